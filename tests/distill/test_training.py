"""The training loop: its schedule, going back after failures, and going on after interruptions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from sample_models import images, residual_cnn
from topologies import TOPOLOGIES, Net

from hap_onnx.distill import Distilled, Recipe, training
from hap_onnx.distill.learned import find_learned
from hap_onnx.distill.objective import Objective, find_hidden, find_scores
from hap_onnx.distill.training import Trainer
from hap_onnx.errors import ValidationError
from hap_onnx.events import Event
from hap_onnx.sensitivity.curvature import to_tensors
from hap_onnx.twin import build_twin
from tests.distill.cases import RECIPE, Case, Interrupted, as_bytes, interrupt_at, perturbed
from tests.helpers import rand

N_STEPS = 12  # of RECIPE: three epochs of four updates
N_SAVED = 1 + 1 + 3 + 3  # both states at the start, and at most both after each epoch


@cache
def case() -> Case:
    return Case(residual_cnn(width=8), {"x": images(96)}, scores="scores")


@cache
def broken() -> gs.Graph:
    return perturbed(case().graph)


@cache
def uninterrupted() -> Distilled:
    return case().distill(broken())


def make_trainer(
    graph: gs.Graph | None = None, recipe: Recipe = RECIPE, *, of: Case | None = None
) -> Trainer:
    one = of or case()
    graph = graph if graph is not None else broken()
    teacher, student = build_twin(one.graph), build_twin(graph)
    calibrate, choose = one.subsets()
    inputs = to_tensors(next(iter(choose.batches(recipe.batch_size))).inputs, teacher)
    with torch.no_grad():
        expected = teacher(inputs)
    scores = None if one.scores is None else find_scores(one.scores, expected[one.scores])
    objective = Objective(one.scales, find_hidden(teacher, student, inputs), scores)
    return Trainer(teacher, student, find_learned(graph), objective, None, calibrate, choose, recipe)


# --- the schedule ---


@pytest.mark.parametrize("epochs", [1, 3, 40])
def test_the_rate_rises_and_then_falls_along_a_cosine(epochs: int) -> None:
    trainer = make_trainer(recipe=replace(RECIPE, epochs=epochs))
    assert trainer.n_steps == 4 * epochs
    rates = np.array([trainer.rate_at(step) for step in range(trainer.n_steps)])
    n_warm = max(1, round(training.WARMUP * trainer.n_steps))
    peak = RECIPE.rate
    np.testing.assert_allclose(rates[:n_warm], peak * np.arange(1, n_warm + 1) / n_warm)
    rest = np.arange(trainer.n_steps - n_warm) / max(trainer.n_steps - n_warm, 1)
    np.testing.assert_allclose(rates[n_warm:], peak * np.cos(np.pi / 2 * rest) ** 2, atol=1e-12)
    assert rates.min() > 0
    assert rates.max() == pytest.approx(peak)


def test_each_epoch_sees_every_sample_once_in_an_order_of_its_own() -> None:
    trainer = make_trainer()
    x = case().inputs["x"]
    number_of = {x[index].tobytes(): index for index in range(len(x))}
    orders = []
    for epoch in range(3):
        shares = training._shares(trainer, 4 * epoch, 4 * epoch + 4)
        orders.append([number_of[image.tobytes()] for share in shares for image in share.batch.inputs["x"]])
    calibrate = set(case().subsets()[0].indices.tolist())
    assert all(set(order) == calibrate and len(order) == len(calibrate) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    again = make_trainer()
    shares = training._shares(again, 5, 8)  # from within the second epoch
    rest = [share.batch.inputs["x"] for share in shares]
    assert [number_of[image.tobytes()] for part in rest for image in part] == orders[1][16:]


def test_only_what_is_learned_changes() -> None:
    trainer = make_trainer()
    before = {name: p.detach().clone() for name, p in trainer.student.parameter_of.items()}
    original = {name: p.detach().clone() for name, p in trainer.teacher.parameter_of.items()}
    (share,) = training._shares(trainer, 0, 1)
    trainer.update(0, share, RECIPE.rate)
    changed = {name for name, p in trainer.student.parameter_of.items() if not torch.equal(p, before[name])}
    assert changed == set(find_learned(broken()))
    assert all(torch.equal(p, original[name]) for name, p in trainer.teacher.parameter_of.items())


def test_an_update_moves_each_weight_by_about_the_rate_relative_to_its_size() -> None:
    trainer = make_trainer(recipe=replace(RECIPE, weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    (share,) = training._shares(trainer, 0, 1)
    trainer.update(0, share, 1e-3)
    for name, parameter in trainer.parameters.items():
        size = float(before[name].square().mean().sqrt())
        moved = (parameter.detach() - before[name]).abs()
        assert float(moved.max()) < 1e-3 * size * 1.5
        assert float(moved.median()) > 1e-3 * size / 1.5


@pytest.mark.parametrize("name", ["residual", "slope_per_channel", "other_rank_conv1d"])
def test_only_weights_decay(name: str) -> None:
    """Scales and biases have one axis that is longer than one."""
    model = TOPOLOGIES[name]().model
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    one = Case(model, {"x": rand(30, *shape[1:])})
    trainer = make_trainer(one.graph, of=one)
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            is_weight = sum(size > 1 for size in parameter.shape) > 1
            if is_weight:
                assert group["weight_decay"] == RECIPE.weight_decay
            elif parameter.ndim == 1:
                assert group["weight_decay"] == 0


def test_the_score_is_that_of_averaged_weights_and_changes_nothing() -> None:
    trainer = make_trainer()
    for step, share in enumerate(training._shares(trainer, 0, 4)):
        trainer.update(step, share, RECIPE.rate)
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    average = {name: tensor.detach().clone() for name, tensor in trainer.average.items()}
    score, _ = trainer.score()
    assert score == pytest.approx(
        case().score(broken(), {name: tensor.numpy() for name, tensor in average.items()}), rel=1e-3
    )
    assert trainer.score()[0] == score
    for name, parameter in trainer.parameters.items():
        assert torch.equal(parameter, before[name])
        assert torch.equal(trainer.average[name], average[name])
        assert parameter.requires_grad


def test_a_state_brings_all_back_that_an_update_depends_on() -> None:
    first, second = make_trainer(), make_trainer()
    shares = list(training._shares(first, 0, 4))
    for step in range(2):
        first.update(step, shares[step], RECIPE.rate)
    state = {name: tensor.detach().clone() for name, tensor in first.tensors().items()}
    second.restore(state)
    for step in (2, 3):
        losses = [trainer.update(step, shares[step], RECIPE.rate) for trainer in (first, second)]
        assert losses[0] == losses[1]
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name])


def test_outputs_of_the_original_are_computed_once_unless_they_are_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = []
    for limit, n_runs in ((training.CACHE_BYTES, 2), (1, 6)):
        monkeypatch.setattr(training, "CACHE_BYTES", limit)
        trainer = make_trainer()
        n_seen = 0

        def count(module: Any, args: Any, output: Any) -> None:
            nonlocal n_seen
            n_seen += 1

        trainer.teacher.register_forward_hook(count)
        scores += [trainer.score() for _ in range(3)]
        assert n_seen == n_runs  # two batches of 16 are set aside
    assert len(set(scores)) == 1


# --- events ---


def test_events_are_a_start_one_step_per_update_and_an_end() -> None:
    events: list[Event] = []
    case().distill(broken(), events=events)
    bar = [event for event in events if event.kind in ("start", "advance", "end")]
    assert {event.stage for event in bar} == {"distill"}
    assert (bar[0].kind, bar[0].total, bar[-1].kind) == ("start", N_STEPS, "end")
    assert {event.kind for event in bar[1:-1]} == {"advance"}
    assert bar[1].amount == 0  # tells how things stand before the first update
    assert [event.amount for event in bar[2:-1]] == [1] * N_STEPS
    assert all(event.message.startswith("loss ") for event in bar[2:-1])


# --- failures ---


def spoil(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool], *, by: float = math.nan
) -> list[float]:
    """Let the loss of some calls be no number; returns the list to which rates of updates are added."""
    real_loss, real_update = Trainer._loss, Trainer.update
    n_calls, rates = 0, []

    def loss(self: Trainer, *args: Any) -> torch.Tensor:
        nonlocal n_calls
        n_calls += 1
        value = real_loss(self, *args)
        return value * by if fails(n_calls - 1) else value

    def update(self: Trainer, step: int, batch: Any, rate: float) -> float:
        rates.append(rate / self.rate_at(step))
        return real_update(self, step, batch, rate)

    monkeypatch.setattr(Trainer, "_loss", loss)
    monkeypatch.setattr(Trainer, "update", update)
    return rates


@pytest.mark.parametrize("n", [0, 2, 5, 11])
def test_a_loss_that_is_no_number_goes_back_and_halves_the_rate(
    monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    rates = spoil(monkeypatch, lambda call: call == n)
    events: list[Event] = []
    found = case().distill(broken(), events=events)
    assert found.n_rollbacks == 1
    n_lost = n % 4 + 1  # updates of the epoch in which it happened
    assert rates == [1.0] * (n + 1) + [0.5] * (N_STEPS - n + n_lost - 1)
    (text,) = [event.message for event in events if event.kind == "warning"]
    assert text == (
        f"training failed after update {n // 4 * 4}: the loss is nan; going back, halving the rate"
    )
    assert all(np.isfinite(values).all() for values in found.weights.values())
    assert found.best_score < found.start_score
    assert found.best_epoch > 0


def test_an_infinite_loss_is_a_failure_too(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda call: call == 6, by=math.inf)
    found = case().distill(broken())
    assert found.n_rollbacks == 1
    assert all(np.isfinite(values).all() for values in found.weights.values())


def test_a_gradient_that_is_not_finite_is_a_failure_too(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = torch.nn.utils.clip_grad_norm_, []

    def clip(parameters: Any, norm: float) -> torch.Tensor:
        calls.append(None)
        found = real(parameters, norm)
        return found * math.nan if len(calls) == 3 else found

    monkeypatch.setattr(training.nn.utils, "clip_grad_norm_", clip)
    events: list[Event] = []
    found = case().distill(broken(), events=events)
    assert found.n_rollbacks == 1
    assert any("the gradient is not finite" in event.message for event in events)


def test_after_too_many_failures_training_stops_with_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = spoil(monkeypatch, lambda call: call >= 6)
    events: list[Event] = []
    found = case().distill(broken(), events=events)
    assert found.n_rollbacks == training.MAX_ROLLBACKS + 1
    assert sorted(set(rates)) == [2.0**-power for power in range(training.MAX_ROLLBACKS, -1, -1)]
    warnings = [event.message for event in events if event.kind == "warning"]
    assert len(warnings) == found.n_rollbacks
    assert warnings[-1].endswith("going back, stopping with the best so far")
    assert all(text.endswith("halving the rate") for text in warnings[:-1])
    assert events[-1].kind == "end"
    assert found.best_epoch == 1  # the one epoch that went well
    assert found.best_score < found.start_score
    assert found.best_score == pytest.approx(case().score(broken(), found.weights), rel=1e-3)


def test_a_model_that_cannot_be_trained_at_all_comes_back_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, lambda call: True)
    found = case().distill(broken())
    assert (found.best_epoch, found.best_score) == (0, found.start_score)
    for name, values in found.weights.items():
        np.testing.assert_array_equal(values, broken().tensors()[name].values)


def test_a_score_far_above_that_of_the_start_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    real, n_calls = Trainer.score, 0

    def score(self: Trainer) -> tuple[float, str]:
        nonlocal n_calls
        n_calls += 1
        value, words = real(self)
        return (value * 1e3 if n_calls == 3 else value), words

    monkeypatch.setattr(Trainer, "score", score)
    events: list[Event] = []
    found = case().distill(broken(), events=events)
    assert found.n_rollbacks == 1
    (text,) = [event.message for event in events if event.kind == "warning"]
    assert "training failed after update 4: the score is " in text


def test_failures_are_remembered_over_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        spoil(patch, lambda call: call == 5)
        expected = case().distill(broken())
    with monkeypatch.context() as patch:
        spoil(patch, lambda call: call == 5)
        with pytest.raises(Interrupted):
            case().distill(broken(), folder=tmp_path, on_event=interrupt_at(8))  # with half the rate
    found = case().distill(broken(), folder=tmp_path)
    assert found.n_rollbacks == expected.n_rollbacks == 1
    assert as_bytes(found) == as_bytes(expected)


# --- interruptions ---


@pytest.mark.parametrize("stops", [(1,), (4,), (5,), (7, 1), (12,), (2, 2, 9), (6, 1, 1, 5)], ids=str)
@pytest.mark.parametrize("augmented", [False, True])
def test_an_interrupted_run_ends_as_one_that_was_not(
    tmp_path: Path, stops: tuple[int, ...], augmented: bool
) -> None:
    """A few times it is stopped, each time after so many updates of that run."""
    one, options = case(), {"augment": augmented}
    if augmented:
        one = Case(TOPOLOGIES["residual"]().model, {"x": rand(96, 3, 6, 6)})
    graph = perturbed(one.graph)
    expected = one.distill(graph, **options)
    for n in stops:
        with pytest.raises(Interrupted):
            one.distill(graph, folder=tmp_path, key="k", on_event=interrupt_at(n), **options)
    events: list[Event] = []
    found = one.distill(graph, folder=tmp_path, key="k", events=events, **options)
    assert as_bytes(found) == as_bytes(expected)
    assert found == replace(expected, weights=found.weights)
    amounts = [event.amount for event in events if event.kind == "advance"]
    assert sum(amounts) == N_STEPS
    assert len(list(tmp_path.iterdir())) == 2  # the last state and the best one


def test_a_run_goes_on_after_the_last_epoch_that_was_finished(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        case().distill(broken(), folder=tmp_path, on_event=interrupt_at(10))
    events: list[Event] = []
    case().distill(broken(), folder=tmp_path, events=events)
    assert "going on after 8 of 12 updates" in [event.message for event in events if event.kind == "note"]
    amounts = [event.amount for event in events if event.kind == "advance"]
    assert amounts == [8, 1, 1, 1, 1]


def test_a_finished_run_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = case().distill(broken(), folder=tmp_path)
    monkeypatch.setattr(Trainer, "update", None)
    found = case().distill(broken(), folder=tmp_path)
    assert as_bytes(found) == as_bytes(expected)


@pytest.mark.parametrize("period", [1, 3, 100])
def test_long_epochs_are_kept_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, period: int) -> None:
    monkeypatch.setattr(training, "MAX_PERIOD", period)
    expected = case().distill(broken())
    for n in (3, 2):
        with pytest.raises(Interrupted):
            case().distill(broken(), folder=tmp_path, on_event=interrupt_at(n))
    events: list[Event] = []
    found = case().distill(broken(), folder=tmp_path, events=events)
    assert as_bytes(found) == as_bytes(expected)
    done = {1: 3, 3: 0, 100: 0}[period]
    first = next(event.amount for event in events if event.kind == "advance")
    assert first == done


def stop_while_saving(monkeypatch: pytest.MonkeyPatch, n: int, *, before: bool) -> None:
    """Interrupt right before or right after the n-th state is written."""
    real, n_calls = training.save_state, 0

    def save(path: Path, *args: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == n and before:
            raise Interrupted
        real(path, *args)
        if n_calls == n:
            raise Interrupted

    monkeypatch.setattr(training, "save_state", save)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("n", range(1, N_SAVED + 1))
def test_a_run_that_is_stopped_while_saving_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, before: bool
) -> None:
    with monkeypatch.context() as patch:
        stop_while_saving(patch, n, before=before)
        with pytest.raises(Interrupted):
            case().distill(broken(), folder=tmp_path)
    assert as_bytes(case().distill(broken(), folder=tmp_path)) == as_bytes(uninterrupted())


@pytest.mark.parametrize("name", ["key", "recipe", "weights"])
def test_other_work_in_the_folder_starts_anew(tmp_path: Path, name: str) -> None:
    with pytest.raises(Interrupted):
        case().distill(broken(), folder=tmp_path, key="one", on_event=interrupt_at(9))
    graph = perturbed(case().graph, seed=5) if name == "weights" else broken()
    recipe = replace(RECIPE, seed=5) if name == "recipe" else RECIPE
    key = "two" if name == "key" else "one"
    events: list[Event] = []
    found = case().distill(graph, recipe, folder=tmp_path, key=key, events=events)
    assert as_bytes(found) == as_bytes(case().distill(graph, recipe))
    assert not any("going on" in event.message for event in events)


def test_a_damaged_state_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Interrupted):
        case().distill(broken(), folder=tmp_path, on_event=interrupt_at(9))
    state = tmp_path / "training.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    assert as_bytes(case().distill(broken(), folder=tmp_path)) == as_bytes(uninterrupted())
    assert "damaged" in caplog.text


def test_a_folder_that_takes_no_files_is_a_validation_error(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "training.safetensors").mkdir()
    with pytest.raises(ValidationError, match="cannot be written"):
        case().distill(broken(), folder=folder)


def test_biases_of_more_axes_do_not_decay() -> None:
    """Such as what is left of a removed branch, [1, C, 1, 1]."""
    net = Net()
    x = net.op("Add", net.conv("x", 3, 4, bias=False), net.rand(1, 4, 1, 1))
    net.conv(net.op("PRelu", x, net.rand(4, 1, 1)), 4, 2, out="y")
    one = Case(net.model("y"), {"x": rand(30, 3, 6, 6)})
    trainer = make_trainer(one.graph, of=one)
    assert len(trainer.parameters) == 5
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            is_weight = sum(size > 1 for size in parameter.shape) > 1
            assert group["weight_decay"] == (RECIPE.weight_decay if is_weight else 0)


@pytest.mark.parametrize("what", ["missing", "damaged"])
def test_the_best_state_may_be_missing_or_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """As after a kill between the first two files, or a disk that has lost one; here nothing gets better."""
    spoil(monkeypatch, lambda call: True)
    expected = case().distill(broken())
    with pytest.raises(Interrupted):
        case().distill(broken(), folder=tmp_path, on_event=stop_at_start)
    best = tmp_path / "best.safetensors"
    if what == "missing":
        best.unlink()
    else:
        best.write_bytes(best.read_bytes()[:100])
    assert as_bytes(case().distill(broken(), folder=tmp_path)) == as_bytes(expected)


def stop_at_start(event: Event) -> None:
    if event.kind == "start":
        raise Interrupted


def test_other_nodes_to_leave_start_anew(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        case().distill(broken(), folder=tmp_path, leave={"make_a1"}, on_event=interrupt_at(9))
    assert as_bytes(case().distill(broken(), folder=tmp_path)) == as_bytes(uninterrupted())


def test_after_too_many_failures_an_interrupted_run_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed before its plan was kept; the facts of training are part of that plan."""
    with monkeypatch.context() as patch:
        spoil(patch, lambda call: call >= 6)
        expected = case().distill(broken(), folder=tmp_path)
    assert expected.n_rollbacks == training.MAX_ROLLBACKS + 1
    spoil(monkeypatch, lambda call: True)
    found = case().distill(broken(), folder=tmp_path)
    assert as_bytes(found) == as_bytes(expected)
    assert found.facts(3) == expected.facts(3)


def test_averaged_weights_keep_no_history_of_gradients() -> None:
    trainer = make_trainer()
    for step, share in enumerate(training._shares(trainer, 0, 4)):
        trainer.update(step, share, RECIPE.rate)
    assert not any(tensor.requires_grad for tensor in trainer.average.values())


def test_an_average_over_several_updates_survives_all_that_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a short run the average is the last weights, unless its share is larger: nothing would tell."""
    monkeypatch.setattr(training, "AVERAGE_SHARE", 0.5)
    expected = case().distill(broken())
    assert expected.best_epoch > 0
    assert expected.best_score == pytest.approx(case().score(broken(), expected.weights), rel=1e-3)
    for n in (3, 6, 5):
        with pytest.raises(Interrupted):
            case().distill(broken(), folder=tmp_path, on_event=interrupt_at(n))
    assert as_bytes(case().distill(broken(), folder=tmp_path)) == as_bytes(expected)
    trainer = make_trainer()
    for step, share in enumerate(training._shares(trainer, 0, 4)):
        trainer.update(step, share, RECIPE.rate)
    name, latest = next(iter(trainer.parameters.items()))
    assert not torch.equal(trainer.average[name], latest)  # or this test would show nothing


def test_each_update_augments_in_its_own_way() -> None:
    class Recorder:
        kinds = ()

        def __init__(self) -> None:
            self.numbers: list[float] = []

        def __call__(self, inputs: Any, generator: np.random.Generator) -> Any:
            self.numbers.append(float(generator.random(16)[0]))
            return inputs

    numbers = []
    for _ in range(2):
        trainer = make_trainer()
        trainer.augmenter = recorder = Recorder()
        for epoch in range(2):
            shares = training._shares(trainer, 4 * epoch, 4 * epoch + 4)
            for step, share in enumerate(shares, start=4 * epoch):
                trainer.update(step, share, RECIPE.rate)
        numbers.append(recorder.numbers)
    assert numbers[0] == numbers[1]
    assert len(set(numbers[0])) == 8


def test_weights_come_with_the_score_that_they_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the state says in which training ended."""
    with pytest.raises(Interrupted):
        case().distill(broken(), folder=tmp_path, on_event=interrupt_at(11))
    spoil(monkeypatch, lambda call: True)
    found = case().distill(broken(), folder=tmp_path)
    assert 0 < found.best_epoch <= 2
    assert found.best_score == pytest.approx(case().score(broken(), found.weights), rel=1e-3)


def test_the_bar_ends_where_it_should_though_updates_are_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda call: call == 5)
    events: list[Event] = []
    case().distill(broken(), events=events)
    assert sum(event.amount for event in events if event.kind == "advance") == N_STEPS


def test_a_start_that_is_no_number_is_none_in_the_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "score", lambda self: (math.inf, "r2 nan"))
    found = case().distill(broken())
    assert found.n_rollbacks == training.MAX_ROLLBACKS + 1
    assert found.facts(3)["start_score"] is found.facts(3)["best_score"] is None
