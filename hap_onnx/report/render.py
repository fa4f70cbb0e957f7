"""Reports and events for people: tables on stdout, bars and notes on stderr. Part of the command line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable
from typing import TextIO

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
    AnalyzeReport,
    CompressReport,
    FrozenNode,
    InspectReport,
    Quality,
    Report,
    Share,
    SweepReport,
    ValidateReport,
    words,
)
from hap_onnx.report.analysis_table import layout_analysis
from hap_onnx.report.printable import printable, printable_parts

DEFAULT_WIDTH = 80


# ---------------------------------------------------------------- reports


def render_json(report: Report) -> str:
    """Return a report as strict JSON with a newline at its end."""
    text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    harmful = {letter for letter in text if letter != "\n" and printable(letter) != letter}
    return text.translate({ord(letter): json.dumps(letter)[1:-1] for letter in harmful})


def render_report(report: Report, stream: TextIO, *, advice: str | None = None) -> str:
    """Return a report as text that suits ``stream``: coloured and as wide as a terminal, else plain.

    ``advice`` is what to run next.
    """
    width = None if stream.isatty() else DEFAULT_WIDTH
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, force_terminal=stream.isatty(), highlight=False, markup=False)
    bar = "\u2588" if _can_show("\u2588", stream) else "#"
    console.print(_layout(printable_parts(report), bar=bar))
    if advice is not None:
        console.print(Text(f"next: {printable(advice)}", style="dim"), soft_wrap=True)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _can_show(letter: str, stream: TextIO) -> bool:
    try:
        letter.encode(stream.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def _layout(report: Report, *, bar: str) -> RenderableType:
    if isinstance(report, InspectReport):
        return _layout_inspect(report)
    if isinstance(report, SweepReport):
        return _layout_sweep(report)
    if isinstance(report, AnalyzeReport):
        return Group(layout_analysis(report, bar=bar), *_texts(_time_lines(report)))
    if isinstance(report, ValidateReport):
        title = f"{report.reference} -> {report.candidate}"
        lines = [*_texts(words.latency_lines(report.latency)), *_quality_texts(report.quality, of="sample")]
        lines += _texts(words.fidelity_lines(report.fidelity))
        lines += _texts([words.SLOWER] if report.slower else [], style="red")
    else:
        title = f"{report.model} -> {report.output or '(nothing written)'}"
        lines = _compress_texts(report)
    parts: list[RenderableType] = [_title(title), _table(words.facts_rows(report)), *lines]
    if isinstance(report, CompressReport) and report.then is not None:
        parts += [Text(""), _table(words.step_rows(report.then, report.quality))]
        parts += _texts(words.step_lines(report.then))
    return Group(*parts)


def _compress_texts(report: CompressReport) -> list[Text]:
    texts = _texts([*words.budget_lines(report), *words.latency_lines(report.latency)])
    texts += _quality_texts(report.quality)
    texts += _texts([*words.fidelity_lines(report.fidelity), *words.plan_lines(report)])
    if report.frozen:
        texts += _texts([f"frozen: {words.plural(len(report.frozen), 'node')}; 'hap-onnx inspect' says why"])
    return texts + _texts(_time_lines(report))


def _quality_texts(quality: Quality | None, *, of: str = "held-out sample") -> list[Text]:
    style = "" if quality is None or quality.passed else "red"
    return _texts(words.quality_lines(quality, of=of), style=style)


def _time_lines(report: CompressReport | SweepReport | AnalyzeReport) -> list[str]:
    total = sum(report.seconds.values())
    return [f"time: {total:.1f} s"] if total else []


def _layout_inspect(report: InspectReport) -> RenderableType:
    size = report.size
    counts = f"{words.count(size.params)} parameters, {words.count(size.macs)} MACs"
    parts: list[RenderableType] = [_title(report.model), Text(f"{counts}, {words.file_size(size.bytes)}")]
    parts += _share_texts(report)
    if report.groups:
        parts += [Text(""), _groups_table(report)]
    if report.frozen:
        parts += [Text(""), Text("why not pruned", style="bold"), *_reason_texts(report.frozen)]
    refused = [FrozenNode(layer.node, layer.implant) for layer in report.layers if layer.implant]
    if refused:
        parts += [Text(""), Text("why no implant", style="bold"), *_reason_texts(refused)]
    return Group(*parts)


def _share_texts(report: InspectReport) -> list[Text]:
    texts = []
    for name in ("prunable", "implantable", "fixed"):
        share: Share = getattr(report, name)
        text = f"{name + ':':<13}{100 * share.params_ratio:5.1f} % of the parameters"
        if share.macs_ratio is not None:
            text += f", {100 * share.macs_ratio:5.1f} % of the MACs"
        texts.append(Text(text))
    return texts


def _groups_table(report: InspectReport) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("channel group", overflow="fold")
    table.add_column("role")
    for title in ("channels", "in steps of", "parameters", "MACs"):
        table.add_column(title, justify="right")
    for group in report.groups:
        costs = words.count(group.params), words.count(group.macs)
        table.add_row(group.name, group.role, str(group.size), str(group.multiple), *costs)
    return table


def _reason_texts(frozen: Iterable[FrozenNode]) -> list[Text]:
    by_reason = words.group_by_reason(frozen)
    return _texts(f"  {words.named(nodes)}: {reason}" for reason, nodes in by_reason.items())


def _layout_sweep(report: SweepReport) -> RenderableType:
    lines = words.sweep_notes(report)
    command = words.apply_command(report)
    if command is not None:
        lines += [f"to write one: {command}", words.SWEEP_CAUTION]
    title = _title(f"{report.model} -> {report.output or '(nothing written)'}")
    return Group(title, _table(words.sweep_rows(report)), *_texts([*lines, *_time_lines(report)]))


def _title(text: str) -> Text:
    return Text(text, style="bold", overflow="fold")


def _texts(lines: Iterable[str], *, style: str = "") -> list[Text]:
    return [Text(line, style=style, overflow="fold") for line in lines]


def _table(rows: words.Rows) -> Table:
    """Lay out rows of which the first holds the titles."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    titles, *others = rows
    for title in titles:
        table.add_column(title, justify="right" if title else "left")
    for row in others:
        table.add_row(*row)
    return table


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
        self._noted = ""

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
        elif event.kind == "note" and not self._quiet and event.message != self._noted:
            self._noted = event.message  # what holds of --data holds of --val, too, and is said once
            self._console.print(Text(printable(event.message)))

    def _start(self, event: Event) -> None:
        """Begin a stage, or begin it again: some stages run once per round."""
        if event.stage in self._tasks:  # a task that was stopped keeps its time, even if it is reset
            self._progress.remove_task(self._tasks[event.stage])
        self._tasks[event.stage] = self._progress.add_task(escape(event.stage), total=event.total, words="")
