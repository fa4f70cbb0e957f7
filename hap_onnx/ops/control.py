"""Control flow.

The graphs inside a node arrive as functions. Where torch lacks a part of them, onnxruntime runs the node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from hap_onnx.ops.arguments import as_int
from hap_onnx.ops.registry import flow_op, run_op

if TYPE_CHECKING:
    from hap_onnx.coupling.channels import Flow


class Subgraph(Protocol):
    """A graph inside a node, as a function of its inputs; what it reads from outside is bound to it."""

    n_outputs: int

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]: ...


@run_op("If")
def If(condition: Tensor, *, then_branch: Subgraph, else_branch: Subgraph) -> tuple[Tensor, ...]:
    """The outputs of one of two graphs."""
    return then_branch() if bool(condition) else else_branch()


@run_op("Loop")
def Loop(
    trip_count: Tensor | None = None, condition: Tensor | None = None, *states: Tensor, body: Subgraph
) -> tuple[Tensor, ...]:
    """Run ``body(step, condition, *states) -> (condition, *states, *rows)`` while the condition holds.

    The outputs are the last states and the rows of all steps, stacked.
    """
    limit = None if trip_count is None else as_int(trip_count)
    runs = condition is None or bool(condition)
    n_states = len(states)
    rows: list[Sequence[Tensor]] = []
    while runs and (limit is None or len(rows) < limit):
        condition, *results = body(torch.tensor(len(rows)), torch.tensor(True), *states)
        runs = bool(condition)
        states = tuple(results[:n_states])
        rows.append(results[n_states:])
    if not rows and body.n_outputs > 1 + n_states:
        raise NotImplementedError("a Loop that does not run once, and makes rows of unknown shape")
    return *states, *(torch.stack(row) for row in zip(*rows, strict=True))


@run_op("Scan", since=9)
def Scan(
    *operands: Tensor,
    body: Subgraph,
    num_scan_inputs: int,
    scan_input_axes: Sequence[int] | None = None,
    scan_input_directions: Sequence[int] | None = None,
    scan_output_axes: Sequence[int] | None = None,
    scan_output_directions: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Run ``body(*states, *rows) -> (*states, *rows)`` over slices of the last operands.

    The outputs are the last states and the rows of all steps, stacked; direction 1 is backwards.
    """
    n_states = len(operands) - num_scan_inputs
    states, inputs = operands[:n_states], []
    for index, operand in enumerate(operands[n_states:]):
        slices = operand.unbind(scan_input_axes[index] if scan_input_axes else 0)
        backwards = scan_input_directions is not None and scan_input_directions[index]
        inputs.append(slices[::-1] if backwards else slices)
    rows = []
    for step in zip(*inputs, strict=True):
        results = body(*states, *step)
        states = results[:n_states]
        rows.append(results[n_states:])
    if not rows:
        raise NotImplementedError("a Scan over nothing, whose rows are of unknown shape")
    outputs = []
    for index, column in enumerate(zip(*rows, strict=True)):
        backwards = scan_output_directions is not None and scan_output_directions[index]
        axis = scan_output_axes[index] if scan_output_axes else 0
        outputs.append(torch.stack(column[::-1] if backwards else column, axis))
    return *states, *outputs


@flow_op("If", "Loop", "Scan")
def _flow_control(node: gs.Node, flow: Flow) -> None:
    for tensor in node.inputs:
        flow.freeze(flow.ids(tensor), node, f"{node.op} decides at run time what reads them")
