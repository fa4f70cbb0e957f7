"""Reductions against onnxruntime, with axes as attribute and as input."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers import check_node, rand

REDUCTIONS = [
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
]


@pytest.mark.parametrize("op_type", REDUCTIONS)
@pytest.mark.parametrize("axes", [None, [1], [0, -1]])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reduction_equals_onnxruntime(op_type: str, axes: list[int] | None, keepdims: int) -> None:
    x = np.abs(rand(2, 3, 4)) + 0.1
    attributes = {} if axes is None else {"axes": axes}
    check_node(op_type, x, opset=11, keepdims=keepdims, **attributes)
    given = None if axes is None else np.array(axes)
    check_node(op_type, x, given, constants=() if axes is None else (1,), opset=18, keepdims=keepdims)


@pytest.mark.parametrize("op_type", REDUCTIONS)
def test_reduction_of_no_axes_equals_onnxruntime(op_type: str) -> None:
    x = np.abs(rand(2, 3)) + 0.1
    check_node(op_type, x, np.zeros(0, np.int64), constants=(1,), opset=18, noop_with_empty_axes=1)


@pytest.mark.parametrize("op_type", ["ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceMean"])
def test_reduction_of_integers_equals_onnxruntime(op_type: str) -> None:
    check_node(op_type, np.array([[1, 2, 4], [3, -8, 5]], np.int32), np.array([1]), opset=18)


@pytest.mark.parametrize("op_type", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("last", [0, 1])
def test_arg_max_breaks_ties_as_onnxruntime(op_type: str, last: int) -> None:
    x = np.array([[3, 1, 3, 1], [2, 2, 0, 0]], np.float32)
    for axis in (0, 1):
        for keepdims in (0, 1):
            check_node(op_type, x, axis=axis, keepdims=keepdims, select_last_index=last)


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_cum_sum_equals_onnxruntime(exclusive: int, reverse: int) -> None:
    check_node("CumSum", rand(3, 4), np.array(-1), exclusive=exclusive, reverse=reverse)
