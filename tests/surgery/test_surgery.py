"""Surgery: for every group of every topology, removal equals masking at every read, to float rounding."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tools.surgery_oracle import Case
from topologies import TOPOLOGIES, Net

from hap_onnx.errors import SurgeryError
from hap_onnx.model.model_io import to_proto
from hap_onnx.planning.cost_graph import cost_model
from hap_onnx.surgery import with_weights
from tools.first_divergence import compare_tensors

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


# --- random models ---


@st.composite
def random_models(draw: st.DrawFn) -> onnx.ModelProto:
    """Draw a small network of everything that couples channels."""
    net = Net(seed=draw(st.integers(0, 99)))
    width = {"x": 4}

    def pick(n: int | None = None) -> str:
        return draw(st.sampled_from([name for name, size in width.items() if n in (None, size)]))

    def made(name: str, size: int) -> None:
        width[name] = size

    kinds = """conv conv branch gate attention depthwise grouped norm relu add concat split pool
        shuffle""".split()
    made(net.conv("x", 4, 6), 6)
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=9)):
        x = pick()
        n = width[x]
        if kind == "conv":
            n_out = draw(st.sampled_from([2, 4, 6]))
            made(net.conv(x, n, n_out, bias=draw(st.booleans())), n_out)
        elif kind == "branch":
            inner = net.relu(net.norm(net.conv(x, n, 4), 4))
            made(net.op("Add", x, net.norm(net.conv(inner, 4, n), n)), n)
        elif kind == "gate" and n % 2 == 0:
            halves = net.many(
                "Split", x, net.ints(n // 2, n // 2), outputs=[net.name("gate"), net.name("gate")], axis=1
            )
            made(net.op("Mul", halves[0], net.op("Sigmoid", halves[1])), n // 2)
        elif kind == "attention":
            gates = net.conv(net.op("GlobalAveragePool", x), n, n, k=1)
            made(net.op("Mul", x, net.op("Sigmoid", gates)), n)
        elif kind == "depthwise":
            made(net.conv(x, n, n, group=n), n)
        elif kind == "grouped" and n % 2 == 0:
            made(net.conv(x, n, 4, group=2), 4)
        elif kind == "norm":
            made(net.norm(x, n), n)
        elif kind == "relu":
            made(net.relu(x), n)
        elif kind == "add":
            made(net.op("Add", x, pick(n)), n)
        elif kind == "concat" and n <= 8:
            other = pick()
            made(net.op("Concat", x, other, axis=1), n + width[other])
        elif kind == "split":
            first = draw(st.integers(1, max(n - 1, 1)))
            if first < n:
                names = [net.name("part"), net.name("part")]
                net.many("Split", x, net.ints(first, n - first), outputs=names, axis=1)
                made(names[0], first)
                made(names[1], n - first)
        elif kind == "pool":
            made(net.op("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4), n)
        elif kind == "shuffle" and n % 2 == 0:
            spread = net.op("Reshape", x, net.ints(0, 2, n // 2, 4, 4))
            turned = net.op("Transpose", spread, perm=[0, 2, 1, 3, 4])
            made(net.op("Reshape", turned, net.ints(0, n, 4, 4)), n)
    last = list(width)[-1]
    net.conv(last, width[last], 3, out="y")
    other = pick()
    net.conv(other, width[other], 2, out="z")
    return net.model("y", "z", inputs={"x": ("N", 4, 4, 4)})


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(model=random_models(), seed=st.integers(0, 9))
def test_random_cuts_of_random_models_are_exact(model: onnx.ModelProto, seed: int) -> None:
    case = Case(model)
    rng = np.random.default_rng(seed)
    keep = rng.random(case.coupling.n_elements) < 0.6
    for group in case.coupling.groups:
        if not keep[group.elements].any():
            keep[group.elements[0]] = True
    case.check(keep, what="random cut")
    removable = sorted(cost_model(case.graph, case.coupling, case.shapes).removable)
    for index in removable:
        if rng.random() < 0.7:
            keep[case.coupling.groups[index].elements] = False
    case.check(keep, what="random cut with whole branches gone")
    # Whatever else is taken away whole is refused, or exact.
    for group in case.coupling.groups:
        if rng.random() < 0.3:
            keep[group.elements] = False
    try:
        case.cut(keep)
    except SurgeryError:
        return
    case.check(keep, what="random cut of whole groups")
