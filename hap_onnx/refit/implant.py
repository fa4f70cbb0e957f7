"""Implants in lock step: the factors of a layer are fitted where it is, to the inputs that it really gets.

A layer that gets an implant is first solved like any other. The solution is factorised under the covariance
of the layer's own inputs (less their mean, if there is a bias to take it up) and the G of the original model.
Then the second factor is solved again on what the first one computes, towards the same targets. The product
goes on as the layer's weight, so that the layers behind correct what the implant loses.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hap_onnx.implants.factors import Factors, Metric, factorise, make_metric
from hap_onnx.refit.fit import Problem, pose_problem
from hap_onnx.refit.pair import Pair
from hap_onnx.refit.rows import Options, Rows
from hap_onnx.refit.schedule import ImplantFit
from hap_onnx.refit.solve import solve
from hap_onnx.refit.spec import FittedImplant, ImplantSpec
from hap_onnx.sensitivity.semidefinite import is_definite
from hap_onnx.twin import Step

DAMPING = 1e-3
"""Of the covariance of a layer's inputs, relative to the mean of its diagonal."""
ROUNDING = 1e-5
"""The same, relative to the second moments, whose sums in float32 are not exact."""


def fit_implant(
    pair: Pair, step: Step, fit: ImplantFit, index: int, options: Options
) -> tuple[dict[str, Tensor], FittedImplant]:
    """Return the new initializers of one layer, the weight as the implant computes it, and the implant."""
    parameter, metric = pair.parameters[fit.weight], fit.spec.make_metric()
    if fit.layer is not None:
        with pose_problem(pair, step, fit.layer, index, options) as problem:
            found = _fit_factors(problem, fit.spec, metric, options)
        if found is not None:
            arrays, weights = found
            return problem.initializers(pair, weights), _record(fit.spec, arrays)
    factors = pair.team.lead(lambda: _factorise(fit.form.to_matrix(parameter), metric, fit.spec))
    dense = fit.form.to_weight(factors.dense.to(parameter), tuple(parameter.shape))
    return {fit.weight: dense}, _record(fit.spec, factors.arrays)


def _record(spec: ImplantSpec, arrays: tuple[Tensor, ...]) -> FittedImplant:
    return FittedImplant(spec.kind, spec.rank, tuple(np.array(a.cpu().numpy(), np.float32) for a in arrays))


def _factorise(weight: Tensor, metric: Metric, spec: ImplantSpec) -> Factors:
    metric = Metric(metric.inputs.to(weight.device), metric.gradients.to(weight.device))
    return factorise(weight, metric, kind=spec.kind, rank=spec.rank, taps=spec.taps, tap=spec.tap)


def _fit_factors(
    problem: Problem, spec: ImplantSpec, metric: Metric, options: Options
) -> tuple[tuple[Tensor, ...], Tensor] | None:
    """Return the implant's arrays, and the weights (like the problem's current ones) that they make.

    ``metric`` is that of the original's inputs, for where there are too few rows for one of its own.
    None if there are no rows, or numbers among them that are not finite.
    """
    rows, current = problem.rows, problem.current
    mean = rows.mean() if rows is not None else None
    if rows is None or mean is None or not bool(torch.isfinite(mean).all()):
        return None
    n_features = current.shape[1] - (problem.bias is not None)
    gram = rows.gram() if rows.n_rows() >= current.shape[1] else None
    solved = solve(rows, current, problem.bounds, options, gram=gram)
    weights = (current if solved is None else solved).double()  # [g, F, O]
    matrix, bias = weights[:, :n_features].mT, weights[:, n_features:]  # bias [g, 1, O], or nothing
    center = None if problem.bias is None else mean[:, :n_features]
    if gram is not None:
        moments = gram[:, :n_features, :n_features] / rows.n_rows()
        metric = _measure(rows, moments, None if problem.bias is None else mean, metric)
    # Each machine rounds in its own way, and what is behind needs the same factors everywhere.
    factors = rows.team.lead(lambda: _factorise(matrix, metric, spec))
    if center is not None:
        bias = bias + ((matrix - factors.dense) @ center[:, :, None]).mT
    arrays = tuple(array.to(current.dtype) for array in factors.arrays)
    bias = bias.to(current.dtype)
    if spec.kind == "pointwise":
        return arrays, torch.cat([factors.dense.mT.to(bias.dtype), bias], 1)
    first, second = arrays
    second, bias = _solve_second(problem, rows, first, second, bias, n_taps=spec.taps[1], options=options)
    return (first, second), torch.cat([_multiply(first, second, n_taps=spec.taps[1]).mT, bias], 1)


def _solve_second(
    problem: Problem,
    rows: Rows,
    first: Tensor,
    second: Tensor,
    bias: Tensor,
    *,
    n_taps: int,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Return a better second factor and bias given the first, if there are any."""
    n_features = problem.current.shape[1] - bias.shape[1]
    inner = rows.transform(partial(_expand, first, n_features=n_features, n_taps=n_taps))
    fitted = solve(inner, torch.cat([second.mT, bias], 1), problem.bounds, options)
    if fitted is None:
        return second, bias
    return fitted[:, : second.shape[2]].mT.contiguous(), fitted[:, second.shape[2] :]


def _measure(rows: Rows, moments: Tensor, mean: Tensor | None, known: Metric) -> Metric:
    """Return the metric of the inputs that the layer gets.

    ``moments`` [g, F, F], the second ones, are overwritten; ``mean`` [g, F or F + 1] is that of the rows, if
    the bias takes it up. Gradients, and all where inputs tell nothing, are those of the ``known`` metric.
    """
    n_features = moments.shape[1]
    diagonal = moments.diagonal(dim1=1, dim2=2)
    diagonal.add_(ROUNDING * diagonal.mean(1, keepdim=True))
    if mean is None:
        return _damped(moments, known) or known
    center = mean[:, :n_features]
    found = _damped(moments.baddbmm_(center[:, :, None], center[:, None], alpha=-1), known)
    if rows.team.agree(found is None):  # what varies is lost in the rounding of much larger means
        around = rows.gram(less=mean)[:, :n_features, :n_features]
        found = _damped(around / rows.n_rows(), known)
    return found or known


def _damped(inputs: Tensor, known: Metric) -> Metric | None:
    """Return the metric of a covariance of inputs [g, F, F], None if it is none."""
    if known.inputs.ndim == 2:
        inputs = inputs.diagonal(dim1=1, dim2=2)
    gradients = known.gradients.to(inputs.device)
    metric = replace(make_metric(inputs, gradients, damping=DAMPING), gradients=gradients)
    return metric if is_definite(metric.inputs) else None


def _expand(first: Tensor, x: Tensor, *, n_features: int, n_taps: int) -> Tensor:
    """Return what the first factor [g, r, C*T1] makes of rows x [g, n, F + more]: [g, n, r*T2 + more]."""
    by_tap = x[:, :, :n_features].unflatten(2, (-1, n_taps))  # [g, n, C*T1, T2]
    inner = torch.einsum("gnat,gra->gnrt", by_tap, first).flatten(2)
    return torch.cat([inner, x[:, :, n_features:]], 2)


def _multiply(first: Tensor, second: Tensor, *, n_taps: int) -> Tensor:
    """Return the matrix [g, O, F] that both factors make."""
    by_tap = second.double().unflatten(2, (-1, n_taps))  # [g, O, r, T2]
    return torch.einsum("gort,gra->goat", by_tap, first.double()).flatten(2).to(second.dtype)
