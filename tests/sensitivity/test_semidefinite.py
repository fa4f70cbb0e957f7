"""Linear algebra of covariances, on matrices with known factors."""

from __future__ import annotations

import pytest
import torch

from hap_onnx.sensitivity.semidefinite import cholesky, eigh_descending, ratio, scale_of

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


def test_eigenvalues_descend_and_are_not_negative() -> None:
    values, vectors = eigh_descending(FACTOR.mT @ FACTOR)
    assert bool((values >= 0).all())
    torch.testing.assert_close(values[:, 0], torch.tensor([30.0, 5.0]).double())
    torch.testing.assert_close((vectors * values[:, None]) @ vectors.mT, FACTOR.mT @ FACTOR)


def test_nothing_is_divided_by_zero() -> None:
    assert ratio(torch.tensor([3.0, 3.0, 0.0]), torch.tensor([2.0, 0.0, 0.0])).tolist() == [1.5, 0.0, 0.0]
    assert scale_of(torch.tensor([[4.0, 0.0], [0.0, 0.0]]).double()).tolist() == [[2.0, 2e-8], [1.0, 1.0]]
