"""Grafting: implants inside models, and channels in another order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from topologies import TOPOLOGIES, Net

from hap_onnx.coupling.channels import ChannelGroup
from hap_onnx.errors import SurgeryError
from hap_onnx.model.model_io import load_model, normalise, to_proto
from hap_onnx.ops.implant import ImplantForm, implant_forms
from hap_onnx.prepare import PreparedModel, prepare
from hap_onnx.surgery.grafting import (
    can_permute,
    content_positions,
    insert_implants,
    permutable_groups,
    permute_channels,
)
from tools.first_divergence import compare_tensors, run_onnxruntime
from tools.surgery_oracle import TOLERANCE, Case


def check_same(case: Case, graph: gs.Graph) -> onnx.ModelProto:
    """Assert that a graph computes what the model computes, in the twin and in onnxruntime."""
    expected = case.run()
    proto = to_proto(graph, case.source)
    onnx.checker.check_model(proto, full_check=True)
    for where, outputs in (("twin", case.run(graph)), ("onnxruntime", run_onnxruntime(proto, case.inputs))):
        assert list(outputs) == list(expected)
        for name, values in expected.items():
            error, problem = compare_tensors(outputs[name], values)
            assert not problem, f"{where}, '{name}': {problem}"
            assert error < TOLERANCE, f"{where}, '{name}': off by {error:.1e}"
    return proto


# --- the order of channels ---

PERMUTABLE = """chain residual option_a_shortcut concat concat_with_input dense_block squeeze_and_excitation
    depthwise_plain depthwise_multiplied grouped_narrow grouped_wide conv_transpose flatten_to_gemm_flatten
    flatten_to_gemm_computed gate other_rank_conv1d other_rank_conv3d shared_weight siamese
    matmul_of_sequences matmul_from_the_left gemm_residual slope_per_channel channels_last mean_head_kept
    group_norm_by_reshape shuffle_by_reshape shuffle_net_units gather_permuted""".split()


def shuffled(case: Case, *groups: ChannelGroup) -> np.ndarray:
    order = np.arange(case.coupling.n_elements)
    rng = np.random.default_rng(0)
    for group in groups:
        order[group.elements] = rng.permutation(group.elements)
    return order


@pytest.mark.parametrize("name", PERMUTABLE)
def test_another_order_of_channels_changes_nothing(name: str) -> None:
    case = Case(TOPOLOGIES[name]().model)
    before = to_proto(case.graph, case.source).SerializeToString()
    graph = permute_channels(case.graph, case.coupling, shuffled(case, *case.coupling.groups))
    proto = check_same(case, graph)
    assert proto.SerializeToString() != before
    assert to_proto(case.graph, case.source).SerializeToString() == before
    assert [node.name for node in graph.nodes] == [node.name for node in case.graph.nodes]


def test_slots_get_the_content_of_their_elements() -> None:
    elements = np.array([2, -1, 0, 0, 1, -1, 1, 2])
    order = np.array([1, 2, 0])
    np.testing.assert_array_equal(content_positions(elements, order), [2, 1, 4, 6, 0, 5, 7, 3])
    values = np.arange(8) * 10
    contents = values[content_positions(elements, order)]
    for element in range(3):
        np.testing.assert_array_equal(contents[elements == element], values[elements == order[element]])
    with pytest.raises(SurgeryError, match="not equally many positions"):
        content_positions(np.array([0, 0, 1]), np.array([1, 0]))


def test_orders_compose() -> None:
    case = Case(TOPOLOGIES["residual"]().model)
    order = shuffled(case, *case.coupling.groups)
    there = permute_channels(case.graph, case.coupling, order)
    back = permute_channels(there, case.coupling, np.argsort(order))
    for name, tensor in case.graph.tensors().items():
        if isinstance(tensor, gs.Constant):
            np.testing.assert_array_equal(back.tensors()[name].values, tensor.values)


@pytest.mark.parametrize("order", [[0] * 14, range(13), [13, *range(1, 13), 0]])
def test_channels_stay_in_their_group(order: Sequence[int]) -> None:
    case = Case(TOPOLOGIES["chain"]().model)
    with pytest.raises(SurgeryError, match="only be permuted within their groups"):
        permute_channels(case.graph, case.coupling, np.array(order))


def prepared(net: Net | str) -> PreparedModel:
    model = TOPOLOGIES[net]().model if isinstance(net, str) else net.model("y")
    probe = np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)
    return prepare(load_model(model), {"x": probe})


@pytest.mark.parametrize("name", ["residual", "option_a_shortcut", "dense_block", "grouped_wide"])
def test_groups_that_can_be_permuted(name: str) -> None:
    found = prepared(name)
    assert permutable_groups(found) == {group.name for group in found.coupling.groups}


def part(net: Net, x: str, start: int, stop: int) -> str:
    return net.op("Slice", x, net.ints(start), net.ints(stop), net.ints(1))


def test_channels_that_go_different_ways_cannot_be_permuted() -> None:
    """Thirds of a tensor of which the outer two are alike: their reversal would not be noticed."""
    net = Net()
    x = net.conv("x", 3, 6, out="a")
    thirds = [net.op(op, part(net, x, 2 * i, 2 * i + 2)) for i, op in enumerate(["Relu", "Neg", "Relu"])]
    x = net.conv(net.op("Concat", *thirds, axis=1), 6, 4, out="b")
    net.conv(x, 4, 3, out="y")
    found = prepared(net)
    groups = {group.name: group for group in found.coupling.groups}
    assert groups["make_a"].size == 6
    assert not can_permute(found, groups["make_a"])
    assert can_permute(found, groups["make_b"])
    assert permutable_groups(found) == {"make_b"}
    reversal = np.arange(found.coupling.n_elements)
    reversal[groups["make_a"].elements] = groups["make_a"].elements[::-1]
    case = Case(net.model("y"))
    check_same(case, permute_channels(case.graph, case.coupling, reversal))


def test_halves_that_meet_again_cannot_be_mixed() -> None:
    found = prepared("gate_of_equal_parts")
    (group,) = found.coupling.groups
    assert group.size == 8
    assert not can_permute(found, group)
    assert permutable_groups(found) == frozenset()


# --- implants in models ---


def forms_of(graph: gs.Graph, name: str) -> dict[str, ImplantForm]:
    (node,) = (node for node in graph.nodes if node.name == name)
    return {form.kind: form for form in implant_forms(node)}


def exact(graph: gs.Graph, name: str, kind: str) -> tuple[str, list[np.ndarray]]:
    """An implant without error for a node with a kernel of one tap in a group."""
    (node,) = (node for node in graph.nodes if node.name == name)
    weight = node.inputs[1].values
    matrix = weight.reshape(len(weight), -1)
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    form = forms_of(graph, name)[kind]
    return kind, list(form.to_weights([v[None], (u * s)[None]]))


def random_implant(graph: gs.Graph, name: str, kind: str, rank: int = 2) -> tuple[str, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    shapes = forms_of(graph, name)[kind].weight_shapes(rank)
    return kind, [rng.standard_normal(shape) / np.prod(shape[1:]) ** 0.5 for shape in shapes]


def test_implants_all_over_a_model_are_exact_at_full_rank() -> None:
    case = Case(TOPOLOGIES["residual"]().model)
    names = [node.name for node in case.graph.nodes if node.op == "Conv"]
    implants = {name: exact(case.graph, name, "lowrank") for name in names}
    before = to_proto(case.graph, case.source).SerializeToString()
    graph = insert_implants(case.graph, implants)
    check_same(case, graph)
    assert to_proto(case.graph, case.source).SerializeToString() == before
    counts = Counter(node.op for node in case.graph.nodes)
    assert Counter(node.op for node in graph.nodes) == counts + Counter(Conv=len(names))
    outputs = {node.name: node.outputs[0].name for node in graph.nodes}
    assert all(outputs[node.name] == node.outputs[0].name for node in case.graph.nodes)
    # The order of the nodes is one that they can run in, and the nodes of an implant are neighbours.
    made = {tensor.name for tensor in graph.inputs}
    for node in graph.nodes:
        assert all(t.name in made for t in node.inputs if isinstance(t, gs.Variable) and t.name)
        made |= {tensor.name for tensor in node.outputs}


def test_no_implants_leave_the_model_as_it_is() -> None:
    case = Case(TOPOLOGIES["residual"]().model)
    assert to_proto(insert_implants(case.graph, {}), case.source) == to_proto(case.graph, case.source)


def test_implants_of_implants_get_names_of_their_own() -> None:
    case = Case(TOPOLOGIES["chain"]().model)
    graph = case.graph
    for _ in range(3):
        graph = insert_implants(graph, {"make_b": exact(graph, "make_b", "lowrank")})
    check_same(case, graph)
    assert len({node.name for node in graph.nodes}) == len(graph.nodes)
    assert sum(node.op == "Conv" for node in graph.nodes) == 6


def test_metadata_of_the_replaced_node_stay() -> None:
    model = TOPOLOGIES["chain"]().model
    for node in model.graph.node:
        node.metadata_props.add(key="origin", value=node.name)
    source = load_model(model)
    graph = normalise(source)
    for kind in ("lowrank", "spatial", "pointwise"):
        proto = to_proto(insert_implants(graph, {"make_b": random_implant(graph, "make_b", kind)}), source)
        (node,) = (node for node in proto.graph.node if node.name == "make_b")
        assert [(entry.key, entry.value) for entry in node.metadata_props] == [("origin", "make_b")]


def test_what_does_not_fit_is_refused() -> None:
    graph = Case(TOPOLOGIES["residual"]().model).graph
    kind, weights = random_implant(graph, "make_a1", "lowrank")
    with pytest.raises(SurgeryError, match="no node 'nowhere'"):
        insert_implants(graph, {"nowhere": (kind, weights)})
    with pytest.raises(SurgeryError, match="of kind 'fancy', but lowrank or spatial or pointwise"):
        insert_implants(graph, {"make_a1": ("fancy", weights)})
    relu = next(node.name for node in graph.nodes if node.op == "Relu")
    with pytest.raises(SurgeryError, match="but none at all"):
        insert_implants(graph, {relu: (kind, weights)})
    for wrong in (weights[:1], weights[::-1], [weights[0], weights[1][:, :1]], []):
        with pytest.raises(SurgeryError, match=r"for rank \d+ they must be"):
            insert_implants(graph, {"make_a1": (kind, wrong)})
    everything = random_implant(graph, "make_a1", "pointwise", rank=6)
    with pytest.raises(SurgeryError, match="none of them empty"):
        insert_implants(graph, {"make_a1": everything})


# --- what onnxruntime makes of it ---


def optimised(proto: onnx.ModelProto, folder: Path, level: ort.GraphOptimizationLevel) -> onnx.ModelProto:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath)


ACTIVATIONS: dict[str, dict[str, Any]] = {
    "Relu": {},
    "Clip": {},
    "LeakyRelu": {"alpha": 0.2},
    "Sigmoid": {},
    "HardSigmoid": {"alpha": 0.3},
    "Tanh": {},
}


def activated(op_type: str, *, opset: int = 17) -> Net:
    net = Net(opset=opset)
    x = net.conv("x", 3, 8, out="a")
    bounds = [net.const(np.float32(0)), net.const(np.float32(6))] if op_type == "Clip" else []
    x = net.op(op_type, x, *bounds, out="act", **ACTIVATIONS.get(op_type, {}))
    net.conv(x, 8, 4, out="y")
    return net


@pytest.mark.parametrize("op_type", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["lowrank", "spatial", "pointwise"])
def test_onnxruntime_still_fuses_the_activation(op_type: str, kind: str, tmp_path: Path) -> None:
    case = Case(activated(op_type).model("y"))
    graph = insert_implants(case.graph, {"make_a": random_implant(case.graph, "make_a", kind)})
    proto = to_proto(graph, case.source)
    level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    before = Counter(
        node.op_type for node in optimised(to_proto(case.graph, case.source), tmp_path, level).graph.node
    )
    after = Counter(node.op_type for node in optimised(proto, tmp_path, level).graph.node)
    assert before == Counter(FusedConv=1, Conv=1)
    if kind == "pointwise":
        assert after == Counter(FusedConv=2, Conv=1, Concat=1)
    else:
        assert after == Counter(FusedConv=1, Conv=2)
    outputs = run_onnxruntime(proto, case.inputs)
    assert compare_tensors(case.run(graph)["y"], outputs["y"])[0] < TOLERANCE
    everything = optimised(proto, tmp_path, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    assert not {node.op_type for node in everything.graph.node} & {"Transpose", "Gather", "Reshape", op_type}


def test_the_sum_of_a_residual_connection_is_still_fused(tmp_path: Path) -> None:
    case = Case(TOPOLOGIES["residual"]().model)
    names = ["make_a1", "make_b1", "make_a2", "make_b2"]
    implants = {name: random_implant(case.graph, name, "spatial") for name in names}
    found = []
    for graph in (case.graph, insert_implants(case.graph, implants)):
        proto = optimised(
            to_proto(graph, case.source), tmp_path, ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        )
        found.append(Counter(node.op_type for node in proto.graph.node))
    assert found[1] == found[0] + Counter(Conv=4)
    assert set(found[0]) <= {"Conv", "FusedConv", "Add", "Relu"}


def test_an_activation_on_the_parts_is_the_activation_of_the_whole() -> None:
    for op_type in ACTIVATIONS:
        case = Case(activated(op_type).model("y"))
        conv = case.graph.nodes[0]
        form = forms_of(case.graph, "make_a")["pointwise"]
        weights = [np.array(conv.inputs[1].values[:5]), np.array(conv.inputs[1].values[5:, :, 1:2, 1:2])]
        graph = insert_implants(case.graph, {"make_a": ("pointwise", weights)})
        dense = np.array(conv.inputs[1].values)
        mask = np.arange(9).reshape(3, 3) != form.tap
        dense[5:, :, mask] = 0
        conv.inputs[1].values = dense
        expected = case.run(case.graph)
        assert compare_tensors(case.run(graph)["y"], expected["y"])[0] < TOLERANCE
        assert {node.op for node in graph.nodes} == {"Conv", op_type, "Concat"}
        concat = next(node for node in graph.nodes if node.op == "Concat")
        assert concat.outputs[0].name == "act"


@pytest.mark.parametrize("why", ["two readers", "slopes", "computed bound", "output", "subgraph"])
def test_an_activation_that_cannot_be_copied_reads_the_whole(why: str) -> None:
    net = Net()
    x = net.conv("x", 3, 8, out="a")
    outputs = ["y"]
    if why == "two readers":
        act = net.op("Mul", x, net.op("Sigmoid", x))
    elif why == "slopes":
        act = net.op("PRelu", x, net.rand(8, 1, 1))
    elif why == "computed bound":
        low = net.op("ReduceMin", "x", keepdims=0)
        act = net.op("Clip", x, low)
    elif why == "subgraph":
        branches = {}
        for name in ("then_branch", "else_branch"):
            relu = helper.make_node("Relu", ["a"], [name], name=f"make_{name}")
            branches[name] = helper.make_graph([relu], name, [], [onnx.ValueInfoProto(name=name)])
        act = net.op("If", net.const(np.array(True)), **branches)
    else:
        act, outputs = net.relu(x), ["y", "a"]
    net.conv(act, 8, 4, out="y")
    case = Case(net.model(*outputs))
    graph = insert_implants(case.graph, {"make_a": random_implant(case.graph, "make_a", "pointwise")})
    concat = next(node for node in graph.nodes if node.op == "Concat")
    assert concat.outputs[0].name == "a"
    assert len(graph.nodes) == len(case.graph.nodes) + 2
    proto = to_proto(graph, case.source)
    onnx.checker.check_model(proto, full_check=True)
    expected = run_onnxruntime(proto, case.inputs)
    for name, values in case.run(graph).items():
        assert compare_tensors(values, expected[name])[0] < TOLERANCE


def test_channels_that_become_pointwise_are_brought_to_the_end() -> None:
    """Permutation and implant together: chosen channels, wherever they are, lose all taps but one."""
    case = Case(TOPOLOGIES["residual"]().model)
    (group,) = (group for group in case.coupling.groups if group.name == "make_a1")
    (axis,) = (
        weight
        for weight in case.coupling.weights
        if weight.initializer == case.graph.tensors()["a1"].inputs[0].inputs[1].name and weight.axis == 0
    )
    chosen = np.array([0, 3])
    rest = np.setdiff1d(np.arange(group.size), chosen)
    order = np.arange(case.coupling.n_elements)
    order[axis.elements] = axis.elements[np.concatenate([rest, chosen])]
    moved = permute_channels(case.graph, case.coupling, order)
    node = moved.tensors()["a1"].inputs[0]
    weights = [node.inputs[1].values[:-2], node.inputs[1].values[-2:, :, 1:2, 1:2]]
    graph = insert_implants(moved, {"make_a1": ("pointwise", weights)})
    original = case.graph.tensors()["a1"].inputs[0].inputs[1]
    dense = np.zeros_like(original.values)
    dense[rest] = original.values[rest]
    dense[chosen, :, 1, 1] = original.values[chosen, :, 1, 1]
    original.values = dense
    with torch.no_grad():
        assert compare_tensors(case.run(graph)["y"], case.run(case.graph)["y"])[0] < TOLERANCE
