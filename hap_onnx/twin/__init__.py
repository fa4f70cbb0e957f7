"""The twin: the model as a torch module that computes the ONNX graph node by node.

    twin = build_twin(graph)
    outputs = twin({"input": images})        # {output name: tensor}

Every float initializer is a parameter that can be reached by its ONNX name, a shared one is one shared
parameter; integers and booleans are buffers that stay on the CPU, where shapes are read. The twin computes
in float32 whatever float type the file uses (``Cast`` between float types is the identity), or in float64
after ``twin.double()``. Nodes are run in topological order, and each activation is freed after its last use.

Many exporters write the batch size of their example into the graph. The twin takes any batch all the same:
when it first meets another one, it notes every shape at the written batch size, lets the literals follow the
batch, and proves on two batches that the outputs are those of each batch alone. Where that fails, it runs
the model once per written batch and joins the outputs (``Twin.batch_limit``).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from logging import getLogger
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from torch import Tensor, nn

from hap_onnx import ops  # noqa: F401  (registers the operators)
from hap_onnx.errors import CalibrationError, ModelError, refuse_out_of_memory
from hap_onnx.ops.arguments import UnitShapes
from hap_onnx.twin.calls import BodyCall, TorchCall, find_call, is_float_array
from hap_onnx.twin.opaque import OpaqueNode, captured_names, is_known, write_node

logger = getLogger(__name__)

ReadHook = Callable[["Step", int, Tensor], Tensor]
WriteHook = Callable[["Step", int, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """One node in execution order; ``""`` stands for an omitted input or output.

    Outer tensors that a subgraph captures follow the node's own inputs. ``last_use`` names the
    activations that nothing needs after this step. An ``opaque`` step runs in onnxruntime.
    """

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last_use: tuple[str, ...]
    opaque: bool


@dataclass
class _BatchState:
    """What the twin has learnt about running other batch sizes than the one written into the model.

    ``unit`` is that size, None if there is none; it may be a guess, that only a failure of the model as it is
    confirms. The proof is made once per ``signature``: the shapes of the inputs without their batch axis.
    """

    unit: int | None
    is_guess: bool = False
    loops: dict[tuple[tuple[int, ...], ...], bool] = field(default_factory=dict)
    shapes: dict[int, list[UnitShapes]] = field(default_factory=dict)  # of steps, by position


class Twin(nn.Module):
    """A model that computes ``{output name: Tensor}`` from ``{input name: Tensor}``.

    Made by :func:`build_twin`.
    """

    def __init__(
        self,
        *,
        steps: Sequence[Step],
        calls: Sequence[Callable[..., tuple[Any, ...]]],
        fallbacks: Sequence[Callable[[], OpaqueNode]],
        inputs: Mapping[str, tuple[int | str | None, ...] | None],
        output_names: Sequence[str],
        constants: Mapping[str, np.ndarray],
        unit_batch: int | None,
        unit_is_guess: bool,
        share_weights: bool = False,
    ) -> None:
        super().__init__()
        self._share_weights = share_weights
        self._computes_in: torch.dtype | None = None  # another type than the parameters have
        self._steps = list(steps)
        self._position = {step.name: position for position, step in enumerate(steps)}
        self._calls: list[Callable[..., tuple[Any, ...]]] = list(calls)
        self._batch = _BatchState(unit_batch, unit_is_guess)
        self._fallbacks = list(fallbacks)
        self._input_shapes = dict(inputs)
        self.input_names = tuple(inputs)
        self.output_names = tuple(output_names)
        self._safe_name: dict[str, str] = {}
        self._untyped: set[str] = set()
        for position, (name, values) in enumerate(constants.items()):
            self._add_constant(name, f"c{position}_{_torch_safe(name)}", values)

    def _add_constant(self, name: str, safe_name: str, values: np.ndarray) -> None:
        if is_float_array(values):
            tensor = _view(values) if self._share_weights else None
            if tensor is None:
                tensor = torch.from_numpy(np.array(values, dtype=np.float32))
            self.register_parameter(safe_name, nn.Parameter(tensor))
        else:
            try:
                tensor = torch.from_numpy(np.array(values))
            except TypeError:  # a type that torch lacks: only onnxruntime reads it
                self._untyped.add(name)
                return
            self.register_buffer(safe_name, tensor)
        self._safe_name[name] = safe_name

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Twin:
        """Move and convert parameters only: integer constants stay on the CPU."""
        buffers = dict(self._buffers)
        super()._apply(fn, recurse)
        self._buffers.update(buffers)
        return self

    # --- what there is ---

    @property
    def steps(self) -> tuple[Step, ...]:
        """The nodes in execution order."""
        return tuple(self._steps)

    @property
    def opaque_nodes(self) -> tuple[str, ...]:
        """Names of the nodes that run in onnxruntime.

        An operator may decline a variant that it does not implement when it first meets one, so the
        list is complete after one forward pass.
        """
        return tuple(step.name for step in self._steps if step.opaque)

    @property
    def expanded_nodes(self) -> tuple[str, ...]:
        """Names of the nodes that torch computes by the function body of their operator's schema."""
        pairs = zip(self._steps, self._calls, strict=True)
        return tuple(step.name for step, call in pairs if isinstance(call, BodyCall))

    @property
    def parameter_of(self) -> Mapping[str, nn.Parameter]:
        """The parameter of each float initializer, by its ONNX name."""
        parameters = self._parameters
        return MappingProxyType(
            {
                name: parameter
                for name, safe in self._safe_name.items()
                if (parameter := parameters.get(safe)) is not None
            }
        )

    def constant(self, name: str) -> Tensor:
        """Return the parameter or buffer of an initializer by its ONNX name; raises KeyError."""
        safe = self._safe_name[name]
        tensor = self._parameters[safe] if safe in self._parameters else self._buffers[safe]
        assert tensor is not None
        return tensor if self._computes_in is None or safe in self._buffers else tensor.to(self._computes_in)

    @property
    def dtype(self) -> torch.dtype:
        """The float type that the twin computes in."""
        return self._computes_in or next(
            (parameter.dtype for parameter in self._parameters.values() if parameter is not None),
            torch.float32,
        )

    @property
    def device(self) -> torch.device | None:
        """Where the parameters are; None for a model without any."""
        return next(
            (parameter.device for parameter in self._parameters.values() if parameter is not None), None
        )

    # --- running ---

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        *,
        on_read: ReadHook | None = None,
        on_write: WriteHook | None = None,
    ) -> dict[str, Tensor]:
        """Run the model.

        ``on_read(step, input_index, tensor)`` and ``on_write(step, output_index, tensor)`` see every tensor
        (constants too) that a step reads or writes, and return the tensor to use in its place.
        Raises CalibrationError for inputs that do not fit, ModelError for a node that fails.
        """
        values = self._check_inputs(inputs)
        n_units = self._n_units(values)
        if n_units > 1 and self._must_loop(values, n_units):
            parts = [self._execute(part, on_read, on_write) for part in self._parts(values, n_units)]
            return {name: _join([part[name] for part in parts]) for name in self.output_names}
        return self._execute(values, on_read, on_write)

    def _execute(
        self, inputs: Mapping[str, Tensor], on_read: ReadHook | None, on_write: WriteHook | None
    ) -> dict[str, Tensor]:
        values = dict(inputs)
        for position in range(len(self._steps)):
            outputs = self._run(position, values, on_read)
            step = self._steps[position]
            for index, (name, tensor) in enumerate(zip(step.outputs, outputs, strict=False)):
                if name:
                    values[name] = _hooked(on_write, step, index, tensor)
            del outputs
            for name in step.last_use:
                values.pop(name, None)
        return {name: self._value(name, values) for name in self.output_names}

    def run_step(
        self, step: Step, values: Mapping[str, Tensor], *, on_read: ReadHook | None = None
    ) -> tuple[Tensor, ...]:
        """Run one step on the activations in ``values``; returns one tensor per output."""
        return self._run(self._position[step.name], values, on_read)

    def _run(
        self, position: int, values: Mapping[str, Tensor], on_read: ReadHook | None
    ) -> tuple[Tensor, ...]:
        step = self._steps[position]
        inputs: list[Tensor | None] = []
        for index, name in enumerate(step.inputs):
            if not name or name in self._untyped:
                inputs.append(None)
                continue
            inputs.append(_hooked(on_read, step, index, self._value(name, values)))
        try:
            if not step.opaque and not self._untyped.isdisjoint(step.inputs):
                raise NotImplementedError("torch lacks the type of an input")
            outputs = self._call(position, inputs)
        except NotImplementedError as reason:
            if step.opaque:
                raise
            # A variant of a known operator that torch cannot express, or an integer type it lacks.
            logger.info("node %r (%s) runs in onnxruntime: %s", step.name, step.op_type, reason)
            self._calls[position] = self._fallbacks[position]()
            self._steps[position] = replace(step, opaque=True)
            outputs = self._call(position, inputs)
        except torch.cuda.OutOfMemoryError:
            raise
        except (ArithmeticError, RuntimeError, TypeError, ValueError, IndexError) as error:
            refuse_out_of_memory(error, f"node {step.name!r} ({step.op_type})")
            shapes = [tuple(tensor.shape) if isinstance(tensor, Tensor) else None for tensor in inputs]
            raise ModelError(
                f"node {step.name!r} ({step.op_type}) cannot be computed on inputs of shapes {shapes}; "
                f"check the shapes of the data: {error}"
            ) from error
        _check_sizes(step, outputs)
        return tuple(self._settle(tensor) for tensor in outputs)

    def _call(self, position: int, inputs: Sequence[Tensor | None]) -> tuple[Any, ...]:
        call = self._calls[position]
        if isinstance(call, OpaqueNode):
            return call(*inputs)
        candidates = self._batch.shapes.get(position, ())
        return call(*inputs, unit=next((unit for unit in candidates if unit.factor(inputs)), None))

    def _settle(self, tensor: Tensor) -> Tensor:
        """Give floats the twin's type and device."""
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return tensor
        if torch.is_autocast_enabled(tensor.device.type):
            return tensor  # torch chooses the type of each result
        return tensor.to(device=self.device, dtype=self.dtype)

    def _value(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        if name in values:
            return values[name]
        if name in self._safe_name:
            return self.constant(name)
        raise ModelError(
            f"tensor {name!r} has no value: it is neither a constant, nor an input, nor computed"
        )

    def _check_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        missing = [name for name in self.input_names if name not in inputs]
        unknown = [name for name in inputs if name not in self._input_shapes]
        if missing or unknown:
            raise CalibrationError(
                f"the inputs do not fit the model: missing {missing}, unknown {unknown}; "
                f"the model takes {list(self.input_names)}"
            )
        for name, tensor in inputs.items():
            declared = self._input_shapes[name]
            if declared is not None and len(declared) != tensor.ndim:
                raise CalibrationError(
                    f"input {name!r} has shape {tuple(tensor.shape)}, "
                    f"the model takes {len(declared)} axes: {declared}"
                )
        return {name: self._settle(tensor) for name, tensor in inputs.items()}

    # --- batches other than the one written into the model ---

    @property
    def batch_limit(self) -> int | None:
        """The largest batch that runs at once, None for any.

        Known once a larger batch has been met, by ``forward`` or by :func:`unfix_batch`. ``forward``
        takes any multiple of it, and then calls the hooks once per part.
        """
        return self._batch.unit if any(self._batch.loops.values()) else None

    def _batched(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs that hold another number of samples than the model was written for.

        Those are the inputs whose first axis is declared as that of the first input.
        """
        unit, shapes = self._batch.unit, self._input_shapes
        first_axis = {name: None if not shape else shape[0] for name, shape in shapes.items()}
        batch_axis = first_axis[self.input_names[0]]
        return {
            name: tensor
            for name, tensor in values.items()
            if tensor.ndim and tensor.shape[0] != unit and first_axis[name] == batch_axis
        }

    def _n_units(self, values: Mapping[str, Tensor]) -> int:
        """Return how many times the written batch the inputs hold; 1 if no batch size is written."""
        unit = self._batch.unit
        batched = self._batched(values) if unit is not None else {}
        sizes = {name: tensor.shape[0] for name, tensor in batched.items()}
        if unit is None or not sizes:
            return 1
        if len(set(sizes.values())) > 1 or next(iter(sizes.values())) % unit:
            raise CalibrationError(
                f"the inputs hold batches of {sizes}; expected one multiple of {unit} for all"
            )
        return next(iter(sizes.values())) // unit

    def _parts(self, values: Mapping[str, Tensor], n_units: int) -> list[dict[str, Tensor]]:
        """Cut the inputs into batches of the written size."""
        batched = {name: tensor.chunk(n_units) for name, tensor in self._batched(values).items()}
        return [
            {name: batched[name][part] if name in batched else tensor for name, tensor in values.items()}
            for part in range(n_units)
        ]

    def _must_loop(self, values: Mapping[str, Tensor], n_units: int) -> bool:
        """Say whether the batch has to be run in parts; finds out at the first call for these shapes."""
        batched = self._batched(values)
        signature = tuple(tuple(tensor.shape[name in batched :]) for name, tensor in values.items())
        if signature not in self._batch.loops:
            if self._batch.is_guess and self._runs_as_it_is(values):
                self._batch = _BatchState(None)  # what the model computes, onnxruntime computes, too
                return False
            self._batch.loops[signature] = not self._prove_batch(values, n_units)
        return self._batch.loops[signature]

    @torch.no_grad()
    def _runs_as_it_is(self, values: Mapping[str, Tensor]) -> bool:
        """Say whether no literal of the model stands against a batch of this size."""
        before, self._batch.shapes = self._batch.shapes, {}
        try:
            self._execute(values, None, None)
        except ModelError:
            return False
        finally:
            self._batch.shapes = before
        return True

    @torch.no_grad()
    def _prove_batch(self, values: Mapping[str, Tensor], n_units: int) -> bool:
        """Note all shapes at the written batch; say whether two batches at once equal each alone."""
        first, second = self._parts(values, n_units)[:2]
        batched = self._batched(values)
        # An input that is the same in both, as attention masks often are, would not show who reads whose.
        second = {
            name: _jitter(tensor) if name in batched and torch.equal(tensor, first[name]) else tensor
            for name, tensor in second.items()
        }
        double = {
            name: torch.cat([first[name], second[name]]) if name in batched else first[name] for name in first
        }
        shapes: dict[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in first.items()}

        def note(step: Step, index: int, tensor: Tensor) -> Tensor:
            shapes[step.outputs[index]] = tuple(tensor.shape)
            return tensor

        alone = [self._execute(first, None, note)]
        try:
            alone.append(self._execute(second, None, None))
        except ModelError:
            return False  # the model does not take the numbers that were made up
        notes = self._batch.shapes
        before = {position: list(units) for position, units in notes.items()}

        def learn(step: Step, index: int, tensor: Tensor) -> Tensor:
            sizes[step.inputs[index]] = tuple(tensor.shape)
            if index == max(i for i, name in enumerate(step.inputs) if name and name not in self._untyped):
                self._learn(step, shapes, sizes)
            return tensor

        sizes: dict[str, tuple[int, ...]] = {}
        try:
            together = self._execute(double, learn, None)
        except ModelError:
            together = None  # a literal that nothing lets follow the batch
        if together is not None and (
            self._is_joined(together, alone) or self._is_joined_in_double(double, [first, second])
        ):
            return True
        self._batch.shapes = before
        return False

    def _is_joined(self, together: Mapping[str, Tensor], parts: Sequence[Mapping[str, Tensor]]) -> bool:
        """Say whether outputs of a batch are those of its parts, up to rounding."""
        return all(
            _close(together[name], _join([part[name] for part in parts])) for name in self.output_names
        )

    def _is_joined_in_double(
        self, batch: Mapping[str, Tensor], parts: Sequence[Mapping[str, Tensor]]
    ) -> bool:
        """The same, computed in double precision: deep models may blow rounding up beyond any tolerance."""
        if self.dtype != torch.float32 or torch.is_autocast_enabled(str(self.device or "cpu").split(":")[0]):
            return False
        try:
            with in_double(self):
                found, *alone = [
                    self._execute({name: self._settle(tensor) for name, tensor in inputs.items()}, None, None)
                    for inputs in (batch, *parts)
                ]
        except ModelError:
            return False
        return self._is_joined(found, alone)

    def _learn(
        self, step: Step, unit: Mapping[str, tuple[int, ...]], grown: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Note the shapes of one step at the written batch, given those at twice as much."""
        position = self._position[step.name]
        call = self._calls[position]
        if not isinstance(call, TorchCall) or not call.takes_unit:
            return
        inputs = [None if not name else unit.get(name, grown.get(name)) for name in step.inputs]
        axes = [
            _first_difference(shape, grown.get(name)) for name, shape in zip(step.inputs, inputs, strict=True)
        ]
        outputs = tuple(unit.get(name, ()) for name in step.outputs)
        record = UnitShapes(tuple(inputs), tuple(axes), outputs)
        records = self._batch.shapes.setdefault(position, [])
        if any(axis is not None for axis in axes) and record not in records:
            records.append(record)


def _hooked(hook: ReadHook | WriteHook | None, step: Step, index: int, value: Tensor) -> Tensor:
    """Apply a hook; ONNX sequences, which are lists, pass by."""
    return value if hook is None or not isinstance(value, Tensor) else hook(step, index, value)


def _first_difference(shape: tuple[int, ...] | None, larger: tuple[int, ...] | None) -> int | None:
    pairs = enumerate(zip(shape or (), larger or (), strict=False))
    return next((axis for axis, (size, other) in pairs if size != other), None)


def _join(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts[0].ndim else torch.stack(list(parts))


def _jitter(tensor: Tensor) -> Tensor:
    """Return other numbers of the same kind: a proof on two equal batches would prove little.

    Of integers, about half become 0, and 1 where they are 0: masks stay masks, and few models have no
    meaning for the numbers 0 and 1.
    """
    generator = torch.Generator().manual_seed(0)
    if not tensor.is_floating_point():
        changes = torch.rand(tensor.shape, generator=generator) < 0.5
        changes.view(-1)[:1] = True
        return torch.where(changes.to(tensor.device), (tensor == 0).to(tensor.dtype), tensor)
    noise = torch.randn(tensor.shape, generator=generator).to(tensor)
    scale = tensor.std() if tensor.numel() > 1 else tensor.abs().sum()
    return tensor + noise * torch.where(scale > 0, scale, torch.ones_like(scale))


def _close(ours: Tensor, expected: Tensor) -> bool:
    """Say whether two outputs agree up to float rounding."""
    if ours.shape != expected.shape:
        return False
    if not ours.is_floating_point():
        return torch.equal(ours, expected)
    finite = torch.isfinite(expected)
    if not finite.any():
        return True
    largest = expected[finite].abs().max()
    return bool((ours[finite] - expected[finite]).abs().max() <= 1e-4 * largest + 1e-7)


@contextmanager
def in_double(twin: Twin) -> Iterator[None]:
    """Let a twin compute in double precision meanwhile: each step converts what it reads."""
    before = twin._computes_in
    twin._computes_in = torch.float64
    try:
        yield
    finally:
        twin._computes_in = before


def unfix_batch(twin: Twin, inputs: Mapping[str, Tensor]) -> bool:
    """Find out now, on ``inputs`` of one sample or more, whether any batch size runs at once.

    ``forward`` finds out by itself; this is for those who need :attr:`Twin.batch_limit` before.
    """
    values = twin._check_inputs(inputs)
    if twin._batch.unit is None:
        return True
    if twin._n_units(values) == 1:
        unit = twin._batch.unit
        values = {
            name: torch.cat([tensor, tensor]) if tensor.ndim and tensor.shape[0] == unit else tensor
            for name, tensor in values.items()
        }
    return not twin._must_loop(values, twin._n_units(values))


@cache
def _memory_bytes() -> int:
    """What this machine has; no limit where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 2**62


def _check_sizes(step: Step, outputs: Sequence[Any]) -> None:
    """Refuse what could never be held: torch repeats a number without storing it, but computes with each."""
    for tensor in outputs:
        if isinstance(tensor, Tensor) and tensor.numel() * tensor.element_size() > _memory_bytes():
            raise ModelError(
                f"node {step.name!r} ({step.op_type}) makes a tensor of shape {list(tensor.shape)}, which is "
                "more than the memory of this machine; check the sizes in the model"
            )


def build_twin(
    graph: gs.Graph, *, device: str | torch.device = "cpu", share_weights: bool = False
) -> Twin:
    """Build the twin of a normalised graph; the graph is only read.

    With ``share_weights`` its parameters lie on the CPU where the graph has them, as far as they are float32:
    for twins that nobody trains, since writing to them would write to the graph.

    Raises ModelError that lists every node which neither torch nor onnxruntime can run.
    """
    nodes = _sort_nodes(graph)
    opsets = _opsets(graph)
    outer = _tensor_names(graph)
    found = {node.name: find_call(node, outer=outer, opsets=opsets) for node in nodes}
    in_torch = {name: call for name, call in found.items() if call is not None}
    _check_nodes(nodes, in_torch, opset=graph.opset)
    constants = _constants(graph, nodes)
    input_names = [tensor.name for tensor in graph.inputs if tensor.name not in constants]
    output_names = [tensor.name for tensor in graph.outputs]
    captured = [captured_names(node, outer) for node in nodes]
    reads = [
        tuple(tensor.name for tensor in node.inputs) + tuple(names)
        for node, names in zip(nodes, captured, strict=True)
    ]
    last_reader = {name: position for position, names in enumerate(reads) for name in names if name}
    steps, calls, fallbacks = [], [], []
    for position, (node, names) in enumerate(zip(nodes, reads, strict=True)):
        fallback = _fallback(node, names, constants, captured=captured[position], opsets=opsets)
        call = in_torch.get(node.name)
        outputs = tuple(tensor.name for tensor in node.outputs)
        # Nobody reads some outputs: they go at once.
        ends = [
            name
            for name in dict.fromkeys(names)
            if name and name not in constants and last_reader[name] == position
        ]
        ends += [name for name in outputs if name and name not in last_reader]
        steps.append(
            Step(
                name=node.name,
                op_type=node.op,
                domain=node.domain or "",
                inputs=names,
                outputs=outputs,
                last_use=tuple(name for name in ends if name not in output_names),
                opaque=call is None,
            )
        )
        calls.append(fallback() if call is None else call)
        fallbacks.append(fallback)
    _check_sessions(calls, _known_types(graph))
    declared = _declared_batch(graph, input_names)
    twin = Twin(
        steps=steps,
        calls=calls,
        fallbacks=fallbacks,
        inputs={
            tensor.name: _declared_shape(tensor) for tensor in graph.inputs if tensor.name in input_names
        },
        output_names=output_names,
        constants=constants,
        unit_batch=_guess_batch(calls, reads, constants) if declared is None else declared,
        unit_is_guess=declared is None,
        share_weights=share_weights,
    )
    return twin.to(device)


def probe_shapes(twin: Twin, inputs: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Run the twin once and return the shape of every tensor, constants included."""
    shapes = {name: tuple(twin.constant(name).shape) for name in twin._safe_name}
    shapes.update({name: tuple(tensor.shape) for name, tensor in inputs.items()})

    def note(step: Step, index: int, tensor: Tensor) -> Tensor:
        shapes[step.outputs[index]] = tuple(tensor.shape)
        return tensor

    with torch.no_grad():
        twin(inputs, on_write=note)
    return shapes


def channels_last(tensor: Tensor) -> Tensor:
    """Lay images out as convolutions are fastest; the numbers stay the same."""
    is_image = tensor.is_floating_point() and tensor.ndim == 4
    return tensor.contiguous(memory_format=torch.channels_last) if is_image else tensor


def run_captured(twin: Twin, inputs: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Run the twin; returns its outputs and the tensors inside that ``names`` asks for."""
    found: dict[str, Tensor] = {}

    def capture(step: Step, index: int, tensor: Tensor) -> Tensor:
        if step.outputs[index] in names:
            found[step.outputs[index]] = tensor
        return tensor

    return {**twin(inputs, on_write=capture if names else None), **found}


# --- from the graph ---


def _view(values: np.ndarray) -> Tensor | None:
    """Return a tensor in the memory of an array, None where torch needs another type or layout."""
    if values.dtype != np.float32 or not values.dtype.isnative or not values.flags.c_contiguous:
        return None
    with warnings.catch_warnings():  # it is not to be written to, which torch cannot promise
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(values)


def _torch_safe(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def _declared_shape(tensor: gs.Tensor) -> tuple[int | str | None, ...] | None:
    return None if tensor.shape is None else tuple(tensor.shape)


def _opsets(graph: gs.Graph) -> list[onnx.OperatorSetIdProto]:
    """Return the opset of each domain that the graph uses."""
    versions = {"": graph.opset}
    for entry in graph.import_domains or []:
        if entry.domain not in ("", "ai.onnx"):
            versions[entry.domain] = entry.version
    for node in graph.nodes:
        versions.setdefault(node.domain or "", 1)
    return [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]


def _sort_nodes(graph: gs.Graph) -> list[gs.Node]:
    """Return the nodes so that each comes after those it reads from, otherwise in the given order."""
    producer = {tensor.name: node for node in graph.nodes for tensor in node.outputs if tensor.name}
    outer = _tensor_names(graph)
    done: set[int] = set()
    order: list[gs.Node] = []
    for start in graph.nodes:
        stack = [start]
        on_path: set[int] = set()
        while stack:
            node = stack[-1]
            if id(node) in done:
                stack.pop()
                continue
            names = [tensor.name for tensor in node.inputs] + captured_names(node, outer)
            waiting = [
                producer[name] for name in names if name in producer and id(producer[name]) not in done
            ]
            if not waiting:
                done.add(id(node))
                order.append(node)
                stack.pop()
            elif id(node) in on_path:
                raise ModelError(f"the graph has a cycle through node {node.name!r} ({node.op})")
            else:
                on_path.add(id(node))
                stack.extend(reversed(waiting))
    return order


def _check_nodes(nodes: Sequence[gs.Node], in_torch: Collection[str], *, opset: int) -> None:
    """Refuse nodes without a unique name, and list all whose operator nothing knows."""
    names = [node.name for node in nodes]
    if not all(names) or len(set(names)) != len(names):
        raise ModelError("the twin needs unique node names: normalise the graph first")
    _refuse(
        [
            f"{node.name!r} ({node.op}, domain {node.domain or 'ai.onnx'!r}, opset {opset})"
            for node in nodes
            if node.name not in in_torch and not is_known(node, opset=opset)
        ]
    )


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ModelError(
            f"{len(problems)} node(s) run neither in torch nor in onnxruntime: {'; '.join(problems)}"
        )


def _check_sessions(calls: Sequence[Callable[..., Any]], types: Mapping[str, np.dtype]) -> None:
    """List all opaque nodes that onnxruntime refuses, as far as the types of their inputs are known."""
    problems = []
    for call in calls:
        if isinstance(call, OpaqueNode) and all(not name or name in types for name in call.input_names):
            try:
                call.prepare([types.get(name) for name in call.input_names])
            except ModelError as error:
                problems.append(str(error))
    _refuse(problems)


def _known_types(graph: gs.Graph) -> dict[str, np.dtype]:
    """Return the element types that the graph states and torch can hold."""
    types: dict[str, np.dtype] = {}
    for node in graph.nodes:
        for tensor in [*node.inputs, *node.outputs]:
            if (
                tensor.name
                and isinstance(tensor.dtype, (type, np.dtype))
                and np.dtype(tensor.dtype).isbuiltin
            ):
                types[tensor.name] = np.dtype(tensor.dtype)
    return types


def _constants(graph: gs.Graph, nodes: Sequence[gs.Node]) -> dict[str, np.ndarray]:
    """Return the values of all constants that nodes or outputs read, by name."""
    found: dict[str, np.ndarray] = {}
    tensors = [tensor for node in nodes for tensor in node.inputs] + list(graph.outputs)
    for tensor in tensors:
        if isinstance(tensor, gs.Constant) and tensor.name not in found:
            found[tensor.name] = np.asarray(tensor.values)
    return found


def _tensor_names(graph: gs.Graph) -> frozenset[str]:
    """Return the names of all tensors of the main graph."""
    names = {tensor.name for node in graph.nodes for tensor in [*node.inputs, *node.outputs]}
    return frozenset(names | {tensor.name for tensor in [*graph.inputs, *graph.outputs]})


def _declared_batch(graph: gs.Graph, input_names: Sequence[str]) -> int | None:
    """Return the batch size in the declared shape of the first input, None if it is dynamic."""
    shapes = [tensor.shape for tensor in graph.inputs if tensor.name in input_names]
    size = shapes[0][0] if shapes and shapes[0] else None
    return size if isinstance(size, int) and size > 0 else None


def _guess_batch(
    calls: Sequence[Callable[..., Any]],
    reads: Sequence[tuple[str, ...]],
    constants: Mapping[str, np.ndarray],
) -> int | None:
    """Return 1 where a shape literal begins with 1: the model may have been exported from a single sample."""
    for call, names in zip(calls, reads, strict=True):
        if isinstance(call, TorchCall) and call.takes_unit:
            literals = [constants[name] for name in names if name in constants]
            if any(
                values.dtype == np.int64 and values.ndim == 1 and values[:1].tolist() == [1]
                for values in literals
            ):
                return 1
    return None


def _fallback(
    node: gs.Node,
    names: Sequence[str],
    constants: Mapping[str, np.ndarray],
    *,
    captured: Sequence[str],
    opsets: Sequence[onnx.OperatorSetIdProto],
) -> Callable[[], OpaqueNode]:
    """Return a builder of the opaque version of a node."""

    def build() -> OpaqueNode:
        fixed = {
            name: constants[name]
            for name in names
            if name in constants and not is_float_array(constants[name])
        }
        return OpaqueNode(write_node(node, captured=captured), input_names=names, fixed=fixed, opsets=opsets)

    return build
