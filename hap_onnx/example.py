"""A complete example: ``python -m hap_onnx.example`` trains, exports and compresses a small network.

The network is a residual CNN of three blocks, the data the 1,797 handwritten digits that ship inside
scikit-learn (8x8 pixels, real). Everything is written to a folder, ``example`` by default, with the
commands to go on from there. Needs the extra ``examples``: ``pip install 'hap-onnx[examples]'``.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hap_onnx import cli
from hap_onnx.errors import HapOnnxError

TEST_SHARE = 0.3
BUDGET = ("--keep-macs", "0.5")


# ---------------------------------------------------------------- the network


class Block(nn.Module):
    """Two 3x3 convolutions around which the input passes, by a 1x1 convolution where its shape changes."""

    def __init__(self, n_inputs: int, n_outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_inputs, n_outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_outputs)
        self.conv2 = nn.Conv2d(n_outputs, n_outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_inputs != n_outputs:
            projection = nn.Conv2d(n_inputs, n_outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(n_outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, n_inputs, H, W] to [N, n_outputs, H / stride, W / stride]."""
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """Images [N, 1, 8, 8] to class scores [N, 10]; 76 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.block1 = Block(16, 16, stride=1)
        self.block2 = Block(16, 32, stride=2)
        self.block3 = Block(32, 64, stride=2)
        self.head = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return class scores."""
        x = F.relu(self.norm(self.stem(image)))
        x = self.block3(self.block2(self.block1(x)))
        return self.head(x.mean((2, 3)))


# ---------------------------------------------------------------- data and training


@dataclass(frozen=True)
class Digits:
    """Images float32 [N, 1, 8, 8] with values 0 to 1, and labels int64 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def save(self, path: Path) -> None:
        """Write the form of data that hap-onnx reads: one array per model input, and labels."""
        np.savez(path, image=self.images, labels=self.labels)


def load_digits(*, seed: int = 0) -> tuple[Digits, Digits]:
    """Return a training and a test part of scikit-learn's digits, drawn by ``seed``."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise _missing("scikit-learn") from error
    bunch = load()
    images = (bunch.images / 16.0).astype(np.float32)[:, None]
    labels = bunch.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    n_test = round(TEST_SHARE * len(labels))
    test, train = order[:n_test], order[n_test:]
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


def train_network(data: Digits, *, epochs: int = 20, seed: int = 0) -> DigitsNet:
    """Train a `DigitsNet` from scratch, on images shifted by up to one pixel; returned in eval mode."""
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitsNet()
        images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
        batch_size = 64
        steps = epochs * (len(labels) // batch_size)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        network.train()
        for _ in range(epochs):
            order = torch.randperm(len(labels))
            for start in range(0, len(order) - batch_size + 1, batch_size):
                chosen = order[start : start + batch_size]
                row, column = torch.randint(0, 3, (2,)).tolist()
                shifted = F.pad(images[chosen], (1, 1, 1, 1))[:, :, row : row + 8, column : column + 8]
                loss = F.cross_entropy(network(shifted), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return network.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Such small layers gain nothing from threads, and lose much where other work shares the cores."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def measure_accuracy(network: nn.Module, data: Digits) -> float:
    """Return the share of images whose highest score is that of their label."""
    with torch.no_grad():
        scores = network(torch.from_numpy(data.images))
    return float((scores.argmax(1) == torch.from_numpy(data.labels)).double().mean())


def export_network(network: nn.Module, path: Path) -> None:
    """Write an ONNX model with input ``image`` [N, 1, 8, 8] and output ``scores`` [N, 10]."""
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)  # it warns of operators of packages that are not there
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torch
            torch.onnx.export(
                network, (torch.zeros(2, 1, 8, 8),), path, dynamo=True, verbose=False, external_data=False,
                input_names=["image"], output_names=["scores"], dynamic_shapes=({0: torch.export.Dim("N")},),
            )  # fmt: skip
    except ImportError as error:
        raise _missing("onnxscript") from error
    finally:
        exporter_log.setLevel(level)


def _missing(package: str) -> HapOnnxError:
    return HapOnnxError(f"the example needs {package}: pip install 'hap-onnx[examples]'")


# ---------------------------------------------------------------- the command


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--folder", default="example", show_default=True, type=click.Path(file_okay=False, path_type=Path),
    help="Where everything is written.",
)  # fmt: skip
@click.option(
    "--epochs", default=20, show_default=True, type=click.IntRange(min=1), help="Length of the training."
)
def main(folder: Path, epochs: int) -> None:
    """Train a small network on handwritten digits, export it to ONNX and compress it to half its MACs."""
    try:
        sys.exit(run(folder, epochs=epochs))
    except HapOnnxError as error:
        click.echo(f"hap-onnx: error: {error}", err=True)
        sys.exit(error.exit_code)


def run(folder: Path, *, epochs: int) -> int:
    """Do all of it and return the exit code of ``hap-onnx compress``."""
    folder.mkdir(parents=True, exist_ok=True)
    model, calib, test = folder / "digits.onnx", folder / "calib.npz", folder / "test.npz"
    train_part, test_part = load_digits()
    click.echo(f"Training on {len(train_part.labels)} images of digits ...")
    start = time.perf_counter()
    network = train_network(train_part, epochs=epochs)
    seconds = time.perf_counter() - start
    accuracy = measure_accuracy(network, test_part)
    click.echo(f"{100 * accuracy:.2f} % of {len(test_part.labels)} test images right, after {seconds:.0f} s")
    export_network(network, model)
    train_part.save(calib)
    test_part.save(test)
    command = ["compress", str(model), "--data", str(calib), "--val", str(test), *BUDGET]
    click.echo(f"\n$ hap-onnx {' '.join(command)}")
    code = cli.main(command)
    if code == 0:
        small = folder / "digits.hap.onnx"
        click.echo(
            f"\n{small} is an ordinary ONNX model. Try also:\n"
            f"  hap-onnx inspect  {model}\n"
            f"  hap-onnx compress {model} --data {calib} --max-drop 0.005\n"
            f"  hap-onnx validate {model} {small} --data {test}"
        )
    return code


if __name__ == "__main__":
    main()
