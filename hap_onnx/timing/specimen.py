"""Single contractions cut out of a model, to be timed with other numbers of channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from onnx import ModelProto

from hap_onnx.ops.implant import ImplantForm
from hap_onnx.ops.linear import linear_form
from hap_onnx.surgery.grafting import insert_implants
from hap_onnx.twin import build_twin, probe_shapes

Shape = tuple[int, ...]

OLDEST, IR_VERSION = 11, 8


@dataclass(frozen=True)
class Specimen:
    """A contraction with a constant weight, apart from how many channels it reads and makes.

    Attributes:
        constants: shapes of its constant inputs as they are in the model, by position.
        in_axis, out_axis: of the weight; ``channel_axis``: of the data input and the output.
        conv_group: of the node in the model; a depthwise convolution has as many as channels.
        x, y: shapes of the data input and the output in the model.
        opset: in which its attributes are to be read.
    """

    op_type: str
    domain: str
    attributes: Mapping[str, Any]
    constants: Mapping[int, Shape]
    weight_index: int
    in_axis: int
    out_axis: int
    channel_axis: int
    conv_group: int
    x: Shape
    y: Shape
    dtype: np.dtype
    opset: int

    @property
    def n_in(self) -> int:
        """Channels that it reads in the model, per conv group."""
        return self.constants[self.weight_index][self.in_axis]

    @property
    def n_out(self) -> int:
        """Channels that it makes in the model."""
        return self.constants[self.weight_index][self.out_axis]

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel is a conv group of its own."""
        return self.conv_group > 1 and self.conv_group == self.n_out and self.n_in == 1

    @property
    def family(self) -> str:
        """Name all that matters for its time but the numbers of channels, the same in every model."""
        weight = self.constants[self.weight_index]
        taps = [str(n) for axis, n in enumerate(weight) if axis not in (self.in_axis, self.out_axis)]
        axis = self.channel_axis % len(self.x)
        places = ["x".join(str(n) for i, n in enumerate(shape) if i != axis) for shape in (self.x, self.y)]
        group = "depthwise" if self.is_depthwise else f"group={self.conv_group}"
        rest = {name: value for name, value in self.attributes.items() if name != "group"}
        words = [
            self.op_type,
            *(["x".join(taps)] if taps else []),
            f"{places[0]}->{places[1]}",
            group,
            *(f"{name}={_plain(value)}" for name, value in sorted(rest.items())),
            f"inputs={len(self.constants)}",
            str(self.dtype),
        ]
        return " ".join(words)

    def sizes(self, n_in: int, n_out: int) -> tuple[Shape, Shape]:
        """Shapes of data input and output with other numbers of channels."""
        groups = n_out if self.is_depthwise else self.conv_group
        x, y = list(self.x), list(self.y)
        x[self.channel_axis], y[self.channel_axis] = n_in * groups, n_out
        return tuple(x), tuple(y)


def specimen_of(node: gs.Node, x: Shape, y: Shape, *, opset: int) -> Specimen | None:
    """Cut a node out; None if it is no contraction of one input with a constant weight."""
    form = linear_form(node)
    constants = {i: t for i, t in enumerate(node.inputs) if isinstance(t, gs.Constant)}
    if form is None or form.weight_index not in constants:
        return None
    if any(t.name and i not in constants for i, t in enumerate(node.inputs) if i != form.data_index):
        return None  # a bias that other nodes compute
    dtype = np.dtype(constants[form.weight_index].values.dtype)
    return Specimen(
        op_type=node.op,
        domain=node.domain or "",
        attributes=dict(node.attrs),
        constants={i: tuple(t.shape) for i, t in constants.items()},
        weight_index=form.weight_index,
        in_axis=form.in_axis,
        out_axis=form.out_axis,
        channel_axis=form.channel_axis,
        conv_group=form.conv_group,
        x=x,
        y=y,
        dtype=dtype if dtype in (np.float16, np.float32, np.float64) else np.dtype(np.float32),
        opset=opset,
    )


def build_model(specimen: Specimen, points: Sequence[tuple[int, int]]) -> tuple[ModelProto, dict[str, Any]]:
    """Return a model of one node per point (inputs, outputs), side by side, and what to feed it.

    The k-th node is called ``p<k>``.
    """
    generator = np.random.default_rng(0)
    inputs: dict[Shape, gs.Variable] = {}
    nodes, outputs = [], []
    for index, (n_in, n_out) in enumerate(points):
        x, y = specimen.sizes(n_in, n_out)
        data = inputs.setdefault(x, gs.Variable(f"x{len(inputs)}", specimen.dtype, x))
        out = gs.Variable(f"y{index}", specimen.dtype, y)
        nodes.append(_node(specimen, f"p{index}", n_in, n_out, data, out, generator))
        outputs.append(out)
    opset = max(specimen.opset, OLDEST)
    graph = gs.Graph(nodes=nodes, inputs=list(inputs.values()), outputs=outputs, opset=opset)
    feed = {
        tensor.name: generator.standard_normal(shape, np.float32).astype(specimen.dtype)
        for shape, tensor in inputs.items()
    }
    return export(graph), feed


def export(graph: gs.Graph) -> ModelProto:
    """Export a small graph of our own in a version that onnxruntime surely reads."""
    model = gs.export_onnx(graph)
    model.ir_version = IR_VERSION  # onnx writes newer ones than onnxruntime reads
    return model


def _node(
    specimen: Specimen,
    name: str,
    n_in: int,
    n_out: int,
    data: gs.Variable,
    out: gs.Variable,
    generator: np.random.Generator,
) -> gs.Node:
    attributes = dict(specimen.attributes)
    if specimen.is_depthwise:
        attributes["group"] = n_out
    node = gs.Node(specimen.op_type, name, attrs=attributes, inputs=[], outputs=[out])
    node.domain = specimen.domain or None
    n_inputs = max(specimen.constants) + 1
    for index in range(n_inputs):
        if index not in specimen.constants:
            node.inputs.append(data)
            continue
        shape = list(specimen.constants[index])
        if index == specimen.weight_index:
            shape[specimen.in_axis], shape[specimen.out_axis] = n_in, n_out
        elif shape and shape[-1] == specimen.n_out:
            shape[-1] = n_out
        scale = max(prod(shape[1:]), 1) ** -0.5
        values = np.asarray(generator.standard_normal(shape, np.float32) * scale, specimen.dtype)
        node.inputs.append(gs.Constant(f"{name}_{index}", values))
    return node


def implant_parts(specimen: Specimen, form: ImplantForm) -> tuple[Specimen, Specimen, bool] | None:
    """Cut out the two contractions of an implant, in the order of its weights.

    The third value says whether other nodes bring their results together. None where they cannot be told.
    """
    x, y = specimen.sizes(specimen.n_in, specimen.n_out)
    generator = np.random.default_rng(0)
    data, out = gs.Variable("x", specimen.dtype, x), gs.Variable("y", specimen.dtype, y)
    node = _node(specimen, "layer", specimen.n_in, specimen.n_out, data, out, generator)
    graph = gs.Graph(nodes=[node], inputs=[data], outputs=[out], opset=max(specimen.opset, OLDEST))
    # As large as ranks can be, so that the parts are timed up to there.
    largest = min(specimen.n_in, specimen.n_out // specimen.conv_group)
    rank = max(1, specimen.n_out - 1 if form.kind == "pointwise" else largest)
    weights = [np.zeros(shape, np.float32) for shape in form.weight_shapes(rank)]
    grafted = insert_implants(graph, {"layer": (form.kind, weights)})
    shapes = probe_shapes(build_twin(grafted), {"x": torch.zeros(x)})
    found = [
        specimen_of(part, shapes[part.inputs[0].name], shapes[part.outputs[0].name], opset=specimen.opset)
        for part in grafted.nodes
        if linear_form(part) is not None
    ]
    if len(found) != 2 or found[0] is None or found[1] is None:
        return None
    return found[0], found[1], len(grafted.nodes) > 2


def _plain(value: Any) -> str:
    return str(value.tolist() if isinstance(value, np.ndarray) else value).replace(" ", "")
