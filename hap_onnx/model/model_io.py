"""From a file to the graph that the stages work on, and back.

``load_model`` reads and checks; ``normalise`` makes the onnx-graphsurgeon graph that all stages share;
``to_proto`` grafts an edited graph into a copy of the input model; ``save_model`` writes atomically.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from google.protobuf.message import Message  # type: ignore[import-untyped]
from onnx import ModelProto, NodeProto, TensorProto
from onnx_graphsurgeon.logger import G_LOGGER
from onnx_graphsurgeon.util.exception import OnnxGraphSurgeonException

from hap_onnx.errors import ModelError, SurgeryError
from hap_onnx.model import folding
from hap_onnx.model.bounds import MAX_DENSE_ELEMENTS
from hap_onnx.model.loading import SourceModel, load_model
from hap_onnx.model.protos import (
    DEFAULT_DOMAINS,
    captured,
    copy_without,
    copy_without_weights,
    describe,
    export_constant,
    export_node,
    n_elements,
    name_nodes,
    opset_of,
    reads,
    sort_nodes,
    subgraphs,
)
from hap_onnx.model.saving import save_model
from hap_onnx.model.stored import StoredWeight, find_stored, store_weights
from hap_onnx.model.weights import (
    MIN_BYTES,
    AnyModel,
    LargeModel,
    is_large,
    outside_header,
    put_inside,
    to_read_only,
)

__all__ = ["SourceModel", "load_model", "normalise", "save_model", "to_proto"]

G_LOGGER.severity = 100  # it prints to stdout; what matters reaches the user as an error of ours

M = TypeVar("M", bound=Message)


def normalise(source: SourceModel) -> gs.Graph:
    """Make the graph that all stages work on.

    Local functions are inlined, every node has a unique name, initializers and Constant nodes are
    ``gs.Constant`` (read-only arrays; one object where the file has one tensor), shapes are computed
    where that freezes nothing, and a weight's private Transpose or Cast is applied to it. A weight that is
    stored in 8 bits becomes the real numbers that it stands for, see ``hap_onnx.model.stored``.

    Raises:
        ModelError: the graph has circles or cannot be expressed in onnx-graphsurgeon.
    """
    prepared, constants, stored = _prepare(source)
    constants |= {name: TensorProto(name=name) for name in stored}
    placeholders = ModelProto()
    placeholders.CopyFrom(prepared)
    placeholders.graph.ClearField("value_info")
    try:
        graph = gs.import_onnx(placeholders)
    except (OnnxGraphSurgeonException, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{_label(source)} cannot be turned into a graph ({error}); export it again"
        ) from error
    arrays: dict[str, np.ndarray] = dict(source.weights)
    arrays |= {name: to_read_only(one.to_float()) for name, one in stored.items()}

    def load(tensor: gs.Tensor) -> None:
        if (
            isinstance(tensor, gs.Constant)
            and tensor.name in constants
            and not isinstance(tensor._values, np.ndarray)
        ):
            if tensor.name not in arrays:
                arrays[tensor.name] = _to_array(constants[tensor.name])
            tensor.values = arrays[tensor.name]
            tensor.data_location = None
        elif isinstance(tensor, gs.Variable) and isinstance(tensor.dtype, int) and tensor.dtype:
            tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(
                tensor.dtype
            )  # gs has no name for bfloat16 and below

    for node in _walk_nodes(graph):
        node.domain = "" if node.domain in (None, "ai.onnx") else node.domain
        for tensor in [*node.inputs, *node.outputs]:
            load(tensor)
    for tensor in [*graph.inputs, *graph.outputs]:
        load(tensor)
    folding.fold(graph, prepared, pinned=frozenset(stored))
    _set_types(graph, prepared)
    return graph


def _label(source: SourceModel) -> str:
    return str(source.path) if source.path else "the given ModelProto"


def _walk_nodes(graph: gs.Graph) -> Iterator[gs.Node]:
    for node in graph.nodes:
        yield node
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from _walk_nodes(value)


def _set_types(graph: gs.Graph, prepared: ModelProto) -> None:
    """Note the element type of every tensor that inference knows; shapes are left to the probe."""
    _, types = folding.infer(graph, folding.make_context(prepared))
    for node in graph.nodes:
        for tensor in node.outputs:
            if isinstance(tensor, gs.Variable) and tensor.dtype is None and tensor.name in types:
                tensor.dtype = types[tensor.name]


def _to_array(tensor: TensorProto) -> np.ndarray:
    array = np.asarray(onnx.numpy_helper.to_array(tensor))
    array.flags.writeable = False
    return array


def stored_weights(source: SourceModel) -> frozenset[str]:
    """Return the names of the constants of a normalised graph that the file stores in 8 bits."""
    return frozenset(_prepare(source)[2])


def _prepare(source: SourceModel) -> tuple[ModelProto, dict[str, TensorProto], dict[str, StoredWeight]]:
    """Inline functions, name and sort nodes, and list all constants of the main graph as initializers.

    The returned model holds the headers of the constants only; the numbers are in the dictionary, by name.
    Weights that are stored in 8 bits are initializers without numbers there: the third has them.
    Numbers that ``source`` has beside its message stay there.
    """
    proto = source.proto
    model = copy_without_weights(proto)
    if proto.functions:
        try:
            model = onnx.inliner.inline_local_functions(model, convert_version=True)
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"the local functions of the model cannot be inlined ({error}); export it without them"
            ) from error
    graph = model.graph
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for sparse in proto.graph.sparse_initializer:
        constants[sparse.values.name] = _to_dense(sparse)
        graph.initializer.append(_header_of(constants[sparse.values.name]))
    graph.ClearField("sparse_initializer")
    inputs = [value for value in graph.input if value.name not in constants]
    nodes: list[NodeProto] = []
    for node in graph.node:
        value = _constant_value(node)
        if value is None:
            nodes.append(node)
        else:
            constants[value.name] = value
            graph.initializer.append(_header_of(value))
    nodes = [_copy(node) for node in sort_nodes(nodes)]
    name_nodes(nodes)
    pinned = {value.name for value in graph.output}
    for node in nodes:
        for subgraph in subgraphs(node):
            pinned |= captured(subgraph)
    stored = find_stored(nodes, constants, source.weights, pinned=pinned)
    for name, one in stored.items():
        header = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=one.quantized.shape)
        graph.initializer.append(header)
    gone = {*stored, *(one.node.input[0] for one in stored.values())}
    nodes = [node for node in nodes if gone.isdisjoint(node.output)]
    for field, values in (("input", [_copy(value) for value in inputs]), ("node", nodes)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)
    return model, constants, stored


def _copy(message: M) -> M:
    copy: M = type(message)()
    copy.CopyFrom(message)
    return copy


def _header_of(tensor: TensorProto) -> TensorProto:
    return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)


def _constant_value(node: NodeProto) -> TensorProto | None:
    """Return the value of a Constant node under the name of its output; None for other nodes."""
    if node.op_type != "Constant" or node.domain not in DEFAULT_DOMAINS or len(node.attribute) != 1:
        return None
    attribute, name = node.attribute[0], node.output[0]
    if attribute.name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(attribute.t)
        tensor.name = name
        return tensor
    if attribute.name == "sparse_value":
        sparse = _copy(attribute.sparse_tensor)
        sparse.values.name = name
        return _to_dense(sparse)
    plain: dict[str, tuple[int, Callable[[Any], tuple[list[int], Any]]]] = {
        "value_float": (TensorProto.FLOAT, lambda a: ([], [a.f])),
        "value_floats": (TensorProto.FLOAT, lambda a: ([len(a.floats)], a.floats)),
        "value_int": (TensorProto.INT64, lambda a: ([], [a.i])),
        "value_ints": (TensorProto.INT64, lambda a: ([len(a.ints)], a.ints)),
        "value_string": (TensorProto.STRING, lambda a: ([], [a.s])),
        "value_strings": (TensorProto.STRING, lambda a: ([len(a.strings)], a.strings)),
    }
    if attribute.name not in plain:
        return None
    data_type, read = plain[attribute.name]
    dims, values = read(attribute)
    return onnx.helper.make_tensor(name, data_type, dims, list(values))


def _to_dense(sparse: onnx.SparseTensorProto) -> TensorProto:
    """Write a sparse tensor in full, within bounds."""
    name, size = sparse.values.name, n_elements(sparse.dims)
    if any(dim < 0 for dim in sparse.dims) or size > MAX_DENSE_ELEMENTS:
        raise ModelError(
            f"sparse tensor {name!r} has {size} elements, more than is reasonable; store it densely"
        )
    values, indices = onnx.numpy_helper.to_array(sparse.values), onnx.numpy_helper.to_array(sparse.indices)
    flat = np.zeros(size, values.dtype)
    strides = np.array([n_elements(sparse.dims[axis + 1 :]) for axis in range(len(sparse.dims))], np.int64)
    positions = indices @ strides if indices.ndim == 2 else indices
    if positions.shape != values.shape or np.any(positions < 0) or np.any(positions >= size):
        raise ModelError(
            f"the indices of sparse tensor {name!r} do not fit its shape {list(sparse.dims)}; export it again"
        )
    flat[positions] = values
    return onnx.numpy_helper.from_array(flat.reshape(tuple(sparse.dims)), name)


def to_proto(
    graph: gs.Graph, source: SourceModel, *, metadata: Mapping[str, str] | None = None
) -> AnyModel:
    """Graft an edited graph into a copy of the input model; that of a model in two parts has two.

    Inputs and outputs, versions, domain, doc strings and metadata (of the model, the graph, and of nodes and
    initializers by name) are the input model's; ``metadata`` is added to the model's.

    Raises:
        SurgeryError: the graph lost an input or output, uses a name twice or reads what nothing writes.
    """
    prepared, _, stored = _prepare(source)
    model: ModelProto = copy_without(prepared, omit=["graph", "training_info"])
    model.graph.CopyFrom(
        copy_without(
            prepared.graph,
            omit=["node", "initializer", "input", "output", "value_info", "quantization_annotation"],
        )
    )
    _check_interface(graph, prepared)
    originals = {node.name: node for node in prepared.graph.node}
    opset = opset_of(prepared) or 1
    nodes = [export_node(node, original=originals.get(node.name), opset=opset) for node in graph.nodes]
    weights: dict[str, np.ndarray] | None = {} if source.weights else None
    tensors = _export_constants(graph, nodes, prepared, source.proto, weights, leave=stored)
    taken = {tensor.name for tensor in tensors} | {name for node in nodes for name in node.output}
    dequantizers, hidden = store_weights(graph, stored, taken=taken)
    nodes += dequantizers
    _check_unique((node.name for node in nodes), "nodes")
    try:
        nodes = sort_nodes(nodes)
    except ModelError as error:
        raise SurgeryError(f"the edited graph has a circle: {error}") from error
    present = {tensor.name for tensor in tensors}
    initializers = [tensor for tensor in tensors if tensor.name not in stored]
    for constant in hidden:
        if constant.name not in present:
            initializers.append(_export_constant(constant, None, weights))
    _check_complete(nodes, initializers, prepared)
    _write_weights(model, initializers, source.proto, weights)
    model.graph.node.extend(nodes)
    model.graph.output.extend(prepared.graph.output)
    kept = {tensor.name for tensor in initializers} | {name for node in nodes for name in node.output}
    model.graph.quantization_annotation.extend(
        note for note in source.proto.graph.quantization_annotation if note.tensor_name in kept
    )
    for key, value in (metadata or {}).items():
        for entry in [entry for entry in model.metadata_props if entry.key == key]:
            model.metadata_props.remove(entry)
        model.metadata_props.add(key=key, value=value)
    return LargeModel(model, weights) if weights is not None else model


def _check_interface(graph: gs.Graph, prepared: ModelProto) -> None:
    for kind, got, expected in (
        ("inputs", graph.inputs, prepared.graph.input),
        ("outputs", graph.outputs, prepared.graph.output),
    ):
        got_names, expected_names = [tensor.name for tensor in got], [value.name for value in expected]
        if got_names != expected_names:
            raise SurgeryError(
                f"the edited graph has the {kind} {got_names}, but the model has {expected_names}"
            )


def _check_unique(names: Iterator[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen or not name:
            raise SurgeryError(
                f"the edited graph has two {what} called {name!r}; names must be unique and not empty"
            )
        seen.add(name)


def _export_constants(
    graph: gs.Graph,
    nodes: list[NodeProto],
    prepared: ModelProto,
    original: ModelProto,
    weights: dict[str, np.ndarray] | None,
    *,
    leave: Collection[str],
) -> list[TensorProto]:
    """Write the constants that are read, in the order of the input model, then of first use.

    With ``weights``, large ones are put there, and the tensors are headers. Those that ``leave`` names get
    tensors without numbers.
    """
    found: dict[str, gs.Constant] = {}
    tensors = [tensor for node in _walk_nodes(graph) for tensor in node.inputs] + list(graph.outputs)
    for tensor in tensors:
        if isinstance(tensor, gs.Constant):
            known = found.setdefault(tensor.name, tensor)
            if known is not tensor and known._values is not tensor._values:
                raise SurgeryError(
                    f"two different constants are called {tensor.name!r}; shared weights were untied"
                )
    used = {name for node in nodes for name in reads(node)} | {tensor.name for tensor in graph.outputs}
    headers = {tensor.name: tensor for tensor in original.graph.initializer}
    rank = {tensor.name: index for index, tensor in enumerate(prepared.graph.initializer)}
    order = sorted((name for name in found if name in used), key=lambda name: rank.get(name, len(rank)))
    return [
        TensorProto(name=name) if name in leave else _export_constant(found[name], headers.get(name), weights)
        for name in order
    ]


def _export_constant(
    constant: gs.Constant, header: TensorProto | None, weights: dict[str, np.ndarray] | None
) -> TensorProto:
    values = constant._values
    if weights is not None and isinstance(values, np.ndarray) and values.nbytes >= MIN_BYTES:
        sample = gs.Constant(constant.name, np.zeros(0, values.dtype))
        tensor = export_constant(sample, header=header)
        if is_large(tensor, values.nbytes):
            tensor.ClearField("dims")
            tensor.dims.extend(values.shape)
            weights[constant.name] = to_read_only(values)
            return outside_header(tensor)
    return export_constant(constant, header=header)


def _check_complete(
    nodes: Sequence[NodeProto], initializers: list[TensorProto], prepared: ModelProto
) -> None:
    names = [value.name for value in prepared.graph.input] + [tensor.name for tensor in initializers]
    names += [name for node in nodes for name in node.output if name]
    _check_unique(iter(names), "tensors")
    written = set(names)
    for node in nodes:
        for name in reads(node):
            if name not in written:
                raise SurgeryError(
                    f"node {describe(node)} reads {name!r}, which nothing in the edited graph writes"
                )
    for value in prepared.graph.output:
        if value.name not in written:
            raise SurgeryError(f"nothing in the edited graph writes the output {value.name!r}")


def _write_weights(
    model: ModelProto,
    initializers: list[TensorProto],
    original: ModelProto,
    weights: dict[str, np.ndarray] | None,
) -> None:
    """Add initializers and graph inputs. Up to IR 3 an initializer must be an input too."""
    own = {tensor.name for tensor in original.graph.initializer}
    if model.ir_version > 3:
        model.graph.initializer.extend(initializers)
        model.graph.input.extend(value for value in original.graph.input if value.name not in own)
        return
    by_name = {tensor.name: tensor for tensor in initializers}
    for value in original.graph.input:
        if value.name in by_name:
            tensor = by_name[value.name]
            listed = onnx.helper.make_tensor_value_info(value.name, tensor.data_type, list(tensor.dims))
            listed.doc_string = value.doc_string
            model.graph.input.append(listed)
        elif value.name not in own:
            model.graph.input.append(value)
    listed_names = {value.name for value in model.graph.input}
    for tensor in initializers:
        if tensor.name in listed_names:
            model.graph.initializer.append(tensor)
        else:  # a new input would change the model's interface; a Constant node does not
            if weights is not None and tensor.name in weights:
                put_inside(tensor, weights.pop(tensor.name))
            node = onnx.helper.make_node(
                "Constant", [], [tensor.name], name=f"Constant_{tensor.name}", value=tensor
            )
            model.graph.node.append(node)
