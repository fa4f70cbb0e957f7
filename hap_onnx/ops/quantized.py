"""Quantized numbers: what stands between them and real ones, and operators that compute with them.

The twin computes QuantizeLinear and DequantizeLinear on real numbers that happen to be whole, with the
gradient of the identity wherever nothing was clipped: a model is ranked and trained as if its activations
were smooth. Operators that multiply integers run in onnxruntime, and their channels stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING

import onnx
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from hap_onnx.ops.registry import flow_op, macs_op, run_op

if TYPE_CHECKING:
    from hap_onnx.coupling.channels import Flow

_MICROSOFT = "com.microsoft"
_QUANTIZER = "QuantizeLinear"
_DEQUANTIZER = "DequantizeLinear"
_DOMAINS = ("", "ai.onnx", _MICROSOFT)

# At which inputs operators on quantized numbers have weights; others but the first are scales and the like.
_WEIGHTS: Mapping[tuple[str, str], tuple[int, ...]] = MappingProxyType(
    {
        ("", _QUANTIZER): (0,),
        ("", _DEQUANTIZER): (0,),
        (_MICROSOFT, _QUANTIZER): (0,),
        (_MICROSOFT, _DEQUANTIZER): (0,),
        ("", "ConvInteger"): (1,),
        ("", "MatMulInteger"): (1,),
        ("", "QLinearConv"): (3, 8),
        ("", "QLinearMatMul"): (3,),
        (_MICROSOFT, "QGemm"): (3, 6),
        (_MICROSOFT, "MatMulIntegerToFloat"): (1,),
        (_MICROSOFT, "DynamicQuantizeMatMul"): (1,),
    }
)


def _key(op_type: str, domain: str) -> tuple[str, str]:
    return ("" if domain == "ai.onnx" else domain, op_type)


def is_quantizer(op_type: str, domain: str = "") -> bool:
    """Say whether an operator turns real numbers into quantized ones."""
    return op_type == _QUANTIZER and domain in _DOMAINS


def is_dequantizer(op_type: str, domain: str = "") -> bool:
    """Say whether an operator turns quantized numbers into real ones."""
    return op_type == _DEQUANTIZER and domain in _DOMAINS


def is_quantized(op_type: str, domain: str = "") -> bool:
    """Say whether an operator makes, reads or computes with quantized numbers."""
    return _key(op_type, domain) in _WEIGHTS


def quantized_weights(op_type: str, domain: str = "") -> tuple[int, ...] | None:
    """Return the inputs at which an operator on quantized numbers has weights; None for other operators."""
    return _WEIGHTS.get(_key(op_type, domain))


# --- QuantizeLinear and DequantizeLinear ---

_STEPS: Mapping[torch.dtype, tuple[int, int]] = {
    torch.uint8: (0, 255),
    torch.int8: (-128, 127),
    torch.int16: (-32768, 32767),
}


def _along(values: Tensor, axis: int, ndim: int) -> Tensor:
    """Bring one number per position of an axis (or one for all) into the shape that is broadcast."""
    if values.ndim > 1:
        raise NotImplementedError("scales in blocks")
    if values.numel() == 1:
        return values.reshape(())
    return values.reshape([-1 if index == axis % ndim else 1 for index in range(ndim)])


@run_op(_QUANTIZER)
@run_op(_QUANTIZER, domain=_MICROSOFT)
def QuantizeLinear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
    readers: tuple[tuple[str, str], ...] = (),
) -> Tensor:
    """Round x / scale half to even, add the zero point, clip; real numbers if all readers want such."""
    dtype = torch.uint8 if zero_point is None else zero_point.dtype
    if dtype not in _STEPS or block_size or precision or (output_dtype and zero_point is None):
        raise NotImplementedError("quantization to other types than 8 and 16 bits, or in blocks")
    if not x.is_floating_point():
        raise NotImplementedError("quantization of integers")
    ratio = x / _along(scale, axis, x.ndim)
    steps = ratio + (torch.round(ratio) - ratio).detach()
    if zero_point is not None:
        steps = steps + _along(zero_point, axis, x.ndim).to(steps)
    steps = steps.clamp(*_STEPS[dtype])
    is_real = bool(readers) and all(is_dequantizer(*reader) for reader in readers)
    return steps if is_real else steps.detach().to(dtype)


@run_op(_DEQUANTIZER)
@run_op(_DEQUANTIZER, domain=_MICROSOFT)
def DequantizeLinear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """Return (x - zero_point) * scale."""
    if block_size or output_dtype not in (0, onnx.TensorProto.FLOAT):
        raise NotImplementedError("scales in blocks, or another type of result")
    scale = _along(scale, axis, x.ndim)
    difference = x.to(device=scale.device)
    if zero_point is not None:
        zero = _along(zero_point, axis, x.ndim).to(difference.device)
        wide = difference if difference.is_floating_point() else difference.to(torch.int64)
        difference = wide - zero.to(wide.dtype)
    return difference.to(scale.dtype) * scale


@flow_op(_QUANTIZER, _DEQUANTIZER)
def _flow_linear(node: gs.Node, flow: Flow) -> None:
    """Channels pass; scales and zero points along their axis lose what they lose."""
    x, out = node.inputs[0], node.outputs[0]
    found = flow.ids(x)
    if found is None:
        return
    axis = int(node.attrs.get("axis", 1))
    for parameter in node.inputs[1:]:
        if not parameter.name or flow.shape(parameter) in ((), (1,)):
            continue
        shape = flow.shape(parameter)
        if len(shape) != 1 or int(node.attrs.get("block_size", 0)) or not isinstance(parameter, gs.Constant):
            flow.freeze(found, node, "its scales are computed, or come in blocks")
            return
        if axis % len(flow.shape(x)) == found.axis:
            flow.bind(parameter, 0, found.ids, "follower", node)
    flow.put(out, found.axis, found.ids)


flow_op(_QUANTIZER, _DEQUANTIZER, domain=_MICROSOFT)(_flow_linear)


# --- Operators that multiply integers ---

_REASON = (
    "{} multiplies integers, and such nodes are not pruned (float ones between QuantizeLinear and "
    "DequantizeLinear are)"
)
# Where they have their weight, and its axis of output channels.
_OUTPUT_AXIS: Mapping[tuple[str, str], tuple[int, int]] = {
    ("", "ConvInteger"): (1, 0),
    ("", "MatMulInteger"): (1, -1),
    ("", "QLinearConv"): (3, 0),
    ("", "QLinearMatMul"): (3, -1),
    (_MICROSOFT, "MatMulIntegerToFloat"): (1, -1),
    (_MICROSOFT, "DynamicQuantizeMatMul"): (1, -1),
    (_MICROSOFT, "QGemm"): (3, -1),
}


def _flow_integers(node: gs.Node, flow: Flow) -> None:
    """Freeze what goes in, and name the node among those that cannot be pruned."""
    reason = _REASON.format(node.op)
    for tensor in node.inputs:
        flow.freeze(flow.ids(tensor), node, reason)
    index, axis = _OUTPUT_AXIS[_key(node.op, node.domain or "")]
    weight = node.inputs[index]
    if isinstance(weight, gs.Constant) and weight.shape:
        axis = axis % len(weight.shape)
        if node.op == "QGemm" and int(node.attrs.get("transB", 0)):
            axis = 0
        ids = flow.fresh(weight.shape[axis])
        flow.bind(weight, axis, ids, "producer", node)
        flow.freeze(ids, node, reason)


for _domain, _op_type in _OUTPUT_AXIS:
    flow_op(_op_type, domain=_domain)(_flow_integers)


@macs_op("QLinearConv")
def _macs_q_linear_conv(
    node: gs.Node, input_shapes: list[tuple[int, ...] | None], output_shapes: list[tuple[int, ...]]
) -> int:
    weight = input_shapes[3]
    assert weight is not None
    return prod(output_shapes[0]) * prod(weight[1:])


@macs_op("ConvInteger")
def _macs_conv_integer(
    node: gs.Node, input_shapes: list[tuple[int, ...] | None], output_shapes: list[tuple[int, ...]]
) -> int:
    weight = input_shapes[1]
    assert weight is not None
    return prod(output_shapes[0]) * prod(weight[1:])


def _macs_product(
    node: gs.Node, input_shapes: list[tuple[int, ...] | None], output_shapes: list[tuple[int, ...]]
) -> int:
    a = input_shapes[0]
    assert a is not None
    return prod(output_shapes[0]) * a[-1]


macs_op("MatMulInteger", "QLinearMatMul")(_macs_product)
macs_op("MatMulIntegerToFloat", "DynamicQuantizeMatMul", domain=_MICROSOFT)(_macs_product)


@macs_op("QGemm", domain=_MICROSOFT)
def _macs_q_gemm(
    node: gs.Node, input_shapes: list[tuple[int, ...] | None], output_shapes: list[tuple[int, ...]]
) -> int:
    a = input_shapes[0]
    assert a is not None
    return prod(output_shapes[0]) * a[0 if int(node.attrs.get("transA", 0)) else 1]
