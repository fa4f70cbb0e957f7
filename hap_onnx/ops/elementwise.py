"""Operators that act on each element by itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from torch import Tensor

from hap_onnx.ops.arguments import as_floats, is_float, together
from hap_onnx.ops.registry import find_flow, flow_op, keep_constant, learn_inputs, run_op

if TYPE_CHECKING:
    from hap_onnx.coupling.channels import Flow

# --- One input, no attributes ---


def _register_plain(table: dict[str, Callable[..., Tensor]]) -> None:
    for op_type, function in table.items():
        function.__name__ = function.__qualname__ = op_type  # tracebacks name the operator
        run_op(op_type)(function)


_register_plain(
    {
        "Abs": lambda x: torch.abs(x),
        "Acos": lambda x: torch.acos(x),
        "Acosh": lambda x: torch.acosh(x),
        "Asin": lambda x: torch.asin(x),
        "Asinh": lambda x: torch.asinh(x),
        "Atan": lambda x: torch.atan(x),
        "Atanh": lambda x: torch.atanh(x),
        "BitwiseNot": lambda x: torch.bitwise_not(x),
        "Ceil": lambda x: torch.ceil(x),
        "Cos": lambda x: torch.cos(x),
        "Cosh": lambda x: torch.cosh(x),
        "Erf": lambda x: torch.erf(x),
        "Exp": lambda x: torch.exp(x),
        "Floor": lambda x: torch.floor(x),
        "HardSwish": lambda x: x * (x / 6 + 0.5).clamp(0, 1),
        "Identity": lambda x: x,
        "IsNaN": lambda x: torch.isnan(x),
        "Log": lambda x: torch.log(x),
        "Mish": lambda x: x * torch.tanh(F.softplus(x)),
        "Neg": lambda x: torch.neg(x),
        "Not": lambda x: torch.logical_not(x),
        "Reciprocal": lambda x: torch.reciprocal(x),
        "Relu": lambda x: torch.relu(x),
        "Round": lambda x: torch.round(x),  # half to even, as ONNX wants
        "Sigmoid": lambda x: torch.sigmoid(x),
        "Sign": lambda x: torch.sign(x),
        "Sin": lambda x: torch.sin(x),
        "Sinh": lambda x: torch.sinh(x),
        "Softplus": lambda x: F.softplus(x),
        "Softsign": lambda x: x / (1 + torch.abs(x)),
        "Sqrt": lambda x: torch.sqrt(x),
        "Tan": lambda x: torch.tan(x),
        "Tanh": lambda x: torch.tanh(x),
    }
)


# --- One input with attributes ---


@run_op("Celu")
def Celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """max(0, x) + min(0, alpha * (exp(x / alpha) - 1))."""
    return F.celu(x, alpha)


@run_op("Elu")
def Elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x, or alpha * (exp(x) - 1) below zero."""
    return F.elu(x, alpha)


@run_op("Gelu", since=20)
def Gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """Gaussian error linear unit."""
    return F.gelu(x, approximate=approximate)


@run_op("HardSigmoid")
def HardSigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """alpha * x + beta, clipped to [0, 1]."""
    return (x * alpha + beta).clamp(0, 1)


@run_op("LeakyRelu")
def LeakyRelu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """x, or alpha * x below zero."""
    return F.leaky_relu(x, alpha)


@run_op("Selu")
def Selu(
    x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875
) -> Tensor:
    """gamma * x, or gamma * alpha * (exp(x) - 1) below zero."""
    return gamma * F.elu(x, alpha)


@run_op("Shrink")
def Shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """Move x towards zero by ``bias`` where its size exceeds ``lambd``; zero elsewhere."""
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))


@run_op("Swish", since=24)
def Swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x * sigmoid(alpha * x)."""
    return x * torch.sigmoid(x if alpha == 1.0 else x * alpha)


@run_op("ThresholdedRelu")
def ThresholdedRelu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x where it exceeds alpha, zero elsewhere."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


@run_op("IsInf")
def IsInf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Say which elements are infinite, of the signs asked for."""
    found = torch.zeros_like(x, dtype=torch.bool)
    if detect_negative:
        found = found | torch.isneginf(x)
    if detect_positive:
        found = found | torch.isposinf(x)
    return found


@run_op("Clip")
def Clip(x: Tensor, min: Tensor | float | None = None, max: Tensor | float | None = None) -> Tensor:
    """Clip x to [min, max]: attributes before opset 11, inputs since."""
    if min is None and max is None:
        return x
    if isinstance(min, Tensor):
        x, min = together(x, min)
    if isinstance(max, Tensor):
        x, max = together(x, max)
    # As scalar tensors both may be mixed; a lower bound above the upper one yields the upper one.
    if min is not None:
        x = torch.maximum(x, torch.as_tensor(min, dtype=x.dtype, device=x.device))
    if max is not None:
        x = torch.minimum(x, torch.as_tensor(max, dtype=x.dtype, device=x.device))
    return x


@run_op("Dropout")
def Dropout(
    x: Tensor,
    ratio: Tensor | float = 0.5,
    training_mode: Tensor | None = None,
    *,
    seed: int | None = None,
    n_outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """The identity: inference keeps everything."""
    if training_mode is not None and bool(training_mode) and as_floats(ratio) != [0.0]:
        raise NotImplementedError("Dropout in training mode")
    return (x, torch.ones_like(x, dtype=torch.bool)) if n_outputs > 1 else x


# --- Two inputs ---


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def run(a: Tensor, b: Tensor) -> Tensor:
        a, b = together(a, b)
        return function(a, b)

    return run


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """Division; between integers it drops the fraction as C does."""
    return a / b if is_float(a) else torch.div(a, b, rounding_mode="trunc")


def _power(a: Tensor, b: Tensor) -> Tensor:
    """a to the power of b, in the type of a."""
    if is_float(a) and b.numel() == 1 and not b.requires_grad:
        # A plain number lets torch use the exact rules for 2, 0.5 and so on, also in the gradient at zero.
        power = torch.pow(a, b.item())
        return power.expand(torch.broadcast_shapes(a.shape, b.shape))
    if is_float(b) and not is_float(a):
        return torch.pow(a.to(b.dtype), b).to(a.dtype)
    return torch.pow(a, b.to(a.dtype))


_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Div": _divide,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Pow": _power,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}
_register_plain({op_type: _binary(function) for op_type, function in _BINARY.items()})


@run_op("Mod")
def Mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """The remainder, with the sign of the divisor, or of the dividend with ``fmod``."""
    a, b = together(a, b)
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


@run_op("BitShift")
def BitShift(a: Tensor, b: Tensor, *, direction: str) -> Tensor:
    """Shift the bits of a by b."""
    a, b = together(a, b)
    return torch.bitwise_left_shift(a, b) if direction == "LEFT" else torch.bitwise_right_shift(a, b)


learn_inputs("PRelu", inputs=(1,))


@run_op("PRelu")
def PRelu(x: Tensor, slope: Tensor) -> Tensor:
    """x, or slope * x below zero."""
    x, slope = together(x, slope)
    return torch.where(x < 0, x * slope, x)


# --- Where and variadic operators ---


@run_op("Where")
def Where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x where the condition holds, else y."""
    condition, x, y = together(condition, x, y)
    return torch.where(condition, x, y)


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(*operands: Tensor) -> Tensor:
        return reduce(function, together(*operands))

    return run


_register_plain(
    {"Max": _variadic(torch.maximum), "Min": _variadic(torch.minimum), "Sum": _variadic(torch.add)}
)


@run_op("Mean")
def Mean(*operands: Tensor) -> Tensor:
    """The mean of all inputs."""
    return reduce(torch.add, together(*operands)) / len(operands)


# --- Cast, CastLike ---

_TORCH_TYPE: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float32,
    onnx.TensorProto.BFLOAT16: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float32,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.BOOL: torch.bool,
}


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert; from float to float nothing happens, since the twin computes in one float type."""
    return x if is_float(x) and dtype.is_floating_point else x.to(dtype)


@run_op("Cast")
def Cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Convert to another type; every float type stands for the one that the twin computes in."""
    if to not in _TORCH_TYPE:
        raise NotImplementedError(f"Cast to {onnx.TensorProto.DataType.Name(to)}")
    return _cast(x, _TORCH_TYPE[to])


@run_op("CastLike")
def CastLike(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Convert to the type of another tensor."""
    return _cast(x, like.dtype)


@run_op("BitCast", since=26)
def BitCast(x: Tensor, *, to: int) -> Tensor:
    """Read the bits of each element as another type of the same width; of floats only 32 bits are known."""
    target = _TORCH_TYPE.get(to)
    if is_float(x):
        x = x.to(torch.float32)
    if (
        target is None
        or x.element_size() != target.itemsize
        or (target.is_floating_point and to != onnx.TensorProto.FLOAT)
    ):
        raise NotImplementedError(f"BitCast from {x.dtype} to {onnx.TensorProto.DataType.Name(to)}")
    return x.contiguous().view(target)


# --- onnxruntime's own activations ---


def _contrib(op_type: str) -> Callable[[Any], Any]:
    return run_op(op_type, domain="com.microsoft")


@_contrib("Gelu")
def MicrosoftGelu(x: Tensor) -> Tensor:
    """Gelu by erf."""
    return F.gelu(x)


@_contrib("BiasGelu")
def BiasGelu(x: Tensor, bias: Tensor) -> Tensor:
    """Gelu of x + bias."""
    return F.gelu(x + bias)


@_contrib("FastGelu")
def FastGelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gelu by tanh, of x + bias."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@_contrib("QuickGelu")
def QuickGelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    """x * sigmoid(alpha * x)."""
    return x * torch.sigmoid(x * alpha)


# --- How channels pass ---


_ELEMENTWISE = """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor
    Cast CastLike Ceil Celu Clip Cos Cosh Div Dropout Elu Equal Erf Exp Floor Gelu Greater
    GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max
    Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin
    Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor
""".split()


@flow_op(*_ELEMENTWISE)
def _flow_elementwise(node: gs.Node, flow: Flow) -> None:
    """Join the channels of all inputs; constants lose what the channels lose."""
    out_shape = flow.shape(node.outputs[0])
    ndim = len(out_shape)
    inputs = [tensor for tensor in node.inputs if tensor.name]
    carrying = [(tensor, found) for tensor in inputs if (found := flow.ids(tensor)) is not None]
    if not carrying:
        return
    # Axes are counted from the right: shapes are broadcast that way.
    first, found = next(
        ((t, f) for t, f in carrying if len(f.ids) == out_shape[f.axis + ndim - len(flow.shape(t))]),
        carrying[0],
    )
    axis = found.axis + ndim - len(flow.shape(first))
    ids = found.ids
    for tensor in inputs:
        shape = flow.shape(tensor)
        own_axis = axis - (ndim - len(shape))
        own = flow.ids(tensor)
        size = shape[own_axis] if own_axis >= 0 else 1
        if own is not None and own.axis == own_axis and size == len(ids):
            flow.join(ids, own.ids)
        elif own is not None and own.axis == own_axis and 1 in (size, len(ids)):
            flow.freeze(own, node, f"{node.op} spreads one channel over several")
            if size > 1:
                flow.freeze(ids, node, f"{node.op} spreads one channel over several")
        elif own is not None:
            flow.freeze(own, node, f"{node.op} combines channels on different axes")
            if size == len(ids) > 1:
                flow.freeze(ids, node, f"{node.op} combines channels on different axes")
        elif isinstance(tensor, gs.Constant):
            if size == len(ids) and (size > 1 or len(shape) > 0) and own_axis >= 0:
                if size > 1:
                    flow.bind(tensor, own_axis, ids, "follower", node)
            elif size > 1:
                flow.freeze(ids, node, f"{node.op} spreads one channel over several")
        elif size == len(ids) and size > 1:
            flow.freeze(ids, node, f"{node.op} joins them with '{tensor.name}', whose channels must stay")
            flow.wish(tensor, size)
        elif size > len(ids):
            flow.freeze(ids, node, f"{node.op} spreads one channel over several")
    if len(ids) == out_shape[axis]:
        for output in node.outputs:
            if output.name:
                flow.put(output, axis, ids)


# --- What the rest of hap-onnx asks about elementwise operators ---

keep_constant(
    *"""Identity Dropout Relu LeakyRelu PRelu Elu Selu Celu Clip Sigmoid HardSigmoid HardSwish Swish Mish Gelu
    Tanh Softplus Softsign Erf ThresholdedRelu""".split()
)


def is_elementwise(op_type: str, *, domain: str = "") -> bool:
    """Say whether an operator works element by element on inputs that are broadcast together."""
    return find_flow(op_type, domain=domain) is _flow_elementwise


def is_addition(op_type: str, *, domain: str = "") -> bool:
    """Say whether an operator is the sum of all its inputs."""
    return domain in ("", "ai.onnx") and op_type in ("Add", "Sum")


def takes_branch(node: gs.Node, index: int) -> bool:
    """Say whether a node of two inputs adds its input ``index`` to the other one, or subtracts it."""
    if (node.domain or "") not in ("", "ai.onnx"):
        return False
    return node.op == "Add" or (node.op == "Sub" and index == 1)


def clip_bounds(node: gs.Node) -> tuple[float, float] | None:
    """The bounds that a node clips its input to, infinite where there is none; None if it does not clip."""
    if (node.domain or "") not in ("", "ai.onnx") or node.op not in ("Relu", "Clip"):
        return None
    if node.op == "Relu":
        return 0.0, inf
    bounds = []
    for index, name, default in ((1, "min", -inf), (2, "max", inf)):
        given = node.inputs[index] if len(node.inputs) > index and node.inputs[index].name else None
        if given is not None and not isinstance(given, gs.Constant):
            return None
        bounds.append(float(node.attrs.get(name, default) if given is None else np.ravel(given.values)[0]))
    return (bounds[0], bounds[1]) if bounds[0] < bounds[1] else None


_FUSED_WITH_CONV = frozenset(["Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "Tanh"])


def is_fused_with_conv(node: gs.Node) -> bool:
    """Say whether onnxruntime computes an activation as part of the Conv before it.

    Such an activation is the same function of every element: its other inputs are constant single numbers.
    """
    if (node.domain or "") not in ("", "ai.onnx") or node.op not in _FUSED_WITH_CONV:
        return False
    return all(
        isinstance(tensor, gs.Constant) and tensor.values.size == 1
        for tensor in node.inputs[1:]
        if tensor.name
    )
