"""How the coupling grows with the graph: seconds and peak memory on stacks of transformer blocks.

    python -m tools.coupling_cost --blocks 8 --blocks 50

Each stack is exported with random weights and coupled in a process of its own, on one thread.
"""

from __future__ import annotations

import io
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor

import click
import onnx
import torch
from torch import Tensor, nn

from hap_onnx.coupling.channels import find_groups
from hap_onnx.model.model_io import load_model, normalise
from hap_onnx.twin import build_twin, probe_shapes
from tools.train_cifar import export

WIDTH, N_HEADS, LENGTH = 48, 4, 6


class Block(nn.Module):
    """Attention and an MLP, each behind a normalisation and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            part(h).reshape(-1, LENGTH, N_HEADS, WIDTH // N_HEADS).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )  # [N, heads, length, width of a head]
        weights = (q @ k.transpose(2, 3) / (WIDTH // N_HEADS) ** 0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(-1, LENGTH, WIDTH))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


def measure(n_blocks: int) -> tuple[int, int, float, float]:
    """Couple one stack; returns (nodes, groups, seconds, peak MB)."""
    torch.set_num_threads(1)
    buffer = io.BytesIO()
    x = torch.randn(2, LENGTH, WIDTH)
    export(nn.Sequential(*(Block() for _ in range(n_blocks))), x, buffer)
    graph = normalise(load_model(onnx.load_from_string(buffer.getvalue())))
    shapes = probe_shapes(build_twin(graph), {"input": x})
    start = time.perf_counter()
    coupling = find_groups(graph, shapes)
    seconds = time.perf_counter() - start
    return (
        len(graph.nodes), len(coupling.groups), seconds,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )  # fmt: skip


@click.command(help=__doc__)
@click.option("--blocks", multiple=True, type=int, default=(8, 50), show_default=True)
def main(blocks: tuple[int, ...]) -> None:
    context = multiprocessing.get_context("spawn")
    for n_blocks in blocks:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            n_nodes, n_groups, seconds, peak = pool.submit(measure, n_blocks).result()
        click.echo(f"{n_nodes} nodes, {n_groups} groups: {seconds:.2f} s, peak {peak:.0f} MB")


if __name__ == "__main__":
    main()
