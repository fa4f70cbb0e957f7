"""Where ids vary along several axes of a tensor: along which one they are joined.

A Reshape from 768 to (12, 64) leaves 12 heads, or 64 positions within a head. Which axis serves better shows
only later, so a graph is coupled several times: with the finer alternative everywhere, and once for each
number of elements that some alternative would leave. Merges that have to agree, those of one attention, say,
are a *component*; each component takes the choices of the trial in which most of it can be removed. Whole
heads come before parts of their width.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

if TYPE_CHECKING:
    from hap_onnx.coupling.channels import Flow

_log = logging.getLogger(__name__)

Ids = NDArray[np.int64]

_MAX_TRIALS = 24
_MAX_RETRIES = 8
_NEARLY = 0.5
"""A trial that can remove at least so much of the weights as another is judged by other things."""


@dataclass(frozen=True)
class Merge:
    """Where ``ids`` were joined along ``axis``; ``n_left`` elements would be left along each axis."""

    ids: Ids
    axis: int
    n_left: Mapping[int, int]


@dataclass(frozen=True)
class Choice:
    """Along which axis ids are joined where they vary along several.

    A merge takes the axis that ``axes`` names for its node; else one that leaves exactly ``aim`` elements,
    else the fewest that are a multiple of ``aim``, else the most. With ``late``, multiples come before exact
    numbers, for a later merge to get there. Of equal axes the last counts, or the ``first``.
    """

    axes: Mapping[str, int] = field(default_factory=dict)
    aim: int | None = None
    first: bool = False
    late: bool = False

    def pick(self, node: str, n_left: Mapping[int, int]) -> int:
        """Choose among axes, given how many elements each would leave."""
        if self.axes.get(node) in n_left:
            return self.axes[node]
        if self.aim is None:
            return min(n_left, key=lambda axis: (-n_left[axis], axis))

        def rank(axis: int) -> tuple[int, int, int]:
            n = n_left[axis]
            is_exact, is_multiple = n == self.aim, n % (self.aim or 1) == 0
            fit = 2 if not is_multiple else int(is_exact == self.late)
            return fit, n if is_multiple else -n, axis if self.first else -axis

        return min(n_left, key=rank)


def varies(ids: Ids, axis: int) -> bool:
    """Say whether ids differ along an axis."""
    return ids.shape[axis] > 1 and bool((ids != np.take(ids, [0], axis=axis)).any())


def count_left(ids: Ids, axis: int) -> int:
    """Count the elements that are left when ids are joined until they vary along ``axis`` only."""
    rows = np.moveaxis(ids, axis, 0).reshape(ids.shape[axis], -1)
    dense = np.unique(rows, return_inverse=True)[1].reshape(-1)  # some versions of numpy keep the shape
    n = int(dense.max()) + 1
    if n == dense.size:  # all differ
        return len(rows)
    first = np.repeat(dense[:: rows.shape[1]], rows.shape[1])
    graph = coo_matrix((np.ones(dense.size), (first, dense)))
    graph.resize((n, n))
    return int(connected_components(graph, directed=False)[0])


def choose(settle: Callable[[Choice], Flow]) -> Flow:
    """Couple a graph with the choices that serve each component best."""
    trials = [settle(Choice())]
    if not trials[0].merges:
        return trials[0]
    tried: list[Choice] = []
    while len(trials) < _MAX_TRIALS:
        todo = next((choice for choice in _choices(trials) if choice not in tried), None)
        if todo is None:
            break
        tried.append(todo)
        trials.append(settle(todo))
    scale = _Scale(trials)
    worths = [scale.weigh(trial) for trial in trials]
    axes: dict[str, int] = {}
    for component, names in enumerate(scale.components):
        best = _best([worth.components[component] for worth in worths])
        axes.update({name: merge.axis for name, merge in trials[best].merges.items() if name in names})
    chosen = settle(Choice(axes=axes))
    most = max(worths, key=lambda worth: worth.total)
    if scale.weigh(chosen).total[0] < _NEARLY * most.total[0]:
        _log.info("components of merges depend on each other: one trial is taken for all")
        chosen = trials[worths.index(most)]
    return _refine(settle, chosen, scale)


def _choices(trials: Iterable[Flow]) -> list[Choice]:
    """Choices that aim at the numbers of elements that some merge could leave, the most frequent first."""
    merges = {tuple(sorted(merge.n_left.items())) for trial in trials for merge in trial.merges.values()}
    aims = Counter(
        n for trial in trials for merge in trial.merges.values() for n in set(merge.n_left.values()) if n > 1
    )
    have_equals = any(len({n for _, n in merge}) < len(merge) for merge in merges)
    staged = {n for merge in merges for _, n in merge for _, m in merge if m > n and m % n == 0}
    by_frequency = sorted(aims, key=lambda n: (-aims[n], n))
    return [
        *(Choice(aim=n) for n in by_frequency),
        *(Choice(aim=n, first=True) for n in by_frequency if have_equals),
        *(Choice(aim=n, late=True) for n in by_frequency if n in staged),
    ]


def _refine(settle: Callable[[Choice], Flow], chosen: Flow, scale: _Scale) -> Flow:
    """Try mixtures of choices where ids ended frozen, or joined further than a merge itself asked for.

    All components change one merge at a time, together.
    """
    poor = set(_poor_merges(chosen))
    queues = [sorted(names & poor)[:_MAX_RETRIES] for names in scale.components]
    for turn in range(max(map(len, queues), default=0)):
        of_turn = {queue[turn]: component for component, queue in enumerate(queues) if turn < len(queue)}
        # Of what another mixture leaves frozen, a merge may have nothing left to choose.
        here = {name: chosen.merges[name] for name in of_turn if name in chosen.merges}
        for axis in sorted({axis for merge in here.values() for axis in merge.n_left}):
            of_axis = {
                name: of_turn[name]
                for name in here
                if name in chosen.merges and chosen.merges[name].axis != axis
            }
            if not of_axis:
                continue
            now = {name: merge.axis for name, merge in chosen.merges.items()}
            trial = settle(Choice(axes={**now, **dict.fromkeys(of_axis, axis)}))
            before, after = scale.weigh(chosen), scale.weigh(trial)
            better = [
                name for name, c in of_axis.items() if _best([before.components[c], after.components[c]]) == 1
            ]
            if better and len(better) < len(of_axis):
                trial = settle(Choice(axes={**now, **dict.fromkeys(better, axis)}))
            if better and scale.weigh(trial).total > before.total:
                chosen = trial
    return chosen


def _poor_merges(flow: Flow) -> list[str]:
    """Merges whose ids ended frozen, or joined further than the merge itself asked for."""
    roots, frozen = flow.representatives(), flow.frozen_ids()
    return [
        name
        for name, merge in flow.merges.items()
        if frozen[merge.ids].any() or len(np.unique(roots[merge.ids])) < merge.n_left[merge.axis]
    ]


# --- what a trial is worth ---

Value = tuple[float, bool, int]
"""(numbers in weights that can go, whether there are heads among it, number of elements that merges left)."""


@dataclass(frozen=True)
class _Worth:
    components: tuple[Value, ...]
    total: tuple[float, int]


def _best(values: Sequence[Value]) -> int:
    """Index of the best trial: of those that cover about the most weights, heads come before their width."""
    least = _NEARLY * max(covered for covered, _, _ in values)
    return max(
        range(len(values)),
        key=lambda i: (values[i][0] >= least, values[i][1], values[i][2], values[i][0], -i),
    )


class _Scale:
    """Components of merges, and what trials are worth to them.

    Ids differ from trial to trial, but positions of weight axes do not: a component has those whose ids any
    trial joins with ids of its merges.
    """

    def __init__(self, trials: Sequence[Flow]) -> None:
        constants = trials[0].graph.tensors()
        self._offsets: dict[tuple[str, int], int] = {}
        weights = []
        n_positions = 0
        for name, axis in dict.fromkeys(key for trial in trials for key in trial.bound):
            shape = constants[name].shape
            self._offsets[name, axis] = n_positions
            n_positions += shape[axis]
            weights.append(np.full(shape[axis], prod(shape) / shape[axis]))
        self._weights = np.concatenate(weights)
        names = list(dict.fromkeys(name for trial in trials for name in trial.merges))
        vertex = {name: n_positions + i for i, name in enumerate(names)}
        n_vertices = n_positions + len(names)
        edges: list[tuple[Ids, Ids]] = []
        for trial in trials:
            roots, at = trial.representatives(), self._ids_at(trial)
            touched = np.zeros(trial.n_ids, bool)
            for name, merge in trial.merges.items():
                own = np.unique(roots[merge.ids])
                own = own[own != roots[0]]  # what must stay joins nothing
                touched[own] = True
                edges.append((np.full(len(own), vertex[name]), n_vertices + own))
            positions = np.flatnonzero(touched[roots[at]])
            edges.append((positions, n_vertices + roots[at][positions]))
            n_vertices += trial.n_ids
        rows, columns = (np.concatenate(side) for side in zip(*edges, strict=True))
        graph = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(n_vertices, n_vertices))
        found = connected_components(graph, directed=False)[1][: n_positions + len(names)]
        of_merges, numbers = np.unique(found[n_positions:], return_inverse=True)
        self.components: list[set[str]] = [set() for _ in of_merges]
        for name, number in zip(names, numbers.tolist(), strict=True):
            self.components[number].add(name)
        place = np.minimum(np.searchsorted(of_merges, found[:n_positions]), len(of_merges) - 1)
        self._component = np.where(of_merges[place] == found[:n_positions], place, -1)

    def _ids_at(self, flow: Flow) -> Ids:
        """The id at each position, 0 (it must stay) where nothing binds it."""
        at = np.zeros(len(self._weights), np.int64)
        for key, (ids, _) in flow.bound.items():
            if key in self._offsets:
                at[self._offsets[key] : self._offsets[key] + len(ids)] = ids
        return at

    def weigh(self, flow: Flow) -> _Worth:
        """Say what can be removed of each component, and in all."""
        roots, free = flow.representatives(), flow.free_ids()
        is_head = np.zeros(flow.n_ids, bool)
        for ids in flow.heads:
            is_head[roots[ids]] = True
        at = roots[self._ids_at(flow)]
        left = free[at]
        inside = left & (self._component >= 0)
        n = len(self.components)
        component = self._component[inside]
        covered = np.bincount(component, self._weights[inside], minlength=n)
        heads = np.bincount(component, is_head[at[inside]], minlength=n)
        values = []
        for i, names in enumerate(self.components):
            own = [flow.merges[name].ids for name in names if name in flow.merges]
            elements = np.unique(roots[np.concatenate(own)]) if own else np.zeros(0, np.int64)
            values.append((float(covered[i]), bool(heads[i]), int(free[elements].sum())))
        return _Worth(tuple(values), (float(self._weights[left].sum()), len(np.unique(at[left]))))
