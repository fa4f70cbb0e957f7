"""What a layer should give: the original's output, less what others have added, within what matters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod

import numpy as np
import torch
from torch import Tensor

from hap_onnx.errors import SurgeryError
from hap_onnx.ops.elementwise import clip_bounds
from hap_onnx.ops.linear import LinearForm
from hap_onnx.refit.pair import Pair, is_addition_step

Bounds = tuple[float, float]
"""Beyond these the values of a tensor do not matter."""


@dataclass(frozen=True)
class Link:
    """An addition that is the only reader of what is fitted, with the other operands in both models."""

    output: str
    originals: tuple[str, ...]
    operands: tuple[str, ...]


def find_links(pair: Pair, name: str) -> list[Link]:
    """Follow a tensor through additions as long as their other operands are there in both models."""
    links: list[Link] = []
    shape = pair.original_value(name, 0).shape
    while True:
        readers = pair.readers.get(name, [])
        if len(readers) != 1 or readers[0] is None:
            return links
        step, index = readers[0]
        before = pair.original_steps.get(step.name)
        if (
            not is_addition_step(step)
            or before is None
            or before.op_type != step.op_type
            or len(before.inputs) != len(step.inputs)
            or (before.inputs[index], before.outputs) != (name, step.outputs)
        ):
            return links
        originals, operands = (names[:index] + names[index + 1 :] for names in (before.inputs, step.inputs))
        if not all(map(pair.has_original, originals)) or not all(map(pair.has, operands)):
            return links
        shapes = [pair.original_value(original, 0).shape for original in originals]
        if torch.broadcast_shapes(shape, *shapes) != shape:
            return links
        name = step.outputs[0]
        links.append(Link(name, originals, operands))


def find_bounds(pair: Pair, name: str) -> Bounds | None:
    """Return the bounds beyond which the values of a tensor do not matter, None if they always do."""
    readers = pair.readers.get(name, [])
    found = {None if reader is None else clip_bounds(pair.nodes[reader[0].name]) for reader in readers}
    bounds = found.pop() if len(found) == 1 else None
    return bounds if bounds != (-inf, inf) else None


def find_target(
    pair: Pair, name: str, links: Sequence[Link], batch: int, *, without: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the original's sum at the channels that are left, and what the compressed model adds to it.

    ``without`` is an operand that is fitted itself.
    """
    total = pair.original_value(name, batch)
    added: Tensor | None = None
    for link in links:
        for original in link.originals:
            total = total + pair.original_value(original, batch)
        for operand in link.operands:
            if operand != without:
                value = pair.value(operand, batch)
                added = value if added is None else added + value
    left = pair.kept.get(name)
    if left is not None and len(left.positions) != total.shape[left.axis]:
        positions = torch.from_numpy(np.array(left.positions)).to(total.device)
        total = total.index_select(left.axis, positions)
    try:
        return total, None if added is None else added.expand_as(total)
    except RuntimeError as error:
        raise SurgeryError(
            f"refit: what is added to '{name}' has shape {list(added.shape) if added is not None else []}, "
            f"the original's channels that are left give {list(total.shape)}"
        ) from error


def find_added_bias(pair: Pair, link: Link, form: LinearForm, *, n_outputs: int, name: str) -> str | None:
    """Return the one operand of the first addition that is the bias of a contraction without one."""
    ndim = pair.original_value(name, 0).ndim
    for operand in link.operands:
        if not pair.owned(operand):
            continue
        shape = tuple(pair.parameters[operand].shape)
        whole = [1] * (ndim - len(shape)) + list(shape)
        if prod(shape) == n_outputs and whole[form.channel_axis] == n_outputs:
            return operand
    return None
