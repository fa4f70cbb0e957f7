"""Short names: no longer than there is room, and still different."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hap_onnx.report.short_names import shorten


def test_what_all_names_share_goes_first():
    names = ["/net/layer1/conv1/Conv", "/net/layer2/conv1/Conv", "/net/layer2/conv2/Conv"]
    assert shorten(names, 30) == ["layer1/conv1", "layer2/conv1", "layer2/conv2"]
    assert shorten(["/net/Conv"], 30) == ["/net/Conv"]
    assert shorten(["Conv", "/net/Conv"], 30) == ["Conv", "/net/Conv"]
    assert shorten(["a/Conv", "a/Conv"], 30) == ["Conv", "Conv"]


def test_what_is_too_long_loses_its_middle():
    assert shorten(["backbone/stage1/a", "backbone/stage2/b"], 8) == ["stage1/a", "stage2/b"]
    assert shorten(["beginning_of_one", "another_end"], 10) == ["beg…of_one", "ano…er_end"]


def test_names_that_differ_in_the_middle_stay_different():
    """Exporters repeat a layer's name in that of its blocks; on a phone all blocks had the same name."""
    names = [f"/layer{i}/layer{i}.{j}/conv{k}/Conv" for i in (1, 2) for j in range(3) for k in (1, 2)]
    shown = shorten([*names, "/linear/Gemm"], 18)
    assert len(set(shown)) == len(names) + 1
    assert shown[0] == "…yer1.0/conv1/Conv"
    assert shown[-1] == "linear/Gemm"


@given(st.lists(st.text(alphabet="ab/", max_size=30), min_size=1, max_size=5), st.integers(2, 20))
def test_there_is_one_for_each_and_none_is_too_long(names, longest):
    shown = shorten(names, longest)
    assert len(shown) == len(names)
    assert max(map(len, shown)) <= longest
