"""Nodes as callables on torch tensors: by the function of their operator, or by the body of its schema.

Many operators are defined in terms of simpler ones: their schema has a *function body*. Where hap-onnx has no
function of its own for an operator but for all that its body uses, the body is run in its place, and so
gradients pass. ``hap_onnx.opaque`` has the nodes for which neither exists.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from hap_onnx.errors import ModelError
from hap_onnx.ops.arguments import UnitShapes
from hap_onnx.ops.registry import find_run
from hap_onnx.protos import DEFAULT_DOMAINS, export_node

logger = getLogger(__name__)

_IR_VERSION = 10


def is_float_array(values: np.ndarray) -> bool:
    """Say whether the twin computes with these numbers; eight bits and less are left to onnxruntime."""
    return values.dtype.name in ("float16", "bfloat16", "float32", "float64")


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
    parameters = inspect.signature(function).parameters
    unknown = [name for name in node.attrs if name not in parameters]
    if unknown:
        raise ModelError(
            f"node {node.name!r} ({node.op}) has attributes that hap-onnx does not know: {unknown}"
        )
    arguments = {name: _attribute(value) for name, value in node.attrs.items()}
    if "n_outputs" in parameters:
        used = [index for index, tensor in enumerate(node.outputs) if tensor.name]
        arguments["n_outputs"] = max(used, default=0) + 1
    return TorchCall(function, arguments, "unit" in parameters)


def _attribute(value: Any) -> Any:
    """Return a tensor attribute as a torch tensor, anything else as it is."""
    if not isinstance(value, gs.Constant):
        return value
    array = np.asarray(value.values)
    return torch.from_numpy(np.array(array, dtype=np.float32 if is_float_array(array) else array.dtype))


# --- The function body of an operator ---


@dataclass(frozen=True)
class BodyCall:
    """The function body of one node's operator: torch calls with the names that they read and write."""

    calls: tuple[tuple[TorchCall, tuple[str, ...], tuple[str, ...]], ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def __call__(self, *inputs: Tensor | None, unit: UnitShapes | None = None) -> tuple[Tensor, ...]:
        values = dict(zip(self.input_names, inputs, strict=True))
        like = next((x for x in inputs if x is not None and x.is_floating_point()), None)
        for call, reads, writes in self.calls:
            results = call(*(values[name] if name else None for name in reads))
            for name, result in zip(writes, results, strict=False):
                values[name] = _follow(result, like)
        outputs = [values[name] if name else None for name in self.output_names]
        return tuple(torch.empty(0) if output is None else output for output in outputs)


def _follow(result: Tensor, like: Tensor | None) -> Tensor:
    """Give floats the type and place of the node's own: a body brings constants of its own."""
    if like is None or not result.is_floating_point() or torch.is_autocast_enabled(like.device.type):
        return result
    return result.to(like)


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
    calls = []
    for inner in graph.nodes:
        function = find_run(inner.op, opset=graph.opset, domain=inner.domain or "")
        if function is None:
            return None
        reads = tuple(tensor.name for tensor in inner.inputs)
        calls.append((make_call(inner, function), reads, tuple(tensor.name for tensor in inner.outputs)))
    return BodyCall(tuple(calls), *_interface(node))


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
        onnx.helper.make_graph([proto], "body", infos, results), opset_imports=opsets, ir_version=_IR_VERSION
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
