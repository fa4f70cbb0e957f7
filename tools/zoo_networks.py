"""Hand-written networks of the zoo: constructs that the model libraries do not have, at small sizes.

Each class or function says what makes it worth having. All are untrained; ``tools.zoo_models`` gives them
their random weights, statistics and inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.networks import BasicBlock, conv_norm

# --- image to image ---


def double_conv(n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(*conv_norm(n_in, n_out), *conv_norm(n_out, n_out))


class UNet(nn.Module):
    """Encoder and decoder with concatenated skips; upsamples by transposed convolutions or bilinearly."""

    def __init__(self, *, bilinear: bool, width: int = 16, n_classes: int = 5) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.bilinear = bilinear
        self.down = nn.ModuleList(double_conv(a, b) for a, b in zip([3, *widths], widths))
        ups = list(zip(widths[:0:-1], widths[-2::-1]))
        self.up = nn.ModuleList(
            nn.Conv2d(a, b, 1) if bilinear else nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in ups
        )
        self.merge = nn.ModuleList(double_conv(2 * b, b) for _, b in ups)
        self.head = nn.Conv2d(width, n_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for index, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if index else x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge):
            skip = skips.pop()
            if self.bilinear:  # to the size of the skip, whatever it is: Shape nodes where sizes are dynamic
                x = F.interpolate(up(x), size=skip.shape[2:], mode="bilinear", align_corners=False)
            else:
                x = up(x)
            x = merge(torch.cat([skip, x], 1))
        return self.head(x)


class EspcnNet(nn.Module):
    """Super-resolution that ends in a pixel shuffle."""

    def __init__(self, scale: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 64, 5, padding=2), nn.Tanh(),
            nn.Conv2d(64, 32, 3, padding=1), nn.Tanh(),
            nn.Conv2d(32, scale**2, 3, padding=1), nn.PixelShuffle(scale),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class EdsrMidShuffle(nn.Module):
    """Residual super-resolution with its pixel shuffle in the middle: channels behind it are prunable."""

    def __init__(self, width: int = 32, n_blocks: int = 4) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
            )
            for _ in range(n_blocks)
        )
        self.up = nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        self.tail = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = start = self.head(x)
        for block in self.blocks:
            x = x + 0.5 * block(x)
        return self.tail(self.up(x + start))


class StyleNet(nn.Module):
    """Image transformation with InstanceNormalization, reflected borders and nearest upsampling."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()

        def conv(n_in: int, n_out: int, size: int, stride: int = 1) -> list[nn.Module]:
            return [nn.ReflectionPad2d(size // 2), nn.Conv2d(n_in, n_out, size, stride=stride)]

        def norm(n: int) -> list[nn.Module]:
            return [nn.InstanceNorm2d(n, affine=True), nn.ReLU()]

        self.encode = nn.Sequential(
            *conv(3, width, 5), *norm(width), *conv(width, 2 * width, 3, 2), *norm(2 * width)
        )
        self.residual = nn.Sequential(
            *conv(2 * width, 2 * width, 3), *norm(2 * width), *conv(2 * width, 2 * width, 3)
        )
        self.decode = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"),
            *conv(2 * width, width, 3), *norm(width), *conv(width, 3, 5), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(x)
        return self.decode(x + self.residual(x))


def dcgan_generator(n_noise: int = 32, width: int = 32) -> nn.Module:
    """Transposed convolutions with BatchNormalization behind them, from a vector to an image."""
    widths = [4 * width, 2 * width, width]
    layers: list[nn.Module] = [
        nn.Unflatten(1, (n_noise, 1, 1)),
        nn.ConvTranspose2d(n_noise, widths[0], 4, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(),
    ]  # fmt: skip
    for n_in, n_out in pairwise(widths):
        layers += [
            nn.ConvTranspose2d(n_in, n_out, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(n_out), nn.ReLU(),
        ]  # fmt: skip
    return nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], 3, 4, stride=2, padding=1), nn.Tanh())


# --- detectors ---


class ConvSilu(nn.Module):
    def __init__(self, n_in: int, n_out: int, size: int = 1, stride: int = 1, padding: int | None = None):
        super().__init__()
        padding = size // 2 if padding is None else padding
        self.conv = nn.Conv2d(n_in, n_out, size, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


class Squeeze3(nn.Module):
    """Two 1x1 branches, one with bottlenecks behind it, concatenated (C3)."""

    def __init__(self, n_in: int, n_out: int, n_blocks: int, *, shortcut: bool = True) -> None:
        super().__init__()
        inner, self.shortcut = n_out // 2, shortcut
        self.left, self.right = ConvSilu(n_in, inner), ConvSilu(n_in, inner)
        self.blocks = nn.ModuleList(
            nn.Sequential(ConvSilu(inner, inner), ConvSilu(inner, inner, 3)) for _ in range(n_blocks)
        )
        self.out = ConvSilu(2 * inner, n_out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(x)
        for block in self.blocks:
            y = y + block(y) if self.shortcut else block(y)
        return self.out(torch.cat([y, self.right(x)], 1))


class SplitStack(nn.Module):
    """One convolution split in two, each bottleneck's result concatenated with all before (C2f)."""

    def __init__(self, n_in: int, n_out: int, n_blocks: int, *, shortcut: bool = True) -> None:
        super().__init__()
        inner, self.shortcut = n_out // 2, shortcut
        self.first = ConvSilu(n_in, 2 * inner)
        self.blocks = nn.ModuleList(
            nn.Sequential(ConvSilu(inner, inner, 3), ConvSilu(inner, inner, 3)) for _ in range(n_blocks)
        )
        self.out = ConvSilu((2 + n_blocks) * inner, n_out)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]) if self.shortcut else block(parts[-1]))
        return self.out(torch.cat(parts, 1))


class PoolPyramid(nn.Module):
    """Three max pools in a row, concatenated with what they started from (SPPF)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.first, self.last = ConvSilu(n, n // 2), ConvSilu(2 * n, n)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, stride=1, padding=2))
        return self.last(torch.cat(parts, 1))


Stage = Callable[..., nn.Module]


class YoloBody(nn.Module):
    """Backbone and feature pyramid with nearest upsampling; returns three scales."""

    def __init__(self, stage: Stage, stem: nn.Module, depths: Sequence[int], *, reduce: bool) -> None:
        super().__init__()
        self.stem = stem
        widths = (16, 32, 64, 128, 256)
        self.down = nn.ModuleList(ConvSilu(a, b, 3, 2) for a, b in pairwise(widths))
        self.stages = nn.ModuleList(stage(n, n, depth) for n, depth in zip(widths[1:], depths))
        self.pyramid = PoolPyramid(256)
        # YOLOv5 narrows before it goes up, YOLOv8 does not.
        self.reduce = nn.ModuleList(
            [ConvSilu(256, 128), ConvSilu(128, 64)] if reduce else [nn.Identity(), nn.Identity()]
        )
        deep, middle = (128, 64) if reduce else (256, 128)
        self.up1, self.up2 = (
            stage(deep + 128, 128, 1, shortcut=False),
            stage(middle + 64, 64, 1, shortcut=False),
        )
        self.back = nn.ModuleList([ConvSilu(64, 64, 3, 2), ConvSilu(128, 128, 3, 2)])
        self.mid1, self.mid2 = (
            stage(64 + middle, 128, 1, shortcut=False),
            stage(128 + deep, 256, 1, shortcut=False),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        scales = []
        for down, stage in zip(self.down, self.stages):
            x = stage(down(x))
            scales.append(x)
        _, p3, p4, p5 = scales
        p5 = self.reduce[0](self.pyramid(p5))
        p4 = self.up1(torch.cat([F.interpolate(p5, scale_factor=2.0, mode="nearest"), p4], 1))
        p4 = self.reduce[1](p4)
        p3 = self.up2(torch.cat([F.interpolate(p4, scale_factor=2.0, mode="nearest"), p3], 1))
        n4 = self.mid1(torch.cat([self.back[0](p3), p4], 1))
        n5 = self.mid2(torch.cat([self.back[1](n4), p5], 1))
        return [p3, n4, n5]


def cell_grid(height: int, width: int) -> Tensor:
    """Coordinates [height, width, 2] of the cells of a feature map, x first."""
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([xs, ys], -1).float()


class Yolo5(nn.Module):
    """Detector with an anchor head: five-dimensional Reshape, Transpose, decoding, Concat of scales."""

    def __init__(self, n_classes: int = 8, n_anchors: int = 3, size: int = 64) -> None:
        super().__init__()
        self.n_anchors, self.n_values = n_anchors, n_classes + 5
        self.body = YoloBody(Squeeze3, ConvSilu(3, 16, 6, 2, 2), (1, 2, 3, 1), reduce=True)
        self.heads = nn.ModuleList(nn.Conv2d(n, n_anchors * self.n_values, 1) for n in (64, 128, 256))
        self.strides = (8, 16, 32)
        for index, stride in enumerate(self.strides):
            self.register_buffer(f"grid{index}", cell_grid(size // stride, size // stride))
            anchors = torch.rand(1, n_anchors, 1, 1, 2) * 4 * stride + stride
            self.register_buffer(f"anchors{index}", anchors)

    def forward(self, x: Tensor) -> Tensor:
        boxes = []
        for index, (head, y) in enumerate(zip(self.heads, self.body(x))):
            y = head(y)
            n, _, height, width = y.shape
            y = y.view(n, self.n_anchors, self.n_values, height, width).permute(0, 1, 3, 4, 2).contiguous()
            y = y.sigmoid()
            grid, anchors = getattr(self, f"grid{index}"), getattr(self, f"anchors{index}")
            xy = (y[..., :2] * 2 - 0.5 + grid) * self.strides[index]
            wh = (y[..., 2:4] * 2) ** 2 * anchors
            y = torch.cat([xy, wh, y[..., 4:]], -1)
            boxes.append(y.view(n, self.n_anchors * height * width, self.n_values))
        return torch.cat(boxes, 1)


class Yolo8(nn.Module):
    """Detector with a decoupled head whose box sides are expectations over a softmax (DFL)."""

    def __init__(self, n_classes: int = 8, n_bins: int = 16, size: int = 64) -> None:
        super().__init__()
        self.n_classes, self.n_bins = n_classes, n_bins
        self.body = YoloBody(SplitStack, ConvSilu(3, 16, 3, 2), (1, 2, 2, 1), reduce=False)

        def head(n_in: int, inner: int, n_out: int) -> nn.Module:
            return nn.Sequential(
                ConvSilu(n_in, inner, 3), ConvSilu(inner, inner, 3), nn.Conv2d(inner, n_out, 1)
            )

        self.sides = nn.ModuleList(head(n, 32, 4 * n_bins) for n in (64, 128, 256))
        self.classes = nn.ModuleList(head(n, 32, n_classes) for n in (64, 128, 256))
        self.expect = nn.Conv2d(n_bins, 1, 1, bias=False)
        strides = (8, 16, 32)
        centres = [(cell_grid(size // s, size // s) + 0.5).reshape(-1, 2) for s in strides]
        self.register_buffer("centres", torch.cat(centres).T[None])
        scale = [torch.full((len(c),), float(s)) for c, s in zip(centres, strides)]
        self.register_buffer("scale", torch.cat(scale)[None, None])

    def fix_constants(self) -> None:
        """The expectation has the bins' numbers as its weights, not random ones."""
        bins = torch.arange(self.n_bins, dtype=torch.float32)
        self.expect.weight.data = bins.reshape(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        scales = self.body(x)
        parts = [torch.cat([a(y), b(y)], 1) for a, b, y in zip(self.sides, self.classes, scales)]
        n = parts[0].shape[0]
        y = torch.cat([part.view(n, 4 * self.n_bins + self.n_classes, -1) for part in parts], 2)
        sides, classes = y.split((4 * self.n_bins, self.n_classes), 1)
        cells = sides.shape[2]
        sides = sides.view(n, 4, self.n_bins, cells).transpose(2, 1).softmax(1)
        sides = self.expect(sides).view(n, 4, cells)
        near, far = sides.chunk(2, 1)
        low, high = self.centres - near, self.centres + far
        boxes = torch.cat([(low + high) / 2, high - low], 1) * self.scale
        return torch.cat([boxes, classes.sigmoid()], 1)


# --- sequences ---


class Crnn(nn.Module):
    """Text recogniser: convolutions, height squeezed away, a bidirectional recurrent layer over the width."""

    def __init__(self, recurrent: type[nn.LSTM] | type[nn.GRU], n_classes: int = 37) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *conv_norm(1, 32), nn.MaxPool2d(2),
            *conv_norm(32, 64), nn.MaxPool2d((2, 2)),
            *conv_norm(64, 128), nn.MaxPool2d((2, 1)),
            *conv_norm(128, 128), nn.MaxPool2d((2, 1)),
        )  # fmt: skip
        self.recurrent = recurrent(2 * 128, 96, bidirectional=True)
        self.head = nn.Linear(192, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs(x)  # [N, 128, 2, W/4]
        y = y.flatten(1, 2).permute(2, 0, 1)  # [W/4, N, 256]
        y, _ = self.recurrent(y)
        return self.head(y).permute(1, 0, 2)


class CausalBlock(nn.Module):
    """Dilated convolutions padded on both sides, of which the future is cut off again by Slice."""

    def __init__(self, n_in: int, n_out: int, dilation: int) -> None:
        super().__init__()
        self.cut = 2 * dilation
        self.conv1 = nn.Conv1d(n_in, n_out, 3, padding=self.cut, dilation=dilation)
        self.conv2 = nn.Conv1d(n_out, n_out, 3, padding=self.cut, dilation=dilation)
        self.skip = nn.Conv1d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x)[:, :, : -self.cut])
        y = F.relu(self.conv2(y)[:, :, : -self.cut])
        return F.relu(y + self.skip(x))


class TemporalNet(nn.Module):
    """Temporal convolutional network; reads the last step."""

    def __init__(self, n_in: int = 8, width: int = 32, n_classes: int = 6) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            CausalBlock(n_in, width, 1), CausalBlock(width, width, 2), CausalBlock(width, width, 4)
        )
        self.head = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)[:, :, -1])


class GluDemixer(nn.Module):
    """One-dimensional encoder and decoder with gated linear units and additive skips."""

    def __init__(self, width: int = 16, n_levels: int = 2) -> None:
        super().__init__()
        encoders, decoders, n_in = [], [], 1
        for level in range(n_levels):
            n = width * 2**level
            encoders.append(
                nn.Sequential(
                    nn.Conv1d(n_in, n, 8, stride=4, padding=2), nn.ReLU(), nn.Conv1d(n, 2 * n, 1), nn.GLU(1)
                )
            )
            last: list[nn.Module] = [nn.ReLU()] if level else []
            decoders.append(
                nn.Sequential(
                    nn.Conv1d(n, 2 * n, 3, padding=1),
                    nn.GLU(1),
                    nn.ConvTranspose1d(n, n_in, 8, stride=4, padding=2),
                    *last,
                )
            )
            n_in = n
        self.encoders, self.decoders = nn.ModuleList(encoders), nn.ModuleList(decoders[::-1])

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
        for decoder in self.decoders:
            x = decoder(x + skips.pop())
        return x


class TinyEncoder(nn.Module):
    """``nn.TransformerEncoder``: packed query, key and value weights."""

    def __init__(self, width: int = 32, n_heads: int = 4, n_in: int = 10, n_classes: int = 5) -> None:
        super().__init__()
        self.embed = nn.Linear(n_in, width)
        layer = nn.TransformerEncoderLayer(
            width, n_heads, dim_feedforward=2 * width, batch_first=True, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class KeywordSpotter(nn.Module):
    """Depthwise separable convolutions on a spectrogram [N, 1, frames, bands]."""

    def __init__(self, width: int = 40, n_blocks: int = 3, n_classes: int = 12) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(1, width, (10, 4), stride=2, padding=(5, 1), bias=False),
            nn.BatchNorm2d(width), nn.ReLU(),
        ]  # fmt: skip
        for _ in range(n_blocks):
            layers += [
                nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
                nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            ]  # fmt: skip
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


# --- classifiers ---


def resnet20() -> nn.Module:
    """ResNet20 for 32x32 images; shortcuts skip pixels and pad channels."""
    layers, n_in = conv_norm(3, 16), 16
    for n_out, stride in ((16, 1), (32, 2), (64, 2)):
        for index in range(3):
            layers.append(BasicBlock(n_in, n_out, stride if index == 0 else 1))
            n_in = n_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class PreActivation(nn.Module):
    """Pre-activation bottleneck with expansion 4: BatchNormalization that cannot be folded."""

    def __init__(self, n_in: int, n_inner: int, stride: int) -> None:
        super().__init__()
        n_out = 4 * n_inner
        self.norms = nn.ModuleList([nn.BatchNorm2d(n_in), nn.BatchNorm2d(n_inner), nn.BatchNorm2d(n_inner)])
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(n_in, n_inner, 1, bias=False),
                nn.Conv2d(n_inner, n_inner, 3, stride=stride, padding=1, bias=False),
                nn.Conv2d(n_inner, n_out, 1, bias=False),
            ]
        )
        same = n_in == n_out and stride == 1
        self.shortcut = None if same else nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](x))
        residual = x if self.shortcut is None else self.shortcut(y)
        y = self.convs[0](y)
        y = self.convs[1](F.relu(self.norms[1](y)))
        return self.convs[2](F.relu(self.norms[2](y))) + residual


def preresnet29() -> nn.Module:
    """PreResNet29 with expansion 4 (0.3 M parameters)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    n_in = 16
    for n_inner, stride in ((16, 1), (32, 2), (64, 2)):
        for index in range(3):
            layers.append(PreActivation(n_in, n_inner, stride if index == 0 else 1))
            n_in = 4 * n_inner
    head = [nn.BatchNorm2d(n_in), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, 10)]
    return nn.Sequential(*layers, *head)


class GroupNormBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(n_out // 4, n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(n_out // 4, n_out)
        same = n_in == n_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(n_in, n_out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet20_groupnorm() -> nn.Module:
    """ResNet20 with GroupNormalization, groups of four channels."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.GroupNorm(4, 16), nn.ReLU()]
    n_in = 16
    for n_out, stride in ((16, 1), (32, 2), (64, 2)):
        for index in range(3):
            layers.append(GroupNormBlock(n_in, n_out, stride if index == 0 else 1))
            n_in = n_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def grouped_convs() -> nn.Module:
    """Grouped and depthwise convolutions in a row, with different numbers of groups."""
    return nn.Sequential(
        *conv_norm(3, 32),
        nn.Conv2d(32, 32, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, groups=8, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1, groups=64, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
        nn.Conv2d(128, 64, 1, groups=2, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, groups=4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


class DilatedNet(nn.Module):
    """Parallel dilated convolutions, concatenated and added."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, width, 2))
        self.branches = nn.ModuleList(nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in (1, 2, 3, 5))
        self.mix = nn.Sequential(*conv_norm(4 * width, 2 * width))
        self.tail = nn.Conv2d(2 * width, width, 3, padding=(2, 1), dilation=(2, 1))
        self.head = nn.Conv2d(width, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.mix(torch.cat([F.relu(branch(x)) for branch in self.branches], 1))
        return self.head(F.relu(self.tail(y) + x))


class LinearGate(nn.Module):
    """Squeeze-and-excitation with fully connected layers and a view back to an image."""

    def __init__(self, n: int, ratio: int = 4) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(n, n // ratio), nn.Linear(n // ratio, n)

    def forward(self, x: Tensor) -> Tensor:
        n, channels = x.shape[:2]
        gate = F.adaptive_avg_pool2d(x, 1).view(n, channels)
        gate = torch.sigmoid(self.up(F.relu(self.down(gate))))
        return x * gate.view(n, channels, 1, 1)


def se_linear() -> nn.Module:
    """Convolutions with squeeze-and-excitation gates."""
    return nn.Sequential(
        *conv_norm(3, 32), LinearGate(32),
        *conv_norm(32, 48, 2), LinearGate(48),
        *conv_norm(48, 72, 2), LinearGate(72),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(72, 10),
    )  # fmt: skip


def lenet() -> nn.Module:
    """Flattened feature maps: each channel is a block of columns of the first fully connected layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 25, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    """Fully connected layers with LayerNormalization and BatchNormalization."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(),
        nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 64), nn.Sigmoid(), nn.Linear(64, 10),
    )  # fmt: skip


def prelu_net() -> nn.Module:
    """Activations with parameters of their own: one slope per channel, one for all."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.PReLU(24),
        nn.Conv2d(24, 32, 3, stride=2, padding=1), nn.PReLU(1),
        nn.Conv2d(32, 40, 3, stride=2, padding=1), nn.PReLU(40),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10),
    )  # fmt: skip


class Conv3dNet(nn.Module):
    """Video classifier with residual three-dimensional convolutions."""

    def __init__(self, width: int = 16, n_classes: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, width, 3, padding=1, bias=False), nn.BatchNorm3d(width))
        self.down = nn.Conv3d(width, 2 * width, 3, stride=2, padding=1)
        self.body = nn.Sequential(
            nn.Conv3d(2 * width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm3d(2 * width), nn.ReLU(),
            nn.Conv3d(2 * width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm3d(2 * width),
        )  # fmt: skip
        self.head = nn.Linear(2 * width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(F.relu(self.stem(x))))
        x = F.max_pool3d(F.relu(x + self.body(x)), 2)
        return self.head(x.mean((2, 3, 4)))


class Siamese(nn.Module):
    """Two inputs through one shared trunk, a third through its own layer; two outputs."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.side = nn.Linear(8, width)
        self.embed = nn.Linear(width, 16)
        self.compare = nn.Linear(2 * 16 + width, 2)

    def forward(self, first: Tensor, second: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (self.embed(self.trunk(x).flatten(1)) for x in (first, second))
        joined = torch.cat([(a - b).abs(), a * b, F.relu(self.side(extra))], 1)
        return self.compare(joined), a


class ShuffleUnit(nn.Module):
    """Grouped 1x1 convolution, channels shuffled by view and transpose, depthwise, grouped 1x1 again."""

    def __init__(self, width: int = 24, groups: int = 3) -> None:
        super().__init__()
        self.groups = groups
        self.stem = nn.Sequential(*conv_norm(3, width, 2))
        self.first = nn.Conv2d(width, width, 1, groups=groups, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(width) for _ in range(3))
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.last = nn.Conv2d(width, width, 1, groups=groups, bias=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.norm1(self.first(x)))
        n, channels, height, width = y.shape
        y = y.view(n, self.groups, channels // self.groups, height, width).transpose(1, 2)
        y = y.reshape(n, channels, height, width)
        y = self.norm3(self.last(self.norm2(self.depthwise(y))))
        return self.head(F.relu(x + y).mean((2, 3)))
