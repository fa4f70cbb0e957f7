"""Linear algebra of covariances: stacks of positive semidefinite matrices [g, n, n], float64."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGES = (1e-12, 1e-9, 1e-6)
"""Relative to the mean of the diagonal; the first that makes a semidefinite matrix definite is taken."""
GRAM_BLOCK = 512
"""Symmetric sums are computed by strips of so many rows, right of the diagonal only."""


def cholesky(matrix: Tensor) -> Tensor:
    """Return L with L L^T = matrix, which may be semidefinite up to rounding.

    Raises ValueError if it is further from that than the largest ridge.
    """
    root = _root(matrix)
    if root is None:
        raise ValueError("a covariance of the metric is not positive semidefinite: damp it (make_metric)")
    return root


def is_definite(matrix: Tensor) -> bool:
    """Say whether ``cholesky`` finds a root of a stack of matrices, or of diagonals [g, n]."""
    return bool((matrix > 0).all()) if matrix.ndim == 2 else _root(matrix) is not None


def _root(matrix: Tensor) -> Tensor | None:
    mean = matrix.diagonal(dim1=1, dim2=2).mean(1)
    scale = torch.where(mean > 0, mean, 1)[:, None, None]
    identity = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    for ridge in RIDGES:
        root, info = torch.linalg.cholesky_ex(matrix + ridge * scale * identity)
        if not info.any():
            return root
    return None


def eigh_descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues [g, n], descending and not negative, and their vectors in columns [g, n, n]."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(1).clamp_min(0), vectors.flip(2)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is not positive."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


def scale_of(variances: Tensor) -> Tensor:
    """Return the standard deviations [g, n] of variances, not so small that one could not divide by them."""
    deviations = variances.clamp_min(0).sqrt()
    floor = 1e-8 * deviations.amax(1, keepdim=True)
    return torch.where(floor > 0, deviations.maximum(floor), 1)


# --- sums of products ---


def add_gram(total: Tensor | None, rows: Tensor) -> Tensor:
    """Add the products x^T x of float rows [g, n, F] to ``total`` [g, F, F] in place, None for nothing yet.

    Of wide matrices only what is above the blocks on the diagonal is computed: ``mirror_gram`` makes the
    sum whole.
    """
    g, _, n_features = rows.shape
    if total is None:
        total = rows.new_zeros(g, n_features, n_features, dtype=torch.float64)
    for start in range(0, n_features, GRAM_BLOCK):
        part = slice(start, start + GRAM_BLOCK)
        total[:, part, start:] += rows[:, :, part].mT @ rows[:, :, start:]
    return total


def mirror_gram(total: Tensor) -> Tensor:
    """Fill in what ``add_gram`` has left out, in place; return it."""
    n_features = total.shape[1]
    for start in range(GRAM_BLOCK, n_features, GRAM_BLOCK):
        part = slice(start, start + GRAM_BLOCK)
        total[:, part, :start] = total[:, :start, part].mT
    return total
