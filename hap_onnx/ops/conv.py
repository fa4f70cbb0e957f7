"""Convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import onnx_graphsurgeon as gs
import torch.nn.functional as F
from torch import Tensor

from hap_onnx.ops.registry import macs_op, run_op
from hap_onnx.ops.window import pad_spatial, per_axis, resolve_pads

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def _check_rank(x: Tensor) -> int:
    n_axes = x.ndim - 2
    if not 1 <= n_axes <= 3:
        raise NotImplementedError(f"a convolution over {n_axes} spatial axes")
    return n_axes


# --- Conv ---


@run_op("Conv")
def Conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Convolve x [N, C, *spatial] with weight [M, C / group, *kernel]."""
    n_axes = _check_rank(x)
    strides, dilations = per_axis(strides, 1, n_axes), per_axis(dilations, 1, n_axes)
    begins, ends = resolve_pads(
        x.shape[2:], weight.shape[2:], strides, dilations, pads=pads, auto_pad=auto_pad
    )
    if begins != ends:  # torch pads both sides alike
        x, begins = pad_spatial(x, begins, ends), [0] * n_axes
    return _CONV[n_axes - 1](x, weight, bias, strides, begins, dilations, group)


@macs_op("Conv")
def _macs_conv(
    node: gs.Node, input_shapes: list[tuple[int, ...] | None], output_shapes: list[tuple[int, ...]]
) -> int:
    weight = input_shapes[1]
    assert weight is not None
    return prod(output_shapes[0]) * prod(weight[1:])


# --- ConvTranspose ---


@run_op("ConvTranspose")
def ConvTranspose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Transposed convolution of x [N, C, *spatial] with weight [C, M / group, *kernel]."""
    n_axes = _check_rank(x)
    strides, dilations = per_axis(strides, 1, n_axes), per_axis(dilations, 1, n_axes)
    extra = per_axis(output_padding, 0, n_axes)
    full = _CONV_TRANSPOSE[n_axes - 1](x, weight, None, strides, 0, 0, group, dilations)
    full = pad_spatial(full, [0] * n_axes, extra)  # [N, M, *spatial] before any cropping
    sizes = list(full.shape[2:])
    if output_shape:
        totals = [have - want for have, want in zip(sizes, output_shape[-n_axes:], strict=True)]
    elif auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
        totals = [max(have - want, 0) for have, want in zip(sizes, wanted, strict=True)]
    else:
        totals = None
    if totals is None:
        begins, ends = resolve_pads(sizes, sizes, strides, dilations, pads=pads, auto_pad=auto_pad)
    else:
        # The larger half lies at the end for SAME_UPPER, else at the beginning; what is missing is appended.
        begins = [max(total if auto_pad == "SAME_UPPER" else total + 1, 0) // 2 for total in totals]
        ends = [total - begin for total, begin in zip(totals, begins, strict=True)]
    out = pad_spatial(full, [-amount for amount in begins], [-amount for amount in ends])
    return out if bias is None else out + bias.reshape(-1, *[1] * n_axes)


@macs_op("ConvTranspose")
def _macs_conv_transpose(
    node: gs.Node, input_shapes: list[tuple[int, ...] | None], output_shapes: list[tuple[int, ...]]
) -> int:
    x, weight = input_shapes[:2]
    assert x is not None
    assert weight is not None
    return prod(x) * prod(weight[1:])
