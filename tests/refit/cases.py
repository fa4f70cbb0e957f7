"""Cut models and what refit makes of them: shared by the tests of the refit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch

from hap_onnx.coupling.channels import find_groups
from hap_onnx.data.calibration import InputSpec, Subset, open_dataset
from hap_onnx.model.model_io import load_model, normalise
from hap_onnx.refit import refit
from hap_onnx.surgery import Kept, kept_positions, remove_channels
from hap_onnx.twin import build_twin, probe_shapes
from tests.helpers import make_model, node, rand

Arrays = dict[str, np.ndarray]


def graph_of(model: onnx.ModelProto) -> gs.Graph:
    return normalise(load_model(model))


def subset_of(x: np.ndarray) -> Subset:
    dataset = open_dataset({"x": x}, [InputSpec("x", x.dtype, ("N", *x.shape[1:]))])
    return Subset(dataset, np.arange(len(x)))


def cut(
    graph: gs.Graph, x: np.ndarray, drop: Mapping[str, Sequence[int]]
) -> tuple[gs.Graph, dict[str, Kept]]:
    """Remove the channels at the given positions of tensors."""
    shapes = probe_shapes(build_twin(graph), {"x": torch.from_numpy(x[:2])})
    coupling = find_groups(graph, shapes)
    keep = np.ones(coupling.n_elements, bool)
    for name, positions in drop.items():
        elements = coupling.tensors[name].ids[list(positions)]
        assert (elements >= 0).all()
        keep[elements] = False
    kept = {
        name: Kept(found.axis, kept_positions(found.ids, keep)) for name, found in coupling.tensors.items()
    }
    return remove_channels(graph, coupling, keep, shapes=shapes), kept


def run(graph: gs.Graph, x: np.ndarray, new: Arrays | None = None) -> np.ndarray:
    twin = build_twin(graph)
    with torch.no_grad():
        for name, values in (new or {}).items():
            assert values.dtype == np.float32
            assert values.shape == tuple(twin.parameter_of[name].shape)
            twin.parameter_of[name].copy_(torch.from_numpy(values))
        return twin({"x": torch.from_numpy(x)})["y"].numpy()


def relative_error(ours: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def fit(
    graph: gs.Graph, compressed: gs.Graph, kept: Mapping[str, Kept], x: np.ndarray, **options: Any
) -> Arrays:
    options = {"batch_size": 16, "seed": 0, "ridge": 1e-7, **options}
    return dict(refit(graph, compressed, kept, subset_of(x), **options).weights)


def duplicates(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    """A weight of 2n outputs, the second half equal to the first."""
    return np.concatenate([rand(n, *shape, seed=seed)] * 2)


def two_branches(*, through: str) -> onnx.ModelProto:
    """Two branches that are added: one through a narrow tensor ``h``, one that reads the input."""
    nodes = [
        node("Conv", ["x", "a"], ["h"]),
        node("Conv", ["h", "b", "bb"], ["d"]),
        node("Conv", ["x", "w", "wb"], ["e"]),
        node("Add", ["d", "e" if through == "conv" else "x"], ["s"]),
        node("Conv", ["s", "v"], ["y"]),
    ]
    if through != "conv":
        del nodes[2]
    return make_model(
        nodes,
        inputs={"x": ["N", 4, 5, 5]},
        outputs=["y"],
        weights={
            "a": rand(6, 4, 1, 1),
            "b": rand(4, 6, 1, 1, seed=1),
            "bb": rand(4, seed=2),
            "v": rand(4, 4, 1, 1, seed=4),
        }
        | ({"w": rand(4, 4, 1, 1, seed=3), "wb": rand(4, seed=5)} if through == "conv" else {}),
    )


def relu_model() -> onnx.ModelProto:
    return make_model(
        [
            node("Conv", ["x", "a"], ["c"]),
            node("Relu", ["c"], ["h"]),
            node("Conv", ["h", "w", "b"], ["d"]),
            node("Add", ["x", "d"], ["s"]),
            node("Relu", ["s"], ["y"]),
        ],
        inputs={"x": ["N", 4, 5, 5]},
        outputs=["y"],
        weights={"a": rand(8, 4, 1, 1), "w": rand(4, 8, 1, 1, seed=1), "b": rand(4, seed=2)},
    )


def deep_case() -> tuple[gs.Graph, gs.Graph, dict[str, Kept], np.ndarray]:
    graph, x = graph_of(relu_model()), rand(30, 4, 5, 5, seed=3)
    return graph, *cut(graph, x, {"h": [0, 3, 5]}), x
