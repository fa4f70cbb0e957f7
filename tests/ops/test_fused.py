"""What onnxruntime's optimizer makes of several operators, against onnxruntime; and whole saved models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch.autograd import gradgradcheck

from hap_onnx.ops.fused import FusedMatMul, SkipLayerNormalization, _macs_fused_matmul
from tests.helpers import check_model, check_node, make_model, node, rand

MICROSOFT: dict[str, Any] = {"domain": "com.microsoft"}


@pytest.mark.parametrize(
    ("activation", "parameters"),
    [
        ("Relu", []),
        ("LeakyRelu", [0.2]),
        ("Clip", [-0.5, 0.8]),
        ("HardSigmoid", [0.3, 0.4]),
        ("Sigmoid", []),
        ("Tanh", []),
    ],
)
@pytest.mark.parametrize("group", [1, 2])
def test_fused_conv_equals_onnxruntime(activation: str, parameters: list[float], group: int) -> None:
    attributes: dict[str, Any] = {"activation_params": parameters} if parameters else {}
    check_node(
        "FusedConv", rand(2, 4, 6, 6), rand(6, 4 // group, 3, 3, seed=1), rand(6, seed=2), group=group,
        activation=activation, pads=[1, 0, 1, 0], strides=[2, 1], **attributes, **MICROSOFT,
    )  # fmt: skip


def test_fused_conv_adds_before_the_activation() -> None:
    x, w, b, z = rand(1, 2, 4, 4), rand(3, 2, 1, 1, seed=1), rand(3, seed=2), rand(1, 3, 4, 4, seed=3)
    check_node("FusedConv", x, w, b, z, activation="Relu", **MICROSOFT)


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("batch", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_fused_matmul_equals_onnxruntime(trans_a: int, trans_b: int, batch: tuple[int, int]) -> None:
    rows, inner, columns = 3, 4, 5
    shapes = []
    for (first, second), transposed, moved in (
        ((rows, inner), trans_a, batch[0]),
        ((inner, columns), trans_b, batch[1]),
    ):
        first, second = (second, first) if transposed else (first, second)
        shapes.append((first, 2, 6, second) if moved else (2, 6, first, second))
    check_node(
        "FusedMatMul", rand(*shapes[0]), rand(*shapes[1], seed=1), alpha=0.3, transA=trans_a, transB=trans_b,
        transBatchA=batch[0], transBatchB=batch[1], **MICROSOFT,
    )  # fmt: skip

    class Node:
        attrs: dict[str, int] = {"transA": trans_a, "transBatchA": batch[0]}  # noqa: RUF012

    assert _macs_fused_matmul(Node(), shapes, [(2, 6, rows, columns)]) == 2 * 6 * rows * columns * inner


@pytest.mark.parametrize(
    ("activation", "parameters"),
    [("Relu", {}), ("LeakyRelu", {"activation_alpha": 0.2}), ("Tanh", {}), ("Sigmoid", {})],
)
def test_fused_gemm_equals_onnxruntime(activation: str, parameters: dict[str, float]) -> None:
    check_node(
        "FusedGemm", rand(3, 4), rand(5, 4, seed=1), rand(5, seed=2), transB=1, alpha=0.5, beta=2.0,
        activation=activation, **parameters, **MICROSOFT,
    )  # fmt: skip


@pytest.mark.parametrize("with_bias", [False, True])
def test_normalised_sums_equal_onnxruntime(with_bias: bool) -> None:
    x, skip, scale, shift, bias = rand(2, 3, 8), rand(2, 3, 8, seed=1), *(rand(8, seed=s) for s in (2, 3, 4))
    last = (bias,) if with_bias else ()
    check_node(
        "SkipLayerNormalization", x, skip, scale, shift, *last, tolerance=1e-4, epsilon=1e-5, **MICROSOFT
    )
    check_node("SkipSimplifiedLayerNormalization", x, skip, scale, *last, tolerance=1e-4, **MICROSOFT)


def test_the_fourth_output_of_a_normalised_sum_is_the_sum() -> None:
    names = [["x", "skip", "scale"], ["y", "", "", "sum"]]
    model = make_model(
        [node("SkipSimplifiedLayerNormalization", *names, **MICROSOFT), node("Add", ["y", "sum"], ["z"])],
        inputs={"x": [2, 3, 8], "skip": [2, 3, 8]},
        outputs=["z"],
        weights={"scale": rand(8)},
        domains={"com.microsoft": 1},
    )
    check_model(model, {"x": rand(2, 3, 8, seed=1), "skip": rand(2, 3, 8, seed=2)}, tolerance=1e-4)


def test_fused_operators_are_twice_differentiable() -> None:
    a, b, scale = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (2, 3), (3,)))
    assert gradgradcheck(lambda a, b: FusedMatMul(a, b, transA=1, alpha=0.5), (a, b))
    assert gradgradcheck(lambda *x: SkipLayerNormalization(*x), (a, b, scale))


@pytest.mark.parametrize("level", ["ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
def test_a_model_that_onnxruntime_has_optimized_runs(level: str, tmp_path: Path) -> None:
    """Fused operators run in torch; the blocked layouts of the last level in onnxruntime."""
    model = make_model(
        [
            node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
            node("LeakyRelu", ["c1"], ["r1"], alpha=0.1),
            node("Conv", ["r1", "w2"], ["c2"]),
            node("Add", ["c2", "r1"], ["s"]),
            node("Relu", ["s"], ["r2"]),
            node("GlobalAveragePool", ["r2"], ["g"]),
            node("Flatten", ["g"], ["f"]),
            node("Transpose", ["f"], ["t"], perm=[1, 0]),
            node("MatMul", ["f", "t"], ["m"]),
            node("Mul", ["m", "half"], ["y"]),
        ],
        inputs={"x": [1, 3, 8, 8]},
        outputs=["y"],
        weights={
            "w1": rand(16, 3, 3, 3), "b1": rand(16, seed=1), "w2": rand(16, 16, 1, 1, seed=2),
            "half": np.float32(0.5),
        },
    )  # fmt: skip
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(options.optimized_model_filepath)
    assert any(proto.domain.startswith("com.microsoft") for proto in optimized.graph.node)
    twin = check_model(optimized, {"x": rand(1, 3, 8, 8, seed=3)}, tolerance=1e-4)
    assert bool(twin.opaque_nodes) == any(p.domain.endswith("nchwc") for p in optimized.graph.node)
