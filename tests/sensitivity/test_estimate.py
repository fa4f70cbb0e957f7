"""Scores of elements: against dense Hessians, Jacobians and finite differences of small nets, in double."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from torch import Tensor

from hap_onnx.coupling.channels import ChannelGroup, Coupling, find_groups
from hap_onnx.data.calibration import InputSpec, Subset, open_dataset
from hap_onnx.errors import CalibrationError, UsageError
from hap_onnx.events import Event
from hap_onnx.model.model_io import load_model, normalise
from hap_onnx.sensitivity.estimate import (
    SENSITIVITIES,
    ElementScores,
    Options,
    estimate,
    gate,
    gauss_newton,
    hutchinson,
    magnitude,
    misplaced_share,
    random,
)
from hap_onnx.sensitivity.hessian import MIN_PROBES
from hap_onnx.twin import Step, Twin, build_twin, probe_shapes
from tests.helpers import make_model, node, rand

N = 12
ESTIMATORS = (hutchinson, gauss_newton, gate)


@dataclass(frozen=True)
class Case:
    """A net with its data; ``owned`` lists the (initializer, axis) that make up the elements' filters."""

    graph: gs.Graph
    twin: Twin
    coupling: Coupling
    subset: Subset
    owned: Sequence[tuple[str, int]]

    @property
    def options(self) -> Options:
        return Options(graph=self.graph, batch_size=5, tolerance=0)

    def inputs(self) -> dict[str, Tensor]:
        batch = next(self.subset.batches(self.subset.n_samples))
        return {name: torch.from_numpy(x).double() for name, x in batch.inputs.items()}

    def parameters(self) -> list[tuple[str, int, torch.nn.Parameter]]:
        return [(name, axis, self.twin.parameter_of[name]) for name, axis in self.owned]

    def sum_by_element(self, values: Mapping[str, Tensor]) -> np.ndarray:
        """Sum over filters, position by position."""
        sums = np.zeros(self.coupling.n_elements)
        for name, axis in self.owned:
            elements = next(
                w.elements for w in self.coupling.weights if (w.initializer, w.axis) == (name, axis)
            )
            for position, element in enumerate(elements):
                if element >= 0:
                    sums[element] += float(values[name].select(axis, position).sum())
        return sums

    def relative(self, diagonal: Mapping[str, Tensor]) -> np.ndarray:
        """The paper's score from the diagonal of a matrix."""
        weights = {name: p.detach() for name, _, p in self.parameters()}
        counts = self.sum_by_element({name: torch.ones_like(w) for name, w in weights.items()})
        norms = self.sum_by_element({name: w.square() for name, w in weights.items()})
        return self.sum_by_element(diagonal) / (2 * counts) * norms


def make_case(
    model: onnx.ModelProto,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    owned: Sequence[tuple[str, int]],
    n_classes: int | None = None,
) -> Case:
    graph = normalise(load_model(model))
    twin = build_twin(graph)
    arrays = {name: rand(N, *shape, seed=50 + i) for i, (name, shape) in enumerate(shapes.items())}
    probe = {name: torch.from_numpy(x[:2]) for name, x in arrays.items()}
    coupling = find_groups(graph, probe_shapes(twin, probe))
    specs = [InputSpec(name, np.dtype(np.float32), ("N", *shape)) for name, shape in shapes.items()]
    if n_classes is not None:
        arrays["labels"] = np.arange(N) % n_classes
    dataset = open_dataset(arrays, specs)
    return Case(graph, twin.double(), coupling, Subset(dataset, np.arange(N)), owned)


def conv_case(*, n_out: int = 2, labels: bool = False, softmax: bool = False) -> Case:
    """Two convolutions and a Gemm with smooth activations; 3 + 4 elements."""
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 0, 0], strides=[2, 1]),
        node("Tanh", ["c1"], ["t1"]),
        node("Conv", ["t1", "w2", "b2"], ["c2"]),
        node("Softplus", ["c2"], ["t2"]),
        node("GlobalAveragePool", ["t2"], ["pool"]),
        node("Flatten", ["pool"], ["flat"]),
        node("Gemm", ["flat", "w3", "b3"], ["z" if softmax else "y"], transB=1),
    ]
    if softmax:
        nodes.append(node("Softmax", ["z"], ["y"], axis=1))
    model = make_model(
        nodes,
        inputs={"x": ["N", 2, 4, 4]},
        outputs=["y"],
        weights={
            "w1": rand(3, 2, 2, 2),
            "b1": rand(3, seed=1),
            "w2": rand(4, 3, 1, 1, seed=2),
            "b2": rand(4, seed=3),
            "w3": rand(n_out, 4, seed=4),
            "b3": rand(n_out, seed=5),
        },
    )
    owned = [("w1", 0), ("b1", 0), ("w2", 0), ("b2", 0)]
    return make_case(model, {"x": (2, 4, 4)}, owned=owned, n_classes=n_out if labels else None)


def shared_case(*, n_out: int = 2) -> Case:
    """A matrix used twice: its rows and columns are the same elements; and a bias that Add adds."""
    model = make_model(
        [
            node("MatMul", ["x", "w0"], ["a"]),
            node("Add", ["a", "b0"], ["ab"]),
            node("MatMul", ["ab", "w"], ["b"]),
            node("Tanh", ["b"], ["c"]),
            node("MatMul", ["c", "w"], ["d"]),
            node("Tanh", ["d"], ["e"]),
            node("MatMul", ["e", "w1"], ["y"]),
        ],
        inputs={"x": ["N", 3]},
        outputs=["y"],
        weights={
            "w0": rand(3, 4),
            "b0": rand(4, seed=1),
            "w": rand(4, 4, seed=2),
            "w1": rand(4, n_out, seed=3),
        },
    )
    return make_case(model, {"x": (3,)}, owned=[("w0", 1), ("w", 1)])


def residual_case(*, n_out: int = 1) -> Case:
    """One element is read by two convolutions and passes an Add beside; another flows through a Concat."""
    model = make_model(
        [
            node("Conv", ["x", "w1"], ["c1"]),
            node("Tanh", ["c1"], ["t1"]),
            node("Conv", ["t1", "w2"], ["c2"], pads=[1, 1, 1, 1]),
            node("Add", ["t1", "c2"], ["s"]),
            node("Conv", ["s", "w3"], ["c3"]),
            node("Concat", ["c3", "s"], ["cat"], axis=1),
            node("GlobalAveragePool", ["cat"], ["pool"]),
            node("Flatten", ["pool"], ["flat"]),
            node("Gemm", ["flat", "w4"], ["y"]),
        ],
        inputs={"x": ["N", 2, 3, 3]},
        outputs=["y"],
        weights={
            "w1": rand(3, 2, 1, 1),
            "w2": rand(3, 3, 3, 3, seed=1),
            "w3": rand(2, 3, 1, 1, seed=2),
            "w4": rand(5, n_out, seed=3),
        },
    )
    return make_case(model, {"x": (2, 3, 3)}, owned=[("w1", 0), ("w2", 0), ("w3", 0)])


def sequence_case(*, n_out: int = 1) -> Case:
    """Tokens first, samples second, as recurrent nets have it; then samples and tokens on one axis."""
    model = make_model(
        [
            node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
            node("MatMul", ["t", "w1"], ["a"]),
            node("Tanh", ["a"], ["b"]),
            node("MatMul", ["b", "w2"], ["c"]),
            node("Tanh", ["c"], ["d"]),
            node("Reshape", ["d", "rows"], ["e"]),
            node("MatMul", ["e", "w3"], ["f"]),
            node("Reshape", ["f", "tokens"], ["g"]),
            node("ReduceMean", ["g"], ["y"], axes=[0], keepdims=0),
        ],
        inputs={"x": ["N", 3, 2]},
        outputs=["y"],
        weights={
            "w1": rand(2, 3),
            "w2": rand(3, 4, seed=1),
            "w3": rand(4, n_out, seed=2),
            "rows": np.array([-1, 4]),
            "tokens": np.array([3, -1, n_out]),
        },
    )
    return make_case(model, {"x": (3, 2)}, owned=[("w1", 1), ("w2", 1)])


def attention_case(*, n_out: int = 1) -> Case:
    """Two heads of width two in one packed product; their projection is read by the output."""
    model = make_model(
        [
            node("MatMul", ["x", "w1"], ["a"]),
            node("Add", ["a", "b1"], ["b"]),
            node("Reshape", ["b", "spread"], ["c"]),
            node("Transpose", ["c"], ["d"], perm=[2, 0, 3, 1, 4]),
            node("Split", ["d"], ["q0", "k0", "v0"], axis=0),
            node("Squeeze", ["q0", "first"], ["q"]),
            node("Squeeze", ["k0", "first"], ["k"]),
            node("Squeeze", ["v0", "first"], ["v"]),
            node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
            node("MatMul", ["q", "kt"], ["scores"]),
            node("Softmax", ["scores"], ["shares"], axis=-1),
            node("MatMul", ["shares", "v"], ["mixed"]),
            node("Transpose", ["mixed"], ["m"], perm=[0, 2, 1, 3]),
            node("Reshape", ["m", "joined"], ["n"]),
            node("MatMul", ["n", "w2"], ["o"]),
            node("Tanh", ["o"], ["p"]),
            node("MatMul", ["p", "w3"], ["r"]),
            node("ReduceMean", ["r"], ["y"], axes=[1], keepdims=0),
        ],
        inputs={"x": ["N", 3, 2]},
        outputs=["y"],
        weights={
            "w1": rand(2, 12),
            "b1": rand(12, seed=1),
            "w2": rand(4, 3, seed=2),
            "w3": rand(3, n_out, seed=3),
            "spread": np.array([0, 0, 3, 2, 2]),
            "joined": np.array([0, 0, 4]),
            "first": np.array([0]),
        },
    )
    return make_case(model, {"x": (3, 2)}, owned=[("w1", 1), ("w2", 1)])


def grouped_case(*, n_out: int = 1) -> Case:
    """Grouped (one element, a filter in each group), depthwise (only follows), transposed convolutions."""
    model = make_model(
        [
            node("Conv", ["x", "w1", "b1"], ["c1"], group=2),
            node("Tanh", ["c1"], ["t1"]),
            node("Conv", ["t1", "w2", "b2"], ["c2"], group=2),
            node("Tanh", ["c2"], ["t2"]),
            node("Conv", ["t2", "w3", "b3"], ["c3"], group=6),
            node("ConvTranspose", ["c3", "w4", "b4"], ["c4"], strides=[2, 2]),
            node("Tanh", ["c4"], ["t4"]),
            node("GlobalAveragePool", ["t4"], ["pool"]),
            node("Flatten", ["pool"], ["flat"]),
            node("Gemm", ["flat", "w5"], ["y"]),
        ],
        inputs={"x": ["N", 2, 3, 3]},
        outputs=["y"],
        weights={
            "w1": rand(4, 1, 1, 1),
            "b1": rand(4, seed=1),
            "w2": rand(6, 2, 2, 2, seed=2),
            "b2": rand(6, seed=3),
            "w3": rand(6, 1, 1, 1, seed=4),
            "b3": rand(6, seed=5),
            "w4": rand(6, 3, 2, 2, seed=6),
            "b4": rand(3, seed=7),
            "w5": rand(3, n_out, seed=8),
        },
    )
    owned = [("w1", 0), ("b1", 0), ("w2", 0), ("b2", 0), ("w4", 1), ("b4", 0)]
    return make_case(model, {"x": (2, 3, 3)}, owned=owned)


def output_scale(case: Case) -> float:
    y = next(iter(case.twin(case.inputs()).values())).detach()
    return float(1 / ((y - y.mean(0)).square().mean() * y[0].numel()).sqrt())


def dense_diagonal(case: Case, loss: Tensor) -> dict[str, Tensor]:
    """Diagonal of the Hessian, one second derivative after the other."""
    diagonal = {}
    for name, _, parameter in case.parameters():
        (gradient,) = torch.autograd.grad(loss, parameter, create_graph=True)
        second = [
            torch.autograd.grad(g, parameter, retain_graph=True)[0].flatten()[i]
            for i, g in enumerate(gradient.flatten())
        ]
        diagonal[name] = torch.stack(second).reshape(parameter.shape)
    return diagonal


def distance_diagonal(case: Case) -> dict[str, Tensor]:
    y = next(iter(case.twin(case.inputs()).values()))
    return dense_diagonal(case, 0.5 * output_scale(case) ** 2 * (y - y.detach()).square().sum() / N)


def check_covers(scores: ElementScores, expected: np.ndarray, *, k: float = 4, largest: float = 0.5) -> None:
    """Assert that the errors cover the truth, and that they say something."""
    assert (np.abs(scores.mean - expected) <= k * scores.std_error + 1e-12).all()
    assert (scores.std_error <= largest * np.abs(expected).max()).all()


# --- traces -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [conv_case, shared_case, sequence_case])
def test_hutchinson_equals_the_dense_hessian_of_the_distance(make) -> None:
    case = make(n_out=2)
    scores = hutchinson(case.twin, case.coupling, case.subset, replace(case.options, n_probes=200))
    assert scores.n_probes == 200
    check_covers(scores, case.relative(distance_diagonal(case)))


def test_hutchinson_equals_the_dense_hessian_of_the_cross_entropy() -> None:
    case = conv_case(n_out=3, labels=True)
    labels = torch.from_numpy(case.subset.labels)
    loss = torch.nn.functional.cross_entropy(case.twin(case.inputs())["y"], labels)
    scores = hutchinson(case.twin, case.coupling, case.subset, replace(case.options, n_probes=200))
    check_covers(scores, case.relative(dense_diagonal(case, loss)))


def test_cross_entropy_of_probabilities_is_that_of_their_logits() -> None:
    options = Options(batch_size=5, n_probes=8, loss="cross-entropy")
    logits, probabilities = (conv_case(n_out=3, labels=True, softmax=softmax) for softmax in (False, True))
    for estimator in ESTIMATORS:
        a, b = (estimator(case.twin, case.coupling, case.subset, options) for case in (logits, probabilities))
        np.testing.assert_allclose(a.mean, b.mean, rtol=1e-9)


@pytest.mark.parametrize("make", [conv_case, shared_case, residual_case, grouped_case, sequence_case])
@pytest.mark.parametrize("with_forms", [True, False])
def test_gauss_newton_equals_the_dense_hessian_of_the_distance(make, with_forms: bool) -> None:
    case = make(n_out=2)
    options = replace(case.options, n_directions=40, graph=case.graph if with_forms else None)
    scores = gauss_newton(case.twin, case.coupling, case.subset, options)
    assert scores.n_probes == 40 * N
    check_covers(scores, case.relative(distance_diagonal(case)))


@pytest.mark.parametrize("make", [conv_case, residual_case])
def test_gauss_newton_of_one_output_is_exact(make) -> None:
    case = make(n_out=1)
    scores = gauss_newton(case.twin, case.coupling, case.subset, case.options)
    np.testing.assert_allclose(scores.mean, case.relative(distance_diagonal(case)), rtol=1e-9)


def test_gauss_newton_and_hutchinson_estimate_one_number() -> None:
    case = conv_case()
    a = gauss_newton(case.twin, case.coupling, case.subset, replace(case.options, n_directions=40))
    b = hutchinson(case.twin, case.coupling, case.subset, replace(case.options, n_probes=200))
    assert (np.abs(a.mean - b.mean) <= 4 * np.hypot(a.std_error, b.std_error)).all()


def test_gauss_newton_of_cross_entropy_is_the_fisher_matrix() -> None:
    case = conv_case(n_out=3)
    z = case.twin(case.inputs())["y"]
    p = z.detach().softmax(1)
    diagonal = {}
    for name, _, parameter in case.parameters():
        total = torch.zeros_like(parameter)
        for sample in range(N):
            rows = [torch.autograd.grad(z[sample, c], parameter, retain_graph=True)[0] for c in range(3)]
            jacobian = torch.stack(rows).flatten(1)
            m = p[sample].diag() - torch.outer(p[sample], p[sample])
            total += torch.einsum("ci,cd,di->i", jacobian, m, jacobian).reshape(parameter.shape) / N
        diagonal[name] = total.detach()
    options = replace(case.options, n_directions=80, loss="cross-entropy")
    check_covers(gauss_newton(case.twin, case.coupling, case.subset, options), case.relative(diagonal))


def test_gauss_newton_takes_few_and_many_positions_alike() -> None:
    """The two ways to a gradient's norm, by inner products of positions and by the gradient itself."""
    model = make_model(
        [node("MatMul", ["x", "w1"], ["a"]), node("Tanh", ["a"], ["b"]), node("MatMul", ["b", "w2"], ["y"])],
        inputs={"x": ["N", "T", 6]},
        outputs=["y"],
        weights={"w1": rand(6, 8), "w2": rand(8, 1, seed=1)},
    )
    for n_tokens in (1, 2, 9):
        case = make_case(model, {"x": (n_tokens, 6)}, owned=[("w1", 1)])
        scores = gauss_newton(case.twin, case.coupling, case.subset, replace(case.options, n_directions=40))
        check_covers(scores, case.relative(distance_diagonal(case)), largest=1)


# --- gates --------------------------------------------------------------------------------------


def gate_by_differences(case: Case, eps: float = 1e-4) -> np.ndarray:
    """Output distance over eps^2 when the gate of one element is closed by eps at all its reads."""
    reads = {(read.node, read.index): read for read in case.coupling.reads}
    with torch.no_grad():
        y = next(iter(case.twin(case.inputs()).values()))
        costs = []
        for element in range(case.coupling.n_elements):

            def scale(step: Step, index: int, tensor: Tensor, element: int = element) -> Tensor:
                read = reads.get((step.name, index))
                if read is None:
                    return tensor
                factor = 1 - eps * torch.from_numpy((read.elements == element).astype(float))
                return tensor * factor.reshape([-1 if a == read.axis else 1 for a in range(tensor.ndim)])

            changed = next(iter(case.twin(case.inputs(), on_read=scale).values()))
            distance = 0.5 * output_scale(case) ** 2 * (changed - y).square().sum() / N
            costs.append(float(distance) / eps**2)
    return np.array(costs)


@pytest.mark.parametrize("make", [conv_case, shared_case, residual_case, grouped_case, attention_case])
def test_gate_of_one_output_equals_finite_differences(make) -> None:
    case = make(n_out=1)
    scores = gate(case.twin, case.coupling, case.subset, case.options)
    expected = gate_by_differences(case)
    assert (expected > 0).all()
    np.testing.assert_allclose(scores.mean, expected, rtol=5e-3)


@pytest.mark.parametrize("make", [conv_case, shared_case, residual_case, sequence_case])
def test_gate_equals_finite_differences(make) -> None:
    case = make(n_out=3)
    options = replace(case.options, n_directions=40)
    check_covers(gate(case.twin, case.coupling, case.subset, options), gate_by_differences(case), k=4.1)


@pytest.mark.parametrize("name", SENSITIVITIES)
def test_heads_have_finite_scores(name: str) -> None:
    case = attention_case(n_out=2)
    assert sorted(group.size for group in case.coupling.groups) == [2, 3]
    scores = estimate(name, case.twin, case.coupling, case.subset, options=case.options)
    assert np.isfinite(scores.mean).all()
    assert name == "hutchinson" or (scores.mean > 0).all()


def test_gate_tells_samples_apart_on_any_axis() -> None:
    """Samples on the second axis: exact for one output; mixed with tokens: one observation per batch."""
    case = sequence_case(n_out=1)
    scores = gate(case.twin, case.coupling, case.subset, replace(case.options, batch_size=1))
    np.testing.assert_allclose(scores.mean, gate_by_differences(case), rtol=5e-3)
    batched = gate(case.twin, case.coupling, case.subset, replace(case.options, batch_size=4))
    first = next(w.elements for w in case.coupling.weights if w.initializer == "w1" and w.axis == 1)
    np.testing.assert_allclose(batched.mean[first], scores.mean[first], rtol=1e-9)


# --- for comparison -----------------------------------------------------------------------------


def test_magnitude_is_the_squared_norm_of_filters_with_bias() -> None:
    case = conv_case()
    scores = magnitude(case.twin, case.coupling)
    expected = case.sum_by_element({name: p.detach().square() for name, _, p in case.parameters()})
    np.testing.assert_allclose(scores.mean, expected, rtol=1e-12)
    assert (scores.std_error == 0).all()


def test_magnitude_leaves_out_followers_of_other_nodes() -> None:
    case = shared_case()  # b0 follows at Add
    w0, w = (case.twin.parameter_of[name].detach().square().sum(0) for name in ("w0", "w"))
    elements = next(x.elements for x in case.coupling.weights if (x.initializer, x.axis) == ("w0", 1))
    np.testing.assert_allclose(magnitude(case.twin, case.coupling).mean[elements], (w0 + w).numpy())


def test_random_follows_the_seed() -> None:
    coupling = conv_case().coupling
    assert np.array_equal(random(coupling, 1).mean, random(coupling, 1).mean)
    assert not np.array_equal(random(coupling, 1).mean, random(coupling, 2).mean)


# --- all alike ----------------------------------------------------------------------------------


def test_estimate_finds_every_sensitivity_by_name() -> None:
    case = conv_case(labels=True)
    for name in SENSITIVITIES:
        options = replace(case.options, n_probes=8, seed=3)
        scores = estimate(name, case.twin, case.coupling, case.subset, options=options)
        again = estimate(name, case.twin, case.coupling, case.subset, options=options)
        assert scores.name == name
        assert scores.mean.shape == scores.std_error.shape == (7,)
        assert scores.mean.dtype == scores.std_error.dtype == np.float64
        assert not scores.mean.flags.writeable
        np.testing.assert_array_equal(scores.mean, again.mean)
        np.testing.assert_array_equal(scores.std_error, again.std_error)
        if name != "magnitude":
            options = replace(options, seed=4)
            other = estimate(name, case.twin, case.coupling, case.subset, options=options)
            assert not np.array_equal(scores.mean, other.mean)
    with pytest.raises(UsageError, match="hutchinson, gauss-newton, gate"):
        estimate("taylor", case.twin, case.coupling, case.subset)


@pytest.mark.parametrize("loss", ["distance", "cross-entropy"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_scores_do_not_depend_on_the_batches(estimator, loss: str) -> None:
    case = conv_case(n_out=3, labels=True)
    results = [
        estimator(
            case.twin,
            case.coupling,
            case.subset,
            replace(case.options, batch_size=n, n_probes=8, n_directions=2, loss=loss),
        )
        for n in (1, 5, N, 64)
    ]
    for other in results[1:]:
        np.testing.assert_allclose(other.mean, results[0].mean, rtol=1e-8)
        np.testing.assert_allclose(other.std_error, results[0].std_error, rtol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_twin_is_left_as_it_was(estimator) -> None:
    case = conv_case()
    case.twin.train()
    case.twin.parameter_of["w2"].requires_grad_(False)
    state = torch.random.get_rng_state()
    estimator(case.twin, case.coupling, case.subset, replace(case.options, n_probes=8))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert case.twin.training
    for name, parameter in case.twin.parameter_of.items():
        assert parameter.requires_grad == (name != "w2")
        assert parameter.grad is None
    with pytest.raises(CalibrationError):
        estimator(case.twin, case.coupling, case.subset, replace(case.options, scales={}))
    assert not case.twin.parameter_of["w2"].requires_grad


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_progress_is_reported(estimator) -> None:
    case = conv_case()
    events: list[Event] = []
    options = replace(case.options, n_probes=8, on_event=events.append)
    estimator(case.twin, case.coupling, case.subset, options)
    assert {event.stage for event in events} == {"sensitivity"}
    assert [event.kind for event in events] == ["start", *["advance"] * (events[0].total or 0), "end"]
    assert events[0].total == (8 if estimator is hutchinson else 3)


def test_several_outputs_count_alike_and_constant_ones_do_not() -> None:
    model = make_model(
        [
            node("MatMul", ["x", "w1"], ["a"]),
            node("MatMul", ["a", "w2"], ["y"]),
            node("Mul", ["y", "thousand"], ["z"]),
            node("Mul", ["y", "zero"], ["nothing"]),
            node("ArgMax", ["y"], ["best"], axis=1),
        ],
        inputs={"x": ["N", 3]},
        outputs=["y", "z", "nothing", "best"],
        weights={
            "w1": rand(3, 4),
            "w2": rand(4, 1, seed=1),
            "thousand": np.float32([1000]),
            "zero": np.float32([0]),
        },
    )
    case = make_case(model, {"x": (3,)}, owned=[("w1", 1)])
    scores = hutchinson(case.twin, case.coupling, case.subset, replace(case.options, n_probes=100))
    check_covers(scores, case.relative(distance_diagonal(case)), largest=1)
    check_covers(
        gate(case.twin, case.coupling, case.subset, replace(case.options, n_directions=200)),
        gate_by_differences(case),
    )


# --- models that do not fit -----------------------------------------------------------------------


def test_a_model_that_takes_single_samples_only() -> None:
    """The batch is written into a Reshape that turns it into channels' neighbours: one sample at a time."""

    def make(batch: int | str, rows: list[int]) -> Case:
        model = make_model(
            [
                node("MatMul", ["x", "w1"], ["a"]),
                node("Tanh", ["a"], ["b"]),
                node("ReduceSum", ["b", "all"], ["total"], keepdims=1),  # mixes the samples of a batch
                node("Mul", ["b", "total"], ["c"]),
                node("MatMul", ["c", "w2"], ["y"]),
            ]
            if batch == 1
            else [
                node("MatMul", ["x", "w1"], ["a"]),
                node("Tanh", ["a"], ["b"]),
                node("Mul", ["b", "b"], ["c"]),
                node("MatMul", ["c", "w2"], ["y"]),
            ],
            inputs={"x": [batch, 3]},
            outputs=["y"],
            weights={"w1": rand(3, 4), "w2": rand(4, 1, seed=1), "all": np.array(rows)},
        )
        return make_case(model, {"x": (3,)}, owned=[("w1", 1)])

    fixed, free = make(1, [0]), make("N", [0])
    for estimator in ESTIMATORS:
        a, b = (
            estimator(case.twin, case.coupling, case.subset, replace(case.options, n_probes=8))
            for case in (fixed, free)
        )
        assert fixed.twin.batch_limit == 1
        np.testing.assert_allclose(a.mean, b.mean, rtol=1e-8)


def test_elements_behind_an_opaque_node_are_kept() -> None:
    model = make_model(
        [
            node("MatMul", ["x", "w1"], ["a"]),
            node("MatMul", ["a", "w2"], ["b"]),
            node("Mul", ["b", "b"], ["squared"]),
            node("SequenceConstruct", ["squared"], ["parts"]),
            node("ConcatFromSequence", ["parts"], ["c"], axis=0),
            node("MatMul", ["c", "w3"], ["d"]),
            node("MatMul", ["d", "w4"], ["y"]),
        ],
        inputs={"x": ["N", 3]},
        outputs=["y"],
        weights={
            "w1": rand(3, 4),
            "w2": rand(4, 2, seed=1),
            "w3": rand(2, 5, seed=2),
            "w4": rand(5, 2, seed=3),
        },
    )
    case = make_case(model, {"x": (3,)}, owned=[("w1", 1), ("w3", 1)])
    hidden, seen = (
        next(w.elements for w in case.coupling.weights if (w.initializer, w.axis) == (name, 1))
        for name in ("w1", "w3")
    )
    for estimator in ESTIMATORS:
        events: list[Event] = []
        options = replace(case.options, n_probes=8, on_event=events.append)
        scores = estimator(case.twin, case.coupling, case.subset, options)
        assert np.isinf(scores.mean[hidden]).all()
        assert np.isfinite(scores.mean[seen]).all()
        assert (scores.mean[seen] != 0).all()
        n_hidden = int(np.isinf(scores.mean).sum())
        assert [event.message for event in events if event.kind == "warning"] == [
            f"no gradient reaches {n_hidden} channels, so they are kept"
        ]


def test_a_model_without_elements_has_no_scores() -> None:
    model = make_model(
        [node("MatMul", ["x", "w"], ["y"])],
        inputs={"x": ["N", 3]},
        outputs=["y"],
        weights={"w": rand(3, 2)},
    )
    case = make_case(model, {"x": (3,)}, owned=[])
    for name in SENSITIVITIES:
        scores = estimate(name, case.twin, case.coupling, case.subset)
        assert scores.mean.shape == scores.std_error.shape == (0,)


def test_data_that_does_not_fit_is_refused() -> None:
    case = conv_case(labels=False)
    one = case.subset.take(1)
    with pytest.raises(CalibrationError, match="no float output varies over 1 sample"):
        gate(case.twin, case.coupling, one, Options())
    with pytest.raises(CalibrationError, match="needs labels"):
        hutchinson(case.twin, case.coupling, case.subset, Options(loss="cross-entropy"))
    wrong = conv_case(n_out=2, labels=True)
    wrong.subset.dataset.labels[0] = 7
    with pytest.raises(CalibrationError, match="labels run from 0 to 7"):
        hutchinson(wrong.twin, wrong.coupling, wrong.subset, Options())
    flat = sequence_case()
    with pytest.raises(CalibrationError, match=r"class scores \[N, C\]"):
        gauss_newton(flat.twin, flat.coupling, flat.subset, Options(loss="cross-entropy"))
    with pytest.raises(UsageError, match="unknown loss"):
        Options(loss="l2")
    with pytest.raises(UsageError, match="at least 1"):
        Options(n_probes=0)


# --- when to stop ---------------------------------------------------------------------------------


def group(elements: Sequence[int]) -> ChannelGroup:
    return ChannelGroup("g", np.array(elements, np.int64), (), (), ())


def test_misplaced_share_is_the_chance_to_be_in_the_wrong_half() -> None:
    mean, exact = np.array([0.0, 1.0, 2.0, 3.0, 9.0]), np.zeros(5)
    groups = [group([0, 1, 2, 3]), group([4])]
    assert misplaced_share(groups, mean, exact) == 0
    assert misplaced_share(groups, mean, np.full(5, 1e9)) == pytest.approx(0.5)
    # Phi(-1.5) of the outer two and Phi(-0.5) of the inner two.
    assert misplaced_share(groups, mean, np.ones(5)) == pytest.approx((0.0668 + 0.3085) / 2, abs=1e-3)
    assert misplaced_share([group([4])], mean, np.ones(5)) == 0


def test_misplaced_share_predicts_how_often_halves_are_wrong() -> None:
    rng = np.random.default_rng(0)
    truth, error = rng.normal(size=40), np.full(40, 0.3)
    everyone = group(range(40))
    lower = np.isin(np.arange(40), np.argsort(truth)[:20])
    predicted, wrong = [], []
    for _ in range(200):
        mean = truth + rng.normal(size=40) * error
        predicted.append(misplaced_share([everyone], mean, error))
        wrong.append(float((np.isin(np.arange(40), np.argsort(mean)[:20]) != lower).mean()))
    assert np.mean(predicted) == pytest.approx(np.mean(wrong), abs=0.03)


def test_hutchinson_stops_when_the_ranking_is_settled() -> None:
    case = conv_case()
    used = [
        hutchinson(
            case.twin, case.coupling, case.subset, replace(case.options, n_probes=64, tolerance=tolerance)
        )
        for tolerance in (1.0, 0.1, 0.0)
    ]
    assert used[0].n_probes == MIN_PROBES
    assert used[0].n_probes <= used[1].n_probes <= used[2].n_probes == 64
    assert misplaced_share(case.coupling.groups, used[1].mean, used[1].std_error) <= 0.1
