"""Coupling: which channels must go together.

Every channel that a contraction (Conv, Gemm, MatMul) produces gets an integer id, and the ids flow along
the tensors of the graph: elementwise operators join the ids that meet, data movement carries them,
contractions join the ids that they read with an axis of their weight and make fresh ids for what they
produce. What is joined in the end is one *element*: it is kept or removed as a whole. Elements that touch
the same axes in the same way form a *channel group*, the unit of planning: which of them stay is a matter
of sensitivity, how many is a matter of cost.

A tensor carries ids along at most one axis. That is no restriction of the method: a tensor is a regular
grid, so it can lose slices along one axis only. Where a Reshape spreads ids over two axes (channel shuffle,
grouped weights, the heads of attention), they are joined along one of them. Which one is found by trial: the
whole graph is coupled with the finer alternative everywhere, and once for each number of elements that some
alternative would leave (12 heads of width 64: aim at 12, and at 64). Merges that have to agree, those of one
attention, say, take the choices of the trial that serves them best.

What is not understood is frozen, with a reason: an operator without a rule, an output of the model,
a normalisation over the channels. A frozen channel is never removed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from hap_onnx.opaque import captured_names
from hap_onnx.ops.elementwise import is_elementwise
from hap_onnx.ops.registry import find_flow
from hap_onnx.ops.shape import asks_shape_only

_log = logging.getLogger(__name__)

Ids = NDArray[np.int64]
Role = Literal["producer", "follower", "consumer"]

FIXED = 0
"""The id of a position that can never be removed."""


@dataclass(frozen=True)
class IdAxis:
    """The ids along the one axis of a tensor that carries channels; ``ids`` has the axis' length."""

    axis: int
    ids: Ids


@dataclass(frozen=True)
class WeightAxis:
    """One axis of an initializer; ``elements[i]`` is the element of its position i, or -1 if it must stay."""

    initializer: str
    axis: int
    role: Role
    elements: Ids


@dataclass(frozen=True)
class Read:
    """A contraction that reads channels: input ``index`` of ``node``, along ``axis`` of ``tensor``.

    ``elements[i]`` is the element of position i of the axis, or -1. Multiplying the tensor by a mask here,
    at every read, has the same effect on the outputs as removing the masked elements.
    """

    node: str
    index: int
    tensor: str
    axis: int
    elements: Ids


@dataclass(frozen=True)
class ChannelGroup:
    """Elements that touch the same weight axes: interchangeable in cost, not in sensitivity.

    ``axes`` holds (initializer, axis, positions per element). ``frozen`` is None, or the reason why
    nothing of the group can be removed.
    """

    name: str
    elements: Ids
    axes: tuple[tuple[str, int, int], ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    frozen: str | None = None

    @property
    def size(self) -> int:
        return len(self.elements)


@dataclass(frozen=True)
class Frozen:
    """A node whose channels cannot be pruned, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class Coupling:
    """Everything that is known about the channels of a graph.

    ``tensors`` maps a tensor name to its channel axis and the element (or -1) of each position.
    """

    n_elements: int
    groups: tuple[ChannelGroup, ...]
    weights: tuple[WeightAxis, ...]
    tensors: Mapping[str, IdAxis]
    reads: tuple[Read, ...]
    frozen: tuple[Frozen, ...]
    initializer_nodes: Mapping[str, tuple[str, ...]]


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


@dataclass
class Flow:
    """The ids of a graph while they flow; what the rules in ``hap_onnx.ops`` work on.

    ``sources`` are constants that are data rather than weights (tables of positions, a scale per head), with
    the axis along which they carry ids from the start; ``wishes`` are further ones that would help.
    ``heads`` are ids along which products of two activations run in parallel.
    """

    graph: gs.Graph
    shapes: Mapping[str, tuple[int, ...]]
    representative: Ids = field(default_factory=lambda: np.zeros(1, np.int64))
    choice: Choice = field(default_factory=Choice)
    static: frozenset[str] = frozenset()
    sources: Mapping[str, int] = field(default_factory=dict)
    wishes: dict[str, int] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    n_ids: int = 1
    tensors: dict[str, IdAxis] = field(default_factory=dict)
    bound: dict[tuple[str, int], tuple[Ids, Role]] = field(default_factory=dict)
    binders: dict[tuple[str, int], set[str]] = field(default_factory=dict)
    users: dict[str, list[str]] = field(default_factory=dict)
    reads: list[tuple[str, int, str, IdAxis]] = field(default_factory=list)
    heads: list[Ids] = field(default_factory=list)
    edges: list[tuple[Ids, Ids]] = field(default_factory=list)
    marks: list[tuple[Ids, str, str]] = field(default_factory=list)
    merges: dict[str, Merge] = field(default_factory=dict)

    def shape(self, tensor: gs.Tensor) -> tuple[int, ...]:
        """Shape of a tensor at the probe input."""
        if isinstance(tensor, gs.Constant):
            return tuple(tensor.shape)
        return self.shapes[tensor.name]

    def ids(self, tensor: gs.Tensor) -> IdAxis | None:
        """The channel axis of a tensor, or None if it carries no channels."""
        self.asked.add(tensor.name)
        return self.tensors.get(tensor.name)

    def fresh(self, n: int) -> Ids:
        """Make n new ids (those of an earlier pass come back already joined)."""
        raw = np.arange(self.n_ids, self.n_ids + n, dtype=np.int64)
        self.n_ids += n
        known = raw < len(self.representative)
        raw[known] = self.representative[raw[known]]
        return raw

    def join(self, a: Ids, b: Ids) -> None:
        """Say that the ids at equal positions of a and b can only go together."""
        differ = a != b
        if differ.any():
            self.edges.append((a[differ], b[differ]))

    def freeze(self, what: IdAxis | Ids | None, node: gs.Node, reason: str) -> None:
        """Say that none of these ids can be removed."""
        if what is None:
            return
        ids = what.ids if isinstance(what, IdAxis) else what
        if ids.size:
            self.marks.append((np.unique(ids), node.name, reason))

    def put(self, tensor: gs.Tensor, axis: int, ids: Ids) -> None:
        """Let ``tensor`` carry ``ids`` along ``axis``."""
        shape = self.shape(tensor)
        if shape[axis] != len(ids):
            raise AssertionError(f"{tensor.name}: {len(ids)} ids on an axis of {shape[axis]}")
        self.tensors[tensor.name] = IdAxis(axis, ids)

    def bind(self, constant: gs.Tensor, axis: int, ids: Ids, role: Role, node: gs.Node) -> None:
        """Let ``axis`` of an initializer carry ``ids``; a shared one joins what it carries already.

        An axis that not all readers of the initializer bind stays whole.
        """
        if constant.shape[axis] != len(ids):
            raise AssertionError(f"{constant.name}: {len(ids)} ids on an axis of {constant.shape[axis]}")
        users = self.users.setdefault(constant.name, [])
        if node.name not in users:
            users.append(node.name)
        key = (constant.name, axis)
        self.binders.setdefault(key, set()).add(node.name)
        if key in self.bound:
            self.join(self.bound[key][0], ids)
        else:
            self.bound[key] = (ids, role)

    def read(self, node: gs.Node, index: int) -> None:
        """Record that a contraction reads the channels of its input ``index``."""
        tensor = node.inputs[index]
        found = self.ids(tensor)
        if found is not None:
            self.reads.append((node.name, index, tensor.name, found))

    def merge(self, node: gs.Node, ids: Ids) -> tuple[int, Ids]:
        """Join ids that spread over several axes until they vary along one; return it and its ids."""
        varying = [axis for axis in range(ids.ndim) if _varies(ids, axis)]
        index = tuple(slice(None) if axis in varying else slice(0, 1) for axis in range(ids.ndim))
        ids, full = ids[index], ids
        if len(varying) <= 1:
            axis = varying[0] if varying else int(np.argmax(full.shape))
            return axis, np.broadcast_to(ids.ravel(), full.shape[axis]).copy()
        n_left = {axis: _n_left(ids, axis) for axis in varying}
        axis = self.choice.pick(node.name, n_left)
        self.merges[node.name] = Merge(np.unique(ids), axis, n_left)
        rows = np.moveaxis(ids, axis, 0).reshape(ids.shape[axis], -1)
        first = np.ascontiguousarray(rows[:, 0])
        self.join(np.repeat(first, rows.shape[1]), rows.ravel())
        return axis, first

    def wish(self, tensor: gs.Tensor, size: int) -> None:
        """Look for constants behind ``tensor`` that could carry the ids that it lacks.

        A guess is enough: what flows from a constant is checked like everything else.
        """
        queue, seen = [tensor], {tensor.name}
        while queue and len(seen) < _MAX_WALK:
            tensor = queue.pop()
            if isinstance(tensor, gs.Constant):
                axes = [axis for axis, length in enumerate(tensor.shape) if length == size > 1]
                before = self.sources.get(tensor.name, len(tensor.shape))
                left = [axis for axis in axes if axis < before]  # what has been tried is of no use
                if left and np.asarray(tensor.values).dtype.kind == "f":
                    self.wishes.setdefault(tensor.name, left[-1])
                continue
            for node in tensor.inputs:
                passes = is_elementwise(node.op, domain=node.domain or "")
                for behind in node.inputs:
                    known = behind.name in self.static or isinstance(behind, gs.Constant)
                    carries = behind.name in self.tensors and not isinstance(behind, gs.Constant)
                    if behind.name and behind.name not in seen and (known or passes) and not carries:
                        seen.add(behind.name)
                        queue.append(behind)


_MAX_WALK = 200


def _varies(ids: Ids, axis: int) -> bool:
    return ids.shape[axis] > 1 and bool((ids != np.take(ids, [0], axis=axis)).any())


def _n_left(ids: Ids, axis: int) -> int:
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


def find_groups(
    graph: gs.Graph,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    exclude: Mapping[str, str] | None = None,
) -> Coupling:
    """Find the channel groups of a normalised graph.

    Args:
        graph: a graph from ``model_io.normalise``.
        shapes: the shape of every tensor at a probe input; its batch should be at least 2, so that
            batch and channels cannot be mixed up.
        exclude: names of nodes or initializers whose channels must stay, with the reason.
    """
    static = _static_tensors(graph)

    def settle(choice: Choice) -> Flow:
        return _settle(graph, shapes, choice, exclude or {}, static)

    return _collect(_choose(settle))


# --- where to join ids that vary along several axes ---

_MAX_TRIALS = 24
_MAX_RETRIES = 8
_NEARLY = 0.3
"""A trial that can remove at least so much of the weights as another is judged by other things."""


def _choose(settle: Callable[[Choice], Flow]) -> Flow:
    """Couple a graph with the choices that serve each component of its merges best."""
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
    worth = [_Worth(trial) for trial in trials]
    axes: dict[str, int] = {}
    components = _components(trials)
    for component in components:
        best = _best([trial.of(component) for trial in worth])
        axes.update({name: merge.axis for name, merge in trials[best].merges.items() if name in component})
    chosen = settle(Choice(axes=axes))
    total = _Worth(chosen).total
    if total[0] < _NEARLY * max(
        trial.total[0] for trial in worth
    ):  # components were not independent after all
        _log.info("the merges of the graph depend on each other: one trial is taken for all")
        chosen = trials[_best([trial.of(trial.merges) for trial in worth])]
    return _refine(settle, chosen, components)


def _refine(settle: Callable[[Choice], Flow], chosen: Flow, components: Sequence[set[str]]) -> Flow:
    """Try mixtures of choices where ids ended frozen, or joined further than a merge itself asked for.

    All components change one merge at a time, together.
    """
    poor = set(_poor_merges(chosen))
    queues = [sorted(component & poor)[:_MAX_RETRIES] for component in components]
    for turn in range(max(map(len, queues), default=0)):
        of_turn = {queue[turn]: index for index, queue in enumerate(queues) if turn < len(queue)}
        for axis in sorted({axis for name in of_turn for axis in chosen.merges[name].n_left}):
            trial = settle(Choice(axes={**_axes_of(chosen), **dict.fromkeys(of_turn, axis)}))
            before, after = _Worth(chosen), _Worth(trial)
            better = [
                name
                for name, index in of_turn.items()
                if axis != chosen.merges[name].axis
                and _best([before.of(components[index]), after.of(components[index])]) == 1
            ]
            if not better:
                continue
            if len(better) < len(of_turn):
                trial = settle(Choice(axes={**_axes_of(chosen), **dict.fromkeys(better, axis)}))
            if _Worth(trial).total > before.total:
                chosen = trial
    return chosen


def _axes_of(flow: Flow) -> dict[str, int]:
    return {name: merge.axis for name, merge in flow.merges.items()}


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


def _components(trials: Sequence[Flow]) -> list[set[str]]:
    """Sets of merges whose ids are joined in some trial: they have to agree."""
    root: dict[object, object] = {}

    def find(key: object) -> object:
        while root.setdefault(key, key) != key:
            root[key] = root[root[key]]
            key = root[key]
        return key

    names: dict[str, None] = {}
    for index, trial in enumerate(trials):
        roots = _representatives(trial)
        for name, merge in trial.merges.items():
            names[name] = None
            for joined in np.unique(roots[merge.ids]).tolist():
                if joined != roots[FIXED]:
                    root[find((index, joined))] = find(name)
    components: dict[object, set[str]] = {}
    for name in names:
        components.setdefault(find(name), set()).add(name)
    return list(components.values())


class _Worth:
    """How much of the weights the free elements of a trial cover."""

    def __init__(self, flow: Flow) -> None:
        self.merges = flow.merges
        self._roots = _representatives(flow)
        self._free = ~_frozen_ids(flow)
        self._weight = np.zeros(flow.n_ids)
        produced = np.zeros(flow.n_ids, bool)
        constants = flow.graph.tensors()
        for (name, axis), (ids, role) in flow.bound.items():
            shape = constants[name].shape
            np.add.at(self._weight, self._roots[ids], prod(shape) / shape[axis])
            if role == "producer":
                produced[self._roots[ids]] = True
        self._free &= produced
        self._weight *= self._free
        self._is_head = np.zeros(flow.n_ids, bool)
        for ids in flow.heads:
            self._is_head[self._roots[ids]] = True
        self.total = (float(self._weight.sum()), int(self._free.sum()))

    def of(self, merges: Collection[str]) -> tuple[float, bool, int]:
        """(numbers in weights that can go, whether some element is a head, number of elements)."""
        ids = [self.merges[name].ids for name in merges if name in self.merges]
        elements = np.unique(self._roots[np.concatenate(ids)]) if ids else np.zeros(0, np.int64)
        elements = elements[self._free[elements]]
        return float(self._weight[elements].sum()), bool(self._is_head[elements].any()), len(elements)


def _best(worths: Sequence[tuple[float, bool, int]]) -> int:
    """Index of the best trial: of those that cover about the most weights, heads come before their width."""
    least = _NEARLY * max(weight for weight, _, _ in worths)
    return max(
        range(len(worths)),
        key=lambda i: (worths[i][0] >= least, worths[i][1], worths[i][2], worths[i][0], -i),
    )


def _poor_merges(flow: Flow) -> list[str]:
    """Merges whose ids ended frozen, or joined further than the merge itself asked for."""
    roots, frozen = _representatives(flow), _frozen_ids(flow)
    return [
        name
        for name, merge in flow.merges.items()
        if frozen[merge.ids].any() or len(np.unique(roots[merge.ids])) < merge.n_left[merge.axis]
    ]


# --- the flow itself ---


def _static_tensors(graph: gs.Graph) -> frozenset[str]:
    """Names of tensors that constants and shapes alone decide."""
    changing = {tensor.name for tensor in graph.inputs}
    static: set[str] = set()
    for node in graph.nodes:
        names = {tensor.name for tensor in node.inputs} | set(captured_names(node, changing))
        is_static = names.isdisjoint(changing) or asks_shape_only(node)
        (static if is_static else changing).update(tensor.name for tensor in node.outputs if tensor.name)
    return frozenset(static)


_MAX_PASSES = 8


def _settle(
    graph: gs.Graph,
    shapes: Mapping[str, tuple[int, ...]],
    choice: Choice,
    exclude: Mapping[str, str],
    static: frozenset[str],
) -> Flow:
    """Flow until joins that were found late no longer change the merges that were chosen early."""
    representative = np.zeros(1, np.int64)
    merges: dict[str, Merge] = {}
    sources: dict[str, int] = {}
    for _ in range(_MAX_PASSES):
        flow = Flow(
            graph, shapes, representative=representative, choice=choice, static=static, sources=sources
        )
        _flow_once(flow, exclude)
        if flow.wishes:  # begin anew: other constants carry ids
            sources = {**sources, **flow.wishes}
            representative, merges = np.zeros(1, np.int64), {}
            continue
        merges = flow.merges = {**flow.merges, **merges}  # later passes do not see what is joined already
        joined = _representatives(flow)
        if np.array_equal(joined, representative):
            break
        representative = joined
    return flow


def _flow_once(flow: Flow, exclude: Mapping[str, str]) -> None:
    graph = flow.graph
    constants = graph.tensors() if flow.sources else {}
    for name, axis in flow.sources.items():
        flow.put(constants[name], axis, flow.fresh(constants[name].shape[axis]))
    for node in graph.nodes:
        rule = find_flow(node.op, domain=node.domain or "")
        n_before = len(flow.bound)
        flow.asked.clear()
        if rule is None:
            reason = f"{node.op} is not an operator that channels are followed through"
            for tensor in node.inputs:
                flow.freeze(flow.ids(tensor), node, reason)
        else:
            rule(node, flow)
        for tensor in node.inputs:
            if tensor.name in flow.sources:
                found = flow.tensors[tensor.name]
                if tensor.name in flow.asked:
                    flow.bind(tensor, found.axis, found.ids, "follower", node)
                else:
                    flow.freeze(found, node, f"{node.op} uses '{tensor.name}' as a weight")
        for name in captured_names(node, flow.shapes):  # what a subgraph reads is out of sight
            flow.freeze(flow.tensors.get(name), node, f"a subgraph of {node.op} reads them")
        if node.name in exclude:
            for tensor in (*node.inputs, *node.outputs):
                flow.freeze(flow.ids(tensor), node, exclude[node.name])
            for ids, _ in list(flow.bound.values())[n_before:]:
                flow.freeze(ids, node, exclude[node.name])
    for tensor in graph.outputs:
        producer = tensor.inputs[0] if tensor.inputs else None
        if producer is not None:
            flow.freeze(flow.ids(tensor), producer, f"its channels are the model's output '{tensor.name}'")
    consumers: dict[str, list[gs.Node]] = {}
    for node in graph.nodes:
        for name in _constants_read(node):
            consumers.setdefault(name, []).append(node)
    outputs = {tensor.name for tensor in graph.outputs}
    for (name, axis), (ids, _) in flow.bound.items():
        # A reader that has other channels, or none, along this axis cannot lose them.
        binders = flow.binders[name, axis]
        strangers = [node for node in consumers.get(name, []) if node.name not in binders]
        for node in strangers:
            flow.freeze(ids, node, f"the initializer '{name}' is also used by {node.op} '{node.name}'")
        if name in outputs:
            flow.freeze(ids, consumers[name][0], f"the initializer '{name}' is also an output of the model")
        if name in exclude:
            flow.freeze(ids, consumers[name][0], exclude[name])


def _constants_read(node: gs.Node) -> set[str]:
    """Names of the constants that a node reads, also from within its subgraphs."""
    names = {tensor.name for tensor in node.inputs if isinstance(tensor, gs.Constant)}
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                names |= _constants_read(inner) | {tensor.name for tensor in inner.inputs}
            names |= {tensor.name for tensor in value.outputs}
    return names


def _representatives(flow: Flow) -> Ids:
    """Map each id to the smallest id that it is joined with."""
    n = flow.n_ids
    if flow.edges:
        rows = np.concatenate([a for a, _ in flow.edges])
        columns = np.concatenate([b for _, b in flow.edges])
    else:
        rows = columns = np.zeros(0, np.int64)
    # Ids of an earlier pass are already replaced by their representatives: join those too.
    known = np.arange(min(n, len(flow.representative)))
    rows = np.concatenate([rows, known])
    columns = np.concatenate([columns, flow.representative[known]])
    edges = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(n, n))
    _, labels = connected_components(edges, directed=False)
    smallest = np.full(labels.max() + 1, n, np.int64)
    np.minimum.at(smallest, labels, np.arange(n))
    return smallest[labels]


def _frozen_ids(flow: Flow) -> NDArray[np.bool_]:
    roots = _representatives(flow)
    frozen = np.zeros(flow.n_ids, bool)
    frozen[roots[FIXED]] = True
    for ids, _, _ in flow.marks:
        frozen[roots[ids]] = True
    return frozen[roots]


def _collect(flow: Flow) -> Coupling:
    roots = _representatives(flow)
    frozen = _frozen_ids(flow)
    reasons: dict[int, tuple[str, str]] = {}
    for ids, node, reason in flow.marks:
        for root in np.unique(roots[ids]):
            reasons.setdefault(int(root), (node, reason))

    producers = [ids for ids, role in flow.bound.values() if role == "producer"]
    produced = np.unique(roots[np.concatenate(producers)]) if producers else np.zeros(0, np.int64)
    free = produced[~frozen[produced]]
    # Zeros from a Pad that nothing produces can go too, where a contraction reads them.
    element_of_id = np.full(flow.n_ids, -1, np.int64)
    element_of_id[free] = np.arange(len(free))
    element_of_id = element_of_id[roots]

    weights = tuple(
        WeightAxis(name, axis, role, element_of_id[ids]) for (name, axis), (ids, role) in flow.bound.items()
    )
    return Coupling(
        n_elements=len(free),
        groups=_group_elements(weights, len(free), flow),
        weights=tuple(weight for weight in weights if (weight.elements >= 0).any()),
        tensors={
            name: IdAxis(found.axis, element_of_id[found.ids])
            for name, found in flow.tensors.items()
            if (element_of_id[found.ids] >= 0).any()
        },
        reads=tuple(
            Read(node, index, tensor, found.axis, element_of_id[found.ids])
            for node, index, tensor, found in flow.reads
            if (element_of_id[found.ids] >= 0).any()
        ),
        frozen=_frozen_nodes(flow, roots, frozen, reasons),
        initializer_nodes={name: tuple(users) for name, users in flow.users.items()},
    )


def _group_elements(weights: Iterable[WeightAxis], n_elements: int, flow: Flow) -> tuple[ChannelGroup, ...]:
    """Put elements with the same signature, (weight axis, number of positions) over all axes, together."""
    signatures: list[list[tuple[int, int]]] = [[] for _ in range(n_elements)]
    weights = tuple(weights)
    for index, weight in enumerate(weights):
        elements, counts = np.unique(weight.elements[weight.elements >= 0], return_counts=True)
        for element, count in zip(elements.tolist(), counts.tolist(), strict=True):
            signatures[element].append((index, count))
    members: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for element, signature in enumerate(signatures):
        members.setdefault(tuple(signature), []).append(element)
    groups = []
    taken: set[str] = set()
    for key, elements_of_group in members.items():
        by_role: dict[str, dict[str, None]] = {"producer": {}, "consumer": {}, "follower": {}}
        for index, _ in key:
            for node in flow.users[weights[index].initializer]:
                by_role[weights[index].role][node] = None
        name = base = next(iter(by_role["producer"]))
        n = 1
        while name in taken:
            n += 1
            name = f"{base}#{n}"
        taken.add(name)
        groups.append(
            ChannelGroup(
                name=name,
                elements=np.array(elements_of_group, np.int64),
                axes=tuple((weights[i].initializer, weights[i].axis, count) for i, count in key),
                producers=tuple(by_role["producer"]),
                consumers=tuple(by_role["consumer"]),
            )
        )
    return tuple(groups)


def _frozen_nodes(
    flow: Flow, roots: Ids, frozen: NDArray[np.bool_], reasons: Mapping[int, tuple[str, str]]
) -> tuple[Frozen, ...]:
    """Name each node that produces channels of which none can go, with the first reason found."""
    result: dict[str, Frozen] = {}
    for (name, _), (ids, role) in flow.bound.items():
        if role != "producer" or not frozen[ids].all():
            continue
        known = (reasons[int(root)] for root in roots[ids] if int(root) in reasons)
        node, reason = next(known, ("", "joined with channels that must stay"))
        for user in flow.users[name]:
            text = reason if node in ("", user) else f"{reason} (at '{node}')"
            result.setdefault(user, Frozen(user, text))
    return tuple(result.values())
