"""Implants: cheaper factors in place of a weight, optimal under the second-order metric. Arrays only.

A contraction y = W x has W as [O, C, T1, T2]: outputs, input channels, and the taps of its kernel in two
parts. Changing W by D costs 1/2 tr(G D A D^T), with A the covariance of the input rows and G that of the
output gradients (see `curvature`). Three kinds of implant:

* ``lowrank``: W ~ U V, all taps in V (T2 = 1). Eckart and Young (1936) in the metric: with G = R R^T and the
  leading eigenvectors P of R^T W A W^T R, U = R^-T P and V = P^T R^T W. The loss is half the sum of the
  other eigenvalues. Nothing of the size of A is decomposed, unless there are fewer features than outputs.
* ``spatial``: W[o, c, t1, t2] ~ sum_r U[o, r, t2] V[r, c, t1], by alternating least squares (`separable`).
* ``pointwise`` (the paper's): some outputs read one tap only, by the least-squares fit of what they gave.

Shapes: g conv groups, O outputs and F = C * T1 * T2 features per group; features are ordered channel by
channel, the taps of a kernel within. All statistics and results are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hap_onnx.implants.separable import Problem, Start, expand, factorise_separable, find_start
from hap_onnx.sensitivity.semidefinite import cholesky, eigh_descending, scale_of

KINDS = ("lowrank", "spatial", "pointwise")
NEGLIGIBLE = 1e-30
"""What stands for a covariance that is zero: factors stay sensible, and cost next to nothing."""


@dataclass(frozen=True)
class Metric:
    """What a change D of the weight costs: 1/2 tr(G D A D^T), summed over the conv groups.

    ``inputs`` is A, [g, F, F] or, where only the diagonal is known, [g, F]; ``gradients`` is G, [g, O, O].
    """

    inputs: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class Factors:
    """The arrays of one implant, the matrix that it computes and the loss that the metric predicts.

    ``arrays``: of lowrank and spatial, (first [g, rank, C*T1], second [g, O, rank*T2]), the features of the
    second rank by rank, the taps T2 within; of pointwise, (full [1, O - rank, F], pointwise [1, rank, C]),
    whose outputs follow each other. ``dense`` is [g, O, F].
    """

    kind: str
    rank: int
    arrays: tuple[Tensor, ...]
    dense: Tensor
    loss: float


# --- metrics ---


def make_metric(inputs: Tensor, gradients: Tensor, *, damping: float = 1e-2) -> Metric:
    """Symmetrise and damp (relative to the mean of the diagonal, group by group) both factors of a metric.

    A group whose covariance is zero gets a negligible multiple of the identity. Raises ValueError if a number
    is not finite or ``damping`` is negative.
    """
    if not damping >= 0:
        raise ValueError(f"damping must not be negative, got {damping}")
    for name, statistic in (("inputs", inputs), ("gradients", gradients)):
        _require_finite(f"{name} of the metric", statistic)
    return Metric(_damp(inputs.double(), damping), _damp(gradients.double(), damping))


def plain_metric(g: int, n_features: int, n_outputs: int) -> Metric:
    """Return the metric of plain SVD, that of the weights themselves: both factors are identities."""
    return Metric(
        torch.eye(n_features, dtype=torch.float64).expand(g, -1, -1),
        torch.eye(n_outputs, dtype=torch.float64).expand(g, -1, -1),
    )


def predict_loss(difference: Tensor, metric: Metric) -> float:
    """Return 1/2 tr(G D A D^T), summed over the groups, for D = ``difference`` [g, O, F]."""
    d = difference.double()
    return 0.5 * float(((metric.gradients @ d) * _times_inputs(d, metric.inputs)).sum())


def _damp(statistic: Tensor, damping: float) -> Tensor:
    if statistic.ndim == 2:
        mean = statistic.mean(1, keepdim=True)
        return statistic + torch.where(mean > 0, damping * mean, NEGLIGIBLE)
    mean = statistic.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    result = (statistic + statistic.mT).div_(2)  # in place from here on: it may be hundreds of megabytes
    result.diagonal(dim1=1, dim2=2).add_(torch.where(mean > 0, damping * mean, NEGLIGIBLE))
    return result


def _times_inputs(matrix: Tensor, inputs: Tensor) -> Tensor:
    """Return ``matrix`` [g, n, F] times A."""
    return matrix * inputs[:, None] if inputs.ndim == 2 else matrix @ inputs


# --- choices ---


def max_rank(shape: tuple[int, ...], *, kind: str, taps: tuple[int, int]) -> int:
    """Return the rank at which an implant of a weight [g, O, F] can do all that the weight does.

    For pointwise: the number of outputs.
    """
    _, n_outputs, n_features = shape
    if kind == "pointwise":
        return n_outputs
    return min(n_features // taps[1], n_outputs * taps[1])


def pointwise_order(weight: Tensor, metric: Metric, *, taps: tuple[int, int], tap: int) -> NDArray[np.int64]:
    """Return the output channels [O], those that cost least as pointwise kernels first.

    The cost of one is G_oo times the variance of what its best kernel at ``tap`` leaves unexplained.
    """
    weight, metric = _check(weight, metric, "pointwise", taps)
    _, errors = _fit_pointwise(weight, metric.inputs, *_check_tap(weight, taps, tap))
    return _cheapest_first(metric.gradients[0] * errors).cpu().numpy().astype(np.int64)


def factorise(
    weight: Tensor,
    metric: Metric,
    *,
    kind: str,
    rank: int,
    taps: tuple[int, int],
    tap: int | None = None,
) -> Factors:
    """Return the implant of ``weight`` [g, O, F] that costs least at a rank (per conv group).

    Arguments and errors as for `find_family` and `Family.at`.
    """
    return find_family(weight, metric, kind=kind, taps=taps, tap=tap).at(rank)


@dataclass(frozen=True)
class Family:
    """All implants of one kind that a weight may become, from one decomposition."""

    kind: str
    max_rank: int
    _losses: Callable[[], Tensor]
    _at: Callable[[int], Factors]

    def losses(self) -> NDArray[np.float64]:
        """Return the predicted loss at each rank, [max_rank + 1].

        Lowrank: exactly the losses of the factors. Spatial: those of the truncated SVD under the near metric
        of `separable`, an estimate: on convolutions of ResNet56 those of the factors are mostly 8 to 20 %
        lower, in some of 16 channels 40 %. Pointwise: by the number of channels turned, in the order of
        `pointwise_order`; they start at 0 and may fall where the errors of two channels cancel.
        """
        return self._losses().cpu().numpy()

    def at(self, rank: int) -> Factors:
        """Return the implant that costs least at a rank; raises ValueError for one outside [1, max_rank].

        Of pointwise it is [0, O], and the last ``rank`` outputs are those that read one tap only.
        """
        lowest = int(self.kind != "pointwise")
        if not lowest <= rank <= self.max_rank:
            raise ValueError(
                f"rank must be in [{lowest}, {self.max_rank}] for {self.kind} factors, got {rank}"
            )
        return self._at(rank)


def find_family(
    weight: Tensor, metric: Metric, *, kind: str, taps: tuple[int, int], tap: int | None = None
) -> Family:
    """Return the implants of one kind of ``weight`` [g, O, F].

    ``taps`` is (T1, T2); lowrank wants T2 = 1. Pointwise makes outputs read the tap of index ``tap`` only.
    Raises ValueError for numbers that are not finite, for shapes that do not fit, and for spatial factors of
    a diagonal A.
    """
    weight, metric = _check(weight, metric, kind, taps)
    highest = max_rank(tuple(weight.shape), kind=kind, taps=taps)
    if kind == "pointwise":
        place = _check_tap(weight, taps, tap)
        return Family(
            kind,
            highest,
            lambda: _pointwise_losses(weight, metric, *place),
            lambda rank: _factorise_pointwise(weight, metric, rank, *place),
        )
    if kind == "spatial":
        problem = Problem(weight, metric.inputs, metric.gradients, taps[1])
        start = find_start(problem)
        return Family(
            kind,
            highest,
            lambda: _tail_losses(start.values).sum(0),
            lambda rank: _factorise_spatial(problem, start, metric, rank),
        )
    found = _decompose(weight, metric)
    return Family(
        kind,
        highest,
        lambda: _tail_losses(found.values).sum(0),
        lambda rank: _factorise_lowrank(found, rank),
    )


# --- checks ---


def _require_finite(name: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def _check(weight: Tensor, metric: Metric, kind: str, taps: tuple[int, int]) -> tuple[Tensor, Metric]:
    """Return weight and metric in float64, or raise ValueError."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if weight.ndim != 3 or not weight.numel():
        raise ValueError(f"weight must be [g, O, F] and not empty, got shape {tuple(weight.shape)}")
    g, n_outputs, n_features = weight.shape
    if n_features % prod(taps):
        raise ValueError(f"taps {taps} do not divide {n_features} features")
    inputs, gradients = tuple(metric.inputs.shape), tuple(metric.gradients.shape)
    if inputs not in {(g, n_features), (g, n_features, n_features)}:
        raise ValueError(f"inputs of the metric are {inputs}, the weight {tuple(weight.shape)}")
    if gradients != (g, n_outputs, n_outputs):
        raise ValueError(f"gradients of the metric are {gradients}, the weight {tuple(weight.shape)}")
    if kind == "lowrank" and taps[1] != 1:
        raise ValueError(f"lowrank factors have all taps in the first one, got taps {taps}")
    if kind == "spatial" and metric.inputs.ndim == 2:
        raise ValueError("spatial factors need all of A, got its diagonal")
    if kind == "pointwise" and g != 1:
        raise ValueError(f"pointwise kernels need one conv group, got {g}")
    _require_finite("weight", weight)
    _require_finite("inputs of the metric", metric.inputs)
    _require_finite("gradients of the metric", metric.gradients)
    return weight.detach().double(), Metric(metric.inputs.double(), metric.gradients.double())


def _check_tap(weight: Tensor, taps: tuple[int, int], tap: int | None) -> tuple[int, int]:
    """Return (number of taps, index of the tap that stays), or raise ValueError."""
    n_taps = prod(taps)
    if tap is None or not 0 <= tap < n_taps:
        raise ValueError(f"tap must be in [0, {n_taps - 1}] for pointwise kernels, got {tap}")
    return n_taps, tap


# --- lowrank ---


@dataclass(frozen=True)
class _Decomposition:
    """Squared singular values [g, n], descending, and a function from rank to both factors."""

    values: Tensor
    factors: Callable[[int], tuple[Tensor, Tensor]]


def _decompose(weight: Tensor, metric: Metric) -> _Decomposition:
    """SVD of R^T W L (G = R R^T, A = L L^T) by the smaller of its Gram matrices."""
    _, n_outputs, n_features = weight.shape
    if n_features < n_outputs:
        root = cholesky(_full(metric.inputs))
        right = weight @ root
        values, vectors = eigh_descending(right.mT @ metric.gradients @ right)

        def from_inputs(rank: int) -> tuple[Tensor, Tensor]:
            chosen = vectors[:, :, :rank]
            return torch.linalg.solve_triangular(root, chosen.mT, upper=False, left=False), right @ chosen

        return _Decomposition(values, from_inputs)
    root = cholesky(metric.gradients)
    left = root.mT @ weight
    values, vectors = eigh_descending(root.mT @ (_times_inputs(weight, metric.inputs) @ weight.mT) @ root)

    def from_outputs(rank: int) -> tuple[Tensor, Tensor]:
        chosen = vectors[:, :, :rank]
        scale = scale_of(values[:, :rank])
        second = torch.linalg.solve_triangular(root.mT, chosen, upper=True)
        return chosen.mT @ left / scale[:, :, None], second * scale[:, None]

    return _Decomposition(values, from_outputs)


def _full(inputs: Tensor) -> Tensor:
    return torch.diag_embed(inputs) if inputs.ndim == 2 else inputs


def _tail_losses(values: Tensor) -> Tensor:
    """Half the sums of all but the first r eigenvalues, [g, n] descending -> [g, n + 1] for r = 0 .. n."""
    tails = values.flip(1).cumsum(1).flip(1)
    return 0.5 * torch.cat([tails, tails.new_zeros(len(tails), 1)], 1)


def _factorise_lowrank(found: _Decomposition, rank: int) -> Factors:
    first, second = found.factors(rank)
    loss = float(_tail_losses(found.values)[:, rank].sum())
    return Factors("lowrank", rank, (first, second), second @ first, loss)


# --- spatial ---


def _factorise_spatial(problem: Problem, start: Start, metric: Metric, rank: int) -> Factors:
    v, u = factorise_separable(problem, rank, start)
    dense = expand(v, u)
    loss = predict_loss(problem.weight - dense, metric)
    return Factors("spatial", rank, (v, u.reshape(*problem.weight.shape[:2], -1)), dense, loss)


# --- pointwise ---


def _fit_pointwise(weight: Tensor, inputs: Tensor, n_taps: int, tap: int) -> tuple[Tensor, Tensor]:
    """Return the kernels [O, C] that fit the outputs best at one tap, and the covariance [O, O] of errors.

    Each row is the least-squares fit k = W A[:, S] A[S, S]^-1, S the features of the tap. It is the best for
    any G, since G only weighs rows whose normal equations all hold.
    """
    w, a = weight[0], inputs[0]
    if a.ndim == 1:
        kernels = w[:, tap::n_taps]
    else:
        right = w @ a[:, tap::n_taps]
        root = cholesky(a[None, tap::n_taps, tap::n_taps])[0]
        kernels = torch.cholesky_solve(right.mT, root).mT
    left = w.clone()
    left[:, tap::n_taps] -= kernels
    return kernels, _times_inputs(left[None], inputs)[0] @ left.mT


def _pointwise_losses(weight: Tensor, metric: Metric, n_taps: int, tap: int) -> Tensor:
    _, errors = _fit_pointwise(weight, metric.inputs, n_taps, tap)
    costs = metric.gradients[0] * errors
    order = _cheapest_first(costs)
    blocks = costs[order][:, order].cumsum(0).cumsum(1).diagonal().clamp_min(0)
    return 0.5 * torch.cat([blocks.new_zeros(1), blocks])


def _cheapest_first(costs: Tensor) -> Tensor:
    return torch.argsort(costs.diagonal(), stable=True)


def _factorise_pointwise(weight: Tensor, metric: Metric, rank: int, n_taps: int, tap: int) -> Factors:
    n_full = weight.shape[1] - rank
    kernels, _ = _fit_pointwise(weight[:, n_full:], metric.inputs, n_taps, tap)
    dense = weight.clone()
    dense[:, n_full:] = 0
    dense[0, n_full:, tap::n_taps] = kernels
    arrays = (weight[:, :n_full].clone(), kernels[None])
    return Factors("pointwise", rank, arrays, dense, predict_loss(weight - dense, metric))
