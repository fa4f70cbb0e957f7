"""Grafting: the surgery of implants, as pure functions from a graph to a new graph.

``insert_implants`` puts implants in the place of nodes. ``permute_channels`` gives channels another order
beforehand, so that those that become pointwise are last; ``can_permute`` proves that the model stays the same
function. The input graph is never changed: arrays are replaced, not written into.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray

from hap_onnx.coupling.channels import ChannelGroup, Coupling
from hap_onnx.errors import ModelError, SurgeryError
from hap_onnx.ops.elementwise import is_fused_with_conv
from hap_onnx.ops.implant import ImplantForm, implant_forms
from hap_onnx.prepare import TRIAL_TOLERANCE, PreparedModel
from hap_onnx.sensitivity.curvature import to_tensors
from hap_onnx.surgery import discard
from hap_onnx.twin import build_twin
from hap_onnx.twin.opaque import captured_names

_log = logging.getLogger(__name__)

Ints = NDArray[np.int64]

# --- implants ---


def insert_implants(graph: gs.Graph, implants: Mapping[str, tuple[str, Sequence[np.ndarray]]]) -> gs.Graph:
    """Return a new graph in which implants stand in the place of nodes.

    The last node of two factors has the replaced node's name, output and bias. Of parts side by side the one
    with the full kernels has the name, and a Concat writes the output; an activation that onnxruntime
    computes as part of the Conv stays with each part.

    Args:
        graph: a normalised graph, or one that comes from it.
        implants: by the name of a node, the kind of its implant and the weights of it, laid out as by
            ``ImplantForm.to_weights``. They take the element type of the weight that they replace.

    Raises:
        SurgeryError: there is no such node, or it cannot have such an implant or weights of such shapes.
    """
    return _graft(graph, implants)[0]


@dataclass(frozen=True)
class ImplantNames:
    """What ``insert_implants`` calls the initializers of an implant.

    ``bias_parts`` are pieces of the layer's ``bias``, in order, where parts side by side share it; () else.
    """

    weights: tuple[str, ...]
    bias: str = ""
    bias_parts: tuple[str, ...] = ()


def implant_names(
    graph: gs.Graph, implants: Mapping[str, tuple[str, Sequence[np.ndarray]]]
) -> dict[str, ImplantNames]:
    """Return the names that ``insert_implants`` gives to the initializers of each implant, by its node."""
    return _graft(graph, implants)[1]


def _graft(
    graph: gs.Graph, implants: Mapping[str, tuple[str, Sequence[np.ndarray]]]
) -> tuple[gs.Graph, dict[str, ImplantNames]]:
    result = graph.copy()
    by_name = {node.name: node for node in result.nodes}
    outer = result.tensors()
    pinned = {name for node in result.nodes for name in captured_names(node, outer)}
    pinned |= {tensor.name for tensor in result.outputs}
    taken = _Names(result)
    places: dict[int, list[gs.Node]] = {}
    names: dict[str, ImplantNames] = {}
    for name, (kind, weights) in implants.items():
        if name not in by_name:
            raise SurgeryError(f"there is no node '{name}' for an implant")
        node = by_name[name]
        form = _find_form(node, kind)
        _check_shapes(node, form, weights)
        dtype = node.inputs[1].values.dtype
        constants = [
            gs.Constant(weight_name, np.ascontiguousarray(np.asarray(values).astype(dtype)))
            for weight_name, values in zip(form.weight_names, weights, strict=True)
        ]
        shared_out = form.kind == "pointwise" and len(node.inputs) > 2 and bool(node.inputs[2].name)
        bias = node.inputs[2].name if shared_out else ""
        placed = places[id(node)] = form.build(node, constants, _activation(node, by_name, pinned))
        taken.make_unique(placed)
        names[name] = ImplantNames(
            weights=tuple(constant.name for constant in constants),
            bias=bias,
            bias_parts=tuple(part.inputs[2].name for part in placed[:2]) if shared_out else (),
        )
    _place(result, places)
    return result.cleanup(remove_unused_graph_inputs=False), names


def _find_form(node: gs.Node, kind: str) -> ImplantForm:
    forms = {form.kind: form for form in implant_forms(node)}
    if kind not in forms:
        offered = " or ".join(forms) or "none at all"
        raise SurgeryError(f"{node.op} '{node.name}' cannot have an implant of kind '{kind}', but {offered}")
    return forms[kind]


def _check_shapes(node: gs.Node, form: ImplantForm, weights: Sequence[np.ndarray]) -> None:
    shapes = tuple(tuple(np.shape(values)) for values in weights)
    rank = shapes[-1][form.rank_axis] if shapes and len(shapes[-1]) > form.rank_axis else 0
    expected = form.weight_shapes(max(rank, 1))
    if shapes != expected or not all(min(shape) > 0 for shape in shapes):
        raise SurgeryError(
            f"the {form.kind} implant for {node.op} '{node.name}' has weights of shapes {list(shapes)}; "
            f"for rank {max(rank, 1)} they must be {list(expected)}, none of them empty"
        )


def _activation(node: gs.Node, by_name: Mapping[str, gs.Node], pinned: set[str]) -> gs.Node | None:
    """The one reader of a node's output, if it is an activation that can be computed on parts."""
    out = node.outputs[0]
    if len(out.outputs) != 1 or out.name in pinned:
        return None
    reader = by_name.get(out.outputs[0].name)
    if reader is None or reader is not out.outputs[0]:  # it is in a subgraph
        return None
    return reader if reader.inputs[0] is out and is_fused_with_conv(reader) else None


def _place(graph: gs.Graph, places: Mapping[int, list[gs.Node]]) -> None:
    """Put nodes in the place of others; what they take along leaves its old place."""
    moved = {id(node) for nodes in places.values() for node in nodes} - set(places)
    nodes: list[gs.Node] = []
    for node in graph.nodes:
        if id(node) in places:
            nodes += places[id(node)]
        elif id(node) not in moved:
            nodes.append(node)
    graph.nodes = nodes


class _Names:
    """Keeps the names of nodes and tensors apart."""

    def __init__(self, graph: gs.Graph) -> None:
        self._nodes = {node.name: id(node) for node in graph.nodes}
        self._tensors = {name: id(tensor) for name, tensor in graph.tensors().items()}

    def make_unique(self, nodes: Sequence[gs.Node]) -> None:
        """Rename what is new and has a name that is taken; a model may be compressed twice."""
        for node in nodes:
            node.name = _unique(node.name, id(node), self._nodes)
            for tensor in [*node.inputs, *node.outputs]:
                if tensor.name:
                    tensor.name = _unique(tensor.name, id(tensor), self._tensors)


def _unique(name: str, owner: int, taken: dict[str, int]) -> str:
    candidate, n = name, 1
    while taken.setdefault(candidate, owner) != owner:
        n += 1
        candidate = f"{name}_{n}"
    return candidate


# --- the order of channels ---


def permute_channels(graph: gs.Graph, coupling: Coupling, order: Ints) -> gs.Graph:
    """Return a new graph in which the slot of element e has the content of element ``order[e]``.

    Slots stay where they are, so ``coupling`` holds for the result, too. Only weights move: where an operator
    in between does not treat all slots alike, the result is another function (see ``can_permute``).

    Args:
        graph: the normalised graph that ``coupling`` was found on.
        order: one element for each element, a permutation within each channel group.

    Raises:
        SurgeryError: ``order`` is no such permutation.
    """
    n = coupling.n_elements
    group_of = np.full(n, -1, np.int64)
    for index, group in enumerate(coupling.groups):
        group_of[group.elements] = index
    if not np.array_equal(np.sort(order), np.arange(n)) or (group_of[order] != group_of).any():
        raise SurgeryError("channels can only be permuted within their groups")
    result = graph.copy()
    tensors = result.tensors()
    for weight in coupling.weights:
        positions = content_positions(weight.elements, order)
        if (positions != np.arange(len(positions))).any():
            constant = tensors[weight.initializer]
            constant.values = np.ascontiguousarray(np.take(constant.values, positions, axis=weight.axis))
    return result


def content_positions(elements: Ints, order: Ints) -> Ints:
    """For each position of a weight axis, the position whose content it gets under ``order``.

    The k-th position of the slot of element e gets that of the k-th position of element ``order[e]``;
    positions of no element (-1) stay.
    """
    carrying = np.flatnonzero(elements >= 0)
    by_element = carrying[np.argsort(elements[carrying], kind="stable")]
    counts = np.bincount(elements[carrying], minlength=len(order))
    if (counts[order] != counts).any():
        raise SurgeryError("channels that change places have not equally many positions in a weight")
    starts = np.cumsum(counts) - counts
    slots = elements[by_element]
    nth = np.arange(len(by_element)) - starts[slots]
    found = np.arange(len(elements))
    found[by_element] = by_element[starts[order[slots]] + nth]
    return found


def can_permute(prepared: PreparedModel, *groups: ChannelGroup) -> bool:
    """Say whether the channels of groups may take any order: proven by trial on the probe.

    A cyclic shift and a random permutation must leave the outputs as they are, to float rounding. What can
    be done one after the other can be done at once, and of these two all (or half of all) permutations can
    be composed, but for rare draws in tiny groups.
    """
    rng = np.random.default_rng(0)
    shifted, drawn = (np.arange(prepared.coupling.n_elements) for _ in range(2))
    for group in groups:
        shifted[group.elements] = np.roll(group.elements, 1)
        drawn[group.elements] = rng.permutation(group.elements)
    return _is_same_function(prepared, shifted) and _is_same_function(prepared, drawn)


def permutable_groups(prepared: PreparedModel) -> frozenset[str]:
    """Return the names of the groups that ``can_permute``; quick where it is all of them."""
    groups = prepared.coupling.groups
    if can_permute(prepared, *groups):
        return frozenset(group.name for group in groups)
    return frozenset(group.name for group in groups if can_permute(prepared, group))


def _is_same_function(prepared: PreparedModel, order: Ints) -> bool:
    """Permute channels and compare the outputs with the original's, where those are finite."""
    twin = prepared.twin
    tensors = to_tensors(prepared.probe, twin)
    try:
        graph = permute_channels(prepared.graph, prepared.coupling, order)
        with torch.no_grad():
            expected = twin(tensors)
            found = build_twin(graph, device=str(twin.device or "cpu"), share_weights=True)(tensors)
        discard(graph)
    except (SurgeryError, ModelError):
        _log.info("channels cannot be permuted", exc_info=True)
        return False
    return all(_is_equal(found[name], values) for name, values in expected.items())


def _is_equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    finite = torch.isfinite(expected)
    if not finite.any():
        return True
    distance = (found - expected)[finite].abs().max()
    return bool(distance <= TRIAL_TOLERANCE * expected[finite].abs().max() + 1e-7)
