"""Summaries in Markdown, seen through a parser of Markdown: what a page shows, whatever the names are."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from sample_reports import AFTER, QUALITY, analyze_report, compress_report, sweep_report, validate_report

from hap_onnx.report import Conversion, FrozenNode, Latency, Quality
from hap_onnx.report.markdown import MAX_REASONS, code, escape, render_summary, render_sweep_markdown
from hap_onnx.report.printable import one_line, printable

LATENCY = Latency(2.41, 1.72, 0.714, (0.7, 0.73), 99, 1, "CPUExecutionProvider", 1)
ALLOWED = {
    "code", "details", "h3", "li", "p", "strong", "summary", "table", "tbody", "td", "th", "thead",
    "tr", "ul",
}  # fmt: skip


class Page(HTMLParser):
    """A rendered page: its tags, and its text by block."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.blocks = [""]
        parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
        self.feed(parser.render(markdown))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("code", "em", "strong"):
            self.blocks.append("")

    def handle_data(self, data):
        self.blocks[-1] += data

    @property
    def texts(self) -> list[str]:
        return [text for block in self.blocks if (text := block.replace("\u200b", "").strip())]

    @property
    def rows(self) -> int:
        return self.tags.count("tr")


def texts_of(report, **options):
    return Page(render_summary(report, **options)).texts


def every_report():
    return [compress_report(latency=LATENCY), sweep_report(), validate_report(), analyze_report()]


# ---------------------------------------------------------------- what is said


def test_a_summary_begins_with_the_verdict_and_what_was_gained():
    report = compress_report(latency=LATENCY)
    first, second, *others = texts_of(report)
    assert first == "✅ models/net.onnx: file -52.1 %, MACs -50.6 %, 1.40x faster, accuracy -0.82 points"
    assert second == "Written to models/net.hap.onnx."
    table = ["", "before", "after", "change", "parameters", "855,770", "402,113", "-53.0 %"]
    assert others[: len(table) - 1] == table[1:]
    for line in (
        "budget: keep-macs 50.0 %, reached 49.4 %; max-bytes 2.00 MB, reached 1.64 MB",
        "latency: 0.714 of the original's (95 %: 0.700 to 0.730), batch 1, 1 thread, CPU",
        "quality: -0.82 points (-1.50 to -0.10) on 1017 held-out samples; gate -1.00 passed",
        "plan: 40 of 48 channels kept, 1 of 2 groups narrower, 1 implant (1 lowrank), 1 residual branch "
        "removed",
        "1 node could not be touched, and why",
        "Gemm_1: feeds a graph output",
        "hap-onnx 0.1.0 · seed 0 · 32.2 s",
    ):
        assert line in others


def test_numbers_are_aligned_to_the_right():
    lines = render_summary(compress_report()).splitlines()
    rule = next(line for line in lines if re.fullmatch(r"[|:-]+", line))
    assert re.fullmatch(r"\|-+\|(-+:\|){3}", rule)


def test_a_refused_result_says_so_first():
    quality = replace(QUALITY, passed=False, drop=0.05, after=0.8772)
    report = compress_report(output=None, quality=quality)
    first, second, *others = texts_of(report, refusal="accuracy drops by 0.05, more than --max-drop 0.01")
    assert first.startswith("❌ models/net.onnx: refused: file -52.1 %")
    assert second == "Nothing was written. Accuracy drops by 0.05, more than --max-drop 0.01."
    assert any("gate -1.00 FAILED" in text for text in others)
    first, second, *_ = texts_of(report)  # the report alone tells as much
    assert first.startswith("❌ models/net.onnx: refused")
    assert second == "Nothing was written."


def test_a_result_that_is_refused_for_another_reason_says_so_too():
    first, second, *_ = texts_of(compress_report(output=None))
    assert first.startswith("❌")
    first, second, *_ = texts_of(compress_report(output=None), refusal="the result is slower")
    assert first.startswith("❌")
    assert second == "Nothing was written. The result is slower."


def test_a_dry_run_is_neither_passed_nor_refused():
    first, second, *others = texts_of(compress_report(output=None, quality=None, fidelity=None))
    assert first == "models/net.onnx: file -52.1 %, MACs -50.6 %"
    assert second == "Nothing was written: this is a plan, not measured yet."
    assert not any("gate" in text for text in others)


@pytest.mark.parametrize(
    ("quality", "words"),
    [
        (replace(QUALITY, max_drop=None), "There was no quality gate"),
        (QUALITY, "the interval reaches beyond it"),
        (replace(QUALITY, interval=(0.001, 0.009)), None),
        (replace(QUALITY, passed=False), None),
    ],
)
def test_what_a_verdict_leaves_open_is_said(quality, words):
    caveats = [text for text in texts_of(compress_report(quality=quality)) if text.startswith("⚠️")]
    assert len(caveats) == (words is not None)
    assert all(words in text for text in caveats)


def test_warnings_of_the_job_are_listed():
    texts = texts_of(compress_report(), warnings=["refit did not help", "weights are *not* trained"])
    assert {"⚠️ refit did not help", "⚠️ weights are *not* trained"} <= set(texts)


def test_the_steps_of_a_conversion_have_a_table_of_their_own():
    then = Conversion("int8", {"weight_bits": 8}, AFTER, AFTER, None, AFTER, ("a", "b", "c", "d"))
    page = Page(render_summary(compress_report(then=then)))
    assert page.tags.count("table") == 2
    assert {"int8 only", "int8: weight bits 8", "left in float32: a, b, c and 1 more"} <= set(page.texts)


def test_a_comparison_says_whether_it_passes():
    first, *_ = texts_of(validate_report())
    assert first.startswith("✅ b.onnx against a.onnx: passed: file -52.1 %")
    failed = Quality("r2", 1.0, 0.8, 0.2, (0.1, 0.3), 1, 0.01, False)
    first, *others = texts_of(validate_report(quality=failed, slower=True, passed=False))
    assert first.startswith("❌ b.onnx against a.onnx: fails the gate: file -52.1 %")
    assert "⚠️ The candidate is slower than the reference beyond noise." in others
    assert any("on 1 sample; gate -0.0100 FAILED" in text for text in others)


def test_a_sweep_names_its_plans_and_how_to_write_a_model():
    page = Page(render_summary(sweep_report()))
    assert page.texts[0] == "✅ models/net.onnx: 5 models tried, 2 to choose from"
    assert page.rows == 7
    command = "hap-onnx apply models/net.onnx models/net.hap.sweep/keep-macs-0.50.json"
    assert f"To write one: {command}" in page.texts
    assert "x 0.30: accuracy drops by 0.1272" in page.texts
    assert "img" not in page.tags  # the plot does not travel with the summary
    refused = sweep_report(points=sweep_report().points[3:], output=None)
    first, second, *others = texts_of(refused, refusal="no point is left")
    assert first == "❌ models/net.onnx: 2 models tried, 0 to choose from"
    assert second == "Nothing was written. No point is left."
    assert not any("hap-onnx apply" in text for text in others)


def test_the_page_of_a_sweep_shows_its_plot():
    text = render_sweep_markdown(sweep_report())
    assert "![quality over cost](sweep.svg)" in text
    table = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in table} == {8}
    assert [row[-1].strip() for row in table[2:]] == [
        "", "keep-macs-0.90.json", "keep-macs-0.70.json", "keep-macs-0.50.json", "", "",
    ]  # fmt: skip
    assert [row[0].strip() for row in table[2:]] == ["", "\\*", "", "\\*", "x", "x"]


def test_an_analysis_shows_sizes_and_the_least_sensitive_groups():
    page = Page(render_summary(analyze_report()))
    assert page.texts[0] == "models/net.onnx: 2 groups of channels can shrink, 1 layer can be replaced"
    assert page.tags.count("table") == 2
    position = page.texts.index("narrow")
    assert page.texts[position : position + 5] == ["narrow", "32", "1,000", "2,000", "0.125 ± 0.01"]
    assert position < page.texts.index("wide")
    position = page.texts.index("50.0 %")
    assert page.texts[position : position + 5] == ["50.0 %", "60.0 %", "50.0 %", "70.0 %", "0.25"]


def test_what_is_frozen_is_told_once_per_reason_and_not_without_end():
    frozen = tuple(FrozenNode(f"node_{i}", "feeds an output") for i in range(5))
    assert "node_0, node_1, node_2 and 2 more: feeds an output" in texts_of(compress_report(frozen=frozen))
    frozen = tuple(FrozenNode(f"node_{i}", f"reason {i} {'x' * 500}") for i in range(MAX_REASONS + 30))
    text = render_summary(compress_report(frozen=frozen))
    assert len(text) < 30_000
    assert "and 30 other reasons" in text
    assert "details" not in render_summary(compress_report(frozen=()))


# ---------------------------------------------------------------- hostile names

HOSTILE = (
    "<script>alert(1)</script>", "a|b", "`x`", "``", "*a* _b_ ~~c~~", "[a](https://example.org)",
    "![a](https://example.org/b.png)", "line\nline", "- a", "1. a", "# a", "    a", "</details>", "<!-- ",
    "&lt;", "a\\", "\\|", "\x1b[2J", "\u202eabc", "| a | b |", "---", "~~~", "$a$", "\ud800", "", " ",
)  # fmt: skip


def shown(name: str) -> str:
    """How a page shows a name: control characters as escapes, runs of white space as one."""
    return " ".join(printable(name).split())


def hostile_reports(name: str):
    frozen = (FrozenNode(name, f"it feeds '{name}'"),)
    quality = replace(QUALITY, metric=name)
    yield compress_report(model=name, output=name, frozen=frozen, quality=quality), {"refusal": f"a {name}"}
    yield validate_report(reference=name, candidate=name, quality=quality), {}
    points = tuple(
        replace(point, plan=name, quality=point.quality and replace(point.quality, metric=name), refused=name)
        for point in sweep_report().points
    )
    yield sweep_report(model=name, output=name, points=points), {"refusal": name, "warnings": [name]}
    plain = analyze_report()
    groups = tuple(replace(group, name=name) for group in plain.analysis.groups)
    analysis = replace(plain.analysis, groups=groups)
    yield replace(plain, model=name, frozen=frozen, analysis=analysis), {}


@pytest.mark.parametrize("name", HOSTILE)
def test_names_cannot_become_markup(name):
    for (report, options), harmless in zip(hostile_reports(name), hostile_reports("harmless"), strict=True):
        page = Page(render_summary(report, **options))
        expected = Page(render_summary(harmless[0], **harmless[1]))
        assert set(page.tags) <= ALLOWED
        assert page.tags == expected.tags
        if shown(name):
            assert shown(name) in page.texts[0]
        assert "\x1b" not in "".join(page.texts)


def test_links_and_mentions_are_cut_in_sentences_and_inert_in_names():
    frozen = (FrozenNode("#12", "see www.a.org, http://b.org, c@d.org"),)
    text = render_summary(compress_report(model="@everyone", frozen=frozen), warnings=["@everyone #12"])
    prose = re.sub(r"`[^`]*`", "", text)
    for link in ("@everyone", "#12", "www.", "://", "@d.org"):
        assert link not in prose
    assert "`@everyone`" in text
    assert "see www.a.org, http://b.org, c@d.org" in text.replace("&#8203;", "")


@example("1. a")
@example("12)")
@example("- a")
@example("# a")
@given(st.text(max_size=60))
def test_any_text_is_shown_as_it_is(text):
    page = Page(f"- {escape(text)}\n\n| {escape(text)} | b |\n|---|---|\n| {escape(text)} | b |\n")
    assert set(page.tags) <= {"ul", "li", "table", "thead", "tbody", "tr", "th", "td"}
    expected = one_line(text, longest=10**6).replace("\u200b", "")
    assert page.texts == [*([expected] if expected else []), *(2 * ([expected, "b"] if expected else ["b"]))]


@given(st.text(max_size=60))
def test_any_name_is_a_code_span(name):
    page = Page(f"- {code(name)}\n\n| a | b |\n|---|---|\n| {code(name).replace('|', chr(92) + '|')} | b |\n")
    assert page.tags.count("code") == 2
    assert set(page.tags) <= {"ul", "li", "code", "table", "thead", "tbody", "tr", "th", "td"}
    expected = shown(name).replace("\u200b", "")
    assert [text for text in page.texts if text not in ("a", "b")] == [
        text for text in 2 * [expected] if text not in ("", "a", "b")
    ]


@pytest.mark.parametrize("report", every_report())
def test_summaries_end_in_one_newline_and_have_no_lines_of_blanks(report):
    text = render_summary(report)
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert all(line == line.rstrip() for line in text.splitlines())
