"""Pooling against onnxruntime, and second derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradgradcheck

from hap_onnx.ops.pool import AveragePool, LpPool, MaxPool
from tests.helpers import check_node, rand

WINDOWS = [
    {"kernel_shape": 2, "strides": 2},
    {"kernel_shape": 3, "strides": 2, "pads": (1, 1)},
    {"kernel_shape": 3, "strides": 2, "pads": (0, 2)},
    {"kernel_shape": 3, "strides": 2, "ceil_mode": 1},
    {"kernel_shape": 2, "strides": 3, "pads": (1, 1), "ceil_mode": 1},
    {"kernel_shape": 3, "strides": 2, "auto_pad": "SAME_UPPER"},
    {"kernel_shape": 2, "strides": 1, "auto_pad": "SAME_LOWER"},
    {"kernel_shape": 3, "auto_pad": "VALID"},
]


def _expand(window: dict, n_axes: int) -> dict:
    given = dict(window)
    for name in ("kernel_shape", "strides", "dilations"):
        if name in given:
            given[name] = [given[name]] * n_axes
    if "pads" in given:
        begin, end = given["pads"]
        given["pads"] = [begin] * n_axes + [end] * n_axes
    return given


@pytest.mark.parametrize("n_axes", [1, 2, 3])
@pytest.mark.parametrize("window", WINDOWS)
def test_max_pool_equals_onnxruntime(n_axes: int, window: dict) -> None:
    check_node("MaxPool", rand(2, 3, *[8, 9, 7][:n_axes]), **_expand(window, n_axes))


@pytest.mark.parametrize("window", [WINDOWS[0], WINDOWS[1], WINDOWS[2]])
@pytest.mark.parametrize("storage_order", [0, 1])
def test_max_pool_indices_equal_onnxruntime(window: dict, storage_order: int) -> None:
    check_node("MaxPool", rand(2, 3, 8, 9), n_outputs=2, storage_order=storage_order, **_expand(window, 2))


def test_max_pool_with_dilations_equals_onnxruntime() -> None:
    check_node(
        "MaxPool", rand(2, 3, 9, 9), kernel_shape=[3, 3], dilations=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1
    )
    check_node("MaxPool", np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4), kernel_shape=[2, 2])


@pytest.mark.parametrize("n_axes", [1, 2, 3])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("count_include_pad", [0, 1])
@pytest.mark.parametrize("opset", [11, 19])
def test_average_pool_equals_onnxruntime(
    n_axes: int, window: dict, count_include_pad: int, opset: int
) -> None:
    x = rand(2, 3, *[8, 9, 7][:n_axes])
    check_node("AveragePool", x, opset=opset, count_include_pad=count_include_pad, **_expand(window, n_axes))


def test_average_pool_with_dilations_equals_onnxruntime() -> None:
    check_node(
        "AveragePool", rand(2, 3, 9, 9), kernel_shape=[3, 3], dilations=[2, 1], pads=[1, 1, 1, 1], opset=19
    )


@pytest.mark.parametrize("window", [WINDOWS[0], WINDOWS[1], WINDOWS[7]])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_lp_pool_equals_onnxruntime(window: dict, p: int) -> None:
    check_node("LpPool", rand(2, 3, 8, 9), p=p, **_expand(window, 2))


@pytest.mark.parametrize("op_type", ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"])
def test_global_pool_equals_onnxruntime(op_type: str) -> None:
    for shape in [(2, 3, 5), (2, 3, 5, 4), (2, 3, 5, 4, 2)]:
        check_node(op_type, rand(*shape))


def test_pooling_is_twice_differentiable() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    window = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    for function in (MaxPool, AveragePool, LpPool):
        assert gradgradcheck(lambda x, function=function: function(x, **window), (x,))
