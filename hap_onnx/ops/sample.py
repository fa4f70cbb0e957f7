"""Images read and written at computed positions: GridSample, RoiAlign, DeformConv, Col2Im, MaxUnpool.

Torch's own grid_sample cannot be differentiated twice, so sampling is written with gathers here: N samples,
C channels, P points; the value at a point is a sum over its neighbours (*taps*) along each axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, prod

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from torch import Tensor

from hap_onnx.ops.arguments import IntsLike, as_ints, together
from hap_onnx.ops.registry import learn_inputs, macs_op, run_op
from hap_onnx.ops.window import pad_spatial, per_axis, split_pads

learn_inputs("DeformConv", inputs=(1, 3))

# --- Sampling at any points ---


def _reflect(x: Tensor, low: float, high: float) -> Tensor:
    """Mirror coordinates at both bounds until they lie between them."""
    span = high - low
    if span <= 0:
        return torch.full_like(x, low)
    position = torch.remainder(x - low, 2 * span)
    return low + torch.where(position > span, 2 * span - position, position)


def _place(x: Tensor, size: int, padding: str, align_corners: bool) -> Tensor:
    """Bring coordinates, or indices, of one axis into the image, if the padding says so."""
    if padding == "border":
        return x.clamp(0, size - 1)
    if padding == "reflection":
        low, high = (0.0, size - 1.0) if align_corners else (-0.5, size - 0.5)
        return torch.where((x < low) | (x > high), _reflect(x, low, high), x)
    return x


def _cubic_weights(fraction: Tensor) -> list[Tensor]:
    """Weights of the four neighbours of a point that lies ``fraction`` behind the second (a = -0.75)."""
    a = -0.75

    def near(t: Tensor) -> Tensor:
        return ((a + 2) * t - (a + 3)) * t * t + 1

    def far(t: Tensor) -> Tensor:
        return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a

    return [far(fraction + 1), near(fraction), near(1 - fraction), far(2 - fraction)]


def _taps(x: Tensor, mode: str) -> list[tuple[Tensor, Tensor]]:
    """Return (index, weight) of each neighbour of the coordinates ``x``; indices are whole floats."""
    if mode == "nearest":
        return [(torch.round(x), torch.ones_like(x))]
    base = torch.floor(x)
    fraction = x - base
    if mode == "linear":
        return [(base, 1 - fraction), (base + 1, fraction)]
    weights = _cubic_weights(fraction)
    return [(base + shift, weight) for shift, weight in zip((-1, 0, 1, 2), weights, strict=True)]


def sample(
    x: Tensor,
    points: Sequence[Tensor],
    *,
    mode: str = "linear",
    padding: str = "zeros",
    align_corners: bool = True,
) -> Tensor:
    """Interpolate x [N, C, *spatial] at ``points``, in pixels, one [N, P] per spatial axis: [N, C, P]."""
    sizes = x.shape[2:]
    flat = x.flatten(2)
    axes = []
    for coordinates, size in zip(points, sizes, strict=True):
        if mode != "cubic":  # a cubic takes its neighbours where they fall, and only places those
            coordinates = _place(coordinates, size, padding, align_corners)
        taps = []
        for index, weight in _taps(coordinates, mode):
            index = _place(index, size, padding, align_corners)
            inside = (index >= 0) & (index <= size - 1)
            taps.append((index.clamp(0, size - 1).to(torch.int64), torch.where(inside, weight, 0)))
        axes.append(taps)
    total = x.new_zeros(x.shape[0], x.shape[1], points[0].shape[1])
    for neighbours in product(*axes):
        position, factor = torch.zeros_like(neighbours[0][0]), torch.ones_like(neighbours[0][1])
        for (index, weight), size in zip(neighbours, sizes, strict=True):
            position, factor = position * size + index, factor * weight
        values = flat.gather(2, position[:, None].expand(-1, x.shape[1], -1))
        total = total + values * factor[:, None]
    return total


# --- GridSample, AffineGrid ---

_MODES = {"bilinear": "linear", "bicubic": "cubic"}  # what opset 16 called them


@run_op("GridSample", since=16)
def GridSample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    """Interpolate x [N, C, *spatial] at the points of ``grid`` [N, *out, ndim], -1 to 1, last axis first."""
    x, grid = together(x, grid)
    sizes, out_sizes = x.shape[2:], grid.shape[1:-1]
    points = []
    for axis, size in enumerate(sizes):
        position = grid[..., len(sizes) - 1 - axis].flatten(1)  # [N, P]
        if align_corners:
            points.append((position + 1) / 2 * (size - 1))
        else:
            points.append(((position + 1) * size - 1) / 2)
    y = sample(
        x, points, mode=_MODES.get(mode, mode), padding=padding_mode, align_corners=bool(align_corners)
    )
    return y.reshape(*x.shape[:2], *out_sizes)


@run_op("AffineGrid", since=20)
def AffineGrid(theta: Tensor, size: IntsLike, *, align_corners: int = 0) -> Tensor:
    """Map a regular grid of ``size`` [N, C, *spatial] by theta [N, ndim, ndim + 1]: [N, *spatial, ndim]."""
    sizes = as_ints(size)[2:]
    positions = []
    for n in sizes:
        steps = torch.arange(n, dtype=theta.dtype, device=theta.device)
        if not align_corners:
            positions.append((steps * 2 + 1) / n - 1)
        else:  # a single point lies at the end: so onnxruntime does
            positions.append(steps * 2 / (n - 1) - 1 if n > 1 else steps + 1)
    mesh = torch.meshgrid(*positions, indexing="ij")
    points = torch.stack([*reversed(mesh), torch.ones_like(mesh[0])], -1)  # [*spatial, ndim + 1]
    moved = points.reshape(1, -1, points.shape[-1]) @ theta.transpose(1, 2)
    return moved.reshape(theta.shape[0], *sizes, len(sizes))


# --- RoiAlign ---


def _bin_taps(
    start: Tensor, extent: Tensor, *, n_bins: int, size: int, ratio: int
) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Return (index, weight) of both neighbours of all points of one axis, and how many points a bin has."""
    n_points = ratio if ratio > 0 else ceil(float(extent) / n_bins)
    steps = torch.arange(n_bins * n_points, device=start.device, dtype=start.dtype)
    place = start + (steps + 0.5) * (extent / (n_bins * max(n_points, 1)))
    inside = (place >= -1) & (place <= size)
    taps = _taps(place.clamp(0, size - 1), "linear")
    return [
        (index.clamp(max=size - 1).to(torch.int64), torch.where(inside, weight, 0)) for index, weight in taps
    ], n_points


@dataclass(frozen=True)
class _RoiRule:
    """How regions are pooled; ``half_pixel``: coordinates count pixel centres, not corners."""

    half_pixel: bool
    mode: str
    size: tuple[int, int]
    sampling_ratio: int
    spatial_scale: float


def _pool_roi(x: Tensor, roi: Tensor, rule: _RoiRule) -> Tensor:
    """Pool one region (left, top, right, bottom) of x [C, H, W]."""
    left, top, right, bottom = roi * rule.spatial_scale - (0.5 if rule.half_pixel else 0.0)
    extents = [bottom - top, right - left]
    if not rule.half_pixel:
        extents = [extent.clamp(min=1) for extent in extents]
    rows, n_rows = _bin_taps(top, extents[0], n_bins=rule.size[0], size=x.shape[1], ratio=rule.sampling_ratio)
    columns, n_columns = _bin_taps(
        left, extents[1], n_bins=rule.size[1], size=x.shape[2], ratio=rule.sampling_ratio
    )
    if n_rows * n_columns == 0:
        return x.new_zeros(x.shape[0], *rule.size)
    corners = [
        x[:, i][:, :, j] * (row_weight[:, None] * column_weight)
        for (i, row_weight), (j, column_weight) in product(rows, columns)
    ]
    stacked = torch.stack(corners, -1).reshape(
        x.shape[0], rule.size[0], n_rows, rule.size[1], n_columns, len(corners)
    )
    if rule.mode == "max":  # of the weighted neighbours, not of the interpolated points: so onnxruntime does
        return stacked.amax((2, 4, 5))
    return stacked.sum((2, 4, 5)) / (n_rows * n_columns)


def _roi_align(x: Tensor, rois: Tensor, batch_indices: Tensor, rule: _RoiRule) -> Tensor:
    x, rois = together(x, rois)
    pooled = [_pool_roi(x[index], roi, rule) for roi, index in zip(rois, as_ints(batch_indices), strict=True)]
    return torch.stack(pooled) if pooled else x.new_zeros(0, x.shape[1], *rule.size)


@run_op("RoiAlign", since=10)
def RoiAlign_10(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    *,
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Pool regions of x [N, C, H, W] to a fixed size; coordinates count pixel corners."""
    rule = _RoiRule(False, mode, (output_height, output_width), sampling_ratio, spatial_scale)
    return _roi_align(x, rois, batch_indices, rule)


@run_op("RoiAlign", since=16)
def RoiAlign(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Pool regions of x [N, C, H, W] to a fixed size: interpolated points in each bin."""
    half_pixel = coordinate_transformation_mode == "half_pixel"
    rule = _RoiRule(half_pixel, mode, (output_height, output_width), sampling_ratio, spatial_scale)
    return _roi_align(x, rois, batch_indices, rule)


# --- DeformConv ---


@run_op("DeformConv", since=19)
def DeformConv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    offset_group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Convolve x [N, C, *spatial] where each tap reads ``offset`` away from its place, times ``mask``.

    offset is [N, offset_group * taps * ndim, *out], mask [N, offset_group * taps, *out].
    """
    n, channels = x.shape[:2]
    kernel, out_sizes = weight.shape[2:], offset.shape[2:]
    n_axes, n_taps = len(kernel), prod(kernel)
    strides, dilations = per_axis(strides, 1, n_axes), per_axis(dilations, 1, n_axes)
    begins, _ = split_pads(pads, n_axes)
    moved = offset.reshape(n * offset_group, *kernel, n_axes, *out_sizes)
    points = []
    for axis in range(n_axes):
        taps = torch.arange(kernel[axis], device=x.device) * dilations[axis] - begins[axis]
        places = torch.arange(out_sizes[axis], device=x.device) * strides[axis]
        taps = taps.reshape([-1 if a == axis else 1 for a in range(n_axes)] + [1] * n_axes)
        places = places.reshape([-1 if a == axis else 1 for a in range(n_axes)])
        points.append((moved.select(1 + n_axes, axis) + (taps + places)).flatten(1))
    values = sample(x.reshape(n * offset_group, channels // offset_group, *x.shape[2:]), points)
    if mask is not None:
        values = values * mask.reshape(n * offset_group, 1, -1)
    columns = values.reshape(n, group, channels // group * n_taps, prod(out_sizes))
    y = weight.reshape(group, weight.shape[0] // group, -1) @ columns  # [N, group, M / group, P]
    y = y.reshape(n, weight.shape[0], *out_sizes)
    return y if bias is None else y + bias.reshape(-1, *[1] * n_axes)


@macs_op("DeformConv")
def _macs_deform_conv(
    node: gs.Node, input_shapes: list[tuple[int, ...] | None], output_shapes: list[tuple[int, ...]]
) -> int:
    weight = input_shapes[1]
    assert weight is not None
    return prod(output_shapes[0]) * prod(weight[1:])


# --- Col2Im, MaxUnpool ---


@run_op("Col2Im", since=18)
def Col2Im(
    x: Tensor,
    image_shape: IntsLike,
    block_shape: IntsLike,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Add blocks x [N, C * taps, blocks] up to images [N, C, *image_shape]."""
    image, block = as_ints(image_shape), as_ints(block_shape)
    n_axes = len(image)
    strides, dilations = per_axis(strides, 1, n_axes), per_axis(dilations, 1, n_axes)
    begins, ends = split_pads(pads, n_axes)
    padded = [size + begin + end for size, begin, end in zip(image, begins, ends, strict=True)]
    index = torch.zeros(1, 1, dtype=torch.int64, device=x.device)  # [taps, blocks]
    for size, width, stride, dilation in zip(padded, block, strides, dilations, strict=True):
        count = (size - dilation * (width - 1) - 1) // stride + 1
        taps = torch.arange(width, device=x.device) * dilation
        places = taps[:, None] + torch.arange(count, device=x.device) * stride
        index = index[:, None, :, None] * size + places[None, :, None, :]
        index = index.flatten(0, 1).flatten(1)
    columns = x.reshape(x.shape[0], -1, index.numel())
    total = columns.new_zeros(*columns.shape[:2], prod(padded)).index_add(2, index.flatten(), columns)
    total = total.reshape(*columns.shape[:2], *padded)
    return pad_spatial(total, [-begin for begin in begins], [-end for end in ends])


@run_op("MaxUnpool")
def MaxUnpool(
    x: Tensor,
    indices: Tensor,
    output_shape: IntsLike = None,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Put each value of x [N, C, *spatial] at its flat index into an output of zeros."""
    n_axes = len(kernel_shape)
    begins, ends = split_pads(pads, n_axes)
    shape = as_ints(output_shape) or [
        *x.shape[:2],
        *(
            (size - 1) * stride + width - begin - end
            for size, stride, width, begin, end in zip(
                x.shape[2:], per_axis(strides, 1, n_axes), kernel_shape, begins, ends, strict=True
            )
        ),
    ]
    x, indices = together(x, indices)
    return x.new_zeros(prod(shape)).scatter(0, indices.flatten(), x.flatten()).reshape(shape)


# --- CenterCropPad ---


@run_op("CenterCropPad", since=18)
def CenterCropPad(x: Tensor, shape: IntsLike, *, axes: Sequence[int] | None = None) -> Tensor:
    """Cut or fill with zeros, on both sides alike, until the axes have the sizes of ``shape``."""
    along = [axis % x.ndim for axis in axes] if axes is not None else list(range(x.ndim))
    amounts = [[0, 0] for _ in range(x.ndim)]
    for axis, wanted in zip(along, as_ints(shape), strict=True):
        missing = wanted - x.shape[axis]
        before = missing // 2 if missing > 0 else -(-missing // 2)
        amounts[axis] = [before, missing - before]
    return F.pad(x, [amount for pair in reversed(amounts) for amount in pair])
