"""Matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from hap_onnx.ops.arguments import together
from hap_onnx.ops.implant import ImplantForm, build_factors, factor_names
from hap_onnx.ops.linear import LinearForm
from hap_onnx.ops.product import flow_product
from hap_onnx.ops.registry import bias_op, flow_op, implant_op, learn_inputs, linear_op, macs_op, run_op
from hap_onnx.ops.rules import bind_bias, constant_bias, constant_input, freeze_other_axis

if TYPE_CHECKING:
    from hap_onnx.coupling.channels import Flow

learn_inputs("Gemm", inputs=(1, 2))
learn_inputs("MatMul", "Einsum", inputs=(0, 1))

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


@flow_op("Gemm")
def _flow_gemm(node: gs.Node, flow: Flow) -> None:
    a, b = node.inputs[:2]
    found = flow.ids(a)
    if not isinstance(b, gs.Constant) or int(node.attrs.get("transA", 0)):
        for tensor in node.inputs:
            flow.freeze(flow.ids(tensor), node, "Gemm with a computed or transposed operand")
        return
    if freeze_other_axis(node, flow, a, 1):
        return
    in_axis, out_axis = (1, 0) if int(node.attrs.get("transB", 0)) else (0, 1)
    ids = flow.fresh(b.shape[out_axis])
    if found is not None:
        flow.bind(b, in_axis, found.ids, "consumer", node)
        flow.read(node, 0)
    flow.bind(b, out_axis, ids, "producer", node)
    bind_bias(node, flow, 2, ids)
    flow.put(node.outputs[0], 1, ids)


@bias_op("Gemm")
def _bias_gemm(node: gs.Node, ndim: int) -> np.ndarray | None:
    n_outputs = node.inputs[1].shape[0 if int(node.attrs.get("transB", 0)) else 1]
    bias = constant_bias(node, 2, n_outputs=n_outputs)
    if bias is None:
        return None
    beta = float(node.attrs.get("beta", 1.0))
    return (bias if beta == 1.0 else (bias * beta).astype(bias.dtype)).reshape(1, -1)


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
    bias_index = constant_input(node, 2)
    n_out = node.inputs[1].shape[0 if attributes.get("transB", 0) else 1]
    if bias_index is not None and node.inputs[2].values.size != n_out:
        bias_index = None
    return _product_form(transposed=bool(attributes.get("transB", 0)), bias_index=bias_index)


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


@flow_op("MatMul")
def _flow_matmul(node: gs.Node, flow: Flow) -> None:
    ranks = [len(flow.shape(tensor)) for tensor in node.inputs]
    if 0 in ranks:
        return
    n_batch = max(*ranks, 2) - 2
    batch = tuple(f"batch {n_batch - i}" for i in range(n_batch))  # counted from the right
    a, b = ranks
    first = (*batch[max(0, n_batch - a + 2) :], "row", "inner") if a > 1 else ("inner",)
    second = (*batch[max(0, n_batch - b + 2) :], "inner", "column") if b > 1 else ("inner",)
    result = (*batch, *(["row"] if a > 1 else []), *(["column"] if b > 1 else []))
    flow_product(node, flow, [first, second], result)


@bias_op("MatMul")
def _bias_matmul(node: gs.Node, ndim: int) -> np.ndarray | None:
    """Zeros: on the last axis where the weight is the right operand, on the one before where the left."""
    a, b = node.inputs
    if isinstance(b, gs.Constant):
        return np.zeros([1] * (ndim - 1) + [b.shape[-1]], b.values.dtype) if len(b.shape) == 2 else None
    if isinstance(a, gs.Constant) and len(a.shape) == 2:
        return np.zeros([1] * (ndim - 2) + [a.shape[-2], 1], a.values.dtype)
    return None


@linear_op("MatMul")
def _linear_matmul(node: gs.Node) -> LinearForm | None:
    a, b = node.inputs
    if not isinstance(b, gs.Constant) or isinstance(a, gs.Constant) or len(b.shape) != 2:
        return None
    return _product_form(transposed=False, bias_index=None)


# --- Implants of both ---


def _two_factors(node: gs.Node, *, transposed: bool) -> tuple[ImplantForm, ...]:
    """``x @ first @ second``. The first is a MatMul: a Gemm had to have a bias before opset 11."""
    weight = node.inputs[1]
    n_in, n_out = reversed(weight.shape) if transposed else weight.shape
    in_axis = 1 if transposed else 0

    def weight_shapes(rank: int) -> tuple[tuple[int, ...], ...]:
        return (n_in, rank), (n_out, rank) if transposed else (rank, n_out)

    def to_weights(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        first, second = arrays
        return first[0].T, second[0] if transposed else second[0].T

    return (
        ImplantForm(
            kind="lowrank",
            taps=(1, 1),
            tap=None,
            weight_names=factor_names(weight),
            rank_axis=in_axis,
            weight_shapes=weight_shapes,
            n_first=lambda x, y: prod(y[:-1]),
            n_second=lambda y: prod(y[:-1]),
            reorder=to_weights,
            build=lambda node, weights, activation: build_factors(
                node, weights, op_type="MatMul", first={}, second=dict(node.attrs)
            ),
        ),
    )


@implant_op("Gemm")
def _implant_gemm(node: gs.Node) -> tuple[ImplantForm, ...]:
    return _two_factors(node, transposed=bool(node.attrs.get("transB", 0)))


@implant_op("MatMul")
def _implant_matmul(node: gs.Node) -> tuple[ImplantForm, ...]:
    return _two_factors(node, transposed=False)


# --- Einsum ---


@run_op("Einsum")
def Einsum(*operands: Tensor, equation: str) -> Tensor:
    """Return the Einstein summation of ``equation``."""
    return torch.einsum(equation.replace(" ", ""), *together(*operands))


def _einsum_labels(
    equation: str, ranks: Sequence[int]
) -> tuple[list[tuple[str, ...]], tuple[str, ...]] | None:
    """Labels of the axes of each operand and of the result; None if an operand has a label twice."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(
            sorted(letter for letter in set(letters) if letters.count(letter) == 1)
        )
    n_dots = max((rank - len(t) + 3 for t, rank in zip(terms, ranks, strict=True) if "..." in t), default=0)

    def labels(term: str, n: int) -> tuple[str, ...]:
        before, dots, after = term.partition("...")
        return (*before, *(f"...{n - i}" for i in range(n if dots else 0)), *after)

    operands = [labels(term, rank - len(term) + 3) for term, rank in zip(terms, ranks, strict=True)]
    if any(len(set(operand)) < len(operand) for operand in operands):
        return None
    return operands, labels(right, n_dots)


@flow_op("Einsum")
def _flow_einsum(node: gs.Node, flow: Flow) -> None:
    found = _einsum_labels(node.attrs["equation"], [len(flow.shape(tensor)) for tensor in node.inputs])
    if found is None:
        for tensor in node.inputs:
            flow.freeze(flow.ids(tensor), node, "Einsum takes a diagonal")
        return
    flow_product(node, flow, *found)


@macs_op("Einsum")
def _macs_einsum(
    node: gs.Node, input_shapes: list[tuple[int, ...] | None], output_shapes: list[tuple[int, ...]]
) -> int:
    """Count the whole index space of two operands; a sum or permutation of one is no product."""
    shapes = [shape or () for shape in input_shapes]
    found = _einsum_labels(node.attrs["equation"], [len(shape) for shape in shapes])
    if len(shapes) < 2:
        return 0
    if found is None:  # some operand has a label twice
        return prod(output_shapes[0])
    operands, result = found
    summed: dict[str, int] = {}
    for labels, shape in zip(operands, shapes, strict=True):
        for label, size in zip(labels, shape, strict=True):
            if label not in result:
                summed.setdefault(label, size)
    return prod(output_shapes[0]) * prod(summed.values())


# --- Det ---


@run_op("Det", since=11)
def Det(x: Tensor) -> Tensor:
    """Return the determinants of the matrices in the last two axes."""
    return torch.linalg.det(x)
