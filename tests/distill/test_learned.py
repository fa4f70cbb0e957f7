"""What training may change: weights, biases and scales, and nothing that means something by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from topologies import TOPOLOGIES, Net

from hap_onnx.distill.learned import find_learned
from hap_onnx.surgery import CONSTANT_SUFFIX
from tests.distill.cases import graph_of
from tests.helpers import make_model, make_node_model, node, rand
from tools.surgery_oracle import Case

X = rand(2, 4, 5, 5)


@pytest.mark.parametrize(
    ("op_type", "inputs", "learned", "options"),
    [
        ("Conv", [X, rand(6, 4, 3, 3), rand(6)], (1, 2), {}),
        ("Conv", [X[:, :, 0], rand(6, 4, 3)], (1,), {}),
        ("ConvTranspose", [X, rand(4, 6, 3, 3), rand(6)], (1, 2), {}),
        ("Gemm", [X[0, 0], rand(5, 3), rand(3)], (1, 2), {}),
        ("MatMul", [X, rand(5, 3)], (1,), {}),
        ("MatMul", [rand(3, 5), X], (0,), {}),
        ("Einsum", [X, rand(5, 3)], (1,), {"equation": "nchw,wd->nchd"}),
        ("BatchNormalization", [X, rand(4), rand(4), rand(4), rand(4) ** 2], (1, 2), {}),
        ("InstanceNormalization", [X, rand(4), rand(4)], (1, 2), {}),
        ("GroupNormalization", [X, rand(4), rand(4)], (1, 2), {"opset": 21, "num_groups": 2}),
        ("LayerNormalization", [X, rand(5), rand(5)], (1, 2), {}),
        ("RMSNormalization", [X, rand(5)], (1,), {"opset": 23}),
        ("SimplifiedLayerNormalization", [X, rand(5)], (1,), {}),
        ("PRelu", [X, rand(4, 1, 1)], (1,), {}),
        # --- what stays as it is ---
        ("Clip", [X, np.float32(0), np.float32(6)], (), {}),
        ("Mul", [X, rand(4, 1, 1)], (), {}),  # anchors, strides, attention masks
        ("Add", [X, rand(4, 1, 1)], (), {}),
        ("Sub", [X, rand(4, 1, 1)], (), {}),
        ("Div", [X, rand(4, 1, 1)], (), {}),
        ("Pow", [X, np.float32(2)], (), {}),
        ("Where", [np.ones((5, 5), bool), X, rand(5, 5)], (), {}),
        ("Concat", [X, X], (), {"axis": 1}),
        ("Gather", [rand(7, 3), np.zeros(2, np.int64)], (), {}),
        ("Resize", [X, None, np.float32([1, 1, 2, 2])], (), {}),
        ("MatMulInteger", [np.ones((2, 3), np.uint8), np.ones((3, 4), np.uint8)], (), {}),
    ],
)  # fmt: skip
def test_each_operator_learns_weights_biases_and_scales(
    op_type: str, inputs: Sequence[Any], learned: tuple[int, ...], options: dict[str, Any]
) -> None:
    data_index = 1 if learned == (0,) or op_type in ("Gather", "Where") else 0
    constants = [i for i, array in enumerate(inputs) if i != data_index and array is not None]
    model, _ = make_node_model(op_type, inputs, constants=constants, **options)
    graph = gs.import_onnx(model)  # as it comes: the rules are about nodes, and some of these have no shapes
    assert find_learned(graph) == tuple(f"in{index}" for index in learned)


def test_running_statistics_stay_though_they_are_of_the_shape_of_scales() -> None:
    net = Net()
    net.norm(net.conv("x", 3, 4, bias=False), 4)
    weight, variance, scale, bias, mean = net.weights
    graph = gs.import_onnx(net.model(net.nodes[-1].output[0]))
    assert find_learned(graph) == (weight, scale, bias)
    assert {mean, variance}.isdisjoint(find_learned(graph))


def test_what_is_a_scale_here_and_a_statistic_there_stays() -> None:
    net = Net()
    net.norm(net.conv("x", 3, 4, bias=False), 4)
    weight, _, _, bias, _ = net.weights
    norm = net.nodes[-1]
    norm.input[1] = norm.input[4]  # the variance is the scale, too: exporters share equal arrays
    assert find_learned(gs.import_onnx(net.model(norm.output[0]))) == (weight, bias)


def test_a_weight_that_is_data_elsewhere_stays() -> None:
    graph = graph_of(TOPOLOGIES["weight_is_an_output"]().model)
    weights = {node.name: node.inputs[1].name for node in graph.nodes if node.op == "Conv"}
    learned = find_learned(graph)
    assert weights["make_a"] not in learned  # an output of the model is its sum
    assert weights["make_y"] in learned


@pytest.mark.parametrize("op_type", ["Add", "Sum"])
@pytest.mark.parametrize("first", [False, True])
def test_a_bias_added_after_a_contraction_is_learned(op_type: str, first: bool) -> None:
    net = Net()
    x = net.op("MatMul", "x", net.rand(6, 4))
    bias = net.rand(4)
    y = net.op(op_type, *((bias, x) if first else (x, bias)))
    assert bias in find_learned(graph_of(net.model(y)))


def test_biases_have_one_axis_in_whatever_rank() -> None:
    net = Net()
    x = net.conv("x", 3, 4, bias=False)
    bias = net.rand(1, 4, 1, 1)
    y = net.relu(net.op("Add", x, bias))
    assert bias in find_learned(gs.import_onnx(net.model(y)))


@pytest.mark.parametrize(
    "build",
    [
        lambda net: net.op("Add", net.op("MatMul", "x", net.rand(6, 5)), net.rand(6, 5)),  # positions
        lambda net: net.op("Add", net.op("MatMul", "x", net.rand(6, 5)), net.const(np.float32(3))),
        lambda net: net.op("Add", net.relu(net.op("MatMul", "x", net.rand(6, 5))), net.rand(5)),
        lambda net: net.op("Add", net.op("MatMul", "x", net.op("Transpose", "x", perm=[0, 1, 3, 2])),
                           net.rand(6)),
        lambda net: net.op("Sub", net.op("MatMul", "x", net.rand(6, 5)), net.rand(5)),
        lambda net: net.op("Mul", net.op("MatMul", "x", net.rand(6, 5)), net.rand(5)),
    ],
    ids=["a table", "one number", "after a Relu", "a mask", "subtracted", "a factor"],
)  # fmt: skip
def test_other_constants_after_a_contraction_stay(build: Any) -> None:
    net = Net()
    y = build(net)
    weights = {name for name in net.weights if name.startswith("w") and name in net.nodes[0].input}
    assert set(find_learned(gs.import_onnx(net.model(y)))) == (
        weights if net.nodes[0].op_type == "MatMul" else set()
    )


def test_shared_weights_come_once_and_all_come_in_the_order_of_the_graph() -> None:
    net = Net()
    weight, bias = net.rand(3, 3, 3, 3), net.rand(3)
    x = "x"
    for _ in range(3):
        x = net.relu(net.op("Conv", x, weight, bias, pads=[1] * 4))
    last = net.rand(5, 3, 1, 1)
    y = net.op("Conv", x, last)
    assert find_learned(graph_of(net.model(y))) == (weight, bias, last)


def test_nodes_to_leave_keep_what_they_share_with_others() -> None:
    net = Net()
    weight = net.rand(3, 3, 3, 3)
    x = net.relu(net.op("Conv", "x", weight, net.rand(3), pads=[1] * 4, out="a"))
    x = net.relu(net.op("Conv", x, weight, net.rand(3), pads=[1] * 4, out="b"))
    net.op("Conv", x, net.rand(5, 3, 1, 1), out="y")
    graph = graph_of(net.model("y"))
    _, first, second, last = net.weights
    assert find_learned(graph) == (weight, first, second, last)
    for names, expected in (
        (["make_a"], (second, last)),
        (["make_b"], (first, last)),
        (["make_y"], (weight, first, second)),
        (["make_a", "make_b", "make_y"], ()),
        (["nothing"], (weight, first, second, last)),
    ):
        assert find_learned(graph, leave=names) == expected


def test_an_added_bias_of_a_node_to_leave_stays() -> None:
    net = Net()
    net.op("Add", net.op("MatMul", "x", net.rand(6, 5), out="h"), net.rand(5), out="y")
    graph = gs.import_onnx(net.model("y"))
    weight, bias = net.weights
    assert find_learned(graph, leave=["make_y"]) == (weight,)
    assert find_learned(graph, leave=["make_h"]) == (bias,)


def test_what_is_left_of_a_removed_branch_is_a_bias() -> None:
    case = Case(TOPOLOGIES["residual"]().model)
    keep = np.ones(case.coupling.n_elements, bool)
    (group,) = (group for group in case.coupling.groups if group.name == "make_b1")
    keep[group.elements] = False
    graph = case.cut(keep)
    constants = [name for name in graph.tensors() if name.endswith(CONSTANT_SUFFIX)]
    assert constants
    learned = find_learned(graph)
    assert set(constants) <= set(learned)
    assert set(learned) - set(constants) < set(find_learned(case.graph))


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_all_that_is_learned_is_a_float_initializer_and_weights_of_convolutions_are(name: str) -> None:
    graph = graph_of(TOPOLOGIES[name]().model)
    learned = find_learned(graph)
    constants = {n: t for n, t in graph.tensors().items() if isinstance(t, gs.Constant)}
    assert len(set(learned)) == len(learned)
    assert {constants[one].values.dtype.kind for one in learned} <= {"f"}
    contractions = [n for n in graph.nodes if n.op in ("Conv", "ConvTranspose", "Gemm")]
    others = {t.name for n in graph.nodes if n not in contractions for t in n.inputs}
    weights = {n.inputs[1].name for n in contractions} - others
    assert weights & set(constants) <= set(learned)


def test_half_precision_is_float_and_integers_are_not() -> None:
    model = make_model(
        [node("Conv", ["x", "w", "b"], ["y"])],
        inputs={"x": rand(1, 3, 5, 5).astype(np.float16)},
        outputs=["y"],
        weights={"w": rand(4, 3, 3, 3).astype(np.float16), "b": rand(4).astype(np.float16)},
    )
    assert find_learned(graph_of(model)) == ("w", "b")
