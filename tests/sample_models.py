"""Small residual networks and data for tests of whole jobs."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from hap_onnx.jobs import machine
from hap_onnx.runtime.latency import LatencyComparison
from hap_onnx.timing import measure
from hap_onnx.timing.specimen import Specimen
from hap_onnx.timing.table import LatencyTable, Point
from tests.helpers import make_model, node, rand
from tools.first_divergence import run_onnxruntime

SHAPE = (3, 8, 8)
N_CLASSES = 5


def conv(
    x: str, y: str, weights: dict[str, np.ndarray], n_in: int, n_out: int, *, stride: int = 1
) -> onnx.NodeProto:
    """Return a 3x3 convolution with a bias, its weights added to ``weights``."""
    seed = len(weights)
    weights[f"{y}.w"] = rand(n_out, n_in, 3, 3, seed=seed) * np.float32(np.sqrt(2 / (9 * n_in)))
    weights[f"{y}.b"] = 0.1 * rand(n_out, seed=seed + 1)
    return node("Conv", [x, f"{y}.w", f"{y}.b"], [y], pads=[1] * 4, strides=[stride] * 2)


def residual_cnn(
    *, batch: int | str = "N", opset: int = 17, dtype: type = np.float32, width: int = 16, seed: int = 0
) -> onnx.ModelProto:
    """Return stem, two residual blocks and a classifier: x [batch, 3, 8, 8] -> scores [batch, 5].

    Two in four channels of each inner convolution are near copies of others, so that there is something
    to remove.
    """
    weights: dict[str, np.ndarray] = {"seed": np.zeros(seed, np.float32)} if seed else {}
    nodes = [conv("x", "stem", weights, 3, width), node("Relu", ["stem"], ["r0"])]
    for index, (n_in, n_out, stride) in enumerate([(width, width, 1), (width, 2 * width, 2)], start=1):
        shortcut = f"r{index - 1}"
        nodes += [
            conv(f"r{index - 1}", f"a{index}", weights, n_in, n_out, stride=stride),
            node("Relu", [f"a{index}"], [f"h{index}"]),
            conv(f"h{index}", f"b{index}", weights, n_out, n_out),
        ]
        if stride != 1:
            shortcut = f"s{index}"
            nodes.append(conv(f"r{index - 1}", shortcut, weights, n_in, n_out, stride=stride))
        nodes += [
            node("Add", [f"b{index}", shortcut], [f"sum{index}"]),
            node("Relu", [f"sum{index}"], [f"r{index}"]),
        ]
        half = n_out // 2
        for part in ("w", "b"):
            array = weights[f"a{index}.{part}"]
            array[half:] = array[:half] + 0.02 * array[half:]
    weights["head.w"] = rand(N_CLASSES, 2 * width, seed=90 + seed)
    weights["head.b"] = rand(N_CLASSES, seed=91)
    nodes += [
        node("GlobalAveragePool", ["r2"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "head.w", "head.b"], ["scores"], transB=1),
    ]
    weights.pop("seed", None)
    weights = {name: array.astype(dtype) for name, array in weights.items()}
    model = make_model(nodes, inputs={"x": [batch, *SHAPE]}, outputs=["scores"], weights=weights, opset=opset)
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    del model.graph.value_info[:]
    model.graph.input[0].type.tensor_type.elem_type = element
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("scores", element, [batch, N_CLASSES]))
    model.producer_name, model.domain, model.doc_string = "tests", "org.example", "a small network"
    model.metadata_props.add(key="author", value="nobody")
    onnx.checker.check_model(model, full_check=True)
    return model


def images(n: int = 120, *, seed: int = 3) -> np.ndarray:
    """Return random images [n, 3, 8, 8] with some structure: a brightness of their own per channel."""
    return rand(n, *SHAPE, seed=seed) + 1.5 * rand(n, 3, 1, 1, seed=seed + 1)


def with_labels(x: np.ndarray, model: onnx.ModelProto | None = None) -> dict[str, np.ndarray]:
    """Label images as the network classifies them."""
    return {"x": x, "labels": run_onnxruntime(model or residual_cnn(), {"x": x})["scores"].argmax(1)}


def timing(ratio: float) -> LatencyComparison:
    """Return what measuring a model gives that takes ``ratio`` times as long as the original."""
    return LatencyComparison(1.0, ratio, ratio, ratio - 0.01, ratio + 0.01, 11, 1, "CPUExecutionProvider", 1)


def fix_speed(patch: pytest.MonkeyPatch, *, overhead: float = 0.0) -> None:
    """Time nothing, where time is not the question: results are faster than the original, implants pay.

    Each layer takes as long as it computes, and ``overhead`` microseconds more.
    """

    def time_points(
        specimen: Specimen, points: Sequence[Point], table: LatencyTable, *, seconds: float
    ) -> dict[Point, float]:
        n_weights = prod(specimen.constants[specimen.weight_index])
        per_pair = n_weights / (specimen.n_in * specimen.n_out) * prod(specimen.y) / specimen.n_out
        return {(i, o): per_pair * i * o / 10 + overhead for i, o in points}

    patch.setattr(machine, "measure_latency", lambda *args, **options: timing(0.9))
    patch.setattr(measure, "time_points", time_points)
    patch.setattr(measure, "time_run", lambda *args, **options: 1000.0)
    patch.setattr(measure, "time_kernels", lambda *args, **options: ())


def write(folder: Path, model: onnx.ModelProto | None = None, *, external: bool = False) -> Path:
    """Write a model to ``folder`` and return its path."""
    path = folder / "net.onnx"
    if external:
        onnx.save(
            model or residual_cnn(), path, save_as_external_data=True, location="net.data", size_threshold=64
        )
    else:
        onnx.save(model or residual_cnn(), path)
    return path
