"""Where ids are joined that vary along several axes."""

from __future__ import annotations

import numpy as np
import pytest
from topologies import TOPOLOGIES
from topologies_attention import Attention

from hap_onnx.coupling import channels as channels_module
from hap_onnx.coupling.merging import Choice, count_left, varies
from tools.surgery_oracle import Case


def test_the_finer_axis_is_the_default() -> None:
    assert Choice().pick("n", {0: 12, 1: 64}) == 1
    assert Choice().pick("n", {0: 8, 1: 8}) == 0
    assert Choice(axes={"n": 0}).pick("n", {0: 12, 1: 64}) == 0
    assert Choice(axes={"n": 2}).pick("n", {0: 12, 1: 64}) == 1  # no such axis here


def test_an_aim_is_met_exactly_or_by_multiples() -> None:
    assert Choice(aim=12).pick("n", {0: 3, 1: 12, 2: 64}) == 1
    assert Choice(aim=12).pick("n", {0: 3, 1: 768}) == 1
    assert Choice(aim=12).pick("n", {0: 24, 1: 48}) == 0
    assert Choice(aim=12).pick("n", {0: 5, 1: 7}) == 1
    equal = {0: 3, 1: 3, 2: 64}
    assert (Choice(aim=3).pick("n", equal), Choice(aim=3, first=True).pick("n", equal)) == (1, 0)
    assert Choice(aim=3).pick("n", {0: 3, 1: 12}) == 0
    assert Choice(aim=3, late=True).pick("n", {0: 3, 1: 12}) == 1
    assert Choice(aim=3, late=True).pick("n", {0: 3, 1: 4}) == 0


def test_elements_left_are_counted_over_joins() -> None:
    ids = np.arange(6).reshape(2, 3)
    assert [count_left(ids, axis) for axis in (0, 1)] == [2, 3]
    assert [varies(ids[:1], axis) for axis in (0, 1)] == [False, True]
    shared = np.array([[1, 2, 3], [3, 4, 5]])  # the first and the last column are joined by 3
    assert [count_left(shared, axis) for axis in (0, 1)] == [1, 2]


@pytest.mark.parametrize(
    "name", ["packed_heads_gather", "heads_in_the_batch_literal", "grouped_queries_expand"]
)
def test_heads_come_before_their_width(name: str) -> None:
    case = Case(TOPOLOGIES[name]().model)
    assert len(case.coupling.groups) == 1
    producers = {axis.initializer: axis.elements for axis in case.coupling.weights if axis.role == "producer"}
    for elements in producers.values():  # each head is whole runs of channels
        width = len(elements) // len(np.flatnonzero(np.diff(elements, prepend=-1)))
        assert width > 1
        assert (elements.reshape(-1, width) == elements[::width, None]).all()


def test_trials_do_not_grow_with_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    n_trials = []
    settle = channels_module._settle

    def count(*arguments):  # type: ignore[no-untyped-def]
        n_trials[-1] += 1
        return settle(*arguments)

    monkeypatch.setattr(channels_module, "_settle", count)
    for depth in (1, 2, 8):
        net = Attention()
        x = "x"
        for _ in range(depth):
            x = net.finish(net.attend(*net.qkv(net.layer_norm(x))), x)
        n_trials.append(0)
        case = Case(net.done(x))
        assert [group.size for group in case.coupling.groups] == [3] * depth
    assert n_trials[0] == n_trials[1] == n_trials[2] < 8


def test_layers_of_different_numbers_of_heads_choose_for_themselves() -> None:
    net = Attention()
    x = "x"
    for n, width in ((3, 4), (2, 6), (6, 2), (4, 4)):
        parts = [net.heads(net.dense(net.layer_norm(x), 12, n * width), n, width) for _ in range(3)]
        x = net.finish(net.attend(*parts), x, width=n * width)
    assert [group.size for group in Case(net.done(x)).coupling.groups] == [3, 2, 6, 4]
