"""One run of ``compress``: its stages in order, the gates at its end, the report."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto

from hap_onnx import report as reports
from hap_onnx.config import BUDGETS, CompressConfig, files_of, flag_of, rejected_path
from hap_onnx.data.calibration import Splits, Subset, split_dataset
from hap_onnx.distributed import ALONE, Team
from hap_onnx.errors import BudgetError, CalibrationError, GateError, ModelError, TargetError
from hap_onnx.events import Event, OnEvent, ignore_event
from hap_onnx.implants.loss import find_implant_layers
from hap_onnx.jobs import hand_off
from hap_onnx.jobs.analysis import analyse, objective_of, size_point, with_plan
from hap_onnx.jobs.candidates import LATENCY_TOLERANCE, Budgets
from hap_onnx.jobs.carry_out import Compressed
from hap_onnx.jobs.machine import (
    Stopwatch,
    check_loads,
    compare_speed,
    open_data,
    open_session,
    open_times,
    pick_device,
    protect_weights,
    whole_batch_size,
    whole_batches,
    write_proto,
)
from hap_onnx.jobs.rounds import Candidate, Round, Workshop
from hap_onnx.jobs.self_check import (
    SELF_CHECK_SAMPLES,
    Result,
    check_result,
    run_both,
)
from hap_onnx.jobs.targets import SPARE_BYTES, check_can_search, params_within, search_smallest
from hap_onnx.jobs.work_folder import Keys, WorkFolder, work_keys
from hap_onnx.jobs.worst import draw_worst, find_worst
from hap_onnx.model.model_io import load_model, save_model
from hap_onnx.model.saving import count_saved_bytes, make_folder
from hap_onnx.model.temporary import remove_all_leftovers
from hap_onnx.model.weights import AnyModel
from hap_onnx.planning.plan import CompressionPlan, save_plan
from hap_onnx.planning.times import NodeTimes
from hap_onnx.prepare import PreparedModel, prepare
from hap_onnx.quantize import BYTES_PER_PARAM, check_model_for, preview, upgrade_note
from hap_onnx.report.advice import LARGE_DROP
from hap_onnx.report.analysis import Analysis, WorstSample
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
from hap_onnx.runtime.latency import LatencyComparison, latency_feed
from hap_onnx.runtime.metrics import Metric, Quality, check_chance_level, choose_metric, compare_outputs
from hap_onnx.runtime.session import Session, run_outputs
from hap_onnx.runtime.soundness import check_finite, check_model
from hap_onnx.sensitivity.curvature import output_scales
from hap_onnx.timing.measure import measure_times
from hap_onnx.twin import Twin

_log = logging.getLogger(__name__)

MAX_RESIZES = 3

Outputs = Mapping[str, np.ndarray]


class Job:
    """One run of compress: what its stages share, and how long each took."""

    def __init__(
        self,
        model: str | Path | ModelProto,
        data: Any,
        config: CompressConfig,
        output: Path | None,
        on_event: OnEvent,
        team: Team = ALONE,
    ) -> None:
        """Open the model and the data; ``output`` is None where no model is to be written."""
        self.config, self._output, self.team = config, output, team
        self._data = data if isinstance(data, (str, Path)) else None  # what a page calls it
        self.warnings: list[str] = []  # what readers of a summary should know, too

        def tell(event: Event) -> None:
            if event.kind == "warning":
                self.warnings.append(event.message)
            on_event(event)

        self.on_event = tell if team.leads else ignore_event
        self.clock = Stopwatch()
        self.label = str(model) if isinstance(model, (str, Path)) else "model in memory"
        with self.clock.stage("load"):
            self.source = load_model(model)
            if config.then is not None:
                check_model_for(config.then, self.source.proto)
            protect_weights(self.source, files_of(config, output=output))
            if config.work_dir is not None:
                make_folder(config.work_dir)
                remove_all_leftovers(config.work_dir)
            self.session = open_session(self.source.model, config)
            self.splits = self._open_data(data)
            self.batch_size = whole_batch_size(config.batch_size, self.session)
        with self.clock.stage("prepare"):
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
        self._check_team(probe)
        keys = Keys("", "")  # without a work folder nothing is kept
        if config.work_dir is not None:
            threads = torch.get_num_threads()
            keys = team.lead(
                lambda: work_keys(
                    config, self.splits, self.source.sha256, installed_versions(), threads=threads
                )
            )
        self.shop = Workshop(
            config=config,
            splits=self.splits,
            scales=self.scales,
            scores=self.scores,
            batch_size=self.batch_size,
            time=self._time,
            time_nodes=self._time_nodes,
            work=WorkFolder(config.work_dir, keys.job, keys.losses),
            clock=self.clock,
            team=team,
            on_event=self.on_event,
        )
        self.times = open_times(config, self.session, self.shop.work.latency_table())
        self.rounds = [Round(self.shop, self.prepared)]
        self._outputs_before = cache(self._run_original)  # copies of the job share what it has found

    def at(self, config: CompressConfig) -> Job:
        """The same job with other budgets: it shares the data, the original, sensitivities and the clock."""
        other = copy(self)
        other.config, other._output = config, config.output or self._output
        other.shop = replace(self.shop, config=config, time=other._time, time_nodes=other._time_nodes)
        other.rounds = [self.rounds[0].at(other.shop)]
        return other

    @property
    def output(self) -> Path:
        """Where the result goes."""
        assert self._output is not None, "a job without an output writes no model"
        return self._output

    def note(self, text: str, *, kind: str = "note") -> None:
        self.on_event(Event("compress", "warning" if kind == "warning" else "note", text))

    def commit(self) -> None:
        """Say that results get their names from now on."""
        self.on_event(Event("write", "commit"))

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
        self.scores = self._find_scores(outputs, first.labels)
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

    def _find_scores(self, outputs: Outputs, labels: np.ndarray | None) -> str | None:
        """The output that holds class scores, whatever the metric is: training knows what to do with them."""
        if self.metric.output is not None or self.config.metric == "auto":
            return self.metric.output
        try:
            return choose_metric("auto", outputs=outputs, labels=labels).output
        except CalibrationError:  # the labels are of another kind
            return None

    def _check_twin(self) -> None:
        """Refuse a twin that does not equal onnxruntime on the data."""
        twin = self.prepared.twin
        self._check_same(twin, self.session, "the torch twin of the model", self.source.model)
        if twin.opaque_nodes:
            self.note(f"{len(twin.opaque_nodes)} nodes run in onnxruntime only and stay as they are")

    def _check_team(self, probe: Mapping[str, np.ndarray]) -> None:
        """Refuse processes that have another model or other data than the first."""
        digest = hashlib.sha256(repr((self.source.sha256, self.splits.sizes)).encode())
        for _, array in sorted(probe.items()):
            digest.update(np.ascontiguousarray(array).tobytes())
        found = self.team.gather(digest.hexdigest())
        others = [rank for rank, one in enumerate(found) if one != found[0]]
        if others:
            raise CalibrationError(
                f"rank {others[0]} of {self.team.size} has another model or other data than rank 0: give all "
                "processes the same"
            )

    def _check_result(self, model: AnyModel, candidate: Candidate, plan: CompressionPlan) -> None:
        """Refuse a model that is not sound, or not what its plan says."""
        n_samples = max(SELF_CHECK_SAMPLES, self.session.fixed_batch or 1)
        result = Result(
            model,
            candidate.compressed.finished(),
            plan,
            [one.prepared for one in self.rounds],
            next(iter(self.splits.calibrate.batches(n_samples))).inputs,
            outputs=tuple(self.scales),
        )
        remark = check_result(
            result,
            self.session,
            lambda one: open_session(one, self.config),
            work_dir=self.config.work_dir,
        )
        if remark:
            self.note(remark, kind="warning")

    def _check_same(self, twin: Twin, session: Session, what: str, model: AnyModel) -> None:
        batch = next(
            iter(self.splits.calibrate.take(max(4, self.session.fixed_batch or 1)).batches(self.batch_size))
        )
        both = run_both(
            twin,
            session,
            batch.inputs,
            model,
            lambda one: run_outputs(one, [batch], batch_size=self.batch_size),
        )
        for name, ours, theirs, allowed in both:
            if name not in self.scales:
                continue
            found, expected = ours.cpu().numpy(), theirs.astype(np.float64)
            if found.size != expected.size:
                raise ModelError(
                    f"output '{name}' has the shape {list(found.shape)} for several samples at once, but "
                    f"{list(expected.shape)} sample by sample: the first axis must be the batch throughout"
                )
            error = float(np.abs(found.reshape(expected.shape) - expected).max())
            if not error <= allowed:
                raise ModelError(
                    f"{what} differs from onnxruntime by {error:.3g} in output '{name}', so the model "
                    "cannot be compressed safely; please report it with the model"
                )

    # --- the job ---

    def run(self) -> reports.CompressReport:
        self.check_can_shrink()
        with self.lock():
            found = self._make()
            self._plan_for_page()
        return self.team.finish(lambda: self._finish(found))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs of the same job out of the work folder; see ``WorkFolder.lock``."""
        with ExitStack() as stack:
            self.team.lead(lambda: stack.enter_context(self.shop.work.lock()))
            yield

    def analyze(self) -> reports.AnalyzeReport:
        """Find sensitivities, and plan for a family of budgets; nothing is cut."""
        with self.lock():
            analysis = self._analysis
        return self.team.finish(lambda: self._write_analysis(analysis))

    def _write_analysis(self, analysis: Analysis) -> reports.AnalyzeReport:
        report = reports.AnalyzeReport(
            model=self.label,
            size=facts_before(self.prepared),
            analysis=analysis,
            frozen=frozen_nodes(self.prepared),
            seconds=dict(self.clock.seconds),
            seed=self.config.seed,
            versions=installed_versions(),
        )
        self.commit()
        self.write_reports(report)
        return report

    @cached_property
    def _analysis(self) -> Analysis:
        """What is known before a plan is made; a later round starts from another model."""
        setting = self.rounds[0].setting
        with self.clock.stage("analysis"):
            return analyse(setting, objective=objective_of(self.config))

    def _plan_for_page(self) -> None:
        """Find what a page tells of sensitivities while all processes are there: they plan together."""
        if self.config.html is not None:
            _ = self._analysis

    def _explained(self, candidate: Candidate, plan: reports.PlanSummary) -> Analysis:
        """The analysis with what a candidate has made of it.

        Losses of several rounds do not add up, since each is a distance to what the round started from: then
        the plan is no point among the sizes.
        """
        chosen = None
        if len(self.rounds) == 1:
            objective = objective_of(self.config)
            asked = getattr(self.config, f"keep_{objective}")
            chosen = size_point(self.rounds[0].setting, candidate.compressed.choice, asked or 1.0)
            if asked is None:  # searched for, or from another budget
                chosen = replace(chosen, asked=getattr(chosen, f"{objective}_ratio"))
        return with_plan(self._analysis, plan, chosen)

    def try_out(self) -> tuple[CompressionPlan, reports.CompressReport, TargetError | None]:
        """Make the model and measure it as if it were to be written.

        Returns its plan, its report, and why ``run`` would refuse it, if it would. Raises BudgetError if
        there is no such model.
        """
        candidate = self._make()
        return self.team.lead(lambda: self._try_out(candidate))

    def _try_out(
        self, candidate: Candidate
    ) -> tuple[CompressionPlan, reports.CompressReport, TargetError | None]:
        plan, compressed, proto = self._build(candidate)
        report, gated = self._measure(candidate, plan, compressed, proto)
        try:
            self._gate(report, proto, gated)
        except TargetError as refusal:
            return plan, report, refusal
        return plan, report, None

    def _make(self) -> Candidate:
        return self._compress_in_rounds(self._budgets()) if self.config.has_budget else self._search()

    def check_can_shrink(self) -> None:
        """Raise BudgetError if there is nothing to remove and nothing to replace."""
        config = self.config
        if not self.prepared.coupling.groups and (
            config.method == "prune" or not find_implant_layers(self.prepared)
        ):
            reasons = [f"'{entry.node}': {entry.reason}" for entry in self.prepared.coupling.frozen[:3]]
            raise BudgetError(
                f"no channel of the model can be removed: {'; '.join(reasons) or 'no layer has weights'}"
            )

    def _budgets(self) -> dict[str, float | None]:
        config, prepared = self.config, self.prepared
        largest = None
        if config.max_bytes is not None:
            proto = write_proto(prepared.graph, self.source, None)
            n_bytes = self._count_bytes(self._preview(proto))
            largest = params_within(
                config.max_bytes,
                prepared,
                n_bytes,
                external_data=self.source.external_data,
                per_param=BYTES_PER_PARAM.get(config.then or ""),
            )
        by_ratio = None if config.keep_params is None else config.keep_params * prepared.n_params
        limits = [limit for limit in (by_ratio, largest) if limit is not None]
        n_macs = self.rounds[0].sizes()["macs"]
        return {
            "params": min(limits, default=None),
            "macs": None if config.keep_macs is None else config.keep_macs * n_macs,
            "latency": config.keep_latency,
        }

    @property
    def _only_sketch(self) -> bool:
        """A dry run ends with the plan, but a plan that is saved holds all that the real run would do."""
        return self.config.dry_run and self.config.save_plan is None

    def _compress_in_rounds(self, budgets: dict[str, float | None]) -> Candidate:
        """Approach the budgets in equal ratios, each round starting from the result of the one before."""
        n_rounds, full = self.config.rounds, self.rounds[0].sizes()
        for done in range(1, n_rounds):
            share = done / n_rounds
            now = {
                name: None if limit is None else full[name] ** (1 - share) * limit**share
                for name, limit in budgets.items()
            }
            candidate = self._repair_in_round(done, now)
            self.note(f"round {done} of {n_rounds} is done")
            self.rounds.append(self._next_round(candidate))
        if self.config.max_bytes is not None:
            budgets = self._fit_bytes(self.config.max_bytes, budgets)
        return self._repair_in_round(n_rounds, budgets)

    def _repair_in_round(self, number: int, budgets: Budgets) -> Candidate:
        """Say of a budget that cannot be reached in which round that was: each has a model of its own."""
        try:
            return self._repair(budgets)
        except BudgetError as error:
            if number == 1:
                raise
            raise BudgetError(
                f"round {number} of {self.config.rounds} cannot go on, by fractions of what the round before "
                f"has left: {error}; or take fewer --rounds"
            ) from error

    def _next_round(self, candidate: Candidate) -> Round:
        source = load_model(self._to_proto(candidate))
        prepared = prepare(
            source,
            self.prepared.probe,
            exclude=self.config.exclude,
            only=self.config.only,
            must_match=False,  # what a pattern named may be gone
            implants_stay=True,  # of an implant only the rank shrinks from round to round
            device=pick_device(self.config.device),
        )
        plan = candidate.plan
        earlier = (*plan.earlier, replace(plan, earlier=()))
        return Round(self.shop, prepared, earlier, self.rounds[-1].moved_by(candidate))

    def _repair(self, budgets: Budgets) -> Candidate:
        """Compress to budgets in the round that is on, refit and train, as far as was asked for."""
        here = self.rounds[-1]
        if self._only_sketch:
            return here.sketch(budgets)
        candidate = here.compress_to(budgets)
        return (
            here.train(candidate, budgets, self.prepared) if self.config.recover == "distill" else candidate
        )

    def _fit_bytes(self, max_bytes: int, budgets: dict[str, float | None]) -> dict[str, float | None]:
        """Lower the budget of parameters until the file is small enough: implants add nodes and names.

        Plans alone are quick and come first; the best candidate may have more nodes than the first plan.
        """
        here = self.rounds[-1]
        compress = [here.sketch] if self._only_sketch else [here.sketch, here.compress_to]
        for make in compress:
            for _ in range(MAX_RESIZES):
                proto = self._preview(self._to_proto(make(budgets)))
                excess = self._count_bytes(proto) + SPARE_BYTES - max_bytes
                if excess <= 0:
                    break
                # At least one byte per parameter, so this is too much rather than too little; what implants
                # add to a small file may be more than all its parameters, and goes with the implants.
                params = budgets["params"] or 0.0
                budgets = {**budgets, "params": max(params - excess, params / 2)}
        return budgets

    def _count_bytes(self, proto: AnyModel) -> int:
        return count_saved_bytes(proto, self.output, external_data=self.source.external_data)

    def _search(self) -> Candidate:
        """Find the smallest model whose drop on the choose part, plus a margin, is within the limit."""
        limit, part = self.config.drop_limit, self.splits.choose
        assert limit is not None
        reference = run_outputs(self.session, part, batch_size=self.batch_size) if self.team.leads else {}
        self.team.lead(
            lambda: check_can_search(self.metric.measure(reference, reference, part.labels), limit=limit)
        )

        def measure(candidate: Candidate) -> Quality:
            session = open_session(self._to_final(candidate), self.config)
            return self.metric.measure(
                reference, run_outputs(session, part, batch_size=self.batch_size), part.labels
            )

        objectives = ("params", "macs") if self.config.objective is None else (self.config.objective,)
        full = {name: size for name, size in self.rounds[0].sizes().items() if name in objectives}
        found = search_smallest(
            full,
            self._repair,
            lambda candidate: self.team.lead(lambda: measure(candidate)),
            limit=limit,
            note=self.note,
        )
        if found.accepted is not None:
            return found.accepted
        error = BudgetError(
            f"no smaller model was found that loses at most {limit:g} of {self.metric.name} beyond doubt "
            f"on {part.n_samples} samples; allow more with --max-drop, or give more data"
        )
        refused = found.refused
        if refused is not None:
            self._plan_for_page()
            self.team.lead(lambda: self._attach(error, refused))
        raise error

    def _attach(self, error: BudgetError, refused: Candidate) -> None:
        """Let a refusal hold the numbers of the model that came nearest."""
        proto = self._to_final(refused)
        self._refuse(error, proto, self._report(refused, proto))

    # --- the result ---

    def _to_proto(self, candidate: Candidate, *, plan: CompressionPlan | None = None) -> AnyModel:
        return write_proto(candidate.compressed.finished(), self.rounds[-1].prepared.source, plan)

    def _with_recipe(self, candidate: Candidate) -> CompressionPlan:
        """The plan of a candidate, with how it becomes the final file."""
        # The candidate may come from the work folder, from a run with another ending.
        plan = replace(candidate.plan, config={**candidate.plan.config, "then": self.config.then})
        if self.config.then is None or self._only_sketch:
            return plan
        with self.clock.stage("quantize"):
            recipe = hand_off.choose_recipe(self._bench, self._to_proto(candidate), self.config.then)
        return replace(plan, then=recipe.to_dict())

    def _to_final(self, candidate: Candidate) -> AnyModel:
        """The final file of a candidate, without its entry in the metadata."""
        return hand_off.finish(self._to_proto(candidate), self._with_recipe(candidate))

    def _preview(self, model: AnyModel) -> AnyModel:
        """A model of the final file's size, made without data."""
        return model if self.config.then is None else preview(hand_off.join(model), self.config.then)

    @property
    def _bench(self) -> hand_off.Bench:
        return hand_off.Bench(
            self.splits, self.batch_size, lambda proto: open_session(proto, self.config), self.note
        )

    def _time(self, candidate: Compressed, prepared: PreparedModel) -> LatencyComparison:
        """Time a candidate against the original, unless one of these widths and ranks was timed before."""
        return self.team.lead(lambda: self._time_here(candidate, prepared))

    def _time_here(self, candidate: Compressed, prepared: PreparedModel) -> LatencyComparison:
        shapes = {name: array.shape[1:] for name, array in sorted(self._first_batch().items())}
        where = hashlib.sha256(repr((self.source.sha256, prepared.source.sha256, shapes)).encode())
        name = f"{where.hexdigest()[:16]}-{candidate.choice.shape_key}"
        comparisons = self.times.table.comparisons
        if name not in comparisons:
            proto = write_proto(candidate.finished(), prepared.source, None)
            comparisons[name] = self._time_session(open_session(proto, self.config))
            self.times.save()
        return comparisons[name]

    def _time_session(self, session: Session) -> LatencyComparison:
        with self.clock.stage("latency"):
            return compare_speed(self.session, session, self._first_batch())

    def _first_batch(self) -> Mapping[str, np.ndarray]:
        return next(iter(self.splits.calibrate.batches(self.session.fixed_batch or 1))).inputs

    def _time_nodes(self, prepared: PreparedModel, kinds: Mapping[str, Collection[str]]) -> NodeTimes:
        return self.team.lead(lambda: self._time_nodes_here(prepared, kinds))

    def _time_nodes_here(self, prepared: PreparedModel, kinds: Mapping[str, Collection[str]]) -> NodeTimes:
        proto = write_proto(prepared.graph, prepared.source, None)
        feed = self.session.prepare(latency_feed(self.session, self._first_batch()))
        found = measure_times(
            prepared,
            proto,
            feed,
            kinds,
            self.times.table,
            only_implants=not self.config.needs_times,
            on_event=self.on_event,
        )
        self.times.save()
        return found

    def _finish(self, candidate: Candidate) -> reports.CompressReport:
        config = self.config
        plan, compressed, proto = self._build(candidate)
        if config.dry_run:
            report = self._report(candidate, proto)
            self.commit()
            self._save_side_files(plan, report)
            return report
        report, gated = self._measure(candidate, plan, compressed, proto)
        self._gate(report, proto, gated)
        lost = self._warn_of_drop(report.quality)
        with self.clock.stage("write"):
            report = replace(report, output=str(self.output))

            def finish(path: Path) -> None:
                """Plan and report come before the model: where it is, the rest is."""
                nonlocal report
                check_loads(path, config)
                report = replace(report, seconds=self.clock.so_far())
                self.commit()
                self._save_side_files(plan, report, warnings=lost)

            save_model(proto, self.output, external_data=self.source.external_data, check=finish)
        for text in lost:  # only now is there something to be warned of
            self.note(text, kind="warning")
        return report

    def _warn_of_drop(self, quality: reports.Quality | None) -> tuple[str, ...]:
        """What to say of a model without a gate that has lost much; nothing of any other."""
        if quality is None or self.config.drop_limit is not None or quality.drop <= LARGE_DROP:
            return ()
        lost = f"{quality.metric} fell by {quality.drop:.4f}"
        return (f"{lost}: keep more, or give --max-drop to refuse such results",)

    def _run_original(self) -> Outputs:
        """Outputs of the original on the report part."""
        return run_outputs(self.session, self.splits.report, batch_size=self.batch_size)

    def _build(self, candidate: Candidate) -> tuple[CompressionPlan, AnyModel, AnyModel]:
        """The whole plan of a candidate, the compressed model that it makes, and the final file."""
        plan = self._with_recipe(candidate)
        compressed = self._to_proto(candidate, plan=plan)
        return plan, compressed, hand_off.finish(compressed, plan, self.config.then)

    def _measure(
        self, candidate: Candidate, plan: CompressionPlan, compressed: AnyModel, proto: AnyModel
    ) -> tuple[reports.CompressReport, LatencyComparison]:
        """Check what was built, and measure the final file: its quality on the report part, and its latency.

        Returns the report, and the comparison that the gates are about.
        """
        config = self.config
        with self.clock.stage("self-check"):
            self._check_result(compressed, candidate, plan)
            if config.then is not None:
                remark = check_model(proto, reference=self.source.model)
                if remark:
                    self.note(remark, kind="warning")
        with self.clock.stage("validate"):
            session = open_session(proto, config)
            part = self.splits.report
            before = self._outputs_before()
            after = run_outputs(session, part, batch_size=self.batch_size)
            check_finite(after, label="the compressed model")
            whole = session if config.then is None else open_session(compressed, config)
            measured = self._metric_for(before, part).measure(before, after, part.labels)
            quality = judge_quality(measured, config.drop_limit)
            fidelity = compare_outputs(before, after)
            worst = self._find_worst(before, after)
        timing = gated = self._time_session(session)
        if not hand_off.gains_from(config.then, session.provider):
            gated = self._time_session(whole)
        report = self._report(candidate, proto, quality=quality, fidelity=fidelity, timing=timing)
        report = replace(report, worst=worst)
        if gated is not timing:  # what was asked of time is about the model before its conversion
            reached = {**report.budget.reached, "keep_latency": gated.ratio}
            report = replace(report, budget=replace(report.budget, reached=reached))
        if config.then is not None:
            report = replace(report, then=self._measure_steps(report, plan, compressed, proto, before))
        return report, gated

    def _find_worst(self, before: Outputs, after: Outputs) -> tuple[WorstSample, ...]:
        if self.config.html is None:
            return ()
        scores = self._metric_for(before, self.splits.report).output or self.scores
        return find_worst(before, after, self.splits.report, scales=self.scales, scores=scores)

    def _measure_steps(
        self,
        report: reports.CompressReport,
        plan: CompressionPlan,
        compressed: AnyModel,
        final: AnyModel,
        before: Outputs,
    ) -> reports.Conversion:
        """What compression and conversion do each alone, on the report part; ``before``: of the original."""
        metric, labels = self._metric_for(before, self.splits.report), self.splits.report.labels
        kind = str(self.config.then)
        upgrade = upgrade_note(hand_off.join(compressed), kind)
        if upgrade:
            self.note(upgrade)
        with self.clock.stage("quantize"):
            original = write_proto(self.prepared.graph, self.source, None)
            quantized = hand_off.convert_alone(self._bench, original, kind)
        return hand_off.measure_steps(
            self._bench,
            report,
            plan,
            compressed=compressed,
            quantized=quantized,
            final=final,
            metric=lambda outputs: metric.measure(before, outputs, labels).after,
            time=self._time_session,
            n_bytes=self._count_bytes,
        )

    def _metric_for(self, outputs: Outputs, part: Subset) -> Metric:
        """The metric of the report part: ``--val`` may have labels where the data has none."""
        return choose_metric(self.config.metric, outputs=outputs, labels=part.labels)

    def _gate(self, report: reports.CompressReport, proto: AnyModel, timing: LatencyComparison) -> None:
        """Raise unless all that was asked for is met; keep the rejected model if asked to."""
        config, quality = self.config, report.quality
        failures: list[TargetError] = []
        for name, asked in report.budget.asked.items():
            reached = report.budget.reached.get(name, 0.0)  # a dry run times nothing
            allowed = asked + LATENCY_TOLERANCE if name == "keep_latency" else asked * (1 + 1e-9)
            if reached > allowed:
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
                    f"against {timing.before_ms:.3g} ms ({timing.ratio:.3f} times as long, 95 % interval "
                    f"{timing.ratio_low:.3f} to {timing.ratio_high:.3f}); keep less, or pass --allow-slower"
                )
            )
        if not failures:
            return
        self._refuse(failures[0], proto, report)
        raise failures[0]

    def _refuse(self, error: TargetError, proto: AnyModel, report: reports.CompressReport) -> None:
        """Attach the numbers to a refusal, and keep what was refused if asked to."""
        config = self.config
        if config.keep_rejected and not config.dry_run:
            save_model(
                proto,
                rejected_path(self.output),
                external_data=self.source.external_data,
                check=lambda path: self.commit(),
            )
        error.report = replace(report, output=None)
        self.write_reports(error.report, refusal=str(error))

    def _report(
        self,
        candidate: Candidate,
        proto: AnyModel,
        *,
        quality: reports.Quality | None = None,
        fidelity: reports.Fidelity | None = None,
        timing: LatencyComparison | None = None,
    ) -> reports.CompressReport:
        prepared, config = self.prepared, self.config
        before = facts_before(prepared)
        n_bytes = self._count_bytes(proto)
        after = facts_after(candidate.compressed.finished(), prepared, n_bytes=n_bytes)
        latency = None if timing is None else timing.facts()
        if timing is not None and quality is not None:
            before = replace(before, latency_ms=timing.before_ms, metric=quality.before)
            after = replace(after, latency_ms=timing.after_ms, metric=quality.after)
        asked = {
            name: value
            for name in BUDGETS
            if (value := getattr(config, name)) is not None
        }
        plan = plan_summary([one.prepared for one in self.rounds], candidate.plan)
        return reports.CompressReport(
            model=self.label,
            output=None,
            before=before,
            after=after,
            quality=quality,
            fidelity=fidelity,
            plan=plan,
            frozen=frozen_nodes(prepared),
            budget=reports.Budget(asked=asked, reached=reached_budgets(before, after, latency)),
            seconds=dict(self.clock.seconds),
            seed=config.seed,
            versions=installed_versions(),
            recovery=recovery_summary(candidate.plan),
            latency=latency,
            analysis=self._explained(candidate, plan) if config.html is not None else None,
        )

    def _save_side_files(
        self, plan: CompressionPlan, report: reports.CompressReport, *, warnings: Sequence[str] = ()
    ) -> None:
        if self.config.save_plan is not None:
            save_plan(plan, self.config.save_plan)
        self.write_reports(report, warnings=warnings)

    def write_reports(
        self, report: reports.Report, *, refusal: str | None = None, warnings: Sequence[str] = ()
    ) -> None:
        """Write the report to all files that were asked for; raises ValidationError.

        ``warnings`` are to be told beside those that were told already.
        """
        worst = report.worst if isinstance(report, reports.CompressReport) else ()
        write_reports(
            report,
            json=self.config.report,
            html=self.config.html,
            summary=self.config.summary,
            images=lambda: draw_worst(worst, self.splits.report) if self.config.html_images else {},
            refusal=refusal,
            warnings=(*self.warnings, *warnings),
            data=self._data,
            options={option.name: getattr(self.config, option.name) for option in fields(self.config)},
            preprocessing=self.splits.report.dataset.preprocessing,
        )


def _refuse_chance(metric: Metric, outputs: Outputs, part: Subset) -> None:
    """Raise unless the original, which gave ``outputs``, is clearly better than guessing."""
    value = metric.reference_value(outputs, part.labels)
    check_chance_level(value, n_classes=metric.n_classes or 2, n_samples=part.n_samples)
