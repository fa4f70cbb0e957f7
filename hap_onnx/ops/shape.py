"""Shapes: reading them, changing them, and making tensors from them.

Tensors that carry shapes are int64 on the CPU, so reading one never waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from hap_onnx.ops.arguments import IntsLike, UnitShapes, as_ints, normalise_axes
from hap_onnx.ops.registry import edit_op, flow_op, run_op
from hap_onnx.ops.rules import freeze_other_axis

if TYPE_CHECKING:
    from hap_onnx.coupling.channels import Flow
    from hap_onnx.surgery import Cut

# --- Shape, Size, Constant, ConstantOfShape, Range, EyeLike ---


@run_op("Shape")
def Shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """The sizes of the axes from ``start`` to ``end``."""
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


@run_op("Size")
def Size(x: Tensor) -> Tensor:
    """The number of elements."""
    return torch.tensor(x.numel(), dtype=torch.int64)


@run_op("Constant")
def Constant(
    *,
    value: Tensor | None = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
    value_int: int | None = None,
    value_ints: Sequence[int] | None = None,
) -> Tensor:
    """A tensor written into the graph."""
    if value is not None:
        return value
    if value_float is not None or value_floats is not None:
        return torch.tensor(value_float if value_float is not None else value_floats, dtype=torch.float32)
    if value_int is not None or value_ints is not None:
        return torch.tensor(value_int if value_int is not None else value_ints, dtype=torch.int64)
    raise NotImplementedError("a Constant that holds neither a tensor nor numbers")


@run_op("ConstantOfShape")
def ConstantOfShape(shape: Tensor, *, value: Tensor | None = None) -> Tensor:
    """A tensor of the given shape, filled with one value."""
    if value is None:
        return torch.zeros(as_ints(shape))
    return value.reshape(-1)[0].expand(as_ints(shape))


@run_op("Range")
def Range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """The numbers from ``start`` to before ``limit`` in steps of ``delta``."""
    first, last, step = start.item(), limit.item(), delta.item()
    if not step:
        raise ValueError("the step must not be 0")
    count = max(ceil((last - first) / step), 0)
    return first + torch.arange(count).to(start.dtype) * step


@run_op("EyeLike")
def EyeLike(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """Ones on the k-th diagonal of a matrix like x."""
    from hap_onnx.ops.elementwise import Cast

    rows, columns = x.shape
    on_diagonal = torch.arange(columns)[None, :] == torch.arange(rows)[:, None] + k
    return on_diagonal.to(x.device, x.dtype) if dtype is None else Cast(on_diagonal.to(x.device), to=dtype)


def asks_shape_only(node: gs.Node) -> bool:
    """Say whether a node reads the shape of its input, not its numbers."""
    return node.op in ("Shape", "Size") and (node.domain or "") in ("", "ai.onnx")


@flow_op("Shape", "Size", "Constant", "ConstantOfShape", "Range", "RandomNormalLike", "RandomUniformLike")
def _flow_nothing(node: gs.Node, flow: Flow) -> None:
    """Carry no channels: what is computed from a shape is checked on the result instead."""


# --- Reshape, Flatten, Squeeze, Unsqueeze, Transpose ---


def resolve_shape(shape: Sequence[int], target: Sequence[int], *, allowzero: bool = False) -> list[int]:
    """Replace 0 (copy) and -1 (infer) in a Reshape target for a tensor of ``shape``."""
    sizes = [shape[axis] if size == 0 and not allowzero else size for axis, size in enumerate(target)]
    if -1 in sizes:
        known = prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = prod(shape) // known if known else 0
    return sizes


@run_op("Reshape")
def Reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0, unit: UnitShapes | None = None) -> Tensor:
    """Reshape: 0 copies a size (unless ``allowzero``), -1 infers one."""
    if unit is not None and (factor := unit.factor([x, shape])) not in (None, 1):
        grown = unit.grown_output(factor)
        if grown is not None:
            return x.reshape(grown)
    return x.reshape(resolve_shape(x.shape, as_ints(shape), allowzero=bool(allowzero)))


@run_op("Flatten")
def Flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """A matrix, cut before ``axis``."""
    cut = axis + x.ndim if axis < 0 else axis
    return x.reshape(prod(x.shape[:cut]), prod(x.shape[cut:]))


@run_op("Squeeze")
def Squeeze(x: Tensor, axes: IntsLike = None) -> Tensor:
    """Drop axes of size 1: the given ones, or all."""
    along = (
        normalise_axes(as_ints(axes), x.ndim)
        if axes is not None
        else [i for i, n in enumerate(x.shape) if n == 1]
    )
    for axis in along:
        if x.shape[axis] != 1:
            raise ValueError(f"cannot squeeze axis {axis} of shape {tuple(x.shape)}: its size is not 1")
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in along])


@run_op("Unsqueeze")
def Unsqueeze(x: Tensor, axes: IntsLike = None) -> Tensor:
    """Insert axes of size 1 at the given positions of the result."""
    inserted = as_ints(axes)
    for axis in sorted(normalise_axes(inserted, x.ndim + len(inserted))):
        x = x.unsqueeze(axis)
    return x


@run_op("Transpose")
def Transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Permute axes; reverse them by default."""
    return x.permute(list(perm) if perm is not None else list(reversed(range(x.ndim))))


def _has_no_axes(node: gs.Node) -> bool:
    return "axes" not in node.attrs and (len(node.inputs) < 2 or not node.inputs[1].name)


def _block_of(old: tuple[int, ...], new: tuple[int, ...], axis: int) -> tuple[list[int], list[int]]:
    """Find the smallest run of axes around ``axis`` that a reshape maps to a run of new axes."""
    cuts_old = np.cumprod((1, *old)).tolist()
    cuts_new = np.cumprod((1, *new)).tolist()
    shared = set(cuts_old) & set(cuts_new)
    begin = max(cut for cut in shared if cut <= cuts_old[axis])
    end = min(cut for cut in shared if cut >= cuts_old[axis + 1])
    in_axes = [
        a
        for a in range(len(old))
        if cuts_old[a] >= begin and cuts_old[a + 1] <= end and (old[a] > 1 or a == axis)
    ]
    out_axes = [a for a in range(len(new)) if cuts_new[a] >= begin and cuts_new[a + 1] <= end and new[a] > 1]
    return in_axes, out_axes


@flow_op("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _flow_reshape(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    old, new = flow.shape(node.inputs[0]), flow.shape(node.outputs[0])
    if node.op == "Squeeze" and _has_no_axes(node):
        flow.freeze(found, node, "Squeeze without axes would drop the channel axis when one channel is left")
        return
    if prod(old) == 0:
        flow.freeze(found, node, f"{node.op} of an empty tensor")
        return
    in_axes, out_axes = _block_of(old, new, found.axis)
    if not out_axes:  # the axis of size one vanished
        flow.freeze(found, node, f"{node.op} drops the channel axis")
        return
    # What lies before and after the channels repeats them as they are: it need not be spread out.
    sizes_in, sizes_out = [old[axis] for axis in in_axes], [new[axis] for axis in out_axes]
    place = in_axes.index(found.axis)
    before, after = prod(sizes_in[:place]), prod(sizes_in[place + 1 :])
    before = before if sizes_out[0] % before == 0 else 1
    after = after if (sizes_out[-1] // (before if len(out_axes) == 1 else 1)) % after == 0 else 1
    spread = found.ids.reshape([-1 if axis == found.axis else 1 for axis in in_axes])
    outer = sizes_in[:place] if before == 1 else [1] * place
    inner = sizes_in[place + 1 :] if after == 1 else [1] * (len(in_axes) - place - 1)
    spread = np.broadcast_to(spread, [*outer, len(found.ids), *inner])
    sizes_out[0] //= before
    sizes_out[-1] //= after
    axis, ids = flow.merge(node, spread.reshape(sizes_out))
    ids = np.repeat(ids, after) if axis == len(out_axes) - 1 else ids
    ids = np.tile(ids, before) if axis == 0 else ids
    flow.put(node.outputs[0], out_axes[axis], ids)


@edit_op("Reshape")
def _edit_reshape(node: gs.Node, cut: Cut) -> None:
    if cut.kept(node.outputs[0]) is not None or cut.kept(node.inputs[0]) is not None:
        cut.edit_shape_input(node, 1)


@flow_op("Transpose")
def _flow_transpose(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    ndim = len(flow.shape(node.inputs[0]))
    perm = list(node.attrs.get("perm", range(ndim - 1, -1, -1)))
    flow.put(node.outputs[0], perm.index(found.axis), found.ids)


# --- Expand, Tile ---


@run_op("Expand")
def Expand(x: Tensor, shape: Tensor) -> Tensor:
    """Broadcast x against a shape, both ways."""
    return x.expand(torch.broadcast_shapes(x.shape, tuple(as_ints(shape))))


@run_op("Tile")
def Tile(x: Tensor, repeats: Tensor) -> Tensor:
    """Repeat x along each axis."""
    return x.repeat(as_ints(repeats))


@flow_op("Expand")
def _flow_expand(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    shape, out = flow.shape(node.inputs[0]), flow.shape(node.outputs[0])
    axis = found.axis + len(out) - len(shape)
    if out[axis] != len(found.ids):
        flow.freeze(found, node, "Expand spreads one channel over several")
        return
    flow.put(node.outputs[0], axis, found.ids)


@edit_op("Expand")
def _edit_expand(node: gs.Node, cut: Cut) -> None:
    if cut.kept(node.outputs[0]) is not None:
        cut.edit_shape_input(node, 1, ones_stay=True)


@flow_op("Tile")
def _flow_tile(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    repeats = flow.shape(node.outputs[0])[found.axis] // len(found.ids)
    flow.put(node.outputs[0], found.axis, np.tile(found.ids, repeats))


# --- DepthToSpace, SpaceToDepth ---


@run_op("DepthToSpace")
def DepthToSpace(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Move channels of x [N, C, H, W] into blocks of space, depth first (DCR) or column first (CRD)."""
    n, c, h, w = x.shape
    b, depth = blocksize, c // blocksize**2
    if mode == "DCR":
        y = x.reshape(n, b, b, depth, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, depth, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(n, depth, h * b, w * b)


@run_op("SpaceToDepth")
def SpaceToDepth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Move blocks of space of x [N, C, H, W] into channels: the inverse of DepthToSpace."""
    n, c, h, w = x.shape
    b = blocksize
    y = x.reshape(n, c, h // b, b, w // b, b)
    y = y.permute(0, 3, 5, 1, 2, 4) if mode == "DCR" else y.permute(0, 1, 3, 5, 2, 4)
    return y.reshape(n, c * b * b, h // b, w // b)


@flow_op("DepthToSpace")
def _flow_depth_to_space(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None or freeze_other_axis(node, flow, node.inputs[0], 1):
        return
    n_blocks = int(node.attrs["blocksize"]) ** 2
    crd = node.attrs.get("mode", "DCR") == "CRD"
    rows = found.ids.reshape(-1, n_blocks) if crd else found.ids.reshape(n_blocks, -1).T  # [C_out, blocks]
    flow.put(node.outputs[0], 1, flow.join_rows(rows))


@flow_op("SpaceToDepth")
def _flow_space_to_depth(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None or freeze_other_axis(node, flow, node.inputs[0], 1):
        return
    flow.put(node.outputs[0], 1, np.tile(found.ids, int(node.attrs["blocksize"]) ** 2))


# --- Trilu ---


@run_op("Trilu")
def Trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    """Keep the upper or lower triangle of the last two axes."""
    diagonal = int(k) if k is not None else 0
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


@flow_op("Trilu")
def _flow_trilu(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    if found.axis >= len(flow.shape(node.inputs[0])) - 2:
        flow.freeze(found, node, "Trilu tells the positions of channels apart")
        return
    flow.put(node.outputs[0], found.axis, found.ids)
