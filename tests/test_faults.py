"""Faults around a whole command: full disks, too little memory, closed streams, signals at a bad moment."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_models import images, write

from hap_onnx import twin as twin_module
from hap_onnx.cli import Signals, Stop
from hap_onnx.errors import is_out_of_memory
from hap_onnx.runtime.session import make_session
from tests.forks import act_before, limit_files, memory_of, run_command
from tests.helpers import make_model, make_twin, node

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

JOB = ("compress", "net.onnx", "--data", "calib.npz", "-o", "out/net.onnx", "--work-dir", "work", "--threads",
       "1", "--keep-macs", "0.5", "--method", "prune", "--allow-slower", "-q", "--save-plan", "out/plan.json",
       "--report", "out/report.json")  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, external=True)
    np.savez(tmp_path / "calib.npz", x=images(60))
    (tmp_path / "out").mkdir()
    return tmp_path


def outputs(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").iterdir())


def check_sentence(error: str, *says: str) -> None:
    (line,) = error.splitlines()
    assert line.startswith("hap-onnx: error: ")
    assert "unexpected" not in line
    for word in says:
        assert word in line


# ---------------------------------------------------------------- disks


def test_a_full_disk_leaves_nothing_and_the_job_goes_on_when_there_is_space(folder: Path) -> None:
    ended = run_command(folder, *JOB, limit=lambda: limit_files(20_000))
    assert ended.code == 1, ended.err
    check_sentence(ended.err, "cannot be written", "File too large", "free space")
    assert outputs(folder) == []
    assert not list(folder.rglob("*.tmp*"))
    assert not list((folder / "work").glob("hap-onnx-*"))
    ended = run_command(folder, *JOB)
    assert ended.code == 0, ended.err
    resumed = (folder / "out" / "net.onnx").read_bytes()
    assert len(outputs(folder)) == 5
    # Undisturbed, in another work folder.
    ended = run_command(folder, *["fresh" if word == "work" else word for word in JOB])
    assert ended.code == 0, ended.err
    assert (folder / "out" / "net.onnx").read_bytes() == resumed


def test_a_report_that_cannot_be_printed_is_said(folder: Path) -> None:
    def fill() -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)

    ended = run_command(folder, "inspect", "net.onnx", "--report", "out/report.json", limit=fill)
    assert ended.code == 1
    check_sentence(ended.err, "cannot be printed", "No space left", "is written")
    assert json.loads((folder / "out" / "report.json").read_text())["model"] == "net.onnx"


# ---------------------------------------------------------------- memory


def wide_model() -> object:
    """A small file whose second node needs 400 MB."""
    return make_model(
        [node("Expand", ["x", "shape"], ["wide"]), node("Exp", ["wide"], ["y"])],
        inputs={"x": ["N", 1]},
        outputs=["y"],
        weights={"shape": np.array([1, 100_000_000], np.int64)},
    )


def test_too_little_memory_is_one_sentence(folder: Path) -> None:
    write(folder, wide_model())  # type: ignore[arg-type]

    def limit() -> None:
        most = memory_of("VmSize") + (300 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    ended = run_command(folder, "inspect", "net.onnx", limit=limit)
    assert ended.code == 1, ended.err
    check_sentence(ended.err, "out of memory", "--batch-size")


def test_what_runs_out_of_memory_is_known_whoever_says_so() -> None:
    for work in (lambda: np.zeros(1 << 50), lambda: torch.empty(1 << 50)):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            work()
        assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(ValueError("the model does not fit"))
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))


def test_memory_is_not_taken_for_a_property_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that freezes what it cannot run must not freeze what there was no memory for."""
    monkeypatch.setattr(twin_module, "_memory_bytes", lambda: 2**62)  # a machine that should have enough
    x, shape = np.zeros((2, 1), np.float32), np.array([1, 1 << 46], np.int64)
    model = make_model(
        [node("Expand", ["x", "shape"], ["wide"]), node("Exp", ["wide"], ["y"])],
        inputs={"x": x, "shape": shape},
        outputs=["y"],
    )
    with pytest.raises(MemoryError, match="node 'make_y'"):
        make_twin(model)({"x": torch.from_numpy(x), "shape": torch.from_numpy(shape)})
    session = make_session(model, providers="cpu")
    with pytest.raises(MemoryError, match="running the model in onnxruntime"):
        session.run({"x": x, "shape": shape})


# ---------------------------------------------------------------- streams


def test_closed_streams_do_no_harm(folder: Path) -> None:
    def close() -> None:
        for descriptor in (1, 2):
            os.close(descriptor)
        sys.stdout = sys.stderr = None

    ended = run_command(folder, "inspect", "net.onnx", "--report", "out/report.json", limit=close)
    assert ended.code == 0
    assert (ended.out, ended.err) == ("", "")
    assert json.loads((folder / "out" / "report.json").read_text())["model"] == "net.onnx"


# ---------------------------------------------------------------- signals


def test_signals_pass_when_results_get_their_names() -> None:
    with Signals() as signals:
        with pytest.raises(Stop):
            os.kill(os.getpid(), signal.SIGTERM)
    with Signals() as signals:
        signals.end()
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_job_that_is_stopped_while_results_get_their_names_ends_well(folder: Path) -> None:
    """Plan, report and model are named one after the other: a signal must not come in between."""
    plan = folder / "out" / ".plan.json"  # so begin the names of temporary files

    def limit() -> None:
        act_before(plan, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))

    ended = run_command(folder, *JOB, limit=limit)
    assert ended.code == 0, ended.err
    names = outputs(folder)
    assert [name for name in names if not name.endswith(".data")] == [
        "net.onnx", "plan.json", "plan.safetensors", "report.json",
    ]  # fmt: skip
    assert len(names) == 5
