"""Several budgets, one job: what is known of the model is found once, and each point keeps its plan.

The folder of a sweep is valid at any time: plans come before the index that lists them, and each file is
there complete or not at all.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hap_onnx import report as reports
from hap_onnx.config import SWEEP_INDEX, SWEEP_VIEWS, CompressConfig, plan_weights_path, point_name
from hap_onnx.errors import BudgetError, TargetError, ValidationError
from hap_onnx.events import track
from hap_onnx.jobs.job import Job
from hap_onnx.model.saving import make_folder, write_text
from hap_onnx.model.temporary import remove_all_leftovers
from hap_onnx.planning.plan import CompressionPlan, save_plan
from hap_onnx.report.markdown import render_sweep_markdown
from hap_onnx.report.render import render_json
from hap_onnx.report.summary import facts_before, installed_versions

_log = logging.getLogger(__name__)

_PLAN_NAME = re.compile(r"keep-(params|macs|latency)-[0-9.e-]+(\.rejected)?\.json")


def run_sweep(job: Job) -> reports.SweepReport:
    """Make and measure a model for each budget of a sweep, and keep its plan in the job's output folder.

    Raises TargetError if none can be kept, with the report, and then nothing is written; and what stops a
    single job, which leaves the points that were finished.
    """
    config = job.config
    assert config.sweep is not None
    job.check_can_shrink()
    folder = SweepFolder(job.output, writes=job.team.leads)
    points, refusals = list[reports.SweepPoint](), list[TargetError]()
    before = facts_before(job.prepared)
    with job.lock():
        for ratio in track(config.sweep, stage="sweep", total=len(config.sweep), on_event=job.on_event):
            try:
                plan, measured, refusal = job.at(config.at_point(ratio, job.output)).try_out()
            except BudgetError as error:
                point = reports.SweepPoint(ratio, None, refused=str(error))
                refusals.append(error)
            else:
                before = measured.before if before.metric is None else before
                name = None
                if refusal is None or config.keep_rejected:
                    folder.begin(_report(job, before, points))
                    name = point_name(config.swept, ratio) + (".rejected.json" if refusal else ".json")
                    folder.save(plan, name)
                point = _measured_point(ratio, name, measured, refusal)
                refusals += [refusal] if refusal is not None else []
            points.append(point)
            job.note(_sentence(config, point))
            report = _report(job, before, points)
            if report.complete:  # the index that says so comes last
                report = report if folder.is_begun else replace(report, output=None)
                job.commit()
                why = _none_is_met(config, refusals) if len(refusals) == len(points) else None
                if job.team.leads:
                    job.write_reports(report, refusal=why)
            if folder.is_begun:
                folder.write_index(report)
    if len(refusals) == len(points):
        none_met = type(refusals[0])(_none_is_met(config, refusals))
        none_met.report = report
        raise none_met
    return report


def _none_is_met(config: CompressConfig, refusals: Sequence[TargetError]) -> str:
    assert config.sweep is not None
    first = f"at {point_name(config.swept, config.sweep[0])}, {refusals[0]}"
    more = f" (and {len(refusals) - 1} more, see the table)" if len(refusals) > 1 else ""
    return f"no point of the sweep is met: {first}{more}"


class SweepFolder:
    """The folder of a sweep, which is made, or freed of an earlier sweep, when there is something to keep.

    It ``writes`` nothing for the processes that only help.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes, self.is_begun = path, writes, False

    def begin(self, report: reports.SweepReport) -> None:
        """Make the folder, unless that is done; ``report`` holds the points that were refused so far.

        Raises ValidationError.
        """
        if self.is_begun:
            return
        self.is_begun = True
        if not self.writes:
            return
        make_folder(self.path, option="--output")
        remove_all_leftovers(self.path)
        self.write_index(report)  # before plans go that an older one lists
        try:
            for path in list(self.path.iterdir()):
                if _PLAN_NAME.fullmatch(path.name):
                    path.unlink()
                    plan_weights_path(path).unlink(missing_ok=True)
        except OSError as error:
            raise ValidationError(
                f"the earlier sweep in {self.path} cannot be removed: {error.strerror or error}"
            ) from error

    def save(self, plan: CompressionPlan, name: str) -> None:
        """Keep the plan of a point."""
        if self.writes:
            save_plan(plan, self.path / name)

    def write_index(self, report: reports.SweepReport) -> None:
        """Write the report of the points so far, with table and plot; raises ValidationError."""
        if not self.writes:
            return
        from hap_onnx.report.plot import draw_sweep  # matplotlib is slow to import

        table, plot = (self.path / name for name in SWEEP_VIEWS)
        write_text(plot, draw_sweep(report), what="the plot")
        write_text(table, render_sweep_markdown(report), what="the table")
        write_text(self.path / SWEEP_INDEX, render_json(report), what="the index")


def _measured_point(
    ratio: float, plan: str | None, measured: reports.CompressReport, refusal: TargetError | None
) -> reports.SweepPoint:
    return reports.SweepPoint(
        keep=ratio,
        plan=plan,
        refused=None if refusal is None else str(refusal),
        after=measured.after,
        quality=measured.quality,
        fidelity=measured.fidelity,
        latency=measured.latency,
        reached=measured.budget.reached,
    )


def mark_best(points: Sequence[reports.SweepPoint], budget: str) -> tuple[reports.SweepPoint, ...]:
    """Mark the points that no other beats, in quality and in the cost that ``budget`` names.

    Of points that are alike in both, none beats the other. Refused ones do not compete.
    """
    competing = [
        (point.reached[budget], -point.quality.after)
        for point in points
        if point.refused is None and point.quality is not None
    ]

    def is_best(point: reports.SweepPoint) -> bool:
        if point.refused is not None or point.quality is None:
            return False
        cost, loss = point.reached[budget], -point.quality.after
        return not any(c <= cost and q <= loss and (c, q) != (cost, loss) for c, q in competing)

    return tuple(replace(point, best=is_best(point)) for point in points)


def _report(
    job: Job, before: reports.ModelFacts, points: Sequence[reports.SweepPoint]
) -> reports.SweepReport:
    config = job.config
    assert config.sweep is not None
    return reports.SweepReport(
        model=job.label,
        output=str(job.output),
        objective=config.objective or "macs",
        asked=config.sweep,
        complete=len(points) == len(config.sweep),
        before=before,
        points=mark_best(points, config.swept),
        seconds=dict(job.clock.seconds),
        seed=config.seed,
        versions=installed_versions(),
    )


def _sentence(config: CompressConfig, point: reports.SweepPoint) -> str:
    name = point_name(config.swept, point.keep)
    if point.refused is not None:
        return f"{name} is refused: {point.refused}"
    assert point.quality is not None
    return f"{name}: {point.quality.metric} drops by {point.quality.drop:.4f}"
