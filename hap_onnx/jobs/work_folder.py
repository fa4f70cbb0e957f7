"""What an interrupted job has finished, kept in ``--work-dir`` for the next one with the same words.

A job has a folder of its own there, named after all that its candidates depend on: the model, the data, the
options, the versions. Other words mean another folder, so nothing is ever mixed up.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from hap_onnx.config import BUDGETS, CompressConfig
from hap_onnx.data.calibration import Splits, Subset
from hap_onnx.errors import ModelError, ValidationError
from hap_onnx.model.saving import make_folder
from hap_onnx.model.temporary import remove_all_leftovers
from hap_onnx.planning.plan import CompressionPlan, load_plan, save_plan

_log = logging.getLogger(__name__)

_NO_MATTER = (  # to what a candidate is; budgets are part of its name
    "output", "report", "save_plan", "work_dir", "dry_run", "json", "keep_rejected", "val", "max_drop",
    "latency_table", "objective", "sweep", "then", "dist_timeout", *BUDGETS,
)  # fmt: skip


class WorkFolder:
    """Plans of finished candidates, and folders for training; without a path nothing is kept."""

    def __init__(self, work_dir: Path | None, key: str) -> None:
        self._path = None if work_dir is None else work_dir / key
        self.key = key

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs of the same job out of the folder; raises ValidationError if one is at work."""
        if self._path is None:
            yield
            return
        make_folder(self._path)
        lock = FileLock(self._path / "job.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValidationError(
                f"another run of the same command is at work in {self._path}; wait for it, or give another "
                "--work-dir"
            ) from error
        except OSError as error:
            raise ValidationError(
                f"{self._path} cannot be locked ({error.strerror or error}); check --work-dir"
            ) from error
        try:
            remove_all_leftovers(self._path)
            yield
        finally:
            lock.release()

    def load(self, name: str) -> CompressionPlan | None:
        """Return the plan of that name; None if there is none, or a damaged one."""
        if self._path is None or not self._file(name).is_file():
            return None
        try:
            return load_plan(self._file(name))
        except ModelError as error:
            _log.warning("not used: %s", error)
            return None

    def save(self, name: str, plan: CompressionPlan) -> None:
        """Keep a plan, complete or not at all; raises ValidationError."""
        if self._path is not None:
            make_folder(self._path)
            save_plan(plan, self._file(name))

    def training(self, name: str) -> Path | None:
        """Where the state of training is kept meanwhile; None for a temporary folder."""
        return None if self._path is None else self._path / f"{name}.training"

    def drop_training(self, name: str) -> None:
        """Remove the state of training when it is over: it is several times as large as the model."""
        path = self.training(name)
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)

    def latency_table(self) -> Path | None:
        """Where times are kept, so that a job that goes on plans as it would have done."""
        return None if self._path is None else self._file("latency")

    def _file(self, name: str) -> Path:
        assert self._path is not None
        return self._path / f"{name}.json"


def job_key(
    config: CompressConfig, splits: Splits, sha256: str, versions: Mapping[str, str], **more: Any
) -> str:
    """Return 16 hex digits for all that the candidates of a job depend on, apart from their budgets.

    All samples are read for it.
    """
    words = {name: value for name, value in config.to_dict().items() if name not in _NO_MATTER}
    digest = hashlib.sha256(json.dumps([words, sha256, dict(versions), more], sort_keys=True).encode())
    for part in (splits.calibrate, splits.choose):
        _add_samples(digest, part)
    return digest.hexdigest()[:16]


def _add_samples(digest: Any, part: Subset) -> None:
    digest.update(np.ascontiguousarray(part.indices).tobytes())
    if part.labels is not None:
        digest.update(np.ascontiguousarray(part.labels).tobytes())
    for batch in part.batches(64):
        for name, values in sorted(batch.inputs.items()):
            digest.update(repr((name, values.dtype.str, values.shape)).encode())
            digest.update(np.ascontiguousarray(values).tobytes())
