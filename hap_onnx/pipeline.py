"""The stages in order: what the command line and the Python API call.

load -> normalise -> couple -> twin -> statistics -> curves -> plan -> surgery -> refit -> validate -> write
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from hap_onnx import report as reports
from hap_onnx.config import (
    CompressConfig,
    check_folder,
    check_options,
    check_outputs,
    default_folder,
    default_output,
    files_of,
    plan_weights_path,
    resolve_max_drop,
)
from hap_onnx.data.calibration import Subset, open_dataset
from hap_onnx.distributed import join_team
from hap_onnx.errors import (
    ModelError,
    UsageError,
)
from hap_onnx.events import Event, OnEvent, ignore_event
from hap_onnx.jobs import hand_off
from hap_onnx.jobs.carry_out import Compressed, from_plan_weights
from hap_onnx.jobs.inspection import inspect_report
from hap_onnx.jobs.job import Job
from hap_onnx.jobs.machine import check_loads, compare_speed, protect_weights, use_threads, write_proto
from hap_onnx.jobs.self_check import Result, check_result
from hap_onnx.jobs.sweep import run_sweep
from hap_onnx.model.bounds import MAX_TENSOR_BYTES
from hap_onnx.model.input_spec import InputSpec
from hap_onnx.model.measure import model_size
from hap_onnx.model.model_io import SourceModel, load_model, normalise, save_model
from hap_onnx.model.protos import n_elements
from hap_onnx.model.saving import count_saved_bytes
from hap_onnx.model.weights import count_model_bytes
from hap_onnx.planning.choose import Choice
from hap_onnx.planning.plan import CompressionPlan, load_plan
from hap_onnx.prepare import PreparedModel, make_probe, prepare
from hap_onnx.report.files import write_reports
from hap_onnx.report.summary import (
    facts_after,
    facts_before,
    frozen_nodes,
    installed_versions,
    judge_quality,
    plan_summary,
    reached_budgets,
    recovery_summary,
)
from hap_onnx.runtime.metrics import check_chance_level, choose_metric, compare_outputs
from hap_onnx.runtime.session import Session, make_session, run_outputs
from hap_onnx.runtime.soundness import check_model
from hap_onnx.sensitivity.curvature import to_tensors
from hap_onnx.twin import Twin, build_twin, probe_shapes

__all__ = ["analyze", "apply_plan", "compress", "inspect", "load_twin", "sweep", "validate"]

_log = logging.getLogger(__name__)

MAX_PROVEN_BYTES = 2**30
"""Of larger models ``apply`` checks the file alone: ``compress`` has proven the plan, and memory is short."""


# ---------------------------------------------------------------- compress, sweep, analyze


def compress(
    model: str | Path | ModelProto, data: Any, *, on_event: OnEvent = ignore_event, **options: Any
) -> reports.CompressReport:
    """Write a smaller, faster model that onnxruntime has already run.

    In the processes that ``torchrun`` starts, each calls this with the same arguments: they share the work,
    the first one writes, and all get the report.

    Args:
        model: path of an ONNX file, or a model in memory (then ``output`` is required).
        data: representative inputs: a path (see ``hap_onnx.data.calibration``), arrays by input name, or an
            iterable of such.
        on_event: is told about progress.
        options: the words of ``CompressConfig``.

    Raises:
        ModelError, CalibrationError: the model or the data cannot be processed.
        UsageError: the request makes no sense.
        BudgetError, GateError: the budget cannot be reached, or a gate is not met; nothing is written, and
            the error's ``report`` holds the numbers.
        ValidationError: the result cannot be written.
    """
    config = CompressConfig.from_options(options)
    if config.sweep is not None:
        raise UsageError("compress makes one model: hap_onnx.sweep makes several at once")
    output = _output_of(model, config)
    inputs = {"MODEL": model, "--data": data, "--val": config.val}
    check_outputs(files_of(config, output=output), inputs=inputs, work_dir=config.work_dir)
    with use_threads(config.threads), join_team(config.dist_timeout) as team:
        return Job(model, data, config, output, on_event, team).run()


def sweep(
    model: str | Path | ModelProto, data: Any, *, on_event: OnEvent = ignore_event, **options: Any
) -> reports.SweepReport:
    """Plan a family of models of falling cost, from sensitivities that are found once.

    The folder ``output`` gets, for each fraction of ``sweep`` (all the usual ones, if it is not given), the
    plan from which ``apply_plan`` writes the model that ``compress`` would have written for this budget, and
    ``sweep.json``, ``sweep.md`` and ``sweep.svg``, which grow from point to point. An earlier sweep there is
    replaced.

    Args, Raises: as ``compress``; points that cannot be reached or fail a gate are in the report, and raise
    only if no other is left.
    """
    config = CompressConfig.from_options({"sweep": True, **options})
    if config.sweep is None:
        raise UsageError("a sweep needs at least one fraction to keep")
    output = _output_of(model, config)
    files = files_of(config, output=output)
    check_folder(output, {**files, "--work-dir": config.work_dir})
    inputs = {"MODEL": model, "--data": data, "--val": config.val}
    check_outputs(files, inputs=inputs, work_dir=config.work_dir)
    with use_threads(config.threads), join_team(config.dist_timeout) as team:
        return run_sweep(Job(model, data, config, output, on_event, team))


def analyze(
    model: str | Path | ModelProto, data: Any, *, on_event: OnEvent = ignore_event, **options: Any
) -> reports.AnalyzeReport:
    """Find how sensitive a model is to each channel group and each layer, and what sizes would cost.

    Nothing is removed, and no model is written. The samples, the ranking and the plans are those of
    ``compress`` with the same words, though plans do not ask whether an implant saves time (as with
    ``allow_slower``) unless ``objective`` is latency. With the same ``work_dir`` a later ``compress`` starts
    from the sensitivities that are found here.

    Args:
        options: ``objective``, ``metric``, ``method``, ``sensitivity``, ``probes``, ``align``,
            ``latency_table``, ``exclude``, ``only``, ``preprocess``, ``max_samples``, ``batch_size``,
            ``device``, ``providers``, ``threads``, ``dist_timeout``, ``seed``, ``report``, ``html``,
            ``summary``, ``work_dir``.

    Raises:
        ModelError, CalibrationError, UsageError, ValidationError: see ``compress``.
    """
    config = CompressConfig.from_options({**check_options(options, command="analyze"), "allow_slower": True})
    files = files_of(config, output=None)
    check_outputs(files, inputs={"MODEL": model, "--data": data}, work_dir=config.work_dir)
    with use_threads(config.threads), join_team(config.dist_timeout) as team:
        return Job(model, data, config, None, on_event, team).analyze()


def _output_of(model: str | Path | ModelProto, config: CompressConfig) -> Path:
    if config.output is not None:
        return config.output
    if isinstance(model, ModelProto):
        raise UsageError("a model that is given in memory needs 'output', the path to write to")
    return default_output(Path(model)) if config.sweep is None else default_folder(Path(model))


# ---------------------------------------------------------------- inspect, apply, validate, load_twin


def inspect(
    model: str | Path | ModelProto, data: Any = None, *, on_event: OnEvent = ignore_event, **options: Any
) -> reports.InspectReport:
    """Report size, channel groups and what is frozen, without looking at sensitivity.

    Args:
        data: needed only where the model leaves sizes of its inputs open.
        options: ``align``, ``exclude``, ``only``, ``preprocess``, ``max_samples``, ``batch_size``, ``seed``,
            ``report``.

    Raises:
        ModelError, CalibrationError, UsageError: see ``compress``.
    """
    words = check_options(options, command="inspect")
    source = load_model(model)
    session = make_session(source.model, providers="cpu", is_timed=False)
    if data is None:
        probe = make_probe(session.inputs)
    else:
        dataset = open_dataset(
            data,
            session.inputs,
            preprocess=words["preprocess"],
            max_samples=words["max_samples"],
            seed=words["seed"],
        )
        n_probe = min(max(2, session.fixed_batch or 2), dataset.n_samples)
        probe = next(iter(dataset.batches(np.arange(n_probe), n_probe))).inputs
    del session  # it has weights of its own
    prepared = prepare(source, probe, exclude=words["exclude"], only=words["only"])
    report = inspect_report(
        str(model) if isinstance(model, (str, Path)) else "model in memory", prepared, words["align"]
    )
    on_event(Event("inspect", "commit"))
    write_reports(report, json=words["report"])
    return report


def apply_plan(
    model: str | Path | ModelProto,
    plan: str | Path,
    *,
    output: str | Path | None = None,
    report: str | Path | None = None,
    on_event: OnEvent = ignore_event,
) -> reports.CompressReport:
    """Write the model that a saved plan describes: no data, no training, the same bytes as ``compress``.

    Raises:
        ModelError: the plan is damaged, or was made for another model.
        ValidationError: the result cannot be written.
    """
    start = time.perf_counter()
    if output is None and isinstance(model, ModelProto):
        raise UsageError("a model that is given in memory needs 'output', the path to write to")
    target = Path(output) if output is not None else default_output(Path(str(model)))
    files = {"--output": target, **({"--report": Path(report)} if report is not None else {})}
    plan_files = {"PLAN.json": plan, "the plan's weights": plan_weights_path(Path(plan))}
    check_outputs(files, inputs={"MODEL": model, **plan_files})
    source = load_model(model)
    protect_weights(source, files)
    inputs = _inputs_of(source)  # before the plan: onnxruntime takes as much memory as the model
    saved = load_plan(plan)
    rounds: list[PreparedModel] = []
    part = source
    for round_plan in (*saved.earlier, saved):
        prepared, candidate = _carry_out(part, round_plan, inputs, is_first=not rounds)
        rounds.append(prepared)
        graph = candidate.finished()
        del candidate
        gc.collect()  # its graph has nodes and weights that are replaced by now, and refers to itself
        compressed = write_proto(graph, part, saved if round_plan is saved else None)
        if round_plan is not saved:
            part = load_model(compressed)
            inputs = _inputs_of(part)
    prepared = rounds[0]
    _check_applied(Result(compressed, graph, saved, rounds, prepared.probe))
    proto = hand_off.finish(compressed, saved)
    if saved.then:
        check_model(proto, reference=source.model)
    before = facts_before(prepared)
    n_bytes, n_between = (
        count_saved_bytes(model, target, external_data=source.external_data) for model in (proto, compressed)
    )
    after = facts_after(graph, prepared, n_bytes=n_bytes)
    then = None
    if saved.then:
        between = replace(after, bytes=n_between)
        then = hand_off.describe(saved, proto, original=before, compressed=between, both=after)
    result = reports.CompressReport(
        model=str(model) if isinstance(model, (str, Path)) else "model in memory",
        output=str(target),
        before=before,
        after=after,
        quality=None,
        fidelity=None,
        plan=plan_summary(rounds, saved),
        frozen=frozen_nodes(prepared),
        budget=reports.Budget(reached=reached_budgets(before, after)),
        seconds={"apply": time.perf_counter() - start},
        seed=int(saved.config.get("seed", 0)),
        versions=installed_versions(),
        recovery=recovery_summary(saved),
        then=then,
    )

    def finish(path: Path) -> None:
        check_loads(path, None)
        on_event(Event("apply", "commit"))
        write_reports(result, json=None if report is None else Path(report))

    save_model(proto, target, external_data=source.external_data, check=finish)
    return result


def _check_applied(result: Result) -> None:
    """Prove what a plan has made; of a large model, which must fit into memory once more, only the file."""
    if count_model_bytes(result.source.model) > MAX_PROVEN_BYTES:
        check_model(result.proto, reference=result.source.model)
        return
    original = make_session(result.source.model, providers="cpu", threads=1)
    check_result(result, original, lambda model: make_session(model, providers="cpu", threads=1))


def _inputs_of(source: SourceModel) -> tuple[InputSpec, ...]:
    """Load a model in onnxruntime, which proves that it can be, and let go of it again."""
    return make_session(source.model, providers="cpu", is_timed=False).inputs


def _carry_out(
    source: SourceModel, plan: CompressionPlan, inputs: Sequence[InputSpec], *, is_first: bool
) -> tuple[PreparedModel, Compressed]:
    """Carry out one round of a plan on the model that it was made for; raises ModelError for any other."""
    plan.check_model(source.sha256)
    sizes, exclude, only = _read_words(plan.config)
    prepared = prepare(
        source,
        make_probe(inputs, sizes=sizes),
        exclude=exclude,
        only=only,
        must_match=is_first,
    )
    choice = Choice(plan.decisions_for(prepared.coupling), plan.replacements)
    return prepared, from_plan_weights(prepared, choice, plan.weights)


def _read_words(
    words: Mapping[str, Any],
) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...], tuple[str, ...]]:
    """Return the input shapes and the patterns that a plan was made with; raises ModelError."""
    shapes = words.get("input_shapes", {})
    if not isinstance(shapes, Mapping) or not all(map(_is_shape, shapes.values())):
        raise ModelError("the plan is damaged: its 'input_shapes' are no shapes")
    patterns = [words.get(name, []) for name in ("exclude", "only")]
    for name, entries in zip(("exclude", "only"), patterns, strict=True):
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise ModelError(f"the plan is damaged: its '{name}' is no list of patterns")
    return {name: tuple(shape) for name, shape in shapes.items()}, tuple(patterns[0]), tuple(patterns[1])


def _is_shape(shape: Any) -> bool:
    whole = isinstance(shape, list) and all(type(size) is int and size >= 1 for size in shape)
    return whole and n_elements(shape) * 8 <= MAX_TENSOR_BYTES


def validate(
    reference: str | Path | ModelProto,
    candidate: str | Path | ModelProto,
    data: Any,
    *,
    on_event: OnEvent = ignore_event,
    **options: Any,
) -> reports.ValidateReport:
    """Compare two models on all of ``data``: quality, fidelity, size and latency; never raises for a gate.

    Raises:
        ModelError, CalibrationError, UsageError: see ``compress``.
    """
    words = check_options(options, command="validate")
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    sources = [load_model(reference), load_model(candidate)]
    sessions = [
        make_session(source.model, providers=words["providers"] or "cpu", threads=words["threads"] or 1)
        for source in sources
    ]
    _check_same_interface(*sessions)
    dataset = open_dataset(
        data,
        sessions[0].inputs,
        preprocess=words["preprocess"],
        max_samples=words["max_samples"],
        seed=words["seed"],
    )
    on_event(Event("validate", "note", dataset.preprocessing))
    everything = Subset(dataset, np.arange(dataset.n_samples))
    before, after = (run_outputs(session, everything, batch_size=words["batch_size"]) for session in sessions)
    seconds["run"] = time.perf_counter() - start
    metric = choose_metric(words["metric"], outputs=before, labels=everything.labels)
    limit = resolve_max_drop(words["max_drop"], has_budget=False)
    quality = judge_quality(metric.measure(before, after, everything.labels), limit)
    if metric.name == "accuracy":
        check_chance_level(quality.before, n_classes=metric.n_classes or 2, n_samples=quality.n_samples)
    first = next(iter(everything.batches(sessions[0].fixed_batch or 1))).inputs
    timing = compare_speed(sessions[0], sessions[1], first)
    seconds["latency"] = time.perf_counter() - start - seconds["run"]
    facts = []
    for source, latency, value in zip(
        sources, (timing.before_ms, timing.after_ms), (quality.before, quality.after), strict=True
    ):
        graph = normalise(source)
        twin = build_twin(graph, share_weights=True)
        shapes = probe_shapes(twin, to_tensors(first, twin))
        size = model_size(graph, shapes)
        macs = size.macs // (sessions[0].fixed_batch or 1)  # of one sample
        facts.append(reports.ModelFacts(size.params, macs, source.n_bytes, latency, value))
    slower = timing.is_slower
    report = reports.ValidateReport(
        reference=str(reference) if isinstance(reference, (str, Path)) else "reference",
        candidate=str(candidate) if isinstance(candidate, (str, Path)) else "candidate",
        before=facts[0],
        after=facts[1],
        quality=quality,
        fidelity=compare_outputs(before, after),
        slower=slower,
        passed=quality.passed and (words["allow_slower"] or not slower),
        seconds=seconds,
        seed=words["seed"],
        versions=installed_versions(),
        latency=timing.facts(),
    )
    on_event(Event("validate", "commit"))
    write_reports(
        report,
        json=words["report"],
        html=words["html"],
        summary=words["summary"],
        data=data,
        options=words,
        preprocessing=dataset.preprocessing,
    )
    return report


def _check_same_interface(first: Session, second: Session) -> None:
    mine, theirs = {spec.name for spec in first.inputs}, {spec.name for spec in second.inputs}
    if mine != theirs or set(first.output_names) != set(second.output_names):
        raise ModelError(
            f"the two models cannot be compared: {first.label} maps {sorted(mine)} to "
            f"{sorted(first.output_names)}, "
            f"{second.label} maps {sorted(theirs)} to {sorted(second.output_names)}"
        )


def load_twin(model: str | Path | ModelProto) -> Twin:
    """Return the model as a ``torch.nn.Module``, from input to output tensors by name."""
    return build_twin(normalise(load_model(model)))
