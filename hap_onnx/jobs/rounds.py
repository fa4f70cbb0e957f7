"""One round of compression: a model, what is known of its layers, and candidates made of it.

Most jobs have one round. ``--rounds N`` takes the way to a small model in steps: each round starts from what
the one before has compressed and repaired, and looks at sensitivities anew.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import hap_onnx
from hap_onnx.config import CompressConfig
from hap_onnx.data.calibration import Splits, Subset
from hap_onnx.distill import Recipe, distill
from hap_onnx.distributed import ALONE, Team
from hap_onnx.errors import BudgetError, ModelError, SurgeryError
from hap_onnx.events import Event, OnEvent
from hap_onnx.implants.speed import faster_kinds
from hap_onnx.jobs.candidates import Budgets, Setting, all_kinds, compress_to, sketch
from hap_onnx.jobs.carry_out import Compressed, from_plan_weights, left_alone
from hap_onnx.jobs.machine import Stopwatch, pick_device
from hap_onnx.jobs.work_folder import WorkFolder
from hap_onnx.planning.align import Align, Blocks
from hap_onnx.planning.choose import Choice, moved_tensors, predicted_losses
from hap_onnx.planning.cost_graph import cost_model
from hap_onnx.planning.decide import LossModel, build_loss_model, with_times
from hap_onnx.planning.kept import load_losses, save_losses
from hap_onnx.planning.plan import CompressionPlan, hash_file
from hap_onnx.planning.times import NodeTimes
from hap_onnx.prepare import PreparedModel
from hap_onnx.report.summary import explain_groups, explain_layers, plan_words, with_measured
from hap_onnx.runtime.latency import LatencyComparison

_log = logging.getLogger(__name__)

N_STATISTICS = 1024
"""Most samples for sensitivities, refit and the choice between candidates: training takes all there are."""
N_CHECKED = 4096
"""Most samples that say which weights on the way of training are best: they are run many times."""


@dataclass(frozen=True)
class Workshop:
    """What all rounds of a job share.

    Attributes:
        splits: the parts of the data.
        scales: of each output that counts, see ``curvature.output_scales``.
        scores: the output that holds class scores, None where there is none.
        time: times a compressed model against the original.
        time_nodes: times the nodes of a model and the implants that its layers may become.
        work: what is kept of an interrupted job.
        clock: how long each stage has taken so far.
        team: the processes that share the samples.
    """

    config: CompressConfig
    splits: Splits
    scales: Mapping[str, float]
    scores: str | None
    batch_size: int
    time: Callable[[Compressed, PreparedModel], LatencyComparison]
    time_nodes: Callable[[PreparedModel, Mapping[str, Collection[str]]], NodeTimes]
    work: WorkFolder
    clock: Stopwatch
    on_event: OnEvent
    team: Team = ALONE

    def few(self, part: Subset, n_most: int | None = None) -> Subset:
        """Return enough samples of a part for statistics, or ``n_most``, in whole batches."""
        return part.take(max(1, (n_most or N_STATISTICS) // self.batch_size) * self.batch_size)

    def note(self, text: str, *, kind: str = "note") -> None:
        """Tell the caller something that a user should know."""
        self.on_event(Event("compress", "warning" if kind == "warning" else "note", text))


@dataclass(frozen=True)
class Candidate:
    """A compressed model with the plan that makes it again, which also says why it is as it is."""

    compressed: Compressed
    plan: CompressionPlan


class Round:
    """Makes candidates of one model.

    ``earlier`` are the plans of the rounds before, and ``moved`` the tensors whose channels have another
    order since. Sensitivities are found when they are first needed: a job that goes on after an interruption
    may have what it asks for already.
    """

    def __init__(
        self,
        shop: Workshop,
        prepared: PreparedModel,
        earlier: Sequence[CompressionPlan] = (),
        moved: Collection[str] = (),
    ) -> None:
        self.shop, self.prepared, self.earlier = shop, prepared, tuple(earlier)
        self.moved = frozenset(moved)
        self._last: tuple[str, Candidate] | None = None
        self._first: Round | None = None

    def at(self, shop: Workshop) -> Round:
        """The same round for a job that has other budgets only: sensitivities are found once for both."""
        other = Round(shop, self.prepared, self.earlier, self.moved)
        other._first = self
        return other

    @cached_property
    def losses(self) -> LossModel:
        """What removing channels and replacing layers is expected to cost."""
        if self._first is not None:
            return self._first.losses
        # What later rounds start from is made on the way, and seldom twice.
        kept = self.shop.work.losses() if not self.earlier else None
        with self.shop.clock.stage("sensitivity"):
            losses = None if kept is None else self._kept_losses(kept)
            if losses is None:
                losses = found = self._find_losses()
                if kept is not None:
                    self.shop.team.lead(lambda: save_losses(found, kept))
        return losses

    def _kept_losses(self, path: Path) -> LossModel | None:
        """Read what an earlier run has found; None unless all processes have the same file."""
        if not self._is_everywhere(path):
            return None
        losses = None
        try:
            losses = load_losses(path, self.prepared)
        except ModelError as error:
            _log.warning("not used: %s", error)
        if not all(self.shop.team.gather(losses is not None)):  # all have to find them, or none
            return None
        self.shop.note(f"sensitivities are those of an earlier run, from {path}")
        return losses

    def _is_everywhere(self, path: Path) -> bool:
        team = self.shop.team
        if team.size == 1:
            return path.is_file()
        own = None
        with suppress(OSError):
            own = hash_file(path)
        first, *others = team.gather(own)
        return first is not None and all(other == first for other in others)

    def _find_losses(self) -> LossModel:
        shop, config = self.shop, self.shop.config
        return build_loss_model(
            self.prepared,
            shop.few(shop.splits.calibrate),
            sensitivity=config.ranking,
            scales=shop.scales,
            batch_size=shop.batch_size,
            n_probes=config.probes,
            seed=config.seed,
            with_implants=config.method != "prune",
            team=shop.team,
            on_event=shop.on_event,
        )

    @cached_property
    def setting(self) -> Setting:
        """What all candidates of the round share."""
        if self._first is not None:
            return self._first.setting
        shop, config, losses, times = self.shop, self.shop.config, self.losses, self.times
        kinds = self._kinds(times)
        align: Align = config.align
        base_ratio = 1.0
        if config.needs_times:
            assert times is not None
            losses = with_times(losses, self.prepared, times)
            align = Blocks(times.unit) if align == "auto" else align
            if self.earlier:
                unchanged = Compressed(Choice(()), self.prepared.graph)
                base_ratio = shop.time(unchanged, self.prepared).ratio
        return Setting(
            prepared=self.prepared,
            losses=losses,
            method=config.method,
            preset=config.preset,
            kinds=kinds,
            calibrate=shop.few(shop.splits.calibrate),
            choose=shop.few(shop.splits.choose),
            scales=shop.scales,
            batch_size=shop.batch_size,
            seed=config.seed,
            align=align,
            base_ratio=base_ratio,
            recover="none" if config.recover == "none" else "refit",
            work_dir=config.work_dir,
            device=pick_device(config.device),
            team=shop.team,
            time=(
                None
                if config.allow_slower and not config.needs_times
                else lambda candidate: shop.time(candidate, self.prepared)
            ),
            on_event=shop.on_event,
        )

    @cached_property
    def times(self) -> NodeTimes | None:
        """What nodes and implants take in the runtime; None where it does not matter."""
        if self._first is not None:
            return self._first.times
        config = self.shop.config
        # A preset is taken as it is; whether it is slower, the gate decides.
        guards_speed = not config.allow_slower and config.preset is None and config.method != "prune"
        if not (config.needs_times or guards_speed):
            return None
        offered = {} if config.method == "prune" else all_kinds(self.losses)
        if not offered and not config.needs_times:
            return None
        with self.shop.clock.stage("layer times"):
            return self.shop.time_nodes(self.prepared, offered)

    def _kinds(self, times: NodeTimes | None) -> dict[str, dict[str, float]]:
        """Which implants each layer may become: with the speed gate on, only those that are faster there."""
        config = self.shop.config
        if config.method == "prune":
            return {}
        offered = all_kinds(self.losses)
        if times is None:
            return offered
        if config.needs_times:  # they are priced by what they take
            return {
                node: {kind: share for kind, share in kinds.items() if (node, kind) in times.implants}
                for node, kinds in offered.items()
            }
        found = faster_kinds(self.prepared, offered, times)
        n_without = sum(not kinds for kinds in found.values())
        if n_without:
            self.shop.note(
                f"{n_without} of {len(found)} layers get no implant, since none saves enough time here "
                "(--allow-slower lets them)"
            )
        if config.method == "implant" and not any(found.values()):
            raise BudgetError(
                "no implant of any layer saves time in onnxruntime here; let channels go, too, with "
                "--method hap, or pass --allow-slower"
            )
        return found

    def sizes(self) -> dict[str, float]:
        """By metric, what the model costs that the round starts from."""
        cost = cost_model(self.prepared.graph, self.prepared.coupling, self.prepared.shapes)
        sizes = {"params": float(self.prepared.n_params), "macs": float(cost.macs(cost.sizes))}
        return {**sizes, "latency": 1.0}  # a fraction from the start

    def name_of(self, budgets: Budgets) -> str:
        """Under which name the work folder keeps what this round makes of ``budgets``."""
        content = repr((self.prepared.source.sha256, sorted(budgets.items())))
        return f"{len(self.earlier) + 1}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    def sketch(self, budgets: Budgets) -> Candidate:
        """Plan and cut only; raises BudgetError."""
        setting = self.setting
        with self.shop.clock.stage("compress"):
            return self._explained(sketch(setting, budgets))

    def compress_to(self, budgets: Budgets) -> Candidate:
        """Return the best model within ``budgets``, repaired but not trained; raises BudgetError."""
        name = self.name_of(budgets)
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        candidate = self.kept(name)
        if candidate is None:
            setting = self.setting  # its stages are not part of this one
            with self.shop.clock.stage("compress"):
                candidate = self._explained(compress_to(setting, budgets))
                self._keep(name, candidate.plan)
        self._last = name, candidate
        return candidate

    def train(self, candidate: Candidate, budgets: Budgets, original: PreparedModel) -> Candidate:
        """Train a candidate towards the model that the job has started from."""
        shop, config, name = self.shop, self.shop.config, self.name_of(budgets)
        kept = self.kept(f"{name}-trained")
        if kept is not None:
            return kept
        finished = candidate.compressed.finished()
        with shop.clock.stage("distill"):
            found = distill(
                original.graph,
                finished,
                shop.splits.calibrate,
                shop.few(shop.splits.choose, N_CHECKED),
                Recipe(config.n_epochs, shop.batch_size, seed=config.seed),
                scales=shop.scales,
                scores=shop.scores,
                augment=config.augment == "auto",
                leave=left_alone(original.graph, finished, self.prepared.untouched),
                moved=self.moved_by(candidate),
                folder=shop.work.training(name),
                key=shop.work.key,
                device=pick_device(config.device),
                team=shop.team,
                on_event=shop.on_event,
            )
        compressed = candidate.compressed.with_trained(found.weights)
        plan = replace(
            candidate.plan, weights=compressed.plan_weights(), training=found.facts(config.n_epochs)
        )
        self._keep(f"{name}-trained", plan)
        shop.team.lead(lambda: shop.work.drop_training(name))
        return Candidate(compressed, plan)

    def _keep(self, name: str, plan: CompressionPlan) -> None:
        self.shop.team.lead(lambda: self.shop.work.save(name, plan))

    def moved_by(self, candidate: Candidate) -> frozenset[str]:
        """The tensors of a candidate whose channels have another order than in the original."""
        return self.moved | moved_tensors(self.prepared, candidate.compressed.choice)

    def kept(self, name: str) -> Candidate | None:
        """Return a candidate of an interrupted job from the work folder, if it is there."""
        plan = self.shop.team.lead(lambda: self._load(name))
        if plan is None:
            return None
        words = plan_words(self.shop.config, self.prepared)  # budgets and gates may have other words by now
        plan = replace(plan, config=words, earlier=self.earlier)
        try:
            choice = Choice(plan.decisions_for(self.prepared.coupling), plan.replacements)
            return Candidate(from_plan_weights(self.prepared, choice, plan.weights), plan)
        except (ModelError, SurgeryError) as error:
            _log.warning("the candidate %s in the work folder is not used: %s", name, error)
            return None

    def _load(self, name: str) -> CompressionPlan | None:
        plan = self.shop.work.load(name)
        return plan if plan is not None and plan.model_sha256 == self.prepared.source.sha256 else None

    def _explained(self, compressed: Compressed) -> Candidate:
        config, losses, choice = self.shop.config, self.losses, compressed.choice
        plan = CompressionPlan(
            model_sha256=self.prepared.source.sha256,
            version=hap_onnx.__version__,
            config=plan_words(config, self.prepared),
            decisions=choice.decisions,
            replacements=with_measured(losses, choice.replacements),
            predicted_loss=predicted_losses(losses, choice.decisions),
            weights=compressed.plan_weights(),
            notes=explain_groups(losses, choice, method=config.method, preset=config.preset),
            layer_notes=explain_layers(
                self.prepared,
                losses,
                choice,
                self.setting.kinds,
                left={node.name for node in compressed.graph.nodes},
                method=config.method,
                preset=config.preset,
            ),
            earlier=self.earlier,
        )
        return Candidate(compressed, plan)
