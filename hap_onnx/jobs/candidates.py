"""Likely ways to compress a model to a budget: planned, cut, repaired, and compared on held-out samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path

import onnx_graphsurgeon as gs
import torch

from hap_onnx.data.calibration import Subset
from hap_onnx.errors import BudgetError
from hap_onnx.events import Event, OnEvent, ignore_event
from hap_onnx.jobs.carry_out import Compressed, CutModel, compress_layers, cut_model, refit_layers
from hap_onnx.planning.choose import choose, residual_groups
from hap_onnx.planning.curves import output_distance
from hap_onnx.planning.decide import LossModel
from hap_onnx.planning.paper import choose_by_threshold
from hap_onnx.prepare import PreparedModel
from hap_onnx.runtime.latency import LatencyComparison
from hap_onnx.sensitivity.curvature import to_tensors
from hap_onnx.twin import build_twin

_log = logging.getLogger(__name__)

WIDER = (8, 16)
"""Alignments to try where ``auto`` gives a model that is slower than the original."""

Budgets = Mapping[str, float | None]


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
    align: int | str = "auto"
    recover: str = "refit"
    preset: str | None = None
    work_dir: Path | None = None
    device: str = "cpu"
    time: Callable[[Compressed], LatencyComparison] | None = None
    on_event: OnEvent = ignore_event

    def note(self, text: str, *, kind: str = "note") -> None:
        """Tell the caller something that a user should know."""
        self.on_event(Event("compress", "warning" if kind == "warning" else "note", text))


def all_kinds(losses: LossModel) -> dict[str, dict[str, float]]:
    """Every kind that fits each layer, at any rank: what may be used where speed does not count."""
    return {name: {form.kind: 1.0 for form in entry.layer.forms} for name, entry in losses.implants.items()}


def sketch(setting: Setting, budgets: Budgets) -> Compressed:
    """Plan and cut only; raises BudgetError."""
    return compress_layers(_plan(setting, budgets, align=setting.align, whole=_whole(setting)))


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


def _plan(setting: Setting, budgets: Budgets, *, align: int | str, whole: Collection[str]) -> CutModel:
    prepared, losses = setting.prepared, setting.losses
    if setting.preset == "paper":
        choice = choose_by_threshold(prepared, losses, budgets, kinds=setting.kinds)
    else:
        choice = choose(prepared, losses, budgets, align=align, whole=whole, kinds=setting.kinds)
    return cut_model(prepared, choice, losses.implants)


def _plan_fast(setting: Setting, budgets: Budgets, *, whole: Collection[str]) -> tuple[CutModel, Compressed]:
    """Plan, and again with wider steps where onnxruntime runs the result slower than the original.

    Returns the cut model, and it with its implants but without repair.
    """
    aligns = (setting.align, *(WIDER if setting.align == "auto" and setting.preset is None else ()))
    found: tuple[CutModel, Compressed] | None = None
    for align in aligns:
        try:
            cut = _plan(setting, budgets, align=align, whole=whole)
        except BudgetError:
            if found is None:
                raise
            break  # the steps are too wide
        found = cut, compress_layers(cut)
        timing = setting.time(found[1]) if setting.time is not None else None
        if timing is None or not timing.is_slower:
            return found
        setting.note(
            f"with widths aligned to {align} the model is {timing.ratio:.2f} times as slow; planning again"
        )
    assert found is not None
    return found  # the gate will refuse it, with all numbers


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
        for batch in setting.choose.batches(setting.batch_size):
            tensors = to_tensors(batch.inputs, twin)
            total += output_distance(twin(tensors), setting.prepared.twin(tensors), setting.scales)
    return total / setting.choose.n_samples if isfinite(total) else inf
