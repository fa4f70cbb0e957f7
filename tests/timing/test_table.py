"""Tables of times: what they keep, what they refuse, and the fit of a family."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_models import timing

from hap_onnx.errors import ModelError, UsageError, ValidationError
from hap_onnx.timing.table import (
    KeptTable,
    LatencyTable,
    default_path,
    fit_times,
    read_table,
    this_machine,
)

HERE = this_machine("CPUExecutionProvider", 1)


def example() -> LatencyTable:
    table = LatencyTable(HERE)
    table.add("Conv 3x3", {(16, 32): 4.5, (8, 32): 2.25})
    table.add_model("sha", 1234.56789, {"conv": 1.23456})
    table.comparisons["abc"] = timing(0.5)
    return table


def write_table(table: LatencyTable, path: Path) -> None:
    path.unlink(missing_ok=True)  # a table that is there would be read
    kept = KeptTable(table.machine, path)
    kept.table = table
    kept.save()


def write_changed(folder: Path, change: Callable[[Any], object]) -> Path:
    """Write the example's table with a change to its content; returns where."""
    path = folder / "t.json"
    write_table(example(), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_times_are_rounded_before_anything_is_made_of_them() -> None:
    """A job that reads a table must not find other numbers than the one that has written it."""
    table = example()
    table.add("Gemm", {(1, 2): 1.23456})
    assert table.times["Gemm"] == {(1, 2): 1.235}
    assert table.models["sha"] == (1234.568, {"conv": 1.235})


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_table(example(), tmp_path / "new" / "t.json")
    assert read_table(tmp_path / "new" / "t.json", HERE) == example()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.json"]
    assert read_table(tmp_path / "none.json", HERE) == LatencyTable(HERE)


def test_only_points_that_are_not_there_are_missing() -> None:
    assert example().missing("Conv 3x3", [(8, 32), (8, 16)]) == [(8, 16)]
    assert example().missing("Gemm", [(8, 32)]) == [(8, 32)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema="other"), "schema is 'other'"),
        (lambda c: c.pop("families"), "families"),
        (lambda c: c.update(families={"f": [[1, 2]]}), "not enough values"),
        (lambda c: c.update(families={"f": [[1, 2, -3.0]]}), "is no time"),
        (lambda c: c.update(families=[]), "damaged"),
        (lambda c: c.update(comparisons={"a": {"ratio": 1}}), "damaged"),
        (lambda c: c["comparisons"]["abc"].update(ratio="fast"), "damaged"),
        (lambda c: c.update(models={"a": [1.0, {"node": -1}]}), "is no time"),
        (lambda c: c["machine"].pop("provider"), "damaged"),
    ],
)
def test_damaged_tables_are_refused(tmp_path: Path, change, message: str) -> None:
    path = write_changed(tmp_path, change)
    with pytest.raises(ModelError, match=message) as caught:
        read_table(path, HERE)
    assert str(path) in str(caught.value)
    assert "name another" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "age"),
    [
        (lambda c: c.update(schema="hap-onnx/latency/0"), "an older version"),
        (lambda c: c.update(schema="hap-onnx/latency/99"), "a newer version"),
        (lambda c: c.pop("models"), "an older version"),
    ],
)
def test_a_table_of_another_version_is_not_called_damaged(tmp_path: Path, change, age: str) -> None:
    path = write_changed(tmp_path, change)
    with pytest.raises(UsageError, match=f"{age} of hap-onnx .* remove it, or .* --latency-table, .* anew"):
        read_table(path, HERE)
    assert KeptTable(HERE, path, is_cache=True).table == LatencyTable(HERE)


def test_what_is_no_json_or_of_another_machine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    for content in (b"\xff\x00{", b"[" * 200_000):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="cannot be read"):
            read_table(path, HERE)
    write_table(replace(example(), machine=replace(HERE, threads=4)), path)
    with pytest.raises(UsageError, match=r"measured with .* 4 threads .* --latency-table"):
        read_table(path, HERE)


def test_a_cache_keeps_layers_only_and_may_be_lost(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text("no table")
    with pytest.raises(ModelError):
        KeptTable(HERE, path)
    assert KeptTable(HERE, path, was_named=False).table == LatencyTable(HERE)
    kept = KeptTable(HERE, path, is_cache=True)
    assert kept.table == LatencyTable(HERE)
    kept.table.add("Gemm", {(1, 2): 3.0})
    kept.table.comparisons["abc"] = timing(0.5)
    kept.table.add_model("sha", 1.0, {})
    kept.save()
    again = KeptTable(HERE, path, is_cache=True).table
    assert (again.times, again.models, again.comparisons) == ({"Gemm": {(1, 2): 3.0}}, {}, {})
    assert kept.table.comparisons, "the job itself still has them"


def test_a_cache_that_does_not_fit_is_no_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, levels = tmp_path / "t.json", list[int]()
    monkeypatch.setattr("hap_onnx.timing.table._log.log", lambda level, *words: levels.append(level))
    for words in ({"is_cache": True}, {"was_named": False}):
        path.write_text("no table")
        KeptTable(HERE, path, **words)
    assert levels == [logging.INFO, logging.WARNING]


def test_only_a_table_that_was_named_must_be_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "t.json"
    KeptTable(HERE, path, is_cache=True).save()
    with pytest.raises((ValidationError, ModelError)):
        KeptTable(HERE, path).save()
    KeptTable(HERE).save()  # without a file nothing is kept


def test_machines_have_tables_of_their_own() -> None:
    machines = [HERE, replace(HERE, threads=2), replace(HERE, processor="x")]
    paths = {default_path(machine) for machine in machines}
    assert len(paths) == 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=4, max_size=4))
def test_the_fit_finds_bilinear_times_again(coefficients: list[float]) -> None:
    c = np.array([coefficients[0] / 100, *coefficients[1:]]) + np.array([0, 0, 0, 1])  # well above the clock
    points = [(i, o) for i in (8, 16, 48) for o in (16, 32, 64)]
    times = {(i, o): float(c @ [i * o, i, o, 1]) for i, o in points}
    fit = fit_times(times)
    assert (fit >= 0).all()
    for (i, o), us in times.items():
        assert float(fit @ [i * o, i, o, 1]) == pytest.approx(us, rel=1e-6, abs=2e-3)


def test_a_layer_with_fewer_channels_never_takes_longer() -> None:
    fit = fit_times({(16, 16): 10.0, (32, 16): 8.0, (16, 32): 9.0, (32, 32): 7.0})
    assert (fit >= 0).all()
