"""What would end the process in onnxruntime is refused when a model is loaded."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from hap_onnx.errors import ModelError
from hap_onnx.model.model_io import load_model
from hap_onnx.model.weights import split_model
from tests.helpers import make_twin, node, rand


def model_of(*nodes: onnx.NodeProto, **weights: np.ndarray) -> onnx.ModelProto:
    """Return a model of x [N, 4, 6, 6]; nothing infers shapes, which crashes, too."""
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "y")]
    values[0].CopyFrom(helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 4, 6, 6]))
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "test", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("group", [0, -1, -(2**63)])
def test_counts_below_one(group: int) -> None:
    model = model_of(node("ConvTranspose", ["x", "w"], ["y"], group=group), w=rand(4, 4, 3, 3))
    with pytest.raises(ModelError, match=rf"'make_y' \(ConvTranspose\) has the group {group}, .* at least 1"):
        load_model(model)
    model.graph.node[0].attribute[0].i = 1
    load_model(model)


def test_heads_inside_a_subgraph() -> None:
    inner = node("Attention", ["x", "x", "x"], ["a"], q_num_heads=0, kv_num_heads=1)
    out = helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, None)
    branch = helper.make_graph([inner], "branch", [], [out])
    model = model_of(node("If", ["c"], ["y"], then_branch=branch, else_branch=branch), c=np.array(True))
    with pytest.raises(ModelError, match=r"'make_a' \(Attention\) has the q_num_heads 0"):
        load_model(model)


@pytest.mark.parametrize("op_type", ["Div", "Mod"])
@pytest.mark.parametrize("as_node", [False, True])
def test_the_smallest_integer_by_minus_one(op_type: str, as_node: bool) -> None:
    divisor = np.array([3, -1])
    nodes = [node(op_type, ["a", "b"], ["c"]), node("Cast", ["c"], ["d"], to=1)]
    nodes.append(node("Add", ["x", "d"], ["y"]))
    weights = {"a": np.array([-(2**63)])}
    if as_node:
        nodes.insert(0, node("Constant", [], ["b"], value=onnx.numpy_helper.from_array(divisor)))
    else:
        weights["b"] = divisor
    with pytest.raises(ModelError, match=rf"'make_c' \({op_type}\) divides integers by -1"):
        load_model(model_of(*nodes, **weights))


@pytest.mark.parametrize("last", [-1, 2])
def test_divisors_beside_the_message_are_looked_at_too(last: int) -> None:
    nodes = [node("Div", ["a", "b"], ["c"]), node("Cast", ["c"], ["d"], to=1)]
    nodes.append(node("Add", ["x", "d"], ["y"]))
    divisor = np.array([1] * 4 * 6 * 5 + [last] * 4 * 6).reshape(4, 6, 6)
    model = split_model(model_of(*nodes, a=np.array([-(2**63)]), b=divisor))
    assert set(model.weights) == {"b"}
    if last == -1:
        with pytest.raises(ModelError, match=r"'make_c' \(Div\) divides integers by -1"):
            load_model(model)
    else:
        load_model(model)


def test_floats_may_be_divided_by_minus_one() -> None:
    load_model(model_of(node("Div", ["x", "b"], ["y"]), b=np.float32([-1])))


def test_sequences_of_nothing() -> None:
    nodes = [
        node("SplitToSequence", ["x", "n"], ["parts"], axis=1),
        node("SequenceAt", ["parts", "i"], ["y"]),
    ]
    with pytest.raises(ModelError, match=r"'make_parts' \(SplitToSequence\) splits into parts of 0"):
        load_model(model_of(*nodes, n=np.array(0), i=np.array(0)))
    load_model(model_of(*nodes, n=np.array([4, 0]), i=np.array(0)))


def test_a_range_without_a_step_is_an_error_with_a_name() -> None:
    nodes = [
        node("Cast", ["x"], ["xi"], to=7),
        node("ReduceMax", ["xi"], ["end"], keepdims=0),
        node("Range", ["zero", "end", "zero"], ["r"]),
        node("Cast", ["r"], ["y"], to=1),
    ]
    twin = make_twin(model_of(*nodes, zero=np.array(0)))
    with pytest.raises(ModelError, match=r"'make_r' \(Range\) .* the step must not be 0"):
        twin({"x": torch.ones(1, 4, 6, 6)})
