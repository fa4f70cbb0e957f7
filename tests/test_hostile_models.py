"""Hostile and damaged model files: each is refused with one sentence, within memory and time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hostile_models import REFUSED, TAKEN, Build
from sample_models import images

from tests.limited import LimitedRunner, Result

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs limits of a process")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


def write(folder: Path, build: Build) -> None:
    content = build(folder)
    data = content if isinstance(content, bytes) else content.SerializeToString()
    (folder / "net.onnx").write_bytes(data)


def look(folder: Path) -> dict[str, int]:
    """What lies in and beside a folder, and when it was last written."""
    return {
        str(path): path.lstat().st_mtime_ns
        for path in folder.parent.rglob("*")
        if ".streams" not in str(path) and not path.is_dir()
    }


def check_sentence(result: Result, says: list[str], *, code: int = 1) -> None:
    """Assert that a run ended by the contract, with one line that holds these words."""
    assert result.code == code, result.err
    assert result.out == ""
    assert result.err.startswith("hap-onnx: error: ")
    assert "unexpected" not in result.err
    assert result.err.endswith("\n")
    assert result.err[:-1].isprintable()  # one line, nothing that a terminal obeys
    assert len(result.err) < 2500
    for words in says:
        assert words in result.err


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_hostile_or_damaged_is_refused(runner: LimitedRunner, folder: Path, name: str) -> None:
    build, says = REFUSED[name]
    write(folder, build)
    before = look(folder)
    check_sentence(runner.run(folder, ["inspect", "net.onnx"]), says)
    assert look(folder) == before


@pytest.mark.parametrize("name", ["ConstantOfShape", "a path upwards", "functions five thousand deep"])
@pytest.mark.parametrize("command", ["compress", "apply", "validate"])
def test_every_command_refuses(runner: LimitedRunner, folder: Path, name: str, command: str) -> None:
    build, says = REFUSED[name]
    write(folder, build)
    np.savez(folder / "calib.npz", x=images(20))
    before = look(folder)
    words = {
        "compress": ["net.onnx", "--data", "calib.npz", "--keep-macs", "0.5"],
        "apply": ["net.onnx", "plan.json"],
        "validate": ["net.onnx", "net.onnx", "--data", "calib.npz"],
    }
    check_sentence(runner.run(folder, [command, *words[command]]), says)
    assert look(folder) == before


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_unusual_is_shown_safely(runner: LimitedRunner, folder: Path, name: str) -> None:
    write(folder, TAKEN[name])
    before = look(folder)
    for words in ([], ["--json"]):
        result = runner.run(folder, ["inspect", "net.onnx", *words])
        assert result.code == 0, result.err
        for text in (result.out, result.err):
            assert text.replace("\n", "").isprintable()
    assert look(folder) == before
