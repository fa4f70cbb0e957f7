"""What replacing layers by implants is expected to cost: predicted by curvature, corrected by measurement.

    layers = find_implant_layers(prepared)
    losses = measure_implants(graph, twin, layers, curvature, subset, ...)
    options = implant_options(losses[node], cost_layer, kept, align="auto")

The prediction is 1/2 tr(G D A D^T) for the change D of the weight (see ``implants.factors``), with the
statistics of the channels that the plan leaves: a rank is priced at the widths it will have. It counts what
happens at the layer, to second order. What the rest of the model makes of it is measured at two ranks of each
layer, as the distance of the model's outputs when the layer alone has its implant's weights, and the ratio of
measured to predicted loss is interpolated over the predicted loss (both in logs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray
from torch import Tensor

from hap_onnx.coupling.channels import ChannelGroup, Coupling
from hap_onnx.data.calibration import Subset
from hap_onnx.distributed import ALONE, Team
from hap_onnx.events import OnEvent, ignore_event
from hap_onnx.implants.factors import Metric, find_family, make_metric
from hap_onnx.model.measure import Shapes, constants_of
from hap_onnx.ops.implant import ImplantForm, implant_forms, is_of_implant
from hap_onnx.ops.linear import LinearForm, linear_form
from hap_onnx.planning.align import Align, allowed_widths
from hap_onnx.planning.cost import LATENCY, N_METRICS, LayerTerms
from hap_onnx.planning.cost_graph import replaceable_layers
from hap_onnx.planning.curves import Fork, Measured, finite_loss, run_forks
from hap_onnx.planning.times import NodeTimes
from hap_onnx.prepare import PreparedModel
from hap_onnx.sensitivity.curvature import LayerCurvature
from hap_onnx.surgery.grafting import permutable_groups
from hap_onnx.twin import Twin

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MEASURED_SHARES = (0.5, 0.25)
"""Shares of a layer's multiply-accumulates at which an implant of it is measured."""
ROUNDING = 1e-4
"""Of second moments, which are sums in float32: the covariance of nearly constant inputs is rounding."""
_TINY = 1e-14
_ALL = b"all"


@dataclass(frozen=True)
class ImplantLayer:
    """A contraction that may be replaced: its weight is its own, and at least one kind fits."""

    node: str
    weight: str
    bias: str | None
    form: LinearForm
    forms: tuple[ImplantForm, ...]

    def kind(self, name: str) -> ImplantForm:
        """Return the form of the kind of that name."""
        return next(form for form in self.forms if form.kind == name)


@dataclass(frozen=True)
class ImplantLosses:
    """Curvature of a layer and how far its prediction was off where it was measured.

    ``predicted`` ascends; ``ratios`` are measured / predicted at the same places, of ``measured_kind``;
    ``measured`` is what was measured, by rank of that kind.
    ``known`` remembers losses of all ranks by kind and positions left: what has been worked out once.
    """

    layer: ImplantLayer
    curvature: LayerCurvature
    weight: Tensor
    predicted: Floats
    ratios: Floats
    measured_kind: str = ""
    measured: Mapping[int, Measured] = field(default_factory=dict)
    known: dict[tuple[str, bytes, bytes], Floats] = field(default_factory=dict, repr=False, compare=False)

    def correct(self, predicted: Floats) -> Floats:
        """Turn predicted losses into expected ones."""
        if not len(self.predicted):
            return predicted
        logs = np.log(np.maximum(predicted, _TINY))
        ratios = np.exp(np.interp(logs, np.log(self.predicted), np.log(self.ratios)))
        return np.asarray(np.maximum(predicted, 0.0) * ratios)


@dataclass(frozen=True)
class CutLayer:
    """A layer with the channels that a plan leaves: weight [g, O, F], its metric, mean inputs [g, F].

    ``mean`` is None where there is no bias to take it up (then ``metric`` has second moments).
    """

    weight: Tensor
    metric: Metric
    mean: Tensor | None


def find_implant_layers(prepared: PreparedModel) -> tuple[ImplantLayer, ...]:
    """Return the contractions that implants may replace: with a weight of their own that may be touched.

    Pointwise kernels need their channels last, so they are offered where one group makes up the outputs of a
    layer and nothing minds the order of its channels, which is proven on the model.
    """
    found = _look_at_contractions(prepared)
    permutable = permutable_groups(prepared)
    layers = []
    for layer in found.values():
        if isinstance(layer, str):
            continue
        group = sole_group(prepared.coupling, layer)
        can_follow = group is not None and group.name in permutable
        forms = tuple(form for form in layer.forms if form.kind != "pointwise" or can_follow)
        if forms:
            layers.append(replace(layer, forms=forms))
    return tuple(layers)


def explain_refusals(prepared: PreparedModel) -> dict[str, str]:
    """Say, for each contraction that cannot become an implant, why."""
    return {node: why for node, why in _look_at_contractions(prepared).items() if isinstance(why, str)}


def _look_at_contractions(prepared: PreparedModel) -> dict[str, ImplantLayer | str]:
    """Each contraction as a layer with all kinds that fit it, or the reason why it must stay as it is."""
    graph = prepared.graph
    readers: dict[str, int] = {}
    for node in graph.nodes:
        for tensor in constants_of(node):
            readers[tensor.name] = readers.get(tensor.name, 0) + 1
    outputs = {tensor.name for tensor in graph.outputs}
    found: dict[str, ImplantLayer | str] = {}
    for node in graph.nodes:
        form = linear_form(node)
        if form is None:
            continue
        weight = node.inputs[form.weight_index]
        bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        forms = implant_forms(node)
        if {node.name, weight.name} & prepared.untouched:
            found[node.name] = "it is excluded"
        elif prepared.implants_stay and is_of_implant(weight):
            found[node.name] = "it is part of an implant already"
        elif weight.name in prepared.stored:
            found[node.name] = "its weight is stored in 8 bits, which implants are not"
        elif readers[weight.name] != 1 or weight.name in outputs:
            found[node.name] = f"its weight '{weight.name}' is used elsewhere, too"
        elif bias is not None and not isinstance(bias, gs.Constant):
            found[node.name] = "its bias is computed by other nodes"
        elif not np.isfinite(weight.values).all():
            found[node.name] = f"its weight '{weight.name}' holds NaN or infinity"
        elif not forms:
            found[node.name] = "no kind of implant fits it"
        else:
            is_own = bias is not None and form.bias_index is not None and readers[bias.name] == 1
            own_bias = bias.name if bias is not None and is_own else None
            if own_bias in outputs | prepared.untouched:
                own_bias = None
            found[node.name] = ImplantLayer(node.name, weight.name, own_bias, form, forms)
    offered = {name for name, layer in found.items() if isinstance(layer, ImplantLayer)}
    for name in offered - replaceable_layers(graph, prepared.coupling, prepared.shapes, offered):
        found[name] = "its channels go together with those that it reads, which no implant follows"
    return found


def sole_group(coupling: Coupling, layer: ImplantLayer) -> ChannelGroup | None:
    """The group that makes up all of a layer's outputs and that it alone produces, if there is one."""
    for axis in coupling.weights:
        if (axis.initializer, axis.axis) != (layer.weight, layer.form.out_axis):
            continue
        for group in coupling.groups:
            same = np.array_equal(np.sort(axis.elements), np.sort(group.elements))
            if same and group.producers == (layer.node,):
                return group
    return None


def cut_layer(losses: ImplantLosses, outputs: Ints | None = None, inputs: Ints | None = None) -> CutLayer:
    """Restrict a layer to the positions of its weight's output and input axis that stay, in a new order.

    Args:
        outputs: positions of the weight's output axis, of all conv groups; equally many of each.
        inputs: positions of the weight's input axis, of one conv group.
    """
    weight, moments = losses.weight, losses.curvature.inputs
    gradients = losses.curvature.gradients
    n_outputs, n_taps = weight.shape[1], losses.layer.form.n_taps
    if outputs is not None:
        of_group = np.unique(outputs // n_outputs)
        rows = torch.from_numpy((outputs % n_outputs).reshape(len(of_group), -1))
        left = torch.from_numpy(of_group)
        weight = torch.take_along_dim(weight[left], rows[:, :, None], 1)
        gradients = torch.take_along_dim(gradients[left], rows[:, :, None], 1)
        gradients = torch.take_along_dim(gradients, rows[:, None, :], 2)
        moments = moments[left]
    has_mean = moments.ndim == 3 and losses.layer.bias is not None
    mean = moments[:, :-1, -1] if has_mean else None
    moments = moments[:, :-1] if moments.ndim == 2 else moments[:, :-1, :-1]
    if inputs is not None:
        features = (torch.from_numpy(inputs)[:, None] * n_taps + torch.arange(n_taps)).reshape(-1)
        weight = weight[:, :, features]
        mean = None if mean is None else mean[:, features]
        moments = moments[:, features] if moments.ndim == 2 else moments[:, features][:, :, features]
    if mean is not None:
        noise = ROUNDING * moments.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        moments = torch.baddbmm(moments, mean[:, :, None], mean[:, None, :], alpha=-1)
        moments.diagonal(dim1=1, dim2=2).add_(noise)
    return CutLayer(weight, make_metric(moments, gradients), mean)


def measure_implants(
    graph: gs.Graph,
    twin: Twin,
    layers: Sequence[ImplantLayer],
    curvature: Mapping[str, LayerCurvature],
    subset: Subset,
    *,
    scales: Mapping[str, float],
    batch_size: int,
    team: Team = ALONE,
    on_event: OnEvent = ignore_event,
) -> dict[str, ImplantLosses]:
    """Compare predicted and measured losses of each layer at two ranks.

    Layers without curvature, that no gradient reaches or one that is not finite, are left out: nothing is
    known about them.
    """
    nodes = {node.name: node for node in graph.nodes}
    position = {step.name: index for index, step in enumerate(twin.steps)}
    found: dict[str, ImplantLosses] = {}
    predicted: dict[tuple[str, int], float] = {}
    kind_of: dict[str, str] = {}
    forks: list[Fork] = []
    for layer in layers:
        if layer.node not in curvature or not _is_finite(curvature[layer.node]):
            continue
        matrix = layer.form.to_matrix(twin.constant(layer.weight).detach()).double()
        empty = np.zeros(0)
        losses = ImplantLosses(layer, curvature[layer.node], matrix, empty, empty)
        found[layer.node] = losses
        cut = cut_layer(losses)
        form = _measured_form(layer, cut)
        if form is None:
            continue
        kind_of[layer.node] = form.kind
        family = find_family(cut.weight, cut.metric, kind=form.kind, taps=form.taps, tap=form.tap)
        every = family.losses()
        # The planner will ask for these.
        losses.known[form.kind, _ALL, _ALL] = every
        for share in MEASURED_SHARES:
            rank = int(np.clip(round(share * _even_rank(form, cut.weight)), 1, len(every) - 1))
            if (layer.node, rank) in predicted:
                continue
            predicted[layer.node, rank] = float(every[rank])
            overrides = weight_overrides(layer, nodes[layer.node], twin, cut, family.at(rank).dense)
            forks.append(Fork((layer.node, rank), position[layer.node], overrides))
    measured = run_forks(
        twin, subset, forks, scales=scales, batch_size=batch_size, team=team, on_event=on_event
    )
    for name in found:
        points = sorted(
            (max(loss, _TINY), finite_loss(measured[key].loss, least=_TINY))
            for key, loss in predicted.items()
            if key[0] == name
        )
        if points:
            p, m = np.array(points).T
            p = np.maximum.accumulate(p * (1 + 1e-9 * np.arange(len(p))))
            found[name] = replace(
                found[name],
                predicted=p,
                ratios=m / p,
                measured_kind=kind_of[name],
                measured={rank: measured[node, rank] for node, rank in predicted if node == name},
            )
    return found


def _is_finite(curvature: LayerCurvature) -> bool:
    return bool(torch.isfinite(curvature.inputs).all() and torch.isfinite(curvature.gradients).all())


def _measured_form(layer: ImplantLayer, cut: CutLayer) -> ImplantForm | None:
    """The kind that is measured for all: the one with the most taps split, which loses least."""
    usable = [form for form in layer.forms if form.kind != "pointwise"]
    if cut.metric.inputs.ndim == 2:
        usable = [form for form in usable if form.taps[1] == 1]
    return max(usable, key=lambda form: min(form.taps), default=None)


def _even_rank(form: ImplantForm, weight: Tensor) -> float:
    """The rank at which two factors have as many weights as the layer they replace, per conv group."""
    _, n_outputs, n_features = weight.shape
    first = n_features // prod(form.taps) * form.taps[0]
    return n_outputs * n_features / (first + n_outputs * form.taps[1])


def weight_overrides(
    layer: ImplantLayer, node: gs.Node, twin: Twin, cut: CutLayer, dense: Tensor
) -> dict[tuple[str, int], Tensor]:
    """The layer's inputs that make it compute ``dense`` [g, O, F], the mean input made up for."""
    weight = twin.constant(layer.weight)
    result = {
        (layer.node, layer.form.weight_index): layer.form.to_weight(
            dense.to(weight.dtype), tuple(weight.shape)
        ).to(weight.device)
    }
    if cut.mean is not None and layer.bias is not None and layer.form.bias_index is not None:
        bias = twin.constant(layer.bias).detach()
        result[layer.node, layer.form.bias_index] = bias + bias_shift(cut, dense).reshape(bias.shape).to(bias)
    return result


def bias_shift(cut: CutLayer, dense: Tensor) -> Tensor:
    """What a layer's bias gains when its weight becomes ``dense``, so that the mean output stays: [g, O]."""
    if cut.mean is None:
        return cut.weight.new_zeros(cut.weight.shape[:2])
    return ((cut.weight - dense) @ cut.mean[:, :, None])[:, :, 0]


# --- options for the planner ---


@dataclass(frozen=True)
class ImplantChoice:
    """One way to have a layer; ``kind`` "" is the layer as it is."""

    kind: str
    rank: int


@dataclass(frozen=True)
class LayerMenu:
    """What a planner may choose for one layer at given widths: choice 0 is the layer as it is.

    ``coefficients`` int64 [n_choices, 4, n_metrics]: costs as ``planning.cost`` wants them. ``losses``
    [n_choices] are expected ones, ``predicted`` those without the correction by measurement.
    """

    node: str
    choices: tuple[ImplantChoice, ...]
    coefficients: Ints
    losses: Floats
    predicted: Floats


def implant_menu(
    losses: ImplantLosses,
    terms: LayerTerms,
    node: gs.Node,
    shapes: Shapes,
    *,
    kinds: Mapping[str, float],
    align: Align,
    times: NodeTimes | None = None,
    outputs: Ints | None = None,
    inputs: Ints | None = None,
) -> LayerMenu:
    """List the implants of a layer that are cheaper than what the plan leaves of it, with their losses.

    ``kinds``: those that may be used, each with the largest share of the layer's multiply-accumulates that it
    may have. Ranks come in steps of ``align``; ``auto`` is as for widths, and of 8 from
    32 channels on where a share below 1 says that time counts. ``times`` prices what they take.
    """
    form_of = {form.kind: form for form in losses.layer.forms if form.kind in kinds}
    every = losses_of_ranks(losses, form_of, outputs, inputs)
    n_taps, (n_groups, n_outputs, n_features) = losses.layer.form.n_taps, losses.weight.shape
    n_in = n_features // n_taps if inputs is None else len(inputs)
    n_out = n_groups * n_outputs if outputs is None else len(outputs)
    n_least = min(n_out // n_groups, n_in)
    lengths = np.array([n_in * n_out, n_in, n_out, 1])
    full = lengths @ terms.dense  # [n_metrics]
    choices, coefficients, predicted = [ImplantChoice("", 0)], [np.array(terms.dense)], [0.0]
    for kind, of_rank in every.items():
        most = len(of_rank) - 1 if kind != "pointwise" else n_out - 1  # something stays as it is
        step = align if align != "auto" else _rank_step(n_least, is_timed=kinds[kind] < 1)
        for rank in allowed_widths(most + 1, step, of=n_least).tolist():
            table = implant_costs(losses.layer, form_of[kind], rank, node, shapes, times=times)
            cost = lengths @ table
            if (cost < full).any() and cost[1] <= kinds[kind] * full[1] * (1 + 1e-9) and cost[2] >= 0:
                choices.append(ImplantChoice(kind, rank))
                coefficients.append(table)
                predicted.append(float(of_rank[rank]))
    plain = np.array(predicted)
    expected = losses.correct(plain)
    expected[0] = 0.0
    return LayerMenu(losses.layer.node, tuple(choices), np.stack(coefficients), expected, plain)


def losses_of_ranks(
    losses: ImplantLosses,
    forms: Mapping[str, ImplantForm],
    outputs: Ints | None = None,
    inputs: Ints | None = None,
) -> dict[str, Floats]:
    """Predicted losses of all ranks of each kind that can be had, remembered: planning asks repeatedly."""
    n_groups, n_outputs, n_features = losses.weight.shape
    outputs = _unless_all(outputs, n_groups * n_outputs)
    inputs = _unless_all(inputs, n_features // losses.layer.form.n_taps)
    has_diagonal = losses.curvature.inputs.ndim == 2
    usable = {kind: form for kind, form in forms.items() if not has_diagonal or form.taps[1] == 1}
    left, read = (_ALL if positions is None else positions.tobytes() for positions in (outputs, inputs))
    unknown = {kind: form for kind, form in usable.items() if (kind, left, read) not in losses.known}
    if unknown:
        cut = cut_layer(losses, outputs, inputs)
        for kind, form in unknown.items():
            family = find_family(cut.weight, cut.metric, kind=kind, taps=form.taps, tap=form.tap)
            losses.known[kind, left, read] = family.losses()
    return {kind: losses.known[kind, left, read] for kind in usable}


def _unless_all(positions: Ints | None, size: int) -> Ints | None:
    """Positions of an axis, None if they are all there are, in their order."""
    return None if positions is None or np.array_equal(positions, np.arange(size)) else positions


def _rank_step(size: int, *, is_timed: bool) -> int:
    """Steps of ranks; where time counts, those with which onnxruntime keeps its blocks of 8 channels."""
    if is_timed and size >= 32:
        return 8
    return 8 if size >= 64 else 4 if size >= 16 else 2 if size >= 8 else 1


def implant_costs(
    layer: ImplantLayer,
    form: ImplantForm,
    rank: int,
    node: gs.Node,
    shapes: Shapes,
    *,
    times: NodeTimes | None,
) -> Ints:
    """Costs of an implant of a layer, int64 [4, n_metrics], with what it takes if ``times`` tell."""
    n_groups, n_taps = layer.form.conv_group, layer.form.n_taps
    table = rank_coefficients(form, rank, node, shapes, n_groups=n_groups, n_taps=n_taps)
    if times is not None:
        table[:, LATENCY] = times.implants[layer.node, form.kind].at_rank(form.kind, rank, n_groups=n_groups)
    return table


def rank_coefficients(
    form: ImplantForm, rank: int, node: gs.Node, shapes: Shapes, *, n_groups: int, n_taps: int
) -> Ints:
    """Costs of an implant, int64 [4, n_metrics]: of inputs * outputs, inputs, outputs and 1; without latency.

    Inputs count those of one conv group, outputs those of all.
    """
    x, y = shapes[node.inputs[0].name], shapes[node.outputs[0].name]
    n_second = form.n_second(y)
    table = np.zeros((4, N_METRICS), np.int64)
    if form.kind == "pointwise":
        table[0, :2] = n_taps, n_taps * n_second
        table[1, :2] = -rank * (n_taps - 1), -rank * (n_taps - 1) * n_second
        return table
    first, second = n_groups * rank * form.taps[0], rank * form.taps[1]
    table[1, :2] = first, first * form.n_first(x, y)
    table[2, :2] = second, second * n_second
    return table
