"""The plot of a sweep; importing it imports matplotlib, which takes a moment."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hap_onnx.report import SweepPoint, SweepReport, words

# Nothing is painted behind the plot, so each colour has to be told from white and from black.
_INK = "#767676"
_BEST = "#1f7fd6"
_BEATEN = "#d0672b"


def draw_sweep(report: SweepReport) -> str:
    """Return quality over cost, with 95 % intervals, as SVG; the same report gives the same text."""
    figure = sweep_figure(report, (6.4, 4.0))
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "hap-onnx"}):  # names of parts that do not change from run to run
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def sweep_figure(report: SweepReport, size: tuple[float, float]) -> Figure:
    """Draw quality over cost in a figure of ``size``, in inches.

    Points that no other beats are filled and joined by a line; those that were refused are crosses.
    """
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    measured = [point for point in report.points if point.quality is not None]
    _draw_original(axes, measured)
    best = [point for point in measured if point.best]
    _draw_points(axes, report, best, color=_BEST, marker="o", line="-", label="best for its cost")
    beaten = [point for point in measured if not point.best and point.refused is None]
    _draw_points(axes, report, beaten, color=_BEATEN, marker="s", filled=False, label="another is better")
    refused = [point for point in measured if point.refused is not None]
    _draw_points(axes, report, refused, color=_INK, marker="x", label="refused")
    _dress(axes, report, measured)
    return figure


def _scale(metric: str) -> float:
    return 100.0 if metric in words.SHARES else 1.0


def _draw_original(axes: Axes, measured: Sequence[SweepPoint]) -> None:
    for point in measured[:1]:
        assert point.quality is not None
        height = point.quality.before * _scale(point.quality.metric)
        axes.axhline(height, color=_INK, linewidth=1, linestyle="--", zorder=1, label="original")


def _draw_points(
    axes: Axes,
    report: SweepReport,
    points: Sequence[SweepPoint],
    *,
    color: str,
    marker: str,
    label: str,
    line: str = "none",
    filled: bool = True,
) -> None:
    if not points:
        return
    costs, heights = [], []
    below, above, left, right = [], [], [], []
    for point in points:
        quality, cost = point.quality, 100 * point.reached[report.budget]
        assert quality is not None
        scale = _scale(quality.metric)
        costs.append(cost)
        heights.append(scale * quality.after)
        # The interval is that of the drop: both models are measured on the same samples.
        below.append(scale * max(quality.interval[1] - quality.drop, 0.0))
        above.append(scale * max(quality.drop - quality.interval[0], 0.0))
        low, high = (cost, cost)
        if report.objective == "latency" and point.latency is not None:
            low, high = (100 * bound for bound in point.latency.interval)
        left.append(max(cost - low, 0.0))
        right.append(max(high - cost, 0.0))
    axes.errorbar(
        costs,
        heights,
        yerr=[below, above],
        xerr=[left, right] if report.objective == "latency" else None,
        color=color,
        marker=marker,
        markersize=7,
        markerfacecolor=color if filled else "none",
        linestyle=line,
        linewidth=1.5,
        elinewidth=1,
        capsize=3,
        label=label,
        zorder=3,
    )


def _dress(axes: Axes, report: SweepReport, measured: Sequence[SweepPoint]) -> None:
    """Label the axes, and colour what is not data."""
    metric = measured[0].quality.metric if measured and measured[0].quality else "quality"
    axes.set_xlabel(f"{words.COST_NAMES[report.objective]}, % of the original's", color=_INK)
    axes.set_ylabel(f"{metric}, %" if metric in words.SHARES else metric, color=_INK)
    axes.tick_params(colors=_INK)
    axes.grid(color=_INK, alpha=0.25, linewidth=0.6)
    for name, spine in axes.spines.items():
        spine.set_color(_INK)
        spine.set_visible(name in ("left", "bottom"))
    if measured:
        axes.legend(frameon=False, labelcolor=_INK, loc="best")
