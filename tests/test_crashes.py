"""A crash of native code ends in a sentence and in exit code 1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.helpers import make_model, node

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals as POSIX has them")


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("crash", "name"),
    [
        ("ctypes.string_at(0)", "SIGSEGV"),
        ("os.abort()", "SIGABRT"),
        ("signal.raise_signal(signal.SIGFPE)", "SIGFPE"),
        ("threading.Thread(target=ctypes.string_at, args=(0,)).run()", "SIGSEGV"),
    ],
)
def test_a_crash_is_one_sentence(tmp_path: Path, crash: str, name: str) -> None:
    lines = ["import ctypes, os, signal, threading", "from hap_onnx import cli"]
    lines += [f"cli._run = lambda args, session: {crash}", "raise SystemExit(cli.main())"]
    done = run("-c", "\n".join(lines), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"hap-onnx: error: a library crashed on this model or data ({name})")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_a_model_on_which_onnxruntime_divides_by_zero(tmp_path: Path) -> None:
    """The smallest integer by -1, which only the shape of the input tells: nothing can look for that."""
    nodes = [
        node("Shape", ["x"], ["sizes"]),
        node("Sub", ["sizes", "three"], ["divisor"]),  # 2 - 3
        node("Div", ["smallest", "divisor"], ["quotient"]),
        node("Cast", ["quotient"], ["number"], to=1),
        node("Add", ["x", "number"], ["y"]),
    ]
    weights = {"three": np.array([3]), "smallest": np.array([-(2**63)])}
    onnx.save(make_model(nodes, inputs={"x": ["N"]}, outputs=["y"], weights=weights), tmp_path / "net.onnx")
    done = run("-m", "hap_onnx", "inspect", "net.onnx", cwd=tmp_path)
    assert done.returncode == 1
    assert "hap-onnx: error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
