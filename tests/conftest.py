"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hap_onnx.jobs.machine import use_threads


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: more are slower on small models, and sums then depend on the machine."""
    with use_threads(1):
        yield
