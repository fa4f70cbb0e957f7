"""What an analysis tells is what the planner reckons with, and what cutting the model really costs."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from planning_cases import Job, make_job
from sample_models import residual_cnn
from topologies import TOPOLOGIES

from hap_onnx import report as reports
from hap_onnx.config import CompressConfig
from hap_onnx.implants.loss import explain_refusals
from hap_onnx.jobs.analysis import MAX_POINTS, SIZE_RATIOS, analyse, objective_of, size_point, with_plan
from hap_onnx.jobs.candidates import Setting, choose_within, sketch
from hap_onnx.model.measure import model_size
from hap_onnx.planning.curves import output_distance
from hap_onnx.report.analysis import Analysis
from hap_onnx.sensitivity.curvature import group_consumers, refitted_weights, to_tensors
from hap_onnx.surgery import remove_channels
from hap_onnx.twin import build_twin, probe_shapes


@cache
def job(sensitivity: str = "obs") -> Job:
    return make_job(residual_cnn(), n_samples=40, sensitivity=sensitivity)


def setting(one: Job) -> Setting:
    return Setting(
        prepared=one.prepared, losses=one.losses, method="hap", kinds=one.kinds, calibrate=one.subset,
        choose=one.subset, scales=one.scales, batch_size=16, seed=0,
    )  # fmt: skip


@cache
def analysis(sensitivity: str = "obs") -> Analysis:
    return analyse(setting(job(sensitivity)), objective="macs")


def cut_loss(one: Job, number: int, width: int) -> np.ndarray:
    """Cut a group to ``width``, refit its readers, and compare the outputs of each sample."""
    prepared, ranking = one.prepared, one.losses.rankings[number]
    coupling, group = prepared.coupling, prepared.coupling.groups[number]
    curvature = {name: losses.curvature for name, losses in one.losses.implants.items()}
    removed = ranking.order[: group.size - width]
    keep = np.ones(coupling.n_elements, bool)
    keep[group.elements[removed]] = False
    cut = build_twin(remove_channels(prepared.graph, coupling, keep, shapes=prepared.probe_shapes))
    parts = group_consumers(group, one.nodes, prepared.twin, curvature)
    for (name, index), tensor in refitted_weights(
        parts, removed, one.nodes, prepared.twin, curvature
    ).items():
        initializer = one.nodes[name].inputs[index].name
        for axis in (w for w in coupling.weights if w.initializer == initializer):
            stays = (axis.elements < 0) | keep[axis.elements]
            tensor = tensor.index_select(axis.axis, torch.from_numpy(np.flatnonzero(stays)))
        with torch.no_grad():
            cut.parameter_of[initializer].copy_(tensor)
    losses = []
    for batch in one.subset.batches(1):
        inputs = to_tensors(batch.inputs, prepared.twin)
        with torch.no_grad():
            losses.append(output_distance(cut(inputs), prepared.twin(inputs), one.scales))
    return np.array(losses)


def test_measured_points_of_a_group_are_what_cutting_it_costs_on_those_samples() -> None:
    n_compared = 0
    for number, group in enumerate(analysis().groups):
        for point in group.curve:
            width = round(point.keep * group.size)
            if point.measured is None or width == 0:  # without channels there is no model to compare with
                continue
            losses = cut_loss(job(), number, width)
            assert point.measured == pytest.approx(losses.mean(), rel=2e-3)
            assert point.std_error == pytest.approx(losses.std(ddof=1) / np.sqrt(len(losses)), rel=5e-3)
            n_compared += 1
    assert n_compared == 3 * len(analysis().groups)


def test_groups_and_layers_are_those_of_the_model_in_its_order() -> None:
    one, found = job(), analysis()
    position = {node.name: index for index, node in enumerate(one.prepared.graph.nodes)}
    assert [group.name for group in found.groups] == [group.name for group in one.prepared.coupling.groups]
    for places in (
        [min(position[node] for node in group.nodes) for group in found.groups],
        [position[layer.node] for layer in found.layers],
    ):
        assert places == sorted(places)
        assert len(places) > 2
    assert {layer.node for layer in found.layers} == set(one.losses.implants)
    assert {group.role for group in found.groups} == {"inner", "residual"}
    assert (found.n_samples, found.sensitivity) == (40, "obs")


@pytest.mark.parametrize("name", ["shuffle_net_units", "dense_block", "transformer_block"])
def test_groups_of_other_models_come_in_the_order_of_their_nodes(name: str) -> None:
    one = make_job(TOPOLOGIES[name]().model)
    position = {node.name: index for index, node in enumerate(one.prepared.graph.nodes)}
    places = [min(position[node] for node in group.producers) for group in one.prepared.coupling.groups]
    assert places == sorted(places)


@pytest.mark.parametrize("name", ["depthwise_plain", "depthwise_multiplied", "shuffle_net_units"])
def test_layers_that_the_planner_cannot_replace_are_left_out(name: str) -> None:
    """Such as depthwise ones: what a kernel of theirs costs depends on channels that go for other reasons."""
    one = make_job(TOPOLOGIES[name]().model)
    found = analyse(setting(one), objective="macs")
    replaceable = [terms.node for terms in one.losses.cost.layers]
    assert [layer.node for layer in found.layers] == replaceable
    assert set(replaceable) == set(one.losses.implants)  # nothing is measured in vain
    assert any("go together with" in why for why in explain_refusals(one.prepared).values())
    assert found.sizes


def test_depthwise_layers_belong_to_the_group_that_they_pass_on() -> None:
    """Else a page says of them that they keep all channels."""
    one = make_job(TOPOLOGIES["depthwise_plain"]().model)
    found = analyse(setting(one), objective="macs")
    layers = [node for node in one.prepared.graph.nodes if len(node.inputs) > 1 and node.op == "Conv"]
    first, depthwise, *_ = layers
    assert depthwise.attrs["group"] == depthwise.inputs[1].values.shape[0] == 8
    (group,) = [group for group in found.groups if first.name in group.nodes]
    assert group.nodes == (first.name, depthwise.name)


def test_curves_of_groups_are_thinned_and_keep_what_was_measured() -> None:
    one = job()
    for group, ranking, curve in zip(
        analysis().groups, one.losses.rankings, one.losses.curves, strict=True
    ):
        shares = [point.keep for point in group.curve]
        assert shares == sorted(set(shares))
        assert (shares[0], shares[-1]) == (0, 1)
        assert len(shares) <= MAX_POINTS
        measured = {round(point.keep * group.size) for point in group.curve if point.measured is not None}
        assert measured == set(curve.measured)
        for point in group.curve:
            width = round(point.keep * group.size)
            assert point.expected == curve.loss[width]
            assert point.predicted == ranking.loss[group.size - width]


def test_the_score_of_obs_is_the_measured_loss_of_half_a_group_per_channel() -> None:
    for number, group in enumerate(analysis().groups):
        half = group.size // 2
        losses = cut_loss(job(), number, half) / half
        assert group.score == pytest.approx(losses.mean(), rel=2e-3)
        assert group.std_error == pytest.approx(losses.std(ddof=1) / np.sqrt(len(losses)), rel=5e-3)


def test_scores_of_estimators_are_their_own() -> None:
    """Squared norms are known exactly: of the weights of each channel, with what follows it."""
    one, found = job("magnitude"), analysis("magnitude")
    assert found.sensitivity == "magnitude"
    for group, ranking in zip(found.groups, one.losses.rankings, strict=True):
        assert group.score == pytest.approx(ranking.loss[-1] / group.size)
        assert group.std_error == 0


def test_implants_are_told_by_their_share_of_the_layer() -> None:
    one = job()
    for layer in analysis().layers:
        losses = one.losses.implants[layer.node]
        kinds = {curve.kind: curve.points for curve in layer.curves}
        assert set(kinds) <= {form.kind for form in losses.layer.forms}
        for points in kinds.values():
            shares = [point.keep for point in points]
            assert shares == sorted(shares)
            assert 0 < shares[0] <= shares[-1] < 1
        measured = [point for point in kinds[losses.measured_kind] if point.measured is not None]
        assert sorted(point.measured for point in measured) == sorted(
            entry.loss for entry in losses.measured.values()
        )
        for point in measured:  # curves pass through what was measured
            assert point.expected == pytest.approx(point.measured, rel=1e-6)
        if np.isinf(layer.score):
            continue
        nearest = [min(points, key=lambda point: abs(point.keep - 0.5)) for points in kinds.values()]
        assert layer.score == min(point.expected for point in nearest if 0.25 <= point.keep <= 0.75)


def test_sizes_are_plans_within_their_budgets() -> None:
    one, found = job(), analysis()
    asked = [point.asked for point in found.sizes]
    assert asked == [ratio for ratio in SIZE_RATIOS if ratio in asked]
    assert len(asked) >= 8
    for point in found.sizes:
        assert point.macs_ratio <= point.asked
        assert point.latency_ratio is None
    assert found.sizes[-1].loss > found.sizes[0].loss
    budgets = {"macs": 0.5 * one.losses.cost.macs(one.losses.cost.sizes)}
    compressed = sketch(setting(one), budgets)  # really cut
    size = model_size(
        compressed.finished(),
        probe_shapes(
            build_twin(compressed.finished()),
            to_tensors({name: values[:1] for name, values in one.prepared.probe.items()}, one.prepared.twin),
        ),
    )
    half = next(point for point in found.sizes if point.asked == 0.5)
    full = model_size(one.prepared.graph, one.prepared.shapes)
    assert half.macs_ratio == pytest.approx(size.macs / full.macs)
    assert half.params_ratio == pytest.approx(size.params / full.params)


def test_a_plan_tells_what_it_has_left() -> None:
    one = job()
    choice = choose_within(setting(one), {"macs": 0.6 * one.losses.cost.macs(one.losses.cost.sizes)})
    plan = reports.PlanSummary(
        groups=tuple(reports.GroupKept(d.group, d.size, len(d.keep)) for d in choice.decisions),
        layers=(reports.LayerChosen(analysis().layers[0].node, "spatial", "it fits"),),
    )
    found = with_plan(analysis(), plan, size_point(setting(one), choice, 0.6))
    assert [group.kept for group in found.groups] == [len(d.keep) for d in choice.decisions]
    assert [layer.chosen for layer in found.layers] == ["spatial", *[None] * (len(found.layers) - 1)]
    assert found.chosen == next(point for point in analysis().sizes if point.asked == 0.6)
    assert all(group.kept is None for group in analysis().groups)


@pytest.mark.parametrize(
    ("words", "objective"),
    [
        ({}, "macs"),
        ({"objective": "params"}, "params"),
        ({"keep_params": 0.5}, "params"),
        ({"max_bytes": 10**6}, "params"),
        ({"max_bytes": 10**6, "keep_macs": 0.5}, "macs"),
        ({"keep_latency": 0.5, "keep_macs": 0.5}, "latency"),
    ],
)
def test_sizes_are_about_what_is_asked_for(words: dict[str, object], objective: str) -> None:
    assert objective_of(CompressConfig(**words)) == objective  # type: ignore[arg-type]
