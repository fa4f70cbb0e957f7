"""Makes trained ONNX models smaller and faster, without their training code.

    import hap_onnx

    report = hap_onnx.compress("model.onnx", "calib.npz", keep_macs=0.5)
    print(report.after.macs / report.before.macs, report.quality)

The names below load what they need on first use, so importing hap_onnx itself is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hap_onnx.config import CompressConfig
    from hap_onnx.errors import (
        BudgetError,
        CalibrationError,
        GateError,
        HapOnnxError,
        ModelError,
        SurgeryError,
        TargetError,
        UsageError,
        ValidationError,
    )
    from hap_onnx.pipeline import analyze, apply_plan, compress, inspect, load_twin, sweep, validate
    from hap_onnx.report import AnalyzeReport, CompressReport, InspectReport, SweepReport, ValidateReport

__version__ = "0.1.0"

__all__ = [
    "AnalyzeReport",
    "BudgetError",
    "CalibrationError",
    "CompressConfig",
    "CompressReport",
    "GateError",
    "HapOnnxError",
    "InspectReport",
    "ModelError",
    "SurgeryError",
    "SweepReport",
    "TargetError",
    "UsageError",
    "ValidateReport",
    "ValidationError",
    "__version__",
    "analyze",
    "apply_plan",
    "compress",
    "inspect",
    "load_twin",
    "sweep",
    "validate",
]

_HOMES = {
    "hap_onnx.pipeline": ("analyze", "apply_plan", "compress", "inspect", "load_twin", "sweep", "validate"),
    "hap_onnx.config": ("CompressConfig",),
    "hap_onnx.report": ("AnalyzeReport", "CompressReport", "InspectReport", "SweepReport", "ValidateReport"),
    "hap_onnx.errors": tuple(name for name in __all__ if name.endswith("Error")),
}


if not TYPE_CHECKING:  # to a type checker, a module with __getattr__ has every name

    def __getattr__(name: str) -> object:
        for home, names in _HOMES.items():
            if name in names:
                module = import_module(home)
                globals().update({public: getattr(module, public) for public in names})
                return globals()[name]
        raise AttributeError(f"module 'hap_onnx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
