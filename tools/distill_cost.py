"""What training on twins costs, against a plain PyTorch loop over the same two networks, side by side.

    python -m tools.distill_cost --batch-size 64 --steps 20

Both loops distil a narrower ResNet56 from a full one, BatchNormalization folded in both, with AdamW, clipped
gradients and the same divergence of softened scores. Ours also augments, averages weights and compares
tensors inside, as it does in use. Steps take turns, and the ratio is that of the medians; memory is what the
steps add to a process of their own at its peak (Linux only).
"""

from __future__ import annotations

import ctypes
import gc
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from hap_onnx.data.calibration import InputSpec, open_dataset, split_dataset
from hap_onnx.distill.augment import find_augmenter
from hap_onnx.distill.learned import find_learned
from hap_onnx.distill.objective import Objective, find_hidden, find_scores
from hap_onnx.distill.training import Recipe, Trainer
from hap_onnx.model.model_io import load_model, normalise
from hap_onnx.sensitivity.curvature import output_scales, to_tensors
from hap_onnx.twin import build_twin
from tools.networks import resnet56
from tools.train_cifar import export

WIDTH = 0.7  # of the student: about half the multiply-accumulates
TEMPERATURE = 20.0

Step = Callable[[], None]


def make_networks(seed: int) -> tuple[nn.Module, nn.Module]:
    """Teacher and student, with BatchNormalization folded into their convolutions."""
    torch.manual_seed(seed)
    teacher, student = (fuse(resnet56(width).eval()) for width in (1.0, WIDTH))
    return teacher, student


def make_plain_step(teacher: nn.Module, student: nn.Module, images: Tensor, batch_size: int) -> Step:
    """One update of a loop as anyone would write it."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    turn = 0

    def step() -> None:
        nonlocal turn
        x = batches[turn % len(batches)]
        turn += 1
        with torch.no_grad():
            target = F.log_softmax(teacher(x) / TEMPERATURE, dim=1)
        soft = F.log_softmax(student(x) / TEMPERATURE, dim=1)
        loss = TEMPERATURE**2 * F.kl_div(soft, target, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()

    return step


def make_our_step(teacher: nn.Module, student: nn.Module, images: Tensor, batch_size: int) -> Step:
    """One update of ``hap_onnx.distill``."""
    graphs = [normalise(load_model(_export(network, images[:2]))) for network in (teacher, student)]
    spec = InputSpec("input", np.dtype(np.float32), (None, *images.shape[1:]))
    splits = split_dataset(open_dataset({"input": images.numpy()}, [spec]), seed=0)
    twins = [build_twin(graph) for graph in graphs]
    inputs = to_tensors(next(iter(splits.choose.batches(batch_size))).inputs, twins[0])
    with torch.no_grad():
        scores = twins[0](inputs)["logits"]
    objective = Objective(
        scales=output_scales([{"logits": scores.numpy()}]),
        hidden=find_hidden(*twins, inputs),
        scores=find_scores("logits", scores),
    )
    augmenter = find_augmenter(twins[0], splits.choose, outputs=["logits"], batch_size=batch_size, seed=0)
    recipe = Recipe(epochs=100, batch_size=batch_size)
    trainer = Trainer(
        *twins, find_learned(graphs[1]), objective, augmenter, splits.calibrate, splits.choose, recipe
    )
    n_whole = splits.calibrate.n_samples // batch_size * batch_size
    batches = list(splits.calibrate.take(n_whole).batches(batch_size))
    turn = 0

    def step() -> None:
        nonlocal turn
        trainer.update(turn, batches[turn % len(batches)], 1e-3)
        turn += 1

    return step


MAKERS = {"plain": make_plain_step, "ours": make_our_step}


def _export(network: nn.Module, example: Tensor) -> onnx.ModelProto:
    buffer = io.BytesIO()
    export(network, example, buffer)
    return onnx.load_from_string(buffer.getvalue())


def _memory(field: str) -> int:
    """Bytes that the kernel notes for this process: ``VmRSS`` is what it holds, ``VmHWM`` the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise click.ClickException("memory is measured on Linux only")


def _memory_added(step: Step, n_steps: int) -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not hide what the steps take
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory("VmRSS")
    for _ in range(n_steps):
        step()
    return _memory("VmHWM") - before


def measure_memory(kind: str, batch_size: int, n_steps: int, threads: int) -> int:
    """Run some steps in a process of its own; returns the bytes that they add."""
    words = {"--only": kind, "--batch-size": batch_size, "--steps": n_steps, "--threads": threads}
    options = [str(part) for word in words.items() for part in word]
    command = [sys.executable, "-W", "ignore", "-m", "tools.distill_cost", *options]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(found.stdout.splitlines()[-1])["added"])


@click.command(help=__doc__)
@click.option("--batch-size", default=64)
@click.option("--steps", "n_steps", default=20)
@click.option("--threads", default=1)
@click.option("--only", type=click.Choice(sorted(MAKERS)), hidden=True)
def main(batch_size: int, n_steps: int, threads: int, only: str | None) -> None:
    torch.set_num_threads(threads)
    networks = make_networks(seed=0)
    images = torch.randn(8 * batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    if only is not None:
        step = MAKERS[only](*networks, images, batch_size)
        click.echo(json.dumps({"added": _memory_added(step, n_steps)}))
        return
    steps = {kind: make(*networks, images, batch_size) for kind, make in MAKERS.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for turn in range(n_steps + 2):
        for kind, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 2:  # the first ones allocate
                seconds[kind].append(time.perf_counter() - start)
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    memory = {kind: measure_memory(kind, batch_size, 4, threads) for kind in MAKERS}
    for kind in MAKERS:
        click.echo(f"{kind}: {1e3 * medians[kind]:.0f} ms per step, {memory[kind] / 1e6:.0f} MB")
    ratios = (found["ours"] / found["plain"] for found in (medians, memory))
    click.echo("ours to plain: time x{:.2f}, memory x{:.2f}".format(*ratios))


if __name__ == "__main__":
    main()
