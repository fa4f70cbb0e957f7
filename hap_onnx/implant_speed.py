"""Which implants are worth their time: fewer multiply-accumulates are not faster by themselves.

Each kind of layer (operator, attributes, sizes) is timed in onnxruntime against its implants, at the rank at
which they have half the multiply-accumulates, alone or, where its output fits its input, as a short chain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import numpy as np
import onnx_graphsurgeon as gs
from onnx import ModelProto

from hap_onnx.grafting import insert_implants
from hap_onnx.ops.implant import ImplantForm, implant_forms
from hap_onnx.prepare import PreparedModel
from hap_onnx.validate import Session, measure_latency

FASTER = 0.9
"""An implant with half the multiply-accumulates has to take at most this share of the time."""
N_CHAINED = 4
SECONDS = 0.25
_ROUND = 8

Open = Callable[[ModelProto], Session]


def faster_kinds(
    prepared: PreparedModel, offered: Mapping[str, tuple[str, ...]], open_session: Open
) -> dict[str, tuple[str, ...]]:
    """Return, of the kinds offered for each node, those that save time.

    Args:
        open_session: loads a model as the speed of the result will be measured.
    """
    nodes = {node.name: node for node in prepared.graph.nodes}
    known: dict[tuple[object, ...], bool] = {}
    result = {}
    for name, kinds in offered.items():
        node = nodes[name]
        kept = []
        for form in implant_forms(node):
            if form.kind not in kinds:
                continue
            key = (form.kind, *_signature(node, prepared))
            if key not in known:
                known[key] = _is_faster(node, form, prepared, open_session)
            if known[key]:
                kept.append(form.kind)
        result[name] = tuple(kept)
    return result


def _signature(node: gs.Node, prepared: PreparedModel) -> tuple[object, ...]:
    attributes = tuple(sorted((key, str(value)) for key, value in node.attrs.items()))
    return node.op, attributes, tuple(node.inputs[1].shape), prepared.shapes[node.inputs[0].name]


def _is_faster(node: gs.Node, form: ImplantForm, prepared: PreparedModel, open_session: Open) -> bool:
    if form.kind == "pointwise" and node.inputs[1].shape[0] == 1:
        return False  # something stays as it is
    x, y = prepared.shapes[node.inputs[0].name], prepared.shapes[node.outputs[0].name]
    dense = _chain(node, x, y)
    rank = _half_rank(node, form, x, y)
    generator = np.random.default_rng(0)
    weights = [
        (generator.standard_normal(shape) / prod(shape[1:]) ** 0.5).astype(np.float32)
        for shape in form.weight_shapes(rank)
    ]
    names = [single.name for single in dense.nodes]
    replaced = insert_implants(dense, dict.fromkeys(names, (form.kind, weights)))
    feed = {"x": generator.standard_normal(x).astype(np.float32)}
    before, after = (open_session(_to_proto(graph)) for graph in (dense, replaced))
    return measure_latency(before, after, feed, seconds=SECONDS).ratio <= FASTER


def _to_proto(graph: gs.Graph) -> ModelProto:
    model = gs.export_onnx(graph)
    model.ir_version = 8  # onnx writes newer ones than onnxruntime reads
    return model


def _half_rank(node: gs.Node, form: ImplantForm, x: tuple[int, ...], y: tuple[int, ...]) -> int:
    """The rank at which an implant has about half the multiply-accumulates, a multiple of 8 if it can.

    Costs are linear in the rank, so two ranks tell all.
    """

    def macs(rank: int) -> int:
        first, second = (prod(shape) for shape in form.weight_shapes(rank))
        return first * form.n_first(x, y) + second * form.n_second(y)

    dense = prod(node.inputs[1].shape) * form.n_second(y)
    slope = macs(2) - macs(1)
    rank = round((dense / 2 - (macs(1) - slope)) / slope)
    most = node.inputs[1].shape[0] - 1 if form.kind == "pointwise" else max(rank, 1)
    rounded = max(_ROUND, rank // _ROUND * _ROUND) if rank >= _ROUND // 2 else max(rank, 1)
    return int(min(rounded, max(most, 1)))


def _chain(node: gs.Node, x: tuple[int, ...], y: tuple[int, ...]) -> gs.Graph:
    """A model of a few copies of one node with weights of their own, one after another where that fits."""
    generator = np.random.default_rng(0)
    first = gs.Variable("x", np.float32, x)
    current, nodes = first, []
    for index in range(N_CHAINED if x == y else 1):
        copy = gs.Node(node.op, f"n{index}", attrs=dict(node.attrs), inputs=[current])
        for position, tensor in enumerate(tensor for tensor in node.inputs[1:] if tensor.name):
            shape = tuple(tensor.shape)
            values = generator.standard_normal(shape) / prod(shape[1:]) ** 0.5
            copy.inputs.append(gs.Constant(f"n{index}_{position}", values.astype(np.float32)))
        current = gs.Variable(f"y{index}", np.float32, y)
        copy.outputs = [current]
        nodes.append(copy)
    return gs.Graph(nodes=nodes, inputs=[first], outputs=[current], opset=17)
