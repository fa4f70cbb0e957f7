"""Reductions along axes."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from hap_onnx.ops.arguments import IntsLike, as_int, as_ints, is_float, normalise_axes, normalise_axis
from hap_onnx.ops.norm import first_max
from hap_onnx.ops.registry import flow_op, run_op
from hap_onnx.ops.rules import read_ints

if TYPE_CHECKING:
    from hap_onnx.coupling.channels import Flow

# --- ReduceSum, ReduceMean, ReduceMax and relatives ---


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if is_float(x):
        return x.mean(axes, keep)
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return torch.div(x.sum(axes, keep), count, rounding_mode="trunc").to(x.dtype)


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keep, dtype=x.dtype)
    return x


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keep, dtype=x.dtype)


def _extreme(function: Callable[..., Tensor]) -> Callable[[Tensor, list[int], bool], Tensor]:
    def run(x: Tensor, axes: list[int], keep: bool) -> Tensor:
        if x.numel() == 0:
            return torch.full_like(x.sum(axes, keep, dtype=x.dtype), _of_nothing(function, x.dtype))
        if x.dtype == torch.bool:
            return function(x.to(torch.uint8), axes, keep).to(torch.bool)
        return function(x, axes, keep)

    return run


def _of_nothing(function: Callable[..., Tensor], dtype: torch.dtype) -> float:
    """The maximum (or minimum) of no elements: the least (or greatest) number of the type."""
    if dtype == torch.bool:
        return function is torch.amin
    if dtype.is_floating_point:
        return inf if function is torch.amin else -inf
    return torch.iinfo(dtype).max if function is torch.amin else torch.iinfo(dtype).min


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceL1": lambda x, axes, keep: _sum(x.abs(), axes, keep),
    "ReduceL2": lambda x, axes, keep: _sum(x * x, axes, keep).sqrt(),
    "ReduceLogSum": lambda x, axes, keep: _sum(x, axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
    "ReduceMax": _extreme(torch.amax),
    "ReduceMean": _mean,
    "ReduceMin": _extreme(torch.amin),
    "ReduceProd": _prod,
    "ReduceSum": _sum,
    "ReduceSumSquare": lambda x, axes, keep: _sum(x * x, axes, keep),
}

# What the operator does to single elements when there is no axis to reduce.
_ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "ReduceL1": torch.abs,
    "ReduceL2": torch.abs,
    "ReduceLogSum": torch.log,
    "ReduceSumSquare": torch.square,
}


def _make_reduction(op_type: str) -> Callable[..., Tensor]:
    function, on_elements = _REDUCTIONS[op_type], _ELEMENTWISE.get(op_type)

    def reduce(
        x: Tensor, axes: IntsLike = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Tensor:
        over = normalise_axes(as_ints(axes), x.ndim)
        if not over and (noop_with_empty_axes or x.ndim == 0):
            return on_elements(x) if on_elements else x
        return function(x, over or list(range(x.ndim)), keepdims == 1)  # no other number is true

    reduce.__name__ = reduce.__qualname__ = op_type
    return reduce


for _op_type in _REDUCTIONS:
    run_op(_op_type)(_make_reduction(_op_type))


@flow_op(*_REDUCTIONS)
def _flow_reduce(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    ndim = len(flow.shape(node.inputs[0]))
    axes = read_ints(node, 1, "axes")
    if axes is None:
        flow.freeze(found, node, f"{node.op} over axes that are computed")
        return
    if not axes and int(node.attrs.get("noop_with_empty_axes", 0)):
        flow.put(node.outputs[0], found.axis, found.ids)
        return
    reduced = {axis % ndim for axis in axes} or set(range(ndim))
    if found.axis in reduced:
        flow.freeze(found, node, f"{node.op} runs over the channels")
        return
    keepdims = node.attrs.get("keepdims", 1) == 1
    axis = found.axis if keepdims else found.axis - sum(a < found.axis for a in reduced)
    flow.put(node.outputs[0], axis, found.ids)


# --- ArgMax, ArgMin ---


@run_op("ArgMax")
def ArgMax(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """The index of the maximum along ``axis``: of equals the first, or the last if asked."""
    axis = normalise_axis(axis, x.ndim)
    index = first_max(x.flip(axis) if select_last_index else x, axis)
    if select_last_index:
        index = x.shape[axis] - 1 - index
    return index if keepdims == 1 else index.squeeze(axis)


@run_op("ArgMin")
def ArgMin(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """The index of the minimum along ``axis``: of equals the first, or the last if asked."""
    mirrored = -x if is_float(x) else -x.to(torch.int64)
    return ArgMax(mirrored, axis=axis, keepdims=keepdims, select_last_index=select_last_index)


@flow_op("ArgMax", "ArgMin")
def _flow_arg(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    axis = int(node.attrs.get("axis", 0)) % len(flow.shape(node.inputs[0]))
    if found.axis == axis:
        flow.freeze(found, node, f"{node.op} counts positions of the channel axis")
        return
    keepdims = node.attrs.get("keepdims", 1) == 1
    flow.put(node.outputs[0], found.axis - int(not keepdims and axis < found.axis), found.ids)


# --- CumSum, CumProd ---


def _accumulate(
    x: Tensor, axis: Tensor, function: Callable[..., Tensor], *, start: float, exclusive: int, reverse: int
) -> Tensor:
    along = normalise_axis(as_int(axis), x.ndim)
    if reverse:
        x = x.flip(along)
    total = function(x, along, dtype=x.dtype)
    if exclusive:
        first = torch.full_like(total.narrow(along, 0, 1), start)
        total = torch.cat([first, total.narrow(along, 0, x.shape[along] - 1)], along)
    return total.flip(along) if reverse else total


@run_op("CumSum")
def CumSum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Running sums along ``axis``, without the element itself if exclusive, from the end if reverse."""
    return _accumulate(x, axis, torch.cumsum, start=0, exclusive=exclusive, reverse=reverse)


@flow_op("CumSum")
def _flow_cumsum(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    axis = read_ints(node, 1, "axis")
    if axis is None or axis[0] % len(flow.shape(node.inputs[0])) == found.axis:
        flow.freeze(found, node, "CumSum adds up channels, or along an axis that is computed")
        return
    flow.put(node.outputs[0], found.axis, found.ids)


@run_op("CumProd", since=26)
def CumProd(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Running products along ``axis``, without the element itself if exclusive, from the end if reverse."""
    return _accumulate(x, axis, torch.cumprod, start=1, exclusive=exclusive, reverse=reverse)
