"""Sessions of onnxruntime: how a model is loaded and run.

Sessions use the optimisation level that users get by default, are silent and, where onnxruntime can be,
deterministic. What onnxruntime cannot load or run becomes one sentence that names the node.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto
from onnxruntime.capi import onnxruntime_pybind11_state as _ort

from hap_onnx.errors import (
    CalibrationError,
    ModelError,
    UsageError,
    ValidationError,
    refuse_out_of_memory,
)
from hap_onnx.model.input_spec import InputSpec, format_shape
from hap_onnx.model.protos import MAX_PROTO_BYTES, count_bytes
from hap_onnx.model.weights import AnyModel, LargeModel, split_model

Model = AnyModel | bytes | str | Path

_log = logging.getLogger(__name__)

ORT_ERRORS: tuple[type[Exception], ...] = (
    _ort.EPFail,
    _ort.Fail,
    _ort.InvalidArgument,
    _ort.InvalidGraph,
    _ort.InvalidProtobuf,
    _ort.NoSuchFile,
    _ort.NotImplemented,
    _ort.RuntimeException,
)
_PROBE_ERRORS: tuple[type[Exception], ...] = (ModelError, *ORT_ERRORS)
_PROVIDER_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# TensorFloat-32 would round weights to 10 bits: the device may change the speed, not the result.
_PROVIDER_OPTIONS: Mapping[str, dict[str, str]] = {"CUDAExecutionProvider": {"use_tf32": "0"}}


class _Batch(Protocol):
    @property
    def inputs(self) -> Mapping[str, np.ndarray]: ...


class _Samples(Protocol):
    def batches(self, batch_size: int) -> Iterable[_Batch]: ...


@dataclass(frozen=True)
class Session:
    """A model loaded in onnxruntime; make it with ``make_session``.

    ``fixed_batch`` is the number of samples that every run must have, or None if any will do.
    """

    inputs: tuple[InputSpec, ...]
    output_names: tuple[str, ...]
    fixed_batch: int | None
    provider: str
    threads: int | None
    session: ort.InferenceSession
    label: str
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)  # onnxruntime may use them where they are

    def prepare(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Pick the model's inputs and cast them to its types; other entries are ignored.

        Raises:
            CalibrationError: an input is missing, cannot be cast, or is no single number where one is needed.
        """
        feed = {}
        for spec in self.inputs:
            if spec.name not in inputs:
                raise CalibrationError(
                    f"the data has no array for the model's input {spec}; "
                    f"it has {', '.join(sorted(inputs)) or 'nothing'}"
                )
            array = np.asarray(inputs[spec.name])
            if array.dtype.kind in "OUS" and spec.dtype.kind not in "OUS":
                raise CalibrationError(f"the model's input {spec} needs numbers, but the data holds text")
            array = (
                array.astype(spec.dtype, copy=False) if spec.dtype.kind not in "OUS" else array.astype(object)
            )
            if spec.shape == () and array.size != 1:
                raise CalibrationError(
                    f"the model's input {spec} takes a single number, but the data has "
                    f"{format_shape(array.shape)} for it"
                )
            feed[spec.name] = np.ascontiguousarray(array).reshape(() if spec.shape == () else array.shape)
        return feed

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once on a prepared feed.

        Raises:
            ModelError: onnxruntime refuses, or an output is not a tensor.
        """
        try:
            values = self.session.run(list(self.output_names), dict(feed))
        except ORT_ERRORS as error:
            refuse_out_of_memory(error, f"running {self.label} in onnxruntime")
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
            raise ModelError(
                f"{self.label} does not run in onnxruntime on {shapes}: {explain(error)}"
            ) from error
        outputs = dict(zip(self.output_names, values, strict=True))
        for name, value in outputs.items():
            if not isinstance(value, np.ndarray):
                raise ModelError(
                    f"output {name!r} of {self.label} is a {type(value).__name__}, but only tensors can be "
                    "compared; export the model without it (for scikit-learn models: zipmap=False)"
                )
        return outputs


def make_session(
    model: Model,
    *,
    providers: str | Sequence[str] = "auto",
    threads: int | None = None,
    label: str | None = None,
    optimise: bool = True,
    is_timed: bool = True,
) -> Session:
    """Load a model in onnxruntime, as its users would but silently.

    Args:
        model: protobuf in one piece or two, its bytes, or a path.
        providers: ``auto`` (CUDA where it works, else the CPU), or names of execution providers; ``cpu``,
            ``cuda`` and ``tensorrt`` are short for their full names.
        threads: of one operator; None leaves the number to onnxruntime.
        label: how messages call the model.
        optimise: whether operators may be fused, as users have it.
        is_timed: False where speed does not count: weights are then not laid out anew, which takes memory.

    Raises:
        ModelError: onnxruntime cannot load the model.
        UsageError: an execution provider is unknown or does not work here.
    """
    label = label or (str(model) if isinstance(model, (str, Path)) else "the model")
    names = _choose_providers(providers)
    session = load(
        model, names, threads=threads, severity=4, label=label, optimise=optimise, is_timed=is_timed
    )
    if session.get_providers()[0] != names[0]:
        raise UsageError(
            f"{names[0]} is installed but does not work on this machine (onnxruntime fell back to "
            f"{session.get_providers()[0]}); choose another provider or mend its libraries"
        )
    inputs = tuple(_to_spec(value, label) for value in session.get_inputs())
    return Session(
        inputs=inputs,
        output_names=tuple(value.name for value in session.get_outputs()),
        fixed_batch=_fixed_batch(inputs, label),
        provider=names[0],
        threads=threads,
        session=session,
        label=label,
        weights=model.weights if isinstance(model, LargeModel) else {},
    )


def load(
    model: Model,
    providers: Sequence[str],
    *,
    threads: int | None,
    severity: int,
    label: str,
    optimise: bool = True,
    is_timed: bool = True,
    profile: str | None = None,
) -> ort.InferenceSession:
    """Load a model with the options that all sessions share; ``profile`` begins the name of its profile."""
    options = ort.SessionOptions()
    if not is_timed:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    options.log_severity_level = severity
    options.use_deterministic_compute = True
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    settings = [(name, _PROVIDER_OPTIONS.get(name, {})) for name in providers]
    if isinstance(model, ModelProto) and count_bytes(model) > MAX_PROTO_BYTES:
        model = split_model(model)
    if isinstance(model, LargeModel):
        source: bytes | str = _give_weights(model, options)
    elif isinstance(model, ModelProto):
        source = model.SerializeToString()
    else:
        source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(source, options, providers=settings)
    except ORT_ERRORS as error:
        refuse_out_of_memory(error, f"loading {label} in onnxruntime")
        raise ModelError(f"{label} does not load in onnxruntime: {explain(error)}") from error


def _give_weights(model: LargeModel, options: ort.SessionOptions) -> bytes:
    """Hand arrays over as they are, without a file; return the rest of the model as bytes."""
    values = {}
    for tensor in model.proto.graph.initializer:
        array = model.weights.get(tensor.name)
        if array is None:
            continue
        if array.dtype.isbuiltin == 1:
            values[tensor.name] = ort.OrtValue.ortvalue_from_numpy(array)
        else:  # such as bfloat16, which is no type of numpy's own
            bits = array.view(f"u{array.dtype.itemsize}")
            values[tensor.name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, tensor.data_type)
    options.add_external_initializers(list(values), list(values.values()))
    return bytes(model.proto.SerializeToString())


def _choose_providers(providers: str | Sequence[str]) -> list[str]:
    if providers == "auto":
        return (
            ["CUDAExecutionProvider", "CPUExecutionProvider"] if _cuda_works() else ["CPUExecutionProvider"]
        )
    asked = [providers] if isinstance(providers, str) else list(providers)
    names = [_PROVIDER_NAMES.get(name.lower(), name) for name in asked]
    available = ort.get_available_providers()
    for name in names:
        if name not in available:
            raise UsageError(
                f"execution provider {name!r} is not in this onnxruntime; choose from {', '.join(available)}"
            )
    if not names:
        raise UsageError(f"no execution provider is given; choose from {', '.join(available)}")
    return names


@functools.cache
def _cuda_works() -> bool:
    """Try CUDA on a one-node model: the provider is listed even where there is no GPU."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return False
    import torch  # brings the CUDA libraries that onnxruntime needs

    if not torch.cuda.is_available():
        return False
    values = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "probe", values[:1], values[1:]
    )
    probe = ModelProto(ir_version=7, opset_import=[onnx.helper.make_opsetid("", 13)], graph=graph)
    try:
        session = load(probe, ["CUDAExecutionProvider"], threads=None, severity=4, label="the probe")
        session.run(None, {"x": np.ones(1, np.float32)})
    except _PROBE_ERRORS as error:
        _log.info("CUDA is left aside: %s", error)
        return False
    return bool(session.get_providers()[0] == "CUDAExecutionProvider")


_NUMPY_TYPES: Mapping[str, Any] = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    "bool": np.bool_,
    "string": np.object_,
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


def _to_spec(value: Any, label: str) -> InputSpec:
    match = re.fullmatch(r"tensor\((\w+)\)", value.type)
    if match is None or match[1] not in _NUMPY_TYPES:
        raise ModelError(
            f"input {value.name!r} of {label} has the type {value.type}, which cannot be fed from numpy "
            "arrays; export the model with a tensor of a common type there"
        )
    shape = tuple(size if isinstance(size, (int, str)) else None for size in value.shape)
    return InputSpec(value.name, np.dtype(_NUMPY_TYPES[match[1]]), shape)


def _fixed_batch(inputs: Sequence[InputSpec], label: str) -> int | None:
    """Return the batch that the inputs declare; an input without axes takes one sample at a time."""
    declared = {spec.name: (spec.shape[0] if spec.shape else 1) for spec in inputs}
    fixed = {name: size for name, size in declared.items() if isinstance(size, int)}
    if len(set(fixed.values())) > 1:
        sizes = ", ".join(f"{name!r}: {size}" for name, size in fixed.items())
        raise ModelError(
            f"the inputs of {label} have different sizes on their first axis ({sizes}), but that axis must "
            "be the batch; export the model with the batch first"
        )
    return next(iter(fixed.values()), None)


_MESSAGE_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")


def explain(error: Exception) -> str:
    """Shorten onnxruntime's message to one sentence and put the node first if one is named."""
    text = _MESSAGE_PREFIX.sub("", str(error)).strip()
    text = re.sub(r"^Load model from .*? failed:\s*", "", text)
    text = re.sub(r"\S*onnxruntime_src/\S+:\d+ (?:[^()]*\([^()]*\)(?: const)? ?)+", "", text)
    text = " ".join(text.split()).rstrip(". ")
    node = re.search(
        r"(?:while running (?P<op>\w+) node\. Name:|[Nn]ode with name |Node ?\(|Node:)\s*'?(?P<name>[^')]*)",
        text,
    )
    if node is not None and node["name"] and not text.startswith("node"):
        op = f" ({node['op']})" if node["op"] else ""
        text = f"node {node['name']!r}{op}: {text.split('Status Message: ')[-1]}"
    return text if len(text) <= 600 else text[:597] + "..."


def run_outputs(
    session: Session, data: _Samples | Iterable[_Batch], *, batch_size: int = 32
) -> dict[str, np.ndarray]:
    """Run samples and return each output with all samples on axis 0, in their order.

    A model with a fixed batch gets chunks of that size, the last one padded by repetition and cut again.
    Where several samples at once do not work (a batch of 1 is written into the graph, or an output has no
    batch axis) they run one by one. An output of m rows per sample comes as [samples, m, ...].

    Raises:
        ModelError: onnxruntime refuses the samples.
        CalibrationError: there is no sample, or an input is missing.
        ValidationError: outputs of different samples do not have the same shape.
    """
    batches = data.batches(batch_size) if hasattr(data, "batches") else data
    parts: list[dict[str, np.ndarray]] = []
    size = session.fixed_batch or batch_size
    for batch in batches:
        n_samples = len(next(iter(batch.inputs.values()))) if batch.inputs else 0
        for start in range(0, n_samples, size):
            chunk = {name: array[start : start + size] for name, array in batch.inputs.items()}
            part = _run_chunk(session, chunk, n_samples=min(size, n_samples - start))
            if part is None:
                size = 1
                part = _run_singly(session, chunk)
            parts.append(part)
    if not parts:
        raise CalibrationError("there are no samples to run; give data with at least one")
    return {name: _join([part[name] for part in parts], name, session.label) for name in session.output_names}


def _run_chunk(
    session: Session, inputs: Mapping[str, np.ndarray], *, n_samples: int
) -> dict[str, np.ndarray] | None:
    """Run some samples at once; None if they must run one by one."""
    n_run = session.fixed_batch or n_samples
    if n_run > n_samples:
        inputs = {
            name: np.concatenate([array, np.repeat(array[-1:], n_run - n_samples, axis=0)])
            for name, array in inputs.items()
        }
    try:
        outputs = session.run(session.prepare(inputs))
    except ModelError:
        if n_run == 1 or session.fixed_batch is not None:
            raise
        return None  # or it fails again, and then with a simpler message
    parts = {}
    for name, array in outputs.items():
        if array.ndim and len(array) == n_run:
            parts[name] = array[:n_samples]
        elif array.size and array.ndim and len(array) % n_run == 0:
            parts[name] = array.reshape(n_run, len(array) // n_run, *array.shape[1:])[:n_samples]
        elif n_run == 1:
            parts[name] = array[np.newaxis]
        elif session.fixed_batch is None:
            return None
        else:
            raise ValidationError(
                f"output {name!r} of {session.label} has the shape {list(array.shape)} for {n_run} samples, "
                "but the first axis must be the batch; export the model so, or with a batch of 1"
            )
    return parts


def _run_singly(session: Session, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    parts: list[dict[str, np.ndarray]] = []
    for index in range(len(next(iter(inputs.values())))):
        part = _run_chunk(session, {name: a[index : index + 1] for name, a in inputs.items()}, n_samples=1)
        assert part is not None, "one sample cannot be split further"
        parts.append(part)
    return {name: _join([part[name] for part in parts], name, session.label) for name in session.output_names}


def _join(arrays: Sequence[np.ndarray], name: str, label: str) -> np.ndarray:
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1:
        examples = " and ".join(format_shape(shape) for shape in sorted(shapes, key=str)[:2])
        raise ValidationError(
            f"output {name!r} of {label} changes its shape from sample to sample ({examples}), so samples "
            "cannot be compared; export the model without its last, data-dependent stage"
        )
    return np.concatenate(arrays)


