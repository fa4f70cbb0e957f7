"""Model files that no exporter writes: damaged ones, and such as want to exhaust, to escape or to deceive."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from sample_models import residual_cnn

PETA = 10**15
EVIL = "\x1b]0;owned\x07\x1b[31mred\n\u202e\u009b2J"
"""What a terminal obeys: a title, a colour, a new line, the direction of writing, a short form of ESC [."""

Content = ModelProto | bytes
Build = Callable[[Path], Content]


def ints(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def floats(name: str, values: Any) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.float32), name)


def model(
    nodes: Sequence[NodeProto],
    *weights: TensorProto,
    opset: int = 17,
    ir_version: int = 9,
    functions: Sequence[FunctionProto] = (),
    domains: Sequence[str] = (),
    x: Sequence[int | str] = ("N", 3, 8, 8),
) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "hostile",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        list(weights),
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(
        graph, opset_imports=opsets, ir_version=ir_version, functions=list(functions)
    )


def relu(x: str = "x", y: str = "y", **more: Any) -> NodeProto:
    return helper.make_node("Relu", [x], [y], **more)


def sums(name: str) -> list[NodeProto]:
    """Add the sum of a tensor to the input, so that it is used."""
    return [
        helper.make_node("ReduceSum", [name], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]


def computes(op_type: str, inputs: Sequence[str], *weights: TensorProto, **attributes: Any) -> Build:
    """A model that computes one tensor from constants."""
    made = helper.make_node(op_type, list(inputs), ["huge"], name="maker", **attributes)
    return lambda _: model([made, *sums("huge")], *weights)


def changed(change: Callable[[ModelProto], object]) -> Build:
    """A sound network with something changed."""

    def build(_: Path) -> ModelProto:
        proto = residual_cnn()
        change(proto)
        return proto

    return build


def of(build: Callable[[], Content]) -> Build:
    return lambda _: build()


def weight(proto: ModelProto) -> TensorProto:
    return proto.graph.initializer[0]


def fill_weight(value: Any) -> Build:
    return changed(
        lambda proto: weight(proto).CopyFrom(
            numpy_helper.from_array(np.full(tuple(weight(proto).dims), value), weight(proto).name)
        )
    )


def set_attribute(name: str, value: Any) -> Build:
    def change(proto: ModelProto) -> None:
        attributes = proto.graph.node[0].attribute
        for attribute in [entry for entry in attributes if entry.name == name]:
            attributes.remove(attribute)
        attributes.append(helper.make_attribute(name, value))

    return changed(change)


def sparse(name: str, dims: Sequence[int], index: int = 0) -> Build:
    values = floats(name, [1.0])
    proto = model(sums(name))
    proto.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, ints(f"{name}.at", index), list(dims))
    )
    return lambda _: proto


def doubling(source: str, *weights: TensorProto, axis: int) -> Build:
    """Forty nodes, each of which doubles what the one before has made."""
    names = [source, *(f"d{index}" for index in range(40))]
    nodes = [
        helper.make_node("Concat", [a, a], [b], axis=axis) for a, b in pairwise(names)
    ]
    nodes.append(helper.make_node("Cast", [names[-1]], ["float"], to=TensorProto.FLOAT))
    return lambda _: model([*nodes, *sums("float")], *weights)


def branch(node: NodeProto) -> GraphProto:
    output = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
    return helper.make_graph([node], "branch", [], [output])


def condition(then: GraphProto, *more: NodeProto) -> ModelProto:
    node = helper.make_node("If", ["true"], ["y"], name="choose", then_branch=then, else_branch=then)
    return model([node, *more], numpy_helper.from_array(np.array(True), "true"))


def function(name: str, *calls: str) -> FunctionProto:
    """A function that calls others in a row, or computes Relu."""
    names = ["a", *(f"m{index}" for index in range(len(calls) - 1)), "b"]
    nodes = [
        helper.make_node(call, [a], [b], domain="f")
        for call, (a, b) in zip(calls, pairwise(names), strict=False)
    ] or [relu("a", "b")]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    return helper.make_function("f", name, ["a"], ["b"], nodes, opsets)


def calls(root: str, *functions: FunctionProto) -> Build:
    node = helper.make_node(root, ["x"], ["y"], domain="f")
    return lambda _: model([node], functions=functions, domains=["f"])


def nested(depth: int) -> bytes:
    """Subgraphs inside of each other, as bytes: deeper than protobuf itself would write them."""

    def field(number: int, payload: bytes) -> bytes:
        size, length = len(payload), b""
        while size > 127:
            length += bytes([size & 127 | 128])
            size >>= 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + payload

    graph = b""
    for _ in range(depth):
        graph = field(1, field(5, field(1, b"body") + field(6, graph)))
    return residual_cnn().SerializeToString() + field(7, graph)


def external(
    location: str | Callable[[Path], str],
    *,
    prepare: Callable[[Path], object] = lambda folder: None,
    **entries: int | str,
) -> Build:
    """A network whose first weight is said to be in a file; ``w.bin`` holds what belongs there."""

    def build(folder: Path) -> ModelProto:
        proto = residual_cnn()
        tensor = weight(proto)
        (folder / "w.bin").write_bytes(tensor.raw_data)
        prepare(folder)
        _point(tensor, location(folder) if callable(location) else location, **entries)
        return proto

    return build


def _point(tensor: TensorProto, location: str, **entries: int | str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))


def secret(folder: Path) -> Path:
    """A file outside of the model's folder."""
    path = folder.with_name(f"{folder.name}.secret")
    path.write_bytes(b"s" * 4096)
    return path


def link(target: Callable[[Path], Path | str], name: str = "link.bin") -> Callable[[Path], object]:
    return lambda folder: (folder / name).symlink_to(target(folder))


def hidden_external(folder: Path) -> ModelProto:
    """External data of a constant inside of a subgraph."""
    tensor = TensorProto(name="k", data_type=TensorProto.FLOAT, dims=[4])
    _point(tensor, f"../{secret(folder).name}")
    then = branch(helper.make_node("Add", ["x", "k"], ["o"]))
    then.initializer.append(tensor)
    return condition(then)


def name_all(prefix: str) -> Build:
    def change(proto: ModelProto) -> None:
        for node in proto.graph.node:
            node.name = prefix + node.name

    return changed(change)


def add_input_dims(*dims: int) -> Build:
    return of(lambda: model([relu()], x=dims))


HUGE = ["GB", "one tensor may take", "here at most"]
REFUSED: dict[str, tuple[Build, list[str]]] = {
    # what would not fit into any memory
    "a petabyte in the shape of a weight": (
        changed(lambda proto: weight(proto).dims.__setitem__(0, PETA)), ["'stem.w'", "1728 bytes", str(PETA)],
    ),
    "a petabyte times zero": (
        of(lambda: model([relu()], TensorProto(name="z", data_type=1, dims=[0, PETA, PETA]))),
        ["'z'", "no machine can hold"],
    ),
    "ConstantOfShape": (computes("ConstantOfShape", ["s"], ints("s", PETA)), ["'maker'", *HUGE]),
    "Expand": (computes("Expand", ["v", "s"], floats("v", [1]), ints("s", 10**6, 10**9)), ["'maker'", *HUGE]),
    "Tile": (computes("Tile", ["v", "s"], floats("v", [1]), ints("s", PETA)), ["'maker'", *HUGE]),
    "Range": (
        computes("Range", ["v", "e", "s"], floats("v", 0), floats("e", 1), floats("s", 1e-12)),
        ["'maker'", *HUGE],
    ),
    "Pad": (computes("Pad", ["v", "s"], floats("v", [1]), ints("s", 0, PETA)), ["'maker'", *HUGE]),
    "OneHot": (
        computes("OneHot", ["i", "d", "v"], ints("i", 1), ints("d", PETA), floats("v", [0, 1])),
        ["'maker'", *HUGE],
    ),
    "RandomNormal": (computes("RandomNormal", [], shape=[10**6, 10**6]), ["'maker'", *HUGE]),
    "Resize": (
        of(lambda: model(
            [helper.make_node("Resize", ["x", "", "s"], ["y"], name="maker")], floats("s", [1, 1, 1e6, 1e6])
        )),
        ["'maker'", *HUGE],
    ),
    "Pad of the input": (
        of(lambda: model(
            [helper.make_node("Pad", ["x", "p"], ["y"], name="maker")],
            ints("p", *[0] * 6, 10**6, 10**6),
        )),
        ["'maker'", *HUGE],
    ),
    "doubling forty times": (doubling("x", axis=1), HUGE),
    "doubling integers, which inference propagates": (doubling("one", ints("one", 1), axis=0), HUGE),
    "an input of petabytes": (add_input_dims(1, PETA, PETA), ["input 'x'", *HUGE]),
    "a batch of a petabyte": (add_input_dims(PETA, 3), ["input 'x'", *HUGE]),
    "a sparse petabyte": (sparse("s", [PETA]), ["'s'", str(PETA), "store it densely"]),
    "a sparse gigabyte": (sparse("s", [2**28]), ["'s'", "store it densely"]),
    "a negative sparse shape": (sparse("s", [-4]), ["'s'", "negative"]),
    "an index outside of a sparse tensor": (sparse("s", [4], index=99), ["index", "99"]),
    # functions and subgraphs
    "a function that calls itself": (calls("F", function("F", "F")), ["'f:F' calls itself"]),
    "functions that call each other": (
        calls("F", function("F", "G"), function("G", "F")), ["calls itself"],
    ),
    "functions that become a billion nodes": (
        calls("F40", function("F0"), *(function(f"F{k}", *[f"F{k - 1}"] * 2) for k in range(1, 41))),
        ["nodes once its functions are expanded"],
    ),
    "functions five thousand deep": (
        calls("F5000", function("F0"), *(function(f"F{k}", f"F{k - 1}") for k in range(1, 5001))),
        ["deep", "more than 100"],
    ),
    "a function that is not there": (calls("F", function("G")), ["f:F"]),
    "two functions of one name": (calls("F", function("F"), function("F")), ["two local functions"]),
    "subgraphs deeper than protobuf reads": (of(lambda: nested(3000)), ["truncated or damaged"]),
    "a subgraph that reads nothing": (
        of(lambda: condition(branch(helper.make_node("Add", ["x", "nowhere"], ["o"])))),
        ["'choose'", "'nowhere'", "nothing writes"],
    ),
    "a subgraph in a circle": (
        of(lambda: condition(branch(helper.make_node("Add", ["x", "z"], ["o"])), relu("y", "z"))),
        ["acyclic"],
    ),
    # structure
    "a circle": (
        of(lambda: model([helper.make_node("Add", ["x", "b"], ["a"]), relu("a", "b"), relu("b")])),
        ["acyclic"],
    ),
    "a node that reads itself": (
        of(lambda: model([helper.make_node("Add", ["x", "a"], ["a"]), relu("a")])), ["acyclic"],
    ),
    "a tensor that is written twice": (of(lambda: model([relu(), relu()])), ["'y'", "written twice"]),
    "two weights of one name": (
        of(lambda: model([relu()], floats("b", [1]), floats("b", [1]))), ["two", "'b'", "unique"],
    ),
    "a weight without a name": (of(lambda: model([relu()], floats("", [1]))), ["''", "not empty"]),
    "a tensor that nothing writes": (of(lambda: model([relu("nowhere")])), ["'nowhere'", "nothing writes"]),
    "two nodes of one name": (
        of(lambda: model([relu("x", "a", name="n"), relu("a", name="n")])), ["same node name"],
    ),
    # types, sizes and attributes
    "a weight of integers": (fill_weight(np.int64(1)), ["stem.w", "int64"]),
    "a weight of complex numbers": (fill_weight(np.complex64(1)), ["stem.w", "complex64"]),
    "an unknown type": (
        changed(lambda proto: setattr(weight(proto), "data_type", 99)),
        ["'stem.w'", "unknown element type 99"],
    ),
    "a negative dimension": (
        changed(lambda proto: weight(proto).dims.__setitem__(0, -16)), ["'stem.w'", "negative"],
    ),
    "more axes than numpy has": (
        changed(lambda proto: weight(proto).dims.extend([1] * 100)), ["'stem.w'", "104 axes"],
    ),
    "a pad of 10**9": (set_attribute("pads", [10**9] * 4), ["'make_stem'", "GB"]),
    "a negative pad": (set_attribute("pads", [-100] * 4), ["make_stem", "negative"]),
    "a million pads": (set_attribute("pads", [1] * 10**6), ["make_stem", "pads"]),
    "a stride of zero": (set_attribute("strides", [0, 0]), ["make_stem", "strides"]),
    "no groups": (set_attribute("group", 0), ["make_stem", "group"]),
    "an attribute of another type": (set_attribute("pads", "none"), ["make_stem", "pads"]),
    "an attribute that is unknown": (set_attribute("padding", 1), ["make_stem", "padding"]),
    # versions and domains
    "an unknown domain": (of(lambda: model([relu(domain="no.such")], domains=["no.such"])), ["no.such:Relu"]),
    "a domain that is not imported": (of(lambda: model([relu(domain="no.such")])), ["'no.such'"]),
    "an opset of 2**40": (of(lambda: model([relu()], opset=2**40)), [f"opset {2**40}", "onnxruntime"]),
    "a negative opset": (of(lambda: model([relu()], opset=-5)), ["opset -5", "onnxruntime"]),
    "an IR version of 2**40": (of(lambda: model([relu()], ir_version=2**40)), [f"IR version {2**40}"]),
    "text that is none": (
        of(lambda: residual_cnn().SerializeToString().replace(b"make_stem", b"make\xff\xfeem")), ["damaged"],
    ),
    # names
    "names that a terminal obeys": (
        of(lambda: model([relu(EVIL, name=EVIL)])), ["\\x1b[31m", "\\u202e", "nothing writes"],
    ),
    "an operator that a terminal obeys": (
        of(lambda: model([helper.make_node(EVIL, ["x"], ["y"])])), ["\\x1b[31mred"],
    ),
    # files beside the model
    "an absolute path": (external(lambda folder: str(secret(folder))), ["'stem.w'", "inside the model's"]),
    "a path upwards": (external(lambda folder: f"../{secret(folder).name}"), ["inside the model's"]),
    "a path up and down again": (external("sub/../w.bin"), ["inside the model's"]),
    "a path of Windows": (external("..\\w.bin"), ["inside the model's"]),
    "a drive of Windows": (external("C:w.bin"), ["inside the model's"]),
    "a link out of the folder": (
        external("link.bin", prepare=link(secret)), ["link out of the model's folder"],
    ),
    "a folder that is a link out": (
        external(lambda folder: f"up/{secret(folder).name}", prepare=link(lambda f: f.parent, "up")),
        ["link out of the model's folder"],
    ),
    "a link to itself": (external("link.bin", prepare=link(lambda f: "link.bin")), ["cannot be opened"]),
    "a pipe": (external("pipe", prepare=lambda folder: os.mkfifo(folder / "pipe")), ["not a regular file"]),
    "a device": (external("link.bin", prepare=link(lambda f: "/dev/zero")), ["link out"]),
    "a folder": (external("sub", prepare=lambda folder: (folder / "sub").mkdir()), ["not a regular file"]),
    "a file that is not there": (external("none.bin"), ["'none.bin'", "put it beside the model"]),
    "no file": (external(""), ["names no file"]),
    "a file name that a terminal obeys": (external(f"w{EVIL}"), ["\\x1b[31m"]),
    "a file name with a zero": (external("w\0.bin"), ["cannot be opened"]),
    "an endless file name": (external("w" * 5000), ["cannot be opened"]),
    "an offset of a petabyte": (external("w.bin", offset=PETA), ["truncated"]),
    "a negative offset": (external("w.bin", offset=-1), ["offset '-1'", "whole number"]),
    "an offset of five thousand digits": (external("w.bin", offset="9" * 5000), ["offset", "whole number"]),
    "a length of a petabyte": (external("w.bin", length=PETA), [f"declares {PETA} bytes", "1728"]),
    "a length that is too short": (external("w.bin", length=4), ["declares 4 bytes", "1728"]),
    "a file for a constant in a subgraph": (hidden_external, ["inside the model's"]),
}  # fmt: skip
"""What is refused: how it is made, and words of the message."""

TAKEN: dict[str, Build] = {
    "a link inside of the folder": external("link.bin", prepare=link(lambda f: f / "w.bin")),
    "a second name of a file elsewhere, which nobody can tell from a file": external(
        "hard.bin", prepare=lambda folder: os.link(secret(folder), folder / "hard.bin")
    ),
    "names that a terminal obeys": name_all(EVIL),
    "names of paths": name_all("../../../../tmp/evil/"),
    "names that are longer than a file name may be": name_all("n" * 100_000),
    "names that plans keep for implants": name_all("implant:"),
    "NaN in a weight": fill_weight(np.float32(np.nan)),
    "infinite weights": fill_weight(np.float32(np.inf)),
}
"""What is unusual but no harm: ``inspect`` shows it."""
