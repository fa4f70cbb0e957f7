"""What a job costs, stage by stage, from the shapes of a model's layers and the rate of this machine.

    python -m tools.cost_model resnet50 vit_l transformer_1b
    python -m tools.cost_model model.onnx --epochs 10 --images 50000

Counts multiply-accumulates and bytes: passes of the model, sums of products (A of F inputs per row, G of O
outputs), factorisations and solutions in float64. The rates are those of one core of this machine, measured
as processor time of products of matrices and, for passes, corrected by ``--pass-share``: how much of the rate
of a plain product the layers of a network reach (0.73 in ResNet50). Nothing of the model is run. Divide by
cores, or by how much faster a GPU is; ``docs/scaling.md`` compares with a job that was run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from hap_onnx.jobs.rounds import N_STATISTICS
from hap_onnx.planning.curves import MEASURED_WIDTHS
from hap_onnx.planning.decide import MAX_MEASURED_MACS, MIN_MEASURED, N_MEASURED
from hap_onnx.refit.rows import MAX_ROWS, ROWS_PER_FEATURE
from hap_onnx.sensitivity.curvature import MAX_FEATURES, MIN_ROWS

POSITIONS_PER_SAMPLE = 64  # of the refit
GRADIENT = 1.0
"""Multiply-accumulates of gradients of activations, in those of a forward pass."""
RANK, SOLVE = 6.0, 1.0
"""Multiply-accumulates in F^3: ranking, measured widths and implants of a layer; its refit."""
RESIDUALS = 10
"""Products of all rows with the weights in one refit: four rounds of two, and the error before and after."""


@dataclass(frozen=True)
class Layer:
    """``count`` contractions of ``n_in`` inputs (taps included) to ``n_out`` outputs, per position."""

    n_in: int
    n_out: int
    positions: int
    count: int = 1

    @property
    def params(self) -> int:
        return self.n_in * self.n_out * self.count

    @property
    def macs(self) -> int:
        return self.params * self.positions


def resnet50() -> Iterator[Layer]:
    """At 224x224."""
    yield Layer(147, 64, 112**2)
    before = 64
    for width, n_blocks, size in ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)):
        for block in range(n_blocks):
            n_in = before if block == 0 else 4 * width
            yield Layer(n_in, width, (size * (2 if block == 0 and width > 64 else 1)) ** 2)
            yield Layer(9 * width, width, size**2)
            yield Layer(width, 4 * width, size**2)
            if block == 0:
                yield Layer(n_in, 4 * width, size**2)
        before = 4 * width
    yield Layer(2048, 1000, 1)


def transformer(width: int, depth: int, tokens: int, *, n_outputs: int, n_inputs: int = 0) -> Iterator[Layer]:
    """Blocks of attention and an MLP of four times the width; products of activations count as a layer."""
    if n_inputs:
        yield Layer(n_inputs, width, tokens)
    yield Layer(width, 3 * width, tokens, depth)
    yield Layer(width, width, tokens, depth)
    yield Layer(width, 4 * width, tokens, depth)
    yield Layer(4 * width, width, tokens, depth)
    yield Layer(width, n_outputs, tokens if n_outputs > 1000 else 1)


NETWORKS = {
    "resnet50": lambda: resnet50(),
    "vit_l": lambda: transformer(1024, 24, 197, n_outputs=1000, n_inputs=768),
    "transformer_1b": lambda: transformer(2048, 18, 512, n_outputs=50_000),
}


def read_layers(path: Path) -> Iterator[Layer]:
    """The contractions of a model, at the sizes that it declares (others count as one)."""
    from hap_onnx.model.model_io import load_model
    from hap_onnx.ops.linear import linear_form
    from hap_onnx.prepare import make_probe, prepare
    from hap_onnx.runtime.session import make_session

    source = load_model(path)
    prepared = prepare(source, make_probe(make_session(source.model, providers="cpu").inputs))
    n = next(iter(prepared.probe.values())).shape[0]
    for node in prepared.graph.nodes:
        form = linear_form(node)
        if form is not None:
            groups, n_out, n_in = form.to_matrix(torch.empty(node.inputs[form.weight_index].shape)).shape
            shape = prepared.shapes[node.outputs[0].name]
            yield Layer(n_in, n_out, prod(shape) // (n * groups * n_out), groups)


# ---------------------------------------------------------------- the model of costs


@dataclass(frozen=True)
class Rates:
    """Multiply-accumulates per second of one core: of passes, of products and of factorisations."""

    passes: float
    products: float
    doubles: float


def measure_rates(pass_share: float) -> Rates:
    """Time products of matrices, in seconds of the processor: others may use it, too."""
    torch.set_num_threads(1)
    found = []
    for dtype in (torch.float32, torch.float64):
        a = torch.rand(1024, 1024, dtype=dtype)
        a @ a
        seconds = []
        for _ in range(5):
            start = time.process_time()
            a @ a
            seconds.append(time.process_time() - start)
        found.append(1024**3 / float(np.median(seconds)))
    return Rates(pass_share * found[0], found[0], found[1])


def cost(
    layers: Sequence[Layer], rates: Rates, *, images: int, epochs: int, keep: float, batch_size: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of one core by stage, and bytes of memory by what they hold."""
    macs, params = sum(one.macs for one in layers), sum(one.params for one in layers)
    n_fit = min(N_STATISTICS, round(0.6 * images))
    small = [one for one in layers if one.n_in <= MAX_FEATURES]
    rows = {one: max(MIN_ROWS, 4 * one.n_in) for one in small}
    grams = sum(one.count * rows[one] * one.n_in**2 / 2 for one in small)
    grams += sum(one.count * n_fit * one.positions * one.n_out**2 / 2 for one in layers)
    n_layers = sum(one.count for one in layers)
    cubes = sum(one.count * one.n_in**3 for one in small)
    n_passes = max(1.0, n_layers * (len(MEASURED_WIDTHS) + 2) / 2)
    n_measured = min(max(MAX_MEASURED_MACS / (macs * n_passes), MIN_MEASURED), N_MEASURED)
    fit_rows = {
        one: max(min(POSITIONS_PER_SAMPLE, one.positions) * n_fit, ROWS_PER_FEATURE * one.n_in)
        for one in small
    }
    fit_grams = sum(
        one.count
        * min(fit_rows[one], max(MAX_ROWS, ROWS_PER_FEATURE * one.n_in))
        * (one.n_in**2 / 2 + RESIDUALS * one.n_in * one.n_out)
        for one in small
    )
    seconds = {
        "statistics": n_fit * macs * (1 + GRADIENT) / rates.passes + grams / rates.products,
        "ranking": RANK * cubes / rates.doubles,
        "measured losses": n_measured * n_passes * macs / rates.passes,
        "refit, a candidate": n_fit * macs * (1 + keep) / rates.passes
        + (fit_grams / rates.products + SOLVE * cubes / rates.doubles) * keep,
        "validation": 0.2 * images * macs * (1 + keep) / rates.passes,
        f"training, {epochs} epochs": epochs * 0.6 * images * macs * (1 + 3 * keep) / rates.passes,
    }
    activations = sum(one.count * one.positions * one.n_out for one in layers)
    held = {
        "weights (file, twin, onnxruntime)": 3 * 4 * params,
        "curvature": 8 * sum(one.count * ((one.n_in + 1) ** 2 if one in rows else one.n_in) for one in layers)
        + 8 * sum(one.count * one.n_out**2 for one in layers),
        "activations of a batch": 2 * 4 * batch_size * activations,
        "training: student, average, Adam, gradient": 4 * 5 * params * keep,
    }
    return seconds, {name: float(n_bytes) for name, n_bytes in held.items()}


@click.command(help=__doc__)
@click.argument("models", nargs=-1, required=True)
@click.option("--images", default=2000, show_default=True, help="Samples in all, 60 % of them to calibrate.")
@click.option("--epochs", default=10, show_default=True)
@click.option("--keep", default=0.5, show_default=True, help="Share that is kept.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--pass-share", default=0.7, show_default=True)
def main(
    models: tuple[str, ...], images: int, epochs: int, keep: float, batch_size: int, pass_share: float
) -> None:
    rates = measure_rates(pass_share)
    console = Console(highlight=False)
    console.print(
        f"one core: {rates.products / 1e9:.1f} billion multiply-accumulates per second in float32, "
        f"{rates.doubles / 1e9:.1f} in float64"
    )
    for name in models:
        layers = list(NETWORKS[name]() if name in NETWORKS else read_layers(Path(name)))
        options = {"images": images, "epochs": epochs, "keep": keep, "batch_size": batch_size}
        seconds, held = cost(layers, rates, **options)  # type: ignore[arg-type]
        macs, params = sum(one.macs for one in layers), sum(one.params for one in layers)
        title = f"{name}: {params / 1e6:.0f} M parameters, {macs / 1e9:.1f} billion multiply-accumulates"
        table = Table(title=title)
        table.add_column("stage or content")
        table.add_column("core minutes", justify="right")
        table.add_column("GB", justify="right")
        for stage, spent in seconds.items():
            table.add_row(stage, f"{spent / 60:.1f}", "")
        for content, n_bytes in held.items():
            table.add_row(content, "", f"{n_bytes / 1e9:.2f}")
        console.print(table)


if __name__ == "__main__":
    main()
