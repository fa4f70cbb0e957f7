"""Reductions against onnxruntime, with axes as attribute and as input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradgradcheck

from hap_onnx.ops.reduce import CumProd, CumSum
from hap_onnx.ops.registry import find_run
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


@pytest.mark.parametrize("op_type", ["ReduceSum", "ArgMax"])
def test_only_a_one_keeps_dimensions_as_in_onnxruntime(op_type: str) -> None:
    attributes = {"axes": [1]} if op_type == "ReduceSum" else {"axis": 1}
    check_node(op_type, rand(2, 3, 4), opset=11, keepdims=7, **attributes)


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


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_cum_prod_is_what_cum_sum_is_for_logarithms(exclusive: int, reverse: int) -> None:
    x, axis = torch.rand(3, 4, dtype=torch.float64) + 0.5, torch.tensor(1)
    flags = {"exclusive": exclusive, "reverse": reverse}
    torch.testing.assert_close(CumProd(x, axis, **flags), CumSum(x.log(), axis, **flags).exp())
    assert gradgradcheck(lambda x: CumProd(x, axis, **flags), (x.requires_grad_(),))


@pytest.mark.parametrize(
    ("op_type", "of_none"), [("ReduceMax", [-np.inf, -128]), ("ReduceMin", [np.inf, 127])]
)
def test_the_extreme_of_no_elements_is_that_of_the_type(op_type: str, of_none: list[float]) -> None:
    reduction = find_run(op_type, opset=18)
    assert reduction is not None
    for dtype, value in zip((torch.float32, torch.int8), of_none, strict=True):
        y = reduction(torch.zeros(2, 0, dtype=dtype), torch.tensor([1]), keepdims=0)
        assert y.dtype == dtype
        assert y.tolist() == [value, value]
    empty = torch.zeros(0, dtype=torch.bool)
    assert bool(reduction(empty)) is (op_type == "ReduceMin")
