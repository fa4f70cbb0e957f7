"""Whose version wrote a file."""

from __future__ import annotations

from typing import Any

import pytest

from hap_onnx.text_files import describe_age


@pytest.mark.parametrize(
    ("found", "age"),
    [
        ("hap-onnx/plan/2", "an older"),
        ("hap-onnx/plan/12", "a newer"),
        ("hap-onnx/plan/" + "9" * 10_000, "a newer"),
        ("hap-onnx/plan/3", None),
        ("hap-onnx/plan/x", None),
        ("hap-onnx/plan/", None),
        ("hap-onnx/latency/2", None),
        ("other", None),
        (None, None),
        (2, None),
        (["hap-onnx/plan/2"], None),
    ],
)
def test_other_versions_are_told_from_other_files(found: Any, age: str | None) -> None:
    said = describe_age(found, "hap-onnx/plan/3")
    assert (said is not None and said.split(" version")[0]) == (age or False)
    assert said is None or len(said) < 200
