"""Count how many of onnx's own node tests the twin computes, and by which means.

    python -m tools.node_tests                      # the cases that the installed onnx generates
    python -m tools.node_tests --data .../data/node # recorded ones, as older onnx packages carry them

A case counts as *torch* if every node has a torch function, as *body* if some run by the function body of
their schema, as *opaque* if some run in onnxruntime, and as *refused* if the model is refused with a reason.
Where an output is not the recorded one, the case is *disputed* if onnxruntime computes what the twin does
(random numbers do, from the same seed), and *wrong* if it does not. Exit code 1 if any is wrong.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto
from torch import Tensor

from hap_onnx.errors import ModelError
from hap_onnx.model.model_io import load_model, normalise
from hap_onnx.twin import Twin, build_twin
from tools.first_divergence import run_onnxruntime

NEWEST_OPSET = 26  # of onnxruntime
_NEWEST_IR_VERSION = 10

KINDS = ("torch", "body", "opaque", "refused", "disputed", "wrong")


@dataclass(frozen=True)
class NodeCase:
    """A model with recorded inputs and outputs: one list of each per data set."""

    name: str
    model: ModelProto
    data_sets: Sequence[tuple[Sequence[Any], Sequence[Any]]]
    rtol: float
    atol: float

    @property
    def op_type(self) -> str:
        """The operator under test, as far as the model tells."""
        types = [node.op_type for node in self.model.graph.node]
        return types[0] if len(types) == 1 else self.name

    @property
    def is_float(self) -> bool:
        """Say whether all inputs and outputs are float32, int32, int64 or bool tensors, one float32."""
        types = []
        for value in [*self.model.graph.input, *self.model.graph.output]:
            if value.type.WhichOneof("value") != "tensor_type":
                return False
            types.append(value.type.tensor_type.elem_type)
        known = (TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL)
        return TensorProto.FLOAT in types and all(code in known for code in types)


@dataclass(frozen=True)
class Outcome:
    """How a case went: one of ``KINDS``, and why."""

    kind: str
    reason: str = ""


def generated_cases() -> Iterator[NodeCase]:
    """Return the cases that the installed onnx generates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference data is computed with overflows and the like
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    for case in cases:
        yield NodeCase(case.name, case.model, case.data_sets, case.rtol, case.atol)


def recorded_cases(folder: Path) -> Iterator[NodeCase]:
    """Return the cases recorded in a folder, one subfolder each."""
    for path in sorted(folder.glob("*/model.onnx")):
        model = onnx.load(path)
        data_sets = []
        for data in sorted(path.parent.glob("test_data_set_*")):
            inputs = [_read(data / f"input_{i}.pb", value) for i, value in enumerate(model.graph.input)]
            outputs = [_read(data / f"output_{i}.pb", value) for i, value in enumerate(model.graph.output)]
            data_sets.append((inputs, outputs))
        yield NodeCase(path.parent.name, model, data_sets, 1e-3, 1e-7)


def _read(path: Path, value: onnx.ValueInfoProto) -> Any:
    content = path.read_bytes()
    kind = value.type.WhichOneof("value")
    if kind == "sequence_type":
        return onnx.SequenceProto.FromString(content)
    if kind == "optional_type":
        return onnx.OptionalProto.FromString(content)
    return TensorProto.FromString(content)


def lower_opset(model: ModelProto) -> ModelProto:
    """Return the model at an opset that onnxruntime knows; newer ones mostly only allow more types."""
    lowered = ModelProto()
    lowered.CopyFrom(model)
    lowered.ir_version = min(model.ir_version, _NEWEST_IR_VERSION)
    for entry in lowered.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = min(entry.version, NEWEST_OPSET)
    return lowered


def as_tensor(value: Any) -> Tensor:
    """Return a recorded value; raises TypeError for one that torch cannot hold."""
    if isinstance(value, TensorProto):
        value = onnx.numpy_helper.to_array(value)
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(f"torch holds no {type(value).__name__}")
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    if array.dtype.kind not in "biuf" or array.dtype.isbuiltin != 1:
        raise TypeError(f"torch holds no {array.dtype}")
    return torch.from_numpy(np.array(array))


def run_case(case: NodeCase) -> Outcome:
    """Run the twin of a case on its recorded inputs and compare."""
    model = lower_opset(case.model)
    names = [value.name for value in model.graph.input]
    try:
        twin = build_twin(normalise(load_model(model)))
        for inputs, outputs in case.data_sets:
            feeds = {name: as_tensor(value) for name, value in zip(names, inputs, strict=True)}
            with torch.no_grad():
                results = list(twin(feeds).values())
            problem = _compare(results, [as_tensor(value) for value in outputs], case)
            if problem:
                theirs = run_onnxruntime(model, {name: tensor.numpy() for name, tensor in feeds.items()})
                agrees = not _compare(results, [as_tensor(array) for array in theirs.values()], case)
                return Outcome("disputed" if agrees else "wrong", problem)
    except (ModelError, TypeError) as error:
        return Outcome("refused", str(error))
    return Outcome(_kind(twin))


def _kind(twin: Twin) -> str:
    if twin.opaque_nodes:
        return "opaque"
    return "body" if twin.expanded_nodes else "torch"


def _compare(results: Sequence[Tensor], expected: Sequence[Tensor], case: NodeCase) -> str:
    """Say how results differ from what is expected; "" if they do not."""
    rtol, atol = tolerances(case)
    for index, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        if result.shape != wanted.shape:
            return f"output {index} has shape {tuple(result.shape)} instead of {tuple(wanted.shape)}"
        if result.is_floating_point() != wanted.is_floating_point() or (
            not wanted.is_floating_point() and result.dtype != wanted.dtype
        ):
            return f"output {index} is {result.dtype} instead of {wanted.dtype}"
        try:
            torch.testing.assert_close(result.double(), wanted.double(), rtol=rtol, atol=atol, equal_nan=True)
        except AssertionError as error:
            return f"output {index}: {' '.join(str(error).split())}"
    return ""


def tolerances(case: NodeCase) -> tuple[float, float]:
    """Return the relative and absolute tolerance of a case; wide where it computes in 16 bits."""
    values = [*case.model.graph.input, *case.model.graph.output]
    low = {value.type.tensor_type.elem_type for value in values} & {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    return (1e-2, 1e-2) if low else (case.rtol, 1e-5)


@click.command()
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of recorded cases.",
)
@click.option("--all", "take_all", is_flag=True, help="Also cases with other types.")
@click.option("--list", "listed", multiple=True, type=click.Choice(KINDS), help="List the cases of a kind.")
def main(data: Path | None, take_all: bool, listed: tuple[str, ...]) -> None:
    """Count how many of onnx's node tests the twin computes."""
    cases = recorded_cases(data) if data is not None else generated_cases()
    counts: Counter[str] = Counter()
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for case in cases:
        if not (take_all or case.is_float):
            continue
        outcome = run_case(case)
        counts[outcome.kind] += 1
        by_type[outcome.kind][case.op_type] += 1
        if outcome.kind in listed or outcome.kind == "wrong":
            click.echo(f"{outcome.kind:8} {case.name}: {outcome.reason[:200]}")
    for kind in KINDS:
        if kind not in ("torch", "wrong") and by_type[kind]:
            click.echo(f"{kind}: " + ", ".join(f"{name} {n}" for name, n in by_type[kind].most_common()))
    total = sum(counts.values())
    click.echo(
        f"{total} cases: "
        + ", ".join(f"{kind} {counts[kind]} ({counts[kind] / total:.1%})" for kind in KINDS)
    )
    raise SystemExit(1 if counts["wrong"] else 0)


if __name__ == "__main__":
    main()
