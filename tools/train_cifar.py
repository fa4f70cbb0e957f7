"""Train a network of our own on CIFAR-10 and export it to ONNX, for benchmarks that need wide layers.

    python tools/train_cifar.py vgg16 --data cifar10.npz --output vgg16.onnx --epochs 4 --minutes 60

``--data`` is an .npz file with images as uint8 [N, 32, 32, 3] (``x_train``, ``x_test``) or as JPEG bytes with
offsets (``jpeg_train``, ``offsets_train``, ...), and labels (``y_train`` or ``labels_train``, ...). Inputs of
the exported model are ``(x / 255 - mean) / std`` with the ImageNet mean and std, float32 NCHW.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def conv_norm(n_in: int, n_out: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]


def vgg16() -> nn.Module:
    """VGG16 for 32x32 images: 13 convolutions with BatchNormalization, one classifier (14.7 M parameters)."""
    layers: list[nn.Module] = []
    n_in = 3
    for n_out, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            layers += conv_norm(n_in, n_out)
            n_in = n_out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


class WideBlock(nn.Module):
    """Pre-activation block of a wide residual network."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(n_in), nn.BatchNorm2d(n_out)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        same = n_in == n_out and stride == 1
        self.shortcut = None if same else nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        residual = x if self.shortcut is None else self.shortcut(h)
        result: Tensor = self.conv2(F.relu(self.norm2(self.conv1(h)))) + residual
        return result


def wide_resnet32() -> nn.Module:
    """WideResNet32, four times as wide as ResNet32 (7.4 M parameters)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    n_in = 16
    for n_out, stride in ((64, 1), (128, 2), (256, 2)):
        for index in range(5):
            layers.append(WideBlock(n_in, n_out, stride if index == 0 else 1))
            n_in = n_out
    head = [nn.BatchNorm2d(n_in), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, 10)]
    return nn.Sequential(*layers, *head)


def mlp() -> nn.Module:
    """Five fully connected layers on the pixels (8.4 M parameters)."""
    sizes = (3072, 1536, 1536, 768, 256)
    layers: list[nn.Module] = [nn.Flatten()]
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {"vgg16": vgg16, "wrn32": wide_resnet32, "mlp": mlp}


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


@click.command(help=__doc__)
@click.argument("network", type=click.Choice(sorted(NETWORKS)))
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path))
@click.option("--epochs", default=4, help="Length of the schedule.")
@click.option("--minutes", default=60.0, help="The schedule is shortened to fit.")
@click.option("--batch-size", default=128)
@click.option("--rate", default=0.1, help="Highest learning rate.")
@click.option("--bfloat16/--float32", default=False, help="Multiply in bfloat16 (faster where the CPU can).")
@click.option("--threads", default=1)
@click.option("--seed", default=0)
def main(
    network: str,
    data: Path,
    output: Path,
    epochs: int,
    minutes: float,
    batch_size: int,
    rate: float,
    bfloat16: bool,
    threads: int,
    seed: int,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    with np.load(data, allow_pickle=False) as arrays:
        images, labels = read_images(arrays, "train")
        test_images, test_labels = read_images(arrays, "test")
    model = NETWORKS[network]().to(memory_format=torch.channels_last)
    n_params = sum(parameter.numel() for parameter in model.parameters())
    click.echo(f"{network}: {n_params / 1e6:.1f} M parameters, {len(labels)} training images")
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(seed)
    n_steps = epochs * (len(labels) // batch_size)
    step, done, start = 0, 0.0, time.perf_counter()
    while done < 1:
        for chosen in torch.randperm(len(labels), generator=generator).split(batch_size)[:-1]:
            if done >= 1:
                break
            # One cycle over the share of the schedule that is done, by steps or by time.
            used = (time.perf_counter() - start) / (60 * minutes)
            done = max((step + 1) / n_steps, used)
            factor = min(done / 0.2, 1.0) * (1.0 - done) / 0.8 if done > 0.2 else done / 0.2
            for group in optimizer.param_groups:
                group["lr"] = rate * max(factor, 1e-3)
            model.train()
            x = to_input(images[chosen], augment=generator).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
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
    value = accuracy(model, test_images, test_labels)
    click.echo(f"{network}: {value:.2f} % on {len(test_labels)} test images")
    model = model.to(memory_format=torch.contiguous_format).eval()
    example = to_input(test_images[:2])
    dynamic = {"input": {0: "N"}, "logits": {0: "N"}}
    torch.onnx.export(
        model, (example,), str(output), input_names=["input"], output_names=["logits"],
        dynamic_axes=dynamic, dynamo=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
