"""Resampling: Resize and Upsample, one axis after the other.

Along each axis an interpolation is a matrix [out, in] that depends on sizes only, so every mode, coordinate
rule and border rule is exact, differentiable any number of times and deterministic. Nearest picks elements.
Coordinates are computed in float32, as onnxruntime does, since rounding decides which element is nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from hap_onnx.ops.arguments import IntsLike, UnitShapes, as_floats, as_ints, normalise_axes
from hap_onnx.ops.registry import edit_op, flow_op, run_op

if TYPE_CHECKING:
    from hap_onnx.coupling.channels import Flow
    from hap_onnx.surgery import Cut

_f = np.float32


@dataclass(frozen=True)
class _AxisRule:
    """Everything that decides how one axis is resampled."""

    size: int
    out_size: int
    scale: float
    mode: str
    coordinates: str
    nearest: str
    cubic_a: float
    exclude_outside: bool
    antialias: bool
    crop: tuple[float, float] | None

    def source(self) -> np.ndarray:
        """Return where each output position lies on the input axis [out_size], float32."""
        x = np.arange(self.out_size, dtype=_f)
        scale, half = _f(self.scale), _f(0.5)
        last = _f(self.size - 1)
        if self.coordinates == "half_pixel":
            return (x + half) / scale - half
        if self.coordinates == "pytorch_half_pixel":
            return (x + half) / scale - half if self.out_size > 1 else np.zeros(1, _f)
        if self.coordinates == "align_corners":
            return x * last / _f(self.out_size - 1) if self.out_size > 1 else np.zeros(1, _f)
        if self.coordinates == "asymmetric":
            return x / scale
        if self.coordinates == "tf_half_pixel_for_nn":
            return (x + half) / scale
        if self.coordinates == "half_pixel_symmetric":
            adjustment = _f(self.out_size) / (scale * _f(self.size))
            offset = _f(self.size) / _f(2) * (_f(1) - adjustment)
            return offset + (x + half) / scale - half
        if self.coordinates == "tf_crop_and_resize":
            start, end = (_f(bound) for bound in self.crop or (0.0, 1.0))
            if self.out_size == 1:
                return np.array([half * (start + end) * last], _f)
            return start * last + x * (end - start) * last / _f(self.out_size - 1)
        raise ValueError(f"unknown coordinate_transformation_mode {self.coordinates!r}")

    def outside(self) -> np.ndarray:
        """Say which output positions lie beyond the input [out_size]."""
        source = self.source()
        return (source < 0) | (source > self.size - 1)


def _round_half_up(x: np.ndarray) -> np.ndarray:
    return np.floor(x + _f(0.5))


_NEAREST: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "round_prefer_floor": lambda x, scale: np.where(x - np.floor(x) == 0.5, np.floor(x), _round_half_up(x)),
    "round_prefer_ceil": lambda x, scale: _round_half_up(x),
    "floor": lambda x, scale: np.floor(x),
    "ceil": lambda x, scale: np.ceil(x),
    # What onnxruntime does before opset 11, where the specification says nothing.
    "legacy": lambda x, scale: np.ceil(x) if scale < 1 else np.floor(x),
}


@lru_cache(maxsize=64)
def _nearest_index(rule: _AxisRule) -> Tensor:
    """Return the nearest input element of each output position [out_size]."""
    index = _NEAREST[rule.nearest](rule.source(), rule.scale)
    return torch.from_numpy(np.clip(index, 0, rule.size - 1).astype(np.int64))


def _linear_kernel(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(distance), 0)


def _cubic_kernel(distance: np.ndarray, a: float) -> np.ndarray:
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


@lru_cache(maxsize=64)
def _matrix(rule: _AxisRule) -> Tensor:
    """Return the interpolation along one axis as a matrix [out_size, size], float64."""
    source = rule.source().astype(np.float64)
    if rule.mode == "linear" and not rule.antialias:
        source = np.clip(source, 0, rule.size - 1)
    squeeze = min(rule.scale, 1.0) if rule.antialias else 1.0
    radius = (2 if rule.mode == "cubic" else 1) / squeeze
    reach = int(np.ceil(radius))
    taps = np.floor(source).astype(np.int64)[:, None] + np.arange(-reach, reach + 2)  # [out_size, n_taps]
    distance = (taps - source[:, None]) * squeeze
    weights = _cubic_kernel(distance, rule.cubic_a) if rule.mode == "cubic" else _linear_kernel(distance)
    if rule.exclude_outside:
        weights = np.where((taps < 0) | (taps >= rule.size), 0.0, weights)
    if rule.exclude_outside or rule.antialias:
        weights = weights / weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((rule.out_size, rule.size))
    rows = np.broadcast_to(np.arange(rule.out_size)[:, None], taps.shape)
    np.add.at(matrix, (rows, np.clip(taps, 0, rule.size - 1)), weights)
    return torch.from_numpy(matrix)


def _resample(x: Tensor, axis: int, rule: _AxisRule) -> Tensor:
    if rule.mode == "nearest":
        return x.index_select(axis, _nearest_index(rule).to(x.device))
    if not x.is_floating_point():
        raise NotImplementedError(f"Resize in mode {rule.mode} of {x.dtype}")
    matrix = _matrix(rule).to(device=x.device, dtype=x.dtype)
    return (x.movedim(axis, -1) @ matrix.T).movedim(-1, axis)


# --- Resize, Upsample ---


def _target_sizes(sizes: list[int], wanted: list[int], policy: str) -> tuple[list[int], list[float]]:
    """Return output sizes and scales for Resize by ``sizes``."""
    scales = [float(_f(want) / _f(size)) for want, size in zip(wanted, sizes, strict=True)]
    if policy == "stretch":
        return wanted, scales
    scale = min(scales) if policy == "not_larger" else max(scales)
    return [int(np.floor(scale * size + 0.5)) for size in sizes], [scale] * len(sizes)


def _unfix_batch(x: Tensor, along: list[int], wanted: list[int], *, unit: UnitShapes | None) -> list[int]:
    """Let a batch size that was written into ``sizes`` follow the batch."""
    batch_axis = unit.batch_axes[0] if unit is not None else None
    if unit is None or batch_axis not in along:
        return wanted
    old_size = unit.outputs[0][batch_axis]
    return [
        x.shape[axis] if axis == batch_axis and size == old_size else size
        for axis, size in zip(along, wanted, strict=True)
    ]


@run_op("Resize", since=11)
def Resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Any = None,
    sizes: IntsLike = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
    unit: UnitShapes | None = None,
) -> Tensor:
    """Resample the axes of x to ``sizes``, or by ``scales``."""
    along = normalise_axes(axes, x.ndim) if axes is not None else list(range(x.ndim))
    old_sizes = [x.shape[axis] for axis in along]
    factors, wanted = as_floats(scales), as_ints(sizes)
    if wanted:
        wanted = _unfix_batch(x, along, wanted, unit=unit)
        new_sizes, factors = _target_sizes(old_sizes, wanted, keep_aspect_ratio_policy)
    else:
        new_sizes = [int(_f(factor) * _f(size)) for factor, size in zip(factors, old_sizes, strict=True)]
    crop = coordinate_transformation_mode == "tf_crop_and_resize"
    bounds = as_floats(roi) if crop else []
    beyond = torch.zeros([1] * x.ndim, dtype=torch.bool)
    for position, axis in enumerate(along):
        if new_sizes[position] == old_sizes[position] and factors[position] == 1.0 and not crop:
            continue
        rule = _AxisRule(
            size=old_sizes[position],
            out_size=new_sizes[position],
            scale=factors[position],
            mode=mode,
            coordinates=coordinate_transformation_mode,
            nearest=nearest_mode,
            cubic_a=cubic_coeff_a,
            exclude_outside=bool(exclude_outside),
            antialias=bool(antialias) and factors[position] < 1,
            crop=(bounds[position], bounds[position + len(along)]) if crop else None,
        )
        x = _resample(x, axis, rule)
        if crop:
            shape = [1] * x.ndim
            shape[axis] = -1
            beyond = beyond | torch.from_numpy(rule.outside()).reshape(shape)
    return torch.where(beyond.to(x.device), extrapolation_value, x) if crop else x


@run_op("Resize", since=10)
def Resize_10(x: Tensor, scales: Any = None, *, mode: str = "nearest") -> Tensor:
    """Resample the axes of x by ``scales``, with the first element fixed."""
    return Resize(
        x, scales=scales, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="legacy"
    )


@run_op("Upsample")
def Upsample(x: Tensor, scales: Any = None, *, mode: str = "nearest") -> Tensor:
    """The former name of Resize."""
    return Resize_10(x, scales, mode=mode)


@flow_op("Resize", "Upsample")
def _flow_resize(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    if flow.shape(node.outputs[0])[found.axis] != len(found.ids):
        flow.freeze(found, node, f"{node.op} changes the number of channels")
        return
    flow.put(node.outputs[0], found.axis, found.ids)


@edit_op("Resize")
def _edit_resize(node: gs.Node, cut: Cut) -> None:
    kept = cut.kept(node.outputs[0])
    if kept is not None and len(node.inputs) > 3 and node.inputs[3].name and "axes" not in node.attrs:
        cut.edit_shape_input(node, 3)
