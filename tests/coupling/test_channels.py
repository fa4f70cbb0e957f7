"""Coupling: which channels are found to go together, and why others stay."""

from __future__ import annotations

import numpy as np
import pytest
from topologies import TOPOLOGIES, Net, Topology

from hap_onnx.coupling.channels import Coupling, find_groups
from hap_onnx.model.model_io import load_model, normalise
from hap_onnx.surgery import kept_positions
from tools.surgery_oracle import Case


def couple(topology: Topology, **exclude: str) -> Coupling:
    case = Case(topology.model)
    return find_groups(case.graph, case.shapes, exclude=exclude)


def reason_of(coupling: Coupling, name: str) -> str:
    return next(entry.reason for entry in coupling.frozen if entry.node == name)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_groups_are_those_of_the_topology(name: str) -> None:
    topology = TOPOLOGIES[name]()
    coupling = couple(topology)
    assert sorted(group.size for group in coupling.groups) == sorted(topology.sizes)
    for node, reason in topology.frozen.items():
        assert reason in reason_of(coupling, node)
    names = [group.name for group in coupling.groups]
    assert len(set(names)) == len(names)
    elements = [element for group in coupling.groups for element in group.elements.tolist()]
    assert sorted(elements) == list(range(coupling.n_elements))


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_axes_of_a_group_count_its_positions(name: str) -> None:
    coupling = couple(TOPOLOGIES[name]())
    weights = {(weight.initializer, weight.axis): weight for weight in coupling.weights}
    for group in coupling.groups:
        for initializer, axis, count in group.axes:
            inside = np.isin(weights[initializer, axis].elements, group.elements)
            assert inside.sum() == count * group.size


def test_groups_name_producers_and_consumers() -> None:
    coupling = couple(TOPOLOGIES["residual"]())
    stream = next(group for group in coupling.groups if group.name == "make_stem")
    assert stream.producers == ("make_stem", "make_a2", "make_b2")
    assert stream.consumers == ("make_a1", "make_b1", "make_y")


def test_reads_lie_where_contractions_read() -> None:
    coupling = couple(TOPOLOGIES["squeeze_and_excitation"]())
    assert [read.index for read in coupling.reads] == [0, 0, 0]
    assert all(read.axis == 1 for read in coupling.reads)


@pytest.mark.parametrize("name", ["make_a", "weight"])
def test_excluded_channels_stay(name: str) -> None:
    topology = TOPOLOGIES["chain"]()
    name = topology.model.graph.node[0].input[1] if name == "weight" else name
    coupling = couple(topology, **{name: "asked for"})
    assert [group.size for group in coupling.groups] == [6]
    assert "asked for" in reason_of(coupling, "make_a")


def test_coupling_is_repeatable() -> None:
    first, second = (couple(TOPOLOGIES["shuffle_net"]()) for _ in range(2))
    assert [group.name for group in first.groups] == [group.name for group in second.groups]
    for a, b in zip(first.weights, second.weights, strict=True):
        assert (a.initializer, a.axis, a.elements.tolist()) == (b.initializer, b.axis, b.elements.tolist())


def test_weights_of_subgraphs_stay() -> None:
    """What an If reads is not followed."""
    from onnx import TensorProto, helper

    net = Net()
    net.conv("x", 3, 6, out="a")
    branches = {}
    for branch in ("then_branch", "else_branch"):
        inner = helper.make_node("Relu" if branch[0] == "t" else "Neg", ["a"], [f"{branch}_y"])
        info = helper.make_tensor_value_info(f"{branch}_y", TensorProto.FLOAT, None)
        branches[branch] = helper.make_graph([inner], branch, [], [info])
    net.op("If", net.const(np.array(True)), out="picked", **branches)
    net.conv("picked", 6, 3, out="y")
    case = Case(net.model("y"))
    coupling = find_groups(case.graph, case.shapes)
    assert coupling.groups == ()
    assert "a subgraph of If reads them" in reason_of(coupling, "make_a")


def test_kept_positions_hold_what_belongs_to_no_element() -> None:
    elements = np.array([-1, 0, 1, 1, -1, 2])
    assert kept_positions(elements, np.array([True, False, False])).tolist() == [0, 1, 4]
    assert kept_positions(np.array([-1, -1]), np.zeros(0, bool)).tolist() == [0, 1]


def test_a_model_without_contractions_has_no_groups() -> None:
    net = Net()
    net.op("Relu", "x", out="y")
    graph = normalise(load_model(net.model("y")))
    assert find_groups(graph, {"x": (2, 3, 6, 6), "y": (2, 3, 6, 6)}).n_elements == 0
