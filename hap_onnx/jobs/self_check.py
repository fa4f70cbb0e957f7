"""Proof that a result is sound, before anything is written.

The checker and strict shape inference must pass, and the model must load without new warnings. It then runs
beside the original at several batch sizes and, where the model leaves sizes open, at several of these: at all
sizes at which the original runs, the shapes of the outputs must be the original's, and numbers finite where
the original's are. What the plan removes is cut anew and compared with the original masked at every
contraction that reads what is gone, at the same sizes; the plan, carried out again, must make the very model
that is to be written; and onnxruntime must compute what the twin of the result computes.

A failure names the node where things go wrong. It is a bug in hap-onnx, and with a work folder whatever shows
it is left there.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor

from hap_onnx.errors import CalibrationError, HapOnnxError, ModelError, SurgeryError, ValidationError
from hap_onnx.jobs.carry_out import from_plan_weights
from hap_onnx.jobs.machine import write_proto
from hap_onnx.model.model_io import SourceModel, load_model, normalise, save_model
from hap_onnx.model.saving import make_folder
from hap_onnx.model.weights import AnyModel, LargeModel, bytes_of, proto_of, weights_of
from hap_onnx.planning.choose import Choice, arrange
from hap_onnx.planning.plan import CompressionPlan, plan_hash, save_plan
from hap_onnx.prepare import Arrays, CutTrial, NoProofError, PreparedModel
from hap_onnx.quantize.protos import find_quantized
from hap_onnx.runtime.session import Session, make_session
from hap_onnx.runtime.soundness import check_model
from hap_onnx.sensitivity.curvature import to_tensors
from hap_onnx.surgery import discard, remove_channels
from hap_onnx.twin import Step, Twin, build_twin

_log = logging.getLogger(__name__)

BATCHES = (1, 2, 5)
SELF_CHECK_SAMPLES = max(BATCHES)
MAX_FREE_SIZES = 4
"""How many symbolic sizes are varied one at a time; all of them are varied together, too."""
MAX_GROWTH = 4
"""Inputs with more elements than so many times those of the largest batch are not tried."""
TWIN_TOLERANCE = 1e-3
STEP_TOLERANCE = 3.0
"""The twin of a quantized model may be so much farther from onnxruntime than that is from itself, unfused."""
TWIN_TOLERANCE_16_BITS = 5e-2
"""Largest difference between a twin and onnxruntime, relative to the largest number of the output."""


@dataclass(frozen=True)
class Result:
    """A model that is to be written, and what it is checked against.

    Attributes:
        proto: the model as it will be written.
        graph: the graph that it was made of.
        plan: what made it, with the plans of the rounds before.
        rounds: the models that the rounds of the plan started from; the first is the original.
        samples: some samples, or made-up ones.
        outputs: the outputs that count: those that vary. None for all floating-point ones.
    """

    proto: AnyModel
    graph: gs.Graph
    plan: CompressionPlan
    rounds: Sequence[PreparedModel]
    samples: Arrays
    outputs: tuple[str, ...] | None = None

    @property
    def source(self) -> SourceModel:
        return self.rounds[0].source


@dataclass(frozen=True)
class Feed:
    """Inputs at one set of sizes."""

    inputs: Arrays

    def __str__(self) -> str:
        return ", ".join(f"{name} {list(array.shape)}" for name, array in self.inputs.items())


class _Failure(Exception):
    """What went wrong, at which inputs; ``kind`` is the error that the caller sees."""

    def __init__(self, message: str, *, feed: Feed | None = None, kind: type[HapOnnxError] = SurgeryError):
        super().__init__(message)
        self.feed, self.kind = feed, kind


def check_result(
    result: Result,
    original: Session,
    load: Callable[[AnyModel], Session],
    *,
    work_dir: Path | None = None,
) -> str | None:
    """Prove that a result is sound; return a remark for the user, if there is one.

    Args:
        original: the model as it came, loaded.
        load: loads the result in the same way.
        work_dir: where whatever shows a failure is left.

    Raises:
        ValidationError: the result does not pass the checker, load or run, or gives numbers that are none.
        SurgeryError: it runs, but is not what the plan says.
    """
    try:
        remark = _check_written(result)
        feeds = [
            feed for feed in make_feeds(original, result.samples) if _run_original(original, feed) is not None
        ]
        if not feeds:
            raise _Failure("the original ran on none of the inputs that the result was to be checked on")
        for prepared, plan in zip(result.rounds, _round_plans(result.plan), strict=True):
            _check_cut(prepared, plan, feeds)
        session = load(result.proto)
        for feed in feeds:
            _compare_outputs(result, original, session, feed)
        _check_twin(result, original, session, _largest_batch(feeds, result.samples))
        _check_plan(result)
        _log.info("the result equals what the plan says at %d sets of sizes", len(feeds))
        return remark
    except _Failure as failure:
        raise failure.kind(f"{failure}; {_how_to_report(result, failure, work_dir)}") from failure


# ---------------------------------------------------------------- inputs


def make_feeds(session: Session, samples: Arrays) -> Iterator[Feed]:
    """Yield samples at several batch sizes, then with each open size changed, and with all of them.

    Numbers are repeated or cut: they stay of the kind that the model knows. Not all sizes need be possible.
    """
    batches = BATCHES if session.fixed_batch is None else (session.fixed_batch,)
    largest = _resized(samples, {(name, 0): max(batches) for name in samples})
    limit = MAX_GROWTH * sum(array.size for array in largest.values())
    seen: set[tuple[tuple[int, ...], ...]] = set()
    for sizes in (
        *({(name, 0): batch for name in samples} for batch in batches),
        *(
            {**{(name, 0): batches[0] for name in samples}, **free}
            for free in _vary(_free_axes(session, samples), samples)
        ),
    ):
        inputs = _resized(samples, sizes)
        shapes = tuple(array.shape for array in inputs.values())
        if shapes not in seen and sum(array.size for array in inputs.values()) <= limit:
            seen.add(shapes)
            yield Feed(inputs)


Sizes = dict[tuple[str, int], int]


def _free_axes(session: Session, samples: Arrays) -> list[list[tuple[str, int]]]:
    """The axes behind the batch whose size is open: those of one name together, those without by size."""
    found: dict[Any, list[tuple[str, int]]] = {}
    for spec in session.inputs:
        for axis, size in enumerate(spec.shape[1:], start=1):
            if not isinstance(size, int):
                key = size if size else ("unnamed", samples[spec.name].shape[axis])
                found.setdefault(key, []).append((spec.name, axis))
    return list(found.values())


def _vary(free: Sequence[list[tuple[str, int]]], samples: Arrays) -> Iterator[Sizes]:
    now = [samples[axes[0][0]].shape[axes[0][1]] for axes in free]
    changes = [_other_sizes(size) for size in now]
    for axes, others in list(zip(free, changes, strict=True))[:MAX_FREE_SIZES]:
        for other in others:
            yield dict.fromkeys(axes, other)
    if len(free) > 1:  # all at once, and not alike: heights and widths are mixed up most easily
        for start in (0, 1):
            picked = [others[(start + index) % 2] for index, others in enumerate(changes)]
            yield {axis: size for axes, size in zip(free, picked, strict=True) for axis in axes}


def _other_sizes(size: int) -> tuple[int, int, int]:
    """A smaller, a larger and an odd size; many networks want multiples of 32."""
    step = 32 if size >= 32 else max(size, 1)
    smaller = size - step if size > step else max(size // 2, 1)
    return smaller, size + step, size + 1


def _resized(samples: Arrays, sizes: Sizes) -> Arrays:
    resized: dict[str, NDArray[np.generic]] = {}
    for name, array in samples.items():
        for axis in range(array.ndim):
            now: int = array.shape[axis]
            size = sizes.get((name, axis), now)
            if size != now:
                array = np.take(array, np.arange(size) % max(now, 1), axis)
        resized[name] = array
    return resized


def _largest_batch(feeds: Sequence[Feed], samples: Arrays) -> Feed:
    """The feed with most samples at the sizes that the data has."""
    plain = [
        feed
        for feed in feeds
        if all(feed.inputs[name].shape[1:] == array.shape[1:] for name, array in samples.items())
    ]
    return (plain or list(feeds))[-1]


# ---------------------------------------------------------------- what is compared


def _check_written(result: Result) -> str | None:
    try:
        return check_model(result.proto, reference=result.source.model)
    except ValidationError as error:
        raise _Failure(str(error), kind=ValidationError) from error


def _run_original(original: Session, feed: Feed) -> dict[str, NDArray[np.generic]] | None:
    try:
        return original.run(original.prepare(feed.inputs))
    except (ModelError, CalibrationError) as error:
        _log.debug("no check at %s: %s", feed, error)
        return None


def _compare_outputs(result: Result, original: Session, session: Session, feed: Feed) -> None:
    """The result must run where the original does, with outputs of the same shapes and finite."""
    expected = _run_original(original, feed) or {}
    try:
        found = session.run(session.prepare(feed.inputs))
    except (ModelError, CalibrationError) as error:
        raise _Failure(
            f"the original runs on {feed}, and the result does not: {error}", feed=feed, kind=ValidationError
        ) from error
    writers = {name: node for node in result.graph.nodes for name in (t.name for t in node.outputs)}
    for name, before in expected.items():
        after = found[name]
        if after.shape != before.shape and not _depends_on_numbers(result, name, before.shape, feed):
            raise _Failure(
                f"node '{writers[name].name}' ({writers[name].op}) gives output '{name}' the shape "
                f"{list(after.shape)} on {feed}, where the original gives {list(before.shape)}",
                feed=feed,
            )
        if before.dtype.kind not in "fc" or after.shape != before.shape:
            continue
        bad = np.isfinite(before) & ~np.isfinite(after)
        if bad.any():
            node = _first_without_numbers(result, feed) or writers[name]
            raise _Failure(
                f"{int(bad.sum())} numbers of output '{name}' are NaN or infinite on {feed}, where the "
                f"original's are not; the first node to give such numbers is '{node.name}' ({node.op})",
                feed=feed,
                kind=ValidationError,
            )


def _depends_on_numbers(result: Result, name: str, shape: tuple[int, ...], feed: Feed) -> bool:
    """Say whether the shape of the original's own output depends on numbers, as that of boxes does."""
    twin = result.rounds[0].twin
    for scale in (0, -1, 3):
        inputs = {
            key: np.multiply(array, scale, dtype=array.dtype) if array.dtype.kind == "f" else array
            for key, array in feed.inputs.items()
        }
        try:
            with torch.no_grad():
                if tuple(twin(to_tensors(inputs, twin))[name].shape) != shape:
                    return True
        except (ModelError, CalibrationError):
            continue
    return False


def _first_without_numbers(result: Result, feed: Feed) -> gs.Node | None:
    """The first node of the result that makes NaN or infinity of finite numbers, as far as the twin knows."""
    twin = build_twin(result.graph, share_weights=True)
    found: list[str] = []

    def look(step: Step, index: int, tensor: Tensor) -> Tensor:
        if not found and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            found.append(step.name)
        return tensor

    try:
        with torch.no_grad():
            twin(to_tensors(feed.inputs, twin), on_write=look)
    except (ModelError, CalibrationError) as error:
        _log.debug("the twin of the result does not run: %s", error)
    return next((node for node in result.graph.nodes if found and node.name == found[0]), None)


def _check_cut(prepared: PreparedModel, plan: CompressionPlan, feeds: Sequence[Feed]) -> None:
    """One round's cut without its repairs must equal the model that it started from with the rest masked."""
    choice = Choice(plan.decisions_for(prepared.coupling), plan.replacements)
    arranged, keep, _ = arrange(prepared, choice)
    try:
        graph = remove_channels(arranged.graph, arranged.coupling, keep, shapes=arranged.probe_shapes)
    except SurgeryError as error:
        raise _Failure(str(error)) from error
    trial = CutTrial(arranged, keep, graph)
    for feed in feeds:
        try:
            complaint = trial.find_fault(feed.inputs)
        except NoProofError as error:
            _log.debug("the cut is not proven on %s: %s", feed, error)
            continue
        except HapOnnxError as error:
            raise _Failure(f"the planned cut does not run on {feed}: {error}", feed=feed) from error
        if complaint is not None:
            raise _Failure(f"the planned cut is not exact on {feed}: {complaint}", feed=feed)
    discard(graph)


def _round_plans(plan: CompressionPlan) -> tuple[CompressionPlan, ...]:
    return (*plan.earlier, plan)


def _check_twin(result: Result, original: Session, session: Session, feed: Feed) -> None:
    """onnxruntime must compute what the twin of the result does, where that is so of the original."""
    # Weights of 8 bits are rounded when they are written, so there the graph is what was written.
    is_stored = any(prepared.stored for prepared in result.rounds)
    graph = normalise(load_model(result.proto)) if is_stored else result.graph
    twin = build_twin(graph, device=str(result.rounds[0].twin.device or "cpu"), share_weights=True)
    bad = [
        name
        for name in _differences(twin, session, feed, result.proto)
        if not result.outputs or name in result.outputs
    ]
    if not bad or bad[0] in _differences(result.rounds[0].twin, original, feed, result.source.model):
        return
    node = _first_difference(result.proto, twin, feed)
    raise _Failure(
        f"output '{bad[0]}' of the result is not what its twin computes on {feed}"
        + (f"; node '{node.name}' ({node.op_type}) is the first to differ" if node else ""),
        feed=feed,
    )


def _differences(twin: Twin, session: Session, feed: Feed, model: AnyModel) -> list[str]:
    """The floating-point outputs in which a twin and onnxruntime, which has loaded ``model``, differ."""
    both = run_both(twin, session, feed.inputs, model, lambda one: one.run(one.prepare(feed.inputs)))
    return [
        name
        for name, ours, theirs, allowed in both
        if theirs.dtype.kind == "f" and not _is_close(ours, theirs, allowed)
    ]


def run_both(
    twin: Twin, session: Session, inputs: Arrays, model: AnyModel, run: Callable[[Session], Arrays]
) -> Iterator[tuple[str, Tensor, NDArray[np.generic], float]]:
    """Yield each output of numbers as a twin and as onnxruntime computes it, and how far they may be apart.

    Args:
        session: ``model``, loaded.
        run: runs a session on ``inputs``.
    """
    with torch.no_grad():
        ours = twin(to_tensors(inputs, twin))
    theirs = run(session)
    other = theirs
    if find_quantized(proto_of(model)) is not None:  # numbers on the border of two steps: rounded either way
        other = run(make_session(model, providers="cpu", threads=1, optimise=False))
    for name, array in theirs.items():
        if array.dtype.kind not in "OSU":
            yield name, ours[name], array, _tolerance(array) + _step_tolerance(array, other[name])


def _step_tolerance(theirs: NDArray[np.generic], unfused: NDArray[np.generic]) -> float:
    """Return how much farther the twin of a quantized model may be off: by what fusing changes."""
    difference = np.abs(unfused.astype(np.float64) - theirs.astype(np.float64))
    return STEP_TOLERANCE * float(difference[np.isfinite(difference)].max(initial=0.0))


def _tolerance(theirs: NDArray[np.generic]) -> float:
    """Return how far a twin may be from an output of onnxruntime: rounding, of the model's own type."""
    relative = TWIN_TOLERANCE if theirs.dtype in (np.float32, np.float64) else TWIN_TOLERANCE_16_BITS
    numbers = np.abs(theirs.astype(np.float64))
    return relative * max(float(numbers[np.isfinite(numbers)].max(initial=0.0)), 1e-6)


def _is_close(ours: Tensor, theirs: NDArray[np.generic], allowed: float) -> bool:
    found, expected = ours.detach().cpu().double().numpy(), theirs.astype(np.float64)
    if found.shape != expected.shape:
        return False
    finite = np.isfinite(expected)
    return bool(np.abs(found - expected)[finite].max(initial=0.0) <= allowed)


def _first_difference(model: AnyModel, twin: Twin, feed: Feed) -> Step | None:
    """The first node of a model whose result in onnxruntime is not that of its twin."""
    exposed = ModelProto()
    exposed.CopyFrom(proto_of(model))
    present = {value.name for value in exposed.graph.output}
    for node in exposed.graph.node:
        names = [name for name in node.output if name and name not in present]
        exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    try:
        whole = LargeModel(exposed, model.weights) if isinstance(model, LargeModel) else exposed
        inside = make_session(whole, providers="cpu", threads=1)
        theirs = inside.run(inside.prepare(feed.inputs))
    except HapOnnxError as error:
        _log.debug("onnxruntime does not show what is inside: %s", error)
        return None
    found: list[Step] = []

    def compare(step: Step, index: int, tensor: Tensor) -> Tensor:
        array = theirs.get(step.outputs[index])
        if found or array is None or array.dtype.kind != "f":
            return tensor
        if not _is_close(tensor, array, _tolerance(array)):
            found.append(step)
        return tensor

    with torch.no_grad():
        twin(to_tensors(feed.inputs, twin), on_write=compare)
    return found[0] if found else None


def _check_plan(result: Result) -> None:
    """The plan must make the very model that is to be written."""
    prepared, plan = result.rounds[-1], result.plan
    choice = Choice(plan.decisions_for(prepared.coupling), plan.replacements)
    try:
        again = write_proto(
            from_plan_weights(prepared, choice, plan.weights).finished(), prepared.source, plan
        )
    except (ModelError, SurgeryError) as error:
        raise _Failure(f"the plan of the result cannot be carried out again: {error}") from error
    other = _first_other_weight(again, result.proto)
    if proto_of(again) == proto_of(result.proto) and other is None:
        return
    before = {node.name: node for node in proto_of(result.proto).graph.node}
    node = next((node for node in proto_of(again).graph.node if before.get(node.name) != node), None)
    what = f"node '{node.name}' ({node.op_type})" if node is not None else "a weight"
    if node is None:
        what = f"the weight '{other}'" if other is not None else "the header"
    raise _Failure(f"the plan of the result, carried out again, makes another model: {what} differs")


def _first_other_weight(model: AnyModel, expected: AnyModel) -> str | None:
    """The name of the first weight that is not bit by bit the expected one's, in the message or beside it."""
    tensors = {tensor.name: tensor for tensor in proto_of(expected).graph.initializer}
    found, wanted = weights_of(model), weights_of(expected)
    for tensor in proto_of(model).graph.initializer:
        name = tensor.name
        if tensors.get(name) != tensor or (name in found) != (name in wanted):
            return name
        if name in found and bytes_of(found[name]) != bytes_of(wanted[name]):
            return name
    return None


# ---------------------------------------------------------------- the report of a bug


def _how_to_report(result: Result, failure: _Failure, work_dir: Path | None) -> str:
    please = "this is a bug in hap-onnx, nothing was written: please report it with"
    if work_dir is None:
        return f"{please} the model (with --work-dir, all that shows it is collected there)"
    folder = work_dir / f"failed-self-check-{plan_hash(result.plan)}"
    try:
        _leave_reproduction(result, failure, folder)
    except (OSError, HapOnnxError) as error:
        return f"{please} the model ({folder} cannot be written: {error})"
    return f"{please} what is in {folder}"


def _leave_reproduction(result: Result, failure: _Failure, folder: Path) -> None:
    """Write both models, the plan, the inputs and a text that says what is what."""
    make_folder(folder)
    source = result.source
    save_model(source.model, folder / "original.onnx", external_data=source.external_data)
    save_model(result.proto, folder / "result.onnx", external_data=source.external_data)
    save_plan(result.plan, folder / "plan.json")
    feed = failure.feed or Feed(result.samples)
    np.savez(folder / "inputs.npz", **feed.inputs)  # type: ignore[arg-type]
    text = f"""\
        {failure}.

        original.onnx is the model as it came, result.onnx what was made of it, plan.json and
        plan.safetensors the plan that says how, inputs.npz the inputs ({feed}).
        To see it again:  hap-onnx apply original.onnx plan.json -o again.onnx
        """
    (folder / "README.txt").write_text(textwrap.dedent(text), encoding="utf-8")
