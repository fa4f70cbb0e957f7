"""Sensitivities for a terminal: tables with bars on a logarithmic scale, the most sensitive last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hap_onnx.report import AnalyzeReport, words
from hap_onnx.report.analysis import GroupSensitivity, LayerSensitivity, SizePoint

BAR_WIDTH = 12
_CURRENCY = "0 is no change of the outputs, 0.5 to 1 are outputs that no longer depend on the input"
_OBS = "loss per channel when half of the group goes"


def layout_analysis(report: AnalyzeReport, *, bar: str) -> RenderableType:
    """Return tables of groups, layers and sizes, 80 columns wide; ``bar`` is what bars are drawn of."""
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
        parts.append(_groups(analysis.groups, bar))
    if analysis.layers:
        title = "layers by expected loss of an implant of half their MACs"
        parts += [Text(""), Text(title, style="bold"), _layers(analysis.layers, bar)]
    if analysis.sizes:
        title = "what sizes are expected to cost"
        parts += [Text(""), Text(title, style="bold"), _sizes(analysis.sizes, bar)]
    return Group(*parts)


def _groups(groups: Sequence[GroupSensitivity], bar: str) -> Table:
    table = _make_table("group", "role", "channels", "parameters", "MACs", "sensitivity")
    scale = _Scale([group.score for group in groups], bar)
    for group in sorted(groups, key=lambda group: group.score):
        costs = words.count(group.params), words.count(group.macs)
        shown = _with_error(group.score, group.std_error)
        table.add_row(group.name, group.role, str(group.size), *costs, shown, scale.draw(group.score))
    return table


def _layers(layers: Sequence[LayerSensitivity], bar: str) -> Table:
    table = _make_table("layer", "", "parameters", "MACs", "loss")
    scale = _Scale([layer.score for layer in layers], bar)
    for layer in sorted(layers, key=lambda layer: layer.score):
        costs = words.count(layer.params), words.count(layer.macs)
        shown = _with_error(layer.score, layer.std_error)
        table.add_row(layer.node, layer.op_type, *costs, shown, scale.draw(layer.score))
    return table


def _sizes(sizes: Sequence[SizePoint], bar: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    is_timed = any(point.latency_ratio is not None for point in sizes)
    for title in ("keep", "parameters", "MACs", *(["latency"] if is_timed else []), "loss"):
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
    table.add_column(name, overflow="fold", ratio=1)
    table.add_column(kind)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", min_width=BAR_WIDTH)
    return table


def _with_error(value: float, error: float | None) -> str:
    if not math.isfinite(value):
        return "unknown"
    return f"{value:.2g}" if error is None else f"{value:.2g} ({error:.0e})"


@dataclass(frozen=True)
class _Scale:
    """Bars for numbers, of which the least positive one is a twelfth of the largest's length."""

    values: Sequence[float]
    bar: str

    def draw(self, value: float) -> str:
        positive = [one for one in self.values if 0 < one < math.inf]
        if not 0 < value < math.inf:
            return ""
        low, high = math.log(min(positive)), math.log(max(positive))
        share = (math.log(value) - low) / (high - low) if high > low else 1.0
        return self.bar * (1 + round(share * (BAR_WIDTH - 1)))
