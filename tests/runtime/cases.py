"""Small models and data for tests of what runs in onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from hap_onnx.runtime.session import make_session, run_outputs

RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Batch:
    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Samples:
    arrays: dict[str, np.ndarray]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        n = len(next(iter(self.arrays.values())))
        for start in range(0, n, batch_size):
            yield Batch({name: array[start : start + batch_size] for name, array in self.arrays.items()})


def build(
    nodes: Sequence[NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[str | onnx.ValueInfoProto],
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    domains: Mapping[str, int] | None = None,
) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "test",
        list(inputs),
        [
            helper.make_tensor_value_info(o, TensorProto.FLOAT, None) if isinstance(o, str) else o
            for o in outputs
        ],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    opsets += [helper.make_opsetid(domain, version) for domain, version in (domains or {}).items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def y_of(*shape: int | str | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("y", TensorProto.FLOAT, list(shape))


def x_of(*shape: int | str | None, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("x", dtype, list(shape))


W = RNG.standard_normal((3, 4)).astype(np.float32)


def matmul_model(batch: int | str | None = "N", *, dtype: int = TensorProto.FLOAT) -> ModelProto:
    nodes = [helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT)]
    return build(
        [*nodes, helper.make_node("MatMul", ["f", "w"], ["y"])],
        [x_of(batch, 3, dtype=dtype)],
        [y_of(batch, 4)],
        {"w": W},
    )


def run(model: ModelProto, x: np.ndarray, **options: int) -> np.ndarray:
    return run_outputs(make_session(model, threads=1, providers="cpu"), Samples({"x": x}), **options)["y"]
