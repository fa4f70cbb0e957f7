"""What is checked of each file of the zoo; every function returns plain data for the table.

The oracles are independent of the code that they check where that can be: parameters are counted on the
files, a cut is compared in onnxruntime, on data, with the original that has the removed channels masked.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from hap_onnx.cli import main as hap_onnx_main
from hap_onnx.data.calibration import Batch
from hap_onnx.jobs.inspection import inspect_report
from hap_onnx.model.model_io import SourceModel, load_model, to_proto
from hap_onnx.pipeline import load_twin
from hap_onnx.planning.choose import Choice, arrange
from hap_onnx.planning.plan import load_plan
from hap_onnx.prepare import PreparedModel, make_probe, prepare
from hap_onnx.runtime.session import make_session, run_outputs
from hap_onnx.surgery import masked_reads, remove_channels
from tools.first_divergence import compare_nodes, run_onnxruntime

Arrays = Mapping[str, np.ndarray]
Facts = dict[str, Any]

RELATIVE, OF_SCALE = 1e-3, 1e-4
"""Tolerance of a twin: this much of each number, and this much of the largest."""
CUT_TOLERANCE = 1e-3
"""Tolerance of a cut, of the largest number: rounding in two engines, through the whole model."""
N_COMPARED = 3


def worst_excess(ours: Arrays, theirs: Arrays) -> tuple[float, float]:
    """Return (largest error of any output relative to its largest value, error in units of the tolerance)."""
    errors, excess = [0.0], [0.0]
    for name, expected in theirs.items():
        found = ours[name]
        if found.shape != expected.shape:
            return float("inf"), float("inf")
        if expected.dtype.kind != "f":
            errors.append(float((found != expected).any()))
            excess.append(errors[-1] * float("inf") if errors[-1] else 0.0)
            continue
        found, expected = found.astype(np.float64), expected.astype(np.float64)
        finite = np.isfinite(expected)
        same = np.array_equal(found[~finite], expected[~finite], equal_nan=True)
        if not same or not np.isfinite(found[finite]).all():
            return float("inf"), float("inf")
        if not finite.any():
            continue
        distance, size = np.abs(found - expected)[finite], np.abs(expected)[finite]
        scale = max(float(size.max()), 1e-12)
        errors.append(float(distance.max()) / scale)
        excess.append(float((distance / (RELATIVE * size + OF_SCALE * scale)).max()))
    return max(errors), max(excess)


def _tensors(inputs: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(values)) for name, values in inputs.items()}


def _first(data: Arrays, n: int) -> dict[str, np.ndarray]:
    return {name: values[:n] for name, values in data.items()}


def check_twin(path: Path, data: Arrays) -> Facts:
    """Compare the twin with onnxruntime on one sample and on a few at once, and differentiate it."""
    source = load_model(path)
    twin = load_twin(path)
    session = make_session(source.model, providers="cpu", threads=1)
    worst, excess = 0.0, 0.0
    for n in (1, N_COMPARED):
        inputs = _first(data, n)
        theirs = run_outputs(session, [Batch(inputs, None)], batch_size=n)
        with torch.no_grad():
            ours = {name: value.numpy() for name, value in twin(_tensors(inputs)).items()}
        error, over = worst_excess(ours, theirs)
        worst, excess = max(worst, error), max(excess, over)
    facts: Facts = {
        "ok": bool(excess <= 1.0),
        "error": worst,
        "opaque": len(twin.opaque_nodes),
        "batch_limit": twin.batch_limit,
        "n_nodes": len(twin.steps),
    }
    if not facts["ok"]:
        facts["reason"] = f"differs from onnxruntime by {worst:.3g} of the largest output"
        try:
            nodes = compare_nodes(source.proto, _first(data, 1), twin=twin)
            first = next((entry for entry in nodes if entry.diverges(1e-4)), None)
            if first is not None:
                facts["reason"] += f", first at {first.op_type} '{first.node}' ({first.error:.3g})"
        except Exception as error:  # a hint only
            facts["reason"] += f" (no first node: {error})"
    return facts


def check_inspect(path: Path, data: Arrays) -> Facts:
    """How much of the model may be pruned, and why the rest may not; and that halves of it can go."""
    start = time.perf_counter()
    source = load_model(path)
    session = make_session(source.model, providers="cpu", threads=1)
    prepared = prepare(source, _first(data, max(2, session.fixed_batch or 2)))
    report = inspect_report(path.name, prepared, "auto")
    seconds = time.perf_counter() - start
    reasons: dict[str, int] = {}
    for entry in report.frozen:
        reasons[entry.reason] = reasons.get(entry.reason, 0) + 1
    half = check_half(source, prepared, data)
    return {
        "ok": half["exact"] is not False,
        "half": half,
        "params": report.size.params,
        "macs": report.size.macs,
        "prunable_params": report.prunable.params_ratio,
        "prunable_macs": report.prunable.macs_ratio,
        "n_groups": len(report.groups),
        "n_frozen": len(report.frozen),
        "frozen": dict(sorted(reasons.items(), key=lambda item: -item[1])[:8]),
        "trial_failures": sum(n for reason, n in reasons.items() if "for trial" in reason),
        "seconds": seconds,
    }


def compress_file(path: Path, data_path: Path, folder: Path, *, keep: float, options: Sequence[str]) -> Facts:
    """Run the command line on a file, in this process; returns its exit code."""
    output = folder / f"{path.stem}.hap.onnx"
    output.unlink(missing_ok=True)
    start = time.perf_counter()
    code = hap_onnx_main(
        [
            "compress", str(path), "--data", str(data_path), "--keep-params", str(keep), "--allow-slower",
            "--threads", "1", "-v", "-o", str(output), "--report", str(folder / f"{path.stem}.report.json"),
            "--save-plan", str(folder / f"{path.stem}.plan.json"), *options,
        ]
    )  # fmt: skip
    return {"exit": code, "seconds": time.perf_counter() - start, "output": str(output)}


def count_params(model: onnx.ModelProto) -> int:
    """Elements of float weights of the main graph, constants in nodes included."""
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE}
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        if node.op_type == "Constant":
            tensors += [attribute.t for attribute in node.attribute if attribute.name == "value"]
    return sum(int(np.prod(tensor.dims)) for tensor in tensors if tensor.data_type in floats)


def _declared(values: Any) -> list[tuple[str, int, tuple[int | str, ...]]]:
    return [
        (
            value.name,
            value.type.tensor_type.elem_type,
            tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    ]


def check_valid(original: Path, output: Path, data: Arrays) -> Facts:
    """Check a written model by onnx and onnxruntime, its interface, and that other sizes still run."""
    before, after = onnx.load(original), onnx.load(output)
    onnx.checker.check_model(str(output), full_check=True)
    sessions = [make_session(model, providers="cpu", threads=1) for model in (before, after)]
    inputs = _first(data, N_COMPARED)
    first, second = (
        run_outputs(session, [Batch(inputs, None)], batch_size=N_COMPARED) for session in sessions
    )
    problems = [
        f"output '{name}' has shape {second[name].shape} instead of {values.shape}"
        for name, values in first.items()
        if second[name].shape != values.shape
    ]
    problems += [f"output '{name}' is not finite" for name in second if not np.isfinite(second[name]).all()]
    if _declared(before.graph.input) != _declared(after.graph.input) or _declared(
        before.graph.output
    ) != _declared(after.graph.output):
        problems.append("the declared inputs or outputs differ")
    facts: Facts = {
        "valid": not problems,
        "problems": problems,
        "params_before": count_params(before),
        "params_after": count_params(after),
    }
    open_axes = {
        value.name: {axis: dim.dim_param for axis, dim in enumerate(value.type.tensor_type.shape.dim)
                     if dim.dim_param}
        for value in before.graph.input
    }  # fmt: skip
    if any(open_axes.values()):
        facts["dynamic"] = all(
            _same_shapes(before, after, _resized(data, open_axes, **sizes))
            for sizes in ({"batch": 1, "factor": 1}, {"batch": 5, "factor": 1}, {"batch": 2, "factor": 2})
        )
    return facts


def _resized(
    data: Arrays, open_axes: Mapping[str, Mapping[int, str]], *, batch: int, factor: int
) -> dict[str, np.ndarray]:
    """Inputs of another size: the batch, and all other open axes times ``factor``."""
    inputs = _first(data, batch)
    for name, axes in open_axes.items():
        for axis in axes:
            if axis > 0:
                inputs[name] = np.concatenate([inputs[name]] * factor, axis=axis)
    return inputs


def _same_shapes(before: onnx.ModelProto, after: onnx.ModelProto, inputs: Arrays) -> bool:
    first, second = (run_onnxruntime(model, inputs) for model in (before, after))
    return all(second[name].shape == values.shape for name, values in first.items())


def check_exact(path: Path, plan_path: Path, data: Arrays) -> Facts:
    """Carry out the cut of a plan alone, and compare it in onnxruntime with the masked original.

    ``moved`` says how far the cut moves the outputs: an exact cut that moves nothing proves nothing. A plan
    of implants alone cuts nothing, and has nothing to prove here.
    """
    plan = load_plan(plan_path)
    source = load_model(path)
    prepared = _prepare_as_planned(source, plan.config)
    arranged, keep, _ = arrange(prepared, Choice(plan.decisions_for(prepared.coupling), plan.replacements))
    if keep.all():
        return {"exact": None}
    return compare_cut(source, arranged, keep, data)


def check_half(source: SourceModel, prepared: PreparedModel, data: Arrays) -> Facts:
    """Cut half of every group, drawn at random, all at once; compare as ``check_exact`` does."""
    rng = np.random.default_rng(0)
    keep = np.ones(prepared.coupling.n_elements, bool)
    for group in prepared.coupling.groups:
        keep[rng.choice(group.elements, group.size // 2, replace=False)] = False
    return {"exact": None} if keep.all() else compare_cut(source, prepared, keep, data)


def compare_cut(source: SourceModel, prepared: PreparedModel, keep: NDArray[np.bool_], data: Arrays) -> Facts:
    """Compare the graph without the elements that are not kept with the original that has them masked."""
    graph = remove_channels(prepared.graph, prepared.coupling, keep, shapes=prepared.probe_shapes)
    session = make_session(to_proto(graph, source), providers="cpu", threads=1)
    original = make_session(source.model, providers="cpu", threads=1)
    inputs = _first(data, max(N_COMPARED, original.fixed_batch or 1))
    found, whole = (
        run_outputs(one, [Batch(inputs, None)], batch_size=N_COMPARED) for one in (session, original)
    )
    with torch.no_grad():
        masked = prepared.twin(_tensors(inputs), on_read=masked_reads(prepared.coupling, keep))
    expected = {name: value.numpy() for name, value in masked.items()}
    error, moved = worst_excess(found, expected)[0], worst_excess(whole, expected)[0]
    return {"exact": bool(error <= CUT_TOLERANCE), "exact_error": error, "moved": moved}


def _prepare_as_planned(source: SourceModel, words: Mapping[str, Any]) -> PreparedModel:
    session = make_session(source.model, providers="cpu", threads=1)
    sizes = {name: tuple(shape) for name, shape in dict(words["input_shapes"]).items()}
    return prepare(source, make_probe(session.inputs, sizes=sizes))
