"""Cost: parameters and multiply-accumulates as functions of how many channels each group keeps.

The length of an axis that carries channels is a number of fixed positions plus, for each group, so many
positions per channel that is kept. A weight has the product of its axes as elements; a node's
multiply-accumulates are a product of the axes that its counting rule looks at. So both costs are sums of
*terms*, each a coefficient times the lengths of a few axes, and planning needs no surgery to price a choice.

A group of width 0 takes a whole branch away, and with it what only the branch kept alive: such terms
vanish though none of their axes does. What the branch adds to the residual stream becomes a constant: such
terms appear. Both are found by following what surgery will do.

The counts equal ``measure.model_size`` after ``surgery.remove_channels``, with exceptions that count too
much, never too little: what lives as long as one of several branches, when all of them go; an axis on which
the channels of a group do not have equally many positions; and a third axis of one array that loses
channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from hap_onnx import ops  # noqa: F401  (registers the counting rules)
from hap_onnx.channels import Coupling, Read
from hap_onnx.measure import Shapes, constants_of, is_float_type, node_macs
from hap_onnx.ops.elementwise import takes_branch
from hap_onnx.ops.registry import find_bias, find_macs, keeps_constant

Ints = NDArray[np.int64]

METRICS = ("params", "macs")
"""The order of the two costs wherever both are in one array."""


@dataclass(frozen=True)
class AxisLength:
    """``fixed`` positions plus, for each (group, positions per channel), so many per channel kept."""

    fixed: int
    multiples: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class CostTerm:
    """``params`` and ``macs`` per unit of the product of ``axes``: indices into the model's, two at most.

    The term is zero while any group of ``dies_with`` has width 0, and while the group ``born_with``, if there
    is one, has another width than 0.
    """

    params: int
    macs: int
    axes: tuple[int, ...]
    dies_with: frozenset[int] = frozenset()
    born_with: int | None = None

    def __post_init__(self) -> None:
        if len(self.axes) > 2:
            raise ValueError(f"a term has two axes at most, not {len(self.axes)}")


@dataclass(frozen=True)
class _Compiled:
    """A cost model as arrays.

    ``axes`` [n_terms, 2] is padded with an extra axis of length 1. ``groups`` and ``multiples`` are, of each
    axis, what lies on it; ``axes_of`` is the same by group: (axes, multiples). ``curvature``
    [n_groups, n_groups, 2] are the second derivatives of both costs where no group has width 0. A *pair* is
    (group, term that appears or disappears when that group goes).
    """

    fixed: Ints
    axes: Ints
    coefficients: Ints
    groups: tuple[Ints, ...]
    multiples: tuple[Ints, ...]
    axes_of: tuple[tuple[Ints, Ints], ...]
    curvature: Ints
    pair_group: Ints
    pair_term: Ints
    pair_multiple: Ints
    pair_dies: NDArray[np.bool_]
    pairs_of: Mapping[int, Ints]


@dataclass(frozen=True)
class CostModel:
    """Parameters and multiply-accumulates as a function of group widths.

    ``sizes`` holds the full width of each group; ``removable`` the groups that may have width 0.
    """

    sizes: tuple[int, ...]
    axes: tuple[AxisLength, ...]
    terms: tuple[CostTerm, ...]
    removable: frozenset[int] = frozenset()

    def params(self, widths: Sequence[int] | Ints) -> int:
        """Count the elements of float initializers at these widths, one per group."""
        return int(self.totals(widths)[0])

    def macs(self, widths: Sequence[int] | Ints) -> int:
        """Count the multiply-accumulates at the probe shape at these widths."""
        return int(self.totals(widths)[1])

    def totals(self, widths: Sequence[int] | Ints) -> Ints:
        """Return both costs [..., 2] for widths [..., n_groups].

        Raises:
            ValueError: a width is out of range, or 0 where the group cannot go entirely.
        """
        widths = np.asarray(widths, np.int64)
        sizes = np.array(self.sizes, np.int64)
        if widths.shape[-1:] != sizes.shape:
            raise ValueError(f"{widths.shape[-1]} widths for {len(sizes)} groups")
        least = np.ones(len(sizes), np.int64)
        least[list(self.removable)] = 0
        if ((widths < least) | (widths > sizes)).any():
            raise ValueError("a width is outside 1..size, or 0 for a group that cannot go entirely")
        c = self._compiled
        lengths = np.broadcast_to(c.fixed, (*widths.shape[:-1], len(c.fixed))).copy()
        for group, (axes, multiples) in enumerate(c.axes_of):
            lengths[..., axes] += widths[..., group, None] * multiples
        values = lengths[..., c.axes].prod(axis=-1)
        for term in self._special:
            dies, born = self.terms[term].dies_with, self.terms[term].born_with
            values[..., term] *= (widths[..., sorted(dies)] != 0).all(axis=-1)
            if born is not None:
                values[..., term] *= widths[..., born] == 0
        return values @ c.coefficients

    def slopes(self, widths: Sequence[int] | Ints, group: int) -> tuple[int, int]:
        """Return the derivatives (d params / d w, d macs / d w) of one group's width, the others fixed.

        A cost is linear in one width unless a group lies on two axes of one weight, or goes entirely: use
        ``CostState.changes`` for exact differences.
        """
        params, macs = CostState(self, widths).gradient[group]
        return int(params), int(macs)

    @cached_property
    def _special(self) -> tuple[int, ...]:
        return tuple(i for i, t in enumerate(self.terms) if t.dies_with or t.born_with is not None)

    @cached_property
    def _compiled(self) -> _Compiled:
        return _compile(self)


class CostState:
    """The costs at some widths, kept up to date while one width after another changes.

    ``totals`` [2] are both costs, ``gradient`` [n_groups, 2] their derivatives.
    """

    def __init__(self, model: CostModel, widths: Sequence[int] | Ints) -> None:
        c = model._compiled
        self.model = model
        self.widths = np.array(model.sizes, np.int64)
        self.totals = model.totals(self.widths)
        self._lengths = c.fixed.copy()
        for group, (axes, multiples) in enumerate(c.axes_of):
            self._lengths[axes] += self.widths[group] * multiples
        self._curvature = c.curvature
        self._owns_curvature = False
        self._blocked = np.zeros(len(c.axes), np.int64)  # how many groups hold each term at zero
        self.gradient = np.zeros((len(model.sizes), 2), np.int64)
        for index, term in enumerate(model.terms):
            self._blocked[index] = int(term.born_with is not None)
            if term.born_with is None:
                self._add_gradient(index, 1)
        for group, width in enumerate(np.asarray(widths, np.int64)):
            self.set_width(group, int(width))

    def copy(self) -> CostState:
        """Return a state that changes independently of this one."""
        twin = object.__new__(CostState)
        twin.model = self.model
        twin.widths, twin.totals, twin.gradient = self.widths.copy(), self.totals.copy(), self.gradient.copy()
        twin._lengths, twin._blocked = self._lengths.copy(), self._blocked.copy()
        twin._curvature, twin._owns_curvature = self._curvature, False
        self._owns_curvature = False  # both copy it before they write
        return twin

    def set_width(self, group: int, width: int) -> None:
        """Change the width of one group."""
        old = int(self.widths[group])
        step = width - old
        if not step:
            return
        c = self.model._compiled
        self.totals = self.totals + self.gradient[group] * step + self._curvature[group, group] // 2 * step**2
        self.gradient += self._curvature[group] * step
        axes, multiples = c.axes_of[group]
        self._lengths[axes] += step * multiples
        self.widths[group] = width
        if (width == 0) == (old == 0) or group not in c.pairs_of:
            return
        for pair in c.pairs_of[group]:
            term = int(c.pair_term[pair])
            was_alive = self._blocked[term] == 0
            self._blocked[term] += 1 if c.pair_dies[pair] == (width == 0) else -1
            is_alive = self._blocked[term] == 0
            if was_alive != is_alive:
                sign = 1 if is_alive else -1
                self.totals = self.totals + sign * self._lengths[c.axes[term]].prod() * c.coefficients[term]
                self._add_gradient(term, sign)
                self._add_curvature(term, sign)

    def changes(self, options: Ints) -> Ints:
        """Return by how much both costs change if only one group takes another width.

        ``options`` [n_groups, n_options] are candidate widths; the result is [n_groups, n_options, 2].
        """
        c = self.model._compiled
        diagonal = np.arange(len(self.widths))
        step = (options - self.widths[:, None])[:, :, None]
        quadratic = self._curvature[diagonal, diagonal] // 2
        result = step * (self.gradient[:, None, :] + step * quadratic[:, None, :])
        if len(c.pair_term):
            groups, terms = c.pair_group, c.pair_term
            blocked = self._blocked[terms]
            is_gone, goes = (self.widths[groups] == 0)[:, None], options[groups] == 0
            shift = np.where(c.pair_dies[:, None], goes * 1 - is_gone, is_gone * 1 - goes)
            turns = (blocked[:, None] + shift == 0) * 1 - (blocked == 0)[:, None]
            # The derivatives have the change of a term while it is alive: correct what lives or dies at 0.
            lengths, multiples = self._lengths[c.axes[terms]], c.pair_multiple
            steps = step[groups, :, 0]
            values = turns * (lengths[:, 0, None] + multiples[:, 0, None] * steps)
            values *= lengths[:, 1, None] + multiples[:, 1, None] * steps
            np.add.at(result, groups, values[:, :, None] * c.coefficients[terms][:, None, :])
        return result

    def _add_gradient(self, term: int, sign: int) -> None:
        c = self.model._compiled
        for axis, other in (c.axes[term], c.axes[term][::-1]):
            slope = sign * self._lengths[other] * c.multiples[axis]
            np.add.at(self.gradient, c.groups[axis], slope[:, None] * c.coefficients[term])

    def _add_curvature(self, term: int, sign: int) -> None:
        c = self.model._compiled
        first, second = c.axes[term]
        if not len(c.groups[first]) or not len(c.groups[second]):
            return
        if not self._owns_curvature:
            self._curvature, self._owns_curvature = self._curvature.copy(), True
        for axis, other in ((first, second), (second, first)):
            block = sign * np.multiply.outer(c.multiples[axis], c.multiples[other])
            index = np.ix_(c.groups[axis], c.groups[other])
            self._curvature[index] += block[:, :, None] * c.coefficients[term]


def _compile(model: CostModel) -> _Compiled:
    n_groups, n_axes = len(model.sizes), len(model.axes)
    on_axis = [*(axis.multiples for axis in model.axes), ()]
    axes = np.array([[*t.axes, n_axes, n_axes][:2] for t in model.terms], np.int64).reshape(-1, 2)
    coefficients = np.array([(t.params, t.macs) for t in model.terms], np.int64).reshape(-1, 2)
    entries = np.array([(a, g, m) for a, on in enumerate(on_axis) for g, m in on], np.int64).reshape(-1, 3)
    by_axis = csr_matrix((entries[:, 2], (entries[:, 0], entries[:, 1])), shape=(n_axes + 1, n_groups))
    counts = np.array([t.born_with is None for t in model.terms], bool)
    curvature = np.zeros((n_groups, n_groups, 2), np.int64)
    for metric in range(2):
        products = csr_matrix(
            (coefficients[counts, metric], (axes[counts, 0], axes[counts, 1])), shape=(n_axes + 1, n_axes + 1)
        )
        curvature[:, :, metric] = (by_axis.T @ (products + products.T) @ by_axis).toarray()
    pairs = sorted(
        (group, index, group in term.dies_with)
        for index, term in enumerate(model.terms)
        for group in {*term.dies_with, *([] if term.born_with is None else [term.born_with])}
    )
    pair_group = np.array([pair[0] for pair in pairs], np.int64)
    pair_term = np.array([pair[1] for pair in pairs], np.int64)
    multiple_of = [dict(on) for on in on_axis]
    of_pairs = [[multiple_of[axis].get(group, 0) for axis in axes[term]] for group, term, _ in pairs]
    of_group: list[list[tuple[int, int]]] = [[] for _ in range(n_groups)]
    for axis, group, multiple in entries.tolist():
        of_group[group].append((axis, multiple))
    return _Compiled(
        fixed=np.array([*(axis.fixed for axis in model.axes), 1], np.int64),
        axes=axes,
        coefficients=coefficients,
        groups=tuple(np.array([g for g, _ in on], np.int64) for on in on_axis),
        multiples=tuple(np.array([m for _, m in on], np.int64) for on in on_axis),
        axes_of=tuple(
            (np.array([a for a, _ in on], np.int64), np.array([m for _, m in on], np.int64))
            for on in of_group
        ),
        curvature=curvature,
        pair_group=pair_group,
        pair_term=pair_term,
        pair_multiple=np.array(of_pairs, np.int64).reshape(-1, 2),
        pair_dies=np.array([pair[2] for pair in pairs], bool),
        pairs_of={group: np.flatnonzero(pair_group == group) for group in sorted(set(pair_group.tolist()))},
    )


# --------------------------------------------------------------- from a graph


def cost_model(graph: gs.Graph, coupling: Coupling, shapes: Shapes) -> CostModel:
    """Price the channel groups of a normalised graph.

    Args:
        graph: the graph that ``coupling`` was found on.
        coupling: its channel groups.
        shapes: the shape of every tensor at the probe input, batch included.
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
    for name, tensor in constants.items():
        users = readers[name]
        if not is_float_type(np.dtype(tensor.values.dtype)):
            continue
        if name not in outputs and not any(user in whole.alive for user in users):
            continue
        dies = {g for g, rest in without.items() if name not in outputs and rest.alive.isdisjoint(users)}
        builder.add(0, tuple(tensor.shape), sliced[name], dies)

    for node in graph.nodes:
        if node.name in whole.alive:
            dies = {group for group, rest in without.items() if node.name not in rest.alive}
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


class _TermBuilder:
    """Collects terms; equal axes are one axis, and terms that differ in coefficients only are one term."""

    def __init__(self) -> None:
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

    def build(self, sizes: tuple[int, ...], removable: Iterable[int]) -> CostModel:
        terms = (
            CostTerm(params, macs, axes, dies_with, born_with)
            for (axes, dies_with, born_with), (params, macs) in self._terms.items()
            if params or macs
        )
        return CostModel(sizes, tuple(self._axes), tuple(terms), frozenset(removable))


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
