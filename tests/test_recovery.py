"""Whole jobs with training, in rounds, interrupted and taken up again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from sample_models import fix_speed, images, residual_cnn, with_labels, write

from hap_onnx import apply_plan, compress, inspect
from hap_onnx.errors import BudgetError, ModelError, UsageError
from hap_onnx.events import Event
from hap_onnx.jobs import job, rounds
from hap_onnx.planning.plan import load_plan
from hap_onnx.report import CompressReport

FAST: dict[str, Any] = {"threads": 1, "batch_size": 32}
N = 200


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_speed(monkeypatch)


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    return {"x": images(N)}


@pytest.fixture(scope="module")
def labelled() -> dict[str, np.ndarray]:
    return with_labels(images(N), residual_cnn(width=8))


@dataclass(frozen=True)
class Made:
    """What a job has given: its report, and the bytes of its model."""

    report: CompressReport
    model: bytes


def make(folder: Path, given: Any, *, name: str = "o", **options: Any) -> Made:
    """Compress the small network of the samples; also keeps the plan."""
    model = folder / "net.onnx"
    if not model.exists():
        write(folder, residual_cnn(width=8))
    output = folder / f"{name}.onnx"
    words = {"output": output, "save_plan": folder / f"{name}.json", **FAST, **options}
    return Made(compress(model, given, **words), output.read_bytes())


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check_applied(folder: Path, made: Made, *, name: str = "o") -> CompressReport:
    """Assert that the saved plan gives the same bytes and tells the same."""
    report = apply_plan(folder / "net.onnx", folder / f"{name}.json", output=folder / "applied.onnx")
    assert (folder / "applied.onnx").read_bytes() == made.model
    assert report.plan == made.report.plan
    assert report.recovery == made.report.recovery
    assert report.before.params == made.report.before.params
    assert (report.after.params, report.after.macs) == (made.report.after.params, made.report.after.macs)
    return report


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("with_them", [False, True], ids=["unlabelled", "labelled"])
def test_a_job_with_training(
    tmp_path: Path, data: dict[str, np.ndarray], labelled: dict[str, np.ndarray], with_them: bool
) -> None:
    given = labelled if with_them else data
    events: list[Event] = []
    made = make(tmp_path, given, keep_macs=0.4, epochs=5, on_event=events.append)
    report = made.report
    assert report.budget.reached["keep_macs"] <= 0.4
    (entry,) = report.recovery
    assert (entry.method, entry.epochs, entry.rollbacks) == ("distill", 5, 0)
    assert entry.start_score is not None
    assert entry.best_score is not None
    assert entry.best_epoch is not None
    assert entry.best_score <= entry.start_score
    assert 0 <= entry.best_epoch <= 5
    assert report.seconds["distill"] > 0
    assert [event.total for event in events if (event.stage, event.kind) == ("distill", "start")] == [
        5 * (120 // 32)
    ]
    check_applied(tmp_path, made)
    assert json.loads((tmp_path / "o.json").read_text())["config"]["recover"] == "distill"
    plain = json.loads(json.dumps(report.to_dict()))["recovery"][0]
    assert plain["augmentations"] == []
    assert plain["best_score"] == entry.best_score
    again = make(tmp_path, given, name="again", keep_macs=0.4, epochs=5)
    assert again.model == made.model


def test_labels_make_another_model(
    tmp_path: Path, data: dict[str, np.ndarray], labelled: dict[str, np.ndarray]
) -> None:
    labels = (labelled["labels"] + (np.arange(N) % 7 == 0)) % 5
    models = [
        make(tmp_path, given, keep_macs=0.4, epochs=4).report.recovery[0]
        for given in (labelled, {**data, "labels": labels})
    ]
    assert models[0].start_score != models[1].start_score


def test_training_starts_from_the_refit(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    trained = make(tmp_path, data, keep_macs=0.4, epochs=4)
    refitted = make(tmp_path, data, name="refit", keep_macs=0.4)
    assert trained.report.plan == refitted.report.plan
    assert trained.model != refitted.model
    assert (refitted.report.recovery[0].method, refitted.report.recovery[0].epochs) == ("refit", None)


def test_recover_distill_trains_for_a_number_of_epochs_of_its_own(
    tmp_path: Path, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hap_onnx.config.DEFAULT_EPOCHS", 2)
    first = make(tmp_path, data, keep_macs=0.4, recover="distill")
    assert first.report.recovery[0].epochs == 2
    second = make(tmp_path, data, keep_macs=0.4, epochs=2)
    assert first.report.recovery == second.report.recovery


def test_words_that_contradict_each_other(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    with pytest.raises(UsageError, match="--recover none forbids it"):
        make(tmp_path, data, keep_macs=0.4, epochs=2, recover="none")
    for options in ({}, {"max_drop": 0.1}):
        with pytest.raises(UsageError, match="--rounds needs a budget"):
            make(tmp_path, data, rounds=2, **options)
    assert files_in(tmp_path) == ["net.onnx"]


def test_a_dry_run_trains_nothing_unless_a_plan_is_kept(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = write(tmp_path, residual_cnn(width=8))
    options: dict[str, Any] = {"keep_macs": 0.4, "epochs": 3, "dry_run": True, **FAST}
    report = compress(model, data, **options)
    assert "distill" not in report.seconds
    assert report.recovery[0].best_score is None
    assert files_in(tmp_path) == ["net.onnx"]
    report = compress(model, data, save_plan=tmp_path / "p.json", **options)
    assert "distill" in report.seconds
    assert report.recovery[0].best_score is not None
    assert files_in(tmp_path) == ["net.onnx", "p.json", "p.safetensors"]
    apply_plan(model, tmp_path / "p.json", output=tmp_path / "applied.onnx")
    real = make(tmp_path, data, keep_macs=0.4, epochs=3)
    assert (tmp_path / "applied.onnx").read_bytes() == real.model


def test_a_search_trains_what_it_looks_at(tmp_path: Path, labelled: dict[str, np.ndarray]) -> None:
    events: list[Event] = []
    made = make(tmp_path, labelled, max_drop=0.25, epochs=2, method="prune", on_event=events.append)
    n_trained = sum((event.stage, event.kind) == ("distill", "start") for event in events)
    n_judged = sum("of the size" in event.message for event in events)
    assert n_trained == n_judged > 1
    assert made.report.quality is not None
    assert made.report.quality.passed
    assert made.report.after.params < made.report.before.params
    check_applied(tmp_path, made)


@pytest.mark.parametrize("method", ["prune", "implant"])
def test_every_method_is_trained(tmp_path: Path, data: dict[str, np.ndarray], method: str) -> None:
    made = make(tmp_path, data, keep_macs=0.5, epochs=4, method=method)
    assert made.report.recovery[0].epochs == 4
    assert bool(made.report.plan.implants) == (method == "implant")
    check_applied(tmp_path, made)


@pytest.mark.parametrize(
    "options", [{"batch": 1}, {"batch": 4}, {"dtype": np.float16}, {"opset": 9}], ids=str
)
def test_every_kind_of_model_is_trained(tmp_path: Path, options: dict[str, Any]) -> None:
    write(tmp_path, residual_cnn(width=8, **options))
    made = make(tmp_path, {"x": images(N)}, keep_macs=0.5, epochs=3)
    entry = made.report.recovery[0]
    assert entry.best_score is not None
    assert entry.start_score is not None
    assert entry.best_score <= entry.start_score
    check_applied(tmp_path, made)


def test_what_is_excluded_is_not_trained(tmp_path: Path) -> None:
    given = {"x": images(600)}
    made = make(tmp_path, given, keep_macs=0.5, epochs=6, exclude=["make_scores"], method="prune")
    old, new = (
        {t.name: t.SerializeToString() for t in onnx.load(path).graph.initializer}
        for path in (tmp_path / "net.onnx", tmp_path / "o.onnx")
    )
    for name in ("head.w", "head.b"):
        assert old[name] == new[name]
    assert old["stem.w"] != new["stem.w"]
    check_applied(tmp_path, made)


# ---------------------------------------------------------------- rounds


@pytest.mark.parametrize("recover", ["none", "refit", "distill"])
def test_rounds_approach_the_budget(
    tmp_path: Path, data: dict[str, np.ndarray], recover: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hap_onnx.config.DEFAULT_EPOCHS", 2)
    made = make(tmp_path, data, keep_macs=0.25, rounds=2, recover=recover)
    report = made.report
    assert report.budget.asked == {"keep_macs": 0.25}
    assert report.budget.reached["keep_macs"] <= 0.25
    assert [entry.method for entry in report.recovery] == [recover] * 2
    assert [entry.epochs for entry in report.recovery] == [2 if recover == "distill" else None] * 2
    groups = {group.name: group.size for group in inspect(tmp_path / "net.onnx").groups}
    told = {group.name: group for group in report.plan.groups}
    assert set(groups) <= set(told)
    for name, size in groups.items():
        assert told[name].size == size
        assert 0 <= told[name].kept <= size
    check_applied(tmp_path, made)
    plan = load_plan(tmp_path / "o.json")
    assert len(plan.earlier) == 1
    assert plan.earlier[0].model_sha256 != plan.model_sha256
    assert [bool(part.training) for part in (*plan.earlier, plan)] == [recover == "distill"] * 2


def test_budgets_of_rounds_fall_in_equal_ratios(
    tmp_path: Path, data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = rounds.compress_to, []
    monkeypatch.setattr(
        rounds, "compress_to", lambda setting, limits: asked.append(limits) or real(setting, limits)
    )
    events: list[Event] = []
    made = make(
        tmp_path, data, keep_macs=0.4, keep_params=0.5, rounds=3, method="prune", recover="none",
        on_event=events.append,
    )  # fmt: skip
    full = {"macs": made.report.before.macs, "params": made.report.before.params}
    for name, ratio in (("macs", 0.4), ("params", 0.5)):
        np.testing.assert_allclose(
            [limits[name] for limits in asked], [ratio ** (part / 3) * full[name] for part in (1, 2, 3)]
        )
    notes = [event.message for event in events if event.message.startswith("round ")]
    assert notes == ["round 1 of 3 is done", "round 2 of 3 is done"]
    assert [len(load_plan(tmp_path / "o.json").earlier)] == [2]
    check_applied(tmp_path, made)


def test_one_round_is_a_plain_job(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    first = make(tmp_path, data, keep_macs=0.5)
    second = make(tmp_path, data, keep_macs=0.5, rounds=1)
    assert first.model == second.model
    assert len(first.report.recovery) == 1


@pytest.mark.parametrize("method", ["prune", "hap"])
def test_rounds_within_a_size_of_the_file(tmp_path: Path, data: dict[str, np.ndarray], method: str) -> None:
    write(tmp_path, residual_cnn(width=8))
    limit = int(0.5 * (tmp_path / "net.onnx").stat().st_size)
    made = make(tmp_path, data, max_bytes=limit, rounds=2, method=method, epochs=1)
    assert 0.7 * limit < len(made.model) <= limit
    assert made.report.budget.reached["max_bytes"] == len(made.model)
    assert len(made.report.recovery) == 2
    check_applied(tmp_path, made)


def test_rounds_of_implants_and_the_paper(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    with pytest.raises(UsageError, match="--method implant, which replaces a layer only once"):
        make(tmp_path, data, keep_macs=0.5, rounds=2, method="implant")
    made = make(tmp_path, data, keep_macs=0.3, rounds=3)
    names = [tensor.name for tensor in onnx.load(tmp_path / "o.onnx").graph.initializer]
    assert any("_hap_" in name for name in names)
    assert not any(name.count("_hap_") > 1 for name in names)  # no implant of an implant
    check_applied(tmp_path, made)
    made = make(tmp_path, data, keep_macs=0.5, rounds=2, preset="paper", probes=4)
    check_applied(tmp_path, made)


def test_what_is_excluded_stays_in_every_round(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    """A pattern may name what a round has removed."""
    made = make(
        tmp_path, data, keep_macs=0.75, rounds=2, epochs=2, exclude=["make_scores", "make_a1"], method="prune"
    )
    old, new = (
        {t.name: t for t in onnx.load(path).graph.initializer}
        for path in (tmp_path / "net.onnx", tmp_path / "o.onnx")
    )
    for name in ("head.b", "a1.b"):
        assert old[name].SerializeToString() == new[name].SerializeToString()
    check_applied(tmp_path, made)
    made = make(tmp_path, data, keep_macs=0.92, rounds=2, epochs=1, only=["make_a?"], method="prune")
    kept = {group.name: group.kept == group.size for group in made.report.plan.groups}
    assert not all(kept[name] for name in ("make_a1", "make_a2"))
    assert all(flag for name, flag in kept.items() if name not in ("make_a1", "make_a2"))
    check_applied(tmp_path, made)


def test_a_dry_run_of_rounds_is_a_plan_of_rounds(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = write(tmp_path, residual_cnn(width=8))
    options: dict[str, Any] = {"keep_macs": 0.4, "rounds": 2, "dry_run": True, **FAST}
    report = compress(model, data, epochs=2, **options)
    assert report.budget.reached["keep_macs"] <= 0.4
    assert len(report.recovery) == 2
    compress(model, data, save_plan=tmp_path / "p.json", **options)
    apply_plan(model, tmp_path / "p.json", output=tmp_path / "applied.onnx")
    assert (tmp_path / "applied.onnx").read_bytes() == make(tmp_path, data, keep_macs=0.4, rounds=2).model


def test_rounds_in_another_order_are_refused(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    make(tmp_path, data, keep_macs=0.4, rounds=3, recover="none", method="prune")
    plan = tmp_path / "o.json"
    document = json.loads(plan.read_text())
    document["earlier"].reverse()
    plan.write_text(json.dumps(document))
    with pytest.raises(ModelError, match=r"another model|does not fit|damaged"):
        apply_plan(tmp_path / "net.onnx", plan, output=tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


# ---------------------------------------------------------------- interruptions


class Stopped(KeyboardInterrupt):
    """Ctrl-C at a place that a test has chosen."""


Stop = Callable[[pytest.MonkeyPatch], Callable[[Event], None]]


def at_event(stage: str, n: int, *, kind: str = "advance") -> Stop:
    """Stop at the n-th event of a kind in a stage."""

    def prepare(patch: pytest.MonkeyPatch) -> Callable[[Event], None]:
        seen = 0

        def listen(event: Event) -> None:
            nonlocal seen
            seen += (event.stage, event.kind) == (stage, kind)
            if seen == n:
                raise Stopped

        return listen

    return prepare


def at_call(owner: Any, name: str, n: int = 1, *, after: bool = False) -> Stop:
    """Stop when a function is called the n-th time, before or after what it does."""

    def prepare(patch: pytest.MonkeyPatch) -> Callable[[Event], None]:
        real, calls = getattr(owner, name), []

        def stop(*args: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) < n:
                return real(*args, **options)
            if after:
                real(*args, **options)
            raise Stopped

        patch.setattr(owner, name, stop)
        return lambda event: None

    return prepare


ONE = {"keep_macs": 0.4, "epochs": 3}
TWO = {"keep_macs": 0.3, "epochs": 2, "rounds": 2}
# Where to stop, and which stages are over by then: these are not repeated.
MOMENTS: dict[str, tuple[dict[str, Any], Stop, set[str]]] = {
    "sensitivity": (ONE, at_call(rounds, "build_loss_model", after=True), set()),
    "refit": (ONE, at_event("refit", 1), set()),
    "compressed": (ONE, at_call(rounds, "compress_to", after=True), set()),
    "before training": (ONE, at_call(rounds, "distill"), {"sensitivity", "compress"}),
    "first update": (ONE, at_event("distill", 2), {"sensitivity", "compress"}),
    "second epoch": (ONE, at_event("distill", 6), {"sensitivity", "compress"}),
    "last update": (ONE, at_event("distill", 10), {"sensitivity", "compress"}),
    "after training": (ONE, at_call(rounds, "distill", after=True), {"sensitivity", "compress"}),
    "validate": (ONE, at_call(job, "check_result"), {"sensitivity", "compress", "distill"}),
    "write": (ONE, at_call(job, "save_model"), {"sensitivity", "compress", "distill"}),
    "round 1": (TWO, at_event("distill", 4), set()),
    "between rounds": (TWO, at_call(job.Job, "_next_round"), set()),
    "second sensitivity": (TWO, at_call(rounds, "build_loss_model", 2), set()),
    "second training": (TWO, at_call(rounds, "distill", 2), {"sensitivity", "compress"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, np.ndarray]
) -> dict[str, tuple[bytes, bytes]]:
    """Return the model and the plan of each job that nothing interrupts."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        fix_speed(patch)
        for options in (ONE, TWO):
            folder = tmp_path_factory.mktemp("whole")
            made = make(folder, data, **options)
            found[repr(options)] = made.model, (folder / "o.json").read_bytes()
    return found


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_job_ends_as_one_that_was_not(
    tmp_path: Path,
    data: dict[str, np.ndarray],
    whole: dict[str, tuple[bytes, bytes]],
    moment: str,
) -> None:
    options, stop, over = MOMENTS[moment]
    work = tmp_path / "work"
    write(tmp_path, residual_cnn(width=8))
    with pytest.MonkeyPatch.context() as patch:
        listen = stop(patch)
        with pytest.raises(Stopped):
            make(tmp_path, data, work_dir=work, on_event=listen, **options)
    assert files_in(tmp_path) == ["net.onnx", "work"]
    made = make(tmp_path, data, work_dir=work, **options)
    assert (made.model, (tmp_path / "o.json").read_bytes()) == whole[repr(options)]
    assert not over & set(made.report.seconds)
    assert not list(work.rglob("*.training"))
    assert not [path.name for path in work.rglob("*") if path.name.startswith(".")]


def test_a_job_may_be_interrupted_again_and_again(
    tmp_path: Path, data: dict[str, np.ndarray], whole: dict[str, tuple[bytes, bytes]]
) -> None:
    work = tmp_path / "work"
    for stop in (
        at_event("refit", 1),
        at_event("distill", 5),
        at_event("distill", 3),
        at_call(job.Job, "_next_round"),
        at_event("distill", 5),
        at_call(job, "save_model"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            listen = stop(patch)
            with pytest.raises(Stopped):
                make(tmp_path, data, work_dir=work, on_event=listen, **TWO)
    made = make(tmp_path, data, work_dir=work, **TWO)
    assert (made.model, (tmp_path / "o.json").read_bytes()) == whole[repr(TWO)]


def test_an_interrupted_search_goes_on(tmp_path: Path, labelled: dict[str, np.ndarray]) -> None:
    options = {"max_drop": 0.25, "epochs": 2, "method": "prune"}
    expected = make(tmp_path, labelled, **options)
    work = tmp_path / "work"
    with pytest.raises(Stopped):
        make(tmp_path, labelled, work_dir=work, on_event=at_event("distill", 9)(None), **options)  # type: ignore[arg-type]
    events: list[Event] = []
    made = make(tmp_path, labelled, work_dir=work, on_event=events.append, **options)
    assert made.model == expected.model
    assert any(event.message.startswith("going on after") for event in events)


def times_of(folder: Path) -> dict[Path, int]:
    """When each file was written; older versions of filelock write to the lock, too."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix not in ("", ".lock")}


@pytest.mark.parametrize("options", [ONE, TWO, {"keep_macs": 0.4}], ids=str)
def test_the_same_command_again_does_no_work_twice(
    tmp_path: Path, data: dict[str, np.ndarray], options: dict[str, Any]
) -> None:
    work = tmp_path / "work"
    first = make(tmp_path, data, work_dir=work, **options)
    before = times_of(work)
    second = make(tmp_path, data, work_dir=work, **options)
    assert second.model == first.model
    assert second.report.plan == first.report.plan
    assert second.report.recovery == first.report.recovery
    assert not {"sensitivity", "compress", "distill", "implant speed"} & set(second.report.seconds)
    assert times_of(work) == before


def test_other_words_are_another_job(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    work = tmp_path / "work"
    make(tmp_path, data, work_dir=work, **ONE)
    for options in ({**ONE, "seed": 3}, {**ONE, "epochs": 2}, {**ONE, "augment": "none"}):
        made = make(tmp_path, data, work_dir=work, **options)
        assert "distill" in made.report.seconds
        assert made.model == make(tmp_path, data, **options).model
    other = {"x": data["x"] + 0.5}
    assert "distill" in make(tmp_path, other, work_dir=work, **ONE).report.seconds
    write(tmp_path, residual_cnn(width=8, seed=3))
    assert "distill" in make(tmp_path, data, work_dir=work, **ONE).report.seconds
    assert len([path for path in work.iterdir() if path.is_dir()]) == 6


def test_budgets_of_one_job_share_a_folder_and_are_kept_apart(
    tmp_path: Path, data: dict[str, np.ndarray]
) -> None:
    work = tmp_path / "work"
    models = {}
    for ratio in (0.4, 0.6):
        models[ratio] = make(tmp_path, data, work_dir=work, keep_macs=ratio).model
    assert len([path for path in work.iterdir() if path.is_dir()]) == 1
    for ratio, model in models.items():
        made = make(tmp_path, data, work_dir=work, keep_macs=ratio)
        assert made.model == model == make(tmp_path, data, keep_macs=ratio).model
        assert made.report.budget.reached["keep_macs"] <= ratio


def test_implants_of_the_paper_are_trained(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    """Pointwise implants share the bias of their layer between two nodes."""
    made = make(tmp_path, data, keep_macs=0.6, preset="paper", probes=8, epochs=3)
    assert {entry.kind for entry in made.report.plan.implants} == {"pointwise"}
    check_applied(tmp_path, made)


def test_a_search_may_train_implants(tmp_path: Path, labelled: dict[str, np.ndarray]) -> None:
    made = make(tmp_path, labelled, max_drop=0.25, epochs=2)
    check_applied(tmp_path, made)


def test_patterns_go_on_naming_a_layer_that_has_become_an_implant(
    tmp_path: Path, data: dict[str, np.ndarray]
) -> None:
    made = make(tmp_path, data, keep_macs=0.8, rounds=3, only=["make_b2", "make_a2", "make_b1", "make_a1"])
    implants = [entry.node for entry in made.report.plan.implants]
    assert implants
    assert all(node.startswith(("make_a", "make_b")) for node in implants)
    check_applied(tmp_path, made)


def test_a_budget_that_a_later_round_cannot_reach_is_told_with_the_round(
    tmp_path: Path, data: dict[str, np.ndarray]
) -> None:
    words: dict[str, Any] = {"only": ["make_a1"], "method": "prune", "recover": "none"}
    with pytest.raises(BudgetError, match="the least is") as found:
        make(tmp_path, data, keep_macs=0.01, **words)
    least = float(re.search(r"the least is ([0-9.]+)", str(found.value))[1])  # type: ignore[index]
    with pytest.raises(BudgetError, match=r"round 2 of 2 cannot go on, .*; or take fewer --rounds"):
        make(tmp_path, data, keep_macs=0.99 * least, rounds=2, **words)


def test_the_metric_does_not_decide_whether_labels_are_learned(
    tmp_path: Path, labelled: dict[str, np.ndarray]
) -> None:
    words = {"keep_macs": 0.5, "epochs": 1, "metric": "r2", "method": "prune"}
    first = make(tmp_path, labelled, **words)
    others = {**labelled, "labels": (labelled["labels"] + 1) % (labelled["labels"].max() + 1)}
    second = make(tmp_path, others, **words)
    starts = [made.report.recovery[0].start_score for made in (first, second)]
    assert starts[1] > 1.2 * starts[0]  # these labels contradict the original
