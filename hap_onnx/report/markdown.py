"""Reports as GitHub-flavoured Markdown, for job summaries and comments on pull requests.

Names in a model, file names and the sentences that quote them can hold anything; on a page that others read
they must not become markup, links or mentions. Names are therefore code spans, and sentences are escaped.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from hap_onnx.report import (
    AnalyzeReport,
    CompressReport,
    FrozenNode,
    Latency,
    ModelFacts,
    Quality,
    SweepReport,
    ValidateReport,
    words,
)
from hap_onnx.report.analysis import Analysis
from hap_onnx.report.printable import one_line, printable

PASSED, REFUSED, NOTICE = "✅", "❌", "⚠️"
MAX_REASONS = 40  # a comment on a pull request holds 65,536 characters
MAX_GROUPS = 10

_LONGEST = 300
_MARKUP = re.compile(r"[\\`*_{}\[\]<>|~&$]|^[#+=-](?=[\s#+=-]|$)")
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")  # the start of a list
_LINKS = re.compile(r"[@#]|:(?=//)|www(?=\.)", re.IGNORECASE)  # what GitHub makes links of by itself


def render_summary(
    report: CompressReport | SweepReport | ValidateReport | AnalyzeReport,
    *,
    refusal: str | None = None,
    warnings: Sequence[str] = (),
) -> str:
    """Return a report as Markdown, the verdict first.

    Args:
        refusal: why nothing was written, if the command ends in an error: the message of the error.
        warnings: what the job said on its way that a reader should know.
    """
    if isinstance(report, AnalyzeReport):
        parts = _analyze(report)
    elif isinstance(report, SweepReport):
        parts = _sweep(report, refusal)
    elif isinstance(report, ValidateReport):
        parts = _validate(report)
    else:
        parts = _compress(report, refusal)
    if warnings:
        parts.append(_bullets(f"{NOTICE} {escape(warning)}" for warning in warnings))
    if not isinstance(report, (SweepReport, ValidateReport)):
        parts += _frozen(report.frozen)
    return _join([*parts, _provenance(report.versions, report.seed, report.seconds)])


def render_sweep_markdown(report: SweepReport) -> str:
    """Return the page of a sweep's folder: its table, and the plot that lies beside it."""
    return _join([*_sweep(report, None), "![quality over cost](sweep.svg)"])


# ---------------------------------------------------------------- by command


def _compress(report: CompressReport, refusal: str | None) -> list[str]:
    # What was measured and is not there was refused; a dry run measures nothing.
    failed = refusal is not None or (report.output is None and report.quality is not None)
    mark = REFUSED if failed else PASSED if report.output is not None else ""
    gains = _gains(report.before, report.after, report.latency, report.quality)
    if failed:
        head = f"refused: {gains}"
        outcome = "**Nothing was written.**" + (f" {escape(_sentence(refusal))}" if refusal else "")
    elif report.output is None:
        head, outcome = gains, "Nothing was written: this is a plan, not measured yet."
    else:
        head, outcome = gains, f"Written to {code(report.output)}."
    lines = [*words.budget_lines(report), *words.latency_lines(report.latency)]
    lines += [*words.quality_lines(report.quality), *words.fidelity_lines(report.fidelity)]
    lines += words.plan_lines(report)
    parts = [_heading(mark, code(report.model), head), outcome, _table(words.facts_rows(report))]
    parts += _caveats(report.quality)
    parts.append(_bullets(map(escape, lines)))
    if report.then is not None:
        parts.append(_table(words.step_rows(report.then, report.quality)))
        parts.append(_bullets(map(escape, words.step_lines(report.then))))
    return parts


def _validate(report: ValidateReport) -> list[str]:
    names = f"{code(report.candidate)} against {code(report.reference)}"
    gains = _gains(report.before, report.after, report.latency, report.quality)
    head = f"{'passed' if report.passed else 'fails the gate'}: {gains}"
    lines = [*words.latency_lines(report.latency), *words.quality_lines(report.quality, of="sample")]
    lines += words.fidelity_lines(report.fidelity)
    parts = [_heading(PASSED if report.passed else REFUSED, names, head), _table(words.facts_rows(report))]
    if report.slower:
        parts.append(f"{NOTICE} The candidate is {words.SLOWER}.")
    return [*parts, *_caveats(report.quality), _bullets(map(escape, lines))]


def _sweep(report: SweepReport, refusal: str | None) -> list[str]:
    n_best = sum(point.best for point in report.points)
    mark = PASSED if n_best else REFUSED
    head = f"{words.plural(len(report.points), 'model')} tried, {n_best} to choose from"
    titles, *rows = words.sweep_rows(report)
    plans = [""] * (len(rows) - len(report.points)) + [point.plan or "" for point in report.points]
    cells = [(*titles, "plan"), *((*row, plan) for row, plan in zip(rows, plans, strict=True))]
    parts = [_heading(mark, code(report.model), head)]
    if not n_best:
        parts.append("**Nothing was written.**" + (f" {escape(_sentence(refusal))}" if refusal else ""))
    parts += [_table(cells), _bullets(map(escape, words.sweep_notes(report)))]
    command = words.apply_command(report)
    if command is not None:
        parts += [f"To write one: {code(command)}", words.SWEEP_CAUTION]
    return parts


def _analyze(report: AnalyzeReport) -> list[str]:
    size, analysis = report.size, report.analysis
    facts = f"{words.count(size.params)} parameters, {words.count(size.macs)} MACs, "
    facts += words.file_size(size.bytes)
    groups, layers = len(analysis.groups), len(analysis.layers)
    head = f"{words.plural(groups, 'group')} of channels can shrink, {words.plural(layers, 'layer')} can be "
    parts = [_heading("", code(report.model), f"{head}replaced"), facts]
    if analysis.sizes:
        parts += ["What each size is expected to cost (0 is no change of the outputs):", _sizes(analysis)]
    if analysis.groups:
        parts += [f"The least sensitive channels ({analysis.sensitivity}):", _groups(analysis)]
    return parts


def _sizes(analysis: Analysis) -> str:
    rows: words.Rows = [("keep", "parameters", "MACs", "latency", "expected loss")]
    for point in analysis.sizes:
        latency = "" if point.latency_ratio is None else words.share(point.latency_ratio)
        shares = words.share(point.params_ratio), words.share(point.macs_ratio), latency
        rows.append((words.share(point.asked), *shares, f"{point.loss:.3g}"))
    return _table(rows)


def _groups(analysis: Analysis) -> str:
    rows: words.Rows = [("group", "channels", "parameters", "MACs", "sensitivity")]
    for group in sorted(analysis.groups, key=lambda group: group.score)[:MAX_GROUPS]:
        error = "" if group.std_error is None else f" ± {group.std_error:.2g}"
        costs = words.count(group.params), words.count(group.macs)
        rows.append((group.name, str(group.size), *costs, f"{group.score:.3g}{error}"))
    return _table(rows, names=1)


# ---------------------------------------------------------------- parts of a page


def _heading(mark: str, name: str, text: str) -> str:
    return f"### {mark} {name}: {text}" if mark else f"### {name}: {text}"


def _gains(before: ModelFacts, after: ModelFacts, latency: Latency | None, quality: Quality | None) -> str:
    """What became smaller, what faster, and what that costs."""
    size, macs = words.change(before.bytes, after.bytes), words.change(before.macs, after.macs)
    parts = [f"{name} {change}" for name, change in (("file", size), ("MACs", macs)) if change]
    if latency is not None:
        parts.append(words.speed(latency.ratio))
    if quality is not None:
        parts.append(f"{escape(quality.metric)} {words.quality_change(quality)}")
    return ", ".join(parts)


def _caveats(quality: Quality | None) -> list[str]:
    """What the verdict of the quality gate does not say."""
    if quality is None:
        return []
    if quality.max_drop is None:
        return [f"{NOTICE} There was no quality gate; {code('--max-drop')} sets one."]
    if quality.passed and quality.interval[1] > quality.max_drop:
        return [f"{NOTICE} The gate is passed, but the interval reaches beyond it: more data would tell."]
    return []


def _frozen(frozen: Sequence[FrozenNode]) -> list[str]:
    """What could not be touched, folded, one line per reason."""
    if not frozen:
        return []
    by_reason = list(words.group_by_reason(frozen).items())
    lines = []
    for reason, nodes in by_reason[:MAX_REASONS]:
        names = ", ".join(map(code, nodes[: words.MAX_NODES_NAMED]))
        n_more = len(nodes) - words.MAX_NODES_NAMED
        lines.append(f"{names}{f' and {n_more} more' if n_more > 0 else ''}: {escape(reason)}")
    n_left = len(by_reason) - MAX_REASONS
    if n_left > 0:
        lines.append(f"and {words.plural(n_left, 'other reason')}")
    summary = f"<summary>{words.plural(len(frozen), 'node')} could not be touched, and why</summary>"
    return [f"<details>{summary}", _bullets(lines), "</details>"]


def _provenance(versions: Mapping[str, str], seed: int, seconds: Mapping[str, float]) -> str:
    tools = [f"{name.replace('_', '-')} {version}" for name, version in versions.items()]
    total = sum(seconds.values())
    return escape(" · ".join([*tools, f"seed {seed}", *([f"{total:.1f} s"] if total else [])]))


def _table(rows: words.Rows, *, names: int = 0) -> str:
    """Lay out rows of which the first holds the titles; the first ``names`` columns hold names of a model."""
    titles, *others = rows
    table = Table(box=box.MARKDOWN)
    for index, title in enumerate(titles):
        table.add_column(escape(title), justify="right" if index else "left", no_wrap=True)
    for row in others:
        cells = [code(cell).replace("|", "\\|") for cell in row[:names]]
        table.add_row(*cells, *map(escape, row[names:]))
    buffer = io.StringIO()
    width = sum(4 * _LONGEST for _ in titles)
    Console(file=buffer, width=width, markup=False, highlight=False, emoji=False).print(table)
    head, rule, *body = (line.strip() for line in buffer.getvalue().splitlines() if line.strip())
    first, *rules = rule.strip("|").split("|")
    aligned = "|".join(["", first, *(f"{dashes[:-1]}:" for dashes in rules), ""])
    return "\n".join([head, aligned, *body])


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _join(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


# ---------------------------------------------------------------- text from files


def code(text: str) -> str:
    """Return text as a code span, in which nothing is markup, a link or a mention."""
    text = one_line(printable(text), longest=_LONGEST) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def escape(text: str) -> str:
    """Return a sentence as Markdown that shows it as it is, in a paragraph, a heading or a table."""
    text = _MARKUP.sub(r"\\\g<0>", one_line(text, longest=_LONGEST))
    text = _NUMBERED.sub(r"\1\\\2", text)
    return _LINKS.sub(r"\g<0>&#8203;", text)  # a space without width
