"""The last line names a command that the parser takes, with the files at hand."""

from __future__ import annotations

import io
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from sample_reports import (
    QUALITY,
    analyze_report,
    compress_report,
    inspect_report,
    sweep_report,
    validate_report,
)

from hap_onnx import cli
from hap_onnx.config import flag_of
from hap_onnx.report import Report, RoundRecovered
from hap_onnx.report.advice import next_step
from hap_onnx.report.render import render_report

LOST = replace(QUALITY, drop=0.05, passed=True, max_drop=None)


@pytest.mark.parametrize(
    ("report", "data", "words"),
    [
        (inspect_report(), None, "analyze net.onnx --data DATA"),
        (inspect_report(), Path("my calib"), "analyze net.onnx --data 'my calib'"),
        (compress_report(), Path("c"), "validate models/net.onnx models/net.hap.onnx --data DATA"),
        (
            compress_report(quality=LOST), Path("c"),
            "compress models/net.onnx --data c --keep-macs 0.5 --max-bytes 2e+06 --epochs 20",
        ),
        (
            compress_report(quality=LOST, recovery=(RoundRecovered("distill"),)), Path("c"),
            "validate models/net.onnx models/net.hap.onnx --data DATA",
        ),
        (
            validate_report(), Path("t"),
            "validate a.onnx b.onnx --data t --max-drop 0.01 --summary summary.md",
        ),
        (
            validate_report(quality=replace(QUALITY, passed=False), passed=False), Path("t"),
            "compress a.onnx --data DATA --max-drop 0.01",
        ),
    ],
)  # fmt: skip
def test_a_report_is_followed_by_a_command(report: Report, data: Path | None, words: str) -> None:
    step = next_step(report, data=data)
    assert step is not None
    assert step.startswith(f"hap-onnx {words}  (")
    name, *rest = shlex.split(words)
    known = {option for param in cli.cli.commands[name].params for option in param.opts}
    assert {word for word in rest if word.startswith("--")} <= known


@pytest.mark.parametrize(
    "report", [compress_report(output=None), compress_report(quality=None), sweep_report()], ids=str
)
def test_nothing_follows_where_nothing_was_written_or_the_report_says_it(report: Report) -> None:
    assert next_step(report, data="c") is None


def test_an_analysis_is_followed_by_the_smallest_size_that_loses_little() -> None:
    report = analyze_report()
    losses = [(0.9, 0.001), (0.6, 0.009), (0.3, 0.4)]
    sizes = tuple(replace(report.analysis.sizes[0], asked=asked, loss=loss) for asked, loss in losses)
    flag = flag_of(f"keep_{report.analysis.objective}")
    some = replace(report, analysis=replace(report.analysis, sizes=sizes))
    found = next_step(some, data="c", options={"work_dir": Path("w")})
    command = f"hap-onnx compress {report.model} --data c {flag} 0.6 --work-dir w"
    assert found == f"{command}  (expected loss 0.009: small)"
    none = replace(report, analysis=replace(report.analysis, sizes=sizes[2:]))
    assert next_step(none, data="c") == (
        f"hap-onnx compress {report.model} --data c  (the smallest model within a point)"
    )


def test_the_next_command_knows_the_data_as_the_last_one_did() -> None:
    """Without its preprocessing the model would see noise, and what was to be left alone would change."""
    given = {
        "preprocess": "raw", "val": Path("my test"), "exclude": ("head.*", "b c"), "allow_slower": True,
        "providers": ("CUDAExecutionProvider", "CPUExecutionProvider"), "work_dir": Path("w"), "seed": 3,
        "keep_macs": 0.5, "html": Path("page.html"),
    }  # fmt: skip
    kept = (
        "--preprocess raw --val 'my test' --exclude 'head.*' --exclude 'b c' --allow-slower "
        "--providers CUDAExecutionProvider,CPUExecutionProvider --work-dir w"
    )
    again = next_step(compress_report(quality=LOST), data="c", options=given)
    assert again is not None
    assert again.startswith(
        f"hap-onnx compress models/net.onnx --data c --keep-macs 0.5 --max-bytes 2e+06 --epochs 20 {kept}  ("
    )
    validate = next_step(compress_report(), data="c", options={**given, "allow_slower": False})
    assert validate is not None
    assert validate.startswith(
        "hap-onnx validate models/net.onnx models/net.hap.onnx --data DATA --preprocess raw "
        "--providers CUDAExecutionProvider,CPUExecutionProvider  ("
    )
    for step in (again, validate):
        name, *words = shlex.split(step.partition("  (")[0])[1:]
        cli.cli.commands[name].make_context(name, words, obj=cli.Session())
    analyze = next_step(inspect_report(), data="c", options={"exclude": ("a",), "json": True})
    assert analyze is not None
    assert analyze.startswith("hap-onnx analyze net.onnx --data c --exclude a  (")


def test_the_line_is_plain_in_a_pipe() -> None:
    text = render_report(analyze_report(), io.StringIO(), advice="hap-onnx compress x")
    assert text.endswith("\nnext: hap-onnx compress x\n")
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_bars_are_of_letters_that_the_stream_has() -> None:
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert render_report(analyze_report(), plain).isascii()
    utf = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    assert "\u2588" in render_report(analyze_report(), utf)
