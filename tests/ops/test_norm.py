"""Normalisations and softmax against onnxruntime, and second derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradgradcheck

from hap_onnx.ops.norm import (
    BatchNormalization,
    GroupNormalization,
    InstanceNormalization,
    LayerNormalization,
)
from tests.helpers import check_node, rand


def _positive(*shape: int, seed: int = 0) -> np.ndarray:
    return np.abs(rand(*shape, seed=seed)) + 0.5


@pytest.mark.parametrize("opset", [9, 14, 17])
@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 5), (2, 4, 5, 6), (1, 4, 2, 3, 2)])
def test_batch_normalization_equals_onnxruntime(shape: tuple[int, ...], opset: int) -> None:
    scale, bias, mean, var = (_positive(4, seed=seed) for seed in range(4))
    check_node(
        "BatchNormalization",
        rand(*shape),
        scale,
        bias,
        mean,
        var,
        constants=(1, 2, 3, 4),
        opset=opset,
        epsilon=1e-3,
    )


def test_batch_normalization_equals_onnxruntime_when_training() -> None:
    statistics = [_positive(4, seed=seed) for seed in range(4)]
    check_node(
        "BatchNormalization",
        rand(3, 4, 5, 5),
        *statistics,
        n_outputs=3,
        training_mode=1,
        momentum=0.7,
        opset=15,
    )


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 4, 5, 6), (1, 4, 2, 3, 2)])
def test_instance_normalization_equals_onnxruntime(shape: tuple[int, ...]) -> None:
    check_node("InstanceNormalization", rand(*shape), rand(4, seed=1), rand(4, seed=2), epsilon=1e-3)


@pytest.mark.parametrize("opset", [18, 21])
def test_group_normalization_equals_onnxruntime(opset: int) -> None:
    width = 2 if opset == 18 else 6
    check_node(
        "GroupNormalization",
        rand(2, 6, 4, 4),
        rand(width, seed=1),
        rand(width, seed=2),
        num_groups=2,
        opset=opset,
    )


@pytest.mark.parametrize("axis", [-1, 1, 2])
def test_layer_normalization_equals_onnxruntime(axis: int) -> None:
    x = rand(2, 3, 4)
    width = x.shape[axis:]
    check_node("LayerNormalization", x, rand(*width, seed=1), rand(*width, seed=2), axis=axis)
    check_node("LayerNormalization", x, rand(*width, seed=1), axis=axis, n_outputs=3)


def test_rms_normalization_equals_onnxruntime() -> None:
    check_node("RMSNormalization", rand(2, 3, 4), rand(4, seed=1), opset=23)
    check_node("SimplifiedLayerNormalization", rand(2, 3, 4), rand(4, seed=1), opset=17)


@pytest.mark.parametrize("p", [1, 2])
def test_lp_normalization_equals_onnxruntime(p: int) -> None:
    check_node("LpNormalization", rand(2, 3, 4), axis=1, p=p)


def test_mean_variance_normalization_equals_onnxruntime() -> None:
    check_node("MeanVarianceNormalization", rand(2, 3, 4, 4), tolerance=1e-4)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_lrn_equals_onnxruntime(size: int) -> None:
    check_node("LRN", rand(2, 7, 3, 3), size=size, alpha=0.1, beta=0.6, bias=1.5)


@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize(("opset", "axis"), [(11, 1), (11, 2), (13, 1), (13, -1), (17, 0)])
def test_softmax_equals_onnxruntime(op_type: str, opset: int, axis: int) -> None:
    check_node(op_type, rand(2, 3, 4), opset=opset, axis=axis)
    check_node(op_type, rand(2, 3, 4), opset=opset)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, s, b: BatchNormalization(x, s, b, b * 0.1, s * s + 1),
        lambda x, s, b: InstanceNormalization(x, s, b),
        lambda x, s, b: GroupNormalization(x, s, b, num_groups=2),
        lambda x, s, b: LayerNormalization(x.movedim(1, -1), s, b),
    ],
)
def test_normalisation_is_twice_differentiable(function) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    s, b = (torch.rand(4, dtype=torch.float64).add(0.5).requires_grad_() for _ in range(2))
    assert gradgradcheck(function, (x, s, b))
