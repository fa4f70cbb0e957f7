"""Folding BatchNormalization: the same function to rounding, and nothing else is touched."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

from hap_onnx.model.model_io import load_model, normalise, to_proto
from hap_onnx.surgery.fusion import fold_batch_norms
from hap_onnx.twin import build_twin
from tests.helpers import make_model, node, rand
from tools.first_divergence import run_onnxruntime

Arrays = dict[str, np.ndarray]


def norm_weights(n: int, prefix: str = "bn", *, seed: int = 7) -> Arrays:
    return {
        f"{prefix}_scale": rand(n, seed=seed),
        f"{prefix}_shift": rand(n, seed=seed + 1),
        f"{prefix}_mean": rand(n, seed=seed + 2),
        f"{prefix}_var": rand(n, seed=seed + 3) ** 2 + 0.1,
    }


def norm(x: str, y: str, prefix: str = "bn", **attributes: float) -> onnx.NodeProto:
    names = [f"{prefix}_{part}" for part in ("scale", "shift", "mean", "var")]
    return node("BatchNormalization", [x, *names], [y], **attributes)


def ops_of(graph: gs.Graph) -> list[str]:
    return [entry.op for entry in graph.nodes]


def run(graph: gs.Graph, x: np.ndarray) -> Arrays:
    with torch.no_grad():
        outputs = build_twin(graph)({"x": torch.from_numpy(x)})
    return {name: tensor.numpy() for name, tensor in outputs.items()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "weight", "attributes"),
    [
        ((2, 3, 6, 6), (4, 3, 3, 3), {"pads": [1, 1, 1, 1]}),
        ((2, 4, 6, 6), (4, 1, 3, 3), {"group": 4}),
        ((2, 4, 6, 6), (6, 2, 1, 1), {"group": 2}),
        ((2, 3, 9), (4, 3, 3), {"strides": [2]}),
        ((2, 2, 4, 4, 4), (3, 2, 2, 2, 2), {}),
    ],
    ids=["plain", "depthwise", "grouped", "1d", "3d"],
)
def test_a_folded_model_is_the_same_function(
    bias: bool, shape: tuple[int, ...], weight: tuple[int, ...], attributes: dict[str, object]
) -> None:
    weights = {"w": rand(*weight, seed=1), **norm_weights(weight[0])}
    if bias:
        weights["b"] = rand(weight[0], seed=2)
    nodes = [
        node("Conv", ["x", "w", *(["b"] if bias else [])], ["c"], **attributes),
        norm("c", "n", epsilon=1e-3),
        node("Relu", ["n"], ["y"]),
    ]
    model = make_model(nodes, inputs={"x": ["N", *shape[1:]]}, outputs=["y"], weights=weights)
    source = load_model(model)
    graph = normalise(source)
    folded = fold_batch_norms(graph)
    assert ops_of(folded) == ["Conv", "Relu"]
    x = rand(*shape)
    expected = run(graph, x)["y"]
    np.testing.assert_allclose(run(folded, x)["y"], expected, atol=1e-5)
    np.testing.assert_allclose(run_onnxruntime(to_proto(folded, source), {"x": x})["y"], expected, atol=1e-5)
    assert ops_of(graph) == ["Conv", "BatchNormalization", "Relu"]  # the input graph is not changed
    np.testing.assert_array_equal(graph.tensors()["w"].values, weights["w"])


def test_a_model_whose_output_is_a_normalisation_keeps_the_outputs_name() -> None:
    weights = {"w": rand(4, 3, 1, 1), **norm_weights(4)}
    model = make_model(
        [node("Conv", ["x", "w"], ["c"]), norm("c", "y")],
        inputs={"x": ["N", 3, 5, 5]},
        outputs=["y"],
        weights=weights,
    )
    graph = normalise(load_model(model))
    folded = fold_batch_norms(graph)
    assert ops_of(folded) == ["Conv"]
    x = rand(2, 3, 5, 5)
    np.testing.assert_allclose(run(folded, x)["y"], run(graph, x)["y"], atol=1e-5)


def test_all_normalisations_of_a_chain_are_folded_one_by_one() -> None:
    weights = {"w": rand(4, 3, 1, 1), "v": rand(2, 4, 1, 1), **norm_weights(4, "p"), **norm_weights(2, "q")}
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        norm("c", "d", "p"),
        node("Conv", ["d", "v"], ["e"]),
        norm("e", "y", "q"),
    ]
    model = make_model(nodes, inputs={"x": ["N", 3, 4, 4]}, outputs=["y"], weights=weights)
    graph = normalise(load_model(model))
    folded = fold_batch_norms(graph)
    assert ops_of(folded) == ["Conv", "Conv"]
    x = rand(2, 3, 4, 4)
    np.testing.assert_allclose(run(folded, x)["y"], run(graph, x)["y"], atol=1e-4)


def test_a_second_normalisation_after_the_first_is_folded_too() -> None:
    weights = {"w": rand(4, 3, 1, 1), **norm_weights(4, "p"), **norm_weights(4, "q", seed=20)}
    nodes = [node("Conv", ["x", "w"], ["c"]), norm("c", "d", "p"), norm("d", "y", "q")]
    model = make_model(nodes, inputs={"x": ["N", 3, 4, 4]}, outputs=["y"], weights=weights)
    graph = normalise(load_model(model))
    x = rand(2, 3, 4, 4)
    folded = fold_batch_norms(graph)
    assert ops_of(folded) == ["Conv"]
    np.testing.assert_allclose(run(folded, x)["y"], run(graph, x)["y"], atol=1e-4)


def test_two_convolutions_may_share_the_statistics_of_their_normalisations() -> None:
    weights = {"w": rand(4, 3, 1, 1), "v": rand(4, 3, 1, 1, seed=5), **norm_weights(4)}
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        norm("c", "d"),
        node("Conv", ["x", "v"], ["e"]),
        norm("e", "f"),
        node("Add", ["d", "f"], ["y"]),
    ]
    model = make_model(nodes, inputs={"x": ["N", 3, 4, 4]}, outputs=["y"], weights=weights)
    graph = normalise(load_model(model))
    folded = fold_batch_norms(graph)
    assert sorted(ops_of(folded)) == ["Add", "Conv", "Conv"]
    x = rand(2, 3, 4, 4)
    np.testing.assert_allclose(run(folded, x)["y"], run(graph, x)["y"], atol=1e-5)


# ---------------------------------------------------------------- what stays


WEIGHTS = {"w": rand(4, 4, 1, 1, seed=1), **norm_weights(4)}


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ([node("Conv", ["x", "w"], ["c"]), norm("c", "n"), node("Add", ["c", "n"], ["y"])], ["y"]),
        ([node("Conv", ["x", "w"], ["c"]), norm("c", "y")], ["y", "c"]),
        ([node("Conv", ["x", "w"], ["c"]), norm("c", "n"), node("Conv", ["n", "w"], ["y"])], ["y"]),
        ([node("Relu", ["x"], ["c"]), norm("c", "y")], ["y"]),
        ([norm("x", "n"), node("Conv", ["n", "w"], ["y"])], ["y"]),
    ],
    ids=["read twice", "model output", "shared weight", "no convolution", "before a convolution"],
)
def test_what_cannot_be_folded_is_left_alone(nodes: list[onnx.NodeProto], outputs: list[str]) -> None:
    model = make_model(nodes, inputs={"x": ["N", 4, 3, 3]}, outputs=outputs, weights=WEIGHTS)
    graph = normalise(load_model(model))
    folded = fold_batch_norms(graph)
    assert ops_of(folded) == ops_of(graph)
    x = rand(2, 4, 3, 3)
    expected = run(graph, x)
    for name, array in run(folded, x).items():
        np.testing.assert_array_equal(array, expected[name])


def test_training_mode_is_left_alone() -> None:
    model = make_model(
        [
            node("Conv", ["x", "w"], ["c"]),
            node(
                "BatchNormalization",
                ["c", "bn_scale", "bn_shift", "bn_mean", "bn_var"],
                ["y", "m", "v"],
                training_mode=1,
            ),
        ],
        inputs={"x": ["N", 4, 3, 3]},
        outputs=["y"],
        weights=WEIGHTS,
    )
    graph = normalise(load_model(model))
    assert "BatchNormalization" in ops_of(fold_batch_norms(graph))


def test_computed_statistics_are_left_alone() -> None:
    weights = {name: array for name, array in WEIGHTS.items() if name != "bn_mean"}
    model = make_model(
        [node("Conv", ["x", "w"], ["c"]), norm("c", "y")],
        inputs={"x": ["N", 4, 3, 3], "bn_mean": [4]},
        outputs=["y"],
        weights=weights,
    )
    graph = normalise(load_model(model))
    assert ops_of(fold_batch_norms(graph)) == ["Conv", "BatchNormalization"]


def test_half_precision_is_left_alone() -> None:
    weights = {name: array.astype(np.float16) for name, array in WEIGHTS.items()}
    x = rand(2, 4, 3, 3).astype(np.float16)
    model = make_model(
        [node("Conv", ["x", "w"], ["c"]), norm("c", "y")], inputs={"x": x}, outputs=["y"], weights=weights
    )
    graph = normalise(load_model(model))
    assert ops_of(fold_batch_norms(graph)) == ["Conv", "BatchNormalization"]


def test_an_omitted_bias_is_no_bias() -> None:
    """An optional input may be left out by an empty name."""
    weights = {"w": rand(4, 3, 1, 1), **norm_weights(4)}
    model = make_model(
        [node("Conv", ["x", "w", ""], ["c"]), norm("c", "y")],
        inputs={"x": ["N", 3, 5, 5]},
        outputs=["y"],
        weights=weights,
    )
    graph = normalise(load_model(model))
    x = rand(2, 3, 5, 5)
    np.testing.assert_allclose(run(fold_batch_norms(graph), x)["y"], run(graph, x)["y"], atol=1e-5)
