"""Prune a model by ``onnxsim.pruning`` in several ways: runs in the environment that ``tools.peer`` makes.

    python peer_worker.py MODEL.onnx CALIB.npz FOLDER l2:0.1 wanda:0.1 wanda-refit:0.1

Each point is a mode and a sparsity, and becomes ``FOLDER/MODE-SPARSITY.onnx``. Modes rank channels by the
norm of their weights (``l1``, ``l2``), or by that times the norm of what flows through them (``wanda``).
``-global`` ranks over all layers that the peer can rank so, instead of in each; ``-refit`` fits fully
connected layers afterwards, which is all that its repair knows. Prints a line of JSON per point, and needs
nothing of ours.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BATCH_SIZE = 64
SUFFIXES = ("global", "refit")
RANKINGS = ("l1", "l2", "wanda")


def parse_mode(mode: str) -> tuple[str, bool, bool]:
    """Return the ranking, whether it is global, and whether layers are refitted; raises ValueError."""
    ranking, *suffixes = mode.split("-")
    if ranking not in RANKINGS or not set(suffixes) <= set(SUFFIXES):
        raise ValueError(f"no such mode: {mode}")
    return ranking, "global" in suffixes, "refit" in suffixes


def prune(model: Any, mode: str, sparsity: float, data: list[dict[str, Any]]) -> Any:
    """Return a pruned copy of an onnx.ModelProto."""
    import onnxsim

    ranking, is_global, refit = parse_mode(mode)
    if ranking == "wanda":
        pruned = onnxsim.apply_structured_wanda_pruning(
            model, calibration_data=data, sparsity=sparsity, global_sparsity=is_global
        )
    else:
        pruned = onnxsim.apply_structured_pruning(
            model, sparsity=sparsity, importance_norm=ranking, global_sparsity=is_global
        )
    return onnxsim.apply_pruning_finetune(model, pruned, calibration_data=data) if refit else pruned


def main(path: str, calib: str, folder: str, *points: str) -> None:
    import numpy as np
    import onnx
    import onnxsim

    model, _ = onnxsim.simplify(onnx.load(path))  # folds BatchNormalization, which its pruning counts on
    with np.load(calib) as arrays:
        inputs = {name: arrays[name] for name in arrays.files}
    n_samples = len(next(iter(inputs.values())))
    data = [
        {name: array[start : start + BATCH_SIZE] for name, array in inputs.items()}
        for start in range(0, n_samples, BATCH_SIZE)
    ]
    for point in points:
        mode, sparsity = point.split(":")
        error = None
        try:
            pruned = prune(model, mode, float(sparsity), data)
            onnx.save(pruned, str(Path(folder) / f"{mode}-{sparsity}.onnx"))
        except Exception as caught:  # a peer's failure is a result
            error = f"{type(caught).__name__}: {caught}"
        print(json.dumps({"mode": mode, "sparsity": float(sparsity), "error": error}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
