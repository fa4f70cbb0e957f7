"""Reports in words and rows of text: what both the terminal and Markdown say. Nothing is escaped here."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from hap_onnx.report import (
    CompressReport,
    Conversion,
    Fidelity,
    FrozenNode,
    Latency,
    ModelFacts,
    PlanSummary,
    Quality,
    RoundRecovered,
    SweepPoint,
    SweepReport,
    ValidateReport,
)

MAX_NODES_NAMED = 3
SWEEP_CAUTION = (
    "The quality of each point was measured on samples that were used for nothing else. Choosing among "
    "several by these figures makes the one chosen look better than it is: check it once more on other data."
)
SLOWER = "slower than the reference beyond noise"

SHARES = ("accuracy", "agreement")  # metrics that read best in per cent
COST_NAMES = {"params": "parameters", "macs": "multiply-accumulates", "latency": "latency"}
_COSTS = {"params": "parameters", "macs": "MACs", "latency": "latency"}

Rows = list[tuple[str, ...]]


# ---------------------------------------------------------------- numbers


def plural(number: int, word: str) -> str:
    """``1 node``, ``2 nodes``."""
    ending = "" if number == 1 else "es" if word.endswith("branch") else "s"
    return f"{number} {word}{ending}"


def count(number: float | None) -> str:
    """A number of parameters or multiply-accumulates, with four digits or so; ``?`` if not known."""
    if number is None:
        return "?"
    for limit, divisor, unit in ((1e7, 1, ""), (1e10, 1e6, " M"), (1e13, 1e9, " G")):
        if number < limit:
            return f"{number:,.0f}" if divisor == 1 else f"{number / divisor:,.1f}{unit}"
    return f"{number / 1e12:,.1f} T"


def file_size(number: float) -> str:
    """Bytes, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.2f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def share(number: float) -> str:
    """A fraction in per cent."""
    return f"{100 * number:.1f} %"


def change(before: float | None, after: float | None) -> str:
    """The change in per cent, signed; nothing if one of the two is not known."""
    return "" if not before or after is None else f"{100 * (after / before - 1):+.1f} %"


def speed(ratio: float) -> str:
    """A latency as a fraction of the original's, in words."""
    return f"{1 / ratio:.2f}x faster" if ratio <= 1 else f"{ratio:.2f}x slower"


def metric_value(name: str, value: float) -> str:
    """A value of the quality metric."""
    return f"{100 * value:.2f} %" if name in SHARES else f"{value:.4f}"


def signed(name: str, value: float) -> str:
    """A difference of two values of the quality metric."""
    value += 0.0  # no negative zero
    return f"{100 * value:+.2f}" if name in SHARES else f"{value:+.4f}"


def quality_change(quality: Quality) -> str:
    """By how much quality rises or falls, with its unit."""
    return signed(quality.metric, -quality.drop) + (" points" if quality.metric in SHARES else "")


def _milliseconds(facts: ModelFacts) -> str:
    return f"{facts.latency_ms:.3f} ms"


# ---------------------------------------------------------------- two models


def facts_rows(report: CompressReport | ValidateReport) -> Rows:
    """Titles, and one row per figure of both models."""
    before, after, quality = report.before, report.after, report.quality
    rows: Rows = [("", "before", "after", "change")]
    for name, old, new in (("parameters", before.params, after.params), ("MACs", before.macs, after.macs)):
        rows.append((name, count(old), count(new), change(old, new)))
    sizes = file_size(before.bytes), file_size(after.bytes)
    rows.append(("file", *sizes, change(before.bytes, after.bytes)))
    if before.latency_ms and after.latency_ms:
        times = _milliseconds(before), _milliseconds(after)
        # The median of the rounds' ratios, where there are rounds: interval and gate are about it, and on a
        # busy machine it is not the ratio of the medians.
        ratio = after.latency_ms / before.latency_ms if report.latency is None else report.latency.ratio
        rows.append(("latency", *times, speed(ratio)))
    if quality is not None:
        name = quality.metric
        values = metric_value(name, quality.before), metric_value(name, quality.after)
        rows.append((name, *values, quality_change(quality)))
    return rows


def step_rows(then: Conversion, quality: Quality | None) -> Rows:
    """Compression and conversion, each alone and both."""
    models = (then.original, then.compressed, then.quantized, then.both)
    rows: Rows = [("", "original", "compressed", f"{then.kind} only", f"compressed, {then.kind}")]

    def add(name: str, show: Callable[[ModelFacts], str]) -> None:
        rows.append((name, *("-" if model is None else show(model) for model in models)))

    add("file", lambda model: file_size(model.bytes))
    if then.both.latency_ms is not None:
        add("latency", _milliseconds)
    if quality is not None and then.both.metric is not None:
        add(quality.metric, lambda model: metric_value(quality.metric, model.metric or 0.0))
    return rows


def step_lines(then: Conversion) -> list[str]:
    """How the conversion was done, and what it left."""
    lines = []
    if then.settings:
        how = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in then.settings.items())
        lines.append(f"{then.kind}: {how}")
    if then.left:
        lines.append(f"left in float32: {named(then.left)}")
    return lines


def named(nodes: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(nodes) - MAX_NODES_NAMED} more" if len(nodes) > MAX_NODES_NAMED else ""
    return ", ".join(nodes[:MAX_NODES_NAMED]) + more


def latency_lines(latency: Latency | None) -> list[str]:
    """The ratio of the latencies with its interval, and what it was measured with; nothing if it was not."""
    if latency is None:
        return []
    low, high = latency.interval
    threads = "threads as onnxruntime chooses"
    if latency.threads is not None:
        threads = plural(latency.threads, "thread")
    provider = latency.provider.removesuffix("ExecutionProvider")
    return [
        f"latency: {latency.ratio:.3f} of the original's (95 %: {low:.3f} to {high:.3f}), batch "
        f"{latency.batch}, {threads}, {provider}"
    ]


def quality_lines(quality: Quality | None, *, of: str = "held-out sample") -> list[str]:
    """The change of quality with its interval, and the verdict of the gate; nothing if not measured."""
    if quality is None:
        return []
    low, high = (signed(quality.metric, -bound) for bound in reversed(quality.interval))
    text = f"quality: {quality_change(quality)} ({low} to {high}) on {plural(quality.n_samples, of)}"
    if quality.max_drop is not None:
        limit = signed(quality.metric, -quality.max_drop)
        text += f"; gate {limit} {'passed' if quality.passed else 'FAILED'}"
    return [text]


def fidelity_lines(fidelity: Fidelity | None) -> list[str]:
    """How near the outputs are to the original's; nothing if that was not measured."""
    if fidelity is None:
        return []
    parts = []
    if fidelity.agreement is not None:
        parts.append(f"same top class {100 * fidelity.agreement:.2f} %")
    if fidelity.r2 is not None:
        parts.append(f"r2 {fidelity.r2:.4f}")
    if fidelity.max_abs_error is not None:
        parts.append(f"largest error {fidelity.max_abs_error:.3g}")
    return ["against the original: " + ", ".join(parts)] if parts else []


def plan_lines(report: CompressReport) -> list[str]:
    """What was done to the model, and the training after it."""
    return [f"plan: {_plan_text(report.plan)}", *_recovery_lines(report.recovery)]


def _plan_text(plan: PlanSummary) -> str:
    kept, size = sum(group.kept for group in plan.groups), sum(group.size for group in plan.groups)
    shrunk = sum(group.kept < group.size for group in plan.groups)
    text = f"{kept} of {size} channels kept, {shrunk} of {plural(len(plan.groups), 'group')} narrower"
    if plan.implants:
        counts = Counter(implant.kind for implant in plan.implants)
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
        text += f", {plural(len(plan.implants), 'implant')} ({kinds})"
    if plan.removed_branches:
        text += f", {plural(len(plan.removed_branches), 'residual branch')} removed"
        n_gone = sum(layer.choice == "removed" for layer in plan.layers)
        text += f" ({plural(n_gone, 'layer')})" if n_gone else ""
    return text


def _recovery_lines(rounds: Sequence[RoundRecovered]) -> list[str]:
    """One line for each round with training."""
    lines = []
    for number, one in enumerate(rounds, start=1):
        if one.start_score is None or one.best_score is None:
            continue
        text = "training" + (f" in round {number}" if len(rounds) > 1 else "")
        text += f": distance to the original {one.start_score:.3g} -> {one.best_score:.3g}"
        text += f", best after {one.best_epoch:g} of {plural(one.epochs or 0, 'epoch')}"
        lines.append(text + (f", {plural(one.rollbacks, 'rollback')}" if one.rollbacks else ""))
    return lines


def budget_lines(report: CompressReport) -> list[str]:
    """What was asked for and what was reached; nothing without a budget."""
    parts = []
    for name, asked in report.budget.asked.items():
        show = file_size if name == "max_bytes" else share
        reached = report.budget.reached.get(name)
        ending = "" if reached is None else f", reached {show(reached)}"
        parts.append(f"{name.replace('_', '-')} {show(asked)}{ending}")
    return [f"budget: {'; '.join(parts)}"] if parts else []


def group_by_reason(frozen: Iterable[FrozenNode]) -> dict[str, list[str]]:
    """Return the nodes by reason: a hundred often share one."""
    nodes_by_reason: dict[str, list[str]] = {}
    for entry in frozen:
        nodes_by_reason.setdefault(entry.reason, []).append(entry.node)
    return nodes_by_reason


# ---------------------------------------------------------------- sweeps


def sweep_rows(report: SweepReport) -> Rows:
    """Titles, the original, and one row per point; costs are fractions of the original's."""
    measured = [point.quality for point in report.points if point.quality is not None]
    metric = measured[0].metric if measured else "quality"
    rows: Rows = [("", "keep", "MACs", "params", "latency (95 %)", metric, "change (95 %)")]
    if measured:
        rows.append(("", "", "1.000", "1.000", "1.00", metric_value(metric, measured[0].before), ""))
    for point in report.points:
        mark = "x" if point.refused else "*" if point.best else ""
        rows.append((mark, _keep(point.keep), *_sweep_figures(point)))
    return rows


def _sweep_figures(point: SweepPoint) -> tuple[str, ...]:
    costs = (point.reached.get(name) for name in ("keep_macs", "keep_params"))
    shares = ["" if cost is None else f"{cost:.3f}" for cost in costs]
    latency = quality = change = ""
    if point.latency is not None:
        low, high = point.latency.interval
        latency = f"{point.latency.ratio:.2f} ({low:.2f}-{high:.2f})"
    if point.quality is not None:
        name = point.quality.metric
        quality = metric_value(name, point.quality.after)
        worst, best = (signed(name, -bound) for bound in reversed(point.quality.interval))
        change = f"{signed(name, -point.quality.drop)} ({worst}, {best})"
    return *shares, latency, quality, change


def sweep_notes(report: SweepReport) -> list[str]:
    """What the marks mean, which points were refused and why, and what is missing."""
    notes = [f"*: no other point is as good, or better, at no more {_COSTS[report.objective]}"]
    for point in report.points:
        if point.refused is not None:
            kept = "" if point.plan is None else f" (its plan is {point.plan})"
            notes.append(f"x {_keep(point.keep)}: {point.refused}{kept}")
    if not report.complete:
        notes.append(f"unfinished: {len(report.points)} of {plural(len(report.asked), 'point')} are done")
    return notes


def _keep(ratio: float) -> str:
    return f"{ratio:.2f}" if round(ratio, 2) == ratio else f"{ratio:g}"


def sweep_choice(report: SweepReport) -> SweepPoint | None:
    """The smallest of the best points of which no loss could be shown, else the best with the least loss."""
    best = [point for point in report.points if point.best and point.quality is not None]
    best.sort(key=lambda point: -point.reached[report.budget])
    unharmed = [point for point in best if point.quality is not None and point.quality.interval[0] <= 0]
    candidates = unharmed or best[:1]
    return candidates[-1] if candidates else None


def apply_command(report: SweepReport) -> str | None:
    """How to write the model of ``sweep_choice``; None if there is none."""
    choice = sweep_choice(report)
    if choice is None:
        return None
    plan = Path(report.output or "") / (choice.plan or "")
    return f"hap-onnx apply {file_word(report.model)} {file_word(str(plan))}"


def file_word(path: str) -> str:
    """A file as one word of a command, which is no option even if its name begins like one."""
    return shlex.quote(f"./{path}" if path.startswith("-") else path)
