"""What a report means, in words for readers who have never heard of any of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from hap_onnx.report import (
    AnalyzeReport,
    CompressReport,
    FrozenNode,
    Latency,
    ModelFacts,
    Quality,
    SweepPoint,
    SweepReport,
    ValidateReport,
    words,
)
from hap_onnx.report.advice import SMALL_LOSS, Step
from hap_onnx.report.analysis import SizePoint
from hap_onnx.report.html.parts import Answer, Command, Part, Text

FEW_SAMPLES = 500  # below, the 95 % interval of an accuracy is several points wide
_COST_VERBS = {"params": "stores", "macs": "computes", "latency": "needs"}


def compress_answers(report: CompressReport, steps: Sequence[Step]) -> list[Answer]:
    """How much smaller, how much worse, what changed, what could not be touched, what to do next."""
    return [
        Answer(
            "How much smaller and faster is it?",
            [Text(_smaller(report.before, report.after)), *_faster(report)],
        ),
        Answer("How much worse is it?", _worse(report.quality, held_out=True)),
        Answer("What was changed?", _changed(report)),
        Answer("What could not be touched?", [Text(_frozen(report.frozen))]),
        _next(steps),
    ]


def validate_answers(report: ValidateReport, steps: Sequence[Step]) -> list[Answer]:
    """How much smaller, how much worse, what to do next."""
    return [
        Answer(
            "How much smaller and faster is it?",
            [Text(_smaller(report.before, report.after)), *_faster(report)],
        ),
        Answer("How much worse is it?", _worse(report.quality, held_out=False)),
        _next(steps),
    ]


def analyze_answers(report: AnalyzeReport, steps: Sequence[Step]) -> list[Answer]:
    """How small it could become, what it depends on most, what cannot be touched, what to do next."""
    return [
        Answer("How small could it become?", _could_become(report)),
        Answer("What does it depend on most?", _depends_on(report)),
        Answer("What cannot be touched?", [Text(_frozen(report.frozen))]),
        _next(steps),
    ]


def sweep_answers(report: SweepReport, steps: Sequence[Step]) -> list[Answer]:
    """What there is to choose from, how much worse each is, what to do next."""
    best = [point for point in report.points if point.best and point.quality is not None]
    return [
        Answer("How small can it become, and how much worse is it then?", _family(report, best)),
        Answer("What could not be done?", _refused(report)),
        _next(steps),
    ]


# ---------------------------------------------------------------- how much smaller, how much worse


def _smaller(before: ModelFacts, after: ModelFacts) -> str:
    parts = [
        f"The file has {words.file_size(after.bytes)} in place of {words.file_size(before.bytes)}, and "
        f"{_of(after.params, before.params)} of the parameters (the numbers that the model has learned) "
        "are left."
    ]
    if before.macs and after.macs is not None:
        parts.append(
            f"One run takes {_of(after.macs, before.macs)} of the multiply-accumulates (MACs), "
            "the arithmetic that a model consists of."
        )
    return " ".join(parts)


def _of(part: float, whole: float) -> str:
    return words.share(part / whole) if whole else "?"


def _faster(report: CompressReport | ValidateReport) -> list[Text]:
    """One paragraph on speed; none where nothing was timed."""
    latency = report.latency
    if latency is None:
        return []
    low, high = latency.interval
    times = f"{latency.before_ms:.3g} ms before, {latency.after_ms:.3g} ms after"
    if low <= 1 <= high:
        text = f"It is as fast as before, as far as could be measured ({times})."
    elif high < 1:
        text = f"On this machine it is {1 / latency.ratio:.2f} times as fast ({times})."
    else:
        text = f"On this machine it is slower: it takes {latency.ratio:.2f} times as long ({times})."
    text += f" With 95 % confidence, it takes {low:.2f} to {high:.2f} of the original's time{_on(latency)}."
    return [Text(text)]


def _on(latency: Latency) -> str:
    threads = "" if latency.threads is None else f", {words.plural(latency.threads, 'thread')}"
    return f" ({latency.provider.removesuffix('ExecutionProvider')}, batch {latency.batch}{threads})"


def _worse(quality: Quality | None, *, held_out: bool) -> list[Part]:
    """``held_out``: whether it is known that the samples had no say in what was made."""
    if quality is None:
        return [Text("This was not measured: there was no data, or nothing was compressed yet.")]
    return [Text(" ".join([_drop_text(quality, held_out), *_gate_text(quality), *_sample_text(quality)]))]


def _drop_text(quality: Quality, held_out: bool) -> str:
    name, low, high = quality.metric, *quality.interval
    before, after = (words.metric_value(name, value) for value in (quality.before, quality.after))
    what = METRIC_MEANINGS.get(name, f"The metric {name}")
    text = f"{what} went from {before} to {after} ({words.quality_change(quality)})"
    text += f" on {words.plural(quality.n_samples, 'sample')}"
    text += f" that {_was(quality)} used for nothing else." if held_out else "."
    if low == high == 0:
        return f"{text} No sample tells the two models apart."
    bounds = f"between {words.signed(name, -high)} and {words.signed(name, -low)}"
    if low <= 0 <= high:
        return f"{text} That may be chance: with 95 % confidence the true change lies {bounds}."
    return f"{text} With 95 % confidence the true change lies {bounds}."


def _was(quality: Quality) -> str:
    return "was" if quality.n_samples == 1 else "were"


METRIC_MEANINGS = {
    "accuracy": "Accuracy, the share of samples that the model gets right,",
    "agreement": "Agreement, the share of samples on which it says the same as the original,",
    "r2": "R2, which is 1 for outputs like the original's and 0 for a model that ignores its input,",
}


def _gate_text(quality: Quality) -> list[str]:
    if quality.max_drop is None:
        return ["There was no limit; --max-drop sets one."]
    limit = words.signed(quality.metric, quality.max_drop).lstrip("+")
    if not quality.passed:
        return [f"That is more than the limit of {limit} (--max-drop): the gate failed."]
    if quality.interval[1] > quality.max_drop:
        return [
            f"The measured change is within the limit of {limit}, but a true loss beyond it "
            "cannot be ruled out with this many samples."
        ]
    return [f"That is within the limit of {limit} (--max-drop), chance included."]


def _sample_text(quality: Quality) -> list[str]:
    if quality.n_samples >= FEW_SAMPLES:
        return []
    return ["With more samples the interval becomes narrower."]


# ---------------------------------------------------------------- what changed, what could not


def _changed(report: CompressReport) -> list[Part]:
    plan = report.plan
    size, kept = sum(group.size for group in plan.groups), sum(group.kept for group in plan.groups)
    narrower = sum(group.kept < group.size for group in plan.groups)
    text = []
    if narrower:
        text.append(
            f"{size - kept} of {words.plural(size, 'channel')} were removed, in {narrower} of "
            f"{words.plural(len(plan.groups), 'channel group')} (channels that can only go together)."
        )
    elif plan.groups:
        text.append(f"All {words.plural(size, 'channel')} stay.")
    if plan.removed_branches:
        text.append(f"{words.plural(len(plan.removed_branches), 'residual branch')} went entirely.")
    if plan.implants:
        counts = Counter(implant.kind for implant in plan.implants)
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
        n = words.plural(len(plan.implants), "layer")
        text.append(f"{n} got a cheaper stand-in, called implant ({kinds}).")
    text += _repaired(report)
    if report.then is not None:
        bits = {"int8": "8", "fp16": "16"}.get(report.then.kind, report.then.kind)
        text.append(f"Then numbers were stored in {bits} bits in place of 32.")
    return [Text(" ".join(text) or "Nothing.")]


def _repaired(report: CompressReport) -> list[str]:
    methods = {one.method for one in report.recovery}
    if "distill" in methods:
        return ["What is left was refitted, and trained to do what the original does."]
    if "refit" in methods:
        return [
            "What is left was refitted, so that layers put out what they did before; nothing was trained."
        ]
    return []


def _frozen(frozen: Sequence[FrozenNode]) -> str:
    if not frozen:
        return "Nothing: every layer could be made smaller."
    reasons = sorted(words.group_by_reason(frozen).items(), key=lambda item: -len(item[1]))
    reason, nodes = reasons[0]
    text = f"{words.plural(len(frozen), 'part')} of the model had to keep all channels."
    if len(reasons) == 1:
        return f"{text} The reason: {reason}."
    return f"{text} The most frequent of {len(reasons)} reasons, for {len(nodes)} of them: {reason}."


# ---------------------------------------------------------------- what next


def was_refused(report: CompressReport) -> bool:
    """Whether a model was made and measured, and yet not written; a dry run measures nothing."""
    return report.output is None and report.quality is not None


def _next(steps: Sequence[Step]) -> Answer:
    parts: list[Part] = []
    for step in steps:
        parts.append(Text(step.why))
        if step.command is not None:
            parts.append(Command(step.command))
    return Answer("What to do next?", parts)


# ---------------------------------------------------------------- what may become of it


def _could_become(report: AnalyzeReport) -> list[Part]:
    analysis = report.analysis
    if not analysis.sizes:
        return [Text("There is nothing in it that could be made smaller.")]
    sizes = [point for point in analysis.sizes if math.isfinite(point.loss)]
    if not sizes:
        return [Text("It could become smaller, but what that costs is not known of any size.")]
    cost = words.COST_NAMES.get(analysis.objective, analysis.objective)
    named = _landmarks(sizes, analysis.objective)
    losses = ", ".join(
        f"{point.loss:.2g} at {words.share(size_of(point, analysis.objective))}" for point in named
    )
    parts: list[Part] = [
        Text(
            f"The loss that is expected at a share of the {cost}: {losses}. Loss is the distance of the "
            "outputs to the original's: 0 is no change, and about 1 a model that ignores its input. It is a "
            "forecast before repair, good for comparing; only a compressed model tells what it means for "
            "quality."
        )
    ]
    cheap = [point for point in analysis.sizes if point.loss <= SMALL_LOSS]
    if cheap:
        least = min(size_of(point, analysis.objective) for point in cheap)
        parts.append(
            Text(
                f"Down to {words.share(least)} of the {cost} it is at most {SMALL_LOSS:g}, at which "
                "classifiers keep all but about a point of their accuracy."
            )
        )
    return parts


def size_of(point: SizePoint, objective: str) -> float:
    """The share of the original's cost that a point of the curve has."""
    ratio = {"params": point.params_ratio, "macs": point.macs_ratio, "latency": point.latency_ratio}.get(
        objective
    )
    return point.asked if ratio is None else ratio


def _landmarks(sizes: Sequence[SizePoint], objective: str) -> list[SizePoint]:
    """The points nearest to three quarters, a half and a quarter, each once."""
    near = [min(sizes, key=lambda point: abs(size_of(point, objective) - goal)) for goal in (0.75, 0.5, 0.25)]
    return list(dict.fromkeys(near))


def _depends_on(report: AnalyzeReport) -> list[Part]:
    groups, layers = report.analysis.groups, report.analysis.layers
    groups = tuple(sorted((one for one in groups if math.isfinite(one.score)), key=lambda one: -one.score))
    layers = tuple(sorted((one for one in layers if math.isfinite(one.score)), key=lambda one: -one.score))
    text = []
    if len(groups) > 1:
        text.append(f"A channel of {groups[0].name} matters most, one of {groups[-1].name} least.")
    if len(layers) > 1:
        text.append(f"A cheaper stand-in costs most in {layers[0].node}, and least in {layers[-1].node}.")
    return [Text(" ".join(text) or "There is nothing to compare.")]


def _family(report: SweepReport, best: Sequence[SweepPoint]) -> list[Part]:
    if not best:
        return [Text("No model was found that may be chosen.")]
    cost = words.COST_NAMES[report.objective]
    parts: list[Part] = []
    for point in best:
        assert point.quality is not None
        low, high = point.quality.interval
        chance = ", which may be chance" if low <= 0 <= high else ""
        parts.append(
            Text(
                f"At {words.share(point.reached[report.budget])} of the {cost}: "
                f"{point.quality.metric} {words.metric_value(point.quality.metric, point.quality.after)}, "
                f"a change of {words.quality_change(point.quality)}{chance}."
            )
        )
    return parts


def _refused(report: SweepReport) -> list[Part]:
    refused = [point for point in report.points if point.refused is not None]
    notes = [f"To keep {100 * point.keep:g} %: {point.refused}." for point in refused]
    if not report.complete:
        missing = len(report.asked) - len(report.points)
        notes.append(
            f"The sweep was interrupted: {words.plural(missing, 'point')} of {len(report.asked)} not done."
        )
    return [Text(note) for note in notes] or [Text("All that was asked for was reached.")]
