"""Where the windows of convolution and pooling lie: padding, ``auto_pad`` and output sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def per_axis(values: Sequence[int] | None, default: int, n_axes: int) -> list[int]:
    """Return one entry per spatial axis, filled with the default of an absent attribute."""
    if not values:
        return [default] * n_axes
    if len(values) != n_axes:
        raise ValueError(f"expected {n_axes} entries, one per spatial axis, got {list(values)}")
    return list(values)


def split_pads(pads: Sequence[int] | None, n_axes: int) -> tuple[list[int], list[int]]:
    """Return ONNX ``pads`` (all begins, then all ends) as (begins, ends)."""
    if not pads:
        return [0] * n_axes, [0] * n_axes
    if len(pads) != 2 * n_axes:
        raise ValueError(f"expected {2 * n_axes} pads for {n_axes} spatial axes, got {list(pads)}")
    return list(pads[:n_axes]), list(pads[n_axes:])


def resolve_pads(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    *,
    pads: Sequence[int] | None,
    auto_pad: str,
) -> tuple[list[int], list[int]]:
    """Return (begins, ends) of the padding of a convolution or pooling over ``sizes``."""
    if auto_pad in ("", "NOTSET"):
        return split_pads(pads, len(sizes))
    if auto_pad == "VALID":
        return split_pads(None, len(sizes))
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        raise ValueError(f"unknown auto_pad {auto_pad!r}")
    begins, ends = [], []
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        n_out = -(-size // stride)
        total = max((n_out - 1) * stride + dilation * (width - 1) + 1 - size, 0)
        small, large = total // 2, total - total // 2
        begins.append(small if auto_pad == "SAME_UPPER" else large)
        ends.append(large if auto_pad == "SAME_UPPER" else small)
    return begins, ends


def pad_spatial(x: Tensor, begins: Sequence[int], ends: Sequence[int], *, value: float = 0.0) -> Tensor:
    """Pad the last ``len(begins)`` axes of ``x`` with a constant (negative amounts crop)."""
    if not any(begins) and not any(ends):
        return x
    amounts = [amount for pair in zip(reversed(begins), reversed(ends), strict=True) for amount in pair]
    return F.pad(x, amounts, value=value)


def n_windows(
    size: int, begin: int, end: int, *, width: int, stride: int, dilation: int, ceil_mode: bool
) -> int:
    """Return how many windows fit; with ``ceil_mode`` the last must begin before the end padding."""
    span = size + begin + end - dilation * (width - 1) - 1
    if not ceil_mode:
        return span // stride + 1
    count = -(-span // stride) + 1
    return count - 1 if (count - 1) * stride >= size + begin else count


def window_sum(x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """Sum ``x`` [N, C, *spatial] over windows, without padding."""
    n_axes = len(kernel)
    flat = x.reshape(-1, 1, *x.shape[2:])
    ones = torch.ones(1, 1, *kernel, dtype=x.dtype, device=x.device)
    conv = (F.conv1d, F.conv2d, F.conv3d)[n_axes - 1]
    summed = conv(flat, ones, None, list(strides), 0, list(dilations))
    return summed.reshape(*x.shape[:2], *summed.shape[2:])
