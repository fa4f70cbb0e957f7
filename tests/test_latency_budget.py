"""Jobs with a budget of time, end to end; what is measured is made up, so that results can be known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_models import fix_speed, images, timing, write

from hap_onnx import apply_plan, cli, compress
from hap_onnx.errors import BudgetError, GateError, UsageError
from hap_onnx.events import Event
from hap_onnx.jobs import machine
from hap_onnx.runtime.latency import LatencyComparison
from hap_onnx.timing import measure
from hap_onnx.timing.specimen import Specimen
from hap_onnx.timing.table import LatencyTable, Point

FAST: dict[str, Any] = {"threads": 1, "batch_size": 64, "recover": "none"}


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    return {"x": images()}


class Clock:
    """Lets layers take what they compute, and whole models ``ratios`` of the original, one after another."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ratios: list[float] = []
        self.n_layers, self.n_models, self.n_runs = 0, 0, 0
        fix_speed(patch)
        patch.setattr(measure, "time_points", self._time_points)
        patch.setattr(measure, "time_run", self._time_run)
        patch.setattr(measure, "time_kernels", lambda *args, **options: ())
        patch.setattr(machine, "measure_latency", self._compare)

    def _time_points(
        self, specimen: Specimen, points: Sequence[Point], table: LatencyTable, *, seconds: float
    ) -> dict[Point, float]:
        self.n_layers += 1
        return {(i, o): i * o / 10 + 1 for i, o in points}

    def _time_run(self, *session_and_feed: Any, **options: Any) -> float:
        self.n_runs += 1
        return 1000.0 * self.n_runs  # never the same again

    def _compare(self, *sessions_and_feed: Any, **options: Any) -> LatencyComparison:
        self.n_models += 1
        return timing(self.ratios.pop(0) if len(self.ratios) > 1 else self.ratios[0])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_budget_of_time_is_measured_and_reported(
    tmp_path: Path, data: dict[str, np.ndarray], clock: Clock
) -> None:
    clock.ratios = [0.59]
    report = compress(write(tmp_path), data, keep_latency=0.6, method="prune", **FAST)
    assert (report.budget.asked, report.budget.reached["keep_latency"]) == ({"keep_latency": 0.6}, 0.59)
    assert report.latency is not None
    assert report.latency.ratio == 0.59
    assert report.latency.interval == pytest.approx((0.58, 0.6))
    assert (report.latency.threads, report.latency.batch) == (1, 1)
    assert any(group.kept < group.size for group in report.plan.groups)
    assert report.output is not None


def test_a_result_that_is_too_slow_after_all_is_refused(
    tmp_path: Path, data: dict[str, np.ndarray], clock: Clock
) -> None:
    """Within 5 % of the original's latency it is what was asked for: the same model is measured twice."""
    model = write(tmp_path)
    words = {**FAST, "keep_latency": 0.6, "method": "implant"}  # one candidate
    clock.ratios = [0.59, 0.66]
    with pytest.raises(BudgetError, match=r"^--keep-latency 0\.6 is not reached: the result has 0\.66$"):
        compress(model, data, **words)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    clock.ratios = [0.59, 0.64]
    assert compress(model, data, **words).budget.reached["keep_latency"] == 0.64


def test_a_latency_out_of_reach_ends_with_exit_code_3(
    tmp_path: Path, data: dict[str, np.ndarray], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    clock.ratios = [0.9]
    model = write(tmp_path)
    np.savez(tmp_path / "data.npz", **data)
    command = ["compress", str(model), "--data", str(tmp_path / "data.npz"), "--keep-latency", "0.5", "-q"]
    assert cli.main([*command, "--recover", "none", "--threads", "1"]) == 3
    message = capsys.readouterr().err
    assert "--keep-latency 0.5 cannot be reached: the least that was reached is 0.900 of" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "net.onnx"]


def test_the_same_table_gives_the_same_bytes_whatever_the_machine_does(
    tmp_path: Path, data: dict[str, np.ndarray], clock: Clock
) -> None:
    model, table = write(tmp_path), tmp_path / "times.json"
    words = {**FAST, "keep_latency": 0.6, "latency_table": table, "method": "prune"}
    clock.ratios = [0.9, 0.7, 0.59]
    first = compress(model, data, output=tmp_path / "a.onnx", save_plan=tmp_path / "a.json", **words)
    assert json.loads(table.read_text())["comparisons"]
    clock.n_layers, clock.n_models, clock.ratios = 0, 0, [0.55]  # a quieter machine by now
    second = compress(model, data, output=tmp_path / "b.onnx", **words)
    assert (clock.n_layers, clock.n_models) == (0, 1), "only the result itself is timed again"
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert first.plan == second.plan
    apply_plan(model, tmp_path / "a.json", output=tmp_path / "c.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "c.onnx").read_bytes()


def test_a_table_is_kept_in_the_work_folder(
    tmp_path: Path, data: dict[str, np.ndarray], clock: Clock
) -> None:
    clock.ratios = [0.59]
    compress(write(tmp_path), data, keep_latency=0.6, work_dir=tmp_path / "work", method="prune", **FAST)
    (table,) = (tmp_path / "work").glob("*/latency.json")
    content = json.loads(table.read_text())
    assert content["families"]
    assert content["comparisons"]


def test_a_near_miss_is_left_to_the_last_measurement(
    tmp_path: Path, data: dict[str, np.ndarray], clock: Clock
) -> None:
    clock.ratios = [0.63]  # whatever the plan
    report = compress(write(tmp_path), data, keep_latency=0.6, method="prune", **FAST)
    assert report.budget.reached["keep_latency"] == 0.63


def test_ordinary_jobs_decide_on_implants_by_the_table_too(
    tmp_path: Path, data: dict[str, np.ndarray], clock: Clock
) -> None:
    clock.ratios = [0.9]
    model, table = write(tmp_path), tmp_path / "times.json"
    plans = []
    for name in "ab":
        report = compress(
            model, data, keep_macs=0.6, latency_table=table, output=tmp_path / f"{name}.onnx", **FAST
        )
        plans.append(report.plan)
    assert plans[0] == plans[1]
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_work_folder_of_another_machine_is_no_obstacle(
    tmp_path: Path, data: dict[str, np.ndarray], clock: Clock
) -> None:
    clock.ratios = [0.9]
    words = {"keep_macs": 0.6, "work_dir": tmp_path / "work", "method": "prune"}
    model = write(tmp_path)
    compress(model, data, **words, **FAST)
    (table,) = (tmp_path / "work").glob("*/latency.json")
    table.write_text("{")
    assert compress(model, data, **words, **FAST).output is not None


def test_a_table_of_another_machine_is_a_usage_error(
    tmp_path: Path, data: dict[str, np.ndarray], clock: Clock
) -> None:
    clock.ratios = [0.59]
    model, table = write(tmp_path), tmp_path / "times.json"
    words = {"keep_latency": 0.6, "latency_table": table, "method": "prune"}
    compress(model, data, **words, **FAST)
    with pytest.raises(UsageError, match=r"measured with .* 1 threads"):
        compress(model, data, **words, **{**FAST, "threads": 2})


def test_a_search_may_make_the_latency_small(
    tmp_path: Path, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    asked: list[float] = []

    def as_planned(self: Any, candidate: Any, prepared: Any) -> LatencyComparison:
        asked.append(1.0)
        return timing(0.5)

    monkeypatch.setattr("hap_onnx.jobs.job.Job._time", as_planned)
    clock.ratios = [0.5]
    events: list[Event] = []
    report = compress(
        write(tmp_path), data, objective="latency", max_drop=0.5, metric="r2", method="prune",
        on_event=events.append, **FAST,
    )  # fmt: skip
    assert asked
    assert report.quality is not None
    assert report.quality.passed
    assert any("of the size" in event.message for event in events)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"keep_latency": 0}, "--keep-latency must be a fraction"),
        ({"keep_latency": 1.5}, "--keep-latency must be a fraction"),
        ({"objective": "speed"}, "--objective must be one of params, macs, latency"),
        ({"objective": "macs", "keep_macs": 0.5}, "--objective .* where no budget is given"),
        ({"keep_latency": 0.5, "preset": "paper"}, "--preset paper knows nothing of time"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(
    tmp_path: Path, data: dict[str, np.ndarray], words: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        compress(write(tmp_path), data, **words)


def test_rounds_approach_a_budget_of_time(
    tmp_path: Path, data: dict[str, np.ndarray], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    real: Callable[..., Any] = compress.__globals__["Job"]._compress_in_rounds

    def spy(self: Any, budgets: dict[str, float | None]) -> Any:
        found = real(self, budgets)
        seen.extend(one.setting.base_ratio for one in self.rounds)
        return found

    monkeypatch.setattr("hap_onnx.jobs.job.Job._compress_in_rounds", spy)
    # The first round aims at sqrt(0.6) = 0.77; the second begins by timing what it starts from.
    clock.ratios = [0.77, 0.77, 0.77, 0.6, 0.59]
    report = compress(write(tmp_path), data, keep_latency=0.6, rounds=2, method="prune", **FAST)
    assert seen == [1.0, 0.77]
    assert report.budget.reached["keep_latency"] == 0.59


def test_a_slower_result_names_its_interval(
    tmp_path: Path, data: dict[str, np.ndarray], clock: Clock
) -> None:
    clock.ratios = [1.2]
    with pytest.raises(GateError, match=r"1\.200 times as long, 95 % interval 1\.190 to 1\.210"):
        compress(write(tmp_path), data, keep_macs=0.6, method="prune", **FAST)
