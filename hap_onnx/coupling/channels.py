"""Coupling: which channels must go together.

Every channel that a contraction (Conv, Gemm, MatMul) produces gets an integer id, and the ids flow along
the tensors of the graph: elementwise operators join the ids that meet, data movement carries them,
contractions join the ids that they read with an axis of their weight and make fresh ids for what they
produce. What is joined in the end is one *element*: it is kept or removed as a whole. Elements that touch
the same axes in the same way form a *channel group*, the unit of planning: which of them stay is a matter
of sensitivity, how many is a matter of cost.

A tensor carries ids along at most one axis. That is no restriction of the method: a tensor is a regular
grid, so it can lose slices along one axis only. Where a Reshape spreads ids over two axes (channel shuffle,
grouped weights, the heads of attention), they are joined along one of them; ``merging`` finds out which.

What is not understood is frozen, with a reason: an operator without a rule, an output of the model,
a normalisation over the channels. A frozen channel is never removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from hap_onnx.coupling.merging import Choice, Merge, choose, count_left, varies
from hap_onnx.ops.elementwise import is_elementwise
from hap_onnx.ops.registry import find_flow
from hap_onnx.ops.shape import asks_shape_only
from hap_onnx.twin.opaque import captured_names

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

    def join_rows(self, rows: Ids) -> Ids:
        """Say that the ids in each row can only go together; return the first of each."""
        first = np.ascontiguousarray(rows[:, 0])
        self.join(np.repeat(first, rows.shape[1]), rows.ravel())
        return first

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
        varying = [axis for axis in range(ids.ndim) if varies(ids, axis)]
        index = tuple(slice(None) if axis in varying else slice(0, 1) for axis in range(ids.ndim))
        ids, full = ids[index], ids
        if len(varying) <= 1:
            axis = varying[0] if varying else int(np.argmax(full.shape))
            return axis, np.broadcast_to(ids.ravel(), full.shape[axis]).copy()
        n_left = {axis: count_left(ids, axis) for axis in varying}
        axis = self.choice.pick(node.name, n_left)
        self.merges[node.name] = Merge(np.unique(ids), axis, n_left)
        return axis, self.join_rows(np.moveaxis(ids, axis, 0).reshape(ids.shape[axis], -1))

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

    # --- what the ids come to in the end ---

    def representatives(self) -> Ids:
        """Map each id to the smallest id that it is joined with."""
        n = self.n_ids
        if self.edges:
            rows = np.concatenate([a for a, _ in self.edges])
            columns = np.concatenate([b for _, b in self.edges])
        else:
            rows = columns = np.zeros(0, np.int64)
        # Ids of an earlier pass are already replaced by their representatives: join those too.
        known = np.arange(min(n, len(self.representative)))
        rows = np.concatenate([rows, known])
        columns = np.concatenate([columns, self.representative[known]])
        edges = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(n, n))
        _, labels = connected_components(edges, directed=False)
        smallest = np.full(labels.max() + 1, n, np.int64)
        np.minimum.at(smallest, labels, np.arange(n))
        return smallest[labels]

    def frozen_ids(self) -> NDArray[np.bool_]:
        """Say of each id whether it must stay, by itself or by what it is joined with."""
        roots = self.representatives()
        frozen = np.zeros(self.n_ids, bool)
        frozen[roots[FIXED]] = True
        for ids, _, _ in self.marks:
            frozen[roots[ids]] = True
        return frozen[roots]

    def free_ids(self) -> NDArray[np.bool_]:
        """Say of each id whether it can be removed: something produces it, and nothing keeps it."""
        roots = self.representatives()
        produced = np.zeros(self.n_ids, bool)
        for ids, role in self.bound.values():
            if role == "producer":
                produced[roots[ids]] = True
        return produced[roots] & ~self.frozen_ids()


_MAX_WALK = 200


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

    return _collect(choose(settle))


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
        joined = flow.representatives()
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


def _collect(flow: Flow) -> Coupling:
    roots = flow.representatives()
    frozen = flow.frozen_ids()
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
    reads = tuple(
        Read(node, index, tensor, found.axis, element_of_id[found.ids])
        for node, index, tensor, found in flow.reads
        if (element_of_id[found.ids] >= 0).any()
    )
    return Coupling(
        n_elements=len(free),
        groups=_group_elements(weights, reads, len(free), flow),
        weights=tuple(weight for weight in weights if (weight.elements >= 0).any()),
        tensors={
            name: IdAxis(found.axis, element_of_id[found.ids])
            for name, found in flow.tensors.items()
            if (element_of_id[found.ids] >= 0).any()
        },
        reads=reads,
        frozen=_frozen_nodes(flow, roots, frozen, reasons),
        initializer_nodes={name: tuple(users) for name, users in flow.users.items()},
    )


def _group_elements(
    weights: Sequence[WeightAxis], reads: Sequence[Read], n_elements: int, flow: Flow
) -> tuple[ChannelGroup, ...]:
    """Put elements with the same signature, (axis, number of positions) over all weights and reads, together.

    Reads count, too: not every contraction has a weight along what it reads, and a group that keeps one
    element must not leave any of them without input.
    """
    signatures: list[list[tuple[int, int]]] = [[] for _ in range(n_elements)]
    carried = [axis.elements for axis in weights] + [read.elements for read in reads]
    for index, ids in enumerate(carried):
        elements, counts = np.unique(ids[ids >= 0], return_counts=True)
        for element, count in zip(elements.tolist(), counts.tolist(), strict=True):
            signatures[element].append((index, count))
    members: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for element, signature in enumerate(signatures):
        members.setdefault(tuple(signature), []).append(element)
    groups = []
    taken: set[str] = set()
    for whole, elements_of_group in members.items():
        key = [(index, count) for index, count in whole if index < len(weights)]
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
