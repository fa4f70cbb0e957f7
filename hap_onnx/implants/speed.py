"""Which implants are worth their time: fewer multiply-accumulates are not faster by themselves.

By the times of a model's nodes (see ``timing.measure``), an implant is compared with the layer in whose place
it would stand, at ranks at which it has so many of its multiply-accumulates. It is worth it where it saves at
least half as much time as multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from hap_onnx.ops.implant import ImplantForm, implant_forms
from hap_onnx.ops.linear import linear_form
from hap_onnx.planning.times import NodeTimes
from hap_onnx.prepare import PreparedModel

COMPARED_SHARES = (0.75, 0.5)
"""Shares of a layer's multiply-accumulates at which its implants are compared, the largest first."""
WORTH = 0.5
"""How much of the multiply-accumulates saved must be saved in time."""

Shape = tuple[int, ...]


def faster_kinds(
    prepared: PreparedModel, offered: Mapping[str, Collection[str]], times: NodeTimes
) -> dict[str, dict[str, float]]:
    """Return, for each node, the kinds that save time, each with the largest share that was worth it.

    A share is one of the layer's multiply-accumulates; implants that have more of them are not to be used.
    """
    nodes = {node.name: node for node in prepared.graph.nodes}
    result: dict[str, dict[str, float]] = {}
    for name, kinds in offered.items():
        found = {
            form.kind: _find_share(nodes[name], form, prepared, times)
            for form in implant_forms(nodes[name])
            if form.kind in kinds and (name, form.kind) in times.implants
        }
        result[name] = {kind: share for kind, share in found.items() if share is not None}
    return result


def _find_share(
    node: gs.Node, form: ImplantForm, prepared: PreparedModel, times: NodeTimes
) -> float | None:
    """The largest of the compared shares that is worth it, None if none is."""
    linear = linear_form(node)
    assert linear is not None  # or it would have no implant
    weight = node.inputs[linear.weight_index]
    n_in, n_out = weight.shape[linear.in_axis], weight.shape[linear.out_axis]
    lengths = np.array([n_in * n_out, n_in, n_out, 1])
    x, y = prepared.shapes[node.inputs[0].name], prepared.shapes[node.outputs[0].name]
    implant = times.implants[node.name, form.kind]
    for wanted in COMPARED_SHARES:
        rank, share = _rank_for(node, form, x, y, wanted)
        taken = float(lengths @ implant.at_rank(form.kind, rank, n_groups=linear.conv_group))
        if share < 1 and taken <= (1 - WORTH * (1 - share)) * float(lengths @ times.dense[node.name]):
            return max(wanted, share)
    return None


def _rank_for(node: gs.Node, form: ImplantForm, x: Shape, y: Shape, share: float) -> tuple[int, float]:
    """The rank with about this share of multiply-accumulates, if it can be a multiple of 4 or 8; its share.

    Costs are linear in the rank, so two ranks tell all. Pointwise channels save, so there more is less.
    """

    def macs(rank: int) -> int:
        first, second = (prod(shape) for shape in form.weight_shapes(rank))
        return first * form.n_first(x, y) + second * form.n_second(y)

    n_outputs = node.inputs[1].shape[0]
    if form.kind == "pointwise" and n_outputs < 3:
        return 1, 1.0
    dense = prod(node.inputs[1].shape) * form.n_second(y)
    slope = macs(2) - macs(1)
    rank = round((share * dense - macs(1)) / slope) + 1
    unit = 8 if min(node.inputs[1].shape[:2]) >= 32 else 4  # as the planner will ask for
    rank = max(round(rank / unit) * unit if rank >= unit else rank, 1)
    if form.kind == "pointwise":
        rank = min(rank, n_outputs - 1)
    return rank, macs(rank) / dense
