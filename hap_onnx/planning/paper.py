"""The recipe of the HAP paper (Yu et al., arXiv 2101.08940, section 3), to measure departures from it.

All channels of the model are ranked by their relative Hessian trace. Those below one threshold, the same for
all layers, are pruned, but of these the most sensitive tenth gets 1x1 kernels instead: neural implants. The
threshold is the highest that the budgets allow. Nothing is priced by its cost, and no loss is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import numpy as np
from numpy.typing import NDArray

from hap_onnx.errors import BudgetError
from hap_onnx.implants.factors import factorise
from hap_onnx.implants.loss import ImplantLayer, cut_layer, sole_group
from hap_onnx.planning.choose import Choice, Slots, costs_with, keep_mask
from hap_onnx.planning.cost import METRICS
from hap_onnx.planning.decide import LossModel
from hap_onnx.planning.plan import GroupDecision, NodeReplacement
from hap_onnx.prepare import PreparedModel

Ints = NDArray[np.int64]

IMPLANT_SHARE = 0.1
"""Of the channels below the threshold, how many become implants: the most sensitive ones."""


def choose_by_threshold(
    prepared: PreparedModel,
    model: LossModel,
    budgets: Mapping[str, float | None],
    *,
    kinds: Mapping[str, Mapping[str, float]],
) -> Choice:
    """Prune and implant the least sensitive channels, as few as the budgets allow.

    Args:
        model: ranked by the relative Hessian trace of each element.
        kinds: which kinds of implants each layer may become; only pointwise is used.

    Raises BudgetError if not even one channel per group is small enough.
    """
    recipe = _Recipe(prepared, model, kinds)
    limits = {METRICS.index(name): limit for name, limit in budgets.items() if limit is not None}

    def fits(n_below: int) -> bool:
        totals = recipe.totals(*recipe.split(n_below))
        return all(totals[column] <= limit for column, limit in limits.items())

    low, high = 0, len(recipe.order)
    if not high and not fits(high):
        raise BudgetError("no channel of the model can be removed, and the paper's recipe does nothing else")
    if not fits(high):
        raise BudgetError(
            "the budget cannot be reached by the paper's recipe, which leaves a channel of every group; keep "
            "more, or leave --preset away"
        )
    while low < high:  # the fewest channels that are enough
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return recipe.choice(*recipe.split(high))


class _Recipe:
    """Channels in the order of their score, and what it costs to treat the first so many of them.

    The most sensitive channel of each group stays, whatever the threshold.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        model: LossModel,
        kinds: Mapping[str, Mapping[str, float]],
    ) -> None:
        self.prepared, self.model = prepared, model
        coupling = prepared.coupling
        score = np.zeros(coupling.n_elements)
        for group, ranking in zip(coupling.groups, model.rankings, strict=True):
            score[group.elements[ranking.order]] = np.diff(ranking.loss)
        self.group_of = np.full(coupling.n_elements, -1, np.int64)
        stays = np.ones(coupling.n_elements, bool)
        for index, group in enumerate(coupling.groups):
            self.group_of[group.elements] = index
            if group.frozen is None:
                stays[group.elements] = False
                stays[group.elements[np.argmax(score[group.elements])]] = True
        ranked = np.argsort(score, kind="stable")
        self.order: Ints = ranked[~stays[ranked]]
        names = {group.name: index for index, group in enumerate(coupling.groups)}
        self.layer_of: dict[int, ImplantLayer] = {}  # by group, where pointwise kernels are possible
        for node, losses in model.implants.items():
            group_found = sole_group(coupling, losses.layer) if "pointwise" in kinds.get(node, ()) else None
            if group_found is not None:
                self.layer_of[names[group_found.name]] = losses.layer
        self.can_follow = np.isin(self.group_of, list(self.layer_of))

    def split(self, n_below: int) -> tuple[Ints, Ints]:
        """Part the ``n_below`` least sensitive channels into removed ones and those that become pointwise."""
        below = self.order[:n_below]
        top = below[len(below) - ceil(IMPLANT_SHARE * len(below)) :]
        implants = top[self.can_follow[top]]
        return np.setdiff1d(below, implants), implants

    def totals(self, removed: Ints, implants: Ints) -> Ints:
        """Costs of the model without ``removed`` and with ``implants``."""
        sizes = np.array(self.model.cost.sizes, np.int64)
        widths = sizes - np.bincount(self.group_of[removed], minlength=len(sizes))
        counts = np.bincount(self.group_of[implants], minlength=len(sizes))
        ranks = {layer.node: int(counts[group]) for group, layer in self.layer_of.items()}
        pointwise = {node: ("pointwise", rank) for node, rank in ranks.items() if rank}
        return costs_with(self.prepared, self.model, widths, pointwise)

    def choice(self, removed: Ints, implants: Ints) -> Choice:
        """The decision in the words of a plan."""
        coupling = self.prepared.coupling
        decisions = tuple(
            GroupDecision.from_keep(group.name, group.size, np.flatnonzero(~np.isin(group.elements, removed)))
            for group in coupling.groups
        )
        slots = Slots(coupling, keep_mask(self.prepared, decisions))
        axes = {(axis.initializer, axis.axis): axis.elements for axis in coupling.weights}
        replacements = []
        for layer in self.layer_of.values():
            elements = axes[layer.weight, layer.form.out_axis]
            channels = np.flatnonzero(np.isin(elements, implants))
            if not len(channels):
                continue
            outputs, inputs = slots.of_layer(layer)
            left = np.arange(len(elements)) if outputs is None else outputs
            last = np.isin(left, channels)
            cut = cut_layer(
                self.model.implants[layer.node], np.concatenate([left[~last], left[last]]), inputs
            )
            form = layer.kind("pointwise")
            factors = factorise(
                cut.weight, cut.metric, kind="pointwise", rank=len(channels), taps=form.taps, tap=form.tap
            )
            expected = self.model.implants[layer.node].correct(np.array([factors.loss]))
            replacements.append(
                NodeReplacement(
                    layer.node, "pointwise", len(channels), channels, factors.loss, float(expected[0])
                )
            )
        return Choice(decisions, tuple(replacements))
