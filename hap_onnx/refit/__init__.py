"""Refit in closed form: the weights that are left learn to give what the original gave.

Both models run in lock step over all calibration samples, node by node, so that each contraction of the
compressed model is refitted on the inputs that it really gets, errors of the layers before included, and
the layers after it see its new weights. Per layer the problem is least squares,

    min_W  sum ||W x + b - t||^2  +  ridge * mean(diag sum x x^T) * ||W - W_current||^2,

towards the original output t at the channels that are left. Two things make it stronger than that:

* *Error-correcting*: where the output is only added to something that the compressed model has computed
  already (a residual connection), t is the original's sum less that operand: the layer also makes up for
  the error of the other branch.
* *Aware of what follows*: where the sum goes into a Relu (or a Clip) only, targets beyond its bounds are
  replaced by the prediction as far as that is beyond them too, and the system is solved again with the
  same factor. Each round can only lower the error after the Relu.

No gradients, no labels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray

from hap_onnx.calibration import Subset
from hap_onnx.events import OnEvent, ignore_event, track
from hap_onnx.refit.fit import run_task
from hap_onnx.refit.pair import make_pair, read_inputs
from hap_onnx.refit.rows import Options
from hap_onnx.refit.schedule import plan_tasks
from hap_onnx.refit.store import Store
from hap_onnx.surgery import Kept

__all__ = ["refit"]

STAGE = "refit"


def refit(
    original: gs.Graph,
    compressed: gs.Graph,
    kept: Mapping[str, Kept],
    subset: Subset,
    *,
    batch_size: int,
    seed: int,
    ridge: float = 1e-3,
    n_positions: int = 64,
    n_relu_rounds: int = 3,
    work_dir: Path | None = None,
    memory_limit_bytes: int = 2 << 30,
    device: str = "cpu",
    on_event: OnEvent = ignore_event,
) -> dict[str, NDArray[np.float32]]:
    """Refit the contractions of a compressed graph that the compression has reached.

    Weights and biases change only if they are initializers with a single reader. Contractions without a
    matrix form get a new bias only, and so does what is left of a removed branch, its constant.

    Args:
        original: the normalised graph before the compression.
        compressed: the graph after it; its nodes and tensors have the names of the original's.
        kept: what is left of the channel axis of the original's tensors; tensors not named are whole.
        ridge: pull towards the current weights, relative to the mean diagonal of the Gram matrix.
        n_positions: output positions per sample that are taken at random (more where samples are few).
        n_relu_rounds: how often the targets below a Relu follow the prediction; 0 for plain least squares.
        work_dir: where activations go that do not fit ``memory_limit_bytes``; default: the system's
            temporary folder.

    Returns:
        The new values of changed initializers of ``compressed``, by name, in float32. Neither graph changes.

    Raises:
        SurgeryError: ``kept`` does not describe how the two graphs differ.
        CalibrationError: there are too few samples, or the disk is too full for what does not fit in memory.
    """
    if work_dir is not None:
        work_dir.mkdir(parents=True, exist_ok=True)
    options = Options(ridge=ridge, n_positions=n_positions, n_relu_rounds=n_relu_rounds, seed=seed)
    with (
        torch.no_grad(),
        tempfile.TemporaryDirectory(
            prefix="hap-onnx-refit-", dir=work_dir, ignore_cleanup_errors=True
        ) as folder,
    ):
        store = Store(Path(folder), memory_limit_bytes)
        try:
            pair = make_pair(original, compressed, kept, store, device)
            tasks = plan_tasks(pair)
            if not tasks:
                return {}
            pair.n_batches = read_inputs(pair, original, subset, batch_size)
            changed: set[str] = set()
            for index, task in enumerate(
                track(tasks, stage=STAGE, total=len(tasks), on_event=on_event),
            ):
                changed |= run_task(pair, task, index, options)
            return {
                name: np.array(pair.parameters[name].cpu().numpy(), np.float32) for name in sorted(changed)
            }
        finally:
            store.close()
