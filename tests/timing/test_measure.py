"""Times of the nodes of a model: what is timed, how it adds up, and what the planner makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from sample_models import residual_cnn, write

from hap_onnx.implants.loss import find_implant_layers
from hap_onnx.jobs.machine import write_proto
from hap_onnx.model.model_io import load_model
from hap_onnx.model.weights import LargeModel, split_model
from hap_onnx.ops.linear import linear_form
from hap_onnx.planning.cost import METRICS, CostModel
from hap_onnx.planning.cost_graph import cost_model
from hap_onnx.planning.times import NodeTimes
from hap_onnx.prepare import PreparedModel, make_probe, prepare
from hap_onnx.runtime.session import make_session
from hap_onnx.timing import measure
from hap_onnx.timing.kernels import Kernel
from hap_onnx.timing.measure import measure_times
from hap_onnx.timing.specimen import Specimen
from hap_onnx.timing.table import LatencyTable, Point, this_machine

HERE = this_machine("CPUExecutionProvider", 1)
LATENCY = METRICS.index("latency")


@pytest.fixture
def prepared(tmp_path) -> PreparedModel:
    source = load_model(write(tmp_path, residual_cnn()))
    return prepare(source, make_probe(make_session(source.proto, providers="cpu").inputs))


def invent(patch: pytest.MonkeyPatch, *, whole: float = 1000.0, kernels: Sequence[Kernel] = ()) -> list[str]:
    """Let each contraction take a microsecond per 100 products and one more; return what is timed."""
    timed: list[str] = []

    def time_points(
        specimen: Specimen, points: Sequence[Point], table: LatencyTable, *, seconds: float
    ) -> dict[Point, float]:
        timed.append(specimen.family)
        return {(i, o): i * o / 100 + 1 for i, o in points}

    patch.setattr(measure, "time_points", time_points)
    patch.setattr(measure, "time_run", lambda *args, **options: whole)
    patch.setattr(measure, "time_kernels", lambda *args, **options: tuple(kernels))
    return timed


def times_of(prepared: PreparedModel, table: LatencyTable | None = None) -> NodeTimes:
    kinds = {layer.node: [form.kind for form in layer.forms] for layer in find_implant_layers(prepared)}
    feed = {name: values[:1] for name, values in prepared.probe.items()}
    proto = write_proto(prepared.graph, prepared.source, None)
    return measure_times(prepared, proto, feed, kinds, table or LatencyTable(HERE))


def cost_of(prepared: PreparedModel, times: NodeTimes) -> CostModel:
    layers = [layer.node for layer in find_implant_layers(prepared)]
    return cost_model(prepared.graph, prepared.coupling, prepared.shapes, layers=layers, times=times)


def test_all_times_add_up_to_that_of_the_model(
    prepared: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for whole in (5.0, 100_000.0):  # less and more than the layers take alone
        invent(monkeypatch, whole=whole)
        cost = cost_of(prepared, times_of(prepared))
        total = cost.totals(cost.sizes)[LATENCY] / 1e6
        assert total == pytest.approx(whole, rel=1e-3)


def test_a_layer_takes_what_was_measured_at_its_widths(
    prepared: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    invent(monkeypatch, whole=1e6)
    times = times_of(prepared)
    nodes = {node.name: node for node in prepared.graph.nodes}
    assert set(times.dense) == {name for name, node in nodes.items() if linear_form(node) is not None}
    carrying = {weight.initializer for weight in prepared.coupling.weights}
    for name, coefficients in times.dense.items():
        form = linear_form(nodes[name])
        assert form is not None
        assert nodes[name].inputs[form.weight_index].name in carrying
        assert coefficients == pytest.approx([1e4, 0, 0, 1e6], abs=2e3)


def test_kernels_of_the_model_scale_what_layers_took_alone(
    prepared: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = next(node for node in prepared.graph.nodes if node.op == "Conv")
    n_out, n_in = conv.inputs[1].shape[:2]
    alone = n_in * n_out / 100 + 1
    fused = Kernel(f"{conv.outputs[0].outputs[0].outputs[0].name}_nchwc", "Conv", 1.5 * alone)
    plain = Kernel(conv.name, "Conv", 1.5 * alone)
    for kernel in (fused, plain):
        invent(monkeypatch, whole=1e6, kernels=[kernel])
        coefficients = times_of(prepared).dense[conv.name]
        assert float(coefficients @ [n_in * n_out, n_in, n_out, 1]) == pytest.approx(1.5e6 * alone, rel=1e-3)


def test_what_is_in_the_table_is_not_timed_again(
    prepared: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, timed = LatencyTable(HERE), invent(monkeypatch)
    first = times_of(prepared, table)
    assert timed
    families = set(timed)
    timed.clear()
    second = times_of(prepared, table)
    assert not timed
    assert {name: c.tolist() for name, c in first.dense.items()} == {
        name: c.tolist() for name, c in second.dense.items()
    }
    assert families == set(table.times)


def test_models_in_two_parts_are_told_apart_by_their_weights(
    prepared: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, feed = LatencyTable(HERE), {name: values[:1] for name, values in prepared.probe.items()}
    invent(monkeypatch)
    model = split_model(prepared.source.proto)
    name = max(model.weights, key=lambda one: model.weights[one].nbytes)
    other = LargeModel(model.proto, {**model.weights, name: model.weights[name] * 0})
    for one, n_known in ((model, 1), (model, 1), (other, 2)):
        measure_times(prepared, one, feed, {}, table)
        assert len(table.models) == n_known


def test_implants_have_the_times_of_their_two_layers(
    prepared: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    invent(monkeypatch, whole=1e6)
    times = times_of(prepared)
    kinds = {kind for _, kind in times.implants}
    assert kinds == {"lowrank", "spatial", "pointwise"}
    node = next(node for node, kind in times.implants if kind == "pointwise")
    implant = times.implants[node, "lowrank"]
    n_in, n_out = 24, 40
    for rank in (4, 16):
        found = float(implant.at_rank("lowrank", rank, n_groups=1) @ [n_in * n_out, n_in, n_out, 1])
        assert found == pytest.approx(1e6 * ((n_in * rank + rank * n_out) / 100 + 2), rel=1e-3)
    pointwise = times.implants[node, "pointwise"]
    found = float(pointwise.at_rank("pointwise", 8, n_groups=1) @ [n_in * n_out, n_in, n_out, 1])
    copied = pointwise.joined * n_out
    assert copied > 0
    assert found == pytest.approx(1e6 * ((n_in * (n_out - 8) + n_in * 8) / 100 + 2) + copied, rel=1e-3)


@pytest.mark.parametrize("unit", [4, 8, 16, 32])
def test_blocks_are_found_by_their_steps(
    prepared: PreparedModel, monkeypatch: pytest.MonkeyPatch, unit: int
) -> None:
    def in_blocks(
        specimen: Specimen, points: Sequence[Point], table: LatencyTable, *, seconds: float
    ) -> dict[Point, float]:
        return {(i, o): i * -(-o // unit) * unit / 10 + 1 for i, o in points}

    invent(monkeypatch)
    monkeypatch.setattr(measure, "time_points", in_blocks)
    assert times_of(prepared).unit == unit


def test_steps_below_what_the_clock_can_tell_are_no_blocks(
    prepared: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noise(
        specimen: Specimen, points: Sequence[Point], table: LatencyTable, *, seconds: float
    ) -> dict[Point, float]:
        return {(i, o): 5.0 + (o >= 40) for i, o in points}

    invent(monkeypatch)
    monkeypatch.setattr(measure, "time_points", noise)
    assert times_of(prepared).unit == 8


def test_parts_of_implants_are_timed_up_to_their_largest_rank(
    prepared: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    invent(monkeypatch)
    table = LatencyTable(HERE)
    times_of(prepared, table)
    widest = max(node.inputs[1].shape[0] for node in prepared.graph.nodes if node.op == "Conv")
    pointwise = [points for family, points in table.times.items() if family.startswith("Conv 1x1")]
    assert max(i for points in pointwise for i, _ in points) == widest  # what a first factor makes


@pytest.mark.parametrize(
    ("kernel", "index"),
    [
        ("p3", 3),
        ("y12_nchwc", 12),
        ("p0/MatMulAddFusion", 0),
        ("InsertedPrecisionFreeCast_y4_nchwc", 4),
        ("ReorderOutput_token_3", None),
        ("p", None),
    ],
)
def test_kernels_of_models_of_our_own_are_known_by_name(kernel: str, index: int | None) -> None:
    assert measure._index_of(kernel) == index


def test_points_without_a_kernel_are_timed_as_a_whole(
    prepared: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    specimen = next(iter(measure._specimens(prepared).values()))
    monkeypatch.setattr(measure, "time_kernels", lambda *args, **options: (Kernel("p1", "Conv", 7.0),))
    runs = iter([2.0, 10.0])  # a model of nothing, and that of the point
    monkeypatch.setattr(measure, "time_run", lambda *args, **options: next(runs))
    found = measure.time_points(specimen, [(4, 8), (8, 8)], LatencyTable(HERE), seconds=0.01)
    assert found == {(8, 8): 7.0, (4, 8): 8.0}


def test_without_steps_there_is_a_default(prepared: PreparedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    invent(monkeypatch)
    assert times_of(prepared).unit == 8


def test_layers_can_be_timed_where_kernels_cannot(
    prepared: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other providers return before their kernels have finished: there whole runs are timed."""
    monkeypatch.setattr(measure, "SYNCHRONOUS", ())
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    cost = cost_of(prepared, times_of(prepared))
    totals: Mapping[str, int] = dict(zip(METRICS, cost.totals(cost.sizes).tolist(), strict=True))
    assert totals["latency"] > 0


def test_real_times_tell_wide_models_from_narrow_ones(prepared: PreparedModel) -> None:
    cost = cost_of(prepared, times_of(prepared))
    least = np.array([1 if group not in cost.removable else 0 for group in range(len(cost.sizes))])
    assert 0 < cost.totals(least)[LATENCY] < cost.totals(cost.sizes)[LATENCY]
