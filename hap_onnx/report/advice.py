"""What to do next: one command that follows from a report, for the last line on a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hap_onnx.report import AnalyzeReport, CompressReport, InspectReport, Report, ValidateReport

SMALL_LOSS = 0.01
"""An expected loss at which classifiers keep all but about a point of their accuracy."""
LARGE_DROP = 0.02
"""A drop of the metric that calls for more than the closed-form repair."""
SOME_DATA = "DATA"  # stands for a path that nobody has named


def next_step(report: Report, *, data: Any = None, options: Mapping[str, Any] | None = None) -> str | None:
    """Return what to run next and why, in one line; None where nothing follows.

    Args:
        data: that of the command which ended with ``report``.
        options: its options, by name.
    """
    options = options or {}
    if isinstance(report, InspectReport):
        return _after_inspect(report, data)
    if isinstance(report, AnalyzeReport):
        return _after_analyze(report, data, options)
    if isinstance(report, ValidateReport):
        return _after_validate(report, data)
    if isinstance(report, CompressReport) and report.quality is not None:
        return _after_compress(report, data, options)
    return None  # a sweep names its own command; a plan that was applied is what was wanted


def _after_inspect(report: InspectReport, data: Any) -> str | None:
    if not report.groups and not any(layer.implants for layer in report.layers):
        return None
    return f"{_command('analyze', report.model, data=data)}  (what each part costs to remove)"


def _after_analyze(report: AnalyzeReport, data: Any, options: Mapping[str, Any]) -> str | None:
    kept = {"work_dir": options["work_dir"]} if options.get("work_dir") else {}
    cheap = [point for point in report.analysis.sizes if point.loss <= SMALL_LOSS]
    if not report.analysis.groups and not report.analysis.layers:
        return None
    if not cheap:
        return f"{_command('compress', report.model, data=data, **kept)}  (the smallest model within a point)"
    point = min(cheap, key=lambda point: point.asked)
    budget = {f"keep_{report.analysis.objective}": point.asked}
    command = _command("compress", report.model, data=data, **budget, **kept)
    return f"{command}  (expected loss {point.loss:.2g}: small)"


def _after_compress(report: CompressReport, data: Any, options: Mapping[str, Any]) -> str | None:
    assert report.quality is not None
    if report.output is None:
        return None  # refused, which the error explains
    trained = any(one.method == "distill" for one in report.recovery)
    if report.quality.drop > LARGE_DROP and not trained:
        asked = dict(report.budget.asked)
        command = _command("compress", report.model, data=data, **asked, epochs=20)
        return f"{command}  (trains some of the loss back)"
    command = _command("validate", report.model, report.output, data=None)
    return f"{command}  (on samples that were not used here)"


def _after_validate(report: ValidateReport, data: Any) -> str | None:
    quality = report.quality
    if not quality.passed:
        command = _command("compress", report.reference, data=None, max_drop=quality.max_drop)
        return f"{command}  (the smallest model within the gate)"
    if report.slower or quality.max_drop is None:
        return None
    names = report.reference, report.candidate
    command = _command("validate", *names, data=data, max_drop=quality.max_drop, summary="summary.md")
    return f"{command}  (as a gate in CI)"


def _command(name: str, *files: str, data: Any, **options: Any) -> str:
    shown = str(data) if isinstance(data, (str, Path)) else SOME_DATA
    parts = ["hap-onnx", name, *map(shlex.quote, files), "--data", shlex.quote(shown)]
    for option, value in options.items():
        text = f"{value:g}" if isinstance(value, float) else shlex.quote(str(value))
        parts += ["--" + option.replace("_", "-"), text]
    return " ".join(parts)
