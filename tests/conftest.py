"""What holds for all tests."""

from __future__ import annotations

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command does; read when torch is imported

from collections.abc import Iterator
from uuid import uuid4

import pytest

from hap_onnx.jobs.machine import use_threads
from tests.limited import LimitedRunner


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests time out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let no test find times that another one has made up; the folder is made when it is needed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache" / uuid4().hex))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: more are slower on small models, and sums then depend on the machine."""
    with use_threads(1):
        yield


@pytest.fixture(scope="module")
def runner() -> Iterator[LimitedRunner]:
    """Run the command line within limits of time and memory."""
    with LimitedRunner() as runner:
        yield runner
