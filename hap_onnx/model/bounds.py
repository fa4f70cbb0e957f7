"""Refuse a small file that asks for more than any machine has, before anything is computed.

A model of a few hundred bytes can declare a tensor of a petabyte, let functions call each other to a billion
nodes, or deeper than a stack is. What can be known without running it is counted here. What depends on
numbers that only a run makes (or on a loop that never ends) cannot: see SECURITY.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import onnx
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from hap_onnx.errors import ModelError
from hap_onnx.model.protos import copy_without_weights, describe, n_elements, subgraphs

MAX_TENSOR_BYTES = 2**34
"""No single tensor may take more, nor more than the machine has."""
MAX_DENSE_ELEMENTS = 2**26
"""How many elements all sparse tensors of a model may have together once they are written in full."""
MAX_CALL_DEPTH = 100
MAX_NODES = 1_000_000
"""How deep functions may call each other, and how many nodes all calls together may become."""
_MAX_PROPAGATED = 100_000
_INTEGERS = (TensorProto.INT64, TensorProto.INT32)


def check_bounds(proto: ModelProto, label: str) -> None:
    """Raise ModelError if a model asks for more than is reasonable, as far as its file tells."""
    _check_functions(proto, label)
    _check_sparse(proto, label)
    _check_sizes(proto, label)


def infer_shapes(model: ModelProto) -> ModelProto:
    """Infer shapes, also through the integers that they are computed from, unless these are too many.

    Raises what ``onnx.shape_inference.infer_shapes`` raises.
    """
    # Propagation writes one message per integer: without a bound, a few nodes can ask for terabytes.
    plain = onnx.shape_inference.infer_shapes(model)
    graph = plain.graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.elem_type in _INTEGERS and _n_known(value) > _MAX_PROPAGATED:
            return plain
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


# ---------------------------------------------------------------- functions

_Key = tuple[str, str, str]


def _check_functions(proto: ModelProto, label: str) -> None:
    """Functions must not call themselves, nor too deep, nor become too many nodes."""
    functions = {_key(function): function for function in proto.functions}
    if len(functions) < len(proto.functions):
        raise ModelError(f"{label} has two local functions of one name; export it without them")
    n_nodes: dict[_Key, int] = {}
    depth: dict[_Key, int] = {}
    for root in functions:
        stack = [(root, _called(functions[root].node, functions))]
        path = {root}
        while stack:
            key, rest = stack[-1]
            called = next(rest, None)
            if called is None:
                stack.pop()
                path.discard(key)
                inner = list(_called(functions[key].node, functions))
                own = sum(1 for _ in _walk_nodes(functions[key].node))
                n_nodes[key] = own + sum(n_nodes[other] for other in inner)
                depth[key] = 1 + max((depth[other] for other in inner), default=0)
                _check_function(key, n_nodes[key], depth[key], label)
            elif called in path:
                raise ModelError(f"{label}: function {_spell(called)} calls itself; export the model again")
            elif called not in n_nodes:
                stack.append((called, _called(functions[called].node, functions)))
                path.add(called)
    total = sum(n_nodes[key] for key in _called(proto.graph.node, functions))
    _check_function(None, total, 0, label)


def _check_function(key: _Key | None, n_nodes: int, depth: int, label: str) -> None:
    what = "the graph" if key is None else f"function {_spell(key)}"
    if depth > MAX_CALL_DEPTH:
        raise ModelError(
            f"{label}: {what} calls functions {depth} deep, more than {MAX_CALL_DEPTH}; export without them"
        )
    if n_nodes > MAX_NODES:
        raise ModelError(
            f"{label}: {what} becomes {n_nodes} nodes once its functions are expanded, more than "
            f"{MAX_NODES}; export the model without them"
        )


def _key(message: FunctionProto | NodeProto) -> _Key:
    name = message.name if isinstance(message, FunctionProto) else message.op_type
    return message.domain, name, message.overload


def _spell(key: _Key) -> str:
    return repr(f"{key[0]}:{key[1]}" if key[0] else key[1])


def _called(nodes: Sequence[NodeProto], functions: Mapping[_Key, FunctionProto]) -> Iterator[_Key]:
    return (key for node in _walk_nodes(nodes) if (key := _key(node)) in functions)


def _walk_nodes(nodes: Sequence[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from _walk_nodes(graph.node)


# ---------------------------------------------------------------- tensors


def _check_sparse(proto: ModelProto, label: str) -> None:
    total = 0
    for name, dims in _sparse_tensors(proto.graph):
        if any(dim < 0 for dim in dims):
            raise ModelError(
                f"{label}: the sparse tensor {name!r} has the shape {list(dims)}, but none may be negative; "
                "export the model again"
            )
        total += n_elements(dims)
        if total > MAX_DENSE_ELEMENTS:
            raise ModelError(
                f"{label}: the sparse tensor {name!r} has {n_elements(dims)} elements once it is written in "
                f"full, and all of them together may have {MAX_DENSE_ELEMENTS}; store it densely"
            )


def _sparse_tensors(graph: GraphProto) -> Iterator[tuple[str, Sequence[int]]]:
    for sparse in graph.sparse_initializer:
        yield sparse.values.name, sparse.dims
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor"):
                yield describe(node), attribute.sparse_tensor.dims
            for sparse in attribute.sparse_tensors:
                yield describe(node), sparse.dims
        for inner in subgraphs(node):
            yield from _sparse_tensors(inner)


def _check_sizes(proto: ModelProto, label: str) -> None:
    """No tensor may take more than the machine has, one sample at a time."""
    limit = min(MAX_TENSOR_BYTES, _machine_bytes())
    model = copy_without_weights(proto)
    for message, names in ((model, ("metadata_props", "doc_string")), (model.graph, ("value_info",))):
        for name in names:
            message.ClearField(name)
    for header, tensor in zip(model.graph.initializer, proto.graph.initializer, strict=True):
        is_here = tensor.data_location != TensorProto.EXTERNAL  # if not, it is large: no shape
        if is_here and n_elements(tensor.dims) <= _MAX_PROPAGATED:
            header.CopyFrom(tensor)
    try:
        inferred = infer_shapes(model)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError):
        inferred = model  # what is wrong is for onnxruntime to say
    for where, value in _declared(inferred.graph, {}):
        kind = value.type.tensor_type
        try:
            itemsize = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
        except (KeyError, ValueError):
            itemsize = 1
        n_bytes = _n_known(value) * itemsize
        if n_bytes > limit:
            raise ModelError(
                f"{label}: {where} takes {n_bytes / 1e9:.3g} GB, but one tensor may take "
                f"{limit / 1e9:.3g} GB here at most; export the model with smaller sizes"
            )


def _declared(graph: GraphProto, writers: Mapping[str, str]) -> Iterator[tuple[str, ValueInfoProto]]:
    """Yield tensors with words that say which they are; also those inside of subgraphs."""
    for value in graph.input:
        yield f"input {value.name!r}", value
    writers = {**writers, **{name: describe(node) for node in graph.node for name in node.output}}
    for value in (*graph.value_info, *graph.output):
        yield f"tensor {value.name!r}, which node {writers.get(value.name, '?')} writes,", value
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _declared(inner, writers)


def _n_known(value: ValueInfoProto) -> int:
    """The product of the dimensions that are known; open ones count as one, and so does zero."""
    return n_elements(max(dim.dim_value, 1) for dim in value.type.tensor_type.shape.dim)


def _machine_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # no such question on this system
        return MAX_TENSOR_BYTES
