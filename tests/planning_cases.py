"""Planned jobs on tiny models, and what a plan must come to, computed another way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray

from hap_onnx.data.calibration import Subset, open_dataset
from hap_onnx.implants.factors import Metric, factorise
from hap_onnx.implants.loss import ImplantLosses, rank_coefficients
from hap_onnx.jobs.carry_out import Compressed
from hap_onnx.model.input_spec import InputSpec
from hap_onnx.model.measure import model_size
from hap_onnx.model.model_io import load_model, to_proto
from hap_onnx.planning.choose import Choice, keep_mask
from hap_onnx.planning.decide import LossModel, build_loss_model
from hap_onnx.planning.plan import GroupDecision, NodeReplacement
from hap_onnx.prepare import PreparedModel, prepare
from hap_onnx.sensitivity.curvature import output_scales, to_tensors
from hap_onnx.surgery import kept_positions, remove_channels
from hap_onnx.twin import Twin, build_twin, probe_shapes
from tools.first_divergence import compare_tensors, run_onnxruntime

Ints = NDArray[np.int64]
TOLERANCE = 5e-5


@dataclass(frozen=True)
class Job:
    """A model with data and all that is known of it before a plan is made."""

    prepared: PreparedModel
    losses: LossModel
    subset: Subset
    scales: Mapping[str, float]

    @property
    def nodes(self) -> dict[str, gs.Node]:
        return {node.name: node for node in self.prepared.graph.nodes}

    @property
    def kinds(self) -> dict[str, dict[str, float]]:
        """All kinds of implants for all layers that may have one, at any share of the layer."""
        return {
            name: {form.kind: 1.0 for form in losses.layer.forms}
            for name, losses in self.losses.implants.items()
        }

    def budgets(self, **ratios: float) -> dict[str, float | None]:
        """Absolute limits from fractions of the original."""
        full = dict(zip(("params", "macs"), self.losses.cost.totals(self.losses.cost.sizes)[:2], strict=True))
        return {name: ratios[name] * float(full[name]) if name in ratios else None for name in full}

    def inputs(self) -> dict[str, np.ndarray]:
        """The first samples: more than the probe has, unless the model declares how many."""
        (declared, *_), *_ = (tensor.shape for tensor in self.prepared.graph.inputs)
        n_samples = declared if isinstance(declared, int) else 5
        return dict(next(iter(self.subset.batches(n_samples))).inputs)

    def run(self, graph: gs.Graph) -> dict[str, np.ndarray]:
        """Outputs of a graph's twin on the first samples."""
        return run_twin(build_twin(graph), self.inputs())


def run_twin(twin: Twin, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {name: value.numpy() for name, value in twin(to_tensors(inputs, twin)).items()}


def make_job(
    model: onnx.ModelProto,
    *,
    n_samples: int = 40,
    sensitivity: str = "obs",
    exclude: Sequence[str] = (),
    only: Sequence[str] = (),
) -> Job:
    """Prepare a model with standard normal inputs, rank its channels and measure its layers."""
    source = load_model(model)
    rng = np.random.default_rng(5)
    specs, arrays = [], {}
    for value in source.proto.graph.input:
        dims = [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
        arrays[value.name] = rng.standard_normal((n_samples, *dims[1:])).astype(np.float32)
        specs.append(InputSpec(value.name, np.dtype(np.float32), tuple(dims)))
    subset = Subset(open_dataset(arrays, specs), np.arange(n_samples))
    probe = next(iter(subset.batches(4))).inputs
    prepared = prepare(source, probe, exclude=exclude, only=only)
    outputs = run_twin(prepared.twin, next(iter(subset.batches(n_samples))).inputs)
    scales = output_scales([outputs])
    losses = build_loss_model(
        prepared, subset, sensitivity=sensitivity, scales=scales, batch_size=20, n_probes=4, seed=0
    )
    return Job(prepared, losses, subset, scales)


# --- sizes ---


def real_totals(job: Job, graph: gs.Graph) -> list[int]:
    """Parameters and multiply-accumulates of a graph, counted on the graph itself."""
    prepared, twin = job.prepared, build_twin(graph)
    first = {name: values[: prepared.shapes[name][0]] for name, values in prepared.probe.items()}
    size = model_size(graph, probe_shapes(twin, to_tensors(first, twin)))
    return [size.params, size.macs]


def widths_of(choice: Choice) -> list[int]:
    return [len(decision.keep) for decision in choice.decisions]


def priced_totals(job: Job, choice: Choice) -> list[int]:
    """Parameters and multiply-accumulates of a choice, by the cost model."""
    replaced = {replacement.node: replacement for replacement in choice.replacements}
    tables = []
    for terms in job.losses.cost.layers:
        layer = job.losses.implants[terms.node].layer
        replacement = replaced.pop(terms.node, None)
        if replacement is None:
            tables.append(terms.dense)
            continue
        tables.append(
            rank_coefficients(
                layer.kind(replacement.kind),
                replacement.rank,
                job.nodes[terms.node],
                job.prepared.shapes,
                n_groups=layer.form.conv_group,
                n_taps=layer.form.n_taps,
            )
        )
    assert not replaced, "replaced layers have a price"
    coefficients = np.stack(tables) if tables else None
    return job.losses.cost.totals(widths_of(choice), coefficients)[:2].tolist()


# --- what a choice must compute ---


def axis_positions(job: Job, initializer: str, axis: int, keep: NDArray[np.bool_], size: int) -> Ints:
    """Positions of one axis of an initializer that a cut leaves, in the order of the original."""
    for weight in job.prepared.coupling.weights:
        if (weight.initializer, weight.axis) == (initializer, axis):
            return kept_positions(weight.elements, keep)
    return np.arange(size)


def left_of(job: Job, node: str, keep: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """Positions of a layer's output and input axis that a cut leaves."""
    layer, weight = job.losses.implants[node].layer, job.prepared.graph.tensors()
    shape, form = weight[layer.weight].values.shape, layer.form
    return tuple(  # type: ignore[return-value]
        axis_positions(job, layer.weight, axis, keep, shape[axis]) for axis in (form.out_axis, form.in_axis)
    )


def slice_by_numpy(
    losses: ImplantLosses, outputs: Ints, inputs: Ints, *, damping: float = 1e-2, rounding: float = 1e-4
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Weight [g, O, F], damped A and G, and mean inputs of what a cut leaves of a layer, one by one."""
    weight, moments = losses.weight.numpy(), losses.curvature.inputs.numpy()
    gradients, n_taps = losses.curvature.gradients.numpy(), losses.layer.form.n_taps
    n_outputs = weight.shape[1]
    features = [channel * n_taps + tap for channel in inputs for tap in range(n_taps)]
    parts: tuple[list[np.ndarray], ...] = ([], [], [], [])
    for group in range(len(weight)):
        rows = [int(p) % n_outputs for p in outputs if int(p) // n_outputs == group]
        if not rows:
            continue
        parts[0].append(weight[group][np.ix_(rows, features)])
        a = moments[group]
        mean = np.zeros(len(features))
        if a.ndim == 1:
            a = a[features]
            parts[1].append(a + damping * a.mean())
        else:
            if losses.layer.bias is not None:
                mean = a[features, -1]
            a = a[np.ix_(features, features)]
            noise = rounding * np.trace(a) / len(a) if losses.layer.bias is not None else 0.0
            a = a - np.outer(mean, mean) + noise * np.eye(len(a))
            parts[1].append((a + a.T) / 2 + damping * np.trace(a) / len(a) * np.eye(len(a)))
        g = gradients[group][np.ix_(rows, rows)]
        parts[2].append((g + g.T) / 2 + damping * np.trace(g) / len(g) * np.eye(len(g)))
        parts[3].append(mean)
    has_mean = losses.layer.bias is not None and moments.ndim == 3
    w, a, g, m = (np.stack(part) for part in parts)
    return w, a, g, m if has_mean else None


def dense_of(job: Job, replacement: NodeReplacement, keep: NDArray[np.bool_]) -> tuple[np.ndarray, ...]:
    """The matrix [g, O, F] that an implant computes, outputs in the original order, and the bias' gain."""
    losses = job.losses.implants[replacement.node]
    outputs, inputs = left_of(job, replacement.node, keep)
    w, a, g, mean = slice_by_numpy(losses, outputs, inputs)
    form = losses.layer.kind(replacement.kind)
    if replacement.kind == "pointwise":
        assert form.tap is not None
        dense = w.copy()
        chosen = np.isin(outputs, replacement.channels)
        assert chosen.sum() == replacement.rank
        at_tap = np.arange(form.tap, w.shape[2], losses.layer.form.n_taps)
        full = np.diag(a[0]) if a.ndim == 2 else a[0]
        kernels = np.linalg.solve(full[np.ix_(at_tap, at_tap)], (w[0, chosen] @ full[:, at_tap]).T).T
        dense[0, chosen] = 0
        dense[0][np.ix_(np.flatnonzero(chosen), at_tap)] = kernels
    else:
        metric = Metric(torch.from_numpy(a), torch.from_numpy(g))
        dense = factorise(
            torch.from_numpy(w), metric, kind=form.kind, rank=replacement.rank, taps=form.taps, tap=form.tap
        ).dense.numpy()
    shift = np.zeros(w.shape[:2]) if mean is None else np.einsum("gof,gf->go", w - dense, mean)
    return dense, shift


def expected_graph(job: Job, choice: Choice) -> gs.Graph:
    """Cut without permuting, and give each replaced layer the dense weight that its implant computes."""
    prepared = job.prepared
    keep = keep_mask(prepared, choice.decisions)
    graph = remove_channels(prepared.graph, prepared.coupling, keep, shapes=prepared.probe_shapes)
    tensors = graph.tensors()
    for replacement in choice.replacements:
        layer = job.losses.implants[replacement.node].layer
        dense, shift = dense_of(job, replacement, keep)
        weight = tensors[layer.weight]
        weight.values = (
            layer.form.to_weight(torch.from_numpy(dense), weight.values.shape)
            .numpy()
            .astype(weight.values.dtype)
        )
        if layer.bias is not None:
            bias = tensors[layer.bias]
            bias.values = (bias.values + shift.reshape(bias.values.shape)).astype(bias.values.dtype)
    return graph


def check_carried_out(job: Job, choice: Choice, compressed: Compressed) -> onnx.ModelProto:
    """Assert that a compressed model is what the choice says: outputs, sizes, operators and names."""
    graph = compressed.finished()
    expected = job.run(expected_graph(job, choice))
    proto = to_proto(graph, job.prepared.source)
    onnx.checker.check_model(proto, full_check=True)
    for where, outputs in (("twin", job.run(graph)), ("ort", run_onnxruntime(proto, job.inputs()))):
        for name, values in expected.items():
            error, problem = compare_tensors(outputs[name], values)
            assert not problem, f"{where}, {name}: {problem}"
            assert error < TOLERANCE, f"{where}, {name}: off by {error:.1e}"
    assert real_totals(job, graph) == priced_totals(job, choice)
    check_operators(job, choice, graph)
    return proto


def check_operators(job: Job, choice: Choice, graph: gs.Graph) -> None:
    """Assert that an implant adds its own nodes only, all of standard domains."""
    keep = keep_mask(job.prepared, choice.decisions)
    cut = remove_channels(job.prepared.graph, job.prepared.coupling, keep, shapes=job.prepared.probe_shapes)
    before, after = (Counter(node.op for node in one.nodes) for one in (cut, graph))
    for replacement in choice.replacements:
        op = job.nodes[replacement.node].op
        before["Conv" if op == "Conv" else "MatMul"] += 1
        if replacement.kind == "pointwise":
            before["Concat"] += 1
    activations = {"Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "Tanh"}
    for op in set(before) | set(after):
        extra = after[op] - before[op]
        assert extra == 0 or (op in activations and 0 < extra <= len(choice.replacements)), (op, extra)
    assert {node.domain or "" for node in graph.nodes} == {""}


# --- choices by chance ---


def random_choice(
    job: Job,
    rng: np.random.Generator,
    *,
    kinds: Collection[str] = ("lowrank", "spatial", "pointwise"),
    full_rank: bool = False,
    narrow: bool = True,
) -> Choice:
    """Any widths, and for about two layers in three any implant that fits there."""
    decisions = []
    for group in job.prepared.coupling.groups:
        width = int(rng.integers(1, group.size, endpoint=True)) if narrow else group.size
        kept = rng.choice(group.size, width, replace=False)
        decisions.append(GroupDecision.from_keep(group.name, group.size, kept.tolist()))
    keep = keep_mask(job.prepared, decisions)
    replacements = []
    for terms in job.losses.cost.layers:
        losses = job.losses.implants[terms.node]
        forms = [form for form in losses.layer.forms if form.kind in kinds]
        if not forms or rng.random() < 0.33:
            continue
        form = forms[int(rng.integers(len(forms)))]
        outputs, inputs = left_of(job, terms.node, keep)
        n_groups, n_outputs = len(losses.weight), len(outputs) // len(losses.weight)
        n_features = len(inputs) * losses.layer.form.n_taps
        assert len(outputs) == n_groups * n_outputs
        if form.kind == "pointwise":
            if n_outputs < 2:
                continue
            rank = int(rng.integers(1, n_outputs))
            channels = np.sort(rng.choice(outputs, rank, replace=False))
            replacements.append(NodeReplacement(terms.node, form.kind, rank, channels))
            continue
        most = min(n_features // form.taps[1], n_outputs * form.taps[1])
        rank = most if full_rank else int(rng.integers(1, most, endpoint=True))
        replacements.append(NodeReplacement(terms.node, form.kind, rank))
    return Choice(tuple(decisions), tuple(replacements))
