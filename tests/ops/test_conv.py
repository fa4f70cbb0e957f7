"""Convolutions against onnxruntime, counts against the definition, and second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradgradcheck

from hap_onnx.ops.conv import Conv, ConvTranspose
from hap_onnx.ops.registry import find_macs
from tests.helpers import check_node, rand


@pytest.mark.parametrize("n_axes", [1, 2, 3])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": 2, "pads": (1, 1)},
        {"pads": (0, 2), "dilations": 2},
        {"pads": (2, 1), "strides": 3},
        {"auto_pad": "SAME_UPPER", "strides": 2},
        {"auto_pad": "SAME_LOWER", "strides": 2},
        {"auto_pad": "VALID"},
    ],
)
def test_conv_equals_onnxruntime(n_axes: int, attributes: dict) -> None:
    given = dict(attributes)
    for name in ("strides", "dilations"):
        if name in given:
            given[name] = [given[name]] * n_axes
    if "pads" in given:
        begin, end = given["pads"]
        given["pads"] = [begin] * n_axes + [end] * n_axes
    x, w = rand(2, 4, *[8, 9, 7][:n_axes]), rand(6, 4, *[3] * n_axes, seed=1)
    check_node("Conv", x, w, rand(6, seed=2), constants=(1, 2), **given)


@pytest.mark.parametrize(("group", "outputs"), [(2, 6), (4, 4), (4, 8)])
def test_conv_equals_onnxruntime_when_grouped(group: int, outputs: int) -> None:
    check_node(
        "Conv",
        rand(1, 4, 6, 6),
        rand(outputs, 4 // group, 3, 3),
        constants=(1,),
        group=group,
        kernel_shape=[3, 3],
    )


@pytest.mark.parametrize("n_axes", [1, 2, 3])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": 2},
        {"strides": 2, "pads": (1, 1), "output_padding": 1},
        {"strides": 2, "pads": (0, 1), "dilations": 2},
        {"strides": 3, "output_shape": 20},
        {"strides": 3, "output_shape": 20, "auto_pad": "SAME_UPPER"},
        {"strides": 2, "auto_pad": "SAME_UPPER"},
        {"strides": 2, "auto_pad": "SAME_LOWER"},
        {"group": 2},
    ],
)
def test_conv_transpose_equals_onnxruntime(n_axes: int, attributes: dict) -> None:
    given = dict(attributes)
    for name in ("strides", "dilations", "output_padding", "output_shape"):
        if name in given:
            given[name] = [given[name]] * n_axes
    if "pads" in given:
        begin, end = given["pads"]
        given["pads"] = [begin] * n_axes + [end] * n_axes
    group = given.get("group", 1)
    x, w = rand(1, 4, *[6] * n_axes), rand(4, 6 // group, *[3] * n_axes, seed=1)
    check_node("ConvTranspose", x, w, rand(6, seed=2), constants=(1, 2), **given)


def test_conv_macs_count_each_weight_once_per_output_position() -> None:
    macs = find_macs("Conv")
    assert macs is not None
    assert macs(None, [(2, 4, 8, 8), (6, 2, 3, 3), (6,)], [(2, 6, 4, 4)]) == 2 * 6 * 4 * 4 * 2 * 9


def test_conv_transpose_macs_count_each_weight_once_per_input_position() -> None:
    macs = find_macs("ConvTranspose")
    assert macs is not None
    assert macs(None, [(2, 4, 5, 5), (4, 6, 3, 3)], [(2, 6, 7, 7)]) == 2 * 4 * 5 * 5 * 6 * 9


def test_conv_is_twice_differentiable() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x, w, b: Conv(x, w, b, pads=[0, 1, 1, 2], strides=[2, 1]), (x, w, b))
    assert gradgradcheck(lambda x, w, b: ConvTranspose(x, w, b, pads=[0, 1, 1, 1], strides=[2, 1]), (x, w, b))
