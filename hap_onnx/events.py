"""Progress as data: the library reports events, the command line draws them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """One step of a stage.

    ``kind`` is ``start`` (``total`` may be known), ``advance`` (by ``amount``; a ``message`` says how things
    stand), ``end``, ``note`` and ``warning`` (``message`` is for the user), or ``commit``: the results are
    complete beside their places and get their names now. Whoever stops a job should not do it from then on.
    """

    stage: str
    kind: Literal["start", "advance", "end", "note", "warning", "commit"]
    message: str = ""
    total: int | None = None
    amount: int = 1


OnEvent = Callable[[Event], None]


def ignore_event(event: Event) -> None:
    """Drop the event: the default of every function that reports progress."""


def track(items: Iterable[T], *, stage: str, total: int | None, on_event: OnEvent) -> Iterator[T]:
    """Yield ``items`` and report one ``advance`` for each, between a ``start`` and an ``end``."""
    on_event(Event(stage, "start", total=total))
    try:
        for item in items:
            yield item
            on_event(Event(stage, "advance"))
    finally:
        on_event(Event(stage, "end"))
