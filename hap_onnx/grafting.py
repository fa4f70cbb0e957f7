"""Grafting: the surgery of implants, as pure functions from a graph to a new graph.

``insert_implants`` puts implants in the place of nodes. ``permute_channels`` gives channels another order
beforehand, where that changes nothing else: ``can_permute`` proves that it does not. The input graph is never
changed: arrays are replaced, not written into.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from hap_onnx.errors import SurgeryError
from hap_onnx.opaque import captured_names
from hap_onnx.ops.elementwise import is_fused_with_conv
from hap_onnx.ops.implant import ImplantForm, implant_forms

_log = logging.getLogger(__name__)


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
    result = graph.copy()
    by_name = {node.name: node for node in result.nodes}
    outer = result.tensors()
    pinned = {name for node in result.nodes for name in captured_names(node, outer)}
    pinned |= {tensor.name for tensor in result.outputs}
    taken = _Names(result)
    places: dict[int, list[gs.Node]] = {}
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
        places[id(node)] = form.build(node, constants, _activation(node, by_name, pinned))
        taken.make_unique(places[id(node)])
    _place(result, places)
    return result.cleanup(remove_unused_graph_inputs=False)


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
    reader = out.outputs[0]
    fits = by_name.get(reader.name) is reader and reader.inputs[0] is out and is_fused_with_conv(reader)
    return reader if fits else None


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
