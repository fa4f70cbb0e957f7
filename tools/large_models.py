"""Peak memory on a model that is larger than 2 GB, against the size of its weights.

    python -m tools.large_models --gigabytes 2.5 inspect apply
    python -m tools.large_models --gigabytes 2.5 compress

Writes a synthetic model with external data (a residual network of wide convolutions, a stack of fully
connected layers behind it) to a temporary folder, and runs each command in a process of its own, which is
ended when it takes more than ``--most`` of memory. ``apply`` gets a plan that cuts each channel group to 70 %
and replaces all weights. Peaks are those of the whole process (VmHWM), Python and libraries included.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import onnx
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

import hap_onnx

N_CLASSES = 10
IMAGE = (64, 4, 4)


def write_large_model(path: Path, n_bytes: int, *, width: int = 1024) -> int:
    """Write a model with about ``n_bytes`` of weights beside it, layer by layer; return how many there are.

    ``width`` is that of the convolutions, a third of the whole; fully connected layers have four times that.
    """
    generator = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    tensors: list[TensorProto] = []
    data_path = path.with_suffix(".data")
    with data_path.open("wb") as stream:

        def weight(name: str, shape: tuple[int, ...], scale: float) -> str:
            stream.write(bytes(-stream.tell() % 4096))
            array = generator.standard_normal(shape, np.float32) * np.float32(scale)
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            facts = (("location", data_path.name), ("offset", stream.tell()), ("length", array.nbytes))
            for key, value in facts:
                tensor.external_data.add(key=key, value=str(value))
            stream.write(array.data)
            tensors.append(tensor)
            return name

        def add(op_type: str, inputs: list[str], output: str, **attributes: object) -> str:
            nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
            return output

        def conv(x: str, name: str, scale: float) -> str:
            w = weight(f"{name}.w", (width, width, 3, 3), scale * np.sqrt(2 / (9 * width)))
            return add("Conv", [x, w], name, pads=[1] * 4)

        w = weight("stem.w", (width, IMAGE[0], 1, 1), np.sqrt(2 / IMAGE[0]))
        x, index = add("Conv", ["x", w], "stem"), 0
        while stream.tell() < n_bytes / 3:
            inner = add("Relu", [conv(x, f"a{index}", 1.0)], f"relu_a{index}")
            x, index = add("Add", [x, conv(inner, f"b{index}", 0.3)], f"sum{index}"), index + 1
        x = add("Flatten", [add("GlobalAveragePool", [x], "pool")], "flat")
        n_in, n_out, index = width, 4 * width, 0
        while stream.tell() < n_bytes:
            scale, name = float(np.sqrt(2 / n_in)), f"m{index}"
            if index % 2:
                x = add("MatMul", [x, weight(f"{name}.w", (n_in, n_out), scale)], name)
            else:
                x = add("Gemm", [x, weight(f"{name}.w", (n_out, n_in), scale)], name, transB=1)
            x, n_in, index = add("Relu", [x], f"relu_{name}"), n_out, index + 1
        x = add("Gemm", [x, weight("head.w", (N_CLASSES, n_in), np.sqrt(1 / n_in))], "scores", transB=1)
        total = stream.tell()
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "large",
        [value("x", TensorProto.FLOAT, ["N", *IMAGE])],
        [value("scores", TensorProto.FLOAT, ["N", N_CLASSES])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return total


def write_plan(model: Path, plan: Path, *, keep: float = 0.7) -> None:
    """Write a plan that cuts each channel group, and replaces all weights that are left."""
    import onnx_graphsurgeon as gs

    from hap_onnx.jobs.carry_out import from_plan_weights
    from hap_onnx.model.model_io import load_model
    from hap_onnx.planning.choose import Choice
    from hap_onnx.planning.plan import CompressionPlan, GroupDecision, save_plan
    from hap_onnx.prepare import make_probe, prepare
    from hap_onnx.runtime.session import make_session

    source = load_model(model)
    probe = make_probe(make_session(source.model, providers="cpu", is_timed=False).inputs)
    prepared = prepare(source, probe)
    decisions = tuple(
        GroupDecision.from_keep(group.name, group.size, range(round(keep * group.size)))
        for group in prepared.coupling.groups
    )
    cut = from_plan_weights(prepared, Choice(decisions, ()), {}).graph
    weights = {
        name: tensor.values * np.float32(1.01)
        for name, tensor in cut.tensors().items()
        if isinstance(tensor, gs.Constant) and tensor.values.dtype == np.float32
    }
    words = {"input_shapes": {name: list(values.shape) for name, values in probe.items()}}
    save_plan(CompressionPlan(source.sha256, hap_onnx.__version__, words, decisions, weights=weights), plan)


def run_peak(command: list[str], most: int) -> tuple[int, int, float]:
    """Run a command; return its exit code, its peak of resident memory in bytes, and seconds."""
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for kind, value in _memory(process.pid):
                peak = max(peak, value) if kind == "VmHWM" else peak
            if peak > most:
                process.kill()
            time.sleep(0.05)
    return process.returncode, peak, time.monotonic() - start


def _memory(pid: int) -> Iterator[tuple[str, int]]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return
    for line in lines:
        kind, _, text = line.partition(":")
        if text.endswith("kB"):
            yield kind, int(text.split()[0]) << 10


@click.command(help=__doc__)
@click.argument("commands", nargs=-1, type=click.Choice(["inspect", "apply", "compress"]))
@click.option("--gigabytes", default=2.5, help="Weights of the model, in 10^9 bytes.")
@click.option("--most", default=9.0, help="Memory at which a process is ended, in 10^9 bytes.")
@click.option("--width", default=1024, help="Width of the convolutions.")
def main(commands: tuple[str, ...], gigabytes: float, most: float, width: int) -> None:
    console = Console(width=100)
    table = Table(title="peak memory")
    for column in ("command", "exit code", "weights GB", "peak GB", "ratio", "seconds"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        model, plan, output = (Path(folder) / name for name in ("large.onnx", "plan.json", "out.onnx"))
        n_bytes = write_large_model(model, int(gigabytes * 1e9), width=width)
        data = Path(folder) / "data.npz"
        np.savez(data, x=np.random.default_rng(1).standard_normal((40, *IMAGE)).astype(np.float32))
        rest = {
            "inspect": [str(model)],
            "apply": [str(model), str(plan), "-o", str(output)],
            "compress": [
                str(model), "--data", str(data), "-o", str(output), "--keep-params", "0.5", "--method",
                "prune", "--sensitivity", "magnitude", "--recover", "none", "--threads", "1",
                "--allow-slower",
            ],
        }  # fmt: skip
        for command in commands or ("inspect", "apply"):
            if command == "apply":  # in a process of its own: ours must stay small
                child = os.fork()
                if child == 0:
                    write_plan(model, plan)
                    os._exit(0)
                os.waitpid(child, 0)
            arguments = [sys.executable, "-m", "hap_onnx", command, *rest[command]]
            code, peak, seconds = run_peak(arguments, int(most * 1e9))
            numbers = (f"{n_bytes / 1e9:.2f}", f"{peak / 1e9:.2f}", f"{peak / n_bytes:.2f}", f"{seconds:.0f}")
            table.add_row(command, str(code), *numbers)
    console.print(table)


if __name__ == "__main__":
    main()
