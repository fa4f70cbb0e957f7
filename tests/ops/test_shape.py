"""Shape operators against onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import numpy_helper

from hap_onnx.ops.registry import find_run
from tests.helpers import check_node, rand


@pytest.mark.parametrize("attributes", [{}, {"start": 1}, {"end": -1}, {"start": -2, "end": 10}])
def test_shape_equals_onnxruntime(attributes: dict) -> None:
    check_node("Shape", rand(2, 3, 4), **attributes)
    check_node("Size", rand(2, 3, 4))


@pytest.mark.parametrize(
    ("target", "allowzero"),
    [([6, 4], 0), ([-1, 4], 0), ([0, -1], 0), ([0, 0, 2, 2], 0), ([], 0), ([0, 3], 1)],
)
def test_reshape_equals_onnxruntime(target: list[int], allowzero: int) -> None:
    x = rand(0, 3) if allowzero else rand(1) if not target else rand(2, 3, 4)
    check_node("Reshape", x, np.array(target, np.int64), constants=(1,), allowzero=allowzero)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_flatten_equals_onnxruntime(axis: int) -> None:
    check_node("Flatten", rand(2, 3, 4), axis=axis)


def test_squeeze_and_unsqueeze_equal_onnxruntime() -> None:
    x = rand(2, 1, 3, 1)
    check_node("Squeeze", x)
    check_node("Squeeze", x, axes=[1], opset=11)
    check_node("Squeeze", x, np.array([-1, 1]), constants=(1,))
    check_node("Unsqueeze", x, axes=[0, 2], opset=11)
    check_node("Unsqueeze", x, np.array([-1, 1]), constants=(1,))


def test_transpose_expand_and_tile_equal_onnxruntime() -> None:
    x = rand(2, 1, 3)
    check_node("Transpose", x)
    check_node("Transpose", x, perm=[1, 2, 0])
    check_node("Expand", x, np.array([4, 1, 5, 1]), constants=(1,))
    check_node("Tile", x, np.array([2, 3, 1]), constants=(1,))


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space_equals_onnxruntime(mode: str) -> None:
    check_node("DepthToSpace", rand(2, 8, 3, 4), blocksize=2, mode=mode)
    check_node("SpaceToDepth", rand(2, 2, 6, 4), blocksize=2)


def test_made_tensors_equal_onnxruntime() -> None:
    shape = np.array([2, 3])
    check_node("ConstantOfShape", shape)
    check_node("ConstantOfShape", shape, value=numpy_helper.from_array(np.array([7])))
    check_node("Range", np.array(1), np.array(10), np.array(3))
    check_node("Range", np.array(5), np.array(-2), np.array(-2))
    check_node("Range", np.float32(1), np.float32(2), np.float32(0.3))
    check_node("EyeLike", rand(3, 4), k=1)
    check_node("Trilu", rand(3, 4), np.array(1), upper=0)
    check_node("Trilu", rand(2, 3, 4))


def test_shapes_stay_on_the_cpu_as_int64() -> None:
    shape = find_run("Shape", opset=17)
    assert shape is not None
    sizes = shape(torch.empty(2, 3, device="meta"))
    assert sizes.device.type == "cpu"
    assert sizes.dtype == torch.int64
