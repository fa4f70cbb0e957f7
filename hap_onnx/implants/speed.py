"""Which implants are worth their time: fewer multiply-accumulates are not faster by themselves.

Each kind of layer (operator, attributes, sizes, type) is timed in onnxruntime against its implants, at ranks
at which they have so many of its multiply-accumulates, alone or, where its output fits its input, as a short
chain. An implant is worth it where it saves at least half as much time as multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from math import prod

import numpy as np
import onnx_graphsurgeon as gs
from onnx import ModelProto

from hap_onnx.ops.implant import ImplantForm, implant_forms
from hap_onnx.prepare import PreparedModel
from hap_onnx.runtime.latency import measure_latency
from hap_onnx.runtime.session import Session
from hap_onnx.surgery.grafting import insert_implants

TIMED_SHARES = (0.75, 0.5)
"""Shares of a layer's multiply-accumulates at which its implants are timed, the largest first."""
WORTH = 0.5
"""How much of the multiply-accumulates saved must be saved in time."""
N_CHAINED = 4
SECONDS = 0.2

Open = Callable[[ModelProto], Session]
Shape = tuple[int, ...]


def faster_kinds(
    prepared: PreparedModel, offered: Mapping[str, Collection[str]], open_session: Open
) -> dict[str, dict[str, float]]:
    """Return, for each node, the kinds that save time, each with the largest share that was worth it.

    A share is one of the layer's multiply-accumulates; implants that have more of them are not to be used.

    Args:
        open_session: loads a model as the speed of the result will be measured.
    """
    nodes = {node.name: node for node in prepared.graph.nodes}
    known: dict[tuple[object, ...], float | None] = {}
    result: dict[str, dict[str, float]] = {}
    for name, kinds in offered.items():
        node = nodes[name]
        kept: dict[str, float] = {}
        for form in implant_forms(node):
            if form.kind not in kinds:
                continue
            key = (form.kind, *_signature(node, prepared))
            if key not in known:
                known[key] = _find_share(node, form, prepared, open_session)
            share = known[key]
            if share is not None:
                kept[form.kind] = share
        result[name] = kept
    return result


def _signature(node: gs.Node, prepared: PreparedModel) -> tuple[object, ...]:
    attributes = tuple(sorted((key, str(value)) for key, value in node.attrs.items()))
    constants = tuple(tuple(tensor.shape) for tensor in node.inputs[1:] if tensor.name)
    return node.op, attributes, _dtype(node), constants, prepared.shapes[node.inputs[0].name]


def _dtype(node: gs.Node) -> np.dtype:
    """The type that a layer computes in; what numpy lacks is timed as float32."""
    dtype = np.dtype(node.inputs[1].values.dtype)
    return dtype if dtype in (np.float16, np.float32, np.float64) else np.dtype(np.float32)


def _find_share(
    node: gs.Node, form: ImplantForm, prepared: PreparedModel, open_session: Open
) -> float | None:
    """The largest of the timed shares that is worth it, None if none is."""
    x, y = prepared.shapes[node.inputs[0].name], prepared.shapes[node.outputs[0].name]
    for wanted in TIMED_SHARES:
        rank, share = _rank_for(node, form, x, y, wanted)
        if share < 1 and _time_ratio(node, form, x, y, rank, open_session) <= 1 - WORTH * (1 - share):
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


def _time_ratio(node: gs.Node, form: ImplantForm, x: Shape, y: Shape, rank: int, open_session: Open) -> float:
    """Time of implants over that of the layers that they replace."""
    dense, dtype = _chain(node, x, y), _dtype(node)
    generator = np.random.default_rng(0)
    weights = [
        (generator.standard_normal(shape) / prod(shape[1:]) ** 0.5).astype(dtype)
        for shape in form.weight_shapes(rank)
    ]
    replaced = insert_implants(dense, {single.name: (form.kind, weights) for single in dense.nodes})
    feed = {"x": generator.standard_normal(x).astype(dtype)}
    before, after = (open_session(_to_proto(graph)) for graph in (dense, replaced))
    return measure_latency(before, after, feed, seconds=SECONDS).ratio


def _chain(node: gs.Node, x: Shape, y: Shape) -> gs.Graph:
    """A model of a few copies of one node with weights of their own, one after another where that fits."""
    generator, dtype = np.random.default_rng(0), _dtype(node)
    first = gs.Variable("x", dtype, x)
    current, nodes = first, []
    for index in range(N_CHAINED if x == y else 1):
        copy = gs.Node(node.op, f"n{index}", attrs=dict(node.attrs), inputs=[current])
        for position, tensor in enumerate(tensor for tensor in node.inputs[1:] if tensor.name):
            shape = tuple(tensor.shape)
            values = generator.standard_normal(shape) / prod(shape[1:]) ** 0.5
            copy.inputs.append(gs.Constant(f"n{index}_{position}", values.astype(dtype)))
        current = gs.Variable(f"y{index}", dtype, y)
        copy.outputs = [current]
        nodes.append(copy)
    return gs.Graph(nodes=nodes, inputs=[first], outputs=[current], opset=17)


def _to_proto(graph: gs.Graph) -> ModelProto:
    model = gs.export_onnx(graph)
    model.ir_version = 8  # onnx writes newer ones than onnxruntime reads
    return model
