"""Loss curves: what each width of each group costs, predicted and then corrected by measurement.

The prediction comes from a sensitivity (the loss after each removal in the order of removal). It is corrected
where it can be measured cheaply: at a few widths the group alone is removed, its consumers take over in
closed form, and the model runs on from there; the distance of its outputs to the original's is the loss.
Between the measured widths the ratio of measured to predicted loss is interpolated (linearly in its log).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, nan, sqrt

import numpy as np
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray
from torch import Tensor

from hap_onnx.coupling.channels import ChannelGroup, Coupling
from hap_onnx.data.calibration import Batch, Subset
from hap_onnx.distributed import ALONE, Team
from hap_onnx.events import OnEvent, ignore_event, track
from hap_onnx.sensitivity.curvature import (
    GroupConsumers,
    LayerCurvature,
    group_consumers,
    n_at_once,
    refitted_weights,
    to_tensors,
)
from hap_onnx.twin import Step, Twin

MEASURED_WIDTHS = (0.0, 0.25, 0.5, 0.75)
_TINY = 1e-12
HUGE_LOSS = 1e14

Overrides = Mapping[tuple[str, int], Tensor]
Masks = Mapping[tuple[str, int], tuple[int, Tensor]]


@dataclass(frozen=True)
class GroupRanking:
    """The order in which elements of a group go (indices into ``group.elements``) and the predicted loss.

    ``loss[k]`` is the loss after k removals, [size + 1]. ``score`` is the mean of its elements' scores, where
    these rank them and all are finite. ``score_error`` is the mean of their standard errors: the error of the
    mean is at most that, however the errors of elements, which share random vectors and samples, go together.
    """

    group: str
    order: NDArray[np.int64]
    loss: NDArray[np.float64]
    score: float | None = None
    score_error: float | None = None


@dataclass(frozen=True)
class Measured:
    """A loss that was measured: its mean over samples, and the standard error of that mean.

    The error is NaN where it is not known: of one sample, or where outputs do not tell samples apart.
    """

    loss: float
    std_error: float = nan


@dataclass(frozen=True)
class GroupCurve:
    """``loss[w]``: expected loss when w elements stay, [size + 1]; ``measured``: by width."""

    group: str
    loss: NDArray[np.float64]
    measured: Mapping[int, Measured]


def rank_by_score(
    group: ChannelGroup, score: NDArray[np.float64], *, std_error: NDArray[np.float64] | None = None
) -> GroupRanking:
    """Order the elements of a group by their score; losses add up.

    ``std_error`` is that of the scores; without it the scores serve to rank, and are not told.
    """
    own = np.maximum(score[group.elements], 0.0)
    # What no gradient reaches scores infinity: it goes last, at a loss that dwarfs the rest but adds up.
    finite = own[np.isfinite(own)]
    own = np.where(np.isfinite(own), own, 1e3 * finite.sum() + 1.0)
    order = np.argsort(own, kind="stable")
    loss = np.concatenate([[0.0], np.cumsum(own[order])])
    if std_error is None or len(finite) < len(own) or not len(own):
        return GroupRanking(group.name, order, loss)
    error = float(std_error[group.elements].mean())
    return GroupRanking(
        group.name, order, loss, float(score[group.elements].mean()), error if np.isfinite(error) else None
    )


def measure_curves(
    graph: gs.Graph,
    twin: Twin,
    coupling: Coupling,
    rankings: Sequence[GroupRanking],
    curvature: Mapping[str, LayerCurvature],
    subset: Subset,
    *,
    scales: Mapping[str, float],
    batch_size: int,
    team: Team = ALONE,
    on_event: OnEvent = ignore_event,
) -> tuple[GroupCurve, ...]:
    """Measure each group at a few widths and correct its predicted curve.

    At the first node that reads a group the model forks once per width. Memory is that of one batch and of
    the replaced weights.
    """
    nodes = {node.name: node for node in graph.nodes}
    groups = {group.name: group for group in coupling.groups}
    position = {step.name: index for index, step in enumerate(twin.steps)}
    forks: list[Fork] = []
    for ranking in rankings:
        group = groups[ranking.group]
        parts = group_consumers(group, nodes, twin, curvature)
        readers = [
            position[read.node] for read in coupling.reads if np.isin(read.elements, group.elements).any()
        ]
        if not readers:
            continue
        for width in sorted({round(group.size * share) for share in MEASURED_WIDTHS}):
            if width >= group.size:
                continue
            removed = ranking.order[: group.size - width]
            overrides = _overrides(group, removed, coupling, parts, nodes, twin, curvature)
            masks = _masks(group, removed, coupling, overrides)
            forks.append(Fork((group.name, width), min(readers), overrides, masks))
    measured = run_forks(
        twin, subset, forks, scales=scales, batch_size=batch_size, team=team, on_event=on_event
    )
    return tuple(
        _correct(ranking, {width: loss for (name, width), loss in measured.items() if name == ranking.group})
        for ranking in rankings
    )


@dataclass(frozen=True)
class Fork:
    """One way to run the model from step ``start`` on: with other values for some inputs of its nodes.

    ``masks`` holds positions that are zero instead, (axis, indices), of inputs that are activations.
    """

    key: tuple[str, int]
    start: int
    overrides: Overrides
    masks: Masks = field(default_factory=dict)


def run_forks(
    twin: Twin,
    subset: Subset,
    forks: Sequence[Fork],
    *,
    scales: Mapping[str, float],
    batch_size: int,
    team: Team = ALONE,
    on_event: OnEvent = ignore_event,
) -> dict[tuple[str, int], Measured]:
    """Return the distance of the outputs to the original's for each fork, per sample, by its key.

    The model runs once per batch, and each fork from its first changed step on; memory is that of one batch.
    """
    batch_size = n_at_once(twin, subset, batch_size)  # single steps do not loop over samples by themselves
    if not forks:
        return {}
    by_start: dict[int, list[Fork]] = {}
    for fork in forks:
        by_start.setdefault(fork.start, []).append(fork)
    n_batches = len(range(team.rank, -(-subset.n_samples // batch_size), team.size))
    sums = {fork.key: 0.0 for fork in forks}
    squares = {fork.key: 0.0 for fork in forks}
    work = _run_all(twin, team.batches(subset, batch_size), by_start, scales=scales)
    for key, loss, square in track(work, stage="measure", total=n_batches * len(forks), on_event=on_event):
        sums[key] += loss
        squares[key] += square
    both = team.sum_(torch.tensor([list(sums.values()), list(squares.values())], dtype=torch.float64))
    n_samples = subset.n_samples
    return {
        key: Measured(total / n_samples, _std_error(total, square, n_samples))
        for key, total, square in zip(sums, *both.tolist(), strict=True)
    }


def _std_error(total: float, squares: float, n_samples: int) -> float:
    """Of the mean of numbers with this sum and this sum of squares; NaN where it is not known."""
    if n_samples < 2 or not squares < inf:
        return nan
    variance = (squares - total * total / n_samples) / (n_samples - 1)
    return sqrt(max(variance, 0.0) / n_samples)


def _run_all(
    twin: Twin,
    batches: Iterable[Batch],
    forks: Mapping[int, Sequence[Fork]],
    *,
    scales: Mapping[str, float],
) -> Iterator[tuple[tuple[str, int], float, float]]:
    """Run all forks of some batches; yields the key of each, its loss and the square, summed over samples."""
    with torch.no_grad():
        for batch in batches:
            inputs = to_tensors(batch.inputs, twin)
            expected = twin(inputs)
            n_samples = len(next(iter(batch.inputs.values())))
            values: dict[str, Tensor] = dict(inputs)
            for index, step in enumerate(twin.steps):
                for fork in forks.get(index, ()):
                    outputs = _run_from(twin, index, values, fork)
                    loss = output_distance(outputs, expected, scales)
                    yield fork.key, loss, _sum_of_squares(outputs, expected, scales, n_samples=n_samples)
                _advance(twin, step, values)


def output_distance(
    outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], scales: Mapping[str, float]
) -> float:
    """Half the squared, scaled distance, summed over samples."""
    return sum(
        float((scale**2) * 0.5 * (outputs[name] - expected[name]).double().square().sum())
        for name, scale in scales.items()
    )


def _sum_of_squares(
    outputs: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    scales: Mapping[str, float],
    *,
    n_samples: int,
) -> float:
    """Squares of the samples' own distances, summed; NaN where an output does not tell samples apart."""
    if any(expected[name].shape[:1] != (n_samples,) for name in scales):
        return nan
    own = torch.zeros(n_samples, dtype=torch.float64)
    for name, scale in scales.items():
        wrong = (outputs[name] - expected[name]).double().square().reshape(n_samples, -1).sum(1)
        own += (scale**2) * 0.5 * wrong.cpu()
    return float(own.square().sum())


def _run_from(twin: Twin, start: int, values: Mapping[str, Tensor], fork: Fork) -> dict[str, Tensor]:
    own = dict(values)
    for step in twin.steps[start:]:
        _advance(twin, step, own, fork)
    return {name: own[name] for name in twin.output_names if name in own}


def _advance(twin: Twin, step: Step, values: dict[str, Tensor], fork: Fork | None = None) -> None:
    def on_read(step: Step, index: int, tensor: Tensor) -> Tensor:
        assert fork is not None
        if (step.name, index) in fork.masks:
            axis, gone = fork.masks[step.name, index]
            return tensor.index_fill(axis, gone.to(tensor.device), 0.0)
        return fork.overrides.get((step.name, index), tensor)

    outputs = twin.run_step(step, values, on_read=on_read if fork is not None else None)
    for name, tensor in zip(step.outputs, outputs, strict=False):
        if name:
            values[name] = tensor
    for name in step.last_use:
        values.pop(name, None)


def _overrides(
    group: ChannelGroup,
    removed: NDArray[np.int64],
    coupling: Coupling,
    parts: GroupConsumers,
    nodes: Mapping[str, gs.Node],
    twin: Twin,
    curvature: Mapping[str, LayerCurvature],
) -> dict[tuple[str, int], Tensor]:
    """Weights without the removed elements: refitted where statistics are there, else with zeros."""
    result = refitted_weights(parts, removed, nodes, twin, curvature)
    gone = group.elements[removed]
    consumer_axes = {
        weight.initializer: (weight.axis, np.isin(weight.elements, gone))
        for weight in coupling.weights
        if weight.role == "consumer"
    }
    for read in coupling.reads:
        node = nodes[read.node]
        for index, tensor in enumerate(node.inputs):
            if tensor.name in consumer_axes and (read.node, index) not in result:
                axis, hit = consumer_axes[tensor.name]
                if not hit.any():
                    continue
                weight = twin.constant(tensor.name).detach().clone()
                weight.index_fill_(axis, torch.from_numpy(np.flatnonzero(hit)).to(weight.device), 0.0)
                result[read.node, index] = weight
    return result


def _masks(
    group: ChannelGroup, removed: NDArray[np.int64], coupling: Coupling, overrides: Overrides
) -> dict[tuple[str, int], tuple[int, Tensor]]:
    """What goes of activations that no changed weight reads: the width of heads, in a product of two."""
    gone = group.elements[removed]
    masks = {}
    changed = {node for node, _ in overrides}
    for read in coupling.reads:
        hit = np.isin(read.elements, gone)
        if read.node not in changed and hit.any():
            masks[read.node, read.index] = (read.axis, torch.from_numpy(np.flatnonzero(hit)))
    return masks


def finite_loss(loss: float, *, least: float) -> float:
    """A measured loss that one can take the logarithm of; where outputs are not finite, it is huge."""
    return float(np.clip(loss, least, HUGE_LOSS)) if np.isfinite(loss) else HUGE_LOSS


def _correct(ranking: GroupRanking, measured: Mapping[int, Measured]) -> GroupCurve:
    """Scale the predicted curve so that it passes through the measured points."""
    size = len(ranking.order)
    predicted = ranking.loss[::-1]  # by width
    if not measured:
        return GroupCurve(ranking.group, predicted.copy(), {})
    widths = np.array(sorted(measured))
    losses = np.array([finite_loss(measured[int(width)].loss, least=_TINY) for width in widths])
    floor = _TINY + 1e-9 * float(predicted.max(initial=0.0))
    ratios = np.log(losses) - np.log(predicted[widths] + floor)
    every = np.arange(size + 1)
    loss = (predicted + floor) * np.exp(np.interp(every, widths, ratios))
    loss[widths] = losses
    loss[size] = 0.0
    return GroupCurve(ranking.group, loss, dict(measured))
