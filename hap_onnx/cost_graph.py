"""What a graph costs: terms, layers and removable branches, found by following what surgery will do.

The counts equal ``measure.model_size`` after ``surgery.remove_channels``, with exceptions that count too
much, never too little: what lives as long as one of several branches, when all of them go; an axis on which
the channels of a group do not have equally many positions; and a third axis of one array that loses
channels.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from hap_onnx import ops  # noqa: F401  (registers the counting rules)
from hap_onnx.channels import Coupling, Read
from hap_onnx.cost import AxisLength, CostModel, CostTerm, Ints, LayerTerms
from hap_onnx.measure import Shapes, constants_of, is_float_type, node_macs
from hap_onnx.ops.elementwise import takes_branch
from hap_onnx.ops.linear import linear_form
from hap_onnx.ops.registry import find_bias, find_macs, keeps_constant


def cost_model(
    graph: gs.Graph, coupling: Coupling, shapes: Shapes, layers: Collection[str] = ()
) -> CostModel:
    """Price the channel groups of a normalised graph.

    Args:
        graph: the graph that ``coupling`` was found on.
        coupling: its channel groups.
        shapes: the shape of every tensor at the probe input, batch included.
        layers: names of nodes that may be replaced. ``CostModel.layers`` has, in the order of the graph,
            those whose cost is bilinear in the two axes of their weight. It lacks what has no matrix form,
            shares its weight, loses whole conv groups, or counts another axis that loses channels.

    Raises:
        ValueError: a layer is no node of the graph.
    """
    network = _Network(graph, coupling, shapes)
    removable = _removable_groups(network)
    without = {group: network.without({group}) for group in removable}
    builder = _TermBuilder()
    whole = network.without(set())

    readers: dict[str, list[str]] = defaultdict(list)
    constants: dict[str, gs.Constant] = {}
    for node in graph.nodes:
        for tensor in constants_of(node):
            readers[tensor.name].append(node.name)
            constants[tensor.name] = tensor
    outputs = {tensor.name: tensor for tensor in graph.outputs if isinstance(tensor, gs.Constant)}
    constants.update(outputs)
    sliced: dict[str, dict[int, AxisLength]] = defaultdict(dict)
    for weight in coupling.weights:
        sliced[weight.initializer][weight.axis] = network.length(weight.elements)
    found_layers = _find_layers(network, set(layers), sliced, {*outputs}, readers)
    for name, tensor in constants.items():
        users = readers[name]
        if len(users) == 1 and users[0] in found_layers and name == found_layers[users[0]].weight:
            continue
        if not is_float_type(np.dtype(tensor.values.dtype)):
            continue
        if name not in outputs and not any(user in whole.alive for user in users):
            continue
        dies = {g for g, rest in without.items() if name not in outputs and rest.alive.isdisjoint(users)}
        builder.add(0, tuple(tensor.shape), sliced[name], dies)

    for node in graph.nodes:
        if node.name in whole.alive:
            dies = {group for group, rest in without.items() if node.name not in rest.alive}
            if node.name in found_layers:
                builder.add_layer(node.name, found_layers[node.name], dies)
                continue
            macs, axes = _macs_axes(node, network, sliced)
            builder.add(1, macs, axes, dies)

    for group, rest in without.items():
        for name in rest.new_constants:
            dies = {
                other
                for other in removable
                if other != group and without[other].alive.isdisjoint(network.reader_names(name))
            }
            read = network.dead_read_behind(name, group)
            shape, axes = network.bias_left(read)
            builder.add(0, shape, axes, dies, born_with=group)
    return builder.build(tuple(group.size for group in coupling.groups), removable)


def removable_branches(graph: gs.Graph, coupling: Coupling, shapes: Shapes) -> frozenset[str]:
    """Return the names of the groups that may go entirely, a residual branch with each.

    Each contraction that reads such a group reads nothing else, and its output goes, through nothing but
    normalisation and activation, into an Add (or a Sub, as what is subtracted) whose other operand is
    computed and has the full output shape. Without the group, the contraction is its bias, and the Add adds
    a constant. All of them may go together: of branches that only together leave nothing, the first may.
    """
    network = _Network(graph, coupling, shapes)
    return frozenset(coupling.groups[group].name for group in _removable_groups(network))


@dataclass(frozen=True)
class _Remains:
    """What surgery leaves when some groups are gone: nodes that still run, and the tensors they read that
    are constant now; ``is_sound`` is False if something that is left has lost what it needs.
    """

    alive: frozenset[str]
    new_constants: frozenset[str]
    is_sound: bool


class _Network:
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

    def without(self, gone: set[int]) -> _Remains:
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
        return _Remains(frozenset(alive), frozenset(new_constants), is_sound)

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


def _removable_groups(network: _Network) -> tuple[int, ...]:
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


def _chain_to_add(read: Read, network: _Network) -> list[str] | None:
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
        position = [tensor.name for tensor in user.inputs].index(name)
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


@dataclass(frozen=True)
class _Layer:
    """The weight of a node, the lengths of its input and output axes, params and macs per their product."""

    weight: str
    lengths: tuple[AxisLength, AxisLength]
    dense: tuple[int, int]


def _find_layers(
    network: _Network,
    names: set[str],
    sliced: Mapping[str, Mapping[int, AxisLength]],
    outputs: set[str],
    readers: Mapping[str, Sequence[str]],
) -> dict[str, _Layer]:
    unknown = sorted(names - set(network.nodes))
    if unknown:
        raise ValueError(f"the graph has no node {', '.join(unknown)}")
    found = {}
    for name in names:
        layer = _bilinear_layer(network.nodes[name], network, sliced)
        if layer is not None and readers[layer.weight] == [name] and layer.weight not in outputs:
            found[name] = layer
    return found


def _bilinear_layer(
    node: gs.Node, network: _Network, sliced: Mapping[str, Mapping[int, AxisLength]]
) -> _Layer | None:
    """Write a node's cost as one product of the axes of its weight; None if it is none."""
    form = linear_form(node)
    weight = None if form is None else node.inputs[form.weight_index]
    if form is None or not isinstance(weight, gs.Constant):
        return None
    if not is_float_type(np.dtype(weight.values.dtype)):
        return None
    shape, axes = tuple(weight.shape), (form.in_axis, form.out_axis)
    follows = any(
        bound.initializer == weight.name and bound.role == "follower" for bound in network.coupling.weights
    )
    varying = {axis: length for axis, length in sliced.get(weight.name, {}).items() if length.multiples}
    if follows or not varying.keys() <= set(axes):  # whole conv groups go, and the number of groups with them
        return None
    _, counted = _macs_axes(node, network, sliced)
    if Counter(length for length in counted.values() if length.multiples) != Counter(varying.values()):
        return None
    n_in, n_out = (shape[axis] for axis in axes)
    macs = node_macs(node, network.shapes)
    if macs == 0 or macs % (n_in * n_out):
        return None
    lengths = tuple(varying.get(axis, AxisLength(shape[axis])) for axis in axes)
    dense = (prod(shape) // (n_in * n_out), macs // (n_in * n_out))
    return _Layer(weight.name, (lengths[0], lengths[1]), dense)


class _TermBuilder:
    """Collects terms; equal axes are one axis, and terms that differ in coefficients only are one term.

    Layers have terms of their own.
    """

    def __init__(self) -> None:
        self._layers: list[tuple[str, Ints, list[CostTerm]]] = []
        self._axes: dict[AxisLength, int] = {}
        self._terms: dict[tuple[Any, ...], list[int]] = {}

    def add(
        self,
        metric: int,
        shape: tuple[int, ...],
        lengths: Mapping[int, AxisLength],
        dies_with: Iterable[int],
        *,
        born_with: int | None = None,
    ) -> None:
        """Add the product of ``shape``, of which some axes have lengths that depend on widths."""
        varying = {axis: length for axis, length in sorted(lengths.items()) if length.multiples}
        varying = dict(list(varying.items())[:2])
        coefficient = prod(size for axis, size in enumerate(shape) if axis not in varying)
        indices = tuple(sorted(self._axes.setdefault(length, len(self._axes)) for length in varying.values()))
        # A group that empties one of the axes needs no mention: the product is zero then.
        emptied = {
            length.multiples[0][0]
            for length in varying.values()
            if not length.fixed and len(length.multiples) == 1
        }
        key = (indices, frozenset(dies_with) - emptied, born_with)
        self._terms.setdefault(key, [0, 0])[metric] += coefficient

    def add_layer(self, node: str, layer: _Layer, dies_with: Iterable[int]) -> None:
        """Add the terms of a layer, all of which vanish with the same groups."""
        n_in, n_out = (self._axes.setdefault(length, len(self._axes)) for length in layer.lengths)
        dense = np.zeros((4, 2), np.int64)
        dense[0] = layer.dense
        terms = [
            CostTerm(params, macs, axes, frozenset(dies_with))
            for (params, macs), axes in zip(
                dense.tolist(), [(n_in, n_out), (n_in,), (n_out,), ()], strict=True
            )
        ]
        self._layers.append((node, dense, terms))

    def build(self, sizes: tuple[int, ...], removable: Iterable[int]) -> CostModel:
        terms = [
            CostTerm(params, macs, axes, dies_with, born_with)
            for (axes, dies_with, born_with), (params, macs) in self._terms.items()
            if params or macs
        ]
        layers = []
        for node, dense, own in self._layers:
            first = len(terms)
            layers.append(LayerTerms(node, (first, first + 1, first + 2, first + 3), dense))
            terms += own
        return CostModel(sizes, tuple(self._axes), tuple(terms), frozenset(removable), tuple(layers))


def _macs_axes(
    node: gs.Node, network: _Network, sliced: Mapping[str, Mapping[int, AxisLength]]
) -> tuple[tuple[int, ...], dict[int, AxisLength]]:
    """Write a node's multiply-accumulates as a product: (sizes, lengths of those that depend on widths).

    Which axes count is asked of the counting rule itself: double one, and see whether the count doubles.
    """
    rule = find_macs(node.op, domain=node.domain or "")
    macs = node_macs(node, network.shapes)
    if rule is None or macs == 0:
        return (macs,), {}
    inputs = [_shape(tensor, network.shapes) for tensor in node.inputs]
    outputs = [network.shapes[tensor.name] for tensor in node.outputs if tensor.name]
    named_outputs = [tensor for tensor in node.outputs if tensor.name]
    factors: list[tuple[int, AxisLength]] = []
    for tensors, sizes in ((node.inputs, inputs), (named_outputs, outputs)):
        for index, tensor in enumerate(tensors):
            for axis, length in _lengths_of(tensor, network, sliced).items():
                shape = sizes[index]
                assert shape is not None  # or the rule would have counted nothing
                sizes[index] = tuple(n * 2 if a == axis else n for a, n in enumerate(shape))
                doubled = int(rule(node, inputs, outputs))
                sizes[index] = shape
                if doubled != macs:
                    assert doubled == 2 * macs, f"{node.name}: multiply-accumulates are no product of axes"
                    factors.append((shape[axis], length))
    rest = macs // prod(size for size, _ in factors)
    return (rest, *(size for size, _ in factors)), {i + 1: length for i, (_, length) in enumerate(factors)}


def _lengths_of(
    tensor: gs.Tensor, network: _Network, sliced: Mapping[str, Mapping[int, AxisLength]]
) -> Mapping[int, AxisLength]:
    if isinstance(tensor, gs.Constant):
        return sliced.get(tensor.name, {})
    found = network.coupling.tensors.get(tensor.name)
    return {} if found is None else {found.axis: network.length(found.ids)}


def _shape(tensor: gs.Tensor, shapes: Shapes) -> tuple[int, ...] | None:
    if not tensor.name:  # an omitted optional input
        return None
    return tuple(tensor.shape) if isinstance(tensor, gs.Constant) else shapes.get(tensor.name)


def _tensors_read(node: gs.Node) -> Iterator[gs.Tensor]:
    """Yield what a node reads, its subgraphs included."""
    yield from (tensor for tensor in node.inputs if tensor.name)
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                yield from _tensors_read(inner)
            yield from value.outputs
