"""Compare with onnxsim's channel pruning, at equal size and at equal measured latency.

    python -m tools.peer --model resnet20 --model resnet56 --folder out

The peer runs in an environment of its own, which is made in the folder once (pip fetches pinned versions),
and prunes each model in several modes (see ``tools/peer_worker.py``) and sparsities, on all calibration
samples that we get. Of modes that give equal shapes the one with the best accuracy on the *test* images
counts, which favours the peer; points that another one of the peer's beats in size and accuracy are left out.

Against each point we are run twice, with defaults otherwise: with ``--keep-params`` and ``--keep-macs`` at
what the peer's model has, and with ``--keep-latency`` at what it takes in onnxruntime, measured in turn with
the original. Where the peer's model is slower than the original, our model of its size stands for both.
Sensitivities are found once per model and shared by all budgets, otherwise this is what ``hap-onnx compress``
does; its command is printed for each. Models and measurements stay in the folder, and what is there is not
made again.

A model is the name of one in ``$HAP_ONNX_SHARED/models``, or a path; it takes arrays as ``tools.train_cifar``
exports its networks for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
import venv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import onnx

from hap_onnx.config import CompressConfig
from hap_onnx.data.calibration import Subset, open_dataset
from hap_onnx.errors import BudgetError
from hap_onnx.jobs.job import Job
from hap_onnx.jobs.machine import compare_speed, use_threads, write_proto
from hap_onnx.jobs.rounds import Round
from hap_onnx.model.measure import ModelSize, model_size
from hap_onnx.model.model_io import load_model, normalise
from hap_onnx.runtime.metrics import choose_metric
from hap_onnx.runtime.session import Session, make_session, run_outputs
from hap_onnx.sensitivity.curvature import to_tensors
from hap_onnx.twin import build_twin, probe_shapes
from tools.train_cifar import read_images, to_input

REQUIREMENTS = ("onnxsim==0.8.1", "onnx==1.23.2", "onnxruntime==1.32.0", "numpy==2.4.6")
MODES = ("l2", "l1", "wanda", "wanda-refit", "l2-global", "wanda-global")
SPARSITIES = (0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5)
WORKER = Path(__file__).with_name("peer_worker.py")
BATCH_SIZE = 32


Interval = tuple[float, float, float]
"""A value and the ends of its 95 % interval."""


@dataclass(frozen=True)
class Measured:
    """A compressed model beside the original.

    Attributes:
        params, macs: shares of the original's.
        latency: the original takes 1; with the ends of its 95 % interval. None where it was not timed.
        outputs: of the test images.
    """

    params: float
    macs: float
    accuracy: float
    outputs: Mapping[str, np.ndarray]
    latency: Interval | None = None


@dataclass(frozen=True)
class Point:
    """What the peer made of a model, and where that lies."""

    mode: str
    sparsity: float
    path: Path
    measured: Measured


@dataclass(frozen=True)
class Row:
    """A point of the peer's, and ours of equal size and of equal latency; None where there is none."""

    peer: Point
    at_size: Measured | None
    at_latency: Measured | None


# --- which points count ---


def contenders(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other one beats, the largest first.

    One beats another if it has no more parameters and multiply-accumulates and at least the accuracy; of
    points that are equal in all three the first one stays.
    """
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.measured.params, p.measured.macs, -p.measured.accuracy)):
        mine = point.measured
        if not any(p.measured.macs <= mine.macs and p.measured.accuracy >= mine.accuracy for p in found):
            found.append(point)
    return found[::-1]


# --- the peer ---


def make_environment(folder: Path) -> Path:
    """Make an environment for the peer unless it is there; returns its Python."""
    home = folder / "environment"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = home / "requirements.txt"
    wanted = "\n".join(REQUIREMENTS) + "\n"
    if not stamp.is_file() or stamp.read_text("utf-8") != wanted:
        click.echo(f"installing {', '.join(REQUIREMENTS)}")
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        stamp.write_text(wanted, "utf-8")
    return python


def run_peer(
    python: Path, model: Path, calib: Path, folder: Path, points: Sequence[tuple[str, float]]
) -> None:
    """Let the peer prune a model to all points; what fails is said and missing afterwards."""
    missing = [(mode, share) for mode, share in points if not _peer_file(folder, mode, share).is_file()]
    if not missing:
        return
    words = [str(python), str(WORKER), str(model), str(calib), str(folder)]
    process = subprocess.run(
        words + [f"{mode}:{share:g}" for mode, share in missing], check=True, capture_output=True, text=True
    )
    for line in process.stdout.splitlines():
        found = json.loads(line) if line.startswith("{") else {}
        if found.get("error"):
            click.echo(f"the peer fails at {found['mode']} {found['sparsity']:g}: {found['error']}")


def _peer_file(folder: Path, mode: str, sparsity: float) -> Path:
    return folder / f"{mode}-{sparsity:g}.onnx"


# --- ours ---


class Ours:
    """Compresses one model to many budgets; its sensitivities are found once, when they are needed."""

    def __init__(
        self, model: Path, calib: Path, test: Path, folder: Path, *, seed: int, threads: int
    ) -> None:
        self._model, self._data, self._folder = model, (calib, test), folder
        self._seed, self._threads = seed, threads

    def compress(self, budgets: Mapping[str, float]) -> Path | None:
        """Return the file of a model within fractions of ``params`` and ``macs``, or of ``latency``.

        None where the budget cannot be reached.
        """
        content = json.dumps([sorted(budgets.items()), self._seed, *map(_digest, (self._model, *self._data))])
        path = self._folder / f"ours-{'-'.join(sorted(budgets))}-{_sha256(content.encode())[:10]}.onnx"
        click.echo(f"{path.name}: {self._command(budgets)}")
        if not path.is_file():
            job, here = self._in_time if "latency" in budgets else self._in_size
            full = here.sizes()
            try:
                candidate = here.compress_to({name: share * full[name] for name, share in budgets.items()})
            except BudgetError as error:
                click.echo(f"not reached: {error}")
                return None
            onnx.save(write_proto(candidate.compressed.finished(), job.source, None), str(path))
        return path

    def _command(self, budgets: Mapping[str, float]) -> str:
        words = " ".join(f"--keep-{name} {share:.6g}" for name, share in sorted(budgets.items()))
        data = " ".join(f"{flag} {path}" for flag, path in zip(("--data", "--val"), self._data, strict=True))
        return f"hap-onnx compress {self._model} {data} {words} --seed {self._seed} --threads {self._threads}"

    def _job(self, **budget: float) -> Job:
        config = CompressConfig.from_options(
            {
                "val": str(self._data[1]), "seed": self._seed, "threads": self._threads,
                "latency_table": self._folder / "latency.json", **budget,
            }
        )  # fmt: skip
        return Job(self._model, self._data[0], config, self._folder / "unused.onnx", lambda event: None)

    @cached_property
    def _in_size(self) -> tuple[Job, Round]:
        job = self._job(keep_params=1.0)  # the budgets themselves are given to the round
        return job, job.rounds[0]

    @cached_property
    def _in_time(self) -> tuple[Job, Round]:
        job, known = self._job(keep_latency=1.0), self._in_size[1]
        here = Round(job.shop, known.prepared)
        here.losses = known.losses
        return job, here


def _digest(path: Path) -> str:
    return _sha256(path.read_bytes())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- measuring ---


@contextmanager
def use_clock(name: str) -> Iterator[None]:
    """Let everything be timed by the CPU time of this process, ours and the planner's measurements alike.

    With one thread that is what the wall clock would say if nobody else used the machine, but for caches.
    """
    if name == "wall":
        yield
        return
    with patch.object(time, "perf_counter", time.process_time):
        yield


class Scale:
    """Measures models beside the original: on the test images, in size, and in turn with it in time."""

    def __init__(self, model: Path, test: Path, *, threads: int) -> None:
        self._threads, self._name = threads, test.stem
        self.session = self._open(model)
        dataset = open_dataset(test, self.session.inputs)
        self.test = Subset(dataset, np.arange(dataset.n_samples))
        outputs = run_outputs(self.session, self.test, batch_size=BATCH_SIZE)
        self.metric = choose_metric("accuracy", outputs=outputs, labels=self.test.labels)
        self.accuracy = 100 * self.metric.reference_value(outputs, self.test.labels)
        self._outputs = outputs
        self._first = next(iter(self.test.batches(self.session.fixed_batch or 1))).inputs
        self._size = self._count(model)

    def measure(self, path: Path, *, timed: bool = True) -> Measured:
        """Measure a model, or return what is kept beside it of the last time."""
        kept = path.with_suffix(f".{self._name}.npz")
        found = self._read(kept) if kept.is_file() else self._run(path)
        if timed and found.latency is None:
            timing = compare_speed(self.session, self._open(path), self._first)
            found = replace(found, latency=(timing.ratio, timing.ratio_low, timing.ratio_high))
        facts = {name: getattr(found, name) for name in ("params", "macs", "accuracy", "latency")}
        arrays: dict[str, Any] = {"facts": json.dumps(facts), **found.outputs}
        np.savez(kept, **arrays)
        return found

    def _read(self, kept: Path) -> Measured:
        with np.load(kept) as arrays:
            facts = json.loads(str(arrays["facts"]))
            outputs = {name: arrays[name] for name in self.session.output_names}
        latency = None if facts["latency"] is None else tuple(facts.pop("latency"))
        return Measured(**{**facts, "latency": latency}, outputs=outputs)

    def _run(self, path: Path) -> Measured:
        size = self._count(path)
        outputs = run_outputs(self._open(path), self.test, batch_size=BATCH_SIZE)
        return Measured(
            params=size.params / self._size.params,
            macs=size.macs / self._size.macs,
            accuracy=100 * self.metric.evaluate(self._outputs, outputs, self.test.labels),
            outputs=outputs,
        )

    def margin(self, ours: Measured, theirs: Measured) -> Interval:
        """Points of accuracy that we are ahead, with the 95 % interval, paired over the images."""
        drop = self.metric.measure(ours.outputs, theirs.outputs, self.test.labels)
        assert drop.interval is not None
        return 100 * drop.drop, 100 * drop.interval[0], 100 * drop.interval[1]

    def _open(self, path: Path) -> Session:
        return make_session(path, providers="cpu", threads=self._threads)

    def _count(self, path: Path) -> ModelSize:
        graph = normalise(load_model(path))
        twin = build_twin(graph)
        return model_size(graph, probe_shapes(twin, to_tensors(self._first, twin)))


def compare(scale: Scale, ours: Ours, peers: Sequence[Point]) -> list[Row]:
    """Run ours against each point of the peer's."""
    rows = []
    for point in peers:
        theirs = scale.measure(point.path)
        assert theirs.latency is not None
        click.echo(f"{point.mode} {point.sparsity:g}: {_facts(theirs)}")
        made = ours.compress({"params": _floor(theirs.params, 6), "macs": _floor(theirs.macs, 6)})
        at_size = at_latency = None if made is None else scale.measure(made)
        if theirs.latency[0] < 1:
            made = ours.compress({"latency": _floor(theirs.latency[0], 3)})
            at_latency = None if made is None else scale.measure(made)
        rows.append(Row(replace(point, measured=theirs), at_size, at_latency))
        for what, found in (("size", at_size), ("latency", at_latency)):
            if found is not None:
                click.echo(f"{point.mode} {point.sparsity:g}, at equal {what}: {_facts(found)}")
    return rows


def _floor(share: float, digits: int) -> float:
    """Round down, so that what is written on a command line is no more than what the peer has."""
    return math.floor(share * 10**digits + 1e-9) / 10**digits


def _facts(found: Measured) -> str:
    text = f"accuracy {found.accuracy:.2f}, params {found.params:.3f}, MACs {found.macs:.3f}"
    return text if found.latency is None else f"{text}, latency {_interval(found.latency, 3)}"


# --- tables ---


def show_modes(points: Sequence[Point]) -> str:
    """Return a Markdown table of all that the peer made."""
    head = ("mode", "sparsity", "params left", "MACs left", "accuracy")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for point in sorted(points, key=lambda p: (p.mode, p.sparsity)):
        found = point.measured
        lines.append(
            f"| {point.mode} | {point.sparsity:g} | {found.params:.3f} | {found.macs:.3f} "
            f"| {found.accuracy:.2f} |"
        )
    return "\n".join(lines)


def show_rows(rows: Sequence[Row], scale: Scale) -> str:
    """Return a Markdown table of the comparison."""
    head = (
        "peer", "params / MACs left", "latency (95 %)", "accuracy",
        "ours, equal params and MACs", "latency", "margin (95 %)",
        "ours, equal latency", "latency", "params", "margin (95 %)",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        theirs = row.peer.measured
        cells = [
            f"{row.peer.mode} {row.peer.sparsity:g}",
            f"{theirs.params:.3f} / {theirs.macs:.3f}",
            _interval(theirs.latency, 3),
            f"{theirs.accuracy:.2f}",
        ]
        for found, is_time in ((row.at_size, False), (row.at_latency, True)):
            if found is None:
                cells += ["not reached", *[""] * (3 if is_time else 2)]
                continue
            mark = "**" if found.accuracy > theirs.accuracy else ""
            cells += [f"{mark}{found.accuracy:.2f}{mark}", _interval(found.latency, 3)]
            cells += [f"{found.params:.3f}"] if is_time else []
            cells += [_interval(scale.margin(found, theirs), 2, sign="+")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(values: Interval | None, digits: int, *, sign: str = "") -> str:
    if values is None:
        return ""
    middle, low, high = (f"{value:{sign}.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


# --- the command ---


def make_arrays(
    cifar: Path, folder: Path, *, n_samples: int, n_test: int | None, seed: int
) -> tuple[Path, Path]:
    """Write ``n_samples`` training images without labels, and test images with them, as models take them."""
    calib, test = folder / f"calib-{n_samples}-{seed}.npz", folder / f"test-{n_test or 'all'}.npz"
    if not (calib.is_file() and test.is_file()):
        generator = np.random.default_rng(seed)
        with np.load(cifar, allow_pickle=False) as arrays:
            images, _ = read_images(arrays, "train")
            chosen = generator.permutation(len(images))[:n_samples]
            np.savez(calib, input=to_input(images[chosen]).numpy())
            images, labels = read_images(arrays, "test")
            np.savez(test, input=to_input(images[:n_test]).numpy(), labels=labels[:n_test].numpy())
    return calib, test


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, required=True, help="In the shared folder, or a path.")
@click.option("--folder", required=True, type=click.Path(path_type=Path), help="Where all files go.")
@click.option("--cifar", type=click.Path(exists=True, path_type=Path),
              help="Images; cifar10_subset.npz of the shared folder unless given.")  # fmt: skip
@click.option("--mode", "modes", multiple=True, default=MODES)
@click.option("--sparsity", "sparsities", multiple=True, type=float, default=SPARSITIES)
@click.option("--samples", "n_samples", default=1024, help="Calibration images.")
@click.option("--max-test", type=int, help="Most test images.")
@click.option("--seed", default=0)
@click.option("--threads", default=1)
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall",
              help="By what to time: cpu is for a machine that others keep busy.")  # fmt: skip
def main(
    models: tuple[str, ...],
    folder: Path,
    cifar: Path | None,
    modes: tuple[str, ...],
    sparsities: tuple[float, ...],
    n_samples: int,
    max_test: int | None,
    seed: int,
    threads: int,
    clock: str,
) -> None:
    if clock == "cpu" and threads != 1:
        raise click.UsageError("--clock cpu adds up what all threads take: it means something for one only")
    shared = Path(os.environ.get("HAP_ONNX_SHARED", ""))
    folder.mkdir(parents=True, exist_ok=True)
    python = make_environment(folder)
    images = cifar or shared / "data" / "cifar10_subset.npz"
    calib, test = make_arrays(images, folder, n_samples=n_samples, n_test=max_test, seed=seed)
    for name in models:
        model = Path(name) if name.endswith(".onnx") else shared / "models" / f"{name}.onnx"
        place = folder / f"{model.stem}-{_sha256(_digest(model).encode() + calib.name.encode())[:8]}"
        place.mkdir(exist_ok=True)
        wanted = [(mode, share) for mode in modes for share in sparsities]
        run_peer(python, model, calib, place, wanted)
        with use_threads(threads), use_clock(clock):
            scale = Scale(model, test, threads=threads)
            points = []
            for mode, share in wanted:
                if (path := _peer_file(place, mode, share)).is_file():
                    points.append(Point(mode, share, path, scale.measure(path, timed=False)))
                    click.echo(f"{mode} {share:g}: {_facts(points[-1].measured)}")
            ours = Ours(model, calib, test, place, seed=seed, threads=threads)
            rows = compare(scale, ours, contenders(points))
        click.echo(f"\n### {model.stem}: {scale.accuracy:.2f} % on {scale.test.n_samples} test images\n")
        click.echo(show_rows(rows, scale) + "\n\n" + show_modes(points))
        click.echo(f"\n{sys.version.split()[0]}, {', '.join(REQUIREMENTS)}", err=True)


if __name__ == "__main__":
    main()
