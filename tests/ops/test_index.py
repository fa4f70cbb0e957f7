"""Gather, Scatter and search operators against onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hap_onnx.ops.index import Unique
from tests.helpers import check_node, rand


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("indices", [np.array(1), np.array([2, -1]), np.array([[0, 2], [-3, 1]], np.int32)])
def test_gather_equals_onnxruntime(axis: int, indices: np.ndarray) -> None:
    check_node("Gather", rand(3, 4, 5), indices, axis=axis)


def test_gather_elements_equals_onnxruntime() -> None:
    check_node("GatherElements", rand(3, 4), np.array([[0, -1, 2], [1, 1, 0]]), axis=0)
    check_node("GatherElements", rand(3, 4), np.array([[0, -1], [1, 1], [3, 2]]), axis=1)


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_gather_nd_equals_onnxruntime(batch_dims: int) -> None:
    indices = np.array([[[0, 1], [1, -1]], [[1, 0], [0, 2]]])
    check_node("GatherND", rand(2, 3, 4, 5), indices, batch_dims=batch_dims)
    check_node("GatherND", rand(3, 4), np.array([[0], [2]]))


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scatter_equals_onnxruntime(reduction: str) -> None:
    indices = np.array([[0, 2, -1], [1, 0, 1]])
    check_node(
        "ScatterElements", rand(3, 4), indices, rand(2, 3, seed=1), axis=0, reduction=reduction, opset=18
    )
    pairs = np.array([[0, 1], [2, -1]])
    check_node("ScatterND", rand(3, 4, 2), pairs, rand(2, 2, seed=1), reduction=reduction, opset=18)
    check_node(
        "ScatterND", rand(3, 4), np.array([[1], [0]]), rand(2, 4, seed=1), reduction=reduction, opset=18
    )


def test_search_equals_onnxruntime() -> None:
    x = np.array([[3, 1, 3, 2], [0, 0, 5, 5]], np.float32)
    check_node("NonZero", x)
    check_node("OneHot", np.array([0, -1, 2]), np.array(4), np.array([0.5, 2.0], np.float32), axis=0)
    check_node("OneHot", np.array([[0, 7]]), np.array([3]), np.array([0, 1]))
    check_node("Compress", x, np.array([True, False, True]), axis=1)
    check_node("Compress", x, np.array([False, True, True]))


@pytest.mark.parametrize("largest", [0, 1])
def test_top_k_takes_the_first_of_equals(largest: int) -> None:
    x = np.array([[3, 1, 3, 2, 1], [0, 0, 5, 5, 5]], np.float32)
    check_node("TopK", x, np.array([3]), constants=(1,), n_outputs=2, largest=largest)
    check_node("TopK", x, opset=9, n_outputs=2, k=2, axis=0)


@pytest.mark.parametrize(("time_axis", "batch_axis"), [(0, 1), (1, 0)])
def test_reverse_sequence_equals_onnxruntime(time_axis: int, batch_axis: int) -> None:
    lengths = np.array([1, 3, 4, 2])
    check_node("ReverseSequence", rand(4, 4, 2), lengths, time_axis=time_axis, batch_axis=batch_axis)


@pytest.mark.parametrize("ordered", [0, 1])
def test_unique_equals_onnxruntime(ordered: int) -> None:
    x = np.array([[3, 1, 3, 2], [0, 1, 2, 3], [3, 1, 3, 2]], np.float32)
    check_node("Unique", x, n_outputs=4, sorted=ordered)
    check_node("Unique", x, n_outputs=4, sorted=ordered, axis=0)
    check_node("Unique", x.astype(np.int64), n_outputs=1, sorted=ordered, axis=1)


def test_unique_passes_gradients_to_where_each_appears_first() -> None:
    x = torch.tensor([2.0, 1.0, 2.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(Unique(x)[0].square().sum(), x)
    assert gradient.tolist() == [4, 2, 0]
