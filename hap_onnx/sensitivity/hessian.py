"""The maths of curvature: Hessian-vector products and Hutchinson's traces, on lists of tensors.

    products = mean_hvps(losses, parameters, vectors)       # H v over all the data, v by v
    traces = hutchinson_traces(apply, parameters, n_probes=300, generator=generator)

Hutchinson (1990): for a random v of independent entries of +1 or -1, E[v * Hv] is the diagonal of H, and the
sum of v * Hv over some parameters is an unbiased estimate of the trace of their block of H.

Nothing here knows of models: a list of tensors is one long vector, in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from hap_onnx.distributed import ALONE, Team

Tensors = Sequence[Tensor]
"""One vector in pieces, one piece per parameter."""

MIN_PROBES = 8
"""Standard errors of fewer probes are not worth a decision."""


# --- algebra ---


def multiply(a: Tensors, b: Tensors) -> list[Tensor]:
    """Return the products, entry by entry."""
    return [x * y for x, y in zip(a, b, strict=True)]


def inner(a: Tensors, b: Tensors) -> Tensor:
    """Return the inner product as one float64 number."""
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]).sum()


def add_scaled(a: Tensors, b: Tensors, factor: float) -> list[Tensor]:
    """Return ``a + factor * b``, in the types of ``a``."""
    return [x + factor * y.to(x.dtype) for x, y in zip(a, b, strict=True)]


def random_signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return independent entries of +1 or -1 (float32, on the CPU, so that every device sees the same)."""
    return torch.randint(0, 2, tuple(shape), generator=generator).to(torch.float32).mul_(2).sub_(1)


def rademacher(like: Tensors, generator: torch.Generator) -> list[Tensor]:
    """Return a random vector of signs with the shapes, types and devices of ``like``."""
    return [random_signs(x.shape, generator).to(device=x.device, dtype=x.dtype) for x in like]


# --- products with the Hessian ---


def hvp(gradients: Tensors, parameters: Tensors, v: Tensors, *, retain_graph: bool = False) -> list[Tensor]:
    """Return Hv = d<g, v>/dw, with g the gradients of a loss at ``parameters``.

    ``gradients`` must carry their graph (``create_graph=True``). Pieces that the loss depends on linearly
    or not at all are zero.
    """
    pairs = [(g, x) for g, x in zip(gradients, v, strict=True) if g.requires_grad]
    if not pairs:
        return [torch.zeros_like(parameter) for parameter in parameters]
    return list(
        torch.autograd.grad(
            [g for g, _ in pairs],
            list(parameters),
            grad_outputs=[x for _, x in pairs],
            retain_graph=retain_graph,
            materialize_grads=True,
        )
    )


def mean_hvps(
    losses: Iterable[tuple[Tensor, int]],
    parameters: Tensors,
    vectors: Sequence[Tensors],
    *,
    team: Team = ALONE,
) -> list[list[Tensor]]:
    """Return Hv in float64 for each of ``vectors``, with H the Hessian of the mean loss over all samples.

    ``losses`` yields (mean loss of a batch, number of its samples). Batches are weighted by their samples,
    so the result does not depend on how the data was batched. Each batch's graph is freed before the next
    one is asked for, and all vectors share its forward pass and gradient. Each process of a ``team`` has
    losses of its own batches.
    """
    sums = [[torch.zeros_like(p, dtype=torch.float64) for p in parameters] for _ in vectors]
    n_total = 0
    for loss, n_samples in losses:
        gradients = torch.autograd.grad(loss, list(parameters), create_graph=True, materialize_grads=True)
        del loss
        for index, v in enumerate(vectors):
            product = hvp(gradients, parameters, v, retain_graph=index < len(vectors) - 1)
            sums[index] = add_scaled(sums[index], product, n_samples)
        del gradients
        n_total += n_samples
    n_total = int(team.total(n_total))
    if n_total == 0:
        raise ValueError("no samples to take the mean over")
    return [[team.sum_(piece) / n_total for piece in total] for total in sums]


# --- statistics ---


class Moments:
    """Running mean and standard error of random vectors (Welford 1962, Chan et al. 1979), in float64.

    Memory does not grow with the observations, and the result does not depend on how they are grouped.
    """

    def __init__(self, size: int, *, device: torch.device | str | None = None) -> None:
        self.n = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self.mean)
        self._weight = 0.0

    def add(self, values: Tensor, *, weight: float = 1.0) -> None:
        """Add observations [k, size], each of the given weight."""
        if not len(values):
            return
        values = values.double()
        mean = values.mean(0)
        self._join(mean, weight * (values - mean).square().sum(0), weight * len(values))
        self.n += len(values)

    def merge(self, other: Moments) -> None:
        """Add what others have observed."""
        if other.n:
            self._join(other.mean.to(self.mean.device), other._squares.to(self.mean.device), other._weight)
            self.n += other.n

    def _join(self, mean: Tensor, squares: Tensor, weight: float) -> None:
        delta = mean - self.mean
        total = self._weight + weight
        self._squares += squares
        self._squares += delta.square() * (self._weight * weight / total)
        self.mean = self.mean + delta * (weight / total)
        self._weight = total

    @property
    def std_error(self) -> Tensor:
        """Standard error of the mean [size]; infinite after fewer than two observations."""
        if self.n < 2:
            return torch.full_like(self.mean, torch.inf)
        return (self._squares / self._weight / (self.n - 1)).sqrt()


def trace_of_each(diagonal: Tensors) -> Tensor:
    """Return the sum of each piece [number of pieces], in float64."""
    return torch.stack([piece.double().sum() for piece in diagonal])


def hutchinson_traces(
    apply: Callable[[Sequence[Tensors]], Sequence[Tensors]],
    parameters: Tensors,
    *,
    n_probes: int,
    generator: torch.Generator,
    reduce: Callable[[Tensors], Tensor] = trace_of_each,
    settled: Callable[[Moments], bool] | None = None,
    on_probe: Callable[[], None] | None = None,
) -> Moments:
    """Estimate traces of blocks of the Hessian from products with random signs.

    Args:
        apply: returns Hv for each of some vectors (they come ``MIN_PROBES`` at a time, so that a pass
            over the data can be shared).
        parameters: give the vectors their shapes, types and devices.
        n_probes: most random vectors to use.
        generator: seeded by the caller; on the CPU.
        reduce: maps one estimate of the diagonal, v * Hv in pieces, to the traces of interest [k];
            by default the trace of each piece.
        settled: asked after every ``MIN_PROBES`` probes; true ends the estimate.
        on_probe: called once per probe.
    """
    moments: Moments | None = None
    for start in range(0, n_probes, MIN_PROBES):
        vectors = [rademacher(parameters, generator) for _ in range(min(MIN_PROBES, n_probes - start))]
        for v, product in zip(vectors, apply(vectors), strict=True):
            traces = reduce(multiply(v, product))
            if moments is None:
                moments = Moments(len(traces), device=traces.device)
            moments.add(traces[None])
            if on_probe is not None:
                on_probe()
        if settled is not None and moments is not None and moments.n >= MIN_PROBES and settled(moments):
            break
    if moments is None:
        raise ValueError(f"n_probes must be at least 1, got {n_probes}")
    return moments
