"""What freed tensors leave goes back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hap_onnx.refit.heap import freed_blocks_returned

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc only"
)


PROGRAM = """
import torch
from hap_onnx.refit.heap import LARGE_BYTES, freed_blocks_returned

def n_resident():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096

torch.ones(15 * LARGE_BYTES, dtype=torch.uint8)  # freed at once: glibc learns to keep such blocks
with freed_blocks_returned():
    before = n_resident()
    large = [torch.ones(4 * LARGE_BYTES, dtype=torch.uint8) for _ in range(20)]
    assert n_resident() - before > 70 * LARGE_BYTES
    del large[:-1]  # in a heap, the last one would keep all below it
    assert n_resident() - before < 10 * LARGE_BYTES
"""


def test_a_freed_tensor_leaves_nothing_though_a_later_one_stays() -> None:
    """In a process of its own: what earlier tests have left of a heap would be used up first."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


def test_a_threshold_of_the_users_own_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    library = SimpleNamespace(mallopt=lambda *words: calls.append(words))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    with freed_blocks_returned():
        pass
    assert len(calls) == 2
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1")
    with freed_blocks_returned():
        pass
    assert len(calls) == 2
