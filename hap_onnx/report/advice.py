"""What follows from a report: what to run next, for the last line on a terminal and for the page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hap_onnx.config import COMMAND_OPTIONS, describe_options, flag_of
from hap_onnx.report import (
    AnalyzeReport,
    CompressReport,
    InspectReport,
    Report,
    SweepReport,
    ValidateReport,
    words,
)

SMALL_LOSS = 0.01
"""An expected loss at which classifiers keep all but about a point of their accuracy."""
LARGE_DROP = 0.02
"""A drop of the metric that calls for more than the closed-form repair."""
SOME_DATA = "DATA"  # stands for other data, and for a path that nobody has named


_OPTIONS = {option.name: option for option in describe_options()}
CARRIED = (
    "preprocess", "val", "metric", "method", "sensitivity", "align", "exclude", "only", "then",
    "allow_slower", "device", "providers", "work_dir",
)  # fmt: skip
"""What a next command must know, too: how the data is read, and what may be done to the model."""
OF_SAMPLES = ("probes", "max_samples", "batch_size", "seed")
"""What a next command on the same data must know, too, for the same samples to play the same parts: only then
are figures comparable, and sensitivities that a work folder keeps of use."""


@dataclass(frozen=True)
class Step:
    """One thing to do next.

    ``why`` is a sentence for a page; ``command`` what to run, None where only the reader can say; ``note``
    says why in a few words, beside the command on a terminal, "" where it is not for a terminal.
    """

    why: str
    command: str | None = None
    note: str = ""


def next_step(report: Report, *, data: Any = None, options: Mapping[str, Any] | None = None) -> str | None:
    """Return what to run next and why, in one line; None where nothing follows. See ``next_steps``."""
    for step in next_steps(report, data=data, options=options):
        if step.command is not None and step.note:
            return f"{step.command}  ({step.note})"
    return None


def next_steps(
    report: Report, *, data: Any = None, options: Mapping[str, Any] | None = None
) -> tuple[Step, ...]:
    """Return what may be done next, the most sensible first.

    Args:
        data: that of the command which ended with ``report``.
        options: its options, by name; the next command gets those of ``CARRIED`` that it takes, and those of
            ``OF_SAMPLES`` if it is about the same data.
    """
    options = _given(_name_of(report), options or {})
    if isinstance(report, InspectReport):
        return _after_inspect(report, data, options)
    if isinstance(report, AnalyzeReport):
        return _after_analyze(report, data, options)
    if isinstance(report, ValidateReport):
        return _after_validate(report, data, options)
    if isinstance(report, SweepReport):
        return _after_sweep(report)
    return _after_compress(report, data, options)


def repeat_command(report: Report, *, data: Any, options: Mapping[str, Any]) -> str:
    """Return the command that makes ``report`` again, with all ``options`` that are not the usual ones."""
    name = _name_of(report)
    files = [report.reference, report.candidate] if isinstance(report, ValidateReport) else [report.model]
    given = {option: value for option, value in _given(name, options).items() if option != "json"}
    return _line(name, *files, data=data, options=given)


def _name_of(report: Report) -> str:
    """The command that ends with such a report."""
    names = {InspectReport: "inspect", AnalyzeReport: "analyze", ValidateReport: "validate"}
    return names.get(type(report), "compress")


def _given(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options of a command that do not have their usual value."""
    known = {option: options[option] for option in COMMAND_OPTIONS[name] if option in options}
    return {option: value for option, value in known.items() if not _is_usual(option, value)}


def _is_usual(option: str, value: Any) -> bool:
    usual = _OPTIONS[option].default
    return value is usual or (isinstance(value, (str, int, float, tuple)) and value == usual)


# ---------------------------------------------------------------- by command


def _after_inspect(report: InspectReport, data: Any, options: Mapping[str, Any]) -> tuple[Step, ...]:
    if not report.groups and not any(layer.implants for layer in report.layers):
        return ()
    command = _command("analyze", report.model, data=data, given=options)
    return (Step("See what each part costs to remove:", command, "what each part costs to remove"),)


def _after_analyze(report: AnalyzeReport, data: Any, options: Mapping[str, Any]) -> tuple[Step, ...]:
    analysis, model = report.analysis, report.model
    if not analysis.groups and not analysis.layers:
        return (Step("Nothing: there is nothing in it that could be made smaller."),)
    objective = {"objective": options["objective"]} if "objective" in options else {}
    cheap = [point for point in analysis.sizes if point.loss <= SMALL_LOSS]
    if cheap:
        point = min(cheap, key=lambda point: point.asked)
        budget = {f"keep_{analysis.objective}": point.asked}
        command = _command("compress", model, data=data, given=options, **budget)
        why = f"Make the smallest for which little loss is expected ({point.loss:.2g}):"
        first = Step(why, command, f"expected loss {point.loss:.2g}: small")
    else:
        command = _command("compress", model, data=data, given=options, **objective)
        why = "Ask for the smallest model within one point of quality:"
        first = Step(why, command, "the smallest model within a point")
    sweep = _command("compress", model, data=data, given=options, sweep=True, **objective)
    return first, Step("Or see what sizes cost in quality, measured on your data:", sweep)


def _after_compress(report: CompressReport, data: Any, options: Mapping[str, Any]) -> tuple[Step, ...]:
    quality = report.quality
    if report.output is None:
        return (_after_refusal(report),)
    if quality is None:
        return ()  # a plan that was applied is what was wanted
    command = _command("validate", report.model, report.output, data=SOME_DATA, given=options)
    why = "Put it to a last test on data that had no say in any of this:"
    steps = [Step(why, command, "on samples that were not used here")]
    trained = any(one.method == "distill" for one in report.recovery)
    if not trained and (quality.drop > LARGE_DROP or quality.interval[0] > 0):
        asked = dict(report.budget.asked)
        command = _command("compress", report.model, data=data, given=options, **asked, epochs=20)
        why = "Quality was lost. Training after compression wins part of it back:"
        train = Step(why, command, "trains some of the loss back")
        steps.insert(0 if quality.drop > LARGE_DROP else 1, train)
    elif quality.passed and quality.interval[0] <= 0:
        command = _command("compress", report.model, data=data, given=options, sweep=True)
        why = "No loss could be shown, so a smaller model may do: see what others would cost."
        steps.append(Step(why, command))
    return tuple(steps)


def _after_refusal(report: CompressReport) -> Step:
    """What to do where nothing was written: on a terminal, the error says it."""
    if report.quality is None:
        return Step(
            "Nothing was written. If the plan is to your liking, run the same command without --dry-run."
        )
    if report.quality.passed:
        return Step(
            "Nothing was written, since the result does not meet what was asked for. The first line of this "
            "page says what is missing."
        )
    return Step(
        "Nothing was written, since the gate failed. Keep more of the model (for example a larger "
        "--keep-macs), train it after compression (--epochs 20), or accept a larger loss (--max-drop)."
    )


def _after_validate(report: ValidateReport, data: Any, options: Mapping[str, Any]) -> tuple[Step, ...]:
    quality = report.quality
    if not quality.passed:
        limit = {"max_drop": quality.max_drop}
        command = _command("compress", report.reference, data=SOME_DATA, given=options, **limit)
        why = (
            "Do not use it, or accept a larger loss (--max-drop). Keeping more of the model helps most; this "
            "searches the smallest model within the limit:"
        )
        return (Step(why, command, "the smallest model within the gate"),)
    if not report.passed:
        return (
            Step(
                "Do not use it: it is slower than the original. Wider steps of channels may help (--align 8)."
            ),
        )
    if quality.max_drop is None:
        return (Step("Decide whether this change is acceptable: there was no limit (--max-drop sets one)."),)
    why = f"{report.candidate} may take the place of {report.reference}."
    if report.slower:
        return (Step(why),)
    names = report.reference, report.candidate
    gate = {"max_drop": quality.max_drop, "summary": "summary.md"}
    command = _command("validate", *names, data=data, given=options, **gate)
    return (Step(f"{why} The same test as a gate in CI:", command, "as a gate in CI"),)


def _after_sweep(report: SweepReport) -> tuple[Step, ...]:
    """On a terminal, what is said of a sweep ends with the same command."""
    choice = words.sweep_choice(report)
    if choice is None:
        return (Step("Ask for larger fractions (--sweep 0.9,0.8), or for a larger --max-drop."),)
    harmless = choice.quality is not None and choice.quality.interval[0] <= 0
    which = "smallest of which no loss could be shown" if harmless else "one with the least loss"
    why = f"Choose by what you can afford to lose. The {which}:"
    return Step(why, words.apply_command(report)), Step(words.SWEEP_CAUTION)


# ---------------------------------------------------------------- words of a command


def _command(name: str, *files: str, data: Any, given: Mapping[str, Any], **options: Any) -> str:
    without = {"then"} if "sweep" in options else set()  # a sweep is about float32
    names = CARRIED if data is SOME_DATA else CARRIED + OF_SAMPLES
    carried = {
        option: given[option]
        for option in names
        if option in given and option in COMMAND_OPTIONS[name] and option not in without
    }
    return _line(name, *files, data=data, options={**options, **carried})


def _line(name: str, *files: str, data: Any, options: Mapping[str, Any]) -> str:
    parts = ["hap-onnx", name, *map(words.file_word, files), "--data", shlex.quote(_text(data))]
    for option, value in options.items():
        parts += _words(option, value)
    return " ".join(parts)


def _words(option: str, value: Any) -> list[str]:
    """An option as it is given on the command line."""
    flag = flag_of(option)
    if isinstance(value, bool):
        return [flag] if value else []
    if _OPTIONS[option].metadata["repeatable"]:
        return [word for one in value for word in (flag, shlex.quote(one))]
    text = ",".join(map(_text, value)) if isinstance(value, tuple) else _text(value)
    return [flag, shlex.quote(text)]


def _text(value: Any) -> str:
    """A value as one word; ``SOME_DATA`` for arrays, which have no name."""
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value) if isinstance(value, (str, Path, int)) else SOME_DATA
