"""The tool that prints what a compression costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from hap_onnx.jobs import machine
from tests.sample_models import residual_cnn
from tools import compress_cost
from tools.compress_cost import find_rows, main, run_job
from tools.reproduce import Used


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(residual_cnn(), path)
    return path


def test_parts_follow_the_stage_that_they_belong_to() -> None:
    report = {
        "seconds": {"load": 1.0, "sensitivity": 5.0, "compress": 3.0},
        "parts": {"sensitivity": 2.0, "measure": 2.5, "refit": 0.5},
    }
    assert find_rows(report) == [
        ("load", 1.0),
        ("sensitivity", 5.0), ("  collect", 2.0), ("  measure", 2.5),
        ("compress", 3.0), ("  refit", 0.5),
    ]  # fmt: skip


def test_the_job_is_a_real_one_and_its_parts_are_within_its_stages(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "LATENCY_SECONDS", 0.01)
    data = tmp_path / "data.npz"
    np.savez(data, x=np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32))
    output = tmp_path / "out.onnx"
    words = {"model": str(model), "data": str(data), "output": str(output), "keep_macs": 0.6}
    report = run_job({**words, "allow_slower": True, "threads": 1})
    assert report["refusal"] is None
    assert report["after"]["macs"] <= 0.6 * report["before"]["macs"]
    assert output.is_file()
    for part, stage in (("sensitivity", "sensitivity"), ("measure", "sensitivity"), ("refit", "compress")):
        assert 0 < report["parts"][part] < report["seconds"][stage]
    output.unlink()
    refused = run_job({**words, "keep_macs": 0.3, "max_drop": 0.0, "recover": "none", "allow_slower": True})
    assert "max-drop" in refused["refusal"]
    assert refused["seconds"]["sensitivity"] > 0
    assert not output.is_file()


def test_the_command_makes_up_data_and_prints_shares_and_passes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(command: list[str]) -> Used:
        job = Path(command[-1])
        asked.append(json.loads(job.read_text()))
        facts = {"params": 100, "macs": 1000}
        report = {
            "seconds": {"load": 1.0, "sensitivity": 3.0}, "parts": {}, "refusal": "too slow",
            "before": facts, "after": {"params": 50, "macs": 400},
        }  # fmt: skip
        job.write_text(json.dumps(report))
        return Used(0, 321.0, 7.0)

    monkeypatch.setattr(compress_cost, "run_process", run)
    monkeypatch.setattr(compress_cost, "time_passes", lambda *_: (0.5, 2.0))
    result = CliRunner().invoke(
        main, [str(model), "--samples", "12", "--keep-macs", "0.4", "--folder", str(tmp_path / "f")]
    )
    assert result.exit_code == 0, result.output
    (words,) = asked
    assert words["keep_macs"] == 0.4
    assert np.load(words["data"])["x"].shape == (12, 3, 8, 8)
    row = next(line for line in result.output.splitlines() if "sensitivity" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["sensitivity", "3.0", "75.0 %", "6.0", "1.5"]
    for text in ("7 s", "321 MB", "x0.400", "x0.500", "refused: too slow"):
        assert text in result.output


def test_a_pass_is_timed_in_both(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, x=np.zeros((8, 3, 8, 8), np.float32))
    assert all(0 < seconds < 10 for seconds in compress_cost.time_passes(model, data, {}, 1))
