"""Fourier transforms and windows against onnxruntime, and second derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradgradcheck

from hap_onnx.ops.signal import DFT, STFT
from tests.helpers import check_node, rand


@pytest.mark.parametrize("length", [None, 4, 10])
@pytest.mark.parametrize("axis", [0, 1, -2])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("inverse", [0, 1])
def test_dft_equals_onnxruntime(length: int | None, axis: int, parts: int, inverse: int) -> None:
    x = rand(6, 8, 7, parts)
    given = None if length is None else np.array(length)
    check_node("DFT", x, given, opset=17, axis=axis, inverse=inverse, tolerance=1e-4)
    check_node("DFT", x, given, np.array(axis), opset=20, inverse=inverse, tolerance=1e-4)


@pytest.mark.parametrize("n", [7, 8])
def test_one_sided_dft_equals_onnxruntime(n: int) -> None:
    check_node("DFT", rand(2, n, 1), None, opset=17, onesided=1, tolerance=1e-4)
    check_node("DFT", rand(2, n, 1), None, np.array(1), opset=20, onesided=1, tolerance=1e-4)


def test_the_inverse_of_a_one_sided_spectrum_is_the_signal() -> None:
    for n, length in ((8, None), (7, torch.tensor(7))):
        x = torch.randn(2, n, 1)
        spectrum = DFT(x, None, torch.tensor(1), onesided=1)
        assert torch.allclose(DFT(spectrum, length, torch.tensor(1), onesided=1, inverse=1), x, atol=1e-6)


@pytest.mark.parametrize("with_window", [False, True])
@pytest.mark.parametrize("onesided", [0, 1])
@pytest.mark.parametrize("shape", [(2, 40, 1), (2, 40)])
def test_stft_equals_onnxruntime(with_window: bool, onesided: int, shape: tuple[int, ...]) -> None:
    window = rand(8, seed=1) if with_window else None
    check_node(
        "STFT", rand(*shape), np.array(5), window, np.array(8), constants=(1, 3), onesided=onesided,
        tolerance=1e-4,
    )  # fmt: skip


def test_transforms_are_twice_differentiable() -> None:
    x = torch.randn(1, 12, 1, dtype=torch.float64, requires_grad=True)
    window = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x, window: STFT(x, 3, window).square(), (x, window))
    assert gradgradcheck(lambda x: DFT(x).square(), (x,))


@pytest.mark.parametrize("op_type", ["HannWindow", "HammingWindow", "BlackmanWindow"])
@pytest.mark.parametrize("periodic", [0, 1])
@pytest.mark.parametrize("size", [9, 10])
def test_window_equals_onnxruntime(op_type: str, periodic: int, size: int) -> None:
    check_node(op_type, np.array(size), periodic=periodic)
