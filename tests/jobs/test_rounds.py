"""One round: what it makes of a budget, and what it finds again in the work folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from sample_models import images, residual_cnn

from hap_onnx.config import CompressConfig
from hap_onnx.data.calibration import InputSpec, Splits, open_dataset, split_dataset
from hap_onnx.errors import BudgetError
from hap_onnx.events import Event
from hap_onnx.jobs import rounds
from hap_onnx.jobs.carry_out import from_plan_weights
from hap_onnx.jobs.machine import Stopwatch
from hap_onnx.jobs.rounds import Candidate, Round, Workshop
from hap_onnx.jobs.work_folder import WorkFolder
from hap_onnx.model.model_io import load_model, to_proto
from hap_onnx.planning.choose import Choice
from hap_onnx.planning.plan import GroupDecision, plan_hash
from hap_onnx.prepare import PreparedModel, prepare
from hap_onnx.sensitivity.curvature import output_scales
from hap_onnx.twin import build_twin
from tests.planning_cases import run_twin

N = 400


@cache
def prepared(seed: int = 0) -> PreparedModel:
    return prepare(load_model(residual_cnn(width=8, seed=seed)), {"x": images(2)})


@cache
def splits() -> Splits:
    spec = InputSpec("x", np.dtype(np.float32), ("N", 3, 8, 8))
    return split_dataset(open_dataset({"x": images(N)}, [spec]), seed=0)


@cache
def scales() -> dict[str, float]:
    return output_scales([run_twin(build_twin(prepared().graph), {"x": images(N)})])


def make_shop(folder: Path | None = None, *, events: list[Event] | None = None, **options: Any) -> Workshop:
    words = {"keep_macs": 0.5, "allow_slower": True, "batch_size": 16, **options}
    return Workshop(
        config=CompressConfig(**words),
        splits=splits(),
        scales=scales(),
        scores="scores",
        batch_size=16,
        time=None,  # type: ignore[arg-type]  # nothing is timed
        time_nodes=None,  # type: ignore[arg-type]
        work=WorkFolder(folder, "key"),
        clock=Stopwatch(),
        on_event=(events if events is not None else []).append,
    )


def budgets(ratio: float = 0.5) -> dict[str, float | None]:
    return {"params": None, "macs": ratio * Round(make_shop(), prepared()).sizes()["macs"]}


def arrays_of(candidate: Candidate) -> dict[str, bytes]:
    tensors = candidate.compressed.finished().tensors()
    return {name: t.values.tobytes() for name, t in tensors.items() if isinstance(t, gs.Constant)}


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function after which the named stages of rounds may not run."""

    def fail(*args: Any, **options: Any) -> Any:
        raise AssertionError("this has been done already")

    def forbid(*names: str) -> None:
        for name in names:
            monkeypatch.setattr(rounds, name, fail)

    return forbid


# --- without a folder ---


def test_a_candidate_is_within_its_budget_and_its_plan_makes_it_again() -> None:
    here = Round(make_shop(), prepared())
    candidate = here.compress_to(budgets())
    assert candidate.plan.model_sha256 == prepared().source.sha256
    assert candidate.plan.earlier == ()
    assert set(candidate.plan.notes) == {group.name for group in prepared().coupling.groups}
    graph = candidate.compressed.finished()
    after = Round(make_shop(), prepare(load_model(to_proto(graph, prepared().source)), {"x": images(2)}))
    assert after.sizes()["macs"] <= 0.5 * here.sizes()["macs"]
    choice = Choice(candidate.plan.decisions, candidate.plan.replacements)
    again = from_plan_weights(prepared(), choice, candidate.plan.weights)
    assert arrays_of(replace(candidate, compressed=again)) == arrays_of(candidate)
    assert here.compress_to(budgets()) is candidate  # made once
    assert here.compress_to(budgets(0.7)) is not candidate


def test_sensitivities_are_found_once_and_only_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = rounds.build_loss_model, []
    monkeypatch.setattr(
        rounds, "build_loss_model", lambda *args, **options: calls.append(1) or real(*args, **options)
    )
    shop = make_shop()
    here = Round(shop, prepared())
    assert calls == []
    for ratio in (0.5, 0.7):
        here.sketch(budgets(ratio))
        here.compress_to(budgets(ratio))
    assert calls == [1]
    assert set(shop.clock.seconds) == {"sensitivity", "compress"}


def test_an_impossible_budget_is_refused_and_nothing_is_kept(tmp_path: Path) -> None:
    here = Round(make_shop(tmp_path), prepared())
    with pytest.raises(BudgetError):
        here.compress_to(budgets(1e-5))
    assert list(tmp_path.rglob("*.json")) == []


def test_a_sketch_is_not_kept(tmp_path: Path) -> None:
    Round(make_shop(tmp_path), prepared()).sketch(budgets())
    assert list(tmp_path.iterdir()) == []


def test_names_tell_budgets_models_and_rounds_apart() -> None:
    here = Round(make_shop(), prepared())
    plan = here.sketch(budgets()).plan
    names = {
        here.name_of(budgets()),
        here.name_of(budgets(0.6)),
        here.name_of({"params": 100.0, "macs": None}),
        here.name_of({"params": None, "macs": 100.0}),
        Round(make_shop(), prepared(4)).name_of(budgets()),
        Round(make_shop(), prepared(), [plan]).name_of(budgets()),
    }
    assert len(names) == 6
    assert here.name_of(dict(reversed(budgets().items()))) == here.name_of(budgets())
    assert all(name.startswith(("1-", "2-")) for name in names)


def test_statistics_take_whole_batches_of_some_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    shop, part = make_shop(), splits().calibrate
    assert shop.few(part).n_samples == part.n_samples
    monkeypatch.setattr(rounds, "N_STATISTICS", 40)
    assert shop.few(part).n_samples == 32
    np.testing.assert_array_equal(shop.few(part).indices, part.indices[:32])
    monkeypatch.setattr(rounds, "N_STATISTICS", 4)
    assert shop.few(part).n_samples == 16


# --- with a folder ---


def test_a_candidate_is_found_again(tmp_path: Path, forbidden: Callable[..., None]) -> None:
    first = Round(make_shop(tmp_path), prepared()).compress_to(budgets())
    forbidden("build_loss_model", "compress_to")
    shop = make_shop(tmp_path)
    second = Round(shop, prepared()).compress_to(budgets())
    assert arrays_of(second) == arrays_of(first)
    assert plan_hash(second.plan) == plan_hash(first.plan)
    assert shop.clock.seconds == {}


def test_words_that_do_not_matter_are_those_of_this_job(tmp_path: Path) -> None:
    Round(make_shop(tmp_path), prepared()).compress_to(budgets())
    shop = make_shop(tmp_path, keep_macs=0.51, max_drop=0.25)
    found = Round(shop, prepared()).compress_to(budgets())
    assert (found.plan.config["keep_macs"], found.plan.config["max_drop"]) == (0.51, 0.25)
    fresh = Round(make_shop(keep_macs=0.51, max_drop=0.25), prepared()).compress_to(budgets())
    assert plan_hash(found.plan) == plan_hash(fresh.plan)


def test_other_budgets_and_models_are_not_found(tmp_path: Path) -> None:
    first = Round(make_shop(tmp_path), prepared()).compress_to(budgets())
    shop = make_shop(tmp_path)
    assert Round(shop, prepared()).kept(Round(shop, prepared()).name_of(budgets(0.6))) is None
    # Even if a file had the right name.
    other = Round(shop, prepared(4))
    shop.work.save(other.name_of(budgets()), first.plan)
    assert other.kept(other.name_of(budgets())) is None


def test_a_damaged_candidate_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Round(make_shop(tmp_path), prepared()).compress_to(budgets())
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with caplog.at_level(logging.WARNING):
        second = Round(make_shop(tmp_path), prepared()).compress_to(budgets())
    assert "not used" in caplog.text
    assert arrays_of(second) == arrays_of(first)
    assert path.read_bytes() == whole


def test_later_rounds_keep_their_history(tmp_path: Path, forbidden: Callable[..., None]) -> None:
    plan = Round(make_shop(tmp_path), prepared()).compress_to(budgets(0.7)).plan
    first = Round(make_shop(tmp_path), prepared(4), [plan]).compress_to(budgets())
    assert [plan_hash(one) for one in first.plan.earlier] == [plan_hash(plan)]
    forbidden("build_loss_model", "compress_to")
    second = Round(make_shop(tmp_path), prepared(4), [plan]).compress_to(budgets())
    assert plan_hash(second.plan) == plan_hash(first.plan)


# --- training ---


def train(folder: Path | None, **options: Any) -> tuple[Candidate, Candidate]:
    here = Round(make_shop(folder, epochs=6, **options), prepared())
    candidate = here.compress_to(budgets(0.3))
    return candidate, here.train(candidate, budgets(0.3), prepared())


def test_training_changes_weights_only_and_is_told_in_the_plan() -> None:
    before, after = train(None)
    assert {n: len(v) for n, v in arrays_of(before).items()} == {
        n: len(v) for n, v in arrays_of(after).items()
    }
    assert arrays_of(before) != arrays_of(after)
    assert after.plan.training["epochs"] == 6
    assert after.plan.training["best_score"] < after.plan.training["start_score"]
    assert before.plan.training == {}
    assert replace(after.plan, weights={}, training={}).decisions == before.plan.decisions


def test_a_folder_makes_no_difference(tmp_path: Path) -> None:
    assert plan_hash(train(tmp_path)[1].plan) == plan_hash(train(None)[1].plan)


def test_a_trained_candidate_is_found_again_and_its_state_is_gone(
    tmp_path: Path, forbidden: Callable[..., None]
) -> None:
    _, first = train(tmp_path)
    assert sorted(path.suffix for path in tmp_path.rglob("*") if path.is_file()) == [
        ".json", ".json", ".safetensors", ".safetensors",
    ]  # fmt: skip
    assert not list(tmp_path.rglob("*.training"))
    forbidden("build_loss_model", "compress_to", "distill")
    _, second = train(tmp_path)
    assert arrays_of(second) == arrays_of(first)
    assert plan_hash(second.plan) == plan_hash(first.plan)


def test_excluded_nodes_are_not_trained() -> None:
    one = prepare(
        load_model(residual_cnn(width=8)), {"x": images(2)}, exclude=["make_scores", "b2.w", "b2.b"]
    )
    here = Round(make_shop(epochs=6, method="prune"), one)
    candidate = here.compress_to(budgets(0.7))
    trained = here.train(candidate, budgets(0.7), one)
    before, after = arrays_of(candidate), arrays_of(trained)
    changed = {name for name in before if before[name] != after[name]}
    assert {"stem.w", "a1.w"} <= changed
    original = {n: t.values for n, t in one.graph.tensors().items() if isinstance(t, gs.Constant)}
    kept = [name for name in ("head.w", "head.b", "b2.b") if before[name] == original[name].tobytes()]
    assert len(kept) == 3
    assert not changed & set(kept)


def test_a_candidate_that_does_not_fit_the_model_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as one whose file was changed by hand: its weights still belong to it."""
    shop = make_shop(tmp_path)
    here = Round(shop, prepared())
    plan = here.compress_to(budgets()).plan
    decisions = (*plan.decisions, GroupDecision.from_keep("more", 2, [0]))
    shop.work.save(here.name_of(budgets()), replace(plan, decisions=decisions))
    with caplog.at_level(logging.WARNING):
        found = Round(make_shop(tmp_path), prepared()).compress_to(budgets())
    assert "not used" in caplog.text
    assert plan_hash(found.plan) == plan_hash(plan)
