"""What an interrupted job has finished, kept in ``--work-dir`` for the next one with the same words.

A job has a folder of its own there, named after all that its candidates depend on: the model, the data, the
options, the versions. Other words mean another folder, so nothing is ever mixed up. Sensitivities depend on
fewer words, and lie beside these folders for all jobs that need the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from hap_onnx.config import BUDGETS, CompressConfig
from hap_onnx.data.calibration import Splits, Subset
from hap_onnx.errors import ModelError, ValidationError
from hap_onnx.jobs.machine import pick_device
from hap_onnx.model.saving import make_folder
from hap_onnx.model.temporary import remove_all_leftovers
from hap_onnx.planning.plan import CompressionPlan, load_plan, save_plan

_log = logging.getLogger(__name__)

_NO_MATTER = (  # to what a candidate is; budgets are part of its name
    "output", "report", "html", "html_images", "summary", "save_plan", "work_dir", "dry_run", "json",
    "keep_rejected", "val", "max_drop", "latency_table", "objective", "sweep", "then", "dist_timeout",
    *BUDGETS,
)  # fmt: skip


_OF_LOSSES = ("ranking", "probes", "exclude", "only", "seed")
"""Of a config: what sensitivities depend on, apart from the data and whether there are implants."""


class Keys(NamedTuple):
    """16 hex digits each, for all that the candidates of a job depend on, and for all that losses do."""

    job: str
    losses: str


class WorkFolder:
    """Plans of finished candidates, and folders for training; without a path nothing is kept."""

    def __init__(self, work_dir: Path | None, key: str, losses_key: str = "") -> None:
        self._path = None if work_dir is None else work_dir / key
        self._losses_key = losses_key
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

    def losses(self) -> Path | None:
        """Where sensitivities are kept, for this job and all others that need the same."""
        if self._path is None or not self._losses_key:
            return None
        make_folder(self._path.parent)
        return self._path.parent / f"losses-{self._losses_key}.safetensors"

    def latency_table(self) -> Path | None:
        """Where times are kept, so that a job that goes on plans as it would have done."""
        return None if self._path is None else self._file("latency")

    def _file(self, name: str) -> Path:
        assert self._path is not None
        return self._path / f"{name}.json"


def work_keys(
    config: CompressConfig, splits: Splits, sha256: str, versions: Mapping[str, str], **more: Any
) -> Keys:
    """Return the names under which a job, and its sensitivities, are kept. Budgets do not matter to them.

    All samples are read for it.
    """
    calibrate, choose = _hash_samples(splits.calibrate), _hash_samples(splits.choose)
    words = {name: value for name, value in config.to_dict().items() if name not in _NO_MATTER}
    of_losses = {name: getattr(config, name) for name in _OF_LOSSES}
    of_losses |= {"batch_size": config.batch_size, "with_implants": config.method != "prune"}
    of_losses |= {"device": pick_device(config.device)}
    common = [sha256, dict(versions), more, calibrate]
    return Keys(_key([words, *common, choose]), _key([of_losses, *common]))


def _key(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _hash_samples(part: Subset) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(part.indices).tobytes())
    if part.labels is not None:
        digest.update(np.ascontiguousarray(part.labels).tobytes())
    for batch in part.batches(64):
        for name, values in sorted(batch.inputs.items()):
            digest.update(repr((name, values.dtype.str, values.shape)).encode())
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
