"""Linear algebra of covariances, on matrices with known factors."""

from __future__ import annotations

import pytest
import torch

from hap_onnx.sensitivity import semidefinite
from hap_onnx.sensitivity.semidefinite import (
    add_gram,
    cholesky,
    eigh_descending,
    is_definite,
    mirror_gram,
    ratio,
    scale_of,
)
from tests.helpers import rand

FACTOR = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[0.0, 1.0, 0.0, 2.0]]], dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e12])
def test_a_semidefinite_matrix_has_a_root(scale: float) -> None:
    matrix = scale * FACTOR.mT @ FACTOR  # of rank 1, with dead rows
    root = cholesky(matrix)
    torch.testing.assert_close(root @ root.mT, matrix, rtol=0, atol=1e-11 * float(matrix.max()))
    assert torch.equal(root, root.tril())


def test_a_matrix_that_is_semidefinite_but_for_rounding_has_a_root() -> None:
    matrix = FACTOR.mT @ FACTOR - 1e-8 * torch.eye(4)
    root = cholesky(matrix)
    torch.testing.assert_close(root @ root.mT, matrix, rtol=0, atol=1e-4)


def test_zero_has_a_root_and_a_negative_matrix_has_none() -> None:
    assert bool((cholesky(torch.zeros(1, 3, 3).double()).diagonal(dim1=1, dim2=2) > 0).all())
    with pytest.raises(ValueError, match="not positive semidefinite"):
        cholesky(-torch.eye(3).double()[None])
    assert [is_definite(scale * torch.eye(3).double()[None]) for scale in (1, -1)] == [True, False]
    assert [is_definite(torch.tensor([[1.0, x]])) for x in (1e-9, 0.0, -1.0)] == [True, False, False]


def test_eigenvalues_descend_and_are_not_negative() -> None:
    values, vectors = eigh_descending(FACTOR.mT @ FACTOR)
    assert bool((values >= 0).all())
    torch.testing.assert_close(values[:, 0], torch.tensor([30.0, 5.0]).double())
    torch.testing.assert_close((vectors * values[:, None]) @ vectors.mT, FACTOR.mT @ FACTOR)


def test_nothing_is_divided_by_zero() -> None:
    assert ratio(torch.tensor([3.0, 3.0, 0.0]), torch.tensor([2.0, 0.0, 0.0])).tolist() == [1.5, 0.0, 0.0]
    assert scale_of(torch.tensor([[4.0, 0.0], [0.0, 0.0]]).double()).tolist() == [[2.0, 2e-8], [1.0, 1.0]]


# ---------------------------------------------------------------- sums of products


@pytest.mark.parametrize("n_features", [1, 5, 6, 7, 14])
def test_sums_of_products_are_whole_and_symmetric_however_wide(
    n_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semidefinite, "GRAM_BLOCK", 6)
    parts = [torch.from_numpy(rand(2, n, n_features, seed=n)) for n in (9, 4)]
    total = None
    for rows in parts:
        total = add_gram(total, rows)
    assert total is not None
    x = torch.cat(parts, 1).double()
    found = mirror_gram(total)
    torch.testing.assert_close(found, x.mT @ x, rtol=1e-5, atol=1e-5)
    if n_features > 6:
        assert torch.equal(found[:, :6, 6:], found[:, 6:, :6].mT)
