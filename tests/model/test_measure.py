"""Counting, against numbers worked out by hand."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from hap_onnx.model.measure import ModelSize, count_params, model_size, node_costs
from hap_onnx.model.model_io import load_model, normalise

SHARED = Path(os.environ.get("HAP_ONNX_SHARED", "/nonexistent"))


def graph_of(
    nodes: Sequence[NodeProto], weights: Mapping[str, np.ndarray], outputs: Sequence[str]
) -> gs.Graph:
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("e", 1)]
    return normalise(load_model(helper.make_model(graph, opset_imports=opsets, ir_version=10)))


def test_counts_floats_of_a_file_wherever_they_are() -> None:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["k"], ["o"])],
        "then",
        [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones(7, np.float32), "k")],
    )
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(2, np.float32), "s"), helper.make_tensor("i", 7, [2], [0, 5]), [30]
    )
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones((3, 4), np.float16))),
        helper.make_node("Constant", [], ["d"], value=numpy_helper.from_array(np.ones(100, np.int64))),
        helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner),
    ]
    weights = [numpy_helper.from_array(np.ones(5, np.float64), "w")]
    graph = helper.make_graph(nodes, "test", [], [], weights, sparse_initializer=[sparse])
    assert count_params(helper.make_model(graph)) == 5 + 30 + 12 + 2 * 7


def test_counts_a_convolution_and_a_matrix_by_hand() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", group=2, strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "m"], ["y"], name="gemm", transB=1),
    ]
    weights = {
        "w": np.ones((6, 2, 3, 3), np.float32),
        "b": np.ones(6, np.float32),
        "m": np.ones((10, 6), np.float32),
    }
    graph = graph_of(nodes, weights, ["y"])
    shapes = {"x": (2, 4, 9, 9), "c": (2, 6, 4, 4), "p": (2, 6, 1, 1), "f": (2, 6), "y": (2, 10)}
    conv, gemm = 2 * 6 * 4 * 4 * (2 * 3 * 3), 2 * 10 * 6
    assert model_size(graph, shapes) == ModelSize(params=108 + 6 + 60, macs=conv + gemm, bytes=4 * 174)
    costs = {cost.name: cost for cost in node_costs(graph, shapes)}
    assert [(c.params, c.macs) for c in costs.values()] == [(114, conv), (0, 0), (0, 0), (60, gemm)]
    assert costs["conv"].output_shape == (2, 6, 4, 4)
    assert costs["conv"].op_type == "Conv"


def test_macs_grow_with_the_batch_and_are_zero_without_shapes() -> None:
    graph = graph_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.ones((3, 5), np.float32)}, ["y"]
    )
    assert [model_size(graph, {"x": (n, 3), "y": (n, 5)}).macs for n in (1, 7)] == [15, 105]
    assert model_size(graph, {}) == ModelSize(params=15, macs=0, bytes=60)


def test_counts_shared_weights_once_and_in_the_first_node() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="a"),
        helper.make_node("MatMul", ["a", "w"], ["y"], name="b"),
    ]
    graph = graph_of(nodes, {"w": np.ones((4, 4), np.float32)}, ["y", "w"])
    assert model_size(graph, {}).params == 16
    assert [cost.params for cost in node_costs(graph, {})] == [16, 0]


def test_counts_floats_of_every_kind_and_nothing_else() -> None:
    weights = {
        "half": np.ones(3, np.float16),
        "brain": np.ones(5, ml_dtypes.bfloat16),
        "eight": np.ones(7, ml_dtypes.float8_e4m3fn),
        "four": np.ones(9, ml_dtypes.int4),
        "index": np.ones(11, np.int64),
        "scalar": np.ones((), np.float64),
    }
    graph = graph_of([helper.make_node("Magic", ["x", *weights], ["y"], domain="e")], weights, ["y"])
    assert model_size(graph, {}).params == 3 + 5 + 7 + 1
    assert model_size(graph, {}).bytes == 6 + 10 + 7 + 5 + 88 + 8


def test_counts_weights_inside_control_flow_and_of_outputs() -> None:
    def branch(name: str, weight: str) -> object:
        own = numpy_helper.from_array(np.ones(2, np.float32), f"own_{name}")
        nodes = [
            helper.make_node("Add", ["x", weight], [f"{name}1"]),
            helper.make_node("Add", [f"{name}1", f"own_{name}"], [f"{name}2"]),
        ]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}2", 1, None)], [own])

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Cast", ["s"], ["cond"], to=TensorProto.BOOL),
        helper.make_node("If", ["cond"], ["y"], then_branch=branch("t", "w"), else_branch=branch("e", "w")),
    ]
    weights = {"w": np.ones(2, np.float32), "out": np.ones(10, np.float32)}
    graph = graph_of(nodes, weights, ["y", "out"])
    assert model_size(graph, {}).params == 2 + 2 + 2 + 10
    assert [cost.params for cost in node_costs(graph, {})] == [0, 0, 6]


def test_node_costs_add_up_to_the_model() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        widths = [int(w) for w in rng.integers(1, 9, 6)]
        nodes, weights, shapes = [], {}, {"t0": (1, widths[0]), "x": (1, widths[0])}
        for index, (a, b) in enumerate(pairwise(widths)):
            weights[f"w{index}"] = np.ones((a, b), np.float32)
            source = "x" if index == 0 else f"t{index}"
            nodes.append(helper.make_node("MatMul", [source, f"w{index}"], [f"t{index + 1}"]))
            shapes[f"t{index + 1}"] = (1, b)
        graph = graph_of(nodes, weights, [f"t{len(nodes)}"])
        size, costs = model_size(graph, shapes), node_costs(graph, shapes)
        assert size.macs == sum(c.macs for c in costs) == sum(a * b for a, b in pairwise(widths))
        assert size.params == sum(c.params for c in costs) == size.macs


@pytest.mark.skipif(not SHARED.is_dir(), reason="HAP_ONNX_SHARED is not set")
@pytest.mark.parametrize(("name", "params"), [("resnet20", 269_034), ("resnet56", 850_986)])
def test_counts_the_published_parameters_of_resnets(name: str, params: int) -> None:
    """BatchNormalization is folded: its scale and shift became the bias of each Conv."""
    graph = normalise(load_model(SHARED / "models" / f"{name}.onnx"))
    n_scalars = sum(
        1
        for tensor in graph.tensors().values()
        if isinstance(tensor, gs.Constant) and tensor.values.size == 1 and tensor.values.dtype == np.float32
    )
    assert model_size(graph, {}).params - n_scalars == params
