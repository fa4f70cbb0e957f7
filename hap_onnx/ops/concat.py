"""Joining and cutting tensors: Concat, Split, Slice, Pad."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hap_onnx.ops.arguments import (
    IntsLike,
    UnitShapes,
    as_floats,
    as_ints,
    normalise_axes,
    normalise_axis,
    together,
)
from hap_onnx.ops.registry import run_op

# --- Concat ---


@run_op("Concat")
def Concat(*operands: Tensor, axis: int, unit: UnitShapes | None = None) -> Tensor:
    """Join tensors along ``axis``; one that is alike for all samples is repeated when the batch grows."""
    if unit is not None and (factor := unit.factor(operands)) not in (None, 1):
        operands = _repeat_constant_operands(operands, factor, unit=unit, axis=axis)
    return torch.cat(together(*operands), axis)


def _repeat_constant_operands(
    operands: tuple[Tensor, ...], factor: int, *, unit: UnitShapes, axis: int
) -> tuple[Tensor, ...]:
    batch_axes = {batch_axis for batch_axis in unit.batch_axes if batch_axis is not None}
    if len(batch_axes) != 1 or batch_axes == {normalise_axis(axis, operands[0].ndim)}:
        return operands
    (batch_axis,) = batch_axes
    repeats = [1] * operands[0].ndim
    repeats[batch_axis] = factor
    return tuple(
        operand.repeat(repeats) if grows is None else operand
        for operand, grows in zip(operands, unit.batch_axes, strict=True)
    )


# --- Split ---


@run_op("Split")
def Split(
    x: Tensor,
    split: IntsLike = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    n_outputs: int = 1,
) -> tuple[Tensor, ...]:
    """Cut x along ``axis`` into the given sizes, or into equal parts of which the last may be smaller."""
    axis = normalise_axis(axis, x.ndim)
    sizes = as_ints(split)
    if split is None:
        width = -(-x.shape[axis] // n_outputs)
        sizes = [width] * (n_outputs - 1) + [x.shape[axis] - width * (n_outputs - 1)]
    return torch.split(x, sizes, axis)


# --- Slice ---


def _slice_axis(x: Tensor, axis: int, start: int, end: int, step: int) -> Tensor:
    size = x.shape[axis]
    clamp = _forward_bounds if step > 0 else _backward_bounds
    start, end = clamp(start, end, size)
    picked = range(start, end, step)
    if len(picked) == 0:
        return x.narrow(axis, 0, 0)
    low, high = min(picked[0], picked[-1]), max(picked[0], picked[-1])
    index = [slice(None)] * x.ndim
    index[axis] = slice(low, high + 1, abs(step))
    part = x[tuple(index)]
    return part if step > 0 else part.flip(axis)


def _forward_bounds(start: int, end: int, size: int) -> tuple[int, int]:
    """Clamp the bounds of a slice; negative ones count from the end."""
    start, end, _ = slice(start, end).indices(size)
    return start, end


def _backward_bounds(start: int, end: int, size: int) -> tuple[int, int]:
    """Clamp the bounds of a backward slice: its end may be -1, one before the first element."""
    start, end = start + size if start < 0 else start, end + size if end < 0 else end
    return min(max(start, -1), size - 1), min(max(end, -1), size - 1)


@run_op("Slice")
def Slice(
    x: Tensor,
    starts: IntsLike = None,
    ends: IntsLike = None,
    axes: IntsLike = None,
    steps: IntsLike = None,
) -> Tensor:
    """Cut a range, possibly backwards, from each of ``axes``: attributes before opset 10, inputs since."""
    first, last = as_ints(starts), as_ints(ends)
    along = normalise_axes(as_ints(axes), x.ndim) if axes is not None else list(range(len(first)))
    strides = as_ints(steps) if steps is not None else [1] * len(first)
    for axis, start, end, step in zip(along, first, last, strides, strict=True):
        x = _slice_axis(x, axis, start, end, step)
    return x


# --- Pad ---


def _source_index(size: int, begin: int, end: int, mode: str) -> Tensor:
    """Return which element of an axis each padded position repeats."""
    index = torch.arange(-begin, size + end)
    if mode == "edge":
        return index.clamp(0, size - 1)
    if mode == "wrap":
        return index.remainder(size)
    if mode != "reflect":
        raise ValueError(f"unknown Pad mode {mode!r}")
    if size == 1:
        return torch.zeros_like(index)
    period = 2 * (size - 1)
    index = index.remainder(period)
    return torch.minimum(index, period - index)


@run_op("Pad")
def Pad(
    x: Tensor,
    pads: IntsLike = None,
    constant_value: Tensor | None = None,
    axes: IntsLike = None,
    *,
    mode: str = "constant",
    value: float = 0.0,
) -> Tensor:
    """Pad (negative amounts crop) around each of ``axes``: attributes before opset 11, inputs since."""
    amounts = as_ints(pads)
    along = normalise_axes(as_ints(axes), x.ndim) if axes is not None else list(range(x.ndim))
    begins, ends = [0] * x.ndim, [0] * x.ndim
    for position, axis in enumerate(along):
        begins[axis], ends[axis] = amounts[position], amounts[position + len(along)]
    if mode == "constant":
        fill = (
            as_floats(constant_value)[0] if constant_value is not None and constant_value.numel() else value
        )
        return _pad_constant(x, begins, ends, fill)
    for axis, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        if begin or end:
            index = _source_index(x.shape[axis], begin, end, mode)
            x = x.index_select(axis, index.to(x.device))
    return x


def _pad_constant(x: Tensor, begins: Sequence[int], ends: Sequence[int], value: float) -> Tensor:
    if not any(begins) and not any(ends):
        return x
    amounts = [amount for pair in zip(reversed(begins), reversed(ends), strict=True) for amount in pair]
    if x.dtype == torch.bool:
        return F.pad(x.to(torch.uint8), amounts, value=value).to(torch.bool)
    return F.pad(x, amounts, value=value)
