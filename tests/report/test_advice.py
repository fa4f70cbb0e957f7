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
from hap_onnx.config import describe_options, flag_of
from hap_onnx.report import Report, RoundRecovered
from hap_onnx.report.advice import next_step, next_steps, repeat_command
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
        "--providers CUDAExecutionProvider,CPUExecutionProvider --work-dir w --seed 3"
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


def test_compress_finds_what_analyze_has_kept() -> None:
    """Sensitivities in a work folder are those of certain samples: other ones begin anew."""
    given = {"work_dir": Path("w"), "seed": 3, "max_samples": 100, "probes": 50, "batch_size": 4}
    for step in next_steps(analyze_report(), data="c", options=given):
        assert step.command is not None
        name, *words = shlex.split(step.command)[1:]
        context = cli.cli.commands[name].make_context(name, words, obj=cli.Session())
        for option, value in given.items():
            assert str(context.params[option]) == str(value)
    assert "seed" not in str(next_step(compress_report(), data="c", options=given))  # on other data
    harmless = compress_report(quality=replace(QUALITY, drop=0.0, interval=(-0.01, 0.01)))
    assert "--sweep" in str(next_steps(harmless, data="c", options=given)[-1].command)
    assert "--work-dir w --probes 50" in str(next_steps(harmless, data="c", options=given)[-1].command)


def test_options_that_are_as_usual_are_not_repeated() -> None:
    usual = {option.name: option.default for option in describe_options()}
    for report in (compress_report(), analyze_report(), validate_report(), sweep_report(), inspect_report()):
        assert next_steps(report, data="c", options=usual) == next_steps(report, data="c")
    # analyze asks for no speed of its own accord
    told = next_steps(analyze_report(), data="c", options={**usual, "allow_slower": True})
    assert "--allow-slower" not in str(told)


def test_a_report_can_be_made_again_by_its_command() -> None:
    given = {
        "keep_macs": 0.123456789, "preprocess": Path("my recipe.toml"), "exclude": ("head.*", "b c"),
        "val": [{"x": 1}],
    }  # fmt: skip
    command = repeat_command(compress_report(model="-odd $(net).onnx"), data=Path("c d"), options=given)
    assert command == (
        "hap-onnx compress './-odd $(net).onnx' --data 'c d' --keep-macs 0.123456789 --exclude 'head.*' "
        "--exclude 'b c' --preprocess 'my recipe.toml' --val DATA"
    )
    sweep = repeat_command(sweep_report(), data="c", options={"sweep": (0.9, 0.5), "json": True, "seed": 1})
    assert sweep == "hap-onnx compress models/net.onnx --data c --sweep 0.9,0.5 --seed 1"
    given = {"providers": ("A", "B"), "max_drop": "none", "summary": Path("s.md")}
    validate = repeat_command(validate_report(), data=None, options=given)
    assert validate == (
        "hap-onnx validate a.onnx b.onnx --data DATA --max-drop none --providers A,B --summary s.md"
    )


def test_a_sweep_advises_the_same_everywhere_and_as_a_shell_reads_it() -> None:
    """The smallest model that shows no loss; names are quoted, capital letters or not."""
    lossy = sweep_report(model="MY NET.ONNX", output="A B")
    first, *others = lossy.points
    worse = replace(QUALITY, drop=0.1, interval=(0.09, 0.11))
    lossy = replace(lossy, points=(first, *(replace(point, quality=worse) for point in others[:2])))
    command = "hap-onnx apply 'MY NET.ONNX' 'A B/keep-macs-0.90.json'"
    assert next_steps(lossy)[0].command == command
    assert f"to write one: {command}" in render_report(lossy, io.StringIO())


def test_nothing_can_follow_where_nothing_can_shrink() -> None:
    report = analyze_report()
    empty = replace(report, analysis=replace(report.analysis, groups=(), layers=(), sizes=()))
    assert [step.command for step in next_steps(empty, data="c")] == [None]


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
