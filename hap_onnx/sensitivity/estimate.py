"""Sensitivity: one score per channel element, the loss that its removal is expected to cost.

    scores = estimate("gate", twin, coupling, subset, options=Options(graph=graph, seed=0))
    scores.mean, scores.std_error                            # float64 [coupling.n_elements]

The estimators and the loss that they expand:

* ``hutchinson``: the relative Hessian trace of HAP (Yu et al., arXiv 2101.08940), by products of the Hessian
  with random signs.
* ``gauss-newton``: the same trace of the Gauss-Newton matrix, from gradients of random output directions.
* ``gate``: the Gauss-Newton cost of switching the element off wherever a contraction reads it.
* ``magnitude`` (squared L2 norm) and ``random``, for comparison.

The loss is ``distance``, half the mean squared distance of the outputs to those of the original, each output
relative to how much it varies (see ``curvature.output_scales``), or ``cross-entropy``. At the original the
distance has no residual, so its Hessian *is* the Gauss-Newton matrix, and the first two estimate one number.

The parameters of an element are its slices of *producer* weights, and of the 1-d initializers that follow at
the same nodes: the filters with bias. Biases that other nodes add (MatMul, then Add) and parameters of
normalisations belong to those nodes and are not counted; neither are the slices of consumers, since one
removal would then count twice.

An element that no gradient reaches, because only onnxruntime runs a node between it and the outputs, scores
infinity: nothing is known about it, so it stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor

from hap_onnx.coupling.channels import ChannelGroup, Coupling, WeightAxis
from hap_onnx.data.calibration import Batch, Subset
from hap_onnx.distributed import ALONE, Team
from hap_onnx.errors import CalibrationError, ModelError, UsageError
from hap_onnx.events import Event, OnEvent, ignore_event, track
from hap_onnx.ops.linear import LinearForm, linear_form
from hap_onnx.sensitivity.curvature import output_scales, to_tensors
from hap_onnx.sensitivity.hessian import Moments, Tensors, hutchinson_traces, mean_hvps, random_signs
from hap_onnx.twin import Step, Twin, probe_shapes, unfix_batch

STAGE = "sensitivity"
_SCALE_SAMPLES = 256  # a scale needs no more
_CHUNK_NUMBERS = 1 << 20  # of per-sample gradients or patches at once

Loss = Literal["auto", "cross-entropy", "distance"]


@dataclass(frozen=True)
class ElementScores:
    """Scores of all elements: ``mean`` and ``std_error``, read-only float64 [n_elements].

    ``n_probes`` counts the random vectors behind each score (samples times directions, where each sample has
    its own). The error is that of the random vectors; where each sample has its own directions it includes
    how samples differ.
    """

    name: str
    mean: NDArray[np.float64]
    std_error: NDArray[np.float64]
    n_probes: int

    def __post_init__(self) -> None:
        for key in ("mean", "std_error"):
            array = np.array(getattr(self, key), np.float64)
            array.setflags(write=False)
            object.__setattr__(self, key, array)


@dataclass(frozen=True)
class Options:
    """What the estimators may be told; each takes what it needs.

    Attributes:
        graph: what the twin was built from. It lets ``gauss-newton`` tell samples apart within a batch;
            without it the error is larger.
        loss: ``auto`` is cross-entropy in ``hutchinson`` if there are labels and one output of class scores,
            distance in all other cases.
        scales: of the outputs, for the distance; by default from the first samples.
        n_probes: most random vectors of ``hutchinson``.
        n_directions: random output directions per sample of ``gauss-newton`` and ``gate``.
        tolerance: ``hutchinson`` stops when the expected share of elements that are on the wrong side of the
            middle of their group is at most this (see :func:`misplaced_share`); 0 uses all probes.
        team: the processes that share the samples.
    """

    graph: gs.Graph | None = None
    loss: Loss = "auto"
    scales: Mapping[str, float] | None = None
    n_probes: int = 300
    n_directions: int = 1
    batch_size: int = 64
    seed: int = 0
    tolerance: float = 0.05
    team: Team = field(default=ALONE, repr=False)
    on_event: OnEvent = field(default=ignore_event, repr=False)

    def __post_init__(self) -> None:
        if self.loss not in ("auto", "cross-entropy", "distance"):
            raise UsageError(f"unknown loss {self.loss!r}; choose auto, cross-entropy or distance")
        if min(self.n_probes, self.n_directions, self.batch_size) < 1:
            raise UsageError("n_probes, n_directions and batch_size must be at least 1")


_DEFAULTS = Options()

# --- the estimators ---


def hutchinson(twin: Twin, coupling: Coupling, subset: Subset, options: Options = _DEFAULTS) -> ElementScores:
    """Score element e by ``S_e = Tr(H_ee) / (2 p_e) * ||w_e||^2`` (the paper's relative Hessian trace).

    p_e is the number of its parameters w_e. The trace is that of the whole data's Hessian, estimated by
    Hutchinson's method; it may come out negative, more so with cross-entropy.

    Raises CalibrationError when the data does not fit the loss.
    """
    if not coupling.n_elements:
        return _no_elements("hutchinson")
    slices = _element_slices(twin, coupling)
    names = list(dict.fromkeys(part.initializer for part in slices))
    survey = _survey(twin, coupling, subset, slices, options)
    if not survey.reached.any():
        return _finish("hutchinson", [], survey, 0)
    with_labels = options.loss == "cross-entropy" or (options.loss == "auto" and subset.labels is not None)
    objective = _make_objective(twin, subset, survey, options, cross_entropy=with_labels)
    parameters = [twin.parameter_of[name] for name in names]
    factor = _relative_factor(twin, coupling, slices)

    def losses() -> Iterator[tuple[Tensor, int]]:
        for batch in options.team.batches(subset, survey.batch_size):
            inputs, labels, n = _unpack(twin, batch)
            yield objective.loss(twin(inputs), labels) / n, n

    def reduce(diagonal: Tensors) -> Tensor:
        return factor * _sum_by_element(dict(zip(names, diagonal, strict=True)), slices, factor)

    def settled(moments: Moments) -> bool:
        mean, error = moments.mean.cpu().numpy(), moments.std_error.cpu().numpy()
        # Each machine rounds in its own way, and all have to end after the same probe.
        return options.team.agree(misplaced_share(coupling.groups, mean, error) <= options.tolerance)

    options.on_event(Event(STAGE, "start", total=options.n_probes))
    try:
        with _borrowed(twin, names):
            moments = hutchinson_traces(
                lambda vectors: mean_hvps(losses(), parameters, vectors, team=options.team),
                parameters,
                n_probes=options.n_probes,
                generator=torch.Generator().manual_seed(options.seed),
                reduce=reduce,
                settled=settled if options.tolerance > 0 else None,
                on_probe=lambda: options.on_event(Event(STAGE, "advance")),
            )
    finally:
        options.on_event(Event(STAGE, "end"))
    return _finish("hutchinson", [(moments.mean, moments.std_error)], survey, moments.n)


def gauss_newton(
    twin: Twin, coupling: Coupling, subset: Subset, options: Options = _DEFAULTS
) -> ElementScores:
    """Score element e by ``Tr(J_e^T M J_e) / (2 p_e) * ||w_e||^2``, without second derivatives.

    With directions v of covariance M (that of the loss over the outputs), independent for every sample, the
    gradient g = J^T v has E[g g^T] = J^T M J, so squared gradients of each sample are unbiased: one forward
    and backward pass for each batch. M of ``cross-entropy`` is diag(p) - p p^T, the Fisher matrix of the
    model's own class probabilities p: no labels are needed.

    Gradients of single samples come from the matrix form of a node. Weights without one, or that several
    nodes share, use the squared gradient of the batch: the cross terms of independent samples vanish in the
    mean, so this is unbiased too, but one batch is then one observation.

    Raises CalibrationError when the data does not fit the loss.
    """
    if not coupling.n_elements:
        return _no_elements("gauss-newton")
    slices = _element_slices(twin, coupling)
    survey = _survey(twin, coupling, subset, slices, options)
    forms = {} if options.graph is None else linear_forms(options.graph)
    layers, rest = _split_linear(twin, slices, forms, survey)
    factor = _relative_factor(twin, coupling, slices)
    with _borrowed(twin, {part.initializer for part in rest}):
        parts = _sweep(twin, subset, survey, options, lambda n: _Gradients(twin, layers, rest, factor, n))
    return _finish("gauss-newton", parts, survey, options.n_directions * subset.n_samples)


def gate(twin: Twin, coupling: Coupling, subset: Subset, options: Options = _DEFAULTS) -> ElementScores:
    """Score element e by ``E[(sum of x * dL/dx over all its reads and positions)^2] / 2``.

    This is the second-order cost of a gate at every contraction that reads the element, closed from 1 to 0:
    the derivative of the outputs along the gate is J x summed over all reads of a sample, so the sum comes
    before the square. L is a random output direction as in :func:`gauss_newton`; ``cross-entropy`` means
    the Fisher matrix here too. Costs one forward pass and one backward pass to activations for each batch.

    Raises CalibrationError when the data does not fit the loss.
    """
    if not coupling.n_elements:
        return _no_elements("gate")
    survey = _survey(twin, coupling, subset, _element_slices(twin, coupling), options)
    reads = _gate_reads(coupling, survey, twin.device)
    with _borrowed(twin, ()):
        parts = _sweep(
            twin, subset, survey, options, lambda n: _Gates(reads, coupling.n_elements, n, twin.device)
        )
    return _finish("gate", parts, survey, options.n_directions * subset.n_samples)


def magnitude(twin: Twin, coupling: Coupling) -> ElementScores:
    """Score each element by the squared L2 norm of its parameters (exact)."""
    _, norms = _count_and_norm(twin, coupling, _element_slices(twin, coupling))
    return ElementScores("magnitude", norms.cpu().numpy(), np.zeros(coupling.n_elements), 0)


def random(coupling: Coupling, seed: int) -> ElementScores:
    """Score elements by chance, uniform in [0, 1)."""
    scores = np.random.default_rng(seed).random(coupling.n_elements)
    return ElementScores("random", scores, np.zeros(coupling.n_elements), 0)


Estimator = Callable[[Twin, Coupling, Subset, Options], ElementScores]

SENSITIVITIES: Mapping[str, Estimator] = MappingProxyType(
    {
        "hutchinson": hutchinson,
        "gauss-newton": gauss_newton,
        "gate": gate,
        "magnitude": lambda twin, coupling, subset, options: magnitude(twin, coupling),
        "random": lambda twin, coupling, subset, options: random(coupling, options.seed),
    }
)


def estimate(
    name: str, twin: Twin, coupling: Coupling, subset: Subset, *, options: Options = _DEFAULTS
) -> ElementScores:
    """Score all elements by the estimator of that name; raises UsageError for an unknown one."""
    if name not in SENSITIVITIES:
        raise UsageError(f"unknown sensitivity {name!r}; choose one of {', '.join(SENSITIVITIES)}")
    return SENSITIVITIES[name](twin, coupling, subset, options)


def linear_forms(graph: gs.Graph) -> dict[str, LinearForm]:
    """Return the matrix form of each node that has one, by node name."""
    forms = {}
    for node in graph.nodes:
        form = linear_form(node)
        if form is not None:
            forms[node.name] = form
    return forms


def misplaced_share(
    groups: Sequence[ChannelGroup], mean: NDArray[np.float64], std_error: NDArray[np.float64]
) -> float:
    """Return the expected share of elements that are in the wrong half of their group.

    The border of a group is midway between the lower half of the means and the upper; an element whose mean
    is d from it with standard error s is really on the other side with probability Phi(-d / s). Groups of
    one element have no order and do not count.
    """
    total, n = 0.0, 0
    for group in groups:
        if group.size < 2:
            continue
        m, s = mean[group.elements], std_error[group.elements]
        ranked = np.sort(m)
        border = ranked[group.size // 2 - 1 : group.size // 2 + 1].mean()
        distance = np.abs(m - border)
        # A score without any error (of a dead channel) is where it is.
        z = np.divide(distance, s, out=np.full_like(distance, np.inf), where=s > 0)
        total += float(ndtr(-z).sum())
        n += group.size
    return total / n if n else 0.0


# --- parameters of elements ---


@dataclass(frozen=True)
class _Slice:
    """An axis of an initializer whose positions belong to elements [axis length], or to none (-1)."""

    initializer: str
    axis: int
    elements: Tensor


def _element_slices(twin: Twin, coupling: Coupling) -> list[_Slice]:
    """Return producer weights and the biases that follow at the same nodes."""
    producing = {
        node
        for weight in coupling.weights
        if weight.role == "producer"
        for node in coupling.initializer_nodes[weight.initializer]
    }

    def owned(weight: WeightAxis) -> bool:
        if weight.role == "producer":
            return True
        shape = twin.constant(weight.initializer).shape
        is_vector = math.prod(shape) == shape[weight.axis]
        users = coupling.initializer_nodes[weight.initializer]
        return weight.role == "follower" and is_vector and any(node in producing for node in users)

    return [
        _Slice(weight.initializer, weight.axis, torch.from_numpy(np.array(weight.elements)).to(twin.device))
        for weight in coupling.weights
        if weight.initializer in twin.parameter_of and owned(weight)
    ]


def _sum_by_element(values: Mapping[str, Tensor], slices: Sequence[_Slice], like: Tensor) -> Tensor:
    """Sum values of parameters over each element's slices: float64 as ``like`` [n_elements]."""
    result = torch.zeros_like(like)
    for part in slices:
        if part.initializer not in values:
            continue
        value = values[part.initializer]
        sums = value.double().movedim(part.axis, 0).reshape(len(part.elements), -1).sum(1)
        known = part.elements >= 0
        result.index_add_(0, part.elements[known], sums[known])
    return result


def _count_and_norm(twin: Twin, coupling: Coupling, slices: Sequence[_Slice]) -> tuple[Tensor, Tensor]:
    """Number of parameters and squared norm of each element, float64 [n_elements]."""
    zeros = torch.zeros(coupling.n_elements, dtype=torch.float64, device=twin.device)
    weights = {part.initializer: twin.constant(part.initializer).detach() for part in slices}
    counts = _sum_by_element({name: torch.ones_like(w) for name, w in weights.items()}, slices, zeros)
    norms = _sum_by_element({name: w.double().square() for name, w in weights.items()}, slices, zeros)
    return counts, norms


def _relative_factor(twin: Twin, coupling: Coupling, slices: Sequence[_Slice]) -> Tensor:
    """``||w_e||^2 / (2 p_e)``: what turns a trace into a score."""
    counts, norms = _count_and_norm(twin, coupling, slices)
    return norms / (2 * counts.clamp_min(1))


# --- the loss ---


class _Draw:
    """One random stream per output and probe: what a sample draws does not depend on the batches."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._streams: dict[tuple[int, int], torch.Generator] = {}

    def stream(self, output: int, probe: int) -> torch.Generator:
        key = (output, probe)
        if key not in self._streams:
            entropy = np.random.SeedSequence([self._seed, output, probe])
            self._streams[key] = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
        return self._streams[key]


@dataclass(frozen=True)
class _Distance:
    """Half the squared distance of the outputs to what they are, each times its scale."""

    scales: Mapping[str, float]

    def loss(self, outputs: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        """Sum over the samples; zero with zero gradient, what matters is its curvature."""
        terms = [
            0.5 * scale**2 * (outputs[name] - outputs[name].detach()).square().sum()
            for name, scale in self.scales.items()
        ]
        return torch.stack(terms).sum()

    def directions(
        self, outputs: Mapping[str, Tensor], draw: _Draw, probe: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Pair each output with random signs times its scale: their covariance is the loss' Hessian."""
        return [
            (y, random_signs(y.shape, draw.stream(index, probe)).to(y) * scale)
            for index, (y, scale) in enumerate((outputs[name], scale) for name, scale in self.scales.items())
        ]


@dataclass(frozen=True)
class _CrossEntropy:
    """Cross-entropy of one output of class scores [N, C]; probabilities are turned into their logarithms."""

    output: str
    of_probabilities: bool

    def _logits(self, outputs: Mapping[str, Tensor]) -> Tensor:
        scores = outputs[self.output]
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log() if self.of_probabilities else scores

    def loss(self, outputs: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        """Sum over the samples."""
        logits = self._logits(outputs)
        if labels is None:
            raise CalibrationError("the loss cross-entropy needs labels, and this part of the data has none")
        n_classes = logits.shape[1]
        if int(labels.min()) < 0 or int(labels.max()) >= n_classes:
            raise CalibrationError(
                f"labels run from {int(labels.min())} to {int(labels.max())}, but output {self.output!r} has "
                f"{n_classes} classes; give labels from 0 to {n_classes - 1}"
            )
        return F.cross_entropy(logits, labels.to(logits.device), reduction="sum")

    def directions(
        self, outputs: Mapping[str, Tensor], draw: _Draw, probe: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Pair the logits with p - onehot(k), k drawn from p: its covariance is diag(p) - p p^T."""
        logits = self._logits(outputs)
        p = logits.detach().softmax(1)
        chance = torch.rand(len(p), 1, generator=draw.stream(0, probe), dtype=torch.float64).to(p.device)
        drawn = (p.double().cumsum(1) < chance).sum(1).clamp_max(p.shape[1] - 1)
        return [(logits, p - F.one_hot(drawn, p.shape[1]))]


def _make_objective(
    twin: Twin, subset: Subset, survey: _Survey, options: Options, *, cross_entropy: bool
) -> _Distance | _CrossEntropy:
    """Choose the loss; cross-entropy, where it is not asked for by name, only if the outputs allow it."""
    if cross_entropy:
        inputs, _, n = next(_batches(twin, subset.take(twin.batch_limit or 2), survey.batch_size))
        with torch.no_grad():
            found = {name: y for name, y in twin(inputs).items() if y.is_floating_point()}
        fits = [name for name, y in found.items() if y.ndim == 2 and len(y) == n and y.shape[1] >= 2]
        if len(found) == len(fits) == 1:
            scores = found[fits[0]].double()
            sums_to_one = bool((scores >= 0).all()) and bool(((scores.sum(1) - 1).abs() < 1e-3).all())
            return _CrossEntropy(fits[0], sums_to_one)
        if options.loss == "cross-entropy":
            shapes = {name: tuple(y.shape) for name, y in found.items()}
            raise CalibrationError(
                f"the loss cross-entropy needs one float output of class scores [N, C], got {shapes}; "
                "use the loss distance"
            )
    scales = options.scales
    if scales is None:
        scales = output_scales(_numpy_outputs(twin, subset.take(_SCALE_SAMPLES), survey.batch_size))
    if not scales:
        raise CalibrationError(
            f"no float output varies over {min(subset.n_samples, _SCALE_SAMPLES)} sample(s), so nothing can "
            "be said about sensitivity; give more and different samples"
        )
    return _Distance(scales)


@torch.no_grad()
def _numpy_outputs(twin: Twin, subset: Subset, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    for inputs, _, _ in _batches(twin, subset, batch_size):
        yield {name: y.cpu().numpy() for name, y in twin(inputs).items() if isinstance(y, Tensor)}


# --- running the twin ---


@contextmanager
def _borrowed(twin: Twin, trainable: Collection[str]) -> Iterator[None]:
    """Evaluation mode, gradients for the ``trainable`` parameters only; all as before in the end."""
    training = twin.training
    before = {name: parameter.requires_grad for name, parameter in twin.parameter_of.items()}
    twin.train(False)
    try:
        for name, parameter in twin.parameter_of.items():
            parameter.requires_grad_(name in trainable)
        with torch.enable_grad():
            yield
    finally:
        for name, parameter in twin.parameter_of.items():
            parameter.requires_grad_(before[name])
        twin.train(training)


def _batches(
    twin: Twin, subset: Subset, batch_size: int
) -> Iterator[tuple[dict[str, Tensor], Tensor | None, int]]:
    """Yield (inputs, labels, number of samples)."""
    for batch in subset.batches(batch_size):
        yield _unpack(twin, batch)


def _unpack(twin: Twin, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None, int]:
    labels = None if batch.labels is None else torch.from_numpy(np.array(batch.labels))
    return to_tensors(batch.inputs, twin), labels, len(next(iter(batch.inputs.values())))


@dataclass(frozen=True)
class _Survey:
    """What two small batches tell.

    ``sample_axis``: the axis of each tensor that runs over samples, one position each; tensors that are not
    laid out like that are missing. ``reached``: bool [n_elements], whether a gradient arrives.
    ``batch_size``: what is asked for, or what the twin takes at once if that is less.
    """

    sample_axis: Mapping[str, int]
    reached: NDArray[np.bool_]
    batch_size: int


def _survey(
    twin: Twin, coupling: Coupling, subset: Subset, slices: Sequence[_Slice], options: Options
) -> _Survey:
    first = next(subset.take(3).batches(3)).inputs

    def some(n: int) -> dict[str, Tensor]:
        return to_tensors({name: x[np.arange(n) % len(x)] for name, x in first.items()}, twin)

    if unfix_batch(twin, some(2)):
        sample_axis, n_at_once = _sample_axes(probe_shapes(twin, some(2)), probe_shapes(twin, some(3))), None
    else:
        sample_axis, n_at_once = {}, twin.batch_limit
    with _borrowed(twin, {part.initializer for part in slices}):
        reached = _reached(twin, coupling, some(n_at_once or 2), slices)
    if not reached.all():
        text = f"no gradient reaches {int((~reached).sum())} channels, so they are kept"
        options.on_event(Event(STAGE, "warning", text))
    return _Survey(sample_axis, reached, min(options.batch_size, n_at_once or options.batch_size))


def _sample_axes(two: Mapping[str, tuple[int, ...]], three: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Find the one axis that differs between batches of two and of three samples, where it counts them."""
    axes = {}
    for name, shape in two.items():
        sizes = list(zip(shape, three.get(name, ()), strict=False))
        differing = [axis for axis, (a, b) in enumerate(sizes) if a != b]
        if len(differing) == 1 and sizes[differing[0]] == (2, 3):
            axes[name] = differing[0]
    return axes


def _reached(
    twin: Twin, coupling: Coupling, inputs: Mapping[str, Tensor], slices: Sequence[_Slice]
) -> NDArray[np.bool_]:
    """Say which elements have parameters that a gradient arrives at, in a twin whose parameters want one."""
    names = list(dict.fromkeys(part.initializer for part in slices))
    outputs = [y for y in twin(inputs).values() if isinstance(y, Tensor) and y.requires_grad]
    reached = np.zeros(coupling.n_elements, bool)
    if not outputs:
        return reached
    gradients = torch.autograd.grad(
        outputs,
        [twin.parameter_of[name] for name in names],
        grad_outputs=[torch.ones_like(y) for y in outputs],
        allow_unused=True,
    )
    arrived = {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    for part in slices:
        if part.initializer in arrived:
            elements = part.elements.cpu().numpy()
            reached[elements[elements >= 0]] = True
    return reached


Part = tuple[Tensor, Tensor]
"""(mean, standard error) of one additive part of the scores, float64 [n_elements]."""


def _sweep(
    twin: Twin,
    subset: Subset,
    survey: _Survey,
    options: Options,
    make_watcher: Callable[[int], _Gates | _Gradients],
) -> list[Part]:
    """Pass over the data once, with random directions for each sample and a backward pass for each direction.

    Returns two parts: what was observed for single samples, and for whole batches.
    """
    objective = _make_objective(twin, subset, survey, options, cross_entropy=options.loss == "cross-entropy")
    draw = _Draw(options.seed)
    seen: tuple[Moments, Moments] | None = None  # of samples and of batches
    dealt = options.team.deal(subset, survey.batch_size)
    n_batches = -(-subset.n_samples // survey.batch_size)
    alike: dict[int, dict[str, Tensor]] = {}  # outputs by the number of samples, without their numbers
    for n, batch in track(dealt, stage=STAGE, total=n_batches, on_event=options.on_event):
        if batch is None:  # another process runs it: draw what it draws
            if n not in alike:
                alike[n] = _empty_outputs(twin, subset, n)
            for direction in range(options.n_directions):
                objective.directions(alike[n], draw, direction)
            continue
        inputs, _, _ = _unpack(twin, batch)
        watcher = make_watcher(n)
        outputs = twin(inputs, on_read=watcher.on_read, on_write=watcher.on_write)
        for direction in range(options.n_directions):
            pairs = [(y, v) for y, v in objective.directions(outputs, draw, direction) if y.requires_grad]
            wanted = watcher.wanted()
            if not pairs or not wanted:
                break
            gradients = torch.autograd.grad(
                [y for y, _ in pairs],
                wanted,
                grad_outputs=[v for _, v in pairs],
                retain_graph=direction < options.n_directions - 1,
                allow_unused=True,
            )
            per_sample, whole = watcher.harvest(gradients)  # [n, n_elements], [n_elements]
            if seen is None:
                seen = Moments(len(whole), device=whole.device), Moments(len(whole), device=whole.device)
            seen[0].add(per_sample)
            seen[1].add(whole[None], weight=n)
        del watcher, outputs, pairs  # the graph goes before the next batch
    everyone = [one for one in options.team.gather(seen) if one is not None]
    for more in everyone[1:]:
        for moments, others in zip(everyone[0], more, strict=True):
            moments.merge(others)
    # Elements of which a part knows nothing have a mean of zero there, and no error.
    return [
        (part.mean, torch.where(part.mean == 0, torch.zeros_like(part.mean), part.std_error))
        for one in everyone[:1]
        for part in one
    ]


def _empty_outputs(twin: Twin, subset: Subset, n: int) -> dict[str, Tensor]:
    """Return zeros with the shapes of the outputs for ``n`` samples."""
    with torch.no_grad():
        outputs = twin(_unpack(twin, next(iter(subset.batches(n))))[0])
    return {
        name: y.new_zeros(()).expand(y.shape) for name, y in outputs.items() if isinstance(y, Tensor)
    }


def _finish(name: str, parts: Sequence[Part], survey: _Survey, n_probes: int) -> ElementScores:
    """Add the parts; their errors add up too, an upper bound since parts may be correlated."""
    mean, error = np.zeros(len(survey.reached)), np.zeros(len(survey.reached))
    for part_mean, part_error in parts:
        mean += part_mean.cpu().numpy()
        error += part_error.cpu().numpy()
    if np.isnan(mean).any():
        raise ModelError(
            f"the {name} sensitivity of {int(np.isnan(mean).sum())} channels is not a number: the "
            "model's outputs or gradients overflow on this data; check the preprocessing"
        )
    mean[~survey.reached], error[~survey.reached] = np.inf, 0.0
    return ElementScores(name, mean, error, n_probes)


def _no_elements(name: str) -> ElementScores:
    return ElementScores(name, np.zeros(0), np.zeros(0), 0)


# --- gates ---


@dataclass(frozen=True)
class _GateRead:
    """A read: its channel axis, its sample axis (None if there is no such thing), and who is where."""

    axis: int
    sample_axis: int | None
    positions: Tensor
    elements: Tensor  # of these positions


@dataclass(frozen=True)
class _GateReads:
    """``by_batch``: bool [n_elements], elements with a read whose samples cannot be told apart."""

    reads: Mapping[tuple[str, int], _GateRead]
    by_batch: Tensor


def _gate_reads(coupling: Coupling, survey: _Survey, device: torch.device | None) -> _GateReads:
    reads = {}
    by_batch = torch.zeros(coupling.n_elements, dtype=torch.bool, device=device)
    for read in coupling.reads:
        positions = torch.from_numpy(np.flatnonzero(read.elements >= 0)).to(device)
        elements = torch.from_numpy(np.array(read.elements)).to(device)[positions]
        axis = survey.sample_axis.get(read.tensor)
        reads[(read.node, read.index)] = _GateRead(read.axis, axis, positions, elements)
        if axis is None:
            by_batch[elements] = True
    return _GateReads(reads, by_batch)


class _Gates:
    """Sums activation x gradient over the reads of one batch of n samples."""

    def __init__(self, reads: _GateReads, n_elements: int, n: int, device: torch.device | None) -> None:
        self._reads, self._n = reads, n
        self._leaves: list[Tensor] = []
        self._sums = torch.zeros(n, n_elements, dtype=torch.float64, device=device)
        self._total = torch.zeros(n_elements, dtype=torch.float64, device=device)

    def on_read(self, step: Step, index: int, tensor: Tensor) -> Tensor:
        read = self._reads.reads.get((step.name, index))
        if read is None:
            return tensor
        if not tensor.requires_grad:  # nothing before this read has to be differentiated
            tensor = tensor.detach().requires_grad_()
            self._leaves.append(tensor)
        value = tensor.detach()
        seen = tensor.view_as(tensor)  # the gradient of this read alone, others may read the tensor too
        seen.register_hook(lambda gradient: self._note(read, value, gradient))
        return seen

    def on_write(self, step: Step, index: int, tensor: Tensor) -> Tensor:
        return tensor

    def wanted(self) -> list[Tensor]:
        return self._leaves

    def _note(self, read: _GateRead, value: Tensor, gradient: Tensor) -> None:
        product = value * gradient
        others = [axis for axis in range(product.ndim) if axis not in (read.axis, read.sample_axis)]
        sums = product.sum(others) if others else product
        if read.sample_axis is None:
            self._total.index_add_(0, read.elements, sums[read.positions].double())
            return
        if read.sample_axis > read.axis:
            sums = sums.T
        self._sums.index_add_(1, read.elements, sums[:, read.positions].double())

    def harvest(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Half the squared sums of single samples, and (over n) of the batch, each where it applies."""
        whole = (self._sums.sum(0) + self._total).square() / (2 * self._n) * self._reads.by_batch
        per_sample = self._sums.square() / 2 * ~self._reads.by_batch
        self._sums = torch.zeros_like(self._sums)
        self._total = torch.zeros_like(self._total)
        return per_sample, whole


# --- squared gradients ---


@dataclass(frozen=True)
class _Layer:
    """A node whose weight and bias get gradients of single samples.

    ``weight`` and ``bias`` hold the element (or -1) of each of the g * O output rows of its matrix form, or
    are None where that initializer is not wanted or cannot be had this way.
    """

    form: LinearForm
    weight: Tensor | None
    bias: Tensor | None


def _split_linear(
    twin: Twin, slices: Sequence[_Slice], forms: Mapping[str, LinearForm], survey: _Survey
) -> tuple[dict[str, _Layer], list[_Slice]]:
    """Return the layers by node, and the slices that need the gradient of the batch."""
    uses: dict[str, list[tuple[Step, int]]] = {}
    for step in twin.steps:
        for index, name in enumerate(step.inputs):
            uses.setdefault(name, []).append((step, index))
    n_slices: dict[str, int] = {}
    for part in slices:
        n_slices[part.initializer] = n_slices.get(part.initializer, 0) + 1
    rows: dict[str, dict[str, Tensor]] = {}
    rest = []
    for part in slices:
        found = None
        if n_slices[part.initializer] == len(uses.get(part.initializer, ())) == 1:
            found = _rows_of(twin, part, *uses[part.initializer][0], forms, survey)
        if found is None:
            rest.append(part)
        else:
            node, kind, elements = found
            rows.setdefault(node, {})[kind] = elements
    layers = {
        node: _Layer(forms[node], kinds.get("weight"), kinds.get("bias")) for node, kinds in rows.items()
    }
    return layers, rest


def _rows_of(
    twin: Twin, part: _Slice, step: Step, index: int, forms: Mapping[str, LinearForm], survey: _Survey
) -> tuple[str, str, Tensor] | None:
    """Return (node, "weight" or "bias", element of each row of the matrix form), or None if it has none."""
    form = forms.get(step.name)
    if form is None or step.opaque or index not in (form.weight_index, form.bias_index):
        return None
    tensors = (step.inputs[form.data_index], step.outputs[0])
    if any(survey.sample_axis.get(name) != 0 for name in tensors):
        return None
    shape = twin.constant(part.initializer).shape
    if index == form.bias_index:
        return step.name, "bias", part.elements
    spread = part.elements.reshape([-1 if axis == part.axis else 1 for axis in range(len(shape))])
    matrix = form.to_matrix(spread.expand(shape))  # [g, O, F]
    if not bool((matrix == matrix[..., :1]).all()):
        return None
    return step.name, "weight", matrix[..., 0].flatten()


class _Gradients:
    """Squared gradients of the parameters of elements, for one batch of n samples."""

    def __init__(
        self, twin: Twin, layers: Mapping[str, _Layer], rest: Sequence[_Slice], factor: Tensor, n: int
    ) -> None:
        self._layers, self._rest, self._factor, self._n = layers, rest, factor, n
        self._names = list(dict.fromkeys(part.initializer for part in rest))
        self._parameters = [twin.parameter_of[name] for name in self._names]
        self._inputs: dict[str, Tensor] = {}
        self._leaves: list[Tensor] = []
        self._squares = factor.new_zeros(n, len(factor))

    def on_read(self, step: Step, index: int, tensor: Tensor) -> Tensor:
        layer = self._layers.get(step.name)
        if layer is not None and index == layer.form.data_index:
            self._inputs[step.name] = tensor.detach()
        return tensor

    def on_write(self, step: Step, index: int, tensor: Tensor) -> Tensor:
        layer = self._layers.get(step.name)
        if layer is None or index != 0:
            return tensor
        if not tensor.requires_grad:  # nothing before this layer has to be differentiated
            tensor = tensor.detach().requires_grad_()
            self._leaves.append(tensor)
        x = self._inputs.pop(step.name)
        seen = tensor.view_as(tensor)
        seen.register_hook(lambda gradient: self._note(layer, x, gradient))
        return seen

    def wanted(self) -> list[Tensor]:
        return [*self._leaves, *self._parameters]

    @torch.no_grad()
    def _note(self, layer: _Layer, x: Tensor, gradient: Tensor) -> None:
        positions = torch.arange(layer.form.n_positions(gradient))
        # Patches repeat each number of the input once for each tap.
        n_chunk = max(1, _CHUNK_NUMBERS // max(1, x[0].numel() * layer.form.n_taps))
        for start in range(0, self._n, n_chunk):
            end = min(start + n_chunk, self._n)
            y = layer.form.outputs(gradient[start:end], positions)
            y = y.reshape(y.shape[0], end - start, len(positions), -1)  # [g, n, P, O]
            if layer.weight is not None:
                rows = layer.form.patches(x[start:end], positions)
                rows = rows.reshape(y.shape[0], end - start, len(positions), -1)  # [g, n, P, F]
                self._add(layer.weight, _squared_products(y, rows), start)
            if layer.bias is not None:
                self._add(layer.bias, y.sum(2).square(), start)

    def _add(self, elements: Tensor, squares: Tensor, start: int) -> None:
        """Add squares [g, n, O] of the samples from ``start`` on to the elements of the rows [g * O]."""
        flat = squares.movedim(0, 1).flatten(1).double()  # [n, g * O]
        known = elements >= 0
        self._squares[start : start + len(flat)].index_add_(1, elements[known], flat[:, known])

    def harvest(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Relative squared gradients of single samples, and (over n) of the batch for the rest."""
        of_parameters = gradients[len(self._leaves) :]
        squares = {
            name: gradient.double().square()
            for name, gradient in zip(self._names, of_parameters, strict=True)
            if gradient is not None
        }
        whole = self._factor * _sum_by_element(squares, self._rest, self._factor) / self._n
        per_sample = self._squares * self._factor
        self._squares = torch.zeros_like(self._squares)
        return per_sample, whole


def _squared_products(y: Tensor, x: Tensor) -> Tensor:
    """Squared norms of the rows of each sample's gradient, ``sum_f (sum_p y_po x_pf)^2``: [g, n, O].

    y is [g, n, P, O], x is [g, n, P, F]. With few positions P the inner products of positions are cheaper
    than the gradient itself: the norm is y_o^T (x x^T) y_o.
    """
    n_positions, n_out, n_features = y.shape[2], y.shape[3], x.shape[3]
    if n_positions * (n_features + n_out) < n_out * n_features:
        return ((x @ x.transpose(2, 3)) @ y).mul_(y).sum(2)
    n_chunk = max(1, _CHUNK_NUMBERS // max(1, y.shape[0] * n_out * n_features))
    chunks = zip(y.transpose(2, 3).split(n_chunk, 1), x.split(n_chunk, 1), strict=True)
    return torch.cat([(a @ b).square_().sum(3) for a, b in chunks], 1)
