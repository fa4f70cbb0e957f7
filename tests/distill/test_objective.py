"""What training minimises, against the formulas written out in numpy and scipy."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from topologies import Net

from hap_onnx.distill import objective as module
from hap_onnx.distill.objective import Objective, Scores, find_hidden, find_scores
from hap_onnx.twin import Twin, probe_shapes, run_captured
from tests.distill.cases import by_numpy
from tests.helpers import make_twin, rand

Arrays = dict[str, np.ndarray]


def tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def make_case(
    seed: int, n: int, n_classes: int, *, spread: float = 3.0, probabilities: bool = False
) -> tuple[Arrays, Arrays, np.ndarray]:
    rng = np.random.default_rng(seed)
    theirs = {
        "scores": spread * rng.standard_normal((n, n_classes)),
        "boxes": 5 + rng.standard_normal((n, 3, 4)),
        "h1": rng.standard_normal((n, 2, 5, 5)),
        "h2": 100 * rng.standard_normal((n, 3, 5, 5)),
    }
    ours = {name: array + 0.3 * rng.standard_normal(array.shape) for name, array in theirs.items()}
    if probabilities:
        for arrays in (ours, theirs):
            arrays["scores"] = softmax(arrays["scores"], axis=1)
    pair = ({k: v.astype(np.float32) for k, v in arrays.items()} for arrays in (ours, theirs))
    return (*pair, rng.integers(0, n_classes, n))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 6),
    n_classes=st.integers(2, 12),
    probabilities=st.booleans(),
    with_scores=st.booleans(),
    with_labels=st.booleans(),
    with_hidden=st.booleans(),
    share=st.floats(0, 1),
)
def test_the_loss_is_what_the_formula_says(
    seed: int,
    n: int,
    n_classes: int,
    probabilities: bool,
    with_scores: bool,
    with_labels: bool,
    with_hidden: bool,
    share: float,
) -> None:
    ours, theirs, labels = make_case(seed, n, n_classes, probabilities=probabilities)
    one = Objective(
        scales={"scores": 0.7, "boxes": 0.2} if seed % 2 else {"boxes": 0.2},
        hidden={"h1": 1.0, "h2": 1e-4} if with_hidden else {},
        scores=Scores("scores", probabilities, 1.5) if with_scores else None,
        label_share=share,
    )
    given_labels = torch.from_numpy(labels) if with_labels else None
    found = float(one.loss(tensors(ours), tensors(theirs), given_labels))
    expected = by_numpy(one, ours, theirs, labels if with_labels else None)
    assert found == pytest.approx(expected, rel=2e-4, abs=1e-6)


def test_the_score_is_the_part_of_outputs() -> None:
    ours, theirs, labels = make_case(0, 5, 4)
    scores = Scores("scores", as_probabilities=False, scale=2.0)
    whole = Objective({"boxes": 0.2}, {"h1": 1.0}, scores)
    bare = Objective({"boxes": 0.2}, {}, scores)
    pair, given_labels = (tensors(ours), tensors(theirs)), torch.from_numpy(labels)
    assert torch.equal(whole.score(*pair, given_labels), bare.loss(*pair, given_labels))
    assert whole.loss(*pair, given_labels) > whole.score(*pair, given_labels)


def test_labels_without_scores_do_nothing() -> None:
    ours, theirs, labels = make_case(0, 5, 4)
    one = Objective({"boxes": 0.2, "scores": 0.1}, {}, None)
    pair = tensors(ours), tensors(theirs)
    assert torch.equal(one.loss(*pair, torch.from_numpy(labels)), one.loss(*pair, None))


def test_probabilities_are_compared_as_the_logits_they_come_from() -> None:
    """Only the distance of the outputs tells the two apart: divergence and labels do not."""
    logits = make_case(3, 6, 5)
    ours, theirs, labels = logits
    as_probabilities = tuple(
        {**arrays, "scores": softmax(arrays["scores"].astype(np.float64), axis=1).astype(np.float32)}
        for arrays in (ours, theirs)
    )
    losses = [
        float(
            Objective({"boxes": 0.1}, {}, Scores("scores", flag, 1.7)).loss(
                tensors(pair[0]), tensors(pair[1]), torch.from_numpy(labels)
            )
        )
        for flag, pair in ((False, (ours, theirs)), (True, as_probabilities))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), probabilities=st.booleans(), spread=st.floats(0.01, 30))
def test_models_that_agree_lose_nothing_without_labels(seed: int, probabilities: bool, spread: float) -> None:
    _, theirs, _ = make_case(seed, 4, 6, spread=spread, probabilities=probabilities)
    one = Objective(
        {"scores": 0.5, "boxes": 0.1},
        {"h1": 1.0, "h2": 1e-4},
        find_scores("scores", torch.from_numpy(theirs["scores"])),
    )
    loss = float(one.loss(tensors(theirs), tensors(theirs), None))
    assert abs(loss) < 1e-5


def test_any_other_model_loses_something() -> None:
    for seed in range(5):
        ours, theirs, _ = make_case(seed, 4, 6)
        for name in theirs:
            pair = tensors({**theirs, name: ours[name]}), tensors(theirs)
            one = Objective({"boxes": 0.1}, {"h1": 1.0, "h2": 1e-4}, Scores("scores", False, 3.0))
            assert float(one.loss(*pair, None)) > 1e-6


def test_an_offset_of_all_scores_is_seen_by_the_distance_alone() -> None:
    _, theirs, _ = make_case(0, 4, 6)
    pair = tensors({**theirs, "scores": theirs["scores"] + 3}), tensors(theirs)
    scores = Scores("scores", as_probabilities=False, scale=3.0)
    assert abs(float(Objective({}, {}, scores).loss(*pair, None))) < 1e-5
    assert float(Objective({"scores": 0.2}, {}, scores).loss(*pair, None)) == pytest.approx(
        0.5 * (0.2 * 3) ** 2 * 6, rel=1e-5
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 100), factor=st.sampled_from([1e-2, 0.1, 10.0, 100.0]))
def test_the_unit_of_logits_does_not_matter(seed: int, factor: float) -> None:
    """Scores times a factor: the divergence and its gradient, in the unit of the scores, stay."""
    ours, theirs, _ = make_case(seed, 4, 6)
    losses = []
    for by in (1.0, factor):
        scaled = [torch.from_numpy(arrays["scores"] * np.float32(by)) for arrays in (ours, theirs)]
        scores = find_scores("scores", scaled[1])
        losses.append(
            float(Objective({}, {}, scores).loss({"scores": scaled[0]}, {"scores": scaled[1]}, None))
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_gradients_are_finite(probabilities: bool, spread: float) -> None:
    ours, theirs, labels = make_case(1, 4, 6, spread=spread, probabilities=probabilities)
    if probabilities:  # exact zeros and ones
        for arrays in (ours, theirs):
            arrays["scores"] = np.eye(6, dtype=np.float32)[:4]
        ours["scores"] = ours["scores"][:, ::-1].copy()
    one = Objective(
        {"scores": 0.5, "boxes": 0.1},
        {"h1": 1.0},
        find_scores("scores", torch.from_numpy(theirs["scores"])),
    )
    mine = {name: tensor.requires_grad_(True) for name, tensor in tensors(ours).items()}
    loss = one.loss(mine, tensors(theirs), torch.from_numpy(labels))
    gradients = torch.autograd.grad(loss, [mine["scores"], mine["boxes"], mine["h1"]])
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_half_precision_is_compared_in_float32() -> None:
    ours, theirs, labels = make_case(1, 4, 6)
    one = Objective({"boxes": 0.1}, {"h2": 1e-4}, Scores("scores", False, 3.0))
    pair = [
        {name: tensor.to(torch.bfloat16) for name, tensor in tensors(arrays).items()}
        for arrays in (ours, theirs)
    ]
    rounded = [{name: tensor.float() for name, tensor in arrays.items()} for arrays in pair]
    found = one.loss(pair[0], pair[1], torch.from_numpy(labels))
    assert found.dtype == torch.float32
    assert torch.equal(found, one.loss(rounded[0], rounded[1], torch.from_numpy(labels)))


# --- what kind of scores ---


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 20), n_classes=st.integers(2, 12))
def test_scores_are_logits_or_probabilities(seed: int, n: int, n_classes: int) -> None:
    logits = 3 * np.random.default_rng(seed).standard_normal((n, n_classes)).astype(np.float32)
    found = find_scores("y", torch.from_numpy(logits))
    assert (found.output, found.as_probabilities) == ("y", False)
    assert found.scale == pytest.approx(np.sqrt(logits.var(axis=1).mean()), rel=1e-4)
    found = find_scores("y", torch.from_numpy(softmax(logits, axis=1)))
    assert found.as_probabilities
    # Logarithms of probabilities are the logits but for an offset per sample, down to the least that count.
    cut = np.log(np.maximum(softmax(logits.astype(np.float64), axis=1), module._TINY))
    assert found.scale == pytest.approx(np.sqrt(cut.var(axis=1).mean()), rel=1e-3)


@pytest.mark.parametrize("rows", [[[0.5, 0.25], [0.5, 0.5]], [[1.5, -0.5]], [[3.0, 4.0]]])
def test_rows_that_do_not_sum_to_one_are_no_probabilities(rows: list) -> None:
    assert not find_scores("y", torch.tensor(rows)).as_probabilities


def test_scores_that_do_not_vary_have_a_scale_too() -> None:
    assert find_scores("y", torch.zeros(3, 4)).scale > 0


# --- tensors inside ---


def stack(n_blocks: int, *, narrow: int = 0, residual: bool = True) -> Twin:
    """Return blocks of two convolutions; the inner width of each is 6, less ``narrow``."""
    net = Net()
    x = net.conv("x", 3, 8, out="stem")
    for index in range(n_blocks):
        inner = net.conv(net.relu(x), 8, 6 - narrow, out=f"inner{index}")
        y = net.conv(net.relu(inner), 6 - narrow, 8, out=f"outer{index}")
        x = net.op("Add", x, y, out=f"sum{index}") if residual else y
    net.op("GlobalAveragePool", x, out="p")
    net.op("Flatten", "p", out="y")
    return make_twin(net.model("y"))


IMAGES = {"x": torch.from_numpy(rand(8, 3, 6, 6))}


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 8, 9, 10, 13, 20])
def test_sums_are_chosen_evenly_with_the_last(n_blocks: int) -> None:
    found = find_hidden(stack(n_blocks), stack(n_blocks, narrow=2), IMAGES)
    places = [int(name.removeprefix("sum")) for name in found]
    assert len(places) == min(n_blocks, module.N_HIDDEN)
    assert places == sorted(set(places))
    assert places[-1] == n_blocks - 1
    gaps = np.diff([-1, *places])
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("narrow", [0, 2])
def test_without_sums_tensors_of_equal_shape_are_chosen(narrow: int) -> None:
    teacher, student = stack(3, residual=False), stack(3, narrow=narrow, residual=False)
    found = find_hidden(teacher, student, IMAGES)
    assert found
    mine, theirs = probe_shapes(student, IMAGES), probe_shapes(teacher, IMAGES)
    assert all(mine[name] == theirs[name] for name in found)
    names = [name for name in found if name.startswith("inner")]
    assert bool(names) == (narrow == 0)
    assert not {"x", "y"} & set(found)
    assert set(found) <= {name for step in teacher.steps for name in step.outputs}


def test_scales_are_one_over_the_mean_variance() -> None:
    teacher = stack(3)
    found = find_hidden(teacher, stack(3, narrow=1), IMAGES)
    with torch.no_grad():
        values = run_captured(teacher, IMAGES, list(found))
    for name, scale in found.items():
        assert scale == pytest.approx(1 / values[name].numpy().var(axis=0).mean(), rel=1e-4)


def two_sums(other: np.ndarray) -> onnx.ModelProto:
    net = Net()
    net.op("Add", net.conv("x", 3, 4), net.const(np.ones((1, 4, 1, 1), np.float32)), out="alive")
    zero = net.op("Mul", "alive", net.const(other))
    net.op("Add", zero, zero, out="dead")
    net.op("Flatten", net.op("Add", "dead", "alive"), out="y")
    return net.model("y")


def test_tensors_that_do_not_vary_are_left_out() -> None:
    teacher = make_twin(two_sums(np.zeros((1, 4, 1, 1), np.float32)))
    assert "dead" not in find_hidden(teacher, teacher, IMAGES)
    teacher = make_twin(two_sums(np.ones((1, 4, 1, 1), np.float32)))
    assert "dead" in find_hidden(teacher, teacher, IMAGES)


def test_models_without_any_tensor_in_common_have_none() -> None:
    net = Net()
    net.op("Flatten", "x", out="f")
    net.op("MatMul", "f", net.rand(108, 4), out="y")
    twin = make_twin(net.model("y"))
    assert find_hidden(twin, twin, IMAGES) == {}  # vectors do not count: refit has matched them
