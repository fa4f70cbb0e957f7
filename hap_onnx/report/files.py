"""Reports as files: JSON for machines, a page and a summary for people. Each is complete or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hap_onnx.model.saving import write_text
from hap_onnx.report import InspectReport, Report

Images = Mapping[int, bytes]


def write_reports(
    report: Report,
    *,
    json: Path | None = None,
    html: Path | None = None,
    summary: Path | None = None,
    images: Callable[[], Images] = dict,
    refusal: str | None = None,
    warnings: Sequence[str] = (),
    data: Any = None,
    options: Mapping[str, Any] | None = None,
    preprocessing: str = "",
) -> None:
    """Write those that have a name, of a report that has such a form; raises ValidationError.

    Args:
        images: makes the pictures of the page, by the number of the sample.
        refusal: what the command ends with, where that is an error.
        warnings: what it said on its way, for the summary.
        data, options, preprocessing: what the report is about, for the page; see ``render_html``.
    """
    if summary is not None and not isinstance(report, InspectReport):
        from hap_onnx.report.markdown import render_summary

        write_text(summary, render_summary(report, refusal=refusal, warnings=warnings), what="the summary")
    if html is not None and not isinstance(report, InspectReport):
        from hap_onnx.report.html import render_html  # what draws is slow to import

        page = render_html(
            report,
            images=images(),
            refusal=refusal,
            data=data,
            options=options,
            preprocessing=preprocessing,
        )
        write_text(html, page, what="the page")
    if json is not None:
        write_text(json, _to_json(report), what="the report")


def _to_json(report: Report) -> str:
    return json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"
