"""Products with the Hessian and Hutchinson's traces, against a dense Hessian of some fifty numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from hap_onnx.sensitivity.hessian import (
    MIN_PROBES,
    Moments,
    Tensors,
    add_scaled,
    hutchinson_traces,
    hvp,
    inner,
    mean_hvps,
    multiply,
    rademacher,
)

SIZES = [(6, 4), (6,), (3, 6), (3,)]


def make_parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in SIZES]


def make_data(n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


def mean_loss(parameters: Tensors, x: Tensor, labels: Tensor) -> Tensor:
    w1, b1, w2, b2 = parameters
    return torch.nn.functional.cross_entropy(torch.tanh(x @ w1.T + b1) @ w2.T + b2, labels)


def flat(pieces: Tensors) -> Tensor:
    return torch.cat([piece.flatten() for piece in pieces])


def dense_hessian(parameters: Tensors) -> Tensor:
    sizes = [p.numel() for p in parameters]

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split(sizes)
        return mean_loss([x.reshape(p.shape) for x, p in zip(pieces, parameters, strict=True)], *make_data())

    return torch.autograd.functional.hessian(loss, flat(parameters).detach())


def losses(parameters: Tensors, sizes: Sequence[int]) -> Iterator[tuple[Tensor, int]]:
    x, labels = make_data()
    for part, part_labels in zip(x.split(list(sizes)), labels.split(list(sizes)), strict=True):
        yield mean_loss(parameters, part, part_labels), len(part)


def test_algebra() -> None:
    a = [torch.ones(2, 2), torch.tensor([3.0])]
    b = [torch.full((2, 2), 2.0), torch.tensor([-1.0])]
    assert inner(a, b) == 8 - 3
    assert inner(a, b).dtype == torch.float64
    torch.testing.assert_close(multiply(a, b)[1], torch.tensor([-3.0]))
    torch.testing.assert_close(add_scaled(a, b, 0.5)[0], torch.full((2, 2), 2.0))
    assert torch.equal(a[0], torch.ones(2, 2))


def test_rademacher_is_signs_and_follows_the_generator() -> None:
    like = make_parameters()
    first = rademacher(like, torch.Generator().manual_seed(3))
    again = rademacher(like, torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [v.shape for v in first] == [p.shape for p in like]
    assert set(flat(first).tolist()) == {-1.0, 1.0}
    assert first[0].dtype == torch.float64


def test_hvp_equals_dense_hessian() -> None:
    parameters = make_parameters()
    v = rademacher(parameters, torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(mean_loss(parameters, *make_data()), parameters, create_graph=True)
    expected = dense_hessian(parameters) @ flat(v)
    torch.testing.assert_close(flat(hvp(gradients, parameters, v)), expected)


def test_hvp_of_a_linear_loss_is_zero() -> None:
    w = torch.ones(3, requires_grad=True)
    gradients = torch.autograd.grad((2 * w).sum(), [w], create_graph=True)
    assert torch.equal(hvp(gradients, [w], [torch.ones(3)])[0], torch.zeros(3))


@pytest.mark.parametrize("sizes", [(12,), (5, 7), (1, 4, 4, 3)])
def test_mean_hvps_does_not_depend_on_the_split(sizes: Sequence[int]) -> None:
    parameters = make_parameters()
    generator = torch.Generator().manual_seed(0)
    vectors = [rademacher(parameters, generator) for _ in range(3)]
    products = mean_hvps(losses(parameters, sizes), parameters, vectors)
    hessian = dense_hessian(parameters)
    for v, product in zip(vectors, products, strict=True):
        assert product[0].dtype == torch.float64
        torch.testing.assert_close(flat(product), hessian @ flat(v))
    assert all(p.grad is None for p in parameters)


def test_mean_hvps_needs_samples() -> None:
    with pytest.raises(ValueError, match="no samples"):
        mean_hvps([], [torch.ones(1, requires_grad=True)], [[torch.ones(1)]])


def test_hutchinson_covers_the_traces() -> None:
    parameters = make_parameters()
    diagonal = dense_hessian(parameters).diagonal().split([p.numel() for p in parameters])
    moments = hutchinson_traces(
        lambda vectors: mean_hvps(losses(parameters, (5, 7)), parameters, vectors),
        parameters,
        n_probes=300,
        generator=torch.Generator().manual_seed(0),
    )
    expected = torch.stack([piece.sum() for piece in diagonal])
    assert moments.n == 300
    assert ((moments.mean - expected).abs() <= 4 * moments.std_error).all()
    assert (moments.std_error < expected.abs().max()).all()


def test_hutchinson_of_a_diagonal_matrix_is_exact_and_stops_when_told() -> None:
    diagonal = torch.tensor([1.0, 2.0, -3.0])
    seen = []
    moments = hutchinson_traces(
        lambda vectors: [[diagonal * v[0]] for v in vectors],
        [torch.zeros(3)],
        n_probes=50,
        generator=torch.Generator().manual_seed(0),
        reduce=lambda pieces: pieces[0],
        settled=lambda moments: moments.n >= 2 * MIN_PROBES,
        on_probe=lambda: seen.append(1),
    )
    assert moments.n == len(seen) == 2 * MIN_PROBES
    torch.testing.assert_close(moments.mean, diagonal.double())
    assert (moments.std_error == 0).all()


def test_moments_equal_the_plain_formulas_however_grouped() -> None:
    values = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double() + 1e6
    moments = Moments(3)
    for part in values.split([1, 7, 0, 12]):
        moments.add(part)
    torch.testing.assert_close(moments.mean, values.mean(0))
    torch.testing.assert_close(moments.std_error, values.std(0) / 20**0.5, rtol=1e-6, atol=0)


def test_moments_weigh_observations() -> None:
    moments = Moments(1)
    moments.add(torch.tensor([[1.0]]), weight=3)
    assert moments.std_error.isinf().all()
    moments.add(torch.tensor([[5.0]]), weight=1)
    assert moments.mean.item() == 2.0
