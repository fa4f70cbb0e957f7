"""Refit: what duplicates carried is restored exactly, and the rest is left alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest

from hap_onnx.errors import SurgeryError
from hap_onnx.events import Event
from hap_onnx.surgery import Kept
from tests.helpers import make_model, node, rand
from tests.refit.cases import (
    cut,
    deep_case,
    duplicates,
    fit,
    graph_of,
    relative_error,
    relu_model,
    run,
    two_branches,
)


def check_restored(model: onnx.ModelProto, x: np.ndarray, drop: Sequence[int], changed: set[str]) -> None:
    """Assert that refit restores the function of a model whose tensor ``h`` lost duplicate channels."""
    graph = graph_of(model)
    compressed, kept = cut(graph, x, {"h": drop})
    expected = run(graph, x)
    assert relative_error(run(compressed, x), expected) > 0.05
    new = fit(graph, compressed, kept, x)
    assert set(new) == changed
    assert relative_error(run(compressed, x, new), expected) < 1e-4


# --- every kind of contraction ---


@pytest.mark.parametrize(
    ("n_axes", "attributes"),
    [
        (2, {"pads": [1, 1, 1, 1]}),
        (2, {"strides": [2, 1], "dilations": [1, 2], "pads": [0, 2, 1, 1]}),
        (2, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        (1, {"strides": [2], "pads": [2, 0]}),
        (3, {"pads": [1, 0, 1, 0, 1, 1]}),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_conv_takes_over_duplicates(n_axes: int, attributes: dict[str, Any], bias: bool) -> None:
    taps = [3] * n_axes
    weights = {"a": duplicates(3, 2, *[1] * n_axes), "ab": duplicates(3), "w": rand(5, 6, *taps, seed=1)}
    if bias:
        weights["b"] = rand(5, seed=2)
    model = make_model(
        [
            node("Conv", ["x", "a", "ab"], ["c"]),
            node("Relu", ["c"], ["h"]),
            node("Conv", ["h", "w", *(["b"] if bias else [])], ["y"], **attributes),
        ],
        inputs={"x": ["N", 2, *[6] * n_axes]},
        outputs=["y"],
        weights=weights,
    )
    # Without noise no bias needs to move: it may be in the result all the same.
    check_restored(model, rand(20, 2, *[6] * n_axes, seed=3), [3, 4, 5], {"w", "b"} if bias else {"w"})


def test_grouped_conv_is_solved_in_blocks() -> None:
    a = np.concatenate([duplicates(2, 2, 1, 1, seed=seed) for seed in (0, 1)])
    model = make_model(
        [
            node("Conv", ["x", "a"], ["c"]),
            node("Relu", ["c"], ["h"]),
            node("Conv", ["h", "w", "b"], ["y"], group=2, pads=[1, 1, 1, 1]),
        ],
        inputs={"x": ["N", 2, 5, 5]},
        outputs=["y"],
        weights={"a": a, "w": rand(6, 4, 3, 3, seed=1), "b": rand(6, seed=2)},
    )
    check_restored(model, rand(20, 2, 5, 5, seed=3), [2, 3, 6, 7], {"w", "b"})


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_takes_over_duplicates(transposed: int) -> None:
    a, w = duplicates(3, 4), rand(5, 6, seed=1)
    model = make_model(
        [
            node("Gemm", ["x", "a"], ["c"], transB=1),
            node("Relu", ["c"], ["h"]),
            node("Gemm", ["h", "w", "b"], ["y"], transB=transposed),
        ],
        inputs={"x": ["N", 4]},
        outputs=["y"],
        weights={"a": a, "w": w if transposed else np.ascontiguousarray(w.T), "b": rand(5, seed=2)},
    )
    check_restored(model, rand(100, 4, seed=3), [3, 4, 5], {"w", "b"})


@pytest.mark.parametrize("bias", [True, False])
def test_matmul_takes_over_duplicates_and_shares_the_bias_that_is_added(bias: bool) -> None:
    nodes = [
        node("MatMul", ["x", "a"], ["c"]),
        node("Relu", ["c"], ["h"]),
        node("MatMul", ["h", "w"], ["m" if bias else "y"]),
    ]
    if bias:
        nodes.append(node("Add", ["b", "m"], ["y"]))
    weights = {"a": np.ascontiguousarray(duplicates(3, 4).T), "w": rand(6, 5, seed=1)}
    model = make_model(
        nodes,
        inputs={"x": ["N", 7, 4]},
        outputs=["y"],
        weights={**weights, "b": rand(5, seed=2)} if bias else weights,
    )
    check_restored(model, rand(20, 7, 4, seed=3), [3, 4, 5], {"w", "b"} if bias else {"w"})


def test_fewer_rows_than_features() -> None:
    model = make_model(
        [
            node("Gemm", ["x", "a"], ["c"], transB=1),
            node("Relu", ["c"], ["h"]),
            node("Gemm", ["h", "w", "b"], ["y"], transB=1),
        ],
        inputs={"x": ["N", 4]},
        outputs=["y"],
        weights={"a": duplicates(40, 4), "w": rand(5, 80, seed=1), "b": rand(5, seed=2)},
    )
    check_restored(model, rand(16, 4, seed=3), list(range(40, 80)), {"w", "b"})


def depthwise_model(batch: int | str = "N") -> onnx.ModelProto:
    return make_model(
        [
            node("Conv", ["x", "w", "b"], ["d"], group=3, pads=[1, 1, 1, 1]),
            node("ConvTranspose", ["d", "t", "tb"], ["u"], strides=[2, 2]),
            node("GlobalAveragePool", ["u"], ["p"]),
            node("Reshape", ["p", "shape"], ["f"]),
            node("Gemm", ["f", "g", "gb"], ["y"], alpha=2.0, beta=0.5),
        ],
        inputs={"x": [batch, 3, 6, 6]},
        outputs=["y"],
        weights={
            "w": rand(3, 1, 3, 3),
            "b": rand(3, seed=1),
            "t": rand(3, 4, 2, 2, seed=2),
            "tb": rand(4, seed=3),
            "shape": np.array([1 if batch == 1 else -1, 4]),
            "g": rand(4, 5, seed=4),
            "gb": rand(5, seed=5),
        },
    )


@pytest.mark.parametrize("name", ["b", "tb", "gb"])
@pytest.mark.parametrize("batch", ["N", 1])
def test_a_bias_that_drifted_comes_back(name: str, batch: int | str) -> None:
    """Depthwise convolutions are solved per channel; what has no matrix form gets a bias."""
    graph = graph_of(depthwise_model(batch))
    compressed = graph.copy()
    constant = compressed.tensors()[name]
    constant.values = constant.values + 1
    x = rand(10, 3, 6, 6, seed=6)
    new = fit(graph, compressed, {}, x)
    np.testing.assert_allclose(new[name], graph.tensors()[name].values, atol=1e-4)
    if batch == "N":
        assert relative_error(run(compressed, x, new), run(graph, x)) < 1e-5


# --- what is left alone ---


def test_nothing_removed_changes_nothing() -> None:
    graph, x = graph_of(relu_model()), rand(8, 4, 5, 5)
    assert fit(graph, graph.copy(), {}, x) == {}


def test_layers_before_the_first_change_and_shared_weights_stay() -> None:
    model = make_model(
        [
            node("Conv", ["x", "w"], ["c"]),
            node("Conv", ["c", "a"], ["h"]),
            node("Conv", ["h", "b"], ["d"]),
            node("Conv", ["d", "w"], ["y"]),
        ],
        inputs={"x": ["N", 4, 5, 5]},
        outputs=["y"],
        weights={"w": rand(4, 4, 1, 1), "a": rand(6, 4, 1, 1, seed=1), "b": rand(4, 6, 1, 1, seed=2)},
    )
    graph, x = graph_of(model), rand(8, 4, 5, 5, seed=3)
    before = {name: np.array(tensor.values) for name, tensor in graph.tensors().items() if name in "wab"}
    compressed, kept = cut(graph, x, {"h": [0]})
    assert set(fit(graph, compressed, kept, x)) == {"b"}
    for name, values in before.items():
        np.testing.assert_array_equal(graph.tensors()[name].values, values)


def test_a_wrong_map_of_channels_is_refused() -> None:
    graph, x = graph_of(two_branches(through="conv")), rand(8, 4, 5, 5)
    compressed, kept = cut(graph, x, {"h": [0]})
    with pytest.raises(SurgeryError, match="left of the original"):
        fit(graph, compressed, {**kept, "h": Kept(1, np.arange(3))}, x)


def test_long_work_is_reported() -> None:
    events: list[Event] = []
    fit(*deep_case(), on_event=events.append)
    kinds = [event.kind for event in events]
    assert {event.stage for event in events} == {"refit"}
    assert (kinds[0], kinds[-1], kinds.count("advance")) == ("start", "end", events[0].total)
