"""What training minimises: the distance of the compressed model to the original, and to labels.

Class scores are compared by the Kullback-Leibler divergence of their softened distributions (Hinton et al.,
*Distilling the Knowledge in a Neural Network*, arXiv 1503.02531), every output by its distance relative to
how much it varies, and so are a few tensors inside whose shapes have survived. Divergence alone would not see
what is added to all scores of a sample, nor serve embeddings, which look like class scores.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hap_onnx.ops.elementwise import is_addition
from hap_onnx.twin import Twin, probe_shapes, run_captured

TEMPERATURE = 3.0
"""Of the softened distributions, in standard deviations of the original's logits."""
N_HIDDEN = 9
"""How many tensors inside are compared, besides the outputs."""
HIDDEN_SHARE = 8.0
"""Weight of the tensors inside, on average, against that of the outputs."""
LABEL_SHARE = 0.5
"""Weight of the labels against the original's scores."""
_TINY = 1e-8

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Scores:
    """The output that holds class scores [N, C].

    ``as_probabilities``: its rows sum to one already; ``scale``: standard deviation of a sample's logits.
    """

    output: str
    as_probabilities: bool
    scale: float

    def logits(self, scores: Tensor) -> Tensor:
        """Return numbers whose softmax are the class probabilities."""
        return scores.clamp_min(_TINY).log() if self.as_probabilities else scores


@dataclass(frozen=True)
class Objective:
    """How two models are compared.

    Attributes:
        scales: of each output that counts, see ``curvature.output_scales``.
        hidden: of each tensor inside that is compared, one over its mean variance.
        scores: which output holds class scores; None for other models.
        label_share: weight of the labels, where samples have any, against the original's scores.
    """

    scales: Mapping[str, float]
    hidden: Mapping[str, float]
    scores: Scores | None
    label_share: float = LABEL_SHARE

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs that are compared."""
        return tuple(dict.fromkeys([*self.scales, *([self.scores.output] if self.scores else [])]))

    def loss(self, ours: Tensors, theirs: Tensors, labels: Tensor | None) -> Tensor:
        """Return what to minimise, the mean of a batch.

        Args:
            ours, theirs: outputs and hidden tensors of the compressed and of the original model.
            labels: int64 [N].
        """
        loss = self.score(ours, theirs, labels)
        for name, scale in self.hidden.items():
            error = (ours[name].float() - theirs[name].float()).square().mean() * scale
            loss = loss + HIDDEN_SHARE / len(self.hidden) * error
        return loss

    def score(self, ours: Tensors, theirs: Tensors, labels: Tensor | None) -> Tensor:
        """Return the part of the loss that outputs decide: what a model is judged by."""
        loss = self._distance(ours, theirs)
        if self.scores is None or labels is None:
            return loss
        logits = self.scores.logits(ours[self.scores.output].float())
        # The distance is relative to the variance of the logits; gradients only balance if both are.
        entropy = F.cross_entropy(logits, labels) / self.scores.scale**2
        return (1 - self.label_share) * loss + self.label_share * entropy

    def _distance(self, ours: Tensors, theirs: Tensors) -> Tensor:
        n_samples = len(theirs[self.outputs[0]])
        loss = torch.zeros((), device=theirs[self.outputs[0]].device)
        for name, scale in self.scales.items():
            error = (ours[name].float() - theirs[name].float()).square().sum()
            loss = loss + scale**2 * 0.5 / n_samples * error
        if self.scores is None:
            return loss
        pair = (self.scores.logits(found[self.scores.output].float()) for found in (ours, theirs))
        temperature = TEMPERATURE * self.scores.scale
        soft, target = (F.log_softmax(logits / temperature, dim=1) for logits in pair)
        divergence = F.kl_div(soft, target, log_target=True, reduction="batchmean")
        # About half the squared error of the logits relative to their variance: of the size of the distance.
        return loss + TEMPERATURE**2 * divergence


def find_scores(name: str, scores: Tensor) -> Scores:
    """Say what kind of class scores the original gives: the output ``name``, [N, C]."""
    sums = scores.float().sum(1)
    is_distribution = bool((scores >= 0).all() and ((sums - 1).abs() < 1e-3).all())
    raw = Scores(name, as_probabilities=is_distribution, scale=1.0)
    deviation = float(raw.logits(scores.float()).std(1, correction=0).square().mean().sqrt())
    return replace(raw, scale=max(deviation, _TINY))


def find_hidden(
    teacher: Twin, student: Twin, inputs: Mapping[str, Tensor], *, leave: Collection[str] = ()
) -> dict[str, float]:
    """Choose tensors inside whose shapes have survived, evenly along the depth, with the scale of each.

    Those to ``leave`` mean something else in the student. Sums come first, since they carry what all layers
    behind them read; without any, all tensors do.
    """
    shapes = probe_shapes(student, inputs)
    expected = probe_shapes(teacher, inputs)
    n_samples = next(iter(inputs.values())).shape[0]
    fitting = [
        (step, name)
        for step in teacher.steps
        for name in step.outputs
        if name in shapes
        and name not in leave
        and shapes[name] == expected[name]
        and len(shapes[name]) > 2
        and shapes[name][0] == n_samples
        and name not in teacher.output_names
    ]
    chosen = [name for step, name in fitting if is_addition(step.op_type, domain=step.domain)]
    names = chosen or [name for _, name in fitting]
    places = {round((index + 1) * len(names) / N_HIDDEN) - 1 for index in range(N_HIDDEN)} if names else set()
    picked = [names[place] for place in sorted(places) if place >= 0]
    return _inverse_variances(teacher, inputs, picked)


@torch.no_grad()
def _inverse_variances(twin: Twin, inputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, float]:
    """One over the mean variance of each tensor over the samples; what does not vary is left out."""
    found = run_captured(twin, inputs, names)
    variances = {
        name: float(found[name].float().var(0, correction=0).mean())
        for name in names
        if found[name].is_floating_point()
    }
    return {name: 1 / variance for name, variance in variances.items() if variance > _TINY}
