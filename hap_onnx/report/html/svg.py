"""Figures of matplotlib as SVG inside a page: in the page's colours and font, with no names but its own."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context, rcParamsDefault
from matplotlib.figure import Figure

PIXELS_PER_INCH = 72  # one unit of the drawing is one CSS pixel

# What figures are painted with, and what a page puts there: it knows whether it is light or dark.
INK, GRID = "#767676", "#7a7a7b"
FIRST, SECOND, THIRD, GONE = "#1f7fd6", "#d0672b", "#7a52b3", "#8f9499"
_VARIABLES = {INK: "ink-soft", GRID: "grid", FIRST: "first", SECOND: "second", THIRD: "third", GONE: "gone"}

_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: it can be found, copied, and shown in the reader's font
    "svg.hashsalt": "hap-onnx",  # names of parts that do not change from run to run
    "text.parse_math": False,  # names may hold dollar signs
    "font.size": 12,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 12,
    "hatch.linewidth": 1.2,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Draw with the same settings on every machine, whatever its matplotlibrc says."""
    settings: dict[Any, Any] = {**rcParamsDefault, **_SETTINGS}
    settings = {name: value for name, value in settings.items() if not name.startswith("backend")}
    with rc_context(settings), warnings.catch_warnings():
        # The browser picks a font for what ours lacks; here glyphs are only measured.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*missing")
        yield


def inline_svg(figure: Figure, prefix: str) -> Markup:
    """Return a figure as an SVG element that is hidden from screen readers: its frame has to have the words.

    ``prefix`` sets the names inside apart from those of other figures on the page.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ET.fromstring(buffer.getvalue())
    _drop_namespaces(root)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):  # a style would hold for the whole page
                parent.remove(child)
    _rename(root, prefix)
    _tidy(root)
    width, height = (round(float(length)) for length in root.attrib["viewBox"].split()[2:])
    kept = {"viewBox": root.attrib["viewBox"], "width": str(width), "height": str(height)}
    root.attrib.clear()
    root.attrib.update({**kept, "aria-hidden": "true", "focusable": "false"})
    text = ET.tostring(root, encoding="unicode")
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return Markup(text)  # ElementTree has escaped it


def _drop_namespaces(root: ET.Element) -> None:
    """HTML knows what belongs to SVG."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in [name for name in element.attrib if name.startswith("{")]:
            element.attrib[name.rpartition("}")[2]] = element.attrib.pop(name)


def _rename(root: ET.Element, prefix: str) -> None:
    """Keep only names that something refers to, short and with ``prefix``; drop what the page says better."""
    used: dict[str, str] = {}

    def new_name(match: re.Match[str]) -> str:
        name = used.setdefault(match[1], f"{prefix}-{len(used)}")
        return match[0].replace(match[1], name)

    for element in root.iter():
        for key, value in element.attrib.items():
            if key in ("href", "clip-path", "style", "fill"):
                element.attrib[key] = re.sub(r"(?:^|url\()#([A-Za-z]\w+)", new_name, value)
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in used:
            element.attrib["id"] = used[name]
        if element.tag == "text":
            style = re.sub(r"font-family:[^;]*;?|font:[^;]*;?", _size_only, element.attrib.get("style", ""))
            element.attrib["style"] = style.strip()


def _tidy(root: ET.Element) -> None:
    """Leave out what nobody sees: blanks, and more than a hundredth of a pixel."""
    for element in root.iter():
        element.tail = None
        if element.tag != "text":
            element.text = None
        for key, value in element.attrib.items():
            if key in ("d", "x", "y", "width", "height", "transform"):
                value = re.sub(r"-?\d+\.\d+", _rounded, value)
                element.attrib[key] = " ".join(value.split())


def _rounded(match: re.Match[str]) -> str:
    return f"{float(match[0]) + 0.0:.2f}".rstrip("0").rstrip(".")


def _size_only(match: re.Match[str]) -> str:
    size = re.search(r"\d+(?:\.\d+)?px", match[0])
    return f"font-size: {size[0]};" if size else ""
