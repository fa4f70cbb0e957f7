"""A loss model as a file: finding one takes minutes, and other budgets and commands start from the same.

One ``.safetensors`` file holds all numbers as they are, so that a plan from a kept model is the same to the
byte. Only what data was needed for is kept; the rest follows from the prepared model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from hap_onnx.errors import ModelError, ValidationError
from hap_onnx.implants.loss import ImplantLayer, ImplantLosses, find_implant_layers
from hap_onnx.interrupts import interruptible
from hap_onnx.model.temporary import folder_beside
from hap_onnx.planning.curves import GroupCurve, GroupRanking, Measured
from hap_onnx.planning.decide import LossModel, loss_model
from hap_onnx.prepare import PreparedModel
from hap_onnx.sensitivity.curvature import LayerCurvature

_FORMAT = 1


def save_losses(model: LossModel, path: Path) -> None:
    """Write what was found out by data, complete or not at all; raises ValidationError."""
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "sensitivity": model.sensitivity,
        "n_measured": model.n_measured,
        "groups": [
            [ranking.group, ranking.score, ranking.score_error, _rows(curve.measured)]
            for ranking, curve in zip(model.rankings, model.curves, strict=True)
        ],
        "layers": [
            [node, losses.measured_kind, _rows(losses.measured)] for node, losses in model.implants.items()
        ],
    }
    try:
        with folder_beside(path) as folder, interruptible():
            temporary = folder / path.name
            save_file(dict(_tensors(model)), temporary, metadata={"losses": json.dumps(facts)})
            os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValidationError(
            f"{path} cannot be written ({getattr(error, 'strerror', None) or error}); "
            "check --work-dir, its permissions and the free space"
        ) from error


def load_losses(path: Path, prepared: PreparedModel) -> LossModel:
    """Read what ``save_losses`` wrote of the same model; raises ModelError if it cannot be used."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return _build(json.loads((file.metadata() or {})["losses"]), file.get_tensor, prepared)
    except (OSError, safetensors.SafetensorError, ValueError, LookupError, TypeError) as error:
        raise ModelError(f"{path} is damaged, or was written by another version: {error}") from error


def _tensors(model: LossModel) -> Iterator[tuple[str, Tensor]]:
    """Each array with its name; copies, since a file takes no memory twice."""
    for number, (ranking, curve) in enumerate(zip(model.rankings, model.curves, strict=True)):
        yield f"group.{number}.order", torch.tensor(ranking.order)
        yield f"group.{number}.predicted", torch.tensor(ranking.loss)
        yield f"group.{number}.expected", torch.tensor(curve.loss)
    for number, losses in enumerate(model.implants.values()):
        yield f"layer.{number}.inputs", losses.curvature.inputs.cpu().contiguous().clone()
        yield f"layer.{number}.gradients", losses.curvature.gradients.cpu().contiguous().clone()
        yield f"layer.{number}.predicted", torch.tensor(losses.predicted)
        yield f"layer.{number}.ratios", torch.tensor(losses.ratios)


def _build(facts: dict[str, Any], tensor: Any, prepared: PreparedModel) -> LossModel:
    if facts["format"] != _FORMAT:
        raise ValueError(f"its format is {facts['format']}, not {_FORMAT}")
    rankings, curves = [], []
    for number, (group, entry) in enumerate(zip(prepared.coupling.groups, facts["groups"], strict=True)):
        name, score, error, measured = entry
        arrays = [tensor(f"group.{number}.{key}").numpy() for key in ("order", "predicted", "expected")]
        if name != group.name or [len(array) - group.size for array in arrays] != [0, 1, 1]:
            raise ValueError(f"it knows nothing of the group {group.name!r}")
        rankings.append(GroupRanking(name, arrays[0], arrays[1], score, error))
        curves.append(GroupCurve(name, arrays[2], _measured(measured)))
    layers = {layer.node: layer for layer in find_implant_layers(prepared)} if facts["layers"] else {}
    nodes = {node.name: node for node in prepared.graph.nodes}
    reads = {(read.node, read.index): read for read in prepared.coupling.reads}
    implants = {}
    for number, (name, kind, measured) in enumerate(facts["layers"]):
        layer: ImplantLayer = layers[nodes[name].name]
        inputs, gradients, predicted, ratios = (
            tensor(f"layer.{number}.{key}") for key in ("inputs", "gradients", "predicted", "ratios")
        )
        read = reads.get((name, layer.form.data_index))
        implants[name] = ImplantLosses(
            layer,
            LayerCurvature(name, layer.form, read, inputs, gradients),
            layer.form.to_matrix(prepared.twin.constant(layer.weight).detach()).double(),
            predicted.numpy(),
            ratios.numpy(),
            measured_kind=kind,
            measured=_measured(measured),
        )
    return loss_model(
        prepared,
        tuple(rankings),
        tuple(curves),
        implants,
        sensitivity=facts["sensitivity"],
        n_measured=facts["n_measured"],
    )


def _rows(measured: Any) -> list[tuple[int, float, float]]:
    return [(int(key), entry.loss, entry.std_error) for key, entry in measured.items()]


def _measured(rows: Any) -> dict[int, Measured]:
    return {int(key): Measured(float(loss), float(error)) for key, loss, error in rows}
