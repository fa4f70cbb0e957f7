"""Allocation against brute force."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping

import numpy as np
import pytest
from helpers import make_coupling
from hypothesis import given, settings
from hypothesis import strategies as st
from topologies import TOPOLOGIES

from hap_onnx.errors import BudgetError
from hap_onnx.planning import allocate as allocate_module
from hap_onnx.planning.allocate import Allocation, GroupOptions, LayerOptions, allocate, find_options
from hap_onnx.planning.cost import METRICS, N_METRICS, AxisLength, CostModel, CostState, CostTerm, LayerTerms
from tools.surgery_oracle import Case

Problem = tuple[list[np.ndarray], tuple[GroupOptions, ...], CostModel]


# --- options ---


def test_options_are_aligned_by_the_size_of_the_group() -> None:
    coupling = make_coupling({"a": 70, "b": 16, "c": 9, "d": 4, "e": 12}, frozen="e")
    options = [option.widths.tolist() for option in find_options(coupling)]
    assert options == [
        [8, 16, 24, 32, 40, 48, 56, 64, 70],
        [4, 8, 12, 16],
        [2, 4, 6, 8, 9],
        [1, 2, 3, 4],
        [12],
    ]


def test_options_honour_a_number_a_minimum_and_branches() -> None:
    coupling = make_coupling({"a": 12, "b": 3, "c": 12}, frozen="c")
    options = find_options(coupling, {"a", "c"}, align=4, min_ratio=0.5)
    assert [option.group for option in options] == ["a", "b", "c"]
    assert [option.widths.tolist() for option in options] == [[0, 8, 12], [3], [12]]
    with pytest.raises(ValueError, match="ascend"):
        GroupOptions("a", np.array([4, 2]))


@pytest.mark.parametrize(
    ("align", "expected"), [("auto", [1, 2, 3]), (4, [1, 2, 3]), (8, [2, 3]), (1, [1, 2, 3])]
)
def test_heads_are_aligned_by_their_channels(align: int | str, expected: list[int]) -> None:
    """Three heads of four channels: one head more is four channels more."""
    coupling = Case(TOPOLOGIES["packed_heads_gather"]().model).coupling
    (option,) = find_options(coupling, align=align)
    assert option.widths.tolist() == expected


# --- allocation ---


def make_problem(seed: int, n_groups: int, n_options: int) -> Problem:
    """Costs as of a residual network: neighbours multiply, all multiply with a stream, branches may go."""
    rng = np.random.default_rng(seed)
    sizes = [8 * n for n in rng.integers(2, n_options, n_groups, endpoint=True).tolist()]
    removable = {group for group in range(n_groups) if rng.random() < 0.4}
    stream = AxisLength(8, tuple((group, 1) for group in range(0, n_groups, 7)))
    axes = (*(AxisLength(0, ((group, 1),)) for group in range(n_groups)), stream)
    terms = [CostTerm(100, 1000, ())]
    for group in range(n_groups):
        params, positions = int(rng.integers(1, 20)), int(rng.integers(1, 64))
        speed = int(rng.integers(1, 300))
        behind = (group, min(group + 1, n_groups - 1))
        terms.append(CostTerm(params, params * positions, behind, latency=speed * positions))
        terms.append(CostTerm(params, params * int(rng.integers(1, 64)), (group, n_groups)))
        terms.append(CostTerm(0, 0, (group,), latency=10 * speed))
        if group in removable:
            terms.append(CostTerm(4, 0, (n_groups,), frozenset({group})))
            terms.append(CostTerm(1, 0, (n_groups,), frozenset(), group, latency=5))
    curves, options = [], []
    for group, size in enumerate(sizes):
        losses = rng.exponential(size=size) * np.exp(rng.normal(0, 1.5))
        curve = np.append(np.cumsum(np.sort(losses) if rng.random() < 0.7 else losses)[::-1], 0.0)
        if rng.random() < 0.2:
            curve = curve + rng.normal(0, 0.3, size + 1) * curve.mean()
        curves.append(curve)
        narrowest = 0 if group in removable else 8
        options.append(GroupOptions(f"g{group}", np.arange(narrowest, size + 1, 8)[-n_options:]))
    return curves, tuple(options), CostModel(tuple(sizes), axes, tuple(terms), frozenset(removable))


def budgets_between(problem: Problem, fractions: Mapping[str, float]) -> dict[str, float | None]:
    """Limits at these fractions of the way from the narrowest to the full widths."""
    _, options, cost = problem
    low, full = cost.totals([int(option.widths[0]) for option in options]), cost.totals(cost.sizes)
    return {
        name: None if name not in fractions else float(low[i] + fractions[name] * (full - low)[i])
        for i, name in enumerate(METRICS)
    }


def brute_force(problem: Problem, budgets: Mapping[str, float | None]) -> float:
    curves, options, cost = problem
    widths = np.stack(np.meshgrid(*(option.widths for option in options), indexing="ij"), -1).reshape(
        -1, len(curves)
    )
    losses = sum(curve[widths[:, group]] for group, curve in enumerate(curves))
    totals = cost.totals(widths)
    for index, name in enumerate(METRICS):
        limit = budgets.get(name)
        if limit is not None:
            losses = np.where(totals[:, index] > limit, np.inf, losses)
    return float(np.min(losses))


def check_allowed(problem: Problem, widths: np.ndarray, budgets: Mapping[str, float | None]) -> float:
    curves, options, cost = problem
    assert all(width in option.widths for width, option in zip(widths, options, strict=True))
    for total, name in zip(cost.totals(widths), METRICS, strict=True):
        limit = budgets.get(name)
        assert limit is None or total <= limit
    return float(sum(curve[width] for curve, width in zip(curves, widths, strict=True)))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n_groups=st.integers(1, 5),
    fractions=st.dictionaries(st.sampled_from(METRICS), st.floats(0.0, 1.0), min_size=1),
)
def test_allocates_as_brute_force_does(seed: int, n_groups: int, fractions: Mapping[str, float]) -> None:
    problem = make_problem(seed, n_groups, 5)
    budgets = budgets_between(problem, fractions)
    widths = allocate(*problem, budgets).widths
    assert check_allowed(problem, widths, budgets) == pytest.approx(brute_force(problem, budgets))


@pytest.mark.parametrize("names", [("macs",), ("params", "macs")])
def test_searches_nearly_as_well_as_brute_force(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    """The search for large models, on problems small enough to know the optimum."""
    monkeypatch.setattr(allocate_module, "_MAX_ENUMERATED", 0)
    gaps = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        problem = make_problem(seed, 5, 5)
        budgets = budgets_between(problem, {name: rng.uniform(0.1, 0.9) for name in names})
        found = check_allowed(problem, allocate(*problem, budgets).widths, budgets)
        best = brute_force(problem, budgets)
        gaps.append((found - best) / max(abs(best), 1e-9))
    assert np.mean(np.array(gaps) < 1e-9) >= 0.95
    assert max(gaps) <= 0.05


@pytest.mark.parametrize("names", [("macs",), ("params", "macs")])
def test_allocates_large_models_quickly_and_repeatably(names: tuple[str, ...]) -> None:
    problem = make_problem(0, 60, 9)
    budgets = budgets_between(problem, dict.fromkeys(names, 0.4))
    start = time.process_time()
    widths = allocate(*problem, budgets).widths
    assert time.process_time() - start < 10  # about 0.5 s; much slower machines run this too
    loss = check_allowed(problem, widths, budgets)
    assert np.array_equal(widths, allocate(*problem, budgets).widths)
    tighter = budgets_between(problem, dict.fromkeys(names, 0.2))
    assert check_allowed(problem, allocate(*problem, tighter).widths, tighter) > loss


def test_keeps_everything_that_costs_no_loss_and_fits() -> None:
    problem = make_problem(3, 4, 5)
    flat = [np.zeros(size + 1) for size in problem[2].sizes]
    assert allocate(flat, *problem[1:], {}).widths.tolist() == list(problem[2].sizes)
    full = float(problem[2].macs(problem[2].sizes))
    whole = allocate(flat, *problem[1:], {"macs": full, "params": None})
    assert whole.widths.tolist() == list(problem[2].sizes)
    assert problem[2].macs(allocate(flat, *problem[1:], {"macs": full - 1}).widths) < full


def test_says_how_small_it_can_get() -> None:
    problem = make_problem(5, 6, 5)
    _, options, cost = problem
    least = cost.totals([int(option.widths[0]) for option in options]) / cost.totals(cost.sizes)
    with pytest.raises(BudgetError, match=r"macs at .* \(the least is") as caught:
        allocate(*problem, {"macs": 0.9 * least[1] * cost.macs(cost.sizes), "params": 1e18})
    said = float(str(caught.value).split("the least is ")[1].split(")")[0])
    assert least[1] <= said <= least[1] + 1e-4
    assert "params" not in str(caught.value)
    allocate(*problem, {"macs": said * cost.macs(cost.sizes)})


def test_refuses_curves_and_budgets_that_make_no_sense() -> None:
    curves, options, cost = make_problem(5, 3, 5)
    with pytest.raises(ValueError, match="finite losses"):
        allocate([curves[0][:-1], *curves[1:]], options, cost, {})
    with pytest.raises(ValueError, match="finite losses"):
        allocate([curves[0] * np.nan, *curves[1:]], options, cost, {})
    with pytest.raises(ValueError, match="budgets"):
        allocate(curves, options, cost, {"watts": 1.0})


def test_a_model_without_groups_has_nothing_to_allocate() -> None:
    cost = CostModel((), (), (CostTerm(10, 20, ()),))
    assert allocate([], (), cost, {"macs": 20}).widths.tolist() == []
    with pytest.raises(BudgetError, match="the least is 1"):
        allocate([], (), cost, {"macs": 19})


# --- layers ---


def add_layers(
    problem: Problem, rng: np.random.Generator, n_layers: int, n_options: int
) -> tuple[CostModel, list[LayerOptions]]:
    """Layers between groups, on streams and of fixed size, as 3x3 convolutions with implants of all kinds."""
    _, options, cost = problem
    terms, layers, found = list(cost.terms), [], []
    axes = (*cost.axes, AxisLength(24))
    least = [min(w for w in option.widths.tolist() if w) for option in options] + [8, 24]
    for index in range(n_layers):
        n_in, n_out = (int(axis) for axis in rng.integers(len(axes), size=2))
        dies = {group for group in (n_in, n_out) if group in cost.removable}
        n_first, n_second = (int(n) for n in rng.choice([16, 32, 64], size=2))
        dense = np.zeros((4, N_METRICS), np.int64)
        dense[0] = 9, 9 * n_second, 5 * n_second
        dense[1:, 2] = rng.integers(0, 20, 3)
        first = len(terms)
        places = (first, first + 1, first + 2, first + 3)
        terms += [
            CostTerm(params, macs, on, frozenset(dies), latency=latency)
            for (params, macs, latency), on in zip(
                dense.tolist(), [(n_in, n_out), (n_in,), (n_out,), ()], strict=True
            )
        ]
        layers.append(LayerTerms(f"conv{index}", places, dense))
        tables, losses = [dense], [0.0]
        for _ in range(int(rng.integers(1, n_options + 1)) - 1):
            table = np.zeros((4, N_METRICS), np.int64)
            if rng.random() < 0.3:
                n_pointwise = int(rng.integers(1, least[n_out] + 1))
                table[0] = dense[0]
                table[1] = -8 * n_pointwise, -8 * n_pointwise * n_second, -4 * n_pointwise * n_second
                losses.append(n_pointwise * rng.exponential())
            else:
                taps, rank = ((9, 1), (3, 3))[int(rng.integers(2))], int(rng.integers(1, 30))
                table[1] = rank * taps[0], n_first * rank * taps[0], n_first * rank
                table[2] = rank * taps[1], n_second * rank * taps[1], n_second * rank
                table[3] = rng.integers(3), 0, rng.integers(50)
                losses.append(30 / rank * rng.exponential())
            tables.append(table)
        found.append(LayerOptions(f"conv{index}", np.array(tables), np.array(losses)))
    return CostModel(cost.sizes, axes, tuple(terms), cost.removable, tuple(layers)), found


def make_layer_problem(
    seed: int, n_groups: int, n_widths: int, n_layers: int, n_options: int
) -> tuple[Problem, list[LayerOptions]]:
    problem = make_problem(seed, n_groups, n_widths)
    cost, layers = add_layers(problem, np.random.default_rng(seed + 1), n_layers, n_options)
    return (*problem[:2], cost), layers


Table = tuple[np.ndarray, np.ndarray]


def all_choices(problem: Problem, layers: list[LayerOptions]) -> Table:
    """Losses [n], costs [n, n_metrics] of all combinations; what a layer that is gone would lose counts 0."""
    curves, options, cost = problem
    losses, totals = [], []
    for widths in itertools.product(*(option.widths.tolist() for option in options)):
        alive = CostState(cost, widths).layer_values().any(axis=1)
        picks = [
            range(len(layer.losses)) if on else range(1) for layer, on in zip(layers, alive, strict=True)
        ]
        for picked in itertools.product(*picks):
            losses.append(
                sum(float(curve[width]) for curve, width in zip(curves, widths, strict=True))
                + sum(float(layer.losses[o]) for layer, o in zip(layers, picked, strict=True))
            )
            tables = [layer.coefficients[o] for layer, o in zip(layers, picked, strict=True)]
            totals.append(cost.totals(widths, np.array(tables, np.int64).reshape(-1, 4, N_METRICS)))
    return np.array(losses), np.array(totals)


def check_layers(
    problem: Problem,
    layers: list[LayerOptions],
    found: Allocation,
    budgets: Mapping[str, float | None],
) -> float:
    """Assert that a choice is allowed and within budgets; return its loss."""
    curves, options, cost = problem
    assert all(width in option.widths for width, option in zip(found.widths, options, strict=True))
    tables = [layer.coefficients[o] for layer, o in zip(layers, found.options, strict=True)]
    totals = cost.totals(found.widths, np.array(tables, np.int64).reshape(-1, 4, N_METRICS))
    for total, name in zip(totals, METRICS, strict=True):
        limit = budgets.get(name)
        assert limit is None or total <= limit
    loss = sum(float(curve[width]) for curve, width in zip(curves, found.widths, strict=True))
    return loss + sum(float(layer.losses[o]) for layer, o in zip(layers, found.options, strict=True))


def limits_within(
    table: Table, fractions: Mapping[str, float]
) -> tuple[dict[str, float | None], float | None]:
    """Budgets between the least and the largest costs, and the least loss within them, if there is any."""
    losses, totals = table
    low, high = totals.min(axis=0), totals.max(axis=0)
    budgets: dict[str, float | None] = {
        name: float(low[METRICS.index(name)] + part * (high - low)[METRICS.index(name)])
        for name, part in fractions.items()
    }
    for name, limit in budgets.items():
        losses = np.where(totals[:, METRICS.index(name)] > limit, np.inf, losses)
    best = float(losses.min())
    return budgets, best if np.isfinite(best) else None


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n_groups=st.integers(0, 3),
    n_layers=st.integers(1, 3),
    fractions=st.dictionaries(st.sampled_from(METRICS), st.floats(0.0, 1.0), min_size=1),
)
def test_allocates_layers_as_brute_force_does(
    seed: int, n_groups: int, n_layers: int, fractions: Mapping[str, float]
) -> None:
    problem, layers = make_layer_problem(seed, n_groups, 3, n_layers, 4)
    budgets, best = limits_within(all_choices(problem, layers), fractions)
    if best is None:
        with pytest.raises(BudgetError, match="at once"):
            allocate(*problem, budgets, layers)
        return
    found = allocate(*problem, budgets, layers)
    assert check_layers(problem, layers, found, budgets) == pytest.approx(best)


@pytest.mark.parametrize("names", [("macs",), ("params", "macs")])
def test_searches_layers_nearly_as_well_as_brute_force(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    monkeypatch.setattr(allocate_module, "_MAX_ENUMERATED", 0)
    gaps = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        problem, layers = make_layer_problem(seed, 3, 3, 3, 5)
        table = all_choices(problem, layers)
        budgets, best = limits_within(table, {name: rng.uniform(0.02, 0.8) for name in names})
        assert best is not None
        found = check_layers(problem, layers, allocate(*problem, budgets, layers), budgets)
        gaps.append((found - best) / max(abs(best), 1e-9))
    assert np.mean(np.array(gaps) < 1e-9) >= 0.95
    assert max(gaps) <= 0.05


def test_finds_the_least_that_layers_can_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    for enumerated in (100_000, 0):
        monkeypatch.setattr(allocate_module, "_MAX_ENUMERATED", enumerated)
        for seed in range(8):
            problem, layers = make_layer_problem(seed, 2, 3, 3, 4)
            low = all_choices(problem, layers)[1].min(axis=0)
            for name, least in zip(METRICS, low.tolist(), strict=True):
                check_layers(problem, layers, allocate(*problem, {name: least}, layers), {name: least})
                with pytest.raises(BudgetError, match="the least is"):
                    allocate(*problem, {name: least - 1}, layers)


def test_says_when_budgets_can_only_be_met_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = np.array([[9, 9, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    terms = tuple(
        CostTerm(*c[:2], axes) for c, axes in zip(dense.tolist(), [(0, 0), (0,), (0,), ()], strict=True)
    )
    cost = CostModel((), (AxisLength(10),), terms, frozenset(), (LayerTerms("conv", (0, 1, 2, 3), dense),))
    few_params, few_macs = dense.copy(), dense.copy()
    few_params[0], few_macs[0] = (1, 8, 0), (8, 1, 0)
    layers = [LayerOptions("conv", np.array([dense, few_params, few_macs]), np.array([0.0, 1.0, 1.0]))]
    for enumerated in (100, 0):
        monkeypatch.setattr(allocate_module, "_MAX_ENUMERATED", enumerated)
        assert allocate([], (), cost, {"params": 100}, layers).options.tolist() == [1]
        assert allocate([], (), cost, {"macs": 100}, layers).options.tolist() == [2]
        with pytest.raises(BudgetError, match=r"params at 0\.111 and macs at 0\.111 of the original at once"):
            allocate([], (), cost, {"params": 100, "macs": 100}, layers)


@pytest.mark.parametrize("names", [("macs",), ("params", "macs")])
def test_allocates_many_layers_quickly_and_repeatably(names: tuple[str, ...]) -> None:
    problem, layers = make_layer_problem(0, 30, 15, 55, 40)
    full = problem[2].totals(problem[2].sizes)
    budgets = {name: 0.4 * float(full[METRICS.index(name)]) for name in names}
    start = time.process_time()
    found = allocate(*problem, budgets, layers)
    assert time.process_time() - start < 30  # about 2 s; much slower machines run this too
    loss = check_layers(problem, layers, found, budgets)
    again = allocate(*problem, budgets, layers)
    assert (found.widths.tolist(), found.options.tolist()) == (again.widths.tolist(), again.options.tolist())
    dense = allocate(*problem, budgets)
    assert dense.options.tolist() == []
    assert loss < check_allowed(problem, dense.widths, budgets)


def test_layers_without_options_stay_as_they_are() -> None:
    problem, layers = make_layer_problem(4, 3, 4, 3, 4)
    curves, options, cost = problem
    budgets = {"macs": 0.6 * cost.macs(cost.sizes)}
    only = [LayerOptions(layer.node, layer.coefficients[:1], np.zeros(1)) for layer in layers]
    plain = allocate(curves, options, cost, budgets)
    assert allocate(curves, options, cost, budgets, only).widths.tolist() == plain.widths.tolist()
    # In any order: options are returned as the layers are given.
    found, turned = (allocate(curves, options, cost, budgets, order) for order in (layers, layers[::-1]))
    assert found.widths.tolist() == turned.widths.tolist()
    assert found.options.tolist() == turned.options.tolist()[::-1]
    assert allocate(curves, options, cost, budgets, layers[1:2]).options.shape == (1,)


def test_widths_may_be_given() -> None:
    problem, layers = make_layer_problem(1, 3, 4, 3, 4)
    curves, options, cost = problem
    narrow = [GroupOptions(option.group, option.widths[-2:-1]) for option in options]
    fixed = (curves, tuple(narrow), cost)
    budgets, best = limits_within(all_choices(fixed, layers), {"macs": 0.5})
    found = allocate(*fixed, budgets, layers)
    assert found.widths.tolist() == [int(option.widths[0]) for option in narrow]
    assert check_layers(fixed, layers, found, budgets) == pytest.approx(best)


def test_refuses_layers_that_make_no_sense() -> None:
    problem, layers = make_layer_problem(4, 3, 4, 2, 4)
    for coefficients, losses in (
        (np.zeros((2, 4, N_METRICS)), np.zeros(1)),
        (np.zeros((0, 4, N_METRICS)), np.zeros(0)),
        (np.zeros((1, 4, N_METRICS)), np.ones(1)),
        (np.zeros((2, 4, N_METRICS)), np.array([0, np.nan])),
    ):
        with pytest.raises(ValueError, match="conv"):
            LayerOptions("conv", coefficients, losses)
    with pytest.raises(ValueError, match="twice"):
        allocate(*problem, {}, [layers[0], layers[0]])
    with pytest.raises(ValueError, match="stranger"):
        allocate(*problem, {}, [LayerOptions("stranger", np.zeros((1, 4, N_METRICS)), np.zeros(1))])
    with pytest.raises(ValueError, match="conv1: option 0"):
        allocate(*problem, {}, [LayerOptions("conv1", np.zeros((1, 4, N_METRICS)), np.zeros(1))])
