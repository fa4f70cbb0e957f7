"""Timing implants: what is timed, at which rank, and what is made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from planning_cases import Job, make_job
from sample_models import images, residual_cnn
from topologies import Net

from hap_onnx.implants import speed as implant_speed
from hap_onnx.implants.speed import N_CHAINED, faster_kinds
from hap_onnx.model.model_io import load_model
from hap_onnx.prepare import prepare
from hap_onnx.runtime.latency import LatencyComparison
from hap_onnx.runtime.session import Session, make_session


def time_as(
    monkeypatch: pytest.MonkeyPatch, ratio_of: float | Callable[[int], float]
) -> list[tuple[Session, Session]]:
    """Let the comparison of each number come out like this; returns those made, each model having run."""
    compared: list[tuple[Session, Session]] = []

    def compare(before: Session, after: Session, feed: Any, *, seconds: float) -> LatencyComparison:
        for session in (before, after):
            assert np.isfinite(session.session.run(None, dict(feed))[0]).all()
        ratio = ratio_of(len(compared)) if callable(ratio_of) else ratio_of
        compared.append((before, after))
        return LatencyComparison(1.0, ratio, ratio, ratio, ratio, 11, 1, "CPUExecutionProvider", 1)

    monkeypatch.setattr(implant_speed, "measure_latency", compare)
    return compared


def open_session(opened: list[onnx.ModelProto]) -> Any:
    def open_one(model: onnx.ModelProto) -> Session:
        opened.append(model)
        return make_session(model, providers="cpu", threads=1)

    return open_one


def make_net(**options: Any) -> Job:
    net = Net()
    x = net.relu(net.conv("x", 3, 32, out="a"))
    for name in "bc":
        x = net.relu(net.conv(x, 32, 32, out=name))
    net.conv(x, 32, 4, k=1, out="y")
    return make_job(net.model("y"), **options)


def n_macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of convolutions to 36 positions."""
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    return sum(
        int(np.prod(shapes[name])) * 36
        for node in model.graph.node
        for name in node.input[1:2]
        if name in shapes and len(shapes[name]) == 4
    )


def shares_of(opened: list[onnx.ModelProto]) -> list[float]:
    """Multiply-accumulates of each pair of models that were timed, the second's over the first's."""
    return [n_macs(after) / n_macs(before) for before, after in zip(opened[::2], opened[1::2], strict=True)]


def test_the_first_share_that_saves_half_as_much_time_as_macs_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the share s of the multiply-accumulates, s of the time would be ideal, and (1 + s) / 2 is enough."""
    one, just = make_net(n_samples=20), 1e-9
    for kind in ("lowrank", "spatial", "pointwise"):
        offered = {"make_b": (kind,)}
        time_as(monkeypatch, 1.0)
        opened: list[onnx.ModelProto] = []
        assert faster_kinds(one.prepared, offered, open_session(opened)) == {"make_b": {}}
        large, small = shares_of(opened)  # both were tried, the large one first
        assert large == pytest.approx(0.75, abs=0.09)
        assert small == pytest.approx(0.5, abs=0.09)
        enough = ((1 + large) / 2, (1 + small) / 2)
        for ratios, found, n_timed in (
            ((enough[0] - just,), max(large, 0.75), 1),
            ((enough[0] + just, enough[1] - just), max(small, 0.5), 2),
            ((enough[0] + just, enough[1] + just), None, 2),
        ):
            compared = time_as(monkeypatch, lambda index, ratios=ratios: ratios[index])
            share = faster_kinds(one.prepared, offered, open_session([]))["make_b"]
            assert share == ({} if found is None else {kind: pytest.approx(found)})
            assert len(compared) == n_timed


@pytest.mark.parametrize(("ratio", "keeps"), [(0.5, True), (0.7, True), (1.0, False), (1.5, False)])
def test_each_kind_of_layer_is_timed_once(monkeypatch: pytest.MonkeyPatch, ratio: float, keeps: bool) -> None:
    one, opened = make_net(n_samples=20), []
    compared = time_as(monkeypatch, ratio)
    found = faster_kinds(one.prepared, one.kinds, open_session(opened))
    assert set(found) == set(one.kinds)
    for name, shares in found.items():
        assert set(shares) == (set(one.kinds[name]) if keeps else set())
        assert all(0.5 <= share < 1 for share in shares.values())
    assert found["make_b"] == found["make_c"]  # alike but for their weights
    assert len(compared) == len(opened) // 2 == (3 + 3 + 1) * (1 if keeps else 2)


def test_layers_are_timed_in_chains_where_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    one, opened = make_net(n_samples=20), []
    time_as(monkeypatch, 1.0)
    faster_kinds(one.prepared, {"make_b": ("lowrank", "spatial", "pointwise")}, open_session(opened))
    assert len(opened) == 3 * 2 * 2
    for dense, replaced in zip(opened[::2], opened[1::2], strict=True):
        assert sum(node.op_type == "Conv" for node in dense.graph.node) == N_CHAINED
        assert sum(node.op_type == "Conv" for node in replaced.graph.node) == 2 * N_CHAINED
        assert n_macs(dense) == N_CHAINED * 36 * 32 * 32 * 9
    opened.clear()
    faster_kinds(one.prepared, {"make_a": ("spatial",)}, open_session(opened))
    assert [len(model.graph.node) for model in opened] == [1, 2] * 2


def test_ranks_are_multiples_of_eight_where_there_are_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    one, opened = make_net(n_samples=20), []
    time_as(monkeypatch, 1.0)
    faster_kinds(one.prepared, {"make_b": ("lowrank", "spatial", "pointwise")}, open_session(opened))
    for replaced in opened[1::2]:
        shapes = [list(tensor.dims) for tensor in replaced.graph.initializer if len(tensor.dims) == 4]
        assert shapes
        assert not any(n % 8 for shape in shapes for n in shape[:2])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_layers_are_timed_in_their_own_type(monkeypatch: pytest.MonkeyPatch, dtype: type) -> None:
    prepared = prepare(load_model(residual_cnn(dtype=dtype)), {"x": images(2).astype(dtype)})
    opened: list[onnx.ModelProto] = []
    compared = time_as(monkeypatch, 0.5)
    found = faster_kinds(
        prepared, {"make_a1": ("lowrank", "spatial"), "make_scores": ("lowrank",)}, open_session(opened)
    )
    assert set(found["make_a1"]) == {"lowrank", "spatial"}
    assert len(compared) >= 2
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    for model in opened:
        values = (*model.graph.input, *model.graph.output)
        assert {value.type.tensor_type.elem_type for value in values} == {element}
        assert {tensor.data_type for tensor in model.graph.initializer} == {element}


def test_types_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of the same sizes are timed anew where their type is another one."""
    model = residual_cnn()
    prepared = prepare(load_model(model), {"x": images(2)})
    half = next(node for node in prepared.graph.nodes if node.name == "make_b1").inputs[1]
    compared = time_as(monkeypatch, 0.5)
    offered = dict.fromkeys(("make_a1", "make_b1"), ("spatial",))
    faster_kinds(prepared, offered, open_session([]))
    assert len(compared) == 1
    half.values = half.values.astype(np.float16)
    faster_kinds(prepared, offered, open_session([]))
    assert len(compared) == 3


def test_layers_of_every_shape_can_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    time_as(monkeypatch, 0.5)
    net = Net()
    x = net.relu(net.conv("x", 3, 1, out="one"))  # no kernel of it can become pointwise
    x = net.op("Conv", x, net.rand(6, 1, 3, 3), "", out="unnamed", strides=[2, 2])
    x = net.op("Flatten", net.relu(net.conv(x, 6, 4, group=2, out="grouped")))
    x = net.relu(net.op("Gemm", x, net.rand(16, 9), net.rand(1, 9), out="gemm"))
    net.op("MatMul", x, net.rand(9, 2), out="y")
    one = make_job(net.model("y"), n_samples=20)
    assert "pointwise" in one.kinds["make_one"]
    found = faster_kinds(one.prepared, one.kinds, open_session([]))
    assert set(found) == set(one.kinds)
    for name, shares in found.items():
        # Of one kernel, 27 weights, all taps at once are no fewer in two factors: 27 + 1.
        wanted = {"spatial"} if name == "make_one" else set(one.kinds[name])
        assert set(shares) == wanted, name
        assert all(0.75 <= share < 1 for share in shares.values())
