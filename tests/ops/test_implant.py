"""Implants of single nodes: they compute what the dense matrix that they stand for computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

from hap_onnx.model.model_io import load_model, normalise, to_proto
from hap_onnx.ops.implant import ImplantForm, implant_forms
from hap_onnx.ops.linear import linear_form
from hap_onnx.ops.registry import find_macs
from hap_onnx.surgery import with_weights
from hap_onnx.surgery.grafting import insert_implants
from hap_onnx.twin import build_twin, probe_shapes
from tests.helpers import make_node_model, rand
from tools.first_divergence import compare_tensors, run_onnxruntime

TOLERANCE = 1e-5
NAME = "make_out0"


class Layer:
    """One node of its own, and what its implants have to equal."""

    def __init__(self, op_type: str, inputs: Sequence[np.ndarray | None], **options: Any) -> None:
        model, self.feeds = make_node_model(
            op_type, inputs, constants=[i for i in range(1, len(inputs)) if inputs[i] is not None], **options
        )
        self.source = load_model(model)
        self.graph = normalise(self.source)
        (self.node,) = self.graph.nodes
        self.forms = {form.kind: form for form in implant_forms(self.node)}
        linear = linear_form(self.node)
        assert linear is not None
        self.linear = linear
        self.weight = self.node.inputs[1]

    @property
    def matrix(self) -> np.ndarray:
        """The weight as [g, O, F]."""
        return self.linear.to_matrix(torch.tensor(self.weight.values)).numpy().astype(np.float64)

    def dense(self, matrix: np.ndarray) -> gs.Graph:
        """The graph with another dense matrix [g, O, F] as weight."""
        shape = tuple(self.weight.shape)
        weight = self.linear.to_weight(torch.from_numpy(np.ascontiguousarray(matrix)), shape).numpy()
        return with_weights(self.graph, {self.weight.name: weight})

    def implanted(self, kind: str, arrays: Sequence[np.ndarray]) -> gs.Graph:
        return insert_implants(self.graph, {NAME: (kind, self.forms[kind].to_weights(arrays))})

    def run(self, graph: gs.Graph) -> dict[str, np.ndarray]:
        """Outputs of a graph, by the engine that computed them."""
        proto = to_proto(graph, self.source)
        onnx.checker.check_model(proto, full_check=True)
        tensors = {name: torch.from_numpy(values) for name, values in self.feeds.items()}
        with torch.no_grad():
            twin = build_twin(graph)(tensors)["out0"].numpy()
        return {"twin": twin, "onnxruntime": run_onnxruntime(proto, self.feeds)["out0"]}

    def check(self, kind: str, arrays: Sequence[np.ndarray], matrix: np.ndarray) -> gs.Graph:
        """Assert that an implant equals a dense matrix, and that its costs are counted right."""
        graph = self.implanted(kind, arrays)
        expected = self.run(self.dense(matrix))["onnxruntime"]
        for where, found in self.run(graph).items():
            error, problem = compare_tensors(found, expected)
            assert not problem, f"{where}: {problem}"
            assert error < TOLERANCE, f"{where}: off by {error:.1e}"
        self.check_form(self.forms[kind], graph)
        return graph

    def check_form(self, form: ImplantForm, graph: gs.Graph) -> None:
        tensors = {name: torch.from_numpy(values) for name, values in self.feeds.items()}
        shapes = probe_shapes(build_twin(graph), tensors)
        x, y = shapes["in0"], shapes["out0"]
        weights = [graph.tensors()[name] for name in form.weight_names]
        rank = weights[1].shape[form.rank_axis]
        assert tuple(tuple(weight.shape) for weight in weights) == form.weight_shapes(rank)
        for weight, n_positions in zip(weights, (form.n_first(x, y), form.n_second(y)), strict=True):
            (node,) = weight.outputs
            channels = shapes[node.outputs[0].name][self.linear.channel_axis]
            assert n_positions == prod(shapes[node.outputs[0].name]) // channels
            macs = find_macs(node.op)
            assert macs is not None
            given = [shapes.get(tensor.name) for tensor in node.inputs]
            assert macs(node, given, [shapes[node.outputs[0].name]]) == n_positions * weight.values.size


def full_rank(layer: Layer, form: ImplantForm) -> list[np.ndarray]:
    """Factors without error by the SVD, in the layout that every source of factors keeps to."""
    n_first, n_second = form.taps
    matrix = layer.matrix
    n_groups, n_out, n_features = matrix.shape
    n_in = n_features // (n_first * n_second)
    spread = matrix.reshape(n_groups, n_out, n_in, n_first, n_second)
    left = spread.transpose(0, 1, 4, 2, 3).reshape(n_groups, n_out * n_second, n_in * n_first)
    u, s, v = np.linalg.svd(left, full_matrices=False)
    rank = s.shape[1]
    second = (u * s[:, None]).reshape(n_groups, n_out, n_second, rank).transpose(0, 1, 3, 2)
    return [v, second.reshape(n_groups, n_out, rank * n_second)]


def random_factors(layer: Layer, form: ImplantForm, rank: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Factors of a low rank and the matrix that is their product."""
    n_first, n_second = form.taps
    n_groups, n_out, n_features = layer.matrix.shape
    n_in = n_features // (n_first * n_second)
    first = rand(n_groups, rank, n_in * n_first, seed=5) / n_in
    second = rand(n_groups, n_out, rank * n_second, seed=6)
    dense = np.einsum(
        "gort,grcs->gocst",
        second.reshape(n_groups, n_out, rank, n_second),
        first.reshape(n_groups, rank, n_in, n_first),
    )
    return [first, second], dense.reshape(n_groups, n_out, n_features)


WINDOWS: list[dict[str, Any]] = [
    {},
    {"strides": 2, "pads": (1, 1)},
    {"pads": (0, 2), "dilations": 2},
    {"pads": (2, 1), "strides": 3},
    {"auto_pad": "SAME_UPPER", "strides": 2},
    {"auto_pad": "SAME_LOWER", "strides": 2},
    {"auto_pad": "SAME_LOWER"},
    {"auto_pad": "VALID", "strides": 2},
    {"auto_pad": "NOTSET", "pads": (1, 1)},
]


def conv_layer(
    n_axes: int, window: dict[str, Any], *, group: int, bias: bool, kernel: Sequence[int] = (3, 2, 3)
) -> Layer:
    given = dict(window)
    for name in ("strides", "dilations"):
        if name in given:
            given[name] = [given[name], *[1, given[name]][: n_axes - 1]]
    if "pads" in given:
        begin, end = given["pads"]
        given["pads"] = [begin] * n_axes + [end] * n_axes
    x, w = rand(2, 4, *[8, 9, 7][:n_axes]), rand(6, 4 // group, *kernel[:n_axes], seed=1)
    return Layer("Conv", [x, w, *([rand(6, seed=2)] if bias else [])], group=group, **given)


@pytest.mark.parametrize("n_axes", [1, 2, 3])
@pytest.mark.parametrize("window", WINDOWS)
def test_factors_of_convolutions_equal_the_dense_kernel(n_axes: int, window: dict[str, Any]) -> None:
    for group, bias in ((1, True), (2, False)):
        layer = conv_layer(n_axes, window, group=group, bias=bias)
        kinds = {"lowrank"} if n_axes == 1 else {"lowrank", "spatial"}
        assert set(layer.forms) - {"pointwise"} == kinds
        for kind in kinds:
            layer.check(kind, full_rank(layer, layer.forms[kind]), layer.matrix)
            arrays, dense = random_factors(layer, layer.forms[kind], 2)
            graph = layer.check(kind, arrays, dense)
            assert Counter(node.op for node in graph.nodes) == {"Conv": 2}
            assert [len(node.inputs) for node in graph.nodes] == [2, 3 if bias else 2]
            assert graph.nodes[1].name == NAME


@pytest.mark.parametrize(
    ("kernel", "taps"), [((3, 2), (3, 2)), ((2, 3, 2), (2, 6)), ((1, 3, 2), (3, 2)), ((3, 1, 2), (3, 2))]
)
def test_the_first_axis_with_several_taps_goes_first(kernel: Sequence[int], taps: tuple[int, int]) -> None:
    layer = conv_layer(len(kernel), {}, group=1, bias=True, kernel=kernel)
    assert layer.forms["spatial"].taps == taps
    assert layer.forms["lowrank"].taps == (prod(kernel), 1)
    layer.check("spatial", full_rank(layer, layer.forms["spatial"]), layer.matrix)


@pytest.mark.parametrize("kernel", [(1, 1), (1, 3), (3, 1), (1, 1, 3)])
def test_one_axis_with_several_taps_has_nothing_to_separate(kernel: Sequence[int]) -> None:
    layer = conv_layer(len(kernel), {"strides": 2}, group=1, bias=True, kernel=kernel)
    assert "spatial" not in layer.forms
    layer.check("lowrank", full_rank(layer, layer.forms["lowrank"]), layer.matrix)


def test_depthwise_kernels_are_separable_in_each_group() -> None:
    layer = Layer(
        "Conv", [rand(2, 4, 6, 7), rand(4, 1, 3, 3, seed=1), rand(4, seed=2)], group=4, pads=[1] * 4
    )
    assert set(layer.forms) == {"lowrank", "spatial"}
    arrays, dense = random_factors(layer, layer.forms["spatial"], 1)
    graph = layer.check("spatial", arrays, dense)
    assert [node.attrs["group"] for node in graph.nodes] == [4, 4]


# --- pointwise ---

POINTWISE: list[tuple[dict[str, Any], tuple[int, ...] | None]] = [
    ({"pads": (1, 1)}, (1, 1, 1)),
    ({"pads": (1, 1), "strides": 2}, (1, 1, 1)),
    ({"pads": (2, 2), "dilations": 2}, (1, 1, 1)),
    ({"pads": (2, 0)}, (2, 2, 2)),
    ({"pads": (0, 2), "strides": 3}, (0, 0, 0)),
    ({"pads": (2, 1)}, (1, 1, 1)),
    ({"pads": (3, 2)}, (1, 1, 1)),
    ({"auto_pad": "SAME_UPPER"}, (1, 1, 1)),
    ({"auto_pad": "SAME_LOWER"}, (1, 1, 1)),
    ({"auto_pad": "SAME_LOWER", "strides": 2}, None),
    ({"auto_pad": "VALID"}, None),
    ({"pads": (1, 0)}, None),
    ({"pads": (0, 1), "strides": 2}, None),
    ({"pads": (1, 1), "dilations": 2}, None),
]


@pytest.mark.parametrize("n_axes", [1, 2, 3])
@pytest.mark.parametrize(("window", "place"), POINTWISE)
def test_pointwise_equals_a_kernel_that_is_zero_but_at_its_tap(
    n_axes: int, window: dict[str, Any], place: tuple[int, ...] | None
) -> None:
    for bias in (True, False):
        layer = conv_layer(n_axes, window, group=1, bias=bias, kernel=(3, 3, 3))
        form = layer.forms.get("pointwise")
        if place is None:
            assert form is None
            continue
        assert form is not None
        assert form.tap == np.ravel_multi_index(place[:n_axes], (3,) * n_axes)
        assert form.taps == (3**n_axes, 1)
        for rank in (1, 5):
            full, pointwise = layer.matrix[:, : 6 - rank], rand(1, rank, 4, seed=7)
            dense = np.zeros((1, rank, 4, 3**n_axes))
            dense[..., form.tap] = pointwise
            matrix = np.concatenate([full, dense.reshape(1, rank, -1)], axis=1)
            graph = layer.check("pointwise", [full, pointwise], matrix)
            assert [node.op for node in graph.nodes] == ["Conv", "Conv", "Concat"]
            assert {len(node.inputs) for node in graph.nodes[:2]} == {3 if bias else 2}


def test_even_kernels_have_no_centre_but_may_have_a_tap() -> None:
    for auto_pad, place in (("SAME_UPPER", (0, 0)), ("SAME_LOWER", (1, 1))):
        layer = Layer("Conv", [rand(1, 2, 5, 5), rand(4, 2, 2, 2, seed=1)], auto_pad=auto_pad)
        form = layer.forms["pointwise"]
        assert form.tap == np.ravel_multi_index(place, (2, 2))
        full, pointwise = layer.matrix[:, :3], rand(1, 1, 2)
        dense = np.zeros((1, 1, 2, 4))
        dense[..., form.tap] = pointwise
        layer.check("pointwise", [full, pointwise], np.concatenate([full, dense.reshape(1, 1, -1)], axis=1))


# --- matrix products ---


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [None, (7,), (1, 7), (1,), (3, 7)])
@pytest.mark.parametrize("opset", [9, 17])
def test_factors_of_gemm(transposed: int, bias: tuple[int, ...] | None, opset: int) -> None:
    weight = rand(7, 5, seed=1) if transposed else rand(5, 7, seed=1)
    c = rand(*bias, seed=2) if bias else rand(7) if opset < 11 else None
    layer = Layer("Gemm", [rand(3, 5), weight, c], transB=transposed, opset=opset)
    assert set(layer.forms) == {"lowrank"}
    layer.check("lowrank", full_rank(layer, layer.forms["lowrank"]), layer.matrix)
    arrays, dense = random_factors(layer, layer.forms["lowrank"], 2)
    graph = layer.check("lowrank", arrays, dense)
    assert [node.op for node in graph.nodes] == ["MatMul", "Gemm"]


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 1, 3, 5)])
def test_factors_of_matmul(shape: Sequence[int]) -> None:
    layer = Layer("MatMul", [rand(*shape), rand(5, 7, seed=1)])
    arrays, dense = random_factors(layer, layer.forms["lowrank"], 2)
    graph = layer.check("lowrank", arrays, dense)
    layer.check("lowrank", full_rank(layer, layer.forms["lowrank"]), layer.matrix)
    assert [node.op for node in graph.nodes] == ["MatMul", "MatMul"]


# --- what is offered ---


def forms_of(op_type: str, inputs: Sequence[np.ndarray | None], **options: Any) -> set[str]:
    model, _ = make_node_model(op_type, inputs, **options)
    return {form.kind for form in implant_forms(normalise(load_model(model)).nodes[0])}


def test_nothing_is_offered_where_it_would_not_be_exact() -> None:
    x, w = rand(1, 4, 5, 5), rand(4, 4, 3, 3)
    assert forms_of("Conv", [x, w], constants=[1], pads=[1] * 4) == {"lowrank", "spatial", "pointwise"}
    assert forms_of("Conv", [x, w], pads=[1] * 4) == set()
    assert forms_of("Conv", [x, w, rand(4)], constants=[1], pads=[1] * 4) == {"lowrank", "spatial"}
    assert forms_of("Conv", [x, rand(4, 2, 3, 3)], constants=[1], pads=[1] * 4, group=2) == {
        "lowrank",
        "spatial",
    }
    assert forms_of("Conv", [x, rand(4, 4, 1, 1)], constants=[1]) == {"lowrank"}
    assert forms_of("ConvTranspose", [x, w], constants=[1]) == set()
    assert forms_of("Gemm", [rand(2, 3), rand(3, 4), rand(4)], constants=[1, 2], alpha=0.5) == set()
    assert forms_of("Gemm", [rand(3, 2), rand(3, 4)], constants=[1], transA=1) == set()
    assert forms_of("MatMul", [rand(3, 4), rand(2, 4, 3)], constants=[1]) == set()
    assert forms_of("MatMul", [rand(3, 4), rand(4, 3)], constants=[0]) == set()
    assert forms_of("Relu", [x]) == set()


def test_a_shared_weight_is_left_alone() -> None:
    layer = Layer("Conv", [rand(1, 4, 5, 5), rand(4, 4, 3, 3)])
    other = gs.Node("Conv", "other", inputs=[layer.node.outputs[0], layer.weight], outputs=[gs.Variable("z")])
    assert implant_forms(layer.node) == implant_forms(other) == ()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_weights_keep_their_type(dtype: Any) -> None:
    layer = Layer("Conv", [rand(1, 4, 5, 5), rand(4, 4, 3, 3), rand(4)], pads=[1] * 4)
    layer.weight.values = layer.weight.values.astype(dtype)
    for kind, form in layer.forms.items():
        weights = [np.zeros(shape) for shape in form.weight_shapes(2)]
        graph = insert_implants(layer.graph, {NAME: (kind, weights)})
        assert [graph.tensors()[name].values.dtype for name in form.weight_names] == [np.dtype(dtype)] * 2


def test_arrays_may_be_tensors() -> None:
    form = Layer("Gemm", [rand(2, 3), rand(4, 3)], transB=1).forms["lowrank"]
    first, second = rand(1, 2, 3), rand(1, 4, 2)
    weights = form.to_weights([torch.from_numpy(first).requires_grad_(), torch.from_numpy(second)])
    np.testing.assert_array_equal(weights[0], first[0].T)
    np.testing.assert_array_equal(weights[1], second[0])
