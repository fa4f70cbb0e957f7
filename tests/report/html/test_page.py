"""Pages of reports: all figures are there, in valid and harmless HTML, the same each time."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sample_reports import (
    QUALITY,
    WORST,
    analysis,
    compress_report,
    frozen_nodes,
    full_analysis,
    full_report,
    layer_name,
    sweep_report,
    validate_report,
)

import hap_onnx.report.html
from hap_onnx.report import (
    Budget,
    Conversion,
    FrozenNode,
    GroupKept,
    ImplantUsed,
    Latency,
    LayerChosen,
    ModelFacts,
    PlanSummary,
)
from hap_onnx.report.analysis import WorstSample
from hap_onnx.report.html import charts, render_html

VOID = {"meta", "link", "img", "br", "hr", "input"}
PNG = b"\x89PNG\r\n\x1a\n" + b"rest"
HOSTILE = "</title></style><script>alert('1')</script>\"'><img src=x onerror=alert(2)>$x_1$\x1b[2J\u202e"


class Page(HTMLParser):
    """A parsed page: tags in order with their attributes, texts by the tag that they are in, and headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is there twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        """All that can be read, blanks folded."""
        words = " ".join(text for tag, text in self.texts if tag not in ("style", "title"))
        return " ".join(words.replace("\N{NO-BREAK SPACE}", " ").split())

    @property
    def sections(self) -> list[str]:
        return [attrs["id"] for tag, attrs in self.tags if tag == "section"]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


REPORTS = {
    "plain": compress_report(),
    "full": full_report(6, 9),
    "analyze": full_analysis(6, 9),
    "sweep": sweep_report(),
    "validate": validate_report(),
}


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    return {name: Page(render_html(report)) for name, report in REPORTS.items()}


# ---------------------------------------------------------------- what is there


def test_a_page_has_the_sections_that_its_report_has_data_for(pages):
    assert {name: page.sections for name, page in pages.items()} == {
        "plain": ["in-short", "before-after", "changes", "predictions", "frozen", "time", "provenance"],
        "full": ["in-short", "before-after", "changes", "groups", "layers", "sizes", "predictions",
                 "training", "frozen", "worst", "time", "provenance"],
        "analyze": ["in-short", "groups", "layers", "sizes", "predictions", "frozen", "time", "provenance"],
        "sweep": ["in-short", "family", "time", "provenance"],
        "validate": ["in-short", "before-after", "provenance"],
    }  # fmt: skip


def test_the_headline_says_how_much_smaller_and_how_much_worse(pages):
    text = pages["full"].text
    for words in (
        "file -52.1 % 3.43 MB → 1.64 MB",
        "parameters -53.0 % 855,770 → 402,113",
        "(MACs) -50.6 % 125.5 M → 62.0 M",
        "latency 1.40x faster 2.41 → 1.72 ms; 0.70 to 0.73 of the time (95 %)",
        "accuracy -0.82 points 92.72 % → 91.90 %; -1.50 to -0.10 (95 %); limit -1.00 kept",
    ):
        assert words in text


def test_every_question_has_an_answer(pages):
    text = pages["full"].text
    for words in (
        "How much smaller and faster is it? The file has 1.64 MB in place of 3.43 MB, and 47.0 %",
        "On this machine it is 1.40 times as fast (2.41 ms before, 1.72 ms after).",
        "How much worse is it? Accuracy, the share of samples that the model gets right, went from 92.72 "
        "% to "
        "91.90 % (-0.82 points) on 1017 samples that were used for nothing else.",
        "a true loss beyond it cannot be ruled out",
        "What was changed? 28 of 96 channels were removed, in 4 of 6 channel groups",
        "1 residual branch went entirely. 4 layers got a cheaper stand-in, called implant (2 lowrank, 2 "
        "spatial).",
        "What could not be touched? 30 parts of the model had to keep all channels. The most frequent of "
        "3 reasons, "
        "for 14 of them: Add joins what must stay.",
        "What to do next? Put it to a last test on data that had no say in any of this: "
        "hap-onnx validate models/net.onnx models/net.hap.onnx --data DATA",
    ):
        assert words in text


def test_an_analysis_says_how_far_it_is_cheap(pages):
    assert "Down to 70.0 % of the multiply-accumulates it is at most 0.01" in pages["analyze"].text
    dear = tuple(replace(point, loss=0.02) for point in full_analysis().analysis.sizes)
    report = full_analysis(analysis=replace(full_analysis().analysis, sizes=dear))
    assert "Down to" not in Page(render_html(report)).text


def test_every_group_and_layer_has_its_figures_in_a_table(pages):
    report = REPORTS["full"]
    text = pages["full"].text
    for group in report.analysis.groups:
        assert f"{group.name} inner 16 {group.kept} {group.score:.3g} {group.std_error:.3g} 4,608" in text
    for layer in report.analysis.layers:
        assert f"{layer.node} Conv {layer.chosen} {layer.score:.3g} {layer.std_error:.3g} 2,304" in text


def test_what_became_of_a_layer_is_told_in_shares_of_its_channels():
    plan = PlanSummary(
        (GroupKept("a", 16, 4, "12 go"), GroupKept("stream", 8, 6), GroupKept("gone", 8, 0)),
        layers=(
            LayerChosen("a", "lowrank", "rank 3"),
            LayerChosen("gone", "dense", "branch"),
            LayerChosen("last", "dense", "branch"),
            LayerChosen("other", "removed", "branch"),
            LayerChosen("free", "dense", "as it is"),
        ),
        removed_branches=("last",),
    )
    text = Page(render_html(compress_report(plan=plan))).text
    assert "a 0 25 75 lowrank rank 3 gone 0 0 100 branch last 0 0 100 branch other 0 0 100 branch" in text
    assert "free 100 0 0 as it is" in text


def test_pointwise_kernels_replace_only_some_channels_of_a_layer():
    """The others keep their whole kernels beside them."""
    plan = PlanSummary(
        (GroupKept("a", 16, 12), GroupKept("b", 16, 16)),
        (ImplantUsed("a", "pointwise", 3), ImplantUsed("b", "pointwise", 4)),
        layers=(LayerChosen("a", "pointwise", "3 of 12"), LayerChosen("b", "pointwise", "4 of 16")),
    )
    text = Page(render_html(compress_report(plan=plan))).text
    assert "a 56 19 25 pointwise 3 of 12 b 75 25 0 pointwise 4 of 16" in text


def test_groups_of_an_analysis_say_which_layers_they_narrow():
    report = full_report(3, 3)
    shared = replace(report.analysis.groups[1], name="stream", nodes=(layer_name(0), layer_name(2)), kept=12)
    known = replace(report.analysis, groups=(shared,))
    plan = replace(report.plan, groups=(GroupKept("stream", 16, 12),), removed_branches=())
    text = Page(render_html(replace(report, analysis=known, plan=plan))).text
    assert f"{layer_name(0)} 75 0 25 it loses" in text
    assert f"{layer_name(1)} 0 100 0 lowrank it loses" in text
    assert f"{layer_name(2)} 75 0 25 it loses" in text


def test_sizes_predictions_times_and_provenance_have_their_figures(pages):
    text = pages["full"].text
    assert "50.0 % 51.0 % 49.4 % 0.04 this plan" in text
    assert "--keep-macs asked 50.0 %, reached 49.4 %" in text
    assert "--max-drop asked 0.01, reached 0.0082" in text
    assert "train 310.0 73.5 %" in text
    assert "onnxruntime 1.31.1" in text
    assert "seed 0" in text
    assert "hap-onnx/compress/1" in text
    assert "sensitivity by gauss-newton losses measured on 512 samples" in text
    assert "Of 48 trials" in text


def test_frozen_parts_are_told_once_per_reason_with_all_their_names():
    page = Page(render_html(compress_report(frozen=frozen_nodes(30))))
    some = "/head/part.2/Gemm, /head/part.3/Gemm, /head/part.6/Gemm and 11 more"
    assert f"Add joins what must stay 14 {some}" in page.text
    named = [text for tag, text in page.texts if tag == "li" and text.startswith("/head/")]
    assert Counter(named) == Counter(f"/head/part.{place}/Gemm" for place in range(30))


def test_pictures_are_shown_only_if_they_are_given():
    report = compress_report(worst=WORST)
    assert Page(render_html(report)).count("img") == 0
    page = Page(render_html(report, images={17: PNG, 99: PNG}))
    (image,) = [attrs for tag, attrs in page.tags if tag == "img"]
    assert image["src"].startswith("data:image/png;base64,iVBORw0KGgp")
    assert image["alt"] == "sample 17, cat"
    with pytest.raises(ValueError, match="sample 17, cat: not a PNG file"):
        render_html(report, images={17: b"GIF89a"})


def test_worst_samples_without_classes_have_no_columns_for_them():
    page = Page(render_html(compress_report(worst=(WorstSample(4, None, 0.25),))))
    assert "sample distance 4 0.25" in page.text
    assert "right is" not in page.text


def test_samples_tell_how_many_answers_break_and_mend(pages):
    words = (
        "Of these 3 samples, the answer changes on 2. Right before and wrong now: 1; wrong before and "
        "right now: 1."
    )
    assert words in pages["full"].text


def test_a_conversion_has_a_table_of_its_steps():
    original, compressed = ModelFacts(10, 10, 4000, 2.0, 0.9), ModelFacts(5, 5, 2000, 1.0, 0.8)
    both, settings = ModelFacts(5, 5, 600, 0.5, 0.7), {"calibration": "minmax", "weight_bits": 8}
    then = Conversion("int8", settings, original, compressed, None, both, ("Gemm_1",))
    text = Page(render_html(compress_report(then=then))).text
    assert "file 4.00 kB 2.00 kB - 600 B" in text
    assert "left in float32: Gemm_1" in text
    assert "Then numbers were stored in 8 bits in place of 32." in text


def test_a_sweep_shows_its_family_and_what_to_choose(pages):
    text = pages["sweep"].text
    assert "2 models to choose from, of 5 asked for." in text
    figures = "accuracy 92.50 %, a change of -0.22 points, which may be chance."
    assert f"At 49.9 % of the multiply-accumulates: {figures}" in text
    assert "To keep 30 %: accuracy drops by 0.1272." in text
    assert "To keep 0.01 %: the budget cannot be reached." in text
    assert "hap-onnx apply models/net.onnx models/net.hap.sweep/keep-macs-0.50.json" in text


# ---------------------------------------------------------------- odd reports


def test_a_failed_gate_and_a_plan_say_that_nothing_was_written():
    failed = replace(QUALITY, passed=False, after=0.9, drop=0.0272, interval=(0.02, 0.035))
    text = Page(render_html(compress_report(output=None, quality=failed))).text
    assert "Nothing was written: too much quality was lost." in text
    assert "the gate failed" in text
    assert "accept a larger loss (--max-drop)" in text
    text = Page(render_html(compress_report(output=None, quality=None, fidelity=None))).text
    assert "Nothing was written: this is a plan only." in text
    assert "run the same command without --dry-run" in text


def test_what_was_refused_for_its_speed_is_no_plan():
    """All was measured and the quality gate holds, and yet there is no model: the page says why."""
    slow = Latency(1.0, 1.5, 1.5, (1.4, 1.6), 99, 1, "CPU", 1)
    report = compress_report(output=None, latency=slow)
    why = "the result is slower than the original in onnxruntime; keep less, or pass --allow-slower"
    for page in (Page(render_html(report, refusal=why)), Page(render_html(report))):
        assert "plan only" not in page.text
        assert "--dry-run" not in page.text
        assert "too much quality" not in page.text
        assert [attrs["class"] for tag, attrs in page.tags if "verdict" in (attrs.get("class") or "")] == [
            "verdict bad"
        ]
    told = Page(render_html(report, refusal=why)).text
    assert "Nothing was written: the result is slower than the original in onnxruntime" in told
    assert "Nothing was written: it was refused." in Page(render_html(report)).text
    sweep = sweep_report(points=sweep_report().points[3:])
    told = Page(render_html(sweep, refusal="no point of the sweep is met")).text
    assert "Nothing was written: no point of the sweep is met." in told


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((0.8, 0.9), "it is 1.18 times as fast"),
        ((0.9, 1.1), "It is as fast as before, as far as could be measured"),
        ((1.1, 1.2), "it is slower: it takes 0.85 times"),
    ],
)
def test_latency_is_told_by_its_interval(interval, words):
    latency = Latency(2.0, 1.7, 0.85, interval, 99, None, "CPU", 1)
    assert words in Page(render_html(validate_report(latency=latency))).text


def test_a_comparison_claims_nothing_about_its_samples():
    """Anybody may compare two models on the data that one of them was made with."""
    assert "used for nothing else" in Page(render_html(compress_report())).text
    text = Page(render_html(validate_report())).text
    assert "used for nothing else" not in text
    assert "held-out" not in text
    assert "on 1017 samples. With 95 % confidence" in text


def test_a_page_tells_one_speed():
    """The ratio of the rounds, not that of the medians, which a busy machine may put outside the interval."""
    latency = Latency(0.890, 0.734, 0.783, (0.766, 0.807), 161, 1, "CPUExecutionProvider", 1)
    text = Page(render_html(validate_report(latency=latency))).text
    assert text.count("1.28x faster") == 2
    assert "it is 1.28 times as fast (0.89 ms before, 0.734 ms after)" in text
    assert "1.21" not in text


def test_a_model_compared_with_itself_has_no_change_that_may_be_chance():
    same = replace(QUALITY, after=QUALITY.before, drop=0.0, interval=(0.0, 0.0))
    text = Page(render_html(validate_report(quality=same))).text
    assert "No sample tells the two models apart." in text
    assert "may be chance" not in text


def test_sizes_of_which_nothing_is_known_are_not_named():
    report = full_analysis()
    known, *others = report.analysis.sizes
    lost = tuple(replace(point, loss=math.inf) for point in others)
    text = Page(render_html(full_analysis(analysis=replace(report.analysis, sizes=(known, *lost))))).text
    assert "is expected at a share of the multiply-accumulates: " in text
    assert "inf at" not in text
    text = Page(render_html(full_analysis(analysis=replace(report.analysis, sizes=lost)))).text
    assert "what that costs is not known of any size" in text


def test_numbers_that_are_none_break_no_chart():
    known = analysis(4, 4)
    odd = [math.nan, math.inf, 0.0, -1e-3]
    groups = tuple(replace(group, score=score, std_error=math.nan) for group, score in zip(known.groups, odd))
    layers = tuple(replace(layer, score=0.0, std_error=None, curves=()) for layer in known.layers)
    sizes = tuple(replace(size, loss=math.nan) for size in known.sizes[:2]) + known.sizes[2:]
    known = replace(known, groups=groups, layers=layers, sizes=sizes)
    page = Page(render_html(compress_report(analysis=known)))
    assert {"groups", "layers", "sizes"} <= set(page.sections)
    assert "nan" not in "".join(attrs.get("d") or "" for tag, attrs in page.tags if tag == "path")


def test_empty_reports_have_a_page_too():
    empty = replace(analysis(1, 1), groups=(), layers=(), sizes=(), chosen=None)
    page = Page(render_html(full_analysis(analysis=empty, frozen=(), seconds={})))
    assert page.sections == ["in-short", "provenance"]
    facts = ModelFacts(0, None, 0)
    report = compress_report(before=facts, after=facts, plan=PlanSummary(), frozen=(), budget=Budget(),
                             seconds={}, versions={}, quality=None, fidelity=None)  # fmt: skip
    assert Page(render_html(report)).sections == ["in-short", "before-after", "provenance"]
    page = Page(render_html(sweep_report(points=(), complete=False)))
    assert "No model was found that may be chosen." in page.text
    assert "5 points of 5 not done" in page.text


# ---------------------------------------------------------------- safe, valid, the same


def test_names_from_files_are_text_and_nothing_else():
    report = full_report(3, 3)
    group = replace(report.analysis.groups[0], name=HOSTILE, nodes=(HOSTILE,))
    layer = replace(report.analysis.layers[0], node=HOSTILE, op_type=HOSTILE)
    known = replace(report.analysis, groups=(group, *report.analysis.groups[1:]), sensitivity=HOSTILE,
                    layers=(layer, *report.analysis.layers[1:]))  # fmt: skip
    plan = replace(report.plan, groups=(GroupKept(HOSTILE, 4, 2, HOSTILE),), removed_branches=(HOSTILE,),
                   layers=(LayerChosen(HOSTILE, HOSTILE, HOSTILE), *report.plan.layers[1:]))  # fmt: skip
    report = replace(
        report, model=HOSTILE, output=HOSTILE, analysis=known, plan=plan,
        frozen=(FrozenNode(HOSTILE, HOSTILE),) * 9,
        seconds={HOSTILE: 1.0, "b": 2.0}, versions={HOSTILE: HOSTILE},
        worst=(WorstSample(17, HOSTILE, 1.0, HOSTILE, HOSTILE, "x"),),
        quality=replace(report.quality, metric=HOSTILE), budget=Budget({HOSTILE: 1.0}),
    )  # fmt: skip
    text = render_html(report, images={17: PNG})
    page = Page(text)
    assert page.count("script") == 0
    assert page.count("img") == 1
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert not {"\x1b", "\u202e"} & set(text)
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert [value for tag, value in page.texts if tag == "h1"] == [shown]
    assert any("$x_1$" in value for tag, value in page.texts if tag == "text")  # a label, not a formula


@pytest.mark.parametrize(
    "name", ["日本語の層/畳み込み", "$\\frac{1}{0}$", "a" * 5000, "", "/", "//", "&amp;"]
)
def test_any_name_can_be_a_label(name):
    rows = [charts.Dot(name, 1.0, None, "layer"), charts.Dot("b", 2.0, 0.5, "layer")]
    drawing = charts.draw_dots("x", rows, label="loss", series=["layer"])
    assert Page(str(drawing.narrow)).count("svg") == Page(str(drawing.wide)).count("svg") == 1


def test_a_command_with_odd_file_names_is_quoted_for_a_shell():
    text = render_html(compress_report(model="my net.onnx", output="out;rm -rf.onnx"))
    command = re.findall("<pre><code>(.*?)</code></pre>", text)[0]
    shown = "".join(part for _, part in Page(command).texts)  # each word in a tag that holds it together
    assert shown == "hap-onnx validate 'my net.onnx' 'out;rm -rf.onnx' --data DATA"


def test_a_page_tells_how_it_came_about_and_goes_on_in_the_same_way():
    """Without the preprocessing and what was left alone, nobody gets the same again."""
    given = {"preprocess": "raw", "exclude": (f"head{HOSTILE}",), "seed": 3, "html": Path("page.html")}
    made = "Images are resized <somehow>."
    page = Page(render_html(compress_report(), data=Path("my data"), options=given, preprocessing=made))
    assert f"data {made}" in page.text
    assert "hap-onnx compress models/net.onnx --data 'my data' --exclude 'head" in page.text
    assert "--preprocess raw --seed 3 --html page.html" in page.text
    assert "hap-onnx validate models/net.onnx models/net.hap.onnx --data DATA --preprocess raw" in page.text
    assert page.count("script") == 0
    assert "\x1b" not in page.text


@pytest.mark.parametrize("name", REPORTS)
def test_a_page_loads_nothing_and_runs_nothing(pages, name):
    page = pages[name]
    assert not {"script", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        for key in ("src", "href", "xlink:href", "action", "data"):
            value = attrs.get(key) or "#"
            assert value.startswith(("#", "data:")), (tag, value)
    style = "".join(text for tag, text in page.texts if tag == "style")
    assert not re.search(r"@import|https?:|url\(", style)
    policy = [attrs["content"] for _, attrs in page.tags if "Security" in (attrs.get("http-equiv") or "")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


@pytest.mark.parametrize("name", REPORTS)
def test_a_page_is_well_formed(pages, name):
    page = pages[name]
    assert page.tags[0] == ("html", {"lang": "en"})
    assert [page.count(tag) for tag in ("h1", "main", "header", "nav", "footer")] == [1] * 5
    names = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(names) == len(set(names))
    links = [attrs["href"] for tag, attrs in page.tags if attrs.get("href", "").startswith("#")]
    assert {link[1:] for link in links} <= set(names)
    styles = " ".join(str(attrs.get("style")) + str(attrs.get("clip-path")) for _, attrs in page.tags)
    assert set(re.findall(r"url\(#([\w-]+)\)", styles)) <= set(names)
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    for tag, attrs in page.tags:
        assert tag != "th" or attrs["scope"] in ("row", "col")
        assert attrs.get("role") != "img" or attrs["aria-label"].startswith("Chart: ")
    assert page.count("caption") == page.count("table")
    assert page.count("svg") == 2 * sum(attrs.get("role") == "img" for _, attrs in page.tags)


def test_charts_are_painted_in_the_colours_of_the_page(pages):
    style = "".join(text for tag, text in pages["full"].texts if tag == "style")
    known = set(re.findall(r"--([\w-]+):", style))
    paints = [str(attrs.get("style")) + str(attrs.get("fill")) for _, attrs in pages["full"].tags]
    used = set(re.findall(r"var\(--([\w-]+)\)", " ".join(paints)))
    assert {"first", "second", "gone", "ink-soft"} <= used <= known
    assert not re.search(r"(?:fill|stroke): (?:#|rgb)", " ".join(paints))


def test_the_same_report_gives_the_same_page_in_every_process():
    here = render_html(compress_report())
    assert render_html(compress_report()) == here
    code = (
        "from sample_reports import compress_report; from hap_onnx.report.html import render_html;"
        "sys.stdout.buffer.write(render_html(compress_report()).encode())"
    )
    tests = Path(__file__).parents[2]
    paths = f"import sys; sys.path[:0] = [{str(tests.parent)!r}, {str(tests)!r}];"
    there = subprocess.run([sys.executable, "-c", paths + code], capture_output=True, check=True, timeout=120)
    assert there.stdout.decode() == here


def test_settings_of_the_user_do_not_change_the_page():
    from matplotlib import rc_context

    report = compress_report()
    here = render_html(report)
    with rc_context({"font.size": 30, "axes.grid": False, "lines.linewidth": 9, "svg.fonttype": "path"}):
        assert render_html(report) == here


def test_charts_grow_with_layers_until_labels_thin_out():
    def measure(n: int) -> tuple[int, int]:
        rows = [charts.Dot(f"layer {place}", 1.0 + place, None, "layer") for place in range(n)]
        page = Page(str(charts.draw_dots("x", rows, label="loss", series=["layer"]).wide))
        labels = sum(tag == "text" and text.startswith("layer") for tag, text in page.texts)
        return int(page.tags[0][1]["height"]), labels

    few, many, most = measure(30), measure(60), measure(240)
    assert [few[1], many[1], most[1]] == [30, 60, 120]
    assert few[0] * 1.8 < many[0] < 1400
    assert most[0] < 2200


def test_what_is_not_known_stands_at_the_right_end_and_says_so():
    known = analysis(3, 3)
    groups = (replace(known.groups[0], score=math.inf, std_error=None), *known.groups[1:])
    text = Page(render_html(full_analysis(analysis=replace(known, groups=groups)))).text
    assert "An open mark at the right end: not known." in text
    assert f"{groups[0].name} inner 16 16 not known 4,608" in text
    assert f"A channel of {groups[1].name} matters most, one of {groups[2].name} least." in text or (
        f"A channel of {groups[2].name} matters most, one of {groups[1].name} least." in text
    )


def test_importing_the_package_imports_nothing_that_draws():
    folder = str(Path(hap_onnx.__file__).parents[1])
    code = (
        f"import sys; sys.path.insert(0, {folder!r}); import hap_onnx.report.html;"
        "assert not {'matplotlib', 'jinja2', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---------------------------------------------------------------- colours


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_stand_out_in_light_and_dark():
    style = (Path(hap_onnx.report.html.__file__).parent / "page.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part))
        for part in style.split("@media (prefers-color", 1)
    )
    assert set(light) == set(dark)
    for colors in (light, dark):
        for paper in ("paper", "raised"):
            for ink in ("ink", "ink-soft", "link", "good", "bad"):
                assert contrast(colors[ink], colors[paper]) >= 4.5, (ink, paper)
        for paint in ("first", "second", "third", "gone", "grid"):
            assert contrast(colors[paint], colors["paper"]) >= 3, paint


@pytest.mark.parametrize("names", [("kept", "gone"), ("gone", "kept")])
def test_colours_go_by_what_series_mean_and_not_by_what_comes_first(names):
    rows = [charts.Dot(str(place), 1.0 + place, None, name) for place, name in enumerate(names)]
    page = Page(str(charts.draw_dots("x", rows, label="loss", series=["kept", "gone"]).wide))
    assert [text for tag, text in page.texts if tag == "text" and text in names] == ["kept", "gone"]
