"""Evaluate beforehand what does not depend on the data: shapes, indices and the layout of weights.

Folding here is careful. Only whitelisted operators on integers, booleans and single numbers are evaluated,
and only when shape inference bounds the result first (a file of a few bytes can ask for gigabytes). Weights
are brought into the layout that their one reader wants, never copied apart. The first axis of each graph
input counts as unknown even where the file declares a number: folding must not freeze the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, NodeProto

from hap_onnx.model.bounds import infer_shapes
from hap_onnx.model.protos import DEFAULT_DOMAINS, captured, export_constant, export_node, opset_of, subgraphs

MAX_ELEMENTS = 10_000
_MAX_ROUNDS = 10
_FLOATS = tuple(np.dtype(t) for t in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16))
_INDEX_TYPES = tuple(np.dtype(t) for t in (np.bool_, np.int32, np.int64))
# What onnxruntime can hand to numpy.
_RESULT_TYPES = (*_INDEX_TYPES, *_FLOATS[:3])
# Exact on small integers, cheap, and without state. Quantization is left alone on purpose.
# fmt: off
_SHAPE_OPS = frozenset([
    "Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Concat", "ConstantOfShape", "CumSum", "Div",
    "Equal", "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Greater",
    "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or",
    "Pad", "Pow", "Range", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Round",
    "ScatterElements", "ScatterND", "Sign", "Size", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Sum",
    "Tile", "Transpose", "Trilu", "Unsqueeze", "Where", "Xor",
])
# fmt: on
_LAYOUT_OPS = frozenset(["Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten"])

_log = logging.getLogger(__name__)

Dims = Mapping[str, tuple[int | None, ...]]


@dataclass(frozen=True)
class Context:
    """What folding needs to know of the input model."""

    header: ModelProto  # graph inputs and outputs, operator sets, IR version; no nodes
    originals: Mapping[str, NodeProto]
    pinned: frozenset[str]  # graph outputs and tensors that subgraphs read: they keep name and meaning

    @property
    def opset(self) -> int:
        return opset_of(self.header) or 1


def make_context(prepared: ModelProto, *, pinned: frozenset[str] = frozenset()) -> Context:
    """Collect what folding needs from the model that the graph was imported from."""
    nodes = prepared.graph.node
    pinned = pinned | {value.name for value in prepared.graph.output}
    for node in nodes:
        for subgraph in subgraphs(node):
            pinned |= captured(subgraph)
    header = ModelProto(ir_version=max(prepared.ir_version, 4), opset_import=prepared.opset_import)
    imported = {entry.domain for entry in header.opset_import}
    for domain in sorted({node.domain for node in nodes} - imported - set(DEFAULT_DOMAINS)):
        header.opset_import.add(
            domain=domain, version=1
        )  # onnxruntime does not ask for it, shape inference does
    header.graph.name = prepared.graph.name
    header.graph.input.extend(prepared.graph.input)
    header.graph.output.extend(prepared.graph.output)
    return Context(header, {node.name: node for node in nodes}, pinned)


def fold(graph: gs.Graph, prepared: ModelProto, *, pinned: frozenset[str] = frozenset()) -> None:
    """Fold ``graph``, imported from ``prepared``, in place; see the module's text for what and how far.

    ``pinned`` are weights that must not be brought into another layout.
    """
    context = make_context(prepared, pinned=pinned)
    derived: set[str] = set()  # floating-point constants that were computed from integers
    stuck: set[str] = set()  # nodes that could not be evaluated
    _remove_identities(graph, context)
    for _ in range(_MAX_ROUNDS):
        before = len(graph.nodes)
        dims, types = infer(graph, context)
        _fold_shapes(graph, context, dims)
        while wave := [node for node in graph.nodes if _is_ready(node, context, derived, stuck)]:
            _fold_wave(graph, wave, context, derived, stuck)
        _fold_layouts(graph, context, dims, types)
        remove_dead_nodes(graph, context.pinned)
        _remove_identities(graph, context)
        if len(graph.nodes) == before:
            break


def infer(graph: gs.Graph, context: Context) -> tuple[Dims, Mapping[str, np.dtype]]:
    """Infer dimensions (None where unknown or symbolic) and element types of the tensors of a graph."""
    model = ModelProto()
    model.CopyFrom(context.header)
    for value in model.graph.input:
        shape = value.type.tensor_type.shape
        if shape.dim and shape.dim[0].HasField("dim_value"):
            shape.dim[0].dim_param = f"batch of {value.name}"
    for value in model.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    constants: dict[str, gs.Constant] = {}
    for node in graph.nodes:
        model.graph.node.append(
            export_node(node, original=context.originals.get(node.name), opset=context.opset)
        )
        for tensor in [*node.inputs, *_inner_constants(node)]:
            if isinstance(tensor, gs.Constant):
                constants.setdefault(tensor.name, tensor)
    dims: dict[str, tuple[int | None, ...]] = {}
    types: dict[str, np.dtype] = {}
    for name, tensor in constants.items():
        dims[name], types[name] = tuple(tensor.shape), tensor.dtype
        if tensor.dtype in _INDEX_TYPES and tensor.values.size <= MAX_ELEMENTS:
            model.graph.initializer.append(export_constant(tensor))
        else:
            code = onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype)
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, code, list(tensor.shape)))
    for value in _infer_proto(model):
        kind = value.type.tensor_type
        if kind.elem_type:
            types[value.name] = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if kind.HasField("shape"):
            dims[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
    return dims, types


def _infer_proto(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """Infer shapes; operators without rules leave them unknown, and then less is folded."""
    try:
        graph = infer_shapes(model).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        _log.info("shapes cannot be inferred, so less is folded: %s", error)
        graph = model.graph
    return [*graph.input, *graph.output, *graph.value_info]


def _inner_constants(node: gs.Node) -> list[gs.Constant]:
    """Return constants that the subgraphs of a node read, whether they come from outside or not."""
    found: list[gs.Constant] = []
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                found.extend(
                    t
                    for t in inner.inputs
                    if isinstance(t, gs.Constant) and isinstance(t._values, np.ndarray)
                )
                found.extend(_inner_constants(inner))
    return found


def _is_plain(node: gs.Node, names: frozenset[str]) -> bool:
    known = node.op in names and (node.domain or "") in DEFAULT_DOMAINS
    return known and bool(node.inputs) and bool(node.outputs)


def _is_ready(node: gs.Node, context: Context, derived: set[str], stuck: set[str]) -> bool:
    """Tell whether a node computes with shapes, indices and single numbers that are all known."""
    if not _is_plain(node, _SHAPE_OPS) or node.name in stuck:
        return False
    if any(tensor.name in context.pinned for tensor in node.outputs):
        return False
    inputs = [tensor for tensor in node.inputs if tensor.name]
    return bool(inputs) and all(isinstance(t, gs.Constant) and _is_shape_like(t, derived) for t in inputs)


def _is_shape_like(tensor: gs.Constant, derived: set[str]) -> bool:
    if tensor.values.size > MAX_ELEMENTS:
        return False
    return tensor.dtype in _INDEX_TYPES or (
        tensor.dtype in _RESULT_TYPES and (tensor.name in derived or tensor.values.size == 1)
    )


def _fold_wave(
    graph: gs.Graph, wave: Sequence[gs.Node], context: Context, derived: set[str], stuck: set[str]
) -> None:
    """Evaluate nodes whose inputs are all constants and put constants in their place."""
    bounded = [node for node in wave if _is_bounded(node, _wave_model([node], context))]
    stuck.update(node.name for node in wave)  # those that succeed are removed, so their names do not matter
    results = _evaluate(bounded, context)
    done: set[int] = set()
    for node in bounded:
        outputs = [tensor for tensor in node.outputs if tensor.name]
        if all(tensor.name in results for tensor in outputs):
            for tensor in outputs:
                _make_constant(tensor, results[tensor.name])
                if tensor.dtype in _FLOATS:
                    derived.add(tensor.name)
            done.add(id(node))
    _remove_nodes(graph, done)


def _wave_model(nodes: Sequence[gs.Node], context: Context) -> ModelProto:
    graph = GraphProto(name="constants")
    for node in nodes:
        graph.node.append(export_node(node, original=context.originals.get(node.name), opset=context.opset))
        graph.output.extend(onnx.ValueInfoProto(name=tensor.name) for tensor in node.outputs if tensor.name)
    inputs = {tensor.name: tensor for node in nodes for tensor in node.inputs if tensor.name}
    graph.initializer.extend(export_constant(tensor) for tensor in inputs.values())
    return ModelProto(
        ir_version=context.header.ir_version, opset_import=context.header.opset_import, graph=graph
    )


def _is_bounded(node: gs.Node, model: ModelProto) -> bool:
    """Tell whether all outputs are known to be small before anything is computed."""
    known = {value.name: value.type.tensor_type for value in _infer_proto(model)}
    for tensor in node.outputs:
        kind = known.get(tensor.name)
        if not tensor.name:
            continue
        if (
            kind is None
            or not kind.HasField("shape")
            or not all(d.HasField("dim_value") for d in kind.shape.dim)
        ):
            return False
        size = 1
        for dim in kind.shape.dim:
            size *= dim.dim_value
        if size > MAX_ELEMENTS or onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type) not in _RESULT_TYPES:
            return False
    return True


def _evaluate(nodes: Sequence[gs.Node], context: Context) -> dict[str, np.ndarray]:
    """Run nodes on their constants in onnxruntime: together, or one by one if some of them cannot run."""
    if not nodes:
        return {}
    # onnxruntime gives an exported operator its meaning; numpy differs, for example in integer division.
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = _wave_model(nodes, context)
    names = [value.name for value in model.graph.output]
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return dict(zip(names, session.run(names, {}), strict=True))
    except (
        ort_errors.Fail,
        ort_errors.InvalidArgument,
        ort_errors.InvalidGraph,
        ort_errors.NotImplemented,
        ort_errors.RuntimeException,
    ) as error:
        if len(nodes) == 1:
            _log.debug("node %s is left as it is: %s", nodes[0].name, error)
            return {}
    results: dict[str, np.ndarray] = {}
    for node in nodes:
        results.update(_evaluate([node], context))
    return results


def _fold_shapes(graph: gs.Graph, context: Context, dims: Dims) -> None:
    """Replace Shape nodes, and picks from their outputs, whose entries are all known."""
    done: set[int] = set()
    for node in graph.nodes:
        if not _is_plain(node, frozenset(["Shape"])) or node.inputs[0].name not in dims:
            continue
        entries = dims[node.inputs[0].name][slice(node.attrs.get("start", 0), node.attrs.get("end"))]
        output = node.outputs[0]
        if None not in entries and output.name not in context.pinned:
            _make_constant(output, np.array(entries, np.int64))
            done.add(id(node))
            continue
        for reader in output.outputs:
            picked = _pick(reader, entries)
            if (
                picked is not None
                and reader.outputs[0].name not in context.pinned
                and reader.inputs[0] is output
            ):
                _make_constant(reader.outputs[0], picked)
                done.add(id(reader))
    _remove_nodes(graph, done)


def _pick(reader: gs.Node, entries: Sequence[int | None]) -> np.ndarray | None:
    """Return what a Gather or Slice takes from the entries of a shape, or None if that is not known."""
    arguments = reader.inputs[1:]
    if not all(isinstance(t, gs.Constant) or not t.name for t in arguments):
        return None
    array = np.array(entries, dtype=object)
    if _is_plain(reader, frozenset(["Gather"])):
        indices = arguments[0].values
        if np.any(indices < -len(entries)) or np.any(indices >= len(entries)):
            return None
        picked = np.asarray(array[indices], dtype=object)
    elif _is_plain(reader, frozenset(["Slice"])):
        if arguments:
            values = {
                key: t.values for key, t in zip(("starts", "ends", "axes", "steps"), arguments) if t.name
            }
        else:
            values = {
                key: np.asarray(reader.attrs[key])
                for key in ("starts", "ends", "axes")
                if key in reader.attrs
            }
        if (
            any(np.size(value) != 1 for value in values.values())
            or "starts" not in values
            or "ends" not in values
        ):
            return None
        start, end, step = (
            int(np.ravel(values[key])[0]) if key in values else 1 for key in ("starts", "ends", "steps")
        )
        if step != 1:
            return None
        picked = array[start:end]
    else:
        return None
    return None if any(entry is None for entry in picked.ravel()) else picked.astype(np.int64)


def _fold_layouts(graph: gs.Graph, context: Context, dims: Dims, types: Mapping[str, np.dtype]) -> None:
    """Apply Transpose, Cast and the like to a weight that nothing else reads."""
    done: set[int] = set()
    for node in graph.nodes:
        if not _is_plain(node, _LAYOUT_OPS) or not node.inputs:
            continue
        weight, output = node.inputs[0], node.outputs[0]
        if not isinstance(weight, gs.Constant) or weight.dtype not in _FLOATS or len(weight.outputs) != 1:
            continue
        if weight.name in context.pinned or output.name in context.pinned:
            continue
        values = _LAYOUT.get(node.op, _reshape)(
            node, weight.values, dims.get(output.name), types.get(output.name)
        )
        if values is not None:
            weight.values = _frozen(values)
            _redirect(output, weight)
            weight.outputs.remove(node)
            done.add(id(node))
    _remove_nodes(graph, done)


Shape = tuple[int | None, ...] | None


def _transpose(node: gs.Node, values: np.ndarray, shape: Shape, dtype: np.dtype | None) -> np.ndarray | None:
    perm = node.attrs.get("perm")
    return (
        np.ascontiguousarray(np.transpose(values, perm)) if perm is None or len(perm) == values.ndim else None
    )


def _cast(node: gs.Node, values: np.ndarray, shape: Shape, dtype: np.dtype | None) -> np.ndarray | None:
    """Cast to a type that is not larger: a model that stores 16 bits must not grow to 32."""
    if dtype not in _FLOATS or dtype is None or dtype.itemsize > values.dtype.itemsize:
        return None
    return values.astype(dtype)


def _reshape(node: gs.Node, values: np.ndarray, shape: Shape, dtype: np.dtype | None) -> np.ndarray | None:
    if shape is None or None in shape or int(np.prod([int(d or 0) for d in shape])) != values.size:
        return None
    return values.reshape([int(d or 0) for d in shape])


_LAYOUT: Mapping[str, Callable[[gs.Node, np.ndarray, Shape, np.dtype | None], np.ndarray | None]] = {
    "Transpose": _transpose,
    "Cast": _cast,
}


def _remove_identities(graph: gs.Graph, context: Context) -> None:
    """Let the readers of a copied constant read the constant itself: shared weights stay one tensor."""
    done: set[int] = set()
    for node in graph.nodes:
        if not _is_plain(node, frozenset(["Identity"])) or not isinstance(node.inputs[0], gs.Constant):
            continue
        if node.outputs[0].name not in context.pinned:
            _redirect(node.outputs[0], node.inputs[0])
            done.add(id(node))
    _remove_nodes(graph, done)


def _redirect(old: gs.Tensor, new: gs.Tensor) -> None:
    for reader in list(old.outputs):
        for index, tensor in enumerate(reader.inputs):
            if tensor is old:
                reader.inputs[index] = new


def _make_constant(tensor: gs.Variable, values: np.ndarray) -> None:
    tensor.inputs.clear()
    tensor.to_constant(_frozen(values))


def _frozen(values: np.ndarray) -> np.ndarray:
    values.flags.writeable = False
    return values


def _remove_nodes(graph: gs.Graph, dead: set[int]) -> None:
    """Remove nodes by identity (graph-surgeon compares nodes by content) and cut their edges."""
    if not dead:
        return
    for node in graph.nodes:
        if id(node) in dead:
            node.inputs.clear()
            node.outputs.clear()
    graph.nodes = [node for node in graph.nodes if id(node) not in dead]


def remove_dead_nodes(graph: gs.Graph, pinned: frozenset[str]) -> None:
    """Remove nodes of the standard domain whose outputs nobody reads."""
    while dead := {
        id(node)
        for node in graph.nodes
        if (node.domain or "") in DEFAULT_DOMAINS
        and not any(t.outputs or t.name in pinned for t in node.outputs)
    }:
        _remove_nodes(graph, dead)
