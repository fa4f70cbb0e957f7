"""Distillation: the compressed model is trained, by gradients, to do what the original does.

Labels are not needed, and are mixed in where the samples have them. Both models run as torch twins; only
weights, biases and scales change, so the graph stays the one that was planned.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from hap_onnx.data.calibration import Subset
from hap_onnx.distill.augment import find_augmenter
from hap_onnx.distill.learned import find_learned
from hap_onnx.distill.objective import Objective, find_hidden, find_scores
from hap_onnx.distill.training import Recipe, Trainer, train
from hap_onnx.distributed import ALONE, Team
from hap_onnx.events import Event, OnEvent, ignore_event
from hap_onnx.interrupts import interruptible
from hap_onnx.model.measure import constants_of
from hap_onnx.model.saving import make_folder
from hap_onnx.model.temporary import temporary_folder
from hap_onnx.sensitivity.curvature import to_tensors
from hap_onnx.twin import Twin, build_twin, unfix_batch

__all__ = ["Distilled", "Recipe", "distill"]

STAGE = "distill"


@dataclass(frozen=True)
class Distilled:
    """What training gave.

    Attributes:
        weights: new values of initializers of the compressed graph, float32.
        augmentations: what was done to the images.
        start_score, best_score: distance to the original (and to labels) on the samples set aside, before
            training and with ``weights``; never larger after than before. None if nothing could be trained
            or they are no finite number.
        best_epoch: where the weights were found, 0 for those before training.
        n_rollbacks: how often training failed, and went back with half the rate.
    """

    weights: Mapping[str, np.ndarray]
    augmentations: tuple[str, ...]
    start_score: float | None
    best_score: float | None
    best_epoch: float
    n_rollbacks: int

    def facts(self, epochs: int) -> dict[str, Any]:
        """What a plan and a report say about it; ``epochs`` were asked for."""
        return {
            "epochs": epochs,
            "best_epoch": round(self.best_epoch, 3),
            "start_score": self.start_score,
            "best_score": self.best_score,
            "rollbacks": self.n_rollbacks,
            "augmentations": list(self.augmentations),
        }


def distill(
    original: gs.Graph,
    compressed: gs.Graph,
    calibrate: Subset,
    choose: Subset,
    recipe: Recipe,
    *,
    scales: Mapping[str, float],
    scores: str | None = None,
    augment: bool = True,
    leave: Collection[str] = (),
    moved: Collection[str] = (),
    folder: Path | None = None,
    key: str = "",
    device: str = "cpu",
    team: Team = ALONE,
    on_event: OnEvent = ignore_event,
) -> Distilled:
    """Train a compressed graph towards the original.

    Args:
        original, compressed: normalised graphs with the same inputs and outputs.
        calibrate: samples to train on; their labels are used if they have some and there are ``scores``.
        choose: samples that say which of the weights on the way are best.
        scales: of each output that counts, see ``curvature.output_scales``.
        scores: the output that holds class scores [N, C], if there is one.
        augment: whether images may be flipped and shifted, if the original hardly notices.
        leave: nodes of ``compressed`` whose weights are not to be touched.
        moved: tensors of ``compressed`` whose channels have another order than in the original.
        folder: where the state of training is kept, for going on after an interruption with the same
            arguments; default: a temporary folder.
        key: what else the state depends on, such as the data.
        team: the processes that share the samples of each update; the first keeps the state.

    Returns:
        The weights that do best on ``choose``; those of ``compressed`` if training does not help.

    Raises:
        ValidationError: the state cannot be written.
    """
    teacher, student = build_twin(original, device=device), build_twin(compressed, device=device)
    first = next(iter(choose.batches(recipe.batch_size)))
    inputs = to_tensors(first.inputs, teacher)
    with torch.no_grad():
        expected = teacher(inputs)
    one_by_one = not (unfix_batch(teacher, inputs) and unfix_batch(student, inputs))
    objective = team.lead(
        lambda: Objective(
            scales=scales,
            hidden={} if one_by_one else find_hidden(teacher, student, inputs, leave=moved),
            scores=None if scores is None else find_scores(scores, expected[scores]),
        )
    )
    learned = find_learned(compressed, leave=leave)
    reached = _reached(student, learned, objective, inputs)
    blocked = _read_before(compressed, objective.outputs).intersection(learned).difference(reached)
    if blocked:
        why = "no gradient reaches them, because a node behind them runs in onnxruntime only"
        _note(on_event, f"{len(blocked)} of {len(learned)} weights are not trained: {why}")
    if not reached:
        _note(on_event, "nothing of the model can be trained, so it stays as it is", kind="warning")
        return Distilled({}, (), None, None, 0.0, 0)
    augmenter = None
    if augment:
        outputs, size, seed = objective.outputs, recipe.batch_size, recipe.seed
        augmenter = team.lead(
            lambda: find_augmenter(teacher, calibrate, outputs=outputs, batch_size=size, seed=seed)
        )
    kinds = augmenter.kinds if augmenter is not None else ()
    how = f", images augmented by {' and '.join(kinds)}" if kinds else ""
    length = f"{recipe.epochs} epoch{'' if recipe.epochs == 1 else 's'}"
    _note(on_event, f"training on {calibrate.n_samples} samples for {length}{how}")
    trainer = Trainer(teacher, student, reached, objective, augmenter, calibrate, choose, recipe, team)
    with _folder(folder) if team.leads else nullcontext(Path()) as place, interruptible():
        state_key = _key(compressed, recipe, objective, (kinds, reached, key))
        trained = train(trainer, place, state_key, on_event=on_event)
    progress = trained.progress
    return Distilled(
        weights=trained.weights,
        augmentations=kinds,
        start_score=_finite(progress.start_score),
        best_score=_finite(progress.best_score),
        best_epoch=progress.best_step / trainer.steps_per_epoch,
        n_rollbacks=progress.n_rollbacks,
    )


def _finite(score: float) -> float | None:
    return score if math.isfinite(score) else None


def _note(on_event: OnEvent, text: str, *, kind: Literal["note", "warning"] = "note") -> None:
    on_event(Event(STAGE, kind, text))


def _reached(
    student: Twin, learned: Sequence[str], objective: Objective, inputs: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Return those of the weights on which the outputs depend in a way that torch can differentiate."""
    if not learned:
        return ()
    outputs = student(inputs)
    total = sum(outputs[name].float().sum() for name in objective.outputs)
    parameters = [student.parameter_of[name] for name in learned]
    if not isinstance(total, Tensor) or not total.requires_grad:
        return ()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return tuple(name for name, gradient in zip(learned, gradients, strict=True) if gradient is not None)


def _read_before(graph: gs.Graph, outputs: Collection[str]) -> set[str]:
    """Return the initializers that the graph reads on the way to some of its outputs."""
    found: set[str] = set()
    seen: set[int] = set()
    waiting = [tensor for tensor in graph.outputs if tensor.name in outputs]
    while waiting:
        tensor = waiting.pop()
        if isinstance(tensor, gs.Constant):
            found.add(tensor.name)
        for node in tensor.inputs:
            if id(node) not in seen:
                seen.add(id(node))
                waiting.extend(node.inputs)
    return found


@contextmanager
def _folder(path: Path | None) -> Iterator[Path]:
    if path is not None:
        make_folder(path)
        yield path
        return
    with temporary_folder("distill") as temporary:
        yield temporary


def _key(compressed: gs.Graph, recipe: Recipe, objective: Objective, more: Any) -> str:
    """Tell apart what is trained, how, and towards what."""
    digest = hashlib.sha256(repr((recipe, objective, more)).encode())
    for node in compressed.nodes:
        digest.update(repr((node.name, node.op, [tensor.name for tensor in node.inputs])).encode())
        for tensor in constants_of(node):
            digest.update(np.ascontiguousarray(tensor.values).tobytes())
    return digest.hexdigest()
