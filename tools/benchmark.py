"""Compare recipes side by side: accuracy after surgery and after repair, for every budget.

    python tools/benchmark.py MODEL.onnx --data calib.npz --test test.npz --keep-macs 0.7 --keep-macs 0.5 \\
        --sensitivity obs --sensitivity magnitude                      # rankings of channels
    python tools/benchmark.py MODEL.onnx --data calib.npz --test test.npz --keep-macs 0.5 --keep-params 0.5 \\
        --method prune --method implant --method hap --method paper    # what is done with them

All recipes use the same planner, measured losses, pricing per cost, alignment and refit, on the same
calibration samples (``paper`` is ``--preset paper``, which has its own ranking and planner). Margins over the
``--base`` are paired over the calibration seeds. Sensitivity times are also given in forward-backward passes
over the same samples. Without ``--latency`` speed does not count, as with ``--allow-slower``; with it,
implants that are not faster are left out, each result is timed against the original, and accuracies are
also compared at equal latency, by interpolation between the budgets. The test data needs labels and is
used for nothing but these figures.
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

from hap_onnx.data.calibration import Subset, open_dataset, split_dataset
from hap_onnx.errors import BudgetError
from hap_onnx.implants.loss import find_implant_layers
from hap_onnx.implants.speed import faster_kinds
from hap_onnx.jobs.candidates import Setting, all_kinds, compress_to, sketch
from hap_onnx.model.model_io import load_model, to_proto
from hap_onnx.model.weights import AnyModel
from hap_onnx.planning.decide import LossModel, build_loss_model, rank_groups
from hap_onnx.prepare import PreparedModel, prepare
from hap_onnx.report.summary import facts_after, facts_before
from hap_onnx.runtime.latency import measure_latency
from hap_onnx.runtime.session import Session, make_session, run_outputs
from hap_onnx.sensitivity.curvature import collect_curvature, output_scales, to_tensors
from hap_onnx.sensitivity.estimate import Options, estimate
from hap_onnx.timing.measure import measure_times
from hap_onnx.timing.table import LatencyTable, this_machine

STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
LATENCY_SECONDS = 4


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
@click.option("--sensitivity", "sensitivities", multiple=True, default=("obs",))
@click.option(
    "--method", "methods", multiple=True, default=("prune",),
    type=click.Choice(["prune", "implant", "hap", "paper"]),
)  # fmt: skip
@click.option("--keep-macs", multiple=True, type=float)
@click.option("--keep-params", multiple=True, type=float)
@click.option("--base", default=None, help="Recipe that margins are over; default: magnitude or prune.")
@click.option("--max-samples", default=1024)
@click.option("--seeds", default=3)
@click.option("--first-seed", default=0)
@click.option("--probes", default=100)
@click.option("--batch-size", default=32)
@click.option("--threads", default=1)
@click.option("--align", default="auto")
@click.option("--latency/--no-latency", default=False)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also written after every seed.")
def main(
    model: Path,
    data: Path,
    tests: tuple[Path, ...],
    sensitivities: tuple[str, ...],
    methods: tuple[str, ...],
    keep_macs: tuple[float, ...],
    keep_params: tuple[float, ...],
    base: str | None,
    max_samples: int,
    seeds: int,
    first_seed: int,
    probes: int,
    batch_size: int,
    threads: int,
    align: str,
    latency: bool,
    json_path: Path | None,
) -> None:
    torch.set_num_threads(threads)
    console = Console(soft_wrap=True)
    source = load_model(model)
    original = make_session(source.model, providers="cpu", threads=threads)
    test_sets = {}
    for path in tests:
        dataset = open_dataset(path, original.inputs)
        test_sets[path.stem] = Subset(dataset, np.arange(dataset.n_samples))
    budgets = [("macs", ratio) for ratio in keep_macs] + [("params", ratio) for ratio in keep_params]
    budgets = budgets or [("macs", 0.7), ("macs", 0.5)]
    recipes = [(name, method) for name in sensitivities for method in methods if method != "paper"]
    recipes += [("hutchinson", "paper")] if "paper" in methods else []
    rows: list[dict[str, Any]] = []
    first: dict[str, float] = {}

    def open_session(proto: AnyModel) -> Session:
        return make_session(proto, providers="cpu", threads=threads)

    for seed in range(first_seed, first_seed + seeds):
        dataset = open_dataset(data, original.inputs, max_samples=max_samples, seed=seed)
        splits = split_dataset(dataset, seed=seed)
        calibrate = splits.calibrate
        prepared = prepare(source, next(iter(calibrate.batches(2))).inputs)
        first = first or accuracy(prepared.graph, source, test_sets, threads)
        feed = {name: values[:1] for name, values in next(iter(calibrate.batches(1))).inputs.items()}
        scales = output_scales([run_outputs(original, calibrate.take(256), batch_size=batch_size)])
        one_pass = pass_seconds(prepared, calibrate, batch_size)
        with_implants = set(methods) != {"prune"}
        start = time.perf_counter()
        curvature = collect_curvature(
            prepared.graph, prepared.twin, prepared.coupling, calibrate, scales=scales, batch_size=batch_size,
            seed=seed, layers=[x.node for x in find_implant_layers(prepared)] if with_implants else (),
        )  # fmt: skip
        statistics_s = time.perf_counter() - start
        models: dict[str, tuple[LossModel, float, int | None]] = {}
        for name in dict.fromkeys(name for name, _ in recipes):
            options = Options(
                graph=prepared.graph, scales=scales, n_probes=probes, batch_size=batch_size, seed=seed
            )
            start, n_probes, rank_s = time.perf_counter(), None, 0.0
            if name == "obs":
                rank_groups(name, prepared, curvature, calibrate, options=options)
                rank_s = statistics_s
            elif len(sensitivities) > 1:
                n_probes = estimate(
                    name, prepared.twin, prepared.coupling, calibrate, options=options
                ).n_probes
            rank_s += time.perf_counter() - start
            losses = build_loss_model(
                prepared, calibrate, sensitivity=name, scales=scales, batch_size=batch_size, n_probes=probes,
                seed=seed, curvature=curvature, with_implants=with_implants,
            )  # fmt: skip
            models[name] = losses, rank_s, n_probes
        offered = all_kinds(models[recipes[0][0]][0])
        if latency and offered:
            table = LatencyTable(this_machine(original.provider, original.threads))
            offered = faster_kinds(
                prepared,
                offered,
                measure_times(prepared, to_proto(prepared.graph, source), feed, offered, table),
            )
        for name, method in recipes:
            losses, rank_s, n_probes = models[name]

            def time_it(candidate: Any) -> Any:
                session = open_session(to_proto(candidate.finished(), source))
                return measure_latency(original, session, feed, seconds=LATENCY_SECONDS)  # noqa: B023

            setting = Setting(
                prepared=prepared, losses=losses, method=method, kinds={} if method == "prune" else offered,
                calibrate=calibrate, choose=splits.choose, scales=scales, batch_size=batch_size, seed=seed,
                align=align if align == "auto" else int(align), preset="paper" if method == "paper" else None,
                time=time_it if latency else None,
            )  # fmt: skip
            before = facts_before(prepared)
            for metric, ratio in budgets:
                size = before.params if metric == "params" else losses.cost.macs(losses.cost.sizes)
                limits = {"params": None, "macs": None, metric: ratio * size}
                start = time.perf_counter()
                try:
                    found = compress_to(setting, limits)
                except BudgetError as error:
                    console.print(f"seed {seed} {name} {method} at {ratio} {metric}: {error}")
                    continue
                seconds = time.perf_counter() - start
                after = facts_after(found.finished(), prepared, n_bytes=0)
                row = {
                    "recipe": method if len(methods) > 1 else name, "sensitivity": name, "method": method,
                    "budget": f"{metric} {ratio:g}", "seed": seed, "probes": n_probes, "rank_s": rank_s,
                    "rank_passes": rank_s / one_pass, "compress_s": seconds,
                    "surgery": accuracy(sketch(setting, limits).finished(), source, test_sets, threads),
                    "repaired": accuracy(found.finished(), source, test_sets, threads),
                    "params": after.params / before.params,
                    "macs": (after.macs or 0) / max(before.macs or 0, 1),
                    "kinds": {
                        kind: sum(r.kind == kind for r in found.choice.replacements)
                        for kind in ("lowrank", "spatial", "pointwise")
                    },
                    "narrower": sum(len(d.drop) > 0 for d in found.choice.decisions),
                }  # fmt: skip
                if latency:
                    row["latency_ratio"] = time_it(found).ratio
                rows.append(row)
                console.print(
                    f"seed {seed} {name} {method} at {ratio} {metric}: "
                    + " ".join(f"{test} {value:.2f}" for test, value in row["repaired"].items())
                    + f" (surgery {next(iter(row['surgery'].values())):.2f}), {row['kinds']}, "
                    f"{row['narrower']} groups narrower, {seconds:.0f} s"
                    + (f", latency x{row['latency_ratio']:.3f}" if latency else ""),
                    highlight=False,
                )
        if json_path is not None:
            json_path.write_text(
                json.dumps({"model": model.name, "original": first, "rows": rows}, indent=1) + "\n"
            )
    show(console, rows, first, base)
    if latency:
        show_equal_latency(console, rows, first)


def show(console: Console, rows: list[dict[str, Any]], first: dict[str, float], base: str | None) -> None:
    """Print means over seeds and paired margins over the base, as a Markdown table."""
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    base = base or next((name for name in ("magnitude", "prune") if name in names), names[0])
    for test, value in first.items():
        console.print(f"\n{test}: original {value:.2f} %, means over calibration seeds\n", highlight=False)
        columns = (
            "keep",
            "recipe",
            "after surgery",
            "repaired",
            f"margin over {base} (95 %)",
            "probes",
            "passes",
        )
        console.print(f"| {' | '.join(columns)} |")
        console.print("|---|---|---|---|---|---|---|")
        for budget in dict.fromkeys(row["budget"] for row in rows):
            here = [row for row in rows if row["budget"] == budget]
            fair = {row["seed"]: row["repaired"][test] for row in here if row["recipe"] == base}
            for name in dict.fromkeys(row["recipe"] for row in here):
                own = [row for row in here if row["recipe"] == name]
                margin = ""
                if name != base and all(row["seed"] in fair for row in own):
                    mean, low, high = interval([row["repaired"][test] - fair[row["seed"]] for row in own])
                    margin = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
                console.print(
                    f"| {budget} | {name} | {np.mean([row['surgery'][test] for row in own]):.2f} "
                    f"| {np.mean([row['repaired'][test] for row in own]):.2f} | {margin} "
                    f"| {own[0]['probes'] or ''} | {np.median([row['rank_passes'] for row in own]):.1f} |",
                    highlight=False,
                )


def show_equal_latency(console: Console, rows: list[dict[str, Any]], first: dict[str, float]) -> None:
    """Print accuracies at equal latency: linear between the budgets of each recipe, mean over seeds."""
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    seeds = sorted({row["seed"] for row in rows})
    for test in first:
        points = {
            (name, seed): np.array(
                sorted(
                    (row["latency_ratio"], row["repaired"][test])
                    for row in rows
                    if (row["recipe"], row["seed"]) == (name, seed)
                )
            )
            for name in names
            for seed in seeds
        }
        if not all(len(curve) > 1 for curve in points.values()):
            console.print(f"{test}: too few results for a comparison at equal latency", highlight=False)
            continue
        low = max(curve[0, 0] for curve in points.values())
        high = min(curve[-1, 0] for curve in points.values())
        if not low < high:
            console.print(f"{test}: the recipes have no latency in common", highlight=False)
            continue
        table = Table(title=f"{test}: accuracy at equal latency (share of the original's)")
        for column in ("latency", *names):
            table.add_column(column, justify="right")
        for latency in np.linspace(low, high, 5):
            means = [np.mean([np.interp(latency, *points[name, seed].T) for seed in seeds]) for name in names]
            table.add_row(f"{latency:.3f}", *(f"{mean:.2f}" for mean in means))
        console.print(table)


if __name__ == "__main__":
    main()
