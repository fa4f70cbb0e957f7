"""How long a model takes in onnxruntime, beside another one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from scipy.stats import binom

from hap_onnx.errors import UsageError
from hap_onnx.report import Latency
from hap_onnx.runtime.session import Session

_MIN_ROUNDS = 11
_MAX_ROUNDS = 2000
_MIN_TIMING_S = 1e-3  # shorter runs are timed several at once


@dataclass(frozen=True)
class LatencyComparison:
    """Two models timed in turn. ``ratio`` is after / before: below 1 is faster.

    ``ratio`` is the median over ``n`` rounds of the ratio within a round, ``ratio_low`` to ``ratio_high``
    its 95 % interval; ``before_ms`` and ``after_ms`` are medians of one run of ``batch`` samples.
    """

    before_ms: float
    after_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    n: int
    threads: int | None
    provider: str
    batch: int

    def facts(self) -> Latency:
        """The comparison in the words of a report."""
        return Latency(
            self.before_ms, self.after_ms, self.ratio, (self.ratio_low, self.ratio_high),
            self.n, self.threads, self.provider, self.batch,
        )  # fmt: skip

    @property
    def is_slower(self) -> bool:
        """Whether the candidate is slower beyond noise."""
        return self.ratio_low > 1.0

    @property
    def is_faster(self) -> bool:
        """Whether the candidate is faster beyond noise."""
        return self.ratio_high < 1.0


def measure_latency(
    reference: Session,
    candidate: Session,
    feed: Mapping[str, np.ndarray],
    *,
    seconds: float = 3.0,
    rounds: int | None = None,
) -> LatencyComparison:
    """Time two sessions on the same input, strictly in turn, so that a busy machine slows both alike.

    Args:
        feed: input name -> array, batch first; see ``latency_feed``.
        seconds: how long to measure, unless ``rounds`` says how often.

    Raises:
        UsageError: the sessions were made with different threads or providers.
    """
    if (reference.threads, reference.provider) != (candidate.threads, candidate.provider):
        raise UsageError("two models can only be timed against each other with the same threads and provider")
    pair = [(session.session, session.prepare(feed)) for session in (reference, candidate)]
    for session in (reference, candidate):
        session.run(session.prepare(feed))  # raises with a message; the timed runs do not
    once = max(_time_runs(*entry, n_runs=1) for entry in pair for _ in range(3))
    n_runs = max(1, int(np.ceil(_MIN_TIMING_S / once)))
    if rounds is None:
        rounds = int(np.clip(seconds / (2 * once * n_runs), _MIN_ROUNDS, _MAX_ROUNDS))
    times = np.empty((rounds, 2))  # seconds of one run: reference, candidate
    for index in range(rounds):
        order = (0, 1) if index % 2 == 0 else (1, 0)  # neither always profits from the other's warm caches
        for which in order:
            times[index, which] = _time_runs(*pair[which], n_runs=n_runs)
    low, median, high = median_interval(times[:, 1] / times[:, 0])
    before, after = np.median(times, axis=0) * 1e3
    first = next(iter(feed.values()))
    return LatencyComparison(
        before_ms=float(before),
        after_ms=float(after),
        ratio=median,
        ratio_low=low,
        ratio_high=high,
        n=rounds,
        threads=reference.threads,
        provider=reference.provider,
        batch=len(first) if first.ndim else 1,
    )


def latency_feed(
    session: Session, inputs: Mapping[str, np.ndarray], *, batch: int = 1
) -> dict[str, np.ndarray]:
    """Take the first ``batch`` samples (or the model's fixed batch) of ``inputs``, repeated if few."""
    n_samples = session.fixed_batch or batch
    return {name: np.resize(array, (n_samples, *array.shape[1:])) for name, array in inputs.items()}


def _time_runs(session: ort.InferenceSession, feed: dict[str, np.ndarray], *, n_runs: int) -> float:
    """Return the mean seconds of ``n_runs`` runs."""
    start = time.perf_counter()
    for _ in range(n_runs):
        session.run(None, feed)
    return (time.perf_counter() - start) / n_runs


def median_interval(values: np.ndarray, *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Return the median of a sample between the ends of its interval.

    The ends are order statistics: the number of values below the true median is binomial(n, 1/2)
    whatever the distribution. Below six values the whole range is returned, which covers less.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    below = int(binom.ppf((1 - confidence) / 2, len(ordered), 0.5))
    index = max(below - 1, 0)
    return float(ordered[index]), float(np.median(ordered)), float(ordered[len(ordered) - 1 - index])
