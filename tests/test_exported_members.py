from __future__ import annotations

import subprocess
import sys

import pytest

import hap_onnx

PUBLIC = [
    "AnalyzeReport", "BudgetError", "CalibrationError", "CompressConfig", "CompressReport", "GateError",
    "HapOnnxError", "InspectReport", "ModelError", "SurgeryError", "SweepReport", "TargetError", "UsageError",
    "ValidateReport", "ValidationError", "__version__", "analyze", "apply_plan", "compress", "inspect",
    "load_twin", "sweep", "validate",
]  # fmt: skip


def test_public_names_are_pinned():
    assert sorted(hap_onnx.__all__) == sorted(PUBLIC)


def test_public_names_exist():
    for name in PUBLIC:
        value = getattr(hap_onnx, name)
        assert isinstance(value, str) or callable(value), name
    assert set(PUBLIC) <= set(dir(hap_onnx))


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        hap_onnx.compres  # noqa: B018


def test_importing_the_package_is_cheap():
    slow = {"torch", "onnx", "onnxruntime", "rich", "matplotlib"}
    code = f"import sys, hap_onnx; print(sorted({slow} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
