"""The training loop: AdamW with warm-up and cosine decay, averaged weights, the best of them kept.

Everything random depends on the seed and on the number of the update alone, and what must survive is written
to a file after each period (an epoch, or a part of a long one). Going on after an interruption and going back
after a failure are then the same thing: read that file.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hap_onnx.data.calibration import Batch, Subset
from hap_onnx.distill.augment import Augmenter, ShareOfDraws
from hap_onnx.distill.checkpoint import Progress, load_state, save_state
from hap_onnx.distill.objective import Objective
from hap_onnx.distributed import ALONE, Team
from hap_onnx.events import Event, OnEvent
from hap_onnx.sensitivity.curvature import to_tensors
from hap_onnx.twin import Twin, channels_last, run_captured

STAGE = "distill"
WARMUP = 0.1
"""Share of all updates over which the rate rises."""
AVERAGE_SHARE = 0.02
"""Share of all updates over which weights are averaged."""
DIVERGED = 3.0
"""A score this many times the one before training is taken for divergence ..."""
NEAR = 0.01
"""... unless it is below this (an r2 of 0.98): next to the original there is nothing to compare with."""
MAX_ROLLBACKS = 4
MAX_PERIOD = 500
"""Most updates between two looks at the samples set aside."""
SMALLEST_SIZE = 1e-3
"""Weights that are smaller than this, as biases that begin at zero, are trained as if they had this size."""
CACHE_BYTES = 1 << 28
_OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")
_ORDER, _AUGMENT = 11, 12  # keep the random streams of one seed apart

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the training samples.
        rate: highest learning rate of AdamW, relative to the root mean square of each weight.
        weight_decay: of weights; biases and scales have none.
        clip: largest norm of the gradient.
    """

    epochs: int
    batch_size: int = 32
    rate: float = 3e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """The best weights by initializer, and how training went."""

    weights: Mapping[str, np.ndarray]
    progress: Progress


@dataclass(frozen=True)
class Share:
    """What one process runs of the ``n_all`` samples of an update: ``batch`` is ``part`` of them, or None."""

    batch: Batch | None
    part: slice
    n_all: int

    @property
    def weight(self) -> float:
        """Of the mean over this process's samples, in that over all."""
        return (self.part.stop - self.part.start) / self.n_all


class Diverged(Exception):
    """Training has left the region in which it makes sense; the message says how it showed."""


class Trainer:
    """Two twins, the samples, and what changes during training."""

    def __init__(
        self,
        teacher: Twin,
        student: Twin,
        learned: Sequence[str],
        objective: Objective,
        augmenter: Augmenter | None,
        calibrate: Subset,
        choose: Subset,
        recipe: Recipe,
        team: Team = ALONE,
    ) -> None:
        self.teacher, self.student, self.team = teacher, student, team
        self.objective, self.augmenter, self.recipe = objective, augmenter, recipe
        self.calibrate, self.choose = calibrate, choose
        self.device = str(student.device or "cpu")
        for parameter in (*teacher.parameters(), *student.parameters()):
            parameter.requires_grad_(False)
        self.parameters = {name: student.parameter_of[name] for name in learned}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        groups = _parameter_groups(list(self.parameters.values()), recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.rate)
        self.steps_per_epoch = max(1, calibrate.n_samples // recipe.batch_size)
        self.n_steps = recipe.epochs * self.steps_per_epoch
        self._expected: list[dict[str, Tensor]] | None = None

    # --- one update ---

    def rate_at(self, step: int) -> float:
        """The learning rate of an update: rises linearly, then falls along a cosine."""
        warmup = max(1, round(WARMUP * self.n_steps))
        if step < warmup:
            return self.recipe.rate * (step + 1) / warmup
        return self.recipe.rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.n_steps - warmup)))

    def update(self, step: int, share: Share, rate: float) -> float:
        """Take one step of the optimizer; returns the loss. Raises Diverged if that is no number."""
        self.optimizer.zero_grad(set_to_none=True)
        value = self.team.total(0.0 if share.batch is None else self._differentiate(step, share))
        if not math.isfinite(value):
            raise Diverged(f"the loss is {value}")
        self._sum_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), self.recipe.clip)
        if not torch.isfinite(norm):
            raise Diverged("the gradient is not finite")
        self.optimizer.step()
        # A short memory at first, so that the average does not hang on to where it began.
        horizon = min(max(1.0, AVERAGE_SHARE * self.n_steps), (step + 10) / 9)
        latest = [parameter.detach() for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), latest, 1 / horizon)
        return value

    def _differentiate(self, step: int, share: Share) -> float:
        """Run this process's samples forward and back; returns their part of the loss."""
        assert share.batch is not None
        inputs = to_tensors(share.batch.inputs, self.student)
        if self.augmenter is not None:
            generator = np.random.default_rng((self.recipe.seed, _AUGMENT, step))
            inputs = self.augmenter(inputs, ShareOfDraws(generator, share.n_all, share.part))
        loss = share.weight * self._loss(inputs, share.batch.labels)
        value = float(loss.detach())
        if math.isfinite(value):
            loss.backward()
        return value

    def _sum_gradients(self) -> None:
        """Add up what all processes have found, at once."""
        if self.team.size == 1:
            return
        parameters = list(self.parameters.values())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = self.team.sum_(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        parts = total.split([gradient.numel() for gradient in gradients])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def _loss(self, inputs: Mapping[str, Tensor], labels: np.ndarray | None) -> Tensor:
        inputs = {name: channels_last(tensor) for name, tensor in inputs.items()}
        with self._precision():
            with torch.no_grad():
                theirs = run_captured(self.teacher, inputs, self.objective.hidden)
            ours = run_captured(self.student, inputs, self.objective.hidden)
            return self.objective.loss(ours, theirs, self._labels(labels))

    def _labels(self, labels: np.ndarray | None) -> Tensor | None:
        return None if labels is None else torch.from_numpy(labels).to(self.device)

    def _precision(self) -> AbstractContextManager[object]:
        """bfloat16 where a GPU has it: it needs no scaling of the loss. Elsewhere float32."""
        if self.device.startswith("cuda") and torch.cuda.is_bf16_supported():
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    # --- the samples set aside ---

    @torch.no_grad()
    def score(self) -> tuple[float, str]:
        """Judge the averaged weights; returns the mean loss of the outputs, and words for the user.

        The loss is infinite where it is no number.
        """
        total, n_hits, scores = 0.0, 0, self.objective.scores
        with self._averaged():
            for batch, theirs in self._expectations():
                inputs = to_tensors(batch.inputs, self.student)
                ours = self.student({name: channels_last(tensor) for name, tensor in inputs.items()})
                labels = self._labels(batch.labels)
                n_samples = len(next(iter(inputs.values())))
                total += n_samples * float(self.objective.score(ours, theirs, labels))
                if scores is not None:
                    top = ours[scores.output].argmax(1)
                    truth = labels if labels is not None else theirs[scores.output].argmax(1)
                    n_hits += int((top == truth).sum())
        total, n_hits = self.team.total(total), int(self.team.total(n_hits))
        score = total / self.choose.n_samples
        if scores is None:
            return (score if math.isfinite(score) else math.inf), f"r2 {1 - 2 * score:.4f}"
        word = "accuracy" if self.choose.labels is not None else "agreement"
        return (score if math.isfinite(score) else math.inf), f"{word} {n_hits / self.choose.n_samples:.2%}"

    def _expectations(self) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """Yield the samples set aside with the original's outputs: computed once where they are small."""
        batches = self.team.batches(self.choose, self.recipe.batch_size)
        if self._expected is not None:
            yield from zip(batches, self._expected, strict=True)
            return
        expected: list[dict[str, Tensor]] | None = []
        n_bytes = 0
        for batch in batches:
            theirs = self.teacher(to_tensors(batch.inputs, self.teacher))
            theirs = {name: theirs[name] for name in self.objective.outputs}
            n_bytes += sum(tensor.nbytes for tensor in theirs.values())
            if expected is not None:
                expected = [*expected, theirs] if n_bytes <= CACHE_BYTES else None
            yield batch, theirs
        self._expected = expected

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Run the student with averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data

    # --- what survives ---

    def tensors(self) -> dict[str, Tensor]:
        """All that an update depends on."""
        found = {f"average:{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in self.parameters.items():
            found[f"weight:{name}"] = parameter
            for kind, tensor in self.optimizer.state[parameter].items():
                found[f"{kind}:{name}"] = tensor
        return found

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to where ``tensors`` were taken."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"weight:{name}"])
            self.average[name].copy_(tensors[f"average:{name}"])
            self.optimizer.state[parameter] = {
                kind: tensors[key].to("cpu" if kind == "step" else parameter.device)
                for kind in _OPTIMIZER_STATE
                if (key := f"{kind}:{name}") in tensors
            }


def _parameter_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Sort parameters by their size, to the next power of two: their rates are proportional to it.

    AdamW moves every number by about the rate, whatever its size; weights of exported models, with their
    normalisation folded in, differ a thousandfold from layer to layer.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        size = float(parameter.detach().double().square().mean().sqrt())
        scale = 2.0 ** round(math.log2(max(size, SMALLEST_SIZE)))
        is_weight = sum(length > 1 for length in parameter.shape) > 1  # no bias, whatever its number of axes
        groups.setdefault((scale, weight_decay if is_weight else 0.0), []).append(parameter)
    return [
        {"params": group, "scale": scale, "weight_decay": decay} for (scale, decay), group in groups.items()
    ]


def train(trainer: Trainer, folder: Path, key: str, *, on_event: OnEvent) -> Trained:
    """Train until the schedule ends or nothing helps; returns the best weights, at worst those of the start.

    Args:
        folder: where the state of training is kept. What is there under the same ``key`` is gone on with.
        key: says what is trained, on what and how.

    Raises ValidationError if the state cannot be written.
    """
    now, best = folder / "training.safetensors", folder / "best.safetensors"
    team = trainer.team
    found = team.lead(lambda: None if load_state(best, key) is None else load_state(now, key))
    if found is None:
        start, words = trainer.score()
        progress = Progress(0, start, start, 0)
        team.lead(lambda: save_state(now, key, progress, trainer.tensors()))
        team.lead(lambda: save_state(best, key, progress, trainer.average))
    else:
        progress, tensors = found
        trainer.restore(tensors)
        words = ""
        on_event(Event(STAGE, "note", f"going on after {progress.step} of {trainer.n_steps} updates"))
    on_event(Event(STAGE, "start", total=trainer.n_steps))
    on_event(Event(STAGE, "advance", words, amount=progress.step))
    try:
        while progress.step < trainer.n_steps and progress.n_rollbacks <= MAX_ROLLBACKS:
            end = _end_of_period(trainer, progress.step)
            n_done = 0

            def advance(text: str) -> None:
                nonlocal n_done
                n_done += 1
                on_event(Event(STAGE, "advance", text))

            try:
                _run_period(trainer, progress, end, words, advance)
                score, words = trainer.score()
                if not score <= max(DIVERGED * progress.start_score, NEAR) or score == math.inf:
                    raise Diverged(f"the score is {score:.3g}, after {progress.start_score:.3g} at the start")
            except Diverged as reason:
                progress = _roll_back(trainer, progress, now, key, reason, on_event)
                on_event(Event(STAGE, "advance", words, amount=-n_done))
                continue
            if score < progress.best_score:
                progress = replace(progress, best_score=score, best_step=end)
                team.lead(partial(save_state, best, key, progress, trainer.average))
            progress = replace(progress, step=end)
            team.lead(partial(save_state, now, key, progress, trainer.tensors()))
    finally:
        on_event(Event(STAGE, "end"))
    kept = team.lead(lambda: load_state(best, key))
    assert kept is not None  # written above, or by the run that was interrupted
    weights = {name: tensor.cpu().numpy() for name, tensor in kept[1].items()}
    return Trained(weights, replace(progress, best_score=kept[0].best_score, best_step=kept[0].best_step))


def _end_of_period(trainer: Trainer, step: int) -> int:
    """The update after which to look again: the end of the epoch, or before."""
    in_epoch = step % trainer.steps_per_epoch
    return step - in_epoch + min(trainer.steps_per_epoch, in_epoch + MAX_PERIOD)


def _run_period(
    trainer: Trainer, progress: Progress, end: int, words: str, advance: Callable[[str], None]
) -> None:
    recipe, mean = trainer.recipe, 0.0
    shares = _shares(trainer, progress.step, end)
    for index, (step, share) in enumerate(zip(range(progress.step, end), shares, strict=True)):
        loss = trainer.update(step, share, progress.rate_factor * trainer.rate_at(step))
        mean += (loss - mean) / (index + 1)
        text = f"loss {mean:.3g}" + (f", {words}" if words else "")
        advance(text)
    _log.info("updates %d to %d of %d at batch size %d: mean loss %.4g", progress.step, end, trainer.n_steps,
              recipe.batch_size, mean)  # fmt: skip


def _shares(trainer: Trainer, start: int, end: int) -> Iterator[Share]:
    """This process's share of some updates within one epoch: each epoch has its own random order."""
    recipe, part = trainer.recipe, trainer.calibrate
    epoch, first = divmod(start, trainer.steps_per_epoch)
    order = np.random.default_rng((recipe.seed, _ORDER, epoch)).permutation(part.indices)
    size = min(recipe.batch_size, len(order))
    for index in range(first, first + end - start):
        indices = order[index * size : (index + 1) * size]
        own = trainer.team.part_of(len(indices))
        read = part.dataset.batches(indices[own], size)
        yield Share(next(read, None), own, len(indices))


def _roll_back(
    trainer: Trainer, progress: Progress, now: Path, key: str, reason: Diverged, on_event: OnEvent
) -> Progress:
    """Return to the state before the failure, with half the rate, and write that down."""
    found = trainer.team.lead(lambda: load_state(now, key))
    assert found is not None
    trainer.restore(found[1])
    progress = replace(progress, rate_factor=progress.rate_factor / 2, n_rollbacks=progress.n_rollbacks + 1)
    trainer.team.lead(lambda: save_state(now, key, progress, trainer.tensors()))
    what = "stopping with the best so far" if progress.n_rollbacks > MAX_ROLLBACKS else "halving the rate"
    on_event(
        Event(STAGE, "warning", f"training failed after update {progress.step}: {reason}; going back, {what}")
    )
    return progress
