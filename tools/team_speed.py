"""How much faster two processes are than one: seconds of each stage of the same job, and their ratio.

    python -m tools.team_speed resnet50 --samples 512 --keep-macs 0.5 --repeat 3

The model is what ``tools.compress_cost`` takes. Each process has one thread; the runs take turns, so that
what else the machine does hits both kinds. Prints medians: seconds of the whole job and of each stage by the
clock, and processor seconds of the busiest process, which tell what the clock would say if nothing else ran
(waiting takes none). With ``--epochs`` the job trains, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import hap_onnx
from tools.compress_cost import make_files
from tools.faults import ROOT

CLOCK, BUSY = "all, by the clock", "all, processor time of the busiest process"


def be_one(job: Path) -> None:
    """Be one of the processes; leaves what it has used beside the job."""
    words = json.loads(job.read_text("utf-8"))
    model, data = words.pop("model"), words.pop("data")
    start, used = time.perf_counter(), time.process_time()
    report = hap_onnx.compress(model, data, **words)
    facts = {
        **report.seconds,
        CLOCK: time.perf_counter() - start,
        BUSY: time.process_time() - used,
    }
    job.with_suffix(f".{os.environ.get('RANK', '0')}").write_text(json.dumps(facts), "utf-8")


def run(job: Path, size: int) -> dict[str, float]:
    """Run the job as a team; return the seconds of the first process, and of the busiest."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size),
        "-m", "tools.team_speed", "--child", str(job),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"the job fails in {size} processes: {done.stderr[-2000:]}")
    found = [json.loads(job.with_suffix(f".{rank}").read_text("utf-8")) for rank in range(size)]
    return {**found[0], BUSY: max(one[BUSY] for one in found)}


def show(title: str, one: Mapping[str, float], team: Mapping[str, float], size: int) -> Table:
    """The table of medians."""
    table = Table(title=title)
    for column in ("stage", "one process, s", f"{size} processes, s", "ratio"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, seconds in one.items():
        ratio = f"{team[name] / seconds:.2f}" if seconds >= 0.05 else ""
        table.add_row(name, f"{seconds:.1f}", f"{team[name]:.1f}", ratio)
    return table


@click.command(help=__doc__)
@click.argument("model", required=False)
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Default: made up.")
@click.option("--samples", "n_samples", default=512, show_default=True, help="Of data that is made up.")
@click.option("--keep-macs", default=0.5, show_default=True)
@click.option("--epochs", type=int, help="Train for so many passes; default: refit only.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--size", default=2, show_default=True, help="Processes of the team.")
@click.option("--repeat", default=3, show_default=True)
@click.option("--child", type=click.Path(path_type=Path), hidden=True)
def main(
    model: str | None,
    data: Path | None,
    n_samples: int,
    keep_macs: float,
    epochs: int | None,
    batch_size: int,
    size: int,
    repeat: int,
    child: Path | None,
) -> None:
    if child is not None:
        be_one(child)
        return
    if model is None:
        raise click.UsageError("name a model")
    runs: dict[int, list[dict[str, float]]] = {1: [], size: []}
    with tempfile.TemporaryDirectory(prefix="team-speed-") as temporary:
        place = Path(temporary)
        path, source = make_files(model, data, place, n_samples)
        words: dict[str, Any] = {
            "model": str(path), "data": str(source), "output": str(place / "out.onnx"),
            "keep_macs": keep_macs, "batch_size": batch_size, "threads": 1, "allow_slower": True,
        }  # fmt: skip
        job = place / "job.json"
        job.write_text(json.dumps({**words, **({"epochs": epochs} if epochs else {})}))
        loads = [os.getloadavg()[0]]
        for _ in range(repeat):
            for n, found in runs.items():
                found.append(run(job, n))
                print(f"{n} process(es): {found[-1][CLOCK]:.1f} s", flush=True)
                loads.append(os.getloadavg()[0])
    one, team = (
        {name: median(run.get(name, 0.0) for run in found) for name in found[0]} for found in runs.values()
    )
    title = f"{path.name}, medians of {repeat}, load of the machine {min(loads):.1f} to {max(loads):.1f}"
    Console(highlight=False).print(show(title, one, team, size))


if __name__ == "__main__":
    main()
