"""Size and cost of a graph: parameters, multiply-accumulates and bytes, in all and per node."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import ModelProto

from hap_onnx import ops  # noqa: F401  (registers the counting rules)
from hap_onnx.model.protos import export_constant, n_data_bytes, walk_tensors
from hap_onnx.ops.quantized import is_quantized, quantized_weights
from hap_onnx.ops.registry import find_macs

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelSize:
    """``params``: elements of float constants and of quantized weights, shared ones once, without scales.

    ``macs``: multiply-accumulates at the shapes given, for their whole batch. ``bytes``: of all constants as
    the graph has them; what else a file holds (nodes, names, metadata) hardly changes when a model is
    compressed.
    """

    params: int
    macs: int
    bytes: int


@dataclass(frozen=True)
class NodeCost:
    """One node: ``params`` counts constants that no earlier node reads; ``output_shape`` is of output 0."""

    name: str
    op_type: str
    params: int
    macs: int
    output_shape: tuple[int, ...] | None


def model_size(graph: gs.Graph, shapes: Shapes) -> ModelSize:
    """Count a graph that ``normalise`` made.

    ``shapes`` maps tensor names to shapes, see ``probe_shapes``. A node whose shapes are not there
    counts no multiply-accumulates.
    """
    constants = _constants(graph)
    return ModelSize(
        params=sum(int(tensor.values.size) for tensor in _weights(graph).values()),
        macs=sum(node_macs(node, shapes) for node in graph.nodes),
        bytes=sum(_n_bytes(tensor) for tensor in constants.values()),
    )


def count_params(proto: ModelProto) -> int:
    """Count the elements of weights as a file holds them, wherever they are; sparse ones in full.

    Weights are of float types, or quantized; scales of these are not counted.
    """
    total = 0
    weights, scales = _quantized_names(proto)
    for _, tensor in walk_tensors(proto):
        is_float = tensor.data_type and is_float_type(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        if (is_float and tensor.name not in scales) or tensor.name in weights:
            total += math.prod(tensor.dims)
    for sparse in proto.graph.sparse_initializer:
        if is_float_type(onnx.helper.tensor_dtype_to_np_dtype(sparse.values.data_type)):
            total += math.prod(sparse.dims) - math.prod(sparse.values.dims)
    return total


def _quantized_names(proto: ModelProto) -> tuple[set[str], set[str]]:
    """Names of what quantized operators read as weights, and of what nothing else reads: scales."""
    weights: set[str] = set()
    scales: set[str] = set()
    others: set[str] = set()
    for node in proto.graph.node:
        positions = quantized_weights(node.op_type, node.domain)
        for index, name in enumerate(node.input):
            if positions is not None and index in positions:
                weights.add(name)
            elif index and is_quantized(node.op_type, node.domain):
                scales.add(name)
            else:
                others.add(name)
    return weights, scales - others - weights - {""}


def node_costs(graph: gs.Graph, shapes: Shapes) -> tuple[NodeCost, ...]:
    """Return the cost of each node in graph order; parameters and MACs add up to those of ``model_size``.

    The one exception are constants that only a graph output reads: no node has them.
    """
    seen: set[str] = set()
    costs = []
    for node in graph.nodes:
        fresh = {t.name: t for t in weights_of(node) if t.name not in seen}
        seen.update(fresh)
        costs.append(
            NodeCost(
                name=node.name,
                op_type=node.op,
                params=sum(int(tensor.values.size) for tensor in fresh.values()),
                macs=node_macs(node, shapes),
                output_shape=shapes.get(node.outputs[0].name) if node.outputs else None,
            )
        )
    return tuple(costs)


def node_macs(node: gs.Node, shapes: Shapes) -> int:
    """Count multiply-accumulates of one node; operators without a rule and unknown shapes count zero."""
    rule = find_macs(node.op, domain=node.domain or "")
    outputs = [shapes.get(tensor.name) for tensor in node.outputs if tensor.name]
    inputs = [_shape(tensor, shapes) for tensor in node.inputs]
    unknown = any(shape is None and tensor.name for shape, tensor in zip(inputs, node.inputs, strict=True))
    if rule is None or unknown or None in outputs:
        return 0
    return int(rule(node, inputs, outputs))


def _shape(tensor: gs.Tensor, shapes: Shapes) -> tuple[int, ...] | None:
    if not tensor.name:  # an omitted optional input
        return None
    if isinstance(tensor, gs.Constant):
        return tuple(tensor.shape)
    return shapes.get(tensor.name)


def _constants(graph: gs.Graph) -> dict[str, gs.Constant]:
    found: dict[str, gs.Constant] = {}
    for node in graph.nodes:
        for tensor in constants_of(node):
            found.setdefault(tensor.name, tensor)
    for tensor in graph.outputs:
        if isinstance(tensor, gs.Constant):
            found.setdefault(tensor.name, tensor)
    return found


def _weights(graph: gs.Graph) -> dict[str, gs.Constant]:
    found: dict[str, gs.Constant] = {}
    for node in graph.nodes:
        for tensor in weights_of(node):
            found.setdefault(tensor.name, tensor)
    for tensor in graph.outputs:
        if isinstance(tensor, gs.Constant) and is_float_type(np.dtype(tensor.values.dtype)):
            found.setdefault(tensor.name, tensor)
    return found


def weights_of(node: gs.Node) -> Iterator[gs.Constant]:
    """Yield the constants of a node that count as parameters: floats, and what stands for floats.

    Of operators on quantized numbers these are the weights, not the scales and zero points.
    """
    if not is_quantized(node.op, node.domain or ""):
        yield from (t for t in constants_of(node) if is_float_type(np.dtype(t.values.dtype)))
        return
    for index in quantized_weights(node.op, node.domain or "") or ():
        if index < len(node.inputs) and isinstance(node.inputs[index], gs.Constant):
            yield node.inputs[index]


def constants_of(node: gs.Node) -> Iterator[gs.Constant]:
    """Yield the constants that a node reads, its subgraphs included."""
    for tensor in node.inputs:
        if isinstance(tensor, gs.Constant):
            yield tensor
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                yield from constants_of(inner)


def is_float_type(dtype: np.dtype) -> bool:
    """Tell whether a type holds real numbers, also bfloat16, float8 and float4 (void to numpy)."""
    return bool(str(dtype).startswith(("float", "bfloat")))


def _n_bytes(tensor: gs.Constant) -> int:
    if tensor.values.dtype.kind in "OUS":  # text has no fixed size
        return int(export_constant(tensor).ByteSize())
    dtype = np.dtype(tensor.values.dtype)
    header = export_constant(gs.Constant("size", np.zeros(0, dtype)))
    header.ClearField("dims")
    header.dims.extend(tensor.values.shape)
    return n_data_bytes(header)
