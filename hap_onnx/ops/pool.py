"""Pooling."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from torch import Tensor

from hap_onnx.ops.registry import flow_op, run_op
from hap_onnx.ops.window import n_windows, pad_spatial, per_axis, resolve_pads, window_sum

if TYPE_CHECKING:
    from hap_onnx.coupling.channels import Flow

_MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVG_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _place_windows(
    x: Tensor,
    kernel: Sequence[int],
    *,
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
    ceil_mode: bool,
) -> tuple[list[int], list[int], list[int]]:
    """Return padding (begins, ends) and how far beyond it the last windows reach."""
    sizes = x.shape[2:]
    if not 1 <= len(sizes) <= 3 or len(kernel) != len(sizes):
        raise NotImplementedError(f"pooling of {len(kernel)} axes over {len(sizes)} spatial axes")
    begins, ends = resolve_pads(sizes, kernel, strides, dilations, pads=pads, auto_pad=auto_pad)
    beyond = []
    for size, begin, end, width, stride, dilation in zip(
        sizes, begins, ends, kernel, strides, dilations, strict=True
    ):
        count = n_windows(
            size, begin, end, width=width, stride=stride, dilation=dilation, ceil_mode=ceil_mode
        )
        reach = (count - 1) * stride + dilation * (width - 1) + 1
        beyond.append(max(reach - (size + begin + end), 0))
    return begins, ends, beyond


def _add(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [x + y for x, y in zip(a, b, strict=True)]


# --- MaxPool ---


@run_op("MaxPool")
def MaxPool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
    n_outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """The maximum of windows of x [N, C, *spatial]; a second output holds flat indices into x."""
    n_axes = len(kernel_shape)
    strides, dilations = per_axis(strides, 1, n_axes), per_axis(dilations, 1, n_axes)
    begins, ends, beyond = _place_windows(
        x, kernel_shape, strides=strides, dilations=dilations, pads=pads, auto_pad=auto_pad,
        ceil_mode=bool(ceil_mode),
    )  # fmt: skip
    if not x.is_floating_point():
        if n_outputs > 1 or x.dtype not in (torch.int8, torch.uint8):
            raise NotImplementedError(f"MaxPool of {x.dtype}")
        pooled = MaxPool(
            x.to(torch.float32), kernel_shape=kernel_shape, auto_pad=auto_pad, ceil_mode=ceil_mode,
            dilations=dilations, pads=pads, strides=strides,
        )  # fmt: skip
        assert isinstance(pooled, Tensor)
        return pooled.to(x.dtype)
    padded = pad_spatial(x, begins, _add(ends, beyond), value=float("-inf"))
    pool = _MAX_POOL[n_axes - 1]
    if n_outputs == 1:
        return pool(padded, list(kernel_shape), strides, 0, dilations)
    y, index = pool(padded, list(kernel_shape), strides, 0, dilations, return_indices=True)
    return y, _index_in_input(index, tuple(padded.shape[2:]), begins, x, storage_order=storage_order)


def _index_in_input(
    index: Tensor, padded_sizes: tuple[int, ...], begins: Sequence[int], x: Tensor, *, storage_order: int
) -> Tensor:
    """Turn indices into padded planes into indices into the whole of x [N, C, *spatial]."""
    sizes = list(x.shape[2:])
    coordinates = []
    for size, begin in zip(reversed(padded_sizes), reversed(begins), strict=True):
        coordinates.append(index % size - begin)
        index = index // size
    coordinates.reverse()
    axes = range(len(sizes)) if storage_order == 0 else reversed(range(len(sizes)))
    flat = torch.zeros_like(coordinates[0])
    for axis in axes:
        flat = flat * sizes[axis] + coordinates[axis]
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device) * prod(sizes)
    return flat + planes.reshape(x.shape[0], x.shape[1], *[1] * len(sizes))


# --- AveragePool, LpPool ---


@run_op("AveragePool")
def AveragePool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The mean of windows of x [N, C, *spatial], over padding too if ``count_include_pad``."""
    n_axes = len(kernel_shape)
    strides, dilations = per_axis(strides, 1, n_axes), per_axis(dilations, 1, n_axes)
    begins, ends, beyond = _place_windows(
        x, kernel_shape, strides=strides, dilations=dilations, pads=pads, auto_pad=auto_pad,
        ceil_mode=bool(ceil_mode),
    )  # fmt: skip
    padded = pad_spatial(x, begins, _add(ends, beyond))
    whole = not any(beyond) and (bool(count_include_pad) or not (any(begins) or any(ends)))
    if whole and set(dilations) == {1}:
        return _AVG_POOL[n_axes - 1](padded, list(kernel_shape), strides)
    total = window_sum(padded, kernel_shape, strides, dilations)
    if whole:
        return total / prod(kernel_shape)
    counted = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    counted = pad_spatial(counted, begins, ends, value=1.0 if count_include_pad else 0.0)
    counted = pad_spatial(counted, [0] * n_axes, beyond)
    return total / window_sum(counted, kernel_shape, strides, dilations)


@run_op("LpPool")
def LpPool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    p: int = 2,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The p-norm of windows of x [N, C, *spatial]."""
    n_axes = len(kernel_shape)
    strides, dilations = per_axis(strides, 1, n_axes), per_axis(dilations, 1, n_axes)
    begins, ends, beyond = _place_windows(
        x, kernel_shape, strides=strides, dilations=dilations, pads=pads, auto_pad=auto_pad,
        ceil_mode=bool(ceil_mode),
    )  # fmt: skip
    padded = pad_spatial(x, begins, _add(ends, beyond))
    return window_sum(padded.abs() ** p, kernel_shape, strides, dilations) ** (1 / p)


# --- Global pooling ---


@run_op("GlobalAveragePool")
def GlobalAveragePool(x: Tensor) -> Tensor:
    """The mean over all positions of x [N, C, *spatial]."""
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@run_op("GlobalMaxPool")
def GlobalMaxPool(x: Tensor) -> Tensor:
    """The maximum over all positions of x [N, C, *spatial]."""
    return x.amax(list(range(2, x.ndim)), keepdim=True)


@run_op("GlobalLpPool")
def GlobalLpPool(x: Tensor, *, p: int = 2) -> Tensor:
    """The p-norm over all positions of x [N, C, *spatial]."""
    return (x.abs() ** p).sum(list(range(2, x.ndim)), keepdim=True) ** (1 / p)


# --- How channels pass ---


@flow_op("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _flow_pool(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    if found.axis > 1:
        flow.freeze(found, node, f"{node.op} mixes positions of axis {found.axis}")
        return
    if len(node.outputs) > 1 and node.outputs[1].name:
        flow.freeze(found, node, "its second output counts positions across channels")
        return
    flow.put(node.outputs[0], found.axis, found.ids)
