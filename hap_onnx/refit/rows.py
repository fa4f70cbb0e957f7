"""The rows of one layer's least-squares problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import torch
from torch import Tensor

from hap_onnx.distributed import ALONE, Team
from hap_onnx.errors import SurgeryError
from hap_onnx.ops.linear import LinearForm
from hap_onnx.refit.pair import Pair
from hap_onnx.refit.schedule import WeightFit
from hap_onnx.refit.store import ROWS, Store
from hap_onnx.refit.targets import Bounds, Link, find_target
from hap_onnx.sensitivity.semidefinite import add_gram, mirror_gram
from hap_onnx.twin import Step

MAX_ROWS = 65_536
"""Rows per layer: more do not change the solution."""
MAX_NUMBERS = 2**26
"""Numbers in the rows of a layer, unless it needs more to have ``ROWS_PER_FEATURE``."""
ROWS_PER_FEATURE = 4
MAX_FEATURES = 8192
"""Above this the features do not get a Gram matrix; rows are limited and it is made of those."""
CHUNK = 8192
"""Rows that are summed up in float32 before they are added in float64."""
_TRANSFORMED = "transformed"


@dataclass(frozen=True)
class Options:
    ridge: float
    n_positions: int
    n_relu_rounds: int
    seed: int


@dataclass(frozen=True)
class Rows:
    """The rows of one layer, in the store: x [g, n, F] (a column of ones last, if there is a bias),
    the wanted sum [g, n, O] and what others add to it, ``added``.

    Each process of a team has rows of its own; sums are those of all.
    """

    store: Store
    n_batches: int
    has_added: bool
    features: str = "x"
    team: Team = ALONE

    def parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield some of this process's rows at a time."""
        for batch in range(self.n_batches):
            names = (self.features, "wanted", "added") if self.has_added else (self.features, "wanted")
            chunks = [self.store.get((ROWS, name), batch).split(CHUNK, dim=1) for name in names]
            for part in zip(*chunks, strict=True):
                yield part[0], part[1], part[2] if self.has_added else None

    def residuals(self, weights: Tensor, bounds: Bounds | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x, what is missing from the prediction) for weights [g, F, O]."""
        for x, wanted, added in self.parts():
            predicted = x @ weights if added is None else x @ weights + added
            if bounds is not None:
                low, high = bounds
                wanted = torch.where(wanted <= low, predicted.clamp(max=low), wanted)
                wanted = torch.where(wanted >= high, predicted.clamp(min=high), wanted)
            yield x, wanted - predicted

    def error(self, weights: Tensor, bounds: Bounds | None) -> float:
        parts = [r.square().sum(dtype=torch.float64) for _, r in self.residuals(weights, bounds)]
        return self.team.total(float(torch.stack(parts).sum()))

    def energy(self) -> float:
        parts = [wanted.square().sum(dtype=torch.float64) for _, wanted, _ in self.parts()]
        return self.team.total(float(torch.stack(parts).sum()))

    def n_rows(self) -> int:
        return int(self.team.total(sum(x.shape[1] for x, _, _ in self.parts())))

    def mean(self) -> Tensor:
        """Mean of x, float64 [g, F]."""
        total = torch.stack([x.sum(1, dtype=torch.float64) for x, _, _ in self.parts()]).sum(0)
        return self.team.sum_(total) / self.n_rows()

    def gram(self, *, less: Tensor | None = None) -> Tensor:
        """Sum of x x^T, float64 [g, F, F], of x ``less`` a vector [g, F]."""
        gram: Tensor | None = None
        for x, _, _ in self.parts():  # more rows at once would lose digits: products are summed in float32
            gram = add_gram(gram, x if less is None else x - less[:, None].to(x))
        assert gram is not None
        return mirror_gram(self.team.sum_(gram))

    def transform(self, function: Callable[[Tensor], Tensor]) -> Rows:
        """Put ``function`` of x into the store too; it gets some of the rows [g, n, F] at a time."""
        for batch in range(self.n_batches):
            parts = self.store.get((ROWS, self.features), batch).split(CHUNK, dim=1)
            self.store.append((ROWS, _TRANSFORMED), torch.cat([function(x) for x in parts], 1))
        return replace(self, features=_TRANSFORMED)

    def drop(self) -> None:
        for name in ("x", _TRANSFORMED, "wanted", "added"):
            self.store.drop((ROWS, name))


def n_rows_to_take(n_samples: int, n_features: int, conv_group: int, options: Options) -> tuple[int, int]:
    """Return (positions per sample, samples) to take."""
    most = min(MAX_ROWS, MAX_NUMBERS // (conv_group * n_features))
    if n_features <= MAX_FEATURES:
        most = max(most, ROWS_PER_FEATURE * n_features)
    most = max(most, 1)
    wanted = max(options.n_positions, ceil(ROWS_PER_FEATURE * n_features / n_samples))
    return max(min(wanted, most // n_samples), 1), min(n_samples, most)


def collect_rows(
    pair: Pair,
    step: Step,
    fit: WeightFit,
    links: Sequence[Link],
    index: int,
    options: Options,
    *,
    n_features: int,
    bias: str | None,
) -> Rows | None:
    """Put the rows of a layer into the store; None if its data has no samples."""
    name, form, store = step.outputs[0], fit.form, pair.store
    layer_seed = np.random.SeedSequence([options.seed, index]).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(layer_seed))
    n_channels = pair.parameters[fit.weight].shape[form.out_axis]
    sizes = _find_sizes(pair, name, form)
    n_all = sum(size for size, _, _ in sizes)
    if pair.value(fit.data, 0).ndim < 2 or not n_all:
        return None
    per_sample, n_samples = n_rows_to_take(n_all, n_features, form.conv_group, options)
    has_added = False
    for size, n, batch in sizes:
        chosen = positions = None
        if size and n_samples < n_all:
            n_chosen = ceil(size * n_samples / n_all)
            chosen = torch.randperm(size, generator=generator)[:n_chosen].sort()[0]
        if per_sample < n:
            positions = torch.randperm(n, generator=generator)[:per_sample].sort()[0]
        if batch is None:  # another process has it
            continue
        x = pair.value(fit.data, batch)
        wanted, added = find_target(pair, name, links, batch, without=bias)
        if chosen is not None:
            chosen = chosen.to(x.device)
            x, wanted, added = x[chosen], wanted[chosen], None if added is None else added[chosen]
        if fit.fixed_bias is not None:
            vector = pair.parameters[fit.fixed_bias].reshape(-1, *[1] * (wanted.ndim - 2))
            added = vector.expand_as(wanted) if added is None else added + vector
        if positions is None:
            positions = torch.arange(form.n_positions(wanted))
        patches = form.patches(x, positions)
        if bias is not None:
            patches = torch.cat([patches, patches.new_ones(*patches.shape[:2], 1)], 2)
        rows = form.outputs(wanted, positions)
        if patches.shape[:2] != rows.shape[:2] or rows.shape[0] * rows.shape[2] != n_channels:
            raise SurgeryError(
                f"refit: {step.op_type} '{step.name}' computes {n_channels} channels of '{name}' from "
                f"{list(x.shape)}, but what is left of the original's is {list(wanted.shape)}"
            )
        n_counted = rows.shape[1] if size else 0
        store.append((ROWS, "x"), patches[:, :n_counted])
        store.append((ROWS, "wanted"), rows[:, :n_counted])
        if added is not None:
            has_added = True
            store.append((ROWS, "added"), form.outputs(added, positions)[:, :n_counted])
    return Rows(store, pair.n_batches, has_added, team=pair.team)


def _find_sizes(
    pair: Pair, name: str, form: LinearForm
) -> list[tuple[int, int, int | None]]:
    """Return the samples and positions that each batch of a tensor has, and which of our own it is.

    In the order of batches; None for those of other processes. An idle process has one without samples.
    """
    values = [pair.original_value(name, batch) for batch in range(pair.n_batches)]
    own = [(len(value), form.n_positions(value)) for value in values]
    found = pair.team.gather([] if pair.is_idle else own)
    sizes: list[tuple[int, int, int | None]] = []
    for index in range(sum(map(len, found))):
        turn, rank = divmod(index, pair.team.size)
        sizes.append((*found[rank][turn], turn if rank == pair.team.rank else None))
    return [*sizes, (0, own[0][1], 0)] if pair.is_idle else sizes
