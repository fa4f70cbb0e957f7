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

Layers that get implants are factorised on the way (``refit.implant``), so that what is behind corrects them.

No gradients, no labels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from hap_onnx.data.calibration import Subset
from hap_onnx.distributed import ALONE, Team
from hap_onnx.events import OnEvent, ignore_event, track
from hap_onnx.interrupts import interruptible
from hap_onnx.model.saving import make_folder
from hap_onnx.model.temporary import temporary_folder
from hap_onnx.refit.fit import fit_offset, fit_weights
from hap_onnx.refit.heap import freed_blocks_returned
from hap_onnx.refit.implant import fit_implant
from hap_onnx.refit.pair import Pair, make_pair, read_inputs
from hap_onnx.refit.rows import Options
from hap_onnx.refit.schedule import ImplantFit, Task, WeightFit, plan_tasks
from hap_onnx.refit.spec import FittedImplant, ImplantSpec, Refitted
from hap_onnx.refit.store import COMPRESSED, ORIGINAL, Store
from hap_onnx.surgery import Kept

__all__ = ["FittedImplant", "ImplantSpec", "Refitted", "refit"]

STAGE = "refit"
_NO_IMPLANTS: Mapping[str, ImplantSpec] = MappingProxyType({})


def refit(
    original: gs.Graph,
    compressed: gs.Graph,
    kept: Mapping[str, Kept],
    subset: Subset,
    *,
    implants: Mapping[str, ImplantSpec] = _NO_IMPLANTS,
    leave: Collection[str] = (),
    batch_size: int,
    seed: int,
    ridge: float = 1e-3,
    n_positions: int = 64,
    n_relu_rounds: int = 3,
    work_dir: Path | None = None,
    memory_limit_bytes: int = 1 << 27,
    device: str = "cpu",
    team: Team = ALONE,
    on_event: OnEvent = ignore_event,
) -> Refitted:
    """Refit the contractions of a compressed graph that the compression has reached.

    Weights and biases change only if they are initializers with a single reader. Contractions without a
    matrix form get a new bias only, and so does what is left of a removed branch, its constant.

    Args:
        original: the normalised graph before the compression.
        compressed: the graph after it; its nodes and tensors have the names of the original's.
        kept: what is left of the channel axis of the original's tensors; tensors not named are whole.
        implants: the nodes of ``compressed``, there with all of their weight, that become factors. The result
            has the factors, and all layers behind are refitted to them.
        leave: nodes of ``compressed`` whose weights are not to be touched.
        ridge: pull towards the current weights, relative to the mean diagonal of the Gram matrix.
        n_positions: output positions per sample that are taken at random (more where samples are few).
        n_relu_rounds: how often the targets below a Relu follow the prediction; 0 for plain least squares.
        work_dir: where activations go that do not fit ``memory_limit_bytes``; default: the system's
            temporary folder.
        team: the processes that share the samples; each keeps the activations of its own.

    Returns:
        The new values of changed initializers of ``compressed``, and the implants. Neither graph changes.

    Raises:
        SurgeryError: ``kept`` does not describe how the two graphs differ, or a node cannot have an implant.
        CalibrationError: there are too few samples, or the disk is too full for what does not fit in memory.
    """
    if work_dir is not None:
        make_folder(work_dir)
    options = Options(ridge=ridge, n_positions=n_positions, n_relu_rounds=n_relu_rounds, seed=seed)
    with (
        torch.no_grad(),
        freed_blocks_returned(),
        temporary_folder("refit", work_dir) as folder,
        interruptible(),
    ):
        store = Store(folder, memory_limit_bytes)
        try:
            pair = make_pair(original, compressed, kept, implants, store, device=device, team=team)
            tasks = plan_tasks(pair, leave)
            if not tasks:
                return Refitted({}, {})
            read_inputs(pair, original, subset, batch_size)
            changed: set[str] = set()
            factors: dict[str, FittedImplant] = {}
            for index, task in enumerate(
                track(tasks, stage=STAGE, total=len(tasks), on_event=on_event),
            ):
                changed |= _run_task(pair, task, index, options, factors)
            weights = {
                name: np.array(pair.parameters[name].cpu().numpy(), np.float32) for name in sorted(changed)
            }
            return Refitted(weights, factors)
        finally:
            store.close()


def _run_task(
    pair: Pair, task: Task, index: int, options: Options, factors: dict[str, FittedImplant]
) -> set[str]:
    """Refit a step and run it; returns the names of the changed initializers, adds to ``factors``."""
    side = ORIGINAL if task.twin is pair.original else COMPRESSED
    new: dict[str, Tensor] = {}
    replaced: set[str] = set()  # weights that factors take the place of
    if isinstance(task.fit, WeightFit):
        new = fit_weights(pair, task.step, task.fit, index, options)
    elif isinstance(task.fit, ImplantFit):
        new, factors[task.step.name] = fit_implant(pair, task.step, task.fit, index, options)
        replaced = {task.fit.weight}
    elif task.fit is not None:
        new = fit_offset(pair, task.step, task.fit)
    for name, values in new.items():
        pair.parameters[name].copy_(values)
    for batch in range(pair.n_batches):
        for name, tensor in zip(task.step.outputs, pair.run(task.twin, task.step, batch), strict=False):
            if name:
                pair.store.append((side, name), tensor)
    for key in task.release:
        pair.store.drop(key)
    return set(new) - replaced
