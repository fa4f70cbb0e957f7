"""A detector without labels: small digits are found on a canvas, judged by the task's own metric.

    python examples/detector.py

Nobody labels a million photos to compress a detector. Without labels hap-onnx compares outputs with those of
the original (r2); better still is a metric that knows what the outputs are for. Here that is F1 of the
detections, where right is what the original finds. At the end the script, which made the canvases, checks
both models against the truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import hap_onnx

SIZE, STRIDE, DIGIT = 48, 8, 16  # pixels: canvas, cell of the grid, digit
CELLS = SIZE // STRIDE
FOLDER = Path("example") / "detector"
Outputs = Mapping[str, np.ndarray]


def f1(reference: Outputs, candidate: Outputs, labels: np.ndarray | None) -> float:
    """Share of the detections that agree: same cell, same digit, boxes that overlap by more than half."""
    (scores, boxes), (other_scores, other_boxes) = ((o["scores"], o["boxes"]) for o in (reference, candidate))
    here, there = scores.max(axis=1) > 0.5, other_scores.max(axis=1) > 0.5  # [N, CELLS, CELLS]
    same = scores.argmax(axis=1) == other_scores.argmax(axis=1)
    right = here & there & same & (overlap(boxes, other_boxes) > 0.5)
    return 2 * float(right.sum()) / max(float(here.sum() + there.sum()), 1.0)


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [N, 4, CELLS, CELLS]: centre (y, x) and size (h, w), in cells."""
    low = np.maximum(a[:, :2] - a[:, 2:] / 2, b[:, :2] - b[:, 2:] / 2)
    high = np.minimum(a[:, :2] + a[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2)
    inner = np.clip(high - low, 0, None).prod(axis=1)
    area = np.clip(a[:, 2:], 0, None).prod(axis=1) + np.clip(b[:, 2:], 0, None).prod(axis=1)
    return inner / np.maximum(area - inner, 1e-9)


def make_canvases(digits: np.ndarray, labels: np.ndarray, n: int, *, seed: int) -> tuple[np.ndarray, Outputs]:
    """Paste up to four digits on each canvas; returns images and what a detector should say of them."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(0, 0.2, (n, 1, SIZE, SIZE)).astype(np.float32)
    scores = np.zeros((n, 10, CELLS, CELLS), np.float32)
    boxes = np.zeros((n, 4, CELLS, CELLS), np.float32)
    for index in range(n):
        for _ in range(4):
            which, (top, left) = rng.integers(len(digits)), rng.integers(0, SIZE - DIGIT + 1, 2)
            patch = images[index, 0, top : top + DIGIT, left : left + DIGIT]
            if patch.max() > 0.25:  # a digit is there already
                continue
            np.maximum(patch, np.kron(digits[which], np.ones((2, 2), np.float32)), out=patch)
            centre = (np.array([top, left]) + DIGIT / 2) / STRIDE
            row, column = centre.astype(int)
            scores[index, labels[which], row, column] = 1
            boxes[index, :, row, column] = [*(centre - (row, column)), DIGIT / STRIDE, DIGIT / STRIDE]
    return images, {"scores": scores, "boxes": boxes}


class Detector(nn.Module):
    """Images to scores [N, 10, CELLS, CELLS] and boxes [N, 4, CELLS, CELLS]: at most one digit per cell."""

    def __init__(self) -> None:
        super().__init__()
        widths, layers = (1, 16, 32, 48, 64, 64), []
        for n_in, n_out, stride in zip(widths, widths[1:], (1, 2, 2, 2, 1), strict=False):
            layers += [nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]
        self.backbone = nn.Sequential(*layers)
        self.scores, self.boxes = nn.Conv2d(64, 10, 1), nn.Conv2d(64, 4, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.backbone(image)
        return self.scores(x).sigmoid(), self.boxes(x)


def train(images: np.ndarray, truth: Outputs, *, epochs: int) -> Detector:
    torch.manual_seed(0)
    network = Detector()
    data = [torch.from_numpy(array) for array in (images, truth["scores"], truth["boxes"])]
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(16):
            image, scores, boxes = (array[chosen] for array in data)
            guess, places = network(image)
            is_there = scores.amax(1, keepdim=True)
            loss = F.binary_cross_entropy(guess, scores, weight=1 + 3 * scores, reduction="sum")
            loss = (loss + ((places - boxes).abs() * is_there).sum()) / is_there.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return network.eval()


def run(model: Path, images: np.ndarray) -> Outputs:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return dict(zip(("scores", "boxes"), session.run(["scores", "boxes"], {"image": images}), strict=True))


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    digits, labels = load_digits(return_X_y=True)
    digits = (digits.reshape(-1, 8, 8) / 16).astype(np.float32)
    images, truth = make_canvases(digits[:1200], labels[:1200], 1500, seed=0)
    held_out, held_out_truth = make_canvases(digits[1200:], labels[1200:], 300, seed=1)  # other digits
    network = train(images, truth, epochs=14)
    torch.onnx.export(
        network, (torch.from_numpy(images[:2]),), FOLDER / "detector.onnx", dynamo=True, verbose=False,
        input_names=["image"], output_names=["scores", "boxes"], external_data=False,
        dynamic_shapes=({0: torch.export.Dim("N")},),
    )  # fmt: skip
    np.savez(FOLDER / "calib.npz", image=images[:500])  # no labels
    np.savez(FOLDER / "test.npz", image=held_out)

    # As hap-onnx compress detector.onnx --data calib.npz --val test.npz --keep-macs 0.5 --metric detector:f1
    report = hap_onnx.compress(
        FOLDER / "detector.onnx", FOLDER / "calib.npz", val=FOLDER / "test.npz", keep_macs=0.5,
        metric="detector:f1", output=FOLDER / "small.onnx",
    )  # fmt: skip
    macs, file = report.after.macs / report.before.macs, report.after.bytes / report.before.bytes
    print(f"{macs:.0%} of the MACs, {report.latency.ratio:.0%} of the time, {file:.0%} of the file")
    print(f"against the original: r2 {report.fidelity.r2:.3f}, F1 {report.quality.after:.3f}")
    for name in ("detector", "small"):
        score = f1(held_out_truth, run(FOLDER / f"{name}.onnx", held_out), None)
        print(f"F1 against the truth on {len(held_out)} canvases, {name}.onnx: {score:.3f}")


if __name__ == "__main__":
    main()
