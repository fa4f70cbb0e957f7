"""The table of the HAP paper (Yu et al., arXiv 2101.08940): compress its networks, recover, print both
figures.

    python -m tools.reproduce preresnet29 --data cifar10.npz --folder out --keep-params 0.3 --epochs 20
    python -m tools.reproduce resnet50 --data imagenet/ --model resnet50.onnx --folder out --keep-params 0.45

The original is ``--model``, or ``FOLDER/NETWORK.onnx``, or trained into that file first (CIFAR-10 networks
only). ``--data`` is what ``tools.train_cifar`` takes, for ``resnet50`` a folder with ``train`` and ``val``
that have one subfolder of images per class, or the word ``synthetic``: then weights and images are random,
and only time, memory, size and latency mean anything. Each run is a process of its own (``hap-onnx
compress``) whose report stays in the folder, and runs that are there are not repeated. Quality is that of
the test images, which nothing else sees.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tools.networks import CIFAR_NETWORKS, resnet50
from tools.train_cifar import Schedule, export, read_images, to_input, train_network

PAPER = {
    "preresnet29": "94.3 %, under 0.1 points lost, over 70 % of the parameters removed",
    "resnet50": "75.1 %, 0.5 points lost, over 50 % of the parameters removed",
}
"""What the paper's abstract says; its tables also have ResNet56, VGG16 and WideResNet32."""
N_SYNTHETIC = 320
RECIPES = {"ours": (), "paper": ("--preset", "paper")}


@dataclass(frozen=True)
class Run:
    """One compression: a recipe at a share of the parameters, with one seed."""

    network: str
    recipe: str
    keep_params: float
    seed: int

    def name(self, words: Sequence[str]) -> str:
        """What its files are called: ``words`` are the rest of its command."""
        digest = hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()[:6]
        return f"{self.network}-{self.recipe}-{self.keep_params:g}-{self.seed}-{digest}"


@dataclass(frozen=True)
class Files:
    """The original and the arguments that say where its data is."""

    model: Path
    data: tuple[str, ...]


# --- originals and data ---


def make_cifar(
    network: str,
    data: Path,
    folder: Path,
    model: Path | None,
    *,
    width: float,
    schedule: Schedule,
    with_labels: bool,
) -> Files:
    """Write arrays as the model takes them, and train the original unless it is there."""
    path = model or folder / f"{network}.onnx"
    if not path.is_file():
        train_network(network, data, path, width=width, schedule=schedule)
    for part in ("train", "test"):
        with np.load(data, allow_pickle=False) as arrays:
            images, labels = read_images(arrays, part)
        found = {"input": to_input(images).numpy()}
        if with_labels or part == "test":
            found["labels"] = labels.numpy()
        np.savez(folder / f"{part}.npz", **found)
    return Files(path, ("--data", str(folder / "train.npz"), "--val", str(folder / "test.npz")))


def make_imagenet(data: str, folder: Path, model: Path | None) -> Files:
    if data != "synthetic":
        if model is None:
            raise click.UsageError("resnet50 needs --model: training it on ImageNet takes days")
        return Files(model, ("--data", str(Path(data) / "train"), "--val", str(Path(data) / "val")))
    path, images = folder / "resnet50.onnx", smooth_images(N_SYNTHETIC)
    if not path.is_file():
        write_random_resnet50(path, images)
    np.savez(folder / "images.npz", input=images.numpy())
    return Files(model or path, ("--data", str(folder / "images.npz")))


def write_random_resnet50(path: Path, images: torch.Tensor) -> None:
    """Write a ResNet50 with random weights; ``images`` give statistics that keep activations in range."""
    torch.manual_seed(0)
    network = resnet50()
    with torch.no_grad():
        network.train()(images[:32])
    export(network, images[:2], str(path))


def smooth_images(n: int) -> torch.Tensor:
    """Random images whose neighbouring pixels are alike, [n, 3, 224, 224]."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(n, 3, size, size, generator=generator) for size in (7, 28, 112)]
    return sum(torch.nn.functional.interpolate(x, size=224, mode="bilinear") for x in layers)  # type: ignore[return-value]


# --- runs ---


def run_all(
    runs: Sequence[Run], files: Files, folder: Path, options: Sequence[str]
) -> Iterator[tuple[Run, Any]]:
    """Yield each run with its report, with ``peak_mb`` added; None where it was refused."""
    for run in runs:
        words = [
            str(files.model), *files.data, "--keep-params", f"{run.keep_params:g}", *RECIPES[run.recipe],
            "--seed", str(run.seed), *options, "--allow-slower", "--work-dir", str(folder / "work"),
        ]  # fmt: skip
        name = run.name(words)
        report = folder / f"{name}.json"
        if not report.is_file():
            words += ["--output", str(folder / f"{name}.onnx"), "--report", str(report)]
            click.echo("hap-onnx compress " + " ".join(words))
            used = run_process([sys.executable, "-m", "hap_onnx", "compress", *words])
            if used.code:
                click.echo(f"exit code {used.code}")
                report.unlink(missing_ok=True)
                yield run, None
                continue
            found = {**json.loads(report.read_text("utf-8")), "peak_mb": used.peak_mb}
            report.write_text(json.dumps(found, indent=1), "utf-8")
        yield run, json.loads(report.read_text("utf-8"))


@dataclass(frozen=True)
class Used:
    """How a process ended, and what it took: the most memory that it held, and processor time."""

    code: int
    peak_mb: float
    cpu_s: float


def run_process(command: Sequence[str]) -> Used:
    """Run a command to its end.

    Linux hands the peak of memory on to what a process starts, so ours has to be below that of the command.
    """
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Used(process.returncode, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime)


# --- the table ---


def show(network: str, found: Sequence[tuple[Run, Any]]) -> Table:
    table = Table(title=f"{network}; the paper: {PAPER.get(network, 'no figure in its abstract')}")
    for column in ("recipe", "params removed", "MACs removed", "original", "compressed", "points lost",
                   "time per sample", "minutes", "peak MB"):  # fmt: skip
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for recipe, keep in dict.fromkeys((run.recipe, run.keep_params) for run, _ in found):
        reports = [report for run, report in found if (run.recipe, run.keep_params) == (recipe, keep)]
        done = [report for report in reports if report is not None]
        if not done:
            table.add_row(recipe, f"{100 * (1 - keep):.0f} % asked", *["refused"] * 7)
            continue
        kept = [_mean([r["after"][key] / r["before"][key] for r in done]) for key in ("params", "macs")]
        drops = [100 * r["quality"]["drop"] for r in done]
        latency = _mean([r["after"]["latency_ms"] / r["before"]["latency_ms"] for r in done])
        table.add_row(
            recipe,
            *(f"{100 * (1 - share):.1f} %" for share in kept),
            f"{100 * done[0]['quality']['before']:.2f} %",
            f"{_mean([100 * r['quality']['after'] for r in done]):.2f} %",
            f"{_mean(drops):.2f} ({min(drops):.2f} to {max(drops):.2f}, {len(done)} of {len(reports)} seeds)",
            f"x {latency:.2f}",
            f"{_mean([sum(r['seconds'].values()) for r in done]) / 60:.1f}",
            f"{max(r['peak_mb'] for r in done):.0f}",
        )
    return table


_mean = statistics.fmean


@click.command(help=__doc__)
@click.argument("network", type=click.Choice([*sorted(CIFAR_NETWORKS), "resnet50"]))
@click.option("--data", required=True)
@click.option("--folder", required=True, type=click.Path(path_type=Path), help="Where all files go.")
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="A trained original.")
@click.option("--keep-params", "shares", multiple=True, type=float, default=(0.3,))
@click.option("--recipe", "recipes", multiple=True, type=click.Choice(list(RECIPES)), default=tuple(RECIPES))
@click.option("--seeds", default=3)
@click.option("--epochs", default=20, help="Of recovery by distillation.")
@click.option("--rounds", default=1)
@click.option("--probes", default=16, help="Of the paper's Hessian traces; it takes 300.")
@click.option("--labels/--no-labels", default=True, help="Whether compression may see labels.")
@click.option("--max-samples", type=int, help="Most training samples that are used for compression.")
@click.option("--width", default=1.0, help="Channels of a network trained here, relative to the paper's.")
@click.option("--train-epochs", default=160)
@click.option("--train-minutes", default=600.0, help="The schedule of training is shortened to fit.")
@click.option("--bfloat16/--float32", default=False, help="Train the original in bfloat16.")
@click.option("--threads", default=1)
def main(
    network: str,
    data: str,
    folder: Path,
    model: Path | None,
    shares: tuple[float, ...],
    recipes: tuple[str, ...],
    seeds: int,
    epochs: int,
    rounds: int,
    probes: int,
    labels: bool,
    max_samples: int | None,
    width: float,
    train_epochs: int,
    train_minutes: float,
    bfloat16: bool,
    threads: int,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if network == "resnet50":
        files = make_imagenet(data, folder, model)
    else:
        schedule = Schedule(train_epochs, train_minutes, bfloat16=bfloat16, threads=threads)
        files = make_cifar(
            network, Path(data), folder, model, width=width, schedule=schedule, with_labels=labels
        )
    options = ["--epochs", str(epochs), "--rounds", str(rounds), "--threads", str(threads)]
    options += ["--probes", str(probes)]
    options += [] if max_samples is None else ["--max-samples", str(max_samples)]
    runs = [
        Run(network, recipe, keep, seed) for recipe in recipes for keep in shares for seed in range(seeds)
    ]
    Console(width=170).print(show(network, list(run_all(runs, files, folder, options))))


if __name__ == "__main__":
    main()
