"""Whole jobs on a small residual network: budgets, gates, plans, and what the output guarantees."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from sample_models import fix_speed, images, residual_cnn, timing, with_labels, write
from topologies import TOPOLOGIES

import hap_onnx
from hap_onnx import apply_plan, compress, inspect, load_twin, validate
from hap_onnx.config import SENSITIVITIES
from hap_onnx.errors import (
    BudgetError,
    CalibrationError,
    GateError,
    ModelError,
    UsageError,
    ValidationError,
)
from hap_onnx.events import Event
from hap_onnx.implants import speed as implant_speed
from hap_onnx.jobs import carry_out, job, machine
from hap_onnx.model.model_io import load_model
from hap_onnx.planning.plan import load_plan
from hap_onnx.report import CompressReport
from hap_onnx.runtime.session import Session
from tests.helpers import make_model, node, rand
from tools.first_divergence import run_onnxruntime

FAST: dict[str, Any] = {"threads": 1, "batch_size": 64}


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_speed(monkeypatch)


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    return {"x": images()}


@pytest.fixture(scope="module")
def labelled() -> dict[str, np.ndarray]:
    return with_labels(images(200))


def run(path: Path, x: np.ndarray) -> np.ndarray:
    return np.asarray(ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0])


def n_params(path: Path) -> int:
    return sum(int(np.prod(tensor.dims)) for tensor in onnx.load(path).graph.initializer)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    "budget",
    [{"keep_params": 0.6}, {"keep_macs": 0.5}, {"keep_params": 0.7, "keep_macs": 0.6}, {"keep_macs": 1.0}],
    ids=str,
)
def test_every_budget_is_met_and_reported(
    tmp_path: Path, data: dict[str, np.ndarray], budget: dict[str, float]
) -> None:
    model = write(tmp_path)
    report = compress(model, data, **budget, **FAST)
    output = tmp_path / "net.hap.onnx"
    assert report.output == str(output)
    assert report.budget.asked == budget
    for name, limit in budget.items():
        assert report.budget.reached[name] <= limit
    assert report.before.params == n_params(model)
    assert report.after.params == n_params(output)
    assert report.after.bytes == output.stat().st_size
    assert report.before.bytes == model.stat().st_size
    assert report.before.macs is not None
    assert report.after.macs is not None
    assert report.budget.reached["keep_params"] == pytest.approx(report.after.params / report.before.params)
    assert report.budget.reached["keep_macs"] == pytest.approx(report.after.macs / report.before.macs)
    assert run(output, data["x"]).shape == (120, 5)
    assert files_in(tmp_path) == ["net.hap.onnx", "net.onnx"]


def test_max_bytes_is_about_the_file(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = write(tmp_path)
    limit = int(0.6 * model.stat().st_size)
    report = compress(model, data, max_bytes=limit, **FAST)
    size = (tmp_path / "net.hap.onnx").stat().st_size
    assert 0.4 * limit < size <= limit
    assert report.budget.reached["max_bytes"] == size
    assert report.budget.asked == {"max_bytes": limit}


@pytest.mark.parametrize("ratio", [0.35, 0.5, 0.65, 0.9])
@pytest.mark.parametrize("method", ["implant", "hap"])
def test_max_bytes_leaves_room_for_the_nodes_and_names_of_implants(
    tmp_path: Path, data: dict[str, np.ndarray], method: str, ratio: float
) -> None:
    """Also where the best candidate has more implants than the one that was planned first."""
    model = write(tmp_path)
    limit = int(ratio * model.stat().st_size)
    report = compress(model, data, max_bytes=limit, method=method, recover="none", **FAST)
    size = (tmp_path / "net.hap.onnx").stat().st_size
    assert report.after.bytes == size
    assert 0.85 * limit < size <= limit
    assert method == "hap" or report.plan.implants


@pytest.mark.parametrize(("method", "limit"), [("implant", 90_000), ("hap", 80_000), ("hap", 95_000)])
def test_max_bytes_counts_external_data_of_implants(
    tmp_path: Path, data: dict[str, np.ndarray], method: str, limit: int
) -> None:
    model = write(tmp_path, external=True)
    before = {path.name for path in tmp_path.iterdir()}
    report = compress(model, data, max_bytes=limit, method=method, recover="none", **FAST)
    size = sum(path.stat().st_size for path in tmp_path.iterdir() if path.name not in before)
    assert report.after.bytes == size <= limit
    assert report.plan.implants


def test_max_bytes_counts_two_bytes_per_half_precision_number(tmp_path: Path) -> None:
    model = write(tmp_path, residual_cnn(dtype=np.float16))
    limit = int(0.7 * model.stat().st_size)
    compress(model, {"x": images()}, max_bytes=limit, **FAST)
    size = (tmp_path / "net.hap.onnx").stat().st_size
    assert 0.5 * limit < size <= limit


def test_max_bytes_counts_external_data(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = write(tmp_path, external=True)
    before = {path.name for path in tmp_path.iterdir()}
    compress(model, data, max_bytes=90_000, **FAST)
    assert sum(p.stat().st_size for p in tmp_path.iterdir() if p.name not in before) <= 90_000


@pytest.mark.parametrize("budget", [{"keep_macs": 1e-4}, {"keep_params": 1e-4}, {"max_bytes": 100}], ids=str)
def test_an_impossible_budget_is_refused(
    tmp_path: Path, data: dict[str, np.ndarray], budget: dict[str, float]
) -> None:
    model = write(tmp_path)
    with pytest.raises(BudgetError) as caught:
        compress(model, data, **budget, **FAST)
    assert caught.value.exit_code == 3
    assert files_in(tmp_path) == ["net.onnx"]


def test_a_model_without_channels_to_remove_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = make_model(
        [node("Gemm", ["x", "w"], ["y"])], inputs={"x": ["N", 4]}, outputs=["y"], weights={"w": rand(4, 3)}
    )
    with pytest.raises(BudgetError, match="output 'y'"):
        compress(model, {"x": rand(50, 4)}, keep_macs=0.5, method="prune", output=tmp_path / "o.onnx", **FAST)
    assert files_in(tmp_path) == []


def test_without_a_budget_the_smallest_model_within_the_drop_is_searched(
    tmp_path: Path, labelled: dict[str, np.ndarray]
) -> None:
    model = write(tmp_path)
    report = compress(model, labelled, max_drop=0.2, **FAST)
    assert report.quality is not None
    assert report.quality.metric == "accuracy"
    assert report.quality.before == 1.0
    assert report.quality.drop <= 0.2
    assert report.quality.max_drop == 0.2
    assert report.quality.n_samples == 40
    assert report.after.params < 0.9 * report.before.params
    assert report.budget.asked == {}


def test_a_search_that_finds_nothing_is_refused(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = write(tmp_path)
    with pytest.raises(BudgetError, match="--max-drop"):
        compress(model, data, max_drop=0.0, metric="r2", **FAST)
    assert files_in(tmp_path) == ["net.onnx"]
    with pytest.raises(BudgetError) as caught:
        compress(
            model, data, max_drop=0.0, metric="r2", report=tmp_path / "r.json", keep_rejected=True, **FAST
        )
    report, rejected = caught.value.report, tmp_path / "net.hap.onnx.rejected.onnx"
    assert files_in(tmp_path) == [rejected.name, "net.onnx", "r.json"]
    assert isinstance(report, CompressReport)
    assert report.output is None
    assert report.after.params == n_params(rejected) < report.before.params
    assert run(rejected, data["x"]).shape == (120, 5)
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(report.to_dict()))


# ---------------------------------------------------------------- gates


def test_a_drop_beyond_the_limit_writes_nothing_and_keeps_the_numbers(
    tmp_path: Path, data: dict[str, np.ndarray]
) -> None:
    model = write(tmp_path)
    with pytest.raises(GateError, match="--max-drop 0") as caught:
        compress(
            model,
            data,
            keep_macs=0.3,
            max_drop=0.0,
            metric="r2",
            report=tmp_path / "r.json",
            save_plan=tmp_path / "p.json",
            **FAST,
        )
    assert caught.value.exit_code == 3
    report = caught.value.report
    assert report is not None
    assert report.output is None
    assert report.quality is not None
    assert not report.quality.passed
    assert report.quality.drop > 0
    assert "net.hap.onnx" not in files_in(tmp_path)
    assert json.loads((tmp_path / "r.json").read_text())["quality"]["passed"] is False


def test_a_rejected_model_is_kept_on_request(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = write(tmp_path)
    with pytest.raises(GateError):
        compress(model, data, keep_macs=0.3, max_drop=0.0, metric="r2", keep_rejected=True, **FAST)
    assert files_in(tmp_path) == ["net.hap.onnx.rejected.onnx", "net.onnx"]
    assert run(tmp_path / "net.hap.onnx.rejected.onnx", data["x"]).shape == (120, 5)


def test_a_slower_result_is_planned_again_and_then_refused(
    tmp_path: Path, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write(tmp_path)
    monkeypatch.setattr(machine, "measure_latency", lambda *args, **options: timing(1.5))
    events: list[Event] = []
    with pytest.raises(GateError, match="slower than the original") as caught:
        compress(model, data, keep_macs=0.5, on_event=events.append, **FAST)
    assert caught.value.report is not None
    assert caught.value.report.after.latency_ms == 1.5
    assert any("wider steps" in event.message for event in events)
    assert files_in(tmp_path) == ["net.onnx"]
    report = compress(model, data, keep_macs=0.5, allow_slower=True, **FAST)
    assert report.output is not None
    assert report.after.latency_ms == 1.5


def test_a_large_drop_without_a_gate_is_a_warning(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = write(tmp_path)
    events: list[Event] = []
    report = compress(model, data, keep_macs=0.2, metric="r2", recover="none", on_event=events.append, **FAST)
    assert report.quality is not None
    assert report.quality.passed
    assert report.quality.drop > 0.02
    assert any(event.kind == "warning" and "--max-drop" in event.message for event in events)


# ---------------------------------------------------------------- plans


def test_a_dry_run_writes_plan_and_report_but_no_model(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = write(tmp_path)
    report = compress(
        model,
        data,
        keep_macs=0.5,
        dry_run=True,
        report=tmp_path / "r.json",
        save_plan=tmp_path / "p.json",
        **FAST,
    )
    assert report.output is None
    assert report.quality is None
    assert files_in(tmp_path) == ["net.onnx", "p.json", "p.safetensors", "r.json"]
    assert report.budget.reached["keep_macs"] <= 0.5
    assert json.loads((tmp_path / "p.json").read_text())["groups"]


def test_a_dry_run_without_a_plan_writes_nothing(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    report = compress(write(tmp_path), data, keep_macs=0.5, dry_run=True, keep_rejected=True, **FAST)
    assert report.output is None
    with pytest.raises(BudgetError):
        compress(
            tmp_path / "net.onnx", data, max_drop=0.0, metric="r2", dry_run=True, keep_rejected=True, **FAST
        )
    assert files_in(tmp_path) == ["net.onnx"]


@pytest.mark.parametrize(
    "options",
    [{"keep_macs": 0.5}, {"keep_params": 0.6, "recover": "none"}, {"max_drop": 0.2}],
    ids=["budget", "no refit", "search"],
)
def test_the_plan_of_a_dry_run_gives_what_the_real_run_gives(
    tmp_path: Path, data: dict[str, np.ndarray], options: dict[str, Any]
) -> None:
    model, plan = write(tmp_path), tmp_path / "p.json"
    compress(model, data, output=tmp_path / "real.onnx", **options, **FAST)
    compress(model, data, dry_run=True, save_plan=plan, **options, **FAST)
    apply_plan(model, plan, output=tmp_path / "applied.onnx")
    assert (tmp_path / "applied.onnx").read_bytes() == (tmp_path / "real.onnx").read_bytes()


def test_the_same_seed_gives_the_same_bytes_and_apply_gives_them_again(
    tmp_path: Path, data: dict[str, np.ndarray]
) -> None:
    model = write(tmp_path)
    for name in ("one", "two"):
        compress(
            model,
            data,
            keep_macs=0.5,
            output=tmp_path / f"{name}.onnx",
            save_plan=tmp_path / f"{name}.json",
            **FAST,
        )
    for suffix in ("onnx", "json", "safetensors"):
        first, second = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("one", "two"))
        assert first == second
    report = apply_plan(
        model, tmp_path / "one.json", output=tmp_path / "three.onnx", report=tmp_path / "r.json"
    )
    assert (tmp_path / "three.onnx").read_bytes() == (tmp_path / "one.onnx").read_bytes()
    assert report.output == str(tmp_path / "three.onnx")
    assert report.quality is None
    assert report.budget.reached["keep_macs"] <= 0.5
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(report.to_dict()))


@pytest.mark.parametrize(
    "model",
    [residual_cnn(batch=1), residual_cnn(batch=4), residual_cnn(dtype=np.float16), residual_cnn(opset=9)],
    ids=["batch of 1", "batch of 4", "half precision", "opset 9"],
)
def test_apply_gives_the_same_bytes_for_every_kind_of_model(tmp_path: Path, model: onnx.ModelProto) -> None:
    path = write(tmp_path, model)
    options: dict[str, Any] = {"keep_macs": 0.6, "only": ["*_a?"], "save_plan": tmp_path / "p.json"}
    report = compress(path, {"x": images()}, **options, **FAST)
    written = (tmp_path / "net.hap.onnx").read_bytes()
    applied = apply_plan(path, tmp_path / "p.json")
    assert (tmp_path / "net.hap.onnx").read_bytes() == written
    assert (applied.before.params, applied.before.macs) == (report.before.params, report.before.macs)
    assert (applied.after.params, applied.after.macs) == (report.after.params, report.after.macs)
    same = validate(path, tmp_path / "net.hap.onnx", {"x": images()}, threads=1, max_drop="none")
    assert (same.before.macs, same.after.macs) == (report.before.macs, report.after.macs)
    assert (same.before.params, same.after.params) == (report.before.params, report.after.params)
    assert inspect(path).size.macs == report.before.macs


def test_apply_names_its_output_as_compress_does(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = write(tmp_path)
    compress(model, data, keep_macs=0.5, dry_run=True, save_plan=tmp_path / "p.json", **FAST)
    apply_plan(model, tmp_path / "p.json")
    assert (tmp_path / "net.hap.onnx").exists()


def test_a_plan_for_another_model_is_refused(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = write(tmp_path)
    compress(model, data, keep_macs=0.5, dry_run=True, save_plan=tmp_path / "p.json", **FAST)
    write(tmp_path, residual_cnn(seed=5))
    with pytest.raises(ModelError, match="another model"):
        apply_plan(model, tmp_path / "p.json", output=tmp_path / "o.onnx")
    assert not (tmp_path / "o.onnx").exists()


# ---------------------------------------------------------------- methods


def check_implants(report: CompressReport, model: onnx.ModelProto, before: onnx.ModelProto) -> None:
    """Assert that the report and the model tell of the same implants, and that they left nothing behind."""
    plain = report.to_dict()["plan"]
    for entry in plain["implants"]:
        assert list(entry) == ["node", "kind", "rank", "predicted_loss", "expected_loss", "measured"]
        for one in entry["measured"]:
            assert list(one) == ["kind", "predicted", "measured"]
            assert one["kind"] in ("lowrank", "spatial")
            assert min(one["predicted"], one["measured"]) > 0
        assert entry["kind"] in ("lowrank", "spatial", "pointwise")
        assert entry["predicted_loss"] > 0
        assert entry["expected_loss"] > 0
        shapes = {t.name: list(t.dims) for t in model.graph.initializer}
        weights = [node.input[1] for node in model.graph.node if node.name == entry["node"]]
        if entry["kind"] != "pointwise":
            second = shapes[weights[0]]
            assert entry["rank"] in second[:2]
    chosen = {entry["node"]: entry["choice"] for entry in plain["layers"]}
    assert set(chosen) == {n.name for n in before.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")}
    for entry in plain["implants"]:
        assert chosen.pop(entry["node"]) == entry["kind"]
    assert set(chosen.values()) <= {"dense"}
    assert all(entry["why"] for entry in plain["layers"] + plain["groups"])
    ops = {n.op_type for n in before.graph.node} | {"Conv", "MatMul"}
    kinds = {entry["kind"] for entry in plain["implants"]}
    assert {n.op_type for n in model.graph.node} <= ops | ({"Concat"} if "pointwise" in kinds else set())
    assert {n.domain for n in model.graph.node} == {""}


MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "half precision": {"dtype": np.float16},
    "batch of 4": {"batch": 4},
    "opset 9": {"opset": 9},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["implant", "hap"])
def test_methods_with_implants_for_every_kind_of_model(
    tmp_path: Path, data: dict[str, np.ndarray], name: str, method: str
) -> None:
    original = residual_cnn(**MODELS[name])
    path, plan = write(tmp_path, original), tmp_path / "p.json"
    report = compress(path, data, keep_macs=0.6, method=method, save_plan=plan, **FAST)
    result = check_kept(original, tmp_path / "net.hap.onnx")
    assert report.budget.reached["keep_macs"] <= 0.6
    assert report.after.params == n_params(tmp_path / "net.hap.onnx")
    check_implants(report, result, original)
    if method == "implant":
        assert report.plan.implants
        assert all(entry.kept == entry.size for entry in report.plan.groups)
        assert {entry.why for entry in report.plan.groups} == {"whole: the method does not remove channels"}
        assert not report.plan.removed_branches
    assert report.quality is not None
    assert report.fidelity is not None
    assert report.fidelity.r2 is not None
    assert report.fidelity.r2 > 0.7
    written = (tmp_path / "net.hap.onnx").read_bytes()
    applied = apply_plan(path, plan)
    assert (tmp_path / "net.hap.onnx").read_bytes() == written
    assert applied.plan == report.plan
    assert applied.recovery == report.recovery
    assert (applied.after.params, applied.after.macs) == (report.after.params, report.after.macs)


def test_pruning_alone_has_no_implants(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    report = compress(write(tmp_path), data, keep_macs=0.6, method="prune", **FAST)
    assert not report.plan.implants
    assert any(entry.kept < entry.size for entry in report.plan.groups)
    nodes = (len(onnx.load(path).graph.node) for path in (tmp_path / "net.hap.onnx", tmp_path / "net.onnx"))
    assert next(nodes) <= next(nodes)
    assert {entry.why for entry in report.plan.layers} == {"as it is: the method does not use implants"}


def test_implants_of_external_data_stay_external(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model, plan = write(tmp_path, external=True), tmp_path / "p.json"
    before = set(files_in(tmp_path))
    limit = 90_000
    report = compress(model, data, max_bytes=limit, method="implant", save_plan=plan, **FAST)
    new = [tmp_path / name for name in files_in(tmp_path) if name not in before and not name.startswith("p.")]
    assert report.plan.implants
    assert report.after.bytes == sum(path.stat().st_size for path in new) <= limit
    written = {path.name: path.read_bytes() for path in new}
    apply_plan(model, plan)
    assert {path.name: path.read_bytes() for path in new} == written


def test_excluded_layers_get_no_implants(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = write(tmp_path)
    options: dict[str, Any] = {"method": "implant", "recover": "none", **FAST}
    report = compress(model, data, keep_macs=0.8, exclude=["make_b2", "a2.w", "b1.b"], **options)
    assert report.plan.implants
    assert not {entry.node for entry in report.plan.implants} & {"make_b2", "make_a2"}
    old, new = ({t.name: t for t in onnx.load(p).graph.initializer} for p in (model, report.output))
    for name in ("b2.w", "b2.b", "a2.w", "b1.b"):
        assert old[name].SerializeToString() == new[name].SerializeToString()
    report = compress(model, data, keep_macs=0.9, only=["make_a2"], **options)
    assert {entry.node for entry in report.plan.implants} == {"make_a2"}
    reasons = {entry.node: entry.why for entry in report.plan.layers}
    assert reasons["make_b2"] == "as it is: it is excluded"


def test_a_model_whose_channels_cannot_go_may_have_implants(tmp_path: Path) -> None:
    net = make_model(
        [node("MatMul", ["x", "w"], ["h"]), node("Softmax", ["h"], ["p"]), node("MatMul", ["p", "v"], ["y"])],
        inputs={"x": ["N", 16]},
        outputs=["y", "p"],
        weights={"w": rand(16, 12), "v": rand(12, 16, seed=1)},
    )
    with pytest.raises(BudgetError, match="no channel"):
        compress(net, {"x": rand(60, 16)}, keep_macs=0.7, method="prune", output=tmp_path / "o.onnx", **FAST)
    for method in ("implant", "hap"):
        report = compress(
            net, {"x": rand(60, 16)}, keep_macs=0.7, method=method, output=tmp_path / "o.onnx", **FAST
        )
        assert {entry.kind for entry in report.plan.implants} == {"lowrank"}
        assert report.budget.reached["keep_macs"] <= 0.7


def test_a_compressed_model_can_be_compressed_again(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    current = write(tmp_path)
    for index in range(3):
        output = tmp_path / f"{index}.onnx"
        report = compress(current, data, keep_macs=0.8, method="implant", output=output, **FAST)
        assert report.plan.implants
        assert report.budget.reached["keep_macs"] <= 0.8
        current = output
    assert run(current, data["x"]).shape == (120, 5)


def test_implants_that_save_no_time_are_not_chosen(
    tmp_path: Path, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write(tmp_path)
    fix_speed(monkeypatch, overhead=1e9)
    report = compress(model, data, keep_macs=0.6, **FAST)
    assert not report.plan.implants
    reasons = {entry.why for entry in report.plan.layers}
    assert "as it is: no implant of it saved enough time in onnxruntime" in reasons
    with pytest.raises(BudgetError, match="no implant of any layer saves time in onnxruntime here"):
        compress(model, data, keep_macs=0.6, method="implant", **FAST)
    report = compress(model, data, keep_macs=0.6, method="implant", allow_slower=True, **FAST)
    assert report.plan.implants


def test_implants_stay_within_the_shares_that_save_time(
    tmp_path: Path, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With half of the time at half of the cost, and nothing saved at three quarters of it."""
    model = write(tmp_path)
    monkeypatch.setattr(implant_speed, "COMPARED_SHARES", (0.5,))
    report = compress(model, data, keep_macs=0.8, method="implant", recover="none", **FAST)
    assert report.plan.implants
    sizes: list[dict[str, int]] = []
    for path in (model, tmp_path / "net.hap.onnx"):
        graph = onnx.load(path).graph
        shapes = {tensor.name: tensor.dims for tensor in graph.initializer}
        weights = ((n.name, shapes.get(name)) for n in graph.node for name in n.input[1:2])
        sizes.append({name: int(np.prod(dims)) for name, dims in weights if dims is not None})
    same_size = {"make_stem", "make_a1", "make_b1", "make_b2"}  # in and out, so weights are as MACs
    used = {entry.node for entry in report.plan.implants} & same_size
    assert used
    for node_name in used:
        parts = [size for name, size in sizes[1].items() if name.startswith(node_name)]
        assert len(parts) == 2
        assert sum(parts) <= 0.56 * sizes[0][node_name]  # ranks that were timed are near the half


def test_a_search_may_use_implants(tmp_path: Path, labelled: dict[str, np.ndarray]) -> None:
    report = compress(write(tmp_path), labelled, max_drop=0.2, method="implant", recover="none", **FAST)
    assert report.quality is not None
    assert report.quality.drop <= 0.2
    assert report.plan.implants


def test_the_preset_of_the_paper(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model, plan = write(tmp_path), tmp_path / "p.json"
    options: dict[str, Any] = {"preset": "paper", "probes": 8, **FAST}
    report = compress(model, data, keep_macs=0.6, save_plan=plan, **options)
    assert report.budget.reached["keep_macs"] <= 0.6
    n_gone = sum(entry.size - entry.kept for entry in report.plan.groups)
    n_pointwise = sum(entry.rank or 0 for entry in report.plan.implants)
    assert {entry.kind for entry in report.plan.implants} == {"pointwise"}
    assert 0 < n_pointwise <= -(-(n_gone + n_pointwise) // 10)
    check_implants(report, onnx.load(tmp_path / "net.hap.onnx"), residual_cnn())
    written = (tmp_path / "net.hap.onnx").read_bytes()
    apply_plan(model, plan)
    assert (tmp_path / "net.hap.onnx").read_bytes() == written
    assert json.loads(plan.read_text())["config"]["preset"] == "paper"
    pruned = compress(model, data, keep_macs=0.6, method="prune", **options)
    assert not pruned.plan.implants
    assert {entry.why for entry in pruned.plan.layers} == {"as it is: the method does not use implants"}
    with pytest.raises(BudgetError, match="recipe"):
        compress(model, data, keep_macs=1e-4, **options)
    with pytest.raises(UsageError, match="leave --method implant away"):
        compress(model, data, keep_macs=0.6, method="implant", **options)


def test_a_plan_whose_implants_do_not_fit_is_refused(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model, plan = write(tmp_path), tmp_path / "p.json"
    compress(model, data, keep_macs=0.6, preset="paper", probes=8, dry_run=True, save_plan=plan, **FAST)
    sound = plan.read_text()
    implants = json.loads(sound)["implants"]
    for changes in (
        {"node": "make_nothing"},
        {"node": "make_r1"},
        {"kind": "lowrank"},
        {"channels": "900", "rank": 1},
        {"channels": "0-8", "rank": 9},
    ):
        document = json.loads(sound)
        document["implants"] = [{**implants[0], **changes}, *implants[1:]]
        plan.write_text(json.dumps(document))
        with pytest.raises(ModelError, match=r"plan|cannot become") as caught:
            apply_plan(model, plan, output=tmp_path / "o.onnx")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "o.onnx").exists()


# ---------------------------------------------------------------- what the output guarantees


def check_kept(original: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Assert that all of a model but its size is as it was."""
    result = onnx.load(path)
    onnx.checker.check_model(result, full_check=True)
    assert [v.SerializeToString() for v in result.graph.input] == [
        v.SerializeToString() for v in original.graph.input
    ]
    assert [v.SerializeToString() for v in result.graph.output] == [
        v.SerializeToString() for v in original.graph.output
    ]
    for name in ("opset_import", "ir_version", "producer_name", "domain", "doc_string", "model_version"):
        assert getattr(result, name) == getattr(original, name), name
    old = {entry.key: entry.value for entry in original.metadata_props}
    new = {entry.key: entry.value for entry in result.metadata_props}
    entry = json.loads(new.pop("hap_onnx"))
    assert new == old
    assert sorted(entry) == ["plan", "version"]
    assert entry["version"] == hap_onnx.__version__
    return result


def test_interface_versions_and_metadata_are_kept(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    original = residual_cnn(opset=13)
    original.graph.doc_string = "graph"
    original.graph.node[0].doc_string = "the stem"
    model = write(tmp_path, original)
    compress(model, data, keep_macs=0.5, **FAST)
    result = check_kept(original, tmp_path / "net.hap.onnx")
    assert result.graph.doc_string == "graph"
    assert result.graph.node[0].doc_string == "the stem"
    for n in (1, 3):  # any batch
        assert run(tmp_path / "net.hap.onnx", data["x"][:n]).shape == (n, 5)


def test_half_precision_stays_half_precision(tmp_path: Path) -> None:
    original = residual_cnn(dtype=np.float16)
    model = write(tmp_path, original)
    report = compress(model, {"x": images()}, keep_macs=0.6, **FAST)
    result = check_kept(original, tmp_path / "net.hap.onnx")
    assert {tensor.data_type for tensor in result.graph.initializer} == {onnx.TensorProto.FLOAT16}
    assert report.fidelity is not None
    assert report.fidelity.r2 is not None
    assert report.fidelity.r2 > 0.8


def test_external_data_stays_external(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = write(tmp_path, external=True)
    report = compress(model, data, keep_macs=0.5, **FAST)
    output = tmp_path / "net.hap.onnx"
    written = [name for name in files_in(tmp_path) if name not in ("net.onnx", "net.data", "net.hap.onnx")]
    assert len(written) == 1
    assert output.stat().st_size < 10_000
    total = output.stat().st_size + (tmp_path / written[0]).stat().st_size
    assert report.after.bytes == total
    assert run(output, data["x"]).shape == (120, 5)


def test_an_export_with_a_fixed_batch_of_one_works(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    original = residual_cnn(batch=1)
    model = write(tmp_path, original)
    report = compress(model, data, keep_macs=0.5, **FAST)
    check_kept(original, tmp_path / "net.hap.onnx")
    assert run(tmp_path / "net.hap.onnx", data["x"][:1]).shape == (1, 5)
    assert report.budget.reached["keep_macs"] <= 0.5
    free = compress(write(tmp_path), data, keep_macs=0.5, output=tmp_path / "free.onnx", **FAST)
    assert report.before.macs == free.before.macs


def test_a_fixed_batch_of_four_is_counted_per_sample(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    report = compress(write(tmp_path, residual_cnn(batch=4)), data, keep_macs=0.5, **FAST)
    assert report.before.macs == inspect(residual_cnn(), {"x": data["x"][:2]}).size.macs
    assert report.budget.reached["keep_macs"] <= 0.5


@pytest.mark.parametrize("n_samples", [23, 41, 118])
def test_samples_that_do_not_fill_the_last_batch_are_no_problem(tmp_path: Path, n_samples: int) -> None:
    model, data = write(tmp_path, residual_cnn(batch=4)), {"x": images(n_samples)}
    report = compress(model, data, keep_macs=0.5, **FAST)
    assert report.budget.reached["keep_macs"] <= 0.5
    assert report.quality is not None
    assert report.quality.n_samples == round(0.2 * n_samples)
    same = validate(model, tmp_path / "net.hap.onnx", data, threads=1, max_drop="none")
    assert same.quality.n_samples == n_samples


@pytest.mark.parametrize("n_samples", [5, 12, 17])
def test_too_few_samples_for_a_fixed_batch_are_refused(tmp_path: Path, n_samples: int) -> None:
    with pytest.raises(CalibrationError, match=r"batches of 4 samples.*at least 20"):
        compress(write(tmp_path, residual_cnn(batch=4)), {"x": images(n_samples)}, keep_macs=0.5, **FAST)


def test_a_model_that_keeps_its_normalisation_comes_back_sound(tmp_path: Path) -> None:
    weights = {
        "w": rand(16, 3, 3, 3, seed=1),
        "v": rand(5, 16, seed=2),
        **{f"bn_{name}": rand(16, seed=9) ** 2 + 0.5 for name in ("scale", "shift", "mean", "var")},
    }
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        node("BatchNormalization", ["c", "bn_scale", "bn_shift", "bn_mean", "bn_var"], ["n"]),
        node("Relu", ["n"], ["r"]),
        node("GlobalAveragePool", ["r"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "v"], ["y"], transB=1),
    ]
    model = make_model(nodes, inputs={"x": ["N", 3, 8, 8]}, outputs=["y"], weights=weights)
    report = compress(model, {"x": images()}, keep_params=0.7, align=1, output=tmp_path / "o.onnx", **FAST)
    assert report.before.params == sum(array.size for array in weights.values())
    assert report.after.params == n_params(tmp_path / "o.onnx")
    assert report.budget.reached["keep_params"] <= 0.7


# ---------------------------------------------------------------- the report

KEYS = {
    "": [
        "schema", "model", "output", "before", "after", "quality", "fidelity", "plan", "frozen", "budget",
        "seconds", "seed", "versions", "recovery", "latency", "then", "analysis", "worst",
    ],
    "before": ["params", "macs", "bytes", "latency_ms", "metric"],
    "after": ["params", "macs", "bytes", "latency_ms", "metric"],
    "quality": ["metric", "before", "after", "drop", "interval", "n_samples", "max_drop", "passed"],
    "fidelity": ["r2", "agreement", "max_abs_error"],
    "plan": ["groups", "implants", "removed_branches", "layers"],
    "budget": ["asked", "reached"],
}  # fmt: skip


def test_the_report_file_has_the_keys_of_the_contract(
    tmp_path: Path, labelled: dict[str, np.ndarray]
) -> None:
    model = write(tmp_path)
    report = compress(model, labelled, keep_macs=0.5, seed=7, report=tmp_path / "r.json", **FAST)
    plain = json.loads((tmp_path / "r.json").read_text())
    assert plain == json.loads(json.dumps(report.to_dict()))
    for name, keys in KEYS.items():
        assert list(plain[name] if name else plain) == keys
    facts = dict.fromkeys(
        ("epochs", "best_epoch", "start_score", "best_score", "rollbacks", "augmentations"), None
    )
    assert plain["recovery"] == [{"method": "refit", **facts}]
    assert plain["model"] == str(model)
    assert plain["seed"] == 7
    assert plain["quality"]["metric"] == "accuracy"
    assert plain["before"]["metric"] == plain["quality"]["before"] == 1.0
    assert plain["after"]["metric"] == plain["quality"]["after"]
    assert plain["quality"]["drop"] == pytest.approx(1 - plain["after"]["metric"])
    low, high = plain["quality"]["interval"]
    assert low <= plain["quality"]["drop"] <= high
    assert all(entry["kept"] <= entry["size"] for entry in plain["plan"]["groups"])
    assert any(entry["node"] == "make_scores" for entry in plain["frozen"])
    stages = {"load", "prepare", "sensitivity", "layer times", "compress", "validate", "write"}
    assert stages <= set(plain["seconds"])
    assert set(plain["versions"]) >= {"hap_onnx", "onnx", "onnxruntime", "torch"}


def test_the_reported_quality_is_that_of_the_written_file(
    tmp_path: Path, data: dict[str, np.ndarray]
) -> None:
    model = write(tmp_path)
    val = {"x": images(60, seed=50)}
    report = compress(model, data, keep_macs=0.5, val=val, **FAST)
    before, after = run(model, val["x"]), run(tmp_path / "net.hap.onnx", val["x"])
    assert report.quality is not None
    assert report.fidelity is not None
    assert report.quality.metric == "agreement"
    assert report.quality.n_samples == 60
    assert report.quality.after == np.mean(before.argmax(1) == after.argmax(1))
    assert report.fidelity.max_abs_error == pytest.approx(np.abs(before - after).max(), rel=1e-4)
    r2 = 1 - ((after - before) ** 2).sum() / ((before - before.mean(0)) ** 2).sum()
    assert report.fidelity.r2 == pytest.approx(r2, rel=1e-3)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("name", SENSITIVITIES)
def test_every_sensitivity_runs(tmp_path: Path, labelled: dict[str, np.ndarray], name: str) -> None:
    model = write(tmp_path, residual_cnn(width=8))
    report = compress(
        model, {"x": labelled["x"][:60]}, keep_macs=0.6, sensitivity=name, probes=3, dry_run=True, **FAST
    )
    assert report.budget.reached["keep_macs"] <= 0.6


def test_refit_helps(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = write(tmp_path)
    r2 = {}
    for recover in ("none", "refit"):
        report = compress(
            model, data, keep_macs=0.5, recover=recover, output=tmp_path / f"{recover}.onnx", **FAST
        )
        assert report.fidelity is not None
        assert report.fidelity.r2 is not None
        r2[recover] = report.fidelity.r2
    assert r2["refit"] > r2["none"]


def test_excluded_nodes_are_not_touched(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = write(tmp_path)
    report = compress(model, data, keep_macs=0.85, exclude=["make_a1", "a2.w"], recover="none", **FAST)
    old, new = ({t.name: t for t in onnx.load(p).graph.initializer} for p in (model, report.output))
    assert old["a1.w"].SerializeToString() == new["a1.w"].SerializeToString()
    assert old["a2.w"].dims[0] == new["a2.w"].dims[0]
    with pytest.raises(UsageError, match="'nothing'"):
        compress(model, data, keep_macs=0.9, exclude=["nothing"], output=tmp_path / "o.onnx", **FAST)


def test_a_model_in_memory_needs_an_output(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    with pytest.raises(UsageError, match="output"):
        compress(residual_cnn(), data, keep_macs=0.5, **FAST)
    report = compress(residual_cnn(), data, keep_macs=0.5, output=tmp_path / "o.onnx", **FAST)
    assert report.model == "model in memory"
    path = compress(write(tmp_path), data, keep_macs=0.5, **FAST)
    assert path.after.params == report.after.params


def test_data_may_be_an_iterable_of_dicts(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = write(tmp_path)
    chunks = ({"x": data["x"][start : start + 30]} for start in range(0, 120, 30))
    compress(model, chunks, keep_macs=0.5, output=tmp_path / "a.onnx", **FAST)
    compress(model, data, keep_macs=0.5, output=tmp_path / "b.onnx", **FAST)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_words_that_do_not_exist_are_refused(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    with pytest.raises(UsageError, match="keep_mac"):
        compress(write(tmp_path), data, keep_mac=0.5)


def test_the_output_is_never_an_input(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = write(tmp_path)
    before = model.read_bytes()
    with pytest.raises(UsageError, match="same file"):
        compress(model, data, keep_macs=0.5, output=model)
    assert model.read_bytes() == before


def with_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("words", [{"output": "net.data"}, {"report": "net.data"}, {"save_plan": "net.data"},
                                   {"save_plan": "plan.json"}], ids=str)  # fmt: skip
def test_the_weights_of_a_model_are_never_overwritten(
    tmp_path: Path, data: dict[str, np.ndarray], words: dict[str, str]
) -> None:
    location = "plan.safetensors" if "plan.json" in words.values() else "net.data"
    model = tmp_path / "net.onnx"
    onnx.save(residual_cnn(), model, save_as_external_data=True, location=location, size_threshold=64)
    before = with_bytes(tmp_path)
    with pytest.raises(UsageError, match=f"the model's weights '{location}'"):
        compress(model, data, keep_macs=0.5, **{k: tmp_path / v for k, v in words.items()}, **FAST)
    assert with_bytes(tmp_path) == before


def test_apply_never_overwrites_weights_or_the_plan(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model, plan = write(tmp_path, external=True), tmp_path / "p.json"
    compress(model, data, keep_macs=0.5, dry_run=True, save_plan=plan, **FAST)
    (tmp_path / "link.onnx").hardlink_to(tmp_path / "net.data")
    before = with_bytes(tmp_path)
    for name in ("net.data", "link.onnx", "p.json", "p.safetensors"):
        with pytest.raises(UsageError, match="same file"):
            apply_plan(model, plan, output=tmp_path / name)
        with pytest.raises(UsageError, match="same file"):
            apply_plan(model, plan, output=tmp_path / "o.onnx", report=tmp_path / name)
    assert with_bytes(tmp_path) == before


@pytest.mark.parametrize("option", ["data", "val"])
def test_a_file_of_the_data_is_never_overwritten(
    tmp_path: Path, data: dict[str, np.ndarray], option: str
) -> None:
    model = write(tmp_path)
    folder = tmp_path / "arrays" / "inner"
    folder.mkdir(parents=True)
    np.save(folder.parent / "x.npy", data["x"])
    (folder / "notes.txt").write_text("mine")
    before = with_bytes(tmp_path)
    given = (folder.parent, {}) if option == "data" else (data, {"val": folder.parent})
    for path in (folder.parent / "x.npy", folder / "notes.txt"):
        for word in ("output", "report", "save_plan"):
            with pytest.raises(UsageError, match=f"would overwrite a file of --{option}"):
                compress(model, given[0], keep_macs=0.5, **given[1], **{word: path}, **FAST)
    assert with_bytes(tmp_path) == before


def test_labels_of_val_alone_are_checked_and_explained(
    tmp_path: Path, data: dict[str, np.ndarray], labelled: dict[str, np.ndarray]
) -> None:
    model = write(tmp_path)
    labels = np.random.default_rng(1).integers(0, 5, 200)
    with pytest.raises(CalibrationError, match="preprocess"):
        compress(model, data, val={**labelled, "labels": labels}, keep_macs=0.5, **FAST)
    assert files_in(tmp_path) == ["net.onnx"]
    events: list[Event] = []
    report = compress(model, data, val=labelled, keep_macs=0.5, on_event=events.append, **FAST)
    assert report.quality is not None
    assert report.quality.metric == "accuracy"
    assert report.quality.n_samples == 200
    notes = [event.message for event in events if "only --val has labels" in event.message]
    assert notes == ["only --val has labels: the report is about accuracy, a search about agreement"]


def test_a_working_folder_is_made(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model, folder = write(tmp_path), tmp_path / "deep" / "work"
    compress(model, data, keep_macs=0.5, work_dir=folder, **FAST)
    losses, job_folder = sorted(folder.iterdir(), key=lambda path: path.is_dir())
    assert (losses.name[:7], losses.suffix) == ("losses-", ".safetensors")  # for whatever job needs the same
    # The plan of what was finished is kept, how fast it was, nothing else.
    kept = sorted(path for path in job_folder.iterdir() if path.name not in ("job.lock", "latency.json"))
    plan, weights = kept
    assert (plan.suffix, weights) == (".json", plan.with_suffix(".safetensors"))
    assert load_plan(plan).model_sha256 == load_model(model).sha256
    np.savez_compressed(tmp_path / "x.npz", **data)  # is unpacked there
    deeper = folder / "two"
    compress(model, tmp_path / "x.npz", keep_macs=0.5, work_dir=deeper, dry_run=True, **FAST)
    assert deeper.is_dir()
    left = [path.name for path in deeper.rglob("*.json")]
    assert left == ["latency.json"]  # a sketch is nothing to go on from
    with pytest.raises(ValidationError, match="--work-dir"):
        compress(model, data, keep_macs=0.5, work_dir=model / "inside", **FAST)


def test_labels_at_chance_level_point_to_the_preprocessing(tmp_path: Path) -> None:
    x = images(200)
    labels = np.random.default_rng(0).integers(0, 5, 200)
    with pytest.raises(CalibrationError, match="preprocess"):
        compress(write(tmp_path), {"x": x, "labels": labels}, keep_macs=0.5, **FAST)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": rand(50, 3, 9, 9)[:, :2]}, "x"),
        ({"y": images()}, "x"),
        ({"x": np.full((50, 3, 8, 8), np.nan, np.float32)}, "NaN"),
        ({"x": images(2)}, "2 samples"),
        ({"x": np.repeat(images(1), 50, axis=0)}, "varies"),
    ],
    ids=["shape", "name", "NaN", "few", "constant"],
)
def test_data_that_does_not_fit_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        compress(write(tmp_path), arrays, keep_macs=0.5, **FAST)
    assert files_in(tmp_path) == ["net.onnx"]


def test_torch_keeps_its_threads(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    with machine.use_threads(2):
        with pytest.raises(BudgetError):
            compress(write(tmp_path), data, keep_macs=1e-4, **FAST)
        assert torch.get_num_threads() == 2


# ---------------------------------------------------------------- inspect


def test_inspect_needs_no_data_where_shapes_are_known(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = write(tmp_path)
    report = inspect(model, report=tmp_path / "r.json")
    assert {group.name: (group.size, group.role) for group in report.groups} == {
        "make_stem": (16, "residual"),
        "make_a1": (16, "inner"),
        "make_a2": (32, "inner"),
        "make_b2": (32, "residual"),
    }
    assert report.size.params == n_params(model)
    assert report.size.bytes == model.stat().st_size
    assert report == inspect(model, data)
    assert [entry.node for entry in report.frozen] == ["make_scores"]
    assert 0.9 < report.prunable.params_ratio <= 1
    assert json.loads((tmp_path / "r.json").read_text())["schema"] == "hap-onnx/inspect/1"
    macs = 8 * 8 * 9 * (3 * 16 + 2 * 16 * 16) + 4 * 4 * 9 * (2 * 16 * 32 + 32 * 32) + 32 * 5
    assert report.size.macs == macs


def test_inspect_answers_for_every_layer_and_its_shares_are_counted(tmp_path: Path) -> None:
    report = inspect(write(tmp_path))
    layers = {layer.node: layer for layer in report.layers}
    assert list(layers) == "make_stem make_a1 make_b1 make_a2 make_b2 make_s2 make_scores".split()
    assert sum(layer.macs for layer in report.layers) == report.size.macs
    assert sum(layer.params for layer in report.layers) == report.size.params
    for name, layer in layers.items():
        assert bool(layer.groups) != bool(layer.prune)
        assert bool(layer.implants) != bool(layer.implant)
        assert (name == "make_scores") == bool(layer.prune)
    assert "output 'scores'" in layers["make_scores"].prune
    assert layers["make_a1"].groups == ("make_a1",)
    assert {"lowrank", "spatial"} <= set(layers["make_a1"].implants)
    assert report.fixed.params_ratio < 0.1
    assert report.prunable.macs_ratio == 1

    only = inspect(tmp_path / "net.onnx", only=["make_a1"])
    layers = {layer.node: layer for layer in only.layers}
    assert "--only" in layers["make_b2"].prune
    assert layers["make_b2"].implant == "it is excluded"
    touched = layers["make_a1"].macs + layers["make_b1"].macs  # and what reads its channels
    assert only.prunable.macs_ratio == pytest.approx(touched / only.size.macs)
    alone = layers["make_a1"].macs / only.size.macs
    assert only.implantable.macs_ratio == pytest.approx(alone)
    assert only.fixed.macs_ratio == pytest.approx(1 - touched / only.size.macs)


def test_heads_are_told_from_residual_streams() -> None:
    model = TOPOLOGIES["heads_by_einsum"]().model
    roles = {group.role for group in inspect(model).groups}
    assert "heads" in roles
    assert "residual" not in roles


def test_inspect_asks_for_data_where_sizes_are_open(data: dict[str, np.ndarray]) -> None:
    model = residual_cnn()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"size{axis}"
    with pytest.raises(UsageError, match="--data"):
        inspect(model)
    assert inspect(model, data).size.macs == inspect(residual_cnn()).size.macs


# ---------------------------------------------------------------- validate


def test_validate_passes_for_equal_models_and_fails_for_others(
    tmp_path: Path, labelled: dict[str, np.ndarray]
) -> None:
    model = write(tmp_path)
    same = validate(model, model, labelled, threads=1, report=tmp_path / "r.json")
    assert same.passed
    assert same.quality.drop == 0
    assert same.fidelity.r2 == 1
    assert same.before.params == same.after.params == n_params(model)
    assert json.loads((tmp_path / "r.json").read_text())["schema"] == "hap-onnx/validate/1"
    other = residual_cnn()
    head = next(t for t in other.graph.initializer if t.name == "head.w")
    head.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(head), "head.w"))
    different = validate(model, other, labelled, threads=1)
    assert not different.passed
    assert not different.quality.passed
    assert different.quality.max_drop == 0.01
    assert validate(model, other, labelled, threads=1, max_drop="none").passed


def test_validate_fails_for_a_slower_model_unless_that_is_allowed(
    labelled: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "measure_latency", lambda *args, **options: timing(2.0))
    report = validate(residual_cnn(), residual_cnn(), labelled, threads=1)
    assert report.slower
    assert not report.passed
    assert validate(residual_cnn(), residual_cnn(), labelled, threads=1, allow_slower=True).passed


def test_models_with_other_inputs_cannot_be_compared(labelled: dict[str, np.ndarray]) -> None:
    other = make_model([node("Relu", ["z"], ["y"])], inputs={"z": ["N", 3]}, outputs=["y"])
    with pytest.raises(ModelError, match="cannot be compared"):
        validate(residual_cnn(), other, labelled)


def test_the_twin_of_a_model_is_public(data: dict[str, np.ndarray]) -> None:
    twin = load_twin(residual_cnn())
    with torch.no_grad():
        scores = twin({"x": torch.from_numpy(data["x"])})["scores"].numpy()
    expected = run_onnxruntime(residual_cnn(), {"x": data["x"]})["scores"]
    np.testing.assert_allclose(scores, expected, atol=1e-4)


# ---------------------------------------------------------------- what is refused late


def test_a_twin_that_differs_from_onnxruntime_is_refused(
    tmp_path: Path, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = job.prepare

    def spoil(*args: Any, **options: Any) -> Any:
        prepared = real(*args, **options)
        with torch.no_grad():
            prepared.twin.parameter_of["head.w"].mul_(1.1)
        return prepared

    monkeypatch.setattr(job, "prepare", spoil)
    with pytest.raises(ModelError, match="differs from onnxruntime"):
        compress(write(tmp_path), data, keep_macs=0.5, **FAST)


def test_a_result_with_nan_is_refused(
    tmp_path: Path, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = carry_out.with_weights

    def spoil(graph: Any, weights: Any) -> Any:
        return real(graph, {**weights, "head.b": np.full(5, np.nan, np.float32)})

    monkeypatch.setattr(carry_out, "with_weights", spoil)
    with pytest.raises(ValidationError, match="NaN"):
        compress(write(tmp_path), data, keep_macs=0.5, recover="none", **FAST)
    assert files_in(tmp_path) == ["net.onnx"]


def test_a_written_file_that_does_not_load_is_not_renamed(
    tmp_path: Path, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = machine.make_session

    def refuse(model: Any, **options: Any) -> Session:
        if isinstance(model, Path):
            raise ModelError("no")
        return real(model, **options)

    monkeypatch.setattr(machine, "make_session", refuse)
    with pytest.raises(ValidationError, match="does not load"):
        compress(write(tmp_path), data, keep_macs=0.5, **FAST)
    assert files_in(tmp_path) == ["net.onnx"]


def test_the_report_type_is_public(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    report = compress(write(tmp_path), data, keep_macs=0.9, **FAST)
    assert isinstance(report, CompressReport)
    assert isinstance(report, hap_onnx.CompressReport)


# ---------------------------------------------------------------- a trained network

SHARED = os.environ.get("HAP_ONNX_SHARED")


@pytest.mark.slow
@pytest.mark.skipif(SHARED is None, reason="HAP_ONNX_SHARED is not set")
def test_resnet20_at_half_its_macs(tmp_path: Path) -> None:
    """Implants lose far less than channels where spatial redundancy is all that is left to take."""
    assert SHARED is not None
    model, stored = Path(SHARED) / "models" / "resnet20.onnx", np.load(f"{SHARED}/data/cifar10_subset.npz")

    def arrays(part: str, n: int) -> dict[str, np.ndarray]:
        x = stored[f"x_{part}"][:n].astype(np.float32) / 255
        x = (x - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
        labels = stored[f"y_{part}"][:n].astype(np.int64)
        return {"input": np.ascontiguousarray(x.transpose(0, 3, 1, 2)), "labels": labels}

    data, after = arrays("train", 600), {}
    for method in ("prune", "implant", "hap"):
        report = compress(
            model,
            data,
            val=arrays("test", 1017),
            keep_macs=0.5,
            method=method,
            output=tmp_path / f"{method}.onnx",
            save_plan=tmp_path / f"{method}.json",
            **FAST,
        )
        assert report.budget.reached["keep_macs"] <= 0.5
        assert report.quality is not None
        after[method] = report.quality.after
        apply_plan(model, tmp_path / f"{method}.json", output=tmp_path / "again.onnx")
        assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / f"{method}.onnx").read_bytes()
        assert {n.domain for n in onnx.load(tmp_path / "again.onnx").graph.node} == {""}
    assert after["implant"] > after["prune"] + 0.01
    assert after["hap"] > max(after["prune"], after["implant"]) - 0.02


def test_outputs_that_mix_samples_are_refused(tmp_path: Path) -> None:
    """A Pad along the batch: one row more than there are samples, whatever their number."""
    weights = {"w": rand(4, 6), "v": rand(6, 3), "pads": np.array([0, 0, 1, 0])}
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("MatMul", ["h", "v"], ["s"]),
        node("Pad", ["s", "pads"], ["y"]),
    ]
    model = make_model(nodes, inputs={"x": ["N", 4]}, outputs=["y"], weights=weights)
    options = {"keep_params": 0.5, "method": "prune", "metric": "r2", "output": tmp_path / "out.onnx"}
    with pytest.raises(ModelError, match=r"'y' .* sample by sample: the first axis must be the batch"):
        compress(model, {"x": rand(40, 4)}, **options)
    assert not list(tmp_path.iterdir())
