"""Compare sensitivities side by side: accuracy after surgery and after refit for every budget.

    python tools/benchmark.py MODEL.onnx --data calib.npz --test test.npz --keep-macs 0.7 --keep-macs 0.5

All sensitivities use the same planner, measured loss curves, pricing per cost, alignment and refit, on the
same calibration samples; only the ranking of channels differs. Margins over ``magnitude`` are paired over the
calibration seeds. Sensitivity times are also given in forward-backward passes over the same samples. The
test data needs labels and is used for nothing but these figures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from hap_onnx.calibration import Subset, open_dataset, split_dataset
from hap_onnx.curvature import collect_curvature, output_scales, to_tensors
from hap_onnx.decide import (
    build_loss_model,
    choose_widths,
    keep_mask,
    rank_groups,
    refit_weights,
    residual_groups,
)
from hap_onnx.model_io import load_model, to_proto
from hap_onnx.prepare import PreparedModel, prepare
from hap_onnx.sensitivity import Options, estimate
from hap_onnx.surgery import remove_channels, with_weights
from hap_onnx.validate import make_session, measure_latency, run_outputs

STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def pass_seconds(prepared: PreparedModel, subset: Subset, batch_size: int) -> float:
    """Time one forward and backward pass (gradients of all parameters) over a subset."""
    twin = prepared.twin
    start = time.perf_counter()
    for batch in subset.batches(batch_size):
        outputs = twin(to_tensors(batch.inputs, twin))
        loss = sum(output.square().sum() for output in outputs.values() if output.is_floating_point())
        torch.autograd.grad(loss, list(twin.parameter_of.values()), allow_unused=True)
    return time.perf_counter() - start


def accuracy(graph: Any, source: Any, tests: dict[str, Subset], threads: int) -> dict[str, float]:
    """Accuracy in percent on each test set, in onnxruntime."""
    session = make_session(to_proto(graph, source), providers="cpu", threads=threads)
    result = {}
    for name, test in tests.items():
        outputs = next(iter(run_outputs(session, test, batch_size=256).values()))
        result[name] = 100.0 * float((outputs.argmax(1) == test.labels).mean())
    return result


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval (Student's t)."""
    mean, n = float(np.mean(differences)), len(differences)
    half = (
        STUDENT_95.get(n, 1.96) * float(np.std(differences, ddof=1)) / np.sqrt(n) if n > 1 else float("nan")
    )
    return mean, mean - half, mean + half


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--test", "tests", required=True, multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--sensitivity",
    "sensitivities",
    multiple=True,
    default=("obs", "gauss-newton", "gate", "magnitude", "random"),
)
@click.option("--keep-macs", multiple=True, type=float, default=(0.7, 0.5))
@click.option("--max-samples", default=1024)
@click.option("--seeds", default=3)
@click.option("--probes", default=100)
@click.option("--batch-size", default=32)
@click.option("--threads", default=1)
@click.option("--align", default="auto")
@click.option("--whole-residual/--cut-residual", default=False, help="Leave residual streams whole.")
@click.option("--latency/--no-latency", default=False, help="Also time each result against the original.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    model: Path,
    data: Path,
    tests: tuple[Path, ...],
    sensitivities: tuple[str, ...],
    keep_macs: tuple[float, ...],
    max_samples: int,
    seeds: int,
    probes: int,
    batch_size: int,
    threads: int,
    align: str,
    whole_residual: bool,
    latency: bool,
    json_path: Path | None,
) -> None:
    torch.set_num_threads(threads)
    console = Console()
    source = load_model(model)
    original = make_session(source.proto, providers="cpu", threads=threads)
    test_sets = {}
    for path in tests:
        dataset = open_dataset(path, original.inputs)
        test_sets[path.stem] = Subset(dataset, np.arange(dataset.n_samples))
    rows: list[dict[str, Any]] = []
    base: dict[str, float] = {}
    for seed in range(seeds):
        splits = split_dataset(
            open_dataset(data, original.inputs, max_samples=max_samples, seed=seed), seed=seed
        )
        calibrate = splits.calibrate
        prepared = prepare(source, next(iter(calibrate.batches(2))).inputs)
        base = base or accuracy(prepared.graph, source, test_sets, threads)
        scales = output_scales([run_outputs(original, calibrate.take(256), batch_size=batch_size)])
        one_pass = pass_seconds(prepared, calibrate, batch_size)
        start = time.perf_counter()
        curvature = collect_curvature(
            prepared.graph,
            prepared.twin,
            prepared.coupling,
            calibrate,
            scales=scales,
            batch_size=batch_size,
            seed=seed,
        )
        statistics_s = time.perf_counter() - start
        for name in sensitivities:
            options = Options(
                graph=prepared.graph, scales=scales, n_probes=probes, batch_size=batch_size, seed=seed
            )
            start = time.perf_counter()
            n_probes = None
            if name == "obs":
                rank_groups(name, prepared, curvature, calibrate, options=options)
                rank_s = statistics_s + time.perf_counter() - start
            else:
                n_probes = estimate(
                    name, prepared.twin, prepared.coupling, calibrate, options=options
                ).n_probes
                rank_s = time.perf_counter() - start
            losses = build_loss_model(
                prepared, calibrate, sensitivity=name, scales=scales, batch_size=batch_size, n_probes=probes,
                seed=seed, curvature=curvature,
            )  # fmt: skip
            for ratio in keep_macs:
                budget = {"params": None, "macs": ratio * losses.cost.macs(losses.cost.sizes)}
                whole = residual_groups(prepared) if whole_residual else ()
                decisions = choose_widths(
                    prepared, losses, budget, align=align if align == "auto" else int(align), whole=whole
                )
                keep = keep_mask(prepared, decisions)
                cut = remove_channels(prepared.graph, prepared.coupling, keep, shapes=prepared.probe_shapes)
                start = time.perf_counter()
                weights = refit_weights(prepared, cut, keep, calibrate, batch_size=batch_size, seed=seed)
                refit_s = time.perf_counter() - start
                refitted = with_weights(cut, weights)
                row = {
                    "sensitivity": name, "keep_macs": ratio, "seed": seed, "probes": n_probes,
                    "rank_s": rank_s, "rank_passes": rank_s / one_pass, "refit_s": refit_s,
                    "surgery": accuracy(cut, source, test_sets, threads),
                    "refit": accuracy(refitted, source, test_sets, threads),
                    "reached": losses.cost.macs([len(d.keep) for d in decisions])
                    / losses.cost.macs(losses.cost.sizes),
                    "widths": {d.group: [len(d.keep), d.size] for d in decisions},
                }  # fmt: skip
                if latency:
                    candidate = make_session(to_proto(refitted, source), providers="cpu", threads=threads)
                    feed = {k: v[:1] for k, v in next(iter(calibrate.batches(1))).inputs.items()}
                    row["latency_ratio"] = measure_latency(original, candidate, feed, seconds=3).ratio
                rows.append(row)
                first = next(iter(test_sets))
                console.print(
                    f"seed {seed} {name} at {ratio}: surgery {row['surgery'][first]:.2f} "
                    f"refit {row['refit'][first]:.2f}",
                    highlight=False,
                )
    show(console, rows, base)
    if json_path is not None:
        json_path.write_text(
            json.dumps({"model": model.name, "original": base, "rows": rows}, indent=1) + "\n"
        )


def show(console: Console, rows: list[dict[str, Any]], base: dict[str, float]) -> None:
    """Print the table: means over seeds, and the paired margin over magnitude."""
    for test, value in base.items():
        table = Table(title=f"{test}: original {value:.2f} %, mean over calibration seeds")
        for column in (
            "keep MACs",
            "sensitivity",
            "surgery %",
            "refit %",
            "margin over magnitude",
            "probes",
            "passes",
            "s",
        ):
            table.add_column(column, justify="right")
        for ratio in sorted({row["keep_macs"] for row in rows}, reverse=True):
            here = [row for row in rows if row["keep_macs"] == ratio]
            fair = {row["seed"]: row["refit"][test] for row in here if row["sensitivity"] == "magnitude"}
            for name in dict.fromkeys(row["sensitivity"] for row in here):
                own = [row for row in here if row["sensitivity"] == name]
                margin = ""
                if fair and name != "magnitude":
                    mean, low, high = interval([row["refit"][test] - fair[row["seed"]] for row in own])
                    margin = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
                table.add_row(
                    f"{ratio:g}", name,
                    f"{np.mean([row['surgery'][test] for row in own]):.2f}",
                    f"{np.mean([row['refit'][test] for row in own]):.2f}",
                    margin, str(own[0]["probes"] or ""),
                    f"{np.median([row['rank_passes'] for row in own]):.2f}",
                    f"{np.median([row['rank_s'] for row in own]):.1f}",
                )  # fmt: skip
        console.print(table)


if __name__ == "__main__":
    main()
