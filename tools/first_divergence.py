"""Name the first node whose output differs between the twin and onnxruntime.

    python -m tools.first_divergence model.onnx [--inputs inputs.npz] [--seed 0] [--dim N=2]

Both run the model with every intermediate tensor exposed; exit code 1 if any node diverges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from hap_onnx.model.model_io import load_model, normalise
from hap_onnx.model.weights import join_model
from hap_onnx.twin import Step, Twin, build_twin


@dataclass(frozen=True)
class NodeError:
    """How far one tensor of the twin is from onnxruntime's; ``error`` is relative to its largest value."""

    node: str
    op_type: str
    tensor: str
    error: float
    problem: str = ""

    def diverges(self, tolerance: float) -> bool:
        """Say whether the tensors differ by more than rounding."""
        return bool(self.problem) or not self.error <= tolerance


def expose_intermediates(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the model in which every tensor computed by a node is an output."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    present = {output.name for output in exposed.graph.output}
    for node in exposed.graph.node:
        for name in node.output:
            if name and name not in present:
                exposed.graph.output.append(onnx.ValueInfoProto(name=name))
                present.add(name)
    return exposed


def run_onnxruntime(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return every output of the model, computed without graph optimisations."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def compare_tensors(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, str]:
    """Return (largest difference relative to the largest value, what else is wrong)."""
    if ours.shape != theirs.shape:
        return float("inf"), f"shape {ours.shape} instead of {theirs.shape}"
    if theirs.dtype.kind in "biu":
        different = int((ours != theirs).sum())
        return float(different), "" if not different else f"{different} integers differ"
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf"), "infinities or NaN differ"
    if not finite.any():
        return 0.0, ""
    largest = float(np.abs(b[finite]).max())
    return float(np.abs(a[finite] - b[finite]).max()) / max(largest, 1e-6), ""


def compare_nodes(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray], *, twin: Twin) -> list[NodeError]:
    """Run both engines and return one entry per tensor that both compute, in execution order."""
    theirs = run_onnxruntime(expose_intermediates(model), inputs)
    errors: list[NodeError] = []

    def note(step: Step, index: int, tensor: Tensor) -> Tensor:
        name = step.outputs[index]
        if isinstance(theirs.get(name), np.ndarray):
            error, problem = compare_tensors(tensor.detach().cpu().numpy(), theirs[name])
            errors.append(NodeError(step.name, step.op_type, name, error, problem))
        return tensor

    with torch.no_grad():
        twin({name: torch.from_numpy(np.array(array)) for name, array in inputs.items()}, on_write=note)
    return errors


def make_inputs(model: onnx.ModelProto, *, seed: int, dims: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Return random inputs; symbolic dimensions that ``dims`` does not give are 2."""
    rng = np.random.default_rng(seed)
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = {}
    for entry in model.graph.input:
        if entry.name in initializers:
            continue
        kind = entry.type.tensor_type
        shape = [dim.dim_value or dims.get(dim.dim_param, 2) for dim in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        floating = dtype.kind == "f"
        inputs[entry.name] = (rng.standard_normal(shape) if floating else rng.integers(0, 2, shape)).astype(
            dtype
        )
    return inputs


def _parse_dims(entries: Sequence[str]) -> dict[str, int]:
    try:
        return {name: int(size) for name, size in (entry.split("=") for entry in entries)}
    except ValueError as error:
        raise click.BadParameter(f"expected NAME=SIZE, got {list(entries)}") from error


@click.command()
@click.argument("model_path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--inputs",
    "inputs_path",
    type=click.Path(exists=True, path_type=Path),
    help="An .npz, one array per input.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of random inputs.")
@click.option(
    "--dim", "dims", multiple=True, metavar="NAME=SIZE", help="Size of a symbolic dimension (else 2)."
)
@click.option("--tolerance", default=1e-4, show_default=True, help="Largest relative difference.")
@click.option("--all", "show_all", is_flag=True, help="List every node, not only those that diverge.")
def main(
    model_path: Path,
    inputs_path: Path | None,
    seed: int,
    dims: tuple[str, ...],
    tolerance: float,
    show_all: bool,
) -> None:
    """Compare the twin of MODEL_PATH with onnxruntime, node by node."""
    source = load_model(model_path)
    twin, model = build_twin(normalise(source)), join_model(source.model)
    if inputs_path is None:
        inputs = make_inputs(model, seed=seed, dims=_parse_dims(dims))
    else:
        with np.load(inputs_path) as stored:
            inputs = {name: stored[name] for name in twin.input_names}
    errors = compare_nodes(model, inputs, twin=twin)
    for entry in errors:
        if show_all or entry.diverges(tolerance):
            click.echo(
                f"{entry.error:10.3e}  {entry.op_type:24} {entry.node} -> {entry.tensor} {entry.problem}"
            )
    if twin.opaque_nodes:
        click.echo(f"in onnxruntime: {', '.join(twin.opaque_nodes)}")
    first = next((entry for entry in errors if entry.diverges(tolerance)), None)
    if first is None:
        click.echo(f"all {len(errors)} tensors agree")
        return
    click.echo(f"first divergence: node {first.node!r} ({first.op_type}), tensor {first.tensor!r}")
    raise SystemExit(1)


if __name__ == "__main__":
    main()
