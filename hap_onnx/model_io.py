"""From a file to a graph that the stages can work on, and back to a file.

``load_model`` reads and checks; ``normalise`` makes the onnx-graphsurgeon graph that all stages share;
``to_proto`` grafts an edited graph into a copy of the input model; ``save_model`` writes atomically.
Nothing of the model is executed while loading.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import google.protobuf.message
import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx_graphsurgeon.logger import G_LOGGER
from onnx_graphsurgeon.util.exception import OnnxGraphSurgeonException

from hap_onnx import folding
from hap_onnx.errors import ModelError, SurgeryError, ValidationError
from hap_onnx.external_data import read_external_data
from hap_onnx.protos import (
    DEFAULT_DOMAINS,
    captured,
    check_tensor,
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
    walk_tensors,
)

G_LOGGER.severity = 100  # it prints to stdout; what matters reaches the user as an error of ours

_MAX_PROTO_BYTES = 2**31 - 1  # protobuf's limit for one message
_MAX_DENSE_ELEMENTS = 2**28
_EXTERNAL_MIN_BYTES = 1024  # smaller tensors stay in the model file, where onnxruntime reads shapes from
_ALIGNMENT = 4096  # lets onnxruntime map the weights instead of copying them
_VERSIONED_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")


@dataclass(frozen=True)
class SourceModel:
    """A loaded model: as it was in the file, but with all weights in memory. Do not change ``proto``."""

    proto: ModelProto
    path: Path | None
    sha256: str  # of the content: the same for weights inside the file and beside it
    external_data: bool
    n_bytes: int  # of the file and its external weights


def load_model(model: str | Path | ModelProto) -> SourceModel:
    """Read a model and everything beside it that belongs to it.

    Raises:
        ModelError: the file is missing, damaged, not ONNX, unsafe, or newer than onnxruntime.
    """
    if isinstance(model, ModelProto):
        proto, path, n_bytes = ModelProto(), None, 0
        proto.CopyFrom(model)
        for where, tensor in walk_tensors(proto):
            if tensor.data_location == TensorProto.EXTERNAL:
                raise ModelError(
                    f"{where} of the given ModelProto keeps its data in another file, and a ModelProto does not know "
                    "its folder; give the path of the model instead, or onnx.load it with external data"
                )
        n_bytes, label = _n_bytes(proto), "the given ModelProto"
        external = False
    else:
        path = Path(model)
        proto = _parse(path)
        label = str(path)
        _check_header(proto, label)
        n_external = read_external_data(proto, path)
        n_bytes, external = path.stat().st_size + n_external, n_external > 0
    _check_header(proto, label)
    for where, tensor in walk_tensors(proto):
        check_tensor(tensor, where=f"{where} of {label}")
    _check_structure(proto.graph, label)
    _check_versions(proto, label)
    return SourceModel(proto=proto, path=path, sha256=_hash(proto), external_data=external, n_bytes=n_bytes)


def _parse(path: Path) -> ModelProto:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ModelError(f"{path} is a folder, but a model file is expected; give the .onnx file inside it")
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path} is not a regular file; give an .onnx file")
        if status.st_size == 0:
            raise ModelError(f"{path} is empty, but an ONNX model is expected; export or download it again")
        if status.st_size > _MAX_PROTO_BYTES:
            raise ModelError(
                f"{path} is larger than 2 GB, the limit of one ONNX file; save it again with its weights as external data"
            )
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist; check the path of the model") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError(f"{path} cannot be read ({reason}); check its permissions") from error
    proto = ModelProto()
    try:
        proto.ParseFromString(content)
    except google.protobuf.message.DecodeError as error:
        raise ModelError(f"{path} {_guess_content(content)}") from error
    if not proto.HasField("graph") and not proto.ir_version:
        raise ModelError(f"{path} {_guess_content(content)}")
    return proto


def _guess_content(content: bytes) -> str:
    """Say what a file that is not a readable model might be."""
    if content.startswith(b"PK\x03\x04"):
        return "is not an ONNX model but a zip archive (a PyTorch checkpoint?); export the model to ONNX first"
    if content.startswith(b"\x08"):  # field 1, the IR version, as a number: what exporters write first
        return "is a truncated or damaged ONNX model; export or download it again"
    if content[:4096].isascii() and b"\x00" not in content[:4096]:
        return "is not an ONNX model but a text file (an unfetched Git LFS pointer?); give a binary .onnx file"
    return "is not an ONNX model (or a damaged one); give an .onnx file as an exporter writes it"


def _n_bytes(proto: ModelProto) -> int:
    """Return the serialised size; the sum of the parts, because protobuf cannot count beyond 2 GB."""
    return copy_without(proto, omit=["graph"]).ByteSize() + sum(
        message.ByteSize()
        for message in [copy_without(proto.graph, omit=["initializer"]), *proto.graph.initializer]
    )


def _check_header(proto: ModelProto, label: str) -> None:
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise ModelError(f"{label} contains no graph, but a model to compress is expected; export it again")
    if not proto.graph.output:
        raise ModelError(f"{label} has no outputs, so nothing can be compared; export it with at least one output")
    if opset_of(proto) is None and any(node.domain in DEFAULT_DOMAINS for node in proto.graph.node):
        raise ModelError(f"{label} does not say which ONNX operator set it uses (opset_import); export it again")


def _check_structure(graph: GraphProto, label: str) -> None:
    """Raise ModelError unless each tensor is written once and all that is read is written."""
    initializers = [tensor.name for tensor in graph.initializer]
    initializers += [sparse.values.name for sparse in graph.sparse_initializer]
    inputs = [value.name for value in graph.input]
    written: set[str] = set()
    for name in [*initializers, *(name for name in inputs if name not in set(initializers))]:
        if name in written or not name:
            raise ModelError(f"{label} has two inputs or initializers called {name!r}; names must be unique and not empty")
        written.add(name)
    for node in graph.node:
        for name in node.output:
            if name and name in written:
                raise ModelError(f"{label}: tensor {name!r}, which node {describe(node)} writes, is written twice")
            written.add(name)
    for node in graph.node:
        for name in reads(node):
            if name not in written:
                raise ModelError(
                    f"{label}: node {describe(node)} reads tensor {name!r}, which nothing writes; export the model again"
                )
    for value in graph.output:
        if value.name not in written:
            raise ModelError(f"{label}: nothing writes the graph output {value.name!r}; export the model again")


def _check_versions(proto: ModelProto, label: str) -> None:
    """Raise ModelError if onnxruntime refuses the IR version or a standard operator set; others pass."""
    checks = [("", 7, proto.ir_version)]
    checks += [(o.domain, o.version, 4) for o in proto.opset_import if o.domain in _VERSIONED_DOMAINS]
    for domain, opset, ir_version in checks:
        refusal = _ask_onnxruntime(domain, opset, ir_version)
        if refusal is not None:
            what = f"IR version {ir_version}" if ir_version == proto.ir_version and opset == 7 else f"opset {opset}"
            if domain not in DEFAULT_DOMAINS:
                what = f"{what} of {domain}"
            raise ModelError(f"{label} uses {what}, which {refusal}; export it with an older version or update onnxruntime")


@functools.cache
def _ask_onnxruntime(domain: str, opset: int, ir_version: int) -> str | None:
    """Load a one-node model of the given versions: None if that works, else what onnxruntime said."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

    value = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "probe", value[:1], value[1:])
    opsets = [onnx.helper.make_opsetid(domain, opset)]
    if domain not in DEFAULT_DOMAINS:
        opsets.append(onnx.helper.make_opsetid("", 7))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    model = ModelProto(ir_version=ir_version, opset_import=opsets, graph=graph)
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except (
        ort_errors.Fail,
        ort_errors.InvalidArgument,
        ort_errors.InvalidGraph,
        ort_errors.InvalidProtobuf,
        ort_errors.NotImplemented,
        ort_errors.RuntimeException,
    ) as error:
        limit = re.search(r"(?:till opset|max supported IR version:)\s*(\d+)", str(error))
        version = onnxruntime.__version__
        if limit is None:
            return f"onnxruntime {version} refuses ({str(error).strip()})"
        return f"onnxruntime {version} does not support (it stops at {limit[1]})"
    return None


def _hash(proto: ModelProto) -> str:
    """Hash the content of a model, the same wherever and in however many files its weights are."""
    digest = hashlib.sha256()

    def add(data: bytes) -> None:
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)

    header = copy_without(proto, omit=["graph"])
    header.graph.CopyFrom(copy_without(proto.graph, omit=["initializer"]))
    for _, tensor in walk_tensors(header):
        tensor.ClearField("data_location")  # present but DEFAULT after onnx.load, absent in a file without external data
    add(header.SerializeToString(deterministic=True))
    for tensor in proto.graph.initializer:
        add(copy_without(tensor, omit=["raw_data", "data_location"]).SerializeToString(deterministic=True))
        add(tensor.raw_data)
    return digest.hexdigest()


def normalise(source: SourceModel) -> gs.Graph:
    """Make the graph that all stages work on.

    Local functions are inlined, every node has a unique name, initializers and Constant nodes are
    ``gs.Constant`` (read-only arrays; one object where the file has one tensor), shape computations are folded
    where that freezes nothing, and a weight's private Transpose or Cast is applied to it.

    Raises:
        ModelError: the graph has circles or cannot be expressed in onnx-graphsurgeon.
    """
    prepared, constants = _prepare(source.proto)
    placeholders = ModelProto()
    placeholders.CopyFrom(prepared)
    placeholders.graph.ClearField("value_info")
    try:
        graph = gs.import_onnx(placeholders)
    except (OnnxGraphSurgeonException, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{_label(source)} cannot be turned into a graph ({error}); export it again") from error
    arrays: dict[str, np.ndarray] = {}

    def load(tensor: gs.Tensor) -> None:
        if isinstance(tensor, gs.Constant) and tensor.name in constants and not isinstance(tensor._values, np.ndarray):
            if tensor.name not in arrays:
                arrays[tensor.name] = _to_array(constants[tensor.name])
            tensor.values = arrays[tensor.name]
            tensor.data_location = None
        elif isinstance(tensor, gs.Variable) and isinstance(tensor.dtype, int) and tensor.dtype:
            tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.dtype)  # gs has no name for bfloat16 and below

    for node in _walk_nodes(graph):
        node.domain = "" if node.domain in (None, "ai.onnx") else node.domain
        for tensor in [*node.inputs, *node.outputs]:
            load(tensor)
    for tensor in [*graph.inputs, *graph.outputs]:
        load(tensor)
    folding.fold(graph, prepared)
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


def _prepare(proto: ModelProto) -> tuple[ModelProto, dict[str, TensorProto]]:
    """Inline functions, name and sort nodes, and list all constants of the main graph as initializers.

    The returned model holds the headers of the constants only; the numbers are in the dictionary, by name.
    """
    model = copy_without_weights(proto)
    if proto.functions:
        try:
            model = onnx.inliner.inline_local_functions(model, convert_version=True)
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"the local functions of the model cannot be inlined ({error}); export it without them") from error
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
    for field, values in (("input", [_copy(value) for value in inputs]), ("node", nodes)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)
    return model, constants


def _copy(message):  # type: ignore[no-untyped-def]
    copy = type(message)()
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
    plain = {
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
    if any(dim < 0 for dim in sparse.dims) or size > _MAX_DENSE_ELEMENTS:
        raise ModelError(f"sparse tensor {name!r} has {size} elements, more than is reasonable; store it densely")
    values, indices = onnx.numpy_helper.to_array(sparse.values), onnx.numpy_helper.to_array(sparse.indices)
    flat = np.zeros(size, values.dtype)
    strides = np.array([n_elements(sparse.dims[axis + 1 :]) for axis in range(len(sparse.dims))], np.int64)
    positions = indices @ strides if indices.ndim == 2 else indices
    if positions.shape != values.shape or np.any(positions < 0) or np.any(positions >= size):
        raise ModelError(f"the indices of sparse tensor {name!r} do not fit its shape {list(sparse.dims)}; export it again")
    flat[positions] = values
    return onnx.numpy_helper.from_array(flat.reshape(tuple(sparse.dims)), name)


def to_proto(graph: gs.Graph, source: SourceModel, *, metadata: Mapping[str, str] | None = None) -> ModelProto:
    """Graft an edited graph into a copy of the input model.

    Inputs and outputs, versions, domain, doc strings and metadata (of the model, the graph, and of nodes and
    initializers by name) are the input model's; ``metadata`` is added to the model's.

    Raises:
        SurgeryError: the graph lost an input or output, uses a name twice or reads what nothing writes.
    """
    prepared, constants = _prepare(source.proto)
    model: ModelProto = copy_without(prepared, omit=["graph", "training_info"])
    model.graph.CopyFrom(
        copy_without(
            prepared.graph, omit=["node", "initializer", "input", "output", "value_info", "quantization_annotation"]
        )
    )
    _check_interface(graph, prepared)
    originals = {node.name: node for node in prepared.graph.node}
    opset = opset_of(prepared) or 1
    nodes = [export_node(node, original=originals.get(node.name), opset=opset) for node in graph.nodes]
    _check_unique((node.name for node in nodes), "nodes")
    try:
        nodes = sort_nodes(nodes)
    except ModelError as error:
        raise SurgeryError(f"the edited graph has a circle: {error}") from error
    initializers = _export_constants(graph, nodes, prepared, source.proto)
    _check_complete(nodes, initializers, prepared)
    _write_weights(model, initializers, source.proto)
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
    return model


def _check_interface(graph: gs.Graph, prepared: ModelProto) -> None:
    for kind, got, expected in (
        ("inputs", graph.inputs, prepared.graph.input),
        ("outputs", graph.outputs, prepared.graph.output),
    ):
        got_names, expected_names = [tensor.name for tensor in got], [value.name for value in expected]
        if got_names != expected_names:
            raise SurgeryError(f"the edited graph has the {kind} {got_names}, but the model has {expected_names}")


def _check_unique(names: Iterator[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen or not name:
            raise SurgeryError(f"the edited graph has two {what} called {name!r}; names must be unique and not empty")
        seen.add(name)


def _export_constants(
    graph: gs.Graph, nodes: list[NodeProto], prepared: ModelProto, original: ModelProto
) -> list[TensorProto]:
    """Write the constants that are read, in the order of the input model, then of first use."""
    found: dict[str, gs.Constant] = {}
    tensors = [tensor for node in _walk_nodes(graph) for tensor in node.inputs] + list(graph.outputs)
    for tensor in tensors:
        if isinstance(tensor, gs.Constant):
            known = found.setdefault(tensor.name, tensor)
            if known is not tensor and known._values is not tensor._values:
                raise SurgeryError(f"two different constants are called {tensor.name!r}; shared weights were untied")
    used = {name for node in nodes for name in reads(node)} | {tensor.name for tensor in graph.outputs}
    headers = {tensor.name: tensor for tensor in original.graph.initializer}
    rank = {tensor.name: index for index, tensor in enumerate(prepared.graph.initializer)}
    order = sorted((name for name in found if name in used), key=lambda name: rank.get(name, len(rank)))
    return [export_constant(found[name], header=headers.get(name)) for name in order]


def _check_complete(nodes: list[NodeProto], initializers: list[TensorProto], prepared: ModelProto) -> None:
    names = [value.name for value in prepared.graph.input] + [tensor.name for tensor in initializers]
    names += [name for node in nodes for name in node.output if name]
    _check_unique(iter(names), "tensors")
    written = set(names)
    for node in nodes:
        for name in reads(node):
            if name not in written:
                raise SurgeryError(f"node {describe(node)} reads {name!r}, which nothing in the edited graph writes")
    for value in prepared.graph.output:
        if value.name not in written:
            raise SurgeryError(f"nothing in the edited graph writes the output {value.name!r}")


def _write_weights(model: ModelProto, initializers: list[TensorProto], original: ModelProto) -> None:
    """Add initializers and graph inputs. Up to IR 3 an initializer must be an input too; later it need not."""
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
            node = onnx.helper.make_node("Constant", [], [tensor.name], name=f"Constant_{tensor.name}", value=tensor)
            model.graph.node.append(node)


def save_model(
    proto: ModelProto,
    path: Path,
    *,
    external_data: bool,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a model so that it appears at ``path`` complete or not at all.

    ``check`` is called with the temporary file before it is renamed and may raise to refuse it. Weights
    go to ``<stem>-<hash>.data`` beside the model if ``external_data`` is set or the model exceeds 2 GB; the
    name follows from the content, so an older model at ``path`` keeps its own data until the rename.

    Raises:
        ValidationError: the folder or the disk does not take the files.
    """
    path = Path(path)
    temporary: list[Path] = []
    model_file = _beside(path, "tmp.onnx")
    try:
        if external_data or _n_bytes(proto) > _MAX_PROTO_BYTES:
            proto = _move_weights_out(proto, path, temporary)
        temporary.append(model_file)
        _write(model_file, [proto.SerializeToString(deterministic=True)])
        if check is not None:
            check(model_file)
        os.replace(model_file, path)
        temporary.clear()
        _sync_folder(path.parent)
    except OSError as error:
        raise ValidationError(
            f"{path} cannot be written ({error.strerror or error}); check the folder, its permissions and the free space"
        ) from error
    finally:
        for leftover in temporary:
            with suppress(OSError):
                leftover.unlink()


def _beside(path: Path, suffix: str) -> Path:
    """Return a hidden name in the same folder, where a rename is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}.{suffix}")


def _write(path: Path, chunks: list[bytes]) -> None:
    with path.open("wb") as stream:
        for chunk in chunks:
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename last; not every file system allows it, and the file itself is already safe."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move_weights_out(proto: ModelProto, path: Path, temporary: list[Path]) -> ModelProto:
    """Write the large initializers to a file named after their content; return the model that points there."""
    slim: ModelProto = copy_without(proto, omit=["graph"])
    slim.graph.CopyFrom(copy_without(proto.graph, omit=["initializer"]))
    data_file = _beside(path, "tmp.data")
    temporary.append(data_file)
    digest, position = hashlib.sha256(), 0
    outside: list[TensorProto] = []
    with data_file.open("wb") as stream:
        for tensor in proto.graph.initializer:
            raw = _raw_data(tensor)
            if raw is None or len(raw) < _EXTERNAL_MIN_BYTES:
                slim.graph.initializer.append(tensor)
                continue
            padding = bytes(-position % _ALIGNMENT)
            header = _header_with_meta(tensor)
            header.data_location = TensorProto.EXTERNAL
            for key, value in (("offset", position + len(padding)), ("length", len(raw))):
                header.external_data.add(key=key, value=str(value))
            for chunk in (padding, raw):
                stream.write(chunk)
                digest.update(chunk)
            position += len(padding) + len(raw)
            slim.graph.initializer.append(header)
            outside.append(slim.graph.initializer[-1])
        stream.flush()
        os.fsync(stream.fileno())
    if not outside:
        data_file.unlink()
        temporary.remove(data_file)
        return slim
    final = path.with_name(f"{path.stem}-{digest.hexdigest()[:12]}.data")
    for tensor in outside:
        tensor.external_data.add(key="location", value=final.name)
    is_new = not final.exists()
    os.replace(data_file, final)
    temporary.remove(data_file)
    if is_new:  # an equal file of an earlier run may be in use
        temporary.append(final)
    return slim


def _header_with_meta(tensor: TensorProto) -> TensorProto:
    header: TensorProto = copy_without(
        tensor,
        omit=["raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "data_location"],
    )
    return header


def _raw_data(tensor: TensorProto) -> bytes | None:
    """Return the bytes of a tensor; None for strings, which cannot be external."""
    if tensor.data_type == TensorProto.STRING:
        return None
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)).raw_data
