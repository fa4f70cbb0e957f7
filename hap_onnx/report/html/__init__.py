"""A report as one HTML page that needs nothing else: no network, no scripts, no files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hap_onnx.report import AnalyzeReport, CompressReport, SweepReport, ValidateReport

ReportOnPage = CompressReport | AnalyzeReport | SweepReport | ValidateReport


def render_html(
    report: ReportOnPage,
    *,
    images: Mapping[int, bytes] | None = None,
    refusal: str | None = None,
    data: Any = None,
    options: Mapping[str, Any] | None = None,
    preprocessing: str = "",
) -> str:
    """Return a report as a page; the same report gives the same text.

    Importing what draws takes a moment, so that is done here.

    Args:
        images: PNG files by ``WorstSample.index``, shown beside the samples on which the models differ most.
        refusal: why nothing was written, if the command ends in an error: the message of the error.
        data, options: those of the command, for what makes the report again and what may follow.
        preprocessing: how the data was read, in a sentence.

    Raises:
        ValueError: if an image is no PNG file.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from hap_onnx.report.html.pages import make_page

    environment = Environment(
        loader=PackageLoader("hap_onnx.report.html", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["tight"] = _tight
    page = make_page(
        report,
        images=images or {},
        refusal=refusal,
        data=data,
        options=options or {},
        preprocessing=preprocessing,
    )
    return environment.get_template("page.html.jinja").render(page=page)


def _tight(text: str) -> str:
    """Keep signs of per cent on the line of their number."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")
