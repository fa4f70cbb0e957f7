"""Two directives that show what the code declares: ``options`` (of one section) and ``errors``.

A page that uses them cannot say anything else than ``--help`` does. Links to SECURITY.md, which work wherever
the files are looked at one by one, lead to its page here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from hap_onnx import errors
from hap_onnx.config import describe_options, flag_of


def plain(text: str) -> str:
    """Return Markdown that shows ``text`` as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", text)


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """Return a Markdown table; cells are Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def describe_value(schema: Mapping[str, Any]) -> str:
    """Return in Markdown which values a schema allows."""
    if "anyOf" in schema:
        return ", or ".join(map(describe_value, schema["anyOf"]))
    if "title" in schema:
        return plain(schema["title"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema["type"] == "array":
        return "a list of such"
    if schema["type"] in ("number", "integer"):
        return "number" if schema["type"] == "number" else "whole number"
    return {"boolean": "`true` or `false`", "string": "text"}[schema["type"]]


def option_rows(section: str) -> Iterator[tuple[str, str, str]]:
    for option in describe_options("compress"):
        facts = option.metadata
        if facts["section"] != section:
            continue
        name = f"`{flag_of(option.name)[2:]}`"
        value = describe_value(facts["check"].schema)
        default = option.default
        shown = "" if default is None or default == () or default is False else f"  Default: `{default}`."
        yield name, "path" if value == "text" and facts["is_path"] else value, plain(facts["help"]) + shown


def error_rows() -> Iterator[tuple[str, str, str]]:
    for error in vars(errors).values():
        if inspect.isclass(error) and issubclass(error, errors.HapOnnxError):
            meaning = inspect.cleandoc(error.__doc__ or "").split("\n\n")[0].replace("\n", " ")
            yield f"{{py:exc}}`~hap_onnx.errors.{error.__name__}`", str(error.exit_code), meaning


class Options(SphinxDirective):
    """``{options} Target``: the options of that section of ``--help``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        rows = list(option_rows(self.arguments[0]))
        if not rows:
            raise self.error(f"there is no section {self.arguments[0]} of options")
        return self.parse_text_to_nodes(table(("option", "value", "meaning"), iter(rows)))


class Errors(SphinxDirective):
    """``{errors}``: all errors with their exit codes."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(table(("error", "exit code", "means"), error_rows()))


def point_here(app: Sphinx, name: str, source: list[str]) -> None:
    """Let a link to a file that lies above these pages lead to the page that shows it."""
    source[0] = source[0].replace("](../SECURITY.md", "](security.md")


def setup(app: Sphinx) -> dict[str, bool]:
    """Make the directives known; called by Sphinx."""
    app.add_directive("options", Options)
    app.add_directive("errors", Errors)
    app.connect("source-read", point_here)
    return {"parallel_read_safe": True}
