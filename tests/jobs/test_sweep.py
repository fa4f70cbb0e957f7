"""Sweeps: each point is the job that it stands for, what is shared is found once, the folder always holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_models import fix_speed, images, residual_cnn, timing, with_labels, write
from sample_reports import FIDELITY, QUALITY

import hap_onnx
from hap_onnx import apply_plan, cli, compress, sweep
from hap_onnx.config import flag_of
from hap_onnx.errors import BudgetError, GateError, UsageError
from hap_onnx.events import Event
from hap_onnx.jobs import machine, rounds
from hap_onnx.jobs.sweep import mark_best
from hap_onnx.model.temporary import beside
from hap_onnx.planning.plan import load_plan
from hap_onnx.report import SweepPoint
from tests.forks import run_fork

FAST: dict[str, Any] = {"threads": 1, "batch_size": 64, "method": "prune", "recover": "none"}


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_speed(monkeypatch)


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    return with_labels(images(150), residual_cnn(width=8))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path, residual_cnn(width=8))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[int]]:
    """Return a function that counts from now on how often a stage of rounds runs."""

    def count(name: str) -> list[int]:
        real, calls = getattr(rounds, name), list[int]()
        monkeypatch.setattr(rounds, name, lambda *a, **words: calls.append(1) or real(*a, **words))
        return calls

    return count


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep.json").read_text())


INDEX = {"sweep.json", "sweep.md", "sweep.svg"}


def files_of(*plans: str) -> set[str]:
    return INDEX | {f"{plan}{ending}" for plan in plans for ending in (".json", ".safetensors")}


# --- what a point is ---


def check_points(
    model: Path,
    data: dict[str, np.ndarray],
    ratios: tuple[float, ...],
    *,
    objective: str,
    n_checked: int = 1,
    **options: Any,
) -> None:
    """Assert that the last points have figures and plan of the job with this budget, to the last byte."""
    folder = model.with_name("family")
    report = sweep(model, data, sweep=ratios, objective=objective, output=folder, **options)
    assert report.complete
    assert names_in(folder) == files_of(*(f"keep-{objective}-{ratio:.2f}" for ratio in ratios))
    for ratio, point in [*zip(ratios, report.points, strict=True)][-n_checked:]:
        direct, applied, plan = (model.with_name(f"{ratio}{end}") for end in (".onnx", ".a.onnx", ".json"))
        alone = compress(
            model, data, **{f"keep_{objective}": ratio}, output=direct, save_plan=plan, **options
        )
        assert point.plan is not None
        apply_plan(model, folder / point.plan, output=applied)
        assert applied.read_bytes() == direct.read_bytes()
        assert (folder / point.plan).read_bytes() == plan.read_bytes()
        assert point.keep == ratio
        assert (point.after, point.quality, point.fidelity) == (alone.after, alone.quality, alone.fidelity)
        assert point.reached == alone.budget.reached
        assert point.reached[f"keep_{objective}"] <= ratio
        assert point.refused is None
        assert report.before == alone.before


def test_each_point_is_the_very_model_that_compress_writes(
    model: Path, data: dict[str, np.ndarray], counted: Callable[[str], list[int]]
) -> None:
    n_estimates, n_plans = counted("build_loss_model"), counted("compress_to")
    options = {"threads": 1, "batch_size": 64, "allow_slower": True}
    check_points(model, data, (0.8, 0.5), objective="macs", **options)
    assert (len(n_estimates), len(n_plans)) == (1 + 1, 2 + 1)  # those of the sweep, and of the job


def test_parameters_may_be_what_falls(model: Path, data: dict[str, np.ndarray]) -> None:
    check_points(model, data, (0.7, 0.6), objective="params", n_checked=2, **FAST)


@pytest.mark.slow  # times layers
def test_latency_may_be_what_falls(
    model: Path, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "measure_latency", lambda *args, **options: timing(0.88))
    options = {**FAST, "latency_table": tmp_path / "times.json"}
    check_points(model, data, (0.9,), objective="latency", **options)
    report = sweep(model, data, sweep=(0.9, 0.5), objective="latency", **options)
    assert [point.plan for point in report.points] == ["keep-latency-0.90.json", None]
    assert "the least that was reached is 0.88" in (report.points[1].refused or "")


def test_training_belongs_to_each_point(
    model: Path, data: dict[str, np.ndarray], tmp_path: Path
) -> None:
    options = {**FAST, "recover": "distill", "epochs": 1, "batch_size": 16}
    check_points(model, data, (0.7, 0.5), objective="macs", **options)


def test_plans_know_nothing_of_the_sweep(model: Path, data: dict[str, np.ndarray]) -> None:
    sweep(model, data, sweep=0.5, objective="params", **FAST)
    config = load_plan(model.with_name("net.hap.sweep") / "keep-params-0.50.json").config
    assert (config["keep_params"], config["keep_macs"], config["objective"]) == (0.5, None, None)
    assert "sweep" not in config


# --- points that are refused ---


def test_points_that_cannot_be_are_listed_with_the_reason(
    model: Path, data: dict[str, np.ndarray], tmp_path: Path
) -> None:
    report = sweep(model, data, sweep=(0.7, 1e-4), report=tmp_path / "r.json", **FAST)
    folder = model.with_name("net.hap.sweep")
    assert report.output == str(folder)
    assert names_in(folder) == files_of("keep-macs-0.70")
    kept, refused = report.points
    assert (kept.best, refused.best) == (True, False)
    assert "cannot be reached" in (refused.refused or "")
    assert (refused.plan, refused.after, refused.quality) == (None, None, None)
    assert index_of(folder) == json.loads(json.dumps(report.to_dict()))
    assert json.loads((tmp_path / "r.json").read_text()) == index_of(folder)
    assert "cannot be reached" in (folder / "sweep.md").read_text()


@pytest.mark.parametrize("keep_rejected", [False, True])
def test_points_that_fail_a_gate_keep_their_figures(
    model: Path, data: dict[str, np.ndarray], tmp_path: Path, keep_rejected: bool
) -> None:
    words = {"metric": "r2", "max_drop": 0.3, "keep_rejected": keep_rejected, **FAST}
    report = sweep(model, data, sweep=(0.9, 0.2), **words)
    folder = model.with_name("net.hap.sweep")
    kept, refused = report.points
    assert kept.refused is None
    assert "r2 drops by" in (refused.refused or "")
    assert refused.quality is not None
    assert refused.quality.drop > 0.3
    assert not refused.best
    rejected = "keep-macs-0.20.rejected"
    assert refused.plan == (f"{rejected}.json" if keep_rejected else None)
    assert names_in(folder) == files_of("keep-macs-0.90", *([rejected] if keep_rejected else []))
    if keep_rejected:
        apply_plan(model, folder / f"{rejected}.json", output=tmp_path / "applied.onnx")


@pytest.mark.parametrize(
    ("words", "error"), [({"sweep": (1e-4, 1e-5)}, BudgetError), ({"sweep": (0.7, 0.5)}, GateError)]
)
def test_a_sweep_of_which_nothing_is_left_writes_nothing(
    model: Path,
    data: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: dict[str, Any],
    error: type[BudgetError],
) -> None:
    monkeypatch.setattr(machine, "measure_latency", lambda *args, **options: timing(1.5))
    with pytest.raises(error, match=r"no point of the sweep is met: at keep-macs-.* \(and 1 more") as caught:
        sweep(model, data, **words, report=tmp_path / "r.json", **FAST)
    assert caught.value.exit_code == 3
    report = caught.value.report
    assert isinstance(report, hap_onnx.SweepReport)
    assert report.output is None
    assert [bool(point.refused) for point in report.points] == [True, True]
    assert names_in(tmp_path) == {"net.onnx", "r.json"}
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(report.to_dict()))


# --- the folder ---


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


def stop_after(n_points: int) -> Callable[[Event], None]:
    left = n_points

    def on_event(event: Event) -> None:
        nonlocal left
        left -= event.stage == "sweep" and event.kind == "advance"
        if left == 0:
            raise Interrupted

    return on_event


def test_an_interrupted_sweep_leaves_what_is_done_and_goes_on(
    model: Path, data: dict[str, np.ndarray], tmp_path: Path, counted: Callable[[str], list[int]]
) -> None:
    ratios, folder = (0.8, 0.6, 0.4), model.with_name("net.hap.sweep")
    words = {"sweep": ratios, "work_dir": tmp_path / "work", **FAST}
    with pytest.raises(Interrupted):
        sweep(model, data, on_event=stop_after(2), **words)
    assert names_in(folder) == files_of("keep-macs-0.80", "keep-macs-0.60")
    index = index_of(folder)
    assert (index["complete"], index["asked"], len(index["points"])) == (False, list(ratios), 2)
    assert "unfinished: 2 of 3 points" in (folder / "sweep.md").read_text()
    apply_plan(model, folder / index["points"][1]["plan"], output=tmp_path / "half.onnx")

    n_plans = counted("compress_to")
    report = sweep(model, data, **words)
    assert len(n_plans) == 1
    assert report.complete
    assert index_of(folder)["points"][:2] == index["points"]
    apply_plan(model, folder / index["points"][1]["plan"], output=tmp_path / "whole.onnx")
    assert (tmp_path / "whole.onnx").read_bytes() == (tmp_path / "half.onnx").read_bytes()


def test_a_sweep_that_stops_before_its_first_point_leaves_nothing(
    model: Path, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(rounds, "compress_to", stop)
    with pytest.raises(Interrupted):
        sweep(model, data, sweep=0.5, **FAST)
    assert names_in(model.parent) == {"net.onnx"}


def test_a_sweep_shares_its_work_folder_with_compress(
    model: Path, data: dict[str, np.ndarray], tmp_path: Path, counted: Callable[[str], list[int]]
) -> None:
    sweep(model, data, sweep=0.5, work_dir=tmp_path / "work", **FAST)
    n_estimates = counted("build_loss_model")
    compress(model, data, keep_macs=0.5, work_dir=tmp_path / "work", **FAST)
    assert n_estimates == []


def test_an_earlier_sweep_is_replaced_and_other_files_stay(
    model: Path, data: dict[str, np.ndarray]
) -> None:
    folder = model.with_name("net.hap.sweep")
    sweep(model, data, sweep=(0.8, 0.6), **FAST)
    for name in ("small.onnx", "keep-macs-0.80.onnx", "keep-notes.json"):
        (folder / name).write_text("mine")
    with pytest.raises(BudgetError):
        sweep(model, data, sweep=1e-4, **FAST)
    assert names_in(folder) > files_of("keep-macs-0.80", "keep-macs-0.60")  # nothing new, nothing lost
    sweep(model, data, sweep=0.7, objective="params", **FAST)
    mine = {"small.onnx", "keep-macs-0.80.onnx", "keep-notes.json"}
    assert names_in(folder) == files_of("keep-params-0.70") | mine
    assert [point["plan"] for point in index_of(folder)["points"]] == ["keep-params-0.70.json"]


def test_the_last_index_and_the_report_get_their_names_when_nobody_should_stop_the_job(
    model: Path, data: dict[str, np.ndarray], tmp_path: Path
) -> None:
    folder, report, seen = model.with_name("net.hap.sweep"), tmp_path / "r.json", []

    def on_event(event: Event) -> None:
        if event.kind == "commit":
            seen.append((len(index_of(folder)["points"]), report.exists()))

    sweep(model, data, sweep=(0.7, 0.5), report=report, on_event=on_event, **FAST)
    assert seen == [(1, False)]
    assert index_of(folder) == json.loads(report.read_text())


def test_what_a_killed_sweep_has_left_goes_with_the_next(model: Path, data: dict[str, np.ndarray]) -> None:
    folder = model.with_name("net.hap.sweep")
    folder.mkdir()

    def leave(path: Path) -> None:
        beside(path).write_text("half")

    for name in ("sweep.svg", "keep-macs-0.40.json"):
        assert run_fork(partial(leave, folder / name)).code == 0
        sweep(model, data, sweep=0.5, **FAST)
        assert names_in(folder) == files_of("keep-macs-0.50")


def test_weights_beside_the_model_make_no_difference(
    model: Path, data: dict[str, np.ndarray], tmp_path: Path
) -> None:
    (tmp_path / "beside").mkdir()
    other = write(tmp_path / "beside", residual_cnn(width=8), external=True)
    inside, beside_it = (sweep(path, data, sweep=(0.7, 0.5), **FAST) for path in (model, other))
    for one, two in zip(inside.points, beside_it.points, strict=True):
        assert (one.quality, one.fidelity) == (two.quality, two.fidelity)
        plans = [path.with_name("net.hap.sweep") / str(one.plan) for path in (model, other)]
        assert plans[0].read_bytes() == plans[1].read_bytes()


def test_the_folder_of_something_else_is_refused_before_any_work(
    model: Path, data: dict[str, np.ndarray], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="holds other files"):
        sweep(model, data, output=tmp_path, **FAST)
    with pytest.raises(UsageError, match=r"hap_onnx\.sweep"):
        compress(model, data, sweep=True, **FAST)
    with pytest.raises(UsageError, match="at least one fraction"):
        sweep(model, data, sweep=False, **FAST)


def test_the_folder_is_for_the_sweep_alone(
    model: Path, data: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """A report would take the place of a plan, and a work folder keep the next run out."""
    folder = tmp_path / "s"
    for again in (False, True):
        if again:
            sweep(model, data, sweep=(0.5,), output=folder, **FAST)
        before = names_in(folder) if again else set()
        for name, value in (
            ("report", "keep-macs-0.50.json"), ("latency_table", "sweep.json"), ("work_dir", "."),
            ("work_dir", "w"),
        ):  # fmt: skip
            flag = flag_of(name)
            with pytest.raises(UsageError, match=f"{flag} .* lies in the folder of the sweep"):
                sweep(model, data, sweep=(0.5,), output=folder, **{name: folder / value}, **FAST)
            arguments = ["compress", str(model), "--data", "x.npz", "--sweep", "0.5", "-o", str(folder)]
            assert cli.main([*arguments, flag, str(folder / value)]) == 2
            assert (names_in(folder) if folder.exists() else set()) == before


# --- which points are best ---


def point(cost: float, quality: float, *, refused: str | None = None) -> SweepPoint:
    measured = replace(QUALITY, after=quality)
    return SweepPoint(cost, "p.json", refused, None, measured, FIDELITY, None, {"keep_macs": cost})


STEPS = st.integers(0, 5).map(lambda n: n / 5)


@given(st.lists(st.builds(point, STEPS, STEPS, refused=st.sampled_from([None, None, "why"])), max_size=9))
def test_the_best_are_a_staircase_under_which_all_others_lie(points: list[SweepPoint]) -> None:
    """Walked from cheap to dear, a point is best where it raises the quality reached so far."""
    marked = mark_best(points, "keep_macs")
    assert [replace(one, best=False) for one in marked] == points
    valid = [(p.reached["keep_macs"], p.quality.after) for p in points if p.quality and not p.refused]
    stairs, reached = set(), -1.0
    for cost, quality in sorted(valid, key=lambda entry: (entry[0], -entry[1])):
        if quality > reached:
            stairs.add((cost, quality))
            reached = quality
    for one in marked:
        assert one.quality is not None
        at = one.reached["keep_macs"], one.quality.after
        assert one.best == (not one.refused and at in stairs)


def test_a_point_without_a_model_is_not_best() -> None:
    none = SweepPoint(0.1, None, "cannot be reached")
    assert [one.best for one in mark_best([point(0.5, 0.9), none], "keep_macs")] == [True, False]
