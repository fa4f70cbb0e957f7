"""Surgery: for every group of every topology, removal equals masking at every read, to float rounding."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from topologies import TOPOLOGIES

from hap_onnx.errors import SurgeryError
from hap_onnx.model.model_io import to_proto
from hap_onnx.planning.cost_graph import cost_model
from hap_onnx.surgery import with_weights
from tools.first_divergence import compare_tensors
from tools.surgery_oracle import Case

SHARED = Path(os.environ.get("HAP_ONNX_SHARED", "/nonexistent")) / "models"
SHARED_MODELS = [
    "resnet20.onnx", "resnet20_bn.onnx", "resnet56.onnx", "resnet56_bn.onnx", "resnet56_dynamo.onnx",
    "ultraface_rfb_320.onnx",
]  # fmt: skip
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="HAP_ONNX_SHARED is not set")


def same_bytes(case: Case, before: bytes) -> bool:
    return to_proto(case.graph, case.source).SerializeToString() == before


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_removal_equals_masking(name: str) -> None:
    topology = TOPOLOGIES[name]()
    case = Case(topology.model)
    before = to_proto(case.graph, case.source).SerializeToString()
    rng = np.random.default_rng(0)
    original = case.run()
    for group in case.coupling.groups:
        keep = case.draw(rng, group.elements)
        case.check(keep, what=f"half of {group.name}")
    if case.coupling.groups:
        keep = case.draw(rng)
        case.check(keep, what="half of all")
        one = np.zeros(case.coupling.n_elements, bool)
        one[[group.elements[-1] for group in case.coupling.groups]] = True
        case.check(one, what="all but one of each group")
        if name != "unread_part":
            masked = case.run(mask=keep)
            assert max(compare_tensors(masked[key], original[key])[0] for key in original) > 1e-3
    assert same_bytes(case, before)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_plan_that_removes_nothing_gives_an_equal_model(name: str) -> None:
    case = Case(TOPOLOGIES[name]().model)
    keep = np.ones(case.coupling.n_elements, bool)
    graph = case.check(keep)
    assert [node.name for node in graph.nodes] == [node.name for node in case.graph.nodes]
    assert to_proto(graph, case.source) == to_proto(case.graph, case.source)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_whole_groups_go_exactly_or_not_at_all(name: str) -> None:
    topology = TOPOLOGIES[name]()
    case = Case(topology.model)
    gone = []
    for group in case.coupling.groups:
        keep = np.ones(case.coupling.n_elements, bool)
        keep[group.elements] = False
        try:
            case.cut(keep)
        except SurgeryError:
            continue
        case.check(keep, what=f"all of {group.name}")
        gone.append(group.name)
    assert set(topology.gone) <= set(gone)
    priced = cost_model(case.graph, case.coupling, case.shapes)
    assert {case.coupling.groups[index].name for index in priced.removable} <= set(gone)


def test_a_removed_branch_leaves_no_nodes() -> None:
    case = Case(TOPOLOGIES["residual"]().model)
    keep = np.ones(case.coupling.n_elements, bool)
    for group in case.coupling.groups:
        if group.name in ("make_a1", "make_b1"):
            keep[group.elements] = False
    graph = case.check(keep)
    assert sorted(node.op for node in graph.nodes) == ["Add", "Add", "Conv", "Conv", "Relu", "Relu", "Relu"]


def test_surgery_refuses_what_it_cannot_do() -> None:
    case = Case(TOPOLOGIES["chain"]().model)
    with pytest.raises(SurgeryError, match="the plan decides 3 elements, the model has 14"):
        case.cut(np.ones(3, bool))
    with pytest.raises(SurgeryError, match="cannot do with a constant"):
        case.cut(np.arange(14) >= 8)
    with pytest.raises(SurgeryError, match="nothing is left"):
        case.cut(np.arange(14) < 8)


def test_weights_are_replaced_in_a_copy() -> None:
    case = Case(TOPOLOGIES["chain"]().model)
    name = case.graph.nodes[0].inputs[1].name
    old = case.graph.tensors()[name].values.copy()
    changed = with_weights(case.graph, {name: old.astype(np.float64) * 2})
    assert changed.tensors()[name].values.dtype == np.float32
    np.testing.assert_array_equal(changed.tensors()[name].values, old * 2)
    np.testing.assert_array_equal(case.graph.tensors()[name].values, old)
    with pytest.raises(SurgeryError, match="is not an initializer"):
        with_weights(case.graph, {name: old[:1]})


# --- real models ---


@needs_shared
@pytest.mark.parametrize("name", SHARED_MODELS)
def test_shared_models(name: str) -> None:
    case = Case(SHARED / name, n_samples=2)
    rng = np.random.default_rng(0)
    case.check(case.draw(rng), what="half of all")
    groups = case.coupling.groups
    assert groups
    for index in rng.choice(len(groups), min(3, len(groups)), replace=False):
        case.check(case.draw(rng, groups[index].elements), what=f"half of {groups[index].name}")
    assert to_proto(case.cut(np.ones(case.coupling.n_elements, bool)), case.source) == to_proto(
        case.graph, case.source
    )
    priced = cost_model(case.graph, case.coupling, case.shapes)
    keep = case.draw(rng)
    for group in sorted(priced.removable)[::2]:
        keep[groups[group].elements] = False
    case.check(keep, what="with whole branches gone")
