"""Fold BatchNormalization into the convolution before it, as onnxruntime does when it loads a model.

A model that keeps its BatchNormalization nodes is then ranked, refitted and counted like one that was
exported without them. Exact up to float rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import numpy as np
import onnx_graphsurgeon as gs

_log = logging.getLogger(__name__)


def fold_batch_norms(graph: gs.Graph, *, leave: Collection[str] = ()) -> gs.Graph:
    """Return a graph in which each BatchNormalization that alone follows a Conv is part of its weights.

    Left as they are: normalisation in training mode or with computed statistics, weights that several nodes
    share, convolutions whose raw output is read elsewhere, types other than float32 and float64, and weights
    that ``leave`` names.
    """
    result = graph.copy()
    readers: dict[str, int] = {}
    for node in result.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                readers[tensor.name] = readers.get(tensor.name, 0) + 1
    outputs = {tensor.name for tensor in result.outputs}
    n_folded = 0
    for norm in list(result.nodes):
        if norm.op != "BatchNormalization" or norm.domain:
            continue
        conv = norm.inputs[0].inputs[0] if norm.inputs[0].inputs else None
        if conv is None or not _can_fold(conv, norm, readers, outputs):
            continue
        if any(tensor.name in leave for tensor in conv.inputs):
            continue
        _fold(conv, norm)
        readers[conv.inputs[2].name] = 1  # another normalisation may follow
        n_folded += 1
    _log.info("folded %d BatchNormalization nodes", n_folded)
    return result.cleanup(remove_unused_graph_inputs=False).toposort() if n_folded else graph


def _can_fold(conv: gs.Node, norm: gs.Node, readers: dict[str, int], outputs: set[str]) -> bool:
    y = conv.outputs[0]
    constants = [*conv.inputs[1:], *norm.inputs[1:]]
    return (
        conv.op == "Conv"
        and not conv.domain
        and len(y.outputs) == 1
        and y.name not in outputs
        and not int(norm.attrs.get("training_mode", 0))
        and sum(bool(tensor.name) for tensor in norm.outputs) == 1
        and all(isinstance(tensor, gs.Constant) for tensor in constants)
        and all(readers[tensor.name] == 1 for tensor in conv.inputs[1:])
        and all(tensor.values.dtype in (np.float32, np.float64) for tensor in constants)
    )


def _fold(conv: gs.Node, norm: gs.Node) -> None:
    scale, shift, mean, variance = (tensor.values.astype(np.float64) for tensor in norm.inputs[1:])
    factor = scale / np.sqrt(variance + float(norm.attrs.get("epsilon", 1e-5)))
    weight = conv.inputs[1]
    dtype = weight.values.dtype
    old_bias = conv.inputs[2].values.astype(np.float64) if len(conv.inputs) > 2 else np.zeros_like(mean)
    by_channel = factor.reshape(-1, *[1] * (weight.values.ndim - 1))
    weight.values = (weight.values.astype(np.float64) * by_channel).astype(dtype)
    bias = ((old_bias - mean) * factor + shift).astype(dtype)
    # The bias takes the name of the normalisation's own: unique, and known to who made the model.
    new = gs.Constant(f"{norm.inputs[2].name}_folded_{conv.name}", bias)
    if len(conv.inputs) > 2:
        conv.inputs[2] = new
    else:
        conv.inputs.append(new)
    output = norm.outputs[0]
    norm.outputs.clear()
    conv.outputs[0] = output
