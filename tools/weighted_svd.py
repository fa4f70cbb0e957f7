"""Compare implants by weighted SVD with those by plain SVD, of equal rank, in every layer of a model.

    python tools/weighted_svd.py MODEL.onnx --data calib.npz --kind lowrank --share 0.5 --share 0.25

One layer at a time gets factors with a share of its multiply-accumulates: once the best under the curvature
of the calibration part, once the best for the weights themselves (a truncated SVD). The bias takes up the
change of the mean output in both, so that only the factors differ. Predicted is the loss under the curvature;
measured is the distance of the model's outputs to the original's (half the mean square, relative to their
variance) on held-out samples that neither has seen: those of --test, or the parts of --data that are not for
calibration. Ratios are weighted over plain, measured: below 1, weighted SVD is better. Prints Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import click
import numpy as np
import onnx_graphsurgeon as gs
import torch

from hap_onnx.data.calibration import Subset, open_dataset, split_dataset
from hap_onnx.implants.factors import factorise, max_rank, plain_metric, predict_loss
from hap_onnx.implants.loss import (
    ImplantLosses,
    cut_layer,
    find_implant_layers,
    rank_coefficients,
    weight_overrides,
)
from hap_onnx.model.measure import Shapes, node_macs
from hap_onnx.model.model_io import load_model
from hap_onnx.ops.implant import ImplantForm
from hap_onnx.planning.curves import Fork, run_forks
from hap_onnx.prepare import PreparedModel, prepare
from hap_onnx.runtime.session import make_session, run_outputs
from hap_onnx.sensitivity.curvature import collect_curvature, output_scales

BATCH_SIZE = 32


@dataclass(frozen=True)
class Comparison:
    """One layer at one rank; pairs are (weighted, plain)."""

    layer: str
    shape: tuple[int, ...]
    rank: int
    predicted: tuple[float, float]
    measured: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Measured loss of weighted over that of plain; 1 where neither loses anything."""
        weighted, plain = self.measured
        return weighted / plain if plain else 1.0 if not weighted else float("inf")


def find_layers(
    prepared: PreparedModel, calibrate: Subset, *, scales: dict[str, float], seed: int
) -> list[ImplantLosses]:
    """Return the layers that implants may replace with their curvature, in the order of the graph."""
    layers = find_implant_layers(prepared)
    curvature = collect_curvature(
        prepared.graph, prepared.twin, prepared.coupling, calibrate, scales=scales, batch_size=BATCH_SIZE,
        seed=seed, layers=[layer.node for layer in layers],
    )  # fmt: skip
    none = np.zeros(0)
    found = []
    for layer in layers:
        if layer.node in curvature:
            weight = layer.form.to_matrix(prepared.twin.constant(layer.weight).detach()).double()
            found.append(ImplantLosses(layer, curvature[layer.node], weight, none, none))
    return found


def rank_at(entry: ImplantLosses, form: ImplantForm, node: gs.Node, shapes: Shapes, share: float) -> int:
    """Return the rank >= 1 whose factors come closest to a share of a layer's multiply-accumulates."""
    n_groups, n_outputs, n_features = entry.weight.shape
    n_taps = prod(form.taps)
    table = rank_coefficients(form, 1, node, shapes, n_groups=n_groups, n_taps=n_taps)
    n_in, n_out = n_features // n_taps, n_groups * n_outputs
    per_rank = int(np.array([n_in * n_out, n_in, n_out, 1]) @ table[:, 1])
    return max(1, round(share * node_macs(node, shapes) / per_rank))


def compare_layers(
    prepared: PreparedModel,
    layers: Sequence[ImplantLosses],
    held_out: Subset,
    *,
    kind: str,
    share: float,
    scales: dict[str, float],
) -> list[Comparison]:
    """Factorise each layer by both; those without the kind, or at full rank (both exact), are left out."""
    nodes = {node.name: node for node in prepared.graph.nodes}
    position = {step.name: index for index, step in enumerate(prepared.twin.steps)}
    forks, found = [], []
    for entry in layers:
        name, cut, shape = entry.layer.node, cut_layer(entry), tuple(entry.weight.shape)
        form = next((form for form in entry.layer.forms if form.kind == kind), None)
        if form is None or (kind == "spatial" and cut.metric.inputs.ndim == 2):
            continue
        rank = rank_at(entry, form, nodes[name], prepared.shapes, share)
        if rank >= max_rank(shape, kind=kind, taps=form.taps):
            continue
        predicted = []
        for index, metric in enumerate((cut.metric, plain_metric(shape[0], shape[2], shape[1]))):
            dense = factorise(cut.weight, metric, kind=kind, rank=rank, taps=form.taps).dense
            predicted.append(predict_loss(cut.weight - dense, cut.metric))
            overrides = weight_overrides(entry.layer, nodes[name], prepared.twin, cut, dense)
            forks.append(Fork((name, index), position[name], overrides))
        found.append((name, shape, rank, (predicted[0], predicted[1])))
    measured = run_forks(prepared.twin, held_out, forks, scales=scales, batch_size=BATCH_SIZE)
    return [Comparison(*row, (measured[row[0], 0].loss, measured[row[0], 1].loss)) for row in found]


def show(title: str, rows: Sequence[Comparison]) -> None:
    """Print one table."""
    click.echo(f"\n### {title}\n")
    click.echo("| layer | groups x outputs x features | rank | predicted weighted | predicted plain "
               "| measured weighted | measured plain | ratio |")  # fmt: skip
    click.echo("|---|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        numbers = " | ".join(f"{value:.3g}" for value in (*row.predicted, *row.measured))
        shape = " x ".join(map(str, row.shape))
        click.echo(f"| {row.layer} | {shape} | {row.rank} | {numbers} | {row.ratio:.3f} |")


def summarise(title: str, rows: Sequence[Comparison]) -> str:
    """Return one line on one table."""
    if not rows:
        return f"{title}: no layer to compare"
    worst = max(rows, key=lambda row: row.ratio)
    mean = np.exp(np.mean([np.log(max(row.ratio, 1e-12)) for row in rows]))
    wins = sum(row.ratio < 1 for row in rows)
    return (
        f"{title}: geometric mean ratio {mean:.3f}, weighted better in {wins} of {len(rows)} layers, "
        f"worst {worst.layer} at {worst.ratio:.3f}"
    )


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--test", type=click.Path(exists=True, path_type=Path))
@click.option("--kind", "kinds", multiple=True, default=("lowrank", "spatial"),
              type=click.Choice(["lowrank", "spatial"]))  # fmt: skip
@click.option("--share", "shares", multiple=True, default=(0.5, 0.25),
              type=click.FloatRange(0, 1, min_open=True))  # fmt: skip
@click.option("--held-out", "n_held_out", default=256, help="Most samples to measure on.")
@click.option("--seed", default=0)
@click.option("--threads", default=1)
def main(
    model: Path,
    data: Path,
    test: Path | None,
    kinds: tuple[str, ...],
    shares: tuple[float, ...],
    n_held_out: int,
    seed: int,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    source = load_model(model)
    session = make_session(source.model, providers="cpu", threads=threads)
    splits = split_dataset(open_dataset(data, session.inputs), seed=seed)
    held_out = Subset(
        splits.choose.dataset, np.concatenate([splits.choose.indices, splits.report.indices])
    ).take(n_held_out)
    if test is not None:
        dataset = open_dataset(test, session.inputs, max_samples=n_held_out, seed=seed)
        held_out = Subset(dataset, np.arange(dataset.n_samples))
    prepared = prepare(source, next(iter(splits.calibrate.batches(2))).inputs)
    scales = output_scales([run_outputs(session, splits.calibrate.take(256), batch_size=BATCH_SIZE)])
    layers = find_layers(prepared, splits.calibrate, scales=scales, seed=seed)
    click.echo(
        f"{model.name}: {len(layers)} layers, curvature of {splits.calibrate.n_samples} samples, measured on "
        f"{held_out.n_samples} others; ratio = weighted / plain, measured"
    )
    summaries = []
    for kind in kinds:
        for share in shares:
            title = f"{kind} at {share:g} of the layer's multiply-accumulates"
            rows = compare_layers(prepared, layers, held_out, kind=kind, share=share, scales=scales)
            show(title, rows)
            summaries.append(summarise(title, rows))
    click.echo("\n### Summary\n\n" + "\n".join(f"* {line}" for line in summaries))


if __name__ == "__main__":
    main()
