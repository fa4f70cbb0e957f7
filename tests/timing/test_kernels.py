"""Kernels of a model, as onnxruntime's profiler tells them."""

from __future__ import annotations

import os

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper

from hap_onnx.errors import ModelError, ValidationError
from hap_onnx.timing.kernels import time_kernels
from tests.runtime.cases import build, x_of, y_of

WHERE = {"provider": "CPUExecutionProvider", "threads": 1, "seconds": 0.05}


def products(*widths: int):  # -> ModelProto
    """A model of one product per width, named after it."""
    nodes = [helper.make_node("MatMul", ["x", f"w{n}"], [f"y{n}"], name=f"product{n}") for n in widths]
    weights = {f"w{n}": np.ones((256, n), np.float32) for n in widths}
    outputs = [helper.make_tensor_value_info(f"y{n}", 1, [64, n]) for n in widths]
    return build(nodes, [x_of(64, 256)], outputs, weights)


def test_each_kernel_is_named_and_larger_ones_take_longer() -> None:
    found = time_kernels(products(8, 512), {"x": np.ones((64, 256), np.float32)}, **WHERE)
    times = {kernel.name: kernel.microseconds for kernel in found}
    assert set(times) == {"product8", "product512"}
    assert {kernel.op_type for kernel in found} == {"MatMul"}
    assert times["product512"] > 4 * times["product8"]  # 64 times the work


def test_what_does_not_run_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="does not run in onnxruntime"):
        time_kernels(products(8), {"x": np.ones((64, 255), np.float32)}, **WHERE)
    with pytest.raises(ModelError, match="does not load"):
        time_kernels(build([helper.make_node("Nothing", ["x"], ["y"])], [x_of(1)], [y_of(1)]), {}, **WHERE)


def test_a_profile_that_is_cut_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    end_profiling = ort.InferenceSession.end_profiling

    def cut_off(session: ort.InferenceSession) -> str:
        path = end_profiling(session)
        os.truncate(path, os.path.getsize(path) // 2)  # as on a full disk, of which onnxruntime says nothing
        return path

    monkeypatch.setattr(ort.InferenceSession, "end_profiling", cut_off)
    with pytest.raises(ValidationError, match="not whole: is there room for them"):
        time_kernels(products(8), {"x": np.ones((64, 256), np.float32)}, **WHERE)
