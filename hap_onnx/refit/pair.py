"""The two twins in lock step: what differs between them, and the activations that are alive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray
from torch import Tensor

from hap_onnx.data.calibration import Subset
from hap_onnx.distributed import ALONE, Team
from hap_onnx.errors import CalibrationError, SurgeryError
from hap_onnx.ops.elementwise import is_addition
from hap_onnx.ops.registry import find_linear
from hap_onnx.refit.spec import ImplantSpec
from hap_onnx.refit.store import COMPRESSED, ORIGINAL, Key, Store
from hap_onnx.surgery import CONSTANT_SUFFIX, Kept
from hap_onnx.twin import Step, Twin, build_twin, channels_last, unfix_batch


@dataclass
class Pair:
    """Both twins, and the activations that are alive.

    ``changed`` names the tensors of the compressed model whose values differ from the original's; all
    others are computed once. ``readers`` are those of the compressed model's tensors, None for the caller.
    Of the batches each process of the ``team`` has its own; where there are too few, the last processes run
    the first batch to know shapes, and count none of it (``is_idle``).
    """

    original: Twin
    compressed: Twin
    original_nodes: Mapping[str, gs.Node]
    nodes: Mapping[str, gs.Node]
    kept: Mapping[str, Kept]
    implants: Mapping[str, ImplantSpec]
    store: Store
    team: Team = ALONE
    changed: set[str] = field(default_factory=set)
    readers: dict[str, list[tuple[Step, int] | None]] = field(default_factory=dict)
    n_batches: int = 0
    is_idle: bool = False

    def __post_init__(self) -> None:
        self.parameters = self.compressed.parameter_of
        self.original_parameters = self.original.parameter_of
        self.original_steps = {step.name: step for step in self.original.steps}
        self.original_outputs = {name for step in self.original.steps for name in step.outputs if name}

    def key(self, name: str) -> Key:
        """Where the values of a tensor of the compressed model are."""
        return (COMPRESSED if name in self.changed else ORIGINAL, name)

    def owned(self, name: str) -> bool:
        """Say whether a tensor is a float initializer that one node reads, once."""
        readers = self.readers.get(name, [])
        return name in self.parameters and len(readers) == 1 and readers[0] is not None

    def has_original(self, name: str) -> bool:
        return (ORIGINAL, name) in self.store or name in self.original_parameters

    def has(self, name: str) -> bool:
        return name in self.parameters or self.key(name) in self.store

    def original_value(self, name: str, batch: int) -> Tensor:
        key = (ORIGINAL, name)
        return self.store.get(key, batch) if key in self.store else self.original_parameters[name]

    def value(self, name: str, batch: int) -> Tensor:
        """Return an activation or float initializer of the compressed model."""
        return self.parameters[name] if name in self.parameters else self.store.get(self.key(name), batch)

    def run(self, twin: Twin, step: Step, batch: int) -> tuple[Tensor, ...]:
        """Run one step of either twin."""
        names = dict.fromkeys(name for name in step.inputs if name)
        keys = {name: (ORIGINAL, name) if twin is self.original else self.key(name) for name in names}
        values = {name: self.store.get(key, batch) for name, key in keys.items() if key in self.store}
        return twin.run_step(step, values)


def make_pair(
    original: gs.Graph,
    compressed: gs.Graph,
    kept: Mapping[str, Kept],
    implants: Mapping[str, ImplantSpec],
    store: Store,
    *,
    device: str,
    team: Team = ALONE,
) -> Pair:
    """Build both twins, and find out what differs; a contraction that gets an implant does."""
    pair = Pair(
        original=build_twin(original, device=device),
        compressed=build_twin(compressed, device=device),
        original_nodes={node.name: node for node in original.nodes},
        nodes={node.name: node for node in compressed.nodes},
        kept=kept,
        implants=implants,
        store=store,
        team=team,
    )
    missing = sorted(set(implants) - set(pair.nodes))
    if missing:
        raise SurgeryError(f"refit: there is no node '{missing[0]}' that could have an implant")
    for step in pair.compressed.steps:
        for index, name in enumerate(step.inputs):
            pair.readers.setdefault(name, []).append((step, index))
    for name in pair.compressed.output_names:
        pair.readers.setdefault(name, []).append(None)
    for _, step in order_steps(pair):
        if step.name in implants or not _is_same(pair, step) or _can_correct(pair, step):
            pair.changed.update(name for name in step.outputs if name)
    return pair


def is_addition_step(step: Step) -> bool:
    return is_addition(step.op_type, domain=step.domain)


def order_steps(pair: Pair) -> list[tuple[int, Step]]:
    """Sort the compressed model's steps as the original's, each with the position that it follows there."""
    position = {step.name: index for index, step in enumerate(pair.original.steps)}
    due: dict[str, int] = {}
    found: list[tuple[int, Step]] = []
    for step in pair.compressed.steps:
        when = max([position.get(step.name, 0), *(due.get(name, 0) for name in step.inputs)])
        due.update(dict.fromkeys(step.outputs, when))
        found.append((when, step))
    return sorted(found, key=lambda entry: entry[0])


def _can_correct(pair: Pair, step: Step) -> bool:
    """Say whether a contraction that is as before is only added to something that has changed already."""
    if find_linear(step.op_type, domain=step.domain) is None:
        return False
    name = step.outputs[0]
    while True:
        readers = pair.readers.get(name, [])
        if len(readers) != 1 or readers[0] is None or not is_addition_step(readers[0][0]):
            return False
        addition, index = readers[0]
        others = addition.inputs[:index] + addition.inputs[index + 1 :]
        if any(other in pair.changed or other.endswith(CONSTANT_SUFFIX) for other in others):
            return True
        name = addition.outputs[0]


def _is_same(pair: Pair, step: Step) -> bool:
    """Say whether a step computes what it did in the original."""
    before = pair.original_steps.get(step.name)
    return (
        before is not None
        and (step.op_type, step.inputs, step.outputs) == (before.op_type, before.inputs, before.outputs)
        and not any(name in pair.changed for name in step.inputs)
        and all(_same_constant(pair, name) for name in step.inputs if name)
        and _same_attributes(pair.original_nodes[step.name].attrs, pair.nodes[step.name].attrs)
    )


def _same_constant(pair: Pair, name: str) -> bool:
    before, after = _find_constant(pair.original, name), _find_constant(pair.compressed, name)
    if before is None or after is None:
        return before is after
    return before.dtype == after.dtype and torch.equal(before, after)


def _find_constant(twin: Twin, name: str) -> Tensor | None:
    try:
        return twin.constant(name)
    except KeyError:
        return None


def _same_attributes(a: Mapping[str, object], b: Mapping[str, object]) -> bool:
    def plain(value: object) -> object:
        if isinstance(value, gs.Constant):
            value = value.values
        return value.tolist() if isinstance(value, np.ndarray) else value

    return a.keys() == b.keys() and all(bool(plain(a[name]) == plain(b[name])) for name in a)


def read_inputs(pair: Pair, graph: gs.Graph, subset: Subset, batch_size: int) -> None:
    """Put the model's inputs into the store, of the batches that are this process's.

    A model that is written for batches of n samples gets multiples of n; what is left over is not used.
    """
    shape = graph.inputs[0].shape if graph.inputs else None
    unit = shape[0] if shape and isinstance(shape[0], int) and shape[0] > 0 else 1
    subset = subset.take(subset.n_samples // unit * unit)
    if not subset.n_samples:
        raise CalibrationError(f"the model takes batches of {unit} samples, and there are fewer to refit on")
    batch_size = max(batch_size // unit, 1) * unit
    first = {
        name: _to_tensor(values, pair.original)
        for name, values in next(iter(subset.batches(batch_size))).inputs.items()
    }
    if not all(unfix_batch(twin, first) for twin in (pair.original, pair.compressed)):
        batch_size = unit
    pair.is_idle = pair.team.rank * batch_size >= subset.n_samples
    own = pair.team.batches(subset, batch_size)
    for batch in subset.take(batch_size).batches(batch_size) if pair.is_idle else own:
        for name in pair.original.input_names:
            pair.store.append((ORIGINAL, name), _to_tensor(batch.inputs[name], pair.original))
        pair.n_batches += 1


def _to_tensor(values: NDArray[np.generic], twin: Twin) -> Tensor:
    tensor = torch.tensor(np.ascontiguousarray(values))
    if not tensor.is_floating_point():
        return tensor
    return channels_last(tensor.to(device=twin.device, dtype=twin.dtype))
