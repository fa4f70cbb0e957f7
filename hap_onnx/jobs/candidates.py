"""Likely ways to compress a model to a budget: planned, cut, repaired, and compared on held-out samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite
from pathlib import Path

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from hap_onnx.data.calibration import Subset
from hap_onnx.distributed import ALONE, Team
from hap_onnx.errors import BudgetError
from hap_onnx.events import Event, OnEvent, ignore_event
from hap_onnx.jobs.carry_out import Compressed, CutModel, compress_layers, cut_model, refit_layers
from hap_onnx.planning.align import Align
from hap_onnx.planning.choose import Choice, choose, residual_groups
from hap_onnx.planning.cost import LATENCY
from hap_onnx.planning.curves import output_distance
from hap_onnx.planning.decide import LossModel
from hap_onnx.planning.paper import choose_by_threshold
from hap_onnx.prepare import PreparedModel
from hap_onnx.runtime.latency import LatencyComparison
from hap_onnx.sensitivity.curvature import to_tensors
from hap_onnx.twin import build_twin

_log = logging.getLogger(__name__)

WIDER = (8, 16)
"""Alignments to try where ``auto`` gives a model that is not faster than the original."""
MAX_TIMED = 5
"""How many plans are timed at most on the way to a budget of time."""
LATENCY_TOLERANCE = 0.05
"""How far a budget of time may be exceeded, as a fraction of the original: it is met by measurement."""
SLACK = 0.03
"""How far below a budget of time a model may stay, as a share of it: nearer is not to be told from noise."""
AIM_TOLERANCE = 0.005
"""Plans for times that differ by less are all but the same."""
N_BISECTIONS = 6
KEPT_BYTES = 64 * 2**20
"""Outputs of the original on the choose part are kept up to this size; larger ones are computed each time."""

Budgets = Mapping[str, float | None]
"""Limits by metric: parameters and multiply-accumulates; of the original's latency, a fraction."""


@dataclass(frozen=True)
class Setting:
    """What all candidates of one job share.

    Attributes:
        method: ``hap``, ``prune`` or ``implant``.
        preset: ``paper`` for the paper's own recipe, else None.
        kinds: which kinds of implants each layer may become, by node, each with the largest share of the
            layer's multiply-accumulates that it may have.
        recover: ``refit`` or ``none``.
        calibrate, choose: samples for repair and for comparing candidates.
        time: times a candidate against the original; None where speed does not count.
        base_ratio: how long the model takes that candidates are made of, as a fraction of the original.
        team: the processes that share the samples; the first of them plans.
    """

    prepared: PreparedModel
    losses: LossModel
    method: str
    kinds: Mapping[str, Mapping[str, float]]
    calibrate: Subset
    choose: Subset
    scales: Mapping[str, float]
    batch_size: int
    seed: int
    align: Align = "auto"
    base_ratio: float = 1.0
    recover: str = "refit"
    preset: str | None = None
    work_dir: Path | None = None
    device: str = "cpu"
    time: Callable[[Compressed], LatencyComparison] | None = None
    team: Team = ALONE
    on_event: OnEvent = ignore_event

    def expected(self) -> Iterable[Mapping[str, Tensor]]:
        """Outputs of the original that count, of each batch of the choose part that is this process's."""
        return self._run_original() if self._kept is None else self._kept

    def _run_original(self) -> Iterator[dict[str, Tensor]]:
        twin = self.prepared.twin
        for batch in self.team.batches(self.choose, self.batch_size):
            with torch.no_grad():
                outputs = twin(to_tensors(batch.inputs, twin))
            yield {name: outputs[name] for name in self.scales}

    @cached_property
    def _kept(self) -> list[dict[str, Tensor]] | None:
        kept, n_bytes = [], 0
        for outputs in self._run_original():
            n_bytes += sum(tensor.nbytes for tensor in outputs.values())
            if n_bytes > KEPT_BYTES:
                return None
            kept.append(outputs)
        return kept

    def note(self, text: str, *, kind: str = "note") -> None:
        """Tell the caller something that a user should know."""
        self.on_event(Event("compress", "warning" if kind == "warning" else "note", text))


def all_kinds(losses: LossModel) -> dict[str, dict[str, float]]:
    """Every kind that fits each layer, at any rank: what may be used where speed does not count."""
    return {name: {form.kind: 1.0 for form in entry.layer.forms} for name, entry in losses.implants.items()}


def sketch(setting: Setting, budgets: Budgets) -> Compressed:
    """Plan and cut only, by predicted times; raises BudgetError."""
    return compress_layers(_plan(setting, budgets))


def compress_to(setting: Setting, budgets: Budgets) -> Compressed:
    """Plan and repair; where a plan has likely rivals, try these too. Outputs on held-out samples decide.

    Every later layer reads a residual stream, so what its channels cost adds up less well than what the
    inner channels of a block cost: a plan that narrows one is compared with one that does not. A plan that
    mixes pruning and implants is compared with implants alone.

    Raises BudgetError.
    """
    cut, plain = _plan_fast(setting, budgets, whole=_whole(setting))
    if setting.preset == "paper" and setting.kinds and not cut.choice.replacements:
        setting.note("none of the channels that the recipe would make pointwise can be put last: no implants")
    candidates = [recover(setting, cut, plain)]
    if setting.preset is None:
        for stay in _rivals(setting, cut):
            with suppress(BudgetError):
                candidates.append(recover(setting, *_plan_fast(setting, budgets, whole=stay)))
    return min(candidates, key=lambda one: one[0])[1]


def _whole(setting: Setting) -> frozenset[str]:
    return _all_groups(setting) if setting.method == "implant" else frozenset()


def _all_groups(setting: Setting) -> frozenset[str]:
    return frozenset(group.name for group in setting.prepared.coupling.groups)


def _rivals(setting: Setting, cut: CutModel) -> list[frozenset[str]]:
    """Sets of groups that another plan could leave whole."""
    narrowed = {decision.group for decision in cut.choice.decisions if len(decision.drop)}
    residual = residual_groups(setting.prepared)
    rivals = []
    if narrowed & residual and narrowed - residual:
        rivals.append(residual)
    if narrowed and cut.choice.replacements:
        rivals.append(_all_groups(setting))
    return rivals


def _absolute(setting: Setting, budgets: Budgets) -> Budgets:
    """Turn the fraction of the original's latency into predicted picoseconds of the model at hand."""
    ratio = budgets.get("latency")
    if ratio is None:
        return budgets
    return {**budgets, "latency": ratio / setting.base_ratio * predicted_latency(setting)}


def predicted_latency(setting: Setting) -> float:
    """Picoseconds that the model takes from which candidates are made, by the times of its nodes."""
    cost = setting.losses.cost
    return float(cost.totals(cost.sizes)[LATENCY])


def choose_within(
    setting: Setting, budgets: Budgets, *, align: Align | None = None, whole: Collection[str] | None = None
) -> Choice:
    """Plan by expected losses alone; ``budgets`` as ``compress_to`` takes them. Raises BudgetError.

    ``align`` and ``whole`` are the setting's own unless they are given.
    """
    prepared, losses = setting.prepared, setting.losses

    def plan() -> Choice:
        limits = _absolute(setting, budgets)
        if setting.preset == "paper":
            return choose_by_threshold(prepared, losses, limits, kinds=setting.kinds)
        own = setting.align if align is None else align
        kept = _whole(setting) if whole is None else whole
        return choose(prepared, losses, limits, align=own, whole=kept, kinds=setting.kinds)

    return setting.team.lead(plan)


def _plan(
    setting: Setting, budgets: Budgets, *, align: Align | None = None, whole: Collection[str] | None = None
) -> CutModel:
    choice = choose_within(setting, budgets, align=align, whole=whole)
    return cut_model(setting.prepared, choice, setting.losses.implants)


def _plan_fast(setting: Setting, budgets: Budgets, *, whole: Collection[str]) -> tuple[CutModel, Compressed]:
    """Plan, and again where onnxruntime does not run the result as fast as it should be.

    Returns the cut model, and it with its implants but without repair.
    """
    if budgets.get("latency") is not None:
        return _plan_in_time(setting, budgets, whole=whole)
    return _plan_not_slower(setting, budgets, whole=whole)


def _plan_not_slower(
    setting: Setting, budgets: Budgets, *, whole: Collection[str]
) -> tuple[CutModel, Compressed]:
    """Plan, and again with wider steps where the result is not faster than the original; take the fastest."""
    aligns = (setting.align, *(WIDER if setting.align == "auto" and setting.preset is None else ()))
    found: list[tuple[float, CutModel, Compressed]] = []
    for align in aligns:
        try:
            cut = _plan(setting, budgets, align=align, whole=whole)
        except BudgetError:
            if not found:
                raise
            break  # the steps are too wide
        plain = compress_layers(cut)
        timing = setting.time(plain) if setting.time is not None else None
        if timing is None or timing.is_faster:
            return cut, plain
        found.append((timing.ratio, cut, plain))
        if align != aligns[-1]:
            setting.note(
                f"with widths aligned to {align} the model takes {timing.ratio:.2f} times as long as the "
                "original, which is not faster beyond doubt; planning with wider steps"
            )
    return min(found, key=lambda entry: entry[0])[1:]  # if it is slower, the gate will refuse it


def _plan_in_time(
    setting: Setting, budgets: Budgets, *, whole: Collection[str]
) -> tuple[CutModel, Compressed]:
    """Plan by predicted times, time the result, and correct the budget by how far the prediction was off.

    Raises BudgetError, which names the least latency that was reached.
    """
    wanted = budgets["latency"]
    assert wanted is not None
    assert setting.time is not None, "a budget of time comes with a stopwatch"
    found: list[tuple[float, CutModel, Compressed]] = []
    aim, is_least = wanted, False
    fits, too_slow = 0.0, inf  # the largest aim that was met so far, and the least that was not
    for _ in range(MAX_TIMED):
        try:
            cut = _plan(setting, {**budgets, "latency": aim}, whole=whole)
        except BudgetError:
            if found:
                break
            cut, aim = _plan_least(setting, budgets, aim, whole=whole)
            is_least = True
        plain = compress_layers(cut)
        ratio = setting.time(plain).ratio
        _log.info("planned for %.3f of the original's latency, measured %.3f of it", aim, ratio)
        found.append((ratio, cut, plain))
        if ratio <= wanted:
            fits = max(fits, aim)
        else:
            too_slow = min(too_slow, aim)
        if wanted * (1 - SLACK) <= ratio <= wanted or (is_least and ratio > wanted):
            break
        aim *= wanted * (1 - SLACK / 2) / ratio
        if not fits < aim < too_slow:  # what was measured errs, too
            aim = (fits + min(too_slow, setting.base_ratio)) / 2
        if aim >= setting.base_ratio or too_slow - fits < AIM_TOLERANCE:
            break
    met = [entry for entry in found if entry[0] <= wanted]
    if met:
        return max(met, key=lambda entry: entry[0])[1:]
    nearest = min(found, key=lambda entry: entry[0])
    if nearest[0] <= wanted + LATENCY_TOLERANCE:  # the gate will measure it again
        return nearest[1:]
    more = "" if setting.method == "hap" else ", or let more go with --method hap"
    raise BudgetError(
        f"--keep-latency {wanted:g} cannot be reached: the least that was reached is {nearest[0]:.3f} of the "
        f"original's latency; keep more, or exclude less{more}"
    )


def _plan_least(
    setting: Setting, budgets: Budgets, too_low: float, *, whole: Collection[str]
) -> tuple[CutModel, float]:
    """Find the least predicted latency for which there is a plan; raises BudgetError if there is none."""
    high = setting.base_ratio
    found = _plan(setting, {**budgets, "latency": high}, whole=whole)
    low = too_low
    for _ in range(N_BISECTIONS):
        middle = (low + high) / 2
        try:
            found, high = _plan(setting, {**budgets, "latency": middle}, whole=whole), middle
        except BudgetError:
            low = middle
    return found, high


def recover(setting: Setting, cut: CutModel, plain: Compressed) -> tuple[float, Compressed]:
    """Repair a cut model, of which ``plain`` is without repair; what does not help is dropped.

    Returns the model with the distance of its outputs on held-out samples.
    """
    before = distance(setting, plain.finished())
    if setting.recover == "none":
        return before, plain
    refitted = refit_layers(
        cut,
        setting.calibrate,
        batch_size=setting.batch_size,
        seed=setting.seed,
        work_dir=setting.work_dir,
        device=setting.device,
        team=setting.team,
        on_event=setting.on_event,
    )
    after = distance(setting, refitted.finished())
    _log.info("distance of the outputs on held-out samples: %.4g before refit, %.4g after", before, after)
    if after > before:
        setting.note("refit did not help on held-out samples and was dropped", kind="warning")
        return before, plain
    return after, refitted


def distance(setting: Setting, graph: gs.Graph) -> float:
    """Distance of the outputs to the original's, per sample of the choose part; infinite if no number."""
    twin, total = build_twin(graph, device=setting.device), 0.0
    with torch.no_grad():
        batches = setting.team.batches(setting.choose, setting.batch_size)
        for batch, expected in zip(batches, setting.expected(), strict=True):
            total += output_distance(twin(to_tensors(batch.inputs, twin)), expected, setting.scales)
    total = setting.team.total(total)
    return total / setting.choose.n_samples if isfinite(total) else inf
