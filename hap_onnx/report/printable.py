"""Text from files, made fit for a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T")

_HARMFUL = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))


def printable(text: str, *, keep: str = "") -> str:
    r"""Write control characters as escapes, apart from those in ``keep``.

    Names in a model file can hold what a terminal obeys: ``\x1b[2J`` clears it, others set its title or turn
    the direction of writing. Half characters, which file names may have, cannot even be printed.
    """
    if text.isprintable():  # nearly always
        return text
    return "".join(
        letter if letter in keep or unicodedata.category(letter) not in _HARMFUL else _escape(letter)
        for letter in text
    )


def printable_parts(value: T) -> T:
    """Return a report, or a part of one, with all its texts printable: names in it come from files."""
    found: Any = value
    if isinstance(value, str):
        found = printable(value)
    elif isinstance(value, (tuple, list)):
        found = type(value)(map(printable_parts, value))
    elif isinstance(value, Mapping):
        found = {printable_parts(key): printable_parts(item) for key, item in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: printable_parts(getattr(value, part.name)) for part in fields(value)}
        found = replace(value, **parts)
    return found


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def one_line(text: str, *, longest: int = 2000) -> str:
    """Return a message on one line that can be read: what is longer has lost its middle."""
    text = printable(" ".join(text.split()))
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} [...] {text[-half:]}"
