"""Names of nodes for charts and tables, where few letters have room."""

from __future__ import annotations

from collections.abc import Sequence

_TAILS = (2 / 3, 1.0)  # how much of the room the end of a name gets; ends tell more than starts


def shorten(names: Sequence[str], longest: int) -> list[str]:
    """Return names of at most ``longest`` letters, as different from each other as they can be.

    What all names start or end with (whole folders of it) goes first; what is still too long loses a part
    before its end.
    """
    parts = [name.split("/") for name in names]
    if len(parts) > 1:
        start, end = _n_common(parts), _n_common([part[::-1] for part in parts])
        room = min(map(len, parts)) - 1  # something is left of each
        start = min(start, room)
        end = min(end, room - start)
        parts = [part[start : len(part) - end] for part in parts]
    stripped = ["/".join(part) for part in parts]
    tries = [[_elide(name, longest, tail) for name in stripped] for tail in _TAILS]
    return max(tries, key=lambda shown: len(set(shown)))  # the first of equals


def _n_common(parts: Sequence[Sequence[str]]) -> int:
    """How many items all begin with."""
    columns = enumerate(zip(*parts))
    return next((place for place, column in columns if len(set(column)) > 1), min(map(len, parts)))


def _elide(name: str, longest: int, tail: float) -> str:
    if len(name) <= longest:
        return name
    n_last = int((longest - 1) * tail)
    return f"{name[: longest - 1 - n_last]}…{name[len(name) - n_last :]}"
