"""What to do next: one command that follows from a report, for the last line on a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hap_onnx.config import COMMAND_OPTIONS, describe_options, flag_of
from hap_onnx.report import AnalyzeReport, CompressReport, InspectReport, Report, ValidateReport

SMALL_LOSS = 0.01
"""An expected loss at which classifiers keep all but about a point of their accuracy."""
LARGE_DROP = 0.02
"""A drop of the metric that calls for more than the closed-form repair."""
SOME_DATA = "DATA"  # stands for a path that nobody has named


REPEATED = {flag_of(option.name) for option in describe_options() if option.metadata["repeatable"]}
CARRIED = (
    "preprocess", "val", "metric", "method", "sensitivity", "align", "exclude", "only", "then",
    "allow_slower", "device", "providers", "work_dir",
)  # fmt: skip
"""What a next command must know, too: how the data is read, and what may be done to the model."""


def next_step(report: Report, *, data: Any = None, options: Mapping[str, Any] | None = None) -> str | None:
    """Return what to run next and why, in one line; None where nothing follows.

    Args:
        data: that of the command which ended with ``report``.
        options: its options, by name; the next command gets those of ``CARRIED`` that it takes.
    """
    options = options or {}
    if isinstance(report, InspectReport):
        return _after_inspect(report, data, options)
    if isinstance(report, AnalyzeReport):
        return _after_analyze(report, data, options)
    if isinstance(report, ValidateReport):
        return _after_validate(report, data, options)
    if isinstance(report, CompressReport) and report.quality is not None:
        return _after_compress(report, data, options)
    return None  # a sweep names its own command; a plan that was applied is what was wanted


def _after_inspect(report: InspectReport, data: Any, options: Mapping[str, Any]) -> str | None:
    if not report.groups and not any(layer.implants for layer in report.layers):
        return None
    return f"{_command('analyze', report.model, data=data, given=options)}  (what each part costs to remove)"


def _after_analyze(report: AnalyzeReport, data: Any, options: Mapping[str, Any]) -> str | None:
    cheap = [point for point in report.analysis.sizes if point.loss <= SMALL_LOSS]
    if not report.analysis.groups and not report.analysis.layers:
        return None
    if not cheap:
        command = _command("compress", report.model, data=data, given=options)
        return f"{command}  (the smallest model within a point)"
    point = min(cheap, key=lambda point: point.asked)
    budget = {f"keep_{report.analysis.objective}": point.asked}
    command = _command("compress", report.model, data=data, given=options, **budget)
    return f"{command}  (expected loss {point.loss:.2g}: small)"


def _after_compress(report: CompressReport, data: Any, options: Mapping[str, Any]) -> str | None:
    assert report.quality is not None
    if report.output is None:
        return None  # refused, which the error explains
    trained = any(one.method == "distill" for one in report.recovery)
    if report.quality.drop > LARGE_DROP and not trained:
        asked = dict(report.budget.asked)
        command = _command("compress", report.model, data=data, given=options, **asked, epochs=20)
        return f"{command}  (trains some of the loss back)"
    command = _command("validate", report.model, report.output, data=None, given=options)
    return f"{command}  (on samples that were not used here)"


def _after_validate(report: ValidateReport, data: Any, options: Mapping[str, Any]) -> str | None:
    quality = report.quality
    if not quality.passed:
        command = _command("compress", report.reference, data=None, given=options, max_drop=quality.max_drop)
        return f"{command}  (the smallest model within the gate)"
    if report.slower or quality.max_drop is None:
        return None
    names = report.reference, report.candidate
    gate = {"max_drop": quality.max_drop, "summary": "summary.md"}
    return f"{_command('validate', *names, data=data, given=options, **gate)}  (as a gate in CI)"


def _command(name: str, *files: str, data: Any, given: Mapping[str, Any], **options: Any) -> str:
    shown = str(data) if isinstance(data, (str, Path)) else SOME_DATA
    parts = ["hap-onnx", name, *map(shlex.quote, files), "--data", shlex.quote(shown)]
    carried = [option for option in CARRIED if option in given and option in COMMAND_OPTIONS[name]]
    for option, value in {**options, **{option: given[option] for option in carried}}.items():
        parts += _words(flag_of(option), value)
    return " ".join(parts)


def _words(flag: str, value: Any) -> list[str]:
    """An option as it is given on the command line."""
    if isinstance(value, bool):
        return [flag] if value else []
    if flag in REPEATED:
        return [word for one in value for word in (flag, shlex.quote(one))]
    if isinstance(value, (list, tuple)):
        value = ",".join(value)
    return [flag, f"{value:g}" if isinstance(value, float) else shlex.quote(str(value))]
