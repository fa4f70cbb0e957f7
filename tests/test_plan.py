"""Allocation against brute force, and plans that survive their file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hap_onnx import plan as plan_module
from hap_onnx.channels import ChannelGroup, Coupling
from hap_onnx.cost import METRICS, AxisLength, CostModel, CostTerm
from hap_onnx.errors import BudgetError, ModelError, UsageError, ValidationError
from hap_onnx.plan import (
    CompressionPlan,
    GroupDecision,
    GroupOptions,
    allocate,
    find_options,
    load_plan,
    plan_hash,
    save_plan,
)

Problem = tuple[list[np.ndarray], tuple[GroupOptions, ...], CostModel]


def make_coupling(sizes: Mapping[str, int], *, frozen: str = "") -> Coupling:
    groups, start = [], 0
    for name, size in sizes.items():
        elements = np.arange(start, start + size)[::-1].copy()
        groups.append(ChannelGroup(name, elements, (), (), (), "why" if name == frozen else None))
        start += size
    return Coupling(start, tuple(groups), (), {}, (), (), {})


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
        terms.append(CostTerm(params, params * positions, (group, min(group + 1, n_groups - 1))))
        terms.append(CostTerm(params, params * int(rng.integers(1, 64)), (group, n_groups)))
        if group in removable:
            terms.append(CostTerm(4, 0, (n_groups,), frozenset({group})))
            terms.append(CostTerm(1, 0, (n_groups,), frozenset(), group))
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
    widths = allocate(*problem, budgets)
    assert check_allowed(problem, widths, budgets) == pytest.approx(brute_force(problem, budgets))


@pytest.mark.parametrize("names", [("macs",), ("params", "macs")])
def test_searches_nearly_as_well_as_brute_force(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    """The search for large models, on problems small enough to know the optimum."""
    monkeypatch.setattr(plan_module, "_MAX_ENUMERATED", 0)
    gaps = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        problem = make_problem(seed, 5, 5)
        budgets = budgets_between(problem, {name: rng.uniform(0.1, 0.9) for name in names})
        found = check_allowed(problem, allocate(*problem, budgets), budgets)
        best = brute_force(problem, budgets)
        gaps.append((found - best) / max(abs(best), 1e-9))
    assert np.mean(np.array(gaps) < 1e-9) >= 0.95
    assert max(gaps) <= 0.05


@pytest.mark.parametrize("names", [("macs",), ("params", "macs")])
def test_allocates_large_models_quickly_and_repeatably(names: tuple[str, ...]) -> None:
    problem = make_problem(0, 60, 9)
    budgets = budgets_between(problem, dict.fromkeys(names, 0.4))
    start = time.process_time()
    widths = allocate(*problem, budgets)
    assert time.process_time() - start < 10  # about 0.5 s; much slower machines run this too
    loss = check_allowed(problem, widths, budgets)
    assert np.array_equal(widths, allocate(*problem, budgets))
    tighter = budgets_between(problem, dict.fromkeys(names, 0.2))
    assert check_allowed(problem, allocate(*problem, tighter), tighter) > loss


def test_keeps_everything_that_costs_no_loss_and_fits() -> None:
    problem = make_problem(3, 4, 5)
    flat = [np.zeros(size + 1) for size in problem[2].sizes]
    assert allocate(flat, *problem[1:], {}).tolist() == list(problem[2].sizes)
    full = float(problem[2].macs(problem[2].sizes))
    assert allocate(flat, *problem[1:], {"macs": full, "params": None}).tolist() == list(problem[2].sizes)
    assert problem[2].macs(allocate(flat, *problem[1:], {"macs": full - 1})) < full


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
        allocate(curves, options, cost, {"latency": 1.0})


def test_a_model_without_groups_has_nothing_to_allocate() -> None:
    cost = CostModel((), (), (CostTerm(10, 20, ()),))
    assert allocate([], (), cost, {"macs": 20}).tolist() == []
    with pytest.raises(BudgetError, match="the least is 1"):
        allocate([], (), cost, {"macs": 19})


# --- decisions ---


@pytest.mark.parametrize(
    ("keep", "drop"),
    [
        ([0, 1], [1, 2]),
        ([0], [2]),
        ([1, 0], [2]),
        ([0, 0], [1]),
        ([-1, 0], [1]),
        ([0.0], [1.0]),
        ([[0]], [1]),
    ],
)
def test_a_decision_is_a_partition(keep: list, drop: list) -> None:
    with pytest.raises(ValueError, match="conv1"):
        GroupDecision("conv1", np.array(keep), np.array(drop))


def test_a_decision_cannot_be_changed() -> None:
    decision = GroupDecision.from_keep("g", 5, [3, 1])
    assert (decision.keep.tolist(), decision.drop.tolist(), decision.size) == ([1, 3], [0, 2, 4], 5)
    with pytest.raises(ValueError, match="read-only"):
        decision.keep[0] = 2
    with pytest.raises(ValueError, match="beyond its 5"):
        GroupDecision.from_keep("g", 5, [5])


def make_plan(**changes: object) -> CompressionPlan:
    plan = CompressionPlan(
        model_sha256="ab" * 32,
        version="0.1.0",
        config={"keep_macs": 0.5, "exclude": ("a*",), "output": None},
        decisions=(GroupDecision.from_keep("a", 6, [0, 1, 2, 5]), GroupDecision.from_keep("b", 3, [])),
        predicted_loss={"a": 0.25, "b": 1e-9},
        weights={"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(3.0)},
        notes={"b": "the branch goes: «übrig» bleibt nichts"},
    )
    return replace(plan, **changes)


def test_keep_mask_marks_the_elements_of_the_groups() -> None:
    mask = make_plan().keep_mask(make_coupling({"b": 3, "a": 6}))
    # Elements descend within each group of make_coupling.
    assert mask.tolist() == [False] * 3 + [True, False, False, True, True, True]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"a": 6, "b": 4}, "'b' has 4 channels, the plan decides 3"),
        ({"a": 6}, "no group 'b'"),
        ({"a": 6, "b": 3, "c": 1}, "'c' has 1 channels, the plan decides none"),
    ],
)
def test_keep_mask_refuses_another_models_groups(sizes: Mapping[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_plan().keep_mask(make_coupling(sizes))


def test_a_plan_belongs_to_one_model() -> None:
    make_plan().check_model("ab" * 32)
    with pytest.raises(ModelError, match="another model"):
        make_plan().check_model("cd" * 32)


def test_a_plan_refuses_what_its_file_could_not_hold() -> None:
    for changes in (
        {"predicted_loss": {"a": float("nan")}},
        {"predicted_loss": {"c": 1.0}},
        {"notes": {"c": "?"}},
        {"config": {"x": float("inf")}},
        {"weights": {"w": np.array(["text"])}},
        {"decisions": (GroupDecision.from_keep("a", 1, [0]),) * 2, "predicted_loss": {}, "notes": {}},
    ):
        with pytest.raises(ValueError, match=r".+"):
            make_plan(**changes)


# --- files ---


def check_equal(plan: CompressionPlan, other: CompressionPlan) -> None:
    for name in ("model_sha256", "version", "config", "predicted_loss", "notes"):
        assert getattr(plan, name) == getattr(other, name)
    assert [(d.group, d.keep.tolist(), d.drop.tolist()) for d in plan.decisions] == [
        (d.group, d.keep.tolist(), d.drop.tolist()) for d in other.decisions
    ]
    assert list(plan.weights) == list(other.weights)
    for name, array in plan.weights.items():
        same = other.weights[name]
        assert (array.dtype, array.shape, array.tobytes()) == (same.dtype, same.shape, same.tobytes())
    assert plan_hash(plan) == plan_hash(other)


_TYPES = [
    np.float32,
    np.float64,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    np.int8,
    np.int64,
    bool,
]
_WEIGHTS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable() and name != "__metadata__"),
    st.tuples(st.sampled_from(_TYPES), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 99)),
    max_size=4,
)


@st.composite
def plans(draw: st.DrawFn) -> CompressionPlan:
    keeps = draw(
        st.dictionaries(st.text(max_size=6), st.lists(st.booleans(), min_size=1, max_size=40), max_size=4)
    )
    names = sorted(keeps)
    losses = draw(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=len(names)))
    notes = draw(st.lists(st.text(max_size=20), max_size=len(names)))
    weights = {
        name: np.random.default_rng(seed).integers(0, 2 if dtype is bool else 100, shape).astype(dtype)
        for name, (dtype, shape, seed) in draw(_WEIGHTS).items()
    }
    return CompressionPlan(
        model_sha256=draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
        version=draw(st.text(max_size=5)),
        config=draw(
            st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.text())
        ),
        decisions=tuple(
            GroupDecision.from_keep(n, len(keeps[n]), np.flatnonzero(keeps[n]).tolist()) for n in names
        ),
        predicted_loss=dict(zip(names, losses, strict=False)),
        weights=weights,
        notes=dict(zip(names, notes, strict=False)),
    )


@settings(max_examples=60, deadline=None)
@given(plan=plans())
def test_a_plan_survives_its_file(plan: CompressionPlan, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("plan") / "p.json"
    save_plan(plan, path)
    check_equal(plan, load_plan(path))
    again = path.with_name("q.json")
    save_plan(load_plan(path), again)
    assert again.read_bytes() == path.read_bytes()
    assert again.with_suffix(".safetensors").read_bytes() == path.with_suffix(".safetensors").read_bytes()
    assert len(list(path.parent.iterdir())) == 4


def test_a_plan_file_is_for_people_too(tmp_path: Path) -> None:
    save_plan(make_plan(), tmp_path / "p.json")
    document = json.loads((tmp_path / "p.json").read_text("utf-8"))
    assert document["groups"][0] == {
        "keep": "0-2,5",
        "name": "a",
        "predicted_loss": 0.25,
        "size": 6,
        "width": 4,
    }
    assert document["weights"]["tensors"] == {"b": "float64[]", "w": "float32[2,3]"}
    assert document["config"] == {"keep_macs": 0.5, "exclude": ["a*"], "output": None}
    assert list(document) == sorted(document)


def test_plan_hash_sees_every_part() -> None:
    plan = make_plan()
    assert plan_hash(plan) == plan_hash(make_plan())
    assert len(plan_hash(plan)) == 16
    others = [
        make_plan(model_sha256="cd" * 32),
        make_plan(version="0.2.0"),
        make_plan(config={}),
        make_plan(notes={}),
        make_plan(predicted_loss={}),
        make_plan(weights={"w": np.arange(6, dtype=np.float32).reshape(3, 2), "b": np.array(3.0)}),
        make_plan(weights={"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(4.0)}),
        make_plan(decisions=(GroupDecision.from_keep("a", 6, [0, 1, 2, 4]), plan.decisions[1])),
    ]
    assert len({plan_hash(other) for other in (plan, *others)}) == 1 + len(others)


def test_loading_says_what_is_missing_or_damaged(tmp_path: Path) -> None:
    path, weights = tmp_path / "p.json", tmp_path / "p.safetensors"
    with pytest.raises(ModelError, match=r"p\.json cannot be read"):
        load_plan(path)
    save_plan(make_plan(), path)
    stored = weights.read_bytes()
    weights.write_bytes(stored[:-1] + b"?")
    with pytest.raises(ModelError, match=r"p\.safetensors does not belong to the plan"):
        load_plan(path)
    weights.unlink()
    with pytest.raises(ModelError, match=r"p\.safetensors cannot be read"):
        load_plan(path)
    for text in ("", "{", "[]", '{"schema": "hap-onnx/plan/99"}', "\x00", "[" * 100_000, '{"a": NaN}'):
        path.write_text(text)
        with pytest.raises(ModelError, match=r"p\.json"):
            load_plan(path)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("groups", 0, "keep"), "0-2,9"),
        (("groups", 0, "keep"), "0,1,2,3,4"),
        (("groups", 0, "keep"), "5,0-2"),
        (("groups", 0, "keep"), "0-2,,5"),
        (("groups", 0, "keep"), "-3"),
        (("groups", 0, "keep"), [0, 1]),
        (("groups", 0, "size"), -1),
        (("groups", 0, "size"), 10**12),
        (("groups", 0, "size"), True),
        (("groups", 0, "name"), "b"),
        (("groups", 0, "predicted_loss"), "much"),
        (("groups", 0), "a"),
        (("groups",), {}),
        (("config",), []),
        (("model_sha256",), None),
        (("weights", "tensors"), {}),
        (("weights", "tensors", "w"), "float32[3,2]"),
        (("weights", "tensors", "w"), "int16[2,3]"),
        (("weights", "tensors", "w"), "nonsense[2,3]"),
        (("weights", "tensors", "w"), 3),
        (("weights", "sha256"), None),
    ],
)
def test_loading_refuses_values_that_make_no_sense(tmp_path: Path, where: tuple, value: object) -> None:
    path = tmp_path / "p.json"
    save_plan(make_plan(), path)
    document = json.loads(path.read_text("utf-8"))
    inner = document
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ModelError, match=r"p\.json is damaged"):
        load_plan(path)
    if isinstance(inner, dict):
        del inner[where[-1]]
        path.write_text(json.dumps(document))
        if where[-1] != "predicted_loss":
            with pytest.raises(ModelError, match=r"p\.json is damaged"):
                load_plan(path)


def test_saving_fails_cleanly(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="weights"):
        save_plan(make_plan(), tmp_path / "p.safetensors")
    with pytest.raises(ValidationError, match="cannot be written"):
        save_plan(make_plan(), tmp_path / "nowhere" / "p.json")
    (tmp_path / "p.json").mkdir()
    with pytest.raises(ValidationError, match="cannot be written"):
        save_plan(make_plan(), tmp_path / "p.json")
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]
