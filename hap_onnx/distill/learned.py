"""Which initializers of a graph training may change."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_graphsurgeon as gs

from hap_onnx.model.measure import is_float_type
from hap_onnx.ops.elementwise import is_addition
from hap_onnx.ops.registry import find_macs, learned_inputs
from hap_onnx.surgery import CONSTANT_SUFFIX
from hap_onnx.twin.opaque import captured_names


def find_learned(graph: gs.Graph, *, leave: Collection[str] = ()) -> tuple[str, ...]:
    """Return the float initializers that hold weights, biases or scales, in graph order.

    Other constants (bounds, anchors, masks, tables, running statistics) mean something by themselves and
    stay, and so does what is both, or an output of the model. A bias may also be a vector that is added to
    what a contraction gives.

    Args:
        leave: names of nodes whose initializers are not to be touched.
    """
    found: dict[str, None] = {}
    kept = {tensor.name for tensor in graph.outputs}
    outer = graph.tensors()
    for node in graph.nodes:
        kept.update(captured_names(node, outer))
        for index, tensor in enumerate(node.inputs):
            if not isinstance(tensor, gs.Constant):
                continue
            is_learned = index in learned_inputs(node.op, domain=node.domain or "")
            is_learned = is_learned or _is_added_bias(node, tensor)
            if is_learned and node.name not in leave and is_float_type(np.dtype(tensor.values.dtype)):
                found[tensor.name] = None
            else:
                kept.add(tensor.name)
    return tuple(name for name in found if name not in kept)


def _is_added_bias(node: gs.Node, constant: gs.Constant) -> bool:
    """Whether a node adds a vector along one axis to the output of a contraction."""
    if not is_addition(node.op, domain=node.domain or ""):
        return False
    if sum(size > 1 for size in constant.shape) != 1:
        return False
    if constant.name.endswith(CONSTANT_SUFFIX):  # what is left of a branch that was removed
        return True
    producers = [tensor.inputs[0] for tensor in node.inputs if tensor is not constant and tensor.inputs]
    return any(
        find_macs(producer.op, domain=producer.domain or "") is not None
        and any(isinstance(tensor, gs.Constant) for tensor in producer.inputs)
        for producer in producers
    )
