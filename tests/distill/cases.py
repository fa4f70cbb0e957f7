"""Pairs of models, data and runs of training: shared by the tests of distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from scipy.special import log_softmax, rel_entr, softmax

from hap_onnx.data.calibration import InputSpec, Subset, open_dataset
from hap_onnx.distill import Distilled, Recipe, distill, objective
from hap_onnx.distill.learned import find_learned
from hap_onnx.distill.objective import Objective, find_scores
from hap_onnx.events import Event
from hap_onnx.model.model_io import load_model, normalise
from hap_onnx.sensitivity.curvature import output_scales, to_tensors
from hap_onnx.surgery import with_weights
from hap_onnx.twin import build_twin
from tools.first_divergence import run_onnxruntime

Arrays = Mapping[str, np.ndarray]
RECIPE = Recipe(epochs=3, batch_size=16, seed=1)


def graph_of(model: onnx.ModelProto) -> gs.Graph:
    return normalise(load_model(model))


def perturbed(graph: gs.Graph, *, noise: float = 0.2, seed: int = 0) -> gs.Graph:
    """Multiply each number that training may change by 1 + noise."""
    rng = np.random.default_rng(seed)
    constants = {name: t.values for name, t in graph.tensors().items() if isinstance(t, gs.Constant)}
    names = find_learned(graph)
    return with_weights(
        graph,
        {
            name: (constants[name] * (1 + noise * rng.standard_normal(constants[name].shape))).astype(
                constants[name].dtype
            )
            for name in names
        },
    )


def by_numpy(one: Objective, ours: Arrays, theirs: Arrays, labels: np.ndarray | None) -> float:
    """The loss of a batch by its formula, in float64, sample by sample."""
    ours, theirs = ({k: v.astype(np.float64) for k, v in arrays.items()} for arrays in (ours, theirs))
    n = len(next(iter(theirs.values())))
    total = 0.0
    for sample in range(n):
        for name, scale in one.scales.items():
            total += 0.5 * (scale * (ours[name][sample] - theirs[name][sample]) ** 2 * scale).sum() / n
    if one.scores is not None:
        logits = [
            np.log(np.maximum(arrays[one.scores.output], 1e-8))
            if one.scores.as_probabilities
            else arrays[one.scores.output]
            for arrays in (ours, theirs)
        ]
        width = objective.TEMPERATURE * one.scores.scale
        for sample in range(n):
            mine, target = (softmax(one_logits[sample] / width) for one_logits in logits)
            total += objective.TEMPERATURE**2 * rel_entr(target, mine).sum() / n
        if labels is not None:
            entropy = -np.mean([log_softmax(logits[0][i])[labels[i]] for i in range(n)])
            total = (1 - one.label_share) * total + one.label_share * entropy / one.scores.scale**2
    for name, scale in one.hidden.items():
        error = np.mean((ours[name] - theirs[name]) ** 2)
        total += objective.HIDDEN_SHARE / len(one.hidden) * scale * error
    return total


@dataclass(frozen=True)
class Case:
    """A model, samples for it, and what the original computes on them."""

    model: onnx.ModelProto
    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None = None
    scores: str | None = None
    graph: gs.Graph = field(init=False)
    outputs: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "graph", graph_of(self.model))
        unit = self.graph.inputs[0].shape[0]
        n, unit = len(next(iter(self.inputs.values()))), unit if isinstance(unit, int) else None
        starts = range(0, n, unit or n)
        parts = [
            run_onnxruntime(self.model, {k: v[start : start + (unit or n)] for k, v in self.inputs.items()})
            for start in starts
        ]
        outputs = parts[0]
        if unit is not None:
            outputs = {name: np.concatenate([part[name] for part in parts]) for name in outputs}
        object.__setattr__(self, "outputs", outputs)

    @property
    def scales(self) -> dict[str, float]:
        return output_scales([self.outputs])

    def subsets(self) -> tuple[Subset, Subset]:
        """Samples to train on, and others to choose by."""
        arrays = dict(self.inputs)
        if self.labels is not None:
            arrays["labels"] = self.labels
        specs = [
            InputSpec(tensor.name, np.dtype(tensor.dtype), tuple(tensor.shape))
            for tensor in self.graph.inputs
        ]
        dataset = open_dataset(arrays, specs)
        indices = np.arange(dataset.n_samples)
        n_choose = len(indices) // 3
        return Subset(dataset, indices[n_choose:]), Subset(dataset, indices[:n_choose])

    def distill(
        self, compressed: gs.Graph, recipe: Recipe = RECIPE, *, events: list[Event] | None = None, **more: Any
    ) -> Distilled:
        options: dict[str, Any] = {"scales": self.scales, "scores": self.scores, "augment": False, **more}
        if events is not None:
            options["on_event"] = events.append
        return distill(self.graph, compressed, *self.subsets(), recipe, **options)

    def score(self, compressed: gs.Graph, weights: Arrays | None = None, *, batch_size: int = 16) -> float:
        """Return by formula what the samples to choose by say of a model."""
        choose = self.subsets()[1]
        ours, theirs, labels = [], [], []
        for batch in choose.batches(choose.n_samples):
            labels.append(batch.labels)
            for graph, parts in ((with_weights(compressed, dict(weights or {})), ours), (self.graph, theirs)):
                twin = build_twin(graph)
                with torch.no_grad():
                    found = twin(to_tensors(batch.inputs, twin))
                parts.append({name: values.numpy() for name, values in found.items()})
        scores = None
        if self.scores is not None:  # the first batch says what the scores are
            scores = find_scores(self.scores, torch.from_numpy(theirs[0][self.scores][:batch_size]))
        return by_numpy(Objective(self.scales, {}, scores), ours[0], theirs[0], labels[0])


def as_bytes(found: Distilled) -> dict[str, bytes]:
    return {name: values.tobytes() for name, values in found.weights.items()}


class Interrupted(Exception):
    """Stands for Ctrl-C: raised by ``interrupt_at``."""


def interrupt_at(n: int) -> Callable[[Event], None]:
    """Return a listener that stops training at its n-th update."""
    seen = 0

    def listen(event: Event) -> None:
        nonlocal seen
        seen += event.stage == "distill" and event.kind == "advance" and event.message.startswith("loss")
        if seen == n:
            raise Interrupted

    return listen
