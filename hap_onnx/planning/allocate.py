"""Which width each channel group gets, and which option each layer: least loss within the budgets.

``allocate`` turns losses (a curve over the width of each group, a number for each option of a layer) and
budgets into a choice. The cost of an option depends on what else is chosen, and is priced exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from hap_onnx.coupling.channels import ChannelGroup, Coupling
from hap_onnx.errors import BudgetError
from hap_onnx.planning.align import Align, allowed_widths
from hap_onnx.planning.cost import METRICS, N_METRICS, CostModel, Ints
from hap_onnx.planning.moves import Floats, Point, Search

# --------------------------------------------------------------- what may be chosen


@dataclass(frozen=True)
class GroupOptions:
    """The widths that a group may have: ascending."""

    group: str
    widths: Ints

    def __post_init__(self) -> None:
        widths = np.array(self.widths, np.int64)
        if widths.ndim != 1 or not len(widths) or widths[0] < 0 or (np.diff(widths) <= 0).any():
            raise ValueError(f"{self.group}: widths must ascend from 0 or more, not {widths.tolist()}")
        widths.flags.writeable = False
        object.__setattr__(self, "widths", widths)


@dataclass(frozen=True, eq=False)
class LayerOptions:
    """What a layer may be: option 0 is the layer as it is, without loss; the others are implants.

    ``coefficients`` int64 [n_options, 4, n_metrics] are those of its cost (see ``cost.LayerTerms``),
    ``losses`` float64 [n_options] what each option adds to the loss, also below 0.
    """

    node: str
    coefficients: Ints
    losses: Floats

    def __post_init__(self) -> None:
        coefficients, losses = np.array(self.coefficients, np.int64), np.array(self.losses, np.float64)
        if losses.ndim != 1 or not len(losses) or coefficients.shape != (len(losses), 4, N_METRICS):
            raise ValueError(f"{self.node}: {losses.shape} losses, coefficients {coefficients.shape}")
        if not np.isfinite(losses).all() or losses[0] != 0:
            raise ValueError(f"{self.node}: losses must be finite, and 0 for the layer as it is")
        for name, array in (("coefficients", coefficients), ("losses", losses)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)


@dataclass(frozen=True, eq=False)
class Allocation:
    """``widths`` int64 [n_groups], and for each layer its option, ``options`` int64 [n_layers]."""

    widths: Ints
    options: Ints


def find_options(
    coupling: Coupling,
    removable: Iterable[str] = (),
    *,
    align: Align = "auto",
    min_ratio: float = 0.0,
) -> tuple[GroupOptions, ...]:
    """Return the allowed widths of each group of ``coupling``, in its order.

    Widths are aligned (see ``align``), at least ``min_ratio`` of the group, or the full width, or 0 for a
    group of ``removable``. It is channels that are counted: of attention heads, each has as many as it is
    wide. A frozen group stays whole.
    """
    may_go = set(removable)
    result = []
    for group in coupling.groups:
        channels = _channels_per_element(coupling, group)
        counts = allowed_widths(group.size * channels, align)
        aligned = np.unique(counts[counts % channels == 0] // channels)
        least = int(np.ceil(min_ratio * group.size - 1e-9))
        narrower = [0] if group.name in may_go else []
        narrower += aligned[aligned >= least].tolist()
        widths = [group.size] if group.frozen else [*narrower, group.size]
        result.append(GroupOptions(group.name, np.array(widths)))
    return tuple(result)


def _channels_per_element(coupling: Coupling, group: ChannelGroup) -> int:
    """How many channels of its largest producer an element of a group has."""
    producers = {(w.initializer, w.axis): w.elements for w in coupling.weights if w.role == "producer"}
    counts = [
        (len(producers[name, axis]), count) for name, axis, count in group.axes if (name, axis) in producers
    ]
    return max(counts)[1] if counts else 1


# --------------------------------------------------------------- choosing

_MAX_ENUMERATED = 100_000  # combinations of options that are simply all tried
_N_BISECTIONS = 24
_N_IMPROVED = 3  # how many of the solutions found are improved by exchange
_MAX_MOVES = 10_000  # changes of one variable tried per improved solution: what bounds the time
_MAX_MOVES_WITH_LAYERS = 3_000  # each takes longer, and what more would find is far below what losses err


def allocate(
    curves: Sequence[Floats],
    options: Sequence[GroupOptions],
    cost: CostModel,
    budgets: Mapping[str, float | None],
    layers: Sequence[LayerOptions] = (),
) -> Allocation:
    """Choose a width for each group and an option for each layer: least sum of losses within all budgets.

    Args:
        curves: for each group the predicted loss at each width 0..size. They are used as they are, convex and
            monotone or not.
        options: the allowed widths of each group.
        cost: prices the choice; the cost of a group or layer depends on the widths of its neighbours.
        budgets: absolute limits by metric (of ``METRICS``); None is no limit.
        layers: the options of layers that ``cost`` has, in any order; the others stay as they are. No option
            may cost less than nothing at any of the widths.

    Returns:
        Widths in the order of ``options``, options in the order of ``layers``; 0 for a layer that is gone.
        Few combinations are enumerated, so the result is the optimum. Otherwise it is found by Lagrangian
        descent over a bisected price, filling the slack, and exchange until nothing improves; equal inputs
        give equal results.

    Raises:
        BudgetError: a budget cannot be reached, with the smallest fraction that can.
        ValueError: curves, options and layers do not fit the cost model.
    """
    _check_groups(curves, options, cost, budgets)
    places = _check_layers(layers, cost)
    search = Search(
        [np.asarray(curve, np.float64)[option.widths] for curve, option in zip(curves, options, strict=True)]
        + [place.losses for place in places],
        [option.widths for option in options],
        [place.coefficients for place in places],
        cost,
        budgets,
    )
    chosen = _choose(search)
    by_node = dict(zip([layer.node for layer in cost.layers], chosen[len(options) :].tolist(), strict=True))
    return Allocation(
        widths=search.split(chosen)[0],
        options=np.array([by_node[layer.node] for layer in layers], np.int64),
    )


def _check_groups(
    curves: Sequence[Floats],
    options: Sequence[GroupOptions],
    cost: CostModel,
    budgets: Mapping[str, float | None],
) -> None:
    unknown = set(budgets) - set(METRICS)
    if unknown or not len(curves) == len(options) == len(cost.sizes):
        raise ValueError(f"{len(curves)} curves, {len(options)} options, budgets for {sorted(budgets)}")
    for curve, option, size in zip(curves, options, cost.sizes, strict=True):
        if len(curve) != size + 1 or option.widths[-1] > size or not np.isfinite(curve).all():
            raise ValueError(f"{option.group}: needs {size + 1} finite losses, and no width beyond {size}")


def _check_layers(layers: Sequence[LayerOptions], cost: CostModel) -> list[LayerOptions]:
    """Return the options of every layer of the cost model; those without stay as they are."""
    given = {layer.node: layer for layer in layers}
    strangers = sorted(given.keys() - {layer.node for layer in cost.layers})
    if strangers or len(given) != len(layers):
        raise ValueError(f"layers that the cost model does not have, or one given twice: {strangers}")
    places = []
    for terms in cost.layers:
        place = given.get(terms.node, LayerOptions(terms.node, terms.dense[None], np.zeros(1)))
        if not np.array_equal(place.coefficients[0], terms.dense):
            raise ValueError(f"{terms.node}: option 0 does not cost what the layer costs as it is")
        places.append(place)
    return places


def _choose(search: Search) -> Ints:
    free = Point(search, search.least_loss())
    if free.fits():
        return _tidy(free)
    _check_reachable(search)
    if prod(search.n_options) <= _MAX_ENUMERATED:
        return _tidy(Point(search, _enumerate(search)))
    return _tidy(_search_choice(search))


def _tidy(point: Point) -> Ints:
    """Leave layers that are gone as they are: their options mean nothing."""
    choice = point.choice.copy()
    choice[point.search.n_groups :][~point.state.layer_values().any(axis=1)] = 0
    return choice


def _check_reachable(search: Search) -> None:
    """Raise BudgetError if a budget is below the least cost that any choice has."""
    rows = zip(search.columns, search.limits, search.full, strict=True)
    missed = []
    for column, limit, full in rows:
        low = search.totals(search.smallest(np.eye(N_METRICS)[column]))[column]
        if low > limit:
            least = np.ceil(low / full * 1e4) / 1e4
            missed.append(f"{METRICS[column]} at {limit / full:.3g} of the original (the least is {least:g})")
    if missed:
        raise _unreachable(" and ".join(missed))


def _unreachable(what: str) -> BudgetError:
    return BudgetError(
        f"the budget cannot be reached: {what}; keep more, exclude less, or let widths be finer "
        "(--align 1 is the finest)"
    )


def _unreachable_together(search: Search) -> BudgetError:
    missed = [
        f"{METRICS[column]} at {limit / full:.3g}"
        for column, limit, full in zip(search.columns, search.limits, search.full, strict=True)
    ]
    return _unreachable(f"{' and '.join(missed)} of the original at once (each alone can be)")


def _enumerate(search: Search) -> Ints:
    """Try all combinations; of equal losses take the widest, and layers as they are."""
    sizes = search.n_options
    n = prod(sizes)
    best, best_loss = None, np.inf
    for start in range(0, n, 16_384):
        choice = np.stack(np.unravel_index(np.arange(start, min(start + 16_384, n)), sizes), axis=1)
        of_groups = choice[:, : search.n_groups]
        choice[:, : search.n_groups] = np.array(sizes[: search.n_groups], np.int64) - 1 - of_groups
        loss = search.losses[search.starts[:-1] + choice].sum(axis=1)
        totals = search.totals(choice)[:, search.columns]
        loss[(totals > search.limits).any(axis=1)] = np.inf
        first = int(loss.argmin())
        if loss[first] < best_loss:
            best, best_loss = choice[first], loss[first]
    if best is None:
        raise _unreachable_together(search)
    return best


def _search_choice(search: Search) -> Point:
    """Find a good choice when there are too many combinations to try them all."""
    none = np.zeros(len(search.limits))
    found = [(point, none) for point in _small_points(search)]
    straight = Point(search, search.least_loss())
    if straight.shrink():
        found.append((straight, none))
    found += _distinct(pair for mix in _mixes(len(search.limits)) for pair in _bisect(search, mix))
    if not found:
        raise _unreachable_together(search)
    for point, _ in found:
        point.fill()
    found.sort(key=lambda entry: entry[0].loss)
    price = next((price for _, price in found if price.any()), none)
    scanned: dict[bytes, float] = {}
    improved = [_exchange(point, price, scanned) for point, _ in _distinct(found)[:_N_IMPROVED]]
    return min(improved, key=lambda point: point.loss)


def _distinct(found: Iterable[tuple[Point, Floats]]) -> list[tuple[Point, Floats]]:
    """Leave the first of equal points."""
    first: dict[bytes, tuple[Point, Floats]] = {}
    for point, prices in found:
        first.setdefault(point.choice.tobytes(), (point, prices))
    return list(first.values())


def _small_points(search: Search) -> list[Point]:
    """The first point of narrowest widths that fits: two budgets may want different options of layers."""
    n_limits = len(search.limits)
    for mix in (np.full(n_limits, 1 / n_limits), *_simplex(n_limits, 16 if n_limits < 3 else 6)):
        weights = np.zeros(N_METRICS)
        weights[search.columns] = mix / search.full
        point = Point(search, search.smallest(weights))
        if point.fits() or point.shrink():
            return [point]
    return []


def _mixes(n_limits: int) -> list[Floats]:
    """In which proportions the limits are priced, the most even first."""
    return sorted(_simplex(n_limits, 4 if n_limits < 3 else 3), key=lambda mix: float(mix.max()))


def _simplex(n_limits: int, n_steps: int) -> list[Floats]:
    """All points of the simplex whose coordinates are multiples of 1 / n_steps."""
    if n_limits == 1:
        return [np.ones(1)]
    counts = product(range(n_steps + 1), repeat=n_limits - 1)
    return [np.array([*c, n_steps - sum(c)]) / n_steps for c in counts if sum(c) <= n_steps]


def _bisect(search: Search, mix: Floats) -> list[tuple[Point, Floats]]:
    """Search the price at which the budgets are just met; return all points met on the way that fit."""
    low, high = np.log(1e-6), np.log(1e6)
    scale = max(search.loss_range, 1e-300)
    below = Point(search, search.least_loss())  # of the largest price known to be too small
    found = []
    for _ in range(_N_BISECTIONS):
        middle = (low + high) / 2
        prices = scale * np.exp(middle) * mix
        point = below.copy()
        point.descend(prices)
        if point.fits():
            found.append((point, prices))
            high = middle
        else:
            below, low = point, middle
    return found


def _exchange(point: Point, prices: Floats, scanned: dict[bytes, float]) -> Point:
    """Try to give one variable another option and let the others make room, or take it; while it improves.

    ``scanned`` remembers choices from which so many moves found nothing better: solutions often meet.
    """
    search = point.search
    most = _MAX_MOVES_WITH_LAYERS if len(search.layer_of) else _MAX_MOVES
    n_moves = 0
    while True:
        best, key, left = point, point.choice.tobytes(), most - n_moves
        if left <= scanned.get(key, -1):
            return point
        # Most promising first: the loss that a change saves, less what the budgets say its cost is worth.
        score = point.gaps + (prices / search.limits) @ point.changes
        score[search.starts[:-1] + point.choice] = np.inf
        for entry in np.argsort(score, kind="stable").tolist():
            if not np.isfinite(score[entry]) or n_moves > most:
                break
            trial = point.copy()
            trial.move(entry)
            if trial.shrink(locked=int(search.variable[entry])):
                trial.fill()
                if trial.loss < best.loss - search.tolerance:
                    best = trial
            n_moves += trial.n_moves
            if best is not point:
                break
        if best is point:
            scanned[key] = left if n_moves > most else np.inf
            return point
        point = best
