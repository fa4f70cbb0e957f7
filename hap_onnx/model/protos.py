"""ONNX protobuf messages as plain data: walking, ordering, naming and writing nodes.

Nothing here reads files, runs a model or knows what the result is for.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from hap_onnx.errors import ModelError, SurgeryError

DEFAULT_DOMAINS = ("", "ai.onnx")
MAX_PROTO_BYTES = 2**31 - 1  # protobuf's limit for one message
_MAX_AXES = 32  # numpy 1 allows no more
_MAX_ELEMENTS = 2**56
_GRAPH_ATTRIBUTES = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
# Elements per byte of the types that are packed.
PACKED_TYPES: dict[int, int] = {
    TensorProto.UINT4: 2,
    TensorProto.INT4: 2,
    TensorProto.FLOAT4E2M1: 2,
    TensorProto.UINT2: 4,
    TensorProto.INT2: 4,
}
_COMPLEX = (TensorProto.COMPLEX64, TensorProto.COMPLEX128)
_TYPED_FIELD: dict[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.COMPLEX64: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.COMPLEX128: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.STRING: "string_data",
}


def copy_without(message: Any, *, omit: Iterable[str]) -> Any:
    """Copy a protobuf message except for the fields named in ``omit``, which are not even read."""
    omitted = set(omit)
    copy = type(message)()
    for field, value in message.ListFields():
        if field.name in omitted:
            continue
        if isinstance(value, (bool, int, float, str, bytes)):
            setattr(copy, field.name, value)
        elif hasattr(value, "CopyFrom"):
            getattr(copy, field.name).CopyFrom(value)
        else:
            getattr(copy, field.name).extend(value)
    return copy


def copy_without_weights(proto: ModelProto) -> ModelProto:
    """Copy a model with the names, types and shapes of its initializers but without their numbers."""
    model: ModelProto = copy_without(proto, omit=["graph"])
    model.graph.CopyFrom(copy_without(proto.graph, omit=["initializer", "sparse_initializer"]))
    for tensor in proto.graph.initializer:
        model.graph.initializer.append(tensor_header(tensor))
    return model


def count_bytes(proto: ModelProto) -> int:
    """Return the serialised size, also beyond 2 GB, where it is the sum of the parts."""
    parts = [copy_without(proto, omit=["graph"]), copy_without(proto.graph, omit=["initializer"])]
    total = sum(int(part.ByteSize()) for part in [*parts, *proto.graph.initializer])
    return total if total > MAX_PROTO_BYTES // 2 else int(proto.ByteSize())


def tensor_header(tensor: TensorProto) -> TensorProto:
    """Copy the name, type, shape, doc string and metadata of a tensor, without its numbers."""
    header = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    if tensor.doc_string:
        header.doc_string = tensor.doc_string
    header.metadata_props.extend(tensor.metadata_props)
    return header


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Yield the graphs in the attributes of a node, not those inside them."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def walk_nodes(proto: ModelProto) -> Iterator[NodeProto]:
    """Yield every node of a model, those of subgraphs and local functions too."""
    queue = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    while queue:
        node = queue.pop()
        yield node
        queue += [inner for graph in subgraphs(node) for inner in graph.node]


def walk_tensors(proto: ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """Yield every tensor of a model with words that say where it is, in a fixed order."""
    yield from _walk_graph(proto.graph)
    for function in proto.functions:
        for node in function.node:
            yield from _walk_node(node)


def _walk_graph(graph: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    for tensor in graph.initializer:
        yield f"initializer {tensor.name!r}", tensor
    for sparse in graph.sparse_initializer:
        yield f"values of the sparse initializer {sparse.values.name!r}", sparse.values
        yield f"indices of the sparse initializer {sparse.values.name!r}", sparse.indices
    for node in graph.node:
        yield from _walk_node(node)


def _walk_node(node: NodeProto) -> Iterator[tuple[str, TensorProto]]:
    for attribute in node.attribute:
        where = f"attribute {attribute.name!r} of node {describe(node)}"
        if attribute.HasField("t"):
            yield where, attribute.t
        for tensor in attribute.tensors:
            yield where, tensor
        sparse_tensors = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
        for sparse in [*sparse_tensors, *attribute.sparse_tensors]:
            yield where, sparse.values
            yield where, sparse.indices
    for graph in subgraphs(node):
        yield from _walk_graph(graph)


def find_broken_text(message: Any) -> str | None:
    """Return the name of a text field that is not valid UTF-8 (protobuf then gives bytes), or None."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            values = [value] if isinstance(value, (str, bytes)) else value
            if any(isinstance(text, bytes) for text in values):
                return str(field.name)
        elif field.type == field.TYPE_MESSAGE:
            for part in [value] if hasattr(value, "ListFields") else value:
                found = find_broken_text(part)
                if found is not None:
                    return found
    return None


def describe(node: NodeProto) -> str:
    """Name a node for a message: its own name, or its operator and first output."""
    return repr(node.name) if node.name else f"{node.op_type} that writes {next(iter(node.output), '')!r}"


def n_elements(dims: Iterable[int]) -> int:
    """Multiply dimensions as Python integers, which do not overflow."""
    product = 1
    for dim in dims:
        product *= int(dim)
    return product


def n_data_bytes(tensor: TensorProto) -> int:
    """Return the bytes that the raw data of a tensor takes by its type and shape."""
    count = n_elements(tensor.dims)
    per_byte = PACKED_TYPES.get(tensor.data_type)
    if per_byte is not None:
        return -(-count // per_byte)
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def check_tensor(tensor: TensorProto, *, where: str) -> None:
    """Raise ModelError unless a tensor's type and shape are sound and its numbers are all there."""
    if tensor.data_type == TensorProto.UNDEFINED or tensor.data_type not in TensorProto.DataType.values():
        raise ModelError(f"{where} has the unknown element type {tensor.data_type}; export the model again")
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(
            f"{where} has the shape {list(tensor.dims)}, but none may be negative; export the model again"
        )
    if len(tensor.dims) > _MAX_AXES:
        raise ModelError(
            f"{where} has {len(tensor.dims)} axes, but {_MAX_AXES} is the most that can be handled"
        )
    if n_elements(max(dim, 1) for dim in tensor.dims) > _MAX_ELEMENTS:  # also of an empty one: [0, 10**15]
        raise ModelError(
            f"{where} has the shape {list(tensor.dims)}, which no machine can hold; the file is damaged: "
            "export or download it again"
        )
    if tensor.HasField("segment"):
        raise ModelError(f"{where} is stored in segments, which nothing reads; export the model again")
    if tensor.data_location == TensorProto.EXTERNAL:
        return
    if tensor.HasField("raw_data"):
        got, expected, unit = len(tensor.raw_data), n_data_bytes(tensor), "bytes"
        if tensor.data_type == TensorProto.STRING:
            raise ModelError(
                f"{where} holds strings as raw bytes, which ONNX does not allow; export the model again"
            )
    else:
        count = n_elements(tensor.dims) * (2 if tensor.data_type in _COMPLEX else 1)
        expected = -(-count // PACKED_TYPES.get(tensor.data_type, 1))
        got, unit = len(getattr(tensor, _TYPED_FIELD.get(tensor.data_type, "int32_data"))), "elements"
    if got != expected:
        raise ModelError(
            f"{where} holds {got} {unit} of data, but its type and shape {list(tensor.dims)} need "
            f"{expected}; the file is damaged: export or download it again"
        )


def reads(node: NodeProto) -> list[str]:
    """Return the names of the tensors that a node reads, also from inside its subgraphs."""
    names = [name for name in node.input if name]
    for graph in subgraphs(node):
        names.extend(sorted(captured(graph)))
    return names


def captured(graph: GraphProto) -> set[str]:
    """Return the names that a subgraph takes from the graphs around it."""
    defined = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    defined |= {sparse.values.name for sparse in graph.sparse_initializer}
    used = {value.name for value in graph.output}
    for node in graph.node:
        defined.update(node.output)
        used.update(reads(node))
    return used - defined - {""}


def sort_nodes(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Order nodes so that each follows what it reads; otherwise the given order is kept.

    Raises:
        ModelError: when nodes read each other in a circle.
    """
    writer = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    readers: list[list[int]] = [[] for _ in nodes]
    waiting = [0] * len(nodes)
    for index, node in enumerate(nodes):
        for source in {writer[name] for name in reads(node) if name in writer}:
            readers[source].append(index)
            waiting[index] += 1
    ready = [index for index, count in enumerate(waiting) if count == 0]
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for reader in readers[index]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(ready, reader)
    if len(order) < len(nodes):
        stuck = next(node for node, count in zip(nodes, waiting, strict=True) if count)
        raise ModelError(f"node {describe(stuck)} depends on its own output; a graph must not have circles")
    return [nodes[index] for index in order]


def name_nodes(nodes: Sequence[NodeProto]) -> None:
    """Give every node a unique name: its own if that is free, else one from its operator and first output."""
    taken: set[str] = set()
    nameless: list[NodeProto] = []
    for node in nodes:
        if node.name and node.name not in taken:
            taken.add(node.name)
        else:
            nameless.append(node)
    for node in nameless:
        first_output = next((name for name in node.output if name), "")
        base = node.name or (f"{node.op_type}_{first_output}" if first_output else node.op_type)
        name, suffix = base, 2
        while name in taken:
            name, suffix = f"{base}_{suffix}", suffix + 1
        node.name = name
        taken.add(name)


def export_node(node: gs.Node, *, original: NodeProto | None, opset: int) -> NodeProto:
    """Write an onnx-graphsurgeon node as protobuf.

    What onnx-graphsurgeon cannot hold (doc string, metadata, overload, attributes of rare types) comes from
    ``original``, the node of the same name in the input model, if it still is the same operator.
    Subgraphs come from there too: hap-onnx never edits inside them.
    """
    proto = NodeProto()
    same = original is not None and original.op_type == node.op
    if same:
        proto.CopyFrom(original)
        for field in ("input", "output", "attribute"):
            proto.ClearField(field)
    proto.op_type, proto.name = node.op, node.name
    if node.domain or proto.domain:
        proto.domain = node.domain or ""
    proto.input.extend(tensor.name for tensor in node.inputs)
    proto.output.extend(tensor.name for tensor in node.outputs)
    known = (
        {attribute.name: attribute for attribute in original.attribute}
        if same and original is not None
        else {}
    )
    for name, attribute in known.items():
        if name in node.attrs:
            proto.attribute.append(_export_attribute(node, name, known=attribute, opset=opset))
        elif attribute.type not in _IMPORTED:
            proto.attribute.append(attribute)  # of a type that onnx-graphsurgeon skips
    for name in node.attrs:
        if name not in known:
            proto.attribute.append(_export_attribute(node, name, known=None, opset=opset))
    return proto


_IMPORTED = {
    AttributeProto.FLOAT,
    AttributeProto.INT,
    AttributeProto.STRING,
    AttributeProto.TENSOR,
    AttributeProto.GRAPH,
    AttributeProto.FLOATS,
    AttributeProto.INTS,
    AttributeProto.STRINGS,
}


def _export_attribute(
    node: gs.Node, name: str, *, known: AttributeProto | None, opset: int
) -> AttributeProto:
    value = node.attrs[name]
    if isinstance(value, gs.Graph):
        if known is None or known.type not in _GRAPH_ATTRIBUTES:
            raise SurgeryError(f"node {node.name!r} got a new subgraph {name!r}, which hap-onnx cannot write")
        return known
    if isinstance(value, gs.Constant):
        value = export_constant(value)
    elif isinstance(value, np.ndarray):
        value = onnx.numpy_helper.from_array(value, name)
    elif isinstance(value, np.generic):
        value = value.item()
    elif isinstance(value, (list, tuple)):
        value = [item.item() if isinstance(item, np.generic) else item for item in value]
    elif isinstance(value, type):
        value = int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(value)))
    attribute_type = known.type if known is not None else _schema_type(node, name, opset=opset)
    if attribute_type == AttributeProto.FLOATS:
        value = [float(item) for item in value]
    elif attribute_type == AttributeProto.FLOAT:
        value = float(value)
    attribute = onnx.helper.make_attribute(name, value, attr_type=attribute_type)
    if known is not None and known.doc_string:
        attribute.doc_string = known.doc_string
    return attribute


def _schema_type(node: gs.Node, name: str, *, opset: int) -> int | None:
    """Ask the operator's schema for the type of an attribute (an empty list does not show its own)."""
    if (node.domain or "") not in DEFAULT_DOMAINS or not onnx.defs.has(node.op):
        return None
    schema = onnx.defs.get_schema(node.op, opset, "")
    if name not in schema.attributes:
        return None
    kind: Any = schema.attributes[name].type
    return int(kind.value)


def export_constant(tensor: gs.Constant, *, header: TensorProto | None = None) -> TensorProto:
    """Write a constant bit by bit as it is; doc string and metadata come from ``header``."""
    values = tensor._values
    if isinstance(values, np.ndarray):
        proto = onnx.numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), tensor.name)
    else:
        proto = TensorProto()
        proto.CopyFrom(values.tensor)
        proto.name = tensor.name
    if header is not None:
        proto.doc_string = header.doc_string
        proto.metadata_props.extend(header.metadata_props)
        if not header.doc_string:
            proto.ClearField("doc_string")
    return proto


def opset_of(proto: ModelProto) -> int | None:
    """Return the version of the default operator set, or None if the model does not state it."""
    versions = [entry.version for entry in proto.opset_import if entry.domain in DEFAULT_DOMAINS]
    return max(versions) if versions else None
