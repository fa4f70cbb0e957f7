"""Damaged and hostile files end in an exit code of the contract; and the judge of that sees what does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from onnx import ModelProto

from hap_onnx import cli
from tools.fuzz_files import (
    MODEL,
    OUT,
    ROOT,
    STRUCTURE,
    Arena,
    Base,
    FileCase,
    Limits,
    Random,
    draw_case,
    mutate_bytes,
    mutate_json,
    write_case,
)
from tools.fuzz_graphs import Seeded, random_model

MODEL_BYTES = random_model(Seeded(3)).SerializeToString()
# Python 3.12 warns of forks in processes with threads; what the children run here uses none.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    """An arena with one model, and without the time that making plans takes."""
    base = tmp_path / "base"
    base.mkdir()
    (base / MODEL).write_bytes(MODEL_BYTES)
    made = Arena.__new__(Arena)
    made.folder, made.limits, made.bases = tmp_path / "arena", Limits(wall_seconds=2.0), [Base(base, False)]
    return made


CASE = FileCase(0, 0, ("inspect", MODEL), ((MODEL, "rename", 1), (MODEL, "bytes", 2)))
WRITING = FileCase(0, 0, ("apply", MODEL, "plan.json", "-o", OUT), ())


def behave(monkeypatch: pytest.MonkeyPatch, act: Callable[[], int]) -> None:
    def main() -> int:
        assert sys.argv[0] == cli.PROGRAM
        return act()

    monkeypatch.setattr(cli, "main", main)


def say(text: str, code: int) -> int:
    os.write(2, text.encode())
    return code


def leave(name: str, code: int) -> int:
    Path(name).write_text("x")
    return say("hap-onnx: done\n", code)


def hang() -> int:
    signal.pause()
    return 0


def crash() -> int:
    os.kill(os.getpid(), signal.SIGKILL)  # not a fault, of which pytest would tell
    return 0


def raise_error() -> int:
    raise ValueError("left main")


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (lambda: say("", 0), "exit 0"),
        (lambda: say("hap-onnx: error: no such model\n", 1), "exit 1"),
        (lambda: say("Usage: hap-onnx\n", 2), "exit 2"),
        (lambda: say("", 1), "silent"),
        (lambda: say("hap-onnx: error: x\n", 7), "wrong code"),
        (lambda: say("Traceback (most recent call last)\n", 1), "traceback"),
        (lambda: say("hap-onnx: error: unexpected KeyError\n", 1), "unexpected"),
        (lambda: leave("left.tmp", 0), "files"),
        (lambda: leave("net.onnx", 1), "files"),
        (lambda: leave("../outside/new", 1), "outside"),
        (lambda: say(Path("link.bin").read_text()[:0] + "hap-onnx: read\n", 1), "outside"),
        (crash, "signal 9"),
        (hang, "hang"),
        (raise_error, "traceback"),
    ],
)
def test_what_a_command_does_is_seen(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, act: Callable[[], int], kind: str
) -> None:
    behave(monkeypatch, act)
    ending = arena.run(CASE)
    assert ending.kind == kind, ending
    assert ending.is_sound == kind.startswith("exit")
    assert not (arena.folder / "case").exists()


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (lambda: leave(OUT, 0), "exit 0"),
        (lambda: leave(OUT, 1), "files"),
        (lambda: say("", 0), "files"),
    ],
)
def test_an_output_appears_where_the_code_says_so(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, act: Callable[[], int], kind: str
) -> None:
    behave(monkeypatch, act)
    assert arena.run(WRITING).kind == kind


def test_limits_are_set(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_memory() -> int:
        try:
            return len(bytearray(8 << 30)) and say("hap-onnx: had it all\n", 0)
        except MemoryError:
            return say("hap-onnx: error: out of memory\n", 1)

    behave(monkeypatch, fill_memory)
    assert arena.run(CASE).kind == "exit 1"


def test_a_failing_case_keeps_the_mutations_that_it_takes(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed = mutated("rename", 1)

    def fail_if_renamed() -> int:
        found = ModelProto.FromString(Path(MODEL).read_bytes())
        return say("hap-onnx: x\n", 9 if found == renamed else 1)

    behave(monkeypatch, fail_if_renamed)
    case = FileCase(0, 0, ("inspect", MODEL), ((MODEL, "rename", 1), (MODEL, "remarks", 9999)))
    only = FileCase(0, 0, case.command, case.mutations[:1])
    ending = arena.run(only)
    assert ending.kind == "wrong code"
    assert arena.minimise(only, ending, in_process=False) == only


def mutated(name: str, seed: int) -> ModelProto:
    model = ModelProto.FromString(MODEL_BYTES)
    STRUCTURE[name](model, Random(seed))
    return model


@pytest.mark.parametrize("name", STRUCTURE)
def test_each_mutation_of_structure_changes_the_model_and_is_that_of_its_seed(name: str) -> None:
    changed = [mutated(name, seed).SerializeToString() for seed in range(12)]
    assert any(content != MODEL_BYTES for content in changed)
    assert [mutated(name, seed).SerializeToString() for seed in range(12)] == changed


def test_bytes_and_documents_are_changed_by_their_seed() -> None:
    changed = [mutate_bytes(MODEL_BYTES, Random(seed)) for seed in range(30)]
    assert len(set(changed)) > 25
    assert changed == [mutate_bytes(MODEL_BYTES, Random(seed)) for seed in range(30)]
    document = json.dumps({"a": [1, {"b": None}], "c": "x"}).encode()
    assert len({mutate_json(document, Random(seed)) for seed in range(30)}) > 10


def test_a_case_is_that_of_its_seed_and_its_files_are_beside_what_must_not_be_touched(
    arena: Arena, tmp_path: Path
) -> None:
    cases = [draw_case(seed, arena.bases) for seed in range(40)]
    assert cases == [draw_case(seed, arena.bases) for seed in range(40)]
    assert {case.command[0] for case in cases} == {"inspect", "compress", "validate"}  # there is no plan
    write_case(CASE, arena.bases[0], tmp_path / "case")
    assert (tmp_path / "case/work" / MODEL).read_bytes() != MODEL_BYTES
    assert (tmp_path / "case/work/link.bin").resolve() == (tmp_path / "case/outside/secret.bin").resolve()


def test_damaged_files_end_in_exit_codes_of_the_contract(tmp_path: Path) -> None:
    """In a process of its own: forks of this one would have the threads that torch has begun."""
    options = [
        "--n",
        "60",
        "--seed",
        "0",
        "--processes",
        "1",
        "--models",
        "3",
        "--keep",
        str(tmp_path / "kept"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tools.fuzz", "files", *options],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 cases from seed 0" in done.stdout
    assert not (tmp_path / "kept").exists()
