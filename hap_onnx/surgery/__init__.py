"""Surgery: pure functions from a graph and a decision to a new graph.

Weights lose slices along their axes as the coupling says; literals that count channels (sizes, bounds,
indices) follow by the rules in ``hap_onnx.ops``. A contraction that loses all its inputs is a constant,
its bias, and what becomes constant or unused after that goes too: that is how a whole residual branch
is removed. The input graph is never changed: arrays are replaced, not written into.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray

from hap_onnx.coupling.channels import Coupling, IdAxis
from hap_onnx.errors import SurgeryError
from hap_onnx.ops.elementwise import is_elementwise
from hap_onnx.ops.registry import find_bias, find_edit, keeps_constant
from hap_onnx.ops.rules import read_ints
from hap_onnx.ops.shape import resolve_shape
from hap_onnx.surgery.shape_program import evaluate, find_edits, replace_numbers
from hap_onnx.twin import Step, build_twin
from hap_onnx.twin.opaque import captured_names

_log = logging.getLogger(__name__)

_NOTHING = np.zeros(0, np.float32)

CONSTANT_SUFFIX = "_hap_constant"
"""How the names of constants end that took the place of removed branches."""


@dataclass(frozen=True)
class Kept:
    """What is left of a tensor's channel axis: the old positions, in order."""

    axis: int
    positions: NDArray[np.int64]


class Cut:
    """What the edit rules may ask and change while channels are removed from ``graph``."""

    def __init__(
        self,
        graph: gs.Graph,
        shapes: Mapping[str, tuple[int, ...]],
        tensors: Mapping[str, IdAxis],
        keep: NDArray[np.bool_],
    ) -> None:
        self._graph = graph
        self._tensors = tensors
        self._keep = keep
        self._shapes = shapes
        self._n_new = 0
        self._programs: dict[tuple[str, tuple[Any, ...]], gs.Tensor] = {}
        self.opset: int = graph.opset

    def kept(self, tensor: gs.Tensor) -> Kept | None:
        """What is left of the channels of a tensor; None if it carries none that can go."""
        found = self._tensors.get(tensor.name)
        if found is None:
            return None
        return Kept(found.axis, kept_positions(found.ids, self._keep))

    def shape(self, tensor: gs.Tensor) -> tuple[int, ...]:
        """Shape of a tensor before the cut, at the probe input."""
        return self._shapes[tensor.name]

    def new_shape(self, tensor: gs.Tensor) -> tuple[int, ...]:
        """Shape of a tensor after the cut, at the probe input."""
        return shape_after(self._shapes[tensor.name], self._tensors.get(tensor.name), self._keep)

    def ints(self, node: gs.Node, index: int, attribute: str) -> list[int] | None:
        """Integers from an attribute or a constant input; [] if neither is there, None if computed."""
        return read_ints(node, index, attribute)

    def set_ints(
        self, node: gs.Node, index: int, attribute: str, values: Sequence[int], *, as_attribute: bool
    ) -> None:
        """Replace integers where they came from; a shared constant is replaced for this node only."""
        if as_attribute:
            node.attrs[attribute] = list(values)
        else:
            self.set_constant(node, index, np.array(values, np.int64))

    def set_constant(self, node: gs.Node, index: int, values: np.ndarray) -> None:
        """Give a node a constant input of its own."""
        old = node.inputs[index].name if len(node.inputs) > index else ""
        if old and isinstance(node.inputs[index], gs.Constant):
            values = values.astype(node.inputs[index].values.dtype).reshape(
                values.shape if values.ndim else node.inputs[index].shape
            )
        constant = gs.Constant(self._new_name(old or node.name), np.ascontiguousarray(values))
        while len(node.inputs) <= index:
            node.inputs.append(gs.Variable.empty())
        node.inputs[index] = constant

    def edit_shape_input(self, node: gs.Node, index: int, *, ones_stay: bool = False) -> None:
        """Let a target shape follow where the output's shape changed: never an entry of 0 or -1.

        Of a shape that other nodes compute, the numbers that are written into the program follow.

        Raises:
            SurgeryError: no change of such numbers gives the new shape.
        """
        before, after = self.shape(node.outputs[0]), self.new_shape(node.outputs[0])
        target = node.inputs[index]
        if isinstance(target, gs.Constant):
            literal = np.array(target.values)
            offset = len(before) - len(literal)  # Expand's shape may be shorter than its output
            for axis in range(len(before)):
                if before[axis] == after[axis]:
                    continue
                entry = literal[axis - offset] if axis >= offset else 1
                if entry > 1 or (entry == 1 and not ones_stay and before[axis] == 1):
                    # Less than the size where the batch was written in that the probe has several of.
                    new, rest = divmod(int(entry) * after[axis], before[axis])
                    if rest:
                        raise SurgeryError(f"{node.op} '{node.name}' cannot follow from {before} to {after}")
                    literal[axis - offset] = new
            if not np.array_equal(literal, target.values):
                self.set_constant(node, index, literal)
            return
        source = self.new_shape(node.inputs[0])

        def complete(sizes: Sequence[int]) -> Sequence[int]:
            if ones_stay:  # broadcast against the input
                try:
                    return np.broadcast_shapes(source, tuple(sizes))
                except ValueError:
                    return sizes
            return resolve_shape(source, sizes) if len(sizes) == len(after) else sizes

        self.edit_program(node, index, after, complete=complete)

    def edit_program(
        self,
        node: gs.Node,
        index: int,
        wanted: Sequence[int],
        *,
        complete: Callable[[Sequence[int]], Sequence[int]] = lambda numbers: numbers,
    ) -> None:
        """Let a computed input become ``wanted``, see ``shape_program.find_edits``.

        A program that depends on more than shapes is left: the check of all shapes finds out.

        Raises:
            SurgeryError: no change of its numbers has this effect.
        """
        target = node.inputs[index]
        if evaluate(target, self._shape_before, opset=self.opset) is None:
            return
        ratios = [
            (new, old)
            for tensor in (node.inputs[0], *node.outputs)
            for new, old in zip(self.new_shape(tensor), self.shape(tensor), strict=True)
            if new != old
        ]
        edits = find_edits(target, wanted, complete, self._shape_after, opset=self.opset, ratios=ratios)
        if edits is None:
            raise SurgeryError(
                f"{node.op} '{node.name}' cannot follow: its size is computed in an unknown way"
            )
        if not edits:
            return
        key = (target.name, tuple(sorted(edits.items())))
        if key not in self._programs:
            self._programs[key] = replace_numbers(target, edits, self._new_name, self._insert)
        node.inputs[index] = self._programs[key]

    def changes(self, node: gs.Node) -> bool:
        """Say whether anything that a node reads or writes loses positions."""
        for tensor in (*node.inputs, *node.outputs):
            found, kept = self._tensors.get(tensor.name), self.kept(tensor)
            if found is not None and kept is not None and len(kept.positions) < len(found.ids):
                return True
        return False

    def _shape_before(self, tensor: gs.Tensor) -> tuple[int, ...] | None:
        return self._shapes.get(tensor.name)

    def _shape_after(self, tensor: gs.Tensor) -> tuple[int, ...] | None:
        return self.new_shape(tensor) if tensor.name in self._shapes else None

    def _new_name(self, base: str) -> str:
        self._n_new += 1
        return f"{base}_hap{self._n_new}"

    def _insert(self, node: gs.Node, after: gs.Node) -> None:
        place = next(i for i, other in enumerate(self._graph.nodes) if other is after)
        self._graph.nodes.insert(place + 1, node)


def kept_positions(elements: NDArray[np.int64], keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Positions of an axis that stay: those of kept elements and those of none (-1)."""
    return (
        np.flatnonzero((elements < 0) | keep[np.maximum(elements, 0)])
        if keep.size
        else np.arange(len(elements))
    )


def shape_after(shape: tuple[int, ...], found: IdAxis | None, keep: NDArray[np.bool_]) -> tuple[int, ...]:
    """The shape of a tensor once the elements that are not kept are gone.

    ``shape`` may be that at another batch size than ``found``: heads share an axis with the batch sometimes.
    """
    if found is None:
        return shape
    n_kept = len(kept_positions(found.ids, keep)) * shape[found.axis] // len(found.ids)
    return (*shape[: found.axis], n_kept, *shape[found.axis + 1 :])


def masked_reads(
    coupling: Coupling, keep: NDArray[np.bool_]
) -> Callable[[Step, int, torch.Tensor], torch.Tensor]:
    """Return an ``on_read`` for the twin that masks removed elements wherever a contraction reads them.

    The original run with it gives what the graph after ``remove_channels`` must give: the oracle of surgery.
    """
    reads = {(read.node, read.index): read for read in coupling.reads}

    def on_read(step: Step, index: int, tensor: torch.Tensor) -> torch.Tensor:
        read = reads.get((step.name, index))
        if read is None:
            return tensor
        mask = np.zeros(len(read.elements), np.float32)
        mask[kept_positions(read.elements, keep)] = 1
        shape = [-1 if axis == read.axis else 1 for axis in range(tensor.ndim)]
        # Not a product with the mask: what is removed may be infinite.
        gone = torch.from_numpy(mask == 0).to(tensor.device).reshape(shape)
        return tensor.masked_fill(gone, 0.0)

    return on_read


def remove_channels(
    graph: gs.Graph, coupling: Coupling, keep: NDArray[np.bool_], *, shapes: Mapping[str, tuple[int, ...]]
) -> gs.Graph:
    """Return a new graph without the elements that are not kept.

    Args:
        graph: the normalised graph that ``coupling`` was found on.
        keep: one flag per element of ``coupling``.
        shapes: the probe shapes that ``coupling`` was found with.

    Raises:
        SurgeryError: the decision leaves an axis empty that must not be.
    """
    if keep.shape != (coupling.n_elements,):
        raise SurgeryError(f"the plan decides {keep.size} elements, the model has {coupling.n_elements}")
    result = graph.copy()
    tensors = result.tensors()
    all_shapes = {**{n: tuple(t.shape) for n, t in tensors.items() if isinstance(t, gs.Constant)}, **shapes}
    cut = Cut(result, all_shapes, coupling.tensors, keep)

    # 1. Contractions that read nothing any more become their bias.
    dead = _dead_reads(coupling, keep)
    # 2. Weights.
    slices: dict[str, list[tuple[int, NDArray[np.int64]]]] = {}
    for weight in coupling.weights:
        positions = kept_positions(weight.elements, keep)
        if len(positions) < len(weight.elements):
            slices.setdefault(weight.initializer, []).append((weight.axis, positions))
    for name, cuts in slices.items():
        constant = tensors[name]
        values = constant.values
        for axis, positions in cuts:
            values = np.take(values, positions, axis=axis)
        constant.values = np.ascontiguousarray(values)
    # 3. Literals.
    for node in list(result.nodes):
        edit = find_edit(node.op, domain=node.domain or "")
        if edit is not None and cut.changes(node):
            edit(node, cut)
    if dead:
        inside = {name for node in result.nodes for name in captured_names(node, tensors)}
        for node in [node for node in result.nodes if node.name in dead]:
            _replace_by_bias(result, node, all_shapes, inside)
        _fold_constants(result, inside)
    result = result.cleanup(remove_unused_graph_inputs=False)
    _check_cut(graph, result, cut)
    return result


def _check_cut(before: gs.Graph, after: gs.Graph, cut: Cut) -> None:
    """Refuse a decision that leaves an axis empty, or a constant where a whole tensor is needed."""
    old = before.tensors()
    for name, tensor in after.tensors().items():
        if (
            isinstance(tensor, gs.Constant)
            and not tensor.values.size
            and (name not in old or not isinstance(old[name], gs.Constant) or old[name].values.size)
        ):
            raise SurgeryError(f"nothing is left of '{name}', which is still needed")
    for node in after.nodes:
        if not any(tensor.name.endswith(CONSTANT_SUFFIX) for tensor in node.inputs):
            continue
        shapes = [
            tuple(tensor.shape) if isinstance(tensor, gs.Constant) else cut.new_shape(tensor)
            for tensor in node.inputs
            if tensor.name
        ]
        broadcasts = is_elementwise(node.op, domain=node.domain or "")
        if not broadcasts or np.broadcast_shapes(*shapes) != cut.new_shape(node.outputs[0]):
            raise SurgeryError(
                f"{node.op} '{node.name}' reads a branch that is gone, and cannot do with a constant"
            )
    lost = {tensor.name for tensor in before.outputs if tensor.inputs} - {
        tensor.name for tensor in after.outputs if tensor.inputs
    }
    if lost:
        raise SurgeryError(f"nothing is left of what computes the output '{min(lost)}'")


def _dead_reads(coupling: Coupling, keep: NDArray[np.bool_]) -> set[str]:
    return {read.node for read in coupling.reads if not len(kept_positions(read.elements, keep))}


def _replace_by_bias(
    graph: gs.Graph, node: gs.Node, shapes: Mapping[str, tuple[int, ...]], inside: set[str]
) -> None:
    """Replace a contraction without inputs by its bias (or zeros), one number per channel.

    ``inside`` names the tensors that graphs inside of nodes read: those must stay.
    """
    out = node.outputs[0]
    if out.name in inside:
        raise SurgeryError(f"{node.op} '{node.name}' cannot lose all its inputs: a subgraph reads its output")
    rule = find_bias(node.op, domain=node.domain or "")
    values = rule(node, len(shapes[out.name])) if rule is not None else None
    if values is None:
        raise SurgeryError(f"{node.op} '{node.name}' cannot lose all its inputs: its bias is computed")
    _rewire(out, gs.Constant(out.name + CONSTANT_SUFFIX, np.ascontiguousarray(values)))
    node.outputs.clear()


def _rewire(old: gs.Tensor, new: gs.Tensor) -> None:
    for consumer in list(old.outputs):
        for index, tensor in enumerate(consumer.inputs):
            if tensor is old:
                consumer.inputs[index] = new


def _fold_constants(graph: gs.Graph, inside: set[str]) -> None:
    """Evaluate the normalisations and activations that read nothing but constants since a branch is gone."""
    for node in graph.nodes:
        inputs = [tensor for tensor in node.inputs if tensor.name]
        if any(tensor.name in inside for tensor in node.outputs):
            continue
        if not node.outputs or not any(tensor.name.endswith(CONSTANT_SUFFIX) for tensor in inputs):
            continue
        domain = node.domain or ""
        if not all(isinstance(tensor, gs.Constant) for tensor in inputs):
            continue
        if not (is_elementwise(node.op, domain=domain) or keeps_constant(node.op, domain=domain)):
            continue
        unused = gs.Variable("hap_unused", np.float32, (1,))  # a twin wants an input
        single = gs.Graph(nodes=[node], inputs=[unused], outputs=list(node.outputs), opset=graph.opset)
        with torch.no_grad():
            found = build_twin(single)({unused.name: torch.zeros(1)})
        values = {name: value.detach().numpy() for name, value in found.items()}  # Identity gives a parameter
        for output in list(node.outputs):
            dtype = output.dtype or np.float32
            _rewire(output, gs.Constant(output.name + CONSTANT_SUFFIX, values[output.name].astype(dtype)))
        node.outputs.clear()


def discard(graph: gs.Graph) -> None:
    """Let go of the weights of a graph that is not needed any more, such as a trial cut.

    Nodes and tensors refer to each other, so it would live on until Python looks for circles.
    """
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            tensor.values = _NOTHING


def with_weights(graph: gs.Graph, weights: Mapping[str, np.ndarray]) -> gs.Graph:
    """Return a new graph with other values for some initializers, in the types that they had.

    Raises:
        SurgeryError: an initializer is not there, or has another shape.
    """
    if not weights:
        return graph
    result = graph.copy()
    tensors = result.tensors()
    for name, values in weights.items():
        constant = tensors.get(name)
        if not isinstance(constant, gs.Constant) or tuple(constant.shape) != values.shape:
            raise SurgeryError(f"'{name}' {list(values.shape)} is not an initializer of the compressed graph")
        constant.values = np.ascontiguousarray(values.astype(constant.values.dtype, copy=False))
    return result
