"""Implants in lock step: exact where they can be, optimal where theory says what is, corrected behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

from hap_onnx.errors import SurgeryError
from hap_onnx.implants.factors import Metric, factorise, plain_metric
from hap_onnx.ops.implant import ImplantForm, implant_forms
from hap_onnx.ops.linear import linear_form
from hap_onnx.refit import FittedImplant, ImplantSpec, Refitted, refit
from hap_onnx.surgery import Kept, with_weights
from hap_onnx.surgery.grafting import insert_implants
from tests.helpers import make_model, node, rand
from tests.refit.cases import cut, graph_of, relative_error, relu_model, run, subset_of, two_branches


def implant_form(graph: gs.Graph, name: str, kind: str) -> ImplantForm:
    found = next(node for node in graph.nodes if node.name == name)
    return next(form for form in implant_forms(found) if form.kind == kind)


def matrix_of(graph: gs.Graph, name: str) -> torch.Tensor:
    """Weight of a node as [g, O, F]."""
    found = next(node for node in graph.nodes if node.name == name)
    form = linear_form(found)
    assert form is not None
    return form.to_matrix(torch.from_numpy(np.array(found.inputs[form.weight_index].values)))


def spec_of(graph: gs.Graph, name: str, kind: str, rank: int) -> ImplantSpec:
    """Describe an implant, under the metric of plain SVD."""
    form, (g, n_outputs, n_features) = implant_form(graph, name, kind), matrix_of(graph, name).shape
    return ImplantSpec(kind, rank, form.taps, form.tap, lambda: plain_metric(g, n_features, n_outputs))


def refit_with(
    graph: gs.Graph,
    compressed: gs.Graph,
    implants: Mapping[str, ImplantSpec],
    x: np.ndarray,
    *,
    kept: Mapping[str, Kept] | None = None,
    **options: Any,
) -> Refitted:
    options = {"batch_size": 16, "seed": 0, "ridge": 1e-7, **options}
    return refit(graph, compressed, kept or {}, subset_of(x), implants=implants, **options)


def graft(graph: gs.Graph, found: Refitted) -> gs.Graph:
    implants = {
        name: (factors.kind, implant_form(graph, name, factors.kind).to_weights(factors.arrays))
        for name, factors in found.factors.items()
    }
    return insert_implants(with_weights(graph, found.weights), implants)


def product(factors: FittedImplant, n_taps: int) -> np.ndarray:
    """Multiply two factors out: [g, O, F]."""
    first, second = factors.arrays
    by_tap = second.reshape(*second.shape[:2], -1, n_taps)
    return np.einsum("gort,gra->goat", by_tap, first).reshape(*second.shape[:2], -1)


def one_layer(
    op_type: str,
    w: np.ndarray,
    n_axes: int,
    *,
    bias: bool = True,
    n_inputs: int | None = None,
    **attributes: Any,
) -> onnx.ModelProto:
    n_outputs = len(w) if op_type == "Conv" else w.shape[1]
    n_inputs = n_inputs or w.shape[1 if op_type == "Conv" else 0]
    return make_model(
        [node(op_type, ["x", "w", *(["b"] if bias else [])], ["y"], **attributes)],
        inputs={"x": ["N", n_inputs, *[6] * n_axes] if op_type == "Conv" else ["N", *[6] * n_axes, n_inputs]},
        outputs=["y"],
        weights={"w": w} | ({"b": rand(n_outputs, seed=2)} if bias else {}),
    )


def patches(x: np.ndarray, kernel: int) -> np.ndarray:
    """Rows [N * positions, C * kernel * kernel] of a convolution that pads by 1, made in numpy."""
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(2, 3))
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(x.shape[0] * windows.shape[2] * windows.shape[3], -1)


# --- full rank ---


@pytest.mark.parametrize(
    ("op_type", "shape", "n_axes", "kind", "rank", "attributes"),
    [
        ("Conv", (5, 4, 3, 3), 2, "lowrank", 5, {"pads": [1, 1, 1, 1], "strides": [2, 1]}),
        ("Conv", (5, 4, 3, 3), 2, "spatial", 12, {"pads": [1, 0, 1, 2], "dilations": [1, 2]}),
        ("Conv", (5, 4, 3, 3), 2, "pointwise", 0, {"pads": [1, 1, 1, 1]}),
        ("Conv", (5, 4, 1, 1), 2, "lowrank", 4, {}),
        ("Conv", (6, 2, 3, 3), 2, "lowrank", 3, {"group": 2}),
        ("Conv", (6, 2, 3, 3), 2, "spatial", 6, {"group": 2}),
        ("Conv", (5, 4, 3), 1, "lowrank", 5, {}),
        ("Conv", (5, 4, 2, 2, 2), 3, "spatial", 8, {}),
        ("Gemm", (4, 5), 0, "lowrank", 4, {}),
        ("MatMul", (4, 5), 1, "lowrank", 4, {}),
    ],
)
def test_full_rank_changes_nothing(
    op_type: str, shape: tuple[int, ...], n_axes: int, kind: str, rank: int, attributes: dict[str, Any]
) -> None:
    bias = op_type != "MatMul"
    n_inputs = 4 if op_type == "Conv" else None
    graph = graph_of(
        one_layer(op_type, rand(*shape, seed=1), n_axes, bias=bias, n_inputs=n_inputs, **attributes)
    )
    x = rand(40, 4, *[6] * n_axes) if op_type == "Conv" else rand(100, *[6] * n_axes, 4)
    spec = spec_of(graph, "make_y", kind, rank)
    found = refit_with(graph, graph.copy(), {"make_y": spec}, x)
    factors = found.factors["make_y"]
    assert (factors.kind, factors.rank, set(found.weights)) == (kind, rank, {"b"} if bias else set())
    assert all(array.dtype == np.float32 for array in factors.arrays)
    dense = factors.arrays[0] if kind == "pointwise" else product(factors, spec.taps[1])
    np.testing.assert_allclose(dense, matrix_of(graph, "make_y"), atol=1e-5)
    if kind != "pointwise":  # no implant at all
        assert relative_error(run(graft(graph, found), x), run(graph, x)) < 1e-5


def test_full_rank_after_a_cut_is_the_refit_without_implants() -> None:
    graph, x = graph_of(relu_model()), rand(40, 4, 5, 5, seed=3)
    compressed, kept = cut(graph, x, {"h": [0, 3, 5]})
    spec = spec_of(compressed, "make_d", "lowrank", 4)
    dense = refit_with(graph, compressed, {}, x, kept=kept, ridge=1e-3)
    found = refit_with(graph, compressed, {"make_d": spec}, x, kept=kept, ridge=1e-3)
    assert dense.factors == {}
    expected = run(with_weights(compressed, dense.weights), x)
    assert relative_error(expected, run(graph, x)) > 0.01
    # The factors are solved once more from there, with more rounds after the Relu: no worse, and near.
    ours = run(graft(compressed, found), x)
    assert relative_error(ours, expected) < 0.01
    assert relative_error(ours, run(graph, x)) <= relative_error(expected, run(graph, x))


# --- what theory says is best ---


def whiten(x: np.ndarray) -> np.ndarray:
    """Rows of mean 0 and covariance 1, exactly."""
    x = x.astype(np.float64) - x.mean(0)
    return np.linalg.solve(np.linalg.cholesky(x.T @ x / len(x)), x.T).T


def reduced_rank_regression(x: np.ndarray, y: np.ndarray, rank: int) -> np.ndarray:
    """Best W [O, F] of a rank for y = x W^T: least squares, projected on the main directions of its fit."""
    w = np.linalg.lstsq(x, y, rcond=None)[0].T
    _, _, vt = np.linalg.svd(x @ w.T, full_matrices=False)
    return vt[:rank].T @ vt[:rank] @ w


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_lowrank_is_reduced_rank_regression(rank: int, bias: bool) -> None:
    """With inputs of covariance 1 damping changes no direction; a mean is left to the bias."""
    x = whiten(rand(300, 8)).astype(np.float32) + np.float32(0.7 if bias else 0)
    graph = graph_of(one_layer("Gemm", rand(8, 6, seed=1), 0, bias=bias))
    spec = spec_of(graph, "make_y", "lowrank", rank)
    found = refit_with(graph, graph.copy(), {"make_y": spec}, x, ridge=1e-9)
    y = run(graph, x).astype(np.float64)
    centered, mean = (x - x.mean(0), y.mean(0)) if bias else (x, 0)
    expected = reduced_rank_regression(centered, y - mean, rank)
    np.testing.assert_allclose(product(found.factors["make_y"], 1)[0], expected, atol=1e-4)
    if bias:
        np.testing.assert_allclose(found.weights["b"], mean - expected @ x.mean(0), atol=1e-4)
    best = centered @ expected.T + mean
    np.testing.assert_allclose(run(graft(graph, found), x), best, atol=1e-3)


def test_error_falls_with_rank_and_is_near_the_best() -> None:
    x = (rand(300, 8) @ rand(8, 8, seed=4)).astype(np.float32)
    graph = graph_of(one_layer("Gemm", rand(8, 6, seed=1), 0, bias=False))
    y = run(graph, x).astype(np.float64)
    errors, best = [], []
    for rank in range(1, 6):
        spec = spec_of(graph, "make_y", "lowrank", rank)
        found = refit_with(graph, graph.copy(), {"make_y": spec}, x)
        errors.append(float(np.square(run(graft(graph, found), x) - y).sum()))
        best.append(float(np.square(x @ reduced_rank_regression(x, y, rank).T - y).sum()))
    assert errors == sorted(errors, reverse=True)
    np.testing.assert_array_less(np.array(best) * (1 - 1e-4), errors)
    np.testing.assert_allclose(errors, best, rtol=0.01)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group", [1, 2])
def test_second_spatial_factor_is_least_squares_on_what_the_first_computes(group: int, bias: bool) -> None:
    width, attributes = 6 // group, {"group": group, "pads": [1, 1, 1, 1]}
    model = one_layer("Conv", rand(6, 3, 3, 3, seed=1), 2, bias=bias, n_inputs=3 * group, **attributes)
    graph, x = graph_of(model), rand(30, 3 * group, 6, 6) + np.float32(0.5)
    spec = spec_of(graph, "make_y", "spatial", 2)
    found = refit_with(graph, graph.copy(), {"make_y": spec}, x, ridge=1e-9)
    ours = run(graft(graph, found), x)
    for index in range(group):
        first, second = (array[index] for array in found.factors["make_y"].arrays)
        part = slice(index * width, (index + 1) * width)
        rows = patches(x[:, 3 * index : 3 * index + 3], 3).reshape(-1, 9, 3)  # [n, C * T1, T2]
        z = np.einsum("nat,ra->nrt", rows, first).reshape(len(rows), -1)
        if bias:
            z = np.concatenate([z, np.ones((len(z), 1))], 1)
        y = run(graph, x)[:, part].transpose(0, 2, 3, 1).reshape(len(z), -1)
        solution = np.linalg.lstsq(z.astype(np.float64), y, rcond=None)[0].T
        np.testing.assert_allclose(second, solution[:, :6], atol=1e-4)
        if bias:
            np.testing.assert_allclose(found.weights["b"][part], solution[:, 6], atol=1e-4)
        best = (z @ solution.T).reshape(30, 6, 6, -1).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(ours[:, part], best, atol=1e-3)


def test_pointwise_kernels_are_least_squares_at_their_tap() -> None:
    graph = graph_of(one_layer("Conv", rand(5, 3, 3, 3, seed=1), 2, pads=[1, 1, 1, 1]))
    x = rand(30, 3, 6, 6) + np.float32(0.5)
    found = refit_with(graph, graph.copy(), {"make_y": spec_of(graph, "make_y", "pointwise", 2)}, x)
    full, pointwise = found.factors["make_y"].arrays
    y = run(graph, x).transpose(0, 2, 3, 1).reshape(-1, 5)
    center = np.concatenate([x.transpose(0, 2, 3, 1).reshape(-1, 3), np.ones((len(y), 1))], 1)
    solution = np.linalg.lstsq(center.astype(np.float64), y, rcond=None)[0].T
    np.testing.assert_array_equal(full[0], matrix_of(graph, "make_y")[0, :3])
    np.testing.assert_allclose(pointwise[0], solution[3:, :3], atol=5e-3)  # damped by 1e-3
    np.testing.assert_allclose(found.weights["b"][3:], solution[3:, 3], atol=5e-3)


def test_conv_groups_are_fitted_each_on_its_own() -> None:
    w, x = rand(6, 2, 3, 3, seed=1), rand(20, 4, 6, 6)
    whole = graph_of(one_layer("Conv", w, 2, n_inputs=4, group=2))
    found = refit_with(whole, whole.copy(), {"make_y": spec_of(whole, "make_y", "lowrank", 2)}, x)
    outputs = run(graft(whole, found), x)
    for group in range(2):
        part = graph_of(one_layer("Conv", w[3 * group : 3 * group + 3], 2))
        part.tensors()["b"].values = rand(6, seed=2)[3 * group : 3 * group + 3]
        mine = x[:, 2 * group : 2 * group + 2]
        alone = refit_with(part, part.copy(), {"make_y": spec_of(part, "make_y", "lowrank", 2)}, mine)
        expected = run(graft(part, alone), mine)
        assert relative_error(outputs[:, 3 * group : 3 * group + 3], expected) < 1e-3


# --- the layers around ---


def test_a_branch_makes_up_for_the_implant_of_the_other() -> None:
    graph, x = graph_of(two_branches(through="conv")), rand(20, 4, 5, 5, seed=6)
    spec = spec_of(graph, "make_d", "lowrank", 1)
    found = refit_with(graph, graph.copy(), {"make_d": spec}, x)
    assert {"bb", "w", "wb"} <= set(found.weights)
    assert "b" not in found.weights
    assert relative_error(run(graft(graph, found), x), run(graph, x)) < 1e-4


def test_layers_behind_correct_what_an_implant_loses() -> None:
    model = make_model(
        [
            node("Conv", ["x", "a", "ab"], ["c"], pads=[1, 1, 1, 1]),
            node("Relu", ["c"], ["h"]),
            node("Conv", ["h", "w", "b"], ["y"], pads=[1, 1, 1, 1]),
        ],
        inputs={"x": ["N", 3, 6, 6]},
        outputs=["y"],
        weights={
            "a": rand(8, 3, 3, 3, seed=1),
            "ab": rand(8, seed=2),
            "w": rand(4, 8, 3, 3, seed=3),
            "b": rand(4, seed=4),
        },
    )
    graph, x = graph_of(model), rand(60, 3, 6, 6)
    found = refit_with(graph, graph.copy(), {"make_c": spec_of(graph, "make_c", "spatial", 3)}, x)
    assert set(found.weights) == {"ab", "w", "b"}
    expected = run(graph, x)
    alone = replace(found, weights={"ab": found.weights["ab"]})
    error = relative_error(run(graft(graph, found), x), expected)
    assert error < 0.9 * relative_error(run(graft(graph, alone), x), expected)


def test_rounds_lower_the_error_after_a_relu() -> None:
    graph, x = graph_of(relu_model()), rand(40, 4, 5, 5, seed=3)
    implants = {"make_d": spec_of(graph, "make_d", "lowrank", 2)}
    errors = [
        relative_error(
            run(graft(graph, refit_with(graph, graph.copy(), implants, x, n_relu_rounds=n)), x), run(graph, x)
        )
        for n in (0, 3)
    ]
    assert errors[0] > errors[1]


def test_a_product_shares_the_bias_that_is_added() -> None:
    model = make_model(
        [node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["y"])],
        inputs={"x": ["N", 7, 6]},
        outputs=["y"],
        weights={"w": rand(6, 5, seed=1), "b": rand(5, seed=2)},
    )
    graph, x = graph_of(model), rand(20, 7, 6) + np.float32(2)
    found = refit_with(graph, graph.copy(), {"make_m": spec_of(graph, "make_m", "lowrank", 2)}, x)
    missing = run(graft(graph, found), x) - run(graph, x)
    np.testing.assert_allclose(missing.mean((0, 1)), 0, atol=1e-4)


# --- where there is little memory or data ---


def test_spilling_changes_no_bit_and_leaves_nothing_behind(tmp_path: Path) -> None:
    graph, x = graph_of(relu_model()), rand(40, 4, 5, 5, seed=3)
    implants = {"make_d": spec_of(graph, "make_d", "lowrank", 2)}
    in_memory = refit_with(graph, graph.copy(), implants, x)
    spilled = refit_with(graph, graph.copy(), implants, x, memory_limit_bytes=0, work_dir=tmp_path)
    np.testing.assert_array_equal(spilled.weights["b"], in_memory.weights["b"])
    for ours, expected in zip(
        spilled.factors["make_d"].arrays, in_memory.factors["make_d"].arrays, strict=True
    ):
        np.testing.assert_array_equal(ours, expected)
    assert list(tmp_path.iterdir()) == []


def test_fewer_rows_than_features_leave_the_metric_to_the_original() -> None:
    graph, x = graph_of(one_layer("Gemm", rand(40, 6, seed=1), 0)), rand(16, 40)
    root = torch.from_numpy(rand(40, 40, seed=5)).double()
    metric = Metric((root @ root.T)[None], torch.eye(6, dtype=torch.float64)[None])
    spec = replace(spec_of(graph, "make_y", "lowrank", 2), make_metric=lambda: metric)
    found = refit_with(graph, graph.copy(), {"make_y": spec}, x)
    expected = factorise(matrix_of(graph, "make_y"), metric, kind="lowrank", rank=2, taps=(1, 1))
    np.testing.assert_allclose(found.factors["make_y"].arrays[0], expected.arrays[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0, -1])
def test_numbers_that_are_not_finite_leave_everything_to_the_metric(value: float) -> None:
    model = make_model(
        [node("Log", ["x"], ["h"]), node("Gemm", ["h", "w", "b"], ["y"])],
        inputs={"x": ["N", 8]},
        outputs=["y"],
        weights={"w": rand(8, 6, seed=1), "b": rand(6, seed=2)},
    )
    graph, x = graph_of(model), np.exp(rand(50, 8))
    x[3, 4] = value
    spec = spec_of(graph, "make_y", "lowrank", 2)
    found = refit_with(graph, graph.copy(), {"make_y": spec}, x)
    expected = factorise(matrix_of(graph, "make_y"), spec.make_metric(), kind="lowrank", rank=2, taps=(1, 1))
    assert found.weights == {}
    np.testing.assert_allclose(product(found.factors["make_y"], 1), expected.dense, atol=1e-5)


@pytest.mark.parametrize("spread", [0.0, 1e-3])
def test_inputs_that_hardly_vary(spread: float) -> None:
    graph, x = graph_of(one_layer("Gemm", rand(8, 6, seed=1), 0)), 100 + np.float32(spread) * rand(200, 8)
    found = refit_with(graph, graph.copy(), {"make_y": spec_of(graph, "make_y", "lowrank", 2)}, x)
    assert relative_error(run(graft(graph, found), x), run(graph, x)) < 1e-4


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_what_varies_counts_beside_means_that_are_far_larger(kind: str) -> None:
    """In second moments summed in float32 it is lost, and what is left is no covariance."""
    x = (rand(8192, 4, seed=3) @ rand(4, 64, seed=4)).astype(np.float32)
    x[:, :6] = 0.01 * x[:, :6] + np.linspace(11_111.1, 23_456.7, 6, dtype=np.float32)
    weight = rand(64, 80, seed=1)
    weight[:6] *= 1e-4
    graph = graph_of(one_layer("Gemm", weight, 0))
    spec = spec_of(graph, "make_y", "lowrank", 4)
    if kind == "diagonal":
        known = Metric(torch.ones(1, 64, dtype=torch.float64), spec.make_metric().gradients)
        spec = replace(spec, make_metric=lambda: known)
    found = refit_with(graph, graph.copy(), {"make_y": spec}, x, batch_size=8192)
    ours, expected = run(graft(graph, found), x), run(graph, x)
    assert relative_error(ours - ours.mean(0), expected - expected.mean(0)) < 0.02


def test_diagonal_metrics_stay_diagonal() -> None:
    """With independent inputs the diagonal of the covariance is all of it."""
    x = (whiten(rand(300, 8)) * np.arange(1, 9)).astype(np.float32)
    graph = graph_of(one_layer("Gemm", rand(8, 6, seed=1), 0))
    spec = spec_of(graph, "make_y", "lowrank", 2)
    metric = Metric(torch.ones(1, 8, dtype=torch.float64), spec.make_metric().gradients)
    diagonal = replace(spec, make_metric=lambda: metric)
    full, ours = (
        product(refit_with(graph, graph.copy(), {"make_y": each}, x).factors["make_y"], 1)
        for each in (spec, diagonal)
    )
    np.testing.assert_allclose(ours, full, atol=1e-4)


# --- what is refused ---


def test_nodes_without_a_weight_of_their_own_are_refused() -> None:
    model = make_model(
        [node("Conv", ["x", "w"], ["c"]), node("Relu", ["c"], ["h"]), node("Conv", ["h", "w"], ["y"])],
        inputs={"x": ["N", 4, 5, 5]},
        outputs=["y"],
        weights={"w": rand(4, 4, 1, 1)},
    )
    graph, x = graph_of(model), rand(8, 4, 5, 5)
    spec = ImplantSpec("lowrank", 1, (1, 1), None, lambda: plain_metric(1, 4, 4))
    for name, message in (
        ("make_c", "weight of its own"),
        ("make_h", "weight of its own"),
        ("gone", "no node"),
    ):
        with pytest.raises(SurgeryError, match=message):
            refit_with(graph, graph.copy(), {name: spec}, x)
