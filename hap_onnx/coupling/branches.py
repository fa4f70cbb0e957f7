"""What surgery leaves of a graph when some channel groups go entirely, and which of them may."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from hap_onnx.coupling.channels import Coupling, Read
from hap_onnx.model.measure import Shapes
from hap_onnx.ops.elementwise import takes_branch
from hap_onnx.ops.registry import find_bias, keeps_constant
from hap_onnx.planning.cost import AxisLength, Ints


@dataclass(frozen=True)
class Remains:
    """What surgery leaves when some groups are gone: nodes that still run, and the tensors they read that
    are constant now; ``is_sound`` is False if something that is left has lost what it needs.
    """

    alive: frozenset[str]
    new_constants: frozenset[str]
    is_sound: bool


class Network:
    """Who reads what, and what would be left without some groups.

    ``chains`` holds, once known, the tensors that turn constant with each group that may go.
    """

    def __init__(self, graph: gs.Graph, coupling: Coupling, shapes: Shapes) -> None:
        self.graph, self.coupling, self.shapes = graph, coupling, shapes
        self.group_of = np.full(coupling.n_elements, -1, np.int64)
        for index, members in enumerate(coupling.groups):
            self.group_of[members.elements] = index
        self.consumers: dict[str, list[gs.Node]] = defaultdict(list)
        for node in graph.nodes:
            for tensor in _tensors_read(node):
                self.consumers[tensor.name].append(node)
        self.nodes = {node.name: node for node in graph.nodes}
        self.producer = {out.name: node for node in graph.nodes for out in node.outputs if out.name}
        self.outputs = {tensor.name for tensor in graph.outputs}
        self.reads: dict[int, list[Read]] = defaultdict(list)
        self.only_groups: dict[str, set[int]] = {}  # of contractions that read nothing that must stay
        for read in coupling.reads:
            groups = self.groups_on(read.elements)
            for group in groups:
                self.reads[group].append(read)
            if (read.elements >= 0).all():
                self.only_groups[read.node] = groups
        self.erasable = {
            name: self.groups_on(found.ids)
            for name, found in coupling.tensors.items()
            if (found.ids >= 0).all()
        }
        self.chains: dict[int, frozenset[str]] = {}

    def groups_on(self, elements: Ints) -> set[int]:
        return set(np.unique(self.group_of[elements[elements >= 0]]).tolist())

    def length(self, elements: Ints) -> AxisLength:
        """Count positions of an axis by group."""
        positions = np.bincount(elements[elements >= 0], minlength=self.coupling.n_elements)
        fixed = int((elements < 0).sum())
        multiples = []
        for group in sorted(self.groups_on(elements)):
            counts = positions[self.coupling.groups[group].elements]
            if (counts == counts[0]).all():
                multiples.append((group, int(counts[0])))
            else:  # what is saved depends on which channels go: count no saving
                fixed += int(counts.sum())
        return AxisLength(fixed, tuple(multiples))

    def reader_names(self, tensor: str) -> set[str]:
        return {node.name for node in self.consumers[tensor]}

    def without(self, gone: set[int]) -> Remains:
        """Follow what surgery does when these groups have width 0."""
        dead = {node for node, groups in self.only_groups.items() if groups <= gone}
        constant: set[str] = set()
        if dead:
            for node in self.graph.nodes:
                inputs = [tensor for tensor in node.inputs if tensor.name]
                is_folded = any(tensor.name in constant for tensor in inputs) and all(
                    isinstance(tensor, gs.Constant) or tensor.name in constant for tensor in inputs
                )
                if node.name in dead or is_folded:
                    constant.update(tensor.name for tensor in node.outputs if tensor.name)
        alive: set[str] = set()
        new_constants: set[str] = set()
        queue = sorted(self.outputs)
        while queue:
            name = queue.pop()
            if name in constant:
                new_constants.add(name)
            elif name in self.producer and self.producer[name].name not in alive:
                node = self.producer[name]
                alive.add(node.name)
                queue.extend(tensor.name for tensor in _tensors_read(node))
        in_chains = set[str]().union(*(self.chains.get(group, frozenset()) for group in gone))
        empty = {name for name, groups in self.erasable.items() if groups <= gone} if gone else set()
        is_sound = constant <= in_chains and not any(
            tensor.name in empty
            for name in alive
            for tensor in (*self.nodes[name].inputs, *self.nodes[name].outputs)
        )
        return Remains(frozenset(alive), frozenset(new_constants), is_sound)

    def dead_read_behind(self, tensor: str, group: int) -> Read:
        """Find the contraction whose bias ``tensor`` becomes: the start of its chain."""
        starts = {read.node: read for read in self.reads[group]}
        while self.producer[tensor].name not in starts:
            tensor = self.producer[tensor].inputs[0].name
        return starts[self.producer[tensor].name]

    def bias_left(self, read: Read) -> tuple[tuple[int, ...], dict[int, AxisLength]]:
        """Shape and channel axis of the constant that a contraction without inputs becomes."""
        node, out = self.nodes[read.node], self.nodes[read.node].outputs[0].name
        left = _bias_of(node, len(self.shapes[out]))
        assert left is not None  # or the group would not count as removable
        found = self.coupling.tensors.get(out)
        return left.shape, {} if found is None else {found.axis: self.length(found.ids)}


def removable_groups(network: Network) -> tuple[int, ...]:
    """Return the groups that may go entirely, all of them together; fill ``network.chains``."""
    for index, members in enumerate(network.coupling.groups):
        reads = network.reads[index]
        if members.frozen is not None or not reads:
            continue
        chains = [
            _chain_to_add(read, network) if network.only_groups.get(read.node) == {index} else None
            for read in reads
        ]
        if None not in chains:
            network.chains[index] = frozenset(name for chain in chains for name in chain or ())
    alone = [group for group in network.chains if network.without({group}).is_sound]
    if network.without(set(alone)).is_sound:
        return tuple(alone)
    accepted: list[int] = []
    for group in alone:
        if network.without({*accepted, group}).is_sound:
            accepted.append(group)
    return tuple(accepted)


def _chain_to_add(read: Read, network: Network) -> list[str] | None:
    """Names of the tensors from a contraction to the Add that takes it in; None if it goes elsewhere."""
    node = network.nodes[read.node]
    if _bias_of(node, len(network.shapes[node.outputs[0].name])) is None:
        return None
    chain: list[str] = []
    while True:
        name = node.outputs[0].name
        chain.append(name)
        users = network.consumers[name]
        if name in network.outputs or len(users) != 1 or any(t.name for t in node.outputs[1:]):
            return None
        user = users[0]
        inputs = [tensor.name for tensor in user.inputs]
        if name not in inputs:  # a graph inside the node reads it
            return None
        position = inputs.index(name)
        if takes_branch(user, position):
            other = user.inputs[1 - position]
            whole = not isinstance(other, gs.Constant) and network.shapes.get(other.name) is not None
            whole = whole and network.shapes[other.name] == network.shapes[user.outputs[0].name]
            return chain if whole else None
        parameters = [tensor for tensor in user.inputs[1:] if tensor.name]
        if (
            not keeps_constant(user.op, domain=user.domain or "")
            or user.inputs[0].name != name
            or not all(isinstance(tensor, gs.Constant) for tensor in parameters)
            or int(user.attrs.get("training_mode", 0))
        ):
            return None
        node = user


def _bias_of(node: gs.Node, ndim: int) -> np.ndarray | None:
    """What surgery replaces a node by when it has nothing to read any more; None if it cannot."""
    rule = find_bias(node.op, domain=node.domain or "")
    return None if rule is None else rule(node, ndim)


def _tensors_read(node: gs.Node) -> Iterator[gs.Tensor]:
    """Yield what a node reads, its subgraphs included."""
    yield from (tensor for tensor in node.inputs if tensor.name)
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                yield from _tensors_read(inner)
            yield from value.outputs
