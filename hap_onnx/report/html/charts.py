"""The charts of a page; importing this imports matplotlib, which takes a moment.

Each is drawn twice, for a narrow and for a wide screen, in sizes at which text can be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from hap_onnx.report import SweepReport
from hap_onnx.report.html.svg import (
    FIRST,
    GONE,
    GRID,
    INK,
    PIXELS_PER_INCH,
    SECOND,
    THIRD,
    drawing,
    inline_svg,
)
from hap_onnx.report.plot import sweep_figure
from hap_onnx.report.short_names import shorten

_WIDTHS = {"narrow": 320, "wide": 720}  # CSS pixels
_LONGEST_NAMES = {"narrow": 18, "wide": 42}
_FULL_ROWS = 60  # from here on rows are thin, and not each one has a label
_ROW, _THIN_ROW, _LABEL = 20.0, 8.0, 15.0  # pixels
_Z95 = 1.96

_SERIES = ((FIRST, "o"), (SECOND, "s"), (THIRD, "^"))


@dataclass(frozen=True)
class Drawing:
    """One chart, for a narrow and for a wide screen."""

    narrow: Markup
    wide: Markup


@dataclass(frozen=True)
class Dot:
    """A row of a dot chart: ``value`` with its standard error, and the series that gives it its colour."""

    name: str
    value: float
    std_error: float | None
    series: str


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart, divided into parts by series."""

    name: str
    parts: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Mark:
    """A point of a scatter chart; ``std_error`` is that of ``y``."""

    x: float
    y: float
    std_error: float | None
    series: str


def draw_dots(name: str, rows: Sequence[Dot], *, label: str, series: Sequence[str]) -> Drawing:
    """Values on a log axis with 95 % intervals, one row each, the first on top.

    ``series`` says which of them has which colour, whether it is there or not.

    What is not above zero has no place on a log axis, and stands at its left end as an open mark; what is
    infinite, at its right end. There are no marks for what is no number.
    """
    return _draw(name, partial(_dots, rows=rows, label=label, series=series))


def draw_bars(name: str, rows: Sequence[Bar], *, label: str, series: Sequence[str]) -> Drawing:
    """Horizontal stacked bars, one row each, the first on top; ``series`` says in which order parts stack."""
    return _draw(name, partial(_bars, rows=rows, label=label, series=series))


def draw_agreement(name: str, marks: Sequence[Mark], *, x: str, y: str) -> Drawing:
    """One quantity over another on two log axes, with the line on which both are the same."""
    return _draw(name, partial(_agreement, marks=marks, x=x, y=y))


def draw_curve(
    name: str, points: Sequence[tuple[float, float]], chosen: tuple[float, float] | None, *, x: str, y: str
) -> Drawing:
    """A curve over a falling cost in per cent, and the point on it that was chosen."""
    return _draw(name, partial(_curve, points=points, chosen=chosen, x=x, y=y))


def draw_family(name: str, report: SweepReport) -> Drawing:
    """Quality over cost of the models of a sweep."""

    def build(size: str) -> Figure:
        return sweep_figure(report, (_inches(_WIDTHS[size]), _inches(330)))

    return _draw(name, build)


# ---------------------------------------------------------------- drawing


def _draw(name: str, build: Callable[[str], Figure]) -> Drawing:
    with drawing():
        drawn = {size: inline_svg(build(size), f"{name}-{size}") for size in _WIDTHS}
    return Drawing(**drawn)


def _inches(pixels: float) -> float:
    return pixels / PIXELS_PER_INCH


def _figure(size: str, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_inches(_WIDTHS[size]), _inches(height)), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color=GRID, alpha=0.35, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _rows_figure(size: str, names: Sequence[str], *, label: str, n_keys: int) -> tuple[Figure, Axes]:
    """A figure that is as high as its rows need, with their names at its left."""
    n = len(names)
    row = _ROW if n <= _FULL_ROWS else _THIN_ROW
    lines = n_keys if size == "narrow" else 1
    figure, axes = _figure(size, n * row + 48 + 18 * lines + (20 if n > _FULL_ROWS else 0))
    step = math.ceil(_LABEL / row)
    shown = shorten(names, _LONGEST_NAMES[size])
    axes.set_yticks(range(0, n, step), shown[::step])
    axes.set_ylim(n - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    if n > _FULL_ROWS:  # the axis below is out of sight
        axes.tick_params(axis="x", top=True, labeltop=True)
    return figure, axes


def _key(figure: Figure, axes: Axes, size: str) -> None:
    """Put the legend above the axes, where it hides nothing; none for a single series."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = 1 if size == "narrow" else len(labels)
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, borderaxespad=0.2)


def _log_axis(axes: Axes, which: str, values: Sequence[float], *, n_ticks: int = 6) -> float:
    """Make an axis logarithmic around ``values``; return its lower end."""
    positive = [value for value in values if 0 < value < math.inf] or [1.0]
    low = 10 ** math.floor(math.log10(min(positive)) - 0.1)
    high = 10 ** math.ceil(math.log10(max(positive)) + 0.1)
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(numticks=n_ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e-0", "e-")))
    axis.set_minor_locator(NullLocator())
    return low


def _dots(size: str, *, rows: Sequence[Dot], label: str, series: Sequence[str]) -> Figure:
    used = {row.series for row in rows}
    figure, axes = _rows_figure(size, [row.name for row in rows], label=label, n_keys=len(used))
    left = _log_axis(axes, "x", [row.value for row in rows], n_ticks=4 if size == "narrow" else 7)
    marker_size = 6 if len(rows) <= _FULL_ROWS else 4
    for one, (color, marker) in zip(series, _SERIES):
        if one not in used:
            continue
        points = [(place, row) for place, row in enumerate(rows) if row.series == one]
        shown = [(place, row) for place, row in points if left < row.value < math.inf]
        bars = [_Z95 * (row.std_error or 0.0) for _, row in shown]
        axes.errorbar(
            [row.value for _, row in shown],
            [place for place, _ in shown],
            xerr=[_inside(bars, [row.value for _, row in shown], left), bars],
            fmt=marker,
            color=color,
            markersize=marker_size,
            elinewidth=1.2,
            capsize=2 if len(rows) <= _FULL_ROWS else 0,
            label=one,
        )
        ends = {"<": [place for place, row in points if row.value <= left],
                ">": [place for place, row in points if row.value == math.inf]}  # fmt: skip
        for end, (pointer, places) in zip(axes.get_xlim(), ends.items()):
            axes.plot([end] * len(places), places, pointer, color=color, mfc="none", ms=6, clip_on=False)
    _key(figure, axes, size)
    return figure


def _inside(bars: Sequence[float], values: Sequence[float], left: float) -> list[float]:
    """Lengths of bars to the left: on a log axis they end where it does."""
    return [min(bar, value - left / 10) for bar, value in zip(bars, values, strict=True)]


def _bars(size: str, *, rows: Sequence[Bar], label: str, series: Sequence[str]) -> Figure:
    used = [one for one in series if any(name == one and value for row in rows for name, value in row.parts)]
    figure, axes = _rows_figure(size, [row.name for row in rows], label=label, n_keys=len(used))
    looks = ((FIRST, FIRST, None), (SECOND, SECOND, None), ("none", GONE, "////"))  # face, edge, hatch
    starts = [0.0] * len(rows)
    for one in used:
        face, edge, hatch = looks[series.index(one)]
        lengths = [dict(row.parts).get(one, 0.0) for row in rows]
        places = [place for place, length in enumerate(lengths) if length]
        axes.barh(
            places,
            [lengths[place] for place in places],
            left=[starts[place] for place in places],
            height=0.72,
            facecolor=face,
            edgecolor=edge,
            linewidth=0.8,
            hatch=hatch,
            label=one,
        )
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    axes.set_xlim(0, max(starts, default=1.0) * 1.01 or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(4 if size == "narrow" else 6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _key(figure, axes, size)
    return figure


def _agreement(size: str, *, marks: Sequence[Mark], x: str, y: str) -> Figure:
    figure, axes = _figure(size, 330 if size == "narrow" else 420)
    both = [value for mark in marks for value in (mark.x, mark.y)]
    low = _log_axis(axes, "x", both, n_ticks=4 if size == "narrow" else 7)
    _log_axis(axes, "y", both)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    ends = axes.get_xlim()
    axes.plot(ends, ends, color=INK, linewidth=1, linestyle="--", label="prediction is right")
    for series, (color, marker) in zip(dict.fromkeys(mark.series for mark in marks), _SERIES):
        points = [mark for mark in marks if mark.series == series]
        bars = [_Z95 * (mark.std_error or 0.0) for mark in points]
        axes.errorbar(
            [mark.x for mark in points],
            [mark.y for mark in points],
            yerr=[_inside(bars, [mark.y for mark in points], low), bars],
            fmt=marker,
            color=color,
            markersize=4.5,
            markerfacecolor="none",
            elinewidth=0.8,
            label=series,
        )
    _key(figure, axes, size)
    return figure


def _curve(
    size: str,
    *,
    points: Sequence[tuple[float, float]],
    chosen: tuple[float, float] | None,
    x: str,
    y: str,
) -> Figure:
    figure, axes = _figure(size, 290 if size == "narrow" else 360)
    everything = [*points, *([chosen] if chosen else [])]
    low = _log_axis(axes, "y", [loss for _, loss in everything])  # where plans without loss stand, too
    axes.plot(
        [cost for cost, _ in points],
        [max(loss, low) for _, loss in points],
        color=FIRST,
        marker="o",
        markersize=4.5,
        linewidth=1.5,
        label="least expected loss",
        clip_on=False,
    )
    if chosen:
        axes.plot(
            [chosen[0]], [max(chosen[1], low)], color=SECOND, marker="D", markersize=9, linestyle="none",
            markerfacecolor="none", markeredgewidth=2, label="this plan", clip_on=False, zorder=4,
        )  # fmt: skip
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(5 if size == "narrow" else 8))
    _key(figure, axes, size)
    return figure
