"""What onnxruntime's optimizer makes of several operators, in a model that it has saved (com.microsoft).

Its reordered layouts (com.microsoft.nchwc) and its attention operators run in onnxruntime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeVar

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from hap_onnx.ops.arguments import together
from hap_onnx.ops.conv import Conv
from hap_onnx.ops.matmul import Gemm
from hap_onnx.ops.norm import LayerNormalization
from hap_onnx.ops.registry import find_macs, find_run, learn_inputs, macs_op, run_op

_DOMAIN = "com.microsoft"
R = TypeVar("R", bound=Callable[..., Any])

learn_inputs("FusedConv", "FusedGemm", inputs=(1, 2), domain=_DOMAIN)
learn_inputs("FusedMatMul", inputs=(0, 1), domain=_DOMAIN)
learn_inputs("SkipLayerNormalization", inputs=(2, 3, 4), domain=_DOMAIN)
learn_inputs("SkipSimplifiedLayerNormalization", inputs=(2, 3), domain=_DOMAIN)


def _fused(op_type: str) -> Callable[[R], R]:
    return run_op(op_type, domain=_DOMAIN)


# The parameters of the activations that onnxruntime fuses, in its order.
_ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "Clip": ("min", "max"),
    "Elu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "HardSwish": (),
    "LeakyRelu": ("alpha",),
    "Relu": (),
    "Selu": ("alpha", "gamma"),
    "Sigmoid": (),
    "Softplus": (),
    "Softsign": (),
    "Tanh": (),
    "ThresholdedRelu": ("alpha",),
}


def _activate(x: Tensor, activation: str, parameters: Sequence[float]) -> Tensor:
    """Apply an activation by the name of its operator; missing parameters have the operator's defaults."""
    if not activation:
        return x
    function = find_run(activation, opset=1)
    if activation not in _ACTIVATIONS or function is None:
        raise NotImplementedError(f"the fused activation {activation!r}")
    result: Tensor = function(x, **dict(zip(_ACTIVATIONS[activation], parameters, strict=False)))
    return result


# --- FusedConv ---


@_fused("FusedConv")
def FusedConv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    summand: Tensor | None = None,
    *,
    activation: str = "",
    activation_params: Sequence[float] | None = None,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """An activation of a convolution, to which another tensor may be added before."""
    y = Conv(
        x, weight, bias, auto_pad=auto_pad, dilations=dilations, group=group, kernel_shape=kernel_shape,
        pads=pads, strides=strides,
    )  # fmt: skip
    return _activate(y if summand is None else y + summand, activation, activation_params or ())


# --- FusedMatMul, FusedGemm ---


def _operand(x: Tensor, *, transposed: int, batch_transposed: int) -> Tensor:
    """Return a matrix operand [..., rows, columns]; ``batch_transposed``: its rows are the first axis."""
    if batch_transposed:
        x = x.movedim(0, -2)
    return x.transpose(-1, -2) if transposed and x.ndim > 1 else x


@_fused("FusedMatMul")
def FusedMatMul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    """Return alpha times the product of two operands, transposed as asked."""
    a, b = together(a, b)
    a = _operand(a, transposed=transA, batch_transposed=transBatchA)
    product = torch.matmul(a, _operand(b, transposed=transB, batch_transposed=transBatchB))
    return product if alpha == 1.0 else product * alpha


@_fused("FusedGemm")
def FusedGemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """An activation of alpha * a @ b + beta * c."""
    given = (activation_alpha, activation_beta, activation_gamma)
    parameters = [value for value in given if value is not None]
    y = Gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)
    return _activate(y, activation, parameters)


@macs_op("FusedMatMul", domain=_DOMAIN)
def _macs_fused_matmul(
    node: gs.Node, input_shapes: list[tuple[int, ...] | None], output_shapes: list[tuple[int, ...]]
) -> int:
    a = input_shapes[0]
    assert a is not None
    rows = 0 if node.attrs.get("transBatchA", 0) else -2
    inner = a[rows] if node.attrs.get("transA", 0) and len(a) > 1 else a[-1]
    return prod(output_shapes[0]) * inner


for _op_type, _plain in (("FusedConv", "Conv"), ("FusedGemm", "Gemm")):
    _macs = find_macs(_plain)
    assert _macs is not None
    macs_op(_op_type, domain=_DOMAIN)(_macs)


# --- Normalisation of a sum ---


@_fused("SkipLayerNormalization")
def SkipLayerNormalization(
    x: Tensor,
    skip: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    n_outputs: int = 1,
) -> tuple[Tensor, ...]:
    """Normalise x + skip + bias over the last axis; the fourth output is the sum."""
    total = x + skip if bias is None else x + skip + bias
    y, mean, inverse = LayerNormalization(total, scale, shift, epsilon=epsilon, n_outputs=3)
    return (y, mean, inverse, total)[:n_outputs]


@_fused("SkipSimplifiedLayerNormalization")
def SkipSimplifiedLayerNormalization(
    x: Tensor,
    skip: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    n_outputs: int = 1,
) -> tuple[Tensor, ...]:
    """Divide x + skip + bias by its root mean square over the last axis; the fourth output is the sum."""
    total = x + skip if bias is None else x + skip + bias
    inverse = torch.rsqrt((total * total).mean(-1, keepdim=True) + epsilon)
    return (total * inverse * scale, torch.zeros_like(inverse), inverse, total)[:n_outputs]
