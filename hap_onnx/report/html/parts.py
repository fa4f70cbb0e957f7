"""What a page consists of, as data; the template gives it its tags."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from hap_onnx.report.html.charts import Drawing

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Image:
    """A picture in a cell of a table, as a data URI."""

    source: str
    text: str  # for those who do not see it

    @staticmethod
    def of(png: bytes, text: str) -> Image:
        """Return the picture in ``png``; raises ValueError if it is no PNG file."""
        if not png.startswith(_PNG):
            raise ValueError(f"{text}: not a PNG file")
        return Image(f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}", text)


Cell = str | Image


@dataclass(frozen=True)
class Table:
    """Rows under ``columns``; the first cell of each row names it. ``texts`` are the columns that are no
    numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    texts: frozenset[int] = frozenset({0})
    kind: str = "table"


@dataclass(frozen=True)
class Chart:
    """A drawing with what it shows in words, and its numbers as a table."""

    text: str
    caption: str
    drawing: Drawing
    table: Table
    kind: str = "chart"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Command:
    """A line for a shell."""

    text: str
    kind: str = "command"


@dataclass(frozen=True)
class Listing:
    """Items under a title that can be opened: too many to be read in passing."""

    title: str
    items: tuple[str, ...]
    kind: str = "listing"


Part = Table | Chart | Text | Command | Listing


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading of its own; ``name`` is where links go."""

    name: str
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Card:
    """One figure of the headline: what it is, how it changed, and from what to what."""

    name: str
    value: str
    note: str
    tone: str = ""  # good, bad or nothing


@dataclass(frozen=True)
class Answer:
    """A question that every reader has, and its answer in plain words."""

    question: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """One report."""

    kind: str
    model: str
    verdict: str
    passed: bool | None
    cards: Sequence[Card]
    answers: Sequence[Answer]
    sections: Sequence[Section]
