"""Refit in closed form: the weights that are left learn to give what the original gave.

Both models run in lock step over all calibration samples, node by node, so that each contraction of the
compressed model is refitted on the inputs that it really gets, errors of the layers before included, and
the layers after it see its new weights. Per layer the problem is least squares,

    min_W  sum ||W x + b - t||^2  +  ridge * mean(diag sum x x^T) * ||W - W_current||^2,

towards the original output t at the channels that are left. Two things make it stronger than that:

* *Error-correcting*: where the output is only added to something that the compressed model has computed
  already (a residual connection), t is the original's sum less that operand: the layer also makes up for
  the error of the other branch.
* *Aware of what follows*: where the sum goes into a Relu (or a Clip) only, targets beyond its bounds are
  replaced by the prediction as far as that is beyond them too, and the system is solved again with the
  same factor. Each round can only lower the error after the Relu.

No gradients, no labels.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, inf, prod
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray
from torch import Tensor

from hap_onnx.calibration import Subset
from hap_onnx.errors import CalibrationError, SurgeryError
from hap_onnx.events import OnEvent, ignore_event, track
from hap_onnx.ops.elementwise import clip_bounds, is_addition
from hap_onnx.ops.linear import LinearForm, linear_form
from hap_onnx.ops.registry import find_linear, find_macs
from hap_onnx.surgery import CONSTANT_SUFFIX, Kept
from hap_onnx.twin import Step, Twin, build_twin, unfix_batch

_log = logging.getLogger(__name__)

STAGE = "refit"
MAX_ROWS = 65_536
"""Rows per layer: more do not change the solution."""
MAX_NUMBERS = 2**26
"""Numbers in the rows of a layer, unless it needs more to have ``ROWS_PER_FEATURE``."""
ROWS_PER_FEATURE = 4
MAX_FEATURES = 8192
"""Above this the features do not get a Gram matrix; rows are limited and it is made of those."""
CHUNK = 8192
"""Rows that are summed up in float32 before they are added in float64."""
EXACT = 1e-12
"""Squared error, relative to the squared targets, that is float rounding."""

_ORIGINAL, _COMPRESSED, _ROWS = "original", "compressed", "rows"
_Key = tuple[str, str]
_Bounds = tuple[float, float]


def refit(
    original: gs.Graph,
    compressed: gs.Graph,
    kept: Mapping[str, Kept],
    subset: Subset,
    *,
    batch_size: int,
    seed: int,
    ridge: float = 1e-3,
    n_positions: int = 64,
    n_relu_rounds: int = 3,
    work_dir: Path | None = None,
    memory_limit_bytes: int = 2 << 30,
    device: str = "cpu",
    on_event: OnEvent = ignore_event,
) -> dict[str, NDArray[np.float32]]:
    """Refit the contractions of a compressed graph that the compression has reached.

    Weights and biases change only if they are initializers with a single reader. Contractions without a
    matrix form get a new bias only, and so does what is left of a removed branch, its constant.

    Args:
        original: the normalised graph before the compression.
        compressed: the graph after it; its nodes and tensors have the names of the original's.
        kept: what is left of the channel axis of the original's tensors; tensors not named are whole.
        ridge: pull towards the current weights, relative to the mean diagonal of the Gram matrix.
        n_positions: output positions per sample that are taken at random (more where samples are few).
        n_relu_rounds: how often the targets below a Relu follow the prediction; 0 for plain least squares.
        work_dir: where activations go that do not fit ``memory_limit_bytes``; default: the system's
            temporary folder.

    Returns:
        The new values of changed initializers of ``compressed``, by name, in float32. Neither graph changes.

    Raises:
        SurgeryError: ``kept`` does not describe how the two graphs differ.
        CalibrationError: there are too few samples, or the disk is too full for what does not fit in memory.
    """
    if work_dir is not None:
        work_dir.mkdir(parents=True, exist_ok=True)
    options = _Options(ridge=ridge, n_positions=n_positions, n_relu_rounds=n_relu_rounds, seed=seed)
    with (
        torch.no_grad(),
        tempfile.TemporaryDirectory(
            prefix="hap-onnx-refit-", dir=work_dir, ignore_cleanup_errors=True
        ) as folder,
    ):
        store = _Store(Path(folder), memory_limit_bytes)
        try:
            pair = _make_pair(original, compressed, kept, store, device)
            tasks = _schedule(pair)
            if not tasks:
                return {}
            pair.n_batches = _read_inputs(pair, original, subset, batch_size)
            changed: set[str] = set()
            for index, task in enumerate(
                track(tasks, stage=STAGE, total=len(tasks), on_event=on_event),
            ):
                changed |= _run_task(pair, task, index, options)
            return {
                name: np.array(pair.parameters[name].cpu().numpy(), np.float32) for name in sorted(changed)
            }
        finally:
            store.close()


# --- activations in memory and on disk ---


class _Store:
    """Lists of per-batch tensors by key; what exceeds the limit lies in memory-mapped files.

    Memory is counted by storage, so views cost nothing. A storage goes to disk as it is, strides and all:
    what is computed from it does not depend on where it lies.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit = folder, limit_bytes
        self._lists: dict[_Key, list[Tensor]] = {}
        self._devices: dict[_Key, torch.device] = {}
        self._users: dict[int, int] = {}  # by address of the storage
        self._sizes: dict[int, int] = {}  # of storages in memory
        self._files: dict[int, Path] = {}
        self.n_bytes = 0
        self.n_files = 0

    def __contains__(self, key: _Key) -> bool:
        return key in self._lists

    def append(self, key: _Key, tensor: Tensor) -> None:
        """Add the next batch."""
        if isinstance(tensor, Tensor):
            self._devices[key] = tensor.device
            tensor = self._hold(tensor)
        self._lists.setdefault(key, []).append(tensor)

    def get(self, key: _Key, batch: int) -> Tensor:
        tensor = self._lists[key][batch]
        # What does not fit on a device lies on the host; ONNX sequences are lists.
        return tensor.to(self._devices[key]) if isinstance(tensor, Tensor) else tensor

    def drop(self, key: _Key) -> None:
        """Free all batches, if there are any."""
        for tensor in self._lists.pop(key, []):
            if isinstance(tensor, Tensor):
                self._let_go(tensor)

    def close(self) -> None:
        for key in list(self._lists):
            self.drop(key)

    def _hold(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self._users and size and self.n_bytes + size > self._limit:
            tensor = self._spill(tensor)
            address = tensor.untyped_storage().data_ptr()
        elif address not in self._users:
            self._sizes[address] = size
            self.n_bytes += size
        self._users[address] = self._users.get(address, 0) + 1
        return tensor

    def _let_go(self, tensor: Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        self._users[address] -= 1
        if self._users[address]:
            return
        del self._users[address]
        self.n_bytes -= self._sizes.pop(address, 0)
        file = self._files.pop(address, None)
        if file is not None:
            try:
                file.unlink()
            except OSError:  # some systems keep mapped files; the folder goes at the end
                _log.debug("cannot remove %s yet", file)

    def _spill(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        free = shutil.disk_usage(self._folder).free
        if free < storage.nbytes() + (64 << 20):
            raise CalibrationError(
                f"the refit needs more disk space for activations than is left in {self._folder.parent} "
                f"({free >> 20} MB); give --work-dir on a larger disk, or fewer --max-samples"
            )
        path = self._folder / f"{self.n_files}.bin"
        self.n_files += 1
        file = torch.from_file(str(path), shared=True, size=storage.nbytes(), dtype=torch.uint8)
        file.copy_(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
        mapped = file.untyped_storage()
        self._files[mapped.data_ptr()] = path
        whole = torch.empty(0, dtype=tensor.dtype)
        return whole.set_(mapped, tensor.storage_offset(), tensor.size(), tensor.stride())


# --- the two models ---


@dataclass(frozen=True)
class _Options:
    ridge: float
    n_positions: int
    n_relu_rounds: int
    seed: int


@dataclass
class _Pair:
    """Both twins, and the activations that are alive.

    ``changed`` names the tensors of the compressed model whose values differ from the original's; all
    others are computed once. ``readers`` are those of the compressed model's tensors, None for the caller.
    """

    original: Twin
    compressed: Twin
    original_nodes: Mapping[str, gs.Node]
    nodes: Mapping[str, gs.Node]
    kept: Mapping[str, Kept]
    store: _Store
    changed: set[str] = field(default_factory=set)
    readers: dict[str, list[tuple[Step, int] | None]] = field(default_factory=dict)
    n_batches: int = 0

    def __post_init__(self) -> None:
        self.parameters = self.compressed.parameter_of
        self.original_parameters = self.original.parameter_of
        self.original_steps = {step.name: step for step in self.original.steps}
        self.original_outputs = {name for step in self.original.steps for name in step.outputs if name}

    def key(self, name: str) -> _Key:
        """Where the values of a tensor of the compressed model are."""
        return (_COMPRESSED if name in self.changed else _ORIGINAL, name)

    def owned(self, name: str) -> bool:
        """Say whether a tensor is a float initializer that one node reads, once."""
        readers = self.readers.get(name, [])
        return name in self.parameters and len(readers) == 1 and readers[0] is not None

    def has_original(self, name: str) -> bool:
        return (_ORIGINAL, name) in self.store or name in self.original_parameters

    def has(self, name: str) -> bool:
        return name in self.parameters or self.key(name) in self.store

    def original_value(self, name: str, batch: int) -> Tensor:
        key = (_ORIGINAL, name)
        return self.store.get(key, batch) if key in self.store else self.original_parameters[name]

    def value(self, name: str, batch: int) -> Tensor:
        """Return an activation or float initializer of the compressed model."""
        return self.parameters[name] if name in self.parameters else self.store.get(self.key(name), batch)

    def run(self, twin: Twin, step: Step, batch: int) -> tuple[Tensor, ...]:
        """Run one step of either twin."""
        names = dict.fromkeys(name for name in step.inputs if name)
        keys = {name: (_ORIGINAL, name) if twin is self.original else self.key(name) for name in names}
        values = {name: self.store.get(key, batch) for name, key in keys.items() if key in self.store}
        return twin.run_step(step, values)


def _make_pair(
    original: gs.Graph, compressed: gs.Graph, kept: Mapping[str, Kept], store: _Store, device: str
) -> _Pair:
    pair = _Pair(
        original=build_twin(original, device=device),
        compressed=build_twin(compressed, device=device),
        original_nodes={node.name: node for node in original.nodes},
        nodes={node.name: node for node in compressed.nodes},
        kept=kept,
        store=store,
    )
    for step in pair.compressed.steps:
        for index, name in enumerate(step.inputs):
            pair.readers.setdefault(name, []).append((step, index))
    for name in pair.compressed.output_names:
        pair.readers.setdefault(name, []).append(None)
    for _, step in _order_steps(pair):
        if not _is_same(pair, step) or _can_correct(pair, step):
            pair.changed.update(name for name in step.outputs if name)
    return pair


def _order_steps(pair: _Pair) -> list[tuple[int, Step]]:
    """Sort the compressed model's steps as the original's, each with the position that it follows there."""
    position = {step.name: index for index, step in enumerate(pair.original.steps)}
    due: dict[str, int] = {}
    found: list[tuple[int, Step]] = []
    for step in pair.compressed.steps:
        when = max([position.get(step.name, 0), *(due.get(name, 0) for name in step.inputs)])
        due.update(dict.fromkeys(step.outputs, when))
        found.append((when, step))
    return sorted(found, key=lambda entry: entry[0])


def _can_correct(pair: _Pair, step: Step) -> bool:
    """Say whether a contraction that is as before is only added to something that has changed already."""
    if find_linear(step.op_type, domain=step.domain) is None:
        return False
    name = step.outputs[0]
    while True:
        readers = pair.readers.get(name, [])
        if len(readers) != 1 or readers[0] is None or not _is_addition(readers[0][0]):
            return False
        addition, index = readers[0]
        others = addition.inputs[:index] + addition.inputs[index + 1 :]
        if any(other in pair.changed or other.endswith(CONSTANT_SUFFIX) for other in others):
            return True
        name = addition.outputs[0]


def _is_same(pair: _Pair, step: Step) -> bool:
    """Say whether a step computes what it did in the original."""
    before = pair.original_steps.get(step.name)
    return (
        before is not None
        and (step.op_type, step.inputs, step.outputs) == (before.op_type, before.inputs, before.outputs)
        and not any(name in pair.changed for name in step.inputs)
        and all(_same_constant(pair, name) for name in step.inputs if name)
        and _same_attributes(pair.original_nodes[step.name].attrs, pair.nodes[step.name].attrs)
    )


def _same_constant(pair: _Pair, name: str) -> bool:
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


def _read_inputs(pair: _Pair, graph: gs.Graph, subset: Subset, batch_size: int) -> int:
    """Put the model's inputs into the store; returns the number of batches.

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
    n_batches = 0
    for batch in subset.batches(batch_size):
        for name in pair.original.input_names:
            pair.store.append((_ORIGINAL, name), _to_tensor(batch.inputs[name], pair.original))
        n_batches += 1
    return n_batches


def _to_tensor(values: NDArray[np.generic], twin: Twin) -> Tensor:
    tensor = torch.tensor(np.ascontiguousarray(values))
    return tensor.to(device=twin.device, dtype=twin.dtype) if tensor.is_floating_point() else tensor


# --- the order of things ---


@dataclass(frozen=True)
class _WeightFit:
    """A contraction whose weight is refitted, with its bias (if it has one of its own).

    ``fixed_bias`` is one that others read too.
    """

    form: LinearForm
    data: str
    weight: str
    bias: str | None
    fixed_bias: str | None


@dataclass(frozen=True)
class _OffsetFit:
    """Something that is added to the output of a step, times ``scale``, along ``axis`` (None: as it is)."""

    initializer: str
    axis: int | None
    scale: float


_Fit = _WeightFit | _OffsetFit


@dataclass(frozen=True)
class _Task:
    """One step of one of the twins; ``release`` names what nothing needs after it."""

    twin: Twin
    step: Step
    fit: _Fit | None
    release: tuple[_Key, ...]


def _schedule(pair: _Pair) -> list[_Task]:
    """Let each changed step of the compressed model follow its namesake of the original, and plan its fit.

    It ends with the last fit.
    """
    changed: list[list[Step]] = [[] for _ in pair.original.steps]
    for when, step in _order_steps(pair):
        if any(name in pair.changed for name in step.outputs):
            changed[when].append(step)
    order: list[tuple[Twin, Step, _Fit | None]] = []
    end = 0
    for step, followers in zip(pair.original.steps, changed, strict=True):
        order.append((pair.original, step, None))
        for follower in followers:
            fit = _plan_fit(pair, follower)
            order.append((pair.compressed, follower, fit))
            end = len(order) if fit is not None else end
    last: dict[_Key, int] = {}
    for index, (twin, step, _) in enumerate(order):
        names = [name for name in (*step.inputs, *step.outputs) if name]
        last.update({(_ORIGINAL, name) if twin is pair.original else pair.key(name): index for name in names})
        last.update({(_ORIGINAL, name): index for name in step.outputs if name})  # may be its target
    release: list[list[_Key]] = [[] for _ in order]
    for key, index in last.items():
        release[index].append(key)
    return [_Task(*entry, tuple(keys)) for entry, keys in zip(order[:end], release, strict=False)]


def _plan_fit(pair: _Pair, step: Step) -> _Fit | None:
    """Say what of a changed step can be refitted."""
    node = pair.nodes[step.name]
    if step.outputs[0] not in pair.original_outputs:
        return None  # there is nothing that it should be
    for name in step.inputs:
        # What is left of a removed branch, where it is added to the others.
        if name.endswith(CONSTANT_SUFFIX) and _is_addition(step) and pair.owned(name):
            return _OffsetFit(name, None, 1.0)
    form = linear_form(node)
    third = step.inputs[2] if len(step.inputs) > 2 else ""
    if form is not None:
        weight = step.inputs[form.weight_index]
        if not pair.owned(weight) or (third and form.bias_index is None):
            return None
        owned = bool(third) and pair.owned(third)
        return _WeightFit(
            form=form,
            data=step.inputs[form.data_index],
            weight=weight,
            bias=third if owned else None,
            fixed_bias=third if third and not owned else None,
        )
    contraction = find_macs(node.op, domain=node.domain or "") is not None
    if contraction and third and pair.owned(third) and pair.parameters[third].ndim == 1:
        return _OffsetFit(third, 1, float(node.attrs.get("beta", 1.0)))
    return None


def _run_task(pair: _Pair, task: _Task, index: int, options: _Options) -> set[str]:
    """Refit a step and run it; returns the names of the changed initializers."""
    side = _ORIGINAL if task.twin is pair.original else _COMPRESSED
    new: dict[str, Tensor] = {}
    if isinstance(task.fit, _WeightFit):
        new = _fit_weights(pair, task.step, task.fit, index, options)
    elif task.fit is not None:
        new = _fit_offset(pair, task.step, task.fit)
    for name, values in new.items():
        pair.parameters[name].copy_(values)
    for batch in range(pair.n_batches):
        for name, tensor in zip(task.step.outputs, pair.run(task.twin, task.step, batch), strict=False):
            if name:
                pair.store.append((side, name), tensor)
    for key in task.release:
        pair.store.drop(key)
    return set(new)


# --- targets ---


@dataclass(frozen=True)
class _Link:
    """An addition that is the only reader of what is fitted, with the other operands in both models."""

    output: str
    originals: tuple[str, ...]
    operands: tuple[str, ...]


def _is_addition(step: Step) -> bool:
    return is_addition(step.op_type, domain=step.domain)


def _find_links(pair: _Pair, name: str) -> list[_Link]:
    """Follow a tensor through additions as long as their other operands are there in both models."""
    links: list[_Link] = []
    shape = pair.original_value(name, 0).shape
    while True:
        readers = pair.readers.get(name, [])
        if len(readers) != 1 or readers[0] is None:
            return links
        step, index = readers[0]
        before = pair.original_steps.get(step.name)
        if (
            not _is_addition(step)
            or before is None
            or before.op_type != step.op_type
            or len(before.inputs) != len(step.inputs)
            or (before.inputs[index], before.outputs) != (name, step.outputs)
        ):
            return links
        originals, operands = (names[:index] + names[index + 1 :] for names in (before.inputs, step.inputs))
        if not all(map(pair.has_original, originals)) or not all(map(pair.has, operands)):
            return links
        shapes = [pair.original_value(original, 0).shape for original in originals]
        if torch.broadcast_shapes(shape, *shapes) != shape:
            return links
        name = step.outputs[0]
        links.append(_Link(name, originals, operands))


def _find_bounds(pair: _Pair, name: str) -> _Bounds | None:
    """Return the bounds beyond which the values of a tensor do not matter, None if they always do."""
    readers = pair.readers.get(name, [])
    found = {None if reader is None else clip_bounds(pair.nodes[reader[0].name]) for reader in readers}
    bounds = found.pop() if len(found) == 1 else None
    return bounds if bounds != (-inf, inf) else None


def _target(
    pair: _Pair, name: str, links: Sequence[_Link], batch: int, *, without: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the original's sum at the channels that are left, and what the compressed model adds to it.

    ``without`` is an operand that is fitted itself.
    """
    total = pair.original_value(name, batch)
    added: Tensor | None = None
    for link in links:
        for original in link.originals:
            total = total + pair.original_value(original, batch)
        for operand in link.operands:
            if operand != without:
                value = pair.value(operand, batch)
                added = value if added is None else added + value
    left = pair.kept.get(name)
    if left is not None and len(left.positions) != total.shape[left.axis]:
        positions = torch.from_numpy(np.array(left.positions)).to(total.device)
        total = total.index_select(left.axis, positions)
    try:
        return total, None if added is None else added.expand_as(total)
    except RuntimeError as error:
        raise SurgeryError(
            f"refit: what is added to '{name}' has shape {list(added.shape) if added is not None else []}, "
            f"the original's channels that are left give {list(total.shape)}"
        ) from error


# --- least squares ---


@dataclass(frozen=True)
class _Rows:
    """The rows of one layer, in the store: x [g, n, F] (a column of ones last, if there is a bias),
    the wanted sum [g, n, O] and what others add to it, ``added``."""

    store: _Store
    n_batches: int
    has_added: bool

    def parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        for batch in range(self.n_batches):
            names = ("x", "wanted", "added") if self.has_added else ("x", "wanted")
            chunks = [self.store.get((_ROWS, name), batch).split(CHUNK, dim=1) for name in names]
            for part in zip(*chunks, strict=True):
                yield part[0], part[1], part[2] if self.has_added else None

    def residuals(self, weights: Tensor, bounds: _Bounds | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x, what is missing from the prediction) for weights [g, F, O]."""
        for x, wanted, added in self.parts():
            predicted = x @ weights if added is None else x @ weights + added
            if bounds is not None:
                low, high = bounds
                wanted = torch.where(wanted <= low, predicted.clamp(max=low), wanted)
                wanted = torch.where(wanted >= high, predicted.clamp(min=high), wanted)
            yield x, wanted - predicted

    def error(self, weights: Tensor, bounds: _Bounds | None) -> float:
        parts = [r.square().sum(dtype=torch.float64) for _, r in self.residuals(weights, bounds)]
        return float(torch.stack(parts).sum())

    def energy(self) -> float:
        parts = [wanted.square().sum(dtype=torch.float64) for _, wanted, _ in self.parts()]
        return float(torch.stack(parts).sum())

    def drop(self) -> None:
        for name in ("x", "wanted", "added"):
            self.store.drop((_ROWS, name))


def _fit_weights(
    pair: _Pair, step: Step, fit: _WeightFit, index: int, options: _Options
) -> dict[str, Tensor]:
    """Solve one layer; returns its new initializers, nothing if there is nothing to gain."""
    name, form = step.outputs[0], fit.form
    links = _find_links(pair, name)
    matrix = form.to_matrix(pair.parameters[fit.weight])  # [g, O, F]
    bias = fit.bias
    if bias is None and fit.fixed_bias is None and links:
        bias = _added_bias(pair, links[0], form, n_outputs=matrix.shape[0] * matrix.shape[1], name=name)
    bounds = _find_bounds(pair, links[-1].output if links else name) if options.n_relu_rounds else None
    current = matrix.mT
    if bias is not None:
        column = pair.parameters[bias].reshape(matrix.shape[0], 1, -1)
        current = torch.cat([current, column], 1)  # [g, F, O]
    rows = _collect_rows(pair, step, fit, links, index, options, n_features=current.shape[1], bias=bias)
    try:
        solved = _solve(rows, current, bounds, options) if rows is not None else None
    finally:
        if rows is not None:
            rows.drop()
    if solved is None:
        return {}
    shape = tuple(pair.parameters[fit.weight].shape)
    new = {fit.weight: form.to_weight(solved[:, : matrix.shape[2]].mT.contiguous(), shape)}
    if bias is not None:
        new[bias] = solved[:, -1].reshape(pair.parameters[bias].shape)
    return new


def _added_bias(pair: _Pair, link: _Link, form: LinearForm, *, n_outputs: int, name: str) -> str | None:
    """Return the one operand of the first addition that is the bias of a contraction without one."""
    ndim = pair.original_value(name, 0).ndim
    for operand in link.operands:
        if not pair.owned(operand):
            continue
        shape = tuple(pair.parameters[operand].shape)
        whole = [1] * (ndim - len(shape)) + list(shape)
        if prod(shape) == n_outputs and whole[form.channel_axis] == n_outputs:
            return operand
    return None


def _n_rows(n_samples: int, n_features: int, conv_group: int, options: _Options) -> tuple[int, int]:
    """Return (positions per sample, samples) to take."""
    most = min(MAX_ROWS, MAX_NUMBERS // (conv_group * n_features))
    if n_features <= MAX_FEATURES:
        most = max(most, ROWS_PER_FEATURE * n_features)
    most = max(most, 1)
    wanted = max(options.n_positions, ceil(ROWS_PER_FEATURE * n_features / n_samples))
    return max(min(wanted, most // n_samples), 1), min(n_samples, most)


def _collect_rows(
    pair: _Pair,
    step: Step,
    fit: _WeightFit,
    links: Sequence[_Link],
    index: int,
    options: _Options,
    *,
    n_features: int,
    bias: str | None,
) -> _Rows | None:
    """Put the rows of a layer into the store; None if its data has no samples."""
    name, form, store = step.outputs[0], fit.form, pair.store
    layer_seed = np.random.SeedSequence([options.seed, index]).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(layer_seed))
    n_channels = pair.parameters[fit.weight].shape[form.out_axis]
    sizes = [pair.original_value(name, batch).shape[0] for batch in range(pair.n_batches)]
    if pair.value(fit.data, 0).ndim < 2 or not sum(sizes):
        return None
    per_sample, n_samples = _n_rows(sum(sizes), n_features, form.conv_group, options)
    has_added = False
    for batch, size in enumerate(sizes):
        x = pair.value(fit.data, batch)
        wanted, added = _target(pair, name, links, batch, without=bias)
        if n_samples < sum(sizes):
            n = ceil(size * n_samples / sum(sizes))
            chosen = torch.randperm(size, generator=generator)[:n].sort()[0].to(x.device)
            x, wanted, added = x[chosen], wanted[chosen], None if added is None else added[chosen]
        if fit.fixed_bias is not None:
            vector = pair.parameters[fit.fixed_bias].reshape(-1, *[1] * (wanted.ndim - 2))
            added = vector.expand_as(wanted) if added is None else added + vector
        n = form.n_positions(wanted)
        positions = torch.arange(n)
        if per_sample < n:
            positions = torch.randperm(n, generator=generator)[:per_sample].sort()[0]
        patches = form.patches(x, positions)
        if bias is not None:
            patches = torch.cat([patches, patches.new_ones(*patches.shape[:2], 1)], 2)
        rows = form.outputs(wanted, positions)
        if patches.shape[:2] != rows.shape[:2] or rows.shape[0] * rows.shape[2] != n_channels:
            raise SurgeryError(
                f"refit: {step.op_type} '{step.name}' computes {n_channels} channels of '{name}' from "
                f"{list(x.shape)}, but what is left of the original's is {list(wanted.shape)}"
            )
        store.append((_ROWS, "x"), patches)
        store.append((_ROWS, "wanted"), rows)
        if added is not None:
            has_added = True
            store.append((_ROWS, "added"), form.outputs(added, positions))
    return _Rows(store, len(sizes), has_added)


def _solve(rows: _Rows, current: Tensor, bounds: _Bounds | None, options: _Options) -> Tensor | None:
    """Return better weights [g, F, O] than ``current``, None if there are none."""
    before = rows.error(current, bounds)
    if not before > EXACT * rows.energy():
        return None
    n_rows = sum(x.shape[1] for x, _, _ in rows.parts())
    system = (_Dual if n_rows < current.shape[1] else _Primal).build(rows, options.ridge)
    if system is None:
        return None
    weights = current
    for number in range(1 + (options.n_relu_rounds if bounds is not None else 0)):
        step = system.advance(rows.residuals(weights, bounds if number else None))
        weights = (current.double() + step).to(current.dtype)
    after = rows.error(weights, bounds)
    _log.debug("refit: squared error %.4g -> %.4g on %d rows", before, after, n_rows)
    return weights if bool(torch.isfinite(weights).all()) and after < before else None


@dataclass
class _Primal:
    """The normal equations over features, for the difference to the current weights.

    Each round adds the solution for what is still missing; without a change of targets there is nothing
    left for a second round but rounding.
    """

    factor: Tensor  # [g, F, F]
    damping: Tensor  # [g, 1, 1]
    state: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    @classmethod
    def build(cls, rows: _Rows, ridge: float) -> _Primal | None:
        gram: Tensor | None = None
        for x, _, _ in rows.parts():
            if gram is None:
                gram = x.new_zeros(x.shape[0], x.shape[2], x.shape[2], dtype=torch.float64)
            gram += x.mT @ x
        assert gram is not None
        factored = _factorise(gram, ridge, gram.shape[1])
        return None if factored is None else cls(*factored)

    def advance(self, residuals: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the difference to the current weights [g, F, O] after one more round."""
        gradient = -self.damping * self.state
        for x, missing in residuals:
            gradient = gradient + (x.mT @ missing).double()
        self.state = self.state + torch.cholesky_solve(gradient, self.factor)
        return self.state


@dataclass
class _Dual:
    """The same problem over rows, where they are fewer than features."""

    factor: Tensor  # [g, n, n]
    damping: Tensor
    x: Tensor  # [g, n, F]
    state: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    @classmethod
    def build(cls, rows: _Rows, ridge: float) -> _Dual | None:
        x = torch.cat([part for part, _, _ in rows.parts()], 1)
        gram = x.new_zeros(x.shape[0], x.shape[1], x.shape[1], dtype=torch.float64)
        for part in x.split(CHUNK, dim=2):
            gram += part @ part.mT
        factored = _factorise(gram, ridge, x.shape[2])
        return None if factored is None else cls(*factored, x)

    def advance(self, residuals: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        missing = torch.cat([part for _, part in residuals], 1).double()
        self.state = self.state + torch.cholesky_solve(missing - self.damping * self.state, self.factor)
        return (self.x.mT @ self.state.to(self.x.dtype)).double()


def _factorise(gram: Tensor, ridge: float, n_features: int) -> tuple[Tensor, Tensor] | None:
    """Damp the diagonal in place and factorise; None if the matrix is not even then positive definite."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    scale = (diagonal.sum(1) / n_features).clamp_min(torch.finfo(torch.float64).tiny)
    damping = torch.zeros_like(scale)
    # Sums in float32 leave noise of 1e-7: where inputs depend on each other, a smaller ridge is not enough.
    for more in (ridge, 1e-6, 1e-5, 1e-4):
        if more >= ridge:
            diagonal += (more * scale - damping)[:, None]
            damping = more * scale
            factor, info = torch.linalg.cholesky_ex(gram)
            if not bool(info.any()):
                return factor, damping[:, None, None]
    return None


def _fit_offset(pair: _Pair, step: Step, fit: _OffsetFit) -> dict[str, Tensor]:
    """Move a bias by the mean of what is missing."""
    name = step.outputs[0]
    links = _find_links(pair, name)
    values = pair.parameters[fit.initializer]
    total: Tensor | float = 0.0
    energy, count = 0.0, 0
    shape: list[int] = []
    for batch in range(pair.n_batches):
        wanted, added = _target(pair, name, links, batch)
        output = pair.run(pair.compressed, step, batch)[0]
        if output.shape != wanted.shape:
            raise SurgeryError(
                f"refit: '{name}' has shape {list(output.shape)}, but the original's channels that are left "
                f"give {list(wanted.shape)}"
            )
        missing = wanted - output if added is None else wanted - output - added
        shape = [1] * (missing.ndim - values.ndim) + list(values.shape)
        if fit.axis is not None:
            shape = [values.numel() if axis == fit.axis else 1 for axis in range(missing.ndim)]
        reduced = [axis for axis, size in enumerate(shape) if size == 1]
        total = total + missing.sum(dim=reduced, keepdim=True, dtype=torch.float64)
        energy += float(wanted.square().sum(dtype=torch.float64))
        count += missing.numel() // values.numel()
    if not isinstance(total, Tensor) or list(total.shape) != shape:
        return {}
    mean = total / max(count, 1)
    # A mean lowers the squared error by its own square, once per position.
    gain = count * float(mean.square().sum())
    if not EXACT * energy < gain < inf:
        return {}
    return {fit.initializer: (values.double() + (mean / fit.scale).reshape(values.shape)).to(values.dtype)}
