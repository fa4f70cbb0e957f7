"""How heads pass through attention in one node, and why recurrent layers and control flow stay whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from hap_onnx.ops.registry import edit_op, flow_op

if TYPE_CHECKING:
    from hap_onnx.channels import Flow, Ids
    from hap_onnx.surgery import Cut

# --- Attention ---


@flow_op("Attention")
def _flow_attention(node: gs.Node, flow: Flow) -> None:
    """Whole heads go: of queries, keys and values together, groups of queries with the keys they read.

    Inputs are [B, H, S, W], or [B, S, H * W] with the numbers of heads as attributes.
    """
    present = [tensor for tensor in node.inputs if tensor.name]
    names = [tensor.name for tensor in node.inputs]
    found = [_heads(node, flow, index) for index in range(3)]
    q, k, v = found
    problem = None
    if any(names[4:]):
        problem = "Attention with a past, or with its length given"
    elif q is None or k is None or v is None:
        lacking = next(names[index] for index, heads in enumerate(found) if heads is None)
        problem = f"Attention reads '{lacking}', whose heads must stay"
    elif len(q) % len(k) or len(k) != len(v):
        problem = f"Attention of {len(q)} heads over {len(k)} and {len(v)}"
    if problem is not None or q is None or k is None or v is None:
        for tensor in present:
            flow.freeze(flow.ids(tensor), node, problem or "")
        return
    flow.join(k, v)
    flow.join(q, np.repeat(k, len(q) // len(k)))
    flow.heads.append(q)
    if len(names) > 3 and names[3]:
        _join_mask(node, flow, q)
    outputs = [*node.outputs, *[gs.Variable.empty()] * 4][:4]
    for output, heads in zip(outputs, (q, k, v, q), strict=True):
        if not output.name:
            continue
        shape = flow.shape(output)
        if len(shape) == 4:
            flow.put(output, 1, heads)
        else:
            flow.put(output, 2, np.repeat(heads, shape[2] // len(heads)))


def _heads(node: gs.Node, flow: Flow, index: int) -> Ids | None:
    """One id for each head of an input, None if it has none that can go."""
    tensor = node.inputs[index]
    found = flow.ids(tensor)
    if found is None:
        return None
    if len(flow.shape(tensor)) == 4:
        return found.ids if found.axis == 1 else None
    n_heads = int(node.attrs["q_num_heads" if index == 0 else "kv_num_heads"])
    if found.axis != 2 or len(found.ids) % n_heads:
        return None
    rows = found.ids.reshape(n_heads, -1)
    flow.join(np.repeat(rows[:, 0], rows.shape[1]), rows.ravel())
    return np.ascontiguousarray(rows[:, 0])


def _join_mask(node: gs.Node, flow: Flow, heads: Ids) -> None:
    """Join the heads with a mask or bias [..., H, S, T] that tells them apart."""
    mask = node.inputs[3]
    shape, found = flow.shape(mask), flow.ids(mask)
    axis = len(shape) - 3
    if axis < 0 or shape[axis] == 1:
        flow.freeze(found, node, "Attention reads them as a mask")
    elif found is not None and found.axis == axis:
        flow.join(heads, found.ids)
    elif found is None and isinstance(mask, gs.Constant):
        flow.bind(mask, axis, heads, "follower", node)
    else:
        flow.freeze(found, node, "Attention reads them as a mask")
        flow.freeze(heads, node, f"Attention joins them with '{mask.name}', whose channels must stay")
        flow.wish(mask, shape[axis])


@edit_op("Attention")
def _edit_attention(node: gs.Node, cut: Cut) -> None:
    for attribute, index in (("q_num_heads", 0), ("kv_num_heads", 1)):
        kept = cut.kept(node.inputs[index])
        if attribute in node.attrs and kept is not None and len(cut.shape(node.inputs[index])) == 3:
            n_channels = cut.shape(node.inputs[index])[2]
            node.attrs[attribute] = int(node.attrs[attribute]) * len(kept.positions) // n_channels


# --- what stays whole ---


@flow_op("LSTM", "GRU", "RNN")
def _flow_recurrent(node: gs.Node, flow: Flow) -> None:
    for tensor in node.inputs:
        flow.freeze(flow.ids(tensor), node, f"{node.op} reads them at every step: its weights stay whole")


@flow_op("If", "Loop", "Scan")
def _flow_control(node: gs.Node, flow: Flow) -> None:
    for tensor in node.inputs:
        flow.freeze(flow.ids(tensor), node, f"{node.op} decides at run time what reads them")
