"""Matrix products."""

from __future__ import annotations

from math import prod

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from hap_onnx.ops.arguments import together
from hap_onnx.ops.registry import macs_op, run_op

# --- Gemm ---


@run_op("Gemm")
def Gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """Return alpha * a @ b + beta * c, with a [M, K] and b [K, N] after transposition."""
    product = (a.T if transA else a) @ (b.T if transB else b)
    if alpha != 1.0:
        product = product * alpha
    if c is None:
        return product
    return product + (c if beta == 1.0 else c * beta)


@macs_op("Gemm")
def _macs_gemm(
    node: gs.Node, input_shapes: list[tuple[int, ...] | None], output_shapes: list[tuple[int, ...]]
) -> int:
    a = input_shapes[0]
    assert a is not None
    return prod(output_shapes[0]) * a[0 if node.attrs.get("transA", 0) else 1]


# --- MatMul ---


@run_op("MatMul")
def MatMul(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of a [..., M, K] and b [..., K, N] with numpy's rules."""
    a, b = together(a, b)
    return torch.matmul(a, b)


@macs_op("MatMul")
def _macs_matmul(
    node: gs.Node, input_shapes: list[tuple[int, ...] | None], output_shapes: list[tuple[int, ...]]
) -> int:
    a = input_shapes[0]
    assert a is not None
    return prod(output_shapes[0]) * a[-1]


# --- Einsum ---


@run_op("Einsum")
def Einsum(*operands: Tensor, equation: str) -> Tensor:
    """Return the Einstein summation of ``equation``."""
    return torch.einsum(equation.replace(" ", ""), *together(*operands))


@macs_op("Einsum")
def _macs_einsum(
    node: gs.Node, input_shapes: list[tuple[int, ...] | None], output_shapes: list[tuple[int, ...]]
) -> int:
    """Count the whole index space of two operands; a sum or permutation of one is no product."""
    terms = node.attrs["equation"].replace(" ", "").split("->")[0].split(",")
    if len(terms) < 2:
        return 0
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, input_shapes, strict=True):
        assert shape is not None
        before, dots, after = term.partition("...")
        for letter, size in zip(before, shape, strict=False):
            sizes[letter] = max(size, sizes.get(letter, 1))
        if after:
            for letter, size in zip(after, shape[-len(after) :], strict=True):
                sizes[letter] = max(size, sizes.get(letter, 1))
        if dots:
            inner = shape[len(before) : len(shape) - len(after)]
            for position, size in enumerate(reversed(inner)):
                key = f"...{position}"
                sizes[key] = max(size, sizes.get(key, 1))
    return prod(sizes.values())
