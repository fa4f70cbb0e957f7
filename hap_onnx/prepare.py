"""Everything that is known of a model before a decision is made, and proof that surgery on it is exact.

Every group is cut once for trial. The shapes of all tensors must come out as the ids say, at two probe
inputs, and the outputs must equal those of the original with the removed channels masked wherever a
contraction reads them. What fails is frozen, with the reason.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray
from torch import Tensor

from hap_onnx.coupling.channels import Coupling, Frozen, IdAxis, find_groups
from hap_onnx.errors import CalibrationError, HapOnnxError, ModelError, SurgeryError, UsageError
from hap_onnx.model.input_spec import InputSpec
from hap_onnx.model.measure import count_params, model_size
from hap_onnx.model.model_io import SourceModel, normalise, stored_weights
from hap_onnx.model.protos import n_elements
from hap_onnx.ops.implant import layer_of
from hap_onnx.sensitivity.curvature import to_tensors
from hap_onnx.surgery import discard, kept_positions, masked_reads, remove_channels, shape_after
from hap_onnx.surgery.fusion import fold_batch_norms
from hap_onnx.twin import Step, Twin, build_twin, in_double, probe_shapes

_log = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[np.generic]]
Shapes = Mapping[str, tuple[int, ...]]

_MAX_PROBE = 2**33
"""The most numbers that are made up for one input."""

TRIAL_TOLERANCE = 1e-4
"""Largest difference between a cut and a masked model, relative to the largest output: float rounding."""


@dataclass(frozen=True)
class PreparedModel:
    """A model with its twin and its channels.

    ``shapes`` are those of one sample (what costs are counted at), ``probe_shapes`` those of the probe
    (two samples where the model allows); ``coupling`` belongs to the latter. ``untouched`` names nodes and
    initializers that were excluded; ``implants_stay`` says that no implant takes the place of another;
    ``stored`` names the weights that the file has in 8 bits.
    """

    source: SourceModel
    n_params: int  # of the model as it came; the graph has BatchNormalization folded
    graph: gs.Graph
    twin: Twin
    probe: Arrays
    shapes: Shapes
    probe_shapes: Shapes
    coupling: Coupling
    untouched: frozenset[str] = frozenset()
    implants_stay: bool = False
    stored: frozenset[str] = frozenset()


def make_probe(inputs: Sequence[InputSpec], *, sizes: Mapping[str, tuple[int, ...]] | None = None) -> Arrays:
    """Make up two samples for a model without data: noise for floats, zeros for integers.

    ``sizes`` gives whole shapes, batch included, where they are known.

    Raises:
        UsageError: nobody knows the sizes.
        ModelError: they are beyond all reason.
    """
    generator = np.random.default_rng(0)
    arrays: dict[str, NDArray[np.generic]] = {}
    for spec in inputs:
        shape: list[int | None]
        if sizes and spec.name in sizes:
            shape = list(sizes[spec.name])
        else:
            shape = [axis if isinstance(axis, int) else None for axis in spec.shape]
            if shape:
                shape[0] = max(2, shape[0] or 0)
        if None in shape:
            raise UsageError(f"the input {spec} leaves sizes open: give --data, so that they are known")
        known = [axis or 0 for axis in shape]
        if n_elements(known) > _MAX_PROBE:
            raise ModelError(
                f"the input {spec} has {n_elements(known)} numbers, more than can be made up; "
                "check the sizes in the model"
            )
        if spec.dtype.kind == "f":
            arrays[spec.name] = generator.standard_normal(known).astype(spec.dtype)
        else:
            arrays[spec.name] = np.zeros(known, spec.dtype)
    return arrays


def prepare(
    source: SourceModel,
    probe: Arrays,
    *,
    exclude: Sequence[str] = (),
    only: Sequence[str] = (),
    must_match: bool = True,
    implants_stay: bool = False,
    device: str = "cpu",
) -> PreparedModel:
    """Normalise a model, build its twin, couple its channels and prove on trial cuts that it can be cut.

    Args:
        probe: a few samples; the first two are used, or the batch that the model declares.
        exclude, only: patterns for names of nodes or initializers.
        must_match: whether a pattern that matches nothing is an error.
        implants_stay: whether the implants that the model has are not to be replaced by others.

    Raises:
        ModelError: the model cannot be run.
        UsageError: a pattern matches nothing.
    """
    original = normalise(source)
    # Tables that normalise computes beforehand, such as the masks of shifted windows, are not the model's.
    n_params = min(model_size(original, {}).params, count_params(source.proto))
    stored = stored_weights(source)
    graph = fold_batch_norms(original, leave=stored)
    twin = build_twin(graph, device=device, share_weights=True)
    n_probe = max(2, _declared_batch(graph))
    probe = _take(probe, n_probe)
    tensors = to_tensors(probe, twin)
    shapes = probe_shapes(twin, tensors)
    if twin.batch_limit is not None:  # it runs in parts, and those were the shapes of one
        probe = _take(probe, twin.batch_limit)
        shapes = probe_shapes(twin, to_tensors(probe, twin))
    first = _take(probe, 1)
    try:
        one = probe_shapes(twin, to_tensors(first, twin))
    except (ModelError, CalibrationError):
        one = shapes  # a batch that is fixed at two or more
    reasons = _excluded(graph, exclude, "excluded by --exclude", must_match)
    coupling = find_groups(graph, shapes, exclude=reasons)
    if only:
        wanted = set(_excluded(graph, only, "", must_match))
        coupling = freeze_groups(coupling, _outside(graph, coupling, wanted))
        reasons |= dict.fromkeys(
            (
                node.name
                for node in graph.nodes
                if not {node.name, *(tensor.name for tensor in node.inputs)} & wanted
            ),
            "not among what --only names",
        )
    untouched = frozenset(reasons)
    return _prove(
        PreparedModel(
            source, n_params, graph, twin, probe, one, shapes, coupling, untouched, implants_stay, stored
        )
    )


def _take(arrays: Arrays, n: int) -> Arrays:
    """The first n samples; an input without axes is the same for all."""
    return {name: values[:n] if values.ndim else values for name, values in arrays.items()}


def _declared_batch(graph: gs.Graph) -> int:
    """The number of samples that is written into the model, 1 if none."""
    sizes = [tensor.shape[0] for tensor in graph.inputs if tensor.shape]
    return max((size for size in sizes if isinstance(size, int)), default=1)


def _names_of(graph: gs.Graph) -> dict[str, None]:
    names: dict[str, None] = {}
    for node in graph.nodes:
        names[node.name] = None
        names.update({tensor.name: None for tensor in node.inputs if isinstance(tensor, gs.Constant)})
    return names


def _excluded(graph: gs.Graph, patterns: Iterable[str], reason: str, must_match: bool) -> dict[str, str]:
    names = _names_of(graph)
    found: dict[str, str] = {}
    for pattern in patterns:
        matches = [name for name in names if fnmatch.filter((name, layer_of(name)), pattern)]
        if not matches and must_match:
            raise UsageError(
                f"'{pattern}' matches no node and no initializer; 'hap-onnx inspect' lists their names"
            )
        found.update(dict.fromkeys(matches, f"{reason} '{pattern}'"))
    return found


def _outside(graph: gs.Graph, coupling: Coupling, matches: set[str]) -> dict[str, str]:
    """Groups in which no producer is among ``matches``, with the reason why they are frozen."""
    weights = {node.name: {tensor.name for tensor in node.inputs} for node in graph.nodes}
    return {
        group.name: "not among what --only names"
        for group in coupling.groups
        if not any(name in matches or weights[name] & matches for name in group.producers)
    }


def freeze_groups(coupling: Coupling, reasons: Mapping[str, str]) -> Coupling:
    """Return the coupling without some groups, whose channels must stay for the ``reasons`` given by name.

    Excluding their nodes would do more: it freezes what the nodes read, too.
    """
    stay = [group for group in coupling.groups if group.name not in reasons]
    alive = np.sort(np.concatenate([group.elements for group in stay])) if stay else np.zeros(0, np.int64)
    # The last entry serves -1, which stays -1.
    new = np.full(coupling.n_elements + 1, -1, np.int64)
    new[alive] = np.arange(len(alive))
    frozen = {entry.node: entry for entry in coupling.frozen}
    for group in coupling.groups:
        if group.name in reasons:
            for node in group.producers:
                frozen.setdefault(node, Frozen(node, reasons[group.name]))
    weights = [replace(weight, elements=new[weight.elements]) for weight in coupling.weights]
    tensors = {name: IdAxis(found.axis, new[found.ids]) for name, found in coupling.tensors.items()}
    reads = [replace(read, elements=new[read.elements]) for read in coupling.reads]
    return replace(
        coupling,
        n_elements=len(alive),
        groups=tuple(replace(group, elements=new[group.elements]) for group in stay),
        weights=tuple(weight for weight in weights if (weight.elements >= 0).any()),
        tensors={name: found for name, found in tensors.items() if (found.ids >= 0).any()},
        reads=tuple(read for read in reads if (read.elements >= 0).any()),
        frozen=tuple(frozen.values()),
    )


# --- proof by trial ---


def _prove(prepared: PreparedModel) -> PreparedModel:
    """Cut for trial; freeze what does not come out exactly, until all is exact."""
    for _ in range(len(prepared.coupling.groups) + 1):
        complaint = _try_all(prepared)
        if complaint is None:
            return prepared
        culprits = {}
        for group in prepared.coupling.groups:
            keep = np.ones(prepared.coupling.n_elements, bool)
            keep[group.elements[: max(1, group.size // 2)]] = False
            found = try_cut(prepared, keep) if group.size > 1 else complaint
            if found is not None:
                culprits[group.name] = f"cutting it for trial failed: {found}"
        if not culprits:  # each alone is exact, together they are not: give up on all
            reason = f"cutting it for trial failed: {complaint}"
            culprits = {group.name: reason for group in prepared.coupling.groups}
        _log.warning("%d channel groups are frozen: %s", len(culprits), next(iter(culprits.values())))
        prepared = replace(prepared, coupling=freeze_groups(prepared.coupling, culprits))
    return prepared


def _try_all(prepared: PreparedModel) -> str | None:
    """Cut half of every group at once."""
    keep = np.ones(prepared.coupling.n_elements, bool)
    for group in prepared.coupling.groups:
        keep[group.elements[: group.size // 2]] = False
    return None if keep.all() else try_cut(prepared, keep)


def try_cut(prepared: PreparedModel, keep: NDArray[np.bool_]) -> str | None:
    """Cut and compare with the masked original; return what is wrong, or None.

    Shapes are compared at both probes, outputs at the probe of two samples.
    """
    try:
        graph = remove_channels(prepared.graph, prepared.coupling, keep, shapes=prepared.probe_shapes)
        first = {
            name: values[: prepared.shapes[name][0]] if values.ndim else values
            for name, values in prepared.probe.items()
        }
        trial = CutTrial(prepared, keep, graph)
        fault = trial.find_fault(first, only_shapes=True) or trial.find_fault(prepared.probe)
        discard(graph)
        return fault
    except (HapOnnxError, AssertionError) as error:
        _log.info("trial cut failed", exc_info=True)
        return " ".join(str(error).split())[:300]


class CutTrial:
    """A model without some channels, to be compared with the whole one that has them masked."""

    def __init__(self, prepared: PreparedModel, keep: NDArray[np.bool_], graph: gs.Graph) -> None:
        self._prepared, self._keep = prepared, keep
        self._cut = build_twin(graph, device=str(prepared.twin.device or "cpu"), share_weights=True)

    def find_fault(self, inputs: Arrays, *, only_shapes: bool = False) -> str | None:
        """Return where the cut is not what it should be on some inputs, by node, or None.

        Raises:
            NoProofError: the inputs show nothing: the whole model does not take them, or its channels lie
                elsewhere at their sizes.
            ModelError: the whole model takes the inputs, and the cut one does not.
        """
        twin, cut = self._prepared.twin, self._cut
        tensors = to_tensors(inputs, twin)
        before, after = _Shapes(), _Shapes()
        expected = self._run_masked(twin, tensors, before)
        with torch.no_grad():
            outputs = cut(tensors, on_write=after.note)
        if before.in_parts != after.in_parts:
            raise NoProofError("only one of the two models takes such a batch at once")
        for step in cut.steps:
            for name in step.outputs:
                if name not in before.found or name not in after.found:
                    continue
                carried = self._prepared.coupling.tensors.get(name)
                wanted = shape_after(before.found[name], carried, self._keep)
                if after.found[name] != wanted:
                    return (
                        f"node '{step.name}' ({step.op_type}): '{name}' has shape {list(after.found[name])} "
                        f"instead of {list(wanted)}"
                    )
        if only_shapes or _difference(outputs, expected) is None:
            return None
        # It may be that floats cannot tell: deep models amplify rounding.
        complaint = _difference(*self._run_in_double(inputs))
        return None if complaint is None else complaint + self._first_difference(tensors)

    def _run_masked(
        self, twin: Twin, tensors: Mapping[str, Tensor], shapes: _Shapes
    ) -> Mapping[str, Tensor]:
        coupling = self._prepared.coupling
        mask = masked_reads(coupling, self._keep)
        reads = {(read.node, read.index): read for read in coupling.reads}

        def on_read(step: Step, index: int, tensor: Tensor) -> Tensor:
            read = reads.get((step.name, index))
            if read is not None and tensor.shape[read.axis] != len(read.elements):
                raise NoProofError(f"'{step.name}' reads a tensor of another size")
            return mask(step, index, tensor)

        try:
            with torch.no_grad():
                return twin(tensors, on_read=on_read, on_write=shapes.note)
        except (ModelError, CalibrationError) as error:
            raise NoProofError(f"the model itself does not run: {error}") from error

    def _run_in_double(self, inputs: Arrays) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Outputs of the cut model and of the masked one, computed in double precision."""
        twin, cut = self._prepared.twin, self._cut
        with in_double(twin), in_double(cut), torch.no_grad():
            tensors = to_tensors(inputs, twin)
            return cut(tensors), self._run_masked(twin, tensors, _Shapes())

    def _first_difference(self, tensors: Mapping[str, Tensor]) -> str:
        """Name the first node of the cut model whose result is not what is left of the whole one's."""
        coupling, whole, places = self._prepared.coupling, dict[str, Tensor](), list[str]()

        def note(step: Step, index: int, tensor: Tensor) -> Tensor:
            whole[step.outputs[index]] = tensor
            return tensor

        def compare(step: Step, index: int, tensor: Tensor) -> Tensor:
            name = step.outputs[index]
            if places or name not in whole or not tensor.is_floating_point():
                return tensor
            left, found = whole[name], coupling.tensors.get(name)
            if found is not None and left.shape[found.axis] == len(found.ids):
                positions = torch.from_numpy(kept_positions(found.ids, self._keep)).to(left.device)
                left = left.index_select(found.axis, positions)
            if left.shape == tensor.shape and _difference({name: tensor}, {name: left}) is not None:
                places.append(f"; node '{step.name}' ({step.op_type}) is the first to differ")
            return tensor

        with torch.no_grad():
            self._prepared.twin(
                tensors, on_read=masked_reads(coupling, self._keep), on_write=note
            )
            self._cut(tensors, on_write=compare)
        return places[0] if places else ""


class NoProofError(SurgeryError):
    """Some inputs cannot show whether a cut is exact."""


class _Shapes:
    """The shapes of the tensors that a twin writes; ``in_parts`` if it ran more than once for one batch."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, ...]] = {}
        self.in_parts = False

    def note(self, step: Step, index: int, tensor: Tensor) -> Tensor:
        name = step.outputs[index]
        self.in_parts |= name in self.found
        self.found[name] = tuple(tensor.shape)
        return tensor


def _difference(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Say which output differs by more than float rounding, or None."""
    for name, values in expected.items():
        if not values.is_floating_point():
            continue
        finite = torch.isfinite(values)
        if not finite.any():
            continue
        distance = (outputs[name] - values)[finite].abs().max()
        if not distance <= TRIAL_TOLERANCE * values[finite].abs().max() + 1e-7:
            return f"the output '{name}' differs by {float(distance):.3g}"
    return None
