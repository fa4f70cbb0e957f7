"""The folder in which the commands of the documentation are run.

A small trained model and data under the names that the pages use, and what earlier commands would have left.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import hap_onnx
from hap_onnx.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from tests.helpers import make_model, node
from tests.pages import ROOT, find_blocks

N_CALIB, N_PHOTOS = 1000, 1000
REAL_SIZES = {"256": "10", "224": "8"}
"""Sizes of images in recipes on the pages, and what stands for them here, where images have 8x8 pixels."""


class _Net(nn.Module):
    """Images [N, 3, 8, 8] to scores of ten digits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.inner = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.outer = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.down(F.relu(self.stem(x))))
        x = F.relu(x + self.outer(F.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))


def _train(images: np.ndarray, labels: np.ndarray, *, width: int = 32, epochs: int = 10) -> _Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _Net(width)
        x, y = torch.from_numpy(images), torch.from_numpy(labels)
        steps = epochs * (len(y) // 64)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
        for _ in range(epochs):
            for chosen in torch.randperm(len(y))[: len(y) // 64 * 64].split(64):
                optimizer.zero_grad()
                F.cross_entropy(network(x[chosen]), y[chosen]).backward()
                optimizer.step()
                schedule.step()
    return network.eval()


def _to_onnx(network: _Net) -> onnx.ModelProto:
    weights = {name: tensor.detach().numpy() for name, tensor in network.named_parameters()}

    def conv(x: str, y: str, *, stride: int = 1) -> onnx.NodeProto:
        names = [x, f"{y}.weight", f"{y}.bias"]
        return node("Conv", names, [y], pads=[1] * 4, strides=[stride] * 2)

    nodes = [
        conv("image", "stem"),
        node("Relu", ["stem"], ["r0"]),
        conv("r0", "down", stride=2),
        node("Relu", ["down"], ["r1"]),
        conv("r1", "inner"),
        node("Relu", ["inner"], ["r2"]),
        conv("r2", "outer"),
        node("Add", ["r1", "outer"], ["sum"]),
        node("Relu", ["sum"], ["r3"]),
        node("GlobalAveragePool", ["r3"], ["pooled"]),
        node("Flatten", ["pooled"], ["flat"]),
        node("Gemm", ["flat", "head.weight", "head.bias"], ["scores"], transB=1),
    ]
    for each in nodes:
        is_head = each.op_type == "Gemm"
        each.name = "head.linear" if is_head else f"backbone.{each.output[0]}"
    model = make_model(nodes, inputs={"image": ["N", 3, 8, 8]}, outputs=["scores"], weights=weights)
    onnx.checker.check_model(model, full_check=True)
    return model


def _write_data(folder: Path) -> _Net:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.repeat((bunch.images * 255 / 16).round().astype(np.uint8)[..., None], 3, axis=3)
    labels = bunch.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = pixels[order], labels[order]
    mean, std = np.float32(IMAGENET_MEAN), np.float32(IMAGENET_STD)
    arrays = np.ascontiguousarray(((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))
    calib, test = slice(0, N_CALIB), slice(N_CALIB, None)
    network = _train(arrays[calib], labels[calib])
    for name, part in {"calib": calib, "train": calib, "test": test}.items():
        np.savez(folder / f"{name}.npz", image=arrays[part], labels=labels[part])
    for name, part in {"calib": calib, "test": test}.items():
        (folder / name).mkdir()
        for number, rows in enumerate(np.array_split(np.arange(len(labels))[part], 3)):
            np.savez(folder / name / f"{number}.npz", image=arrays[rows], labels=labels[rows])
    (folder / "photos").mkdir()
    for number, photo in enumerate(pixels[:N_PHOTOS]):
        Image.fromarray(photo).save(folder / "photos" / f"{number:03}.png")
    return network


def write_network(folder: Path) -> None:
    """Train ``model.onnx`` on handwritten digits, and write these as data."""
    onnx.save(_to_onnx(_write_data(folder)), folder / "model.onnx")


def write_world(folder: Path) -> None:
    """Write models, data, the files that pages show, and one compressed model with its plan."""
    write_network(folder)
    for block in find_blocks():
        if block.name:
            text = block.text
            for real, small in REAL_SIZES.items():
                assert real in text or block.name != "recipe.toml"
                text = text.replace(real, small)
            (folder / block.name).write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "examples", folder / "examples")
    hap_onnx.compress(
        folder / "model.onnx", folder / "calib.npz", keep_macs=0.5, method="prune", sensitivity="magnitude",
        allow_slower=True, max_samples=200, threads=1, output=folder / "model.hap.onnx",
        save_plan=folder / "plan.json",
    )  # fmt: skip
    (folder / "model.hap.sweep").mkdir()
    for suffix in (".json", ".safetensors"):
        shutil.copy(folder / f"plan{suffix}", folder / "model.hap.sweep" / f"keep-macs-0.50{suffix}")
