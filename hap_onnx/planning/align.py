"""Which widths and ranks are offered: runtimes compute channels in blocks, and what lies between is slow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Blocks:
    """Alignment by measurement: the runtime computes ``unit`` channels at once.

    Multiples of it are offered, and quarters of it where there is one block only, and else no choice: making
    a part of a block takes as long as all of it, but reading less is faster.
    """

    unit: int

    def __str__(self) -> str:
        return str(self.unit)


Align = int | str | Blocks
"""``auto``, multiples of a number, or blocks that were measured."""


def allowed_widths(size: int, align: int | str | Blocks, *, of: int | None = None) -> Ints:
    """Return the widths from 1 to ``size - 1`` that are offered, ascending, in a layer of ``of`` channels.

    ``auto`` means multiples of 8 from 64 channels on, of 4 from 16, of 2 from 8.
    """
    n_channels = size if of is None else of
    if isinstance(align, Blocks):
        unit = align.unit if n_channels > align.unit else max(align.unit // 4, 1)
    else:
        unit = _auto_unit(n_channels) if isinstance(align, str) else align
    return np.arange(unit, size, unit)


def _auto_unit(size: int) -> int:
    return 8 if size >= 64 else 4 if size >= 16 else 2 if size >= 8 else 1
