"""Kronecker curvature: what a layer loses when input channels go and the rest is refitted.

For a contraction y = W x the second-order loss of changing W by dW is 1/2 tr(G dW A dW^T), with
A = E[x x^T] over input rows and G = E[sum of g g^T over positions] over output gradients g. Without labels
the loss is half the squared distance of the model's outputs to those of the original, whose Hessian is the
Gauss-Newton matrix: one backward pass per batch with an independent random output direction per sample
gives unbiased gradients g (the covariance of J^T v is J^T J for v ~ N(0, I)).

The order of removal is Optimal Brain Surgeon on blocks: remove next the element that costs least *after the
other inputs have taken over*, 1/2 tr(G W_e ([A^-1]_ee)^-1 W_e^T) summed over all contractions that read it;
then update W and A^-1 (Hassibi and Stork 1993, as used for channels by K-FAC pruning).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray
from torch import Tensor

from hap_onnx.coupling.channels import ChannelGroup, Coupling, Read
from hap_onnx.data.calibration import Subset
from hap_onnx.distributed import ALONE, Team
from hap_onnx.errors import CalibrationError, ModelError
from hap_onnx.events import OnEvent, ignore_event, track
from hap_onnx.ops.linear import LinearForm, linear_form
from hap_onnx.sensitivity.semidefinite import add_gram, mirror_gram
from hap_onnx.twin import Step, Twin, channels_last, probe_shapes

MAX_FEATURES = 6000
"""Above this many inputs only the diagonal of A is kept (8 bytes x features^2 is the cost of all of it)."""
MIN_ROWS = 32_768
ACTIVATION_NUMBERS = 2**23
"""Of one tensor, of all samples that run at once."""


@dataclass(frozen=True)
class LayerCurvature:
    """Statistics of one contraction; ``read`` says which channels it reads, None if none that can go.

    ``inputs`` is A, float64 [g, F + 1, F + 1] with a constant 1 as last input, or [g, F + 1] where only the
    diagonal is kept; ``gradients`` is G, float64 [g, O, O].
    """

    node: str
    form: LinearForm
    read: Read | None
    inputs: Tensor
    gradients: Tensor


def output_directions(
    outputs: Mapping[str, Tensor], scales: Mapping[str, float], generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Pair each float output that varies with an independent Gaussian direction per sample."""
    pairs = []
    for name, scale in scales.items():
        output = outputs[name]
        noise = torch.randn(output.shape, generator=generator).to(output)
        pairs.append((output, noise * scale))
    return pairs


def output_scales(outputs: Iterable[Mapping[str, NDArray[np.generic]]]) -> dict[str, float]:
    """Scale of each float output: 1 / (std over samples x sqrt(numbers per sample x outputs)).

    Distances are then relative to how much the original's own outputs vary, and several outputs count
    alike. Outputs that do not vary are left out.
    """
    sums: dict[str, list[float | NDArray[np.float64]]] = {}
    for batch in outputs:
        for name, values in batch.items():
            if values.dtype.kind != "f" or not values.ndim:
                continue
            x = values.astype(np.float64)
            entry = sums.setdefault(name, [0, np.zeros(x.shape[1:]), np.zeros(x.shape[1:])])
            entry[0] += len(x)
            entry[1] = entry[1] + x.sum(0)
            entry[2] = entry[2] + (x * x).sum(0)
    scales = {}
    for name, (n, total, squares) in sums.items():
        variance = float(np.mean(np.maximum(squares / n - (total / n) ** 2, 0)))
        if np.isfinite(variance) and variance > 1e-12:
            scales[name] = 1.0 / np.sqrt(variance * max(1, np.size(total)))
    return {name: scale / np.sqrt(len(scales)) for name, scale in scales.items()}


def to_tensors(inputs: Mapping[str, NDArray[np.generic]], twin: Twin) -> dict[str, Tensor]:
    """Turn a batch of arrays into tensors on the twin's device, floats in the type that it computes in.

    Images are laid out as convolutions are fastest; the numbers stay the same.
    """
    tensors = {}
    for name, values in inputs.items():
        whole = np.ascontiguousarray(values).reshape(values.shape)  # the former gives numbers an axis
        tensor = torch.from_numpy(whole).to(twin.device)
        tensors[name] = channels_last(tensor.to(twin.dtype)) if tensor.is_floating_point() else tensor
    return tensors


def n_at_once(twin: Twin, subset: Subset, batch_size: int) -> int:
    """How many samples to run at once: ``batch_size``, or fewer where activations are large.

    Then caches hold more of them, and statistics that need many activations at a time hold fewer. A batch
    that is written into the model and cannot be changed is what it is.
    """
    first = to_tensors(next(iter(subset.batches(1))).inputs, twin)
    try:
        shapes = probe_shapes(twin, first)
    except (CalibrationError, ModelError):  # it takes several samples
        return twin.batch_limit or batch_size
    if twin.batch_limit is not None:
        return twin.batch_limit
    made = [shapes[name] for step in twin.steps for name in step.outputs if name in shapes]
    fitting = ACTIVATION_NUMBERS // max(map(prod, made), default=1)
    return max(1, min(batch_size, 1 << max(fitting, 1).bit_length() - 1))


def collect_curvature(
    graph: gs.Graph,
    twin: Twin,
    coupling: Coupling,
    subset: Subset,
    *,
    scales: Mapping[str, float],
    batch_size: int,
    seed: int,
    layers: Collection[str] = (),
    team: Team = ALONE,
    on_event: OnEvent = ignore_event,
) -> dict[str, LayerCurvature]:
    """Collect A and G of every contraction that reads channels, and of the nodes in ``layers``.

    One forward and backward pass per batch, of ``batch_size`` at most and fewer where activations are large;
    memory does not depend on the number of samples. Contractions without a matrix form (transposed
    convolutions) are left out.

    Raises:
        CalibrationError: the numbers that a contraction meets are not finite, or too large.
    """
    batch_size = n_at_once(twin, subset, batch_size)  # else the hooks below see parts of a batch
    nodes = {node.name: node for node in graph.nodes}
    reads = {(read.node, read.index): read for read in coupling.reads}
    forms: dict[str, tuple[LinearForm, Read | None]] = {}
    for name in dict.fromkeys([*(read.node for read in coupling.reads), *layers]):
        form = linear_form(nodes[name])
        read = None if form is None else reads.get((name, form.data_index))
        if form is not None and (read is not None or name in layers):
            forms[name] = (form, read)
    if not forms:
        return {}
    a_sums: dict[str, Tensor] = {}
    g_sums: dict[str, Tensor] = {}
    n_rows: dict[str, int] = {}
    directions = torch.Generator().manual_seed(seed)
    places = torch.Generator().manual_seed(seed + 1)
    drawn = _Drawn(twin, subset, scales, forms)
    n_batches = -(-subset.n_samples // batch_size)
    dealt = team.deal(subset, batch_size)
    for n_batch, batch in track(dealt, stage="sensitivity", total=n_batches, on_event=on_event):
        if batch is None:
            drawn.skip(n_batch, directions, places)
            continue
        with torch.enable_grad():
            outputs, seen, made = _run_and_capture(twin, to_tensors(batch.inputs, twin), forms)
            drawn.note(n_batch, outputs, made)
            pairs = output_directions(outputs, scales, directions)
            total = sum((output * noise).sum() for output, noise in pairs)
            names = list(made)
            gradients: Sequence[Tensor | None] = [None] * len(names)
            if isinstance(total, Tensor) and total.requires_grad:  # else opaque operators block all of it
                gradients = torch.autograd.grad(total, [made[name] for name in names], allow_unused=True)
        with torch.no_grad():
            for name, gradient in zip(names, gradients, strict=True):
                form, _ = forms[name]
                x, y = seen.pop(name), made.pop(name)
                n_positions = form.n_positions(y)
                wanted = _n_positions(n_positions, _n_features(x, form), subset.n_samples)
                picked = torch.randperm(n_positions, generator=places)[:wanted].sort().values
                rows = form.patches(x, picked)
                rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
                if rows.shape[2] - 1 > MAX_FEATURES:
                    squares = rows.double().square().sum(1)
                    a_sums[name] = a_sums[name] + squares if name in a_sums else squares
                else:
                    a_sums[name] = add_gram(a_sums.get(name), rows)
                n_rows[name] = n_rows.get(name, 0) + rows.shape[1]
                if gradient is not None:
                    rows = form.outputs(gradient, torch.arange(n_positions))
                    g_sums[name] = add_gram(g_sums.get(name), rows)
    a_sums, g_sums = (team.sum_all(sums, device=twin.device) for sums in (a_sums, g_sums))
    n_rows = {name: sum(one.get(name, 0) for one in team.gather(n_rows)) for name in a_sums}
    for name, total in a_sums.items():
        a_sums[name] = (total if total.ndim == 2 else mirror_gram(total)).div_(n_rows[name])
    for total in g_sums.values():
        mirror_gram(total).div_(subset.n_samples)
    _check_finite(a_sums)
    unknown = {name for name, total in g_sums.items() if not torch.isfinite(total).all()}
    return {  # of a layer with gradients beyond all bounds nothing is known
        name: LayerCurvature(name, form, read, a_sums[name], _gradients_of(name, g_sums, twin, nodes, form))
        for name, (form, read) in forms.items()
        if name in a_sums and name not in unknown
    }


class _Drawn:
    """What is drawn for each batch, so that others can draw as much for those that they do not run."""

    def __init__(
        self,
        twin: Twin,
        subset: Subset,
        scales: Mapping[str, float],
        forms: Mapping[str, tuple[LinearForm, Read | None]],
    ) -> None:
        self._twin, self._subset, self._scales, self._forms = twin, subset, scales, forms
        self._by_size: dict[int, tuple[list[torch.Size], list[int]]] = {}

    def note(self, n: int, outputs: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> None:
        """Remember the shapes of output directions, and the numbers of positions, of a batch of ``n``."""
        self._by_size[n] = (
            [outputs[name].shape for name in self._scales],
            [self._forms[name][0].n_positions(y) for name, y in made.items()],
        )

    def skip(self, n: int, directions: torch.Generator, places: torch.Generator) -> None:
        """Draw what a batch of ``n`` samples would take; the first of a size is run to learn that."""
        if n not in self._by_size:
            inputs = to_tensors(next(iter(self._subset.batches(n))).inputs, self._twin)
            with torch.no_grad():
                outputs, _, made = _run_and_capture(self._twin, inputs, self._forms)
            self.note(n, outputs, made)
        shapes, n_positions = self._by_size[n]
        for shape in shapes:
            torch.randn(shape, generator=directions)
        for n_places in n_positions:
            torch.randperm(n_places, generator=places)


def _run_and_capture(
    twin: Twin, inputs: Mapping[str, Tensor], forms: Mapping[str, tuple[LinearForm, Read | None]]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Run the twin; return its outputs, and what the nodes of ``forms`` read and write, by node."""
    seen: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}

    def on_read(step: Step, index: int, tensor: Tensor) -> Tensor:
        if step.name in forms and index == forms[step.name][0].data_index:
            seen[step.name] = tensor.detach()
        return tensor

    def on_write(step: Step, index: int, tensor: Tensor) -> Tensor:
        if step.name in forms and index == 0:
            made[step.name] = tensor
        return tensor

    return twin(inputs, on_read=on_read, on_write=on_write), seen, made


def _gradients_of(
    name: str, found: Mapping[str, Tensor], twin: Twin, nodes: Mapping[str, gs.Node], form: LinearForm
) -> Tensor:
    """G of a layer; the identity where an opaque operator blocks the gradient: its output error counts."""
    if name in found:
        return found[name]
    weight = twin.constant(nodes[name].inputs[form.weight_index].name)
    matrix = form.to_matrix(weight)
    return torch.eye(matrix.shape[1], dtype=torch.float64).expand(matrix.shape[0], -1, -1)


def _n_features(x: Tensor, form: LinearForm) -> int:
    return x.shape[form.channel_axis] // form.conv_group * form.n_taps


def _n_positions(n_positions: int, n_features: int, n_samples: int) -> int:
    """Positions per sample so that there are enough rows in all, but not many more."""
    return min(n_positions, max(1, -(-max(MIN_ROWS, 4 * n_features) // n_samples)))


def _check_finite(sums: Mapping[str, Tensor]) -> None:
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise CalibrationError(
                f"what node {name!r} reads is not finite, or so large that its square is not; "
                "check the data, its preprocessing and the model's number range"
            )


# --- one layer as a consumer of elements ---


class Consumer:
    """A contraction that reads elements of one group: the state of greedy removal.

    ``features[e]`` holds the inputs that belong to element e of the group, [n_elements, block]. The weight W
    is kept as W^T, and beside it W^T G, [F + 1, O]: what a block of inputs costs are products of its rows.
    """

    def __init__(
        self, layer: LayerCurvature, weight: Tensor, bias: Tensor | None, conv_group: int, damping: float
    ) -> None:
        matrix = layer.form.to_matrix(weight.detach())[conv_group].double()
        last = bias.detach().double() if bias is not None else matrix.new_zeros(matrix.shape[0])
        self.weight = torch.cat([matrix, last.reshape(-1, 1)], 1)  # [O, F + 1]
        self.inputs, self.gradients = layer.inputs[conv_group], layer.gradients[conv_group]
        self.diagonal = self.inputs.ndim == 1
        diagonal = self.inputs if self.diagonal else self.inputs.diagonal()
        self.noise = float(damping * diagonal.mean())  # what the diagonal of A gains

    def damped(self, keep: Tensor | None = None) -> Tensor:
        """A with its diagonal damped, of all features or those that ``keep`` [F + 1] flags."""
        if self.diagonal:
            return self.inputs + self.noise
        a = self.inputs.clone() if keep is None else self.inputs[keep][:, keep]
        a.diagonal().add_(self.noise)
        return a

    def start(self) -> None:
        """Forget all removals."""
        self._w = self.weight.T.contiguous()
        self._wg = self._w @ self.gradients
        if self.diagonal:
            self._damped = self.damped()
            return
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.damped()))
        self._place = torch.arange(len(self._inverse))  # of each feature in the inverse
        self._gone = torch.zeros(len(self._inverse), dtype=torch.bool)

    def costs(self, features: Tensor) -> Tensor:
        """Loss of removing each element next; features [m, block] -> [m]."""
        if self.diagonal:
            squares = (self._w[features] * self._wg[features]).sum(2)  # [m, block]
            return 0.5 * (squares * self._damped[features]).sum(1)
        features = self._place[features]
        products = self._w[features] @ self._wg[features].mT  # [m, block, block]
        blocks = self._inverse[features[:, :, None], features[:, None, :]]
        return 0.5 * torch.linalg.solve(blocks, products).diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, features: Tensor) -> None:
        """Remove elements [block] and let the remaining inputs take over."""
        if self.diagonal:
            self._w[features] = 0
            self._wg[features] = 0
            return
        features = self._place[features]
        p = self._inverse
        rows = p[features]
        k = torch.linalg.solve(rows[:, features], rows)  # [block, what is left of F + 1]
        for weight in (self._w, self._wg):
            weight.addmm_(k.T, weight[features], alpha=-1)
            weight[features] = 0
        p.addmm_(rows.T, k, alpha=-1)  # in place: it may be hundreds of megabytes
        p[features] = 0
        p[:, features] = 0
        p[features, features] = 1
        self._forget(features)

    def _forget(self, features: Tensor) -> None:
        """Mark places of the inverse as unused; drop them once they are a quarter of it."""
        self._gone[features] = True
        if self._gone.sum() * 4 < len(self._gone):
            return
        left = ~self._gone
        self._inverse = self._inverse[left][:, left]
        self._w, self._wg = self._w[left], self._wg[left]
        new = torch.cumsum(left, 0) - 1
        alive = self._place >= 0
        alive[alive.clone()] = left[self._place[alive]]
        self._place = torch.where(alive, new[self._place.clamp_min(0)], -1)
        self._gone = torch.zeros(len(self._inverse), dtype=torch.bool)

    def solve(self, removed: Tensor) -> Tensor:
        """Weights [O, F + 1] that lose least without the removed features: zero there, refitted elsewhere."""
        keep = torch.ones(self.weight.shape[1], dtype=torch.bool)
        keep[removed] = False
        result = torch.zeros_like(self.weight)
        if self.diagonal:
            result[:, keep] = self.weight[:, keep]
        else:
            factor = torch.linalg.cholesky(self.damped(keep))
            result[:, keep] = torch.cholesky_solve(self._wanted[:, keep].T, factor).T
        return result

    @cached_property
    def _wanted(self) -> Tensor:
        """W times the damped A: what any weight that loses least has at the features that are left."""
        return self.weight @ self.inputs + self.noise * self.weight


@dataclass(frozen=True)
class GroupConsumers:
    """All consumers of one group; ``features[k][e]``: inputs of consumer k that element e feeds."""

    keys: tuple[tuple[str, int], ...]  # (node, conv group)
    consumers: tuple[Consumer, ...]
    features: tuple[Tensor, ...]


def group_consumers(
    group: ChannelGroup,
    graph_nodes: Mapping[str, gs.Node],
    twin: Twin,
    curvature: Mapping[str, LayerCurvature],
    *,
    damping: float = 1e-2,
) -> GroupConsumers:
    """Bring the statistics of all contractions that read a group together."""
    keys, consumers, features = [], [], []
    position_in_group = {int(element): index for index, element in enumerate(group.elements)}
    for name, layer in curvature.items():
        node, form = graph_nodes[name], layer.form
        if layer.read is None:
            continue
        elements = layer.read.elements
        local = np.array([position_in_group.get(int(element), -1) for element in elements])
        if (local < 0).all():
            continue
        weight = twin.constant(node.inputs[form.weight_index].name)
        bias = (
            None if form.bias_index is None else twin.constant(node.inputs[form.bias_index].name).reshape(-1)
        )
        width = len(elements) // form.conv_group
        n_out = form.to_matrix(weight).shape[1]
        for conv_group in range(form.conv_group):
            here = local[conv_group * width : (conv_group + 1) * width]
            owned = np.repeat(here, form.n_taps)
            order = np.argsort(owned, kind="stable")
            order = order[owned[order] >= 0]
            part = None if bias is None else bias[conv_group * n_out : (conv_group + 1) * n_out]
            keys.append((name, conv_group))
            consumers.append(Consumer(layer, weight, part, conv_group, damping))
            features.append(torch.from_numpy(order.reshape(group.size, -1)))
    return GroupConsumers(tuple(keys), tuple(consumers), tuple(features))


def eliminate(parts: GroupConsumers, size: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Remove the elements of a group one by one, the cheapest first.

    Returns the order of removal [size] and the predicted loss after each removal [size + 1] (0 first).
    """
    for consumer in parts.consumers:
        consumer.start()
    alive = torch.arange(size)
    order, loss = [], [0.0]
    # Many elements go in steps of several: the ranking hardly moves within one step.
    while len(alive):
        costs = torch.zeros(len(alive), dtype=torch.float64)
        for consumer, features in zip(parts.consumers, parts.features, strict=True):
            costs += consumer.costs(features[alive])
        n_next = max(1, len(alive) // 64)
        ranked = torch.argsort(costs, stable=True)[:n_next]
        for index in ranked:
            order.append(int(alive[index]))
            loss.append(loss[-1] + max(float(costs[index]), 0.0))
        for consumer, features in zip(parts.consumers, parts.features, strict=True):
            consumer.remove(features[alive[ranked]].reshape(-1))
        keep = torch.ones(len(alive), dtype=torch.bool)
        keep[ranked] = False
        alive = alive[keep]
    return np.array(order, np.int64), np.array(loss)


def refitted_weights(
    parts: GroupConsumers,
    removed: Sequence[int] | NDArray[np.int64],
    graph_nodes: Mapping[str, gs.Node],
    twin: Twin,
    curvature: Mapping[str, LayerCurvature],
) -> dict[tuple[str, int], Tensor]:
    """Weights and biases, {(node, input index): tensor}, that take over when elements of a group go."""
    solved: dict[str, dict[int, Tensor]] = {}
    index = torch.as_tensor(np.asarray(removed, np.int64))
    for (name, conv_group), consumer, features in zip(
        parts.keys, parts.consumers, parts.features, strict=True
    ):
        solved.setdefault(name, {})[conv_group] = consumer.solve(features[index].reshape(-1))
    result = {}
    for name, by_group in solved.items():
        node, form = graph_nodes[name], curvature[name].form
        weight = twin.constant(node.inputs[form.weight_index].name)
        both = torch.stack([by_group[g] for g in range(form.conv_group)])  # [g, O, F + 1]
        result[name, form.weight_index] = form.to_weight(both[:, :, :-1], tuple(weight.shape)).to(
            weight.dtype
        )
        if form.bias_index is not None:
            bias = twin.constant(node.inputs[form.bias_index].name)
            result[name, form.bias_index] = both[:, :, -1].reshape(bias.shape).to(bias.dtype)
    return result
