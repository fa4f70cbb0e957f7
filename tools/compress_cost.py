"""What one ``compress`` costs: seconds and share of each stage, in passes over the data, and memory.

    python -m tools.compress_cost resnet50 --samples 256 --keep-macs 0.5
    python -m tools.compress_cost resnet56.onnx --data calib.npz

The model is a file, or one of ``resnet50`` and ``mobilenet_v2`` at 224x224 with random weights (the latter
needs ``.[zoo]``); without ``--data`` its inputs are made up. The job runs in a process of its own, on default
settings but for what ``--config`` says; *passes* are its seconds over those of one forward pass over all the
data, in onnxruntime and in the torch twin. Lines that are set in are parts of the line above them. With
random weights only time and memory mean anything; where other jobs share the processor, its time says more
than seconds do.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import hap_onnx
from hap_onnx.config import CompressConfig, read_config
from hap_onnx.data.calibration import Subset, open_dataset
from hap_onnx.errors import TargetError
from hap_onnx.events import Event
from hap_onnx.model.model_io import load_model
from hap_onnx.runtime.session import make_session, run_outputs
from hap_onnx.sensitivity.curvature import to_tensors
from tools.reproduce import Used, run_process, smooth_images, write_random_resnet50

SIZE = 224
PARTS = {"measure": "sensitivity", "refit": "compress"}
"""Work that reports its progress, and the stage that it is a part of."""


def write_mobilenet(path: Path, images: torch.Tensor) -> None:
    """Write a MobileNetV2 with random weights and statistics of BatchNormalization."""
    from tools.zoo_models import NETWORKS, Input, export

    shape = Input("input", tuple(images.shape[1:]))
    export(replace(NETWORKS["mobilenet_v2"], inputs=(shape,), dynamic=True), "main", path)


NETWORKS: Mapping[str, Callable[[Path, torch.Tensor], None]] = {
    "resnet50": write_random_resnet50,
    "mobilenet_v2": write_mobilenet,
}


def make_files(model: str, data: Path | None, folder: Path, n_samples: int) -> tuple[Path, Path]:
    """Return the model and the data, made up and written to ``folder`` as far as they are not there."""
    path = folder / f"{model}.onnx" if model in NETWORKS else Path(model)
    if model in NETWORKS:
        images = smooth_images(n_samples)
        NETWORKS[model](path, images)
        arrays = {"input": images.numpy()}
    elif not path.is_file():
        raise click.UsageError(f"there is no file '{model}', and no network of that name: {sorted(NETWORKS)}")
    elif data is None:
        generator = np.random.default_rng(0)
        arrays = {
            spec.name: generator.standard_normal(
                [n_samples, *(size if isinstance(size, int) else SIZE for size in spec.shape[1:])]
            ).astype(spec.dtype)
            for spec in make_session(path, providers="cpu").inputs
        }
    if data is None:
        data = folder / "data.npz"
        np.savez(data, **arrays)
    return path, data


# --- the job, in a process of its own ---


def run_job(words: Mapping[str, Any]) -> dict[str, Any]:
    """Compress, and return the report with the seconds of the parts that tell when they begin and end."""
    parts: dict[str, float] = {}
    begun: dict[str, float] = {}

    def on_event(event: Event) -> None:
        if event.kind == "start":
            begun[event.stage] = time.perf_counter()
        elif event.kind == "end":
            spent = time.perf_counter() - begun.pop(event.stage)
            parts[event.stage] = parts.get(event.stage, 0.0) + spent

    words = dict(words)
    model, data = words.pop("model"), words.pop("data")
    try:
        report, refusal = hap_onnx.compress(model, data, on_event=on_event, **words), None
    except TargetError as error:
        if error.report is None:
            raise
        report, refusal = error.report, str(error)
    return {**report.to_dict(), "parts": parts, "refusal": refusal}


# --- one pass ---


def time_passes(model: Path, data: Path, words: Mapping[str, Any], threads: int) -> tuple[float, float]:
    """Seconds of one forward pass over all the data, in onnxruntime and in the twin."""
    batch_size = int(words.get("batch_size", CompressConfig().batch_size))
    session = make_session(load_model(model).proto, providers="cpu", threads=threads)
    dataset = open_dataset(data, session.inputs, max_samples=words.get("max_samples"))
    subset = Subset(dataset, np.arange(dataset.n_samples))
    twin = hap_onnx.load_twin(model)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)

    def run_session(part: Subset) -> None:
        run_outputs(session, part, batch_size=batch_size)

    def run_twin(part: Subset) -> None:
        with torch.no_grad():
            for batch in part.batches(batch_size):
                twin(to_tensors(batch.inputs, twin))

    try:
        return _time(run_session, subset), _time(run_twin, subset)
    finally:
        torch.set_num_threads(before)


def _time(run: Callable[[Subset], None], subset: Subset) -> float:
    run(subset.take(1))  # the first run sets up
    start = time.perf_counter()
    run(subset)
    return time.perf_counter() - start


# --- the table ---


def find_rows(report: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Stages in the order in which they first ended, each followed by its parts, set in."""
    rows: list[tuple[str, float]] = []
    for stage, seconds in report["seconds"].items():
        rows.append((stage, seconds))
        parts = {name: s for name, s in report["parts"].items() if PARTS.get(name, name) == stage}
        rows += [(f"  {name if name != stage else 'collect'}", s) for name, s in parts.items()]
    return rows


def show(title: str, rows: Iterable[tuple[str, float]], total: float, passes: Sequence[float]) -> Table:
    """The table of stages; ``passes`` are the seconds of a pass in onnxruntime and in the twin."""
    table = Table(title=title)
    for column in ("stage", "seconds", "share", "passes, onnxruntime", "passes, twin"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, seconds in [*rows, ("all", total)]:
        ratios = (f"{seconds / one:.1f}" for one in passes)
        table.add_row(name, f"{seconds:.1f}", f"{100 * seconds / total:.1f} %", *ratios)
    return table


def describe(report: Mapping[str, Any], used: Used, passes: Sequence[float]) -> list[str]:
    """What the table has no room for."""
    before, after = report["before"], report["after"]
    lines = [
        f"one pass: {passes[0]:.3g} s in onnxruntime, {passes[1]:.3g} s in the twin",
        f"processor time {used.cpu_s:.0f} s, peak memory {used.peak_mb:.0f} MB",
        f"multiply-accumulates x{after['macs'] / before['macs']:.3f}, params "
        f"x{after['params'] / before['params']:.3f}",
    ]
    return lines if report["refusal"] is None else [*lines, f"refused: {report['refusal']}"]


@click.command(help=__doc__)
@click.argument("model", required=False)
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Default: made up.")
@click.option("--samples", "n_samples", default=256, show_default=True, help="Of data that is made up.")
@click.option("--keep-macs", default=0.5, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--config", type=click.Path(exists=True, path_type=Path), help="More options of compress.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keeps all files; default: a temporary one.")
@click.option("--child", type=click.Path(path_type=Path), hidden=True)
def main(
    model: str | None,
    data: Path | None,
    n_samples: int,
    keep_macs: float,
    threads: int,
    config: Path | None,
    folder: Path | None,
    child: Path | None,
) -> None:
    if child is not None:
        child.write_text(json.dumps(run_job(json.loads(child.read_text("utf-8")))), "utf-8")
        return
    if model is None:
        raise click.UsageError("name a model")
    with tempfile.TemporaryDirectory(prefix="compress-cost-") as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        path, source = make_files(model, data, place, n_samples)
        words = {**(read_config(config) if config else {}), "keep_macs": keep_macs, "threads": threads}
        job = place / "job.json"
        job.write_text(
            json.dumps({**words, "model": str(path), "data": str(source), "output": str(place / "out.onnx")})
        )
        used = run_process([sys.executable, "-m", "tools.compress_cost", "--child", str(job)])
        if used.code:
            raise click.ClickException(f"the job ended with exit code {used.code}")
        report = json.loads(job.read_text("utf-8"))
        passes = time_passes(path, source, words, threads)
    total = sum(report["seconds"].values())
    console = Console(highlight=False)
    console.print(show(f"{path.name}, {threads} thread(s)", find_rows(report), total, passes))
    for line in describe(report, used, passes):
        console.print(line)


if __name__ == "__main__":
    main()
