"""Train a network of our own on CIFAR-10 and export it to ONNX, for benchmarks that need wide layers.

    python -m tools.train_cifar vgg16 --data cifar10.npz --output vgg16.onnx --epochs 4 --minutes 60

``--data`` is an .npz file with images as uint8 [N, 32, 32, 3] (``x_train``, ``x_test``) or as JPEG bytes with
offsets (``jpeg_train``, ``offsets_train``, ...), and labels (``y_train`` or ``labels_train``, ...). Inputs of
the exported model are ``(x / 255 - mean) / std`` with the ImageNet mean and std, float32 NCHW.
"""

from __future__ import annotations

import io
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from tools.networks import CIFAR_NETWORKS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read_images(data: Mapping[str, NDArray[np.generic]], part: str) -> tuple[Tensor, Tensor]:
    """Return images uint8 [N, 3, 32, 32] and labels int64 [N]."""
    if f"x_{part}" in data:
        pixels, labels = np.asarray(data[f"x_{part}"]), np.asarray(data[f"y_{part}"])
    else:
        raw, offsets = np.asarray(data[f"jpeg_{part}"]).tobytes(), np.asarray(data[f"offsets_{part}"])
        pairs = pairwise(offsets)
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(raw[a:b])).convert("RGB")) for a, b in pairs])
        labels = np.asarray(data[f"labels_{part}"])
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return images, torch.from_numpy(labels.astype(np.int64))


def to_input(images: Tensor, *, augment: torch.Generator | None = None) -> Tensor:
    """Normalise; with a generator also flip and shift by up to four pixels, each image for itself."""
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    x = (images.float() / 255 - mean) / std
    if augment is None:
        return x
    n = len(x)
    flip = torch.rand(n, generator=augment) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    rows, columns = (torch.randint(0, 9, (n, 1), generator=augment) + torch.arange(32) for _ in range(2))
    padded = F.pad(x, (4, 4, 4, 4))
    index = torch.arange(n)[:, None, None, None], torch.arange(3)[None, :, None, None]
    return padded[index[0], index[1], rows[:, None, :, None], columns[:, None, None, :]]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        hits = [
            (model(to_input(x)).argmax(1) == y).sum()
            for x, y in zip(images.split(250), labels.split(250), strict=True)
        ]
    return 100.0 * int(torch.stack(hits).sum()) / len(labels)


@dataclass(frozen=True)
class Schedule:
    """How to train: one cycle of the learning rate over ``epochs``, shortened to fit into ``minutes``."""

    epochs: int = 4
    minutes: float = 60.0
    batch_size: int = 128
    rate: float = 0.1
    bfloat16: bool = False
    threads: int = 1
    seed: int = 0


def make_optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)


def train(model: nn.Module, images: Tensor, labels: Tensor, schedule: Schedule) -> None:
    optimizer = make_optimizer(model, schedule.rate)
    generator = torch.Generator().manual_seed(schedule.seed)
    n_steps = schedule.epochs * math.ceil(len(labels) / schedule.batch_size)
    step, done, start = 0, 0.0, time.perf_counter()
    while done < 1:
        for chosen in torch.randperm(len(labels), generator=generator).split(schedule.batch_size):
            if done >= 1:
                break
            # One cycle over the share of the schedule that is done, by steps or by time.
            used = (time.perf_counter() - start) / (60 * schedule.minutes)
            done = max((step + 1) / n_steps, used)
            factor = done / 0.2 if done <= 0.2 else (1.0 - done) / 0.8
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate * max(factor, 1e-3)
            model.train()
            x = to_input(images[chosen], augment=generator).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=schedule.bfloat16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            step += 1
            if step % 50 == 0:
                seconds = time.perf_counter() - start
                click.echo(f"step {step} ({done:.0%}) loss {loss:.3f} {seconds:.0f} s")


def export(model: nn.Module, example: Tensor, output: str | BinaryIO) -> None:
    """Write a network with a dynamic batch; BatchNormalization is folded, as exporters do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the newer exporter needs onnxscript
        torch.onnx.export(
            model.to(memory_format=torch.contiguous_format).eval(), (example,), output,
            input_names=["input"], output_names=["logits"],
            dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}}, dynamo=False,
        )  # fmt: skip


def train_network(network: str, data: Path, output: Path, *, width: float, schedule: Schedule) -> None:
    """Train a network of ``CIFAR_NETWORKS`` and write it to ``output``."""
    torch.set_num_threads(schedule.threads)
    torch.manual_seed(schedule.seed)
    with np.load(data, allow_pickle=False) as arrays:
        images, labels = read_images(arrays, "train")
        test_images, test_labels = read_images(arrays, "test")
    model = CIFAR_NETWORKS[network](width).to(memory_format=torch.channels_last)
    n_params = sum(parameter.numel() for parameter in model.parameters())
    click.echo(f"{network}: {n_params / 1e6:.2f} M parameters, {len(labels)} training images")
    train(model, images, labels, schedule)
    value = accuracy(model, test_images, test_labels)
    click.echo(f"{network}: {value:.2f} % on {len(test_labels)} test images")
    export(model, to_input(test_images[:2]), str(output))


@click.command(help=__doc__)
@click.argument("network", type=click.Choice(sorted(CIFAR_NETWORKS)))
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path))
@click.option("--width", default=1.0, help="Channels relative to the full network.")
@click.option("--epochs", default=4, help="Length of the schedule.")
@click.option("--minutes", default=60.0, help="The schedule is shortened to fit.")
@click.option("--batch-size", default=128)
@click.option("--rate", default=0.1, help="Highest learning rate.")
@click.option("--bfloat16/--float32", default=False, help="Multiply in bfloat16 (faster where the CPU can).")
@click.option("--threads", default=1)
@click.option("--seed", default=0)
def main(network: str, data: Path, output: Path, width: float, **words: Any) -> None:
    train_network(network, data, output, width=width, schedule=Schedule(**words))


if __name__ == "__main__":
    main()
