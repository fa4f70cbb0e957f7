"""The oracle of surgery: a cut equals the original masked wherever a contraction reads what is gone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray

from hap_onnx.coupling.channels import Coupling, find_groups
from hap_onnx.model.model_io import load_model, normalise, to_proto
from hap_onnx.surgery import masked_reads, remove_channels
from hap_onnx.twin import build_twin, probe_shapes
from tools.first_divergence import compare_tensors, run_onnxruntime

TOLERANCE = 2e-5
SYMBOLIC_SIZE = 6
"""Of axes other than the batch; one less in the probe."""
Keep = NDArray[np.bool_]


class Case:
    """A model with its twin, coupling and inputs.

    Shapes are probed at another batch, and at other sizes of symbolic axes, than the model is run at.
    """

    def __init__(self, model: onnx.ModelProto | Path, *, n_samples: int = 3) -> None:
        self.source = load_model(model)
        self.graph = normalise(self.source)
        self.twin = build_twin(self.graph)
        rng = np.random.default_rng(1)
        self.inputs: dict[str, np.ndarray] = {}
        probe: dict[str, torch.Tensor] = {}
        for tensor in self.graph.inputs:
            sizes = [size if isinstance(size, int) else SYMBOLIC_SIZE for size in tensor.shape]
            probed = tuple(
                slice(None if isinstance(size, int) else SYMBOLIC_SIZE - 1) for size in tensor.shape
            )
            if not isinstance(tensor.shape[0], int):
                sizes[0], probed = n_samples, (slice(2), *probed[1:])
            values = rng.standard_normal(sizes).astype(np.float32)
            self.inputs[tensor.name] = values
            probe[tensor.name] = torch.from_numpy(values[probed])
        self.shapes = probe_shapes(self.twin, probe)
        self._coupling: Coupling | None = None

    @property
    def coupling(self) -> Coupling:
        if self._coupling is None:
            self._coupling = find_groups(self.graph, self.shapes)
        return self._coupling

    def cut(self, keep: Keep) -> gs.Graph:
        return remove_channels(self.graph, self.coupling, keep, shapes=self.shapes)

    def run(self, graph: gs.Graph | None = None, *, mask: Keep | None = None) -> dict[str, np.ndarray]:
        """Run a twin: the original's, masked if asked, or that of another graph."""
        twin = self.twin if graph is None else build_twin(graph)
        on_read = None if mask is None else masked_reads(self.coupling, mask)
        tensors = {name: torch.from_numpy(values) for name, values in self.inputs.items()}
        with torch.no_grad():
            return {name: value.numpy() for name, value in twin(tensors, on_read=on_read).items()}

    def check(self, keep: Keep, *, what: str = "") -> gs.Graph:
        """Assert that the cut is exact, in the twin and in onnxruntime."""
        expected = self.run(mask=keep)
        graph = self.cut(keep)
        proto = to_proto(graph, self.source)
        onnx.checker.check_model(proto, full_check=True)
        results = {"twin": self.run(graph), "onnxruntime": run_onnxruntime(proto, self.inputs)}
        for where, outputs in results.items():
            assert list(outputs) == list(expected)
            for name, values in expected.items():
                error, problem = compare_tensors(outputs[name], values)
                assert not problem, f"{what}: {where}, '{name}': {problem}"
                assert error < TOLERANCE, f"{what}: {where}, '{name}': off by {error:.1e}"
        return graph

    def draw(self, rng: np.random.Generator, elements: NDArray[np.int64] | None = None) -> Keep:
        """Draw a half of the given elements to go, of each group; at least one of each stays."""
        keep = np.ones(self.coupling.n_elements, bool)
        for group in self.coupling.groups:
            if elements is None or elements is group.elements:
                n_gone = max(group.size // 2, 1 if group.size > 1 else 0)
                keep[rng.choice(group.elements, n_gone, replace=False)] = False
        return keep
