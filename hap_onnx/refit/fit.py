"""One step after the other: refit it, run it, free what nothing needs."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from hap_onnx.errors import SurgeryError
from hap_onnx.refit.pair import Pair
from hap_onnx.refit.rows import Options, collect_rows
from hap_onnx.refit.schedule import OffsetFit, Task, WeightFit
from hap_onnx.refit.solve import EXACT, solve
from hap_onnx.refit.store import COMPRESSED, ORIGINAL
from hap_onnx.refit.targets import find_added_bias, find_bounds, find_links, find_target
from hap_onnx.twin import Step


def run_task(pair: Pair, task: Task, index: int, options: Options) -> set[str]:
    """Refit a step and run it; returns the names of the changed initializers."""
    side = ORIGINAL if task.twin is pair.original else COMPRESSED
    new: dict[str, Tensor] = {}
    if isinstance(task.fit, WeightFit):
        new = fit_weights(pair, task.step, task.fit, index, options)
    elif task.fit is not None:
        new = fit_offset(pair, task.step, task.fit)
    for name, values in new.items():
        pair.parameters[name].copy_(values)
    for batch in range(pair.n_batches):
        for name, tensor in zip(task.step.outputs, pair.run(task.twin, task.step, batch), strict=False):
            if name:
                pair.store.append((side, name), tensor)
    for key in task.release:
        pair.store.drop(key)
    return set(new)


def fit_weights(pair: Pair, step: Step, fit: WeightFit, index: int, options: Options) -> dict[str, Tensor]:
    """Solve one layer; returns its new initializers, nothing if there is nothing to gain."""
    name, form = step.outputs[0], fit.form
    links = find_links(pair, name)
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
        solved = solve(rows, current, bounds, options) if rows is not None else None
    finally:
        if rows is not None:
            rows.drop()
    if solved is None:
        return {}
    shape = tuple(pair.parameters[fit.weight].shape)
    new = {fit.weight: form.to_weight(solved[:, : matrix.shape[2]].mT.contiguous(), shape)}
    if bias is not None:
        new[bias] = solved[:, -1].reshape(pair.parameters[bias].shape)
    return new


def fit_offset(pair: Pair, step: Step, fit: OffsetFit) -> dict[str, Tensor]:
    """Move a bias by the mean of what is missing."""
    name = step.outputs[0]
    links = find_links(pair, name)
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
        total = total + missing.sum(dim=reduced, keepdim=True, dtype=torch.float64)
        energy += float(wanted.square().sum(dtype=torch.float64))
        count += missing.numel() // values.numel()
    if not isinstance(total, Tensor) or list(total.shape) != shape:
        return {}
    mean = total / max(count, 1)
    # A mean lowers the squared error by its own square, once per position.
    gain = count * float(mean.square().sum())
    if not EXACT * energy < gain < inf:
        return {}
    return {fit.initializer: (values.double() + (mean / fit.scale).reshape(values.shape)).to(values.dtype)}
