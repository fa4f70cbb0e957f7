"""How channels pass through products: what MatMul and Einsum share.

Each axis of each operand has a label. A label that is not in the result is *contracted*: what meets there is
joined, and read. A label that several operands have and that is in the result runs in *parallel* (batches,
the heads of attention): what meets there is joined and goes on. Any other label of an activation goes on as
it is, and a label that only a weight has is *made* by it: it gets new ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

if TYPE_CHECKING:
    from hap_onnx.coupling.channels import Flow, Ids

Labels = tuple[str, ...]


def flow_product(node: gs.Node, flow: Flow, operands: Sequence[Labels], result: Labels) -> None:
    """Let channels flow through the product of all inputs of a node.

    ``operands`` holds the labels of each input's axes, ``result`` those of the output; no tensor has a label
    twice.
    """
    out = node.outputs[0]
    carried: dict[str, Ids] = {}
    for tensor, labels in zip(node.inputs, operands, strict=True):
        found = flow.ids(tensor)
        if found is None:
            continue
        label = labels[found.axis]
        if label not in carried:
            carried[label] = found.ids
        elif len(carried[label]) == len(found.ids):
            flow.join(carried[label], found.ids)
        else:
            for ids in (carried[label], found.ids):
                flow.freeze(ids, node, f"{node.op} spreads one channel over several")
    sound = [label for label, ids in carried.items() if _is_sound(node, flow, label, ids, operands, result)]
    going_on = sorted((label for label in sound if label in result), key=result.index)
    # A tensor can lose slices along one axis only: the first one, where attention has its heads.
    for label in going_on[1:]:
        flow.freeze(carried[label], node, f"the output of {node.op} has other channels on another axis")
    for label in sound:
        if label in going_on[1:]:
            continue
        contracted = label not in result
        carriers: list[int] = []
        for index, tensor, axis in _holders(node, label, operands):
            if flow.ids(tensor) is not None:
                carriers.append(index)
            elif flow.shape(tensor)[axis] > 1:
                flow.bind(tensor, axis, carried[label], "consumer" if contracted else "follower", node)
        if contracted:
            flow.read(node, carriers[0])  # a product is gone when one factor is
        elif len(carriers) > 1:
            flow.heads.append(carried[label])
    _make(node, flow, operands, result, is_taken=bool(going_on))
    if going_on:
        flow.put(out, result.index(going_on[0]), carried[going_on[0]])


def _holders(node: gs.Node, label: str, operands: Sequence[Labels]) -> Iterator[tuple[int, gs.Tensor, int]]:
    """Yield (input, tensor, axis) of each operand that has a label."""
    for index, (tensor, labels) in enumerate(zip(node.inputs, operands, strict=True)):
        if label in labels:
            yield index, tensor, labels.index(label)


def _is_sound(
    node: gs.Node, flow: Flow, label: str, ids: Ids, operands: Sequence[Labels], result: Labels
) -> bool:
    """Say whether everything that meets the ids along a label can go with them; freeze them if not."""
    for _, tensor, axis in _holders(node, label, operands):
        size = flow.shape(tensor)[axis]
        found = flow.ids(tensor)
        if size == 1 < len(ids) and label in result:
            continue  # one for all
        if size != len(ids):
            flow.freeze(ids, node, f"{node.op} spreads one channel over several")
            return False
        if isinstance(tensor, gs.Constant) or (found is not None and found.axis == axis):
            continue
        flow.freeze(ids, node, f"{node.op} joins them with '{tensor.name}', whose channels must stay")
        flow.wish(tensor, size)
        return False
    if label not in result and len(list(_holders(node, label, operands))) == 1:
        flow.freeze(ids, node, f"{node.op} adds up the channels")
        return False
    return True


def _make(node: gs.Node, flow: Flow, operands: Sequence[Labels], result: Labels, *, is_taken: bool) -> None:
    """Make ids for what the weight alone has; none of it can go if the output has other channels."""
    weights = [
        index
        for index, tensor in enumerate(node.inputs)
        if isinstance(tensor, gs.Constant) and flow.ids(tensor) is None
    ]
    if not weights:
        return
    weight = node.inputs[weights[-1]]
    labels = operands[weights[-1]]
    made = [
        axis
        for axis, label in enumerate(labels)
        if label in result
        and all(
            flow.shape(tensor)[other] == 1
            for index, tensor, other in _holders(node, label, operands)
            if index != weights[-1]
        )
    ]
    made = [axis for axis in made if weight.shape[axis] > 1] or made[-1:]
    if not made:
        return
    # Made in either case, so that ids keep their numbers from pass to pass.
    shape = [weight.shape[axis] for axis in made]
    grid = flow.fresh(prod(shape)).reshape(shape)
    if is_taken:
        return
    chosen, ids = flow.merge(node, grid)
    flow.bind(weight, made[chosen], ids, "producer", node)
    flow.put(node.outputs[0], result.index(labels[made[chosen]]), ids)
