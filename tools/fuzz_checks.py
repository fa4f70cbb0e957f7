"""What must hold of every random graph: whatever surgery takes away, the rest computes what it did before.

``check_graph`` loads a model, couples its channels, cuts it in many ways and compares each result with the
masked original, in the torch twin and in onnxruntime.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray

from hap_onnx.errors import HapOnnxError, SurgeryError
from hap_onnx.model.model_io import to_proto
from hap_onnx.planning.cost_graph import cost_model
from hap_onnx.prepare import prepare
from hap_onnx.runtime.session import ORT_ERRORS
from hap_onnx.surgery import masked_reads, remove_channels
from hap_onnx.twin import Step, build_twin, in_double
from tools.first_divergence import compare_tensors, run_onnxruntime
from tools.surgery_oracle import TOLERANCE, Case

Keep = NDArray[np.bool_]
Outputs = Mapping[str, np.ndarray]

DOUBLE_TOLERANCE = 1e-9
"""Where floats cannot tell rounding from an error, double precision can."""
ROUNDING = 50.0
"""How much more than the twin's own distance from double precision onnxruntime may be off."""


class Failed(Exception):
    """A graph came out wrong; ``kind`` is one word for the count."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


def check_graph(model: onnx.ModelProto, *, seed: int, counts: Counter[str] | None = None) -> None:
    """Raise ``Failed`` if a cut of the model is inexact, invalid or ends in an exception.

    ``seed`` decides what is cut; ``counts`` grows by what was found and done.
    """
    try:
        _check(model, np.random.default_rng(seed), Counter() if counts is None else counts)
    except Failed:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
        raise Failed("exception", f"{type(error).__name__} at {place}: {error}") from error


def _check(model: onnx.ModelProto, rng: np.random.Generator, counts: Counter[str]) -> None:
    case = Case(model)
    original = case.run()
    try:
        reference = run_onnxruntime(model, case.inputs)
    except ORT_ERRORS:  # of valid sizes that it cannot follow, such as some computed ones of Resize
        counts["graphs that onnxruntime refuses"] += 1
        return
    _compare(reference, original, "twin", _Doubles(case))
    coupling = case.coupling
    counts["groups"] += len(coupling.groups)
    counts["graphs without groups"] += not coupling.groups
    everything = np.ones(coupling.n_elements, bool)
    if to_proto(case.cut(everything), case.source) != to_proto(case.graph, case.source):
        raise Failed("changed", "a cut that removes nothing changes the graph")
    refused = 0
    for what, keep, may_refuse in _decisions(case, rng):
        try:
            graph = case.cut(keep)
        except SurgeryError as error:
            counts["whole groups refused" if may_refuse else "cuts refused"] += 1
            refused += not may_refuse
            if not may_refuse:
                counts[f"refused: {str(error)[:60]}"] += 1
            continue
        counts["cuts"] += 1
        _check_cut(case, graph, keep, what)
    if refused or rng.random() < 0.1:
        _check_prepared(case, rng)
        counts["prepared"] += 1


def _decisions(case: Case, rng: np.random.Generator) -> Iterator[tuple[str, Keep, bool]]:
    """Yield (name, keep, whether surgery may refuse it)."""
    groups = case.coupling.groups
    n = case.coupling.n_elements
    if not groups:
        return

    def drop(keep: Keep, elements: NDArray[np.int64]) -> None:
        if len(elements) > 1:
            keep[rng.choice(elements, rng.integers(1, len(elements)), replace=False)] = False

    for group in groups:
        keep = np.ones(n, bool)
        drop(keep, group.elements)
        if len(groups) > 1 and not keep.all():
            yield f"part of {group.name}", keep, False
    keep = np.ones(n, bool)
    for group in groups:
        drop(keep, group.elements)
    yield "part of all", keep, False
    one = np.zeros(n, bool)
    one[[rng.choice(group.elements) for group in groups]] = True
    yield "all but one of each", one, False
    removable = sorted(cost_model(case.graph, case.coupling, case.shapes).removable)
    if removable:
        gone = keep.copy()
        for index in removable:
            if rng.random() < 0.7:
                gone[groups[index].elements] = False
        yield "branches", gone, False
    whole = keep.copy()
    for group in groups:
        if rng.random() < 0.4:
            whole[group.elements] = False
    yield "whole groups", whole, True


def _check_cut(case: Case, graph: gs.Graph, keep: Keep, what: str) -> None:
    expected = case.run(mask=keep)
    try:
        proto = to_proto(graph, case.source)
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, HapOnnxError) as error:
        raise Failed("invalid", f"{what}: {' '.join(str(error).split())[:400]}") from error
    if list(proto.graph.output) != list(case.source.proto.graph.output):
        raise Failed("interface", f"{what}: the outputs are declared differently")
    doubles = _Doubles(case, graph, keep)
    _compare(case.run(graph), expected, f"twin, {what}", doubles)
    batches = [(case.inputs, expected)]
    if what == "part of all" and all(not isinstance(tensor.shape[0], int) for tensor in case.graph.inputs):
        one = {name: values[:1] for name, values in case.inputs.items()}
        tensors = {name: torch.from_numpy(values) for name, values in one.items()}
        with torch.no_grad():
            found = case.twin(tensors, on_read=masked_reads(case.coupling, keep))
        batches.append((one, {name: value.numpy() for name, value in found.items()}))
    for inputs, values in batches:
        try:
            outputs = run_onnxruntime(proto, inputs)
        except Exception as error:
            raise Failed("onnxruntime", f"{what}: {' '.join(str(error).split())[:400]}") from error
        _compare(outputs, values, f"onnxruntime, {what}", doubles)


class _Doubles:
    """The same in double precision, computed when floats leave a doubt."""

    def __init__(self, case: Case, graph: gs.Graph | None = None, keep: Keep | None = None) -> None:
        self._case, self._graph, self._keep = case, graph, keep

    def rounding(self, expected: Outputs) -> float:
        """Raise Failed if double precision tells an error; else how far floats are off, relatively.

        That is the twin's distance from double precision, or what comes of a rounding error after each
        node: where the outputs are differences of equal values, the twin's happen to be exact.
        """
        case = self._case
        tensors = {name: torch.from_numpy(values) for name, values in case.inputs.items()}
        hook = None if self._keep is None else masked_reads(case.coupling, self._keep)
        with in_double(case.twin), torch.no_grad():
            exact = {name: value.numpy() for name, value in case.twin(tensors, on_read=hook).items()}
            rounded = case.twin(tensors, on_read=hook, on_write=_RoundingErrors())
        if self._graph is not None:
            with torch.no_grad():
                cut = build_twin(self._graph).double()(tensors)
            for name, values in exact.items():
                error, problem = compare_tensors(cut[name].numpy(), values)
                if problem or error > DOUBLE_TOLERANCE:
                    raise Failed("inexact", f"'{name}' is off by {error:.1e} in double precision {problem}")
        return max(
            compare_tensors(found, values)[0]
            for name, values in exact.items()
            for found in (expected[name], rounded[name].numpy())
        )


class _RoundingErrors:
    """Hook that puts on what each node writes the error that single precision may have."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, step: Step, index: int, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        error = torch.rand(tensor.shape, generator=self._generator, dtype=tensor.dtype) * 2 - 1
        return tensor * (1 + torch.finfo(torch.float32).eps / 2 * error)


def _compare(outputs: Outputs, expected: Outputs, what: str, doubles: _Doubles) -> None:
    """Raise Failed if outputs differ by more than rounding."""
    if list(outputs) != list(expected):
        raise Failed("interface", f"{what}: outputs {list(outputs)} instead of {list(expected)}")
    for name, values in expected.items():
        error, problem = compare_tensors(outputs[name], values)
        if not problem and error <= TOLERANCE:
            continue
        try:
            limit = doubles.rounding(expected)
        except Failed as failure:
            raise Failed(failure.kind, f"{what}: {failure.detail}") from failure
        if problem or error > max(TOLERANCE, ROUNDING * limit):
            raise Failed("inexact", f"{what}: '{name}' is off by {error:.1e} {problem}")


def _check_prepared(case: Case, rng: np.random.Generator) -> None:
    """What the command line does before it plans must leave only what can be cut."""
    probe = {
        name: values if isinstance(tensor.shape[0], int) else values[:2]
        for (name, values), tensor in zip(case.inputs.items(), case.graph.inputs, strict=True)
    }
    prepared = prepare(case.source, probe)
    coupling = prepared.coupling
    keep = rng.random(coupling.n_elements) < 0.6
    for group in coupling.groups:
        if not keep[group.elements].any():
            keep[rng.choice(group.elements)] = True
    try:
        graph = remove_channels(prepared.graph, coupling, keep, shapes=prepared.probe_shapes)
    except SurgeryError as error:
        raise Failed("refused", f"after all trials: {error}") from error
    proto = to_proto(graph, case.source)
    onnx.checker.check_model(proto, full_check=True)
    tensors = {name: torch.from_numpy(values) for name, values in case.inputs.items()}
    hook = masked_reads(coupling, keep)
    with in_double(prepared.twin), torch.no_grad():
        exact = {name: value.numpy() for name, value in prepared.twin(tensors, on_read=hook).items()}
        cut = {name: value.numpy() for name, value in build_twin(graph).double()(tensors).items()}
    outputs = run_onnxruntime(proto, case.inputs)
    with torch.no_grad():
        floats = {name: value.numpy() for name, value in prepared.twin(tensors, on_read=hook).items()}
    for name, values in exact.items():
        error, problem = compare_tensors(cut[name], values)
        if problem or error > DOUBLE_TOLERANCE:
            raise Failed("inexact", f"prepared: '{name}' is off by {error:.1e} in double precision {problem}")
        limit = max(TOLERANCE, ROUNDING * compare_tensors(floats[name], values)[0])
        error, problem = compare_tensors(outputs[name], values)
        if problem or error > limit:
            raise Failed("inexact", f"prepared, onnxruntime: '{name}' is off by {error:.1e} {problem}")
