"""Your own preprocessing: folders of images, and a recipe in TOML that says how they become inputs.

    python examples/preprocessing.py

Images must reach a model as they did in its training, else all that is measured on them is worthless.
hap-onnx cannot know how that was: it says what it does, and stops where labels show the original to be no
better than chance. Smaller mistakes it cannot see; the one below, to crop where the training stretched, costs
two digits in five. So compare once: hap-onnx validate of a model with itself must show the accuracy that its
training showed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import hap_onnx

FOLDER = Path("example") / "preprocessing"
MEAN, STD = 0.70, 0.38  # of the training's pixels, roughly
RECIPE = f"""\
[image]
resize = "stretch"     # to the size, whatever the shape of the image
size = [16, 16]
interpolation = "box"
color = "gray"         # the files are RGB, the model has one channel
scale = "1/255"
mean = [{MEAN}]
std = [{STD}]
"""
MISTAKE = RECIPE.replace("stretch", "shorter").replace("[16, 16]", "16")  # and cropped, as usual elsewhere


def write_images(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write black digits on white, 32 x 24 pixels (height x width), one folder per class."""
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / str(label) / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.kron(255 - image * 255 / 16, np.ones((4, 3))).round().astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(path)


def load_inputs(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs [N, 1, 16, 16] and labels as the training wants them: the recipe, by hand."""
    paths = sorted(folder.glob("*/*.png"))
    images = (Image.open(path).convert("L").resize((16, 16), Image.Resampling.BOX) for path in paths)
    pixels = torch.from_numpy(np.stack([np.asarray(image, np.float32) for image in images]))
    return ((pixels / 255 - MEAN) / STD)[:, None], torch.tensor([int(path.parent.name) for path in paths])


def train(inputs: torch.Tensor, labels: torch.Tensor, *, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for n_in, n_out, stride in ((1, 24, 1), (24, 48, 2), (48, 64, 2)):
        layers += [nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs)).split(32):
            loss = F.cross_entropy(network(inputs[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return network.eval()


def evaluate(network: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((network(inputs).argmax(1) == labels).double().mean())


def measure(model: Path, images: Path, *, preprocess: Path) -> float:
    """As hap-onnx validate digits.onnx digits.onnx --data calib --preprocess recipe.toml"""
    report = hap_onnx.validate(model, model, images, preprocess=str(preprocess), max_drop="none")
    return report.quality.before


def main() -> None:
    digits = load_digits()
    for name, rows in {"calib": slice(1200), "test": slice(1200, None)}.items():
        write_images(FOLDER / name, digits.images[rows], digits.target[rows])
    model, calib, test = FOLDER / "digits.onnx", FOLDER / "calib", FOLDER / "test"
    recipe, mistake = FOLDER / "recipe.toml", FOLDER / "mistake.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    mistake.write_text(MISTAKE, encoding="utf-8")
    inputs, labels = load_inputs(calib)
    network = train(inputs, labels, epochs=8)
    torch.onnx.export(
        network, (inputs[:2],), model, dynamo=True, verbose=False, input_names=["image"],
        output_names=["scores"], external_data=False, dynamic_shapes=({0: torch.export.Dim("N")},),
    )  # fmt: skip

    own = evaluate(network, inputs, labels)
    right, wrong = (measure(model, calib, preprocess=path) for path in (recipe, mistake))
    print(f"The original on {len(labels)} images, in its training's own evaluation: {own:.1%} right, "
          f"with the recipe {right:.1%}, with a mistake in it {wrong:.1%}")  # fmt: skip
    assert abs(right - own) < 0.002, "the recipe is not what the training did"
    assert wrong < own - 0.2, "the mistake costs little: this example shows nothing"

    # As hap-onnx compress digits.onnx --data calib --val test --preprocess recipe.toml --keep-macs 0.5 ...
    report = hap_onnx.compress(
        model, calib, val=test, preprocess=str(recipe), keep_macs=0.5, max_drop=0.02,
        output=FOLDER / "small.onnx",
    )  # fmt: skip
    macs, file = report.after.macs / report.before.macs, report.after.bytes / report.before.bytes
    print(f"Now {macs:.0%} of the MACs, {file:.0%} of the file, {report.latency.ratio:.0%} of the time")
    print(f"Right on {report.quality.n_samples} images not seen before: {report.quality.before:.1%} before, "
          f"{report.quality.after:.1%} after")  # fmt: skip


if __name__ == "__main__":
    main()
