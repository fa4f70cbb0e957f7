"""The node tests that come with onnx, for every operator the twin computes in torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from hap_onnx.ops.registry import find_run
from tests.helpers import make_twin

# What the twin does not do as these cases ask, and why. Everything else that has a torch function must pass.
EXCEPTIONS = {
    "test_castlike_FLOAT_to_BFLOAT16": "a value that only overflows in bfloat16",
    "test_training_dropout": "random numbers",
    "test_reduce_max_empty_set_bool": "the maximum of no booleans",
    "test_resize_downsample_scales_linear_align_corners": "onnxruntime differs from the case; we follow it",
    "test_resize_downsample_scales_cubic_align_corners": "onnxruntime differs from the case; we follow it",
    "test_resize_downsample_scales_linear_antialias": "onnxruntime differs from the case; we follow it",
    "test_resize_downsample_sizes_linear_antialias": "onnxruntime differs from the case; we follow it",
    "test_resize_downsample_scales_cubic_antialias": "onnxruntime differs from the case; we follow it",
    "test_resize_downsample_sizes_cubic_antialias": "onnxruntime differs from the case; we follow it",
}
NEWEST_OPSET = 26


def _cases() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference data is computed with overflows and the like
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    for case in cases:
        nodes = case.model.graph.node
        if len(nodes) == 1 and find_run(nodes[0].op_type, opset=NEWEST_OPSET, domain=nodes[0].domain):
            yield case


def _lower_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model at an opset that onnxruntime knows; newer ones only allow more types."""
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    lowered.ir_version = min(model.ir_version, 10)
    for entry in lowered.opset_import:
        entry.version = min(entry.version, NEWEST_OPSET)
    return lowered


def _as_tensor(value: Any) -> torch.Tensor:
    array = onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    if array.dtype.kind not in "biuf" or array.dtype.isbuiltin != 1:
        pytest.skip(f"torch holds no {array.dtype}")
    return torch.from_numpy(np.array(array))


@pytest.mark.parametrize("case", list(_cases()), ids=lambda case: case.name)
def test_case_of_onnx(case: Any) -> None:
    for name, reason in EXCEPTIONS.items():
        if case.name.removesuffix("_expanded").startswith(name):
            pytest.skip(reason)
    model = _lower_opset(case.model)
    for inputs, outputs in case.data_sets:
        feeds = {
            entry.name: _as_tensor(value) for entry, value in zip(model.graph.input, inputs, strict=True)
        }
        expected = [_as_tensor(value) for value in outputs]
        if any(
            tensor.dtype in (torch.uint16, torch.uint32, torch.uint64)
            for tensor in [*feeds.values(), *expected]
        ):
            pytest.skip("torch hardly computes with wide unsigned integers")
        with torch.no_grad():
            results = make_twin(model)(feeds)
        low = any(tensor.dtype == torch.float16 for tensor in [*feeds.values(), *expected])
        low = low or onnx.TensorProto.BFLOAT16 in (
            entry.type.tensor_type.elem_type for entry in [*model.graph.input, *model.graph.output]
        )
        rtol, atol = (1e-2, 1e-2) if low else (case.rtol, 1e-5)
        for result, wanted in zip(results.values(), expected, strict=True):
            assert result.shape == wanted.shape
            torch.testing.assert_close(result.double(), wanted.double(), rtol=rtol, atol=atol, equal_nan=True)
