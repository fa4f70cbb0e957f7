"""The paper's recipe, restated by hand and tried threshold by threshold."""

from __future__ import annotations

from functools import cache
from math import ceil

import numpy as np
import pytest
from planning_cases import Job, check_carried_out, make_job, priced_totals, real_totals, widths_of
from topologies import TOPOLOGIES, Net

from hap_onnx.errors import BudgetError
from hap_onnx.jobs.carry_out import compress_layers, cut_model
from hap_onnx.planning.choose import Choice
from hap_onnx.planning.paper import choose_by_threshold
from hap_onnx.planning.plan import GroupDecision, NodeReplacement


@cache
def job(name: str) -> Job:
    if name != "chain of three":
        return make_job(TOPOLOGIES[name]().model, sensitivity="hutchinson")
    net = Net()
    x = net.relu(net.conv("x", 3, 16, out="a"))
    x = net.relu(net.conv(x, 16, 20, k=1, out="b"))
    x = net.relu(net.conv(x, 20, 12, out="c"))
    net.conv(x, 12, 5, out="y")
    return make_job(net.model("y"), sensitivity="hutchinson")


def by_hand(one: Job, n_below: int) -> Choice:
    """The n least sensitive channels of the model go, the top tenth of them becomes pointwise."""
    coupling = one.prepared.coupling
    channels = []  # (score, group, position)
    for group, ranking in zip(coupling.groups, one.losses.rankings, strict=True):
        scores = dict(zip(ranking.order.tolist(), np.diff(ranking.loss).tolist(), strict=True))
        best = max(range(group.size), key=lambda position: scores[position])
        channels += [(scores[p], group.name, p) for p in range(group.size) if p != best]
    below = sorted(channels, key=lambda channel: channel[0])[:n_below]
    n_top = ceil(n_below / 10)
    top = below[n_below - n_top :]
    can = {node for node, kinds in one.kinds.items() if "pointwise" in kinds}
    implants = [(group, position) for _, group, position in top if group in can]
    gone = [(group, p) for _, group, p in below if (group, p) not in implants]
    decisions = tuple(
        GroupDecision.from_keep(
            group.name, group.size, [p for p in range(group.size) if (group.name, p) not in gone]
        )
        for group in coupling.groups
    )
    replacements = []
    for group in sorted({group for group, _ in implants}):
        which = np.sort([position for name, position in implants if name == group])
        replacements.append(NodeReplacement(group, "pointwise", len(which), which))
    return Choice(decisions, tuple(replacements))


def told(choice: Choice) -> object:
    replaced = sorted((r.node, r.kind, r.channels.tolist()) for r in choice.replacements)
    return [decision.keep.tolist() for decision in choice.decisions], replaced


@pytest.mark.parametrize("name", ["chain of three", "residual", "other_rank_conv1d", "dense_block"])
def test_the_threshold_is_the_lowest_that_meets_the_budget(name: str) -> None:
    one = job(name)
    sizes = [group.size for group in one.prepared.coupling.groups]
    n_most = sum(sizes) - len(sizes)
    choices = [by_hand(one, n) for n in range(n_most + 1)]
    totals = [priced_totals(one, choice) for choice in choices]
    assert (np.diff(totals, axis=0) <= 0).all()
    n_implants = 0
    for ratios in ({"macs": 0.9}, {"macs": 0.5}, {"params": 0.6}, {"params": 0.8, "macs": 0.7}, {}):
        limits = one.budgets(**ratios)
        fits = [
            all(limit is None or total <= limit for total, limit in zip(both, limits.values(), strict=True))
            for both in totals
        ]
        found = choose_by_threshold(one.prepared, one.losses, limits, kinds=one.kinds)
        assert told(found) == told(choices[fits.index(True)])
        compressed = compress_layers(cut_model(one.prepared, found, one.losses.implants))
        assert real_totals(one, compressed.finished()) == totals[fits.index(True)]
        check_carried_out(one, found, compressed)
        n_implants += len(found.replacements)
        for replacement in found.replacements:
            assert replacement.predicted_loss >= 0
            losses = one.losses.implants[replacement.node]
            corrected = losses.correct(np.array([replacement.predicted_loss]))[0]
            assert replacement.expected_loss == pytest.approx(corrected)
    assert n_implants


def test_no_group_is_emptied() -> None:
    for name in ("chain of three", "residual"):
        one = job(name)
        least = min(total[1] for total in [priced_totals(one, by_hand(one, 10**6))])
        limits = {"macs": float(least), "params": None}
        found = choose_by_threshold(one.prepared, one.losses, limits, kinds={})
        assert min(widths_of(found)) >= 1
        for decision, ranking in zip(found.decisions, one.losses.rankings, strict=True):
            assert ranking.order[-1] in decision.keep
        with pytest.raises(BudgetError, match="leaves a channel of every group"):
            choose_by_threshold(one.prepared, one.losses, {"macs": 1.0, "params": None}, kinds={})


def test_without_pointwise_kernels_all_below_the_threshold_goes() -> None:
    one = job("chain of three")
    found = choose_by_threshold(one.prepared, one.losses, one.budgets(macs=0.5), kinds={})
    assert not found.replacements
    n_gone = sum(len(decision.drop) for decision in found.decisions)
    with_implants = choose_by_threshold(one.prepared, one.losses, one.budgets(macs=0.5), kinds=one.kinds)
    n_with = sum(len(decision.drop) for decision in with_implants.decisions)
    assert n_gone <= n_with + sum(replacement.rank for replacement in with_implants.replacements)
