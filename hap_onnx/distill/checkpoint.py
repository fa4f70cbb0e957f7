"""Where training stands, kept in files that are complete or not there: numbers only, nothing is unpickled."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from hap_onnx.errors import ValidationError
from hap_onnx.interrupts import interruptible
from hap_onnx.model.temporary import folder_beside

_log = logging.getLogger(__name__)
_ENTRY = "hap_onnx"


@dataclass(frozen=True)
class Progress:
    """How far training has come.

    Attributes:
        step: updates that are done.
        start_score, best_score: on the samples set aside, before training and at best; smaller is better.
        best_step: after which update the best weights were found, 0 for those before training.
        rate_factor: what has become of the learning rate by halving.
        n_rollbacks: how often it was halved.
    """

    step: int
    start_score: float
    best_score: float
    best_step: int
    rate_factor: float = 1.0
    n_rollbacks: int = 0


def save_state(path: Path, key: str, progress: Progress, tensors: dict[str, Tensor]) -> None:
    """Write a state; ``key`` says what it belongs to. Raises ValidationError if the disk does not take it."""
    entry = json.dumps({"key": key, **asdict(progress)})
    try:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        with folder_beside(path) as folder, interruptible():
            temporary = folder / path.name
            safetensors.torch.save_file(contiguous, temporary, metadata={_ENTRY: entry})
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValidationError(
            f"the state of training cannot be written to {path}: {reason}; check the folder and free space"
        ) from error


def load_state(path: Path, key: str) -> tuple[Progress, dict[str, Tensor]] | None:
    """Read a state that ``save_state`` wrote; None where there is none, or none with this ``key``."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            entry = json.loads((file.metadata() or {}).get(_ENTRY, "{}"))
            if not isinstance(entry, dict):
                raise ValueError("its description is no object")
            if entry.pop("key", None) != key:
                _log.info("%s belongs to other work and is not used", path)
                return None
            return Progress(**entry), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
        _log.warning("%s is damaged and not used: %s", path, error)
        return None
