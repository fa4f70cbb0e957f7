"""What the refit is told about implants, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hap_onnx.implants.factors import Metric


@dataclass(frozen=True)
class ImplantSpec:
    """The implant that a contraction gets: kind, rank, taps and tap as for ``implants.factorise``.

    ``metric`` is that of the cut layer: A of the original model's inputs at the channels that are left, G at
    the outputs that are left.
    """

    kind: str
    rank: int
    taps: tuple[int, int]
    tap: int | None
    metric: Metric


@dataclass(frozen=True)
class FittedImplant:
    """The arrays of an implant, float32, in the order and shapes of ``implants.Factors``."""

    kind: str
    rank: int
    arrays: tuple[NDArray[np.float32], ...]


@dataclass(frozen=True)
class Refitted:
    """New values of initializers of the compressed graph, float32, and the implants by node.

    The weight of a node with an implant is not among ``weights``, its bias is if it has changed.
    """

    weights: Mapping[str, NDArray[np.float32]]
    factors: Mapping[str, FittedImplant]
