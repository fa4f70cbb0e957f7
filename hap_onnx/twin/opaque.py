"""Nodes that the twin cannot compute with torch run here, each in an onnxruntime session of its own.

An opaque node is a black box: no gradient passes through it. Control flow, custom domains that
onnxruntime knows and rare operators end here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import torch
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnxruntime.capi import _pybind_state
from torch import Tensor

from hap_onnx.errors import ModelError, refuse_out_of_memory
from hap_onnx.model.protos import subgraphs

Value = Tensor | list[Tensor]  # a list is an ONNX sequence, which only opaque nodes read and write

Arrays = np.ndarray | list[np.ndarray]

# onnxruntime refuses an IR version it does not know; a one-node model needs nothing newer.
IR_VERSION = 10
_MAX_SESSIONS = 16  # of one node, for inputs of different types or, for control flow, shapes
_WRITABLE_TYPES = ("tensor_type", "sequence_type", "sparse_tensor_type")


@cache
def _known_operators() -> dict[tuple[str, str], int]:
    """Return the first opset of each (domain, op_type) whose schema is compiled into onnxruntime."""
    known: dict[tuple[str, str], int] = {}
    for schema in _pybind_state.get_all_operator_schema():
        key = (schema.domain, schema.name)
        known[key] = min(schema.since_version, known.get(key, schema.since_version))
    return known


def is_known(node: gs.Node, *, opset: int) -> bool:
    """Say whether onnxruntime knows the operator of ``node``; it may still lack a kernel for its types."""
    domain = "" if (node.domain or "") == "ai.onnx" else node.domain or ""
    since = _known_operators().get((domain, node.op))
    return since is not None and (domain != "" or since <= opset)


def subgraphs_of(node: gs.Node) -> list[gs.Graph]:
    """Return the graphs in the attributes of a control-flow node."""
    found: list[gs.Graph] = []
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(entry for entry in value if isinstance(entry, gs.Graph))
    return found


def captured_names(node: gs.Node, outer: Collection[str]) -> list[str]:
    """Return the tensors of the ``outer`` graph that the subgraphs of ``node`` read, in first-use order."""
    captured: dict[str, None] = {}

    def visit(graph: gs.Graph, hidden: frozenset[str]) -> None:
        local = hidden.union(tensor.name for tensor in graph.inputs)
        local = local.union(tensor.name for child in graph.nodes for tensor in child.outputs)
        read = [tensor for child in graph.nodes for tensor in child.inputs]
        for tensor in [*read, *graph.outputs]:
            if tensor.name and tensor.name not in local and tensor.name in outer:
                captured.setdefault(tensor.name)
        for child in graph.nodes:
            for subgraph in subgraphs_of(child):
                visit(subgraph, local)

    for subgraph in subgraphs_of(node):
        visit(subgraph, frozenset())
    return list(captured)


def write_node(node: gs.Node, *, captured: Collection[str]) -> onnx.NodeProto:
    """Return a node as protobuf; what its subgraphs capture is left to be read from outside.

    Raises ModelError for a subgraph over optional values, which onnx-graphsurgeon cannot write.
    """
    for graph in subgraphs_of(node):
        for tensor in [*graph.inputs, *graph.outputs]:
            if isinstance(tensor, gs.Variable) and tensor.type not in _WRITABLE_TYPES:
                raise ModelError(
                    f"node {node.name!r} ({node.op}) has a subgraph whose {tensor.name!r} is an optional "
                    "value, which hap-onnx cannot hold; export the model without optional values"
                )
    proto: onnx.NodeProto = OnnxExporter.export_node(node)

    def strip(graph: onnx.GraphProto) -> None:
        kept = [tensor for tensor in graph.initializer if tensor.name not in captured]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        for value in [*graph.input, *graph.output, *graph.value_info]:
            kind = value.type.WhichOneof("value")
            if kind == "tensor_type" and not value.type.tensor_type.elem_type:
                value.ClearField("type")  # onnx-graphsurgeon writes an unknown type as that of no number
        for child in graph.node:
            for subgraph in subgraphs(child):
                strip(subgraph)

    for subgraph in subgraphs(proto):
        strip(subgraph)
    return proto


def _to_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor's numbers; floats in float32, for which onnxruntime has the most kernels."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _to_arrays(value: Value) -> Arrays:
    return [_to_array(tensor) for tensor in value] if isinstance(value, list) else _to_array(value)


def _describe(arrays: Arrays, *, with_shape: bool) -> str:
    if isinstance(arrays, list):
        return "sequence " + "".join(sorted({array.dtype.str for array in arrays}))
    return f"{arrays.dtype.str} {arrays.shape}" if with_shape else arrays.dtype.str


def _value_info(name: str, arrays: Arrays, *, with_shape: bool) -> onnx.ValueInfoProto:
    if isinstance(arrays, list):
        dtype = arrays[0].dtype if arrays else np.dtype(np.float32)
        element = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        return onnx.helper.make_tensor_sequence_value_info(name, element, None)
    element = onnx.helper.np_dtype_to_tensor_dtype(arrays.dtype)
    return onnx.helper.make_tensor_value_info(name, element, list(arrays.shape) if with_shape else None)


class OpaqueNode:
    """One node as a callable on tensors; the session is built at the first call.

    ``fixed`` holds inputs that never change (integer constants, and constants of types that torch
    lacks): they become initializers, as some onnxruntime kernels demand.
    """

    def __init__(
        self,
        proto: onnx.NodeProto,
        *,
        input_names: Sequence[str],
        fixed: Mapping[str, np.ndarray],
        opsets: Sequence[onnx.OperatorSetIdProto],
    ) -> None:
        self._proto = proto
        self.input_names = tuple(input_names)
        self._fixed = dict(fixed)
        self._opsets = list(opsets)
        self._has_subgraphs = any(True for _ in subgraphs(proto))
        self._sessions: dict[tuple[str, ...], ort.InferenceSession] = {}

    def __call__(self, *inputs: Value | None) -> tuple[Value, ...]:
        """Run the node on one value per name (None where omitted); returns detached tensors."""
        feeds = {
            name: _to_arrays(value)
            for name, value in zip(self.input_names, inputs, strict=True)
            if name and name not in self._fixed and value is not None
        }
        try:
            outputs = iter(self._run(feeds, with_shape=False))
        except ModelError:
            if not self._has_subgraphs:
                raise
            outputs = iter(self._run(feeds, with_shape=True))  # a Scan wants to know the shapes inside it
        return tuple(self._to_value(next(outputs)) if name else torch.empty(0) for name in self._proto.output)

    def _run(self, feeds: Mapping[str, Arrays], *, with_shape: bool) -> list[Arrays]:
        session = self._session(feeds, with_shape=with_shape)
        try:
            return session.run(None, dict(feeds))
        except Exception as error:  # onnxruntime raises many unrelated types from its bindings
            refuse_out_of_memory(error, self._label)
            raise ModelError(f"{self._label} failed in onnxruntime: {error}") from error

    def _session(self, feeds: Mapping[str, Arrays], *, with_shape: bool) -> ort.InferenceSession:
        key = tuple(_describe(array, with_shape=with_shape) for array in feeds.values())
        if key not in self._sessions:
            if len(self._sessions) == _MAX_SESSIONS:
                del self._sessions[next(iter(self._sessions))]
            self._sessions[key] = self._build(feeds, with_shape=with_shape)
        return self._sessions[key]

    def prepare(self, dtypes: Sequence[np.dtype | None]) -> None:
        """Build the session now for inputs of these types; raises ModelError if onnxruntime refuses.

        Control flow, which may want shapes too, waits for its first call.
        """
        if self._has_subgraphs:
            return
        feeds = {
            name: np.empty(0, np.float32 if dtype.kind == "f" else dtype)
            for name, dtype in zip(self.input_names, dtypes, strict=True)
            if name and name not in self._fixed and dtype is not None
        }
        self._session(feeds, with_shape=False)

    def _to_value(self, output: Arrays) -> Value:
        try:
            if isinstance(output, list):
                return [torch.from_numpy(np.array(array)) for array in output]
            return torch.from_numpy(np.array(output))
        except TypeError as error:
            raise ModelError(f"{self._label} returns a type that the twin cannot hold: {error}") from error

    @property
    def _label(self) -> str:
        return (
            f"node {self._proto.name!r} ({self._proto.op_type}, domain {self._proto.domain or 'ai.onnx'!r})"
        )

    def _build(self, feeds: Mapping[str, Arrays], *, with_shape: bool) -> ort.InferenceSession:
        inputs = [_value_info(name, arrays, with_shape=with_shape) for name, arrays in feeds.items()]
        outputs = [onnx.ValueInfoProto(name=name) for name in self._proto.output if name]
        initializers = [onnx.numpy_helper.from_array(array, name) for name, array in self._fixed.items()]
        graph = onnx.helper.make_graph([self._proto], "opaque", inputs, outputs, initializers)
        model = onnx.helper.make_model(graph, opset_imports=self._opsets, ir_version=IR_VERSION)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        try:
            return ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises many unrelated types from its bindings
            refuse_out_of_memory(error, self._label)
            raise ModelError(f"{self._label} runs neither in torch nor in onnxruntime: {error}") from error
