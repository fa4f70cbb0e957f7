"""What is known of a model's sensitivities, for people: what a planner reckons with, and its plans."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from math import inf, isfinite

import numpy as np
import onnx_graphsurgeon as gs

from hap_onnx import report as reports
from hap_onnx.config import CompressConfig
from hap_onnx.coupling.channels import ChannelGroup
from hap_onnx.errors import BudgetError
from hap_onnx.events import track
from hap_onnx.implants.loss import ImplantLosses, implant_costs, losses_of_ranks
from hap_onnx.jobs.candidates import Setting, choose_within
from hap_onnx.model.measure import node_macs, weights_of
from hap_onnx.ops.implant import ImplantForm
from hap_onnx.ops.linear import linear_form
from hap_onnx.planning.choose import Choice, group_roles, predicted_costs, predicted_losses
from hap_onnx.planning.cost import METRICS, LayerTerms
from hap_onnx.planning.curves import GroupCurve, GroupRanking, Measured
from hap_onnx.planning.decide import LossModel
from hap_onnx.prepare import PreparedModel
from hap_onnx.report.analysis import (
    Analysis,
    GroupSensitivity,
    ImplantCurve,
    LayerSensitivity,
    LossPoint,
    SizePoint,
)
from hap_onnx.report.summary import per_sample

SIZE_RATIOS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""The budgets, as fractions of the original, for which plans are made to see what sizes cost."""
MAX_POINTS = 17
"""How many points of a curve are told at most."""
STAGE = "plans"


def objective_of(config: CompressConfig) -> str:
    """What a job makes small: what it says, or what its budget is about."""
    if config.objective is not None:
        return config.objective
    if config.keep_latency is not None:
        return "latency"
    by_params = config.keep_params is not None or config.max_bytes is not None
    return "params" if by_params and config.keep_macs is None else "macs"


def analyse(setting: Setting, *, objective: str) -> Analysis:
    """Tell all that is known before a plan is made, and what the planner would do for a family of budgets."""
    prepared, losses = setting.prepared, setting.losses
    return Analysis(
        sensitivity=losses.sensitivity,
        n_samples=losses.n_measured,
        objective=objective,
        groups=_groups(prepared, losses),
        layers=_layers(prepared, losses),
        sizes=_sizes(setting, objective),
    )


def with_plan(analysis: Analysis, plan: reports.PlanSummary, chosen: SizePoint | None) -> Analysis:
    """Add what a plan has done to each group and layer, and where it lies among the sizes."""
    kept = {group.name: group.kept for group in plan.groups}
    kinds = {layer.node: layer.choice for layer in plan.layers}
    return replace(
        analysis,
        groups=tuple(replace(group, kept=kept.get(group.name)) for group in analysis.groups),
        layers=tuple(replace(layer, chosen=kinds.get(layer.node)) for layer in analysis.layers),
        chosen=chosen,
    )


def size_point(setting: Setting, choice: Choice, asked: float) -> SizePoint:
    """What a choice costs, as fractions of the model, and what it is expected to lose."""
    prepared, losses = setting.prepared, setting.losses
    full = np.maximum(losses.cost.totals(losses.cost.sizes), 1)
    params, macs, latency = (predicted_costs(prepared, losses, choice) / full).tolist()
    expected = sum(predicted_losses(losses, choice.decisions).values())
    expected += sum(entry.expected_loss or 0.0 for entry in choice.replacements)
    return SizePoint(asked, params, macs, expected, latency if losses.times is not None else None)


def _sizes(setting: Setting, objective: str) -> tuple[SizePoint, ...]:
    """The plan of least expected loss for each budget that can be reached, from large to small."""
    cost = setting.losses.cost
    if not cost.sizes and not cost.layers:
        return ()  # nothing to choose
    full = cost.totals(cost.sizes)[METRICS.index(objective)]
    found = []
    for ratio in track(SIZE_RATIOS, stage=STAGE, total=len(SIZE_RATIOS), on_event=setting.on_event):
        limit = ratio if objective == "latency" else ratio * float(full)
        try:
            choice = choose_within(setting, {objective: limit})
        except BudgetError:  # smaller ones cannot be reached either, but the planner need not be perfect
            continue
        found.append(size_point(setting, choice, ratio))
    return tuple(found)


# --- groups ---


def _groups(prepared: PreparedModel, losses: LossModel) -> tuple[GroupSensitivity, ...]:
    roles, found = group_roles(prepared), []
    for group, ranking, curve, saved in zip(
        prepared.coupling.groups, losses.rankings, losses.curves, losses.cost.savings().tolist(), strict=True
    ):
        score, error = _group_score(losses.sensitivity, ranking, curve)
        found.append(
            GroupSensitivity(
                name=group.name,
                role=roles[group.name],
                size=group.size,
                nodes=(*group.producers, *_followers(prepared, group)),
                params=saved[0],
                macs=per_sample(saved[1], prepared),
                score=score,
                std_error=error,
                curve=_group_points(ranking, curve),
            )
        )
    return tuple(found)


def _followers(prepared: PreparedModel, group: ChannelGroup) -> list[str]:
    """Return the layers that lose channels with those that they read, which are depthwise ones."""
    coupling = prepared.coupling
    roles = {(weight.initializer, weight.axis): weight.role for weight in coupling.weights}
    following = [name for name, axis, _ in group.axes if roles[name, axis] == "follower"]
    nodes = {node.name: node for node in prepared.graph.nodes}
    found = dict.fromkeys(node for name in following for node in coupling.initializer_nodes[name])
    others = [node for node in found if node not in group.producers]  # whose biases follow their weights
    return [node for node in others if linear_form(nodes[node]) is not None]


def _group_score(
    sensitivity: str, ranking: GroupRanking, curve: GroupCurve
) -> tuple[float, float | None]:
    """Return the sensitivity per channel of a group, and its standard error; see ``GroupSensitivity``."""
    if sensitivity != "obs":
        return inf if ranking.score is None else ranking.score, ranking.score_error
    size = len(ranking.order)
    half = round(0.5 * size)  # one of the widths that are measured
    loss, error = _known(curve.measured.get(half))
    n_gone = size - half
    return inf if loss is None else loss / n_gone, None if error is None else error / n_gone


def _group_points(ranking: GroupRanking, curve: GroupCurve) -> tuple[LossPoint, ...]:
    size, predicted = len(ranking.order), ranking.loss[::-1]
    points = []
    for width in _thin(range(size + 1), must=curve.measured):
        measured, error = _known(curve.measured.get(width))
        points.append(
            LossPoint(width / size, float(predicted[width]), float(curve.loss[width]), measured, error)
        )
    return tuple(filter(_is_finite, points))


# --- layers ---


def _layers(prepared: PreparedModel, losses: LossModel) -> tuple[LayerSensitivity, ...]:
    terms_of = {terms.node: terms for terms in losses.cost.layers}  # of those that the planner may replace
    found = []
    for node in prepared.graph.nodes:
        if node.name not in terms_of:
            continue
        entry = losses.implants[node.name]
        curves = _implant_curves(prepared, node, entry, terms_of[node.name])
        score, error = _layer_score(entry, curves)
        found.append(
            LayerSensitivity(
                node=node.name,
                op_type=node.op,
                params=sum(int(tensor.values.size) for tensor in weights_of(node)),
                macs=per_sample(node_macs(node, prepared.shapes), prepared),
                score=score,
                std_error=error,
                curves=curves,
            )
        )
    return tuple(found)


def _implant_curves(
    prepared: PreparedModel, node: gs.Node, losses: ImplantLosses, terms: LayerTerms
) -> tuple[ImplantCurve, ...]:
    """What each kind of implant costs of a layer with all its channels, at ranks that save something."""
    forms = {form.kind: form for form in losses.layer.forms}
    curves = []
    for kind, of_rank in losses_of_ranks(losses, forms).items():
        shares = _shares(prepared, node, losses, terms, forms[kind], n_ranks=len(of_rank))
        measured = losses.measured if kind == losses.measured_kind else {}
        expected = losses.correct(of_rank)
        points = []
        for rank in _thin(shares, must=measured):
            value, error = _known(measured.get(rank))
            points.append(LossPoint(shares[rank], float(of_rank[rank]), float(expected[rank]), value, error))
        points = sorted(filter(_is_finite, points), key=lambda point: point.keep)
        if points:
            curves.append(ImplantCurve(kind, tuple(points)))
    return tuple(curves)


def _shares(
    prepared: PreparedModel,
    node: gs.Node,
    losses: ImplantLosses,
    terms: LayerTerms,
    form: ImplantForm,
    *,
    n_ranks: int,
) -> dict[int, float]:
    """By rank, the share of the layer's multiply-accumulates that an implant of it has, where below 1."""
    n_groups, n_outputs, n_features = losses.weight.shape
    n_in, n_out = n_features // losses.layer.form.n_taps, n_groups * n_outputs
    lengths, macs = np.array([n_in * n_out, n_in, n_out, 1]), METRICS.index("macs")
    full = float((lengths @ terms.dense)[macs])
    shares = {}
    for rank in range(1, n_ranks if form.kind != "pointwise" else n_out):  # some outputs stay as they are
        costs = implant_costs(losses.layer, form, rank, node, prepared.shapes, times=None)
        share = float((lengths @ costs)[macs]) / full if full else 1.0
        if 0 <= share < 1:
            shares[rank] = share
    return shares


def _layer_score(losses: ImplantLosses, curves: Sequence[ImplantCurve]) -> tuple[float, float | None]:
    """Return the expected loss of the best implant of about half the layer, and its error.

    See ``LayerSensitivity``.
    """
    nearest = [min(curve.points, key=lambda point: abs(point.keep - 0.5)) for curve in curves]
    about_half = [point for point in nearest if 0.25 <= point.keep <= 0.75]
    if not about_half:
        return inf, None
    best = min(about_half, key=lambda point: point.expected)
    known = [
        (abs(np.log(max(measured, 1e-300) / max(best.expected, 1e-300))), error / measured)
        for measured, error in map(_known, losses.measured.values())
        if measured is not None and error is not None and measured > 0
    ]
    return best.expected, best.expected * min(known)[1] if known else None


# --- points ---


def _known(measured: Measured | None) -> tuple[float | None, float | None]:
    """A measured loss and its error, each None where it is not known or no number."""
    if measured is None or not isfinite(measured.loss):
        return None, None
    return measured.loss, measured.std_error if isfinite(measured.std_error) else None


def _is_finite(point: LossPoint) -> bool:
    return isfinite(point.predicted) and isfinite(point.expected)


def _thin(values: Collection[int], *, must: Collection[int]) -> list[int]:
    """Return at most ``MAX_POINTS`` of ascending numbers, evenly spread, among them those in ``must``."""
    every = list(values)
    if len(every) <= MAX_POINTS:
        return every
    chosen = {value for value in every if value in must}
    spread = np.linspace(0, len(every) - 1, MAX_POINTS - len(chosen)).round().astype(int)
    return sorted(chosen | {every[index] for index in spread})
