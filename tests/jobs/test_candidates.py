"""Candidates: which plans are tried, and that outputs on held-out samples decide between them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from planning_cases import Job, make_job, real_totals, run_twin, widths_of
from sample_models import residual_cnn
from topologies import TOPOLOGIES

from hap_onnx.data.calibration import Subset
from hap_onnx.errors import BudgetError
from hap_onnx.events import Event
from hap_onnx.jobs import candidates
from hap_onnx.jobs.candidates import Setting, all_kinds, compress_to, distance, recover, sketch
from hap_onnx.jobs.carry_out import Compressed, CutModel, compress_layers, cut_model
from hap_onnx.model.measure import node_macs
from hap_onnx.ops.linear import linear_form
from hap_onnx.planning.choose import Choice, predicted_costs
from hap_onnx.planning.decide import with_times
from hap_onnx.planning.paper import choose_by_threshold
from hap_onnx.planning.times import ImplantTimes, NodeTimes
from hap_onnx.runtime.latency import LatencyComparison
from hap_onnx.twin import build_twin


@cache
def job(name: str = "residual") -> Job:
    model = residual_cnn() if name == "residual cnn" else TOPOLOGIES[name]().model
    return make_job(model, n_samples=60)


def setting(one: Job, method: str = "hap", **changes: Any) -> Setting:
    data = one.subset.dataset
    facts: dict[str, Any] = {
        "kinds": {} if method == "prune" else one.kinds,
        "calibrate": Subset(data, np.arange(40)),
        "choose": Subset(data, np.arange(40, 60)),
        "scales": one.scales,
        "batch_size": 20,
        "seed": 0,
        "align": 1,
    }
    return Setting(one.prepared, one.losses, method, **{**facts, **changes})


def timing(ratio: float) -> LatencyComparison:
    return LatencyComparison(1.0, ratio, ratio, ratio - 0.01, ratio + 0.01, 11, 1, "CPUExecutionProvider", 1)


def test_the_original_runs_once_unless_its_outputs_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    one = job()
    graph = sketch(setting(one), one.budgets(macs=0.6)).finished()
    twin, calls = one.prepared.twin, list[int]()
    found = []
    for limit, n_calls in ((candidates.KEPT_BYTES, 2), (0, 5)):
        monkeypatch.setattr(candidates, "KEPT_BYTES", limit)
        of = setting(one, batch_size=10)
        hook = twin.register_forward_pre_hook(lambda *_: calls.append(1))
        found += [distance(of, graph) for _ in range(2)]
        hook.remove()
        assert len(calls) == n_calls
        calls.clear()
    assert len(set(found)) == 1


def test_the_distance_is_that_of_held_out_outputs() -> None:
    one = job()
    compressed = sketch(setting(one), one.budgets(macs=0.6))
    held_out = {"x": next(iter(one.subset.dataset.batches(np.arange(40, 60), 20))).inputs["x"]}
    before, after = (
        run_twin(build_twin(graph), held_out)["y"].astype(np.float64)
        for graph in (one.prepared.graph, compressed.finished())
    )
    expected = 0.5 * one.scales["y"] ** 2 * np.square(after - before).sum() / 20
    assert distance(setting(one), compressed.finished()) == pytest.approx(expected, rel=1e-4)
    assert distance(setting(one), one.prepared.graph) == 0


def test_implants_alone_leave_all_widths() -> None:
    one = job()
    for function in (sketch, compress_to):
        compressed = function(setting(one, "implant"), one.budgets(macs=0.7))
        assert widths_of(compressed.choice) == list(one.losses.cost.sizes)
        assert compressed.choice.replacements
        assert real_totals(one, compressed.finished())[1] <= one.budgets(macs=0.7)["macs"]
        with pytest.raises(BudgetError):
            function(setting(one, "implant"), one.budgets(macs=0.01))


def test_pruning_alone_uses_no_implants() -> None:
    one = job()
    compressed = compress_to(setting(one, "prune"), one.budgets(macs=0.6))
    assert not compressed.choice.replacements
    assert not compressed.implants
    assert widths_of(compressed.choice) < list(one.losses.cost.sizes)


@pytest.mark.parametrize("recovery", ["none", "refit"])
def test_held_out_samples_decide(monkeypatch: pytest.MonkeyPatch, recovery: str) -> None:
    one = job()
    tried: list[tuple[float, Compressed]] = []
    real = candidates.recover

    def remember(of: Setting, cut: CutModel, plain: Compressed) -> tuple[float, Compressed]:
        assert cut.choice is plain.choice
        tried.append(real(of, cut, plain))
        return tried[-1]

    monkeypatch.setattr(candidates, "recover", remember)
    of = setting(one, recover=recovery)
    found = compress_to(of, one.budgets(macs=0.6))
    distances = [distance(of, candidate.finished()) for _, candidate in tried]
    assert distances == [known for known, _ in tried]
    assert len(tried) >= 2
    assert distance(of, found.finished()) == min(distances)
    assert any(widths_of(candidate.choice) == list(one.losses.cost.sizes) for _, candidate in tried)
    groups = {group.name for group in one.prepared.coupling.groups}
    assert [candidate.choice.whole for _, candidate in tried] == [set(), groups]
    for _, candidate in tried:  # what a plan was not free to narrow is whole
        assert not {d.group for d in candidate.choice.decisions if len(d.drop)} & candidate.choice.whole


def test_a_rival_that_is_out_of_reach_is_left_out() -> None:
    one = job()
    compressed = compress_to(setting(one, recover="none"), one.budgets(params=0.12))
    assert real_totals(one, compressed.finished())[0] <= one.budgets(params=0.12)["params"]


def test_a_refit_that_does_not_help_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    one, events = job(), list[Event]()
    of = setting(one, on_event=events.append)
    choice = sketch(of, one.budgets(macs=0.6)).choice
    cut = cut_model(one.prepared, choice, one.losses.implants)
    plain = compress_layers(cut)
    after, refitted = recover(of, cut, plain)
    assert after == distance(of, refitted.finished()) < distance(of, plain.finished())
    assert not events or all(event.kind != "warning" for event in events)
    spoilt = replace(refitted, weights={name: 100 * array for name, array in refitted.weights.items()})
    monkeypatch.setattr(candidates, "refit_layers", lambda *args, **options: spoilt)
    before, dropped = recover(of, cut, plain)
    assert dropped is plain
    assert before == distance(of, plain.finished())
    assert [event.message for event in events if event.kind == "warning"] == [
        "refit did not help on held-out samples and was dropped"
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_no_numbers_are_infinitely_far(
    monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    one = job()
    of = setting(one, recover="none")
    real, calls = candidates.output_distance, list[float]()
    monkeypatch.setattr(candidates, "output_distance", lambda *args: value)
    assert distance(of, one.prepared.graph) == np.inf

    def spoil_the_first(*args: Any) -> float:
        calls.append(value if not calls else real(*args))
        return calls[-1]

    first = sketch(of, one.budgets(macs=0.6)).choice
    monkeypatch.setattr(candidates, "output_distance", spoil_the_first)
    found = compress_to(of, one.budgets(macs=0.6))
    assert len(calls) > 1
    assert widths_of(found.choice) != widths_of(first)


def test_a_refit_without_numbers_is_dropped_and_one_that_gives_numbers_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = job()
    of = setting(one)
    choice = sketch(of, one.budgets(macs=0.6)).choice
    cut = cut_model(one.prepared, choice, one.losses.implants)
    plain, other = compress_layers(cut), compress_layers(cut)
    monkeypatch.setattr(candidates, "refit_layers", lambda *args, **options: other)
    for distances, kept in (([1.0, np.inf], plain), ([np.inf, 1.0], other), ([1.0, 0.5], other)):
        rest = list(distances)
        monkeypatch.setattr(candidates, "distance", lambda of, graph, rest=rest: rest.pop(0))
        found, model = recover(of, cut, plain)
        assert model is kept
        assert found == min(distances)


def test_where_speed_does_not_count_all_kinds_may_be_used_at_any_rank() -> None:
    one = job()
    assert all_kinds(one.losses) == one.kinds
    assert set(one.kinds["make_a1"].items()) == {("lowrank", 1), ("spatial", 1), ("pointwise", 1)}
    assert set(one.kinds["make_y"]) == {"lowrank", "spatial"}


def test_slow_plans_are_planned_again_with_wider_steps() -> None:
    one, events, timed = job("residual cnn"), list[Event](), list[Choice]()

    def time_it(candidate: Any) -> LatencyComparison:
        timed.append(candidate.choice)
        return timing(1.5 if len(timed) == 1 else 0.9)

    of = setting(one, "prune", align="auto", recover="none", time=time_it, on_event=events.append)
    compress_to(of, one.budgets(macs=0.5))
    assert all(len(decision.keep) % 8 == 0 for decision in timed[1].decisions)
    assert any(len(decision.keep) % 8 for decision in timed[0].decisions)
    assert [event.message for event in events] == [
        "with widths aligned to auto the model takes 1.50 times as long as the original, which is not faster "
        "beyond doubt; planning with wider steps"
    ]


def test_wider_steps_that_cannot_reach_the_budget_end_the_search() -> None:
    """What the gate says of a slow model is more to the point than that wider steps are too wide."""
    one = job("residual cnn")
    of = setting(one, "prune", align="auto", recover="none", time=lambda candidate: timing(1.5))
    compressed = compress_to(of, one.budgets(macs=0.08))
    assert real_totals(one, compressed.finished())[1] <= one.budgets(macs=0.08)["macs"]
    with pytest.raises(BudgetError):
        compress_to(of, one.budgets(macs=0.01))


def test_the_papers_recipe_has_no_rivals() -> None:
    one = make_job(TOPOLOGIES["residual"]().model, n_samples=60, sensitivity="hutchinson")
    of = setting(one, preset="paper", recover="none")
    limits = one.budgets(macs=0.6)
    expected = choose_by_threshold(one.prepared, one.losses, limits, kinds=one.kinds)
    for function in (sketch, compress_to):
        choice = function(of, limits).choice
        assert widths_of(choice) == widths_of(expected)
        assert [r.channels.tolist() for r in choice.replacements] == [
            r.channels.tolist() for r in expected.replacements
        ]


# --- budgets of time ---


def timed(one: Job) -> Job:
    """A job whose nodes take a picosecond per multiply-accumulate and 100 each."""
    nodes = one.prepared.graph.nodes
    dense, implants = {}, {}
    for node in nodes:
        form = linear_form(node)
        if form is None or not isinstance(node.inputs[form.weight_index], gs.Constant):
            continue
        per_pair = node_macs(node, one.prepared.shapes) // (
            node.inputs[form.weight_index].shape[form.in_axis]
            * node.inputs[form.weight_index].shape[form.out_axis]
        )
        dense[node.name] = np.array([per_pair, 0, 0, 100])
        for kind in one.kinds.get(node.name, ()):
            half = np.array([per_pair / 2, 0.0, 0.0, 100.0])
            implants[node.name, kind] = ImplantTimes(half, half)
    other = {node.name: 100 for node in nodes if node.name not in dense}
    times = NodeTimes(dense, other, implants, unit=4)
    return replace(one, losses=with_times(one.losses, one.prepared, times))


def predicted(one: Job, choice: Choice) -> float:
    cost = one.losses.cost
    return predicted_costs(one.prepared, one.losses, choice)[2] / cost.totals(cost.sizes)[2]


def stopwatch(one: Job, asked: list[float], *, factor: float = 1.0, least: float = 0.0) -> Any:
    """Time candidates as predicted, times a factor, but never below ``least``."""

    def time_it(candidate: Compressed) -> LatencyComparison:
        asked.append(predicted(one, candidate.choice))
        return timing(max(asked[-1] * factor, least))

    return time_it


@pytest.mark.parametrize("method", ["prune", "hap"])
@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_a_budget_of_time_is_met_as_it_is_measured(method: str, factor: float) -> None:
    """Predictions may be off: what was measured corrects them."""
    one, asked = timed(job("residual cnn")), list[float]()
    of = setting(one, method, align=1, recover="none", time=stopwatch(one, asked, factor=factor))
    found = compress_to(of, {"params": None, "macs": None, "latency": 0.6})
    ratio = predicted(one, found.choice) * factor
    assert 0.5 < ratio <= 0.6
    assert len(asked) > (1 if factor > 1 else 0)


def test_predicted_costs_are_those_of_the_choice_carried_out() -> None:
    one = timed(job("residual cnn"))
    for method, ratio in (("prune", 0.4), ("implant", 0.7)):
        found = sketch(setting(one, method), one.budgets(macs=ratio))
        assert bool(found.choice.replacements) == (method == "implant")
        costs = predicted_costs(one.prepared, one.losses, found.choice)
        assert costs[:2].tolist() == real_totals(one, found.finished())


def test_a_latency_out_of_reach_names_the_least_that_was_reached() -> None:
    one, asked = timed(job("residual cnn")), list[float]()
    of = setting(one, "prune", align=1, recover="none", time=stopwatch(one, asked, least=0.7))
    with pytest.raises(BudgetError, match=r"--keep-latency 0\.3 cannot be reached: .* is 0\.700 of the"):
        compress_to(of, {"latency": 0.3})
    asked.clear()  # now no plan is predicted to be fast enough: the fastest is timed, and that is all
    of = setting(one, "prune", align=1, recover="none", time=stopwatch(one, asked, least=0.2))
    with pytest.raises(BudgetError, match=r"cannot be reached: .* is 0\.200 of the"):
        compress_to(of, {"latency": 0.001})
    assert len(asked) == 1


def test_rounds_count_time_from_the_original() -> None:
    """A model that takes half as long as the original already may keep all of its time."""
    one, asked = timed(job("residual cnn")), list[float]()
    time_it = stopwatch(one, asked, factor=0.5)
    of = setting(one, "prune", align=1, recover="none", base_ratio=0.5, time=time_it)
    found = compress_to(of, {"latency": 0.4})
    assert predicted(one, found.choice) == pytest.approx(0.8, abs=0.04)
