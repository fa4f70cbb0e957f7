"""Which widths and ranks are offered: runtimes compute channels in blocks, and what lies between is slow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Blocks:
    """Alignment by measurement: the runtime computes ``unit`` channels at once.

    Multiples of it are offered, and in narrow groups, which would have next to no choice, its quarters
    below it: what reads a fraction of a block may read less.
    """

    unit: int

    def __str__(self) -> str:
        return str(self.unit)


Align = int | str | Blocks
"""``auto``, multiples of a number, or blocks that were measured."""


def allowed_widths(size: int, align: int | str | Blocks) -> Ints:
    """Return the widths from 1 to ``size - 1`` that are offered, ascending.

    ``auto`` means multiples of 8 from 64 channels on, of 4 from 16, of 2 from 8.
    """
    if isinstance(align, Blocks):
        unit, quarter = align.unit, max(align.unit // 4, 1)
        below = np.arange(quarter, min(unit, size), quarter) if size <= 2 * unit else np.zeros(0, np.int64)
        return np.concatenate([below, np.arange(unit, size, unit)])
    unit = _auto_unit(size) if isinstance(align, str) else align
    return np.arange(unit, size, unit)


def _auto_unit(size: int) -> int:
    return 8 if size >= 64 else 4 if size >= 16 else 2 if size >= 8 else 1
