"""Damaged and hostile files, and what the command line makes of them.

A ``FileCase`` is drawn from a seed: one of a few valid models with its data and plan, a command, and some
mutations of bytes or of structure. ``Arena`` runs cases, in forked workers or in processes of their own, each
in a folder of its own under limits of memory, time and file size, and judges how they end.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tools.fuzz_graphs import Seeded, random_model

ROOT = Path(__file__).parents[1]
MODEL, PLAN, WEIGHTS, DATA, OUT = "net.onnx", "plan.json", "plan.safetensors", "data.npz", "out.onnx"
EXIT_CODES = (0, 1, 2, 3)
HUGE = (0, -1, 1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, -(2**31), -(2**63), 2**63 - 1)
NAMES = ("", "x0", "../../x", "a\nb", "\x1b[31mred", "name" * 3000, "{0}", "%s", "é", "/", "\u202e")
LOCATIONS = (
    "missing.bin", "../outside/secret.bin", "/etc/passwd", "link.bin", "", ".", "weights.bin", "a\x00b",
    "..\\outside\\secret.bin", "C:\\secret.bin", "file:///etc/passwd", "/dev/zero", "fifo",
)  # fmt: skip

# --- mutations of structure: each changes a model in place ---

Random = random.Random
Mutation = Callable[[ModelProto, Random], None]
STRUCTURE: dict[str, Mutation] = {}


def structure(mutate: Mutation) -> Mutation:
    STRUCTURE[mutate.__name__] = mutate
    return mutate


def _nodes(model: ModelProto) -> list[NodeProto]:
    """All nodes, those of subgraphs and functions too."""
    found: list[NodeProto] = []
    queue = list(model.graph.node) + [node for function in model.functions for node in function.node]
    while queue:
        node = queue.pop()
        found.append(node)
        for attribute in node.attribute:
            queue += attribute.g.node
            queue += [inner for graph in attribute.graphs for inner in graph.node]
    return found


def _names(model: ModelProto) -> list[str]:
    names = [value.name for value in (*model.graph.input, *model.graph.output, *model.graph.initializer)]
    return [*names, *(name for node in _nodes(model) for name in (*node.input, *node.output)), *NAMES]


def _any(rng: Random, options: Sequence[Any]) -> Any:
    return rng.choice(options) if options else None


def _tensors(model: ModelProto) -> list[TensorProto]:
    inner = [attribute.t for node in _nodes(model) for attribute in node.attribute if attribute.HasField("t")]
    return [*model.graph.initializer, *inner]


@structure
def tensor_dims(model: ModelProto, rng: Random) -> None:
    tensor = _any(rng, _tensors(model))
    if tensor is None:
        return
    dims = list(tensor.dims)
    how = rng.randrange(4)
    if how == 0 and dims:
        dims[rng.randrange(len(dims))] = rng.choice(HUGE)
    elif how == 1:
        dims.insert(rng.randint(0, len(dims)), rng.choice([1, *HUGE]))
    elif how == 2 and dims:
        dims.pop(rng.randrange(len(dims)))
    else:
        dims = [1] * rng.choice([33, 9, 5]) if rng.random() < 0.5 else dims[::-1]
    tensor.ClearField("dims")
    tensor.dims.extend(dims)


@structure
def tensor_type(model: ModelProto, rng: Random) -> None:
    tensor = _any(rng, _tensors(model))
    if tensor is not None:
        tensor.data_type = rng.choice([*TensorProto.DataType.values(), 99, -1])


@structure
def tensor_retyped(model: ModelProto, rng: Random) -> None:
    """Another element type, soundly stored."""
    tensor = _any(rng, list(model.graph.initializer))
    if tensor is not None:
        with contextlib.suppress(ValueError, TypeError):
            array = numpy_helper.to_array(tensor).astype(
                rng.choice(["f8", "f2", "i4", "i8", "u1", "?", "i1"])
            )
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


@structure
def tensor_numbers(model: ModelProto, rng: Random) -> None:
    tensor = _any(rng, _tensors(model))
    if tensor is None:
        return
    with contextlib.suppress(ValueError, TypeError):
        array = np.array(numpy_helper.to_array(tensor))
        if not array.size:
            return
        if array.dtype.kind == "f":
            array.reshape(-1)[rng.randrange(array.size)] = rng.choice(
                [np.nan, np.inf, -np.inf, 0, 1e38, -1e-40]
            )
            if rng.random() < 0.3:
                array[...] = rng.choice([np.nan, np.inf, 0, 1e30])
        elif array.dtype.kind in "iu":
            limits = np.iinfo(array.dtype)
            number = min(max(rng.choice(HUGE), limits.min), limits.max)
            array.reshape(-1)[rng.randrange(array.size)] = number
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


@structure
def tensor_bytes(model: ModelProto, rng: Random) -> None:
    tensor = _any(rng, _tensors(model))
    if tensor is not None:
        tensor.raw_data = mutate_bytes(tensor.raw_data, rng)


@structure
def tensor_fields(model: ModelProto, rng: Random) -> None:
    """Numbers in several fields at once, or in the wrong one."""
    tensor = _any(rng, _tensors(model))
    if tensor is None:
        return
    if rng.random() < 0.5:
        tensor.ClearField("raw_data")
    tensor.float_data.extend([1.0] * rng.choice([1, 5]))
    if rng.random() < 0.5:
        tensor.int64_data.extend([1] * 3)
    if rng.random() < 0.3:
        tensor.segment.begin, tensor.segment.end = 0, 2**40


@structure
def external(model: ModelProto, rng: Random) -> None:
    for tensor in rng.sample(
        list(model.graph.initializer), min(len(model.graph.initializer), rng.choice([1, 1, 3]))
    ):
        del tensor.external_data[:]
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=rng.choice(LOCATIONS))
        if rng.random() < 0.7:
            tensor.external_data.add(
                key="offset", value=rng.choice(["0", "-1", "1e9", str(2**70), "x", "4096", ""])
            )
        if rng.random() < 0.7:
            size = len(tensor.raw_data)
            tensor.external_data.add(
                key="length", value=rng.choice([str(size), "0", str(2**50), "-5", "two"])
            )
        if rng.random() < 0.5:
            tensor.ClearField("raw_data")


@structure
def rename(model: ModelProto, rng: Random) -> None:
    graph = model.graph
    target = _any(rng, [*graph.initializer, *graph.input, *graph.output, *_nodes(model), graph])
    target.name = rng.choice(_names(model))


@structure
def node_input(model: ModelProto, rng: Random) -> None:
    node = _any(rng, _nodes(model))
    if node is None:
        return
    how = rng.randrange(5)
    if how == 0 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(_names(model))
    elif how == 1 and node.input:
        del node.input[rng.randrange(len(node.input))]
    elif how == 2:
        node.input.append(rng.choice(_names(model)))
    elif how == 3 and node.input and node.output:
        node.input[0] = node.output[0]
    else:
        del node.input[:]


@structure
def node_output(model: ModelProto, rng: Random) -> None:
    node = _any(rng, _nodes(model))
    if node is None:
        return
    how = rng.randrange(4)
    if how == 0 and node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice(_names(model))
    elif how == 1:
        node.output.append(rng.choice(_names(model)))
    elif how == 2:
        del node.output[:]
    elif node.output:
        node.output[0] = ""


@structure
def node_operator(model: ModelProto, rng: Random) -> None:
    node = _any(rng, _nodes(model))
    if node is not None:
        schemas = onnx.defs.get_all_schemas()
        common = [other.op_type for other in _nodes(model)]
        node.op_type = rng.choice(
            [rng.choice(schemas).name, rng.choice(common), rng.choice(common), *NAMES[:4]]
        )


@structure
def node_domain(model: ModelProto, rng: Random) -> None:
    node = _any(rng, _nodes(model))
    if node is not None:
        node.domain = rng.choice(
            ["ai.onnx", "ai.onnx.ml", "com.microsoft", "junk", "ai.onnx.training", *NAMES]
        )
        if rng.random() < 0.5:
            model.opset_import.add(domain=node.domain, version=rng.choice([1, 3, *HUGE]))


@structure
def attribute_number(model: ModelProto, rng: Random) -> None:
    found = [attribute for node in _nodes(model) for attribute in node.attribute]
    attribute = _any(rng, found)
    if attribute is None:
        return
    if attribute.type == AttributeProto.INT:
        attribute.i = rng.choice(HUGE)
    elif attribute.type == AttributeProto.FLOAT:
        attribute.f = rng.choice([float("nan"), float("inf"), -1.0, 0.0, 1e38])
    elif attribute.type == AttributeProto.STRING:
        attribute.s = rng.choice([b"", b"\xff\xfe", b"SAME_LOWER", b"VALID", b"linear", b"x" * 5000])
    elif attribute.type == AttributeProto.INTS:
        how = rng.randrange(3)
        if how == 0 and attribute.ints:
            attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(HUGE)
        elif how == 1:
            attribute.ints.append(rng.choice(HUGE))
        else:
            del attribute.ints[: rng.randint(0, len(attribute.ints))]


@structure
def attribute_kind(model: ModelProto, rng: Random) -> None:
    """Remove, repeat, retype or add an attribute."""
    node = _any(rng, _nodes(model))
    if node is None:
        return
    how = rng.randrange(5)
    if how == 0 and node.attribute:
        del node.attribute[rng.randrange(len(node.attribute))]
    elif how == 1 and node.attribute:
        node.attribute.append(copy.deepcopy(rng.choice(list(node.attribute))))
    elif how == 2 and node.attribute:
        rng.choice(list(node.attribute)).type = rng.choice(list(AttributeProto.AttributeType.values()))
    elif how == 3 and node.attribute:
        rng.choice(list(node.attribute)).name = rng.choice(["axis", "perm", "to", "value", *NAMES[:4]])
    else:
        name = rng.choice(
            ["group", "axis", "junk", "kernel_shape", "strides", "dilations", "pads", "auto_pad"]
        )
        value = rng.choice([rng.choice(HUGE[:8]), [rng.choice(HUGE[:8]) for _ in range(2)], "text", 0.5])
        node.attribute.append(helper.make_attribute(name, value))


@structure
def nodes_moved(model: ModelProto, rng: Random) -> None:
    nodes = [copy.deepcopy(node) for node in model.graph.node]
    how = rng.randrange(4)
    if how == 0:
        rng.shuffle(nodes)
    elif how == 1 and nodes:
        nodes.pop(rng.randrange(len(nodes)))
    elif how == 2 and nodes:
        nodes.insert(rng.randint(0, len(nodes)), copy.deepcopy(rng.choice(nodes)))
    else:
        nodes = nodes[: rng.randint(0, len(nodes))]
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)


@structure
def interface(model: ModelProto, rng: Random) -> None:
    """Inputs and outputs: shapes, types, number."""
    values = rng.choice([model.graph.input, model.graph.output])
    value = _any(rng, list(values))
    if value is None:
        return
    how = rng.randrange(8)
    shape = value.type.tensor_type.shape
    if how == 0 and shape.dim:
        shape.dim[rng.randrange(len(shape.dim))].dim_value = rng.choice(HUGE)
    elif how == 1 and shape.dim:
        shape.dim[rng.randrange(len(shape.dim))].dim_param = rng.choice(NAMES)
    elif how == 2 and shape.dim:
        del shape.dim[rng.randrange(len(shape.dim))]
    elif how == 3:
        value.type.tensor_type.elem_type = rng.choice([*TensorProto.DataType.values(), 99])
    elif how == 4:
        value.type.tensor_type.ClearField("shape")
    elif how == 5:
        value.ClearField("type")
        if rng.random() < 0.5:
            value.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif how == 6:
        values.append(copy.deepcopy(value))
        if rng.random() < 0.5:
            values[-1].name = rng.choice(_names(model))
    else:
        del values[:]


@structure
def versions(model: ModelProto, rng: Random) -> None:
    how = rng.randrange(4)
    if how == 0:
        model.ir_version = rng.choice([3, 4, 11, 13, *HUGE[:-1]])
    elif how == 1:
        del model.opset_import[:]
    elif how == 2 and model.opset_import:
        model.opset_import[0].version = rng.choice([*range(1, 30), *HUGE])
    else:
        model.opset_import.add(domain=rng.choice(["", "ai.onnx", "junk"]), version=rng.choice([1, 7, *HUGE]))


@structure
def nested(model: ModelProto, rng: Random) -> None:
    """Control flow: deep, endless, or over names that are not there."""
    if not model.graph.node:
        return
    index = rng.randrange(len(model.graph.node))
    node = copy.deepcopy(model.graph.node[index])
    depth = rng.choice([1, 1, 2, 10, 30])  # protobuf itself ends at 100 messages in each other, three a level
    body = [node]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name][:1] or [
        onnx.ValueInfoProto(name="q")
    ]
    flag = helper.make_tensor("flag", TensorProto.BOOL, [], [True])
    for level in range(depth):
        name = outputs[0].name
        branch = helper.make_graph(body, f"level{level}", [], outputs)
        other = helper.make_graph(
            [helper.make_node("Identity", [rng.choice(_names(model)[:8] or ["x0"])], [f"{name}_o{level}"])],
            f"other{level}", [], [onnx.ValueInfoProto(name=f"{name}_o{level}")],
        )  # fmt: skip
        renamed = name if level == depth - 1 or rng.random() < 0.5 else f"{name}_{level}"
        body = [helper.make_node("If", ["flag"], [renamed], then_branch=branch, else_branch=other)]
        outputs = [onnx.ValueInfoProto(name=renamed)]
    model.graph.initializer.append(flag)
    model.graph.node[index].CopyFrom(body[0])


@structure
def loop(model: ModelProto, rng: Random) -> None:
    """A Loop on the way to the first output; it ends: how long a model may compute is its user's matter."""
    count = helper.make_tensor("n_turns", TensorProto.INT64, [], [rng.choice([3, 0, 5000, -1])])
    go_on = helper.make_tensor("go_on", TensorProto.BOOL, [], [True])
    out = model.graph.output[0].name if model.graph.output else "y"
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c_out"]), helper.make_node("Abs", ["s"], ["s_out"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []),
         helper.make_tensor_value_info("c", TensorProto.BOOL, []),
         helper.make_tensor_value_info("s", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("c_out", TensorProto.BOOL, []),
         helper.make_tensor_value_info("s_out", TensorProto.FLOAT, None)],
    )  # fmt: skip
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == out:
                node.output[index] = "before_loop"
    model.graph.initializer.extend([count, go_on])
    model.graph.node.append(helper.make_node("Loop", ["n_turns", "go_on", "before_loop"], [out], body=body))


@structure
def bomb(model: ModelProto, rng: Random) -> None:
    """A few bytes that ask for very much: before the first output, or as a constant of its own."""
    size = rng.choice([10**5, 10**7, 2**36, 2**40, 2**62])
    axes = rng.choice([1, 2, 3])
    graph = model.graph
    out = graph.output[0].name if graph.output else "y"
    graph.initializer.append(helper.make_tensor("big", TensorProto.INT64, [axes], [size] + [1] * (axes - 1)))
    kind = rng.randrange(6)
    if kind == 0:
        graph.node.insert(0, helper.make_node("ConstantOfShape", ["big"], ["bomb"]))
    elif kind == 1:
        graph.initializer.append(helper.make_tensor("one", TensorProto.FLOAT, [1] * axes, [1.0]))
        graph.node.insert(0, helper.make_node("Expand", ["one", "big"], ["bomb"]))
    elif kind == 2:
        graph.initializer.append(helper.make_tensor("one", TensorProto.FLOAT, [1] * axes, [1.0]))
        graph.node.insert(0, helper.make_node("Tile", ["one", "big"], ["bomb"]))
    elif kind == 3:
        for name, number in (("zero", 0), ("end", size), ("step", 1)):
            graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [], [number]))
        graph.node.insert(0, helper.make_node("Range", ["zero", "end", "step"], ["range"]))
        graph.node.insert(1, helper.make_node("Cast", ["range"], ["bomb"], to=1))
    elif kind == 4:
        pads = [0] * axes + [size] + [0] * (axes - 1)
        graph.initializer.append(helper.make_tensor("pads", TensorProto.INT64, [2 * axes], pads))
        graph.initializer.append(helper.make_tensor("one", TensorProto.FLOAT, [1] * axes, [1.0]))
        graph.node.insert(0, helper.make_node("Pad", ["one", "pads"], ["bomb"]))
    else:
        sparse = graph.sparse_initializer.add()
        sparse.dims.extend([size] + [1] * (axes - 1))
        sparse.values.CopyFrom(helper.make_tensor("bomb", TensorProto.FLOAT, [1], [1.0]))
        sparse.indices.CopyFrom(helper.make_tensor("at", TensorProto.INT64, [1], [0]))
    graph.node.append(helper.make_node("ReduceMax", ["bomb"], ["peak"], keepdims=0))
    for node in list(graph.node)[:-1]:
        for index, name in enumerate(node.output):
            if name == out:
                node.output[index] = "before_bomb"
    graph.node.append(helper.make_node("Add", ["before_bomb", "peak"], [out]))


_ODD: tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...] = (
    ("Slice", (1, 1, 1, 1), ()), ("Gather", (1,), ("axis",)), ("Reshape", (3,), ("allowzero",)),
    ("Tile", (3,), ()), ("Expand", (3,), ()), ("Pad", (6,), ()), ("Unsqueeze", (2,), ()),
    ("Squeeze", (1,), ()), ("Trilu", (0,), ()), ("Split", (2,), ("axis",)),
    ("Split", (), ("axis", "num_outputs")), ("TopK", (1,), ("axis", "largest")),
    ("CumSum", (0,), ("exclusive",)), ("ReduceSum", (2,), ("keepdims",)), ("Transpose", (), ("perm 3",)),
    ("Flatten", (), ("axis",)), ("Softmax", (), ("axis",)), ("LogSoftmax", (), ("axis",)),
    ("ArgMax", (), ("axis",)), ("MaxPool", (), ("kernel_shape 2", "strides 2", "ceil_mode")),
    ("MaxPool", (), ("kernel_shape 2", "dilations 2")), ("AveragePool", (), ("kernel_shape 2", "pads 4")),
    ("LpPool", (), ("kernel_shape 2", "p", "strides 2")), ("DepthToSpace", (), ("blocksize",)),
    ("SpaceToDepth", (), ("blocksize",)), ("LRN", (), ("size",)), ("LpNormalization", (), ("axis", "p")),
    ("Concat", (), ("axis",)), ("GatherND", (2,), ("batch_dims",)), ("ReduceMean", (), ("axes 2",)),
    ("SplitToSequence", (0,), ("axis",)), ("Shape", (), ("start", "end")), ("OneHot", (1, 2), ("axis",)),
    ("ConstantOfShape", (), ()), ("EyeLike", (), ("k", "dtype")), ("Div", (1,), ()),
    ("Mod", (1,), ("fmod",)), ("BitShift", (1,), ()), ("Range", (0, 0), ()), ("Cast", (), ("to",)),
    ("Attention", (), ("q_num_heads", "kv_num_heads")), ("DFT", (0,), ("axis", "inverse")),
    ("Size", (), ()),
)  # fmt: skip
"""Operators with the lengths of their integer inputs and the names (and lengths) of their attributes."""


@structure
def odd_operator(model: ModelProto, rng: Random) -> None:
    """An operator with numbers that make little sense, on the way to the first output."""
    graph = model.graph
    if not graph.output:
        return
    out = graph.output[0].name
    op_type, lengths, names = rng.choice(_ODD)
    odd = lambda: rng.choice([0, 1, 2, rng.choice(HUGE)])  # noqa: E731
    inputs = []
    for index, length in enumerate(lengths):
        numbers = [odd() for _ in range(length or 1)]
        graph.initializer.append(
            helper.make_tensor(f"odd{index}", TensorProto.INT64, [length] if length else [], numbers)
        )
        inputs.append(f"odd{index}")
    attributes: dict[str, Any] = {}
    for name in names:
        stem, _, length_of = name.partition(" ")
        attributes[stem] = [odd() for _ in range(int(length_of))] if length_of else odd()
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == out:
                node.output[index] = "before_odd"
    first = "before_odd"
    if rng.random() < 0.3 or op_type in ("Div", "Mod", "BitShift", "OneHot", "ConstantOfShape", "Range"):
        graph.node.append(helper.make_node("Cast", [first], ["odd_ints"], to=TensorProto.INT64))
        first = "odd_ints"
        if op_type == "Range":
            graph.node.append(helper.make_node("ReduceMax", [first], ["odd_int"], keepdims=0))
            first = "odd_int"
    if rng.random() < 0.2 and inputs:
        first = inputs[-1]  # all of it is constant then
    graph.node.append(helper.make_node(op_type, [first, *inputs], ["odd_made"], **attributes))
    graph.node.append(helper.make_node("Cast", ["odd_made"], [out], to=TensorProto.FLOAT))


@structure
def local_function(model: ModelProto, rng: Random) -> None:
    """A function of the file, which may call itself or have a known operator's name."""
    node = _any(rng, list(model.graph.node))
    if node is None:
        return
    name = rng.choice(["F", node.op_type, "Add"])
    inner = copy.deepcopy(node)
    function = onnx.FunctionProto(name=name, domain=rng.choice(["own", "", node.domain]))
    function.input.extend(entry for entry in node.input if entry)
    function.output.extend(node.output)
    function.opset_import.extend(model.opset_import)
    if rng.random() < 0.4:
        inner.op_type, inner.domain = name, function.domain
        del inner.attribute[:]
    function.node.append(inner)
    model.functions.append(function)
    if rng.random() < 0.3:
        model.functions.append(function)
    node.op_type, node.domain = name, function.domain
    del node.attribute[:]
    if rng.random() < 0.7:
        model.opset_import.add(domain=function.domain, version=1)


@structure
def remarks(model: ModelProto, rng: Random) -> None:
    """Things beside the graph: wrong value_info, metadata, sparse tensors, training."""
    how = rng.randrange(5)
    if how == 0:
        name = rng.choice(_names(model))
        shape = [rng.choice(HUGE[:10]) for _ in range(rng.randint(0, 5))]
        model.graph.value_info.append(helper.make_tensor_value_info(name, rng.choice([1, 7, 11]), shape))
    elif how == 1:
        model.metadata_props.add(
            key=rng.choice(["hap_onnx", *NAMES]), value=rng.choice(["{", "x" * 10**5, "null"])
        )
    elif how == 2:
        sparse = model.graph.sparse_initializer.add()
        sparse.dims.extend(rng.choice([[3], [2, 2], [2**40, 2**40], [-1], []]))
        sparse.values.CopyFrom(helper.make_tensor(rng.choice(_names(model)), 1, [2], [1.0, 2.0]))
        sparse.indices.CopyFrom(helper.make_tensor("at", TensorProto.INT64, [2], [rng.choice(HUGE), 1]))
    elif how == 3:
        model.training_info.add().algorithm.name = "train"
        model.producer_name = rng.choice(NAMES)
    else:
        note = model.graph.quantization_annotation.add(tensor_name=rng.choice(_names(model)))
        note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=rng.choice(_names(model)))


# --- mutations of bytes and of JSON ---


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """Flip, insert, delete, repeat, overwrite or truncate."""
    content = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        start = rng.randint(0, len(content))
        length = min(rng.choice([1, 1, 2, 4, 8, 64, 1000]), len(content) - start)
        how = rng.randrange(8)
        if how == 0 and start < len(content):
            content[start] ^= 1 << rng.randrange(8)
        elif how == 1:
            content[start : start + length] = rng.randbytes(length)
        elif how == 2:
            content[start:start] = rng.randbytes(rng.choice([1, 2, 8, 100]))
        elif how == 3:
            del content[start : start + length]
        elif how == 4:
            content[start:start] = content[start : start + length]
        elif how == 5:
            content[start : start + length] = rng.choice([b"\x00", b"\xff", b"\x7f"]) * length
        elif how == 6:
            content[start:start] = rng.choice(
                [b"\xff" * 9 + b"\x01", b"\x80\x80\x80\x80\x08", b"\x0a\xff\xff\xff\x7f"]
            )
        elif rng.random() < 0.4:
            del content[start:]
    if rng.random() < 0.02:
        content = bytearray(
            rng.choice([b"", b"PK\x03\x04", b"\x00" * 64, b"version https://git-lfs", b"\x08"])
        )
    return bytes(content)


_JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**70, 1e308, 0.5, "", "x", "../x", [], {}, [[]], [0, 1], [-1], "nan", [[0, 2**40]],
    [[5, 2]], {"a": 1},
)  # fmt: skip


def mutate_json(text: bytes, rng: Random) -> bytes:
    """Change a value, a key or the length of a list somewhere in a document."""
    document = json.loads(text)
    for _ in range(rng.choice([1, 1, 2, 5])):
        places: list[tuple[Any, Any]] = []
        queue: list[Any] = [document]
        while queue:
            part = queue.pop()
            keys = (
                list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
            )
            for key in keys:
                places.append((part, key))
                queue.append(part[key])
        if not places:
            break
        part, key = rng.choice(places)
        how = rng.randrange(4)
        if how == 0:
            del part[key]
        elif how == 1 and isinstance(part, dict):
            part[rng.choice(["x", "name", "size", *NAMES[:3]])] = part.pop(key)
        elif how == 1:
            part.append(copy.deepcopy(part[key]))
        elif how == 2:
            other, place = rng.choice(places)
            with contextlib.suppress(KeyError, IndexError):
                part[key] = copy.deepcopy(other[place])
        else:
            part[key] = rng.choice(_JUNK)
    return json.dumps(document).encode()


# --- cases ---


@dataclass(frozen=True)
class Base:
    """A valid model in a folder, with data and a plan for it if there is one."""

    folder: Path
    has_plan: bool


@dataclass(frozen=True)
class FileCase:
    """What is done to which files, and the command that meets them.

    ``mutations`` holds (file, name of the mutation, its own seed).
    """

    seed: int
    base: int
    command: tuple[str, ...]
    mutations: tuple[tuple[str, str, int], ...]


_QUICK = ("--threads", "1", "--max-samples", "12", "--batch-size", "4", "-q")
_COMPRESS: tuple[tuple[str, ...], ...] = (
    ("--keep-macs", "0.6", "--sensitivity", "magnitude", "--recover", "none", "--allow-slower"),
    ("--keep-params", "0.5", "--sensitivity", "magnitude", "--method", "prune", "--allow-slower"),
    ("--keep-macs", "0.7", "--sensitivity", "random", "--dry-run"),
    ("--keep-params", "0.7", "--method", "implant", "--sensitivity", "magnitude", "--allow-slower"),
    ("--keep-macs", "0.6", "--max-drop", "none", "--allow-slower", "--method", "prune"),
)


def draw_case(seed: int, bases: Sequence[Base]) -> FileCase:
    """Draw the case of a seed."""
    rng = Random(seed)
    kind = rng.choice(["inspect"] * 7 + ["apply"] * 4 + ["compress"] * 5 + ["validate"] * 4)
    planned = [index for index, base in enumerate(bases) if base.has_plan]
    if kind == "apply" and not planned:
        kind = "inspect"
    index = rng.choice(planned if kind == "apply" else range(len(bases)))
    target = MODEL
    if kind == "inspect":
        command: tuple[str, ...] = ("inspect", MODEL, *(("--data", DATA) if rng.random() < 0.7 else ()))
    elif kind == "apply":
        command = ("apply", MODEL, PLAN, "-o", OUT)
        target = rng.choice([MODEL, PLAN, PLAN, WEIGHTS])
    elif kind == "validate":
        command = ("validate", MODEL, "other.onnx", "--data", DATA, *_QUICK)
        target = rng.choice([MODEL, "other.onnx", "other.onnx", DATA])
    else:
        command = ("compress", MODEL, "--data", DATA, "-o", OUT, *rng.choice(_COMPRESS), *_QUICK)
        target = rng.choice([MODEL, MODEL, MODEL, DATA])
    mutations = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if target in (MODEL, "other.onnx") and rng.random() < 0.75:
            name = rng.choice(list(STRUCTURE))
        elif target == PLAN and rng.random() < 0.8:
            name = "json"
        else:
            name = "bytes"
        mutations.append((target, name, rng.randrange(2**32)))
    # Bytes come last: nothing reads the structure of what they leave.
    mutations.sort(key=lambda entry: entry[1] == "bytes")
    return FileCase(seed, index, command, tuple(mutations))


def write_case(case: FileCase, base: Base, folder: Path) -> None:
    """Write the files of a case into ``folder / "work"``; beside it lie things that must not be touched."""
    work, outside = folder / "work", folder / "outside"
    for path in (work, outside, folder / "tmp"):
        path.mkdir(parents=True)
    (outside / "secret.bin").write_bytes(b"s" * 4096)
    files = {path.name: path.read_bytes() for path in base.folder.iterdir()}
    files["other.onnx"] = files[MODEL]
    parsed: dict[str, ModelProto] = {}
    for target, name, seed in case.mutations:
        rng = Random(seed)
        if name == "bytes":
            content = parsed.pop(target).SerializeToString() if target in parsed else files[target]
            files[target] = mutate_bytes(content, rng)
        elif name == "json":
            files[target] = mutate_json(files[target], rng)
        else:
            if target not in parsed:
                parsed[target] = ModelProto.FromString(files[target])
            with contextlib.suppress(Exception):  # what protobuf or onnx refuse to hold, after some changes
                STRUCTURE[name](parsed[target], rng)
    for target, model in parsed.items():
        files[target] = model.SerializeToString()
    for name, content in files.items():
        (work / name).write_bytes(content)
    (work / "link.bin").symlink_to(outside / "secret.bin")
    os.mkfifo(work / "fifo")


def make_bases(folder: Path, *, n: int) -> list[Base]:
    """Write valid models with data, and plans for some of them."""
    bases = []
    seed = 0
    while len(bases) < n:
        model = random_model(Seeded(seed))
        seed += 1
        if not 4 <= len(model.graph.node) <= 24 or any(
            dim.dim_param in ("H", "W")
            for value in model.graph.input
            for dim in value.type.tensor_type.shape.dim
        ):
            continue
        place = folder / f"base{len(bases)}"
        place.mkdir(parents=True)
        arrays = {}
        rng = np.random.default_rng(seed)
        known = {tensor.name for tensor in model.graph.initializer}
        for value in model.graph.input:
            if value.name not in known:
                shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
                arrays[value.name] = rng.standard_normal((20, *shape[1:])).astype(np.float32)
        np.savez(place / DATA, **arrays)
        if len(bases) % 4 == 3:
            onnx.save(
                model, place / MODEL, save_as_external_data=True, location="weights.bin", size_threshold=16
            )
        else:
            onnx.save(model, place / MODEL)
        if sum(base.has_plan for base in bases) < 1 + n // 4:
            plan = (
                "--save-plan",
                str(place / PLAN),
                "-o",
                str(place / OUT),
                *_COMPRESS[1],
                "--align",
                "1",
                *_QUICK,
            )
            _fork(("compress", str(place / MODEL), "--data", str(place / DATA), *plan), place, limits=None)
            (place / OUT).unlink(missing_ok=True)
        bases.append(Base(place, (place / PLAN).exists()))
    return bases


# --- running ---


@dataclass(frozen=True)
class Limits:
    """What a case may use; ``memory`` comes on top of what the libraries take."""

    memory: int = 3 << 30
    cpu_seconds: int = 60
    wall_seconds: float = 900.0  # of a busy machine
    file_bytes: int = 64 << 20


@dataclass(frozen=True)
class Ending:
    """How a case ended: ``kind`` is ``exit 0`` to ``exit 3``, or what is wrong."""

    kind: str
    detail: str = ""
    seconds: float = 0.0

    @property
    def is_sound(self) -> bool:
        return self.kind.startswith("exit ")


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _set_limits(limits: Limits, *, base: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (base + limits.memory, base + limits.memory))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _watch(folder: Path) -> None:
    """Report on stderr each file outside the work folder that Python writes, or opens beside that folder."""
    allowed = (*(str(folder / name) for name in ("work", "tmp", "cache")), "/dev/null")
    sandbox = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in (
            "open",
            "os.rename",
            "os.mkdir",
            "os.remove",
            "os.link",
            "os.symlink",
            "shutil.move",
        ):
            return
        paths = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
        if event == "open":
            flags = arguments[2] or 0
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            writes = True
        for path in paths:
            if not isinstance(path, (str, bytes, os.PathLike)):
                continue
            place = os.path.realpath(os.path.abspath(os.fsdecode(path)))
            is_inside = any(place == entry or place.startswith(entry + "/") for entry in allowed)
            if not is_inside and (writes or place.startswith(sandbox)):
                os.write(2, f"\nOUTSIDE {event} {place}\n".encode())

    sys.addaudithook(hook)


def _fork(arguments: Sequence[str], folder: Path, *, limits: Limits | None) -> tuple[int, float]:
    """Run the command line in a fork of this process; return its wait status and how long it took.

    -1 stands for one that had to be killed. Output goes to ``folder / "stdout"`` and ``"stderr"``.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            _become_worker(arguments, folder, limits)
            from hap_onnx import cli

            sys.argv = [cli.PROGRAM, *arguments]
            status = cli.main()
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException as error:
            os.write(2, f"Traceback: {error!r} left main\n".encode())
        finally:
            os._exit(status)
    return _wait(child, start, limits.wall_seconds if limits else 600.0)


def _become_worker(arguments: Sequence[str], folder: Path, limits: Limits | None) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if limits is not None:
        os.chdir(folder / "work")
        os.environ |= _places(folder)
        tempfile.tempdir = None
        _watch(folder)
        _set_limits(limits, base=_virtual_bytes())


def _places(folder: Path) -> dict[str, str]:
    """Where a command may keep temporary files, and times of layers for the next one."""
    return {"TMPDIR": str(folder / "tmp"), "XDG_CACHE_HOME": str(folder / "cache")}


def _wait(child: int, start: float, seconds: float) -> tuple[int, float]:
    pause = 0.001
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        passed = time.monotonic() - start
        if done:
            return status, passed
        if passed > seconds:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -1, passed
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)


class Arena:
    """Runs cases in folders of their own below ``folder``."""

    def __init__(self, folder: Path, *, limits: Limits | None = None, n_models: int = 16) -> None:
        self.folder, self.limits = folder, limits or Limits()
        warm_up()
        self.bases = make_bases(folder / "bases", n=n_models)

    def run(self, case: FileCase, *, in_process: bool = False) -> Ending:
        """Run a case and judge it; its folder is removed."""
        folder = self.folder / "case"
        remove(folder)
        write_case(case, self.bases[case.base], folder)
        before = listing(folder)
        if in_process:
            status, seconds = self._run_process(case, folder)
        else:
            status, seconds = _fork(case.command, folder, limits=self.limits)
        ending = self._judge(case, folder, status, seconds, before)
        remove(folder)
        return ending

    def _run_process(self, case: FileCase, folder: Path) -> tuple[int, float]:
        base = _virtual_bytes()
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            **_places(folder),
        }
        start = time.monotonic()
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            child = subprocess.Popen(
                [sys.executable, "-m", "hap_onnx", *case.command],
                cwd=folder / "work", env=environment, stdout=out, stderr=err, stdin=subprocess.DEVNULL,
                preexec_fn=lambda: _set_limits(self.limits, base=base),
            )  # fmt: skip
            try:
                code = child.wait(self.limits.wall_seconds)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                return -1, time.monotonic() - start
        return (-code if code < 0 else code << 8), time.monotonic() - start

    def _judge(
        self, case: FileCase, folder: Path, status: int, seconds: float, before: dict[str, tuple[int, int]]
    ) -> Ending:
        error = (folder / "stderr").read_text(encoding="utf-8", errors="replace")
        tail = " ".join(error.split())[-600:]
        if status == -1:
            return Ending("hang", f"{seconds:.0f} s; {tail}", seconds)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            name = "too slow" if number == signal.SIGXCPU else f"signal {number}"
            return Ending(name, tail, seconds)
        code = os.WEXITSTATUS(status)
        for word in ("Traceback", "unexpected", "OUTSIDE"):
            if word in error:
                return Ending(word.lower(), tail, seconds)
        if code not in EXIT_CODES:
            return Ending("wrong code", f"{code}; {tail}", seconds)
        if code and not [
            line for line in error.splitlines() if line.startswith(("hap-onnx:", "Error:", "Usage:"))
        ]:
            return Ending("silent", tail, seconds)
        if "please report" in error:
            return Ending("bug", tail, seconds)
        after = listing(folder)
        new = sorted(set(after) - set(before) - {"stdout", "stderr"})
        new = [name for name in new if not name.startswith("cache/hap-onnx/latency-")]
        changed = [name for name in before if after.get(name) != before[name]]
        writes = code == 0 and "-o" in case.command and "--dry-run" not in case.command
        expected = [
            name for name in new if name == f"work/{OUT}" or name.startswith(f"work/{OUT.split('.')[0]}")
        ]
        if changed or new != expected or (writes != (f"work/{OUT}" in new)):
            return Ending("files", f"exit {code}, new {new}, changed {changed}; {tail}", seconds)
        return Ending(f"exit {code}", tail, seconds)

    def minimise(self, case: FileCase, ending: Ending, *, in_process: bool) -> FileCase:
        """Drop the mutations that it does not take."""
        best = case
        for mutation in case.mutations:
            fewer = tuple(entry for entry in best.mutations if entry != mutation)
            if (
                fewer
                and self.run(candidate := replace(best, mutations=fewer), in_process=in_process).kind
                == ending.kind
            ):
                best = candidate
        return best


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Files below a folder, with size and time of the last change."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            status = path.lstat()
            found[str(path.relative_to(folder))] = (status.st_size, status.st_mtime_ns)
    return found


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it."""
    shutil.rmtree(folder, ignore_errors=True)


def warm_up() -> None:
    """Import what the command line imports, and shorten what it times: workers are forks of this process."""
    from hap_onnx import cli, pipeline  # noqa: F401
    from hap_onnx.implants import speed
    from hap_onnx.jobs import machine

    machine.LATENCY_SECONDS = speed.SECONDS = 0.02
    with tempfile.TemporaryDirectory(prefix="hap-fuzz-") as folder:
        model = Path(folder, MODEL)
        onnx.save(random_model(Seeded(0)), model)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            cli.main(["inspect", str(model)])  # much is imported at first use
    gc.collect()
    gc.freeze()  # or collections in each worker copy all pages
