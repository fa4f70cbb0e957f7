from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sample_reports import compress_report, inspect_report, sweep_report, validate_report

from hap_onnx.events import Event
from hap_onnx.report import Conversion, Fidelity, Latency, ModelFacts, Quality, RoundRecovered
from hap_onnx.report.render import EventPrinter, render_json, render_report


def test_the_keys_of_a_compress_report_are_the_contract():
    plain = compress_report().to_dict()
    assert list(plain) == [
        "schema", "model", "output", "before", "after", "quality", "fidelity", "plan", "frozen", "budget",
        "seconds", "seed", "versions", "recovery", "latency", "then", "analysis", "worst",
    ]  # fmt: skip
    assert plain["schema"] == "hap-onnx/compress/1"
    assert list(plain["before"]) == ["params", "macs", "bytes", "latency_ms", "metric"]
    assert list(plain["quality"]) == [
        "metric", "before", "after", "drop", "interval", "n_samples", "max_drop", "passed",
    ]  # fmt: skip
    assert list(plain["fidelity"]) == ["r2", "agreement", "max_abs_error"]
    assert list(plain["plan"]) == ["groups", "implants", "removed_branches", "layers"]
    assert plain["plan"]["groups"][0] == {"name": "a", "size": 16, "kept": 8, "why": "half is copies"}
    assert plain["plan"]["implants"] == [
        {"node": "c", "kind": "lowrank", "rank": 4, "predicted_loss": 0.25, "expected_loss": 0.5,
         "measured": [{"kind": "spatial", "predicted": 0.125, "measured": 0.25}]}
    ]  # fmt: skip
    assert plain["plan"]["layers"] == [{"node": "c", "choice": "lowrank", "why": "it fits"}]
    assert plain["plan"]["removed_branches"] == ["add_3"]
    assert plain["frozen"] == [{"node": "Gemm_1", "reason": "feeds a graph output"}]
    assert plain["budget"]["asked"] == {"keep_macs": 0.5, "max_bytes": 2e6}


def test_reports_are_strict_json_whatever_numbers_they_hold():
    fidelity = Fidelity(float("-inf"), np.float32(0.5), float("nan"))
    odd = compress_report(fidelity=fidelity, seed=np.int64(3), seconds={"x": np.float64(1)})
    plain = json.loads(render_json(odd))
    assert plain["fidelity"] == {"r2": None, "agreement": 0.5, "max_abs_error": None}
    assert plain["seed"] == 3
    assert json.loads(render_json(compress_report(model=Path("x.onnx"))))["model"] == "x.onnx"


def test_a_report_refuses_what_json_cannot_say():
    with pytest.raises(TypeError, match="cannot hold"):
        compress_report(seed=object()).to_dict()


@pytest.mark.parametrize("report", [compress_report(), inspect_report(), validate_report(), sweep_report()])
def test_reports_fit_80_columns_and_carry_no_colour_in_a_pipe(report):
    text = render_report(report, io.StringIO())
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text
    assert text.endswith("\n")


def test_the_table_shows_both_models_and_the_change():
    text = render_report(compress_report(), io.StringIO())
    for row in (
        ["parameters", "855,770", "402,113", "-53.0", "%"],
        ["MACs", "125.5", "M", "62.0", "M", "-50.6", "%"],
        ["latency", "2.410", "ms", "1.720", "ms", "1.40x", "faster"],
        ["accuracy", "92.72", "%", "91.90", "%", "-0.82", "points"],
    ):
        assert row in [line.split() for line in text.splitlines()]
    text = " ".join(text.split())
    assert "-0.82 points (-1.50 to -0.10) on 1017 held-out samples" in text
    assert "keep-macs 50.0 %, reached 49.4 %; max-bytes 2.00 MB, reached 1.64 MB" in text
    assert "1 implant (1 lowrank), 1 residual branch removed" in text


def test_the_table_counts_the_kinds_of_implants():
    plan = compress_report().plan
    kinds = ["spatial", "lowrank", "spatial"]
    used = tuple(replace(plan.implants[0], node=f"n{index}", kind=kind) for index, kind in enumerate(kinds))
    text = render_report(compress_report(plan=replace(plan, implants=used)), io.StringIO())
    assert "3 implants (1 lowrank, 2 spatial)" in " ".join(text.split())
    assert "implant" not in render_report(compress_report(plan=replace(plan, implants=())), io.StringIO())


def test_a_dry_run_has_no_quality_and_says_that_nothing_was_written():
    after = ModelFacts(400_000, None, 1_600_000)
    report = compress_report(output=None, quality=None, fidelity=None, after=after)
    text = render_report(report, io.StringIO())
    assert "nothing written" in text
    assert "latency" not in text
    assert json.loads(render_json(report))["quality"] is None


def test_a_failed_gate_is_told():
    quality = Quality("r2", 1.0, 0.8, 0.2, (0.1, 0.3), 1, 0.01, False)
    text = render_report(validate_report(quality=quality, slower=True, passed=False), io.StringIO())
    assert "gate -0.0100 FAILED" in text
    assert "slower than the reference" in text
    assert "on 1 sample;" in text


def test_frozen_nodes_are_told_once_per_reason():
    text = render_report(inspect_report(), io.StringIO())
    assert text.count("feeds a graph output") == 1
    assert "node_0, node_1, node_2 and 2 more: feeds a graph output" in text


def test_names_with_brackets_are_shown_as_they_are():
    report = compress_report(model="net[bold]1.onnx", frozen=())
    assert "net[bold]1.onnx" in render_report(report, io.StringIO())


# ---------------------------------------------------------------- sweeps


def test_the_keys_of_a_sweep_are_the_contract():
    plain = sweep_report().to_dict()
    assert list(plain) == [
        "schema", "model", "output", "objective", "asked", "complete", "before", "points", "seconds", "seed",
        "versions",
    ]  # fmt: skip
    assert plain["schema"] == "hap-onnx/sweep/1"
    assert [list(point) for point in plain["points"]] == 5 * [
        ["keep", "plan", "refused", "after", "quality", "fidelity", "latency", "reached", "best"]
    ]
    assert plain["points"][0]["plan"] == "keep-macs-0.90.json"
    assert plain["points"][-1] == {
        "keep": 0.0001, "plan": None, "refused": "the budget cannot be reached", "after": None,
        "quality": None, "fidelity": None, "latency": None, "reached": {}, "best": False,
    }  # fmt: skip


ROWS = (
    "1.000  1.000  1.00              92.72 %",
    "*  0.90    0.895  0.945  0.80 (0.79-0.81)  92.60 %  -0.12 (-0.70, +0.50)",
    "0.70    0.690  0.740  0.70 (0.69-0.71)  92.40 %  -0.32 (-0.90, +0.30)",
    "x  0.30    0.298  0.348  0.50 (0.49-0.51)  80.00 %  -12.72 (-13.30, -12.10)",
    "x  0.0001",
)


def test_the_table_of_a_sweep_has_a_row_for_each_point_and_says_why_not():
    lines = [line.split() for line in render_report(sweep_report(), io.StringIO()).splitlines()]
    for row in ROWS:
        assert row.split() in lines
    text = " ".join(render_report(sweep_report(), io.StringIO()).split())
    assert "x 0.30: accuracy drops by 0.1272 x 0.0001: the budget cannot be reached" in text
    assert "hap-onnx apply models/net.onnx models/net.hap.sweep/keep-macs-0.50.json" in text
    assert "makes the one chosen look better than it is" in text
    assert "unfinished" not in text
    for objective, word in (("params", "no more parameters"), ("latency", "no more latency")):
        assert word in render_report(sweep_report(objective=objective), io.StringIO())


def test_an_unfinished_sweep_says_so_and_a_failed_one_offers_nothing():
    points = sweep_report().points
    text = render_report(sweep_report(points=points[:2], complete=False), io.StringIO())
    assert "unfinished: 2 of 5 points are done" in text
    text = render_report(sweep_report(points=points[3:], output=None), io.StringIO())
    assert "(nothing written)" in text
    assert "hap-onnx apply" not in text


def test_a_sweep_of_a_model_with_an_odd_name_can_be_shown():
    text = render_report(replace(sweep_report(), model="net\x1b[2J.onnx"), io.StringIO())
    assert "\x1b" not in text
    assert "net\\x1b[2J.onnx" in text


# ---------------------------------------------------------------- events

EVENTS = (
    Event("refit", "start", total=2), Event("refit", "advance"), Event("x", "advance"), Event("refit", "end"),
    Event("refit", "start", total=None), Event("refit", "end"), Event("data", "note", message="a [note]"),
    Event("data", "warning", message="a [warning]"),
)  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


def play(stream, *, quiet):
    with EventPrinter(stream, quiet=quiet) as printer:
        for event in EVENTS:
            printer(event)
    return stream.getvalue()


def test_without_a_terminal_there_are_notes_but_no_bars():
    assert play(io.StringIO(), quiet=False) == "a [note]\nwarning: a [warning]\n"


def test_a_note_that_comes_twice_in_a_row_is_said_once():
    stream = io.StringIO()
    with EventPrinter(stream, quiet=False) as printer:
        for message in ("images are resized", "images are resized", "2 files left out", "images are resized"):
            printer(Event("load", "note", message))
    assert stream.getvalue().splitlines() == ["images are resized", "2 files left out", "images are resized"]


def test_quiet_keeps_only_warnings():
    assert play(io.StringIO(), quiet=True) == "warning: a [warning]\n"
    assert "refit" not in play(Terminal(), quiet=True)


def test_a_terminal_gets_bars(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text = play(Terminal(), quiet=False)
    assert "refit" in text
    assert "a [note]" in text


@pytest.mark.parametrize(("n", "words"), [(1, "1 epoch"), (4, "4 epochs")])
def test_the_table_tells_of_training(n, words):
    entry = RoundRecovered("distill", n, 0.5, 0.25, 0.125, 2, ())
    text = " ".join(render_report(compress_report(recovery=(entry,)), io.StringIO()).split())
    assert f"training: distance to the original 0.25 -> 0.125, best after 0.5 of {words}, 2 rollbacks" in text
    rounds = (RoundRecovered("refit"), entry)
    text = " ".join(render_report(compress_report(recovery=rounds), io.StringIO()).split())
    assert f"training in round 2: distance to the original 0.25 -> 0.125, best after 0.5 of {words}" in text
    assert "round 1" not in text


def test_the_steps_of_a_conversion_have_a_table_of_their_own():
    before, after = compress_report().before, compress_report().after
    compressed = replace(after, bytes=2_000_000, latency_ms=1.9, metric=0.921)
    settings = {"calibration": "percentile", "weight_bits": 8}
    then = Conversion("int8", settings, before, compressed, None, after, ("a", "b", "c", "d"))
    report = compress_report(then=then)
    text = render_report(report, io.StringIO())
    assert max(len(line) for line in text.splitlines()) <= 80
    rows = [line.split() for line in text.splitlines()]
    assert ["file", "3.43", "MB", "2.00", "MB", "-", "1.64", "MB"] in rows
    assert ["latency", "2.410", "ms", "1.900", "ms", "-", "1.720", "ms"] in rows
    assert ["accuracy", "92.72", "%", "92.10", "%", "-", "91.90", "%"] in rows
    assert "int8: calibration percentile, weight bits 8" in text
    assert "left in float32: a, b, c and 1 more" in text
    plain = report.to_dict()["then"]
    assert list(plain) == ["kind", "settings", "original", "compressed", "quantized", "both", "left"]
    assert plain["quantized"] is None
    assert plain["both"] == report.to_dict()["after"]
    assert compress_report().to_dict()["then"] is None


@pytest.mark.parametrize("make", [compress_report, validate_report])
def test_the_latency_is_shown_with_its_interval_and_what_it_was_measured_with(make) -> None:
    latency = Latency(2.0, 1.0, 0.5, (0.49, 0.515), 300, 1, "CPUExecutionProvider", 4)
    text = " ".join(render_report(make(latency=latency), io.StringIO()).split())
    assert "latency: 0.500 of the original's (95 %: 0.490 to 0.515), batch 4, 1 thread, CPU" in text
    chosen = replace(latency, threads=None)
    text = " ".join(render_report(make(latency=chosen), io.StringIO()).split())
    assert "threads as onnxruntime chooses" in text
    assert "of the original's (" not in render_report(make(), io.StringIO())
