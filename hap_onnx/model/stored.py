"""Weights that a file stores in 8 bits, behind a DequantizeLinear of their own.

    w [int8] --DequantizeLinear(scale, zero_point)--> Conv          in the file
    w [float32] -------------------------------------> Conv          in the graph that the stages work on

All stages see such a weight as the real numbers that it stands for. When the graph is written, it is stored
as it was: numbers that lie on a grid of the original scales, as those that were only sliced do, come out bit
by bit; others (refitted, trained) get a scale of their own, within the same range of integers. Biases, which
onnxruntime takes as multiples of input scale times weight scale whatever their own scale says, follow these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from hap_onnx.errors import SurgeryError
from hap_onnx.model.protos import reads
from hap_onnx.ops.quantized import is_dequantizer, is_quantizer

Numbers = NDArray[Any]

_TYPES = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32)
_PROBE = 16  # numbers of a row that are tried on all scales at once, before the whole row on few


@dataclass(frozen=True)
class StoredWeight:
    """A weight, named as the output of its DequantizeLinear ``node``.

    ``quantized``, ``scale`` and ``zero`` are the node's inputs (``zero`` None if it has none); ``axis`` is
    that of the scales, None for one scale. ``shared`` says which of the inputs other nodes read, too.
    """

    name: str
    node: NodeProto
    quantized: Numbers
    scale: NDArray[np.float32]
    zero: Numbers | None
    axis: int | None
    shared: frozenset[str]

    def to_float(self) -> NDArray[np.float32]:
        """Return the real numbers that the weight stands for."""
        return _dequantize(self.quantized, *(self._along_axis(part) for part in (self.scale, self._zeros())))

    def _zeros(self) -> NDArray[np.int64]:
        zeros = np.zeros(self.scale.shape, np.int64)
        return zeros if self.zero is None else zeros + self.zero

    def _along_axis(self, values: Numbers) -> Numbers:
        if self.axis is None:
            return values.reshape(())
        return values.reshape([-1 if axis == self.axis else 1 for axis in range(self.quantized.ndim)])


def _dequantize(quantized: Numbers, scale: Numbers, zero: Numbers) -> NDArray[np.float32]:
    """(q - zero) * scale: the difference in integers, the product in float32, as onnxruntime has it."""
    difference = quantized.astype(np.int64) - zero
    product: NDArray[np.float32] = difference.astype(np.float32) * scale
    return product


def find_stored(
    nodes: Iterable[NodeProto],
    constants: Mapping[str, TensorProto],
    arrays: Mapping[str, Numbers],
    *,
    pinned: Collection[str],
) -> dict[str, StoredWeight]:
    """Find the weights that a graph keeps in 8 bits (biases in 32), by the names of their real numbers.

    A float weight behind a QuantizeLinear, as training for quantization leaves it, is one of them, and stored
    in 8 bits from then on. Left alone: what other nodes read as well, scales in blocks or of other types than
    float32, and ``pinned`` names (outputs of the model, tensors that subgraphs read).
    """
    nodes = list(nodes)
    constants = dict(constants)

    def read(tensor: TensorProto) -> Numbers:
        array = arrays.get(tensor.name)
        return np.asarray(onnx.numpy_helper.to_array(tensor)) if array is None else array

    readers: dict[str, int] = {}
    for node in nodes:
        for name in reads(node):
            readers[name] = readers.get(name, 0) + 1
    alone = {name for name, count in readers.items() if count == 1} - set(pinned)
    for node in nodes:
        if is_quantizer(node.op_type, node.domain) and {node.input[0], node.output[0]} <= alone:
            quantized = _evaluate(node, constants, read)
            if quantized is not None:
                constants[node.output[0]] = onnx.numpy_helper.from_array(quantized, node.output[0])
                for name in node.input:  # it will be gone
                    readers[name] -= 1
    found: dict[str, StoredWeight] = {}
    for node in nodes:
        if not is_dequantizer(node.op_type, node.domain) or not set(filter(None, node.input)) <= set(
            constants
        ):
            continue
        data, scale = constants[node.input[0]], constants[node.input[1]]
        zero = constants[node.input[2]] if len(node.input) > 2 and node.input[2] else None
        attributes = {entry.name: entry.i for entry in node.attribute}
        if (
            data.data_type not in _TYPES
            or scale.data_type != TensorProto.FLOAT
            or attributes.get("block_size", 0)
            or attributes.get("output_dtype", 0) not in (0, TensorProto.FLOAT)
            or readers[data.name] != 1
            or {node.output[0], data.name} & set(pinned)
            or not node.name
        ):
            continue
        scales = np.asarray(read(scale), np.float32)
        axis = attributes.get("axis", 1) % max(len(data.dims), 1) if scales.size > 1 else None
        is_blocked = scales.ndim > 1 or (axis is not None and scales.shape != (data.dims[axis],))
        if is_blocked or not (np.isfinite(scales).all() and (scales > 0).all()):
            continue
        found[node.output[0]] = StoredWeight(
            name=node.output[0],
            node=node,
            quantized=read(data),
            scale=scales,
            zero=None if zero is None else read(zero),
            axis=axis,
            shared=frozenset(name for name in node.input[1:] if name and readers[name] > 1),
        )
    return found


def _evaluate(
    node: NodeProto, constants: Mapping[str, TensorProto], read: Callable[[TensorProto], Numbers]
) -> Numbers | None:
    """Quantize a float32 constant as a QuantizeLinear does; None if the node does anything else."""
    if len(node.input) < 3 or not set(node.input) <= set(constants):
        return None
    values, scale, zero = (read(constants[name]) for name in node.input)
    attributes = {entry.name: entry.i for entry in node.attribute}
    if values.dtype != np.float32 or scale.dtype != np.float32 or attributes.get("block_size", 0):
        return None
    if scale.shape != zero.shape or zero.dtype not in (np.int8, np.uint8, np.int16, np.uint16):
        return None
    if scale.size > 1:
        axis = attributes.get("axis", 1) % max(values.ndim, 1)
        if scale.shape != values.shape[axis : axis + 1]:
            return None
        scale, zero = (
            part.reshape([-1 if index == axis else 1 for index in range(values.ndim)])
            for part in (scale, zero)
        )
    limits = np.iinfo(zero.dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.rint(values / scale) + zero
    if not np.isfinite(steps).all():
        return None
    quantized: Numbers = np.clip(steps, limits.min, limits.max).astype(zero.dtype)
    return quantized


# --- back into 8 bits ---


@dataclass(frozen=True)
class _Grid:
    """Integers with their scales and zero points, one per row (or one for all)."""

    quantized: Numbers
    scale: NDArray[np.float32]
    zero: NDArray[np.int64]


def store_weights(
    graph: gs.Graph, stored: Mapping[str, StoredWeight], *, taken: Collection[str]
) -> tuple[list[NodeProto], list[gs.Constant]]:
    """Return nodes and constants that give the graph's weights as they are stored.

    ``taken`` are names that new tensors must not have. Weights that the graph no longer reads are left out.

    Raises:
        SurgeryError: a weight has lost its number of axes.
    """
    weights = {
        tensor.name: tensor
        for node in graph.nodes
        for tensor in node.inputs
        if isinstance(tensor, gs.Constant) and tensor.name in stored
    }
    grids = {
        name: _to_grid(np.asarray(tensor.values), stored[name])
        for name, tensor in weights.items()
        if not _is_bias(stored[name])
    }
    for name, tensor in weights.items():
        if _is_bias(stored[name]):
            grids[name] = _bias_grid(tensor, stored[name], grids)
    nodes: list[NodeProto] = []
    tensors: dict[str, gs.Constant] = {}
    names = set(taken)
    for name in weights:
        node, added = _write(stored[name], grids[name], names)
        nodes.append(node)
        tensors.update({tensor.name: tensor for tensor in added})
    return nodes, list(tensors.values())


def _is_bias(one: StoredWeight) -> bool:
    return one.quantized.dtype == np.int32


def _to_grid(values: NDArray[np.float32], one: StoredWeight) -> _Grid:
    if values.ndim != one.quantized.ndim:
        raise SurgeryError(f"the weight '{one.name}' has other axes than the one that is stored")
    rows = (
        np.moveaxis(values, one.axis, 0).reshape(values.shape[one.axis], -1)
        if one.axis is not None
        else (values.reshape(1, -1))
    )
    scales, zeros = one.scale.reshape(-1), np.broadcast_to(one._zeros().reshape(-1), one.scale.size)
    limits = np.iinfo(one.quantized.dtype)
    used = int(np.abs(one.quantized.astype(np.int64) - one._along_axis(one._zeros())).max(initial=1))
    picked_scale = np.empty(len(rows), np.float32)
    picked_zero = np.empty(len(rows), np.int64)
    last = -1
    for index, row in enumerate(rows):
        match = _find_scale(row, scales, zeros, limits, start=last + 1)
        if match is not None:
            picked_scale[index], picked_zero[index] = scales[match], zeros[match]
            last = match
        else:
            picked_scale[index], picked_zero[index] = _new_scale(row, scales, zeros, limits, used)
    quantized = _quantize(rows, picked_scale[:, None], picked_zero[:, None], limits).astype(
        one.quantized.dtype
    )
    if one.axis is not None:
        moved = [values.shape[one.axis], *np.delete(values.shape, one.axis)]
        quantized = np.moveaxis(quantized.reshape(moved), 0, one.axis)
    return _Grid(np.ascontiguousarray(quantized).reshape(values.shape), picked_scale, picked_zero)


def _quantize(values: Numbers, scale: Numbers, zero: Numbers, limits: np.iinfo[Any]) -> NDArray[np.int64]:
    steps = np.rint(values.astype(np.float64) / scale.astype(np.float64)) + zero
    return np.clip(steps, limits.min, limits.max).astype(np.int64)


def _find_scale(
    row: Numbers, scales: NDArray[np.float32], zeros: NDArray[np.int64], limits: np.iinfo[Any], *, start: int
) -> int | None:
    """Return the first scale, from ``start`` on and around, on whose grid a row lies exactly; or None."""
    if len(scales) > start and _lies_on(row, scales[start], zeros[start], limits):
        return start
    probe = row[:_PROBE][None, :]
    steps = _quantize(probe, scales[:, None], zeros[:, None], limits)
    fits = (_dequantize(steps, scales[:, None], zeros[:, None]) == probe).all(axis=1)
    candidates = np.flatnonzero(fits)
    for index in sorted(candidates.tolist(), key=lambda index: (index < start, index)):
        if _lies_on(row, scales[index], zeros[index], limits):
            return int(index)
    return None


def _lies_on(row: Numbers, scale: np.float32, zero: np.int64, limits: np.iinfo[Any]) -> bool:
    steps = _quantize(row, np.asarray(scale), np.asarray(zero), limits)
    return bool((_dequantize(steps, np.asarray(scale), np.asarray(zero)) == row).all())


def _new_scale(
    row: Numbers, scales: NDArray[np.float32], zeros: NDArray[np.int64], limits: np.iinfo[Any], used: int
) -> tuple[np.float32, int]:
    """A scale and a zero point for numbers that lie on no grid: with as many steps as the original used.

    Around the zero point that all rows have, if they have one, else wherever the row needs it. No scale is
    below all of the original's: a bias that is a multiple of it must fit into its integers.
    """
    zero, least = int(zeros[0]), float(scales.min())
    if (zeros == zero).all() and limits.min < zero < limits.max:
        room = min(used, limits.max - zero, zero - limits.min)
        largest = float(np.abs(row).max(initial=0.0))
        return np.float32(max(largest / room, least)), zero
    low, high = min(float(row.min(initial=0.0)), 0.0), max(float(row.max(initial=0.0)), 0.0)
    scale = np.float32(max((high - low) / (limits.max - limits.min), least))
    return scale, int(np.clip(np.rint(limits.min - low / scale), limits.min, limits.max))


def _bias_grid(bias: gs.Constant, one: StoredWeight, grids: Mapping[str, _Grid]) -> _Grid:
    """Quantize a bias to input scale times weight scale, where both are known; else like a weight."""
    values = np.asarray(bias.values)
    partner = _scale_of_product(bias, grids)
    if partner is None or partner.size not in (1, values.shape[-1] if values.ndim else 1):
        return _to_grid(values, one)
    limits = np.iinfo(np.int32)
    if one.axis is not None:
        partner = np.broadcast_to(partner, values.shape[-1:])
    scale = partner if partner.size > 1 else partner.reshape(())
    if (np.abs(values) > np.float64(limits.max) * scale).any():
        raise SurgeryError(f"the bias '{one.name}' does not fit into its integers at the scale of its layer")
    quantized = _quantize(values, scale, np.asarray(0), limits).astype(np.int32)
    return _Grid(quantized, np.ascontiguousarray(partner), np.zeros(partner.shape, np.int64))


def _scale_of_product(bias: gs.Constant, grids: Mapping[str, _Grid]) -> NDArray[np.float32] | None:
    if len(bias.outputs) != 1:
        return None
    reader = bias.outputs[0]
    source = reader.inputs[0].inputs[0] if reader.inputs[0].inputs else None
    weight = next((grids[tensor.name] for tensor in reader.inputs if tensor.name in grids), None)
    if source is None or weight is None or not is_dequantizer(source.op, source.domain or ""):
        return None
    scale = source.inputs[1]
    if not isinstance(scale, gs.Constant) or scale.values.size != 1:
        return None
    product: NDArray[np.float32] = np.float32(scale.values.ravel()[0]) * weight.scale
    return product


def _write(one: StoredWeight, grid: _Grid, names: set[str]) -> tuple[NodeProto, list[gs.Constant]]:
    """Write a weight with its node; scales and zero points that others read, and that differ, get names."""
    node = NodeProto()
    node.CopyFrom(one.node)
    per_row = one.axis is not None or len(grid.scale) > 1
    scale = grid.scale if per_row else grid.scale.reshape(one.scale.shape)
    parts: list[tuple[int, Numbers, Numbers | None]] = [(0, grid.quantized, None), (1, scale, one.scale)]
    if one.zero is not None:
        zero = grid.zero.astype(one.zero.dtype)
        parts.append((2, zero.reshape(scale.shape), one.zero))
    elif grid.zero.any():
        raise SurgeryError(f"the weight '{one.name}' needs a zero point, and is stored without")
    if per_row and one.axis is None:  # a bias that had one scale has one per channel now
        for entry in [entry for entry in node.attribute if entry.name == "axis"]:
            node.attribute.remove(entry)
        node.attribute.append(onnx.helper.make_attribute("axis", grid.quantized.ndim - 1))
    tensors = []
    for index, values, before in parts:
        name = node.input[index]
        is_same = before is not None and before.shape == values.shape and np.array_equal(before, values)
        if name in one.shared and not is_same:
            name = base = f"{name}_{one.name}"
            n = 1
            while name in names:
                n += 1
                name = f"{base}_{n}"
            names.add(name)
            node.input[index] = name
        tensors.append(gs.Constant(name, np.array(values, order="C")))
    return node, tensors
