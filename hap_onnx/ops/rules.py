"""What the flow and edit rules of several families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

if TYPE_CHECKING:
    from hap_onnx.coupling.channels import Flow, Ids

ReadInts = Callable[[int, str], "list[int] | None"]
"""Reads integers from a constant input or an attribute, see ``read_ints``."""


def freeze_other_axis(node: gs.Node, flow: Flow, tensor: gs.Tensor, axis: int) -> bool:
    """Freeze channels that do not lie on the axis that the operator works on; say whether that was so."""
    found = flow.ids(tensor)
    if found is None or found.axis == axis:
        return False
    flow.freeze(found, node, f"its input's channels lie on axis {found.axis}, not {axis}")
    return True


def bind_bias(node: gs.Node, flow: Flow, index: int, ids: Ids) -> None:
    """Let the bias of a contraction carry the channels that the contraction makes."""
    if len(node.inputs) <= index or not node.inputs[index].name:
        return
    bias = node.inputs[index]
    if isinstance(bias, gs.Constant):
        if bias.shape and bias.shape[-1] == len(ids):
            flow.bind(bias, len(bias.shape) - 1, ids, "follower", node)
        # Else it is one number for all channels.
    else:
        flow.freeze(ids, node, "its bias is computed by other nodes")


def constant_bias(node: gs.Node, index: int, *, n_outputs: int) -> np.ndarray | None:
    """The bias of a contraction, one number per output; zeros if it has none, None if it is computed."""
    bias = node.inputs[index] if len(node.inputs) > index and node.inputs[index].name else None
    if bias is None:
        return np.zeros(n_outputs, node.inputs[1].values.dtype)
    if not isinstance(bias, gs.Constant) or bias.values.size != (bias.shape[-1] if bias.shape else 1):
        return None
    return np.ascontiguousarray(np.broadcast_to(bias.values.ravel(), n_outputs))


def read_ints(node: gs.Node, index: int, attribute: str) -> list[int] | None:
    """Integers from a constant input or an attribute; [] if neither is there, None if they are computed."""
    if attribute in node.attrs:
        value = node.attrs[attribute]
        return [int(v) for v in value] if isinstance(value, (list, tuple, np.ndarray)) else [int(value)]
    if len(node.inputs) > index and node.inputs[index].name:
        tensor = node.inputs[index]
        if not isinstance(tensor, gs.Constant):
            return None
        return [int(v) for v in np.asarray(tensor.values).ravel()]
    return []


def constant_input(node: gs.Node, index: int) -> int | None:
    """Index of a constant input, None if it is absent or computed."""
    present = len(node.inputs) > index and node.inputs[index].name
    return index if present and isinstance(node.inputs[index], gs.Constant) else None
