"""Loss curves: what is measured equals the distance of a model that is really cut and refitted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from topologies import TOPOLOGIES

from hap_onnx.coupling.channels import ChannelGroup
from hap_onnx.events import Event
from hap_onnx.planning.curves import (
    GroupCurve,
    GroupRanking,
    Measured,
    _sum_of_squares,
    measure_curves,
    output_distance,
    rank_by_score,
)
from hap_onnx.sensitivity.curvature import (
    LayerCurvature,
    collect_curvature,
    group_consumers,
    refitted_weights,
)
from hap_onnx.surgery import remove_channels
from hap_onnx.twin import build_twin, probe_shapes
from tests.helpers import make_model, node, rand
from tests.sensitivity.test_curvature import Case, conv_net, make_case

SCALES = {"y": 0.5}


def by_number(group: ChannelGroup) -> GroupRanking:
    return GroupRanking(group.name, np.arange(group.size), np.linspace(0.0, 1.0, group.size + 1))


def measure(
    case: Case, *, curvature: dict[str, LayerCurvature] | None = None, batch_size: int = 5, **options: object
) -> tuple[GroupCurve, ...]:
    return measure_curves(
        case.graph,
        case.twin,
        case.coupling,
        [by_number(group) for group in case.coupling.groups],
        case.collect() if curvature is None else curvature,
        case.subset,
        scales=SCALES,
        batch_size=batch_size,
        **options,  # type: ignore[arg-type]
    )


def real_distance(case: Case, group: ChannelGroup, width: int, curvature: dict[str, LayerCurvature]) -> float:
    """Cut the graph by surgery, put the refitted weights in, and compare the outputs."""
    removed = np.arange(group.size - width)
    keep = np.ones(case.coupling.n_elements, bool)
    keep[group.elements[removed]] = False
    x = torch.from_numpy(case.x)
    shapes = probe_shapes(case.twin, {"x": x[:2]})
    cut = build_twin(remove_channels(case.graph, case.coupling, keep, shapes=shapes))
    parts = group_consumers(group, case.nodes, case.twin, curvature)
    new = refitted_weights(parts, removed, case.nodes, case.twin, curvature)
    with torch.no_grad():
        for (name, index), tensor in new.items():
            initializer = case.nodes[name].inputs[index].name
            for axis in (w for w in case.coupling.weights if w.initializer == initializer):
                stays = (axis.elements < 0) | keep[axis.elements]
                tensor = tensor.index_select(axis.axis, torch.from_numpy(np.flatnonzero(stays)))
            cut.parameter_of[initializer].copy_(tensor)
        outputs, expected = cut({"x": x})["y"].double(), case.twin({"x": x})["y"].double()
    return 0.5 * SCALES["y"] ** 2 * float((outputs - expected).square().sum()) / len(x)


@pytest.mark.parametrize("group", [1, 2])
def test_measured_losses_are_those_of_the_model_that_is_really_cut(group: int) -> None:
    case = make_case(conv_net(group=group, width=8 * group))
    curvature = case.collect()
    curves = {curve.group: curve for curve in measure(case, curvature=curvature)}
    assert len(curves) == 2
    n_compared = 0
    for channels in case.coupling.groups:
        measured = curves[channels.name].measured
        assert set(measured) == {0, channels.size // 4, channels.size // 2, 3 * channels.size // 4}
        for width, loss in measured.items():
            if width:  # a width of 0 has no model to compare with here
                assert loss.loss == pytest.approx(real_distance(case, channels, width, curvature), rel=1e-3)
                n_compared += 1
    assert n_compared == {1: 6, 2: 4}[group]


def test_losses_of_what_only_products_of_activations_read_are_measured() -> None:
    """Parts of the width of queries and keys: no weight reads them, so that nothing is refitted."""
    case = make_case(TOPOLOGIES["one_key_for_all_queries"]().model)
    curvature = case.collect()
    curves = {curve.group: curve for curve in measure(case, curvature=curvature)}
    n_compared = 0
    for channels in case.coupling.groups:
        for width, loss in curves[channels.name].measured.items():
            if width:
                assert loss.loss == pytest.approx(real_distance(case, channels, width, curvature), rel=1e-3)
                assert loss.loss > 1e-4
                n_compared += 1
    assert n_compared == 6


def test_curves_pass_through_what_was_measured_and_end_at_zero() -> None:
    case = make_case(conv_net(width=8))
    for curve, group in zip(measure(case), case.coupling.groups, strict=True):
        assert curve.loss.shape == (group.size + 1,)
        assert curve.loss[group.size] == 0
        for width, loss in curve.measured.items():
            assert curve.loss[width] == pytest.approx(max(loss.loss, 1e-12))
        assert (curve.loss[:-1] > 0).all()
        assert np.isfinite(curve.loss).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_a_huge_loss(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hap_onnx.planning.curves.run_forks",
        lambda twin, subset, forks, **options: {fork.key: Measured(value) for fork in forks},
    )
    for curve in measure(make_case(conv_net())):
        assert np.isfinite(curve.loss).all()
        assert (curve.loss[list(curve.measured)] > 1e10).all()


def test_between_measured_widths_the_ratio_is_interpolated_in_its_log() -> None:
    case = make_case(conv_net(width=8))
    group = next(g for g in case.coupling.groups if g.size == 8)
    curve = next(c for c in measure(case) if c.group == group.name)
    predicted = by_number(group).loss[::-1]
    ratio = curve.loss[:7] / predicted[:7]
    np.testing.assert_allclose(ratio[3], np.sqrt(ratio[2] * ratio[4]), rtol=1e-5)
    np.testing.assert_allclose(ratio[5], np.sqrt(ratio[4] * ratio[6]), rtol=1e-5)
    assert curve.loss[7] == pytest.approx(predicted[7] * ratio[6], rel=1e-5)  # beyond: the last ratio


def test_losses_do_not_depend_on_the_batches() -> None:
    case = make_case(conv_net())
    curvature = case.collect()
    for one, other in zip(
        measure(case, curvature=curvature, batch_size=12),
        measure(case, curvature=curvature, batch_size=5),
        strict=True,
    ):
        np.testing.assert_allclose(one.loss, other.loss, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [5, 12])
def test_errors_are_those_of_the_mean_over_samples(batch_size: int) -> None:
    """Each sample measured alone gives the numbers whose mean was measured."""
    case = make_case(conv_net())
    curvature = case.collect()
    alone = [measure(replace(case, x=x[None]), curvature=curvature) for x in case.x]
    assert all(np.isnan(m.std_error) for curve in alone[0] for m in curve.measured.values())
    for number, curve in enumerate(measure(case, curvature=curvature, batch_size=batch_size)):
        for width, found in curve.measured.items():
            losses = np.array([curves[number].measured[width].loss for curves in alone])
            assert found.loss == pytest.approx(losses.mean(), rel=1e-4)
            assert found.std_error == pytest.approx(losses.std(ddof=1) / np.sqrt(len(losses)), rel=1e-3)
            assert found.std_error > 0


def test_outputs_that_do_not_tell_samples_apart_have_no_error() -> None:
    one, other = {"y": torch.ones(6, 2)}, {"y": torch.zeros(6, 2)}
    assert _sum_of_squares(one, other, {"y": 1.0}, n_samples=6) == pytest.approx(6.0)
    assert np.isnan(_sum_of_squares(one, other, {"y": 1.0}, n_samples=3))


def test_scores_are_told_with_an_error_that_holds_however_they_go_together() -> None:
    group = make_case(conv_net(width=4)).coupling.groups[0]
    score, error = np.zeros(100), np.zeros(100)
    score[group.elements], error[group.elements] = [3.0, -1.0, 0.5, 2.0], [0.1, 0.2, 0.3, 0.4]
    ranking = rank_by_score(group, score, std_error=error)
    assert ranking.score == pytest.approx(4.5 / 4)
    assert ranking.score_error == pytest.approx(0.25)
    score[group.elements[1]] = np.inf  # nothing is known
    assert rank_by_score(group, score, std_error=error).score is None
    assert rank_by_score(group, score).score is None


def test_progress_counts_every_fork() -> None:
    events: list[Event] = []
    case = make_case(conv_net())
    measure(case, on_event=events.append)
    start = next(event for event in events if event.kind == "start")
    assert start.total == 3 * 8  # batches x (two groups at four widths)
    assert sum(event.kind == "advance" for event in events) == start.total


def test_consumers_without_a_matrix_form_lose_the_channels_without_a_refit() -> None:
    weights = {"w1": rand(4, 2, 1, 1, seed=1), "w2": rand(4, 3, 2, 2, seed=2)}
    nodes = [
        node("Conv", ["x", "w1"], ["a"]),
        node("Relu", ["a"], ["h"]),
        node("ConvTranspose", ["h", "w2"], ["y"], strides=[2, 2]),
    ]
    model = make_model(nodes, inputs={"x": ["N", 2, 3, 3]}, outputs=["y"], weights=weights)
    case = make_case(model)
    (curve,) = measure(case)
    (group,) = case.coupling.groups
    assert set(curve.measured) == {0, 1, 2, 3}
    for width, loss in curve.measured.items():
        if width:
            assert loss.loss == pytest.approx(real_distance(case, group, width, {}), rel=1e-4)
    x = torch.from_numpy(case.x)
    with torch.no_grad():
        everything = 0.5 * SCALES["y"] ** 2 * float(case.twin({"x": x})["y"].square().sum()) / len(x)
    assert curve.measured[0].loss == pytest.approx(everything, rel=1e-4)


def test_a_model_whose_batch_cannot_be_unfixed_is_measured_sample_by_sample() -> None:
    """The Reshape mixes samples unless they run one by one."""
    weights = {
        "w1": rand(4, 2, 1, 1, seed=1),
        "w2": rand(3, 4, 1, 1, seed=2),
        "shape": np.array([3, -1], np.int64),
        "shift": rand(3, 20, seed=3),
        "back": np.array([1, 60], np.int64),
    }
    nodes = [
        node("Conv", ["x", "w1"], ["a"]),
        node("Relu", ["a"], ["h"]),
        node("Conv", ["h", "w2"], ["c"]),
        node("Reshape", ["c", "shape"], ["r"]),
        node("Add", ["r", "shift"], ["s"]),
        node("Reshape", ["s", "back"], ["y"]),
    ]
    model: onnx.ModelProto = make_model(nodes, inputs={"x": [1, 2, 5, 4]}, outputs=["y"], weights=weights)
    case = make_case(model)
    (one,) = measure(case, batch_size=12)
    (other,) = measure(case, batch_size=1)
    np.testing.assert_allclose(one.loss, other.loss, rtol=1e-5)
    (group,) = case.coupling.groups
    found = case.collect(batch_size=12)["make_c"]
    h = np.maximum(np.einsum("oi,nihw->nohw", weights["w1"][:, :, 0, 0], case.x), 0)
    rows = np.concatenate([h.transpose(0, 2, 3, 1).reshape(-1, 4), np.ones((12 * 20, 1))], 1)
    np.testing.assert_allclose(found.inputs[0], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert one.measured[2].loss == pytest.approx(real_distance(case, group, 2, case.collect()), rel=0.05)


# ---------------------------------------------------------------- small parts


def test_scores_give_an_order_and_losses_that_add_up() -> None:
    case = make_case(conv_net(width=4))
    group = case.coupling.groups[0]
    score = np.zeros(case.coupling.n_elements)
    score[group.elements] = [3.0, -1.0, 0.5, 2.0]
    ranking = rank_by_score(group, score)
    assert ranking.group == group.name
    np.testing.assert_array_equal(ranking.order, [1, 2, 3, 0])
    np.testing.assert_allclose(ranking.loss, [0, 0, 0.5, 2.5, 5.5])


def test_infinite_scores_go_last_at_finite_losses() -> None:
    case = make_case(conv_net(width=4))
    group = case.coupling.groups[0]
    score = np.zeros(case.coupling.n_elements)
    score[group.elements] = [np.inf, 3.0, np.inf, 0.5]
    ranking = rank_by_score(group, score)
    np.testing.assert_array_equal(ranking.order, [3, 1, 0, 2])
    assert np.isfinite(ranking.loss).all()
    assert (np.diff(ranking.loss)[2:] > 100 * ranking.loss[2]).all()
    everything = rank_by_score(group, np.full(case.coupling.n_elements, np.inf))
    assert np.isfinite(everything.loss).all()
    assert (np.diff(everything.loss) > 0).all()
    (curve,) = measure_curves(
        case.graph, case.twin, case.coupling, [ranking], case.collect(), case.subset, scales=SCALES,
        batch_size=5,
    )  # fmt: skip
    assert np.isfinite(curve.loss).all()


def test_equal_scores_keep_their_order() -> None:
    group = make_case(conv_net(width=4)).coupling.groups[0]
    np.testing.assert_array_equal(rank_by_score(group, np.ones(100)).order, np.arange(4))


def test_the_distance_is_half_the_scaled_square_summed_over_outputs() -> None:
    ours = {"y": torch.tensor([[1.0, 2.0]]), "z": torch.tensor([[5.0]]), "other": torch.tensor([[9.0]])}
    theirs = {"y": torch.tensor([[0.0, 0.0]]), "z": torch.tensor([[1.0]]), "other": torch.tensor([[0.0]])}
    assert output_distance(ours, theirs, {"y": 2.0, "z": 0.5}) == pytest.approx(0.5 * (4 * 5 + 0.25 * 16))


def test_collecting_leaves_the_twin_as_it_was() -> None:
    case = make_case(conv_net())
    before = {name: parameter.detach().clone() for name, parameter in case.twin.parameter_of.items()}
    collect_curvature(case.graph, case.twin, case.coupling, case.subset, scales=SCALES, batch_size=4, seed=0)
    measure(case)
    for name, parameter in case.twin.parameter_of.items():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0)
        assert parameter.grad is None
