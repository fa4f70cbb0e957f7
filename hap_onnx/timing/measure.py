"""From a model to the times of its nodes: contractions at several widths, all others as they are.

Each family of contractions (operator, attributes, positions, type) is timed in a small model at a grid of
channel counts, and a bilinear form is fitted. The whole model is timed, too: what a node takes there, with
the fusions and layouts that the runtime finds for it, scales what it took alone, and what no node accounts
for is spread over the nodes that only move data.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from hap_onnx.events import OnEvent, ignore_event, track
from hap_onnx.model.weights import AnyModel, bytes_of, proto_of, weights_of
from hap_onnx.ops.implant import implant_forms
from hap_onnx.planning.align import Blocks, allowed_widths
from hap_onnx.planning.times import ImplantTimes, Ints, NodeTimes
from hap_onnx.prepare import PreparedModel
from hap_onnx.runtime.session import load
from hap_onnx.timing.kernels import SYNCHRONOUS, Kernel, time_kernels, time_run
from hap_onnx.timing.specimen import Specimen, build_model, export, implant_parts, specimen_of
from hap_onnx.timing.table import Floats, LatencyTable, Point, fit_times

_log = logging.getLogger(__name__)

SECONDS = 60.0
"""How long timing of contractions may take in all; whole models are timed for a few seconds more."""
SECONDS_PER_FAMILY = (0.05, 0.3)
"""How long one family is timed at least and at most."""
WHOLE_SECONDS = 2.0
GRID = (0.25, 0.5, 0.75)
"""At which shares of its channels a layer is timed, beside all of them."""
UNITS = (32, 16, 8, 4)
"""Block sizes among which the runtime's is looked for, the largest first."""
MIN_UNIT_CHANNELS = 16
"""Layers that read fewer channels may have kernels of their own, such as the first one."""
MIN_STEP = 4.0
"""Microseconds that a block must cost to be seen: the clock counts whole ones."""
MAX_WEIGHT_BYTES = 2**27
"""Weights that are held at once to time a family."""
COARSE_GRID, COARSE_WEIGHTS = (0.5,), 2**22
"""Shares at which layers with so many weights are timed: they take long, and fit their form well."""
STEP = 0.7
"""Half a block must cost at least so much of a whole one."""
DEFAULT_UNIT = 8
SCALE_BOUNDS = (0.5, 2.0)
"""How much a layer in its model may differ from the layer alone; beyond, the names have misled."""


def measure_times(
    prepared: PreparedModel,
    model: AnyModel,
    feed: Mapping[str, np.ndarray],
    kinds: Mapping[str, Collection[str]],
    table: LatencyTable,
    *,
    only_implants: bool = False,
    on_event: OnEvent = ignore_event,
) -> NodeTimes:
    """Time the nodes of a model, and the implants that its layers may become.

    Args:
        model: ``prepared`` as a file would hold it; ``feed`` is what it is run on.
        kinds: of implants, by node.
        table: what was timed before; it is added to.
        only_implants: whether layers that no implant can replace may go without times of their own.

    Raises:
        ModelError: onnxruntime cannot run the model.
    """
    specimens = _specimens(prepared)
    parts = _implants(prepared, specimens, kinds)
    varying = {node for node, _ in parts} if only_implants else {*kinds, *_nodes_with_channels(prepared)}
    wanted: dict[str, list[Specimen]] = {}
    for specimen in (
        *(specimen for name, specimen in specimens.items() if name in varying),
        *(part for first, second, _ in parts.values() for part in (first, second)),
    ):
        wanted.setdefault(specimen.family, []).append(specimen)
    unit = _find_unit(list(specimens.values()), table)
    fits = _fit_families(table, {name: (s[0], _grid(s, unit)) for name, s in wanted.items()}, on_event)
    alone = {name: _at(fits[s.family], s) for name, s in specimens.items() if name in varying}
    whole, inside = _time_whole(model, feed, prepared.graph, table)
    dense: dict[str, Floats] = {}
    scales: dict[str, float] = {}
    for name, specimen in specimens.items():
        if name in alone:
            scale = float(np.clip(inside[name] / alone[name], *SCALE_BOUNDS)) if name in inside else 1.0
            dense[name], scales[name] = fits[specimen.family] * scale, scale
        elif name in inside:  # nothing of it varies
            dense[name] = np.array([0.0, 0.0, 0.0, inside[name]])
    other = {node.name: inside.get(node.name, 0.0) for node in prepared.graph.nodes if node.name not in dense}
    accounted = sum(_at(dense[name], specimens[name]) for name in dense) + sum(other.values())
    if accounted > whole or not other:
        shrink = whole / max(accounted, 1e-9)
        dense = {name: coefficients * shrink for name, coefficients in dense.items()}
        other = {name: value * shrink for name, value in other.items()}
    else:
        shrink = 1.0
        sizes = {node.name: _output_size(node, prepared) for node in prepared.graph.nodes}
        sizes = {name: size for name, size in sizes.items() if name in other}
        for name, size in sizes.items():
            other[name] += (whole - accounted) * size / max(sum(sizes.values()), 1)
    _log.info(
        "one run takes %.0f microseconds, of which single nodes account for %.0f; blocks of %d channels",
        whole, accounted, unit,
    )  # fmt: skip
    return NodeTimes(
        dense={name: _picoseconds(coefficients) for name, coefficients in dense.items()},
        other={name: round(value * 1e6) for name, value in other.items()},
        implants={
            key: _implant_times(fits, specimens[key[0]], *found, scale=shrink * scales[key[0]])
            for key, found in parts.items()
        },
        unit=unit,
    )


# --- what is to be timed ---


def _specimens(prepared: PreparedModel) -> dict[str, Specimen]:
    found = {}
    for node in prepared.graph.nodes:
        if not node.inputs or not node.outputs:
            continue
        x, y = (prepared.shapes.get(tensor.name) for tensor in (node.inputs[0], node.outputs[0]))
        specimen = specimen_of(node, x, y, opset=prepared.graph.opset) if x and y else None
        if specimen is not None:
            found[node.name] = specimen
    return found


def _nodes_with_channels(prepared: PreparedModel) -> set[str]:
    """Nodes of whose weights some axis loses channels."""
    carrying = {weight.initializer for weight in prepared.coupling.weights}
    return {
        node.name for node in prepared.graph.nodes if any(tensor.name in carrying for tensor in node.inputs)
    }


def _implants(
    prepared: PreparedModel, specimens: Mapping[str, Specimen], kinds: Mapping[str, Collection[str]]
) -> dict[tuple[str, str], tuple[Specimen, Specimen, bool]]:
    nodes = {node.name: node for node in prepared.graph.nodes}
    known: dict[tuple[object, ...], tuple[Specimen, Specimen, bool] | None] = {}
    result: dict[tuple[str, str], tuple[Specimen, Specimen, bool]] = {}
    for name, offered in kinds.items():
        if name not in specimens:
            continue
        specimen = specimens[name]
        for form in implant_forms(nodes[name]):
            if form.kind not in offered:
                continue
            key = (form.kind, specimen.family, specimen.n_in, specimen.n_out)
            if key not in known:
                known[key] = implant_parts(specimen, form)
            parts = known[key]
            if parts is not None:
                result[name, form.kind] = parts
    return result


def _grid(specimens: Sequence[Specimen], unit: int) -> list[Point]:
    """Numbers of channels at which a family is timed: up to the largest in the model, in blocks."""
    first = specimens[0]
    n_in, n_out = (max(size) for size in zip(*((s.n_in, s.n_out) for s in specimens), strict=True))
    if first.is_depthwise:
        return [(1, n) for n in _counts(n_out, unit, GRID)]
    taps = prod(first.constants[first.weight_index]) // (first.n_in * first.n_out)
    grid = COARSE_GRID if taps * n_in * n_out > COARSE_WEIGHTS else GRID
    step = first.conv_group
    outputs = sorted({max(n // step, 1) * step for n in _counts(n_out, unit, grid)})
    return [(i, o) for i in _counts(n_in, unit, grid) for o in outputs]


def _counts(size: int, unit: int, grid: Sequence[float]) -> list[int]:
    """Some of the widths that are offered, and the whole."""
    offered = allowed_widths(size, Blocks(unit))
    if size <= unit:
        return [*offered.tolist(), size]
    wanted = [max(round(size * share / unit), 1) * unit for share in grid]
    return sorted({size, *(n for n in wanted if n < size)})


# --- timing ---


def _time_whole(
    model: AnyModel, feed: Mapping[str, np.ndarray], graph: gs.Graph, table: LatencyTable
) -> tuple[float, dict[str, float]]:
    """Microseconds of one run of a model, and of its nodes as far as kernels tell; kept in the table."""
    shapes = {name: array.shape for name, array in sorted(feed.items())}
    digest = hashlib.sha256(repr(shapes).encode())
    digest.update(proto_of(model).SerializeToString(deterministic=True))
    for name, array in sorted(weights_of(model).items()):
        digest.update(name.encode())
        digest.update(bytes_of(array))
    key = digest.hexdigest()[:16]
    if key not in table.models:
        provider, threads = table.machine.provider, table.machine.threads
        session = load(model, [provider], threads=threads, severity=4, label="the model")
        whole = time_run(session, feed, seconds=WHOLE_SECONDS)
        kernels: tuple[Kernel, ...] = ()
        if provider in SYNCHRONOUS:
            kernels = time_kernels(model, feed, provider=provider, threads=threads, seconds=WHOLE_SECONDS)
        table.add_model(key, whole, _by_node(kernels, graph))
    return table.models[key]


def _fit_families(
    table: LatencyTable, grids: Mapping[str, tuple[Specimen, list[Point]]], on_event: OnEvent
) -> dict[str, Floats]:
    """Time what the table lacks, within the time that there is; return microseconds as coefficients [4].

    Only points of this model's grid are fitted: the result must not depend on what else was timed before.
    """
    missing = {family: table.missing(family, points) for family, (_, points) in grids.items()}
    todo = [family for family, points in missing.items() if points]
    start = time.perf_counter()
    work = track(todo, stage="layer times", total=len(todo), on_event=on_event)
    for index, family in enumerate(work):
        left = SECONDS - (time.perf_counter() - start)
        seconds = float(np.clip(left / (len(todo) - index), *SECONDS_PER_FAMILY))
        found = time_points(grids[family][0], missing[family], table, seconds=seconds)
        table.add(family, found)
    return {
        family: fit_times({point: table.times[family][point] for point in points})
        for family, (_, points) in grids.items()
    }


def time_points(
    specimen: Specimen, points: Sequence[Point], table: LatencyTable, *, seconds: float
) -> dict[Point, float]:
    """Time a contraction with other numbers of channels: microseconds by (inputs, outputs)."""
    provider, threads = table.machine.provider, table.machine.threads
    found: dict[Point, float] = {}
    if provider in SYNCHRONOUS:
        for some in _in_parts(specimen, points):
            model, feed = build_model(specimen, some)
            share = seconds * len(some) / len(points)
            kernels = time_kernels(model, feed, provider=provider, threads=threads, seconds=share)
            for kernel in kernels:
                index = _index_of(kernel.name)
                if index is not None:
                    found[some[index]] = found.get(some[index], 0.0) + kernel.microseconds
    left = [point for point in points if point not in found]  # the runtime has given kernels other names
    if left:
        nothing = _time_nothing(provider, threads)
        for point in left:
            taken = _time_alone(specimen, point, provider, threads, seconds / len(points))
            found[point] = max(taken - nothing, 0.0)
    return found


def _in_parts(specimen: Specimen, points: Sequence[Point]) -> list[list[Point]]:
    """Part points so that the weights of each part are not too large to be held at once."""
    itemsize = specimen.dtype.itemsize
    per_pair = itemsize * prod(specimen.constants[specimen.weight_index]) // (specimen.n_in * specimen.n_out)
    parts: list[list[Point]] = []
    n_bytes = 0
    for n_in, n_out in points:
        size = per_pair * n_in * n_out
        if not parts or n_bytes + size > MAX_WEIGHT_BYTES:
            parts.append([])
            n_bytes = 0
        parts[-1].append((n_in, n_out))
        n_bytes += size
    return parts


def _index_of(kernel: str) -> int | None:
    """Which of the nodes p0, p1 ... of a model of our own a kernel computes; None for changes of layout."""
    stem = _plain_name(kernel).split("/")[0]
    number = stem[1:]
    return int(number) if stem[:1] in ("p", "y") and number.isdigit() else None


def _plain_name(kernel: str) -> str:
    """Strip what onnxruntime adds to the name of a node or tensor when it changes layout or type."""
    return kernel.removeprefix("InsertedPrecisionFreeCast_").removesuffix("_nchwc")


def _time_alone(
    specimen: Specimen, point: Point, provider: str, threads: int | None, seconds: float
) -> float:
    """Time a model of one node as a whole."""
    model, feed = build_model(specimen, [point])
    session = load(model, [provider], threads=threads, severity=4, label="a model to time")
    return time_run(session, feed, seconds=seconds)


def _time_nothing(provider: str, threads: int | None) -> float:
    """Time a model that hands one number through: what any run takes."""
    x, y = gs.Variable("x", np.float32, (1,)), gs.Variable("y", np.float32, (1,))
    graph = gs.Graph(nodes=[gs.Node("Identity", "p0", inputs=[x], outputs=[y])], inputs=[x], outputs=[y])
    session = load(export(graph), [provider], threads=threads, severity=4, label="a model to time")
    return time_run(session, {"x": np.zeros(1, np.float32)}, seconds=SECONDS_PER_FAMILY[0])


def _find_unit(specimens: Sequence[Specimen], table: LatencyTable) -> int:
    """Find the block in which the runtime computes output channels, by the steps of the slowest layer.

    The slowest, that is, with as many channels: it has the most positions.
    """
    base = max(UNITS)
    n_in = 2 * base
    wide = [s for s in specimens if s.conv_group == 1 and s.n_in >= MIN_UNIT_CHANNELS]
    if not wide:
        return DEFAULT_UNIT
    slowest = max(wide, key=lambda s: (prod(s.y) // s.n_out, s.family))
    points = [(n_in, base + n) for n in sorted({0, *UNITS, *(unit // 2 for unit in UNITS)})]
    missing = table.missing(slowest.family, points)
    if missing:
        table.add(slowest.family, time_points(slowest, points, table, seconds=SECONDS_PER_FAMILY[1]))
    times = table.times[slowest.family]
    for unit in UNITS:
        half, whole = (times[n_in, base + n] - times[n_in, base] for n in (unit // 2, unit))
        if whole >= MIN_STEP and half >= STEP * whole:
            return unit
    return DEFAULT_UNIT


def _by_node(kernels: Sequence[Kernel], graph: gs.Graph) -> dict[str, float]:
    """Microseconds by node: a kernel is named after a node, or after a tensor that it writes.

    A kernel that computes several nodes counts for the first contraction among them: the one that has the
    kernel's operator and leads to the tensor.
    """
    nodes = {node.name: node for node in graph.nodes}
    writers = {tensor.name: node for node in graph.nodes for tensor in node.outputs}
    found: dict[str, float] = {}
    for kernel in kernels:
        name = _plain_name(kernel.name)
        while name not in nodes and name not in writers and "/" in name:
            name = name.rsplit("/", 1)[0]
        node = nodes.get(name) or writers.get(name)
        if node is None:
            continue
        node = _leading_to(node, kernel.op_type, found)
        found[node.name] = found.get(node.name, 0.0) + kernel.microseconds
    return found


def _leading_to(node: gs.Node, op_type: str, taken: Collection[str]) -> gs.Node:
    """The node of an operator from which a kernel's last node follows directly; else that node itself."""
    current = [node]
    for _ in range(4):
        for candidate in current:
            if candidate.op == op_type and candidate.name not in taken:
                return candidate
        current = [
            tensor.inputs[0]
            for candidate in current
            for tensor in candidate.inputs
            if isinstance(tensor, gs.Variable) and tensor.inputs and len(tensor.outputs) == 1
        ]
    return node


# --- arithmetic ---


def _at(coefficients: Floats, specimen: Specimen) -> float:
    n_in, n_out = specimen.n_in, specimen.n_out
    return float(coefficients @ np.array([n_in * n_out, n_in, n_out, 1.0]))


def _picoseconds(coefficients: Floats) -> Ints:
    return np.round(coefficients * 1e6).astype(np.int64)


def _implant_times(
    fits: Mapping[str, Floats],
    whole: Specimen,
    first: Specimen,
    second: Specimen,
    is_joined: bool,
    *,
    scale: float,
) -> ImplantTimes:
    """What an implant takes; ``scale`` is how its layer differs inside the model from the layer alone."""
    a, b = (fits[part.family] * 1e6 * scale for part in (first, second))
    joined = JOIN_PICOSECONDS * prod(whole.y) / whole.n_out if is_joined else 0.0
    return ImplantTimes(a, b, joined)


def _output_size(node: gs.Node, prepared: PreparedModel) -> int:
    shapes = [prepared.shapes.get(tensor.name) for tensor in node.outputs]
    return sum(prod(shape) for shape in shapes if shape)


JOIN_PICOSECONDS = 500.0
"""What copying one number takes: 8 bytes at 16 GB/s."""
