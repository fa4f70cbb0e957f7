"""Least squares with a ridge, aware of the bounds beyond which outputs do not matter."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hap_onnx.distributed import Team
from hap_onnx.refit.rows import CHUNK, Options, Rows
from hap_onnx.refit.targets import Bounds

_log = logging.getLogger(__name__)

EXACT = 1e-12
"""Squared error, relative to the squared targets, that is float rounding."""


def solve(
    rows: Rows, current: Tensor, bounds: Bounds | None, options: Options, *, gram: Tensor | None = None
) -> Tensor | None:
    """Return better weights [g, F, O] than ``current``, None if there are none.

    ``gram`` is that of the rows, if it is known; it stays as it is.
    """
    before = rows.error(current, bounds)
    if not before > EXACT * rows.energy():
        return None
    n_rows = rows.n_rows()
    system: _Primal | _Dual | None
    if n_rows < current.shape[1]:
        system = _Dual.build(rows, options.ridge)
    else:
        system = _Primal.build(rows.gram() if gram is None else gram.clone(), options.ridge, rows.team)
    if system is None:
        return None
    weights = current
    for number in range(1 + (options.n_relu_rounds if bounds is not None else 0)):
        step = rows.team.agree(system.advance(rows.residuals(weights, bounds if number else None)))
        weights = (current.double() + step).to(current.dtype)
    after = rows.error(weights, bounds)
    _log.debug("refit: squared error %.4g -> %.4g on %d rows", before, after, n_rows)
    return weights if bool(torch.isfinite(weights).all()) and after < before else None


@dataclass
class _Primal:
    """The normal equations over features, for the difference to the current weights.

    Each round adds the solution for what is still missing; without a change of targets there is nothing
    left for a second round but rounding.
    """

    factor: Tensor  # [g, F, F]
    damping: Tensor  # [g, 1, 1]
    team: Team
    state: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    @classmethod
    def build(cls, gram: Tensor, ridge: float, team: Team) -> _Primal | None:
        factored = _factorise(gram, ridge, gram.shape[1], team)
        return None if factored is None else cls(*factored, team)

    def advance(self, residuals: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the difference to the current weights [g, F, O] after one more round."""
        gradient = -self.damping * self.state * self.team.leads  # once, not once per process
        for x, missing in residuals:
            gradient = gradient + (x.mT @ missing).double()
        self.state = self.state + torch.cholesky_solve(self.team.sum_(gradient), self.factor)
        return self.state


@dataclass
class _Dual:
    """The same problem over rows, where they are fewer than features."""

    factor: Tensor  # [g, n, n]
    damping: Tensor
    x: Tensor  # [g, n, F], of all processes
    team: Team
    state: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    @classmethod
    def build(cls, rows: Rows, ridge: float) -> _Dual | None:
        x = torch.cat(rows.team.gather(torch.cat([part for part, _, _ in rows.parts()], 1)), 1)
        gram = x.new_zeros(x.shape[0], x.shape[1], x.shape[1], dtype=torch.float64)
        for part in x.split(CHUNK, dim=2):
            gram += part @ part.mT
        factored = _factorise(gram, ridge, x.shape[2], rows.team)
        return None if factored is None else cls(*factored, x, rows.team)

    def advance(self, residuals: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        missing = torch.cat(self.team.gather(torch.cat([part for _, part in residuals], 1)), 1).double()
        self.state = self.state + torch.cholesky_solve(missing - self.damping * self.state, self.factor)
        return (self.x.mT @ self.state.to(self.x.dtype)).double()


def _factorise(
    gram: Tensor, ridge: float, n_features: int, team: Team
) -> tuple[Tensor, Tensor] | None:
    """Damp the diagonal in place and factorise; None if the matrix is not even then positive definite."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    scale = (diagonal.sum(1) / n_features).clamp_min(torch.finfo(torch.float64).tiny)
    damping = torch.zeros_like(scale)
    # Sums in float32 leave noise of 1e-7: where inputs depend on each other, a smaller ridge is not enough.
    for more in (ridge, 1e-6, 1e-5, 1e-4):
        if more >= ridge:
            diagonal += (more * scale - damping)[:, None]
            damping = more * scale
            factor, info = torch.linalg.cholesky_ex(gram)
            if not team.agree(bool(info.any())):
                return factor, damping[:, None, None]
    return None
