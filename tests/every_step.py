"""A signal at every step of some code at which Python may call its handler."""

from __future__ import annotations

import contextlib
import dis
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FrameType
from typing import Any

import hap_onnx

# What the functions of other modules do is one step, as a signal in them is one before or after it.
PLACES = (os.path.dirname(hap_onnx.__file__), *(module.__file__ for module in (contextlib, shutil, tempfile)))


class Interrupted(BaseException):
    """What the handlers here raise, as that of the command line does."""


def _handler(number: int, _: FrameType | None) -> None:
    raise Interrupted(number)


@contextlib.contextmanager
def handlers() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise Interrupted."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, _handler) for number in numbers]
    try:
        yield
        assert [signal.getsignal(number) for number in numbers] == [_handler, _handler]
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


class _Steps:
    """Counts the steps of some code, and acts before one of them.

    Handlers are called when a function begins, after a call and at a jump back (so it is in all versions of
    CPython); here also at the start of each line.
    """

    def __init__(self, number: int, act: Callable[[], None]) -> None:
        self.n_seen = 0
        self._number, self._act = number, act
        self._last: dict[int, str] = {}  # by id: a frame that is kept keeps what it holds

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "call":
            if not frame.f_code.co_filename.startswith(PLACES):
                return None
            frame.f_trace_opcodes = True
            self._last[id(frame)] = "CALL"
        elif event == "line":
            self._last[id(frame)] = "CALL"
        elif event == "opcode":
            if "CALL" in self._last[id(frame)] or "JUMP" in self._last[id(frame)]:
                self.n_seen += 1
                if self.n_seen == self._number:
                    self._act()
            self._last[id(frame)] = _names(frame.f_code)[frame.f_lasti]
        elif event == "return":
            del self._last[id(frame)]
        return self.trace


@cache
def _names(code: CodeType) -> dict[int, str]:
    return {step.offset: step.opname for step in dis.get_instructions(code)}


def signal_before(number: int, work: Callable[[], object], *, of: int = signal.SIGINT) -> bool | None:
    """Run ``work`` with a signal before its step of that number, counted from one.

    Returns:
        Whether it ended with Interrupted; None if it has fewer steps. Other exceptions are let through where
        there was no signal, or it came too late to matter.
    """
    steps = _Steps(number, lambda: signal.raise_signal(of))
    with handlers():
        before = sys.gettrace()
        try:
            sys.settrace(steps.trace)
            try:
                work()
            finally:
                sys.settrace(before)
        except Interrupted:
            return True
    return False if steps.n_seen >= number else None
