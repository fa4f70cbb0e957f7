"""Fourier transforms and windows.

The last axis of a signal holds its real and imaginary part, or is of size 1.
"""

from __future__ import annotations

from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

from hap_onnx.ops.arguments import IntsLike, as_int, as_ints, normalise_axis
from hap_onnx.ops.elementwise import Cast
from hap_onnx.ops.registry import run_op

_FLOAT = 1  # onnx.TensorProto.FLOAT

# --- DFT, STFT ---


def _fit(x: Tensor, axis: int, size: int) -> Tensor:
    """Cut ``axis`` to ``size``, or fill it up with zeros."""
    missing = size - x.shape[axis]
    return F.pad(x, [0, 0] * (x.ndim - 1 - axis) + [0, missing]) if missing else x


def _transform(x: Tensor, axis: int, length: int | None, *, inverse: bool, onesided: bool) -> Tensor:
    """The transform along ``axis`` of x [..., 1 or 2]; the inverse of a one-sided spectrum is real."""
    if inverse and onesided:
        spectrum = torch.view_as_complex(x.contiguous())
        size = length if length is not None else 2 * (x.shape[axis] - 1)
        return torch.fft.irfft(spectrum, size, axis).unsqueeze(-1)
    size = x.shape[axis] if length is None else length
    x = _fit(x, axis, size)
    if x.shape[-1] == 2:
        signal = torch.view_as_complex(x.contiguous())
        if onesided:
            raise NotImplementedError("the one-sided transform of a complex signal")
    else:
        signal = x.squeeze(-1)
    if onesided:
        return torch.view_as_real(torch.fft.rfft(signal, dim=axis))
    transform = torch.fft.ifft if inverse else torch.fft.fft
    return torch.view_as_real(transform(signal, dim=axis).resolve_conj())


@run_op("DFT", since=17)
def DFT_17(
    x: Tensor, dft_length: IntsLike = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0
) -> Tensor:
    """The discrete Fourier transform along ``axis``."""
    length = as_int(dft_length) if dft_length is not None else None
    along = normalise_axis(axis, x.ndim)
    return _transform(x, along, length, inverse=bool(inverse), onesided=bool(onesided))


@run_op("DFT", since=20)
def DFT(
    x: Tensor,
    dft_length: IntsLike = None,
    axis: IntsLike = None,
    *,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    """The discrete Fourier transform along ``axis``, an input since opset 20."""
    along = as_int(axis) if axis is not None else -2
    return DFT_17(x, dft_length, axis=along, inverse=inverse, onesided=onesided)


@run_op("STFT", since=17)
def STFT(
    signal: Tensor,
    frame_step: IntsLike,
    window: Tensor | None = None,
    frame_length: IntsLike = None,
    *,
    onesided: int = 1,
) -> Tensor:
    """Transform frames of a signal [B, samples, 1 or 2], cut every ``frame_step``: [B, frames, bins, 2]."""
    if signal.ndim == 2:  # as torch exports a real signal, and onnxruntime reads it
        signal = signal.unsqueeze(-1)
    if frame_length is not None:
        width = as_int(frame_length)
    else:
        width = window.shape[0] if window is not None else signal.shape[1]
    frames = signal.unfold(1, width, as_int(frame_step)).transpose(2, 3)  # [B, frames, width, 1 or 2]
    if window is not None:
        frames = frames * window.reshape(-1, 1)
    return _transform(frames, 2, None, inverse=False, onesided=bool(onesided) and signal.shape[-1] == 1)


# --- Windows ---


def _cosines(size: IntsLike, *, periodic: int, output_datatype: int, factors: tuple[float, ...]) -> Tensor:
    """The window sum_k factors[k] * cos(2 pi k n / N), N one less where it is not periodic."""
    (count,) = as_ints(size)
    steps = torch.arange(count, dtype=torch.float64)
    angle = 2 * pi * steps / max(count if periodic else count - 1, 1)
    window = torch.zeros_like(angle)
    for order, factor in enumerate(factors):
        window = window + factor * torch.cos(order * angle)
    return Cast(window.to(torch.float32), to=output_datatype)


@run_op("HannWindow", since=17)
def HannWindow(size: IntsLike, *, output_datatype: int = _FLOAT, periodic: int = 1) -> Tensor:
    """The window of Hann."""
    return _cosines(size, periodic=periodic, output_datatype=output_datatype, factors=(0.5, -0.5))


@run_op("HammingWindow", since=17)
def HammingWindow(size: IntsLike, *, output_datatype: int = _FLOAT, periodic: int = 1) -> Tensor:
    """The window of Hamming, with the coefficients 25/46 and 21/46."""
    return _cosines(size, periodic=periodic, output_datatype=output_datatype, factors=(25 / 46, -21 / 46))


@run_op("BlackmanWindow", since=17)
def BlackmanWindow(size: IntsLike, *, output_datatype: int = _FLOAT, periodic: int = 1) -> Tensor:
    """The window of Blackman."""
    return _cosines(size, periodic=periodic, output_datatype=output_datatype, factors=(0.42, -0.5, 0.08))
