"""Normalisations and softmax."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from torch import Tensor

from hap_onnx.ops.arguments import as_ints, normalise_axis
from hap_onnx.ops.registry import edit_op, flow_op, keep_constant, learn_inputs, run_op
from hap_onnx.ops.rules import freeze_other_axis

if TYPE_CHECKING:
    from hap_onnx.coupling.channels import Flow
    from hap_onnx.surgery import Cut

learn_inputs("BatchNormalization", "InstanceNormalization", "GroupNormalization", inputs=(1, 2))
learn_inputs("LayerNormalization", inputs=(1, 2))
learn_inputs("RMSNormalization", "SimplifiedLayerNormalization", inputs=(1,))


def _standardise(x: Tensor, axes: list[int], epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x - mean) / std over ``axes``, the mean and the inverse deviation."""
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    inverse = torch.rsqrt((centred * centred).mean(axes, keepdim=True) + epsilon)
    return centred * inverse, mean, inverse


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """View one value per channel so that it broadcasts against x [N, C, ...]."""
    return values.reshape(1, -1, *[1] * (x.ndim - 2))


# --- BatchNormalization ---


@run_op("BatchNormalization")
def BatchNormalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
    training_mode: int = 0,
    n_outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """Normalise x [N, C, ...] by running statistics, or by the batch's own in training mode."""
    if not spatial:
        raise NotImplementedError("BatchNormalization with spatial=0")
    if not training_mode:
        if n_outputs > 1:
            raise NotImplementedError("BatchNormalization with statistics as outputs outside training mode")
        # Statistics are parameters here, and torch's own function cannot differentiate by them.
        factor = scale * torch.rsqrt(var + epsilon)
        return x * _per_channel(factor, x) + _per_channel(bias - mean * factor, x)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    batch_var, batch_mean = torch.var_mean(x, axes, correction=0)
    inverse = torch.rsqrt(batch_var + epsilon)
    y = (x - _per_channel(batch_mean, x)) * _per_channel(inverse * scale, x) + _per_channel(bias, x)
    running_mean = mean * momentum + batch_mean * (1 - momentum)
    running_var = var * momentum + batch_var * (1 - momentum)
    return y, running_mean, running_var


# --- InstanceNormalization, GroupNormalization ---


@run_op("InstanceNormalization")
def InstanceNormalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Normalise each channel of each sample of x [N, C, *spatial] over its positions."""
    standard, _, _ = _standardise(x, list(range(2, x.ndim)), epsilon)
    return standard * _per_channel(scale, x) + _per_channel(bias, x)


@run_op("GroupNormalization", since=18)
def GroupNormalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Normalise groups of channels of x [N, C, *spatial]; scale per channel, or per group before 21."""
    grouped = x.reshape(x.shape[0], num_groups, -1)
    standard = _standardise(grouped, [2], epsilon)[0].reshape(x.shape)
    if scale.numel() != x.shape[1]:
        width = x.shape[1] // num_groups
        scale, bias = scale.repeat_interleave(width), bias.repeat_interleave(width)
    return standard * _per_channel(scale, x) + _per_channel(bias, x)


keep_constant("BatchNormalization")


@flow_op("BatchNormalization", "InstanceNormalization")
def _flow_channel_norm(node: gs.Node, flow: Flow) -> None:
    x = node.inputs[0]
    found = flow.ids(x)
    if found is None:
        return
    if freeze_other_axis(node, flow, x, 1):
        return
    if int(node.attrs.get("training_mode", 0)):
        flow.freeze(found, node, "BatchNormalization in training mode")
        return
    for tensor in node.inputs[1:]:
        if not isinstance(tensor, gs.Constant):
            flow.freeze(found, node, f"its statistic '{tensor.name}' is computed by other nodes")
            return
        flow.bind(tensor, 0, found.ids, "follower", node)
    flow.put(node.outputs[0], 1, found.ids)


@flow_op("GroupNormalization")
def _flow_group_norm(node: gs.Node, flow: Flow) -> None:
    """Whole groups go."""
    x = node.inputs[0]
    found = flow.ids(x)
    if found is None or freeze_other_axis(node, flow, x, 1):
        return
    parameters = node.inputs[1:3]
    if not all(
        isinstance(tensor, gs.Constant) and tensor.shape[0] == len(found.ids) for tensor in parameters
    ):
        flow.freeze(found, node, "GroupNormalization without a constant scale and bias for each channel")
        return
    n_groups = int(node.attrs["num_groups"])
    ids = np.repeat(flow.join_rows(found.ids.reshape(n_groups, -1)), len(found.ids) // n_groups)
    for tensor in parameters:
        flow.bind(tensor, 0, ids, "follower", node)
    flow.put(node.outputs[0], 1, ids)


@edit_op("GroupNormalization")
def _edit_group_norm(node: gs.Node, cut: Cut) -> None:
    x, n_groups = node.inputs[0], int(node.attrs["num_groups"])
    node.attrs["num_groups"] = n_groups * cut.new_shape(x)[1] // cut.shape(x)[1]


# --- LayerNormalization and relatives ---


@run_op("LayerNormalization")
def LayerNormalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    n_outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """Normalise x over the axes from ``axis`` on; further outputs are the mean and inverse deviation."""
    axes = list(range(normalise_axis(axis, x.ndim), x.ndim))
    width = x.shape[axes[0] :]
    if n_outputs == 1 and scale.shape == width and (bias is None or bias.shape == width):
        return F.layer_norm(x, width, scale, bias, epsilon)
    standard, mean, inverse = _standardise(x, axes, epsilon)
    y = standard * scale
    return (y if bias is None else y + bias), mean, inverse


@run_op("RMSNormalization", since=23)
def RMSNormalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Divide x by its root mean square over the axes from ``axis`` on."""
    axes = list(range(normalise_axis(axis, x.ndim), x.ndim))
    return x * torch.rsqrt((x * x).mean(axes, keepdim=True) + epsilon) * scale


@run_op("SimplifiedLayerNormalization")
def SimplifiedLayerNormalization(
    x: Tensor,
    scale: Tensor,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    n_outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """onnxruntime's own name for RMSNormalization, in the default domain."""
    axes = list(range(normalise_axis(axis, x.ndim), x.ndim))
    inverse = torch.rsqrt((x * x).mean(axes, keepdim=True) + epsilon)
    return x * inverse * scale, inverse


@run_op("MeanVarianceNormalization")
def MeanVarianceNormalization(x: Tensor, *, axes: list[int] | None = None) -> Tensor:
    """Standardise x over ``axes`` (default: all but channels)."""
    over = as_ints(axes) if axes is not None else [0, 2, 3]
    mean = x.mean(over, keepdim=True)
    deviation = torch.sqrt((x * x).mean(over, keepdim=True) - mean * mean)
    return (x - mean) / (deviation + 1e-9)


@run_op("LpNormalization")
def LpNormalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """Divide x by its p-norm along ``axis``; a norm of zero gives zero."""
    norm = x.abs().sum(axis, keepdim=True) if p == 1 else (x * x).sum(axis, keepdim=True).sqrt()
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@run_op("LRN")
def LRN(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    """Divide x [N, C, ...] by a power of the mean square over ``size`` neighbouring channels."""
    before = (size - 1) // 2
    squares = (x * x).reshape(x.shape[0], 1, x.shape[1], prod(x.shape[2:]))
    padded = F.pad(squares, (0, 0, before, size - 1 - before))
    mean = F.avg_pool2d(padded, (size, 1), 1).reshape(x.shape)
    return x / (bias + alpha * mean) ** beta


@flow_op("LayerNormalization", "LpNormalization", "RMSNormalization")
def _flow_normalised_axes(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    axis = int(node.attrs.get("axis", -1)) % len(flow.shape(node.inputs[0]))
    if found.axis >= axis:
        flow.freeze(found, node, f"{node.op} normalises over the channels")
    else:
        flow.put(node.outputs[0], found.axis, found.ids)


# --- Softmax, LogSoftmax, Hardmax ---


def _as_matrix(x: Tensor, axis: int) -> Tensor:
    """Flatten x to two axes at ``axis``, as these operators did before opset 13."""
    return x.reshape(prod(x.shape[: normalise_axis(axis, x.ndim)]), -1)


@run_op("Softmax")
def Softmax_1(x: Tensor, *, axis: int = 1) -> Tensor:
    """Softmax over all axes from ``axis`` on."""
    return torch.softmax(_as_matrix(x, axis), 1).reshape(x.shape)


@run_op("Softmax", since=13)
def Softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Softmax over one axis."""
    return torch.softmax(x, axis)


@run_op("LogSoftmax")
def LogSoftmax_1(x: Tensor, *, axis: int = 1) -> Tensor:
    """Log-softmax over all axes from ``axis`` on."""
    return torch.log_softmax(_as_matrix(x, axis), 1).reshape(x.shape)


@run_op("LogSoftmax", since=13)
def LogSoftmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Log-softmax over one axis."""
    return torch.log_softmax(x, axis)


def first_max(x: Tensor, axis: int) -> Tensor:
    """Return the index of the first maximum along ``axis``, kept as an axis of size 1."""
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    positions = torch.arange(x.shape[axis], device=x.device).reshape(shape)
    is_max = x == x.amax(axis, keepdim=True)
    return torch.where(is_max, positions, x.shape[axis] - 1).amin(axis, keepdim=True)


@run_op("Hardmax")
def Hardmax_1(x: Tensor, *, axis: int = 1) -> Tensor:
    """One at the first maximum over all axes from ``axis`` on, zero elsewhere."""
    return Hardmax(_as_matrix(x, axis), axis=1).reshape(x.shape)


@run_op("Hardmax", since=13)
def Hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """One at the first maximum along one axis, zero elsewhere."""
    return torch.zeros_like(x).scatter(axis, first_max(x, axis), 1)


@flow_op("Softmax", "LogSoftmax", "Hardmax")
def _flow_softmax(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    ndim = len(flow.shape(node.inputs[0]))
    flat = flow.graph.opset < 13  # before, all axes from `axis` on were normalised together
    axis = int(node.attrs.get("axis", 1 if flat else -1)) % ndim
    if found.axis == axis or (flat and found.axis > axis):
        flow.freeze(found, node, f"{node.op} normalises over the channels")
    else:
        flow.put(node.outputs[0], found.axis, found.ids)
