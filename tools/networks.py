"""Networks of the HAP paper (Yu et al., arXiv 2101.08940, section 5) and of our benchmarks, untrained.

``CIFAR_NETWORKS`` are made for 32x32 images and ten classes; ``resnet50`` for 224x224 and a thousand.
``width`` scales the channels of those that take it, for machines on which the full network would train
too long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(n_in: int, n_out: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]


def _head(n_features: int) -> list[nn.Module]:
    """What follows the last pre-activation block."""
    norm = [nn.BatchNorm2d(n_features), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return [*norm, nn.Flatten(), nn.Linear(n_features, 10)]


def vgg16(width: float = 1.0) -> nn.Module:
    """VGG16 for 32x32 images: 13 convolutions with BatchNormalization, one classifier (14.7 M parameters)."""
    layers: list[nn.Module] = []
    n_in = 3
    for n_full, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        n_out = round(n_full * width)
        for _ in range(repeats):
            layers += conv_norm(n_in, n_out)
            n_in = n_out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(n_in, 10))


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


def wide_resnet32(width: float = 1.0) -> nn.Module:
    """WideResNet32, four times as wide as ResNet32 (7.4 M parameters)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    n_in = 16
    for n_full, stride in ((64, 1), (128, 2), (256, 2)):
        n_out = round(n_full * width)
        for index in range(5):
            layers.append(WideBlock(n_in, n_out, stride if index == 0 else 1))
            n_in = n_out
    return nn.Sequential(*layers, *_head(n_in))


class PreActivationBottleneck(nn.Module):
    """Pre-activation bottleneck without expansion: all three convolutions have the block's width."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(n_in), nn.Conv2d(n_in, n_out, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, stride=stride, padding=1, bias=False)
        self.norm3, self.conv3 = nn.BatchNorm2d(n_out), nn.Conv2d(n_out, n_out, 1, bias=False)
        same = n_in == n_out and stride == 1
        self.shortcut = None if same else nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        residual = x if self.shortcut is None else self.shortcut(h)
        h = self.conv2(F.relu(self.norm2(self.conv1(h))))
        result: Tensor = self.conv3(F.relu(self.norm3(h))) + residual
        return result


def preresnet29(width: float = 1.0) -> nn.Module:
    """The paper's PreResNet29: nine bottleneck blocks of 64, 128 and 256 channels (2.9 M parameters)."""
    n_in = round(64 * width)
    layers: list[nn.Module] = [nn.Conv2d(3, n_in, 3, padding=1, bias=False)]
    for n_full, stride in ((64, 1), (128, 2), (256, 2)):
        n_out = round(n_full * width)
        for index in range(3):
            layers.append(PreActivationBottleneck(n_in, n_out, stride if index == 0 else 1))
            n_in = n_out
    return nn.Sequential(*layers, *_head(n_in))


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions; the shortcut skips pixels and fills channels up with zeros."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.stride, self.n_new = stride, n_out - n_in
        self.body = nn.Sequential(*conv_norm(n_in, n_out, stride), *conv_norm(n_out, n_out)[:-1])

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        if self.n_new or self.stride > 1:
            before = self.n_new // 2
            residual = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.n_new - before)
            )
        return F.relu(self.body(x) + residual)


def resnet56(width: float = 1.0) -> nn.Module:
    """ResNet56 for 32x32 images (0.85 M parameters)."""
    n_in = round(16 * width)
    layers: list[nn.Module] = conv_norm(3, n_in)
    for n_full, stride in ((16, 1), (32, 2), (64, 2)):
        n_out = round(n_full * width)
        for index in range(9):
            layers.append(BasicBlock(n_in, n_out, stride if index == 0 else 1))
            n_in = n_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, 10))


def mlp(width: float = 1.0) -> nn.Module:
    """Five fully connected layers on the pixels (8.4 M parameters)."""
    sizes = (3072, *(round(size * width) for size in (1536, 1536, 768, 256)))
    layers: list[nn.Module] = [nn.Flatten()]
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))


class Bottleneck(nn.Module):
    """Bottleneck block of ResNet50: 1x1, 3x3 (which has the stride) and 1x1 to four times the width."""

    def __init__(self, n_in: int, n_inner: int, stride: int) -> None:
        super().__init__()
        n_out = 4 * n_inner
        self.body = nn.Sequential(
            nn.Conv2d(n_in, n_inner, 1, bias=False), nn.BatchNorm2d(n_inner), nn.ReLU(inplace=True),
            *conv_norm(n_inner, n_inner, stride),
            nn.Conv2d(n_inner, n_out, 1, bias=False), nn.BatchNorm2d(n_out),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if n_in != n_out or stride > 1:
            conv = nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    """ResNet50 for 224x224 images (25.6 M parameters); names of weights are not those of torchvision."""
    stem = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, stride=2, padding=1))
    n_in = 64
    for n_inner, repeats, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(repeats):
            layers.append(Bottleneck(n_in, n_inner, stride if index == 0 else 1))
            n_in = 4 * n_inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, 1000))


CIFAR_NETWORKS: Mapping[str, Callable[[float], nn.Module]] = {
    "preresnet29": preresnet29,
    "resnet56": resnet56,
    "vgg16": vgg16,
    "wrn32": wide_resnet32,
    "mlp": mlp,
}
