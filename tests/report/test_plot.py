"""The plot of a sweep: each point is where its figures say, and can be told from what is behind it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sample_reports import sweep_report

from hap_onnx.report import plot
from hap_onnx.report.plot import draw_sweep


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn from now on."""
    drawn: list[Figure] = []

    class Kept(Figure):
        def __init__(self, **options: object) -> None:
            super().__init__(**options)  # type: ignore[arg-type]
            drawn.append(self)

    monkeypatch.setattr(plot, "Figure", Kept)
    return drawn


def series(axes: Axes) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """By label: positions (x, y) [n, 2], the first and the last set of bars [n, 2 ends, 2]."""
    found = {}
    for container in axes.containers:
        line, _, bars = container
        ends = [np.array(one.get_segments()) for one in (bars[0], bars[-1])]
        found[container.get_label()] = (line.get_xydata(), *ends)
    return found


def same(one: np.ndarray, other: object) -> bool:
    return bool(np.allclose(one, np.array(other), rtol=0, atol=1e-9)) and one.shape == np.shape(other)


def test_points_and_bars_are_where_the_figures_say(figures: list[Figure]) -> None:
    draw_sweep(sweep_report())
    (axes,) = figures[0].axes
    found = series(axes)
    assert set(found) == {"best for its cost", "another is better", "refused"}
    points, _, bars = found["best for its cost"]
    assert same(points, [(89.5, 92.6), (49.9, 92.5)])
    assert same(bars[..., 1], [(92.02, 93.22), (91.92, 93.12)])  # the original's minus those of the drop
    assert same(found["another is better"][0], [(69.0, 92.4)])
    assert same(found["refused"][0], [(29.8, 80.0)])
    assert axes.get_xlabel() == "multiply-accumulates, % of the original's"
    assert axes.get_ylabel() == "accuracy, %"
    original = [line for line in axes.lines if line.get_label() == "original"]
    assert [list(line.get_ydata()) for line in original] == [[pytest.approx(92.72)] * 2]


def test_costs_in_time_have_bars_of_their_own(figures: list[Figure]) -> None:
    report = sweep_report(objective="latency")
    draw_sweep(report)
    (axes,) = figures[0].axes
    points, across, _ = series(axes)["best for its cost"]
    assert same(points, [(80.0, 92.6), (60.0, 92.5)])
    assert same(across[..., 0], [(79.0, 81.0), (59.0, 61.0)])


def test_a_metric_that_is_no_share_is_shown_as_it_is(figures: list[Figure]) -> None:
    report = sweep_report()
    points = tuple(
        replace(point, quality=point.quality and replace(point.quality, metric="r2"))
        for point in report.points
    )
    draw_sweep(replace(report, points=points))
    (axes,) = figures[0].axes
    assert axes.get_ylabel() == "r2"
    assert same(series(axes)["refused"][0], [(29.8, 0.8)])


def test_the_file_is_svg_and_the_same_each_time() -> None:
    text = draw_sweep(sweep_report())
    assert ET.fromstring(text).tag.endswith("svg")
    assert draw_sweep(sweep_report()) == text


def test_a_sweep_without_points_has_a_plot_too() -> None:
    assert ET.fromstring(draw_sweep(sweep_report(points=()))).tag.endswith("svg")


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_colour_stands_out_from_white_and_from_black() -> None:
    text = draw_sweep(sweep_report())
    colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", text))
    assert {plot._INK, plot._BEST, plot._BEATEN} <= colours
    for colour in colours:
        assert contrast(colour, "#ffffff") > 3, colour  # what WCAG wants of graphics and large text
        assert contrast(colour, "#0d1117") > 3, colour
