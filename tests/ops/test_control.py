"""Control flow in torch against onnxruntime, and second derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.autograd import gradgradcheck

from hap_onnx.twin import Twin
from tests.helpers import check_model, make_model, make_twin, node, rand

_TYPES = {"i": TensorProto.INT64, "go": TensorProto.BOOL, "stay": TensorProto.BOOL}


def _graph(
    nodes: Sequence[onnx.NodeProto], inputs: Sequence[str], outputs: Sequence[str], **local: np.ndarray
) -> onnx.GraphProto:
    def info(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(
            name, _TYPES.get(name, TensorProto.FLOAT), [] if name in _TYPES else None
        )

    constants = [numpy_helper.from_array(array, name) for name, array in local.items()]
    return helper.make_graph(list(nodes), "inner", [*map(info, inputs)], [*map(info, outputs)], constants)


def _loop_net(*, while_small: bool = False) -> onnx.ModelProto:
    """A state that grows by x and a weight at each step; the rows are its halves."""
    nodes = [
        helper.make_node("Add", ["state", "x"], ["sum"]),
        helper.make_node("Mul", ["sum", "w"], ["next"]),
        helper.make_node("Mul", ["next", "half"], ["row"]),
        helper.make_node("ReduceMax", ["next"], ["most"], keepdims=0),
        helper.make_node("Less", ["most", "bound"], ["small"]),
        helper.make_node("Or", ["small", "go"] if not while_small else ["small", "small"], ["stay"]),
    ]
    body = _graph(nodes, ["i", "go", "state"], ["stay", "next", "row"], half=np.float32(0.5))
    return make_model(
        [node("Loop", ["n", "", "start"], ["last", "rows"], body=body)],
        inputs={"x": rand(3), "n": np.array(4)},
        outputs=["last", "rows"],
        weights={"start": rand(3, seed=1), "w": np.full(3, 1.5, np.float32), "bound": np.float32(9.0)},
    )


@pytest.mark.parametrize("while_small", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_loop_equals_onnxruntime(while_small: bool, n: int) -> None:
    model = _loop_net(while_small=while_small)
    twin = check_model(model, {"x": rand(3, seed=2) + 2, "n": np.array(n)})
    assert twin.opaque_nodes == ()


def test_a_loop_without_steps_is_left_to_onnxruntime() -> None:
    twin = check_model(_loop_net(), {"x": rand(3), "n": np.array(0)})
    assert twin.opaque_nodes == ("make_last",)


def test_a_loop_is_twice_differentiable() -> None:
    twin = make_twin(_loop_net()).double()
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x: tuple(twin({"x": x.square(), "n": torch.tensor(3)}).values()), (x,))


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"scan_input_axes": [1, -1], "scan_output_axes": [1, 0]},
        {"scan_input_directions": [1, 0], "scan_output_directions": [0, 1]},
        {"scan_input_axes": [1, 1], "scan_input_directions": [1, 1], "scan_output_axes": [-1, 1]},
    ],
)
@pytest.mark.parametrize("opset", [9, 21])
def test_scan_equals_onnxruntime(attributes: dict[str, Any], opset: int) -> None:
    nodes = [
        helper.make_node("Mul", ["a", "w"], ["aw"]),
        helper.make_node("Add", ["state", "aw"], ["sum"]),
        helper.make_node("Sub", ["sum", "b"], ["next"]),
        helper.make_node("Neg", ["sum"], ["row1"]),
        helper.make_node("Mul", ["b", "sum"], ["row2"]),
    ]
    body = _graph(nodes, ["state", "a", "b"], ["next", "row1", "row2"])
    model = make_model(
        [
            node(
                "Scan",
                ["start", "x1", "x2"],
                ["last", "y1", "y2"],
                body=body,
                num_scan_inputs=2,
                **attributes,
            )
        ],
        inputs={"start": rand(4), "x1": rand(4, 4), "x2": rand(4, 4)},
        outputs=["last", "y1", "y2"],
        weights={"w": rand(4, seed=1)},
        opset=opset,
    )
    twin = check_model(model, {"start": rand(4), "x1": rand(4, 4, seed=2), "x2": rand(4, 4, seed=3)})
    assert twin.opaque_nodes == ()


def _nested_net() -> onnx.ModelProto:
    """A Loop with an If inside that reads tensors of both graphs around it."""
    branches = [
        _graph([helper.make_node(op_type, ["state", "x"], [f"of_{op_type}"])], [], [f"of_{op_type}"])
        for op_type in ("Add", "Mul")
    ]
    body = _graph(
        [
            helper.make_node("Mod", ["i", "two"], ["odd"]),
            helper.make_node("Cast", ["odd"], ["is_odd"], to=TensorProto.BOOL),
            helper.make_node("If", ["is_odd"], ["next"], then_branch=branches[0], else_branch=branches[1]),
            helper.make_node("Identity", ["go"], ["stay"]),
        ],
        ["i", "go", "state"],
        ["stay", "next"],
        two=np.array(2),
    )
    return make_model(
        [node("Relu", ["in"], ["x"]), node("Loop", ["n", "", "x"], ["y"], body=body)],
        inputs={"in": rand(3)},
        outputs=["y"],
        weights={"n": np.array(3)},
    )


def test_nested_control_flow_equals_onnxruntime() -> None:
    twin: Twin = check_model(_nested_net(), {"in": rand(3, seed=1)})
    assert twin.opaque_nodes == ()
    (step,) = [step for step in twin.steps if step.op_type == "Loop"]
    assert "x" in step.inputs[3:]
