"""Reports and events for people: tables on stdout, bars and notes on stderr. Part of the command line."""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from hap_onnx.events import Event
from hap_onnx.report import (
    CompressReport,
    Conversion,
    Fidelity,
    FrozenNode,
    InspectReport,
    Latency,
    ModelFacts,
    PlanSummary,
    Quality,
    Report,
    RoundRecovered,
    Share,
    SweepPoint,
    SweepReport,
    ValidateReport,
)
from hap_onnx.report.printable import printable

DEFAULT_WIDTH = 80
_SHARES = ("accuracy", "agreement")  # metrics that read best in per cent
_MAX_NODES_NAMED = 3


# ---------------------------------------------------------------- reports


def render_json(report: Report) -> str:
    """Return a report as strict JSON with a newline at its end."""
    text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    harmful = {letter for letter in text if letter != "\n" and printable(letter) != letter}
    return text.translate({ord(letter): json.dumps(letter)[1:-1] for letter in harmful})


def render_report(report: Report, stream: TextIO) -> str:
    """Return a report as text that suits ``stream``: coloured and as wide as a terminal, else plain."""
    width = None if stream.isatty() else DEFAULT_WIDTH
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, force_terminal=stream.isatty(), highlight=False, markup=False)
    console.print(_layout(_printable(report)))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _printable(value: Any) -> Any:
    """Return a report, or a part of one, whose texts a terminal can show: names come from files."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map(_printable, value))
    if isinstance(value, Mapping):
        return {_printable(key): _printable(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: _printable(getattr(value, part.name)) for part in fields(value)})
    return value


def _layout(report: Report) -> RenderableType:
    if isinstance(report, InspectReport):
        return _layout_inspect(report)
    if isinstance(report, SweepReport):
        return _layout_sweep(report)
    if isinstance(report, ValidateReport):
        title = f"{report.reference} -> {report.candidate}"
        lines = [*_latency_lines(report.latency), *_quality_lines(report.quality, of="sample")]
        lines += _fidelity_lines(report.fidelity)
        if report.slower:
            lines.append(Text("slower than the reference beyond noise", style="red"))
    else:
        title = f"{report.model} -> {report.output or '(nothing written)'}"
        lines = _compress_lines(report)
    parts: list[RenderableType] = [Text(title, style="bold", overflow="fold"), _facts_table(report), *lines]
    if isinstance(report, CompressReport) and report.then is not None:
        parts += [Text(""), _steps_table(report.then, report.quality), *_step_lines(report.then)]
    return Group(*parts)


def _compress_lines(report: CompressReport) -> list[Text]:
    lines = [Text(f"budget: {_budget_text(report)}")] if report.budget.asked else []
    lines += _latency_lines(report.latency) + _quality_lines(report.quality)
    lines += _fidelity_lines(report.fidelity)
    lines.append(Text(f"plan: {_plan_text(report.plan)}"))
    lines += _recovery_lines(report.recovery)
    if report.frozen:
        lines.append(Text(f"frozen: {_plural(len(report.frozen), 'node')}; 'hap-onnx inspect' says why"))
    total = sum(report.seconds.values())
    if total:
        lines.append(Text(f"time: {total:.1f} s"))
    return lines


def _facts_table(report: CompressReport | ValidateReport) -> Table:
    before, after, quality = report.before, report.after, report.quality
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for title in ("before", "after", "change"):
        table.add_column(title, justify="right")
    for name, old, new in (("parameters", before.params, after.params), ("MACs", before.macs, after.macs)):
        table.add_row(name, _count(old), _count(new), _change(old, new))
    table.add_row("file", _bytes(before.bytes), _bytes(after.bytes), _change(before.bytes, after.bytes))
    if before.latency_ms and after.latency_ms:
        change = _speed(before.latency_ms, after.latency_ms)
        table.add_row("latency", _latency(before), _latency(after), change)
    if quality is not None:
        name = quality.metric
        table.add_row(name, _metric(name, quality.before), _metric(name, quality.after), _drop(quality))
    return table


def _steps_table(then: Conversion, quality: Quality | None) -> Table:
    """Compression and conversion, each alone and both."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    models = (then.original, then.compressed, then.quantized, then.both)
    for title in ("original", "compressed", f"{then.kind} only", f"compressed, {then.kind}"):
        table.add_column(title, justify="right")

    def add(name: str, show: Callable[[ModelFacts], str]) -> None:
        table.add_row(name, *("-" if model is None else show(model) for model in models))

    add("file", lambda model: _bytes(model.bytes))
    if then.both.latency_ms is not None:
        add("latency", _latency)
    if quality is not None and then.both.metric is not None:
        add(quality.metric, lambda model: _metric(quality.metric, model.metric or 0.0))
    return table


def _step_lines(then: Conversion) -> list[Text]:
    lines = []
    if then.settings:
        how = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in then.settings.items())
        lines.append(Text(f"{then.kind}: {how}"))
    if then.left:
        named = ", ".join(then.left[:_MAX_NODES_NAMED])
        more = f" and {len(then.left) - _MAX_NODES_NAMED} more" if len(then.left) > _MAX_NODES_NAMED else ""
        lines.append(Text(f"left in float32: {named}{more}", overflow="fold"))
    return lines


def _latency_lines(latency: Latency | None) -> list[Text]:
    if latency is None:
        return []
    low, high = latency.interval
    threads = "threads as onnxruntime chooses"
    if latency.threads is not None:
        threads = _plural(latency.threads, "thread")
    provider = latency.provider.removesuffix("ExecutionProvider")
    return [
        Text(
            f"latency: {latency.ratio:.3f} of the original's (95 %: {low:.3f} to {high:.3f}), batch "
            f"{latency.batch}, {threads}, {provider}"
        )
    ]


def _quality_lines(quality: Quality | None, *, of: str = "held-out sample") -> list[Text]:
    if quality is None:
        return []
    low, high = (_signed(quality.metric, -bound) for bound in reversed(quality.interval))
    text = f"quality: {_drop(quality)} ({low} to {high}) on {_plural(quality.n_samples, of)}"
    if quality.max_drop is None:
        return [Text(text)]
    verdict = "passed" if quality.passed else "FAILED"
    limit = _signed(quality.metric, -quality.max_drop)
    return [Text(f"{text}; gate {limit} {verdict}", style="" if quality.passed else "red")]


def _fidelity_lines(fidelity: Fidelity | None) -> list[Text]:
    if fidelity is None:
        return []
    parts = []
    if fidelity.agreement is not None:
        parts.append(f"same top class {100 * fidelity.agreement:.2f} %")
    if fidelity.r2 is not None:
        parts.append(f"r2 {fidelity.r2:.4f}")
    if fidelity.max_abs_error is not None:
        parts.append(f"largest error {fidelity.max_abs_error:.3g}")
    return [Text("against the original: " + ", ".join(parts))] if parts else []


def _recovery_lines(rounds: Sequence[RoundRecovered]) -> list[Text]:
    """One line for each round with training."""
    lines = []
    for number, one in enumerate(rounds, start=1):
        if one.start_score is None or one.best_score is None:
            continue
        text = "training" + (f" in round {number}" if len(rounds) > 1 else "")
        text += f": distance to the original {one.start_score:.3g} -> {one.best_score:.3g}"
        text += f", best after {one.best_epoch:g} of {_plural(one.epochs or 0, 'epoch')}"
        lines.append(Text(text + (f", {_plural(one.rollbacks, 'rollback')}" if one.rollbacks else "")))
    return lines


def _budget_text(report: CompressReport) -> str:
    parts = []
    for name, asked in report.budget.asked.items():
        show = _bytes if name == "max_bytes" else _ratio
        reached = report.budget.reached.get(name)
        ending = "" if reached is None else f", reached {show(reached)}"
        parts.append(f"{name.replace('_', '-')} {show(asked)}{ending}")
    return "; ".join(parts)


def _plan_text(plan: PlanSummary) -> str:
    kept, size = sum(group.kept for group in plan.groups), sum(group.size for group in plan.groups)
    shrunk = sum(group.kept < group.size for group in plan.groups)
    text = f"{kept} of {size} channels kept, {shrunk} of {_plural(len(plan.groups), 'group')} narrower"
    if plan.implants:
        counts = Counter(implant.kind for implant in plan.implants)
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
        text += f", {_plural(len(plan.implants), 'implant')} ({kinds})"
    if plan.removed_branches:
        text += f", {_plural(len(plan.removed_branches), 'residual branch')} removed"
    return text


def _layout_inspect(report: InspectReport) -> RenderableType:
    size = report.size
    facts = f"{_count(size.params)} parameters, {_count(size.macs)} MACs, {_bytes(size.bytes)}"
    title = Text(report.model, style="bold", overflow="fold")
    parts: list[RenderableType] = [title, Text(facts), *_share_lines(report)]
    if report.groups:
        parts += [Text(""), _groups_table(report)]
    if report.frozen:
        parts += [Text(""), Text("why not pruned", style="bold"), *_reason_lines(report.frozen)]
    refused = [FrozenNode(layer.node, layer.implant) for layer in report.layers if layer.implant]
    if refused:
        parts += [Text(""), Text("why no implant", style="bold"), *_reason_lines(refused)]
    return Group(*parts)


def _share_lines(report: InspectReport) -> list[Text]:
    lines = []
    for name in ("prunable", "implantable", "fixed"):
        share: Share = getattr(report, name)
        text = f"{name + ':':<13}{100 * share.params_ratio:5.1f} % of the parameters"
        if share.macs_ratio is not None:
            text += f", {100 * share.macs_ratio:5.1f} % of the MACs"
        lines.append(Text(text))
    return lines


def _groups_table(report: InspectReport) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("channel group", overflow="fold")
    table.add_column("role")
    for title in ("channels", "in steps of", "parameters", "MACs"):
        table.add_column(title, justify="right")
    for group in report.groups:
        counts = str(group.size), str(group.multiple), _count(group.params), _count(group.macs)
        table.add_row(group.name, group.role, *counts)
    return table


def _reason_lines(frozen: Iterable[FrozenNode]) -> list[Text]:
    """One line per reason: a hundred nodes often share one."""
    nodes_by_reason: dict[str, list[str]] = {}
    for entry in frozen:
        nodes_by_reason.setdefault(entry.reason, []).append(entry.node)
    lines = []
    for reason, nodes in nodes_by_reason.items():
        named = ", ".join(nodes[:_MAX_NODES_NAMED])
        more = f" and {len(nodes) - _MAX_NODES_NAMED} more" if len(nodes) > _MAX_NODES_NAMED else ""
        lines.append(Text(f"  {named}{more}: {reason}", overflow="fold"))
    return lines


# ---------------------------------------------------------------- sweeps

SWEEP_CAUTION = (
    "The quality of each point was measured on samples that were used for nothing else. Choosing among "
    "several by these figures makes the one chosen look better than it is: check it once more on other data."
)


def _layout_sweep(report: SweepReport) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim")
    titles, *rows = _sweep_rows(report)
    for title in titles:
        table.add_column(title, justify="right" if title else "left")
    for row in rows:
        table.add_row(*row)
    lines = [*_sweep_notes(report)]
    if any(point.best for point in report.points):
        lines += [f"to write one: {_apply_command(report)}", SWEEP_CAUTION]
    total = sum(report.seconds.values())
    if total:
        lines.append(f"time: {total:.1f} s")
    head = Text(f"{report.model} -> {report.output or '(nothing written)'}", style="bold", overflow="fold")
    return Group(head, table, *(Text(line, overflow="fold") for line in lines))


def render_sweep_markdown(report: SweepReport) -> str:
    """Return the table of a sweep as Markdown, with what was refused, and how to write a model."""
    report = _printable(report)
    titles, *rows = _sweep_rows(report)
    plans = [""] * (len(rows) - len(report.points)) + [point.plan or "" for point in report.points]
    cells = [(*titles, "plan"), ("---",) * (len(titles) + 1)]
    cells += [(*row, plan) for row, plan in zip(rows, plans, strict=True)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in cells).replace("| * |", "| \\* |")
    notes = "\n".join(f"- {note}" for note in _sweep_notes(report))
    parts = [f"# {report.model}", table, notes, "![quality over cost](sweep.svg)"]
    if any(point.best for point in report.points):
        parts += [f"    {_apply_command(report)}", SWEEP_CAUTION]
    return "\n\n".join(parts) + "\n"


def _sweep_rows(report: SweepReport) -> list[tuple[str, ...]]:
    """Titles, the original, and one row per point; costs are fractions of the original's."""
    measured = [point.quality for point in report.points if point.quality is not None]
    metric = measured[0].metric if measured else "quality"
    rows: list[tuple[str, ...]] = [("", "keep", "MACs", "params", "latency (95 %)", metric, "change (95 %)")]
    if measured:
        rows.append(("", "", "1.000", "1.000", "1.00", _metric(metric, measured[0].before), ""))
    for point in report.points:
        mark = "x" if point.refused else "*" if point.best else ""
        rows.append((mark, _keep(point.keep), *_sweep_figures(point)))
    return rows


def _sweep_figures(point: SweepPoint) -> tuple[str, ...]:
    costs = (point.reached.get(name) for name in ("keep_macs", "keep_params"))
    shares = ["" if cost is None else f"{cost:.3f}" for cost in costs]
    latency = quality = change = ""
    if point.latency is not None:
        low, high = point.latency.interval
        latency = f"{point.latency.ratio:.2f} ({low:.2f}-{high:.2f})"
    if point.quality is not None:
        name = point.quality.metric
        quality = _metric(name, point.quality.after)
        worst, best = (_signed(name, -bound) for bound in reversed(point.quality.interval))
        change = f"{_signed(name, -point.quality.drop)} ({worst}, {best})"
    return *shares, latency, quality, change


def _sweep_notes(report: SweepReport) -> list[str]:
    """What the marks mean, which points were refused and why, and what is missing."""
    cost = {"params": "parameters", "macs": "MACs", "latency": "latency"}[report.objective]
    notes = [f"*: no other point is as good, or better, at no more {cost}"]
    for point in report.points:
        if point.refused is not None:
            kept = "" if point.plan is None else f" (its plan is {point.plan})"
            notes.append(f"x {_keep(point.keep)}: {point.refused}{kept}")
    if not report.complete:
        notes.append(f"unfinished: {len(report.points)} of {_plural(len(report.asked), 'point')} are done")
    return notes


def _keep(ratio: float) -> str:
    return f"{ratio:.2f}" if round(ratio, 2) == ratio else f"{ratio:g}"


def _apply_command(report: SweepReport) -> str:
    """How to write a model, the smallest of the best."""
    plan = next(point.plan or "" for point in reversed(report.points) if point.best)
    return f"hap-onnx apply {report.model} {Path(report.output or '') / plan}"


# ---------------------------------------------------------------- numbers


def _plural(number: int, word: str) -> str:
    ending = "" if number == 1 else "es" if word.endswith("branch") else "s"
    return f"{number} {word}{ending}"


def _count(number: float | None) -> str:
    if number is None:
        return "?"
    for limit, divisor, unit in ((1e7, 1, ""), (1e10, 1e6, " M"), (1e13, 1e9, " G")):
        if number < limit:
            return f"{number:,.0f}" if divisor == 1 else f"{number / divisor:,.1f}{unit}"
    return f"{number / 1e12:,.1f} T"


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.2f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def _ratio(number: float) -> str:
    return f"{100 * number:.1f} %"


def _change(before: float | None, after: float | None) -> str:
    return "" if not before or after is None else f"{100 * (after / before - 1):+.1f} %"


def _latency(facts: ModelFacts) -> str:
    return f"{facts.latency_ms:.3f} ms"


def _speed(before: float, after: float) -> str:
    return f"{before / after:.2f}x faster" if after <= before else f"{after / before:.2f}x slower"


def _metric(name: str, value: float) -> str:
    return f"{100 * value:.2f} %" if name in _SHARES else f"{value:.4f}"


def _signed(name: str, value: float) -> str:
    value += 0.0  # no negative zero
    return f"{100 * value:+.2f}" if name in _SHARES else f"{value:+.4f}"


def _drop(quality: Quality) -> str:
    return _signed(quality.metric, -quality.drop) + (" points" if quality.metric in _SHARES else "")


# ---------------------------------------------------------------- events


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage(), keep="\n"), ()
    return True


class EventPrinter:
    """An ``on_event`` that draws one bar per stage on a terminal, and prints notes and warnings.

    Bars vanish when the job ends. Without a terminal, or when quiet, there are none; when quiet, there
    are no notes either.
    """

    def __init__(self, stream: TextIO, *, quiet: bool) -> None:
        self._quiet = quiet
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=12), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            TextColumn("{task.fields[words]}"),
        )  # fmt: skip
        hidden = quiet or not self._console.is_terminal
        self._progress = Progress(*columns, console=self._console, transient=True, disable=hidden)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> EventPrinter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def log_handler(self) -> logging.Handler:
        """Return a handler that prints log records without disturbing the bars."""
        handler = RichHandler(console=self._console, show_path=False, show_time=False, markup=False)
        handler.addFilter(_make_printable)
        return handler

    def __call__(self, event: Event) -> None:
        if event.kind == "start":
            self._start(event)
        elif event.kind == "advance" and event.stage in self._tasks:
            task = self._tasks[event.stage]
            self._progress.advance(task, event.amount)
            if event.message:
                self._progress.update(task, words=escape(event.message))
        elif event.kind == "end" and event.stage in self._tasks:
            self._progress.stop_task(self._tasks[event.stage])
        elif event.kind == "warning":
            self._console.print(Text(f"warning: {printable(event.message)}", style="yellow"))
        elif event.kind == "note" and not self._quiet:
            self._console.print(Text(printable(event.message)))

    def _start(self, event: Event) -> None:
        """Begin a stage, or begin it again: some stages run once per round."""
        if event.stage in self._tasks:  # a task that was stopped keeps its time, even if it is reset
            self._progress.remove_task(self._tasks[event.stage])
        self._tasks[event.stage] = self._progress.add_task(escape(event.stage), total=event.total, words="")
