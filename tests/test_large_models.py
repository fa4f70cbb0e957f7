"""Weights that are in files beside the model are in memory once, or nearly: peaks against their size."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hap_onnx import pipeline
from tests.forks import memory_of, run_fork
from tools.large_models import write_large_model, write_plan

MOST = 2.5
"""The largest peak, as a multiple of the weights."""
ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs a system that resets peaks of memory"
)


def peak_of(work: Callable[[Path], object], model: Path) -> int:
    """Return by how much the memory of a fork grows at most while it works on a model."""

    def measured() -> None:
        # Small blocks go back to the system at once: what counts is what is alive.
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
        work(model.with_name("small.onnx"))  # what libraries load at first use is not the model's
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory_of("VmRSS")
        work(model)
        print(memory_of("VmHWM") - before)

    ended = run_fork(measured)
    assert ended.code == 0, ended.err
    return int(ended.out)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A model with layers that are small against the whole, and its plan beside it."""
    model = tmp_path_factory.mktemp("large") / "large.onnx"
    write_large_model(model.with_name("small.onnx"), 200_000, width=16)
    n_bytes = write_large_model(model, 120_000_000, width=256)
    for name in ("small", "large"):
        plan = model.with_name(f"{name}.json")
        assert run_fork(lambda plan=plan: write_plan(plan.with_suffix(".onnx"), plan)).code == 0
    return model, n_bytes


def test_inspect_holds_weights_about_twice(large: tuple[Path, int]) -> None:
    model, n_bytes = large
    peak = peak_of(pipeline.inspect, model)
    assert n_bytes < peak < MOST * n_bytes


def test_apply_holds_weights_about_twice(large: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, n_bytes = large
    monkeypatch.setattr(pipeline, "MAX_PROVEN_BYTES", n_bytes // 2)  # as of a model that is really large

    def apply(path: Path) -> None:
        pipeline.apply_plan(path, path.with_suffix(".json"), output=path.with_suffix(".out.onnx"))

    assert n_bytes < peak_of(apply, model) < MOST * n_bytes
    (data,) = model.parent.glob("large.out-*.data")
    assert 0.4 * n_bytes < data.stat().st_size < 0.6 * n_bytes


@pytest.mark.slow
def test_a_model_of_more_than_2_gb(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tools.large_models", "--gigabytes", "2.5", "inspect", "apply"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = r"│ +{} │ +0 │ +([\d.]+) │ +[\d.]+ │ +([\d.]+) │"
    for command in ("inspect", "apply"):
        found = re.search(row.format(command), done.stdout)
        assert found is not None, done.stdout + done.stderr
        assert float(found[1]) > 2**31 / 1e9
        assert float(found[2]) <= MOST
