"""What to aim at: limits from budgets, and the search for the smallest model within a quality drop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import onnx_graphsurgeon as gs

from hap_onnx.errors import BudgetError
from hap_onnx.jobs.candidates import Budgets
from hap_onnx.model.measure import is_float_type
from hap_onnx.model.saving import ALIGNMENT
from hap_onnx.prepare import PreparedModel
from hap_onnx.runtime.metrics import Quality

T = TypeVar("T")  # a candidate

SEARCH_RATIOS = tuple(twentieths / 20 for twentieths in range(19, 1, -1))
"""Sizes, as fractions of the original, among which the smallest within ``max_drop`` is searched."""
SEARCH_MARGIN = 1.28
"""The search wants the drop plus so many standard errors below the limit: 90 % one-sided."""
SPARE_BYTES = 256
"""What ``--max-bytes`` leaves for the entry in the model's metadata."""


def params_within(
    max_bytes: int,
    prepared: PreparedModel,
    n_bytes: int,
    *,
    external_data: bool,
    per_param: float | None = None,
) -> float:
    """Return how many parameters a file of ``max_bytes`` has room for.

    Bytes of parameters all but make up a file; the rest is as in the whole model, which has ``n_bytes``.
    ``per_param`` says how many bytes a parameter takes there, if other than in the graph.

    Raises BudgetError if there is room for none.
    """
    constants = [t for t in prepared.graph.tensors().values() if isinstance(t, gs.Constant)]
    weights = [t for t in constants if is_float_type(t.values.dtype)]
    in_8_bits = prepared.stored
    n_weight_bytes: float = sum(t.values.size if t.name in in_8_bits else t.values.nbytes for t in weights)
    n_weights = max(sum(t.values.size for t in weights), 1)
    if per_param is None:
        per_param = n_weight_bytes / n_weights
    else:
        n_weight_bytes = per_param * n_weights
    rest = n_bytes - n_weight_bytes + SPARE_BYTES + (ALIGNMENT * len(weights) if external_data else 0)
    if max_bytes <= rest:
        raise BudgetError(
            f"--max-bytes {max_bytes} cannot be reached: {int(rest)} bytes are needed apart from weights"
        )
    return (max_bytes - rest) / per_param


@dataclass(frozen=True)
class Found(Generic[T]):
    """The smallest model that was accepted, and the last that was refused; None where there was none."""

    accepted: T | None
    refused: T | None


def check_can_search(unchanged: Quality, *, limit: float) -> None:
    """Raise BudgetError if the search would refuse even a model that changes nothing.

    ``unchanged`` is the quality of the original against itself, on the samples set aside for choices.
    """
    margin = SEARCH_MARGIN * _spread(unchanged)
    if margin > limit:
        more = f"give {math.ceil(margin / limit)} times as much data, " if limit else ""
        raise BudgetError(
            f"the {unchanged.n_samples} samples that steer the search cannot tell a loss of {limit:g} of "
            f"{unchanged.metric} from chance, which alone makes {margin:.2g}: {more}allow more with "
            "--max-drop, or say how large the model may be, for example with --keep-macs 0.5"
        )


def search_smallest(
    full: Mapping[str, float],
    compress_to: Callable[[Budgets], T],
    measure: Callable[[T], Quality],
    *,
    limit: float,
    note: Callable[[str], None],
) -> Found[T]:
    """Bisect the sizes for the smallest model whose drop, plus a margin for chance, is within ``limit``.

    ``full`` holds the costs of the whole model, ``measure`` the quality on samples set aside for choices.
    """
    accepted: T | None = None
    refused: T | None = None
    low, high = 0, len(SEARCH_RATIOS)  # ratios before `low` are accepted, from `high` on refused
    while low < high:
        middle = (low + high) // 2
        ratio = SEARCH_RATIOS[middle]
        try:
            candidate = compress_to({name: ratio * size for name, size in full.items()})
        except BudgetError:
            high = middle
            continue
        quality = measure(candidate)
        spread = _spread(quality)
        fits = quality.drop + SEARCH_MARGIN * spread <= limit
        note(
            f"at {ratio:.0%} of the size: {quality.metric} drops by {quality.drop:.4f} "
            f"(+-{spread:.4f}), {'accepted' if fits else 'refused'}"
        )
        if fits:
            accepted, low = candidate, middle + 1
        else:
            refused, high = candidate, middle
    return Found(accepted, refused)


def _spread(quality: Quality) -> float:
    """The standard error of a drop; 0 where it is not known."""
    return 0.0 if quality.interval is None else (quality.interval[1] - quality.interval[0]) / (2 * 1.96)
