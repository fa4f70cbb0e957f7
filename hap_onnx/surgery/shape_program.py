"""The small integer programs in which exporters compute shapes: evaluate them, and find what to change.

A dynamic model computes the target of a Reshape from the sizes of tensors and from numbers that were written
into it: ``Concat(batch, length * 4, 64)``. When channels go, the sizes follow by themselves and the numbers
have to. Which number that is follows from evaluating the program: change it, and the target comes out right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray

from hap_onnx.ops.concat import is_concat
from hap_onnx.ops.elementwise import is_elementwise
from hap_onnx.ops.shape import asks_shape_only
from hap_onnx.twin.calls import call_node

MAX_NUMBERS = 10_000
_MAX_NODES = 100

Numbers = NDArray[np.generic]
ShapeOf = Callable[[gs.Tensor], "tuple[int, ...] | None"]
Place = tuple[str, int, int]
"""A number of a constant, where it is read: (node, input, flat position); the target itself is ("", 0)."""
Edits = Mapping[Place, int]
"""New values of single numbers, by place: other readers of the same constant keep theirs."""


def evaluate(
    tensor: gs.Tensor, shape_of: ShapeOf, *, opset: int, edits: Edits | None = None
) -> Numbers | None:
    """Compute a tensor from shapes and constants; None if it depends on anything else, or is large."""
    found: dict[str, torch.Tensor | None] = {}
    for node in _program(tensor):
        inputs: list[torch.Tensor | None] = []
        for index, read in enumerate(node.inputs):
            is_constant = isinstance(read, gs.Constant)
            value = _constant(read, edits, node.name, index) if is_constant else found.get(read.name)
            if asks_shape_only(node):
                shape = shape_of(read)
                value = None if shape is None else torch.empty(shape, device="meta")
            if value is None and read.name:
                break
            inputs.append(value)
        else:
            try:
                outputs = call_node(node, inputs, opset=opset)
            except (RuntimeError, ValueError, IndexError, NotImplementedError):
                return None
            for out, result in zip(node.outputs, outputs, strict=False):
                found[out.name] = result if result.numel() <= MAX_NUMBERS else None
    value = _constant(tensor, edits, "", 0) if isinstance(tensor, gs.Constant) else found.get(tensor.name)
    return None if value is None else value.numpy()


def find_edits(
    target: gs.Tensor,
    wanted: Sequence[int],
    complete: Callable[[Sequence[int]], Sequence[int]],
    shape_of: ShapeOf,
    *,
    opset: int,
    ratios: Iterable[tuple[int, int]] = (),
) -> Edits | None:
    """Find numbers to change so that a program yields ``wanted``; {} if it does already, None if none do.

    ``complete`` turns what the program yields into what it means (a Reshape infers -1). ``ratios`` are (new,
    old) sizes that changed: a program may divide by the old one.
    """
    ratios = set(ratios)
    edits: dict[Place, int] = {}

    def wrong(trial: Edits) -> list[tuple[int, int]] | None:
        value = evaluate(target, shape_of, opset=opset, edits=trial)
        if value is None:
            return None
        have = complete([int(n) for n in np.ravel(value)])
        if len(have) != len(wanted):
            return None
        return [(a, b) for a, b in zip(have, wanted, strict=True) if a != b]

    left = wrong(edits)
    while left:
        for key, trial_left in _trials(target, left, edits, wrong, ratios):
            if trial_left is not None and len(trial_left) < len(left):
                edits[key[0]] = key[1]
                left = trial_left
                break
        else:
            return None
    return None if left is None else edits


def _trials(
    target: gs.Tensor,
    left: Sequence[tuple[int, int]],
    edits: Edits,
    wrong: Callable[[Edits], list[tuple[int, int]] | None],
    ratios: set[tuple[int, int]],
) -> Iterator[tuple[tuple[Place, int], list[tuple[int, int]] | None]]:
    """Yield ((number, new value), what is still wrong then), the numbers nearest to the target first."""
    for node, index, constant in _numbers_behind(target):
        for position, old in enumerate(np.ravel(constant.values).tolist()):
            key = (node, index, position)
            if key in edits or old in (0, -1):
                continue
            # A factor of the size, or a divisor of it.
            wanted = [(want, have) for have, want in left] + [(have, want) for have, want in left]
            for above, below in dict.fromkeys([*wanted, *sorted(ratios)]):
                if below > 0 and old * above % below == 0 and old * above // below not in (0, old):
                    value = old * above // below
                    yield (key, value), wrong({**edits, key: value})


def replace_numbers(
    target: gs.Tensor, edits: Edits, name: Callable[[str], str], insert: Callable[[gs.Node, gs.Node], None]
) -> gs.Tensor:
    """Return a copy of a tensor's program with other numbers; what does not change is shared.

    ``insert(node, after)`` takes each new node.
    """
    if isinstance(target, gs.Constant):
        return gs.Constant(name(target.name), _edited(target, edits, "", 0))
    places = {place[:2] for place in edits}
    copies: dict[str, gs.Tensor] = {}
    for node in _program(target):
        inputs = [
            gs.Constant(name(tensor.name), _edited(tensor, edits, node.name, index))
            if (node.name, index) in places
            else copies.get(tensor.name, tensor)
            for index, tensor in enumerate(node.inputs)
        ]
        if all(new is old for new, old in zip(inputs, node.inputs, strict=True)):
            continue
        own = gs.Node(node.op, name(node.name), dict(node.attrs), inputs, domain=node.domain)
        own.outputs = [gs.Variable(name(out.name), out.dtype, out.shape) for out in node.outputs]
        copies.update({old.name: new for old, new in zip(node.outputs, own.outputs, strict=True)})
        insert(own, node)
    return copies[target.name]


def _edited(tensor: gs.Constant, edits: Edits, node: str, index: int) -> Numbers:
    values = np.array(tensor.values)
    for (reader, position_of_input, position), value in edits.items():
        if (reader, position_of_input) == (node, index):
            values.reshape(-1)[position] = value
    return values


def _constant(tensor: gs.Constant, edits: Edits | None, node: str, index: int) -> torch.Tensor | None:
    if tensor.values.size > MAX_NUMBERS:
        return None
    values = _edited(tensor, edits or {}, node, index)
    if values.dtype.kind == "f":
        values = values.astype(np.float32)
    return torch.from_numpy(values) if values.dtype.kind in "fib" else None


def _program(tensor: gs.Tensor) -> list[gs.Node]:
    """The nodes that compute a tensor, each after what it reads; shapes are given, not computed."""
    order: list[gs.Node] = []
    done: set[int] = set()
    stack = [(node, False) for node in tensor.inputs]
    while stack and len(done) <= _MAX_NODES:
        node, is_ready = stack.pop()
        if is_ready:
            order.append(node)
        elif id(node) not in done:
            done.add(id(node))
            stack.append((node, True))
            if not asks_shape_only(node):
                stack += [(behind, False) for read in node.inputs for behind in read.inputs]
    return order


def _numbers_behind(target: gs.Tensor) -> list[tuple[str, int, gs.Constant]]:
    """(reader, input, constant) of constants whose numbers arrive in the target.

    Those that only say where to look for numbers are not among them.
    """
    found: list[tuple[str, int, gs.Constant]] = []
    queue = [("", 0, target)]
    seen: set[tuple[str, int]] = set()
    while queue and len(seen) <= _MAX_NODES:
        reader, index, tensor = queue.pop(0)
        if (reader, index) in seen:
            continue
        seen.add((reader, index))
        if isinstance(tensor, gs.Constant):
            if np.asarray(tensor.values).dtype.kind == "i" and tensor.values.size <= MAX_NUMBERS:
                found.append((reader, index, tensor))
            continue
        for node in tensor.inputs:
            if asks_shape_only(node):
                continue
            all_count = is_concat(node) or is_elementwise(node.op, domain=node.domain or "")
            queue += [
                (node.name, i, read)
                for i, read in enumerate(node.inputs)
                if read.name and (all_count or i == 0)
            ]
    return found
