"""What the README and the pages of docs/ show: their blocks of code, and the commands in these."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md")))

# What makes lines a script, which is run as a whole.
_SCRIPT = re.compile(r"^\s*(set|if|for|while|case|export|trap|exec|cd) |\$\?|<<|^\w+=\S*$", re.MULTILINE)
_NAME = re.compile(r"<!-- (\S+\.\w+) -->")


@dataclass(frozen=True)
class Block:
    """Code on a page; ``name`` is that of the file which it shows (a comment before it says so), or ""."""

    page: str
    line: int
    language: str
    text: str
    name: str = ""


@dataclass(frozen=True)
class Command:
    """What a user would enter at once: a line with its continuations, or a whole script."""

    page: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        """The words of a plain line, without its comment."""
        return shlex.split(self.text, comments=True)

    @property
    def label(self) -> str:
        """Where it is and how it begins, for the names of tests."""
        return f"{self.page}:{self.line} {' '.join(self.text.split())[:60]}"


def find_blocks() -> Iterator[Block]:
    """Yield the blocks of all pages in order; those that Markdown only indents are commands."""
    parser = MarkdownIt("commonmark").enable("table")
    for path in PAGES:
        page = str(path.relative_to(ROOT))
        name = ""
        for token in parser.parse(path.read_text(encoding="utf-8")):
            if token.type == "html_block":
                match = _NAME.match(token.content)
                name = match.group(1) if match else ""
            elif token.type in ("fence", "code_block"):
                assert token.map is not None
                language = token.info.strip() if token.type == "fence" else "sh"
                yield Block(page, token.map[0] + 1, language, token.content, name)
                name = ""


def find_commands() -> Iterator[Command]:
    """Yield the commands of all blocks that a shell would read."""
    for block in find_blocks():
        if block.language != "sh":
            continue
        if _SCRIPT.search(block.text):
            yield Command(block.page, block.line, block.text)
            continue
        begun = ""
        for number, line in enumerate(block.text.splitlines(), start=block.line + 1):
            begun += line
            if line.endswith("\\"):
                begun = begun[:-1]
            elif begun.strip() and not begun.strip().startswith("#"):
                yield Command(block.page, number, begun.strip())
                begun = ""
            else:
                begun = ""
