"""Weights and activations of 8 bits, by onnxruntime's static quantization in QDQ format.

Weights are signed, one scale per output channel; activations are unsigned and asymmetric, one scale per
tensor: what onnxruntime's kernels on x86 compute fastest (signed activations were slower than float32 there),
and on ResNet20 and ResNet56 nothing else was more exact. What onnxruntime cannot quantize stays in float32.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import (
    CalibrationDataReader,
    CalibrationMethod,
    TensorData,
    TensorsData,
    create_calibrator,
)
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from hap_onnx.errors import ModelError
from hap_onnx.interrupts import interruptible
from hap_onnx.model.protos import MAX_PROTO_BYTES, count_bytes
from hap_onnx.model.saving import save_model
from hap_onnx.model.temporary import temporary_folder
from hap_onnx.quantize.protos import with_header_of, with_opset, with_types
from hap_onnx.quantize.recipe import Ranges, Recipe

LEAST_OPSET = 13
"""Since then a scale may be given per channel."""
PERCENTILE = 99.999
_CHUNK = 64  # samples whose activations are kept at once while their histograms grow

_METHODS: Mapping[str, tuple[CalibrationMethod, dict[str, Any]]] = {
    "minmax": (CalibrationMethod.MinMax, {}),
    "percentile": (CalibrationMethod.Percentile, {"percentile": PERCENTILE, "symmetric": False}),
}
_ERRORS = (ValueError, TypeError, RuntimeError, KeyError, AttributeError, NotImplementedError)
# In its preprocessing onnxruntime marks models whose types are known; ours are, without files and copies.
_TYPES_ARE_KNOWN = ("onnx.infer", "onnxruntime.quant")


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Gives onnxruntime some feeds."""

    def __init__(self, feeds: Iterable[Mapping[str, np.ndarray]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        feed = next(self._feeds, None)
        return None if feed is None else dict(feed)


def calibrate(
    model: ModelProto, feeds: Iterable[Mapping[str, np.ndarray]], *, method: str
) -> dict[str, tuple[float, float]]:
    """Return the range of each float tensor over the data.

    Args:
        feeds: inputs as the model takes them, by name; no more than ``_CHUNK`` samples at once.
        method: one of ``recipe.CALIBRATIONS``.

    Raises:
        ModelError: onnxruntime cannot run the model for it.
    """
    kind, options = _METHODS[method]
    model, _ = with_opset(model, LEAST_OPSET)
    typed = with_types(model)
    with temporary_folder("calibrate") as folder, interruptible(), _quiet():
        path = folder / "model.onnx"
        large = count_bytes(typed) > MAX_PROTO_BYTES // 2
        save_model(typed, path, external_data=large)
        try:
            calibrator = create_calibrator(
                path,
                _known_op_types(),
                str(folder / "augmented.onnx"),
                calibrate_method=kind,
                use_external_data_format=large,
                extra_options=options,
            )
            for chunk in _chunks(feeds):
                calibrator.collect_data(_Reader(chunk))
            found = calibrator.compute_data()
        except _ERRORS as error:
            raise ModelError(f"the ranges of the model's activations cannot be found: {error}") from error
    ranges = {}
    for name, data in found.items():
        low, high = (float(np.asarray(bound).ravel()[0]) for bound in data.range_value)
        if not np.isfinite([low, high]).all():
            raise ModelError(f"the activation '{name}' is not finite on the data, so it cannot be quantized")
        ranges[name] = (min(low, high), max(low, high))
    return dict(sorted(ranges.items()))


def _chunks(
    feeds: Iterable[Mapping[str, np.ndarray]],
) -> Iterator[list[Mapping[str, np.ndarray]]]:
    """Yield feeds in lists of about ``_CHUNK`` samples: histograms are made of one list at a time.

    Those of a list have the same shapes, since onnxruntime makes one array of what comes out of them.
    """
    chunk: list[Mapping[str, np.ndarray]] = []
    n_samples = 0
    for feed in feeds:
        if chunk and (n_samples >= _CHUNK or _shapes(feed) != _shapes(chunk[0])):
            yield chunk
            chunk, n_samples = [], 0
        chunk.append(feed)
        first = next(iter(feed.values()), np.zeros(1))
        n_samples += len(first) if first.ndim else 1
    if chunk:
        yield chunk


def _shapes(feed: Mapping[str, np.ndarray]) -> list[tuple[int, ...]]:
    return [array.shape for array in feed.values()]


def quantize_to_int8(model: ModelProto, recipe: Recipe) -> ModelProto:
    """Return the model quantized as a recipe says; the same recipe gives the same model.

    Raises:
        ModelError: onnxruntime cannot quantize the model, or the recipe does not fit it.
    """
    model, _ = with_opset(model, LEAST_OPSET)
    typed = with_types(model)
    listed = {tensor.name for tensor in typed.graph.initializer}
    inputs = [value for value in typed.graph.input if value.name not in listed]
    typed.graph.ClearField("input")
    typed.graph.input.extend(inputs)  # weights that could be fed would stay as they are
    typed.metadata_props.add(key=_TYPES_ARE_KNOWN[0], value=_TYPES_ARE_KNOWN[1])
    ranges = TensorsData(
        CalibrationMethod.MinMax,
        {
            name: TensorData(lowest=np.float32(low), highest=np.float32(high))
            for name, (low, high) in recipe.ranges.items()
        },
    )
    with _quiet():
        try:
            quantizer = QDQQuantizer(
                typed,
                True,  # one scale per channel
                recipe.weight_bits < 8,
                QuantType.QInt8,
                QuantType.QUInt8,
                ranges,
                list(recipe.nodes),
                [],
                _known_op_types(),
                {},
            )
            quantizer.quantize_model()
        except _ERRORS as error:
            raise ModelError(f"onnxruntime cannot quantize the model: {error}") from error
    return with_header_of(model, quantizer.model.model)


def preview_ranges(model: ModelProto) -> Ranges:
    """Make up ranges, for a file that is as large as the real one but of no other use."""
    typed = with_types(model)
    names = [
        value.name
        for value in (*typed.graph.input, *typed.graph.output, *typed.graph.value_info)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    ]
    return dict.fromkeys(sorted(names), (-1.0, 1.0))


def _known_op_types() -> list[str]:
    return sorted({*QDQRegistry, *QLinearOpsRegistry})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnxruntime's tools from printing, and from logging to the root logger."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
