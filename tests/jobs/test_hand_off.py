"""Whole jobs with ``--then``, and jobs on models that are quantized already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto
from quantize.cases import initializers, lost_variance, ops_of, outputs, to_int8
from sample_models import fix_speed, images, residual_cnn, timing, with_labels, write

from hap_onnx import apply_plan, compress, inspect, validate
from hap_onnx.config import rejected_path
from hap_onnx.data.calibration import open_dataset, split_dataset
from hap_onnx.errors import GateError, ModelError
from hap_onnx.events import Event
from hap_onnx.jobs import hand_off, job
from hap_onnx.model.measure import count_params
from hap_onnx.model.weights import join_model, split_model
from hap_onnx.planning.plan import CompressionPlan
from hap_onnx.quantize import Recipe, carry_out
from hap_onnx.runtime.session import Session, make_session

FAST: dict[str, Any] = {"threads": 1, "batch_size": 64, "method": "prune", "recover": "none"}
FULL: dict[str, Any] = {"threads": 1, "batch_size": 64}


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_speed(monkeypatch)


@pytest.fixture(scope="module")
def labelled() -> dict[str, np.ndarray]:
    return with_labels(images(120))


def output_of(folder: Path) -> ModelProto:
    return onnx.load(folder / "net.hap.onnx")


@pytest.mark.parametrize("kind", ["int8", "fp16"])
@pytest.mark.parametrize("opset", [12, pytest.param(17, marks=pytest.mark.slow)])
def test_the_final_file_has_few_bits_and_the_report_tells_the_steps_apart(tmp_path, labelled, kind, opset):
    model = write(tmp_path, residual_cnn(opset=opset))
    notes: list[Event] = []
    report = compress(model, labelled, keep_macs=0.6, then=kind, on_event=notes.append, **FAST)
    final = output_of(tmp_path)
    types = {tensor.data_type for tensor in final.graph.initializer}
    assert (TensorProto.INT8 if kind == "int8" else TensorProto.FLOAT16) in types
    assert [value.name for value in final.graph.input] == ["x"]
    assert {entry.key for entry in final.metadata_props} == {"author", "hap_onnx"}
    then = report.then
    assert then is not None
    assert then.kind == kind
    assert then.original == report.before
    assert then.both == report.after
    assert then.both.bytes == (tmp_path / "net.hap.onnx").stat().st_size
    assert then.both.bytes < min(then.compressed.bytes, then.quantized.bytes) < then.original.bytes
    assert (then.compressed.params, then.compressed.macs) == (report.after.params, report.after.macs)
    assert then.quantized.params == report.before.params
    for facts in (then.original, then.compressed, then.quantized, then.both):
        assert 0.2 < facts.metric <= 1.0
        assert facts.latency_ms == (1.0 if facts is then.original else 0.9)
    assert report.budget.reached["keep_macs"] <= 0.6
    assert "quantize" in report.seconds
    raised = [event.message for event in notes if "raised from opset 12 to 13" in event.message]
    assert len(raised) == (kind == "int8" and opset == 12)
    assert final.opset_import[0].version == (13 if raised else opset)
    assert count_params(final) == report.after.params


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_plan_gives_the_same_bytes_without_data(tmp_path, labelled, kind):
    """In another process, too, where hashes of names differ."""
    model = write(tmp_path, external=kind == "int8")
    plan, again = tmp_path / "plan.json", tmp_path / "again.onnx"
    compress(model, labelled, keep_macs=0.6, then=kind, save_plan=plan, **FAST)
    command = [sys.executable, "-m", "hap_onnx", "apply", str(model), str(plan), "-o", str(again), "--json"]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    if kind == "int8":  # its external data is named after the file
        (tmp_path / "net.hap.onnx").unlink()
        apply_plan(model, plan)
        first, second = (onnx.load(path).SerializeToString() for path in (tmp_path / "net.hap.onnx", again))
        assert first == second
    else:
        assert again.read_bytes() == (tmp_path / "net.hap.onnx").read_bytes()
    report = json.loads(done.stdout)
    assert report["then"]["kind"] == kind
    assert report["then"]["both"]["bytes"] == report["after"]["bytes"]
    assert report["then"]["compressed"]["bytes"] > report["after"]["bytes"]


@pytest.mark.parametrize(("batch", "n"), [("N", 80), (1, 110)])
def test_the_last_batch_may_be_short_and_batches_may_be_of_one_sample(tmp_path, batch, n):
    model = write(tmp_path, residual_cnn(batch=batch))
    report = compress(model, {"x": images(n)}, keep_macs=0.6, then="int8", **FAST | {"batch_size": 32})
    assert report.then is not None
    assert report.then.both.bytes < report.then.compressed.bytes


def test_what_implants_add_to_a_small_file_does_not_make_its_size_unreachable(tmp_path, labelled):
    report = compress(write(tmp_path), labelled, max_bytes=14_000, then="int8", **FULL | {"recover": "none"})
    assert 8_000 < (tmp_path / "net.hap.onnx").stat().st_size <= 14_000
    assert report.budget.reached["max_bytes"] <= 14_000


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(tmp_path, labelled):
    model = write(tmp_path)
    options = {"keep_macs": 0.6, "then": "int8", "rounds": 2, **FAST}
    plan = tmp_path / "plan.json"
    compress(model, labelled, output=tmp_path / "a.onnx", save_plan=plan, **options)
    compress(model, labelled, output=tmp_path / "b.onnx", **options)
    apply_plan(model, plan, output=tmp_path / "c.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "c.onnx").read_bytes()


@pytest.mark.slow
def test_a_run_with_another_ending_goes_on_from_the_same_work(tmp_path, labelled):
    model, work = write(tmp_path), tmp_path / "work"
    outputs_of = {}
    for name, options in {
        "first": {"then": "fp16", "work_dir": work},
        "second": {"then": "int8", "work_dir": work},
        "fresh": {"then": "int8"},
    }.items():
        output, plan = tmp_path / f"{name}.onnx", tmp_path / f"{name}.json"
        compress(model, labelled, keep_macs=0.6, output=output, save_plan=plan, **options, **FAST)
        outputs_of[name] = output.read_bytes(), plan.read_text()
    assert outputs_of["second"] == outputs_of["fresh"] != outputs_of["first"]


def test_the_plan_of_a_dry_run_has_all_that_the_real_run_has(tmp_path, labelled):
    model = write(tmp_path)
    options = {"keep_macs": 0.6, "then": "int8", **FAST}
    plans = [tmp_path / "dry.json", tmp_path / "real.json"]
    dry = compress(model, labelled, dry_run=True, save_plan=plans[0], **options)
    real = compress(model, labelled, save_plan=plans[1], **options)
    assert plans[0].read_text() == plans[1].read_text()
    assert dry.after.bytes == real.after.bytes
    sketch = compress(model, labelled, dry_run=True, **options)
    assert sketch.then is None
    assert abs(sketch.after.bytes - real.after.bytes) < 0.1 * real.after.bytes


def test_a_damaged_recipe_is_refused(tmp_path, labelled):
    model, plan = write(tmp_path), tmp_path / "plan.json"
    compress(model, labelled, keep_macs=0.6, then="int8", save_plan=plan, **FAST)
    document = json.loads(plan.read_text())
    document["then"]["ranges"]["x"] = [1.0, "b"]
    plan.write_text(json.dumps(document))
    with pytest.raises(ModelError, match=r"damaged: the range of 'x'"):
        apply_plan(model, plan, output=tmp_path / "again.onnx")
    document["then"] = []
    plan.write_text(json.dumps(document))
    with pytest.raises(ModelError, match="'then' is no dict"):
        apply_plan(model, plan, output=tmp_path / "again.onnx")
    assert not (tmp_path / "again.onnx").exists()


def test_the_gate_is_about_the_total_drop(tmp_path, labelled, monkeypatch):
    """A conversion that ruins the model is refused though compression alone is within the limit."""
    model = write(tmp_path)
    real = hand_off.choose_recipe

    def ruin(bench, proto, kind):
        recipe = real(bench, proto, kind)
        ranges = {name: (low / 1e4, high / 1e4) for name, (low, high) in recipe.ranges.items()}
        return hand_off.Recipe("int8", ranges=ranges)

    monkeypatch.setattr(hand_off, "choose_recipe", ruin)
    options = {"keep_macs": 0.9, "then": "int8", "max_drop": 0.2, **FAST}
    with pytest.raises(GateError, match="accuracy drops by") as caught:
        compress(model, labelled, keep_rejected=True, **options)
    assert not (tmp_path / "net.hap.onnx").exists()
    rejected = onnx.load(rejected_path(tmp_path / "net.hap.onnx"))
    assert "QuantizeLinear" in ops_of(rejected)
    report = caught.value.report
    assert report.quality.before - report.then.compressed.metric <= 0.2 < report.quality.drop
    assert report.then.both.metric == report.quality.after


@pytest.mark.slow
def test_the_search_is_about_the_final_file(tmp_path, labelled, monkeypatch):
    seen: list[str] = []
    real = hand_off.choose_recipe

    def choose(bench, proto, kind):
        seen.append(kind)
        return real(bench, proto, kind)

    monkeypatch.setattr(hand_off, "choose_recipe", choose)
    report = compress(write(tmp_path), labelled, max_drop=0.5, then="int8", **FAST)
    assert report.quality.passed
    assert len(seen) > 3  # once for each candidate, for the result and for the original


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp16", marks=pytest.mark.slow)])
def test_max_bytes_is_about_the_final_file(tmp_path, labelled, kind):
    model = write(tmp_path)
    limit = int((0.27 if kind == "int8" else 0.4) * model.stat().st_size)
    report = compress(model, labelled, max_bytes=limit, then=kind, **FAST)
    size = (tmp_path / "net.hap.onnx").stat().st_size
    assert 0.75 * limit < size <= limit
    assert report.budget.reached["max_bytes"] == size


def test_speed_counts_where_the_provider_gains_from_it(tmp_path, labelled, monkeypatch):
    """float16 is slower on the CPU, which says nothing about the machine that the file is for."""

    def slow_if_converted(reference: Session, candidate: Session, inputs: Any) -> Any:
        names = {value.name for value in candidate.session.get_inputs()}
        assert names == {"x"}
        return timing(2.0 if candidate.label == "converted" else 0.5)

    real = job.open_session
    converted = ("QuantizeLinear", "Cast")

    def open_session(model, config):
        session = real(model, config)
        is_final = isinstance(model, ModelProto) and any(op in ops_of(model) for op in converted)
        return Session(**{**vars(session), "label": "converted"}) if is_final else session

    monkeypatch.setattr(job, "open_session", open_session)
    monkeypatch.setattr(job, "compare_speed", slow_if_converted)
    model = write(tmp_path)
    report = compress(model, labelled, keep_macs=0.6, then="fp16", **FAST)
    assert report.after.latency_ms == 2.0
    with pytest.raises(GateError, match="slower than the original"):
        compress(model, labelled, keep_macs=0.6, then="int8", **FAST)
    compress(model, labelled, keep_macs=0.6, then="int8", allow_slower=True, **FAST)
    assert hand_off.gains_from("fp16", "CUDAExecutionProvider")
    assert hand_off.gains_from(None, "CPUExecutionProvider")


def test_what_cannot_become_int8_is_refused_before_any_work(tmp_path, labelled):
    model = write(tmp_path, residual_cnn(dtype=np.float16))
    with pytest.raises(ModelError, match="--then int8 starts from a float32 model"):
        compress(model, {"x": labelled["x"].astype(np.float16)}, keep_macs=0.6, then="int8", **FAST)
    with pytest.raises(ModelError, match="quantized already"):
        compress(to_int8(), labelled, keep_macs=0.6, then="int8", output=tmp_path / "o.onnx", **FAST)


def test_pruned_widths_stay_aligned(tmp_path, labelled):
    model = write(tmp_path, residual_cnn(width=32))
    compress(model, {"x": labelled["x"]}, keep_macs=0.5, then="int8", align=8, **FAST)
    weights = {k: v for k, v in initializers(output_of(tmp_path)).items() if k.endswith(".w_quantized")}
    widths = [array.shape[0] for name, array in weights.items() if not name.startswith("head")]
    assert min(widths) < 32
    assert all(width % 8 == 0 for width in widths)


def test_layers_alone_are_tried_where_all_is_too_coarse(labelled, monkeypatch):
    monkeypatch.setattr(hand_off, "GOOD_ENOUGH", 0.0)
    model, notes = residual_cnn(), []
    session = make_session(model, providers="cpu", threads=1)
    splits = split_dataset(open_dataset(labelled, session.inputs), seed=0)
    bench = hand_off.Bench(
        splits, 64, lambda proto: make_session(proto, providers="cpu", threads=1), notes.append
    )
    recipe = hand_off.choose_recipe(bench, model, "int8")
    tried = {"make_stem", "make_a1", "make_scores"}
    assert not recipe.nodes or tried <= set(recipe.nodes)
    assert "of the outputs' variance is lost on 24 samples" in notes[0]


# ---------------------------------------------------------------- models that are quantized already


def test_a_quantized_model_is_compressed_and_stays_quantized(tmp_path, labelled):
    model = write(tmp_path, to_int8())
    plan = tmp_path / "plan.json"
    report = compress(model, labelled, keep_macs=0.6, save_plan=plan, **FULL)
    final, before = output_of(tmp_path), onnx.load(model)
    assert report.before.params == count_params(residual_cnn())
    assert report.after.params == count_params(final) < 0.75 * report.before.params
    assert report.budget.reached["keep_macs"] <= 0.6
    assert report.quality.drop < 0.15
    stored = initializers(final)
    assert {array.dtype for name, array in stored.items() if name.endswith("_quantized")} <= {
        np.dtype(np.int8), np.dtype(np.int32),
    }  # fmt: skip
    assert {op: ops_of(final).count(op) for op in ("Conv", "QuantizeLinear", "DequantizeLinear")} == {
        op: ops_of(before).count(op) for op in ("Conv", "QuantizeLinear", "DequantizeLinear")
    }
    assert len(final.SerializeToString()) < 0.8 * len(before.SerializeToString())
    again = tmp_path / "again.onnx"
    apply_plan(model, plan, output=again)
    assert again.read_bytes() == (tmp_path / "net.hap.onnx").read_bytes()
    x = images(64, seed=12)
    assert lost_variance(outputs(final, x=x), outputs(before, x=x)) < 0.1


@pytest.mark.slow
def test_training_goes_through_quantized_activations(tmp_path, labelled):
    model = write(tmp_path, to_int8())
    report = compress(model, labelled, keep_macs=0.5, epochs=1, **FULL)
    assert report.recovery[0].method == "distill"
    assert "QuantizeLinear" in ops_of(output_of(tmp_path))


def test_inspect_says_what_can_be_done_with_a_quantized_model(tmp_path):
    report = inspect(write(tmp_path, to_int8()))
    assert report.prunable.params_ratio > 0.999  # all but the last bias
    assert report.size.params == count_params(residual_cnn())
    whys = {layer.implant for layer in report.layers}
    assert whys == {"its weight is stored in 8 bits, which implants are not"}


def test_validate_counts_a_model_in_8_bits_like_the_float_one(labelled):
    report = validate(residual_cnn(), to_int8(), labelled, max_drop=0.2)
    assert report.before.params == report.after.params
    assert report.before.macs == report.after.macs
    assert report.after.bytes < 0.5 * report.before.bytes
    assert report.passed


def test_a_model_in_two_parts_is_joined_for_the_converters_within_their_limit(monkeypatch):
    large = split_model(residual_cnn())
    assert large.weights
    final = hand_off.finish(large, plan_of(Recipe("fp16")))
    assert final == carry_out(join_model(large), Recipe("fp16"))
    monkeypatch.setattr(hand_off, "MAX_PROTO_BYTES", 1000)
    with pytest.raises(ModelError, match="--then needs a model of at most 2 GB"):
        hand_off.finish(large, plan_of(Recipe("fp16")))


def plan_of(recipe):
    return CompressionPlan("0" * 64, "0", {}, (), then=recipe.to_dict())
