"""Augmentation of images: only what the original model itself hardly notices.

A flipped photograph of a cat is a cat, a flipped "b" is a "d", and boxes move with what they enclose. Rather
than guess, each augmentation is tried on calibration samples: it is used if the original's outputs stay as
they are. That leaves out whatever is not consistent with the labels, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hap_onnx.data.calibration import Subset
from hap_onnx.runtime.metrics import choose_metric
from hap_onnx.sensitivity.curvature import to_tensors
from hap_onnx.twin import Twin

MIN_SIZE = 16
"""Inputs with fewer pixels than this along an axis are no images to us."""
SHIFT = 0.125
"""Largest shift, as a fraction of the size (4 pixels of 32)."""
INVARIANCE = 0.8
"""Agreement or r2 of the original's outputs before and after an augmentation that is used."""
N_TRIED = 256
TRIED_BYTES = 1 << 28
"""Most that the samples on which augmentations are tried take up, with the outputs for them."""



class Draws(Protocol):
    """What augmentations need of a ``np.random.Generator``."""

    def random(self, size: int, /) -> np.ndarray: ...

    def integers(self, low: int, high: int, size: tuple[int, ...], /) -> np.ndarray: ...


@dataclass(frozen=True)
class ShareOfDraws:
    """Draws for ``n_all`` samples, and gives what is for some of them: ``part``."""

    generator: np.random.Generator
    n_all: int
    part: slice

    def random(self, size: int, /) -> np.ndarray:
        return self.generator.random(self.n_all)[self.part]

    def integers(self, low: int, high: int, size: tuple[int, ...], /) -> np.ndarray:
        return self.generator.integers(low, high, (self.n_all, *size[1:]))[self.part]


Augmentation = Callable[[Tensor, Draws], Tensor]


@dataclass(frozen=True)
class Augmenter:
    """Augments one input of a model: ``kinds`` of AUGMENTATIONS in turn, each sample for itself."""

    input_name: str
    kinds: tuple[str, ...]
    channels_last: bool

    def __call__(self, inputs: Mapping[str, Tensor], generator: Draws) -> dict[str, Tensor]:
        """Return the inputs with images [N, C, H, W] (or [N, H, W, C]) augmented."""
        images = inputs[self.input_name]
        images = images.movedim(-1, 1) if self.channels_last else images
        for kind in self.kinds:
            images = AUGMENTATIONS[kind](images, generator)
        images = images.movedim(1, -1) if self.channels_last else images
        return {**inputs, self.input_name: images}


def flip(images: Tensor, generator: Draws) -> Tensor:
    """Mirror every other image [N, C, H, W], left to right."""
    chosen = torch.from_numpy(generator.random(len(images)) < 0.5).to(images.device)
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def shift(images: Tensor, generator: Draws) -> Tensor:
    """Shift each image [N, C, H, W] by up to an eighth of its size; pixels at the edge are repeated."""
    n, n_channels, *sizes = images.shape
    most = [max(1, round(SHIFT * size)) for size in sizes]
    padded = F.pad(images, (most[1], most[1], most[0], most[0]), mode="replicate")
    starts = [torch.from_numpy(generator.integers(0, 2 * border + 1, (n, 1))) for border in most]
    rows, columns = (
        (start + torch.arange(size)).to(images.device) for start, size in zip(starts, sizes, strict=True)
    )
    sample = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(n_channels, device=images.device)[None, :, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


AUGMENTATIONS: Mapping[str, Augmentation] = {"flip": flip, "shift": shift}


def find_augmenter(
    teacher: Twin, subset: Subset, *, outputs: Collection[str], batch_size: int, seed: int
) -> Augmenter | None:
    """Return an augmenter with what the original hardly notices on some samples; None where nothing fits.

    The model must have one input, and that images with one, three or four channels. ``outputs`` are those
    that count.
    """
    size = teacher.batch_limit or batch_size
    first = to_tensors(next(iter(subset.batches(size))).inputs, teacher)
    place = _find_images(first)
    if place is None:
        return None
    part = subset.take(_count_tried(first, _run(teacher, [first], outputs), size))

    def batches() -> Iterator[dict[str, Tensor]]:  # read anew each time rather than kept
        return (to_tensors(batch.inputs, teacher) for batch in part.batches(size))

    before = _run(teacher, batches(), outputs)
    metric = choose_metric("auto", outputs=before, labels=None)
    kinds = []
    for kind in AUGMENTATIONS:
        augmenter = Augmenter(place[0], (kind,), place[1])
        generator = np.random.default_rng(seed)
        after = _run(teacher, (augmenter(batch, generator) for batch in batches()), outputs)
        if metric.evaluate(before, after) >= INVARIANCE:
            kinds.append(kind)
    return Augmenter(place[0], tuple(kinds), place[1]) if kinds else None


def _count_tried(inputs: Mapping[str, Tensor], outputs: Mapping[str, np.ndarray], size: int) -> int:
    """How many samples fit into ``TRIED_BYTES``, given a batch of them: whole batches, at least one."""
    n_samples = len(next(iter(inputs.values())))
    n_bytes = sum(tensor.nbytes for tensor in inputs.values())
    n_bytes += 2 * sum(array.nbytes for array in outputs.values())  # before and after
    n_fitting = TRIED_BYTES * n_samples // max(n_bytes, 1)
    return max(1, min(N_TRIED, n_fitting) // size) * size


def _find_images(inputs: Mapping[str, Tensor]) -> tuple[str, bool] | None:
    """Return the name of the input that holds images, and whether its channels are last."""
    if len(inputs) != 1:
        return None
    name, tensor = next(iter(inputs.items()))
    if not tensor.is_floating_point() or tensor.ndim != 4:
        return None
    for channels_last, n_channels, sizes in (
        (False, tensor.shape[1], tensor.shape[2:]),
        (True, tensor.shape[3], tensor.shape[1:3]),
    ):
        if n_channels in (1, 3, 4) and min(sizes) >= MIN_SIZE:
            return name, channels_last
    return None


@torch.no_grad()
def _run(
    twin: Twin, batches: Iterable[Mapping[str, Tensor]], outputs: Collection[str]
) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {name: [] for name in outputs}
    for batch in batches:
        found = twin(batch)
        for name in outputs:
            parts[name].append(found[name].cpu().numpy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}
