"""What both conversions need of a model as protobuf: types of its tensors, and its own header again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnx.version_converter
from onnx import ModelProto, TensorProto, ValueInfoProto

from hap_onnx.errors import ModelError
from hap_onnx.model.protos import DEFAULT_DOMAINS, copy_without, opset_of, sort_nodes, walk_tensors
from hap_onnx.ops.quantized import is_quantized
from hap_onnx.runtime.session import load

_SMALL = 256  # elements of what shape inference may have to read
_LEAST_IR = 4  # before it, an initializer had to be listed as an input

_ELEMENTS = {
    f"tensor({name})": getattr(TensorProto, name.upper())
    for name in ("float", "float16", "double", "bool", "int8", "uint8", "int32", "int64")
}

HALF_TYPES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def with_types(model: ModelProto) -> ModelProto:
    """Copy a model and note the type of each of its tensors.

    Weights of any size are not looked at. Of operators that onnx does not know, onnxruntime is asked.
    """
    light: ModelProto = copy_without(model, omit=["graph"])
    light.graph.CopyFrom(copy_without(model.graph, omit=["initializer", "value_info"]))
    listed = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if int(np.prod(tensor.dims)) <= _SMALL:
            light.graph.initializer.append(tensor)
        elif tensor.name not in listed:
            described = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            light.graph.input.append(described)
    try:
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=True).graph.value_info
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"the types of the compressed model's tensors cannot be inferred: {error}"
        ) from error
    typed = ModelProto()
    typed.CopyFrom(model)
    typed.graph.ClearField("value_info")
    typed.graph.value_info.extend(inferred)
    known = {value.name for value in (*inferred, *model.graph.output) if value.type.WhichOneof("value")}
    unknown = [name for node in model.graph.node for name in node.output if name and name not in known]
    if unknown:
        typed.graph.value_info.extend(_ask_onnxruntime(model, unknown))
    return typed


def _ask_onnxruntime(model: ModelProto, names: Sequence[str]) -> list[ValueInfoProto]:
    """Return the types of tensors as onnxruntime finds them when it loads a model."""
    asking = ModelProto()
    asking.CopyFrom(model)
    asking.graph.output.extend(ValueInfoProto(name=name) for name in names)
    session = load(asking, ["CPUExecutionProvider"], threads=1, severity=4, label="the compressed model")
    found = []
    for value in session.get_outputs()[len(model.graph.output) :]:
        element = _ELEMENTS.get(value.type)
        if element is not None:
            found.append(onnx.helper.make_tensor_value_info(value.name, element, value.shape))
    return found


def with_header_of(original: ModelProto, converted: ModelProto) -> ModelProto:
    """Put the graph of a converted model into the original's header: versions, metadata, inputs, outputs.

    Raises:
        ModelError: the conversion used a name twice.
    """
    model: ModelProto = copy_without(original, omit=["graph", "opset_import"])
    model.graph.CopyFrom(copy_without(original.graph, omit=["node", "initializer", "value_info", "input"]))
    known = {entry.domain for entry in original.opset_import}
    domains = {node.domain for node in converted.graph.node}
    model.opset_import.extend(original.opset_import)
    model.opset_import.extend(
        entry for entry in converted.opset_import if entry.domain in domains and entry.domain not in known
    )
    model.graph.node.extend(sort_nodes(converted.graph.node))
    model.graph.initializer.extend(converted.graph.initializer)
    left = {tensor.name for tensor in converted.graph.initializer}
    listed = {tensor.name for tensor in original.graph.initializer}
    # Old files list weights as inputs: those that have become others are gone.
    model.graph.input.extend(
        value for value in original.graph.input if value.name not in listed or value.name in left
    )
    _check_names(model)
    return model


def _check_names(model: ModelProto) -> None:
    graph = model.graph
    tensors = [tensor.name for tensor in graph.initializer]
    tensors += [value.name for value in graph.input if value.name not in set(tensors)]
    tensors += [name for node in graph.node for name in node.output if name]
    seen: set[str] = set()
    for name in tensors:
        if name in seen:
            raise ModelError(
                f"a tensor that quantization adds would have the name {name!r}, which the model uses; "
                "rename the model's"
            )
        seen.add(name)


def with_opset(model: ModelProto, least: int) -> tuple[ModelProto, str]:
    """Raise a model's opset to ``least`` where it is older; returns it with what is to be told, or "".

    Raises:
        ModelError: the model uses what cannot be converted.
    """
    opset = opset_of(model) or 1
    if opset >= least and model.ir_version >= _LEAST_IR:
        return model, ""
    changes = []
    raised = ModelProto()
    raised.CopyFrom(model)
    if raised.ir_version < _LEAST_IR:
        changes.append(f"IR version {raised.ir_version} to {_LEAST_IR}")
        raised.ir_version = _LEAST_IR
    if opset < least:
        changes.append(f"opset {opset} to {least}")
        raised = _convert(raised, least)
    return raised, f"the final file is raised from {' and from '.join(changes)}, which int8 needs"


def _convert(model: ModelProto, opset: int) -> ModelProto:
    try:
        converted = onnx.version_converter.convert_version(model, opset)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"--then int8 needs opset {opset}, and the model cannot be converted from opset "
            f"{opset_of(model)} ({' '.join(str(error).split())[:200]}); export it with a newer opset"
        ) from error
    raised = ModelProto()
    raised.CopyFrom(model)
    for entry in raised.opset_import:
        if entry.domain in DEFAULT_DOMAINS:
            entry.version = opset
    return with_header_of(raised, converted)


def find_quantized(model: ModelProto) -> str | None:
    """Return the name of a node that makes, reads or computes with quantized numbers, or None."""
    for node in model.graph.node:
        if is_quantized(node.op_type, node.domain):
            return node.name or node.op_type
    return None


def float_weight_types(model: ModelProto) -> Iterator[int]:
    """Yield the element type of each tensor in a model that holds real numbers."""
    for _, tensor in walk_tensors(model):
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.DOUBLE, *HALF_TYPES):
            yield tensor.data_type
