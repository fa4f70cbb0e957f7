"""Decisions, and plans that survive their file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import make_coupling
from hypothesis import given, settings
from hypothesis import strategies as st

from hap_onnx.errors import ModelError, UsageError, ValidationError
from hap_onnx.planning.plan import (
    CompressionPlan,
    GroupDecision,
    NodeReplacement,
    load_plan,
    plan_hash,
    save_plan,
)
from tests.forks import run_fork

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
        replacements=(
            NodeReplacement("a", "pointwise", 3, np.array([1, 2, 5]), 0.5, 0.25),
            NodeReplacement("node c", "spatial", 7, predicted_loss=1e-9),
        ),
        layer_notes={"a": "fitting", "d": "as it is"},
    )
    return replace(plan, **changes)


MEASURED = (("spatial", 0.125, 0.25), ("lowrank", 1e-9, 3.0))


def make_rounds() -> CompressionPlan:
    """A plan of three rounds, the last two of which were trained; weights have the same names in each."""
    first = make_plan(replacements=(NodeReplacement("c", "lowrank", 2, measured=MEASURED),))
    second = make_plan(
        model_sha256="cd" * 32,
        weights={"w": np.zeros(2, np.float16), "earlier:0:w": np.ones(3)},
        training={"epochs": 3, "best_epoch": 1.5, "augmentations": ["flip"]},
        replacements=(),
    )
    return make_plan(
        model_sha256="ef" * 32,
        training={"epochs": 3, "rollbacks": 1},
        earlier=(first, second),
        replacements=(NodeReplacement("b", "spatial", 7, measured=MEASURED[:1]),),
    )


@pytest.mark.parametrize(
    ("kind", "rank", "channels"),
    [
        ("dense", 1, []),
        ("lowrank", 0, []),
        ("spatial", -2, []),
        ("lowrank", 1, [0]),
        ("pointwise", 2, [0]),
        ("pointwise", 2, [1, 0]),
        ("pointwise", 2, [1, 1]),
        ("pointwise", 1, [-1]),
        ("pointwise", 1, [[0]]),
    ],
)
def test_a_replacement_names_its_channels(kind: str, rank: int, channels: list) -> None:
    with pytest.raises(ValueError, match="conv1"):
        NodeReplacement("conv1", kind, rank, np.array(channels, np.int64))


def test_a_replacement_cannot_be_changed_and_has_finite_losses() -> None:
    given = np.array([1, 4])
    replacement = NodeReplacement("conv1", "pointwise", 2, given)
    given[0] = 0
    assert replacement.channels.tolist() == [1, 4]
    with pytest.raises(ValueError, match="read-only"):
        replacement.channels[0] = 2
    for losses in (
        {"expected_loss": float("nan")},
        {"measured": (("spatial", float("inf"), 1.0),)},
        {"measured": (("spatial", 1.0, 1.0), ("spatial", 1.0, float("nan")))},
    ):
        with pytest.raises(ValueError, match="finite"):
            NodeReplacement("conv1", "lowrank", 2, **losses)


def test_decisions_come_in_the_order_of_the_groups() -> None:
    plan = make_plan()
    found = plan.decisions_for(make_coupling({"b": 3, "a": 6}))
    assert found == (plan.decisions[1], plan.decisions[0])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"a": 6, "b": 4}, "'b' has 4 channels, the plan decides 3"),
        ({"a": 6}, "no group 'b'"),
        ({"a": 6, "b": 3, "c": 1}, "'c' has 1 channels, the plan decides none"),
    ],
)
def test_another_models_groups_are_refused(sizes: Mapping[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_plan().decisions_for(make_coupling(sizes))


def test_a_plan_belongs_to_one_model() -> None:
    make_plan().check_model("ab" * 32)
    with pytest.raises(ModelError, match="another model"):
        make_plan().check_model("cd" * 32)


def test_a_plan_refuses_what_its_file_could_not_hold() -> None:
    for changes in (
        {"predicted_loss": {"a": float("nan")}},
        {"predicted_loss": {"c": 1.0}},
        {"notes": {"c": "?"}},
        {"replacements": (NodeReplacement("a", "lowrank", 1), NodeReplacement("a", "spatial", 2))},
        {"config": {"x": float("inf")}},
        {"weights": {"w": np.array(["text"])}},
        {"training": {"best_score": float("nan")}},
        {"earlier": (make_plan(earlier=(make_plan(),)),)},
        {"decisions": (GroupDecision.from_keep("a", 1, [0]),) * 2, "predicted_loss": {}, "notes": {}},
    ):
        with pytest.raises(ValueError, match=r".+"):
            make_plan(**changes)


# --- files ---


def check_equal(plan: CompressionPlan, other: CompressionPlan) -> None:
    for name in ("model_sha256", "version", "config", "predicted_loss", "notes", "layer_notes", "training"):
        assert getattr(plan, name) == getattr(other, name)
    assert [(d.group, d.keep.tolist(), d.drop.tolist()) for d in plan.decisions] == [
        (d.group, d.keep.tolist(), d.drop.tolist()) for d in other.decisions
    ]
    assert [
        (r.node, r.kind, r.rank, r.channels.tolist(), r.predicted_loss, r.expected_loss, r.measured)
        for r in plan.replacements
    ] == [
        (r.node, r.kind, r.rank, r.channels.tolist(), r.predicted_loss, r.expected_loss, r.measured)
        for r in other.replacements
    ]
    assert len(plan.earlier) == len(other.earlier)
    for mine, theirs in zip(plan.earlier, other.earlier, strict=True):
        check_equal(mine, theirs)
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
def replacements(draw: st.DrawFn) -> NodeReplacement:
    kind = draw(st.sampled_from(["lowrank", "spatial", "pointwise"]))
    channels = sorted(draw(st.sets(st.integers(0, 60), min_size=1, max_size=20)))
    losses = st.floats(allow_nan=False, allow_infinity=False)
    return NodeReplacement(
        draw(st.text(max_size=6)),
        kind,
        len(channels) if kind == "pointwise" else draw(st.integers(1, 10**6)),
        np.array(channels if kind == "pointwise" else [], np.int64),
        draw(losses),
        draw(losses),
        tuple(draw(st.lists(st.tuples(st.text(max_size=6), losses, losses), max_size=2))),
    )


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def plans(draw: st.DrawFn, *, most_earlier: int = 2) -> CompressionPlan:
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
        replacements=tuple(draw(st.lists(replacements(), max_size=3, unique_by=lambda r: r.node))),
        layer_notes=draw(st.dictionaries(st.text(max_size=6), st.text(max_size=20), max_size=3)),
        training=draw(st.dictionaries(st.text(max_size=5), _JSON, max_size=2)),
        earlier=tuple(draw(st.lists(plans(most_earlier=0), max_size=most_earlier))),
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


def test_rounds_survive_their_file_with_weights_of_the_same_names(tmp_path: Path) -> None:
    plan = make_rounds()
    save_plan(plan, tmp_path / "p.json")
    found = load_plan(tmp_path / "p.json")
    check_equal(plan, found)
    assert found.earlier[0].replacements[0].measured == MEASURED
    assert found.earlier[1].training["augmentations"] == ["flip"]
    assert [sorted(part.weights) for part in (*found.earlier, found)] == [
        ["b", "w"],
        ["earlier:0:w", "w"],
        ["b", "w"],
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "p.safetensors"]


def test_what_a_plan_lacks_is_not_in_its_file(tmp_path: Path) -> None:
    save_plan(make_plan(), tmp_path / "p.json")
    document = json.loads((tmp_path / "p.json").read_text("utf-8"))
    assert {"training", "earlier"}.isdisjoint(document)
    save_plan(make_rounds(), tmp_path / "p.json")
    document = json.loads((tmp_path / "p.json").read_text("utf-8"))
    assert document["training"] == {"epochs": 3, "rollbacks": 1}
    assert document["implants"][0]["measured"] == [["spatial", 0.125, 0.25]]
    assert [len(entry["implants"]) for entry in document["earlier"]] == [1, 0]
    assert "training" not in document["earlier"][0]


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
    assert document["implants"] == [
        {
            "node": "a",
            "kind": "pointwise",
            "rank": 3,
            "channels": "1-2,5",
            "predicted_loss": 0.5,
            "expected_loss": 0.25,
        },
        {"node": "node c", "kind": "spatial", "rank": 7, "predicted_loss": 1e-9, "expected_loss": 0.0},
    ]
    assert document["layers"] == {"a": "fitting", "d": "as it is"}
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
        make_plan(replacements=()),
        make_plan(replacements=(plan.replacements[0],)),
        make_plan(replacements=(replace(plan.replacements[0], channels=np.array([1, 2, 4])),)),
        make_plan(layer_notes={}),
        make_plan(weights={"w": np.arange(6, dtype=np.float32).reshape(3, 2), "b": np.array(3.0)}),
        make_plan(weights={"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(4.0)}),
        make_plan(decisions=(GroupDecision.from_keep("a", 6, [0, 1, 2, 4]), plan.decisions[1])),
    ]
    rounds = make_rounds()
    first, second = rounds.earlier
    (implant,) = rounds.replacements
    others += [
        make_plan(training={"epochs": 3}),
        make_plan(training={"epochs": 4}),
        make_plan(earlier=(first,)),
        rounds,
        replace(rounds, training={}),
        replace(rounds, earlier=(second, first)),
        replace(rounds, earlier=(first,)),
        replace(rounds, earlier=(first, replace(second, training={"epochs": 3}))),
        replace(rounds, earlier=(replace(first, version="0.2.0"), second)),
        replace(rounds, earlier=(replace(first, model_sha256="01" * 32), second)),
        replace(rounds, earlier=(first, replace(second, weights={}))),
        replace(rounds, earlier=(first, replace(second, weights={"w": np.ones(2, np.float16)}))),
        replace(rounds, replacements=(replace(implant, measured=()),)),
        replace(rounds, replacements=(replace(implant, measured=(("lowrank", 0.125, 0.25),)),)),
        replace(rounds, replacements=(replace(implant, measured=(("spatial", 0.125, 0.5),)),)),
        replace(rounds, replacements=(replace(implant, measured=MEASURED),)),
    ]
    assert len({plan_hash(other) for other in (plan, *others)}) == 1 + len(others)


@pytest.mark.parametrize(("number", "age"), [(0, "an older"), (99, "a newer")])
def test_a_plan_of_another_version_says_so(tmp_path: Path, number: int, age: str) -> None:
    path = tmp_path / "plan.json"
    save_plan(make_plan(), path)
    path.write_text(path.read_text().replace('"hap-onnx/plan/1"', f'"hap-onnx/plan/{number}"'))
    with pytest.raises(ModelError, match=f"written by {age} version .* make it anew with"):
        load_plan(path)


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


OPTIONAL = [
    ("groups", 0, "predicted_loss"), ("implants",), ("layers",), ("layers", "a"), ("training",),
    ("implants", 0, "measured"), ("earlier",), ("earlier", 0, "implants"), ("earlier", 1, "training"),
    ("earlier", 0, "implants", 0, "measured"), ("training", "epochs"),
    ("earlier", 1, "training", "start_score"), ("earlier", 1, "training", "best_epoch"),
    ("earlier", 1, "training", "epochs"), ("config", "input_shapes"), ("config", "exclude"),
    ("config", "only"), ("config", "seed"),
]  # fmt: skip


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
        (("config", "input_shapes"), "x"),
        (("config", "input_shapes"), {"x": 3}),
        (("config", "input_shapes"), {"x": [2, -1]}),
        (("config", "input_shapes"), {"x": [2, True]}),
        (("config", "input_shapes"), {"x": [0, 3, 8, 8]}),
        (("config", "exclude"), "head.*"),
        (("config", "only"), [3]),
        (("config", "seed"), None),
        (("model_sha256",), None),
        (("groups", 0, "keep"), "0-268435454"),
        (("groups", 0, "predicted_loss"), 10**400),
        (("implants",), {}),
        (("implants", 0), "a"),
        (("implants", 0, "node"), "node c"),
        (("implants", 0, "node"), None),
        (("implants", 0, "kind"), "dense"),
        (("implants", 0, "kind"), "lowrank"),
        (("implants", 1, "kind"), "pointwise"),
        (("implants", 0, "rank"), 2),
        (("implants", 0, "rank"), 10**12),
        (("implants", 1, "rank"), 0),
        (("implants", 1, "rank"), 1.5),
        (("implants", 1, "rank"), True),
        (("implants", 0, "channels"), "5,1-2"),
        (("implants", 0, "channels"), "1-268435454"),
        (("implants", 0, "channels"), [1, 2, 5]),
        (("implants", 0, "predicted_loss"), "much"),
        (("implants", 0, "expected_loss"), 10**400),
        (("implants", 0, "expected_loss"), True),
        (("layers",), []),
        (("layers", "a"), 3),
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
        if where not in OPTIONAL:
            with pytest.raises(ModelError, match=r"p\.json is damaged"):
                load_plan(path)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("training",), []),
        (("training",), "epochs"),
        (("implants", 0, "measured"), {}),
        (("implants", 0, "measured"), "spatial"),
        (("implants", 0, "measured", 0), "spatial"),
        (("implants", 0, "measured", 0), ["spatial", 0.5]),
        (("implants", 0, "measured", 0), ["spatial", 0.5, 0.5, 0.5]),
        (("implants", 0, "measured", 0, 0), 3),
        (("implants", 0, "measured", 0, 1), "much"),
        (("implants", 0, "measured", 0, 2), True),
        (("implants", 0, "measured", 0, 2), None),
        (("implants", 0, "measured", 0, 2), 10**400),
        (("earlier",), {}),
        (("earlier",), "first"),
        (("earlier", 0), "first"),
        (("earlier", 0), None),
        (("earlier", 0, "groups"), {}),
        (("earlier", 0, "groups", 0, "keep"), "0-2,9"),
        (("earlier", 0, "groups", 0, "width"), 5),
        (("earlier", 0, "model_sha256"), None),
        (("earlier", 0, "config"), []),
        (("earlier", 0, "implants"), {}),
        (("earlier", 0, "implants", 0, "rank"), 0),
        (("earlier", 0, "implants", 0, "measured"), "spatial"),
        (("earlier", 1, "training"), []),
        (("earlier", 1, "training", "start_score"), "high"),
        (("earlier", 1, "training", "best_epoch"), None),
        (("earlier", 1, "training", "epochs"), "x"),
        (("weights", "tensors"), {}),
        (("weights", "tensors", "round:0:w"), "float32[3,2]"),
        (("weights", "tensors", "round:1:earlier:0:w"), 3),
    ],
)
def test_loading_refuses_damaged_rounds(tmp_path: Path, where: tuple, value: object) -> None:
    path = tmp_path / "p.json"
    save_plan(make_rounds(), path)
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
        if where not in OPTIONAL:
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


def test_whoever_may_read_the_plan_may_read_its_weights(tmp_path: Path) -> None:
    save_plan(make_plan(), tmp_path / "p.json")
    modes = {(tmp_path / name).stat().st_mode & 0o777 for name in ("p.json", "p.safetensors")}
    (tmp_path / "other").touch()
    assert modes == {(tmp_path / "other").stat().st_mode & 0o777}


def test_what_the_library_of_weights_had_begun_when_it_was_killed_is_removed(tmp_path: Path) -> None:
    """It writes under names of its own, which say nothing."""

    def save_and_die(tensors: object, path: Path) -> None:
        Path(path).with_name(".tmpAbCdEf").write_bytes(b"half")
        os._exit(7)

    def work() -> None:
        safetensors.numpy.save_file = save_and_die
        save_plan(make_plan(), tmp_path / "p.json")

    assert run_fork(work).code == 7
    assert list(tmp_path.rglob(".tmpAbCdEf"))
    save_plan(make_plan(), tmp_path / "p.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.json", "p.safetensors"]


def test_weights_of_rounds_are_kept_apart_whatever_their_names(tmp_path: Path) -> None:
    first = make_plan(weights={"w": np.ones(3), "round:1:w": np.ones(2)})
    plan = make_plan(weights={"round:0:w": np.zeros(2), "round:": np.zeros(1)}, earlier=(first,))
    save_plan(plan, tmp_path / "p.json")
    check_equal(plan, load_plan(tmp_path / "p.json"))
