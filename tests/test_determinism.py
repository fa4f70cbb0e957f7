"""The same seed, input and threads give the same bytes in every process; other threads nearly the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_models import fix_speed, images, write

from hap_onnx import apply_plan, compress
from hap_onnx.planning.plan import load_plan
from hap_onnx.runtime.session import make_session

ROOT = Path(__file__).parents[1]
THREAD_TOLERANCE = 1e-3
"""Largest difference of outputs, relative to the largest, that another number of threads makes."""


def run(folder: Path, *words: str, hash_seed: int) -> None:
    """Run the command line in a process whose sets and dictionaries of sets have an order of their own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, "-m", "hap_onnx", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--epochs", "2")], ids=["refit", "distill"])
def test_every_process_writes_the_same_bytes(tmp_path: Path, more: tuple[str, ...]) -> None:
    words = ("--keep-macs", "0.5", "--allow-slower", "--threads", "1", "--save-plan", "plan.json", *more)
    made = []
    for hash_seed in (1, 2):
        folder = tmp_path / f"folder {hash_seed}"  # another path, another time
        folder.mkdir()
        write(folder)
        np.savez(folder / "calib.npz", x=images())
        run(folder, "compress", "net.onnx", "--data", "calib.npz", *words, hash_seed=hash_seed)
        names = ("net.hap.onnx", "plan.json", "plan.safetensors")
        made.append([(folder / name).read_bytes() for name in names])
    assert made[0] == made[1]
    run(folder, "apply", "net.onnx", "plan.json", "-o", "again.onnx", hash_seed=3)
    assert (folder / "again.onnx").read_bytes() == made[0][0]


@pytest.mark.slow
def test_other_threads_make_nearly_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_speed(monkeypatch)
    model, data = write(tmp_path), {"x": images()}
    options: dict[str, Any] = {"keep_macs": 0.5, "batch_size": 32, "method": "prune"}
    for threads in (1, 2):
        output, plan = tmp_path / f"{threads}.onnx", tmp_path / f"{threads}.json"
        compress(model, data, output=output, save_plan=plan, threads=threads, **options)
    plans = [load_plan(tmp_path / f"{threads}.json") for threads in (1, 2)]
    for first, second in zip(plans[0].decisions, plans[1].decisions, strict=True):
        assert first.group == second.group
        assert np.array_equal(first.keep, second.keep)
    outputs = []
    for threads in (1, 2):
        session = make_session(tmp_path / f"{threads}.onnx", providers="cpu", threads=1)
        outputs.append(session.run(session.prepare(data))["scores"])
    assert np.abs(outputs[0] - outputs[1]).max() <= THREAD_TOLERANCE * np.abs(outputs[0]).max()
    apply_plan(model, tmp_path / "2.json", output=tmp_path / "again.onnx")  # here with one, as all tests
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()
