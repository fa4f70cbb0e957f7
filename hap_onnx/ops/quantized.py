"""Quantized numbers: what stands between them and real ones, and operators that compute with them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_MICROSOFT = "com.microsoft"

QUANTIZER = "QuantizeLinear"
DEQUANTIZER = "DequantizeLinear"
_DOMAINS = ("", "ai.onnx", _MICROSOFT)

# Operators that read quantized numbers, and at which inputs they have weights; all their other inputs but the
# first are scales and zero points.
_INTEGER_WEIGHTS: Mapping[tuple[str, str], tuple[int, ...]] = MappingProxyType(
    {
        ("", DEQUANTIZER): (0,),
        (_MICROSOFT, DEQUANTIZER): (0,),
        ("", "ConvInteger"): (1,),
        ("", "MatMulInteger"): (1,),
        ("", "QLinearConv"): (3, 8),
        ("", "QLinearMatMul"): (3,),
        (_MICROSOFT, "QGemm"): (3, 6),
        (_MICROSOFT, "QLinearConv"): (3, 8),
        (_MICROSOFT, "MatMulIntegerToFloat"): (1,),
        (_MICROSOFT, "DynamicQuantizeMatMul"): (1,),
    }
)


def _key(op_type: str, domain: str) -> tuple[str, str]:
    return ("" if domain == "ai.onnx" else domain, op_type)


def is_quantizer(op_type: str, domain: str = "") -> bool:
    """Say whether an operator turns real numbers into quantized ones."""
    return op_type == QUANTIZER and domain in _DOMAINS


def is_dequantizer(op_type: str, domain: str = "") -> bool:
    """Say whether an operator turns quantized numbers into real ones."""
    return op_type == DEQUANTIZER and domain in _DOMAINS


def integer_weights(op_type: str, domain: str = "") -> tuple[int, ...] | None:
    """Return the inputs at which an operator has quantized weights; None if it reads none."""
    return _INTEGER_WEIGHTS.get(_key(op_type, domain))


def is_quantized(op_type: str, domain: str = "") -> bool:
    """Say whether an operator makes, reads or computes with quantized numbers."""
    return is_quantizer(op_type, domain) or _key(op_type, domain) in _INTEGER_WEIGHTS
