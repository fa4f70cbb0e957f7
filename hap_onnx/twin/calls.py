"""Nodes as callables on torch tensors: by the function of their operator, or by the body of its schema.

Many operators are defined in terms of simpler ones: their schema has a *function body*. Where hap-onnx has no
function of its own for an operator but for all that its body uses, the body is run in its place, and so
gradients pass. The same holds for the graphs inside control flow. ``twin.opaque`` has the nodes for which
all this fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from logging import getLogger
from typing import Any, Protocol

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from hap_onnx.errors import ModelError
from hap_onnx.model.protos import DEFAULT_DOMAINS, export_node
from hap_onnx.ops.arguments import UnitShapes
from hap_onnx.ops.registry import find_run
from hap_onnx.twin.opaque import IR_VERSION, captured_names

logger = getLogger(__name__)


def is_float_array(values: np.ndarray) -> bool:
    """Say whether the twin computes with these numbers; eight bits and less are left to onnxruntime."""
    return values.dtype.name in ("float16", "bfloat16", "float32", "float64")


class Call(Protocol):
    """A node on tensors, None for an omitted input; what its graphs capture follows its own inputs."""

    def __call__(self, *inputs: Tensor | None, unit: UnitShapes | None = None) -> tuple[Tensor, ...]: ...


def find_call(
    node: gs.Node, *, outer: Collection[str], opsets: Sequence[onnx.OperatorSetIdProto]
) -> Call | None:
    """Return how torch computes a node, None if it does not; ``outer`` names the tensors around it.

    Raises ModelError for attributes that the node's function does not know.
    """
    function = find_run(node.op, opset=_opset(opsets), domain=node.domain or "")
    if function is None:
        return make_body(node, opsets=opsets)
    if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        return _make_control(node, function, outer=outer, opsets=opsets)
    return make_call(node, function)


def call_node(node: gs.Node, inputs: Sequence[Tensor | None], *, opset: int) -> tuple[Tensor, ...]:
    """Compute one node of a graph by the torch function of its operator, outside a twin.

    Raises NotImplementedError if the operator has none, or it does not know the variant.
    """
    function = find_run(node.op, opset=opset, domain=node.domain or "")
    if function is None:
        raise NotImplementedError(node.op)
    return make_call(node, function)(*inputs, unit=None)


# --- The torch function of an operator ---


@dataclass(frozen=True)
class TorchCall:
    """A torch function of the registry with the attributes of one node."""

    function: Callable[..., Any]
    attributes: Mapping[str, Any]
    takes_unit: bool

    def __call__(self, *inputs: Tensor | None, unit: UnitShapes | None = None) -> tuple[Tensor, ...]:
        if self.takes_unit:
            result = self.function(*inputs, **self.attributes, unit=unit)
        else:
            result = self.function(*inputs, **self.attributes)
        return (result,) if isinstance(result, Tensor) else tuple(result)


def make_call(node: gs.Node, function: Callable[..., Any]) -> TorchCall:
    """Return a node as a call of its function; raises ModelError for attributes that it does not know."""
    parameters = _parameters_of(function)
    unknown = [name for name in node.attrs if name not in parameters]
    if unknown:
        raise ModelError(
            f"node {node.name!r} ({node.op}) has attributes that hap-onnx does not know: {unknown}"
        )
    arguments = {name: _attribute(value) for name, value in node.attrs.items()}
    if "n_outputs" in parameters:
        used = [index for index, tensor in enumerate(node.outputs) if tensor.name]
        arguments["n_outputs"] = max(used, default=0) + 1
    if "readers" in parameters:
        readers = [reader for tensor in node.outputs for reader in tensor.outputs]
        arguments["readers"] = tuple((reader.op, reader.domain or "") for reader in readers)
    return TorchCall(function, arguments, "unit" in parameters)


@cache
def _parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function of the registry; a twin of many nodes asks again and again."""
    return inspect.signature(function).parameters


def _attribute(value: Any) -> Any:
    """Return a tensor attribute as a torch tensor, anything else as it is."""
    return _to_tensor(np.asarray(value.values)) if isinstance(value, gs.Constant) else value


# --- Graphs inside a node ---


@dataclass(frozen=True)
class TorchGraph:
    """A graph in torch: calls with the names that they read and write, in execution order."""

    calls: tuple[tuple[Call, tuple[str, ...], tuple[str, ...]], ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    constants: Mapping[str, Tensor]

    def run(
        self, inputs: Sequence[Tensor | None], outer: Mapping[str, Tensor | None], like: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Run on inputs and what is read from outside; floats get the type and place of ``like``."""
        values = dict(outer)
        values.update((name, _follow(constant, like)) for name, constant in self.constants.items())
        values.update(zip(self.input_names, inputs, strict=True))
        for call, reads, writes in self.calls:
            results = call(*(values[name] if name else None for name in reads))
            for name, result in zip(writes, results, strict=False):
                values[name] = _follow(result, like)
        outputs = [values[name] if name else None for name in self.output_names]
        return tuple(torch.empty(0) if output is None else output for output in outputs)


def _follow(result: Tensor, like: Tensor | None) -> Tensor:
    """Give floats the type and place of ``like``: a graph inside a node brings constants of its own."""
    if like is None or not result.is_floating_point() or torch.is_autocast_enabled(like.device.type):
        return result
    return result.to(like)


def _first_float(tensors: Iterable[Tensor | None]) -> Tensor | None:
    return next((tensor for tensor in tensors if tensor is not None and tensor.is_floating_point()), None)


def _make_graph(
    graph: gs.Graph,
    *,
    outer: Collection[str],
    captured: Collection[str],
    opsets: Sequence[onnx.OperatorSetIdProto],
) -> TorchGraph | None:
    """Return a graph in torch, None if torch lacks a part; what it captures keeps its name."""
    read = [tensor for node in graph.nodes for tensor in node.inputs] + list(graph.outputs)
    visible = {*outer, *(t.name for t in read), *(t.name for node in graph.nodes for t in node.outputs)}
    visible.update(tensor.name for tensor in graph.inputs)
    calls = []
    for node in graph.nodes:
        try:
            call = find_call(node, outer=visible, opsets=opsets)
        except ModelError as error:
            logger.info("%s", error)
            return None
        if call is None:
            return None
        reads = (*(tensor.name for tensor in node.inputs), *captured_names(node, visible))
        calls.append((call, reads, tuple(tensor.name for tensor in node.outputs)))
    constants = {}
    for tensor in read:
        if isinstance(tensor, gs.Constant) and tensor.name not in captured and tensor.name not in constants:
            values = _to_tensor(np.asarray(tensor.values))
            if values is None:
                return None
            constants[tensor.name] = values
    return TorchGraph(
        calls=tuple(calls),
        input_names=tuple(tensor.name for tensor in graph.inputs),
        output_names=tuple(tensor.name for tensor in graph.outputs),
        constants=constants,
    )


def _to_tensor(array: np.ndarray) -> Tensor | None:
    """Return an array as a tensor, floats in float32; None for types that torch lacks."""
    try:
        return torch.from_numpy(np.array(array, dtype=np.float32 if is_float_array(array) else array.dtype))
    except TypeError:
        return None


# --- Control flow ---


@dataclass(frozen=True)
class _BoundGraph:
    """A graph as a function of its inputs."""

    graph: TorchGraph
    outer: Mapping[str, Tensor | None]
    like: Tensor | None

    @property
    def n_outputs(self) -> int:
        return len(self.graph.output_names)

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        return self.graph.run(inputs, self.outer, self.like)


@dataclass(frozen=True)
class ControlCall:
    """A torch function of the registry with the attributes and the graphs of one node."""

    function: Callable[..., tuple[Tensor, ...]]
    attributes: Mapping[str, Any]
    graphs: Mapping[str, TorchGraph]
    captured: tuple[str, ...]

    def __call__(self, *inputs: Tensor | None, unit: UnitShapes | None = None) -> tuple[Tensor, ...]:
        n_own = len(inputs) - len(self.captured)
        outer = dict(zip(self.captured, inputs[n_own:], strict=True))
        like = _first_float(inputs)
        graphs = {name: _BoundGraph(graph, outer, like) for name, graph in self.graphs.items()}
        return self.function(*inputs[:n_own], **self.attributes, **graphs)


def _make_control(
    node: gs.Node,
    function: Callable[..., Any],
    *,
    outer: Collection[str],
    opsets: Sequence[onnx.OperatorSetIdProto],
) -> ControlCall | None:
    captured = tuple(captured_names(node, outer))
    graphs = {}
    for name, value in node.attrs.items():
        if isinstance(value, gs.Graph):
            graph = _make_graph(value, outer=outer, captured=captured, opsets=opsets)
            if graph is None:
                return None
            graphs[name] = graph
    plain = {name: value for name, value in node.attrs.items() if name not in graphs}
    return ControlCall(function, plain, graphs, captured)


# --- The function body of an operator ---


@dataclass(frozen=True)
class BodyCall:
    """The function body of one node's operator."""

    graph: TorchGraph

    def __call__(self, *inputs: Tensor | None, unit: UnitShapes | None = None) -> tuple[Tensor, ...]:
        return self.graph.run(inputs, {}, _first_float(inputs))


def make_body(node: gs.Node, *, opsets: Sequence[onnx.OperatorSetIdProto]) -> BodyCall | None:
    """Return the function body of a node in torch; None where there is none, or no gradient to gain by it.

    What the body of an operator is may depend on the types of the inputs; a type that inference did not
    find is taken for float32.
    """
    domain = node.domain or ""
    if not _has_body(node.op, _version(opsets, domain), domain):
        return None
    if not any(_element_type(tensor) == onnx.TensorProto.FLOAT for tensor in node.outputs):
        return None
    graph = _inline(node, opsets)
    if graph is None:
        return None
    body = _make_graph(graph, outer=(), captured=(), opsets=opsets)
    if body is None:
        return None
    inputs, outputs = _interface(node)
    return BodyCall(replace(body, input_names=inputs, output_names=outputs))


def _has_body(op_type: str, opset: int, domain: str) -> bool:
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return False
    return bool(
        schema.has_function or schema.has_context_dependent_function  # type: ignore[attr-defined]
    )


def _element_type(tensor: gs.Tensor) -> int:
    """Return the element type that the twin computes with, in the numbers of ONNX."""
    if tensor.dtype is None:
        return int(onnx.TensorProto.FLOAT)
    dtype = np.dtype(tensor.dtype)
    if dtype.name in ("float16", "bfloat16", "float64"):
        return int(onnx.TensorProto.FLOAT)
    return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))


def _interface(node: gs.Node) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return names for the inputs and outputs of a body; inputs that are one tensor get two names."""
    inputs = tuple(f"input{i}" if tensor.name else "" for i, tensor in enumerate(node.inputs))
    outputs = tuple(f"output{i}" if tensor.name else "" for i, tensor in enumerate(node.outputs))
    return inputs, outputs


def _inline(node: gs.Node, opsets: Sequence[onnx.OperatorSetIdProto]) -> gs.Graph | None:
    """Return a graph that computes one node by the bodies of all operators without a torch function."""
    if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        return None
    inputs, outputs = _interface(node)
    proto = export_node(node, original=None, opset=_opset(opsets))
    del proto.input[:], proto.output[:]
    proto.input.extend(inputs)
    proto.output.extend(outputs)
    infos = [
        onnx.helper.make_tensor_value_info(name, _element_type(tensor), None)
        for name, tensor in zip(inputs, node.inputs, strict=True)
        if name
    ]
    results = [onnx.ValueInfoProto(name=name) for name in outputs if name]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([proto], "body", infos, results), opset_imports=opsets, ir_version=IR_VERSION
    )
    tried: set[tuple[str, str]] = set()
    while missing := _without_function(model):
        if missing <= tried:
            return None
        tried |= missing
        for inner in model.graph.node:
            if (inner.domain, inner.op_type) in missing:
                _write_defaults(inner, _version(model.opset_import, inner.domain))
        try:
            model = onnx.inliner.inline_selected_functions(
                model, sorted(missing), inline_schema_functions=True
            )
        except RuntimeError as error:
            logger.info("node %r (%s) has no usable function body: %s", node.name, node.op, error)
            return None
    return gs.import_onnx(model)


def _without_function(model: onnx.ModelProto) -> set[tuple[str, str]]:
    opset = _opset(model.opset_import)
    return {
        (inner.domain, inner.op_type)
        for inner in model.graph.node
        if find_run(inner.op_type, opset=opset, domain=inner.domain) is None
    }


def _write_defaults(proto: onnx.NodeProto, version: int) -> None:
    """Write the defaults of absent attributes into a node: bodies take attributes by name, as they are."""
    present = {attribute.name for attribute in proto.attribute}
    try:
        schema = onnx.defs.get_schema(proto.op_type, version, proto.domain)
    except onnx.defs.SchemaError:
        return
    for name, attribute in schema.attributes.items():
        if name not in present and attribute.default_value.name:
            proto.attribute.append(attribute.default_value)


def _version(opsets: Iterable[onnx.OperatorSetIdProto], domain: str) -> int:
    return next((entry.version for entry in opsets if entry.domain == domain), 1)


def _opset(opsets: Iterable[onnx.OperatorSetIdProto]) -> int:
    return next((entry.version for entry in opsets if entry.domain in DEFAULT_DOMAINS), 1)
