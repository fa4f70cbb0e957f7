"""From a decision to a model: channels are removed, layers replaced, and what is left is repaired.

Channels go first, by surgery on the model with its layers dense; that cut is proven exact. Then factors of
the layers to be replaced are computed: by the metric alone, or by the refit, which knows what the layers read
by then and lets the layers behind make up for the rest. Factors become nodes last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from hap_onnx.data.calibration import Subset
from hap_onnx.distributed import ALONE, Team
from hap_onnx.errors import ModelError, SurgeryError
from hap_onnx.events import OnEvent, ignore_event
from hap_onnx.implants.factors import Factors, Metric, factorise
from hap_onnx.implants.loss import CutLayer, ImplantLayer, ImplantLosses, bias_shift, cut_layer
from hap_onnx.ops.implant import ImplantForm, implant_forms
from hap_onnx.ops.linear import linear_form
from hap_onnx.planning.choose import Choice, Slots, arrange, keep_mask
from hap_onnx.prepare import PreparedModel, try_cut
from hap_onnx.refit import FittedImplant, ImplantSpec, refit
from hap_onnx.surgery import Kept, kept_positions, remove_channels, with_weights
from hap_onnx.surgery.grafting import implant_names, insert_implants

Arrays = tuple[NDArray[np.generic], ...]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class CutModel:
    """A model without the channels that a choice removes, its layers still dense.

    ``prepared`` may have its channels in another order than the original; ``keep`` has one flag per element
    of it. ``layers`` holds each layer that becomes an implant, by node, and the positions of its weight's
    output and input axis that are left.
    """

    prepared: PreparedModel
    choice: Choice
    keep: NDArray[np.bool_]
    graph: gs.Graph
    layers: Mapping[str, tuple[ImplantLosses, tuple[Ints | None, Ints | None]]]

    def left_of(self, node: str) -> tuple[ImplantLayer, CutLayer]:
        """What is left of a layer: made when asked for, since a metric may have hundreds of megabytes."""
        losses, positions = self.layers[node]
        return losses.layer, cut_layer(losses, *positions)

    def metric_of(self, node: str) -> Metric:
        """The metric of what is left of a layer."""
        return self.left_of(node)[1].metric


@dataclass(frozen=True)
class Compressed:
    """A compressed model: ``graph`` has dense layers, and ``implants`` (kind, arrays) by node replace some.

    ``weights`` are new values of initializers of ``graph``.
    """

    choice: Choice
    graph: gs.Graph
    weights: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    implants: Mapping[str, tuple[str, Arrays]] = field(default_factory=dict)

    def finished(self) -> gs.Graph:
        """Return the graph with its weights and implants in place."""
        graph = with_weights(self.graph, self.weights)
        return insert_implants(graph, self.implants) if self.implants else graph

    def with_trained(self, values: Mapping[str, NDArray[np.generic]]) -> Compressed:
        """Return it with other values for initializers of its finished graph."""
        rest = dict(values)
        graph = with_weights(self.graph, self.weights)
        names, tensors = implant_names(graph, self.implants), graph.tensors()
        implants: dict[str, tuple[str, Arrays]] = {}
        for node, (kind, arrays) in self.implants.items():
            given, parts = names[node].weights, names[node].bias_parts
            implants[node] = kind, tuple(map(rest.pop, given, arrays))
            if any(part in rest for part in parts):
                n_full = arrays[0].shape[0]
                pieces = np.split(tensors[names[node].bias].values, [n_full])
                rest[names[node].bias] = np.concatenate(list(map(rest.pop, parts, pieces)))
        return replace(self, weights={**self.weights, **rest}, implants=implants)

    def plan_weights(self) -> dict[str, NDArray[np.generic]]:
        """All that is more than slices of the original's initializers: these by name, factors by node."""
        factors = {
            key: array
            for name, (_, arrays) in self.implants.items()
            for key, array in zip(_factor_keys(name), arrays, strict=True)
        }
        taken = sorted(set(factors) & set(self.weights))
        if taken:
            raise SurgeryError(f"the initializer '{taken[0]}' has a name that plans keep for implants")
        return {**self.weights, **factors}


def _factor_keys(node: str) -> tuple[str, str]:
    """Under which keys a plan keeps the factors of an implant: names of initializers may be taken."""
    return f"implant:{node}:0", f"implant:{node}:1"


def _find_form(node: gs.Node, kind: str) -> ImplantForm:
    for form in implant_forms(node):
        if form.kind == kind:
            return form
    raise ModelError(f"{node.op} '{node.name}' cannot become a {kind} implant")


def cut_model(prepared: PreparedModel, choice: Choice, implants: Mapping[str, ImplantLosses]) -> CutModel:
    """Remove the channels of a choice; raises SurgeryError unless that is exact."""
    arranged, keep, order = arrange(prepared, choice)
    complaint = try_cut(arranged, keep)
    if complaint is not None:
        raise SurgeryError(f"the planned cut is not exact: {complaint}; please report it with the model")
    graph = remove_channels(arranged.graph, arranged.coupling, keep, shapes=arranged.probe_shapes)
    original_keep = keep if order is None else _inverse(keep, order)
    slots = Slots(prepared.coupling, original_keep, order)
    layers = {}
    for replacement in choice.replacements:
        losses = implants[replacement.node]
        layers[replacement.node] = (losses, slots.of_layer(losses.layer))
    return CutModel(arranged, choice, keep, graph, layers)


def _inverse(keep: NDArray[np.bool_], order: NDArray[np.int64]) -> NDArray[np.bool_]:
    result = np.empty_like(keep)
    result[order] = keep
    return result


def compress_layers(cut: CutModel) -> Compressed:
    """Compute implants from the metric alone; weights of other layers stay as they are."""
    nodes = {node.name: node for node in cut.graph.nodes}
    constants = {name: t for name, t in cut.graph.tensors().items() if isinstance(t, gs.Constant)}
    weights: dict[str, NDArray[np.generic]] = {}
    implants: dict[str, tuple[str, Arrays]] = {}
    for replacement in cut.choice.replacements:
        layer, left = cut.left_of(replacement.node)
        form = layer.kind(replacement.kind)
        factors = factorise(
            left.weight, left.metric, kind=form.kind, rank=replacement.rank, taps=form.taps, tap=form.tap
        )
        implants[layer.node] = (form.kind, _to_arrays(nodes[layer.node], factors))
        if layer.bias is not None:
            bias = constants[layer.bias].values
            shift = bias_shift(left, factors.dense).numpy().reshape(bias.shape)
            weights[layer.bias] = (bias + shift).astype(np.float32)
    return Compressed(cut.choice, cut.graph, weights, implants)


def refit_layers(
    cut: CutModel,
    subset: Subset,
    *,
    batch_size: int,
    seed: int,
    work_dir: Path | None = None,
    device: str = "cpu",
    team: Team = ALONE,
    on_event: OnEvent = ignore_event,
) -> Compressed:
    """Refit what is left, with implants computed from what their layers read by then."""
    coupling = cut.prepared.coupling
    kept = {
        name: Kept(found.axis, kept_positions(found.ids, cut.keep))
        for name, found in coupling.tensors.items()
    }
    specs = {}
    for replacement in cut.choice.replacements:
        node = replacement.node
        form = cut.layers[node][0].layer.kind(replacement.kind)
        specs[node] = ImplantSpec(
            form.kind, replacement.rank, form.taps, form.tap, partial(cut.metric_of, node)
        )
    found = refit(
        cut.prepared.graph,
        cut.graph,
        kept,
        subset,
        implants=specs,
        leave=left_alone(cut.prepared.graph, cut.graph, cut.prepared.untouched),
        batch_size=batch_size,
        seed=seed,
        work_dir=work_dir,
        device=device,
        team=team,
        on_event=on_event,
    )
    nodes = {node.name: node for node in cut.graph.nodes}
    implants = {
        name: (factors.kind, _to_arrays(nodes[name], factors)) for name, factors in found.factors.items()
    }
    return Compressed(cut.choice, cut.graph, found.weights, implants)


def left_alone(original: gs.Graph, compressed: gs.Graph, untouched: frozenset[str]) -> set[str]:
    """Nodes that were excluded, unless their weights have lost slices: these have to make up for it."""
    before = {name: t for name, t in original.tensors().items() if isinstance(t, gs.Constant)}
    return {
        node.name
        for node in compressed.nodes
        if {node.name, *(tensor.name for tensor in node.inputs)} & untouched
        and all(before[tensor.name].shape == tensor.shape for tensor in node.inputs if tensor.name in before)
    }


def _to_arrays(node: gs.Node, factors: Factors | FittedImplant) -> Arrays:
    """Bring factors into the layout of the initializers that stand in the place of a node's weight."""
    weights = _find_form(node, factors.kind).to_weights(factors.arrays)
    return tuple(np.asarray(array, np.float32) for array in weights)


def from_plan_weights(
    prepared: PreparedModel, choice: Choice, weights: Mapping[str, NDArray[np.generic]]
) -> Compressed:
    """Build what a saved plan describes, from the weights that it keeps.

    Raises ModelError if the weights of an implant are missing, or if it does not fit the model.
    """
    _check_replacements(prepared, choice)
    arranged, keep, _ = arrange(prepared, choice)
    graph = remove_channels(arranged.graph, arranged.coupling, keep, shapes=arranged.probe_shapes)
    nodes = {node.name: node for node in graph.nodes}
    rest = dict(weights)
    implants = {}
    for replacement in choice.replacements:
        if replacement.node not in nodes:
            raise ModelError(f"the plan replaces '{replacement.node}', which it removes")
        form = _find_form(nodes[replacement.node], replacement.kind)
        keys = _factor_keys(replacement.node)
        missing = [key for key in keys if key not in rest]
        if missing:
            raise ModelError(f"the plan lacks the weights '{missing[0]}' of its implant '{replacement.node}'")
        arrays = tuple(rest.pop(key) for key in keys)
        if tuple(array.shape for array in arrays) != form.weight_shapes(replacement.rank):
            raise ModelError(
                f"the plan's implant '{replacement.node}' has weights of other shapes than rank "
                f"{replacement.rank} has"
            )
        implants[replacement.node] = (replacement.kind, arrays)
    return Compressed(choice, graph, rest, implants)


def _check_replacements(prepared: PreparedModel, choice: Choice) -> None:
    """Raise ModelError unless each replaced node is there and has the channels that become pointwise."""
    nodes = {node.name: node for node in prepared.graph.nodes}
    keep = keep_mask(prepared, choice.decisions)
    axes = {(axis.initializer, axis.axis): axis.elements for axis in prepared.coupling.weights}
    for replacement in choice.replacements:
        if replacement.node not in nodes:
            raise ModelError(f"the plan replaces '{replacement.node}', which the model does not have")
        node, channels = nodes[replacement.node], replacement.channels
        _find_form(node, replacement.kind)
        if not len(channels):
            continue
        form = linear_form(node)
        assert form is not None  # or it would have no implant
        elements = axes.get((node.inputs[form.weight_index].name, form.out_axis), np.zeros(0, np.int64))
        if channels[-1] >= len(elements) or not keep[elements[channels]].all():
            raise ModelError(f"the plan makes channels of '{replacement.node}' pointwise that are not there")
