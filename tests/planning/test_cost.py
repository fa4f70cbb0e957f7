"""Costs without surgery, against counts after surgery."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from helpers import make_model, node, rand
from hypothesis import given, settings
from hypothesis import strategies as st
from topologies import TOPOLOGIES

from hap_onnx.coupling.channels import Coupling, find_groups
from hap_onnx.model.measure import model_size
from hap_onnx.model.model_io import load_model, normalise
from hap_onnx.ops.linear import linear_form
from hap_onnx.planning.cost import N_METRICS, AxisLength, CostModel, CostState, CostTerm, LayerTerms
from hap_onnx.planning.cost_graph import cost_model, removable_branches
from hap_onnx.surgery import remove_channels
from hap_onnx.twin import build_twin, probe_shapes

SHARED = Path(os.environ.get("HAP_ONNX_SHARED", "/nonexistent"))

Inputs = dict[str, torch.Tensor]
Prepared = tuple[gs.Graph, Coupling, dict[str, tuple[int, ...]], Inputs]


def prepare(model: onnx.ModelProto | Path) -> Prepared:
    graph = normalise(load_model(model))
    inputs = {
        tensor.name: torch.zeros(*[2, *tensor.shape[1:]], dtype=torch.float32) for tensor in graph.inputs
    }
    shapes = probe_shapes(build_twin(graph), inputs)
    return graph, find_groups(graph, shapes), shapes, inputs


def check_counts(prepared: Prepared, cost: CostModel, widths: np.ndarray, rng: np.random.Generator) -> None:
    """Assert that the costs are those of the graph after surgery."""
    graph, coupling, shapes, inputs = prepared
    keep = np.zeros(coupling.n_elements, bool)
    for group, width in zip(coupling.groups, widths, strict=True):
        keep[rng.choice(group.elements, width, replace=False)] = True
    cut = remove_channels(graph, coupling, keep, shapes=shapes)
    size = model_size(cut, probe_shapes(build_twin(cut), inputs))
    assert (cost.params(widths), cost.macs(widths)) == (size.params, size.macs), widths.tolist()


def draw(cost: CostModel, rng: np.random.Generator, *, gone: float) -> np.ndarray:
    widths = np.array([rng.integers(1, size + 1) for size in cost.sizes], np.int64)
    for group in sorted(cost.removable):
        if rng.random() < gone:
            widths[group] = 0
    return widths


class Net:
    """Collects nodes and weights."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = np.abs(rand(*shape, seed=len(self.weights))) + 0.1
        return name

    def op(self, op_type: str, *inputs: str, **attributes: object) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(node(op_type, inputs, [name], **attributes))
        return name

    def conv(
        self, x: str, n_in: int, n_out: int, *, bias: bool = True, kernel: int = 3, group: int = 1
    ) -> str:
        weights = [self.weight(n_out, n_in // group, kernel, kernel)] + [self.weight(n_out)] * bias
        return self.op("Conv", x, *weights, group=group, pads=[kernel // 2] * 4)

    def norm(self, x: str, n: int) -> str:
        return self.op("BatchNormalization", x, *[self.weight(n) for _ in range(4)])

    def model(self, out: str, **inputs: tuple[int | str, ...]) -> onnx.ModelProto:
        return make_model(self.nodes, inputs=inputs, outputs=[out], weights=self.weights)


def chain() -> onnx.ModelProto:
    net = Net()
    x = net.op("Relu", net.conv("x", 3, 8))
    x = net.op("Relu", net.norm(net.conv(x, 8, 8, group=8, bias=False), 8))
    x = net.op("Clip", net.conv(x, 8, 12, kernel=1), net.weight(), net.weight())
    x = net.conv(x, 12, 8, group=2)
    x = net.op("ConvTranspose", x, net.weight(8, 5, 2, 2), net.weight(5), strides=[2, 2])
    x = net.op("Flatten", net.op("AveragePool", x, kernel_shape=[4, 4], strides=[4, 4]))
    return net.model(net.op("Gemm", x, net.weight(20, 7), net.weight(7)), x=("N", 3, 4, 4))


def residual() -> onnx.ModelProto:
    """Blocks with folded and with real BatchNormalization, a bottleneck, and one normalised before."""
    net = Net()
    x = net.op("Relu", net.conv("x", 3, 8))
    y = net.conv(net.op("Relu", net.conv(x, 8, 6)), 6, 8)
    x = net.op("Relu", net.op("Add", y, x))
    y = net.norm(net.conv(net.op("Relu", net.norm(net.conv(x, 8, 6, bias=False), 6)), 6, 8, bias=False), 8)
    x = net.op("Relu", net.op("Add", x, y))
    y = net.op("Relu", net.norm(net.conv(x, 8, 4, kernel=1, bias=False), 4))
    y = net.op("Clip", net.norm(net.conv(y, 4, 5, bias=False), 5), net.weight(), net.weight())
    y = net.op("LeakyRelu", net.norm(net.conv(y, 5, 8, kernel=1, bias=False), 8))
    x = net.op("Add", y, x)
    y = net.conv(net.op("Relu", net.norm(x, 8)), 8, 4)
    x = net.op("Sub", x, net.conv(net.op("Relu", net.norm(y, 4)), 4, 8, bias=False))
    x = net.op("Flatten", net.op("GlobalAveragePool", x))
    return net.model(net.op("Gemm", x, net.weight(7, 8), net.weight(7), transB=1), x=("N", 3, 6, 6))


def mixer() -> onnx.ModelProto:
    """A product that mixes positions, channels passing through it, and a residual branch of products."""
    net = Net()
    x = net.op("MatMul", "x", net.weight(5, 8))
    y = net.op("MatMul", net.op("Relu", net.op("MatMul", x, net.weight(8, 12))), net.weight(12, 8))
    x = net.op("Add", x, y)
    x = net.op(
        "Transpose",
        net.op("MatMul", net.op("Transpose", x, perm=[0, 2, 1]), net.weight(4, 6)),
        perm=[0, 2, 1],
    )
    return net.model(net.op("MatMul", x, net.weight(8, 3)), x=("N", 4, 5))


def shared() -> onnx.ModelProto:
    """One weight in two places, one number for all channels, and channels side by side."""
    net = Net()
    weight = net.weight(6, 6, 3, 3)
    a = net.op("Relu", net.conv("x", 3, 6))
    b = net.op("Conv", a, weight, pads=[1] * 4)
    c = net.op("Mul", net.op("Conv", b, weight, pads=[1] * 4), net.weight(1))
    d = net.op("Concat", c, net.conv("x", 3, 4), axis=1)
    return net.model(net.conv(d, 10, 2), x=("N", 3, 5, 5))


@pytest.mark.parametrize("build", [chain, residual, mixer, shared])
def test_costs_equal_counts_after_surgery(build: Callable[[], onnx.ModelProto]) -> None:
    prepared = prepare(build())
    cost = cost_model(*prepared[:3])
    assert len(cost.sizes) > 1
    rng = np.random.default_rng(0)
    check_counts(prepared, cost, np.array(cost.sizes), rng)
    for gone in (0.0, 0.3, 0.3, 0.6, 0.6, 1.0):
        check_counts(prepared, cost, draw(cost, rng, gone=gone), rng)


@pytest.mark.skipif(not SHARED.is_dir(), reason="HAP_ONNX_SHARED is not set")
@pytest.mark.parametrize(("name", "n_branches"), [("resnet20", 9), ("resnet20_bn", 9)])
def test_costs_of_a_resnet_equal_counts_after_surgery(name: str, n_branches: int) -> None:
    prepared = prepare(SHARED / "models" / f"{name}.onnx")
    cost = cost_model(*prepared[:3])
    assert len(cost.removable) == n_branches
    rng = np.random.default_rng(0)
    for gone in (0.0, 0.3, 1.0):
        check_counts(prepared, cost, draw(cost, rng, gone=gone), rng)


ATTENTION = [
    *("transformer_block packed_heads_gather grouped_queries_expand one_key_for_all_queries".split()),
    *("heads_by_einsum products_by_einsum attention_over_channels attention_of_convolutions".split()),
    *("heads_in_the_batch_computed bias_of_scores_table bias_of_scores_small_network".split()),
    *("shifted_windows gated_width_split heads_of_two_widths".split()),
]


@pytest.mark.parametrize("name", ATTENTION)
def test_costs_of_attention_equal_counts_after_surgery(name: str) -> None:
    """Also at one sample, where an axis that holds heads and samples is half as long as at the probe."""
    graph, coupling, shapes, inputs = prepare(TOPOLOGIES[name]().model)
    one = {key: tensor[:1] for key, tensor in inputs.items()}
    rng = np.random.default_rng(0)
    for run, at in ((inputs, shapes), (one, probe_shapes(build_twin(graph), one))):
        cost = cost_model(graph, coupling, at)
        full = np.array(cost.sizes)
        assert cost.macs(full) == model_size(graph, at).macs
        for _ in range(4):
            widths = draw(cost, rng, gone=0.3)
            keep = np.zeros(coupling.n_elements, bool)
            for group, width in zip(coupling.groups, widths, strict=True):
                keep[rng.choice(group.elements, width, replace=False)] = True
            cut = remove_channels(graph, coupling, keep, shapes=shapes)
            size = model_size(cut, probe_shapes(build_twin(cut), run))
            assert (cost.params(widths), cost.macs(widths)) == (size.params, size.macs), widths.tolist()


def test_names_the_branches_that_may_go() -> None:
    graph, coupling, shapes, _ = prepare(residual())
    names = removable_branches(graph, coupling, shapes)
    ends = [group.consumers[0] for group in coupling.groups if group.name in names]
    # The second of two convolutions of each block, the third of the bottleneck.
    assert len(ends) == 4
    sizes = [group.size for group in coupling.groups if group.name in names]
    assert sizes == [6, 6, 5, 4]
    cost = cost_model(graph, coupling, shapes)
    assert {coupling.groups[group].name for group in cost.removable} == names


def test_keeps_branches_that_something_else_needs() -> None:
    def n_removable(finish: Callable[[Net, str, str], str]) -> int:
        net = Net()
        x = net.op("Relu", net.conv("x", 3, 6))
        y = net.conv(net.op("Relu", net.conv(x, 6, 4)), 4, 6)
        out = finish(net, x, y)
        return len(removable_branches(*prepare(net.model(net.conv(out, 6, 2), x=("N", 3, 5, 5)))[:3]))

    assert n_removable(lambda net, x, y: net.op("Add", x, y)) == 1
    assert n_removable(lambda net, x, y: net.op("Sub", x, net.op("Identity", y))) == 1
    assert n_removable(lambda net, x, y: y) == 0
    assert n_removable(lambda net, x, y: net.op("Mul", x, y)) == 0
    assert n_removable(lambda net, x, y: net.op("Sub", y, x)) == 0
    assert n_removable(lambda net, x, y: net.op("Add", y, y)) == 0
    assert n_removable(lambda net, x, y: net.op("Add", y, net.weight(6, 1, 1))) == 0
    assert n_removable(lambda net, x, y: net.op("Add", y, net.op("GlobalAveragePool", x))) == 0
    assert n_removable(lambda net, x, y: net.op("Add", net.op("Mul", x, y), y)) == 0


def test_of_two_branches_that_are_all_there_is_one_may_go() -> None:
    net = Net()
    left = net.conv(net.op("Relu", net.conv("x", 3, 4)), 4, 6)
    right = net.conv(net.op("Relu", net.conv("x", 3, 5)), 5, 6)
    model = net.model(net.conv(net.op("Add", left, right), 6, 2), x=("N", 3, 5, 5))
    graph, coupling, shapes, _ = prepare(model)
    names = removable_branches(graph, coupling, shapes)
    assert [group.size for group in coupling.groups if group.name in names] == [4]


@pytest.mark.parametrize("build", [chain, residual, mixer, shared])
def test_state_follows_every_change_of_a_width(build: Callable[[], onnx.ModelProto]) -> None:
    cost = cost_model(*prepare(build())[:3])
    rng = np.random.default_rng(1)
    state = CostState(cost, draw(cost, rng, gone=0.3))
    for _ in range(30):
        options = np.stack([draw(cost, rng, gone=0.4) for _ in range(3)], axis=1)
        changes = state.changes(options)
        for group, row in enumerate(options):
            for width, change in zip(row, changes[group], strict=True):
                widths = state.widths.copy()
                widths[group] = width
                assert (cost.totals(widths) - cost.totals(state.widths)).tolist() == change.tolist()
        before, old = state.copy(), state.widths.copy()
        group = int(rng.integers(len(cost.sizes)))
        state.set_width(group, int(options[group, 0]))
        assert state.totals.tolist() == cost.totals(state.widths).tolist()
        assert before.totals.tolist() == cost.totals(old).tolist()
        assert before.changes(options).tolist() == changes.tolist()


def test_a_group_on_both_axes_costs_its_square() -> None:
    cost = CostModel((5,), (AxisLength(1, ((0, 2),)),), (CostTerm(3, 7, (0, 0)),))
    assert [cost.params([w]) for w in (1, 2, 5)] == [27, 75, 363]
    state = CostState(cost, [2])
    assert state.changes(np.array([[1, 5]])).tolist() == [[[27 - 75, 63 - 175, 0], [363 - 75, 847 - 175, 0]]]
    assert state.gradient.tolist() == [[3 * 2 * 2 * 5, 7 * 2 * 2 * 5, 0]]


def test_refuses_widths_that_cannot_be() -> None:
    cost = CostModel((5, 3), (AxisLength(0, ((0, 1),)),), (CostTerm(1, 1, (0,)),), frozenset({1}))
    assert cost.totals([[5, 0], [1, 3]]).tolist() == [[5, 5, 0], [1, 1, 0]]
    for widths in ([0, 3], [6, 3], [5, -1]):
        with pytest.raises(ValueError, match="width"):
            cost.params(widths)
    with pytest.raises(ValueError, match="1 widths for 2 groups"):
        cost.params([5])
    with pytest.raises(ValueError, match="two axes"):
        CostTerm(1, 1, (0, 0, 0))


# --- layers ---


def with_layers(prepared: Prepared) -> CostModel:
    """The cost of a graph in which every node with a matrix form may be replaced."""
    graph, coupling, shapes, _ = prepared
    names = {node.name for node in graph.nodes if linear_form(node) is not None}
    return cost_model(graph, coupling, shapes, layers=names)


def draw_tables(cost: CostModel, rng: np.random.Generator, n_options: int) -> np.ndarray:
    tables = rng.integers(-3, 50, (len(cost.layers), n_options, 4, N_METRICS))
    tables[rng.random(tables.shape[:2]) < 0.3, 1:] = 0
    for index, layer in enumerate(cost.layers):
        tables[index, 0] = layer.dense
    return tables


def count_layers(prepared: Prepared, cost: CostModel, tables: np.ndarray, keep: np.ndarray) -> list[int]:
    """All costs after surgery, each layer counted by its own coefficients and the shape its weight has."""
    graph, coupling, shapes, inputs = prepared
    cut = remove_channels(graph, coupling, keep, shapes=shapes)
    size = model_size(cut, probe_shapes(build_twin(cut), inputs))
    nodes = {node.name: node for node in cut.nodes}
    totals = np.array([size.params, size.macs, 0])
    for layer, table in zip(cost.layers, tables, strict=True):
        if layer.node in nodes:
            form = linear_form(nodes[layer.node])
            assert form is not None
            shape = nodes[layer.node].inputs[form.weight_index].shape
            n_in, n_out = shape[form.in_axis], shape[form.out_axis]
            totals += np.array([n_in * n_out, n_in, n_out, 1]) @ (table - layer.dense)
    return totals.tolist()


@pytest.mark.parametrize(("build", "n_layers"), [(chain, 4), (residual, 11), (mixer, 4), (shared, 3)])
def test_layers_cost_what_they_have_after_surgery(
    build: Callable[[], onnx.ModelProto], n_layers: int
) -> None:
    prepared = prepare(build())
    plain, cost = cost_model(*prepared[:3]), with_layers(prepared)
    assert len(cost.layers) == n_layers
    assert all(layer.dense[1:].tolist() == [[0, 0, 0]] * 3 for layer in cost.layers)
    rng = np.random.default_rng(2)
    for gone in (0.0, 0.3, 0.3, 0.6, 1.0):
        widths = draw(cost, rng, gone=gone)
        assert cost.totals(widths).tolist() == plain.totals(widths).tolist()
        tables = draw_tables(cost, rng, 2)[:, 1]
        keep = np.zeros(prepared[1].n_elements, bool)
        for group, width in zip(prepared[1].groups, widths, strict=True):
            keep[rng.choice(group.elements, width, replace=False)] = True
        assert cost.totals(widths, tables).tolist() == count_layers(prepared, cost, tables, keep)


def test_leaves_out_layers_whose_cost_is_not_of_two_axes() -> None:
    prepared = prepare(chain())
    nodes = {node.name: node for node in prepared[0].nodes if node.op in ("Conv", "ConvTranspose", "Gemm")}
    kinds = {name: (node.op, int(node.attrs.get("group", 1))) for name, node in nodes.items()}
    graph, coupling, shapes, _ = prepared
    cost = cost_model(graph, coupling, shapes, layers=list(nodes))
    # Depthwise loses whole conv groups; a transposed convolution has no matrix form.
    left_out = [kinds[name] for name in kinds if name not in {layer.node for layer in cost.layers}]
    assert left_out == [("Conv", 8), ("ConvTranspose", 1)]
    assert [kinds[layer.node] for layer in cost.layers] == [
        ("Conv", 1),
        ("Conv", 1),
        ("Conv", 2),
        ("Gemm", 1),
    ]
    # A product over positions counts channels besides; a weight in two places is not one layer's.
    assert len(with_layers(prepare(mixer())).layers) == 4
    nodes_of_shared = [node for node in prepare(shared())[0].nodes if node.op == "Conv"]
    assert len(nodes_of_shared) == len(with_layers(prepare(shared())).layers) + 2
    with pytest.raises(ValueError, match="no node stranger"):
        cost_model(graph, coupling, shapes, layers=["stranger"])


# Two layers with a group on both of their axes, of which one goes with it.
_SQUARE = CostModel(
    (5, 4),
    (AxisLength(1, ((0, 2), (1, 1))), AxisLength(0, ((0, 1),))),
    (
        *(
            CostTerm(c, 2 * c, axes, frozenset({0}), latency=3 * c)
            for c, axes in [(3, (0, 0)), (0, (0,)), (0, (0,)), (0, ())]
        ),
        *(
            CostTerm(c, 5 * c, axes, latency=2 * c)
            for c, axes in [(2, (0, 1)), (0, (0,)), (0, (1,)), (0, ())]
        ),
        CostTerm(7, 0, (0,), frozenset(), 0),
    ),
    frozenset({0}),
    tuple(
        LayerTerms(name, places, np.array([dense, (0, 0, 0), (0, 0, 0), (0, 0, 0)]))
        for name, places, dense in [("a", (0, 1, 2, 3), (3, 6, 9)), ("b", (4, 5, 6, 7), (2, 10, 4))]
    ),
)


@functools.cache
def layered(name: str) -> CostModel:
    builds = {"chain": chain, "residual": residual, "mixer": mixer}
    return _SQUARE if name == "square" else with_layers(prepare(builds[name]()))


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(["chain", "residual", "mixer", "square"]), seed=st.integers(0, 10**6))
def test_state_follows_every_change_of_a_layer(name: str, seed: int) -> None:
    cost, rng = layered(name), np.random.default_rng(seed)
    tables = draw_tables(cost, rng, 4)
    current = tables[:, 0].copy()
    state = CostState(cost, draw(cost, rng, gone=0.3))
    for _ in range(12):
        before, old = state.copy(), (state.widths.copy(), current.copy())
        if rng.random() < 0.5:
            layer, option = int(rng.integers(len(cost.layers))), int(rng.integers(4))
            current[layer] = tables[layer, option]
            state.set_coefficients(layer, tables[layer, option])
        else:
            group = int(rng.integers(len(cost.sizes)))
            state.set_width(group, int(draw(cost, rng, gone=0.5)[group]))
        totals = cost.totals(state.widths, current)
        assert state.totals.tolist() == totals.tolist()
        assert before.totals.tolist() == cost.totals(*old).tolist()
    options = np.stack([draw(cost, rng, gone=0.5) for _ in range(3)], axis=1)
    for (group, column), width in np.ndenumerate(options):
        widths = state.widths.copy()
        widths[group] = width
        change = state.changes(options)[group, column]
        assert change.tolist() == (cost.totals(widths, current) - totals).tolist()
    for layer, option in np.ndindex(*tables.shape[:2]):
        other = current.copy()
        other[layer] = tables[layer, option]
        change = state.layer_changes(tables)[layer, option]
        assert change.tolist() == (cost.totals(state.widths, other) - totals).tolist()


def test_totals_take_many_choices_at_once() -> None:
    cost, rng = layered("residual"), np.random.default_rng(0)
    widths = np.stack([draw(cost, rng, gone=0.3) for _ in range(5)])
    tables = np.moveaxis(draw_tables(cost, rng, 5), 1, 0)
    every = cost.totals(widths, tables)
    assert every.tolist() == [cost.totals(w, t).tolist() for w, t in zip(widths, tables, strict=True)]


@pytest.mark.skipif(not SHARED.is_dir(), reason="HAP_ONNX_SHARED is not set")
def test_every_layer_of_a_resnet_may_be_replaced() -> None:
    prepared = prepare(SHARED / "models" / "resnet20.onnx")
    cost = with_layers(prepared)
    assert len(cost.layers) == 20  # nineteen convolutions and a Gemm
    rng = np.random.default_rng(0)
    for gone in (0.0, 0.5):
        check_counts(prepared, cost, draw(cost, rng, gone=gone), rng)
