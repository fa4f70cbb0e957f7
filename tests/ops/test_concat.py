"""Concat, Split, Slice and Pad against onnxruntime, in attribute and input form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hap_onnx.ops.concat import Split
from tests.helpers import check_node, rand

I = np.int64  # noqa: E741


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concat_equals_onnxruntime(axis: int) -> None:
    check_node("Concat", rand(2, 3, 4), rand(2, 3, 4, seed=1), axis=axis)


def test_split_equals_onnxruntime() -> None:
    x = rand(2, 7)
    check_node("Split", x, n_outputs=2, axis=1, split=[3, 4], opset=11)
    check_node("Split", x, np.array([3, 4]), constants=(1,), n_outputs=2, axis=-1)
    check_node("Split", rand(2, 6), n_outputs=3, axis=1)
    check_node("Split", x, n_outputs=3, axis=1, num_outputs=3, opset=18)


@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps"),
    [
        ([1, 0], [4, 3], [0, 2], [1, 1]),
        ([-3], [2**31], [2], [2]),
        ([-1], [-(2**63)], [1], [-1]),
        ([100, 4], [-100, 0], [0, 2], [-2, -3]),
        ([-7, -8], [-99, -8], [1, 2], [-1, -1]),
        ([0], [0], [1], [1]),
        ([3, 1], [1, 5], None, None),
    ],
)
def test_slice_equals_onnxruntime(starts: list, ends: list, axes: list | None, steps: list | None) -> None:
    given = [None if values is None else np.array(values, I) for values in (starts, ends, axes, steps)]
    constants = tuple(position + 1 for position, values in enumerate(given) if values is not None)
    check_node("Slice", rand(5, 6, 7), *given, constants=constants)
    if steps is None or set(steps) == {1}:
        attributes = {"axes": axes} if axes else {}
        check_node("Slice", rand(5, 6, 7), opset=9, starts=starts, ends=ends, **attributes)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize(
    "pads", [[0, 0, 1, 2, 0, 0, 3, 1], [0, 0, -1, 2, 0, 0, 0, -2], [1, 2, 0, 0, 1, 1, 0, 0]]
)
def test_pad_equals_onnxruntime(mode: str, pads: list[int]) -> None:
    x = rand(3, 4, 5, 6)
    opset = 19 if mode == "wrap" else 17
    value = np.float32(1.5) if mode == "constant" else None
    crops = mode == "wrap" and min(pads) < 0  # onnxruntime wraps before it crops, and goes its own way
    check_node("Pad", x, np.array(pads), value, mode=mode, opset=opset, opaque=crops)
    if mode != "wrap":
        check_node("Pad", x, mode=mode, pads=pads, opset=10, **({"value": 0.5} if mode == "constant" else {}))


def test_pad_of_some_axes_equals_onnxruntime() -> None:
    check_node("Pad", rand(3, 4, 5), np.array([1, 2, 3, 0]), None, np.array([2, -3]), opset=18)
    check_node("Pad", rand(3, 4) > 0, np.array([1, 0, 0, 1]))
    check_node("Pad", np.arange(4), np.array([1, 2]), np.array(7))


def test_split_counts_the_parts_that_nobody_reads() -> None:
    first, second = Split(torch.arange(6), num_outputs=3, n_outputs=2)[:2]
    assert (first.tolist(), second.tolist()) == ([0, 1], [2, 3])
