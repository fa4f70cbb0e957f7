"""Models whose large weights are arrays beside the protobuf message.

Protobuf copies what it is given and what it is asked for, and stops at 2 GB. A model that keeps its weights
in files beside it is therefore never put together: its message holds names, types and shapes, and each number
is in memory once, in an array that all stages only read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from hap_onnx.model.protos import PACKED_TYPES, copy_without, count_bytes, n_data_bytes, tensor_header

MIN_BYTES = 1024
"""Smaller tensors stay in the message: shape inference reads them."""
_IN_MEMORY = "in memory"  # where the message says that the numbers are


@dataclass(frozen=True)
class LargeModel:
    """A model in two parts.

    Attributes:
        proto: all but the numbers of the initializers that ``weights`` has; those say that they are external.
        weights: these numbers by initializer, read-only and contiguous.
    """

    proto: ModelProto
    weights: Mapping[str, np.ndarray]


AnyModel = ModelProto | LargeModel


def weights_of(model: AnyModel) -> Mapping[str, np.ndarray]:
    """Return the arrays beside the message; none for a model in one piece."""
    return model.weights if isinstance(model, LargeModel) else {}


def proto_of(model: AnyModel) -> ModelProto:
    """Return the message of a model; numbers of a large one may be missing."""
    return model.proto if isinstance(model, LargeModel) else model


def is_large(tensor: TensorProto, n_bytes: int) -> bool:
    """Tell whether the numbers of an initializer are to be an array beside the message."""
    has_bytes = tensor.data_type != TensorProto.STRING and tensor.data_type not in PACKED_TYPES
    return has_bytes and n_bytes >= MIN_BYTES


def outside_header(tensor: TensorProto) -> TensorProto:
    """Return a tensor without its numbers, which are somewhere else."""
    header = tensor_header(tensor)
    header.data_location = TensorProto.EXTERNAL
    header.external_data.add(key="location", value=_IN_MEMORY)
    return header


def to_read_only(array: np.ndarray) -> np.ndarray:
    """Return a contiguous view that nobody can write through."""
    view = np.ascontiguousarray(array).reshape(array.shape).view()
    view.flags.writeable = False
    return view


def bytes_of(array: np.ndarray) -> memoryview:
    """Return the bytes of a contiguous array without copying them."""
    return array.reshape(-1).view(np.uint8).data


def split_model(proto: ModelProto) -> LargeModel:
    """Copy a model with its large initializers as arrays; the message is only read."""
    slim = copy_without(proto, omit=["graph"])
    slim.graph.CopyFrom(copy_without(proto.graph, omit=["initializer"]))
    weights: dict[str, np.ndarray] = {}
    for tensor in proto.graph.initializer:
        if tensor.data_type != TensorProto.STRING and is_large(tensor, n_data_bytes(tensor)):
            weights[tensor.name] = to_read_only(np.asarray(onnx.numpy_helper.to_array(tensor)))
            slim.graph.initializer.append(outside_header(tensor))
        else:
            slim.graph.initializer.append(tensor)
    return LargeModel(slim, weights)


def join_model(model: AnyModel) -> ModelProto:
    """Return a model in one piece, a copy where it is in two; for small ones."""
    if not isinstance(model, LargeModel):
        return model
    whole = ModelProto()
    whole.CopyFrom(model.proto)
    for tensor in whole.graph.initializer:
        if tensor.name in model.weights:
            put_inside(tensor, model.weights[tensor.name])
    return whole


def put_inside(tensor: TensorProto, array: np.ndarray) -> None:
    """Give a header its numbers."""
    tensor.raw_data = array.tobytes()
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def with_placeholders(model: LargeModel) -> ModelProto:
    """Return the message with graph inputs in the place of large initializers: without their numbers."""
    slim = copy_without(model.proto, omit=["graph"])
    slim.graph.CopyFrom(copy_without(model.proto.graph, omit=["initializer"]))
    inputs = {value.name for value in slim.graph.input}
    for tensor in model.proto.graph.initializer:
        if tensor.name not in model.weights:
            slim.graph.initializer.append(tensor)
        elif tensor.name not in inputs:  # up to IR 3 it is one already
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            slim.graph.input.append(value)
    return slim


def count_model_bytes(model: AnyModel) -> int:
    """Return about how large a model is in one piece."""
    return count_bytes(proto_of(model)) + sum(array.nbytes for array in weights_of(model).values())


