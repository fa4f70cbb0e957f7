"""Contractions as matrix products: what statistics, ranking and refit work on.

A contraction computes, for each sample and each output position, ``y = W x + b`` with the same W at every
position. ``LinearForm`` brings the inputs of a node into rows x, its outputs into rows y and its weight into
the matrix W, for every kind of convolution and matrix product alike. Features are ordered channel by channel,
the taps of a kernel within.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from hap_onnx.ops.registry import linear_op
from hap_onnx.ops.window import pad_spatial, per_axis, resolve_pads


@dataclass(frozen=True)
class LinearForm:
    """The matrix form of one node.

    Shapes, with g conv groups, P output positions per sample, F features and O outputs per conv group:

    * ``patches(x, positions)``: the node's data input -> [g, N * n_positions, F]
    * ``outputs(y, positions)``: the node's output -> [g, N * n_positions, O]
    * ``to_matrix(w)``: the weight -> [g, O, F]; ``to_weight(matrix, shape)`` is its inverse
    * ``n_taps``: features per position of the weight's input axis ``in_axis``

    ``positions`` is an int64 tensor of indices below ``n_positions(y)``.
    """

    data_index: int
    weight_index: int
    bias_index: int | None
    conv_group: int
    n_taps: int
    in_axis: int
    out_axis: int
    channel_axis: int  # of the data input and of the output
    patches: Callable[[Tensor, Tensor], Tensor]
    outputs: Callable[[Tensor, Tensor], Tensor]
    n_positions: Callable[[Tensor], int]
    to_matrix: Callable[[Tensor], Tensor]
    to_weight: Callable[[Tensor, tuple[int, ...]], Tensor]


def _constant_input(node: gs.Node, index: int) -> int | None:
    """Index of a constant input, None if it is absent or computed."""
    present = len(node.inputs) > index and node.inputs[index].name
    return index if present and isinstance(node.inputs[index], gs.Constant) else None


@linear_op("Conv")
def _linear_conv(node: gs.Node) -> LinearForm | None:
    weight = node.inputs[1]
    if not isinstance(weight, gs.Constant) or len(weight.shape) < 3:
        return None
    attributes = node.attrs
    kernel = list(weight.shape[2:])
    n_axes, conv_group = len(kernel), int(attributes.get("group", 1))
    strides = per_axis(attributes.get("strides"), 1, n_axes)
    dilations = per_axis(attributes.get("dilations"), 1, n_axes)

    def patches(x: Tensor, positions: Tensor) -> Tensor:
        begins, ends = resolve_pads(
            x.shape[2:],
            kernel,
            strides,
            dilations,
            pads=attributes.get("pads"),
            auto_pad=attributes.get("auto_pad", "NOTSET"),
        )
        padded = pad_spatial(x, begins, ends)
        sizes = padded.shape[2:]
        n_out = [
            (size - dilation * (width - 1) - 1) // stride + 1
            for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True)
        ]
        flat = torch.zeros(len(positions), 1, dtype=torch.int64)
        rest = positions
        places = []
        for extent in reversed(n_out):
            places.append(rest % extent)
            rest = rest // extent
        for place, size, width, stride, dilation in zip(
            reversed(places), sizes, kernel, strides, dilations, strict=True
        ):
            taps = place[:, None] * stride + torch.arange(width) * dilation  # [n_positions, width]
            flat = (flat[:, :, None] * size + taps[:, None, :]).flatten(1)
        n, channels = x.shape[:2]
        gathered = padded.flatten(2)[:, :, flat.flatten().to(x.device)]
        gathered = gathered.reshape(n, conv_group, channels // conv_group, len(positions), flat.shape[1])
        return gathered.permute(1, 0, 3, 2, 4).reshape(conv_group, n * len(positions), -1)

    def outputs(y: Tensor, positions: Tensor) -> Tensor:
        n, channels = y.shape[:2]
        picked = y.flatten(2)[:, :, positions.to(y.device)]
        picked = picked.reshape(n, conv_group, channels // conv_group, -1)
        return picked.permute(1, 0, 3, 2).reshape(conv_group, n * len(positions), -1)

    return LinearForm(
        data_index=0,
        weight_index=1,
        bias_index=_constant_input(node, 2),
        conv_group=conv_group,
        n_taps=prod(kernel),
        in_axis=1,
        out_axis=0,
        channel_axis=1,
        patches=patches,
        outputs=outputs,
        n_positions=lambda y: prod(y.shape[2:]),
        to_matrix=lambda w: w.reshape(conv_group, w.shape[0] // conv_group, -1),
        to_weight=lambda matrix, shape: matrix.reshape(shape),
    )


def _product_form(*, transposed: bool, bias_index: int | None) -> LinearForm:
    """Matrix form of ``x @ w`` (or ``x @ w.T``) over the last axis of x."""

    def rows(x: Tensor, positions: Tensor) -> Tensor:
        middle = x.reshape(x.shape[0], -1, x.shape[-1])[:, positions.to(x.device)]
        return middle.reshape(1, -1, x.shape[-1])

    return LinearForm(
        data_index=0,
        weight_index=1,
        bias_index=bias_index,
        conv_group=1,
        n_taps=1,
        in_axis=1 if transposed else 0,
        out_axis=0 if transposed else 1,
        channel_axis=-1,
        patches=rows,
        outputs=rows,
        n_positions=lambda y: prod(y.shape[1:-1]),
        to_matrix=lambda w: (w if transposed else w.T)[None],
        to_weight=lambda matrix, shape: matrix[0] if transposed else matrix[0].T.contiguous(),
    )


@linear_op("Gemm")
def _linear_gemm(node: gs.Node) -> LinearForm | None:
    attributes = node.attrs
    scaled = attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0
    if not isinstance(node.inputs[1], gs.Constant) or attributes.get("transA", 0) or scaled:
        return None
    bias_index = _constant_input(node, 2)
    n_out = node.inputs[1].shape[0 if attributes.get("transB", 0) else 1]
    if bias_index is not None and node.inputs[2].values.size != n_out:
        bias_index = None
    return _product_form(transposed=bool(attributes.get("transB", 0)), bias_index=bias_index)


@linear_op("MatMul")
def _linear_matmul(node: gs.Node) -> LinearForm | None:
    a, b = node.inputs
    if not isinstance(b, gs.Constant) or isinstance(a, gs.Constant) or len(b.shape) != 2:
        return None
    return _product_form(transposed=False, bias_index=None)
