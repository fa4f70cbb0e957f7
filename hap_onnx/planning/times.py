"""What nodes take in the runtime, as coefficients that planning can add up.

The time of a contraction is bilinear in the lengths of the input and output axis of its weight, as long as
these fit the blocks in which the runtime computes: four coefficients, of inputs * outputs, inputs, outputs
and 1. Two factors in its place are two contractions, and so their time at a given rank is of the same form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ImplantTimes:
    """Picoseconds of the two contractions of one kind of implant: coefficients [4] each.

    ``joined`` is what bringing parts side by side takes, per output channel.
    """

    first: Floats
    second: Floats
    joined: float = 0.0

    def at_rank(self, kind: str, rank: int, *, n_groups: int) -> Ints:
        """Return the coefficients [4] of an implant of one rank (per conv group)."""
        a, b = self.first, self.second
        if kind == "pointwise":  # `rank` outputs are computed by the second, the others by the first
            found = [a[0], a[1] - a[0] * rank + b[0] * rank + b[1], a[2] + self.joined]
            found.append(a[3] - a[2] * rank + b[2] * rank + b[3])
        else:
            n_between = n_groups * rank
            found = [0.0, a[0] * n_between + a[1], b[0] * rank + b[2]]
            found.append(a[2] * n_between + a[3] + b[1] * rank + b[3])
        return np.round(found).astype(np.int64)


@dataclass(frozen=True, eq=False)
class NodeTimes:
    """Times of one model's nodes in the runtime, in picoseconds.

    Attributes:
        dense: of each contraction with a constant weight, coefficients int64 [4].
        other: of each other node as it is; in proportion to its channels where it loses some.
        implants: of each (node, kind).
        unit: the steps of widths that the runtime rewards; see ``align``.
    """

    dense: Mapping[str, Ints]
    other: Mapping[str, int]
    implants: Mapping[tuple[str, str], ImplantTimes] = field(default_factory=dict)
    unit: int = 8

    def of_layer(self, node: str) -> Ints:
        """Return the coefficients [4] of a layer; without times of its own they are those of its node."""
        return self.dense.get(node, np.array([0, 0, 0, self.other.get(node, 0)]))
