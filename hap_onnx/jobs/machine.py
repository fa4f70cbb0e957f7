"""What a job runs on and with: threads, devices, sessions, data, files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch

import hap_onnx
from hap_onnx.config import CompressConfig, check_outputs
from hap_onnx.data.calibration import Dataset, Subset, open_dataset
from hap_onnx.errors import CalibrationError, ModelError, UsageError, ValidationError
from hap_onnx.model.model_io import SourceModel, to_proto
from hap_onnx.model.weights import AnyModel
from hap_onnx.planning.plan import CompressionPlan, plan_hash
from hap_onnx.runtime.latency import LatencyComparison, latency_feed, measure_latency
from hap_onnx.runtime.session import Session, make_session
from hap_onnx.timing.table import KeptTable, default_path, this_machine

LATENCY_SECONDS = 3.0
"""How long two models are timed against each other."""


class Stopwatch:
    """Counts the seconds that each stage of a job takes; they add up, since no second counts twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._counted = 0.0  # of all stages that have ended
        self._open: list[tuple[str, float, float]] = []  # name, start, and what was counted then

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside as part of a stage, but for the stages within it."""
        self._open.append((name, time.perf_counter(), self._counted))
        try:
            yield
        finally:
            _, start, counted = self._open.pop()
            own = time.perf_counter() - start - (self._counted - counted)
            self.seconds[name] = self.seconds.get(name, 0.0) + own
            self._counted += own

    def so_far(self) -> dict[str, float]:
        """Return the seconds of all stages as if those that are on would end now."""
        seconds, now, counted = dict(self.seconds), time.perf_counter(), self._counted
        for name, start, counted_before in reversed(self._open):
            own = now - start - (counted - counted_before)
            seconds[name] = seconds.get(name, 0.0) + own
            counted += own
        return seconds


@contextmanager
def use_threads(n_threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here")
    return name


def open_session(model: AnyModel, config: CompressConfig) -> Session:
    """Load a model as its latency is measured: one thread unless told otherwise."""
    return make_session(model, providers=config.providers or "cpu", threads=config.threads or 1)


def compare_speed(
    reference: Session, candidate: Session, inputs: Mapping[str, np.ndarray]
) -> LatencyComparison:
    """Time two models in turn on the first sample of ``inputs``."""
    feed = latency_feed(reference, inputs)
    return measure_latency(reference, candidate, feed, seconds=LATENCY_SECONDS)


def open_times(config: CompressConfig, session: Session, in_work_folder: Path | None) -> KeptTable:
    """Open the times that a job may use again: of the table named, the work folder, or the user's cache."""
    machine = this_machine(session.provider, session.threads)
    if config.latency_table is not None:
        return KeptTable(machine, config.latency_table)
    if in_work_folder is not None:
        return KeptTable(machine, in_work_folder, was_named=False)
    return KeptTable(machine, default_path(machine), is_cache=True)


def whole_batch_size(wanted: int, session: Session) -> int:
    """Batches of a model that was exported for k samples hold multiples of k."""
    unit = session.fixed_batch or 1
    return max(1, wanted // unit) * unit


def open_data(data: Any, inputs: Sequence[Any], config: CompressConfig, note: Any) -> Dataset:
    dataset = open_dataset(
        data,
        inputs,
        preprocess=config.preprocess,
        max_samples=config.max_samples,
        seed=config.seed,
        work_dir=config.work_dir,
    )
    for text in (dataset.preprocessing, *dataset.notes):
        if text:
            note(text)
    return dataset


def whole_batches(part: Subset, unit: int) -> Subset:
    """Leave out the last samples of a part that do not fill a batch of a model with a fixed one."""
    if part.n_samples < unit:
        raise CalibrationError(
            f"the model takes batches of {unit} samples, and a part of the data has only {part.n_samples}; "
            f"give at least {unit * 5} samples"
        )
    return part.take(part.n_samples // unit * unit)


def protect_weights(source: SourceModel, outputs: Mapping[str, Path]) -> None:
    """Refuse outputs that would overwrite the files in which the model keeps its weights."""
    check_outputs(
        outputs, inputs={f"the model's weights '{file.name}'": file for file in source.weight_files}
    )


def write_proto(graph: gs.Graph, source: SourceModel, plan: CompressionPlan | None) -> AnyModel:
    entry = {"version": hap_onnx.__version__, "plan": plan_hash(plan)} if plan is not None else None
    return to_proto(
        graph, source, metadata=None if entry is None else {"hap_onnx": json.dumps(entry, sort_keys=True)}
    )


def check_loads(path: Path, config: CompressConfig | None) -> None:
    """Refuse to rename a file that onnxruntime cannot load."""
    try:
        make_session(path, providers=(config.providers if config else None) or "cpu", threads=1)
    except ModelError as error:
        raise ValidationError(f"the written model does not load: {error}") from error
