"""Ctrl-C and SIGTERM wait while something is done that must not be left half done.

Python calls the handler of a signal between any two steps of a program: between the making of a file and the
``try`` that removes it, or in the middle of a clean-up. So what makes something that has to go again does it
with signals held, and lets them through only where a ``try`` is around them:

    with hold_signals():
        folder.mkdir()
        try:
            with interruptible():
                ...
        finally:
            shutil.rmtree(folder)

After the first signal that was let through, all others wait until the outermost ``hold_signals`` is left.
Only handlers that are Python functions are held; in other threads than the main one, where no handler is ever
called, both do nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_NUMBERS = (signal.SIGINT, signal.SIGTERM)

_handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}  # those that ours stands in for
_waiting: list[int] = []
_closed = [False]
"""Whether signals wait: in the program, and in each block that was entered, the innermost last."""


def _handle(number: int, frame: FrameType | None) -> None:
    if _closed[-1]:
        _waiting.append(number)
        return
    before = _closed[:]
    _closed[1:] = [True] * (len(before) - 1)  # if the handler raises, what follows is the clean-up
    _handlers[number](number, frame)
    _closed[:] = before


def _deliver() -> None:
    while _waiting and not _closed[-1]:
        _handle(_waiting.pop(0), None)


def _stand_in() -> None:
    for number in _NUMBERS:
        handler = signal.getsignal(number)
        if callable(handler) and handler is not _handle:
            _handlers[number] = handler
            signal.signal(number, _handle)


def _stand_back() -> None:
    for number, handler in _handlers.items():
        if signal.getsignal(number) is _handle:
            signal.signal(number, handler)


class hold_signals:
    """Let signals wait until the end of the block.

    A class, as ``interruptible``: a generator that was left without its end would come to it at any time.
    """

    def __enter__(self) -> None:
        self._depth = len(_closed) if threading.current_thread() is threading.main_thread() else 0
        if not self._depth:
            return
        try:
            if self._depth == 1:
                _stand_in()
            _closed.append(True)
        except BaseException:  # of a handler that ours did not stand in for yet
            self._end()
            raise

    def __exit__(self, *_: object) -> None:
        if not self._depth:
            return
        try:
            self._end()
        except BaseException:  # of a handler, somewhere in the middle
            self._end()
            raise

    def _end(self) -> None:
        del _closed[self._depth :]
        if self._depth == 1:
            _stand_back()
        _deliver()


class interruptible:
    """Let signals through, inside of ``hold_signals``, as far as they were before it."""

    def __enter__(self) -> None:
        self._depth = len(_closed) if threading.current_thread() is threading.main_thread() else 0
        if self._depth:
            _closed.append(all(_closed[-2:]))
            _deliver()

    def __exit__(self, *_: object) -> None:
        if self._depth:
            del _closed[self._depth :]
