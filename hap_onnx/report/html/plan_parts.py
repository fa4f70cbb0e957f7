"""What was found out about a model and what was done to it: charts along its depth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from hap_onnx.report import AnalyzeReport, CompressReport, LayerChosen, PlanSummary, words
from hap_onnx.report.analysis import Analysis, GroupSensitivity, LayerSensitivity, LossPoint
from hap_onnx.report.html import charts
from hap_onnx.report.html.answers import size_of
from hap_onnx.report.html.parts import Chart, Section, Table

LOSS = "loss (0: no change, 1: ignores its input)"
_FATES = ("kept whole", "made narrower", "removed")
"""What may have become of a group; without a plan all are as the first, and the chart needs no legend."""
_CHOICES = ("left as it is", "replaced", "removed")
"""The same of a layer."""
_HOW_ESTIMATED = {"obs": "Measured by taking away half of the group and repairing what reads it (obs)."}


# ---------------------------------------------------------------- sensitivities


def sensitivities(analysis: Analysis | None) -> list[Section]:
    """How much each group and each layer matters."""
    if analysis is None:
        return []
    found = []
    if analysis.groups:
        found.append(_groups_section(analysis))
    if analysis.layers:
        found.append(_layers_section(analysis))
    return found


def _unknown(scores: Sequence[float]) -> str:
    """What an open mark at the right end is; nothing if there is none."""
    return "" if all(map(math.isfinite, scores)) else " An open mark at the right end: not known."


def _groups_section(analysis: Analysis) -> Section:
    groups = analysis.groups
    dots = [charts.Dot(group.name, group.score, _error(group.std_error), _fate(group)) for group in groups]
    drawing = charts.draw_dots("groups", dots, label="sensitivity per channel", series=_FATES)
    rows = [
        (group.name, group.role, str(group.size), "" if group.kept is None else str(group.kept),
        _sci(group.score),
         _sci(group.std_error), words.count(group.params), words.count(group.macs))
        for group in groups
    ]  # fmt: skip
    table = Table(
        "Sensitivity of each channel group",
        ("channel group", "role", "channels", "kept", "sensitivity", "standard error", "parameters", "MACs"),
        tuple(rows),
        frozenset({0, 1}),
    )
    caption = (
        "How much the outputs depend on one channel of each group, from the first layer on top to the last "
        "one. Further right matters more; equal steps are equal factors. Bars are 95 % intervals. "
        f"{_HOW_ESTIMATED.get(analysis.sensitivity, f'Estimated by {analysis.sensitivity}.')}"
        f"{_unknown([group.score for group in groups])}"
    )
    section = Chart(_extremes("channel groups", [(g.name, g.score) for g in groups]), caption, drawing, table)
    return Section("groups", "Sensitivity of channel groups", [section])


def _fate(group: GroupSensitivity) -> str:
    if group.kept is None:
        return _FATES[0]
    return _FATES[0 if group.kept == group.size else 1 if group.kept else 2]


def _layers_section(analysis: Analysis) -> Section:
    layers = analysis.layers
    dots = [charts.Dot(layer.node, layer.score, _error(layer.std_error), _choice(layer)) for layer in layers]
    drawing = charts.draw_dots("layers", dots, label="expected loss at half its MACs", series=_CHOICES)
    rows = [
        (layer.node, layer.op_type, layer.chosen or "", _sci(layer.score), _sci(layer.std_error),
         words.count(layer.params), words.count(layer.macs))
        for layer in layers
    ]  # fmt: skip
    table = Table(
        "Sensitivity of each layer",
        ("layer", "operator", "chosen", "loss", "standard error", "parameters", "MACs"),
        tuple(rows),
        frozenset({0, 1, 2}),
    )
    caption = (
        "What it would cost to put a stand-in with half the arithmetic in the place of each layer, from the "
        f"first layer on top to the last one. {LOSS[0].upper()}{LOSS[1:]}; bars are 95 % intervals."
        f"{_unknown([layer.score for layer in layers])}"
    )
    section = Chart(_extremes("layers", [(x.node, x.score) for x in layers]), caption, drawing, table)
    return Section("layers", "Sensitivity of layers", [section])


def _choice(layer: LayerSensitivity) -> str:
    if layer.chosen is None:
        return _CHOICES[0]
    return _CHOICES[{"dense": 0, "removed": 2}.get(layer.chosen, 1)]


def _error(std_error: float | None) -> float | None:
    """A standard error that can be drawn."""
    return std_error if std_error is not None and math.isfinite(std_error) else None


def _extremes(what: str, scores: Sequence[tuple[str, float]]) -> str:
    text = f"Chart: sensitivity of {len(scores)} {what} on a logarithmic axis"
    known = sorted((score, name) for name, score in scores if math.isfinite(score))
    if not known:
        return f"{text}; none is known."
    (least, first), (most, last) = known[0], known[-1]
    return f"{text}, from {_sci(least)} ({first}) to {_sci(most)} ({last})."


def _sci(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if math.isfinite(value) else "not known"


# ---------------------------------------------------------------- what was done

SHARES = ("kept", "replaced", "removed")


def changes(report: CompressReport) -> Section | None:
    """What was kept, replaced and removed of each layer, along the depth."""
    shares = _layer_shares(report.plan, report.analysis)
    if not shares:
        return None
    bars = [charts.Bar(name, tuple(zip(SHARES, parts, strict=True))) for name, parts, _ in shares]
    drawing = charts.draw_bars("changes", bars, label="% of the channels", series=SHARES)
    why = {layer.node: layer.why for layer in report.plan.layers}
    why.update({group.name: group.why for group in report.plan.groups if group.name not in why and group.why})
    rows = [
        (name, *(f"{part:.0f}" for part in parts), choice, why.get(name, ""))
        for name, parts, choice in shares
    ]
    table = Table(
        "What became of each layer, in per cent of its channels",
        ("layer", *SHARES, "stand-in", "why"),
        tuple(rows),
        frozenset({0, 4, 5}),
    )
    n_narrow = sum(parts[2] > 0 for _, parts, _ in shares)
    n_replaced = sum(parts[1] > 0 for _, parts, _ in shares)
    text = (
        f"Chart: what was kept, replaced and removed in each of {words.plural(len(shares), 'layer')}. "
        f"{n_narrow} lost channels, {n_replaced} got a cheaper stand-in."
    )
    caption = (
        "Each bar is a layer, from the first on top to the last. Removed: its channels are gone. Replaced: a "
        "cheaper stand-in (an implant) computes them. Kept: as before."
    )
    return Section("changes", "What was changed", [Chart(text, caption, drawing, table)])


def _layer_shares(
    plan: PlanSummary, analysis: Analysis | None
) -> list[tuple[str, tuple[float, float, float], str]]:
    """Of each layer: its name, what was kept, replaced and removed in per cent, and its stand-in."""
    kept_of = {group.name: 100 * group.kept / group.size for group in plan.groups if group.size}
    for group in analysis.groups if analysis is not None else ():
        share = kept_of.get(group.name)
        kept_of.update({node: share for node in group.nodes if share is not None and node not in kept_of})
    kept_of.update(dict.fromkeys(plan.removed_branches, 0.0))
    # Pointwise kernels are in groups that only their layer produces, which bear its name.
    pointwise = {
        implant.node: (implant.rank or 0) / max(group.kept, 1)
        for implant in plan.implants
        for group in plan.groups
        if implant.kind == "pointwise" and group.name == implant.node
    }
    layers = plan.layers or tuple(LayerChosen(group.name, "dense", "") for group in plan.groups)
    shares = []
    for layer in layers:
        left = kept_of.get(layer.node, 100.0)
        if layer.choice == "removed":
            left = 0.0
        is_whole = layer.choice in ("dense", "removed")
        replaced = 0.0 if is_whole else left * min(1.0, pointwise.get(layer.node, 1.0))
        parts = (left - replaced, replaced, 100 - left)
        shares.append((layer.node, parts, "" if is_whole else layer.choice))
    return shares


# ---------------------------------------------------------------- loss and size


def sizes(analysis: Analysis | None) -> Section | None:
    """The least expected loss for each size."""
    if analysis is None or not analysis.sizes:
        return None
    cost = words.COST_NAMES.get(analysis.objective, analysis.objective)
    points = [(100 * size_of(point, analysis.objective), point.loss) for point in analysis.sizes]
    points = [point for point in points if all(map(math.isfinite, point))]
    chosen = None
    if analysis.chosen is not None and math.isfinite(analysis.chosen.loss):
        chosen = (100 * size_of(analysis.chosen, analysis.objective), analysis.chosen.loss)
    if not points:
        return None
    drawing = charts.draw_curve("sizes", points, chosen, x=f"{cost} left, %", y="expected loss")
    listed = [*((point, "") for point in analysis.sizes)]
    if analysis.chosen is not None:
        listed.append((analysis.chosen, "this plan"))
    rows = [
        (words.share(point.asked), words.share(point.params_ratio), words.share(point.macs_ratio),
         "" if point.latency_ratio is None else words.share(point.latency_ratio), _sci(point.loss), note)
        for point, note in listed
    ]  # fmt: skip
    table = Table(
        "Expected loss for each size",
        ("asked", "parameters", "MACs", "latency", "expected loss", ""),
        tuple(rows),
        frozenset({5}),
    )
    text = (
        f"Chart: expected loss over {cost} left, from {points[0][1]:.3g} at {points[0][0]:.1f} % "
        f"to {points[-1][1]:.3g} at {points[-1][0]:.1f} %."
    )
    if chosen:
        text += f" This plan: {chosen[1]:.3g} at {chosen[0]:.1f} %."
    caption = (
        "The smaller the model (further left), the larger the loss that the planner expects, before repair. "
        "Equal steps upwards are equal factors; a loss of 0 stands at the lower end."
    )
    return Section("sizes", "Loss against size", [Chart(text, caption, drawing, table)])


# ---------------------------------------------------------------- prediction


def predictions(report: CompressReport | AnalyzeReport) -> Section | None:
    """Losses that were predicted against those that were measured."""
    found = list(_measured_points(report))
    found = [item for item in found if item[2].predicted > 0 and (item[2].measured or 0) > 0]
    found = [
        item for item in found if math.isfinite(item[2].predicted) and math.isfinite(item[2].measured or 0)
    ]
    if not found:
        return None
    marks = [
        charts.Mark(point.predicted, point.measured or 0.0, _error(point.std_error), series)
        for series, _, point in found
    ]
    drawing = charts.draw_agreement("predictions", marks, x="predicted loss", y="measured loss")
    rows = [
        (name, series, _sci(point.predicted), _sci(point.measured), _sci(point.std_error))
        for series, name, point in found
    ]
    table = Table(
        "Predicted and measured losses",
        ("where", "what", "predicted", "measured", "standard error"),
        tuple(rows),
        frozenset({0, 1}),
    )
    ratios = sorted((point.measured or 0.0) / point.predicted for _, _, point in found)
    middle = ratios[len(ratios) // 2]
    near = sum(0.5 <= ratio <= 2 for ratio in ratios)
    caption = (
        "Before a plan is made, the losses that curvature predicts are checked by trying some of them. On "
        "the dashed line a prediction is right; above it, the loss is larger than predicted. Of "
        f"{words.plural(len(found), 'trial')}, {near} came within a factor of two; the middle one measured "
        f"{middle:.2f} times its prediction. Plans reckon with predictions that these measurements have "
        "corrected."
    )
    text = (
        f"Chart: measured over predicted loss of {words.plural(len(found), 'trial')}, both on logarithmic "
        f"axes; {near} within a factor of two."
    )
    return Section("predictions", "Predicted and measured loss", [Chart(text, caption, drawing, table)])


def _measured_points(report: CompressReport | AnalyzeReport) -> Iterable[tuple[str, str, LossPoint]]:
    """Series, name and point of all that was measured; what a plan tried where there is no analysis."""
    if report.analysis is not None:
        for group in report.analysis.groups:
            for point in group.curve:
                if point.measured is not None:
                    yield "fewer channels", group.name, point
        for layer in report.analysis.layers:
            for curve in layer.curves:
                for point in curve.points:
                    if point.measured is not None:
                        yield "stand-ins", f"{layer.node} ({curve.kind})", point
    elif isinstance(report, CompressReport):
        for implant in report.plan.implants:
            for one in implant.measured:
                point = LossPoint(math.nan, one.predicted, math.nan, one.measured)
                yield "stand-ins", f"{implant.node} ({one.kind})", point
