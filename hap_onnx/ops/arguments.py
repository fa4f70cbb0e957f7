"""How operator functions read their arguments: the few conventions that all families share.

Many ONNX arguments were an attribute once and are an input now (``axes``, ``pads``, ``split``, ...). An
operator function has one parameter for both: the attribute arrives as a Python value, the input as a
tensor, and :func:`as_ints` reads either.

Tensors that carry shapes and indices live on the CPU, data may live elsewhere: :func:`together` joins them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
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


@dataclass(frozen=True)
class UnitShapes:
    """The shapes that a node sees when the model runs at the batch size that was written into it.

    Exporters write the batch size of the example, usually 1, into shapes that should be dynamic. A function
    that takes ``unit`` reads from it what such a literal should become when the batch has grown.
    """

    inputs: tuple[tuple[int, ...] | None, ...]
    batch_axes: tuple[int | None, ...]  # of each input: the axis that grows with the batch
    outputs: tuple[tuple[int, ...], ...]

    def factor(self, inputs: Sequence[Tensor | None]) -> int | None:
        """Return how many times the written batch the inputs hold, or None if these are not their shapes."""
        factors: set[int] = set()
        for tensor, shape, axis in zip(inputs, self.inputs, self.batch_axes, strict=True):
            if tensor is None or shape is None:
                continue
            if axis is None:
                if tuple(tensor.shape) != shape:
                    return None
                continue
            if tensor.ndim != len(shape) or shape[axis] == 0 or tensor.shape[axis] % shape[axis]:
                return None
            factors.add(tensor.shape[axis] // shape[axis])
            if any(tensor.shape[other] != shape[other] for other in range(len(shape)) if other != axis):
                return None
        return factors.pop() if len(factors) == 1 else None

    def grown_output(self, factor: int) -> list[int] | None:
        """Return the first output's shape with the batch grown, for a node that keeps the element order."""
        shape, axis = self.inputs[0], self.batch_axes[0]
        if shape is None or axis is None:
            return None
        n_before = prod(shape[:axis])
        grown = list(self.outputs[0])
        for position in range(len(grown)):
            if prod(grown[:position]) == n_before:
                grown[position] *= factor
                return grown
        return None
