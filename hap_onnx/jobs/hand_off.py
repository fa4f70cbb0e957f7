"""``--then``: from the compressed model to the final file, and what each of the two steps has done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf

import numpy as np
from onnx import ModelProto

from hap_onnx import report as reports
from hap_onnx.data.calibration import Splits, Subset
from hap_onnx.errors import HapOnnxError, ModelError
from hap_onnx.model.protos import MAX_PROTO_BYTES
from hap_onnx.model.weights import AnyModel, count_model_bytes, join_model, proto_of
from hap_onnx.ops.quantized import is_dequantizer
from hap_onnx.ops.registry import find_macs
from hap_onnx.planning.plan import CompressionPlan
from hap_onnx.quantize import Recipe, carry_out, preview
from hap_onnx.quantize.int8 import calibrate
from hap_onnx.quantize.recipe import CALIBRATIONS, WEIGHT_BITS
from hap_onnx.runtime.latency import LatencyComparison
from hap_onnx.runtime.metrics import compare_outputs
from hap_onnx.runtime.session import Session, run_outputs

CALIBRATION_SAMPLES = 512
"""So many samples settle the range of an activation; more make no difference and take time."""
GOOD_ENOUGH = 0.02
"""Share of the outputs' variance that quantization may cost before layers alone are tried."""

Outputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Bench:
    """What a conversion is tried on: the data, and how models are opened."""

    splits: Splits
    batch_size: int
    open: Callable[[AnyModel], Session]
    note: Callable[[str], None]


def join(model: AnyModel) -> ModelProto:
    """Return a model in one piece, which the converters need.

    Raises:
        ModelError: it is too large for that.
    """
    n_bytes = count_model_bytes(model)
    if n_bytes > MAX_PROTO_BYTES:
        raise ModelError(
            f"--then needs a model of at most 2 GB, the limit of onnxruntime's converters, and this one has "
            f"{n_bytes / 1e9:.3g} GB; keep less, or leave --then away"
        )
    return join_model(model)


def choose_recipe(bench: Bench, compressed: AnyModel, kind: str) -> Recipe:
    """Decide how a float32 model is converted: ranges by the calibrate part, the rest by the choose part.

    Raises:
        ModelError: the model cannot be converted.
    """
    if kind != "int8":
        return Recipe(kind)
    model = join(compressed)
    session = bench.open(model)
    part = bench.splits.choose
    expected = run_outputs(session, part, batch_size=bench.batch_size)

    def loss(recipe: Recipe) -> float:
        outputs = run_outputs(bench.open(carry_out(model, recipe)), part, batch_size=bench.batch_size)
        r2 = compare_outputs(expected, outputs).r2
        return 1.0 - r2 if r2 is not None and np.isfinite(r2) else inf

    calibrated = bench.splits.calibrate.take(CALIBRATION_SAMPLES)
    candidates = []
    for method in CALIBRATIONS:
        ranges = calibrate(model, _feeds(session, calibrated, bench.batch_size), method=method)
        recipe = Recipe(kind, calibration=method, ranges=ranges)
        candidates.append((loss(recipe), recipe))
    best_loss, best = min(candidates, key=lambda pair: pair[0])
    more = [replace(best, weight_bits=bits) for bits in WEIGHT_BITS[1:]]
    if not best_loss <= GOOD_ENOUGH:
        more += [replace(recipe, nodes=_layers(model)) for _, recipe in candidates]
    for recipe in more:
        found = loss(recipe)
        if found < best_loss:
            best_loss, best = found, recipe
    where = "only in its layers" if best.nodes else "wherever it can"
    bench.note(
        f"int8 {where}, ranges by {best.calibration}, weights of {best.weight_bits} bits: "
        f"{100 * best_loss:.2f} % of the outputs' variance is lost on {part.n_samples} samples"
    )
    return best


def _layers(model: ModelProto) -> tuple[str, ...]:
    """Names of the nodes that multiply and accumulate."""
    return tuple(node.name for node in model.graph.node if find_macs(node.op_type, domain=node.domain))


def _feeds(session: Session, part: Subset, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the samples of a part as the model takes them; one by one if it does not take several."""
    size = session.fixed_batch or batch_size
    if session.fixed_batch is None and not _takes(session, part, size):
        size = 1
    for batch in part.batches(size):
        if session.fixed_batch is None or len(next(iter(batch.inputs.values()))) == size:
            yield session.prepare(batch.inputs)


def _takes(session: Session, part: Subset, size: int) -> bool:
    try:
        session.run(session.prepare(next(iter(part.batches(size))).inputs))
    except ModelError:
        return False
    return True


def finish(compressed: AnyModel, plan: CompressionPlan, then: str | None = None) -> AnyModel:
    """Return the final file of a plan: the compressed model itself unless the plan says more.

    With ``then``, a plan that has no recipe yet gives a model of the final one's size.

    Raises:
        ModelError: the plan is damaged, or the model too large to be converted.
    """
    if not plan.then:
        return compressed if then is None else preview(join(compressed), then)
    try:
        recipe = Recipe.from_dict(plan.then)
    except ValueError as error:
        raise ModelError(f"the plan is damaged: {error}") from error
    return carry_out(join(compressed), recipe)


def gains_from(kind: str | None, provider: str) -> bool:
    """Say whether a provider has kernels for the final file, so that its speed is the question.

    The CPU computes float16 in float32, with casts around it: there the compressed model is timed instead.
    """
    return kind != "fp16" or provider != "CPUExecutionProvider"


def describe(
    plan: CompressionPlan,
    final: AnyModel,
    *,
    original: reports.ModelFacts,
    compressed: reports.ModelFacts,
    both: reports.ModelFacts,
    quantized: reports.ModelFacts | None = None,
) -> reports.Conversion:
    """Put together what the report says about the conversion."""
    recipe = Recipe.from_dict(plan.then)
    settings: dict[str, str | int] = {}
    if recipe.kind == "int8":
        settings = {"calibration": recipe.calibration, "weight_bits": recipe.weight_bits}
    return reports.Conversion(
        kind=recipe.kind,
        settings=settings,
        original=original,
        compressed=compressed,
        quantized=quantized,
        both=both,
        left=_left_in_float(proto_of(final)) if recipe.kind == "int8" else (),
    )


def _left_in_float(final: ModelProto) -> tuple[str, ...]:
    made = {
        name for node in final.graph.node if is_dequantizer(node.op_type, node.domain) for name in node.output
    }
    return tuple(
        node.name
        for node in final.graph.node
        if find_macs(node.op_type, domain=node.domain) and made.isdisjoint(node.input)
    )


def convert_alone(bench: Bench, original: AnyModel, kind: str) -> ModelProto | None:
    """Convert the original in the same way, for comparison; None, and a note, if it cannot be."""
    try:
        return carry_out(join(original), choose_recipe(replace(bench, note=_say_nothing), original, kind))
    except HapOnnxError as error:
        bench.note(f"the original alone cannot become {kind}: {error}")
        return None


def _say_nothing(text: str) -> None:
    pass


def measure_steps(
    bench: Bench,
    report: reports.CompressReport,
    plan: CompressionPlan,
    *,
    compressed: AnyModel,
    quantized: ModelProto | None,
    final: AnyModel,
    metric: Callable[[Outputs], float],
    time: Callable[[Session], LatencyComparison],
    n_bytes: Callable[[AnyModel], int],
) -> reports.Conversion:
    """Measure the compressed model and the ``quantized`` original as the report does the final file.

    Args:
        report: that of the final file.
        metric: of outputs on the report part.
        time: a session against the original.
    """

    def facts(model: AnyModel, like: reports.ModelFacts) -> reports.ModelFacts:
        session = bench.open(model)
        value = metric(run_outputs(session, bench.splits.report, batch_size=bench.batch_size))
        latency = (report.before.latency_ms or 0.0) * time(session).ratio
        return replace(like, bytes=n_bytes(model), latency_ms=latency, metric=value)

    return describe(
        plan,
        final,
        original=report.before,
        compressed=facts(compressed, report.after),
        quantized=None if quantized is None else facts(quantized, report.before),
        both=report.after,
    )
