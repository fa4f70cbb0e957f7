"""Quality metrics: known values, laws, and statistics of the intervals."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hap_onnx.errors import CalibrationError, UsageError, ValidationError
from hap_onnx.runtime.metrics import (
    Metric,
    agreement_score,
    check_chance_level,
    check_label_range,
    choose_metric,
    compare_outputs,
    max_abs_error,
    r2_score,
)

finite = st.floats(-1e3, 1e3, width=32)
arrays = hnp.arrays(
    np.float32, st.tuples(st.integers(2, 6), st.integers(1, 3), st.integers(1, 3)), elements=finite
)


def scores(classes: list[int], n_classes: int = 4) -> dict[str, np.ndarray]:
    return {"logits": np.eye(n_classes, dtype=np.float32)[classes]}


def test_auto_is_accuracy_with_labels() -> None:
    outputs = scores([0, 1, 2, 3])
    labels = np.array([0, 1, 2, 0])
    metric = choose_metric("auto", outputs=outputs, labels=labels)
    assert (metric.name, metric.output, metric.n_classes) == ("accuracy", "logits", 4)
    assert metric.reference_value(outputs, labels) == 0.75
    assert metric.evaluate(outputs, scores([3, 1, 2, 0]), labels) == 0.75


@pytest.mark.parametrize(
    ("outputs", "name"),
    [
        ({"y": np.zeros((5, 2), np.float32)}, "agreement"),
        ({"y": np.zeros((5, 2), np.float16)}, "agreement"),
        ({"y": np.zeros((5, 1), np.float32)}, "r2"),
        ({"y": np.zeros((5, 2), np.int64)}, "r2"),
        ({"y": np.zeros((5, 2, 1), np.float32)}, "r2"),
        ({"y": np.zeros((5, 2), np.float32), "z": np.zeros((5, 2), np.float32)}, "r2"),
    ],
)
def test_auto_without_labels(outputs: dict[str, np.ndarray], name: str) -> None:
    assert choose_metric("auto", outputs=outputs, labels=None).name == name


def test_agreement_compares_with_the_original() -> None:
    metric = choose_metric("agreement", outputs=scores([0, 1]), labels=None)
    assert metric.reference_value(scores([0, 1])) == 1.0
    assert metric.evaluate(scores([0, 1]), scores([0, 2])) == 0.5


def test_scores_with_trailing_ones_count_as_classes() -> None:
    outputs = {"y": scores([2, 1])["logits"][:, :, None, None]}
    labels = np.array([2, 2])
    assert choose_metric("auto", outputs=outputs, labels=labels).reference_value(outputs, labels) == 0.5


def test_accuracy_picks_the_output_that_can_hold_the_labels() -> None:
    outputs = {"features": np.ones((2, 3), np.float32), "logits": scores([5, 0], 6)["logits"]}
    assert choose_metric("auto", outputs=outputs, labels=np.array([5, 0])).output == "logits"


def test_accuracy_without_class_scores() -> None:
    with pytest.raises(CalibrationError, match=r"class scores.*'y' \[N, 7, 7\]"):
        choose_metric("auto", outputs={"y": np.zeros((3, 7, 7), np.float32)}, labels=np.array([0, 1, 2]))
    with pytest.raises(CalibrationError, match="needs labels"):
        choose_metric("accuracy", outputs=scores([0]), labels=None)


def test_label_range() -> None:
    with pytest.raises(CalibrationError, match=r"class 4, but the model scores 4 classes.*subtract 1"):
        choose_metric("auto", outputs=scores([0, 1]), labels=np.array([1, 4]))
    with pytest.raises(CalibrationError, match="class -1"):
        check_label_range(np.array([0, -1]), n_classes=3, n_samples=2)
    with pytest.raises(CalibrationError, match="3 labels for 2 samples"):
        check_label_range(np.array([0, 1, 2]), n_classes=3, n_samples=2)


def test_r2_by_hand() -> None:
    y = np.array([[0.0, 10.0], [2.0, 10.0]], np.float32)  # position means 1 and 10
    new = np.array([[0.0, 10.0], [1.0, 10.0]], np.float32)
    assert r2_score({"y": y}, {"y": new}) == 0.5
    # two outputs are averaged; a constant one is left out, or counts as 0 when it differs
    z = np.arange(2, dtype=np.float32)[:, None]
    constant = np.full((2, 3), 7, np.float32)
    assert r2_score({"y": y, "z": z, "c": constant}, {"y": new, "z": z, "c": constant}) == 0.75
    assert r2_score({"y": y, "z": z, "c": constant}, {"y": new, "z": z, "c": constant + 1}) == 0.5
    assert r2_score({"c": constant}, {"c": constant}) == 1.0


@settings(max_examples=60, deadline=None)
@given(arrays)
def test_r2_of_a_perfect_copy_is_one(y: np.ndarray) -> None:
    assert r2_score({"y": y}, {"y": y.copy()}) == 1.0
    assert max_abs_error({"y": y}, {"y": y.copy()}) == 0.0
    assert Metric("r2").drop_interval({"y": y}, {"y": y.copy()}) == (0.0, 0.0)


@settings(max_examples=60, deadline=None)
@given(arrays, st.data())
def test_r2_of_a_model_that_ignores_its_input_is_at_most_zero(y: np.ndarray, data: st.DataObject) -> None:
    row = data.draw(hnp.arrays(np.float32, y.shape[1:], elements=finite))
    value = r2_score({"y": y}, {"y": np.broadcast_to(row, y.shape)})
    varies = bool((y != y[0]).any())
    assert value <= 1e-9 if varies else value in (0.0, 1.0)
    if varies:
        mean = y.astype(np.float64).mean(axis=0)
        assert abs(r2_score({"y": y}, {"y": np.broadcast_to(mean, y.shape)})) < 1e-9


@settings(max_examples=30, deadline=None)
@given(arrays, st.randoms(use_true_random=False))
def test_r2_does_not_depend_on_sample_order(y: np.ndarray, random: object) -> None:
    new = y + np.linspace(0, 1, y.size, dtype=np.float32).reshape(y.shape)
    order = np.random.default_rng(random.randrange(2**32)).permutation(len(y))  # type: ignore[attr-defined]
    first, second = r2_score({"y": y}, {"y": new}), r2_score({"y": y[order]}, {"y": new[order]})
    assert first == pytest.approx(second, rel=1e-9, abs=1e-9)


def test_nan_never_passes() -> None:
    good, bad = scores([0, 1]), {"logits": np.full((2, 4), np.nan, np.float32)}
    labels = np.array([0, 1])
    assert Metric("accuracy", output="logits").evaluate(good, bad, labels) == 0.0
    assert Metric("agreement", output="logits").evaluate(good, bad) == 0.0
    assert r2_score(good, bad) == -math.inf
    assert r2_score(good, {"logits": np.full((2, 4), np.inf, np.float32)}) == -math.inf
    assert max_abs_error(good, bad) == math.inf
    assert Metric("r2").drop_interval(good, bad) == (math.inf, math.inf)
    for metric in (Metric("r2"), Metric("agreement", output="logits")):
        with pytest.raises(CalibrationError, match=r"original model gives NaN.*'logits'"):
            metric.evaluate(bad, good)


def test_outputs_must_match() -> None:
    with pytest.raises(ValidationError, match="outputs are"):
        r2_score({"y": np.zeros((2, 1))}, {"z": np.zeros((2, 1))})
    with pytest.raises(ValidationError, match=r"shape \[2, 2\] but the original \[2, 1\]"):
        r2_score({"y": np.zeros((2, 1))}, {"y": np.zeros((2, 2))})


def test_fidelity_numbers() -> None:
    a, b = scores([0, 1]), scores([0, 2])
    assert agreement_score(a, b) == 0.5
    assert agreement_score({"y": np.zeros((2, 1), np.float32)}, {"y": np.zeros((2, 1), np.float32)}) is None
    assert max_abs_error(a, b) == 1.0
    inf = {"y": np.array([[-np.inf, 1.0]])}
    assert max_abs_error(inf, {"y": np.array([[-np.inf, 1.5]])}) == 0.5


def test_interval_is_paired() -> None:
    """Two models that miss the same samples differ by nothing, however bad both are."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 1000)
    predicted = np.where(rng.random(1000) < 0.6, labels, (labels + 1) % 4)
    quality = Metric("accuracy", output="logits").measure(scores(predicted), scores(predicted), labels)
    assert quality.drop == 0
    assert quality.interval is not None
    assert -0.003 < quality.interval[0] < 0 < quality.interval[1] < 0.003


@pytest.mark.parametrize("name", ["accuracy", "agreement", "r2"])
def test_interval_covers_the_true_drop(name: str) -> None:
    """Over many draws from a known population, about 95 % of the intervals hold the truth."""
    covered, n_draws, n = 0, 150, 200
    for draw in range(n_draws):
        rng = np.random.default_rng(draw)
        if name == "r2":
            y = rng.normal(size=(n, 2))
            new = y + 0.3 * rng.normal(size=(n, 2))
            interval, truth = Metric("r2").drop_interval({"y": y}, {"y": new}), 0.09
        else:
            labels = rng.integers(0, 4, n)
            before = np.where(rng.random(n) < 0.9, labels, (labels + 1) % 4)
            after = np.where(rng.random(n) < 0.95, before, (before + 2) % 4)
            interval = Metric(name, output="logits").drop_interval(scores(before), scores(after), labels)
            truth = 0.045 if name == "accuracy" else 0.05
        assert interval is not None
        covered += interval[0] <= truth <= interval[1]
    assert covered / n_draws > 0.88


def test_interval_is_deterministic() -> None:
    rng = np.random.default_rng(3)
    y, new = {"y": rng.normal(size=(20, 3))}, {"y": rng.normal(size=(20, 3))}
    assert Metric("r2").drop_interval(y, new) == Metric("r2").drop_interval(y, new)


@pytest.mark.parametrize(
    ("accuracy", "n_classes", "n_samples"),
    [(0.1, 10, 1000), (0.13, 10, 200), (0.105, 10, 50_000), (0.001, 1000, 1000), (0.02, 1000, 50_000),
     (0.5, 2, 100), (0.58, 2, 100), (0.0, 10, 20)],
)  # fmt: skip
def test_near_chance_is_refused(accuracy: float, n_classes: int, n_samples: int) -> None:
    with pytest.raises(CalibrationError, match=r"near chance.*preprocessing.*classes\.txt"):
        check_chance_level(accuracy, n_classes=n_classes, n_samples=n_samples)


@pytest.mark.parametrize(
    ("accuracy", "n_classes", "n_samples"),
    [(0.9164, 10, 1017), (0.3, 10, 200), (0.7, 1000, 100), (0.8, 2, 5), (0.65, 2, 200), (1.0, 2, 1)],
)
def test_clearly_better_than_chance_passes(accuracy: float, n_classes: int, n_samples: int) -> None:
    check_chance_level(accuracy, n_classes=n_classes, n_samples=n_samples)


def test_function_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_quality_module.py").write_text(
        "def half(reference, candidate, labels):\n    return 0.5 + float(labels[0])\n"
        "def broken(reference, candidate, labels):\n    raise KeyError('boxes')\n"
        "def nothing(reference, candidate, labels):\n    return float('nan')\n"
    )
    monkeypatch.chdir(tmp_path)
    outputs, labels = scores([0, 1]), np.array([1, 0])
    quality = choose_metric("my_quality_module:half", outputs=outputs, labels=labels).measure(
        outputs, outputs, labels
    )
    assert (quality.before, quality.after, quality.drop, quality.interval) == (1.5, 1.5, 0.0, None)
    with pytest.raises(UsageError, match="failed: KeyError: 'boxes'"):
        choose_metric("my_quality_module:broken", outputs=outputs, labels=None).evaluate(outputs, outputs)
    with pytest.raises(UsageError, match="returned NaN"):
        choose_metric("my_quality_module:nothing", outputs=outputs, labels=None).evaluate(outputs, outputs)
    with pytest.raises(UsageError, match="no function 'missing'"):
        choose_metric("my_quality_module:missing", outputs=outputs, labels=None)


@pytest.mark.parametrize("name", ["no_such_module_anywhere:f", ":f"])
def test_function_that_cannot_be_imported(name: str) -> None:
    with pytest.raises(UsageError, match="cannot import"):
        choose_metric(name, outputs=scores([0]), labels=None)


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'accuracy'"):
        choose_metric("acuracy", outputs=scores([0]), labels=None)


def test_compare_outputs_by_hand() -> None:
    reference = {"y": np.float32([[1, 2], [5, 0]])}
    candidate = {"y": np.float32([[1, 2.5], [5, 0]])}
    fidelity = compare_outputs(reference, candidate)
    mean = reference["y"].mean(0)
    assert fidelity.r2 == pytest.approx(1 - 0.25 / ((reference["y"] - mean) ** 2).sum())
    assert fidelity.agreement == 1.0
    assert fidelity.max_abs_error == 0.5
