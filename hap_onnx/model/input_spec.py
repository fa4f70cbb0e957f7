"""What a model wants at one input: name, element type and shape."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class InputSpec:
    """One graph input.

    ``shape`` has one entry per axis: a fixed size, the name of a symbolic size, or None when the
    model does not say. Axis 0 is the batch, and its size is never compared with the data.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        object.__setattr__(self, "shape", tuple(self.shape))

    def __str__(self) -> str:
        return f"'{self.name}' {type_name(self.dtype)} {format_shape(self.shape)}"


def format_shape(shape: tuple[int | str | None, ...]) -> str:
    """``(None, 3, "H")`` as ``[?, 3, H]``."""
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def is_float(dtype: np.dtype) -> bool:
    """Whether the type is a real floating-point type, bfloat16 included (numpy has no kind for it)."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def type_name(dtype: np.dtype) -> str:
    """The type as a user would call it; numpy's own name for text is ``str256`` or ``object``."""
    return "string" if dtype.kind in "OUS" else dtype.name
