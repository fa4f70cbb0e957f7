"""How operator functions read their arguments: the few conventions that all families share.

Many ONNX arguments were an attribute once and are an input now (``axes``, ``pads``, ``split``, ...). An
operator function has one parameter for both: the attribute arrives as a Python value, the input as a
tensor, and :func:`as_ints` reads either.

Tensors that carry shapes and indices live on the CPU, data may live elsewhere: :func:`together` joins them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

IntsLike = Tensor | Sequence[int] | int | None


def as_ints(value: IntsLike) -> list[int]:
    """Return an attribute or a tensor of integers as a list (a scalar as a list of one)."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [int(entry) for entry in value.detach().reshape(-1).tolist()]
    return [int(value)] if isinstance(value, int) else [int(entry) for entry in value]


def as_int(value: IntsLike) -> int:
    """Return an attribute or a tensor of one integer."""
    entries = as_ints(value)
    if len(entries) != 1:
        raise ValueError(f"expected one integer, got {entries}")
    return entries[0]


def as_floats(value: Any) -> list[float]:
    """Return an attribute or a tensor of floats as a list (a scalar as a list of one)."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [float(entry) for entry in value.detach().reshape(-1).tolist()]
    return [float(value)] if isinstance(value, (int, float)) else [float(entry) for entry in value]


def normalise_axis(axis: int, ndim: int) -> int:
    """Return ``axis`` counted from the front; raises IndexError when it is out of range."""
    if not -ndim <= axis < max(ndim, 1):
        raise IndexError(f"axis {axis} is out of range for a tensor of {ndim} dimensions")
    return axis + ndim if axis < 0 else axis


def normalise_axes(axes: Sequence[int], ndim: int) -> list[int]:
    """Return all ``axes`` counted from the front."""
    return [normalise_axis(axis, ndim) for axis in axes]


def together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Move tensors that wait on the CPU to where the others are."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) < 2:
        return tensors
    target = next(device for device in devices if device.type != "cpu")
    return tuple(tensor.to(target) for tensor in tensors)


def is_float(tensor: Tensor) -> bool:
    """Say whether a tensor holds floating-point numbers."""
    return torch.is_floating_point(tensor)
