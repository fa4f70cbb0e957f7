"""From data to a plan: statistics, ranking, loss curves, widths."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from hap_onnx.allocate import GroupOptions, allocate, find_options
from hap_onnx.calibration import Subset
from hap_onnx.cost import CostModel
from hap_onnx.cost_graph import cost_model, removable_branches
from hap_onnx.curvature import LayerCurvature, collect_curvature, eliminate, group_consumers
from hap_onnx.curves import MEASURED_WIDTHS, GroupCurve, GroupRanking, measure_curves, rank_by_score
from hap_onnx.events import OnEvent, ignore_event
from hap_onnx.measure import model_size
from hap_onnx.plan import GroupDecision
from hap_onnx.prepare import PreparedModel
from hap_onnx.refit import refit
from hap_onnx.sensitivity import Options, estimate
from hap_onnx.surgery import Kept, kept_positions

DEFAULT_SENSITIVITY = "obs"
N_MEASURED = 256
"""Samples that loss curves are measured on, unless the model is so large that fewer have to do."""
MIN_MEASURED = 32
MAX_MEASURED_MACS = 5e12
"""Multiply-accumulates that measuring may take: a minute or two on a core."""


@dataclass(frozen=True)
class LossModel:
    """What removing channels is expected to cost, for every group, and what it saves."""

    rankings: tuple[GroupRanking, ...]
    curves: tuple[GroupCurve, ...]
    cost: CostModel
    removable: frozenset[str]


def rank_groups(
    name: str,
    prepared: PreparedModel,
    curvature: Mapping[str, LayerCurvature],
    subset: Subset,
    *,
    options: Options,
) -> tuple[GroupRanking, ...]:
    """Order the elements of each group by the sensitivity of that name (``auto``: the default).

    ``obs`` uses the curvature that the planner collects anyway; groups that no contraction with statistics
    reads, and all other sensitivities, are ordered by a score per element.
    """
    if name == "auto":
        name = DEFAULT_SENSITIVITY
    coupling, twin = prepared.coupling, prepared.twin
    nodes = {node.name: node for node in prepared.graph.nodes}
    if name != "obs":
        score = estimate(name, twin, coupling, subset, options=options).mean
        return tuple(rank_by_score(group, score) for group in coupling.groups)
    rankings = []
    fallback: NDArray[np.float64] | None = None
    for group in coupling.groups:
        parts = group_consumers(group, nodes, twin, curvature)
        if parts.consumers:
            order, loss = eliminate(parts, group.size)
            rankings.append(GroupRanking(group.name, order, loss))
        else:
            if fallback is None:
                fallback = estimate("magnitude", twin, coupling, subset, options=options).mean
            rankings.append(rank_by_score(group, fallback))
    return tuple(rankings)


def build_loss_model(
    prepared: PreparedModel,
    subset: Subset,
    *,
    sensitivity: str,
    curvature: Mapping[str, LayerCurvature] | None = None,
    scales: Mapping[str, float],
    batch_size: int,
    n_probes: int,
    seed: int,
    on_event: OnEvent = ignore_event,
) -> LossModel:
    """Collect statistics on ``subset`` (unless they are there already), rank, and measure loss curves."""
    graph, twin, coupling = prepared.graph, prepared.twin, prepared.coupling
    if curvature is None:
        curvature = collect_curvature(
            graph, twin, coupling, subset, scales=scales, batch_size=batch_size, seed=seed, on_event=on_event
        )
    options = Options(
        graph=graph, scales=scales, n_probes=n_probes, batch_size=batch_size, seed=seed, on_event=on_event
    )
    rankings = rank_groups(sensitivity, prepared, curvature, subset, options=options)
    curves = measure_curves(
        graph,
        twin,
        coupling,
        rankings,
        curvature,
        subset.take(n_measured(prepared)),
        scales=scales,
        batch_size=batch_size,
        on_event=on_event,
    )
    return LossModel(
        rankings=rankings,
        curves=curves,
        cost=cost_model(graph, coupling, prepared.shapes),
        removable=removable_branches(graph, coupling, prepared.shapes),
    )


def n_measured(prepared: PreparedModel) -> int:
    """How many samples the loss curves are measured on.

    Each group runs the rest of the model, on average half of it, once per measured width.
    """
    shape = prepared.shapes[next(iter(prepared.probe))]
    macs = model_size(prepared.graph, prepared.shapes).macs / max(shape[0] if shape else 1, 1)
    n_passes = max(1.0, len(prepared.coupling.groups) * len(MEASURED_WIDTHS) / 2)
    return int(np.clip(MAX_MEASURED_MACS / max(macs * n_passes, 1.0), MIN_MEASURED, N_MEASURED))


def choose_widths(
    prepared: PreparedModel,
    model: LossModel,
    budgets: Mapping[str, float | None],
    *,
    align: int | str,
    whole: Collection[str] = (),
) -> tuple[GroupDecision, ...]:
    """Decide which elements of each group stay, within absolute ``budgets``; groups in ``whole`` stay whole.

    Raises BudgetError.
    """
    options = tuple(
        GroupOptions(option.group, option.widths[-1:]) if option.group in whole else option
        for option in find_options(prepared.coupling, model.removable, align=align)
    )
    widths = allocate([curve.loss for curve in model.curves], options, model.cost, budgets).widths
    return tuple(
        GroupDecision.from_keep(group.name, group.size, ranking.order[group.size - int(width) :])
        for group, ranking, width in zip(prepared.coupling.groups, model.rankings, widths, strict=True)
    )


def predicted_losses(model: LossModel, decisions: tuple[GroupDecision, ...]) -> dict[str, float]:
    """Expected loss of each decision, from the curve of its group."""
    return {
        decision.group: float(curve.loss[len(decision.keep)])
        for decision, curve in zip(decisions, model.curves, strict=True)
    }


def residual_groups(prepared: PreparedModel) -> frozenset[str]:
    """Groups that several nodes produce: the channels of residual streams, which every later layer reads."""
    return frozenset(group.name for group in prepared.coupling.groups if len(group.producers) > 1)


def keep_mask(prepared: PreparedModel, decisions: Sequence[GroupDecision]) -> NDArray[np.bool_]:
    """One flag per element of the coupling, for ``surgery.remove_channels``."""
    keep = np.ones(prepared.coupling.n_elements, bool)
    for group, decision in zip(prepared.coupling.groups, decisions, strict=True):
        keep[group.elements[decision.drop]] = False
    return keep


def refit_weights(
    prepared: PreparedModel, compressed: gs.Graph, keep: NDArray[np.bool_], subset: Subset, **options: Any
) -> dict[str, NDArray[np.float32]]:
    """``refit.refit`` for a graph that ``remove_channels`` made with this ``keep``."""
    kept = {
        name: Kept(found.axis, kept_positions(found.ids, keep))
        for name, found in prepared.coupling.tensors.items()
    }
    return dict(refit(prepared.graph, compressed, kept, subset, **options).weights)
