"""Text from files, made fit for a terminal."""

from __future__ import annotations

import unicodedata

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


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def one_line(text: str, *, longest: int = 2000) -> str:
    """Return a message on one line that can be read: what is longer has lost its middle."""
    text = printable(" ".join(text.split()))
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} [...] {text[-half:]}"
