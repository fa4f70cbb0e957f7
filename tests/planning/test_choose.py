"""Choosing widths and implants together: budgets hold for the finished model exactly as priced."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from planning_cases import (
    Job,
    check_carried_out,
    left_of,
    make_job,
    priced_totals,
    random_choice,
    real_totals,
    slice_by_numpy,
    widths_of,
)
from topologies import TOPOLOGIES, Net

from hap_onnx.errors import BudgetError
from hap_onnx.implants.loss import rank_coefficients
from hap_onnx.jobs.carry_out import compress_layers, cut_model
from hap_onnx.planning.choose import (
    Choice,
    arrange,
    choose,
    decide_groups,
    keep_mask,
    moved_tensors,
    predicted_losses,
    residual_groups,
)
from hap_onnx.planning.plan import GroupDecision
from hap_onnx.sensitivity.curvature import to_tensors
from hap_onnx.twin import run_captured
from tests.helpers import make_coupling

NAMES = """residual concat dense_block squeeze_and_excitation depthwise_plain grouped_wide other_rank_conv1d
    gemm_residual flatten_to_gemm_flatten fixed_batch""".split()

WIDE = ("make_c0", "make_c1")  # where implants are needed to save anything


@cache
def job(name: str, *, exclude: tuple[str, ...] = (), only: tuple[str, ...] = ()) -> Job:
    if name in TOPOLOGIES:
        return make_job(TOPOLOGIES[name]().model, exclude=exclude, only=only)
    net, x, n = Net(), "x", 3
    widths = [12, 12] if name == "centred" else [int(width) for width in name.split()]
    for index, width in enumerate(widths):  # a chain of these widths
        x, n = net.relu(net.conv(x, n, width, out=f"c{index}")), width
        if name == "centred":  # kernels of every other channel are all but 1x1
            outer = np.arange(9).reshape(3, 3) != 4
            net.weights[net.nodes[-2].input[1]][::2, :, outer] *= 1e-3
    net.conv(x, n, 5, out="y")
    return make_job(net.model("y"), exclude=exclude, only=only)


def decide(one: Job, method: str, *, align: int | str = 1, **ratios: float) -> Choice:
    whole = {group.name for group in one.prepared.coupling.groups} if method == "implant" else ()
    kinds = {} if method == "prune" else one.kinds
    return choose(one.prepared, one.losses, one.budgets(**ratios), align=align, whole=whole, kinds=kinds)


def told(choice: Choice) -> list[object]:
    return [
        widths_of(choice),
        [(r.node, r.kind, r.rank, r.channels.tolist(), r.expected_loss) for r in choice.replacements],
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["prune", "implant", "hap"])
def test_the_finished_model_meets_the_budgets_as_they_were_priced(name: str, method: str) -> None:
    one = job(name)
    for ratios in ({"macs": 0.8}, {"params": 0.75}, {"macs": 0.7, "params": 0.85}):
        try:
            choice = decide(one, method, **ratios)
        except BudgetError:
            assert method == "implant"  # which has less to choose from
            continue
        assert method != "prune" or not choice.replacements
        assert method != "implant" or widths_of(choice) == list(one.losses.cost.sizes)
        compressed = compress_layers(cut_model(one.prepared, choice, one.losses.implants))
        totals = real_totals(one, compressed.finished())
        assert totals == priced_totals(one, choice)
        limits = one.budgets(**ratios)
        for total, limit in zip(totals, (limits["params"], limits["macs"]), strict=True):
            assert limit is None or total <= limit
        if 0 not in widths_of(choice):
            check_carried_out(one, choice, compressed)
        assert told(choice) == told(decide(one, method, **ratios))


def test_both_means_together_lose_no_more_than_either() -> None:
    for name in ("residual", "16 16 16"):
        one = job(name)
        for ratio in (0.8, 0.6, 0.4):
            expected = {}
            for method in ("prune", "implant", "hap"):
                choice = decide(one, method, macs=ratio)
                expected[method] = sum(predicted_losses(one.losses, choice.decisions).values()) + sum(
                    replacement.expected_loss for replacement in choice.replacements
                )
            assert expected["hap"] <= 1.05 * min(expected["prune"], expected["implant"])


def test_an_implant_is_priced_at_the_widths_of_the_plan() -> None:
    """Predicted losses of lowrank are exactly those of the tail of the spectrum of what is left."""
    one = job("16 16 16")
    kinds = {name: {"lowrank": 1.0} for name in one.kinds}
    choice = choose(one.prepared, one.losses, one.budgets(macs=0.3), align=1, kinds=kinds, whole=WIDE)
    assert choice.replacements
    assert widths_of(choice) != list(one.losses.cost.sizes)
    keep = keep_mask(one.prepared, choice.decisions)
    for replacement in choice.replacements:
        losses = one.losses.implants[replacement.node]
        w, a, g, _ = slice_by_numpy(losses, *left_of(one, replacement.node, keep))
        root_a, root_g = np.linalg.cholesky(a[0]), np.linalg.cholesky(g[0])
        values = np.linalg.svd(root_g.T @ w[0] @ root_a, compute_uv=False)
        assert replacement.predicted_loss == pytest.approx(
            0.5 * np.square(values[replacement.rank :]).sum(), rel=1e-6
        )
        corrected = losses.correct(np.array([replacement.predicted_loss]))[0]
        assert replacement.expected_loss == pytest.approx(corrected)


def test_channels_become_pointwise_that_cost_least_on_their_own() -> None:
    one = job("centred")
    choice = choose(one.prepared, one.losses, one.budgets(macs=0.6), align=1, kinds=one.kinds, whole=WIDE)
    keep = keep_mask(one.prepared, choice.decisions)
    pointwise = [replacement for replacement in choice.replacements if replacement.kind == "pointwise"]
    assert pointwise
    for replacement in pointwise:
        losses = one.losses.implants[replacement.node]
        outputs, inputs = left_of(one, replacement.node, keep)
        w, a, g, _ = slice_by_numpy(losses, outputs, inputs)
        at_tap = np.arange(losses.layer.kind("pointwise").tap or 0, w.shape[2], 9)
        kernels = np.linalg.solve(a[0][np.ix_(at_tap, at_tap)], (w[0] @ a[0][:, at_tap]).T).T
        change = w[0].copy()
        change[:, at_tap] -= kernels
        cost = np.diag(g[0]) * np.einsum("of,fe,oe->o", change, a[0], change)
        cheapest = outputs[np.argsort(cost, kind="stable")[: replacement.rank]]
        assert replacement.channels.tolist() == sorted(cheapest)
        assert np.isin(replacement.channels, outputs).all()
        assert replacement.rank < len(outputs)


@pytest.mark.parametrize("align", [1, 2, "auto"])
def test_ranks_and_widths_are_aligned(align: int | str) -> None:
    one = job("16 16 16")
    choice = decide(one, "hap", align=align, macs=0.5)
    for decision in choice.decisions:
        assert len(decision.keep) % (4 if align == "auto" else align) == 0
    for replacement in choice.replacements:
        outputs, inputs = left_of(one, replacement.node, keep_mask(one.prepared, choice.decisions))
        size = min(len(outputs), len(inputs))
        step = (4 if size >= 16 else 2 if size >= 8 else 1) if align == "auto" else align
        assert replacement.rank % step == 0


def test_kinds_that_are_not_allowed_are_not_used() -> None:
    one = job("residual")
    for allowed in (("lowrank",), ("spatial",), ("pointwise",), ()):
        kinds = {name: {kind: 1.0 for kind in allowed if kind in has} for name, has in one.kinds.items()}
        choice = choose(one.prepared, one.losses, one.budgets(macs=0.5), align=1, kinds=kinds)
        assert {replacement.kind for replacement in choice.replacements} <= set(allowed)
    only_one = {"make_a2": one.kinds["make_a2"]}
    choice = choose(one.prepared, one.losses, one.budgets(macs=0.9), align=1, kinds=only_one,
                    whole={group.name for group in one.prepared.coupling.groups})  # fmt: skip
    assert [replacement.node for replacement in choice.replacements] == ["make_a2"]


@pytest.mark.parametrize("share", [0.75, 0.5, 0.3])
@pytest.mark.parametrize("method", ["implant", "hap"])
def test_no_implant_has_more_than_its_share_of_the_macs(method: str, share: float) -> None:
    """The share is that of what the plan leaves of the layer."""
    one = job("16 16 16")
    kinds = {name: dict.fromkeys(has, share) for name, has in one.kinds.items()}
    whole = {group.name for group in one.prepared.coupling.groups} if method == "implant" else set(WIDE)
    terms = {entry.node: entry for entry in one.losses.cost.layers}
    n_replaced = 0
    for ratio in (0.9, 0.7, 0.5, 0.3):
        try:
            choice = choose(one.prepared, one.losses, one.budgets(macs=ratio), align=1, whole=whole,
                            kinds=kinds)  # fmt: skip
        except BudgetError:
            continue
        assert choice.whole == whole
        keep = keep_mask(one.prepared, choice.decisions)
        for replacement in choice.replacements:
            outputs, inputs = left_of(one, replacement.node, keep)
            layer = one.losses.implants[replacement.node].layer
            table = rank_coefficients(
                layer.kind(replacement.kind), replacement.rank, one.nodes[replacement.node],
                one.prepared.shapes, n_groups=1, n_taps=9,
            )  # fmt: skip
            lengths = np.array([len(inputs) * len(outputs), len(inputs), len(outputs), 1])
            before, after = ((lengths @ costs)[1] for costs in (terms[replacement.node].dense, table))
            assert after <= share * before
            n_replaced += 1
    assert n_replaced


@pytest.mark.parametrize(
    ("options", "touchable"),
    [
        ({"exclude": ("make_a2", "make_stem")}, {"make_a1", "make_b1", "make_b2", "make_y"}),
        ({"only": ("make_a1", "make_b?")}, {"make_a1", "make_b1", "make_b2"}),
        ({"exclude": ("make_*",)}, set()),
    ],
)
def test_excluded_layers_stay_as_they_are(options: dict[str, tuple[str, ...]], touchable: set[str]) -> None:
    one = job("residual", **options)
    assert set(one.kinds) == touchable
    for ratio in (0.9, 0.7):
        try:
            choice = decide(one, "hap", macs=ratio)
        except BudgetError:
            continue
        assert {replacement.node for replacement in choice.replacements} <= touchable


def test_a_budget_just_above_the_least_is_reached() -> None:
    """Steps of ranks depend on widths: what one round can pay another may not."""
    one = job("16 17 18 64")
    with pytest.raises(BudgetError) as caught:
        decide(one, "hap", align="auto", macs=1e-6)
    least = float(re.findall(r"least is ([\d.]+)", str(caught.value))[0])
    for factor in (1, 1.01, 1.05, 1.2, 1.4, 1.8, 2.5):
        choice = decide(one, "hap", align="auto", macs=factor * least)
        assert priced_totals(one, choice)[1] <= factor * least * one.budgets(macs=1)["macs"]


# --- decisions and masks ---


def test_the_elements_that_go_first_are_removed() -> None:
    one = job("residual")
    decisions = decide_groups(one.prepared, one.losses, [2, 6, 5])
    for decision, ranking, width in zip(decisions, one.losses.rankings, [2, 6, 5], strict=True):
        assert set(decision.drop.tolist()) == set(ranking.order[: decision.size - width].tolist())
    losses = predicted_losses(one.losses, decisions)
    assert [losses[curve.group] for curve in one.losses.curves] == [
        curve.loss[width] for curve, width in zip(one.losses.curves, [2, 6, 5], strict=True)
    ]


def test_a_keep_mask_marks_the_elements_of_the_groups() -> None:
    class Prepared:
        coupling = make_coupling({"b": 3, "a": 6})

    decisions = (GroupDecision.from_keep("b", 3, []), GroupDecision.from_keep("a", 6, [0, 1, 2, 5]))
    # Elements descend within each group of make_coupling.
    mask = keep_mask(Prepared(), decisions)  # type: ignore[arg-type]
    assert mask.tolist() == [False] * 3 + [True, False, False, True, True, True]


def test_residual_groups_have_several_producers() -> None:
    assert residual_groups(job("residual").prepared) == {"make_stem"}
    assert residual_groups(job("16 16 16").prepared) == frozenset()


@pytest.mark.parametrize("name", ["residual", "16 16 16"])
def test_moved_tensors_are_those_whose_channels_change_places(name: str) -> None:
    one, rng, n_moved = job(name), np.random.default_rng(0), 0
    for _ in range(6):
        choice = random_choice(one, rng, kinds=["pointwise"])
        whole = tuple(GroupDecision.from_keep(d.group, d.size, range(d.size)) for d in choice.decisions)
        choice = replace(choice, decisions=whole)  # so that shapes tell nothing
        arranged, _, _ = arrange(one.prepared, choice)
        moved = moved_tensors(one.prepared, choice)
        found = [
            run_captured(twin, to_tensors(one.inputs(), twin), list(one.prepared.coupling.tensors))
            for twin in (one.prepared.twin, arranged.twin)
        ]
        for tensor in one.prepared.coupling.tensors:
            stays = torch.allclose(found[0][tensor], found[1][tensor], atol=1e-4)
            assert stays == (tensor not in moved)
        n_moved += len(moved)
    assert n_moved


def test_without_pointwise_channels_nothing_moves() -> None:
    one = job("residual")
    choice = choose(one.prepared, one.losses, one.budgets(macs=0.5), align=1,
                    kinds={name: {"lowrank": 1.0, "spatial": 1.0} for name in one.kinds})  # fmt: skip
    prepared, keep, order = arrange(one.prepared, choice)
    assert prepared is one.prepared
    assert order is None
    assert not moved_tensors(one.prepared, choice)
    assert keep.tolist() == keep_mask(one.prepared, choice.decisions).tolist()
