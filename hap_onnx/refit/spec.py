"""What the refit is told about implants, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hap_onnx.implants.factors import Metric


@dataclass(frozen=True)
class ImplantSpec:
    """The implant that a contraction gets: kind, rank, taps and tap as for ``implants.factorise``.

    ``make_metric`` returns that of the cut layer: A of the original model's inputs at the channels that are
    left, G at the outputs that are left. It is made when the layer's turn comes: of all layers at once these
    would be gigabytes.
    """

    kind: str
    rank: int
    taps: tuple[int, int]
    tap: int | None
    make_metric: Callable[[], Metric]


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
