"""Implants as ONNX nodes: what can take the place of a contraction, and how its weights lie.

An implant is two cheaper nodes in place of one. For ``lowrank`` and ``spatial`` they follow each other, for
``pointwise`` they stand side by side (see ``implants.factors`` for the numbers). A rule beside each operator
says what is offered for a node: only what computes exactly the product with the dense matrix that the
implant stands for, whatever the input. The rules are in ``conv_implants`` and ``matmul``.

The first of two factors has no bias, so that the zeros which the second one pads with are the same zeros
that the original padded its input with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from torch import Tensor

from hap_onnx.ops.linear import linear_form
from hap_onnx.ops.registry import find_implants

FIRST, SECOND = "_hap_first", "_hap_second"
"""What the names of the two factors end in; the second node keeps the name of the node."""
FULL, POINTWISE, JOINED = "_hap_full", "_hap_pointwise", "_hap_concat"
"""What the names of the parts side by side end in; the node with the full kernels keeps its name."""

_ENDINGS = re.compile(rf"(?:(?:{'|'.join((FIRST, SECOND, FULL, POINTWISE, JOINED))})(?:_\d+)?)+$")

Shape = tuple[int, ...]
_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class ImplantForm:
    """One kind of implant for one node.

    With g conv groups, O outputs and F features per conv group:

    * ``taps``: how many taps of the kernel the first and the second node cover (T1, T2).
    * ``tap``: the tap of the full kernel at which the kernels of ``pointwise`` sit, else None.
    * ``weight_names``: the two new initializers.
    * ``weight_shapes(rank)``: their shapes. ``rank`` is per conv group; for ``pointwise`` it is the number
      of output channels, the last ones, that become pointwise.
    * ``rank_axis``: the axis of the second one whose length is the rank.
    * ``n_first(x, y)``, ``n_second(y)``: output positions of each node, batch included, from the shapes of
      the node's data input and output. Times the elements of the weight, these are the
      multiply-accumulates.
    * ``reorder``: arrays as ``implants.factors`` makes them -> arrays in the order of the new initializers
      (see ``to_weights``).
    * ``build(node, weights, activation)``: edits the node and returns all nodes that stand in its place, in
      order. ``activation`` is the only reader of the node's output if it can be computed on parts, else
      None.
    """

    kind: str
    taps: tuple[int, int]
    tap: int | None
    weight_names: tuple[str, str]
    rank_axis: int
    weight_shapes: Callable[[int], tuple[Shape, ...]]
    n_first: Callable[[Shape, Shape], int]
    n_second: Callable[[Shape], int]
    reorder: Callable[[Sequence[np.ndarray]], tuple[np.ndarray, ...]]
    build: Callable[[gs.Node, Sequence[gs.Constant], gs.Node | None], list[gs.Node]]

    def to_weights(self, arrays: Sequence[Tensor | np.ndarray]) -> tuple[np.ndarray, ...]:
        """Bring the arrays of an implant into the layout of its initializers.

        For ``lowrank`` and ``spatial``: first [g, rank, C * T1] and second [g, O, rank * T2]; for
        ``pointwise``: full [1, O - rank, F] and pointwise [1, rank, C].
        """
        plain = [
            array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
            for array in arrays
        ]
        return tuple(np.ascontiguousarray(array) for array in self.reorder(plain))


def layer_of(name: str) -> str:
    """Return the name that a node or an initializer of an implant had before: that of the layer's own."""
    return _ENDINGS.sub("", name)


def is_of_implant(weight: gs.Tensor) -> bool:
    """Whether an initializer is one of those that an implant has in place of a layer's weight."""
    return layer_of(weight.name) != weight.name


def implant_forms(node: gs.Node) -> tuple[ImplantForm, ...]:
    """Return the implants that can replace a node exactly; () if there are none.

    The weight must be a float initializer that nothing else reads.
    """
    rule = find_implants(node.op, domain=node.domain or "")
    form = linear_form(node) if rule is not None else None
    if rule is None or form is None:
        return ()
    weight = node.inputs[form.weight_index]
    owned = len(weight.outputs) == 1 and weight.values.dtype.name in _FLOATS and weight.values.size > 0
    found: tuple[ImplantForm, ...] = rule(node) if owned else ()
    return found


def factor_names(weight: gs.Constant) -> tuple[str, str]:
    """Name the initializers of two factors."""
    return weight.name + FIRST, weight.name + SECOND


def build_factors(
    node: gs.Node,
    weights: Sequence[gs.Constant],
    *,
    op_type: str,
    first: Mapping[str, Any],
    second: Mapping[str, Any],
) -> list[gs.Node]:
    """Put a node without bias before ``node``, which keeps name, outputs and bias; both get attributes."""
    out = node.outputs[0]
    between = gs.Variable(out.name + FIRST, out.dtype)
    before = gs.Node(
        op_type,
        node.name + FIRST,
        attrs=dict(first),
        inputs=[node.inputs[0], weights[0]],
        outputs=[between],
    )
    node.attrs = dict(second)
    node.inputs[0], node.inputs[1] = between, weights[1]
    return [before, node]
