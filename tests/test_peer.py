"""The developer tool that compares with onnxsim's pruning: all of it but the peer itself."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from hap_onnx.errors import BudgetError
from hap_onnx.runtime.latency import LatencyComparison
from tests.helpers import make_model, node, rand
from tools.peer import (
    Measured,
    Ours,
    Point,
    Scale,
    compare,
    contenders,
    make_arrays,
    show_modes,
    show_rows,
    use_clock,
)
from tools.peer_worker import parse_mode

N_IN, N_CLASSES, N_TEST = 6, 3, 60


def _measured(params: float, macs: float, accuracy: float, latency: float = 1.0) -> Measured:
    return Measured(params, macs, accuracy, {}, (latency, latency - 0.01, latency + 0.01))


def _point(mode: str, params: float, macs: float, accuracy: float) -> Point:
    return Point(mode, 0.5, Path("none"), _measured(params, macs, accuracy))


def test_the_best_mode_of_a_shape_counts_and_what_another_beats_does_not() -> None:
    points = [
        _point("l2", 0.9, 0.9, 80.0),
        _point("wanda", 0.9, 0.9, 85.0),  # better at equal size
        _point("l2", 0.5, 0.6, 40.0),
        _point("global", 0.6, 0.5, 39.0),  # fewer multiply-accumulates, so it stays
        _point("l1", 0.7, 0.7, 39.5),  # larger and worse than another
        _point("same", 0.9, 0.9, 85.0),  # a tie: the first one stays
    ]
    found = contenders(points)
    assert [(p.mode, p.measured.params) for p in found] == [("wanda", 0.9), ("global", 0.6), ("l2", 0.5)]


@pytest.mark.parametrize(
    ("mode", "parts"),
    [
        ("l2", ("l2", False, False)),
        ("wanda-refit", ("wanda", False, True)),
        ("l1-global", ("l1", True, False)),
    ],
)
def test_a_mode_names_ranking_scope_and_repair(mode: str, parts: tuple[str, bool, bool]) -> None:
    assert parse_mode(mode) == parts


@pytest.mark.parametrize("mode", ["l3", "wanda-refit-twice", "global"])
def test_an_unknown_mode_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=mode):
        parse_mode(mode)


# --- measuring ---


def _classifier(width: int) -> onnx.ModelProto:
    """Two layers whose hidden width is cut to its first ``width`` of eight channels."""
    return make_model(
        [
            node("Gemm", ["x", "w1"], ["h"]),
            node("Relu", ["h"], ["r"]),
            node("Gemm", ["r", "w2"], ["y"]),
        ],
        inputs={"x": ["N", N_IN]},
        outputs=["y"],
        weights={"w1": rand(N_IN, 8)[:, :width], "w2": rand(8, N_CLASSES, seed=1)[:width]},
    )


def _scores(x: np.ndarray, width: int) -> np.ndarray:
    return np.maximum(x @ rand(N_IN, 8)[:, :width], 0) @ rand(8, N_CLASSES, seed=1)[:width]


@pytest.fixture
def scale(tmp_path: Path) -> Scale:
    x = rand(N_TEST, N_IN, seed=2)
    labels = _scores(x, 8).argmax(1)
    labels[::5] = (labels[::5] + 1) % N_CLASSES  # the original misses every fifth
    np.savez(tmp_path / "test.npz", x=x, labels=labels)
    onnx.save(_classifier(8), str(tmp_path / "whole.onnx"))
    onnx.save(_classifier(3), str(tmp_path / "narrow.onnx"))
    onnx.save(_classifier(6), str(tmp_path / "wide.onnx"))
    return Scale(tmp_path / "whole.onnx", tmp_path / "test.npz", threads=1)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hap_onnx.jobs.machine.LATENCY_SECONDS", 0.01)


def test_sizes_and_accuracy_are_those_of_arithmetic(scale: Scale, tmp_path: Path) -> None:
    untimed = scale.measure(tmp_path / "narrow.onnx", timed=False)
    found = scale.measure(tmp_path / "narrow.onnx")
    assert untimed.latency is None
    assert found.latency is not None
    with np.load(tmp_path / "test.npz") as arrays:
        x, labels = arrays["x"], arrays["labels"]
    assert scale.accuracy == pytest.approx(80.0)
    assert found.params == found.macs == pytest.approx(3 / 8)
    assert found.accuracy == pytest.approx(100 * np.mean(_scores(x, 3).argmax(1) == labels))
    assert found.latency[1] <= found.latency[0] <= found.latency[2]

    kept = scale.measure(tmp_path / "narrow.onnx")  # from the file beside the model
    assert kept.latency == found.latency
    assert (kept.params, kept.macs, kept.accuracy) == (found.params, found.macs, found.accuracy)
    np.testing.assert_array_equal(kept.outputs["y"], found.outputs["y"])


def test_the_margin_is_positive_where_ours_is_better(scale: Scale, tmp_path: Path) -> None:
    narrow, whole = (scale.measure(tmp_path / f"{name}.onnx") for name in ("narrow", "whole"))
    margin, low, high = scale.margin(whole, narrow)
    assert margin == pytest.approx(80.0 - narrow.accuracy)
    assert margin > 0
    assert low < margin < high
    assert scale.margin(narrow, whole)[0] == pytest.approx(-margin)


# --- what ours is asked for ---


class _FakeOurs:
    """Answers every budget with a file, but those of time below 0.5."""

    def __init__(self, path: Path) -> None:
        self.path, self.asked = path, []

    def compress(self, budgets: dict[str, float]) -> Path | None:
        self.asked.append(budgets)
        return None if budgets.get("latency", 1.0) < 0.5 else self.path


def _peer_at(scale: Scale, path: Path, latency: float, monkeypatch: pytest.MonkeyPatch) -> Point:
    found = scale.measure(path)
    measure = scale.measure
    theirs = replace(found, latency=(latency, latency, latency))
    monkeypatch.setattr(scale, "measure", lambda other: theirs if other == path else measure(other))
    return Point("l2", 0.25, path, found)


@pytest.mark.parametrize(
    ("latency", "asked"),
    [
        (1.2, [{"params": 0.375, "macs": 0.375}]),  # slower than the original: the same model stands for both
        (0.8765, [{"params": 0.375, "macs": 0.375}, {"latency": 0.876}]),
    ],
)
def test_each_point_asks_for_its_size_and_its_time(
    scale: Scale,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    latency: float,
    asked: list[dict[str, float]],
) -> None:
    ours = _FakeOurs(tmp_path / "wide.onnx")
    [row] = compare(scale, ours, [_peer_at(scale, tmp_path / "narrow.onnx", latency, monkeypatch)])  # type: ignore[arg-type]
    assert ours.asked == asked
    assert row.at_size is not None
    assert row.at_latency is not None
    assert row.at_size.params == row.at_latency.params == pytest.approx(6 / 8)


def test_a_budget_that_is_not_reached_is_said_in_the_table(
    scale: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = _FakeOurs(tmp_path / "wide.onnx")
    rows = compare(scale, ours, [_peer_at(scale, tmp_path / "narrow.onnx", 0.4, monkeypatch)])  # type: ignore[arg-type]
    assert rows[0].at_latency is None
    header, rule, line = show_rows(rows, scale).splitlines()
    assert header.count("|") == rule.count("|") == line.count("|")
    assert line.startswith("| l2 0.25 | 0.375 / 0.375 | 0.400 (0.400 to 0.400) |")
    assert "not reached" in line
    assert "**80" not in line  # the original's accuracy is in no column


def test_a_budget_out_of_reach_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def sizes(self) -> dict[str, float]:
            return {"params": 10.0}

        def compress_to(self, budgets: dict[str, float]) -> None:
            assert budgets == {"params": 5.0}
            raise BudgetError("too small")

    for name in ("model.onnx", "calib.npz", "test.npz"):
        (tmp_path / name).write_bytes(b"any")
    files = (tmp_path / name for name in ("model.onnx", "calib.npz", "test.npz"))
    ours = Ours(*files, tmp_path, seed=0, threads=1)
    monkeypatch.setattr(Ours, "_in_size", (None, Refusing()))
    assert ours.compress({"params": 0.5}) is None


def test_all_of_the_peers_points_are_listed() -> None:
    text = show_modes([_point("wanda", 0.9, 0.8, 85.0), _point("l2", 0.9, 0.8, 80.0)])
    assert text.splitlines()[2:] == [
        "| l2 | 0.5 | 0.900 | 0.800 | 80.00 |",
        "| wanda | 0.5 | 0.900 | 0.800 | 85.00 |",
    ]


def test_calibration_images_have_no_labels_and_test_images_have(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(12)
    np.savez(tmp_path / "cifar.npz", x_train=images, y_train=labels, x_test=images[:8], y_test=labels[:8])
    calib, test = make_arrays(tmp_path / "cifar.npz", tmp_path, n_samples=5, n_test=7, seed=0)
    with np.load(calib) as arrays:
        assert arrays.files == ["input"]
        assert arrays["input"].shape == (5, 3, 32, 32)
    with np.load(test) as arrays:
        assert arrays["labels"].tolist() == list(range(7))
        pixel = (images[0, 4, 9, 1] / 255 - 0.456) / 0.224
        assert arrays["input"][0, 1, 4, 9] == pytest.approx(pixel, rel=1e-5)


def test_the_clock_of_the_cpu_stands_still_while_the_process_sleeps() -> None:
    before = time.perf_counter
    with use_clock("cpu"):
        start = time.perf_counter()
        time.sleep(0.2)
        assert time.perf_counter() - start < 0.1
    assert time.perf_counter is before


@pytest.mark.slow
def test_ours_meets_its_budgets_and_looks_at_a_model_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rand(200, N_IN, seed=2)
    np.savez(tmp_path / "calib.npz", x=x[:140])
    np.savez(tmp_path / "test.npz", x=x[140:], labels=_scores(x[140:], 8).argmax(1))
    onnx.save(_classifier(8), str(tmp_path / "whole.onnx"))
    files = (tmp_path / name for name in ("whole.onnx", "calib.npz", "test.npz"))
    ours = Ours(*files, tmp_path, seed=0, threads=1)
    scale = Scale(tmp_path / "whole.onnx", tmp_path / "test.npz", threads=1)
    made = ours.compress({"params": 0.5, "macs": 0.7})
    assert made is not None
    found = scale.measure(made)
    assert found.params <= 0.5
    assert found.accuracy > 50.0
    assert ours.compress({"params": 0.5, "macs": 0.7}) == made

    faster = LatencyComparison(1.0, 0.78, 0.78, 0.77, 0.79, 11, 1, "CPUExecutionProvider", 1)
    monkeypatch.setattr("hap_onnx.jobs.job.compare_speed", lambda *_: faster)  # this one is too small to time
    in_time = ours.compress({"latency": 0.79})
    assert in_time not in (None, made)
    assert ours._in_time[1].losses is ours._in_size[1].losses
