"""Recurrent layers against onnxruntime, and second derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import gradgradcheck

from hap_onnx.ops.recurrent import GRU, LSTM, RNN, _macs_recurrent
from tests.helpers import check_node, rand

STEPS, BATCH, INPUTS, HIDDEN = 5, 3, 4, 2
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def _weights(op_type: str, n_directions: int) -> tuple[np.ndarray, ...]:
    """Return w, r and bias."""
    width = GATES[op_type] * HIDDEN
    return (
        rand(n_directions, width, INPUTS, seed=1),
        rand(n_directions, width, HIDDEN, seed=2),
        rand(n_directions, 2 * width, seed=3),
    )


def _check(op_type: str, *optional: np.ndarray | None, direction: str = "forward", **attributes: Any) -> None:
    """Compare all outputs of a layer; ``optional`` inputs follow x, w and r."""
    n_directions = 2 if direction == "bidirectional" else 1
    w, r, _ = _weights(op_type, n_directions)
    check_node(
        op_type, rand(STEPS, BATCH, INPUTS), w, r, *optional, n_outputs=3 if op_type == "LSTM" else 2,
        hidden_size=HIDDEN, direction=direction, tolerance=1e-4, **attributes,
    )  # fmt: skip


@pytest.mark.parametrize("op_type", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("lengths", [None, [5, 2, 4]])
@pytest.mark.parametrize("opset", [9, 22])
def test_layer_equals_onnxruntime(
    op_type: str, direction: str, lengths: list[int] | None, opset: int
) -> None:
    n_directions = 2 if direction == "bidirectional" else 1
    bias = _weights(op_type, n_directions)[2]
    state = rand(n_directions, BATCH, HIDDEN, seed=4)
    given = None if lengths is None else np.array(lengths, np.int32)
    _check(op_type, bias, given, state, direction=direction, opset=opset)


@pytest.mark.parametrize("op_type", ["RNN", "GRU", "LSTM"])
def test_layer_without_optional_inputs_equals_onnxruntime(op_type: str) -> None:
    _check(op_type)


def test_gru_that_resets_after_the_product_equals_onnxruntime() -> None:
    _check("GRU", _weights("GRU", 1)[2], linear_before_reset=1)
    _check("GRU", _weights("GRU", 2)[2], linear_before_reset=1, direction="bidirectional")


@pytest.mark.parametrize("input_forget", [0, 1])
def test_lstm_with_peepholes_and_states_equals_onnxruntime(input_forget: int) -> None:
    h, c = rand(2, BATCH, HIDDEN, seed=4), rand(2, BATCH, HIDDEN, seed=5)
    bias, peepholes = _weights("LSTM", 2)[2], rand(2, 3 * HIDDEN, seed=6)
    _check("LSTM", bias, None, h, c, peepholes, direction="bidirectional", input_forget=input_forget)


@pytest.mark.parametrize(
    ("activations", "alpha", "beta"),
    [
        (["HardSigmoid", "Elu", "Softsign"], [0.3, 0.7], [0.4]),
        (["Sigmoid", "Affine", "Relu"], [0.6], [0.1]),
        (["Softplus", "LeakyRelu", "Tanh"], None, None),
        (["HardSigmoid", "ScaledTanh", "ThresholdedRelu"], [0.2, 0.5, 0.1], [0.5, 1.5]),
    ],
)
@pytest.mark.parametrize("clip", [None, 0.4])
def test_activations_equal_onnxruntime(
    activations: list[str], alpha: list[float] | None, beta: list[float] | None, clip: float | None
) -> None:
    attributes: dict[str, Any] = {"activations": activations}
    for name, value in (("activation_alpha", alpha), ("activation_beta", beta), ("clip", clip)):
        if value is not None:
            attributes[name] = value
    _check("LSTM", _weights("LSTM", 1)[2], **attributes)


def test_each_direction_has_its_own_activations() -> None:
    _check("RNN", direction="bidirectional", activations=["Relu", "Tanh"])
    _check("GRU", direction="bidirectional", activations=["Sigmoid", "Relu", "HardSigmoid", "Tanh"])


def test_batch_first_is_the_same_transposed() -> None:  # onnxruntime has only the other layout on the CPU
    tensors = [torch.from_numpy(array) for array in _weights("LSTM", 2)]
    x, state = torch.randn(STEPS, BATCH, INPUTS), torch.randn(2, BATCH, HIDDEN)
    lengths = torch.tensor([5, 2, 4])
    y, h, c = LSTM(x, *tensors, lengths, state, state, direction="bidirectional")
    swapped = state.transpose(0, 1)
    y1, h1, c1 = LSTM(
        x.transpose(0, 1), *tensors, lengths, swapped, swapped, direction="bidirectional", layout=1
    )
    assert torch.equal(y1, y.permute(2, 0, 1, 3))
    assert torch.equal(h1, h.transpose(0, 1))
    assert torch.equal(c1, c.transpose(0, 1))


def test_no_steps_leave_the_state() -> None:
    w, r, bias = (torch.from_numpy(array) for array in _weights("GRU", 1))
    state = torch.randn(1, BATCH, HIDDEN)
    y, h = GRU(torch.zeros(0, BATCH, INPUTS), w, r, bias, None, state)
    assert y.shape == (0, 1, BATCH, HIDDEN)
    assert torch.equal(h, state)


def test_an_unknown_activation_is_left_to_onnxruntime() -> None:
    w, r, _ = (torch.from_numpy(array) for array in _weights("RNN", 1))
    with pytest.raises(NotImplementedError, match="Swish"):
        RNN(torch.zeros(1, 1, INPUTS), w, r, activations=["Swish"])


@pytest.mark.parametrize(("op_type", "layer"), [("RNN", RNN), ("GRU", GRU), ("LSTM", LSTM)])
def test_layer_is_twice_differentiable(op_type: str, layer: Any) -> None:
    w, r, bias = (torch.from_numpy(array).double().requires_grad_() for array in _weights(op_type, 1))
    x = torch.randn(3, 2, INPUTS, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda *inputs: layer(*inputs)[0], (x, w, r, bias))


def test_macs_count_both_products_at_each_step() -> None:
    shapes = [(STEPS, BATCH, INPUTS), (2, 4 * HIDDEN, INPUTS), (2, 4 * HIDDEN, HIDDEN)]
    assert _macs_recurrent(None, shapes, []) == STEPS * BATCH * 2 * 4 * HIDDEN * (INPUTS + HIDDEN)


@pytest.mark.parametrize("name", ["Affine", "ScaledTanh", "ThresholdedRelu"])
def test_activations_whose_defaults_are_disputed_run_in_onnxruntime(name: str) -> None:
    inputs = rand(5, 2, 3), rand(1, 4, 3, seed=1), rand(1, 4, 4, seed=2)
    check_node("RNN", *inputs, hidden_size=4, activations=[name], n_outputs=2, opset=17, opaque=True)
