"""The tables of an analysis on a terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from sample_reports import full_analysis

from hap_onnx.report.analysis_table import layout_analysis


@pytest.fixture
def report():
    """With names as exporters give them, some of which differ only in their middle."""
    return full_analysis(28, 40)


def lines_of(report, *, width):
    """The lines of the tables: those of groups, of layers, of sizes."""
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(layout_analysis(report, bar="#"))
    _, *tables = buffer.getvalue().split("\n\n")
    return [[line.rstrip() for line in table.splitlines()[2:]] for table in tables]


def test_each_group_and_layer_is_one_line_of_80_columns(report):
    groups, layers, sizes = lines_of(report, width=80)
    assert (len(groups), len(layers)) == (28, 40)
    assert len(sizes) == len(report.analysis.sizes)
    for lines in (groups, layers):
        assert len({line.split()[0] for line in lines}) == len(lines)
        assert all(line.endswith("#") for line in lines)
        assert max(map(len, lines)) <= 80


def test_names_are_whole_where_there_is_room(report):
    groups, layers, _ = lines_of(report, width=120)
    assert {line.split()[0] for line in groups} == {group.name for group in report.analysis.groups}
    assert {line.split()[0] for line in layers} == {layer.node for layer in report.analysis.layers}


def test_costs_are_shares_of_the_model(report):
    group = min(report.analysis.groups, key=lambda group: group.score)
    first = lines_of(report, width=120)[0][0]
    assert f" {100 * group.params / report.size.params:.1f} % " in first
    assert f" {100 * group.macs / report.size.macs:.1f} % " in first
    unknown = replace(report, size=replace(report.size, macs=None))
    assert " ? " in lines_of(unknown, width=120)[0][0]
