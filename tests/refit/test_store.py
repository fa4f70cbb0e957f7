"""Activations on disk: the same bits, and nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from hap_onnx.errors import CalibrationError
from hap_onnx.events import Event
from hap_onnx.refit.store import RESIDENT_BYTES, Store
from tests.forks import limit_files, memory_of, run_fork
from tests.refit.cases import deep_case, fit


def test_spilling_changes_no_bit_and_leaves_nothing_behind(tmp_path: Path) -> None:
    case = deep_case()
    options = {"ridge": 1e-3, "n_positions": 10}
    in_memory = fit(*case, **options)
    for limit in (0, 20_000):
        spilled = fit(*case, **options, memory_limit_bytes=limit, work_dir=tmp_path)
        assert spilled.keys() == in_memory.keys()
        for name, values in in_memory.items():
            np.testing.assert_array_equal(spilled[name], values)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_what_is_on_disk_takes_no_memory(tmp_path: Path) -> None:
    n_bytes = 4 * RESIDENT_BYTES

    def work() -> None:
        store = Store(tmp_path, 0)
        before, seen = memory_of("RssFile"), []
        for number in range(16):
            store.append(("", "x"), torch.full((n_bytes // 64,), float(number)))
            seen.append(memory_of("RssFile"))
        for number in range(16):
            assert [float(x) for x in store.get(("", "x"), number).aminmax()] == [number] * 2
            seen.append(memory_of("RssFile"))
        assert max(seen) - before < 2 * RESIDENT_BYTES
        store.close()

    ended = run_fork(work)
    assert ended.code == 0, ended.err


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(event: Event) -> None:
        if event.kind == "advance":
            assert any(tmp_path.rglob("*.bin"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(*deep_case(), memory_limit_bytes=0, work_dir=tmp_path, on_event=fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the space cannot be reserved here")
def test_a_disk_that_is_full_is_said_before_it_could_kill_the_process(tmp_path: Path) -> None:
    """Writing to a mapped file on a full disk raises no error: the system ends the process."""

    def spill() -> None:
        limit_files(10_000)
        store = Store(tmp_path, 0)
        store.append(("", "small"), torch.zeros(1000))
        with pytest.raises(CalibrationError, match=r"written to .* \(File too large\); give --work-dir"):
            store.append(("", "large"), torch.zeros(5000))

    ended = run_fork(spill)
    assert ended.code == 0, ended.err


def test_store_counts_a_storage_once_and_frees_it_with_its_last_view(tmp_path: Path) -> None:
    store = Store(tmp_path, 1000)
    whole = torch.arange(100, dtype=torch.float32)
    store.append(("", "whole"), whole)
    store.append(("", "view"), whole.reshape(10, 10)[::2].mT)
    assert store.n_bytes == 400
    store.append(("", "spilled"), torch.arange(200.0).reshape(20, 10).mT)
    assert (store.n_bytes, len(list(tmp_path.iterdir()))) == (400, 1)
    assert store.get(("", "spilled"), 0).stride() == (1, 10)
    torch.testing.assert_close(store.get(("", "spilled"), 0), torch.arange(200.0).reshape(20, 10).mT)
    store.drop(("", "whole"))
    assert store.n_bytes == 400
    store.close()
    assert (store.n_bytes, list(tmp_path.iterdir())) == (0, [])
