"""What holds for all tests."""

from __future__ import annotations

import logging
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


@pytest.fixture(autouse=True)
def _same_logging() -> Iterator[None]:
    """Let no test leave our loggers other than it has found them: a later one may ask what was logged."""
    before, disabled = _logging_state(), logging.root.manager.disable
    yield
    after, still = _logging_state(), logging.root.manager.disable
    logging.disable(disabled)
    assert still == disabled, f"logging.disable({still}) was left"
    changed = {name: (before.get(name), state) for name, state in after.items() if before.get(name) != state}
    for name in changed:  # the next test is not to blame
        if name in before:
            logger = logging.getLogger(name)
            logger.setLevel(before[name][0])
            logger.propagate, logger.disabled, logger.handlers[:] = before[name][1:]
    assert not {name for name in changed if name in before or after[name] != _NEW}, changed


_NEW = (logging.NOTSET, True, False, [])


def _logging_state() -> dict[str, tuple[int, bool, bool, list[logging.Handler]]]:
    """Level, propagation, whether it is disabled, and handlers of each of our loggers."""
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "hap_onnx"]
    loggers = {name: logging.getLogger(name) for name in ("hap_onnx", *names)}
    return {
        name: (logger.level, logger.propagate, logger.disabled, logger.handlers[:])
        for name, logger in loggers.items()
    }
