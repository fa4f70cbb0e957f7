"""The kernels that onnxruntime runs for a model, and how long each takes, by its own profiler."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from hap_onnx.errors import ModelError, ValidationError
from hap_onnx.interrupts import interruptible
from hap_onnx.model.temporary import temporary_folder
from hap_onnx.runtime.session import ORT_ERRORS, Model, explain, load

SYNCHRONOUS = ("CPUExecutionProvider",)
"""Providers whose kernels have finished when the profiler stops its watch."""
MIN_RUNS, MAX_RUNS = 7, 300
_SUFFIX = "_kernel_time"
_LABEL = "a model to time"


@dataclass(frozen=True)
class Kernel:
    """One kernel of a loaded model: what onnxruntime calls it, its operator, and the time of one run."""

    name: str
    op_type: str
    microseconds: float


def time_kernels(
    model: Model,
    feed: Mapping[str, np.ndarray],
    *,
    provider: str,
    threads: int | None,
    seconds: float,
) -> tuple[Kernel, ...]:
    """Run a model for about so many seconds and return its kernels in the order in which they ran.

    Of the times of a kernel, the mean of the middle half is taken: the profiler counts whole microseconds,
    and a busy machine makes some runs slow.

    Raises:
        ModelError: onnxruntime cannot load or run the model.
        ValidationError: what the profiler wrote is not whole.
    """
    with temporary_folder("profile") as folder, interruptible():
        prefix = f"{folder}/profile"
        session = load(model, [provider], threads=threads, severity=4, label=_LABEL, profile=prefix)
        try:
            once = _run(session, feed)
            for _ in range(int(np.clip(seconds / max(once, 1e-6), MIN_RUNS, MAX_RUNS))):
                _run(session, feed)
        except ORT_ERRORS as error:
            raise ModelError(f"{_LABEL} does not run in onnxruntime: {explain(error)}") from error
        events = _read_events(Path(session.end_profiling()))
    durations: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            name = event["name"].removesuffix(_SUFFIX)
            durations[name, event["args"].get("op_name", "")].append(event["dur"])
    return tuple(
        Kernel(name, op_type, _middle_mean(np.array(times[1:] or times)))  # the first run warms up
        for (name, op_type), times in durations.items()
    )


def _read_events(path: Path) -> list[dict[str, Any]]:
    try:
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # onnxruntime itself does not say that it could not write
        raise ValidationError(
            f"the times of layers that onnxruntime wrote to {path} are not whole: is there room for them?"
        ) from error
    return events


def time_run(session: ort.InferenceSession, feed: Mapping[str, np.ndarray], *, seconds: float) -> float:
    """Return the microseconds of one run as a whole, a robust mean of several."""
    once = max(_run(session, feed) for _ in range(2))
    n_runs = int(np.clip(seconds / max(once, 1e-6), MIN_RUNS, MAX_RUNS))
    return _middle_mean(np.array([_run(session, feed) for _ in range(n_runs)])) * 1e6


def _run(session: ort.InferenceSession, feed: Mapping[str, np.ndarray]) -> float:
    start = time.perf_counter()
    session.run(None, dict(feed))
    return time.perf_counter() - start


def _middle_mean(values: np.ndarray) -> float:
    """The mean of what lies between the quartiles."""
    low, high = np.quantile(values, [0.25, 0.75])
    return float(values[(values >= low) & (values <= high)].mean())
