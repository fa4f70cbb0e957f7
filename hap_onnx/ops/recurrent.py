"""Recurrent layers: RNN, GRU and LSTM, step by step, so that they can be differentiated twice.

Shapes, with T steps, B samples, D directions, I inputs, H hidden units and G gates:
x [T, B, I], w [D, G * H, I], r [D, G * H, H], bias [D, 2 * G * H], states [D, B, H], y [T, D, B, H];
with ``layout=1`` the samples come first. A state of one sample serves a batch of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from torch import Tensor

from hap_onnx.ops.index import ReverseSequence
from hap_onnx.ops.registry import flow_op, learn_inputs, macs_op, run_op

if TYPE_CHECKING:
    from hap_onnx.coupling.channels import Flow

learn_inputs("RNN", "GRU", inputs=(1, 2, 3))
learn_inputs("LSTM", inputs=(1, 2, 3, 7))

Activation = Callable[[Tensor], Tensor]
Cell = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]
"""(what the gates get from the input at one step [B, G * H], states) -> new states, the output first."""

# --- Activations ---

_DISPUTED = {"affine": 2, "scaledtanh": 2, "thresholdedrelu": 1}
"""How many parameters these activations have: onnxruntime has other defaults than the specification."""
# By lower-case name: the function of x, alpha and beta, and the defaults of those it uses.
_ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], float | None, float | None]] = {
    "affine": (lambda x, alpha, beta: alpha * x + beta, 1.0, 0.0),
    "elu": (lambda x, alpha, beta: F.elu(x, alpha), 1.0, None),
    "hardsigmoid": (lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1), 0.2, 0.5),
    "leakyrelu": (lambda x, alpha, beta: F.leaky_relu(x, alpha), 0.01, None),
    "relu": (lambda x, alpha, beta: torch.relu(x), None, None),
    "scaledtanh": (lambda x, alpha, beta: alpha * torch.tanh(beta * x), 1.0, 1.0),
    "sigmoid": (lambda x, alpha, beta: torch.sigmoid(x), None, None),
    "softplus": (lambda x, alpha, beta: F.softplus(x), None, None),
    "softsign": (lambda x, alpha, beta: F.softsign(x), None, None),
    "tanh": (lambda x, alpha, beta: torch.tanh(x), None, None),
    "thresholdedrelu": (lambda x, alpha, beta: torch.where(x >= alpha, x, torch.zeros_like(x)), 1.0, None),
}


def _take(given: list[float], default: float | None) -> float:
    """Return the next given parameter for an activation that has one, else its default."""
    if default is None:
        return 0.0
    return given.pop(0) if given else default


def _activations(
    names: Sequence[str], alphas: Sequence[float] | None, betas: Sequence[float] | None
) -> list[Activation]:
    """Return the activations by name; those that have parameters take the next given ones."""
    left_alphas, left_betas = list(alphas or ()), list(betas or ())
    found: list[Activation] = []
    for name in names:
        if name.lower() not in _ACTIVATIONS:
            raise NotImplementedError(f"the activation {name!r} in a recurrent layer")
        if name.lower() in _DISPUTED and len(left_alphas) + len(left_betas) < _DISPUTED[name.lower()]:
            raise NotImplementedError(f"the activation {name!r} without its parameters")
        function, alpha, beta = _ACTIVATIONS[name.lower()]
        found.append(partial(function, alpha=_take(left_alphas, alpha), beta=_take(left_betas, beta)))
    return found


def _clipped(activation: Activation, bound: float | None) -> Activation:
    """Return an activation of what lies between -bound and bound."""
    return activation if not bound else lambda x: activation(x.clamp(-bound, bound))


# --- Steps and directions ---


def _reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverse x [T, B, ...] in time, of each sample only the steps that it has."""
    return x.flip(0) if lengths is None else ReverseSequence(x, lengths, time_axis=0, batch_axis=1)


def _run_steps(
    gates: Tensor, states: tuple[Tensor, ...], cell: Cell, lengths: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a cell over gates [T, B, G * H]; returns (outputs [T, B, H], the states after the last step)."""
    outputs = []
    for step in range(gates.shape[0]):
        new = cell(gates[step], states)
        output = new[0]
        if lengths is not None:
            runs = (step < lengths)[:, None]
            new = tuple(torch.where(runs, after, before) for after, before in zip(new, states, strict=True))
            output = torch.where(runs, output, torch.zeros_like(output))
        states = new
        outputs.append(output)
    return (torch.stack(outputs) if outputs else gates.new_zeros(0, *states[0].shape)), states


def _run_layer(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None,
    sequence_lens: Tensor | None,
    initial: Sequence[Tensor | None],
    *,
    direction: str,
    layout: int,
    make_cell: Callable[[int, Tensor, Tensor], Cell],
) -> tuple[Tensor, ...]:
    """Run all directions; ``make_cell(direction, r, bias of r)`` is the cell of one. Returns (y, *states)."""
    if layout:
        x = x.transpose(0, 1)
        initial = [None if state is None else state.transpose(0, 1) for state in initial]
    n_directions, width, hidden = r.shape
    if n_directions != (2 if direction == "bidirectional" else 1):
        raise ValueError(f"weights for {n_directions} direction(s), but the direction is {direction!r}")
    lengths = None if sequence_lens is None else sequence_lens.to(x.device, torch.int64)
    bias = x.new_zeros(n_directions, 2 * width) if bias is None else bias
    outputs, lasts = [], []
    for index in range(n_directions):
        backwards = direction == "reverse" or index == 1
        gates = (_reverse(x, lengths) if backwards else x) @ w[index].T + bias[index, :width]
        states = tuple(
            x.new_zeros(x.shape[1], hidden) if state is None else state[index].expand(x.shape[1], hidden)
            for state in initial
        )
        y, last = _run_steps(gates, states, make_cell(index, r[index], bias[index, width:]), lengths)
        outputs.append(_reverse(y, lengths) if backwards else y)
        lasts.append(last)
    stacked = torch.stack(outputs, 1)
    final = [torch.stack(states) for states in zip(*lasts, strict=True)]
    if layout:
        return stacked.permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in final)
    return stacked, *final


def _per_direction(functions: Sequence[Activation], index: int, count: int) -> Sequence[Activation]:
    """Return the ``count`` activations of one direction; if no more are given, the first serve both."""
    own = functions[index * count : (index + 1) * count]
    return own if len(own) == count else functions[:count]


# --- RNN ---


@run_op("RNN")
def RNN(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] = ("Tanh", "Tanh"),
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    output_sequence: int = 0,
) -> tuple[Tensor, ...]:
    """h = f(x W^T + h R^T + biases) at each step."""
    functions = _activations(activations, activation_alpha, activation_beta)

    def make_cell(index: int, recurrence: Tensor, r_bias: Tensor) -> Cell:
        activate = _clipped(_per_direction(functions, index, 1)[0], clip)
        return lambda gates, states: (activate(gates + states[0] @ recurrence.T + r_bias),)

    return _run_layer(
        x, w, r, bias, sequence_lens, [initial_h], direction=direction, layout=layout, make_cell=make_cell
    )


# --- GRU ---


@run_op("GRU")
def GRU(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] = ("Sigmoid", "Tanh"),
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
    output_sequence: int = 0,
) -> tuple[Tensor, ...]:
    """Gated recurrent units; gates in the order update, reset, hidden."""
    functions = _activations(activations, activation_alpha, activation_beta)
    hidden = r.shape[2]

    def make_cell(index: int, recurrence: Tensor, r_bias: Tensor) -> Cell:
        f, g = (_clipped(function, clip) for function in _per_direction(functions, index, 2))
        of_gates, of_hidden = recurrence[: 2 * hidden].T, recurrence[2 * hidden :].T
        gate_bias, hidden_bias = r_bias[: 2 * hidden], r_bias[2 * hidden :]

        def cell(gates: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (h,) = states
            update, reset = f(gates[:, : 2 * hidden] + h @ of_gates + gate_bias).chunk(2, 1)
            if linear_before_reset:
                recurrent = reset * (h @ of_hidden + hidden_bias)
            else:
                recurrent = (reset * h) @ of_hidden + hidden_bias
            candidate = g(gates[:, 2 * hidden :] + recurrent)
            return ((1 - update) * candidate + update * h,)

        return cell

    return _run_layer(
        x, w, r, bias, sequence_lens, [initial_h], direction=direction, layout=layout, make_cell=make_cell
    )


# --- LSTM ---


@run_op("LSTM")
def LSTM(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] = ("Sigmoid", "Tanh", "Tanh"),
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
    output_sequence: int = 0,
) -> tuple[Tensor, ...]:
    """Long short-term memory; gates in the order input, output, forget, cell; peepholes [D, 3 * H]."""
    functions = _activations(activations, activation_alpha, activation_beta)
    hidden = r.shape[2]

    def make_cell(index: int, recurrence: Tensor, r_bias: Tensor) -> Cell:
        f, g, h_of = _per_direction(functions, index, 3)
        f, g = _clipped(f, clip), _clipped(g, clip)  # not the cell: so onnxruntime does
        if peepholes is None:
            peep_i = peep_o = peep_f = recurrence.new_zeros(hidden)
        else:
            peep_i, peep_o, peep_f = peepholes[index].chunk(3)

        def cell(gates: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            h, c = states
            into, out, forget, value = (gates + h @ recurrence.T + r_bias).chunk(4, 1)
            into = f(into + peep_i * c)
            forget = 1 - into if input_forget else f(forget + peep_f * c)
            c = forget * c + into * g(value)
            return f(out + peep_o * c) * h_of(c), c

        return cell

    return _run_layer(
        x, w, r, bias, sequence_lens, [initial_h, initial_c], direction=direction, layout=layout,
        make_cell=make_cell,
    )  # fmt: skip


@macs_op("RNN", "GRU", "LSTM")
def _macs_recurrent(
    node: gs.Node, input_shapes: list[tuple[int, ...] | None], output_shapes: list[tuple[int, ...]]
) -> int:
    x, w, r = input_shapes[:3]
    assert x is not None
    assert w is not None
    assert r is not None
    return prod(x[:2]) * (prod(w) + prod(r))


@flow_op("LSTM", "GRU", "RNN")
def _flow_recurrent(node: gs.Node, flow: Flow) -> None:
    for tensor in node.inputs:
        flow.freeze(flow.ids(tensor), node, f"{node.op} reads them at every step: its weights stay whole")
