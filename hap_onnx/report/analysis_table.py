"""Sensitivities for a terminal: tables with bars on a logarithmic scale, the most sensitive last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from hap_onnx.report import AnalyzeReport, ModelFacts, words
from hap_onnx.report.analysis import GroupSensitivity, LayerSensitivity, SizePoint
from hap_onnx.report.short_names import shorten

BAR_WIDTH = 8
NAME_WIDTH = 14  # that each name has at least
_CURRENCY = "0 is no change of the outputs, 0.5 to 1 are outputs that no longer depend on the input"
_OBS = "loss per channel when half of the group goes"


def layout_analysis(report: AnalyzeReport, *, bar: str) -> RenderableType:
    """Return tables of groups, layers and sizes; ``bar`` is what bars are drawn of.

    Costs are shares of the model's, and names are shortened where there is no room: a row is one line also
    where 80 columns must do.
    """
    analysis = report.analysis
    counts = f"{words.count(report.size.params)} parameters, {words.count(report.size.macs)} MACs"
    parts: list[RenderableType] = [
        Text(report.model, style="bold", overflow="fold"),
        Text(f"{counts}, {words.file_size(report.size.bytes)}"),
        Text(f"losses measured on {words.plural(analysis.n_samples, 'sample')}: {_CURRENCY}"),
    ]
    if analysis.groups:
        what = _OBS if analysis.sensitivity == "obs" else f"score per channel, {analysis.sensitivity}"
        parts += [Text(""), Text(f"channel groups by sensitivity ({what})", style="bold")]
        parts.append(_groups(analysis.groups, report.size, bar))
    if analysis.layers:
        title = "layers by expected loss of an implant of half their MACs"
        parts += [Text(""), Text(title, style="bold"), _layers(analysis.layers, report.size, bar)]
    if analysis.sizes:
        title = "what sizes are expected to cost"
        parts += [Text(""), Text(title, style="bold"), _sizes(analysis.sizes, bar)]
    return Group(*parts)


def _groups(groups: Sequence[GroupSensitivity], size: ModelFacts, bar: str) -> Table:
    table = _make_table("group", "role", "channels", "params", "MACs", "sensitivity")
    scale = _Scale([group.score for group in groups], bar)
    names = tuple(group.name for group in groups)
    for place, group in sorted(enumerate(groups), key=lambda item: item[1].score):
        costs = _share(group.params, size.params), _share(group.macs, size.macs)
        shown = _with_error(group.score, group.std_error)
        name = _Name(names, place)
        table.add_row(name, group.role, str(group.size), *costs, shown, scale.draw(group.score))
    return table


def _layers(layers: Sequence[LayerSensitivity], size: ModelFacts, bar: str) -> Table:
    table = _make_table("layer", "", "params", "MACs", "loss")
    scale = _Scale([layer.score for layer in layers], bar)
    names = tuple(layer.node for layer in layers)
    for place, layer in sorted(enumerate(layers), key=lambda item: item[1].score):
        costs = _share(layer.params, size.params), _share(layer.macs, size.macs)
        shown = _with_error(layer.score, layer.std_error)
        table.add_row(_Name(names, place), layer.op_type, *costs, shown, scale.draw(layer.score))
    return table


def _sizes(sizes: Sequence[SizePoint], bar: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    is_timed = any(point.latency_ratio is not None for point in sizes)
    for title in ("keep", "params", "MACs", *(["latency"] if is_timed else []), "loss"):
        table.add_column(title, justify="right")
    table.add_column("")
    scale = _Scale([point.loss for point in sizes], bar)
    for point in sizes:
        shares = [point.asked, point.params_ratio, point.macs_ratio]
        shares += [point.latency_ratio or 0.0] if is_timed else []
        table.add_row(*map(words.share, shares), f"{point.loss:.2g}", scale.draw(point.loss))
    return table


def _make_table(name: str, kind: str, *titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(name)
    table.add_column(kind)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", min_width=BAR_WIDTH)
    return table


def _share(part: float | None, whole: float | None) -> str:
    return words.share(part / whole) if part is not None and whole else "?"


def _with_error(value: float, error: float | None) -> str:
    if not math.isfinite(value):
        return "unknown"
    return f"{value:.2g}" if error is None else f"{value:.2g} ({error:.0e})"


@cache
def _fitting(names: tuple[str, ...], width: int) -> Sequence[str]:
    """Names in full where all have room, else shortened."""
    return names if max(map(len, names)) <= width else shorten(names, width)


@dataclass(frozen=True)
class _Name:
    """A cell with one of the names in a column, as long as the column has room."""

    names: tuple[str, ...]
    place: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(_fitting(self.names, options.max_width)[self.place], no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max(map(len, self.names))
        return Measurement(min(longest, NAME_WIDTH), longest)


@dataclass(frozen=True)
class _Scale:
    """Bars for numbers on a logarithmic scale, of which that of the least positive one has one letter."""

    values: Sequence[float]
    bar: str

    def draw(self, value: float) -> str:
        positive = [one for one in self.values if 0 < one < math.inf]
        if not 0 < value < math.inf:
            return ""
        low, high = math.log(min(positive)), math.log(max(positive))
        share = (math.log(value) - low) / (high - low) if high > low else 1.0
        return self.bar * (1 + round(share * (BAR_WIDTH - 1)))
