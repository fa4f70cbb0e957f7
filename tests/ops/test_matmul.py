"""Matrix products against onnxruntime, and their counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hap_onnx.model.model_io import load_model, normalise
from hap_onnx.ops.registry import find_macs
from tests.helpers import check_node, make_node_model, rand


@pytest.mark.parametrize("transposed", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("bias", [None, (5,), (1, 5), (3, 1), (1,), (3, 5)])
def test_gemm_equals_onnxruntime(transposed: tuple[int, int], bias: tuple[int, ...] | None) -> None:
    a, b = rand(3, 4), rand(4, 5, seed=1)
    a, b = (np.ascontiguousarray(m.T) if flag else m for m, flag in zip((a, b), transposed, strict=True))
    c = None if bias is None else rand(*bias, seed=2)
    check_node("Gemm", a, b, c, transA=transposed[0], transB=transposed[1], alpha=0.5, beta=2.0)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3, 4), (4, 5)),
        ((2, 3, 4), (4, 5)),
        ((2, 1, 3, 4), (6, 4, 5)),
        ((4,), (4, 5)),
        ((3, 4), (4,)),
        ((4,), (4,)),
    ],
)
def test_matmul_equals_onnxruntime(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    check_node("MatMul", rand(*a), rand(*b, seed=1))


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ij,jk->ik", [(3, 4), (4, 5)]),
        ("bhid, bhjd -> bhij", [(2, 3, 4, 5), (2, 3, 6, 5)]),
        ("...ij,...jk->...ik", [(2, 3, 4), (2, 4, 5)]),
        ("ii->i", [(3, 3)]),
        ("ij,ij", [(3, 4), (3, 4)]),
    ],
)
def test_einsum_equals_onnxruntime(equation: str, shapes: list[tuple[int, ...]]) -> None:
    check_node("Einsum", *[rand(*shape, seed=i) for i, shape in enumerate(shapes)], equation=equation)


@pytest.mark.parametrize(
    ("op_type", "shapes", "attributes", "expected"),
    [
        ("Gemm", [(3, 4), (4, 5)], {}, 60),
        ("Gemm", [(4, 3), (5, 4)], {"transA": 1, "transB": 1}, 60),
        ("MatMul", [(2, 3, 4), (4, 5)], {}, 120),
        ("MatMul", [(4,), (4,)], {}, 4),
        ("Einsum", [(2, 3, 4), (2, 4, 5)], {"equation": "bij,bjk->bik"}, 120),
        ("Einsum", [(2, 3, 4), (1, 4, 5)], {"equation": "...ij,...jk->...ik"}, 120),
        ("Einsum", [(3, 4)], {"equation": "ij->ji"}, 0),
    ],
)
def test_macs_count_one_product_per_index(
    op_type: str, shapes: list, attributes: dict, expected: int
) -> None:
    arrays = [rand(*shape, seed=i) for i, shape in enumerate(shapes)]
    model, _ = make_node_model(op_type, arrays, **attributes)
    (gs_node,) = normalise(load_model(model)).nodes
    twin = check_node(op_type, *arrays, **attributes)
    out = twin({f"in{i}": torch.from_numpy(a) for i, a in enumerate(arrays)})["out0"]
    macs = find_macs(op_type)
    assert macs is not None
    assert macs(gs_node, shapes, [tuple(out.shape)]) == expected


def test_det_equals_onnxruntime() -> None:
    check_node("Det", rand(4, 4))
    check_node("Det", rand(2, 3, 3, 3), tolerance=1e-4)
