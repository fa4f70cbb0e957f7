"""Timing implants: what is timed, at which rank, and what is made of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from planning import Job, make_job
from topologies import Net

from hap_onnx import implant_speed
from hap_onnx.implant_speed import N_CHAINED, faster_kinds
from hap_onnx.validate import LatencyComparison, Session, make_session


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def time_as(monkeypatch: pytest.MonkeyPatch, ratio: float) -> list[tuple[Session, Session]]:
    """Let all comparisons come out the same; returns those that were made, each model having run."""
    compared: list[tuple[Session, Session]] = []

    def compare(before: Session, after: Session, feed: Any, *, seconds: float) -> LatencyComparison:
        for session in (before, after):
            assert np.isfinite(session.session.run(None, dict(feed))[0]).all()
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


@pytest.mark.parametrize(("ratio", "keeps"), [(0.5, True), (0.9, True), (0.91, False), (1.5, False)])
def test_only_kinds_that_save_time_are_kept(
    monkeypatch: pytest.MonkeyPatch, ratio: float, keeps: bool
) -> None:
    one, opened = make_net(n_samples=20), []
    compared = time_as(monkeypatch, ratio)
    found = faster_kinds(one.prepared, one.kinds, open_session(opened))
    assert found == {name: kinds if keeps else () for name, kinds in one.kinds.items()}
    # b and c are alike: each kind of layer is timed once.
    assert len(compared) == len(opened) // 2 == 3 + 3 + 1


def n_macs(model: onnx.ModelProto) -> int:
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    return sum(
        int(np.prod(shapes[name])) * 36
        for node in model.graph.node
        for name in node.input[1:2]
        if name in shapes and len(shapes[name]) == 4
    )


def test_layers_are_timed_in_chains_at_half_their_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    one, opened = make_net(n_samples=20), []
    time_as(monkeypatch, 1.0)
    faster_kinds(one.prepared, {"make_b": ("lowrank", "spatial", "pointwise")}, open_session(opened))
    for dense, replaced in zip(opened[::2], opened[1::2], strict=True):
        assert sum(node.op_type == "Conv" for node in dense.graph.node) == N_CHAINED
        assert sum(node.op_type == "Conv" for node in replaced.graph.node) == 2 * N_CHAINED
        assert n_macs(dense) == N_CHAINED * 36 * 32 * 32 * 9
        assert 0.25 < n_macs(replaced) / n_macs(dense) < 0.6  # ranks are multiples of 8
    opened.clear()
    faster_kinds(one.prepared, {"make_a": ("spatial",)}, open_session(opened))
    assert [len(model.graph.node) for model in opened] == [1, 2]


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
    assert found == {**one.kinds, "make_one": ("lowrank", "spatial")}
