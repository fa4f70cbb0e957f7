"""Whether planning in time keeps its word: predictions and measurements, budgets of time, never slower.

    python -m tools.latency check MODEL.onnx --data calib.npz
    python -m tools.latency equal MODEL.onnx --data calib.npz --test test.npz

``check`` times 20 plans of all sizes, pruned and with implants, and prints the rank correlation with what was
predicted; then it plans for fractions of the original's latency (--keep-latency) and of its
multiply-accumulates. ``equal`` compares the accuracy of both kinds of plans at the same latency. Each
result is written and timed against the original in a process of its own. All points of one model share its
sensitivities. Without ``--data`` images are made up, which is enough for times.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import spearmanr

from hap_onnx.config import CompressConfig
from hap_onnx.errors import BudgetError
from hap_onnx.events import Event
from hap_onnx.jobs.carry_out import compress_layers, cut_model
from hap_onnx.jobs.job import Job
from hap_onnx.jobs.machine import use_threads, write_proto
from hap_onnx.jobs.rounds import Candidate
from hap_onnx.model.saving import save_model
from hap_onnx.planning.choose import choose, predicted_costs
from hap_onnx.planning.cost import LATENCY, MACS, METRICS
from hap_onnx.runtime.latency import latency_feed, measure_latency
from hap_onnx.runtime.metrics import choose_metric
from hap_onnx.runtime.session import make_session, run_outputs
from tools.peer import use_clock

N_MADE_UP = 15


def open_job(model: Path, data: Path | None, words: dict[str, Any], folder: Path) -> Job:
    """Begin a job whose rounds are then asked for candidates one by one."""
    config = CompressConfig.from_options({"threads": 1, "latency_table": folder / "table.json", **words})
    source: Any = data
    if data is None:
        session = make_session(str(model), providers="cpu")
        generator = np.random.default_rng(0)
        source = {
            spec.name: generator.standard_normal((N_MADE_UP, *_sizes(spec.shape[1:])), np.float32)
            for spec in session.inputs
        }
    return Job(model, source, config, folder / "out.onnx", _tell)


def _sizes(shape: Sequence[int | str | None]) -> list[int]:
    return [n if isinstance(n, int) else 1 for n in shape]


def _tell(event: Event) -> None:
    if event.kind != "progress" and event.message:
        click.echo(f"  {event.message}", err=True)


def write_candidate(job: Job, candidate: Candidate, path: Path) -> None:
    """Write a candidate as the job would."""
    source = job.rounds[-1].prepared.source
    proto = write_proto(candidate.compressed.finished(), source, candidate.plan)
    save_model(proto, path, external_data=False)


def time_apart(original: Path, candidate: Path, seconds: float, clock: str) -> dict[str, float]:
    """Time a written model against the original in a fresh process; returns the fields of the comparison."""
    words = [str(original), str(candidate), str(seconds), clock]
    command = [sys.executable, "-m", "tools.latency", "pair", *words]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def table(header: str, rows: list[list[str]]) -> str:
    """Write rows as a Markdown table."""
    names = header.split("|")
    lines = [" | ".join(row) for row in [names, ["---"] * len(names), *rows]]
    return "\n".join(f"| {line} |" for line in lines)


@click.group(help=__doc__)
def main() -> None:
    """Collect the commands."""


_MODEL = click.argument("model", type=click.Path(exists=True, path_type=Path))
_DATA = click.option("--data", type=click.Path(exists=True, path_type=Path))
_SAMPLES = click.option("--max-samples", default=1024, show_default=True)
_SECONDS = click.option("--seconds", default=6.0, show_default=True, help="How long a pair is timed.")
_CLOCK = click.option(
    "--clock", type=click.Choice(["wall", "cpu"]), default="wall", help="cpu: for a machine that is busy."
)


@main.command()
@_MODEL
@_DATA
@_SAMPLES
@_SECONDS
@click.option("-n", "n_plans", default=20, show_default=True)
@click.option("--latency", "latencies", multiple=True, type=float, default=(0.8, 0.6, 0.4), show_default=True)
@click.option("--macs", "macs", multiple=True, type=float, help="Default: 0.95 to 0.3 in steps of 0.05.")
@click.option("--recover", default="none", show_default=True)
@click.option("--seed", default=0, show_default=True)
@_CLOCK
def check(
    model: Path,
    data: Path | None,
    max_samples: int,
    seconds: float,
    clock: str,
    n_plans: int,
    latencies: tuple[float, ...],
    macs: tuple[float, ...],
    recover: str,
    seed: int,
) -> None:
    """Print predicted and measured latency of plans, and what becomes of budgets of time and of MACs."""
    macs = macs or tuple(n / 20 for n in range(19, 5, -1))
    words = {"max_samples": max_samples, "recover": recover}
    with tempfile.TemporaryDirectory() as name, use_threads(1), use_clock(clock):
        folder = Path(name)
        by_time = open_job(model, data, {**words, "objective": "latency"}, folder)
        by_macs = open_job(model, data, {**words, "keep_macs": 0.5}, folder)
        by_macs.times = by_time.times  # one table for the one file
        by_macs.rounds[0].losses = by_time.rounds[0].losses  # they are the same
        click.echo(compare_plans(model, by_time, n_plans, np.random.default_rng(seed), seconds))
        wanted = [(f"{ratio:g}", {"latency": ratio}) for ratio in latencies]
        click.echo(f"\n{make_and_time(model, by_time, wanted, folder, seconds, clock)}")
        wanted = [(f"{ratio:.2f}", {"macs": ratio}) for ratio in macs]
        click.echo(f"\n{make_and_time(model, by_macs, wanted, folder, seconds, clock)}")


def compare_plans(model: Path, job: Job, n_plans: int, generator: np.random.Generator, seconds: float) -> str:
    """Time plans of all sizes and kinds, and compare with what was predicted for them."""
    setting = job.rounds[0].setting
    prepared, losses = setting.prepared, setting.losses
    full = losses.cost.totals(losses.cost.sizes)
    rows, pairs = [], []
    for index in range(n_plans):
        metric = METRICS[index % len(METRICS)]
        kinds = setting.kinds if index % 2 else {}
        ratio = float(generator.uniform(0.3, 0.98))
        limits = {metric: ratio * float(full[METRICS.index(metric)])}
        try:
            choice = choose(prepared, losses, limits, align=setting.align, kinds=kinds)
        except BudgetError:
            continue
        cut = cut_model(prepared, choice, losses.implants)
        proto = write_proto(compress_layers(cut).finished(), prepared.source, None)
        sessions = [make_session(m, providers="cpu", threads=1) for m in (str(model), proto)]
        feed = latency_feed(sessions[0], next(iter(job.splits.calibrate.batches(1))).inputs)
        found = measure_latency(*sessions, feed, seconds=seconds)
        predicted = float(predicted_costs(prepared, losses, choice)[LATENCY] / full[LATENCY])
        pairs.append((predicted, found.ratio))
        what = f"{metric} {ratio:.2f}, {'hap' if kinds else 'prune'}"
        rows.append([what, f"{predicted:.3f}", f"{found.ratio:.3f}"])
        click.echo(f"  {rows[-1]}", err=True)
    predicted_all, measured_all = np.array(pairs).T
    error = np.median(np.abs(predicted_all / measured_all - 1))
    rank = spearmanr(predicted_all, measured_all).statistic
    summary = f"{len(pairs)} plans: rank correlation {rank:.3f}, median error {error:.1%}"
    return f"{table('plan|predicted|measured', rows)}\n\n{summary}"


def make_and_time(
    model: Path,
    job: Job,
    wanted: list[tuple[str, dict[str, float]]],
    folder: Path,
    seconds: float,
    clock: str,
) -> str:
    """Make candidates for budgets, fractions by metric, and time each in a process of its own."""
    here, path, rows = job.rounds[0], folder / "candidate.onnx", []
    full = here.sizes()
    for label, limits in wanted:
        absolute = {name: limits[name] * size if name in limits else None for name, size in full.items()}
        try:
            candidate = here.compress_to(absolute)
        except BudgetError as error:
            rows.append([label, "", "", "", f"refused: {error}"])
        else:
            write_candidate(job, candidate, path)
            found = time_apart(model, path, seconds, clock)
            low, high = found["ratio_low"], found["ratio_high"]
            costs = predicted_costs(here.prepared, here.setting.losses, candidate.compressed.choice)
            macs = costs[MACS] / full["macs"]
            verdict = "the gate refuses it" if low > 1 else ""
            bounds = f"{low:.3f} to {high:.3f}"
            rows.append([label, f"{macs:.2f}", f"{found['ratio']:.3f}", bounds, verdict])
        click.echo(f"  {rows[-1]}", err=True)
    return table("budget|MACs|latency|95 % interval|", rows)


@main.command()
@_MODEL
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--test", type=click.Path(exists=True, path_type=Path), required=True, help="With labels.")
@_SAMPLES
@_SECONDS
@click.option("--ratio", "ratios", multiple=True, type=float, default=(0.8, 0.65, 0.5, 0.35))
@click.option("--seed", default=0, show_default=True)
@_CLOCK
def equal(
    model: Path,
    data: Path,
    test: Path,
    max_samples: int,
    seconds: float,
    ratios: tuple[float, ...],
    seed: int,
    clock: str,
) -> None:
    """Compare, at equal measured latency, plans for multiply-accumulates with plans for time."""
    rows = []
    with tempfile.TemporaryDirectory() as name, use_threads(1), use_clock(clock):
        folder = Path(name)
        words = {"max_samples": max_samples, "val": test, "seed": seed}
        by_macs = open_job(model, data, {**words, "keep_macs": 0.5}, folder)
        by_time = open_job(model, data, {**words, "objective": "latency"}, folder)
        by_macs.times = by_time.times  # one table for the one file
        for ratio in ratios:
            macs = by_macs.rounds[0].sizes()["macs"]
            row = [f"{ratio:g}"]
            latency = 1.0
            for job, limits in ((by_macs, {"macs": ratio * macs}), (by_time, {})):
                absolute = {"params": None, "macs": None, "latency": None if limits else latency, **limits}
                try:
                    candidate = job.rounds[0].compress_to(absolute)
                except BudgetError as error:
                    row += ["", "", str(error)]
                    break
                path = folder / "candidate.onnx"
                write_candidate(job, candidate, path)
                found = time_apart(model, path, seconds, clock)
                latency = found["ratio"]
                bounds = f"{found['ratio_low']:.3f} to {found['ratio_high']:.3f}"
                row += [f"{latency:.3f}", bounds, f"{_accuracy(job, path):.2%}"]
            rows.append(row)
            click.echo(f"  {row}", err=True)
    header = "keep MACs|latency|95 % interval|accuracy|planned for it: latency|95 % interval|accuracy"
    click.echo(table(header, rows))


def _accuracy(job: Job, path: Path) -> float:
    part = job.splits.report
    outputs = run_outputs(make_session(path, providers="cpu", threads=1), part)
    metric = choose_metric("accuracy", outputs=outputs, labels=part.labels)
    return metric.reference_value(outputs, part.labels)


@main.command()
@click.argument("original")
@click.argument("candidate")
@click.argument("seconds", type=float)
@click.argument("clock")
def pair(original: str, candidate: str, seconds: float, clock: str) -> None:
    """Time two models in turn on made-up input and print the comparison as JSON."""
    sessions = [make_session(path, providers="cpu", threads=1) for path in (original, candidate)]
    generator = np.random.default_rng(0)
    feed = {
        spec.name: generator.standard_normal(_sizes(spec.shape), np.float32)
        for spec in sessions[0].inputs
    }
    with use_clock(clock):
        found = measure_latency(*sessions, feed, seconds=seconds)
    click.echo(json.dumps(vars(found)))


if __name__ == "__main__":
    main()
