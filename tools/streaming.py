"""Peak memory of a job against the number of images, in each form that data may have.

    python -m tools.streaming --samples 500 --samples 10000

A small network for 64x64 images is compressed, each time in a new process of one thread, with its data as a
folder of images, as ``.npz`` (plain and compressed) and as an iterable of batches that are made when they are
asked for. Prints the peak of the resident memory, and how much more the largest number takes than the least.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from PIL import Image
from rich.console import Console
from rich.table import Table

import hap_onnx
from tools.faults import small_network
from tools.reproduce import Used, run_process

SIZE = 64
FORMS = ("images", "npz", "compressed npz", "iterable")


def make_batches(n_samples: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield noise of a brightness of its own, sixty-four images at a time: x [N, 3, 64, 64], 0 to 1."""
    for start in range(0, n_samples, 64):
        generator = np.random.default_rng(start)
        n = min(64, n_samples - start)
        noise = 0.2 * generator.random((n, 3, SIZE, SIZE)) + 0.8 * generator.random((n, 3, 1, 1))
        yield {"x": noise.astype(np.float32)}


def write_model(path: Path) -> None:
    """Write the network, for images of our size."""
    model = small_network()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = SIZE
    onnx.save(model, path)


def data_path(form: str, n_samples: int, folder: Path) -> Path:
    """Where the samples are."""
    name = f"{form.replace(' ', '-')}-{n_samples}"
    return folder / (name if form == "images" else f"{name}.npz")


def write_data(form: str, n_samples: int, folder: Path) -> None:
    """Write the samples in one of the forms."""
    path = data_path(form, n_samples, folder)
    if form == "images":
        path.mkdir()
        for number, batch in enumerate(make_batches(n_samples)):
            for index, image in enumerate((255 * batch["x"]).astype(np.uint8)):
                Image.fromarray(image.transpose(1, 2, 0)).save(path / f"{number:04}-{index:02}.png")
        return
    x = np.concatenate([batch["x"] for batch in make_batches(n_samples)])
    (np.savez_compressed if form == "compressed npz" else np.savez)(path, x=x)


def be_child(words: dict[str, Any]) -> None:
    """Write data or compress; each in a process of its own, for a process inherits the peak of its parent."""
    if "folder" in words:
        write_data(words["form"], words["n_samples"], Path(words["folder"]))
        return
    n_samples, data = words.pop("n_samples"), words.pop("data")
    hap_onnx.compress(words.pop("model"), data or make_batches(n_samples), **words)


def _run(words: dict[str, Any]) -> Used:
    used = run_process([sys.executable, "-m", "tools.streaming", "--child", json.dumps(words)])
    if used.code:
        raise click.ClickException(f"exit code {used.code} of {words}")
    return used


@click.command(help=__doc__)
@click.option("--samples", multiple=True, type=int, default=(500, 10_000), show_default=True)
@click.option("--form", "forms", multiple=True, type=click.Choice(FORMS), default=FORMS)
@click.option("--child", hidden=True)
def main(samples: tuple[int, ...], forms: tuple[str, ...], child: str | None) -> None:
    if child is not None:
        be_child(json.loads(child))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    table = Table(title="peak memory, MB")
    for column in ("form of the data", *(f"{n} samples" for n in samples), "more"):
        table.add_column(column, justify="left" if column == "form of the data" else "right")
    with tempfile.TemporaryDirectory(prefix="streaming-") as temporary:
        folder = Path(temporary)
        write_model(folder / "net.onnx")
        for form in forms:
            peaks = []
            for n_samples in samples:
                data = None
                if form != "iterable":
                    _run({"form": form, "n_samples": n_samples, "folder": str(folder)})
                    data = str(data_path(form, n_samples, folder))
                words = {
                    "model": str(folder / "net.onnx"), "data": data, "n_samples": n_samples,
                    "output": str(folder / "out.onnx"), "keep_macs": 0.5, "allow_slower": True,
                    **({"preprocess": "unit"} if form == "images" else {}),
                }  # fmt: skip
                used = _run(words)
                peaks.append(used.peak_mb)
                print(f"{form}, {n_samples}: {used.peak_mb:.0f} MB, {used.cpu_s:.0f} s", flush=True)
            more = peaks[-1] / peaks[0] - 1
            table.add_row(form, *(f"{peak:.0f}" for peak in peaks), f"{100 * more:+.1f} %")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
