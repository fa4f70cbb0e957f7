"""Training brings a model nearer to the original, whatever the model is like, and never farther away."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import TensorProto
from sample_models import images, residual_cnn, with_labels
from topologies import TOPOLOGIES, Net

from hap_onnx.distill import Recipe
from hap_onnx.distill.learned import find_learned
from hap_onnx.distill.training import Trainer
from hap_onnx.errors import ValidationError
from hap_onnx.events import Event
from hap_onnx.jobs.carry_out import compress_layers, cut_model
from hap_onnx.planning.choose import choose
from hap_onnx.surgery import with_weights
from hap_onnx.twin import build_twin, run_captured
from tests.distill.cases import RECIPE, Case, as_bytes, perturbed
from tests.helpers import make_model, node, rand
from tests.planning_cases import make_job

N = 96
FEW_SAMPLES = {"cut_and_swapped_opset9", "cut_and_swapped_opset13"}
"""They take no more than nine samples at once."""
NOT_BY_SAMPLE = {"computed_weight", "raised_rank"}
"""Outputs hang on the whole batch, or do not begin with the samples: what they lose depends on the batch."""
NAMES = [name for name in TOPOLOGIES if name not in FEW_SAMPLES]


@cache
def classifier(*, labelled: bool = False, **options: Any) -> Case:
    """Return a small residual network, with labels that a tenth of its own answers contradict."""
    model, x = residual_cnn(width=8, **options), images(N)
    labels = None
    if labelled:
        labels = with_labels(x)["labels"]
        labels = np.where(np.arange(N) % 10 == 0, (labels + 1) % 5, labels)
    x = x.astype(options.get("dtype", np.float32))
    return Case(model, {"x": x}, labels, scores="scores")


@cache
def topology(name: str) -> Case:
    model = TOPOLOGIES[name]().model
    inputs = {}
    constants = {tensor.name for tensor in model.graph.initializer}
    for index, value in enumerate(value for value in model.graph.input if value.name not in constants):
        shape = [dim.dim_value or 0 for dim in value.type.tensor_type.shape.dim]
        unit = shape[0] or 1
        inputs[value.name] = rand(36 // unit * unit, *shape[1:], seed=index)
    return Case(model, inputs)


def notes(events: list[Event], kind: str = "note") -> list[str]:
    return [event.message for event in events if event.kind == kind]


# --- better, or as it was ---


def test_training_repairs_a_perturbed_classifier() -> None:
    case = classifier()
    broken = perturbed(case.graph)
    found = case.distill(broken, replace(RECIPE, epochs=8))
    assert found.best_score < 0.5 * found.start_score
    assert found.start_score == pytest.approx(case.score(broken), rel=1e-3)
    assert found.best_score == pytest.approx(case.score(broken, found.weights), rel=1e-3)
    assert 0 < found.best_epoch <= 8
    assert set(found.weights) == set(find_learned(broken))
    assert found.n_rollbacks == 0


def test_training_repairs_a_compressed_model() -> None:
    """Narrower layers and implants in place of some: weights come back under the names of its graph."""
    one = make_job(TOPOLOGIES["residual"]().model, n_samples=N)
    choice = choose(one.prepared, one.losses, one.budgets(macs=0.5), align=1, whole=(), kinds=one.kinds)
    compressed = compress_layers(cut_model(one.prepared, choice, one.losses.implants))
    assert choice.replacements
    graph = compressed.finished()
    case = Case(TOPOLOGIES["residual"]().model, one.inputs() | {"x": rand(N, 3, 6, 6, seed=4)})
    found = case.distill(graph, replace(RECIPE, epochs=8))
    assert found.best_score < 0.9 * found.start_score
    shapes = {name: t.shape for name, t in graph.tensors().items() if isinstance(t, gs.Constant)}
    assert {name: list(values.shape) for name, values in found.weights.items()} == {
        name: list(shapes[name]) for name in find_learned(graph)
    }
    trained = compressed.with_trained(found.weights)
    assert case.score(trained.finished()) == pytest.approx(found.best_score, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_every_model_gets_better_or_stays(name: str) -> None:
    case = topology(name)
    broken = perturbed(case.graph)
    found = case.distill(broken, Recipe(epochs=2, batch_size=8))
    assert found.best_score <= found.start_score
    assert set(found.weights) <= set(find_learned(broken))
    for values in found.weights.values():
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
    if found.weights and name not in NOT_BY_SAMPLE:
        before, after = case.score(broken), case.score(broken, found.weights)
        assert found.start_score == pytest.approx(before, rel=1e-3, abs=1e-6)
        assert found.best_score == pytest.approx(after, rel=1e-3, abs=1e-6)
        assert after <= before * (1 + 1e-6)


@pytest.mark.parametrize("name", ["residual", "gemm_residual", "two_inputs_two_outputs", "fixed_batch"])
def test_these_models_get_better(name: str) -> None:
    case = topology(name)
    found = case.distill(perturbed(case.graph), Recipe(epochs=10, batch_size=8))
    assert found.best_score < 0.8 * found.start_score


def test_a_model_that_equals_the_original_comes_back_as_it_was() -> None:
    case = classifier()
    found = case.distill(case.graph.copy())
    constants = {n: t.values for n, t in case.graph.tensors().items() if isinstance(t, gs.Constant)}
    assert found.best_epoch == 0
    assert found.best_score == found.start_score == pytest.approx(0, abs=1e-6)
    for name, values in found.weights.items():
        np.testing.assert_array_equal(values, constants[name])


@pytest.mark.parametrize("rate", [10.0, 1e6])
def test_a_rate_far_too_high_does_no_harm(rate: float) -> None:
    case = classifier()
    broken = perturbed(case.graph, noise=0.05)
    events: list[Event] = []
    found = case.distill(broken, replace(RECIPE, rate=rate), events=events)
    assert found.n_rollbacks > 0
    assert found.best_score <= found.start_score
    assert case.score(broken, found.weights) <= case.score(broken) * (1 + 1e-6)
    assert all(np.isfinite(values).all() for values in found.weights.values())
    assert any("halving the rate" in text for text in notes(events, "warning"))


def test_facts_are_ready_for_json() -> None:
    case = classifier()
    found = case.distill(perturbed(case.graph))
    assert found.facts(3) == {
        "epochs": 3,
        "best_epoch": round(found.best_epoch, 3),
        "start_score": found.start_score,
        "best_score": found.best_score,
        "rollbacks": 0,
        "augmentations": [],
    }


# --- kinds of models ---


def test_outputs_that_are_integers_are_no_obstacle() -> None:
    net = Net()
    x = net.relu(net.conv("x", 3, 6))
    net.op("Flatten", net.op("GlobalAveragePool", net.conv(x, 6, 4)), out="y")
    net.op("ArgMax", "y", axis=1, keepdims=0, out="top")
    case = Case(net.model("y", "top"), {"x": rand(N, 3, 6, 6)}, scores="y")
    assert set(case.scales) == {"y"}
    found = case.distill(perturbed(case.graph, noise=0.5), replace(RECIPE, epochs=6))
    assert found.best_score < 0.8 * found.start_score


def test_each_of_two_outputs_counts() -> None:
    case = topology("two_inputs_two_outputs")
    broken = perturbed(case.graph)
    both = case.distill(broken, Recipe(epochs=2, batch_size=8))
    one = case.distill(broken, Recipe(epochs=2, batch_size=8), scales={"y": case.scales["y"]})
    (head,) = {n.inputs[1].name for n in case.graph.nodes if n.op == "Gemm"}
    assert head in both.weights
    assert head not in one.weights  # nothing that counts depends on it
    assert as_bytes(both) != as_bytes(one)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_batch_that_is_written_into_the_model_is_no_obstacle(batch: int) -> None:
    free, fixed = classifier(), classifier(batch=batch)
    broken = perturbed(fixed.graph)
    found = fixed.distill(broken)
    assert found.best_score < found.start_score
    same = free.distill(perturbed(free.graph))
    for name, values in found.weights.items():
        np.testing.assert_allclose(values, same.weights[name], rtol=1e-3, atol=1e-5)


def test_a_model_that_runs_batch_by_batch_only_is_trained_without_tensors_inside() -> None:
    """It subtracts the mean of its batch of four, so that larger batches are not the same."""
    net = Net()
    h = net.conv("x", 3, 6)
    h = net.relu(net.op("Sub", h, net.op("ReduceMean", h, axes=[0], keepdims=1)))
    net.conv(net.op("Add", h, net.conv(h, 6, 6)), 6, 2, out="y")
    case = Case(net.model("y", inputs={"x": (4, 3, 6, 6)}), {"x": rand(N, 3, 6, 6)})
    found = case.distill(perturbed(case.graph), replace(RECIPE, epochs=6))
    assert found.best_score < 0.9 * found.start_score
    assert case.score(perturbed(case.graph), found.weights) == pytest.approx(found.best_score, rel=1e-3)


def test_half_precision_is_trained_in_float32() -> None:
    case = classifier(dtype=np.float16)
    broken = perturbed(case.graph)
    found = case.distill(broken, replace(RECIPE, epochs=6))
    assert found.best_score < 0.8 * found.start_score
    assert {values.dtype for values in found.weights.values()} == {np.dtype(np.float32)}
    assert case.score(broken, found.weights) == pytest.approx(found.best_score, rel=0.05)


def through_a_sequence(net: Net, x: str) -> str:
    """The same numbers, by way of a sequence, which torch does not have: gradients end here."""
    return net.op("ConcatFromSequence", net.op("SequenceConstruct", x), axis=0)


def opaque_in_the_middle() -> Case:
    net = Net()
    x = net.op("Det", through_a_sequence(net, net.conv("x", 3, 6, k=1, out="a")))
    x = net.relu(net.op("Gemm", x, net.rand(6, 8), net.rand(8), out="b"))
    net.op("Gemm", x, net.rand(8, 3), net.rand(3), out="y")
    return Case(net.model("y"), {"x": rand(N, 3, 6, 6)})


def test_weights_before_a_node_without_gradient_stay_and_that_is_said() -> None:
    case, events = opaque_in_the_middle(), []
    broken = perturbed(case.graph)
    found = case.distill(broken, replace(RECIPE, epochs=6), events=events)
    before = {tensor.name for tensor in next(n for n in case.graph.nodes if n.name == "make_a").inputs[1:]}
    assert len(before) == 2
    assert set(found.weights) == set(find_learned(broken)) - before
    assert found.best_score < found.start_score
    assert (
        "2 of 6 weights are not trained: no gradient reaches them, because a node behind them runs in "
        "onnxruntime only"
    ) in notes(events)


def test_a_model_without_any_gradient_stays_and_that_is_a_warning() -> None:
    net = Net()
    net.op("Det", through_a_sequence(net, net.conv("x", 3, 6)), out="y")
    case, events = Case(net.model("y"), {"x": rand(N, 3, 6, 6)}), []
    found = case.distill(perturbed(case.graph), events=events)
    assert not found.weights
    assert found.best_score is found.start_score is None
    assert notes(events, "warning") == ["nothing of the model can be trained, so it stays as it is"]
    assert not [event for event in events if event.kind == "start"]


def test_excluded_nodes_keep_their_weights() -> None:
    case = classifier()
    broken = perturbed(case.graph)
    found = case.distill(broken, leave={"make_a1", "make_scores"})
    assert set(found.weights) == set(find_learned(broken)) - {"a1.w", "a1.b", "head.w", "head.b"}
    assert found.best_score < found.start_score


# --- labels ---


def test_labels_change_the_result_where_there_are_scores() -> None:
    plain, labelled = classifier(), classifier(labelled=True)
    broken = perturbed(plain.graph)
    first, second = plain.distill(broken), labelled.distill(broken)
    assert as_bytes(first) != as_bytes(second)
    assert first.start_score == pytest.approx(plain.score(broken), rel=1e-3)
    assert second.start_score == pytest.approx(labelled.score(broken), rel=1e-3)
    assert second.best_score == pytest.approx(labelled.score(broken, second.weights), rel=1e-3)
    assert second.start_score != pytest.approx(first.start_score, rel=1e-2)


def test_labels_are_not_used_without_scores() -> None:
    plain, labelled = classifier(), classifier(labelled=True)
    broken = perturbed(plain.graph)
    assert as_bytes(plain.distill(broken, scores=None)) == as_bytes(labelled.distill(broken, scores=None))


def test_the_words_of_the_bar_say_what_is_judged() -> None:
    for case, scores, word in (
        (classifier(), "scores", "agreement"),
        (classifier(labelled=True), "scores", "accuracy"),
        (classifier(), None, "r2"),
    ):
        events: list[Event] = []
        case.distill(perturbed(case.graph), scores=scores, events=events)
        texts = [event.message for event in events if event.kind == "advance"]
        assert all(f"{word} " in text for text in texts)


# --- augmentation ---


def colour_classifier() -> Case:
    """It looks at the mean colour, through a layer that could look at places."""
    model = make_model(
        [
            node("Conv", ["x", "w", "b"], ["h"], pads=[1] * 4),
            node("Relu", ["h"], ["r"]),
            node("GlobalAveragePool", ["r"], ["p"]),
            node("Flatten", ["p"], ["f"]),
            node("Gemm", ["f", "head"], ["scores"]),
        ],
        inputs={"x": ["N", 3, 16, 16]},
        outputs=["scores"],
        weights={"w": rand(6, 3, 3, 3) / 5, "b": rand(6), "head": rand(6, 4)},
    )
    return Case(model, {"x": rand(N, 3, 16, 16) + 2 * rand(N, 3, 1, 1, seed=1)}, scores="scores")


def test_images_are_augmented_where_that_fits_and_it_is_said() -> None:
    case, events = colour_classifier(), []
    broken = perturbed(case.graph)
    plain = case.distill(broken)
    found = case.distill(broken, augment=True, events=events)
    assert found.augmentations == ("flip", "shift")
    assert found.facts(3)["augmentations"] == ["flip", "shift"]
    assert as_bytes(found) != as_bytes(plain)
    assert "training on 64 samples for 3 epochs, images augmented by flip and shift" in notes(events)
    assert plain.augmentations == ()
    small = classifier()  # 8 x 8 pixels
    first, second = (small.distill(perturbed(small.graph), augment=flag) for flag in (False, True))
    assert second.augmentations == ()
    assert as_bytes(first) == as_bytes(second)


# --- the same again ---


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    case = colour_classifier()
    broken = perturbed(case.graph)
    first, second = (case.distill(broken, augment=True) for _ in range(2))
    third = case.distill(broken, augment=True, folder=tmp_path / "new" / "folder", key="some")
    assert as_bytes(first) == as_bytes(second) == as_bytes(third)
    assert (first.best_score, first.best_epoch) == (second.best_score, second.best_epoch)
    assert as_bytes(first) != as_bytes(case.distill(broken, replace(RECIPE, seed=2), augment=True))


def test_the_random_numbers_of_others_do_not_matter_and_are_left_alone() -> None:
    case = classifier()
    broken = perturbed(case.graph)
    torch.manual_seed(1)
    first = case.distill(broken)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(99)
    assert as_bytes(case.distill(broken)) == as_bytes(first)


def test_the_graphs_stay_as_they_are() -> None:
    case = classifier()
    broken = perturbed(case.graph)
    before = [
        {n: t.values.copy() for n, t in graph.tensors().items() if isinstance(t, gs.Constant)}
        for graph in (case.graph, broken)
    ]
    case.distill(broken)
    for graph, constants in zip((case.graph, broken), before, strict=True):
        for name, values in constants.items():
            np.testing.assert_array_equal(graph.tensors()[name].values, values)


def test_few_samples_are_one_update_per_epoch() -> None:
    case = Case(residual_cnn(width=8), {"x": images(9)}, scores="scores")
    events: list[Event] = []
    found = case.distill(perturbed(case.graph), Recipe(epochs=4, batch_size=16), events=events)
    assert [event.total for event in events if event.kind == "start"] == [4]
    assert found.best_score <= found.start_score


def test_a_temporary_folder_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    case = classifier()
    case.distill(perturbed(case.graph))
    assert list(tmp_path.iterdir()) == []


# --- what the GPU does ---


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_runs_in_mixed_precision(name: str) -> None:
    case = topology(name)
    twin = build_twin(case.graph)
    inputs = {key: torch.from_numpy(values[: len(values) // 3]) for key, values in case.inputs.items()}
    names = [output for step in twin.steps for output in step.outputs]
    with torch.no_grad():
        expected = run_captured(twin, inputs, names)
        with torch.autocast("cpu", torch.bfloat16):
            found = run_captured(twin, inputs, names)
    for output in twin.output_names:
        if not expected[output].is_floating_point():
            continue
        error = (found[output].float() - expected[output]).square().mean().sqrt()
        assert error < 0.05 * expected[output].square().mean().sqrt() + 1e-6
        assert found[output].shape == expected[output].shape


@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_trained_in_mixed_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_precision", lambda self: torch.autocast("cpu", torch.bfloat16))
    case = topology(name)
    found = case.distill(perturbed(case.graph), Recipe(epochs=2, batch_size=8))
    assert found.best_score <= found.start_score
    for values in found.weights.values():
        assert values.dtype == np.float32
        assert np.isfinite(values).all()


def test_mixed_precision_repairs_about_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    case, recipe = classifier(), replace(RECIPE, epochs=8)
    broken = perturbed(case.graph)
    exact = case.distill(broken, recipe)
    monkeypatch.setattr(Trainer, "_precision", lambda self: torch.autocast("cpu", torch.bfloat16))
    mixed = case.distill(broken, recipe)
    assert as_bytes(mixed) != as_bytes(exact)
    assert mixed.start_score == exact.start_score  # models are judged in float32
    assert mixed.best_score < 0.5 * mixed.start_score
    assert mixed.best_score == pytest.approx(exact.best_score, rel=0.2)


def test_gradients_in_mixed_precision_are_near_those_in_float32() -> None:
    case = classifier()
    twin = build_twin(perturbed(case.graph))
    inputs = {"x": torch.from_numpy(case.inputs["x"][:16])}
    parameters = list(twin.parameter_of.values())
    gradients = []
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = twin(inputs)["scores"].float().square().mean()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert cosine > 0.995


def test_casts_and_integers_survive_mixed_precision() -> None:
    net = Net()
    x = net.conv("x", 3, 6)
    x = net.op("Cast", net.op("Cast", x, to=TensorProto.FLOAT16), to=TensorProto.FLOAT)
    net.op("ArgMax", net.op("GlobalAveragePool", x, out="p"), axis=1, keepdims=0, out="top")
    model: onnx.ModelProto = net.model("p", "top")
    case = Case(model, {"x": rand(12, 3, 6, 6)})
    twin = build_twin(with_weights(case.graph, {}))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = twin({"x": torch.from_numpy(case.inputs["x"])})
    assert found["top"].dtype == torch.int64
    np.testing.assert_allclose(found["p"].float().numpy(), case.outputs["p"], atol=0.02)


def test_a_model_that_equals_the_original_is_no_failure() -> None:
    """There is nothing to gain, but nothing goes wrong either: the user need not be warned."""
    events: list[Event] = []
    case = classifier()
    found = case.distill(case.graph.copy(), events=events)
    assert notes(events, "warning") == []
    assert found.n_rollbacks == 0


def test_weights_that_reach_no_output_are_no_opaque_weights() -> None:
    """A head that does not count is left alone, but for another reason than a node in onnxruntime."""
    case, events = topology("two_inputs_two_outputs"), []
    case.distill(
        perturbed(case.graph), Recipe(1, batch_size=8), scales={"y": case.scales["y"]}, events=events
    )
    assert not any("onnxruntime only" in text for text in notes(events))


def test_a_model_that_is_excluded_as_a_whole_stays_and_that_is_a_warning() -> None:
    case, events = classifier(), []
    found = case.distill(perturbed(case.graph), leave={n.name for n in case.graph.nodes}, events=events)
    assert not found.weights
    assert notes(events, "warning") == ["nothing of the model can be trained, so it stays as it is"]


def test_a_folder_that_cannot_be_made_is_a_validation_error(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("a file")
    case = classifier()
    with pytest.raises(ValidationError, match="work"):
        case.distill(perturbed(case.graph), folder=tmp_path / "work" / "one.training")
