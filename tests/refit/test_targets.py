"""Targets: branches correct each other, and what lies beyond a Relu does not count."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from hap_onnx.ops.elementwise import clip_bounds
from tests.helpers import rand
from tests.refit.cases import cut, fit, graph_of, relative_error, relu_model, run, two_branches


@pytest.mark.parametrize("drop", [[1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
def test_the_later_branch_corrects_the_error_of_the_earlier_one(drop: list[int]) -> None:
    graph, x = graph_of(two_branches(through="conv")), rand(20, 4, 5, 5, seed=6)
    compressed, kept = cut(graph, x, {"h": drop})
    new = fit(graph, compressed, kept, x)
    assert {"w", "wb"} <= set(new)
    assert relative_error(run(compressed, x, new), run(graph, x)) < 1e-4


def test_what_is_left_of_a_removed_branch_is_the_mean_of_the_branch() -> None:
    graph, x = graph_of(two_branches(through="skip")), rand(20, 4, 5, 5, seed=6) + 1
    compressed, kept = cut(graph, x, {"h": range(6)})
    new = fit(graph, compressed, kept, x, ridge=1e6)
    weights = {name: tensor.values for name, tensor in graph.tensors().items() if name in "abbb"}
    h = np.einsum("oc,nchw->nohw", weights["a"][:, :, 0, 0], x)
    d = np.einsum("oc,nchw->nohw", weights["b"][:, :, 0, 0], h) + weights["bb"][:, None, None]
    np.testing.assert_allclose(new["d_hap_constant"].ravel(), d.mean((0, 2, 3)), atol=1e-4)


def test_rounds_lower_the_error_after_a_relu() -> None:
    graph, x = graph_of(relu_model()), rand(20, 4, 5, 5, seed=3)
    compressed, kept = cut(graph, x, {"h": [0, 3, 5]})
    expected = run(graph, x)
    errors = [
        relative_error(run(compressed, x, fit(graph, compressed, kept, x, n_relu_rounds=n)), expected)
        for n in (0, 1, 3)
    ]
    assert relative_error(run(compressed, x), expected) > errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(
    ("op_type", "limits", "expected"),
    [
        ("Relu", [], (0, np.inf)),
        ("Clip", [0, 6], (0, 6)),
        ("Clip", [0], (0, np.inf)),
        ("Clip", [6, 0], None),
        ("Sigmoid", [], None),
    ],
)
def test_bounds(op_type: str, limits: list[float], expected: tuple[float, float] | None) -> None:
    constants = [gs.Constant(str(value), np.array(value, np.float32)) for value in limits]
    assert clip_bounds(gs.Node(op_type, inputs=[gs.Variable("x"), *constants])) == expected
