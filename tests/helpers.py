"""Tiny models built in code, and the oracle that compares the twin with onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from hap_onnx.coupling.channels import ChannelGroup, Coupling
from hap_onnx.model.model_io import load_model, normalise
from hap_onnx.twin import Twin, build_twin
from tools.first_divergence import compare_nodes, compare_tensors, run_onnxruntime

IR_VERSION = 9
Shape = Sequence[int | str]


def rand(*shape: int, seed: int = 0) -> np.ndarray:
    """Return normal random numbers in float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def node(op_type: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    """Return a node named after its first output."""
    return helper.make_node(op_type, list(inputs), list(outputs), name=f"make_{outputs[0]}", **attributes)


def _describe_input(name: str, like: Shape | np.ndarray) -> onnx.ValueInfoProto:
    shape, dtype = (like.shape, like.dtype) if isinstance(like, np.ndarray) else (like, np.dtype(np.float32))
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), list(shape))


def make_model(
    nodes: Sequence[onnx.NodeProto],
    *,
    inputs: Mapping[str, Shape] | Mapping[str, np.ndarray],
    outputs: Sequence[str],
    weights: Mapping[str, np.ndarray] | None = None,
    opset: int = 17,
    domains: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """Return a model; an input is given by its shape (float32) or by an example array."""
    infos = [_describe_input(name, like) for name, like in inputs.items()]
    graph = helper.make_graph(
        list(nodes),
        "test",
        infos,
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()],
    )
    imports = {"": opset, **(domains or {})}
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid(*entry) for entry in imports.items()], ir_version=IR_VERSION
    )
    return onnx.shape_inference.infer_shapes(model)


def make_node_model(
    op_type: str,
    inputs: Sequence[np.ndarray | np.generic | None],
    *,
    constants: Sequence[int] = (),
    n_outputs: int = 1,
    opset: int = 17,
    domain: str = "",
    **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Return (model of one node, its inputs); inputs at the positions ``constants`` become initializers."""
    names = ["" if array is None else f"in{position}" for position, array in enumerate(inputs)]
    arrays = {name: np.asarray(array) for name, array in zip(names, inputs, strict=True) if array is not None}
    weights = {name: arrays[name] for name in (names[position] for position in constants)}
    feeds = {name: array for name, array in arrays.items() if name not in weights}
    outputs = [f"out{index}" for index in range(n_outputs)]
    model = make_model(
        [node(op_type, names, outputs, domain=domain, **attributes)],
        inputs=feeds,
        outputs=outputs,
        weights=weights,
        opset=opset,
        domains={domain: 1} if domain else None,
    )
    return model, feeds


def make_twin(model: onnx.ModelProto) -> Twin:
    """Return the twin of a model."""
    return build_twin(normalise(load_model(model)))


def check_model(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray], *, tolerance: float = 1e-5) -> Twin:
    """Assert that the twin equals onnxruntime, else name the first tensor that differs; returns the twin."""
    twin = make_twin(model)
    feeds = {name: np.asarray(array) for name, array in inputs.items()}
    expected = run_onnxruntime(model, feeds)
    with torch.no_grad():
        outputs = twin({name: torch.from_numpy(np.array(array)) for name, array in feeds.items()})
    assert list(outputs) == list(expected)
    for name, array in expected.items():
        error, problem = compare_tensors(outputs[name].numpy(), array)
        if problem or error > tolerance:
            first = next((e for e in compare_nodes(model, feeds, twin=twin) if e.diverges(tolerance)), None)
            raise AssertionError(
                f"output {name!r}: relative error {error:.2e} {problem}; first divergence: {first}"
            )
        if array.dtype.kind in "biu":
            assert outputs[name].numpy().dtype == array.dtype
    return twin


def check_node(
    op_type: str,
    *inputs: np.ndarray | np.generic | None,
    tolerance: float = 1e-5,
    opaque: bool = False,
    **options: Any,
) -> Twin:
    """Assert that one node computes the same in the twin and in onnxruntime, in torch unless ``opaque``."""
    model, feeds = make_node_model(op_type, inputs, **options)
    twin = check_model(model, feeds, tolerance=tolerance)
    assert bool(twin.opaque_nodes) == opaque
    return twin


def make_coupling(sizes: Mapping[str, int], *, frozen: str = "") -> Coupling:
    """Groups of these sizes by name; their elements descend."""
    groups, start = [], 0
    for name, size in sizes.items():
        elements = np.arange(start, start + size)[::-1].copy()
        groups.append(ChannelGroup(name, elements, (), (), (), "why" if name == frozen else None))
        start += size
    return Coupling(start, tuple(groups), (), {}, (), (), {})
