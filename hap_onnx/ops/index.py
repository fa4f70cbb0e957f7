"""Gathering, scattering and finding elements."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from hap_onnx.ops.arguments import as_int, normalise_axis, together
from hap_onnx.ops.registry import edit_op, flow_op, run_op

if TYPE_CHECKING:
    from hap_onnx.coupling.channels import Flow
    from hap_onnx.surgery import Cut


def _from_front(indices: Tensor, size: int) -> Tensor:
    """Count negative indices from the front."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


# --- Gather, GatherElements, GatherND ---


@run_op("Gather")
def Gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Pick whole slices along ``axis``."""
    axis = normalise_axis(axis, x.ndim)
    index = _from_front(indices, x.shape[axis]).to(x.device)
    picked = x.index_select(axis, index.reshape(-1))
    return picked.reshape(x.shape[:axis] + index.shape + x.shape[axis + 1 :])


@run_op("GatherElements")
def GatherElements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Pick single elements along ``axis``."""
    x, indices = together(x, indices)
    return torch.gather(x, axis, _from_front(indices, x.shape[axis]))


def _flat_index(indices: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Turn index tuples (the last axis) into positions in a flattened block of ``sizes``."""
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=indices.device)
    for position, size in enumerate(sizes):
        flat = flat * size + _from_front(indices[..., position], size)
    return flat


@run_op("GatherND")
def GatherND(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Pick slices by index tuples, after ``batch_dims`` axes that run in parallel."""
    x, indices = together(x, indices)
    batch, depth = x.shape[:batch_dims], indices.shape[-1]
    inner = tuple(x.shape[batch_dims : batch_dims + depth])
    rest = x.shape[batch_dims + depth :]
    n_batch = 1
    for size in batch:
        n_batch *= size
    n_inner = 1
    for size in inner:
        n_inner *= size
    flat = _flat_index(indices, inner).reshape(n_batch, -1)  # [n_batch, n_picked]
    offsets = torch.arange(n_batch, device=x.device)[:, None] * n_inner
    picked = x.reshape(n_batch * n_inner, *rest).index_select(0, (flat + offsets).reshape(-1))
    return picked.reshape(indices.shape[:-1] + rest)


@flow_op("Gather")
def _flow_gather(node: gs.Node, flow: Flow) -> None:
    x, indices = node.inputs
    found = flow.ids(x)
    if flow.ids(indices) is not None:
        flow.freeze(flow.ids(indices), node, "channels are used as indices")
    if found is None:
        return
    axis = int(node.attrs.get("axis", 0)) % len(flow.shape(x))
    n_index_axes = len(flow.shape(indices))
    if axis != found.axis:
        flow.put(node.outputs[0], found.axis + (n_index_axes - 1 if axis < found.axis else 0), found.ids)
        return
    if not isinstance(indices, gs.Constant) or n_index_axes != 1:
        flow.freeze(found, node, "Gather of channels by computed indices, or by a single one")
        return
    flow.put(node.outputs[0], axis, found.ids[np.asarray(indices.values)])


@edit_op("Gather")
def _edit_gather(node: gs.Node, cut: Cut) -> None:
    kept_in, kept_out = cut.kept(node.inputs[0]), cut.kept(node.outputs[0])
    axis = int(node.attrs.get("axis", 0)) % len(cut.shape(node.inputs[0]))
    if kept_in is None or kept_in.axis != axis or not isinstance(node.inputs[1], gs.Constant):
        return
    n_channels = cut.shape(node.inputs[0])[axis]
    indices = np.asarray(node.inputs[1].values) % n_channels
    if kept_out is not None:
        indices = indices[kept_out.positions]
    new_position = np.full(n_channels, -1, np.int64)
    new_position[kept_in.positions] = np.arange(len(kept_in.positions))
    cut.set_constant(node, 1, new_position[indices].astype(node.inputs[1].values.dtype))


# --- ScatterElements, Scatter, ScatterND ---

_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@run_op("ScatterElements")
@run_op("Scatter")
def ScatterElements(
    x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    """Write (or add, multiply, ...) single elements along ``axis``."""
    x, indices, updates = together(x, indices, updates.to(x.dtype))
    index = _from_front(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, index, updates)
    if reduction == "add":
        return x.scatter_add(axis, index, updates)
    return x.scatter_reduce(axis, index, updates, _REDUCE[reduction])


@run_op("ScatterND")
def ScatterND(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """Write (or add, multiply, ...) slices at index tuples."""
    x, indices, updates = together(x, indices, updates.to(x.dtype))
    depth = indices.shape[-1]
    inner, rest = tuple(x.shape[:depth]), x.shape[depth:]
    flat = _flat_index(indices, inner).reshape(-1)
    rows = x.reshape(-1, rest.numel()) if inner else x.reshape(1, -1)
    values = updates.reshape(flat.shape[0], rest.numel())
    if reduction == "none":
        out = rows.index_put((flat,), values)
    elif reduction == "add":
        out = rows.index_add(0, flat, values)
    else:
        out = rows.scatter_reduce(0, flat[:, None].expand_as(values), values, _REDUCE[reduction])
    return out.reshape(x.shape)


# --- NonZero, OneHot, TopK, Compress ---


@run_op("NonZero")
def NonZero(x: Tensor) -> Tensor:
    """The indices [ndim, count] of elements that are not zero."""
    return torch.nonzero(x).T


@run_op("OneHot")
def OneHot(indices: Tensor, depth: Tensor, values: Tensor, *, axis: int = -1) -> Tensor:
    """Put the on-value where an index points, the off-value elsewhere, along a new axis."""
    indices, values = together(indices, values)
    count = as_int(depth)
    axis = normalise_axis(axis, indices.ndim + 1)
    shape = [1] * (indices.ndim + 1)
    shape[axis] = count
    positions = torch.arange(count, device=indices.device).reshape(shape)
    wanted = torch.where(indices < 0, indices + count, indices).unsqueeze(axis)
    return torch.where(wanted == positions, values[1], values[0])


@run_op("TopK")
def TopK(
    x: Tensor, k: Tensor | int, *, axis: int = -1, largest: int = 1, sorted: int = 1
) -> tuple[Tensor, Tensor]:
    """The k largest or smallest elements along ``axis``; of equals, the first comes first."""
    values, indices = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    count = as_int(k)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


@run_op("Compress")
def Compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """Keep slices along ``axis`` (of the flattened tensor by default) where the condition holds."""
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, torch.nonzero(condition).reshape(-1).to(x.device))


# --- ReverseSequence, Unique ---


@run_op("ReverseSequence", since=10)
def ReverseSequence(x: Tensor, sequence_lens: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """Reverse, of each sample, only the first ``sequence_lens`` steps."""
    x, lengths = together(x, sequence_lens)
    steps = torch.arange(x.shape[time_axis], device=x.device)[:, None]
    source = torch.where(steps < lengths, lengths - 1 - steps, steps)  # [T, B]
    source = source if time_axis < batch_axis else source.T
    shape = [1] * x.ndim
    shape[time_axis], shape[batch_axis] = x.shape[time_axis], x.shape[batch_axis]
    return x.gather(time_axis, source.reshape(shape).expand_as(x))


@run_op("Unique", since=11)
def Unique(x: Tensor, *, axis: int | None = None, sorted: int = 1, n_outputs: int = 1) -> tuple[Tensor, ...]:
    """Distinct slices along ``axis``, or elements of the flattened x: sorted, or as they first appear.

    Further outputs: where each first appears, which one each slice of x is, and how often each occurs.
    """
    if axis is None:
        x, axis = x.reshape(-1), 0
    _, inverse, counts = torch.unique(x.detach(), dim=axis, return_inverse=True, return_counts=True)
    positions = torch.arange(x.shape[axis], device=x.device)
    first = positions.new_full((len(counts),), x.shape[axis]).scatter_reduce(0, inverse, positions, "amin")
    if not sorted:
        order = torch.argsort(first)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device)
        first, inverse, counts = first[order], rank[inverse], counts[order]
    return (x.index_select(axis, first), first, inverse, counts)[:n_outputs]
