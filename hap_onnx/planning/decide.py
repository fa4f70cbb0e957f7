"""From data to expected losses: statistics, ranking of channels, curves of groups, implants of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from hap_onnx.coupling.channels import ChannelGroup
from hap_onnx.data.calibration import Subset
from hap_onnx.distributed import ALONE, Team
from hap_onnx.events import OnEvent, ignore_event
from hap_onnx.implants.loss import (
    MEASURED_SHARES,
    ImplantLosses,
    find_implant_layers,
    measure_implants,
)
from hap_onnx.model.measure import model_size
from hap_onnx.planning.cost import CostModel
from hap_onnx.planning.cost_graph import cost_model, removable_branches
from hap_onnx.planning.curves import MEASURED_WIDTHS, GroupCurve, GroupRanking, measure_curves, rank_by_score
from hap_onnx.planning.times import NodeTimes
from hap_onnx.prepare import PreparedModel
from hap_onnx.sensitivity.curvature import LayerCurvature, collect_curvature, eliminate, group_consumers
from hap_onnx.sensitivity.estimate import Options, estimate

DEFAULT_SENSITIVITY = "obs"
N_MEASURED = 256
"""Samples that loss curves are measured on, unless the model is so large that fewer have to do."""
MIN_MEASURED = 32
MAX_MEASURED_MACS = 5e12
"""Multiply-accumulates that measuring may take: a minute or two on a core."""


@dataclass(frozen=True)
class LossModel:
    """What removing channels and replacing layers is expected to cost, and what it saves.

    ``sensitivity`` names what channels are ranked by, and ``n_measured`` says on how many samples losses were
    measured. ``implants`` holds the layers that may be replaced, by node; ``times`` what nodes take, where
    that counts.
    """

    rankings: tuple[GroupRanking, ...]
    curves: tuple[GroupCurve, ...]
    cost: CostModel
    removable: frozenset[str]
    sensitivity: str
    n_measured: int
    implants: Mapping[str, ImplantLosses] = field(default_factory=dict)
    times: NodeTimes | None = None


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
        scores = estimate(name, twin, coupling, subset, options=options)
        return tuple(
            rank_by_score(group, scores.mean, std_error=scores.std_error) for group in coupling.groups
        )

    def rank(group: ChannelGroup) -> GroupRanking:
        parts = group_consumers(group, nodes, twin, curvature)
        if parts.consumers:
            return GroupRanking(group.name, *eliminate(parts, group.size))
        return rank_by_score(group, fallback())

    @cache
    def fallback() -> NDArray[np.float64]:
        return estimate("magnitude", twin, coupling, subset, options=options).mean

    return tuple(options.team.map(rank, coupling.groups))


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
    with_implants: bool = True,
    team: Team = ALONE,
    on_event: OnEvent = ignore_event,
) -> LossModel:
    """Collect statistics on ``subset`` (unless they are there already), rank, and measure losses.

    Without implants nothing is measured for them.
    """
    graph, twin, coupling = prepared.graph, prepared.twin, prepared.coupling
    layers = find_implant_layers(prepared) if with_implants else ()
    if curvature is None:
        curvature = collect_curvature(
            graph,
            twin,
            coupling,
            subset,
            scales=scales,
            batch_size=batch_size,
            seed=seed,
            layers=[layer.node for layer in layers],
            team=team,
            on_event=on_event,
        )
    options = Options(
        graph=graph,
        scales=scales,
        n_probes=n_probes,
        batch_size=batch_size,
        seed=seed,
        team=team,
        on_event=on_event,
    )
    rankings = rank_groups(sensitivity, prepared, curvature, subset, options=options)
    measured = subset.take(n_measured(prepared, n_layers=len(layers)))
    curves = measure_curves(
        graph,
        twin,
        coupling,
        rankings,
        curvature,
        measured,
        scales=scales,
        batch_size=batch_size,
        team=team,
        on_event=on_event,
    )
    implants = measure_implants(
        graph,
        twin,
        layers,
        curvature,
        measured,
        scales=scales,
        batch_size=batch_size,
        team=team,
        on_event=on_event,
    )
    return loss_model(
        prepared,
        rankings,
        curves,
        implants,
        sensitivity=DEFAULT_SENSITIVITY if sensitivity == "auto" else sensitivity,
        n_measured=measured.n_samples,
    )


def loss_model(
    prepared: PreparedModel,
    rankings: tuple[GroupRanking, ...],
    curves: tuple[GroupCurve, ...],
    implants: Mapping[str, ImplantLosses],
    *,
    sensitivity: str,
    n_measured: int,
) -> LossModel:
    """Put what was found out by data beside what the choices save, which needs none."""
    graph, coupling = prepared.graph, prepared.coupling
    return LossModel(
        rankings=rankings,
        curves=curves,
        cost=cost_model(graph, coupling, prepared.shapes, layers=tuple(implants)),
        removable=removable_branches(graph, coupling, prepared.shapes),
        sensitivity=sensitivity,
        n_measured=n_measured,
        implants=implants,
    )


def with_times(model: LossModel, prepared: PreparedModel, times: NodeTimes) -> LossModel:
    """Price the choices in time, too."""
    layers = tuple(model.implants)
    cost = cost_model(prepared.graph, prepared.coupling, prepared.shapes, layers=layers, times=times)
    return replace(model, cost=cost, times=times)


def n_measured(prepared: PreparedModel, *, n_layers: int = 0) -> int:
    """How many samples losses are measured on, of all groups and of ``n_layers`` layers with implants.

    Each group runs the rest of the model, on average half of it, once per measured width, and each layer once
    per measured share.
    """
    shape = prepared.shapes[next(iter(prepared.probe))]
    macs = model_size(prepared.graph, prepared.shapes).macs / max(shape[0] if shape else 1, 1)
    n_forks = len(prepared.coupling.groups) * len(MEASURED_WIDTHS) + n_layers * len(MEASURED_SHARES)
    n_passes = max(1.0, n_forks / 2)
    return int(np.clip(MAX_MEASURED_MACS / max(macs * n_passes, 1.0), MIN_MEASURED, N_MEASURED))
