"""Quality as one number, higher is better, with an interval for what compression costs.

- ``accuracy``: share of samples whose highest class score is the label's.
- ``agreement``: share of samples whose highest class score is the original's.
- ``r2``: for each output 1 - sum (y' - y)^2 / sum (y - m)^2, with m the mean *over samples at each
  position*, averaged over outputs. A model that ignores its input scores at most 0. Outputs that do
  not vary over the samples are compared exactly: equal ones are left out, others count as 0.
- ``package.module:function``: called as ``function(reference, candidate, labels)`` with two dicts
  ``{output name: array, batch first}`` (the original's outputs and the compressed model's) and
  the int64 labels or None; returns a number, higher is better.

Outputs are dicts of arrays with all samples on axis 0.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hap_onnx.data.preprocess import nearest_word
from hap_onnx.errors import CalibrationError, UsageError, ValidationError
from hap_onnx.model.input_spec import format_shape, is_float
from hap_onnx.report import Fidelity

Outputs = Mapping[str, np.ndarray]
QualityFunction = Callable[[Outputs, Outputs, np.ndarray | None], float]

METRICS = ("auto", "accuracy", "agreement", "r2")
_Z95 = 1.959963984540054
_N_RESAMPLES = 1000
_RESAMPLE_SEED = 20210108
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Quality:
    """The metric of the original (``before``) and of the compressed model (``after``).

    ``interval`` is the 95 % interval of ``drop`` = before - after, paired over samples; None where
    the metric is the user's function.
    """

    metric: str
    before: float
    after: float
    interval: tuple[float, float] | None
    n_samples: int

    @property
    def drop(self) -> float:
        return self.before - self.after


@dataclass(frozen=True)
class Metric:
    """A quality metric; make it with `choose_metric`.

    ``output`` names the class scores that accuracy and agreement read. ``n_classes`` is their number.
    """

    name: str
    output: str | None = None
    n_classes: int | None = None
    function: QualityFunction | None = None

    def evaluate(self, reference: Outputs, candidate: Outputs, labels: np.ndarray | None = None) -> float:
        """The candidate's quality. A candidate with NaN where it matters gets -inf (r2) or misses (classes).

        Raises CalibrationError when the original gives NaN or the labels do not fit, and
        ValidationError when the candidate's outputs have other names or shapes.
        """
        _check_same(reference, candidate)
        if self.function is not None:
            return _call(self.name, self.function, reference, candidate, labels)
        if self.name == "r2":
            return _r2(_r2_terms(reference, candidate))
        return float(self._hits(reference, candidate, labels).mean())

    def reference_value(self, reference: Outputs, labels: np.ndarray | None = None) -> float:
        """The original's own quality: its accuracy, or 1 for agreement and r2."""
        return self.evaluate(reference, reference, labels)

    def measure(self, reference: Outputs, candidate: Outputs, labels: np.ndarray | None = None) -> Quality:
        """Quality before and after, with the interval of the drop."""
        return Quality(
            metric=self.name,
            before=self.reference_value(reference, labels),
            after=self.evaluate(reference, candidate, labels),
            interval=self.drop_interval(reference, candidate, labels),
            n_samples=len(next(iter(reference.values()))),
        )

    def drop_interval(
        self, reference: Outputs, candidate: Outputs, labels: np.ndarray | None = None
    ) -> tuple[float, float] | None:
        """95 % interval of the drop, by differences per sample; None for the user's own function.

        Accuracy: Agresti and Min's for matched pairs; agreement: Wilson's; r2: 1000 bootstrap
        resamples of the samples with the position means m held fixed.
        """
        _check_same(reference, candidate)
        if self.function is not None:
            return None
        if self.name == "r2":
            return _bootstrap_r2(_r2_terms(reference, candidate))
        after = self._hits(reference, candidate, labels)
        if self.name == "agreement":
            return _wilson(n_events=int((~after).sum()), n_samples=len(after))
        before = self._hits(reference, reference, labels)
        return _matched_pairs(
            n_lost=int((before & ~after).sum()), n_won=int((after & ~before).sum()), n_samples=len(after)
        )

    def _hits(self, reference: Outputs, candidate: Outputs, labels: np.ndarray | None) -> np.ndarray:
        assert self.output is not None
        top = top_classes(candidate[self.output])
        original = top_classes(reference[self.output])
        if (original < 0).any():
            raise CalibrationError(
                f"The original model gives NaN in output '{self.output}' for sample "
                f"{int(np.argmin(original))}; "
                "check the data and its preprocessing."
            )
        if self.name == "agreement":
            return top == original
        if labels is None:
            raise CalibrationError("The metric accuracy needs labels, and this part of the data has none.")
        check_label_range(labels, n_classes=_n_classes(reference[self.output]), n_samples=len(top))
        return top == labels


def choose_metric(name: str, *, outputs: Outputs, labels: np.ndarray | None) -> Metric:
    """The metric of that name for a model with these ``outputs`` (the original's on some samples).

    ``auto``: accuracy when there are labels; agreement when there are none and the model has one
    float output [N, C] with C >= 2; otherwise r2.

    Raises UsageError for an unknown name, and CalibrationError when the metric does not fit.
    """
    if ":" in name:
        return Metric(name, function=_import_function(name))
    if name not in METRICS:
        close = nearest_word(name, METRICS)
        raise UsageError(
            f"--metric '{name}' is none of {', '.join(METRICS)} or package.module:function{close or '.'}"
        )
    if not outputs:
        raise CalibrationError("The model has no outputs to compare.")
    if name == "auto":
        only = next(iter(outputs.values()))
        if labels is not None:
            name = "accuracy"
        elif len(outputs) == 1 and is_float(only.dtype) and only.ndim == 2 and only.shape[1] >= 2:
            name = "agreement"
        else:
            name = "r2"
    if name == "r2":
        return Metric("r2")
    if name == "accuracy" and labels is None:
        raise CalibrationError(
            "--metric accuracy needs labels: an array 'labels' in the .npz, or one subfolder of images per "
            "class."
        )
    output = _find_scores(outputs, labels if name == "accuracy" else None, name)
    n_classes = _n_classes(outputs[output])
    if name == "accuracy" and labels is not None:
        check_label_range(labels, n_classes=n_classes, n_samples=len(labels))
    return Metric(name, output=output, n_classes=n_classes)


def check_label_range(labels: np.ndarray, *, n_classes: int, n_samples: int) -> None:
    """Raise CalibrationError unless there is one label in [0, n_classes) per sample."""
    if len(labels) != n_samples:
        raise CalibrationError(f"There are {len(labels)} labels for {n_samples} samples.")
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= n_classes):
        wrong = int(labels.min()) if labels.min() < 0 else int(labels.max())
        hint = (
            "; they seem to count from 1, subtract 1"
            if labels.min() >= 1 and labels.max() == n_classes
            else ""
        )
        raise CalibrationError(
            f"The labels hold class {wrong}, but the model scores {n_classes} classes, 0 to "
            f"{n_classes - 1}{hint}."
        )


def check_chance_level(accuracy: float, *, n_classes: int, n_samples: int) -> None:
    """Raise CalibrationError when the original model is hardly better than guessing among its classes.

    The line lies above 1/n_classes by two standard errors of a guess (at most half of the way to 1,
    so that a good model passes on few samples), and by at least 5 % of the way: with many samples a
    useless model is significantly, but only slightly, better than chance.
    """
    chance = 1 / n_classes
    noise = 2 * math.sqrt(chance * (1 - chance) / n_samples)
    margin = max(0.05 * (1 - chance), min(noise, 0.5 * (1 - chance)))
    if n_classes >= 2 and accuracy <= chance + margin:
        raise CalibrationError(
            f"The original model's accuracy is {accuracy:.2%} on {n_samples} samples, near chance for "
            f"{n_classes} "
            "classes; most likely the preprocessing is not the model's own (see --preprocess), or the "
            "labels are in "
            "another order (see classes.txt). If the labels are simply not these classes, use --metric "
            "agreement."
        )


def r2_score(reference: Outputs, candidate: Outputs) -> float:
    """The metric ``r2``, see the module's text; -inf when the candidate has NaN or infinity."""
    return Metric("r2").evaluate(reference, candidate)


def agreement_score(reference: Outputs, candidate: Outputs) -> float | None:
    """Top-1 agreement where the model has class scores [N, C], otherwise None."""
    scores = [name for name, array in reference.items() if _is_scores(array)]
    if len(scores) != 1:
        return None
    return Metric("agreement", output=scores[0]).evaluate(reference, candidate)


def max_abs_error(reference: Outputs, candidate: Outputs) -> float:
    """The largest |y' - y| over all numeric outputs (inf when only one side is not finite)."""
    _check_same(reference, candidate)
    worst = 0.0
    for name, original in reference.items():
        if original.dtype.kind in "OUS":
            continue
        for y, new in _chunks(original, candidate[name]):
            with np.errstate(invalid="ignore"):
                error = np.abs(new - y)
            error[(new == y) | (np.isnan(new) & np.isnan(y))] = 0.0  # equal infinities differ by NaN
            worst = max(worst, float(np.nan_to_num(error, nan=np.inf, posinf=np.inf).max(initial=0.0)))
    return worst


def distances(reference: Outputs, candidate: Outputs, scales: Mapping[str, float]) -> np.ndarray:
    """Half the squared distance of each sample's outputs [N], each output by its scale; NaN counts as NaN."""
    _check_same(reference, candidate)
    total = np.zeros(len(next(iter(reference.values()))))
    for name, scale in scales.items():
        wrong = [_sum_per_sample(new - y) for y, new in _chunks(reference[name], candidate[name])]
        total += 0.5 * scale**2 * np.concatenate(wrong)
    return total


@dataclass(frozen=True)
class _R2Terms:
    """Per varying output: squared error and squared deviation of each sample, float64 [n_outputs, N]."""

    error: np.ndarray
    deviation: np.ndarray
    n_broken: int  # constant outputs that are not reproduced exactly


def _r2_terms(reference: Outputs, candidate: Outputs) -> _R2Terms:
    errors, deviations, n_broken = [], [], 0
    n_samples = len(next(iter(reference.values())))
    for name, original in reference.items():
        if original.dtype.kind in "OUS" or not _varies(original):
            equal = bool(np.array_equal(original, candidate[name]))
            n_broken += not equal
            continue
        mean = np.zeros(original.shape[1:], np.float64)
        for y, _ in _chunks(original, original):
            mean += y.sum(axis=0)
        mean /= n_samples
        if not np.isfinite(mean).all():
            raise CalibrationError(
                f"The original model gives NaN or infinity in output '{name}'; check the data and its "
                "preprocessing, or choose another --metric."
            )
        pairs = [
            (_sum_per_sample(new - y), _sum_per_sample(y - mean))
            for y, new in _chunks(original, candidate[name])
        ]
        deviation = np.concatenate([deviation for _, deviation in pairs])
        if deviation.sum() == 0:  # differences too small to square
            n_broken += not np.array_equal(original, candidate[name])
            continue
        errors.append(np.concatenate([error for error, _ in pairs]))
        deviations.append(deviation)
    empty = np.zeros((0, n_samples))
    return _R2Terms(
        np.stack(errors) if errors else empty, np.stack(deviations) if deviations else empty, n_broken
    )


def _r2(terms: _R2Terms) -> float:
    n_outputs = len(terms.error) + terms.n_broken
    if n_outputs == 0:
        return 1.0
    values = 1 - terms.error.sum(axis=1) / terms.deviation.sum(axis=1)
    return float(values.sum() / n_outputs) if np.isfinite(values).all() else -math.inf


def _bootstrap_r2(terms: _R2Terms) -> tuple[float, float]:
    drop = 1 - _r2(terms)
    n_outputs, n_samples = terms.error.shape
    if n_outputs == 0 or n_samples < 2 or not math.isfinite(drop):
        return drop, drop
    generator = np.random.default_rng(_RESAMPLE_SEED)
    drops = []
    for _ in range(_N_RESAMPLES):
        rows = generator.integers(n_samples, size=n_samples)
        deviation = terms.deviation[:, rows].sum(axis=1)
        if (deviation > 0).all():  # a resample of one sample over and over says nothing
            lost = terms.error[:, rows].sum(axis=1) / deviation
            drops.append((lost.sum() + terms.n_broken) / (n_outputs + terms.n_broken))
    if not drops:
        return drop, drop
    low, high = np.quantile(drops, [0.025, 0.975])
    return min(float(low), drop), max(float(high), drop)


def _wilson(*, n_events: int, n_samples: int) -> tuple[float, float]:
    """95 % interval of a proportion; keeps a width when no event was seen."""
    share, z2 = n_events / n_samples, _Z95**2
    centre = (share + z2 / (2 * n_samples)) / (1 + z2 / n_samples)
    half = _Z95 / (1 + z2 / n_samples) * math.sqrt(share * (1 - share) / n_samples + z2 / (4 * n_samples**2))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _matched_pairs(*, n_lost: int, n_won: int, n_samples: int) -> tuple[float, float]:
    """95 % interval of (n_lost - n_won) / n_samples: Wald's with half a pair added to each cell.

    Agresti and Min 2005, "Simple improved confidence intervals for comparing matched proportions".
    """
    lost, won, n = n_lost + 0.5, n_won + 0.5, n_samples + 2
    centre = (lost - won) / n
    half = _Z95 * math.sqrt(max(0.0, (lost + won) / n - centre**2) / n)
    drop = (n_lost - n_won) / n_samples
    return max(-1.0, min(drop, centre - half)), min(1.0, max(drop, centre + half))


def _is_scores(array: np.ndarray) -> bool:
    """Float [N, C] with C >= 2; axes of size 1 may follow, as in fully convolutional classifiers."""
    return (
        is_float(array.dtype)
        and array.ndim >= 2
        and array.shape[1] >= 2
        and all(size == 1 for size in array.shape[2:])
    )


def _find_scores(outputs: Outputs, labels: np.ndarray | None, metric: str) -> str:
    scores = [name for name, array in outputs.items() if _is_scores(array)]
    if not scores:
        shapes = ", ".join(
            f"'{name}' {format_shape(('N', *array.shape[1:]))}" for name, array in outputs.items()
        )
        cause = (
            "Labels are there, and so the metric is accuracy, which"
            if labels is not None
            else f"--metric {metric}"
        )
        raise CalibrationError(
            f"{cause} needs an output of class scores (float [N, C], C >= 2), but the outputs are "
            f"{shapes}; use --metric "
            "r2 or package.module:function."
        )
    if labels is not None and len(labels):
        fitting = [name for name in scores if outputs[name].shape[1] > int(labels.max())]
        return (fitting or scores)[0]
    return scores[0]


def _n_classes(scores: np.ndarray) -> int:
    return int(scores.shape[1])


def top_classes(scores: np.ndarray) -> np.ndarray:
    """Index of the highest score [N]; -1 where a score is NaN."""
    flat = scores.reshape(len(scores), -1)
    flat = flat if flat.dtype.kind == "f" else flat.astype(np.float32)
    return np.where(np.isnan(flat).any(axis=1), -1, flat.argmax(axis=1))


def _varies(array: np.ndarray) -> bool:
    return len(array) > 1 and any(bool((array[i] != array[0]).any()) for i in range(1, len(array)))


def _sum_per_sample(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.square(values).reshape(len(values), -1).sum(axis=1)


def _chunks(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some samples of both at a time, as float64."""
    step = max(1, _CHUNK_BYTES // max(1, 8 * math.prod(first.shape[1:])))
    for start in range(0, len(first), step):
        rows = slice(start, start + step)
        yield first[rows].astype(np.float64), second[rows].astype(np.float64)


def _check_same(reference: Outputs, candidate: Outputs) -> None:
    if set(reference) != set(candidate):
        raise ValidationError(
            f"The compressed model's outputs are {sorted(candidate)} but the original's are "
            f"{sorted(reference)}."
        )
    for name, original in reference.items():
        if original.shape != candidate[name].shape:
            raise ValidationError(
                f"Output '{name}': the compressed model gives shape {format_shape(candidate[name].shape)} "
                "but the "
                f"original {format_shape(original.shape)}."
            )
        if original.ndim == 0 or len(original) == 0:
            raise CalibrationError(
                f"Output '{name}' of shape {format_shape(original.shape)} holds no samples."
            )


def _import_function(name: str) -> QualityFunction:
    module_name, _, function_name = name.partition(":")
    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:  # a console script, unlike python -m, does not look into the current folder
        sys.path.append(folder)
    try:
        function: Any = importlib.import_module(module_name)
    except (ImportError, ValueError, SyntaxError) as error:
        raise UsageError(f"--metric '{name}': cannot import '{module_name}' ({error}).") from error
    finally:
        if added:
            sys.path.remove(folder)
    for part in function_name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise UsageError(f"--metric '{name}': '{module_name}' has no function '{function_name}'.")
    return function


def _call(
    name: str, function: QualityFunction, reference: Outputs, candidate: Outputs, labels: np.ndarray | None
) -> float:
    try:
        value = float(function(reference, candidate, labels))
    except Exception as error:  # foreign code may raise anything; the cause stays attached
        raise UsageError(f"--metric '{name}' failed: {type(error).__name__}: {error}.") from error
    if math.isnan(value):
        raise UsageError(f"--metric '{name}' returned NaN; it must return a number, higher is better.")
    return value


def compare_outputs(reference: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray]) -> Fidelity:
    """Tell how near the candidate's outputs are to the reference's (all samples on axis 0)."""
    return Fidelity(
        r2=r2_score(reference, candidate),
        agreement=agreement_score(reference, candidate),
        max_abs_error=max_abs_error(reference, candidate),
    )
