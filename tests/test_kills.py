"""The tool that kills jobs sees what is wrong after a kill, and nothing where all is well."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import onnx
import pytest

from tools.faults import JOBS, Ended, Place, Stop, check_end, check_kill, small_network

TERM, KILL = Stop(signal.SIGTERM, seconds=1.0), Stop(signal.SIGKILL, operation=3)
STOPPED = "hap-onnx: terminated; nothing was written at out/net.onnx; the same command goes on from work\n"
WHOLE = {"net.onnx": b"model", "plan.json": b"plan", "plan.safetensors": b"weights"}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place.make(tmp_path / "job", "epochs")


def fill(place: Place, files: dict[str, bytes]) -> dict[str, str]:
    """Write files to the job's output folder, and return the hashes of all that is there."""
    for name, content in files.items():
        (place.path / "out" / name).write_bytes(content)
    return place.files("out")


def problems(
    place: Place,
    stop: Stop,
    code: int,
    expected: dict[str, str],
    stderr: str = STOPPED,
    before: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    return list(check_kill(place, Ended(code, stderr, 1.0, True), stop, before, expected))


def test_what_is_well_after_a_kill(place: Place) -> None:
    assert problems(place, TERM, 143, {}) == []
    assert problems(place, TERM, -signal.SIGTERM, {}, "") == []
    assert problems(place, KILL, -signal.SIGKILL, {}, "") == []
    expected = fill(place, WHOLE)
    fill(place, {".net.onnx.0a1b2c-12.tmp.onnx": b"half"})
    assert problems(place, KILL, -signal.SIGKILL, expected, "") == []


def test_what_is_wrong_after_a_kill(place: Place) -> None:
    (said,) = problems(place, TERM, 1, {})
    assert said.startswith("exit code 1 after SIGTERM")
    (said,) = problems(place, TERM, 143, {}, "Traceback\n" + STOPPED)
    assert said.startswith("stderr after SIGTERM")
    (place.path / "tmp" / "hap-onnx-refit-0a1b2c-12-xyz").mkdir()
    (said,) = problems(place, TERM, 143, {})
    assert said.startswith("left after SIGTERM")
    expected = fill(place, WHOLE)
    fill(place, {"net.onnx": b"mod"})
    (said,) = problems(place, KILL, -signal.SIGKILL, expected, "")
    assert said == "out/net.onnx is there and is not what it should be"
    fill(place, WHOLE)
    (place.path / "out" / "plan.json").unlink()
    (said,) = problems(place, KILL, -signal.SIGKILL, expected, "")
    assert said == "the model is there, but not ['out/plan.json']"
    assert any("something was written" in said for said in problems(place, TERM, 143, expected))


def test_what_an_earlier_kill_has_left_is_not_held_against_the_next_run(place: Place) -> None:
    before = fill(place, {".net.onnx.0a1b2c-12.tmp.onnx": b"half", "net-0123.data": b"data"})
    expected = {"out/net-0123.data": before["out/net-0123.data"]}
    assert problems(place, TERM, 143, expected, before=before) == []
    (place.path / "out" / ".net.onnx.0a1b2c-12.tmp.onnx").unlink()  # the next run had come to that
    assert problems(place, TERM, 143, expected, before=before) == []
    fill(place, {".net.onnx.0a1b2c-13.tmp.onnx": b"half"})
    (said,) = problems(place, TERM, 143, expected, before=before)
    assert said.startswith("left after SIGTERM: ['out/.net.onnx.0a1b2c-13")
    (place.path / "out" / ".net.onnx.0a1b2c-13.tmp.onnx").unlink()
    fill(place, {"net-0123.data": b"other"})
    said, *_ = problems(place, TERM, 143, expected, before=before)
    assert said == "something was written, though stopped by SIGTERM: ['out/net-0123.data']"


def test_what_is_wrong_at_the_end(place: Place) -> None:
    expected = fill(place, WHOLE)
    done = Ended(0, "", 1.0, False)
    assert list(check_end(place, done, expected)) == ["there is no report"]
    fill(place, {"report.json": b"{}"})
    assert list(check_end(place, done, expected)) == []
    (place.path / "work" / "hap-onnx-data-0a1b2c-12-xyz").mkdir()
    (said,) = check_end(place, done, expected)
    assert said.startswith("left at the end")
    said, *_ = check_end(place, done, {**expected, "out/net-0123.data": "hash"})
    assert said == "not what an undisturbed run writes: ['out/net-0123.data']"
    (said,) = check_end(place, Ended(3, "why", 1.0, False), expected)
    assert said == "exit code 3 at the end: why"


def test_the_jobs_have_a_sound_model() -> None:
    onnx.checker.check_model(small_network(), full_check=True)
    assert {external for _, external in JOBS.values()} == {False, True}
