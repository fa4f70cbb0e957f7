"""Read a model file, check it, and say in one sentence what is wrong with it.

Nothing of the model is executed, and nothing outside its folder is read.
"""

from __future__ import annotations

import functools
import hashlib
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, TensorProto

from hap_onnx.errors import ModelError
from hap_onnx.model.bounds import check_bounds
from hap_onnx.model.external_data import read_external_data, stamp_of
from hap_onnx.model.protos import (
    DEFAULT_DOMAINS,
    MAX_PROTO_BYTES,
    check_tensor,
    copy_without,
    describe,
    find_broken_text,
    opset_of,
    reads,
    walk_nodes,
    walk_tensors,
)
from hap_onnx.model.weights import (
    AnyModel,
    LargeModel,
    bytes_of,
    count_model_bytes,
    proto_of,
    split_model,
    weights_of,
)
from hap_onnx.ops.hazards import constants_read, find_hazard

_VERSIONED_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")


@dataclass(frozen=True)
class SourceModel:
    """A loaded model, with all weights in memory. Do not change ``proto``.

    ``proto`` is as it was in the file, but for what was external: small tensors are in there by now, and
    large initializers are the arrays in ``weights``, so that they are in memory once. ``model`` is both.
    """

    proto: ModelProto
    path: Path | None
    sha256: str  # of the content: the same for weights inside the file and beside it
    external_data: bool
    n_bytes: int  # of the file and its external weights
    weight_files: tuple[Path, ...] = ()  # where the external weights came from
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def model(self) -> AnyModel:
        """The whole model, in the one piece or the two that it has."""
        return LargeModel(self.proto, self.weights) if self.weights else self.proto


def load_model(model: str | Path | AnyModel) -> SourceModel:
    """Read a model and everything beside it that belongs to it.

    Raises:
        ModelError: the file is missing, damaged, not ONNX, unsafe, or newer than onnxruntime.
    """
    weights: Mapping[str, np.ndarray] = {}
    files: tuple[Path, ...] = ()
    if isinstance(model, (ModelProto, LargeModel)):
        path, n_bytes = None, 0
        for where, tensor in walk_tensors(proto_of(model)):
            if tensor.data_location == TensorProto.EXTERNAL and tensor.name not in weights_of(model):
                raise ModelError(
                    f"{where} of the given ModelProto keeps its data in another file, and a ModelProto "
                    "does not know its folder; "
                    "give the path of the model instead, or onnx.load it with external data"
                )
        n_bytes, label = count_model_bytes(model), "the given ModelProto"
        external = False
        if isinstance(model, ModelProto) and n_bytes > MAX_PROTO_BYTES:
            model = split_model(model)
        proto, weights = ModelProto(), weights_of(model)
        proto.CopyFrom(proto_of(model))
    else:
        path = Path(model)
        before = stamp_of(path)
        proto, proto_bytes = _parse(path)
        label = str(path)
        _check_header(proto, label)
        found, n_external, files = read_external_data(proto, path)
        weights = found.weights
        n_bytes, external = proto_bytes + n_external, n_external > 0
        if stamp_of(path) != before:
            raise ModelError(f"{path} was changed while it was read; start again when it is complete")
    _check_header(proto, label)
    for where, tensor in walk_tensors(proto):
        check_tensor(tensor, where=f"{where} of {label}")
    _check_structure(proto.graph, label)
    _check_hazards(proto, weights, label)
    _check_versions(proto, label)
    check_bounds(proto, label)
    return SourceModel(
        proto=proto,
        path=path,
        sha256=_hash(proto, weights),
        external_data=external,
        n_bytes=n_bytes,
        weight_files=files,
        weights=weights,
    )


def _parse(path: Path) -> tuple[ModelProto, int]:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ModelError(
                f"{path} is a folder, but a model file is expected; give the .onnx file inside it"
            )
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path} is not a regular file; give an .onnx file")
        if status.st_size == 0:
            raise ModelError(f"{path} is empty, but an ONNX model is expected; export or download it again")
        if status.st_size > MAX_PROTO_BYTES:
            raise ModelError(
                f"{path} is larger than 2 GB, the limit of one ONNX file; "
                "save it again with its weights as external data"
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
    except DecodeError as error:
        raise ModelError(f"{path} {_guess_content(content)}") from error
    if not proto.HasField("graph") and not proto.ir_version:
        raise ModelError(f"{path} {_guess_content(content)}")
    return proto, len(content)


def _guess_content(content: bytes) -> str:
    """Say what a file that is not a readable model might be."""
    if content.startswith(b"PK\x03\x04"):
        return (
            "is not an ONNX model but a zip archive (a PyTorch checkpoint?); export the model to ONNX first"
        )
    if content.startswith(b"\x08"):  # field 1, the IR version, as a number: what exporters write first
        return "is a truncated or damaged ONNX model; export or download it again"
    if content[:4096].isascii() and b"\x00" not in content[:4096]:
        return (
            "is not an ONNX model but a text file (an unfetched Git LFS pointer?); give a binary .onnx file"
        )
    return "is not an ONNX model (or a damaged one); give an .onnx file as an exporter writes it"


def _check_header(proto: ModelProto, label: str) -> None:
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise ModelError(f"{label} contains no graph, but a model to compress is expected; export it again")
    if not proto.graph.output:
        raise ModelError(
            f"{label} has no outputs, so nothing can be compared; export it with at least one output"
        )
    broken = find_broken_text(proto)
    if broken is not None:
        raise ModelError(f"{label} is damaged: a {broken!r} in it is not text; export or download it again")
    if proto.ir_version < 1:
        raise ModelError(f"{label} does not say which version of the ONNX format it has; export it again")
    if opset_of(proto) is None and any(node.domain in DEFAULT_DOMAINS for node in proto.graph.node):
        raise ModelError(
            f"{label} does not say which ONNX operator set it uses (opset_import); export it again"
        )


def _check_structure(graph: GraphProto, label: str) -> None:
    """Raise ModelError unless each tensor is written once and all that is read is written."""
    initializers = [tensor.name for tensor in graph.initializer]
    initializers += [sparse.values.name for sparse in graph.sparse_initializer]
    inputs = [value.name for value in graph.input]
    written: set[str] = set()
    for name in [*initializers, *(name for name in inputs if name not in set(initializers))]:
        if name in written or not name:
            raise ModelError(
                f"{label} has two inputs or initializers called {name!r}; names must be unique and not empty"
            )
        written.add(name)
    for value in [*graph.input, *graph.output]:
        element = value.type.tensor_type.elem_type
        if element not in TensorProto.DataType.values():
            raise ModelError(
                f"{label}: {value.name!r} has the unknown element type {element}; export the model again"
            )
    for node in graph.node:
        for name in node.output:
            if name and name in written:
                raise ModelError(
                    f"{label}: tensor {name!r}, which node {describe(node)} writes, is written twice"
                )
            written.add(name)
    for node in graph.node:
        for name in reads(node):
            if name not in written:
                raise ModelError(
                    f"{label}: node {describe(node)} reads tensor {name!r}, which nothing writes; "
                    "export the model again"
                )
    for value in graph.output:
        if value.name not in written:
            raise ModelError(
                f"{label}: nothing writes the graph output {value.name!r}; export the model again"
            )


def _check_hazards(proto: ModelProto, weights: Mapping[str, np.ndarray], label: str) -> None:
    """Raise ModelError for numbers that would end the process in onnxruntime."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in walk_nodes(proto):
        if node.op_type == "Constant" and node.output:
            constants.update((node.output[0], part.t) for part in node.attribute if part.HasField("t"))
    for node in walk_nodes(proto):
        for name in constants_read(node):
            if name in weights and weights[name].dtype.kind == "i":
                constants[name] = onnx.numpy_helper.from_array(weights[name])
        hazard = find_hazard(node, constants)
        if hazard is not None:
            raise ModelError(f"{label}: node {describe(node)} ({node.op_type}) {hazard}")


def _check_versions(proto: ModelProto, label: str) -> None:
    """Raise ModelError if onnxruntime refuses the IR version or a standard operator set; others pass."""
    asked = [(f"IR version {proto.ir_version}", "", 7, proto.ir_version)]
    for entry in proto.opset_import:
        if entry.domain in _VERSIONED_DOMAINS:
            of = "" if entry.domain in DEFAULT_DOMAINS else f" of {entry.domain}"
            asked.append((f"opset {entry.version}{of}", entry.domain, entry.version, 4))
    for what, domain, opset, ir_version in asked:
        refusal = _ask_onnxruntime(domain, opset, ir_version)
        if refusal is not None:
            raise ModelError(
                f"{label} uses {what}, which {refusal}; export it with an older version or update onnxruntime"
            )


@functools.cache
def _ask_onnxruntime(domain: str, opset: int, ir_version: int) -> str | None:
    """Load a one-node model of the given versions: None if that works, else what onnxruntime said."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

    value = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "probe", value[:1], value[1:]
    )
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


def _hash(proto: ModelProto, weights: Mapping[str, np.ndarray]) -> str:
    """Hash the content of a model, the same wherever and in however many files its weights are."""
    digest = hashlib.sha256()

    def add(data: bytes | memoryview) -> None:
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)

    header = copy_without(proto, omit=["graph"])
    header.graph.CopyFrom(copy_without(proto.graph, omit=["initializer"]))
    for _, tensor in walk_tensors(header):
        tensor.ClearField(
            "data_location"
        )  # present but DEFAULT after onnx.load, absent in a file without external data
    add(header.SerializeToString(deterministic=True))
    for tensor in proto.graph.initializer:
        header = copy_without(tensor, omit=["raw_data", "data_location", "external_data"])
        add(header.SerializeToString(deterministic=True))
        add(bytes_of(weights[tensor.name]) if tensor.name in weights else tensor.raw_data)
    return digest.hexdigest()
