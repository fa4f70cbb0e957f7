"""Signals that wait, and all that writes files under a signal at every single step."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from sample_reports import compress_report

from hap_onnx import interrupts
from hap_onnx.data.array_data import SpillFolder
from hap_onnx.distill.checkpoint import Progress, save_state
from hap_onnx.errors import ValidationError
from hap_onnx.interrupts import hold_signals, interruptible
from hap_onnx.model.saving import save_model, write_text
from hap_onnx.model.temporary import temporary_folder
from hap_onnx.planning.kept import save_losses
from hap_onnx.planning.plan import CompressionPlan, GroupDecision, save_plan
from hap_onnx.report import files as report_files
from hap_onnx.timing.table import KeptTable, this_machine
from tests.every_step import Interrupted, handlers, signal_before
from tests.helpers import make_model, node, rand

INT, TERM = signal.SIGINT, signal.SIGTERM


# ---------------------------------------------------------------- holding


def interrupted(work: Callable[[list[str]], None]) -> list[str]:
    """Run ``work``, which a signal must end; return what it has done."""
    done: list[str] = []
    with handlers(), pytest.raises(Interrupted):
        work(done)
    return done


def test_signals_wait_for_the_end_of_the_block() -> None:
    def work(done: list[str]) -> None:
        with hold_signals():
            signal.raise_signal(INT)
            done.append("inner")
        done.append("after")

    assert interrupted(work) == ["inner"]


def test_signals_are_let_through_where_the_block_says_so() -> None:
    def work(done: list[str]) -> None:
        with hold_signals():
            signal.raise_signal(INT)
            try:
                with interruptible():
                    done.append("never")
            finally:
                done.append("cleaned up")

    assert interrupted(work) == ["cleaned up"]


def test_what_an_outer_block_holds_an_inner_one_does_not_let_through() -> None:
    def work(done: list[str]) -> None:
        with hold_signals():
            with hold_signals(), interruptible():
                signal.raise_signal(TERM)
                done.append("inner")
            done.append("outer")

    assert interrupted(work) == ["inner", "outer"]


def test_a_block_in_what_is_let_through_is_itself_let_through() -> None:
    def work(done: list[str]) -> None:
        with hold_signals(), interruptible(), hold_signals(), interruptible():
            signal.raise_signal(TERM)
            done.append("never")

    assert interrupted(work) == []


def test_a_second_signal_does_not_break_the_clean_up_after_the_first() -> None:
    def work(done: list[str]) -> None:
        with hold_signals():
            try:
                with interruptible():
                    signal.raise_signal(INT)
            finally:
                signal.raise_signal(TERM)
                done.append("cleaned up")

    assert interrupted(work) == ["cleaned up"]


def test_a_handler_that_returns_changes_nothing() -> None:
    came: list[int] = []
    before = signal.signal(INT, lambda number, _: came.append(number))
    try:
        with hold_signals(), interruptible():
            signal.raise_signal(INT)
            signal.raise_signal(INT)
            assert came == [INT, INT]
        with hold_signals():
            signal.raise_signal(INT)
            assert came == [INT, INT]
        assert came == [INT, INT, INT]
    finally:
        signal.signal(INT, before)


def test_what_is_ignored_or_the_systems_is_left_alone() -> None:
    before = signal.signal(TERM, signal.SIG_IGN)
    try:
        with hold_signals():
            assert signal.getsignal(TERM) is signal.SIG_IGN
            signal.raise_signal(TERM)
        assert signal.getsignal(TERM) is signal.SIG_IGN
    finally:
        signal.signal(TERM, before)


def test_in_other_threads_nothing_is_held() -> None:
    found = []

    def work() -> None:
        before = signal.getsignal(INT)
        with hold_signals(), interruptible():
            found.append(signal.getsignal(INT) is before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True]


# ---------------------------------------------------------------- a signal at every step


@cache
def model(seed: int) -> onnx.ModelProto:
    nodes, weights = [node("MatMul", ["x", "w"], ["y"])], {"w": rand(20, 20, seed=seed)}
    return make_model(nodes, inputs={"x": ["N", 20]}, outputs=["y"], weights=weights)


def save(folder: Path, *, seed: int = 1, external: bool = False, refuse: bool = False) -> None:
    def check(_: Path) -> None:
        if refuse:
            raise ValidationError("refused")

    with suppress(ValidationError):
        save_model(model(seed), folder / "out.onnx", external_data=external, check=check)


def save_external(folder: Path) -> None:
    save(folder, external=True)


def save_refused(folder: Path) -> None:
    save(folder, external=True, refuse=True)


def older_model(folder: Path) -> None:
    save(folder, seed=0, external=True)


def text(folder: Path) -> None:
    write_text(folder / "report.json", "{}", what="the report")


def text_in_the_way(folder: Path) -> None:
    with suppress(ValidationError):
        write_text(folder / "report.json", "{}", what="the report")


def a_folder_in_its_place(folder: Path) -> None:
    (folder / "report.json").mkdir()


REPORT = compress_report()
HERE = this_machine("CPUExecutionProvider", 1)


def reports(folder: Path) -> None:
    names = {"json": "r.json", "html": "r.html", "summary": "r.md"}
    report_files.write_reports(REPORT, **{kind: folder / name for kind, name in names.items()})


def plan(folder: Path) -> None:
    groups = (GroupDecision.from_keep("conv", 4, [0, 2]),)
    weights = {"w": np.ones((3, 2), np.float32)}
    save_plan(CompressionPlan("0" * 64, "1", {}, groups, weights=weights), folder / "plan.json")


def older_plan(folder: Path) -> None:
    save_plan(CompressionPlan("1" * 64, "1", {}, ()), folder / "plan.json")


def losses(folder: Path) -> None:
    known = SimpleNamespace(sensitivity="obs", n_measured=3, rankings=(), curves=(), implants={})
    save_losses(known, folder / "losses.safetensors")  # type: ignore[arg-type]


def training(folder: Path) -> None:
    save_state(folder / "state", "key", Progress(3, 1.0, 0.5, 2), {"w": torch.ones(2)})


def times(folder: Path) -> None:
    table = KeptTable(HERE, folder / "t.json")
    table.table.add("Conv 3x3", {(16, 32): 4.5})
    table.save()


def a_temporary_folder(folder: Path) -> None:
    with temporary_folder("refit", folder) as place, interruptible():
        (place / "much").write_bytes(b"much")


held: list[SpillFolder] = []


def unpacked_data(folder: Path) -> None:
    """Its folder goes with its owner: in a callback of Python's, which tells no signal on."""
    held[:] = [SpillFolder(folder)]
    held[0].new_file().write_bytes(b"much")


def nothing(folder: Path) -> None:
    pass


WRITERS = [
    (save, nothing),
    (save_external, nothing),
    (save_external, older_model),
    (save_external, save_external),
    (save_refused, nothing),
    (save_refused, older_model),
    (text, nothing),
    (text_in_the_way, a_folder_in_its_place),
    (reports, nothing),
    (plan, nothing),
    (plan, older_plan),
    (losses, nothing),
    (training, nothing),
    (times, nothing),
    (a_temporary_folder, nothing),
    (unpacked_data, nothing),
]
Work = Callable[[Path], None]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a file that is opened is closed when it is forgotten
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("write", "prepare"), WRITERS)
def test_a_signal_at_any_step_leaves_what_was_there_or_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Work, prepare: Work, every: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # takes long, and is not what this is about
    for name in ("html.render_html", "markdown.render_summary", "files._to_json"):  # they write no files
        monkeypatch.setattr(f"hap_onnx.report.{name}", lambda *_, **__: "drawn")

    def fresh(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        prepare(folder)
        return folder

    def reset() -> Path:
        shutil.rmtree(tmp_path / "place")
        return fresh("place")

    folder = fresh("place")
    before = contents(folder)
    write(folder)
    held.clear()
    after = contents(folder)
    whole = [before, after]
    gc.collect()
    n_descriptors = len(os.listdir("/dev/fd"))
    outcomes = set()
    for number in count(1, every):
        folder = reset()
        ended = signal_before(number, lambda folder=folder: write(folder), of=INT if number % 2 else TERM)
        held.clear()
        found = contents(folder)
        if write is reports:
            assert all(after.get(name) == content for name, content in found.items()), (number, found)
        else:
            assert found in whole, (number, set(found))
        assert (interrupts._closed, interrupts._waiting) == ([False], [])
        if ended is None:
            break
        outcomes.add(found == after)
    gc.collect()
    assert len(os.listdir("/dev/fd")) <= n_descriptors
    assert outcomes == {True} if before == after else {False, True}
