"""Implants against dense linear algebra: square roots, SVD, least squares on data, brute-force losses."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hap_onnx.implants.factors import (
    KINDS,
    Factors,
    Metric,
    factorise,
    find_family,
    make_metric,
    max_rank,
    plain_metric,
    pointwise_order,
    predict_loss,
)
from hap_onnx.implants.separable import Alternation, Problem, find_start


def rank_losses(weight: Tensor, metric: Metric, **words: Any) -> np.ndarray:
    return find_family(weight, metric, **words).losses()

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_data(g: int, n_features: int, seed: int = 0) -> Tensor:
    """Rows [g, n, F] of correlated features."""
    return rand(g, 3 * n_features + 5, n_features, seed=seed) @ rand(g, n_features, n_features, seed=seed + 1)


def second_moment(rows: Tensor) -> Tensor:
    return rows.mT @ rows / rows.shape[1]


def make_case(
    g: int, n_outputs: int, n_channels: int, taps: tuple[int, int], *, diagonal: bool = False, seed: int = 0
) -> tuple[Tensor, Metric]:
    n_features = n_channels * prod(taps)
    a = second_moment(make_data(g, n_features, seed))
    g_outputs = second_moment(rand(g, 2 * n_outputs + 1, n_outputs, seed=seed + 2))
    inputs = a.diagonal(dim1=1, dim2=2) if diagonal else a
    return rand(g, n_outputs, n_features, seed=seed + 3), make_metric(inputs, g_outputs)


def brute_force(difference: Tensor, metric: Metric) -> float:
    """1/2 tr(G D A D^T), entry by entry."""
    a = torch.diag_embed(metric.inputs) if metric.inputs.ndim == 2 else metric.inputs
    return 0.5 * float(torch.einsum("gij,gjk,gkl,gil->", metric.gradients, difference, a, difference))


def dense_of(factors: Factors, taps: tuple[int, int], tap: int | None) -> Tensor:
    """The matrix that the arrays compute, from their documented order."""
    if factors.kind == "pointwise":
        full, pointwise = factors.arrays
        spread = torch.zeros(1, *pointwise.shape[1:], prod(taps), dtype=torch.float64)
        spread[..., tap] = pointwise
        return torch.cat([full, spread.flatten(2)], 1)
    first, second = factors.arrays
    u = second.reshape(*second.shape[:2], factors.rank, taps[1])
    v = first.reshape(len(first), factors.rank, -1, taps[0])
    return torch.einsum("gorj,grci->gocij", u, v).flatten(2)


def square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


sizes = st.integers(1, 6)
cases = st.tuples(sizes, sizes, sizes, st.tuples(st.integers(1, 3), st.integers(1, 3)), st.integers(0, 9))


# --- laws of all kinds ---


@given(case=cases, kind=st.sampled_from(KINDS), diagonal=st.booleans(), part=st.floats(0, 1))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_the_arrays_compute_the_dense_matrix_and_the_loss_is_that_of_the_difference(
    case: tuple[int, int, int, tuple[int, int], int], kind: str, diagonal: bool, part: float
) -> None:
    g, n_outputs, n_channels, taps, seed = case
    g = 1 if kind == "pointwise" else g
    taps = (prod(taps), 1) if kind == "lowrank" else taps
    tap = prod(taps) // 2 if kind == "pointwise" else None
    weight, metric = make_case(
        g, n_outputs, n_channels, taps, diagonal=diagonal and kind != "spatial", seed=seed
    )
    highest = max_rank(tuple(weight.shape), kind=kind, taps=taps)
    rank = max(1, round(part * highest))
    factors = factorise(weight, metric, kind=kind, rank=rank, taps=taps, tap=tap)
    total = brute_force(weight, metric)
    torch.testing.assert_close(dense_of(factors, taps, tap), factors.dense, **EXACT)
    assert factors.loss == pytest.approx(brute_force(weight - factors.dense, metric), abs=1e-9 * total)
    assert predict_loss(weight - factors.dense, metric) == pytest.approx(factors.loss, abs=1e-9 * total)
    if kind != "pointwise" and rank == highest:
        torch.testing.assert_close(factors.dense, weight, **EXACT)
        assert factors.loss <= 1e-9 * total


@pytest.mark.parametrize(
    "shape", [(2, 7, 3, (3, 3)), (1, 3, 9, (3, 2)), (3, 9, 2, (1, 1)), (1, 2, 8, (3, 3))]
)
@pytest.mark.parametrize("kind", ["lowrank", "spatial"])
def test_the_loss_falls_with_rank(kind: str, shape: tuple[int, int, int, tuple[int, int]]) -> None:
    taps = (prod(shape[3]), 1) if kind == "lowrank" else shape[3]
    weight, metric = make_case(*shape[:3], taps)
    losses = rank_losses(weight, metric, kind=kind, taps=taps)
    total = brute_force(weight, metric)
    assert losses.dtype == np.float64
    assert len(losses) == 1 + max_rank(tuple(weight.shape), kind=kind, taps=taps)
    assert (np.diff(losses) <= 0).all()
    assert losses[-1] == 0
    reached = [
        factorise(weight, metric, kind=kind, rank=rank, taps=taps).loss for rank in range(1, len(losses))
    ]
    if kind == "lowrank":
        assert losses[0] == pytest.approx(total)
        np.testing.assert_allclose(reached, losses[1:], atol=1e-10 * total)
    else:
        assert (np.diff(reached) < 0).all()
        assert (np.array(reached) <= losses[1:] + 1e-9 * total).all()


def test_the_same_arguments_give_the_same_bits() -> None:
    weight, metric = make_case(1, 8, 8, (3, 3))
    a, b = (factorise(weight, metric, kind="spatial", rank=5, taps=(3, 3)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.arrays, b.arrays))
    assert a.loss == b.loss


# --- lowrank ---


@pytest.mark.parametrize("shape", [(6, 4, 3), (12, 2, 3), (5, 5, 1)])
def test_lowrank_is_the_truncated_svd_between_dense_square_roots(shape: tuple[int, int, int]) -> None:
    n_outputs, n_channels, n_taps = shape
    weight, metric = make_case(1, n_outputs, n_channels, (n_taps, 1))
    left, right = square_root(metric.gradients[0]), square_root(metric.inputs[0])
    u, s, vt = torch.linalg.svd(left @ weight[0] @ right, full_matrices=False)
    for rank in (1, 2, 4):
        expected = torch.linalg.inv(left) @ (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(right)
        factors = factorise(weight, metric, kind="lowrank", rank=rank, taps=(n_taps, 1))
        torch.testing.assert_close(factors.dense[0], expected, rtol=1e-6, atol=1e-8)
        assert factors.loss == pytest.approx(0.5 * float(s[rank:].square().sum()), rel=1e-8)


@given(case=cases, diagonal=st.booleans(), rank=st.integers(1, 4))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_other_factors_of_the_rank_lose_less(
    case: tuple[int, int, int, tuple[int, int], int], diagonal: bool, rank: int
) -> None:
    g, n_outputs, n_channels, taps, seed = case
    taps = (prod(taps), 1)
    weight, metric = make_case(g, n_outputs, n_channels, taps, diagonal=diagonal, seed=seed)
    rank = min(rank, max_rank(tuple(weight.shape), kind="lowrank", taps=taps))
    best = factorise(weight, metric, kind="lowrank", rank=rank, taps=taps)
    identity = plain_metric(g, weight.shape[2], n_outputs)
    plain = factorise(weight, identity, kind="lowrank", rank=rank, taps=taps)
    first, second = best.arrays
    others = [
        plain.dense,
        (second + 0.05 * rand(*second.shape, seed=seed)) @ (first + 0.05 * rand(*first.shape, seed=seed + 1)),
        rand(*second.shape, seed=seed) @ rand(*first.shape, seed=seed + 1),
    ]
    total = brute_force(weight, metric)
    for other in others:
        assert best.loss <= brute_force(weight - other, metric) + 1e-10 * total


@pytest.mark.parametrize("kind", ["lowrank", "spatial"])
def test_outputs_of_the_first_factor_have_unit_variance(kind: str) -> None:
    taps = (9, 1) if kind == "lowrank" else (3, 3)
    weight, metric = make_case(2, 6, 5, taps)
    first, _ = factorise(1e-6 * weight, metric, kind=kind, rank=4, taps=taps).arrays
    a = metric.inputs.reshape(2, -1, taps[1], first.shape[2], taps[1])
    variance = torch.einsum("gra,gajbj,grb->gr", first, a, first) / taps[1]
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-6, atol=0)


# --- spatial ---


@pytest.mark.parametrize("shape", [(1, 9, 8, (3, 3)), (2, 3, 12, (3, 2)), (1, 2, 9, (2, 4))])
def test_a_separable_weight_is_recovered(shape: tuple[int, int, int, tuple[int, int]]) -> None:
    g, n_outputs, n_channels, (t1, t2) = shape
    _, metric = make_case(*shape)
    u, v = rand(g, n_outputs, 3, t2, seed=1), rand(g, 3, n_channels, t1, seed=2)
    weight = torch.einsum("gorj,grci->gocij", u, v).flatten(2)
    factors = factorise(weight, metric, kind="spatial", rank=3, taps=(t1, t2))
    torch.testing.assert_close(factors.dense, weight, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_no_round_of_alternation_raises_the_loss(seed: int) -> None:
    weight, metric = make_case(2, 7, 6, (3, 3), seed=seed)
    problem = Problem(weight, metric.inputs, metric.gradients, 3)
    state = Alternation(problem, find_start(problem), 5)
    losses = [state.loss]
    for _ in range(6):
        state.improve_first()
        state.solve_second()
        losses.append(state.loss)
    fall = -torch.stack(losses).diff(dim=0)
    assert (fall > 0).all()
    reached = factorise(weight, metric, kind="spatial", rank=5, taps=(3, 3)).loss
    assert reached <= float(losses[3].sum()) * (1 + 1e-9)


def test_alternation_ends_where_small_changes_of_either_factor_do_not_help(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hap_onnx.implants.separable.MAX_ROUNDS", 400)
    monkeypatch.setattr("hap_onnx.implants.separable.ENOUGH", 0.0)
    weight, metric = make_case(1, 4, 3, (3, 3))
    factors = factorise(weight, metric, kind="spatial", rank=3, taps=(3, 3))
    first, second = (array.clone().requires_grad_() for array in factors.arrays)
    u, v = second.reshape(1, 4, 3, 3), first
    difference = weight - torch.einsum("gorj,gra->goaj", u, v).flatten(2)
    loss = 0.5 * ((metric.gradients @ difference) * (difference @ metric.inputs)).sum()
    gradients = torch.autograd.grad(loss, (first, second))
    assert float(loss.detach()) == pytest.approx(factors.loss)
    scales = [float(array.norm() * gradient.norm()) for array, gradient in zip(factors.arrays, gradients)]
    assert max(scales) < 1e-6 * brute_force(weight, metric)


def test_the_rank_estimate_is_exact_where_the_metric_separates() -> None:
    t1, t2, n_channels = 3, 3, 4
    a1, taps = second_moment(make_data(1, n_channels * t1)), second_moment(make_data(1, t2))
    inputs = torch.einsum("gab,gjk->gajbk", a1, taps).reshape(1, n_channels * t1 * t2, -1)
    weight, metric = make_case(1, 5, n_channels, (t1, t2))
    metric = Metric(inputs, metric.gradients)
    losses = rank_losses(weight, metric, kind="spatial", taps=(t1, t2))
    assert losses[0] == pytest.approx(brute_force(weight, metric))
    for rank in (1, 4, 9):
        factors = factorise(weight, metric, kind="spatial", rank=rank, taps=(t1, t2))
        assert factors.loss == pytest.approx(losses[rank], rel=1e-6, abs=1e-9 * losses[0])


@pytest.mark.parametrize("seed", range(4))
def test_the_metric_beats_plain_least_squares(seed: int) -> None:
    weight, metric = make_case(1, 8, 6, (3, 3), seed=seed)
    plain = plain_metric(1, weight.shape[2], 8)
    for rank in (2, 6, 12):
        of_metric, of_plain = (
            factorise(weight, each, kind="spatial", rank=rank, taps=(3, 3)) for each in (metric, plain)
        )
        assert of_metric.loss < brute_force(weight - of_plain.dense, metric)
        assert of_plain.loss <= brute_force(weight - of_metric.dense, plain) + 1e-12


# --- pointwise ---


def test_pointwise_kernels_are_the_least_squares_fit_to_data() -> None:
    n_outputs, n_channels, n_taps, tap = 5, 4, 9, 4
    rows = make_data(1, n_channels * n_taps)
    weight = rand(1, n_outputs, n_channels * n_taps)
    metric = Metric(second_moment(rows), second_moment(rand(1, 20, n_outputs)))
    factors = factorise(weight, metric, kind="pointwise", rank=2, taps=(3, 3), tap=tap)
    full, kernels = factors.arrays
    assert torch.equal(full, weight[:, :3])
    targets = rows[0] @ weight[0, 3:].T
    expected = torch.linalg.lstsq(rows[0][:, tap::n_taps], targets).solution.T
    torch.testing.assert_close(kernels[0], expected, rtol=1e-7, atol=1e-7)
    normal = (weight - factors.dense) @ metric.inputs
    torch.testing.assert_close(normal[0, 3:, tap::n_taps], torch.zeros(2, n_channels).double(), **EXACT)


@pytest.mark.parametrize("diagonal", [False, True])
def test_pointwise_order_and_losses_are_those_of_the_factors(diagonal: bool) -> None:
    taps, tap = (3, 3), 4
    weight, metric = make_case(1, 6, 3, taps, diagonal=diagonal)
    order = pointwise_order(weight, metric, taps=taps, tap=tap)
    losses = rank_losses(weight, metric, kind="pointwise", taps=taps, tap=tap)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(6))
    # Channels turned alone, one by one, cost more and more in this order.
    fitted = factorise(weight, metric, kind="pointwise", rank=6, taps=taps, tap=tap).dense
    alone = []
    for channel in order:
        difference = torch.zeros_like(weight)
        difference[:, channel] = (weight - fitted)[:, channel]
        alone.append(brute_force(difference, metric))
    assert alone == sorted(alone)
    for n_turned in range(7):
        cheapest_last = torch.from_numpy(order[::-1].copy())
        permuted = Metric(metric.inputs, metric.gradients[:, cheapest_last][:, :, cheapest_last])
        factors = factorise(
            weight[:, cheapest_last], permuted, kind="pointwise", rank=n_turned, taps=taps, tap=tap
        )
        assert factors.loss == pytest.approx(losses[n_turned], rel=1e-9, abs=1e-12)
        assert [array.shape[1] for array in factors.arrays] == [6 - n_turned, n_turned]


# --- damaged and degenerate statistics ---


def test_make_metric_symmetrises_and_damps_each_group() -> None:
    inputs, gradients = rand(2, 6, 6) @ rand(2, 6, 6).mT, rand(2, 3, 3) @ rand(2, 3, 3).mT
    skew = rand(2, 6, 6) - rand(2, 6, 6).mT
    metric = make_metric(inputs.float() + skew.float(), gradients, damping=0.1)
    mean = inputs.diagonal(dim1=1, dim2=2).mean(1)
    expected = inputs + 0.1 * mean[:, None, None] * torch.eye(6)
    torch.testing.assert_close(metric.inputs, expected, rtol=1e-4, atol=1e-4)
    diagonal = make_metric(inputs.diagonal(dim1=1, dim2=2), gradients, damping=0.1).inputs
    torch.testing.assert_close(diagonal, expected.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dead", ["gradients", "inputs", "weight", "all"])
def test_without_signal_factors_are_sensible_and_cost_nothing(kind: str, dead: str) -> None:
    taps = (9, 1) if kind == "lowrank" else (3, 3)
    weight, metric = make_case(1, 6, 4, taps)
    alive = {name: 0.0 if dead in (name, "all") else 1.0 for name in ("gradients", "inputs", "weight")}
    metric = make_metric(alive["inputs"] * metric.inputs, alive["gradients"] * metric.gradients)
    weight = alive["weight"] * weight
    factors = factorise(weight, metric, kind=kind, rank=3, taps=taps, tap=4)
    assert all(bool(torch.isfinite(array).all()) for array in factors.arrays)
    assert 0 <= factors.loss < 1e-20
    assert float((weight - factors.dense).square().sum()) <= float(weight.square().sum())
    assert rank_losses(weight, metric, kind=kind, taps=taps, tap=4)[0] < 1e-20


@pytest.mark.parametrize("kind", KINDS)
def test_dead_channels_and_deficient_statistics(kind: str) -> None:
    taps = (9, 1) if kind == "lowrank" else (3, 3)
    rows, gradients = rand(1, 10, 4, 9), rand(1, 3, 6)
    rows[:, :, 1] = 0
    gradients[..., 2] = 0
    rows = rows.flatten(2)
    metric = Metric(second_moment(rows), second_moment(gradients))  # ranks 10 of 36 and 3 of 6, not damped
    weight = rand(1, 6, 36)
    factors = factorise(weight, metric, kind=kind, rank=5, taps=taps, tap=4)
    total = brute_force(weight, metric)
    assert all(bool(torch.isfinite(array).all()) for array in factors.arrays)
    assert factors.loss == pytest.approx(brute_force(weight - factors.dense, metric), abs=1e-8 * total)
    if kind == "lowrank":
        assert factors.loss < 1e-8 * total  # G has rank 3
    assert factors.loss < total


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    weight, metric = make_case(1, 4, 3, (3, 3))
    broken = [metric.inputs.clone(), metric.gradients.clone(), weight.clone()]
    for array in broken:
        array[0, 0, 0] = bad
    inputs, gradients, broken_weight = broken
    with pytest.raises(ValueError, match="inputs of the metric must be finite"):
        make_metric(inputs, metric.gradients)
    with pytest.raises(ValueError, match="gradients of the metric must be finite"):
        factorise(weight, Metric(metric.inputs, gradients), kind="spatial", rank=1, taps=(3, 3))
    with pytest.raises(ValueError, match="weight must be finite"):
        rank_losses(broken_weight, metric, kind="lowrank", taps=(9, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, r"rank must be in \[1, 8\] for lowrank factors, got 0"),
        ({"rank": 9}, "got 9"),
        ({"kind": "pointwise", "rank": 9, "tap": 0}, r"\[0, 8\]"),
        ({"kind": "pointwise"}, r"tap must be in \[0, 8\]"),
        ({"kind": "pointwise", "tap": 9}, "got 9"),
        ({"taps": (3, 3)}, "all taps in the first"),
        ({"taps": (5, 1)}, "do not divide"),
        ({"kind": "depthwise"}, "kind must be one of lowrank, spatial, pointwise"),
        ({"kind": "spatial", "taps": (3, 3), "metric": "diagonal"}, "got its diagonal"),
        ({"metric": "negative"}, "not positive semidefinite"),
        ({"metric": "small"}, r"inputs of the metric are \(1, 9, 9\)"),
        ({"metric": "wide"}, r"gradients of the metric are \(1, 9, 9\)"),
        ({"weight": torch.zeros(8, 27)}, r"weight must be \[g, O, F\]"),
    ],
)
def test_requests_that_make_no_sense(change: dict[str, object], message: str) -> None:
    weight, metric = make_case(1, 8, 3, (3, 3))
    metrics = {
        "diagonal": make_metric(metric.inputs[0].diagonal()[None], metric.gradients),
        "negative": Metric(metric.inputs, -metric.gradients),
        "small": Metric(metric.inputs[:, :9, :9], metric.gradients),
        "wide": Metric(metric.inputs, torch.eye(9)[None]),
    }
    options = {"weight": weight, "kind": "lowrank", "rank": 2, "taps": (9, 1)} | change
    chosen = metrics.get(str(options.pop("metric", "")), metric)
    with pytest.raises(ValueError, match=message):
        factorise(options.pop("weight"), chosen, **options)  # type: ignore[arg-type]


def test_pointwise_wants_one_group_and_damping_is_not_negative() -> None:
    weight, metric = make_case(2, 4, 3, (3, 3))
    with pytest.raises(ValueError, match="one conv group, got 2"):
        pointwise_order(weight, metric, taps=(3, 3), tap=4)
    with pytest.raises(ValueError, match="damping"):
        make_metric(metric.inputs, metric.gradients, damping=-1.0)


@pytest.mark.parametrize(("kind", "taps"), [("lowrank", (9, 1)), ("spatial", (3, 3)), ("pointwise", (9, 1))])
def test_one_decomposition_serves_all_ranks(kind: str, taps: tuple[int, int]) -> None:
    weight, metric = make_case(1, 6, 5, taps)
    words = {"kind": kind, "taps": taps, "tap": 4 if kind == "pointwise" else None}
    family = find_family(weight, metric, **words)
    losses = family.losses()
    assert len(losses) == family.max_rank + 1
    for rank in (3, 1, 5):
        expected = factorise(weight, metric, rank=rank, **words)
        found = family.at(rank)
        assert (found.kind, found.rank, found.loss) == (kind, rank, expected.loss)
        assert torch.equal(found.dense, expected.dense)
    assert np.array_equal(family.losses(), losses)
    with pytest.raises(ValueError, match="rank must be in"):
        family.at(family.max_rank + 1)
