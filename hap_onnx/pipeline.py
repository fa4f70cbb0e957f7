"""The stages in order: what the command line and the Python API call.

load -> normalise -> couple -> twin -> statistics -> curves -> plan -> surgery -> refit -> validate -> write
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from onnx import ModelProto

import hap_onnx
from hap_onnx import report as reports
from hap_onnx.calibration import Dataset, Splits, Subset, open_dataset, split_dataset
from hap_onnx.candidates import Setting, compress_to, sketch
from hap_onnx.carry_out import Compressed, from_plan_weights
from hap_onnx.choose import Choice, predicted_losses
from hap_onnx.config import (
    CompressConfig,
    check_options,
    check_outputs,
    default_output,
    files_of,
    flag_of,
    plan_weights_path,
    rejected_path,
    resolve_max_drop,
)
from hap_onnx.curvature import output_scales, to_tensors
from hap_onnx.decide import build_loss_model
from hap_onnx.errors import (
    BudgetError,
    CalibrationError,
    GateError,
    ModelError,
    TargetError,
    UsageError,
    ValidationError,
)
from hap_onnx.events import Event, OnEvent, ignore_event
from hap_onnx.implant_loss import find_implant_layers
from hap_onnx.implant_speed import faster_kinds
from hap_onnx.measure import is_float_type, model_size
from hap_onnx.metrics import Metric, check_chance_level, choose_metric
from hap_onnx.model_io import SourceModel, load_model, normalise, save_model, to_proto
from hap_onnx.plan import CompressionPlan, GroupDecision, load_plan, plan_hash, save_plan
from hap_onnx.prepare import make_probe, prepare
from hap_onnx.saving import ALIGNMENT, count_saved_bytes
from hap_onnx.summary import (
    explain_groups,
    explain_layers,
    facts_after,
    facts_before,
    frozen_nodes,
    inspect_report,
    installed_versions,
    judge_quality,
    plan_summary,
    plan_words,
    reached_budgets,
    write_report,
)
from hap_onnx.twin import Twin, build_twin, probe_shapes
from hap_onnx.validate import (
    LatencyComparison,
    Session,
    check_finite,
    check_model,
    compare_outputs,
    latency_feed,
    make_session,
    measure_latency,
    run_outputs,
)

__all__ = ["apply_plan", "compress", "inspect", "load_twin", "validate"]

_log = logging.getLogger(__name__)

SEARCH_RATIOS = tuple(twentieths / 20 for twentieths in range(19, 1, -1))
"""Sizes, as fractions of the original, among which the smallest within ``max_drop`` is searched."""
SEARCH_MARGIN = 1.28
"""The search wants the drop plus so many standard errors below the limit: 90 % one-sided."""
LARGE_DROP = 0.02
SPARE_BYTES = 256
"""What ``--max-bytes`` leaves for the entry in the model's metadata."""
TWIN_TOLERANCE = {np.dtype(np.float32): 1e-3, np.dtype(np.float64): 1e-3}
LATENCY_SECONDS = 3.0

Outputs = Mapping[str, np.ndarray]


# ---------------------------------------------------------------- compress


def compress(
    model: str | Path | ModelProto, data: Any, *, on_event: OnEvent = ignore_event, **options: Any
) -> reports.CompressReport:
    """Write a smaller, faster model that onnxruntime has already run.

    Args:
        model: path of an ONNX file, or a model in memory (then ``output`` is required).
        data: representative inputs: a path (see ``hap_onnx.calibration``), arrays by input name, or an
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
    output = _output_of(model, config)
    check_outputs(
        files_of(config, output=output), inputs={"MODEL": model, "--data": data, "--val": config.val}
    )
    with _threads(config.threads):
        return _Job(model, data, config, output, on_event).run()


def _output_of(model: str | Path | ModelProto, config: CompressConfig) -> Path:
    if config.output is not None:
        return config.output
    if isinstance(model, ModelProto):
        raise UsageError("a model that is given in memory needs 'output', the path to write to")
    return default_output(Path(model))


class _Job:
    """One run of compress: what its stages share, and how long each took."""

    def __init__(
        self,
        model: str | Path | ModelProto,
        data: Any,
        config: CompressConfig,
        output: Path,
        on_event: OnEvent,
    ) -> None:
        self.config, self.output, self.on_event = config, output, on_event
        self.seconds: dict[str, float] = {}
        self.label = str(model) if isinstance(model, (str, Path)) else "model in memory"
        with self.stage("load"):
            self.source = load_model(model)
            _protect_weights(self.source, files_of(config, output=output))
            if config.work_dir is not None:
                _make_folder(config.work_dir)
            self.session = _session(self.source.proto, config)
            self.splits = self._open_data(data)
            self.batch_size = _batch_size(config.batch_size, self.session)
        with self.stage("prepare"):
            self._check_original()
            probe = next(iter(self.splits.calibrate.batches(max(2, self.session.fixed_batch or 2)))).inputs
            self.prepared = prepare(
                self.source, probe, exclude=config.exclude, only=config.only, device=_device(config.device)
            )
            self._check_twin()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def note(self, text: str, *, kind: str = "note") -> None:
        self.on_event(Event("compress", "warning" if kind == "warning" else "note", text))

    # --- data and the original ---

    def _open_data(self, data: Any) -> Splits:
        config, inputs = self.config, self.session.inputs
        dataset = _open(data, inputs, config, self.note)
        val = None
        if config.val is not None:
            val = _open(config.val, inputs, replace(config, max_samples=None), self.note)
        splits = split_dataset(dataset, seed=config.seed, val=val)
        unit = self.session.fixed_batch or 1
        return replace(
            splits,
            calibrate=_whole_batches(splits.calibrate, unit),
            choose=_whole_batches(splits.choose, unit),
        )

    def _check_original(self) -> None:
        """Run the original, choose the metric, and refuse data on which it is near chance level."""
        first = self.splits.calibrate.take(256)
        outputs = run_outputs(self.session, first, batch_size=self.batch_size)
        check_finite(outputs, label="the original model")
        self.scales = output_scales([outputs])
        if not self.scales:
            raise CalibrationError(
                "no floating-point output of the model varies over the data, so nothing can be learnt "
                "from it; give samples that differ"
            )
        self.metric = choose_metric(self.config.metric, outputs=outputs, labels=first.labels)
        if self.metric.name == "accuracy":
            _refuse_chance(self.metric, outputs, first)
        elif self.splits.report.labels is not None and self.config.metric == "auto":
            # Labels in --val only: the gate is about accuracy, while the search has agreement to go by.
            part = self.splits.report.take(256)
            outputs = run_outputs(self.session, part, batch_size=self.batch_size)
            metric = self._metric_for(outputs, part)
            self.note(
                f"only --val has labels: the report is about {metric.name}, a search about {self.metric.name}"
            )
            if metric.name == "accuracy":
                _refuse_chance(metric, outputs, part)

    def _check_twin(self) -> None:
        """Refuse a twin that does not equal onnxruntime on the data."""
        twin = self.prepared.twin
        self._check_same(twin, self.session, "the torch twin of the model")
        if twin.opaque_nodes:
            self.note(f"{len(twin.opaque_nodes)} nodes run in onnxruntime only and stay as they are")

    def _check_result(self, candidate: Compressed, session: Session) -> None:
        """Refuse a written model that does not compute what the compressed graph says."""
        twin = build_twin(candidate.finished(), device=_device(self.config.device))
        self._check_same(twin, session, "the compressed model's twin")

    def _check_same(self, twin: Twin, session: Session, what: str) -> None:
        batch = next(
            iter(self.splits.calibrate.take(max(4, self.session.fixed_batch or 1)).batches(self.batch_size))
        )
        with torch.no_grad():
            ours = twin(to_tensors(batch.inputs, twin))
        theirs = run_outputs(session, [batch], batch_size=self.batch_size)
        for name in self.scales:
            expected = theirs[name].astype(np.float64)
            error = float(np.abs(ours[name].cpu().numpy() - expected).max())
            allowed = TWIN_TOLERANCE.get(theirs[name].dtype, 5e-2) * max(float(np.abs(expected).max()), 1e-6)
            if not error <= allowed:
                raise ModelError(
                    f"{what} differs from onnxruntime by {error:.3g} in output '{name}', so the model "
                    "cannot be compressed safely; please report it with the model"
                )

    # --- the job ---

    def run(self) -> reports.CompressReport:
        config = self.config
        if not self.prepared.coupling.groups and (
            config.method == "prune" or not find_implant_layers(self.prepared)
        ):
            raise BudgetError(
                "no channel of the model can be removed: "
                + "; ".join(f"'{entry.node}': {entry.reason}" for entry in self.prepared.coupling.frozen[:3])
            )
        with self.stage("sensitivity"):
            self.losses = build_loss_model(
                self.prepared,
                self.splits.calibrate,
                sensitivity=config.ranking,
                scales=self.scales,
                batch_size=self.batch_size,
                n_probes=config.probes,
                seed=config.seed,
                with_implants=config.method != "prune",
                on_event=self.on_event,
            )
        self.setting = self._setting()
        candidate = self._compress_to(self._budgets()) if config.has_budget else self._search()
        return self._finish(candidate)

    def _budgets(self) -> dict[str, float | None]:
        """Absolute limits; ``--max-bytes`` is about parameters, whose bytes all but make up a file."""
        config, prepared = self.config, self.prepared
        n_macs = self.losses.cost.macs(self.losses.cost.sizes)
        limits = []
        if config.keep_params is not None:
            limits.append(config.keep_params * prepared.n_params)
        if config.max_bytes is not None:
            constants = [t for t in prepared.graph.tensors().values() if isinstance(t, gs.Constant)]
            weights = [t.values for t in constants if is_float_type(t.values.dtype)]
            n_weight_bytes = sum(values.nbytes for values in weights)
            per_param = n_weight_bytes / max(sum(values.size for values in weights), 1)
            whole = self._to_proto(Compressed(Choice(self._whole()), prepared.graph))
            rest = (
                count_saved_bytes(whole, self.output, external_data=self.source.external_data)
                - n_weight_bytes
            )
            rest += SPARE_BYTES + (ALIGNMENT * len(weights) if self.source.external_data else 0)
            limits.append((config.max_bytes - rest) / per_param)
            if limits[-1] <= 0:
                raise BudgetError(
                    f"--max-bytes {config.max_bytes} cannot be reached: {int(rest)} bytes are needed "
                    "apart from weights"
                )
        return {
            "params": min(limits) if limits else None,
            "macs": None if config.keep_macs is None else config.keep_macs * n_macs,
        }

    def _whole(self) -> tuple[GroupDecision, ...]:
        return tuple(
            GroupDecision.from_keep(group.name, group.size, range(group.size))
            for group in self.prepared.coupling.groups
        )

    def _kinds(self) -> dict[str, tuple[str, ...]]:
        """Which implants each layer may become: with the speed gate on, only those that are faster there."""
        if self.config.method == "prune":
            return {}
        offered = {
            name: tuple(form.kind for form in losses.layer.forms)
            for name, losses in self.losses.implants.items()
        }
        if self.config.allow_slower:
            return offered
        with self.stage("implant speed"):
            return faster_kinds(self.prepared, offered, lambda model: _session(model, self.config))

    @property
    def _only_sketch(self) -> bool:
        """A dry run ends with the plan, but a plan that is saved holds all that the real run would do."""
        return self.config.dry_run and self.config.save_plan is None

    def _setting(self) -> Setting:
        config = self.config

        def time_it(candidate: Compressed) -> LatencyComparison:
            return self._time(_session(self._to_proto(candidate), config))

        return Setting(
            prepared=self.prepared,
            losses=self.losses,
            method=config.method,
            preset=config.preset,
            kinds=self._kinds(),
            calibrate=self.splits.calibrate,
            choose=self.splits.choose,
            scales=self.scales,
            batch_size=self.batch_size,
            seed=config.seed,
            align=config.align,
            recover=config.recover,
            work_dir=config.work_dir,
            device=_device(config.device),
            time=None if config.allow_slower else time_it,
            on_event=self.on_event,
        )

    def _compress_to(self, budgets: Mapping[str, float | None]) -> Compressed:
        with self.stage("compress"):
            return sketch(self.setting, budgets) if self._only_sketch else compress_to(self.setting, budgets)

    def _search(self) -> Compressed:
        """Find the smallest model whose drop on the choose part, plus a margin, is within the limit."""
        limit = self.config.drop_limit
        assert limit is not None
        choose, cost = self.splits.choose, self.losses.cost
        full = {"params": float(self.prepared.n_params), "macs": float(cost.macs(cost.sizes))}
        reference = run_outputs(self.session, choose, batch_size=self.batch_size)
        best: Compressed | None = None
        refused: Compressed | None = None
        low, high = 0, len(SEARCH_RATIOS)  # ratios before `low` are accepted, from `high` on refused
        while low < high:
            middle = (low + high) // 2
            ratio = SEARCH_RATIOS[middle]
            try:
                candidate = self._compress_to({name: ratio * size for name, size in full.items()})
            except BudgetError:
                high = middle
                continue
            outputs = run_outputs(
                _session(self._to_proto(candidate), self.config), choose, batch_size=self.batch_size
            )
            quality = self.metric.measure(reference, outputs, choose.labels)
            spread = (
                0.0 if quality.interval is None else (quality.interval[1] - quality.interval[0]) / (2 * 1.96)
            )
            accepted = quality.drop + SEARCH_MARGIN * spread <= limit
            self.note(
                f"at {ratio:.0%} of the size: {self.metric.name} drops by {quality.drop:.4f} "
                f"(+-{spread:.4f}), {'accepted' if accepted else 'refused'}"
            )
            if accepted:
                best, low = candidate, middle + 1
            else:
                refused, high = candidate, middle
        if best is None:
            error = BudgetError(
                f"no smaller model was found that loses at most {limit:g} of {self.metric.name} beyond doubt "
                f"on {choose.n_samples} samples; allow more with --max-drop, or give more data"
            )
            if refused is not None:
                proto = self._to_proto(refused)
                self._refuse(error, proto, self._report(refused, proto))
            raise error
        return best

    # --- the result ---

    def _layer_notes(self, candidate: Compressed) -> dict[str, str]:
        return explain_layers(self.prepared, self.losses, candidate.choice, self.setting.kinds)

    def _to_proto(self, candidate: Compressed, *, plan: CompressionPlan | None = None) -> ModelProto:
        return _write_proto(candidate.finished(), self.source, plan)

    def _time(self, session: Session) -> LatencyComparison:
        with self.stage("latency"):
            inputs = next(iter(self.splits.calibrate.batches(self.session.fixed_batch or 1))).inputs
            return measure_latency(
                self.session, session, latency_feed(self.session, inputs), seconds=LATENCY_SECONDS
            )

    def _finish(self, candidate: Compressed) -> reports.CompressReport:
        config = self.config
        plan = CompressionPlan(
            model_sha256=self.source.sha256,
            version=hap_onnx.__version__,
            config=plan_words(config, self.prepared),
            decisions=candidate.choice.decisions,
            replacements=candidate.choice.replacements,
            predicted_loss=predicted_losses(self.losses, candidate.choice.decisions),
            weights=candidate.plan_weights(),
            notes=explain_groups(self.losses, candidate.choice),
            layer_notes=self._layer_notes(candidate),
        )
        proto = self._to_proto(candidate, plan=plan)
        if config.dry_run:
            report = self._report(candidate, proto)
            self._save_side_files(plan, report)
            return report
        with self.stage("validate"):
            remark = check_model(proto, reference=self.source.proto)
            if remark:
                self.note(remark, kind="warning")
            session = _session(proto, config)
            part = self.splits.report
            before = run_outputs(self.session, part, batch_size=self.batch_size)
            after = run_outputs(session, part, batch_size=self.batch_size)
            check_finite(after, label="the compressed model")
            self._check_result(candidate, session)
            measured = self._metric_for(before, part).measure(before, after, part.labels)
            quality = judge_quality(measured, config.drop_limit)
            fidelity = compare_outputs(before, after)
        timing = self._time(session)
        report = self._report(candidate, proto, quality=quality, fidelity=fidelity, timing=timing)
        self._gate(report, proto, timing)
        with self.stage("write"):
            save_model(
                proto,
                self.output,
                external_data=self.source.external_data,
                check=lambda path: _loads(path, config),
            )
        report = replace(report, output=str(self.output), seconds=dict(self.seconds))
        self._save_side_files(plan, report)
        if config.drop_limit is None and quality.drop > LARGE_DROP:
            self.note(
                f"{quality.metric} fell by {quality.drop:.4f}: keep more, or give --max-drop "
                "to refuse such results",
                kind="warning",
            )
        return report

    def _metric_for(self, outputs: Outputs, part: Subset) -> Metric:
        """The metric of the report part: ``--val`` may have labels where the data has none."""
        return choose_metric(self.config.metric, outputs=outputs, labels=part.labels)

    def _gate(self, report: reports.CompressReport, proto: ModelProto, timing: LatencyComparison) -> None:
        """Raise unless all that was asked for is met; keep the rejected model if asked to."""
        config, quality = self.config, report.quality
        failures: list[TargetError] = []
        for name, asked in report.budget.asked.items():
            reached = report.budget.reached[name]
            if reached > asked * (1 + 1e-9):
                failures.append(
                    BudgetError(f"{flag_of(name)} {asked:g} is not reached: the result has {reached:g}")
                )
        if quality is not None and not quality.passed:
            failures.append(
                GateError(
                    f"{quality.metric} drops by {quality.drop:.4f} on {quality.n_samples} held-out samples, "
                    f"more than --max-drop {quality.max_drop:g}; keep more, or allow a larger drop"
                )
            )
        if timing.is_slower and not config.allow_slower:
            failures.append(
                GateError(
                    f"the result is slower than the original in onnxruntime: {timing.after_ms:.3g} ms "
                    f"against {timing.before_ms:.3g} ms; keep less, or pass --allow-slower"
                )
            )
        if not failures:
            return
        self._refuse(failures[0], proto, report)
        raise failures[0]

    def _refuse(self, error: TargetError, proto: ModelProto, report: reports.CompressReport) -> None:
        """Attach the numbers to a refusal, and keep what was refused if asked to."""
        config = self.config
        if config.keep_rejected and not config.dry_run:
            save_model(proto, rejected_path(self.output), external_data=self.source.external_data)
        error.report = replace(report, output=None)
        if config.report is not None:
            write_report(config.report, error.report)

    def _report(
        self,
        candidate: Compressed,
        proto: ModelProto,
        *,
        quality: reports.Quality | None = None,
        fidelity: reports.Fidelity | None = None,
        timing: LatencyComparison | None = None,
    ) -> reports.CompressReport:
        prepared, config = self.prepared, self.config
        before = facts_before(prepared)
        n_bytes = count_saved_bytes(proto, self.output, external_data=self.source.external_data)
        after = facts_after(candidate.finished(), prepared, n_bytes=n_bytes)
        if timing is not None and quality is not None:
            before = replace(before, latency_ms=timing.before_ms, metric=quality.before)
            after = replace(after, latency_ms=timing.after_ms, metric=quality.after)
        asked = {
            name: value
            for name in ("keep_params", "keep_macs", "max_bytes")
            if (value := getattr(config, name)) is not None
        }
        return reports.CompressReport(
            model=self.label,
            output=None,
            before=before,
            after=after,
            quality=quality,
            fidelity=fidelity,
            plan=plan_summary(
                prepared,
                candidate.choice,
                notes=explain_groups(self.losses, candidate.choice),
                layer_notes=self._layer_notes(candidate),
            ),
            frozen=frozen_nodes(prepared),
            budget=reports.Budget(asked=asked, reached=reached_budgets(before, after)),
            seconds=dict(self.seconds),
            seed=config.seed,
            versions=installed_versions(),
        )

    def _save_side_files(self, plan: CompressionPlan, report: reports.CompressReport) -> None:
        if self.config.save_plan is not None:
            save_plan(plan, self.config.save_plan)
        if self.config.report is not None:
            write_report(self.config.report, report)


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
    session = make_session(source.proto, providers="cpu")
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
    prepared = prepare(source, probe, exclude=words["exclude"], only=words["only"])
    report = inspect_report(
        str(model) if isinstance(model, (str, Path)) else "model in memory", prepared, words["align"]
    )
    if words["report"] is not None:
        write_report(words["report"], report)
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
    _protect_weights(source, files)
    saved = load_plan(plan)
    saved.check_model(source.sha256)
    session = make_session(source.proto, providers="cpu")
    words = saved.config
    sizes = {name: tuple(shape) for name, shape in dict(words.get("input_shapes", {})).items()}
    prepared = prepare(
        source,
        make_probe(session.inputs, sizes=sizes),
        exclude=tuple(words.get("exclude", ())),
        only=tuple(words.get("only", ())),
    )
    choice = Choice(saved.decisions_for(prepared.coupling), saved.replacements)
    candidate = from_plan_weights(prepared, choice, saved.weights)
    proto = _write_proto(candidate.finished(), source, saved)
    check_model(proto, reference=source.proto)
    save_model(proto, target, external_data=source.external_data, check=lambda path: _loads(path, None))
    before = facts_before(prepared)
    n_bytes = count_saved_bytes(proto, target, external_data=source.external_data)
    after = facts_after(candidate.finished(), prepared, n_bytes=n_bytes)
    result = reports.CompressReport(
        model=str(model) if isinstance(model, (str, Path)) else "model in memory",
        output=str(target),
        before=before,
        after=after,
        quality=None,
        fidelity=None,
        plan=plan_summary(prepared, choice, notes=saved.notes, layer_notes=saved.layer_notes),
        frozen=frozen_nodes(prepared),
        budget=reports.Budget(reached=reached_budgets(before, after)),
        seconds={"apply": time.perf_counter() - start},
        seed=int(words.get("seed", 0)),
        versions=installed_versions(),
    )
    if report is not None:
        write_report(Path(report), result)
    return result


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
        make_session(source.proto, providers=words["providers"] or "cpu", threads=words["threads"] or 1)
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
    feed = latency_feed(sessions[0], first)
    timing = measure_latency(sessions[0], sessions[1], feed, seconds=LATENCY_SECONDS)
    seconds["latency"] = time.perf_counter() - start - seconds["run"]
    facts = []
    for source, latency, value in zip(
        sources, (timing.before_ms, timing.after_ms), (quality.before, quality.after), strict=True
    ):
        graph = normalise(source)
        twin = build_twin(graph)
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
    )
    if words["report"] is not None:
        write_report(words["report"], report)
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


# ---------------------------------------------------------------- small parts


@contextmanager
def _threads(n_threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _protect_weights(source: SourceModel, outputs: Mapping[str, Path]) -> None:
    """Refuse outputs that would overwrite the files in which the model keeps its weights."""
    check_outputs(
        outputs, inputs={f"the model's weights '{file.name}'": file for file in source.weight_files}
    )


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValidationError(f"--work-dir {path} cannot be made: {error.strerror or error}") from error


def _refuse_chance(metric: Metric, outputs: Outputs, part: Subset) -> None:
    """Raise unless the original, which gave ``outputs``, is clearly better than guessing."""
    value = metric.reference_value(outputs, part.labels)
    check_chance_level(value, n_classes=metric.n_classes or 2, n_samples=part.n_samples)


def _whole_batches(part: Subset, unit: int) -> Subset:
    """Leave out the last samples of a part that do not fill a batch of a model with a fixed one."""
    if part.n_samples < unit:
        raise CalibrationError(
            f"the model takes batches of {unit} samples, and a part of the data has only {part.n_samples}; "
            f"give at least {unit * 5} samples"
        )
    return part.take(part.n_samples // unit * unit)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here")
    return name


def _session(model: ModelProto, config: CompressConfig) -> Session:
    """Load a model as its latency is measured: one thread unless told otherwise."""
    return make_session(model, providers=config.providers or "cpu", threads=config.threads or 1)


def _batch_size(wanted: int, session: Session) -> int:
    """Batches of a model that was exported for k samples hold multiples of k."""
    unit = session.fixed_batch or 1
    return max(1, wanted // unit) * unit


def _open(data: Any, inputs: Sequence[Any], config: CompressConfig, note: Any) -> Dataset:
    dataset = open_dataset(
        data,
        inputs,
        preprocess=config.preprocess,
        max_samples=config.max_samples,
        seed=config.seed,
        work_dir=config.work_dir,
    )
    for text in (dataset.preprocessing, *dataset.notes):
        if text:
            note(text)
    return dataset


def _write_proto(graph: gs.Graph, source: SourceModel, plan: CompressionPlan | None) -> ModelProto:
    entry = {"version": hap_onnx.__version__, "plan": plan_hash(plan)} if plan is not None else None
    return to_proto(
        graph, source, metadata=None if entry is None else {"hap_onnx": json.dumps(entry, sort_keys=True)}
    )


def _loads(path: Path, config: CompressConfig | None) -> None:
    """Refuse to rename a file that onnxruntime cannot load."""
    try:
        make_session(path, providers=(config.providers if config else None) or "cpu", threads=1)
    except ModelError as error:
        raise ValidationError(f"the written model does not load: {error}") from error
