"""Which parts the page of a report has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hap_onnx.report import (
    AnalyzeReport,
    CompressReport,
    Conversion,
    Fidelity,
    FrozenNode,
    ModelFacts,
    Quality,
    RoundRecovered,
    SweepReport,
    ValidateReport,
    words,
)
from hap_onnx.report.advice import Step, next_steps, repeat_command
from hap_onnx.report.analysis import WorstSample
from hap_onnx.report.html import answers, charts, plan_parts
from hap_onnx.report.html.parts import (
    Card,
    Cell,
    Chart,
    Command,
    Image,
    Listing,
    Page,
    Part,
    Section,
    Table,
    Text,
)
from hap_onnx.report.printable import one_line, printable, printable_parts

ReportOnPage = CompressReport | AnalyzeReport | SweepReport | ValidateReport


@dataclass(frozen=True)
class _Extra:
    """What is on a page beside its report: see ``render_html``; ``again`` makes the report once more."""

    images: Mapping[int, bytes]
    refusal: str | None
    steps: Sequence[Step]
    again: str
    preprocessing: str


def make_page(
    report: ReportOnPage,
    *,
    images: Mapping[int, bytes],
    refusal: str | None,
    data: Any,
    options: Mapping[str, Any],
    preprocessing: str,
) -> Page:
    """Return what is on the page of a report; see ``render_html``."""
    report = printable_parts(report)
    extra = _Extra(
        images,
        None if refusal is None else one_line(refusal),
        printable_parts(next_steps(report, data=data, options=options)),
        printable(repeat_command(report, data=data, options=options)),
        printable(preprocessing),
    )
    if isinstance(report, AnalyzeReport):
        return _analyze_page(report, extra)
    if isinstance(report, SweepReport):
        return _sweep_page(report, extra)
    if isinstance(report, ValidateReport):
        return _validate_page(report, extra)
    return _compress_page(report, extra)


def _compress_page(report: CompressReport, extra: _Extra) -> Page:
    sections = [
        _both_models(report.before, report.after, report),
        _then(report.then, report.quality),
        plan_parts.changes(report),
        *plan_parts.sensitivities(report.analysis),
        plan_parts.sizes(report.analysis),
        plan_parts.predictions(report),
        _training(report.recovery),
        _frozen(report.frozen),
        _worst(report.worst, extra.images),
        _time(report.seconds),
        _provenance(report, _budget_rows(report), extra),
    ]
    is_refused = extra.refusal is not None or answers.was_refused(report)
    return Page(
        kind="Compression report",
        model=report.model,
        verdict=_compress_verdict(report, extra.refusal),
        passed=False if is_refused else None if report.quality is None else report.quality.passed,
        cards=_cards(report.before, report.after, report),
        answers=answers.compress_answers(report, extra.steps),
        sections=[section for section in sections if section is not None],
    )


def _compress_verdict(report: CompressReport, refusal: str | None) -> str:
    smaller = words.change(report.before.bytes, report.after.bytes)
    if report.output is not None:
        gate = report.quality is not None and report.quality.max_drop is not None and report.quality.passed
        return (
            f"Written to {report.output} ({smaller} file size){', within the quality limit' if gate else ''}."
        )
    if report.quality is not None and not report.quality.passed:
        return "Nothing was written: too much quality was lost."
    if refusal is not None:
        return f"Nothing was written: {refusal.rstrip('.')}."
    if answers.was_refused(report):
        return "Nothing was written: it was refused."
    return "Nothing was written: this is a plan only."


def _validate_page(report: ValidateReport, extra: _Extra) -> Page:
    sections = [
        _both_models(report.before, report.after, report),
        _time(report.seconds),
        _provenance(report, [("compared with", report.reference)], extra),
    ]
    if report.passed:
        verdict = "Passed: all gates hold."
    else:
        verdict = "Failed: " + ("it is slower." if report.slower else "too much quality was lost.")
    return Page(
        kind="Validation report",
        model=report.candidate,
        verdict=verdict,
        passed=report.passed,
        cards=_cards(report.before, report.after, report),
        answers=answers.validate_answers(report, extra.steps),
        sections=[section for section in sections if section is not None],
    )


def _analyze_page(report: AnalyzeReport, extra: _Extra) -> Page:
    analysis = report.analysis
    sections = [
        *plan_parts.sensitivities(analysis),
        plan_parts.sizes(analysis),
        plan_parts.predictions(report),
        _frozen(report.frozen),
        _time(report.seconds),
        _provenance(report, [], extra),
    ]
    size = report.size
    cards = [
        Card("file", words.file_size(size.bytes), ""),
        Card("parameters", words.count(size.params), ""),
        Card("multiply-accumulates (MACs)", words.count(size.macs), "of one run, for one sample"),
        Card("can be narrower", words.plural(len(analysis.groups), "channel group"), ""),
        Card("can be replaced", words.plural(len(analysis.layers), "layer"), ""),
    ]
    return Page(
        kind="Analysis",
        model=report.model,
        verdict="Nothing was changed: this page says how much each part of the model matters.",
        passed=None,
        cards=cards,
        answers=answers.analyze_answers(report, extra.steps),
        sections=[section for section in sections if section is not None],
    )


def _sweep_page(report: SweepReport, extra: _Extra) -> Page:
    titles, *rows = words.sweep_rows(report)
    marks = {"": "", "*": "best", "x": "refused"}
    table = Table(
        "The models of the sweep; costs are fractions of the original's, changes have 95 % intervals",
        ("keep", *titles[2:], ""),
        tuple((row[1] or "original", *row[2:], marks[row[0]]) for row in rows),
        frozenset({0, len(titles) - 1}),
    )
    measured = [point for point in report.points if point.quality is not None]
    best = sum(point.best for point in report.points)
    cost = words.COST_NAMES[report.objective]
    caption = (
        f"Each mark is a model. Further left is cheaper ({cost}), further up is better; bars are 95 % "
        "intervals. "
        "Models on the line are the ones to choose from: any other is beaten in one of the two, and no "
        "better "
        "in the other."
    )
    text = (
        f"Chart: quality over {cost} of {words.plural(len(measured), 'model')}, {best} of them best for "
        "their cost."
    )
    parts: list[Part] = [table]
    if measured:
        parts = [Chart(text, caption, charts.draw_family("family", report), table)]
    sections = [
        Section("family", "The family of models", parts),
        _time(report.seconds),
        _provenance(report, [("asked for", ", ".join(f"{keep:g}" for keep in report.asked))], extra),
    ]
    verdict = f"{words.plural(best, 'model')} to choose from, of {len(report.asked)} asked for."
    if extra.refusal is not None:
        verdict = f"Nothing was written: {extra.refusal.rstrip('.')}."
    return Page(
        kind="Sweep",
        model=report.model,
        verdict=verdict,
        passed=None if extra.refusal is None else False,
        cards=[],
        answers=answers.sweep_answers(report, extra.steps),
        sections=[section for section in sections if section is not None],
    )


# ---------------------------------------------------------------- both models


def _cards(before: ModelFacts, after: ModelFacts, report: CompressReport | ValidateReport) -> list[Card]:
    arrow = "{} → {}".format
    cards = [
        Card("file", words.change(before.bytes, after.bytes),
             arrow(words.file_size(before.bytes), words.file_size(after.bytes))),
        Card("parameters", words.change(before.params, after.params),
             arrow(words.count(before.params), words.count(after.params))),
    ]  # fmt: skip
    if before.macs and after.macs is not None:
        costs = arrow(words.count(before.macs), words.count(after.macs))
        cards.append(Card("multiply-accumulates (MACs)", words.change(before.macs, after.macs), costs))
    if report.latency is not None:
        latency = report.latency
        low, high = latency.interval
        tone = "good" if high < 1 else "bad" if low > 1 else ""
        note = (
            f"{latency.before_ms:.3g} → {latency.after_ms:.3g} ms; {low:.2f} to {high:.2f} of the time (95 %)"
        )
        cards.append(Card("latency", words.speed(latency.ratio), note, tone))
    elif before.latency_ms and after.latency_ms:
        note = f"{before.latency_ms:.3g} → {after.latency_ms:.3g} ms"
        cards.append(Card("latency", words.speed(after.latency_ms / before.latency_ms), note))
    if report.quality is not None:
        cards.append(_quality_card(report.quality))
    return cards


def _quality_card(quality: Quality) -> Card:
    name = quality.metric
    low, high = (words.signed(name, -bound) for bound in reversed(quality.interval))
    note = (
        f"{words.metric_value(name, quality.before)} → {words.metric_value(name, quality.after)}; {low} "
        f"to {high} (95 %)"
    )
    tone = ""
    if quality.max_drop is not None:
        tone = "good" if quality.passed else "bad"
        limit = words.signed(name, -quality.max_drop)
        note += f"; limit {limit} {'kept' if quality.passed else 'not kept'}"
    return Card(name, words.quality_change(quality), note, tone)


def _both_models(before: ModelFacts, after: ModelFacts, report: CompressReport | ValidateReport) -> Section:
    titles, *rows = words.facts_rows(report)
    table = Table("The original and the compressed model", titles, tuple(rows))
    samples = "sample" if isinstance(report, ValidateReport) else "held-out sample"
    lines = [*words.latency_lines(report.latency), *words.quality_lines(report.quality, of=samples)]
    lines += _fidelity(report.fidelity)
    return Section("before-after", "Before and after", [table, *map(Text, lines)])


def _fidelity(fidelity: Fidelity | None) -> list[str]:
    lines = words.fidelity_lines(fidelity)
    if fidelity is not None and fidelity.r2 is not None:
        lines.append(
            "(r2 is 1 for outputs like the original's, and at most 0 for a model that ignores its input.)"
        )
    return [" ".join(lines)] if lines else []


def _then(then: Conversion | None, quality: Quality | None) -> Section | None:
    if then is None:
        return None
    titles, *rows = words.step_rows(then, quality)
    table = Table("Compression and fewer bits, each alone and both", titles, tuple(rows))
    return Section("fewer-bits", "Fewer bits", [table, *map(Text, words.step_lines(then))])


# ---------------------------------------------------------------- the rest


def _training(rounds: Sequence[RoundRecovered]) -> Section | None:
    trained = [(number, one) for number, one in enumerate(rounds, start=1) if one.start_score is not None]
    if not trained:
        return None
    rows = [
        (str(number), _number(one.start_score), _number(one.best_score), _number(one.best_epoch),
        str(one.epochs),
         str(one.rollbacks or 0), ", ".join(one.augmentations or ()) or "none")
        for number, one in trained
    ]  # fmt: skip
    table = Table(
        "Distance to the original on samples set aside, before training and at best",
        ("round", "before", "best", "best after epoch", "of epochs", "rollbacks", "images varied by"),
        tuple(rows),
        frozenset({0, 6}),
    )
    return Section("training", "Training", [table])


def _number(value: float | None) -> str:
    return "?" if value is None or not math.isfinite(value) else f"{value:.3g}"


def _frozen(frozen: Sequence[FrozenNode]) -> Section | None:
    if not frozen:
        return None
    by_reason = sorted(words.group_by_reason(frozen).items(), key=lambda item: -len(item[1]))
    table = Table(
        "Why channels could not be removed, most frequent reason first",
        ("reason", "parts", "which"),
        tuple((reason, str(len(nodes)), words.named(nodes)) for reason, nodes in by_reason),
        frozenset({0, 2}),
    )
    lists = [
        Listing(f"All {len(nodes)} parts: {reason}", tuple(nodes))
        for reason, nodes in by_reason
        if len(nodes) > words.MAX_NODES_NAMED
    ]
    note = Text(
        "Removing channels there would change what the model puts out, or could not be proven to be safe. "
        "That costs some compression and no correctness."
    )
    return Section("frozen", "What could not be touched", [note, table, *lists])


def _worst(worst: Sequence[WorstSample], images: Mapping[int, bytes]) -> Section | None:
    if not worst:
        return None
    columns: list[tuple[str, list[Cell], bool]] = [
        ("sample", [str(sample.index) for sample in worst], True),
        ("file", [sample.source or "" for sample in worst], True),
        ("distance", [_number(sample.distance) for sample in worst], False),
        ("right is", [sample.label or "" for sample in worst], True),
        ("original says", [sample.before or "" for sample in worst], True),
        ("compressed says", [sample.after or "" for sample in worst], True),
    ]
    if any(sample.index in images for sample in worst):
        shown = [_image(sample, images) for sample in worst]
        columns.insert(1, ("picture", shown, True))
    columns = [column for column in columns if any(column[1])]
    has_classes = any(sample.before is not None for sample in worst)
    order = "other answers first, then by the" if has_classes else "in the order of the"
    table = Table(
        f"Samples on which the two models differ most, {order} distance of their outputs",
        tuple(name for name, _, _ in columns),
        tuple(zip(*(cells for _, cells, _ in columns), strict=True)),
        frozenset(place for place, (_, _, is_text) in enumerate(columns) if is_text),
    )
    changed = [sample for sample in worst if sample.before != sample.after]
    note = f"Of these {len(worst)} samples, the answer changes on {len(changed)}."
    if any(sample.label is not None for sample in worst):
        broken = sum(sample.label == sample.before != sample.after for sample in worst)
        mended = sum(sample.label == sample.after != sample.before for sample in worst)
        note += f" Right before and wrong now: {broken}; wrong before and right now: {mended}."
    return Section("worst", "Worst samples", [*([Text(note)] if has_classes else []), table])


def _image(sample: WorstSample, images: Mapping[int, bytes]) -> Cell:
    if sample.index not in images:
        return ""
    words_ = f"sample {sample.index}" + (f", {sample.label}" if sample.label else "")
    return Image.of(images[sample.index], words_)


def _time(seconds: Mapping[str, float]) -> Section | None:
    total = sum(seconds.values())
    if not total:
        return None
    rows = tuple((stage, f"{time:.1f}", words.share(time / total)) for stage, time in seconds.items())
    table = Table("Seconds per stage", ("stage", "seconds", "share"), (*rows, ("total", f"{total:.1f}", "")))
    longest = max(seconds, key=lambda stage: seconds[stage])
    text = (
        f"Chart: {total:.1f} seconds in {words.plural(len(seconds), 'stage')}; most of it, "
        f"{seconds[longest]:.1f}, in {longest}."
    )
    bars = [charts.Bar(stage, (("time", time),)) for stage, time in seconds.items()]
    drawing = charts.draw_bars("time", bars, label="seconds", series=("time",))
    return Section(
        "time",
        "Run time",
        [Chart(text, f"Where {total:.1f} seconds went, in the order of stages.", drawing, table)],
    )


def _budget_rows(report: CompressReport) -> list[tuple[str, str]]:
    rows = []
    for name in dict.fromkeys([*report.budget.asked, *report.budget.reached]):
        show = words.file_size if name == "max_bytes" else words.share
        asked, reached = report.budget.asked.get(name), report.budget.reached.get(name)
        text = "" if asked is None else f"asked {show(asked)}"
        if reached is not None:
            text += f"{', ' if text else ''}reached {show(reached)}"
        rows.append((f"--{name.replace('_', '-')}", text))
    if report.quality is not None:
        limit = report.quality.max_drop
        rows.append(
            (
                "--max-drop",
                "no limit" if limit is None else f"asked {limit:g}, reached {report.quality.drop:.4g}",
            )
        )
    return rows


def _provenance(report: ReportOnPage, more: Sequence[tuple[str, str]], extra: _Extra) -> Section:
    rows = [("model", report.candidate if isinstance(report, ValidateReport) else report.model)]
    output = getattr(report, "output", None)
    if output is not None:
        rows.append(("written to", output))
    if extra.preprocessing:
        rows.append(("data", extra.preprocessing))
    rows += more
    analysis = getattr(report, "analysis", None)
    if analysis is not None:
        rows += [
            ("sensitivity by", analysis.sensitivity),
            ("losses measured on", words.plural(analysis.n_samples, "sample")),
            ("made small", words.COST_NAMES.get(analysis.objective, analysis.objective)),
        ]
    if isinstance(report, SweepReport):
        rows.append(("made small", words.COST_NAMES[report.objective]))
    rows.append(("seed", str(report.seed)))
    rows += [(name.replace("_", "-"), version) for name, version in report.versions.items()]
    rows.append(("form of the report", report.schema))
    table = Table("What it takes to get the same again", ("", "value"), tuple(rows), frozenset({0, 1}))
    again: list[Part] = [Text("The same again, with the same files and versions:"), Command(extra.again)]
    return Section("provenance", "Provenance", [*again, table])
