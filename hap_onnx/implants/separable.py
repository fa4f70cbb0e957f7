"""Separable kernels: W[o, c, t1, t2] ~ sum_r U[o, r, t2] V[r, c, t1] at least loss. Arrays only.

The loss 1/2 tr(G D A D^T) couples the taps t2, so that there is no closed form. The start is the truncated
SVD under a near metric that has one: A ~ A1 (x) T, with A1 the mean over t2 of the diagonal blocks of A,
[C*T1, C*T1], and T the correlations of the taps t2, mean over features (the partial traces of A). Then, in
turns, U is solved exactly for V, and V takes a step down the gradient, preconditioned by the inverse of the
near metric's Hessian and as long as is best. With U solved after each step, such steps converge faster than
several per solution of U.

Shapes: g conv groups, each on its own; R = C*T1 rows. All arrays are float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hap_onnx.sensitivity.semidefinite import cholesky, eigh_descending, ratio, scale_of

MAX_ROUNDS = 8
"""On convolutions of ResNet56, 6 rounds end within 2 % of where 24 end."""
MAX_WORK = 2.5e10
"""Multiplications in products with A that one layer may cost (seconds of one core); one round at least."""
ENOUGH = 1e-3
"""Alternation ends when a round lowers the loss by less than this ratio."""


@dataclass(frozen=True)
class Problem:
    """A weight [g, O, R * T2] and its metric: A, [g, R * T2, R * T2], and G, [g, O, O]."""

    weight: Tensor
    inputs: Tensor
    gradients: Tensor
    n_taps: int  # T2

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Return (g, O, R, T2)."""
        g, n_outputs, n_features = self.weight.shape
        return g, n_outputs, n_features // self.n_taps, self.n_taps

    @cached_property
    def weighted(self) -> Tensor:
        """Return W A, which every rank needs."""
        return self.weight @ self.inputs

    @property
    def rows(self) -> Tensor:
        """The weight as [g, R, O * T2]."""
        g, _, n_rows, _ = self.shape
        return self.weight.reshape(self.shape).transpose(1, 2).reshape(g, n_rows, -1)


@dataclass(frozen=True)
class Start:
    """The near metric with a closed form, and the SVD of the weight under it.

    ``root``: L of A1 = L L^T, [g, R, R]; ``taps``: T, [g, T2, T2], with a mean diagonal of 1; ``matrix``: the
    weight in this metric, [g, R, O * T2]; ``values``: its squared singular values [g, min(R, O * T2)],
    descending; ``vectors``: its left singular vectors, or, where R is larger, the right ones.
    """

    root: Tensor
    taps: Tensor
    matrix: Tensor
    values: Tensor
    vectors: Tensor

    def basis(self, rank: int) -> Tensor:
        """Return the leading left singular vectors [g, R, rank]."""
        leading = self.vectors[:, :, :rank]
        if self.matrix.shape[1] <= self.matrix.shape[2]:
            return leading
        # QR in place of a division by singular values, some of which may be zero.
        return torch.linalg.qr(self.matrix @ leading).Q

    def first(self, rank: int) -> Tensor:
        """Return V [g, rank, R]; its outputs have a variance of 1 and no correlation, mean over the taps."""
        return torch.linalg.solve_triangular(self.root, self.basis(rank).mT, upper=False, left=False)


def find_start(problem: Problem) -> Start:
    """Separate the metric and decompose the weight, by the smaller of its Gram matrices."""
    g, n_outputs, n_rows, n_taps = problem.shape
    a = problem.inputs.reshape(g, n_rows, n_taps, n_rows, n_taps)
    root = cholesky(torch.einsum("gajbj->gab", a) / n_taps)
    taps = torch.einsum("gajak->gjk", a)
    taps = ratio(taps, taps.diagonal(dim1=1, dim2=2).mean(1)[:, None, None])
    x = (root.mT @ problem.rows).reshape(g, n_rows, n_outputs, n_taps)
    x = cholesky(problem.gradients).mT[:, None] @ x @ cholesky(taps)[:, None]
    x = x.reshape(g, n_rows, -1)
    gram = x @ x.mT if n_rows <= x.shape[2] else x.mT @ x
    return Start(root, taps, x, *eigh_descending(gram))


def factorise_separable(problem: Problem, rank: int, start: Start) -> tuple[Tensor, Tensor]:
    """Return V [g, rank, R] and U [g, O, rank, T2]; at full rank U V is the weight."""
    if rank < start.values.shape[1]:
        v, u = _alternate(problem, start, rank)
        scale = scale_of((v @ start.root).square().sum(2))
        return v / scale[:, :, None], u * scale[:, None, :, None]
    # Nothing to choose: the weight is projected on a basis of all that it needs.
    g, n_outputs, _, n_taps = problem.shape
    u = start.basis(rank).mT @ (start.root.mT @ problem.rows)
    return start.first(rank), u.reshape(g, rank, n_outputs, n_taps).transpose(1, 2)


def expand(v: Tensor, u: Tensor) -> Tensor:
    """Return the matrix [g, O, R * T2] that both factors compute."""
    return torch.einsum("gorj,gra->goaj", u, v).reshape(*u.shape[:2], -1)


def _alternate(problem: Problem, start: Start, rank: int) -> tuple[Tensor, Tensor]:
    """Return V and U of the best round, group by group."""
    n_rounds = min(MAX_ROUNDS, max(1, int(MAX_WORK / (problem.inputs.numel() * rank))))
    state = Alternation(problem, start, rank)
    v, u, best = state.v, state.u, state.loss
    for _ in range(n_rounds):
        state.improve_first()
        state.solve_second()
        better = (state.loss < best)[:, None, None]  # else rounding is all that is left
        v, u = torch.where(better, state.v, v), torch.where(better[..., None], state.u, u)
        last, best = best, best.minimum(state.loss)
        if float((last - best).sum()) <= ENOUGH * float(last.sum()):
            break
    return v, u


class Alternation:
    """Factors ``v`` [g, r, R] and ``u`` [g, O, r, T2] that are improved in turns, and their ``loss`` [g].

    ``va`` is V A as [g, r, T2, R, T2]: entry (r, j, b, k) is the sum over a of v[r, a] A[(a, j), (b, k)]. It
    is the expensive part; as it is linear in v, each step costs one such product.
    """

    def __init__(self, problem: Problem, start: Start, rank: int) -> None:
        self.problem, self.start = problem, start
        wa = problem.weighted
        self.total = (problem.gradients * (wa @ problem.weight.mT)).sum((1, 2))
        self.wa = wa.reshape(problem.shape)
        self.gwa = (problem.gradients @ wa).reshape(problem.shape)
        self.v = start.first(rank)
        self.va = self._times_inputs(self.v)
        self.solve_second()

    def _times_inputs(self, v: Tensor) -> Tensor:
        g, _, n_rows, n_taps = self.problem.shape
        product = v @ self.problem.inputs.reshape(g, n_rows, -1)
        return product.reshape(g, -1, n_taps, n_rows, n_taps)

    def solve_second(self) -> None:
        """Make u the best for v."""
        g, n_outputs, _, n_taps = self.problem.shape
        n = self.v.shape[1] * n_taps
        gram = torch.einsum("grjbk,gsb->grjsk", self.va, self.v).reshape(g, n, n)
        right = torch.einsum("gra,goaj->grjo", self.v, self.wa).reshape(g, n, n_outputs)
        solved = torch.cholesky_solve(right, cholesky((gram + gram.mT) / 2)).mT
        explained = ((self.problem.gradients @ solved) * right.mT).sum((1, 2))
        self.u = solved.reshape(g, n_outputs, -1, n_taps)
        self.loss = 0.5 * (self.total - explained)

    def improve_first(self) -> None:
        """Step on v down the preconditioned gradient, to the lowest point there for the present u."""
        pairs = torch.einsum("gopk,goq,gqrj->gpkrj", self.u, self.problem.gradients, self.u)
        residual = torch.einsum("gopk,gobk->gpb", self.u, self.gwa)
        residual = residual - torch.einsum("gpkrj,grjbk->gpb", pairs, self.va)
        weights = cholesky(torch.einsum("gpkrj,gjk->gpr", pairs, self.start.taps))
        direction = torch.cholesky_solve(residual, weights)
        direction = torch.cholesky_solve(direction.mT, self.start.root).mT
        product = self._times_inputs(direction)
        image = torch.einsum("gpkrj,grjbk->gpb", pairs, product)
        slope, curvature = (direction * residual).sum((1, 2)), (direction * image).sum((1, 2))
        step = ratio(slope, curvature)[:, None, None]
        self.v = self.v + step * direction
        self.va = self.va + step[..., None, None] * product
