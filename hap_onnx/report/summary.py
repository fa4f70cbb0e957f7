"""Reports from what the stages know: sizes before and after, what was decided and why, and the JSON file."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import torch

import hap_onnx
from hap_onnx import report as reports
from hap_onnx.config import BUDGETS, CompressConfig
from hap_onnx.implants.loss import ImplantLosses, explain_refusals
from hap_onnx.model.measure import model_size, node_macs
from hap_onnx.ops.linear import linear_form
from hap_onnx.planning.choose import Choice
from hap_onnx.planning.decide import LossModel
from hap_onnx.planning.plan import CompressionPlan, NodeReplacement
from hap_onnx.prepare import PreparedModel
from hap_onnx.runtime import metrics
from hap_onnx.sensitivity.curvature import to_tensors
from hap_onnx.twin import build_twin, probe_shapes

UNUSED = "the method does not use implants"
GONE = "gone: its branch is removed"
"""What a plan notes of a layer that is no more; old plans do so, too."""


def facts_before(prepared: PreparedModel) -> reports.ModelFacts:
    """Size of the model as it came; multiply-accumulates are those of one sample."""
    size = model_size(prepared.graph, prepared.shapes)
    return reports.ModelFacts(prepared.n_params, per_sample(size.macs, prepared), prepared.source.n_bytes)


def facts_after(graph: gs.Graph, prepared: PreparedModel, *, n_bytes: int) -> reports.ModelFacts:
    """Size of a compressed graph of the same model, counted anew on the graph itself."""
    twin = build_twin(graph, share_weights=True)
    first = {
        name: values[: prepared.shapes[name][0]] if values.ndim else values
        for name, values in prepared.probe.items()
    }
    size = model_size(graph, probe_shapes(twin, to_tensors(first, twin)))
    return reports.ModelFacts(size.params, per_sample(size.macs, prepared), n_bytes)


def per_sample(macs: int, prepared: PreparedModel) -> int:
    """Divide what was counted at ``prepared.shapes`` by the samples in there."""
    name = next(iter(prepared.probe))
    shape = prepared.shapes[name]
    return macs // (shape[0] if shape else 1)


def reached_budgets(
    before: reports.ModelFacts, after: reports.ModelFacts, latency: reports.Latency | None = None
) -> dict[str, float]:
    """What became of each budget, by option name."""
    reached = {"keep_params": after.params / max(before.params, 1), "max_bytes": float(after.bytes)}
    if before.macs and after.macs is not None:
        reached["keep_macs"] = after.macs / before.macs
    if latency is not None:
        reached["keep_latency"] = latency.ratio
    return reached


def plan_words(config: CompressConfig, prepared: PreparedModel) -> dict[str, Any]:
    """The options that shaped the plan, and the input shapes that the channels were found at."""
    words = config.to_dict()
    names = (
        *BUDGETS, "objective", "max_drop", "metric", "method", "preset", "sensitivity", "probes",
        "recover", "epochs", "rounds", "augment", "align", "then", "exclude", "only", "max_samples",
        "batch_size", "seed",
    )  # fmt: skip
    shapes = {name: list(values.shape) for name, values in prepared.probe.items()}
    return {**{name: words[name] for name in names}, "input_shapes": shapes}


def explain_groups(
    losses: LossModel, choice: Choice, *, method: str = "hap", preset: str | None = None
) -> dict[str, str]:
    """Say for each group why it was decided so."""
    notes = {}
    for decision, curve in zip(choice.decisions, losses.curves, strict=True):
        width = len(decision.keep)
        what = "the whole branch goes" if width == 0 else f"{decision.size - width} channels go"
        how = "measured" if width in curve.measured else "interpolated between measured widths"
        if method == "implant":
            notes[decision.group] = "whole: the method does not remove channels"
        elif width == decision.size and decision.group in choice.whole:
            notes[decision.group] = "whole: this plan leaves it alone, and does better than one that does not"
        elif width == decision.size and preset is not None:
            notes[decision.group] = "whole: all its channels are above the threshold"
        elif width == decision.size:
            notes[decision.group] = "whole: removing channels here loses more per cost than elsewhere"
        elif preset is not None:
            notes[decision.group] = f"{what}, below the threshold: expected loss {curve.loss[width]:.3g}"
        else:
            notes[decision.group] = f"{what}: expected loss {curve.loss[width]:.3g} ({how})"
    return notes


def explain_layers(
    prepared: PreparedModel,
    losses: LossModel,
    choice: Choice,
    kinds: Mapping[str, Mapping[str, float]],
    *,
    left: Collection[str],
    method: str = "hap",
    preset: str | None = None,
) -> dict[str, str]:
    """Say for each contraction why it becomes an implant or stays as it is.

    Args:
        kinds: those that the plan was free to use, by node.
        left: the nodes that the plan leaves.
    """
    refusals = explain_refusals(prepared)
    replaced = {replacement.node: replacement for replacement in choice.replacements}
    notes = {}
    for node in prepared.graph.nodes:
        has_weight = any(isinstance(tensor, gs.Constant) for tensor in node.inputs[:2])
        if linear_form(node) is None and (not has_weight or node_macs(node, prepared.shapes) == 0):
            continue
        if node.name in replaced:
            why = _explain_implant(losses.implants[node.name], replaced[node.name], preset)
        elif node.name not in left:
            why = GONE
        elif method == "prune":
            why = "as it is: the method does not use implants"
        elif node.name not in losses.implants:
            why = f"as it is: {refusals.get(node.name, 'no kind of implant fits it')}"
        elif not kinds.get(node.name):
            why = "as it is: no implant of it saved enough time in onnxruntime"
        elif preset is not None:
            why = "as it is: none of its channels is among the most sensitive of those below the threshold"
        else:
            why = "as it is: an implant that is cheaper loses more per cost than what was done elsewhere"
        notes[node.name] = why
    return notes


def _explain_implant(losses: ImplantLosses, one: NodeReplacement, preset: str | None) -> str:
    what = f"{one.kind} of rank {one.rank}"
    if preset is not None:
        which = "its channels are the most sensitive below the threshold"
        return f"{what}: {which}; expected loss {one.expected_loss:.3g}"
    n = len(losses.predicted)
    how = f"corrected by {n} measurements of {losses.measured_kind} here" if n else "not measured"
    return (
        f"{what}: loses less per cost than other ranks and narrower widths; "
        f"predicted loss {one.predicted_loss:.3g}, expected {one.expected_loss:.3g} ({how})"
    )


def with_measured(losses: LossModel, replacements: Iterable[NodeReplacement]) -> tuple[NodeReplacement, ...]:
    """Add to each implant what was measured on its layer, beside what had been predicted."""
    found = []
    for replacement in replacements:
        layer = losses.implants[replacement.node]
        pairs = zip(layer.predicted.tolist(), layer.ratios.tolist(), strict=True)
        measured = tuple((layer.measured_kind, loss, loss * ratio) for loss, ratio in pairs)
        found.append(replace(replacement, measured=measured))
    return tuple(found)


def plan_summary(rounds: Sequence[PreparedModel], plan: CompressionPlan) -> reports.PlanSummary:
    """What a plan does, for the report; ``rounds`` are the models that its rounds started from.

    With several rounds, groups and layers are those of the original, as they are in the end; groups that a
    later round has found, such as the ranks of implants, follow.
    """
    parts = [
        _round_summary(prepared, part) for prepared, part in zip(rounds, (*plan.earlier, plan), strict=True)
    ]
    groups: dict[str, reports.GroupKept] = {}
    implants: dict[str, reports.ImplantUsed] = {}
    layers: dict[str, reports.LayerChosen] = {}
    for part in parts:
        for group in part.groups:
            before = groups.get(group.name)
            if before is not None and before.kept == group.size:
                group = replace(group, size=before.size)
            groups[group.name] = group
        implants.update({implant.node: implant for implant in part.implants})
        for layer in part.layers:
            # A layer that has become an implant is no dense layer in later rounds.
            if layer.choice != "dense" or layer.node not in implants:
                layers[layer.node] = layer
    return reports.PlanSummary(
        groups=tuple(groups.values()),
        implants=tuple(implants.values()),
        removed_branches=tuple(node for part in parts for node in part.removed_branches),
        layers=tuple(layers.values()),
    )


def _round_summary(prepared: PreparedModel, plan: CompressionPlan) -> reports.PlanSummary:
    groups = {group.name: group for group in prepared.coupling.groups}
    return reports.PlanSummary(
        groups=tuple(
            reports.GroupKept(d.group, d.size, len(d.keep), plan.notes.get(d.group)) for d in plan.decisions
        ),
        implants=tuple(
            reports.ImplantUsed(
                r.node,
                r.kind,
                r.rank,
                r.predicted_loss,
                r.expected_loss,
                tuple(reports.MeasuredLoss(*measured) for measured in r.measured),
            )
            for r in plan.replacements
        ),
        removed_branches=tuple(
            node for d in plan.decisions if not len(d.keep) for node in groups[d.group].consumers
        ),
        layers=tuple(
            reports.LayerChosen(node.name, _become(node.name, plan), plan.layer_notes[node.name])
            for node in prepared.graph.nodes
            if node.name in plan.layer_notes
        ),
    )


def _become(node: str, plan: CompressionPlan) -> str:
    """What a plan has made of a layer of which it has a note."""
    if plan.layer_notes[node] == GONE:
        return "removed"
    return next((one.kind for one in plan.replacements if one.node == node), "dense")


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def recovery_summary(plan: CompressionPlan) -> tuple[reports.RoundRecovered, ...]:
    """How each round was repaired, for the report."""
    return tuple(
        reports.RoundRecovered(
            method=str(part.config.get("recover", "refit")),
            **{name: _as_tuple(part.training.get(name)) for name in reports.TRAINING_FACTS},
        )
        for part in (*plan.earlier, plan)
    )


def frozen_nodes(prepared: PreparedModel) -> tuple[reports.FrozenNode, ...]:
    """What cannot be pruned and why, for the report."""
    return tuple(reports.FrozenNode(entry.node, entry.reason) for entry in prepared.coupling.frozen)


def judge_quality(measured: metrics.Quality, limit: float | None) -> reports.Quality:
    """The measured quality with the verdict of the gate; without an interval the drop stands for it."""
    drop = measured.before - measured.after
    interval = measured.interval if measured.interval is not None else (drop, drop)
    return reports.Quality(
        metric=measured.metric,
        before=measured.before,
        after=measured.after,
        drop=drop,
        interval=(float(interval[0]), float(interval[1])),
        n_samples=measured.n_samples,
        max_drop=limit,
        passed=limit is None or bool(drop <= limit + 1e-12),
    )


def installed_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "hap_onnx": hap_onnx.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": ort.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
