"""Models and data for tests of ``--then``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper
from sample_models import images, residual_cnn

from hap_onnx.quantize import Recipe, carry_out
from hap_onnx.quantize.int8 import calibrate
from tests.helpers import make_model, node, rand
from tools.first_divergence import run_onnxruntime


def feeds(n: int = 60, *, size: int = 20) -> list[dict[str, np.ndarray]]:
    x = images(n)
    return [{"x": x[start : start + size]} for start in range(0, n, size)]


def int8_recipe(model: ModelProto, data: Sequence[dict[str, np.ndarray]], **changes) -> Recipe:
    return Recipe("int8", ranges=calibrate(model, data, method="minmax"), **changes)


def to_int8(model: ModelProto | None = None, **changes) -> ModelProto:
    """Return the small residual network in 8 bits."""
    model = residual_cnn() if model is None else model
    return carry_out(model, int8_recipe(model, feeds(), **changes))


def initializers(model: ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def ops_of(model: ModelProto) -> list[str]:
    return [entry.op_type for entry in model.graph.node]


def outputs(model: ModelProto, **arrays: np.ndarray) -> np.ndarray:
    return next(iter(run_onnxruntime(model, arrays).values()))


def lost_variance(ours: np.ndarray, expected: np.ndarray) -> float:
    return float(((ours - expected) ** 2).sum() / ((expected - expected.mean(axis=0)) ** 2).sum())


def two_inputs() -> ModelProto:
    """Return scores = relu(x @ w) @ v + 0 * ids: two inputs, the second of integers."""
    weights = {"w": rand(12, 16, seed=1), "v": rand(16, 4, seed=2), "table": rand(5, 16, seed=3)}
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("Gather", ["table", "ids"], ["e"]),
        node("Add", ["h", "e"], ["s"]),
        node("Relu", ["s"], ["r"]),
        node("MatMul", ["r", "v"], ["scores"]),
    ]
    model = make_model(nodes, inputs={"x": ["N", 12], "ids": ["N"]}, outputs=["scores"], weights=weights)
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.INT64
    del model.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(model)
