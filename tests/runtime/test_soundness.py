"""Whether models may be written."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from hap_onnx.errors import ValidationError
from hap_onnx.runtime import soundness
from hap_onnx.runtime.soundness import check_finite, check_model
from tests.runtime.cases import build, matmul_model, x_of, y_of


def test_finite_outputs_pass_and_others_are_counted() -> None:
    check_finite({"y": np.ones((2, 3)), "i": np.ones(2, np.int64)}, label="it")
    bad = np.ones((4, 3), np.float32)
    bad[1, 0], bad[3, 1], bad[3, 2] = np.nan, np.inf, -np.inf
    with pytest.raises(
        ValidationError, match=r"output 'y' of it has 3 NaN or infinite numbers \(in 2 samples\)"
    ):
        check_finite({"y": bad}, label="it")


def test_check_model_accepts_a_sound_model() -> None:
    assert check_model(matmul_model()) is None
    check_model(matmul_model(), reference=matmul_model())


def test_check_model_refuses_what_the_checker_refuses() -> None:
    model = matmul_model()
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 99]))
    with pytest.raises(ValidationError, match=r"does not pass onnx\.checker: .*99"):
        check_model(model, reference=matmul_model())
    remark = check_model(model, reference=model)  # the user's model had the flaw before
    assert remark is not None
    assert "99" in remark


def test_check_model_refuses_what_does_not_load() -> None:
    node = helper.make_node("Magic", ["x"], ["y"], domain="com.example")
    with pytest.raises(ValidationError, match=r"not usable: .*Magic"):
        check_model(build([node], [x_of(1)], [y_of(1)], domains={"com.example": 1}))


def test_check_model_refuses_new_warnings_only(capfd: pytest.CaptureFixture[str]) -> None:
    noisy = matmul_model()
    noisy.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "unused"))
    with pytest.raises(ValidationError, match=r"new warning: .*unused"):
        check_model(noisy, reference=matmul_model())
    other = matmul_model()
    other.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "another"))
    check_model(other, reference=noisy)
    assert capfd.readouterr().err == ""


def test_captured_stderr_passes_other_lines_on(capfd: pytest.CaptureFixture[str]) -> None:
    with soundness._captured_stderr() as lines:
        os.write(2, b"1 [W:onnxruntime:, graph.cc:1 f] text\nprogress 50 %\n")
    sys.stderr.flush()
    assert lines == ["1 [W:onnxruntime:, graph.cc:1 f] text\n"]


def test_check_model_takes_paths(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(matmul_model().SerializeToString())
    check_model(path, reference=path)
