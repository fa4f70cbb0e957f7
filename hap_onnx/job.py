"""One run of ``compress``: its stages in order, the gates at its end, the report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto

import hap_onnx
from hap_onnx import report as reports
from hap_onnx.calibration import Splits, Subset, split_dataset
from hap_onnx.candidates import Setting, all_kinds, compress_to, sketch
from hap_onnx.carry_out import Compressed
from hap_onnx.choose import predicted_losses
from hap_onnx.config import (
    CompressConfig,
    files_of,
    flag_of,
    rejected_path,
)
from hap_onnx.curvature import output_scales, to_tensors
from hap_onnx.decide import build_loss_model
from hap_onnx.errors import (
    BudgetError,
    CalibrationError,
    GateError,
    ModelError,
    TargetError,
)
from hap_onnx.events import Event, OnEvent
from hap_onnx.implant_loss import find_implant_layers
from hap_onnx.implant_speed import faster_kinds
from hap_onnx.machine import (
    check_loads,
    compare_speed,
    make_folder,
    open_data,
    open_session,
    pick_device,
    protect_weights,
    whole_batch_size,
    whole_batches,
    write_proto,
)
from hap_onnx.metrics import Metric, Quality, check_chance_level, choose_metric
from hap_onnx.model_io import load_model, save_model
from hap_onnx.plan import CompressionPlan, save_plan
from hap_onnx.prepare import prepare
from hap_onnx.saving import count_saved_bytes
from hap_onnx.summary import (
    explain_groups,
    explain_layers,
    facts_after,
    facts_before,
    frozen_nodes,
    installed_versions,
    judge_quality,
    measured_losses,
    plan_summary,
    plan_words,
    reached_budgets,
    write_report,
)
from hap_onnx.targets import SPARE_BYTES, params_within, search_smallest, whole_choice
from hap_onnx.twin import Twin, build_twin
from hap_onnx.validate import (
    LatencyComparison,
    Session,
    check_finite,
    check_model,
    compare_outputs,
    run_outputs,
)

_log = logging.getLogger(__name__)

LARGE_DROP = 0.02
MAX_RESIZES = 3
TWIN_TOLERANCE = {np.dtype(np.float32): 1e-3, np.dtype(np.float64): 1e-3}

Outputs = Mapping[str, np.ndarray]


class Job:
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
            protect_weights(self.source, files_of(config, output=output))
            if config.work_dir is not None:
                make_folder(config.work_dir)
            self.session = open_session(self.source.proto, config)
            self.splits = self._open_data(data)
            self.batch_size = whole_batch_size(config.batch_size, self.session)
        with self.stage("prepare"):
            self._check_original()
            probe = next(iter(self.splits.calibrate.batches(max(2, self.session.fixed_batch or 2)))).inputs
            self.prepared = prepare(
                self.source,
                probe,
                exclude=config.exclude,
                only=config.only,
                device=pick_device(config.device),
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
        dataset = open_data(data, inputs, config, self.note)
        val = None
        if config.val is not None:
            val = open_data(config.val, inputs, replace(config, max_samples=None), self.note)
        splits = split_dataset(dataset, seed=config.seed, val=val)
        unit = self.session.fixed_batch or 1
        return replace(
            splits,
            calibrate=whole_batches(splits.calibrate, unit),
            choose=whole_batches(splits.choose, unit),
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
        twin = build_twin(candidate.finished(), device=pick_device(self.config.device))
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
        if config.max_bytes is not None:
            candidate = self._compress_within(config.max_bytes, self._budgets())
        elif config.has_budget:
            candidate = self._compress_to(self._budgets())
        else:
            candidate = self._search()
        return self._finish(candidate)

    def _budgets(self) -> dict[str, float | None]:
        config, prepared = self.config, self.prepared
        largest = None
        if config.max_bytes is not None:
            proto = self._to_proto(Compressed(whole_choice(prepared), prepared.graph))
            n_bytes = self._count_bytes(proto)
            largest = params_within(
                config.max_bytes, prepared, n_bytes, external_data=self.source.external_data
            )
        by_ratio = None if config.keep_params is None else config.keep_params * prepared.n_params
        limits = [limit for limit in (by_ratio, largest) if limit is not None]
        n_macs = self.losses.cost.macs(self.losses.cost.sizes)
        return {
            "params": min(limits, default=None),
            "macs": None if config.keep_macs is None else config.keep_macs * n_macs,
        }

    def _kinds(self) -> dict[str, dict[str, float]]:
        """Which implants each layer may become: with the speed gate on, only those that are faster there."""
        config = self.config
        if config.method == "prune":
            return {}
        offered = all_kinds(self.losses)
        if config.allow_slower or config.preset is not None:  # a preset is taken as it is; the gate decides
            return offered
        with self.stage("implant speed"):
            found = faster_kinds(self.prepared, offered, lambda model: open_session(model, config))
        n_without = sum(not kinds for kinds in found.values())
        if n_without:
            self.note(
                f"{n_without} of {len(found)} layers get no implant, since none saves enough time here "
                "(--allow-slower lets them)"
            )
        if config.method == "implant" and not any(found.values()):
            raise BudgetError(
                "no implant of any layer saves time in onnxruntime here; let channels go, too, with "
                "--method hap, or pass --allow-slower"
            )
        return found

    @property
    def _only_sketch(self) -> bool:
        """A dry run ends with the plan, but a plan that is saved holds all that the real run would do."""
        return self.config.dry_run and self.config.save_plan is None

    def _setting(self) -> Setting:
        config = self.config

        def time_it(candidate: Compressed) -> LatencyComparison:
            return self._time(open_session(self._to_proto(candidate), config))

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
            device=pick_device(config.device),
            time=None if config.allow_slower else time_it,
            on_event=self.on_event,
        )

    def _compress_to(self, budgets: Mapping[str, float | None]) -> Compressed:
        with self.stage("compress"):
            return sketch(self.setting, budgets) if self._only_sketch else compress_to(self.setting, budgets)

    def _compress_within(self, max_bytes: int, budgets: dict[str, float | None]) -> Compressed:
        """Compress to a file size: implants add nodes and names, so plan with what is left after those.

        Plans alone are quick and come first; the best candidate may have more nodes than the first plan.
        """

        def plan(budgets: Mapping[str, float | None]) -> Compressed:
            with self.stage("compress"):
                return sketch(self.setting, budgets)

        for compress in (plan, self._compress_to):
            for _ in range(MAX_RESIZES):
                candidate = compress(budgets)
                excess = self._count_bytes(self._to_proto(candidate)) + SPARE_BYTES - max_bytes
                if excess <= 0:
                    break
                # At least one byte per parameter, so this is never too little.
                budgets = {**budgets, "params": max((budgets["params"] or 0.0) - excess, 1.0)}
        return candidate

    def _count_bytes(self, proto: ModelProto) -> int:
        return count_saved_bytes(proto, self.output, external_data=self.source.external_data)

    def _search(self) -> Compressed:
        """Find the smallest model whose drop on the choose part, plus a margin, is within the limit."""
        limit, part, cost = self.config.drop_limit, self.splits.choose, self.losses.cost
        assert limit is not None
        full = {"params": float(self.prepared.n_params), "macs": float(cost.macs(cost.sizes))}
        reference = run_outputs(self.session, part, batch_size=self.batch_size)

        def measure(candidate: Compressed) -> Quality:
            session = open_session(self._to_proto(candidate), self.config)
            return self.metric.measure(
                reference, run_outputs(session, part, batch_size=self.batch_size), part.labels
            )

        found = search_smallest(full, self._compress_to, measure, limit=limit, note=self.note)
        if found.accepted is not None:
            return found.accepted
        error = BudgetError(
            f"no smaller model was found that loses at most {limit:g} of {self.metric.name} beyond doubt "
            f"on {part.n_samples} samples; allow more with --max-drop, or give more data"
        )
        if found.refused is not None:
            proto = self._to_proto(found.refused)
            self._refuse(error, proto, self._report(found.refused, proto))
        raise error

    # --- the result ---

    def _layer_notes(self, candidate: Compressed) -> dict[str, str]:
        return explain_layers(
            self.prepared,
            self.losses,
            candidate.choice,
            self.setting.kinds,
            left={node.name for node in candidate.graph.nodes},
            method=self.config.method,
            preset=self.config.preset,
        )

    def _to_proto(self, candidate: Compressed, *, plan: CompressionPlan | None = None) -> ModelProto:
        return write_proto(candidate.finished(), self.source, plan)

    def _time(self, session: Session) -> LatencyComparison:
        with self.stage("latency"):
            inputs = next(iter(self.splits.calibrate.batches(self.session.fixed_batch or 1))).inputs
            return compare_speed(self.session, session, inputs)

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
            notes=explain_groups(
                self.losses, candidate.choice, method=self.config.method, preset=self.config.preset
            ),
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
            session = open_session(proto, config)
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
                check=lambda path: check_loads(path, config),
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
        n_bytes = self._count_bytes(proto)
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
                notes=explain_groups(
                    self.losses, candidate.choice, method=self.config.method, preset=self.config.preset
                ),
                layer_notes=self._layer_notes(candidate),
                measured=measured_losses(self.losses, candidate.choice),
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


def _refuse_chance(metric: Metric, outputs: Outputs, part: Subset) -> None:
    """Raise unless the original, which gave ``outputs``, is clearly better than guessing."""
    value = metric.reference_value(outputs, part.labels)
    check_chance_level(value, n_classes=metric.n_classes or 2, n_samples=part.n_samples)
