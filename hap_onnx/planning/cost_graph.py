"""What a graph costs: its terms and layers, found by following what surgery will do.

The counts equal ``measure.model_size`` after ``surgery.remove_channels``, with exceptions that count too
much, never too little: what lives as long as one of several branches, when all of them go; an axis on which
the channels of a group do not have equally many positions; and a third axis of one array that loses
channels.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from hap_onnx import ops  # noqa: F401  (registers the counting rules)
from hap_onnx.coupling.branches import Network, removable_groups
from hap_onnx.coupling.channels import Coupling
from hap_onnx.model.measure import Shapes, constants_of, is_float_type, node_macs, weights_of
from hap_onnx.ops.linear import linear_form
from hap_onnx.ops.registry import find_macs
from hap_onnx.planning.cost import (
    LATENCY,
    MACS,
    N_METRICS,
    PARAMS,
    AxisLength,
    CostModel,
    CostTerm,
    Ints,
    LayerTerms,
)
from hap_onnx.planning.times import NodeTimes


def cost_model(
    graph: gs.Graph,
    coupling: Coupling,
    shapes: Shapes,
    layers: Collection[str] = (),
    times: NodeTimes | None = None,
) -> CostModel:
    """Price the channel groups of a normalised graph.

    Args:
        graph: the graph that ``coupling`` was found on.
        coupling: its channel groups.
        shapes: the shape of every tensor at the probe input, batch included.
        layers: names of nodes that may be replaced. ``CostModel.layers`` has, in the order of the graph,
            those whose cost is bilinear in the two axes of their weight. It lacks what has no matrix form,
            shares its weight, loses whole conv groups, or counts another axis that loses channels.
        times: what nodes take in the runtime; without it latency is 0.

    Raises:
        ValueError: a layer is no node of the graph.
    """
    network = Network(graph, coupling, shapes)
    removable = removable_groups(network)
    without = {group: network.without({group}) for group in removable}
    builder = _TermBuilder()
    whole = network.without(set())

    readers, sliced = _readers(graph), _sliced_axes(network)
    constants = {tensor.name: tensor for node in graph.nodes for tensor in constants_of(node)}
    outputs = {tensor.name: tensor for tensor in graph.outputs if isinstance(tensor, gs.Constant)}
    constants.update(outputs)
    counted = {tensor.name for node in graph.nodes for tensor in weights_of(node)}
    counted |= {name for name, tensor in outputs.items() if is_float_type(np.dtype(tensor.values.dtype))}
    found_layers = _find_layers(network, set(layers), sliced, {*outputs}, readers)
    for name, tensor in constants.items():
        users = readers[name]
        if len(users) == 1 and users[0] in found_layers and name == found_layers[users[0]].weight:
            continue
        if name not in counted:
            continue
        if name not in outputs and not any(user in whole.alive for user in users):
            continue
        dies = {g for g, rest in without.items() if name not in outputs and rest.alive.isdisjoint(users)}
        builder.add(PARAMS, tuple(tensor.shape), sliced[name], dies)

    for node in graph.nodes:
        if node.name in whole.alive:
            dies = {group for group, rest in without.items() if node.name not in rest.alive}
            if node.name in found_layers:
                dense_times = None if times is None else times.of_layer(node.name)
                builder.add_layer(node.name, found_layers[node.name], dies, dense_times)
                continue
            shape, axes = _macs_axes(node, network, sliced)
            builder.add(MACS, shape, axes, dies)
            if times is not None:
                for picoseconds, lengths in _time_terms(node, times, network, sliced):
                    builder.add_product(LATENCY, picoseconds, lengths, dies)

    for group, rest in without.items():
        for name in rest.new_constants:
            dies = {
                other
                for other in removable
                if other != group and without[other].alive.isdisjoint(network.reader_names(name))
            }
            read = network.dead_read_behind(name, group)
            shape, axes = network.bias_left(read)
            builder.add(PARAMS, shape, axes, dies, born_with=group)
    return builder.build(tuple(group.size for group in coupling.groups), removable)


def replaceable_layers(
    graph: gs.Graph, coupling: Coupling, shapes: Shapes, layers: Collection[str]
) -> frozenset[str]:
    """Return those of ``layers`` that ``cost_model`` would have as such: no plan can replace any other."""
    network = Network(graph, coupling, shapes)
    outputs = {tensor.name for tensor in graph.outputs}
    return frozenset(_find_layers(network, set(layers), _sliced_axes(network), outputs, _readers(graph)))


def _readers(graph: gs.Graph) -> Mapping[str, list[str]]:
    """The nodes that read each constant, once per use."""
    readers: dict[str, list[str]] = defaultdict(list)
    for node in graph.nodes:
        for tensor in constants_of(node):
            readers[tensor.name].append(node.name)
    return readers


def _sliced_axes(network: Network) -> Mapping[str, dict[int, AxisLength]]:
    """By constant, the axes that lose channels."""
    sliced: dict[str, dict[int, AxisLength]] = defaultdict(dict)
    for weight in network.coupling.weights:
        sliced[weight.initializer][weight.axis] = network.length(weight.elements)
    return sliced


def removable_branches(graph: gs.Graph, coupling: Coupling, shapes: Shapes) -> frozenset[str]:
    """Return the names of the groups that may go entirely, a residual branch with each.

    Each contraction that reads such a group reads nothing else, and its output goes, through nothing but
    normalisation and activation, into an Add (or a Sub, as what is subtracted) whose other operand is
    computed and has the full output shape. Without the group, the contraction is its bias, and the Add adds
    a constant. All of them may go together: of branches that only together leave nothing, the first may.
    """
    network = Network(graph, coupling, shapes)
    return frozenset(coupling.groups[group].name for group in removable_groups(network))


@dataclass(frozen=True)
class _Layer:
    """The weight of a node, the lengths of its input and output axes, params and macs per their product."""

    weight: str
    lengths: tuple[AxisLength, AxisLength]
    dense: tuple[int, int]


def _find_layers(
    network: Network,
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
    node: gs.Node, network: Network, sliced: Mapping[str, Mapping[int, AxisLength]]
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
        self.add_product(metric, coefficient, list(varying.values()), dies_with, born_with=born_with)

    def add_product(
        self,
        metric: int,
        coefficient: int,
        varying: Sequence[AxisLength],
        dies_with: Iterable[int],
        *,
        born_with: int | None = None,
    ) -> None:
        """Add a multiple of the product of at most two lengths that depend on widths."""
        indices = tuple(sorted(self._axes.setdefault(length, len(self._axes)) for length in varying))
        # A group that empties one of the axes needs no mention: the product is zero then.
        emptied = {
            length.multiples[0][0]
            for length in varying
            if not length.fixed and len(length.multiples) == 1
        }
        key = (indices, frozenset(dies_with) - emptied, born_with)
        self._terms.setdefault(key, [0] * N_METRICS)[metric] += coefficient

    def add_layer(
        self, node: str, layer: _Layer, dies_with: Iterable[int], times: Ints | None = None
    ) -> None:
        """Add the terms of a layer, all of which vanish with the same groups; ``times`` [4] as it is."""
        n_in, n_out = (self._axes.setdefault(length, len(self._axes)) for length in layer.lengths)
        dense = np.zeros((4, N_METRICS), np.int64)
        dense[0, [PARAMS, MACS]] = layer.dense
        if times is not None:
            dense[:, LATENCY] = times
        terms = [
            CostTerm(params, macs, axes, frozenset(dies_with), latency=latency)
            for (params, macs, latency), axes in zip(
                dense.tolist(), [(n_in, n_out), (n_in,), (n_out,), ()], strict=True
            )
        ]
        self._layers.append((node, dense, terms))

    def build(self, sizes: tuple[int, ...], removable: Iterable[int]) -> CostModel:
        terms = [
            CostTerm(params, macs, axes, dies_with, born_with, latency)
            for (axes, dies_with, born_with), (params, macs, latency) in self._terms.items()
            if params or macs or latency
        ]
        layers = []
        for node, dense, own in self._layers:
            first = len(terms)
            layers.append(LayerTerms(node, (first, first + 1, first + 2, first + 3), dense))
            terms += own
        return CostModel(sizes, tuple(self._axes), tuple(terms), frozenset(removable), tuple(layers))


def _macs_axes(
    node: gs.Node, network: Network, sliced: Mapping[str, Mapping[int, AxisLength]]
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
                    if doubled != 2 * macs:  # no product of axes: count no saving
                        return (macs,), {}
                    factors.append((shape[axis], length))
    rest = macs // prod(size for size, _ in factors)
    return (rest, *(size for size, _ in factors)), {i + 1: length for i, (_, length) in enumerate(factors)}


def _time_terms(
    node: gs.Node, times: NodeTimes, network: Network, sliced: Mapping[str, Mapping[int, AxisLength]]
) -> list[tuple[int, list[AxisLength]]]:
    """Write what a node takes as a sum of picoseconds times products of lengths that depend on widths."""
    dense = times.dense.get(node.name)
    form = linear_form(node) if dense is not None else None
    if dense is not None and form is not None:
        weight = node.inputs[form.weight_index]
        shape, axes = weight.shape, sliced.get(weight.name, {})
        n_in, n_out = (axes.get(axis, AxisLength(shape[axis])) for axis in (form.in_axis, form.out_axis))
        pairs = zip(dense.tolist(), [[n_in, n_out], [n_in], [n_out], []], strict=True)
        return [_fix(picoseconds, lengths) for picoseconds, lengths in pairs if picoseconds]
    whole = times.other.get(node.name, 0)
    counted = [length for _, length in sorted(_macs_axes(node, network, sliced)[1].items())][:2]
    if not counted:  # data moves, or is looked at element by element
        named = [tensor for tensor in (*node.outputs, *node.inputs) if tensor.name]
        found = [length for tensor in named for length in _lengths_of(tensor, network, sliced).values()]
        counted = [length for length in found if length.multiples][:1]
    full = prod(_full(length, network) for length in counted)
    return [_fix(round(whole / full), counted)] if whole else []


def _fix(picoseconds: int, lengths: Sequence[AxisLength]) -> tuple[int, list[AxisLength]]:
    """Multiply with the lengths that do not depend on widths."""
    fixed = prod(length.fixed for length in lengths if not length.multiples)
    return picoseconds * fixed, [length for length in lengths if length.multiples]


def _full(length: AxisLength, network: Network) -> int:
    groups = network.coupling.groups
    return length.fixed + sum(n * groups[group].size for group, n in length.multiples)


def _lengths_of(
    tensor: gs.Tensor, network: Network, sliced: Mapping[str, Mapping[int, AxisLength]]
) -> Mapping[int, AxisLength]:
    if isinstance(tensor, gs.Constant):
        return sliced.get(tensor.name, {})
    found = network.coupling.tensors.get(tensor.name)
    if found is None:
        return {}
    length = network.length(found.ids)
    size = network.shapes[tensor.name][found.axis]
    if size != len(found.ids):  # heads lie on one axis with the batch, of which the probe had more
        length = AxisLength(
            length.fixed * size // len(found.ids),
            tuple((group, n * size // len(found.ids)) for group, n in length.multiples),
        )
    return {found.axis: length}


def _shape(tensor: gs.Tensor, shapes: Shapes) -> tuple[int, ...] | None:
    if not tensor.name:  # an omitted optional input
        return None
    return tuple(tensor.shape) if isinstance(tensor, gs.Constant) else shapes.get(tensor.name)
