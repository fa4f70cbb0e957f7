"""What is fitted at one step: the weight and bias of a contraction, or only a constant that is added."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from hap_onnx.errors import SurgeryError
from hap_onnx.refit.pair import Pair
from hap_onnx.refit.rows import Options, Rows, collect_rows
from hap_onnx.refit.schedule import OffsetFit, WeightFit
from hap_onnx.refit.solve import EXACT, solve
from hap_onnx.refit.targets import Bounds, find_added_bias, find_bounds, find_links, find_target
from hap_onnx.twin import Step


@dataclass(frozen=True)
class Problem:
    """The least-squares problem of one layer.

    ``current`` are its weights as they are, [g, F, O], the bias as last feature if one is fitted. ``rows``
    are None if the layer's data has no samples, or too few axes.
    """

    fit: WeightFit
    rows: Rows | None
    current: Tensor
    bias: str | None
    bounds: Bounds | None

    def initializers(self, pair: Pair, weights: Tensor) -> dict[str, Tensor]:
        """Turn weights like ``current`` into initializers by name."""
        n_features = weights.shape[1] - (self.bias is not None)
        shape = tuple(pair.parameters[self.fit.weight].shape)
        matrix = weights[:, :n_features].mT.contiguous()
        new = {self.fit.weight: self.fit.form.to_weight(matrix, shape)}
        if self.bias is not None:
            new[self.bias] = weights[:, -1].reshape(pair.parameters[self.bias].shape)
        return new


@contextmanager
def pose_problem(pair: Pair, step: Step, fit: WeightFit, index: int, options: Options) -> Iterator[Problem]:
    """Collect the rows of one layer, which are in the store as long as the context lasts."""
    name, form = step.outputs[0], fit.form
    links = pair.team.agree(find_links(pair, name))
    matrix = form.to_matrix(pair.parameters[fit.weight])  # [g, O, F]
    bias = fit.bias
    if bias is None and fit.fixed_bias is None and links:
        bias = find_added_bias(pair, links[0], form, n_outputs=matrix.shape[0] * matrix.shape[1], name=name)
    bounds = find_bounds(pair, links[-1].output if links else name) if options.n_relu_rounds else None
    current = matrix.mT
    if bias is not None:
        column = pair.parameters[bias].reshape(matrix.shape[0], 1, -1)
        current = torch.cat([current, column], 1)  # [g, F, O]
    rows = collect_rows(pair, step, fit, links, index, options, n_features=current.shape[1], bias=bias)
    try:
        yield Problem(fit, rows, current, bias, bounds)
    finally:
        if rows is not None:
            rows.drop()


def fit_weights(pair: Pair, step: Step, fit: WeightFit, index: int, options: Options) -> dict[str, Tensor]:
    """Solve one layer; returns its new initializers, nothing if there is nothing to gain."""
    with pose_problem(pair, step, fit, index, options) as problem:
        if problem.rows is None:
            return {}
        solved = solve(problem.rows, problem.current, problem.bounds, options)
    return {} if solved is None else problem.initializers(pair, solved)


def fit_offset(pair: Pair, step: Step, fit: OffsetFit) -> dict[str, Tensor]:
    """Move a bias by the mean of what is missing."""
    name = step.outputs[0]
    links = pair.team.agree(find_links(pair, name))
    values = pair.parameters[fit.initializer]
    total: Tensor | float = 0.0
    energy, count = 0.0, 0
    shape: list[int] = []
    for batch in range(pair.n_batches):
        wanted, added = find_target(pair, name, links, batch)
        output = pair.run(pair.compressed, step, batch)[0]
        if output.shape != wanted.shape:
            raise SurgeryError(
                f"refit: '{name}' has shape {list(output.shape)}, but the original's channels that are left "
                f"give {list(wanted.shape)}"
            )
        missing = wanted - output if added is None else wanted - output - added
        shape = [1] * (missing.ndim - values.ndim) + list(values.shape)
        if fit.axis is not None:
            shape = [values.numel() if axis == fit.axis else 1 for axis in range(missing.ndim)]
        reduced = [axis for axis, size in enumerate(shape) if size == 1]
        if pair.is_idle:
            missing, wanted = torch.zeros_like(missing), torch.zeros_like(wanted)
        total = total + missing.sum(dim=reduced, keepdim=True, dtype=torch.float64)
        energy += float(wanted.square().sum(dtype=torch.float64))
        count += 0 if pair.is_idle else missing.numel() // values.numel()
    energy, count = pair.team.total(energy), int(pair.team.total(count))
    if isinstance(total, Tensor):
        pair.team.sum_(total)
    if not isinstance(total, Tensor) or list(total.shape) != shape:
        return {}
    mean = total / max(count, 1)
    # A mean lowers the squared error by its own square, once per position.
    gain = count * float(mean.square().sum())
    if not EXACT * energy < gain < inf:
        return {}
    return {fit.initializer: (values.double() + (mean / fit.scale).reshape(values.shape)).to(values.dtype)}
