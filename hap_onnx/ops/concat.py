"""Joining and cutting tensors: Concat, Split, Slice, Pad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
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
from hap_onnx.ops.registry import edit_op, flow_op, run_op
from hap_onnx.ops.rules import ReadInts, read_ints

if TYPE_CHECKING:
    from hap_onnx.coupling.channels import Flow
    from hap_onnx.surgery import Cut

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


def is_concat(node: gs.Node) -> bool:
    """Say whether a node joins tensors."""
    return node.op == "Concat" and (node.domain or "") in ("", "ai.onnx")


@flow_op("Concat")
def _flow_concat(node: gs.Node, flow: Flow) -> None:
    ndim = len(flow.shape(node.outputs[0]))
    axis = int(node.attrs["axis"]) % ndim
    found = [flow.ids(tensor) for tensor in node.inputs]
    if all(f is None for f in found):
        return
    axes = {f.axis for f in found if f is not None}
    if len(axes) > 1:
        for f in found:
            flow.freeze(f, node, "Concat of tensors whose channels lie on different axes")
        return
    channel_axis = axes.pop()
    if channel_axis == axis:
        parts = []
        for tensor, f in zip(node.inputs, found, strict=True):
            parts.append(np.zeros(flow.shape(tensor)[axis], np.int64) if f is None else f.ids)
        flow.put(node.outputs[0], axis, np.concatenate(parts))
        return
    first = next(f for f in found if f is not None)
    for tensor, f in zip(node.inputs, found, strict=True):
        if f is None:
            flow.freeze(first, node, f"Concat beside '{tensor.name}', whose channels must stay")
            flow.wish(tensor, len(first.ids))
        else:
            flow.join(first.ids, f.ids)
    flow.put(node.outputs[0], channel_axis, first.ids)


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
        count = num_outputs or n_outputs
        width = -(-x.shape[axis] // count)
        sizes = [width] * (count - 1) + [x.shape[axis] - width * (count - 1)]
    return torch.split(x, sizes, axis)


@flow_op("Split")
def _flow_split(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    axis = int(node.attrs.get("axis", 0)) % len(flow.shape(node.inputs[0]))
    start = 0
    for output in node.outputs:
        if axis == found.axis:
            size = flow.shape(output)[axis]
            flow.put(output, axis, found.ids[start : start + size])
            start += size
        else:
            flow.put(output, found.axis, found.ids)


@edit_op("Split")
def _edit_split(node: gs.Node, cut: Cut) -> None:
    axis = int(node.attrs.get("axis", 0)) % len(cut.shape(node.inputs[0]))
    kept = [cut.kept(output) for output in node.outputs]
    if not any(k is not None and k.axis == axis for k in kept):
        return
    sizes = [
        cut.shape(output)[axis] if k is None else len(k.positions)
        for output, k in zip(node.outputs, kept, strict=True)
    ]
    node.attrs.pop("num_outputs", None)
    cut.set_ints(node, 1, "split", sizes, as_attribute=cut.opset < 13)


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
    """Clamp the bounds of a backward slice: to elements, but its end may be -1, one before the first."""
    start, end = start + size if start < 0 else start, end + size if end < 0 else end
    return min(max(start, 0), size - 1), min(max(end, -1), size - 1)


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


def _slice_bounds(shape: tuple[int, ...], read: ReadInts) -> dict[int, tuple[int, int, int]] | None:
    """Map each sliced axis to its clamped (start, stop, step), or None if any is computed."""
    starts, ends, axes, steps = (
        read(1, "starts"),
        read(2, "ends"),
        read(3, "axes"),
        read(4, "steps"),
    )
    if starts is None or ends is None or axes is None or steps is None:
        return None
    axes = axes or list(range(len(starts)))
    steps = steps or [1] * len(starts)
    result = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= len(shape)
        if step < 0:
            result[axis] = (*_backward_bounds(start, end, shape[axis]), step)
        else:
            result[axis] = (*_forward_bounds(start, end, shape[axis]), step)
    return result


@flow_op("Slice")
def _flow_slice(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    bounds = _slice_bounds(flow.shape(node.inputs[0]), lambda i, name: read_ints(node, i, name))
    if found is None:
        return
    if bounds is None:
        whole = flow.shape(node.outputs[0])[found.axis] == len(found.ids)
        flow.freeze(found, node, f"Slice {'' if whole else 'of the channels '}with computed bounds")
        return
    if found.axis in bounds:
        start, stop, step = bounds[found.axis]
        if step != 1:
            flow.freeze(found, node, "Slice of the channels with a step")
            return
        flow.put(node.outputs[0], found.axis, found.ids[start:stop])
        return
    flow.put(node.outputs[0], found.axis, found.ids)


@edit_op("Slice")
def _edit_slice(node: gs.Node, cut: Cut) -> None:
    kept_in, kept_out = cut.kept(node.inputs[0]), cut.kept(node.outputs[0])
    if kept_in is None:
        return
    axis = kept_in.axis
    bounds = _slice_bounds(cut.shape(node.inputs[0]), lambda i, name: cut.ints(node, i, name))
    if bounds is None or axis not in bounds:
        return
    start, stop, _ = bounds[axis]
    if (start, stop) == (0, cut.shape(node.inputs[0])[axis]):
        new = (0, len(kept_in.positions))
    else:
        new = (int((kept_in.positions < start).sum()), int((kept_in.positions < stop).sum()))
    n_out = cut.shape(node.outputs[0])[axis] if kept_out is None else len(kept_out.positions)
    if new[1] - new[0] != n_out:
        raise AssertionError(f"{node.name}: slice {new} for {n_out} channels")
    starts, ends = cut.ints(node, 1, "starts"), cut.ints(node, 2, "ends")
    axes = cut.ints(node, 3, "axes") or list(range(len(starts or [])))
    assert starts is not None
    assert ends is not None
    index = [a % len(cut.shape(node.inputs[0])) for a in axes].index(axis)
    starts[index], ends[index] = new
    as_attribute = "starts" in node.attrs
    cut.set_ints(node, 1, "starts", starts, as_attribute=as_attribute)
    cut.set_ints(node, 2, "ends", ends, as_attribute=as_attribute)


# --- Pad ---


def _source_index(size: int, begin: int, end: int, mode: str) -> Tensor:
    """Return which element of an axis each padded position repeats."""
    index = torch.arange(-begin, size + end)
    if mode == "edge":
        return index.clamp(0, size - 1)
    if mode == "wrap":
        if begin < 0 or end < 0:
            raise NotImplementedError("onnxruntime wraps before it crops")
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


def _pads(ndim: int, read: ReadInts) -> list[tuple[int, int]] | None:
    """(begin, end) for each axis, or None if the amounts are computed."""
    pads = read(1, "pads")
    axes = read(3, "axes")
    if pads is None or axes is None:
        return None
    axes = [axis % ndim for axis in axes] or list(range(ndim))
    half = len(pads) // 2
    result = [(0, 0)] * ndim
    for axis, begin, end in zip(axes, pads[:half], pads[half:], strict=True):
        result[axis] = (begin, end)
    return result


@flow_op("Pad")
def _flow_pad(node: gs.Node, flow: Flow) -> None:
    x = node.inputs[0]
    found = flow.ids(x)
    pads = _pads(len(flow.shape(x)), lambda i, name: read_ints(node, i, name))
    if found is None:
        return
    if pads is None:
        flow.freeze(found, node, "Pad with computed amounts")
        return
    begin, end = pads[found.axis]
    if begin == end == 0:
        flow.put(node.outputs[0], found.axis, found.ids)
        return
    mode = node.attrs.get("mode", "constant")
    if mode != "constant" or begin < 0 or end < 0:
        flow.freeze(found, node, f"Pad of the channels in mode '{mode}' or by a negative amount")
        return
    ids = np.concatenate([flow.fresh(begin), found.ids, flow.fresh(end)])
    flow.put(node.outputs[0], found.axis, ids)


@edit_op("Pad")
def _edit_pad(node: gs.Node, cut: Cut) -> None:
    kept = cut.kept(node.outputs[0])
    if kept is None:
        return
    ndim = len(cut.shape(node.inputs[0]))
    pads = _pads(ndim, lambda i, name: cut.ints(node, i, name))
    if pads is None or pads[kept.axis] == (0, 0):
        return
    begin, end = pads[kept.axis]
    total = cut.shape(node.outputs[0])[kept.axis]
    new = (int((kept.positions < begin).sum()), int((kept.positions >= total - end).sum()))
    raw = cut.ints(node, 1, "pads")
    assert raw is not None
    axes = [axis % ndim for axis in (cut.ints(node, 3, "axes") or range(ndim))]
    index = axes.index(kept.axis)
    raw[index], raw[index + len(raw) // 2] = new
    cut.set_ints(node, 1, "pads", raw, as_attribute="pads" in node.attrs)
