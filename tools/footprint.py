"""What sensitivity costs: time in forward-backward passes, and peak memory against the number of images.

    python tools/footprint.py MODEL.onnx --data calib.npz --samples 256 --samples 1024

Each number of samples runs in a process of its own. Prints one row each: seconds of the statistics and the
ranking (default estimator), of the measured loss curves, of one forward-backward pass over the same images,
the ratios, and the peak resident memory of the process.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
from benchmark import pass_seconds
from rich.console import Console
from rich.table import Table

from hap_onnx.data.calibration import Subset, open_dataset
from hap_onnx.model.model_io import load_model
from hap_onnx.planning.curves import measure_curves
from hap_onnx.planning.decide import n_measured, rank_groups
from hap_onnx.prepare import prepare
from hap_onnx.runtime.session import make_session, run_outputs
from hap_onnx.sensitivity.curvature import collect_curvature, output_scales
from hap_onnx.sensitivity.estimate import Options


def measure(model: Path, data: Path, n_samples: int, threads: int, batch_size: int) -> dict[str, float]:
    """Run the statistics on ``n_samples`` once and return seconds and peak memory in MB."""
    torch.set_num_threads(threads)
    source = load_model(model)
    session = make_session(source.model, providers="cpu", threads=threads)
    dataset = open_dataset(data, session.inputs, max_samples=n_samples)
    subset = Subset(dataset, np.arange(dataset.n_samples))
    prepared = prepare(source, next(iter(subset.batches(2))).inputs)
    scales = output_scales([run_outputs(session, subset.take(64), batch_size=batch_size)])
    start = time.perf_counter()
    curvature = collect_curvature(
        prepared.graph, prepared.twin, prepared.coupling, subset, scales=scales, batch_size=batch_size, seed=0
    )
    options = Options(graph=prepared.graph, scales=scales, batch_size=batch_size)
    rankings = rank_groups("auto", prepared, curvature, subset, options=options)
    ranked = time.perf_counter()
    few = subset.take(n_measured(prepared))
    measure_curves(
        prepared.graph, prepared.twin, prepared.coupling, rankings, curvature, few,
        scales=scales, batch_size=batch_size,
    )  # fmt: skip
    measured = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "samples": subset.n_samples,
        "sensitivity_s": ranked - start,
        "curves_s": measured - ranked,
        "pass_s": pass_seconds(prepared, subset, batch_size),
        "peak_mb": peak,
    }


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--samples", multiple=True, type=int, default=(256, 1024))
@click.option("--threads", default=1)
@click.option("--batch-size", default=32)
@click.option("--child", is_flag=True, hidden=True)
def main(
    model: Path, data: Path, samples: tuple[int, ...], threads: int, batch_size: int, child: bool
) -> None:
    if child:
        print(json.dumps(measure(model, data, samples[0], threads, batch_size)))
        return
    table = Table(title=f"{model.name}, {threads} thread(s)")
    for column in ("images", "sensitivity s", "passes", "curves s", "passes", "one pass s", "peak MB"):
        table.add_column(column, justify="right")
    for n_samples in samples:
        command = [
            sys.executable, __file__, str(model), "--data", str(data), "--samples", str(n_samples),
            "--threads", str(threads), "--batch-size", str(batch_size), "--child",
        ]  # fmt: skip
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        table.add_row(
            str(row["samples"]),
            f"{row['sensitivity_s']:.1f}", f"{row['sensitivity_s'] / row['pass_s']:.2f}",
            f"{row['curves_s']:.1f}", f"{row['curves_s'] / row['pass_s']:.2f}",
            f"{row['pass_s']:.1f}", f"{row['peak_mb']:.0f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
