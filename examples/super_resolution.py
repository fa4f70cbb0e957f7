"""Super-resolution: photographs at twice their size, with a gate in decibels.

    python examples/super_resolution.py

PSNR needs the true image, and data for hap-onnx holds inputs and at most one whole number per sample. That is
enough: here the number says which patch it is, and the metric looks up the truth. One strip of the photos is
for choosing how to train, and another, used for nothing else, judges the compressed model.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F

import hap_onnx

PATCH = 24  # pixels of the small image; the large one has twice as many
FOLDER = Path("example") / "super_resolution"
Outputs = Mapping[str, np.ndarray]
Patches = tuple[np.ndarray, np.ndarray]  # small, large


def psnr(reference: Outputs, candidate: Outputs, labels: np.ndarray) -> float:
    """Peak signal-to-noise ratio of the candidate's images against the truth, in decibels.

    The error is averaged before the logarithm, else patches of plain sky would say most of what is said.
    """
    return decibels(candidate["large"], load_truth()[labels])


def decibels(images: np.ndarray, truth: np.ndarray) -> float:
    return float(-10 * np.log10(((images - truth) ** 2).mean()))


@cache
def load_truth() -> np.ndarray:
    return np.load(FOLDER / "truth.npy")


def cut_patches(images: list[np.ndarray], *, step: int) -> Patches:
    """Return small and large patches [N, 3, PATCH, PATCH] and [N, 3, 2 PATCH, 2 PATCH], of values 0 to 1."""
    size = 2 * PATCH
    large = np.stack([
        image[top : top + size, left : left + size]
        for image in images
        for top in range(0, image.shape[0] - size + 1, step)
        for left in range(0, image.shape[1] - size + 1, step)
    ]).transpose(0, 3, 1, 2).astype(np.float32) / 255  # fmt: skip
    small = large.reshape(-1, 3, PATCH, 2, PATCH, 2).mean(axis=(3, 5))
    return small, large


class SuperResolution(nn.Module):
    """Adds what is missing to an image that was enlarged by interpolation."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 12, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
            )
            for _ in range(2)
        )
        nn.init.zeros_(self.last.weight)  # the training begins at plain interpolation
        nn.init.zeros_(self.last.bias)

    def forward(self, small: Tensor) -> Tensor:
        x = F.relu(self.first(small))
        for block in self.blocks:
            x = x + block(x)
        enlarged = F.interpolate(small, scale_factor=2.0, mode="bicubic", align_corners=False)
        return enlarged + F.pixel_shuffle(self.last(x), 2)


def train(small: np.ndarray, large: np.ndarray, *, epochs: int, augment: bool) -> SuperResolution:
    torch.manual_seed(0)
    network = SuperResolution()
    inputs, targets = torch.from_numpy(small), torch.from_numpy(large)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs)).split(8):
            x, y = inputs[chosen], targets[chosen]
            if augment:
                turn, flip = int(torch.randint(4, ())), [3] * int(torch.randint(2, ()))
                x, y = (a.rot90(turn, (2, 3)).flip(flip) for a in (x, y))
            loss = F.mse_loss(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return network.eval()


def choose(train_part: Patches, choice_part: Patches, *, epochs: int) -> SuperResolution:
    """Train with and without augmentation, and return what is better on patches that neither has seen."""
    found = {}
    for augment in (False, True):
        network = train(*train_part, epochs=epochs, augment=augment)
        with torch.no_grad():
            quality = decibels(network(torch.from_numpy(choice_part[0])).numpy(), choice_part[1])
        print(f"trained {'with' if augment else 'without'} turned and mirrored patches: {quality:.2f} dB")
        found[quality] = network
    return found[max(found)]


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    photos = load_sample_images().images  # china.jpg and flower.jpg
    # Of each photo, the left five eighths train, the next one chooses, and the right quarter judges.
    ends = [photos[0].shape[1] * eighths // 8 for eighths in (0, 5, 6, 8)]
    parts = (
        cut_patches([photo[:, start:end] for photo in photos], step=step)
        for start, end, step in zip(ends, ends[1:], (24, 32, 32), strict=False)
    )
    (small, large), choice_part, (small_test, large_test) = parts
    network = choose((small, large), choice_part, epochs=15)
    torch.onnx.export(
        network, (torch.from_numpy(small[:2]),), FOLDER / "enlarge.onnx", dynamo=True, verbose=False,
        input_names=["small"], output_names=["large"], external_data=False,
        dynamic_shapes=({0: torch.export.Dim("N")},),
    )  # fmt: skip
    numbers = np.arange(len(small) + len(small_test))
    np.save(FOLDER / "truth.npy", np.concatenate([large, large_test]))
    np.savez(FOLDER / "calib.npz", small=small, labels=numbers[: len(small)])
    np.savez(FOLDER / "test.npz", small=small_test, labels=numbers[len(small) :])

    # As hap-onnx compress enlarge.onnx --data calib.npz --val test.npz --metric super_resolution:psnr ...
    report = hap_onnx.compress(
        FOLDER / "enlarge.onnx", FOLDER / "calib.npz", val=FOLDER / "test.npz", keep_macs=0.6,
        metric="super_resolution:psnr", max_drop=0.05, output=FOLDER / "small.onnx",
    )  # fmt: skip
    plain = {}
    for mode in ("bilinear", "bicubic"):
        enlarged = F.interpolate(torch.from_numpy(small_test), scale_factor=2.0, mode=mode)
        plain[mode] = decibels(enlarged.numpy(), large_test)
    macs, file = report.after.macs / report.before.macs, report.after.bytes / report.before.bytes
    print(f"{macs:.0%} of the MACs, {report.latency.ratio:.0%} of the time, {file:.0%} of the file")
    print(f"PSNR on {len(small_test)} patches of parts not seen before: bilinear {plain['bilinear']:.2f} dB, "
          f"bicubic {plain['bicubic']:.2f} dB, "
          f"original {report.quality.before:.2f} dB, compressed {report.quality.after:.2f} dB")  # fmt: skip


if __name__ == "__main__":
    main()
