"""Convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from torch import Tensor

from hap_onnx.ops.linear import LinearForm
from hap_onnx.ops.registry import bias_op, edit_op, flow_op, learn_inputs, linear_op, macs_op, run_op
from hap_onnx.ops.rules import bind_bias, constant_bias, constant_input, freeze_other_axis
from hap_onnx.ops.window import pad_spatial, per_axis, resolve_pads

if TYPE_CHECKING:
    from hap_onnx.coupling.channels import Flow
    from hap_onnx.surgery import Cut

learn_inputs("Conv", "ConvTranspose", inputs=(1, 2))

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


@flow_op("Conv")
def _flow_conv(node: gs.Node, flow: Flow) -> None:
    x, weight = node.inputs[:2]
    out = node.outputs[0]
    conv_group = int(node.attrs.get("group", 1))
    if not isinstance(weight, gs.Constant):
        flow.freeze(flow.ids(x), node, "its weight is computed by other nodes")
        return
    if freeze_other_axis(node, flow, x, 1):
        return
    n_out, width = weight.shape[0], weight.shape[1]
    if conv_group == 1:
        ids = flow.fresh(n_out)
        found = flow.ids(x)
        if found is not None:
            flow.bind(weight, 1, found.ids, "consumer", node)
            flow.read(node, 0)
        flow.bind(weight, 0, ids, "producer", node)
        bind_bias(node, flow, 2, ids)
        flow.put(out, 1, ids)
        return
    _flow_grouped(node, flow, conv_group, in_width=width, out_width=n_out // conv_group)


def _flow_grouped(node: gs.Node, flow: Flow, conv_group: int, *, in_width: int, out_width: int) -> None:
    """Grouped convolution: either whole groups go, or the same positions of every group.

    1. Whole groups: the ids of the input are joined within each group and pass through to the output.
    2. Positions: the ids of the input are joined across the groups; the output gets its own ids, one per
       position within a group.
    """
    x, weight = node.inputs[:2]
    out = node.outputs[0]
    found = flow.ids(x)
    ids = flow.fresh(out_width)  # made in either case, so that ids keep their numbers from pass to pass
    if found is None:
        # Groups of something that cannot go: positions of the output still can.
        flow.bind(weight, 0, np.tile(ids, conv_group), "producer", node)
        bind_bias(node, flow, 2, np.tile(ids, conv_group))
        flow.put(out, 1, np.tile(ids, conv_group))
        return
    if in_width == 1:
        whole, by_group = True, found.ids
    else:
        axis, merged = flow.merge(node, found.ids.reshape(conv_group, in_width))
        whole = axis == 0
        by_group = merged
    if whole:
        repeated = np.repeat(by_group, out_width)
        flow.bind(weight, 0, repeated, "follower", node)
        bind_bias(node, flow, 2, repeated)
        flow.put(out, 1, repeated)
    else:
        flow.bind(weight, 1, by_group, "consumer", node)
        flow.read(node, 0)
        tiled = np.tile(ids, conv_group)
        flow.bind(weight, 0, tiled, "producer", node)
        bind_bias(node, flow, 2, tiled)
        flow.put(out, 1, tiled)


@edit_op("Conv")
def _edit_conv(node: gs.Node, cut: Cut) -> None:
    kept, weight = cut.kept(node.inputs[0]), node.inputs[1]
    if int(node.attrs.get("group", 1)) == 1 or kept is None:
        return
    if cut.shape(weight)[1] == weight.shape[1]:  # whole groups went, not positions within each
        node.attrs["group"] = len(kept.positions) // weight.shape[1]


@bias_op("Conv")
def _bias_conv(node: gs.Node, ndim: int) -> np.ndarray | None:
    bias = constant_bias(node, 2, n_outputs=node.inputs[1].shape[0])
    return None if bias is None else bias.reshape(1, -1, *[1] * (ndim - 2))


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
        rows = _pick(padded, flat.flatten())
        rows = rows.reshape(n, len(positions), flat.shape[1], conv_group, channels // conv_group)
        return rows.permute(3, 0, 1, 4, 2).reshape(conv_group, n * len(positions), -1)

    def outputs(y: Tensor, positions: Tensor) -> Tensor:
        n, channels = y.shape[:2]
        rows = _pick(y, positions).reshape(n, len(positions), conv_group, channels // conv_group)
        return rows.permute(2, 0, 1, 3).reshape(conv_group, n * len(positions), -1)

    return LinearForm(
        data_index=0,
        weight_index=1,
        bias_index=constant_input(node, 2),
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


def _pick(x: Tensor, places: Tensor) -> Tensor:
    """What x [N, C, *spatial] has at flat places: [N, n_places, C], without a copy where it is all of x."""
    rows = x.flatten(2).transpose(1, 2)
    if len(places) == rows.shape[1] and torch.equal(places, torch.arange(len(places))):
        return rows
    return rows.index_select(1, places.to(x.device))


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


@flow_op("ConvTranspose")
def _flow_conv_transpose(node: gs.Node, flow: Flow) -> None:
    x, weight = node.inputs[:2]
    conv_group = int(node.attrs.get("group", 1))
    if not isinstance(weight, gs.Constant):
        flow.freeze(flow.ids(x), node, "its weight is computed by other nodes")
        return
    if freeze_other_axis(node, flow, x, 1):
        return
    found = flow.ids(x)
    ids = flow.fresh(weight.shape[1])
    if conv_group == 1:
        if found is not None:
            flow.bind(weight, 0, found.ids, "consumer", node)
            flow.read(node, 0)
        flow.bind(weight, 1, ids, "producer", node)
        bind_bias(node, flow, 2, ids)
        flow.put(node.outputs[0], 1, ids)
        return
    if found is None:
        return
    # Grouped: whole groups go, input and output together.
    in_width = weight.shape[0] // conv_group
    group_ids = flow.join_rows(found.ids.reshape(conv_group, in_width))
    flow.bind(weight, 0, np.repeat(group_ids, in_width), "follower", node)
    repeated = np.repeat(group_ids, weight.shape[1])
    bind_bias(node, flow, 2, repeated)
    flow.put(node.outputs[0], 1, repeated)


@bias_op("ConvTranspose")
def _bias_conv_transpose(node: gs.Node, ndim: int) -> np.ndarray | None:
    n_outputs = node.inputs[1].shape[1] * int(node.attrs.get("group", 1))
    bias = constant_bias(node, 2, n_outputs=n_outputs)
    return None if bias is None else bias.reshape(1, -1, *[1] * (ndim - 2))


@edit_op("ConvTranspose")
def _edit_conv_transpose(node: gs.Node, cut: Cut) -> None:
    x, conv_group = node.inputs[0], int(node.attrs.get("group", 1))
    if conv_group > 1:
        node.attrs["group"] = conv_group * cut.new_shape(x)[1] // cut.shape(x)[1]
