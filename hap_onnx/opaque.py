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

from hap_onnx.errors import ModelError
from hap_onnx.protos import subgraphs

# onnxruntime refuses an IR version it does not know; a one-node model needs nothing newer.
_IR_VERSION = 10


@cache
def _known_operators() -> frozenset[tuple[str, str]]:
    """Return (domain, op_type) of every schema compiled into onnxruntime."""
    schemas = _pybind_state.get_all_operator_schema()
    return frozenset((schema.domain, schema.name) for schema in schemas)


def runs_in_onnxruntime(node: gs.Node) -> bool:
    """Say whether onnxruntime knows the operator of ``node``."""
    domain = "" if (node.domain or "") == "ai.onnx" else node.domain or ""
    return (domain, node.op) in _known_operators()


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
    """Return the names of tensors of the ``outer`` graph that the subgraphs of ``node`` read, in first-use order."""
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
    """Return a node as protobuf; what its subgraphs capture is left to be read from outside."""
    proto: onnx.NodeProto = OnnxExporter.export_node(node)

    def strip(graph: onnx.GraphProto) -> None:
        kept = [tensor for tensor in graph.initializer if tensor.name not in captured]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        for child in graph.node:
            for subgraph in subgraphs(child):
                strip(subgraph)

    for subgraph in subgraphs(proto):
        strip(subgraph)
    return proto


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
        self._input_names = tuple(input_names)
        self._fixed = dict(fixed)
        self._opsets = list(opsets)
        self._sessions: dict[tuple[str, ...], ort.InferenceSession] = {}

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Run the node on one tensor per name (None where omitted); returns detached tensors."""
        feeds: dict[str, np.ndarray] = {}
        for name, tensor in zip(self._input_names, inputs):
            if name and name not in self._fixed and tensor is not None:
                feeds[name] = tensor.detach().cpu().contiguous().numpy()
        key = tuple(array.dtype.str for array in feeds.values())
        if key not in self._sessions:
            self._sessions[key] = self._build(feeds)
        try:
            outputs = self._sessions[key].run(None, feeds)
        except Exception as error:  # onnxruntime raises many unrelated types from its bindings
            raise ModelError(
                f"node {self._proto.name!r} ({self._proto.op_type}) failed in onnxruntime: {error}"
            ) from error
        return self._as_tensors(outputs)

    def _as_tensors(self, outputs: Sequence[np.ndarray]) -> tuple[Tensor, ...]:
        remaining = iter(outputs)
        tensors = []
        for name in self._proto.output:
            if not name:
                tensors.append(torch.empty(0))
                continue
            array = next(remaining)
            try:
                tensors.append(torch.from_numpy(np.array(array)))
            except TypeError as error:
                kind = (
                    type(array).__name__
                    if not isinstance(array, np.ndarray)
                    else f"an array of {array.dtype}"
                )
                raise ModelError(
                    f"node {self._proto.name!r} ({self._proto.op_type}) returns {kind}, which the twin cannot hold"
                ) from error
        return tuple(tensors)

    def _build(self, feeds: Mapping[str, np.ndarray]) -> ort.InferenceSession:
        inputs = [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), None)
            for name, array in feeds.items()
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in self._proto.output if name]
        initializers = [onnx.numpy_helper.from_array(array, name) for name, array in self._fixed.items()]
        graph = onnx.helper.make_graph([self._proto], "opaque", inputs, outputs, initializers)
        model = onnx.helper.make_model(graph, opset_imports=self._opsets, ir_version=_IR_VERSION)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        try:
            return ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises many unrelated types from its bindings
            raise ModelError(
                f"node {self._proto.name!r} ({self._proto.op_type}, domain {self._proto.domain!r}) "
                f"runs neither in torch nor in onnxruntime: {error}"
            ) from error
