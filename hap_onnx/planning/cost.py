"""Cost: parameters, multiply-accumulates and time as functions of how many channels each group keeps.

The length of an axis that carries channels is a number of fixed positions plus, for each group, so many
positions per channel that is kept. A weight has the product of its axes as elements; a node's
multiply-accumulates are a product of the axes that its counting rule looks at, and its time is all but
bilinear in them where widths fit the blocks of the runtime. So all costs are sums of *terms*, each a
coefficient times the lengths of a few axes, and planning needs no surgery to price a choice.

A group of width 0 takes a whole branch away, and with it what only the branch kept alive: such terms
vanish though none of their axes does. What the branch adds to the residual stream becomes a constant: such
terms appear.

A *layer* is a node that may be replaced by an implant. What it costs is bilinear in the lengths of the input
and the output axis of its weight, whatever it is replaced by: four coefficients for each metric, which an
option of the layer sets. Its loss apart, an option is its coefficients.

This module is arithmetic; ``cost_graph`` finds terms and layers in a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

Ints = NDArray[np.int64]

METRICS = ("params", "macs", "latency")
"""The order of the costs wherever they are in one array; latency in picoseconds, 0 if nothing was timed."""
N_METRICS = len(METRICS)
PARAMS, MACS, LATENCY = range(N_METRICS)


@dataclass(frozen=True)
class AxisLength:
    """``fixed`` positions plus, for each (group, positions per channel), so many per channel kept."""

    fixed: int
    multiples: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class CostTerm:
    """What a unit of the product of ``axes`` costs: indices into the model's, two at most.

    The term is zero while any group of ``dies_with`` has width 0, and while the group ``born_with``, if there
    is one, has another width than 0.
    """

    params: int
    macs: int
    axes: tuple[int, ...]
    dies_with: frozenset[int] = frozenset()
    born_with: int | None = None
    latency: int = 0

    def __post_init__(self) -> None:
        if len(self.axes) > 2:
            raise ValueError(f"a term has two axes at most, not {len(self.axes)}")

    @property
    def costs(self) -> tuple[int, int, int]:
        """The coefficients in the order of ``METRICS``."""
        return self.params, self.macs, self.latency


@dataclass(frozen=True, eq=False)
class LayerTerms:
    """A node that costs ``c0 * n_in * n_out + c1 * n_in + c2 * n_out + c3``, with coefficients to choose.

    ``n_in`` and ``n_out`` are the lengths of the weight's input axis (per conv group) and output axis.
    ``terms`` are the indices of the four terms in this order, of which nothing else is part; ``dense``
    int64 [4, n_metrics] are the coefficients, by metric, of the node as it is: c0 only.

    A coefficient may be negative as long as the cost is not: an implant that gives ``q`` of the outputs a
    cheaper kernel has a negative c1, and cannot be where fewer than ``q`` outputs are left.
    """

    node: str
    terms: tuple[int, int, int, int]
    dense: Ints


@dataclass(frozen=True)
class _Compiled:
    """A cost model as arrays.

    ``axes`` [n_terms, 2] is padded with an extra axis of length 1. ``layer_terms`` [n_layers, 4] and
    ``layer_axes`` [n_layers, 2] (input, output) are those of the layers. ``groups`` and ``multiples`` are,
    of each axis, what lies on it; ``axes_of`` is the same by group: (axes, multiples). ``curvature``
    [n_groups, n_groups, n_metrics] are the second derivatives of the costs where no group has width 0. A
    *pair* is (group, term that appears or disappears when that group goes).
    """

    fixed: Ints
    axes: Ints
    coefficients: Ints
    layer_terms: Ints
    layer_axes: Ints
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
    """Parameters, multiply-accumulates and time as a function of group widths.

    ``sizes`` holds the full width of each group; ``removable`` the groups that may have width 0; ``layers``
    what may have other coefficients.
    """

    sizes: tuple[int, ...]
    axes: tuple[AxisLength, ...]
    terms: tuple[CostTerm, ...]
    removable: frozenset[int] = frozenset()
    layers: tuple[LayerTerms, ...] = ()

    def params(self, widths: Sequence[int] | Ints) -> int:
        """Count the elements of float initializers at these widths, one per group."""
        return int(self.totals(widths)[PARAMS])

    def macs(self, widths: Sequence[int] | Ints) -> int:
        """Count the multiply-accumulates at the probe shape at these widths."""
        return int(self.totals(widths)[MACS])

    def savings(self) -> Ints:
        """Return what each group saves if all but one of its channels go [n_groups, n_metrics]."""
        sizes = np.array(self.sizes, np.int64)
        widths = np.tile(sizes, (len(sizes), 1))
        np.fill_diagonal(widths, np.minimum(sizes, 1))
        return self.totals(sizes) - self.totals(widths)

    def totals(self, widths: Sequence[int] | Ints, coefficients: Ints | None = None) -> Ints:
        """Return all costs [..., n_metrics] for widths [..., n_groups].

        ``coefficients`` [..., n_layers, 4, n_metrics] are those of the layers; None: all are dense.

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
        totals: Ints = values @ c.coefficients
        if coefficients is not None:
            dense = c.coefficients[c.layer_terms]
            of_layers = values[..., c.layer_terms]  # [..., n_layers, 4]
            totals = totals + np.einsum("...lk,...lkm->...m", of_layers, coefficients - dense)
        return totals

    @cached_property
    def _special(self) -> tuple[int, ...]:
        return tuple(i for i, t in enumerate(self.terms) if t.dies_with or t.born_with is not None)

    @cached_property
    def _compiled(self) -> _Compiled:
        return _compile(self)


class CostState:
    """The costs at some widths, kept up to date while one width or layer after another changes.

    ``totals`` [n_metrics] are the costs, ``gradient`` [n_groups, n_metrics] their derivatives. All layers
    begin dense.
    """

    def __init__(self, model: CostModel, widths: Sequence[int] | Ints) -> None:
        c = model._compiled
        self.model = model
        self.widths = np.array(model.sizes, np.int64)
        self.totals = model.totals(self.widths)
        self._coefficients = c.coefficients.copy()
        self._lengths = c.fixed.copy()
        for group, (axes, multiples) in enumerate(c.axes_of):
            self._lengths[axes] += self.widths[group] * multiples
        self._curvature = c.curvature
        self._owns_curvature = False
        self._blocked = np.zeros(len(c.axes), np.int64)  # how many groups hold each term at zero
        self.gradient = np.zeros((len(model.sizes), N_METRICS), np.int64)
        for index, term in enumerate(model.terms):
            self._blocked[index] = int(term.born_with is not None)
            if term.born_with is None:
                self._add_gradient(index, c.coefficients[index])
        for group, width in enumerate(np.asarray(widths, np.int64)):
            self.set_width(group, int(width))

    def copy(self) -> CostState:
        """Return a state that changes independently of this one."""
        twin = object.__new__(CostState)
        twin.model = self.model
        twin.widths, twin.totals, twin.gradient = self.widths.copy(), self.totals.copy(), self.gradient.copy()
        twin._lengths, twin._blocked = self._lengths.copy(), self._blocked.copy()
        twin._coefficients = self._coefficients.copy()
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
                coefficient = self._coefficients[term] if is_alive else -self._coefficients[term]
                self._add_term(term, coefficient)

    def set_coefficients(self, layer: int, new: Ints) -> None:
        """Change the four coefficients [4, n_metrics] of one layer."""
        terms = self.model._compiled.layer_terms[layer]
        steps = new - self._coefficients[terms]
        self._coefficients[terms] = new
        for term, step in zip(terms.tolist(), steps, strict=True):
            if self._blocked[term] == 0:
                self._add_term(term, step)

    def layer_values(self) -> Ints:
        """Return what the coefficients of each layer are multiplied with [n_layers, 4]; 0 if it is gone."""
        c = self.model._compiled
        n_in, n_out = self._lengths[c.layer_axes].T
        values = np.stack([n_in * n_out, n_in, n_out, np.ones_like(n_in)], axis=1)
        values[self._blocked[c.layer_terms] != 0] = 0
        return values

    def layer_changes(self, tables: Ints) -> Ints:
        """Return by how much the costs change if only one layer takes other coefficients.

        ``tables`` [n_layers, n_options, 4, n_metrics] are candidates; the result is
        [n_layers, n_options, n_metrics].
        """
        steps = tables - self._coefficients[self.model._compiled.layer_terms][:, None]
        changes: Ints = np.einsum("lk,lokm->lom", self.layer_values(), steps)
        return changes

    def changes(self, options: Ints) -> Ints:
        """Return by how much the costs change if only one group takes another width.

        ``options`` [n_groups, n_options] are candidate widths; the result is
        [n_groups, n_options, n_metrics].
        """
        c = self.model._compiled
        diagonal = np.arange(len(self.widths))
        step = (options - self.widths[:, None])[:, :, None]
        quadratic = self._curvature[diagonal, diagonal] // 2
        result = step * (self.gradient[:, None, :] + step * quadratic[:, None, :])
        if len(c.pair_term):
            # The derivatives have the change of a term while it is alive: correct what lives or dies at 0.
            crosses = (options == 0) != (self.widths == 0)[:, None]
            pairs, columns = np.nonzero(crosses[c.pair_group])
            groups, terms = c.pair_group[pairs], c.pair_term[pairs]
            blocked = self._blocked[terms]
            shift = np.where(c.pair_dies[pairs] == (self.widths[groups] != 0), 1, -1)
            turns = (blocked + shift == 0) * 1 - (blocked == 0)
            steps = options[groups, columns] - self.widths[groups]
            lengths = self._lengths[c.axes[terms]] + c.pair_multiple[pairs] * steps[:, None]
            values = turns * lengths[:, 0] * lengths[:, 1]
            np.add.at(result, (groups, columns), values[:, None] * self._coefficients[terms])
        return result

    def _add_term(self, term: int, coefficient: Ints) -> None:
        """Add the product of the axes of a term, times ``coefficient`` [n_metrics], to the costs."""
        if not coefficient.any():
            return
        self.totals = self.totals + self._lengths[self.model._compiled.axes[term]].prod() * coefficient
        self._add_gradient(term, coefficient)
        self._add_curvature(term, coefficient)

    def _add_gradient(self, term: int, coefficient: Ints) -> None:
        c = self.model._compiled
        first, second = c.axes[term].tolist()
        for axis, other in ((first, second), (second, first)):
            if len(c.groups[axis]):
                slope = self._lengths[other] * c.multiples[axis]
                self.gradient[c.groups[axis]] += slope[:, None] * coefficient

    def _add_curvature(self, term: int, coefficient: Ints) -> None:
        c = self.model._compiled
        first, second = c.axes[term].tolist()
        if not len(c.groups[first]) or not len(c.groups[second]):
            return
        if not self._owns_curvature:
            self._curvature, self._owns_curvature = self._curvature.copy(), True
        for axis, other in ((first, second), (second, first)):
            block = np.multiply.outer(c.multiples[axis], c.multiples[other])
            index = np.ix_(c.groups[axis], c.groups[other])
            self._curvature[index] += block[:, :, None] * coefficient


def _compile(model: CostModel) -> _Compiled:
    n_groups, n_axes = len(model.sizes), len(model.axes)
    on_axis = [*(axis.multiples for axis in model.axes), ()]
    axes = np.array([[*t.axes, n_axes, n_axes][:2] for t in model.terms], np.int64).reshape(-1, 2)
    coefficients = np.array([term.costs for term in model.terms], np.int64).reshape(-1, N_METRICS)
    layer_terms = np.array([layer.terms for layer in model.layers], np.int64).reshape(-1, 4)
    entries = np.array([(a, g, m) for a, on in enumerate(on_axis) for g, m in on], np.int64).reshape(-1, 3)
    by_axis = csr_matrix((entries[:, 2], (entries[:, 0], entries[:, 1])), shape=(n_axes + 1, n_groups))
    counts = np.array([t.born_with is None for t in model.terms], bool)
    curvature = np.zeros((n_groups, n_groups, N_METRICS), np.int64)
    for metric in range(N_METRICS):
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
        layer_terms=layer_terms,
        layer_axes=axes[layer_terms[:, 0]],
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
