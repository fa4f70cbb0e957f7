"""Resize and Upsample against onnxruntime in every mode, and second derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradgradcheck

from hap_onnx.ops.resize import Resize
from tests.helpers import check_node, rand

COORDINATES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric"]
TARGETS = [
    {"scales": [1, 1, 2, 2]},
    {"scales": [1, 1, 0.61, 0.73]},
    {"sizes": [1, 2, 3, 4]},
    {"sizes": [1, 2, 11, 23]},
]


def _check(
    x: np.ndarray, *, scales: list | None = None, sizes: list | None = None, opset: int = 19, **options
) -> None:  # type: ignore[no-untyped-def]
    given = [
        None,
        None if scales is None else np.array(scales, np.float32),
        None if sizes is None else np.array(sizes),
    ]
    constants = (2,) if scales is not None else (3,)
    if opset < 13:
        given[0] = np.zeros(0, np.float32)  # roi was not optional
        constants = (1, *constants)
    check_node("Resize", x, *given, constants=constants, opset=opset, **options)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize(
    "rule",
    [
        {"mode": "nearest", "nearest_mode": "round_prefer_floor"},
        {"mode": "nearest", "nearest_mode": "ceil"},
        {"mode": "nearest", "nearest_mode": "floor"},
        {"mode": "linear"},
        {"mode": "linear", "antialias": 1},
        {"mode": "cubic"},
        {"mode": "cubic", "exclude_outside": 1, "cubic_coeff_a": -0.5},
        {"mode": "cubic", "antialias": 1},
    ],
)
def test_resize_equals_onnxruntime(target: dict, coordinates: str, rule: dict) -> None:
    _check(rand(1, 2, 7, 10), coordinate_transformation_mode=coordinates, **target, **rule)


@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resize_of_older_opsets_equals_onnxruntime(opset: int, mode: str) -> None:
    _check(rand(1, 2, 5, 6), scales=[1, 1, 2, 3], opset=opset, mode=mode)


@pytest.mark.parametrize(("op_type", "opset"), [("Upsample", 9), ("Resize", 10)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_before_opset_11_equals_onnxruntime(op_type: str, opset: int, mode: str) -> None:
    x = rand(1, 2, 4, 6)
    check_node(op_type, x, np.array([1, 1, 2, 3], np.float32), constants=(1,), opset=opset, mode=mode)
    if op_type == "Resize":
        check_node(op_type, x, np.array([1, 1, 0.5, 0.6], np.float32), constants=(1,), opset=opset, mode=mode)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resize_of_a_crop_equals_onnxruntime(mode: str) -> None:
    roi = np.array([0, 0, 0.1, -0.2, 1, 1, 0.8, 1.1], np.float32)
    check_node(
        "Resize", rand(1, 1, 6, 7), roi, None, np.array([1, 1, 4, 5]), constants=(1, 3), mode=mode,
        coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=9.0,
    )  # fmt: skip


@pytest.mark.parametrize("policy", ["stretch", "not_larger", "not_smaller"])
def test_resize_keeps_the_aspect_ratio_as_onnxruntime(policy: str) -> None:
    x = rand(1, 2, 6, 8)
    _check(x, sizes=[9, 10], axes=[2, 3], keep_aspect_ratio_policy=policy, mode="linear")


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resize_is_twice_differentiable(mode: str) -> None:
    x = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x: Resize(x, scales=[1.0, 1.0, 2.0, 1.5], mode=mode) ** 3, (x,))
