"""Implants of convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from hap_onnx.ops.implant import (
    FULL,
    JOINED,
    POINTWISE,
    ImplantForm,
    Shape,
    build_factors,
    factor_names,
)
from hap_onnx.ops.registry import implant_op
from hap_onnx.ops.rules import constant_input
from hap_onnx.ops.window import per_axis, resolve_pads


@dataclass(frozen=True)
class _Window:
    """The kernel of a Conv and how it moves, one entry per spatial axis; ``pads`` None where sizes decide."""

    conv_group: int
    n_out: int
    width: int  # input channels per conv group
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, ...], tuple[int, ...]] | None
    auto_pad: str

    @property
    def n_axes(self) -> int:
        return len(self.kernel)

    def attributes(self, axes: range) -> dict[str, Any]:
        """Attributes of a Conv that works along some of the axes only, and leaves the others alone.

        Along an axis with a kernel of one tap and a stride of one, ``auto_pad`` pads nothing.
        """

        def only(values: Sequence[int], default: int) -> list[int]:
            return [value if axis in axes else default for axis, value in enumerate(values)]

        found: dict[str, Any] = {
            "dilations": only(self.dilations, 1),
            "group": self.conv_group,
            "kernel_shape": only(self.kernel, 1),
            "strides": only(self.strides, 1),
        }
        if self.pads is None:
            found["auto_pad"] = self.auto_pad
        else:
            found["pads"] = only(self.pads[0], 0) + only(self.pads[1], 0)
        return found


def _read_window(node: gs.Node) -> _Window | None:
    """Read the attributes of a Conv; None if they do not fit its weight."""
    attributes, (n_out, width, *kernel) = node.attrs, node.inputs[1].shape
    n_axes, conv_group = len(kernel), int(attributes.get("group", 1))
    auto_pad = str(attributes.get("auto_pad", "NOTSET"))
    if not 1 <= n_axes <= 3 or n_out % conv_group or list(attributes.get("kernel_shape", kernel)) != kernel:
        return None
    strides = per_axis(attributes.get("strides"), 1, n_axes)
    dilations = per_axis(attributes.get("dilations"), 1, n_axes)
    pads = None
    if not auto_pad.startswith("SAME") or set(strides) == {1}:  # else they depend on the sizes
        begins, ends = resolve_pads(
            [0] * n_axes, kernel, strides, dilations, pads=attributes.get("pads"), auto_pad=auto_pad
        )
        pads = tuple(begins), tuple(ends)
    return _Window(conv_group, n_out, width, tuple(kernel), tuple(strides), tuple(dilations), pads, auto_pad)


@implant_op("Conv")
def _implant_conv(node: gs.Node) -> tuple[ImplantForm, ...]:
    window = _read_window(node)
    if window is None:
        return ()
    forms = [_factors(node, window, "lowrank", n_first_axes=window.n_axes)]
    split = next((n for n in range(1, window.n_axes) if prod(window.kernel[:n]) > 1), window.n_axes)
    if prod(window.kernel[split:]) > 1:
        forms.append(_factors(node, window, "spatial", n_first_axes=split))
    tap = _central_tap(window)
    if tap is not None and _can_split_bias(node, window):
        forms.append(_pointwise(node, window, tap))
    return tuple(forms)


def _factors(node: gs.Node, window: _Window, kind: str, *, n_first_axes: int) -> ImplantForm:
    """Two convolutions: the first along the first axes, the second along the rest (1x1 if there are none)."""
    axes = range(n_first_axes), range(n_first_axes, window.n_axes)
    first, second = (window.attributes(part) for part in axes)

    def weight_shapes(rank: int) -> tuple[Shape, ...]:
        return (
            (window.conv_group * rank, window.width, *first["kernel_shape"]),
            (window.n_out, rank, *second["kernel_shape"]),
        )

    def reorder(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        shapes = weight_shapes(arrays[0].shape[1])
        return tuple(array.reshape(shape) for array, shape in zip(arrays, shapes, strict=True))

    return ImplantForm(
        kind=kind,
        taps=(prod(first["kernel_shape"]), prod(second["kernel_shape"])),
        tap=None,
        weight_names=factor_names(node.inputs[1]),
        rank_axis=1,
        weight_shapes=weight_shapes,
        # The first leaves the sizes of the other axes as they are in the input.
        n_first=lambda x, y: prod((y[0], *y[2 : 2 + n_first_axes], *x[2 + n_first_axes :])),
        n_second=_n_positions,
        reorder=reorder,
        build=lambda node, weights, activation: build_factors(
            node, weights, op_type="Conv", first=first, second=second
        ),
    )


def _n_positions(y: Shape) -> int:
    return prod((y[0], *y[2:]))


# --- pointwise ---


def _central_tap(window: _Window) -> int | None:
    """The most central tap at which a 1x1 kernel, in place of the whole one, need not crop the input."""
    if window.conv_group != 1 or prod(window.kernel) == 1 or window.pads is None:
        return None
    taps = []
    for width, dilation, begin, end in zip(window.kernel, window.dilations, *window.pads, strict=True):
        fitting = [t for t in range(width) if begin >= dilation * t and end >= dilation * (width - 1 - t)]
        if not fitting:
            return None
        taps.append(min(fitting, key=lambda t: abs(2 * t - (width - 1))))
    return int(np.ravel_multi_index(taps, window.kernel))


def _pointwise_attributes(window: _Window, tap: int) -> dict[str, Any]:
    """Attributes of the 1x1 convolution that reads what the kernel reads at ``tap``."""
    assert window.pads is not None
    places = [int(place) for place in np.unravel_index(tap, window.kernel)]
    axes = list(zip(places, window.kernel, window.dilations, *window.pads, strict=True))
    begins = [begin - dilation * place for place, _, dilation, begin, _ in axes]
    ends = [end - dilation * (width - 1 - place) for place, width, dilation, _, end in axes]
    return {
        "kernel_shape": [1] * window.n_axes,
        "pads": begins + ends,
        "strides": list(window.strides),
    }


def _can_split_bias(node: gs.Node, window: _Window) -> bool:
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return True
    if constant_input(node, 2) is None or tuple(node.inputs[2].shape) != (window.n_out,):
        return False
    return len(node.inputs[2].outputs) == 1  # what others read, too, cannot be trained in parts


def _pointwise(node: gs.Node, window: _Window, tap: int) -> ImplantForm:
    weight = node.inputs[1]

    def weight_shapes(rank: int) -> tuple[Shape, ...]:
        ones = (1,) * window.n_axes
        return (window.n_out - rank, window.width, *window.kernel), (rank, window.width, *ones)

    def reorder(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        shapes = weight_shapes(arrays[1].shape[1])
        return tuple(array.reshape(shape) for array, shape in zip(arrays, shapes, strict=True))

    return ImplantForm(
        kind="pointwise",
        taps=(prod(window.kernel), 1),
        tap=tap,
        weight_names=(weight.name + FULL, weight.name + POINTWISE),
        rank_axis=0,
        weight_shapes=weight_shapes,
        n_first=lambda x, y: _n_positions(y),
        n_second=_n_positions,
        reorder=reorder,
        build=lambda node, weights, activation: _build_pointwise(
            node, weights, activation, attributes=_pointwise_attributes(window, tap)
        ),
    )


def _build_pointwise(
    node: gs.Node,
    weights: Sequence[gs.Constant],
    activation: gs.Node | None,
    *,
    attributes: Mapping[str, Any],
) -> list[gs.Node]:
    """Conv and 1x1 Conv on the same input, each with its part of the bias, and a Concat of both.

    An activation after them is computed on each part, so that onnxruntime still makes it part of the Conv.
    """
    x, joined = node.inputs[0], node.outputs[0]
    pointwise = gs.Node("Conv", node.name + POINTWISE, attrs=dict(attributes), inputs=[x, weights[1]])
    node.inputs[1] = weights[0]
    if len(node.inputs) > 2 and node.inputs[2].name:
        bias, n_full = node.inputs[2], weights[0].shape[0]
        node.inputs[2] = gs.Constant(bias.name + FULL, bias.values[:n_full].copy())
        pointwise.inputs.append(gs.Constant(bias.name + POINTWISE, bias.values[n_full:].copy()))
    nodes = [node, pointwise]
    _split_output(joined, nodes)
    if activation is not None:
        joined = activation.outputs[0]
        copy = gs.Node(activation.op, activation.name + POINTWISE, attrs=dict(activation.attrs))
        copy.inputs = [pointwise.outputs[0], *activation.inputs[1:]]
        activation.inputs[0] = node.outputs[0]
        _split_output(joined, [activation, copy])
        nodes += [activation, copy]
    parts = [part.outputs[0] for part in nodes[-2:]]
    concat = gs.Node("Concat", node.name + JOINED, attrs={"axis": 1}, inputs=parts, outputs=[joined])
    return [*nodes, concat]


def _split_output(joined: gs.Variable, nodes: Sequence[gs.Node]) -> None:
    """Let two nodes write the parts of what was one tensor."""
    for part, suffix in zip(nodes, (FULL, POINTWISE), strict=True):
        part.outputs = [gs.Variable(joined.name + suffix, joined.dtype)]
