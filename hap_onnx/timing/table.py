"""What was timed, kept from job to job: times of contractions by family and numbers of channels.

A table belongs to one machine: the runtime and its version, the provider, the threads and the processor. It
also keeps how whole candidates compared, so that a job with the same table comes to the same result.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from platformdirs import user_cache_path
from scipy.optimize import nnls

from hap_onnx.errors import ModelError, UsageError, ValidationError
from hap_onnx.model.saving import make_folder, write_text
from hap_onnx.runtime.latency import LatencyComparison
from hap_onnx.text_files import describe_age, read_text

_log = logging.getLogger(__name__)

SCHEMA = "hap-onnx/latency/1"

_RATIOS = ("before_ms", "after_ms", "ratio", "ratio_low", "ratio_high")
LEAST = 0.5
"""Microseconds: half of what the profiler can tell."""

Floats = NDArray[np.float64]
Point = tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """What times depend on beside the model."""

    runtime: str
    provider: str
    threads: int | None
    processor: str
    n_cores: int


def this_machine(provider: str, threads: int | None) -> Machine:
    """Describe the machine at hand."""
    return Machine(f"onnxruntime {ort.__version__}", provider, threads, _processor(), os.cpu_count() or 1)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    words = {key.strip(): value.strip() for key, value in facts.items()}
    vectors = sorted(flag for flag in words.get("flags", "").split() if flag.startswith(("avx", "amx")))
    return f"{words.get('model name', platform.machine())} ({' '.join(vectors)})"


def default_path(machine: Machine) -> Path:
    """Where the table of a machine is kept unless a file is named: in the user's cache folder."""
    key = hashlib.sha256(json.dumps(asdict(machine)).encode()).hexdigest()[:12]
    return user_cache_path("hap-onnx") / f"latency-{key}.json"


@dataclass
class LatencyTable:
    """What was timed, in microseconds, rounded as it is written: a job that reads it must plan the same.

    Attributes:
        times: of contractions at (inputs, outputs), by family.
        models: of whole models and of their nodes, by a hash of the model.
        comparisons: of candidates with the original, by the name of their shapes.
    """

    machine: Machine
    times: dict[str, dict[Point, float]] = field(default_factory=dict)
    models: dict[str, tuple[float, dict[str, float]]] = field(default_factory=dict)
    comparisons: dict[str, LatencyComparison] = field(default_factory=dict)

    def missing(self, family: str, points: Sequence[Point]) -> list[Point]:
        """Return the points that were not timed yet."""
        known = self.times.get(family, {})
        return [point for point in points if point not in known]

    def add(self, family: str, found: Mapping[Point, float]) -> None:
        """Remember the times of some points."""
        rounded = {point: round(us, 3) for point, us in found.items()}
        self.times.setdefault(family, {}).update(rounded)

    def add_model(self, key: str, whole: float, nodes: Mapping[str, float]) -> None:
        """Remember the times of a model and of its nodes."""
        self.models[key] = round(whole, 3), {name: round(us, 3) for name, us in nodes.items()}


def fit_times(times: Mapping[Point, float]) -> Floats:
    """Fit ``c0 * n_in * n_out + c1 * n_in + c2 * n_out + c3`` to times, by least squares of relative errors.

    No coefficient is negative: a layer with fewer channels never takes longer.
    """
    points = np.array(list(times), np.float64).reshape(-1, 2)
    values = np.maximum(np.array(list(times.values())), LEAST)  # less is not to be told from nothing
    features = np.stack([points.prod(axis=1), points[:, 0], points[:, 1], np.ones(len(points))], axis=1)
    scales = features.max(axis=0)
    found, _ = nnls(features / scales / values[:, None], np.ones(len(values)))
    coefficients: Floats = found / scales
    return coefficients


def read_table(path: Path, machine: Machine) -> LatencyTable:
    """Read a table; an empty one if there is no such file.

    Raises:
        UsageError: it was measured on another machine, or written by another version.
        ModelError: the file is damaged.
    """
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError:
        return LatencyTable(machine)
    except (OSError, ValueError, RecursionError) as error:  # also lists inside of lists
        raise ModelError(f"the latency table {path} cannot be read ({error}); name another") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    age = describe_age(schema, SCHEMA)
    if schema == SCHEMA and "models" not in content:  # the first tables knew layers only
        age = "an older version of hap-onnx (it has no times of whole models)"
    if age:
        raise UsageError(
            f"the latency table {path} was written by {age}; remove it, or name another file with "
            "--latency-table, and times are taken anew"
        )
    try:
        if schema != SCHEMA:
            raise ValueError(f"its schema is {schema!r}, not {SCHEMA!r}")
        measured_on = Machine(**content["machine"])
        times = {
            str(family): {(int(i), int(o)): _positive(us) for i, o, us in rows}
            for family, rows in content["families"].items()
        }
        models = {
            str(key): (_positive(whole), {str(name): _positive(us) for name, us in nodes.items()})
            for key, (whole, nodes) in content["models"].items()
        }
        comparisons = {str(name): _comparison(entry) for name, entry in content["comparisons"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelError(f"the latency table {path} is damaged ({error}); name another") from error
    if measured_on != machine:
        raise UsageError(
            f"the latency table {path} was measured with {_describe(measured_on)}, but this is "
            f"{_describe(machine)}; name another file with --latency-table"
        )
    return LatencyTable(machine, times, models, comparisons)


def _write(text: str, path: Path) -> None:
    make_folder(path.parent)
    write_text(path, text, what="the latency table")


def _to_text(table: LatencyTable) -> str:
    content = {
        "schema": SCHEMA,
        "machine": asdict(table.machine),
        "families": {
            family: [[*point, us] for point, us in sorted(rows.items())]
            for family, rows in sorted(table.times.items())
        },
        "models": {key: list(entry) for key, entry in sorted(table.models.items())},
        "comparisons": {name: asdict(entry) for name, entry in sorted(table.comparisons.items())},
    }
    return json.dumps(content, indent=1) + "\n"


class KeptTable:
    """A table, and the file in which it is kept, if there is one.

    A table that nobody named may be lost, and is begun anew where it does not fit; of a cache that is no
    news. In a cache are times of single layers only: those of whole models would outlive the moment in which
    the machine was busy.

    Raises:
        UsageError, ModelError: see ``read_table``; not unless the table ``was_named``.
    """

    def __init__(
        self,
        machine: Machine,
        path: Path | None = None,
        *,
        was_named: bool = True,
        is_cache: bool = False,
    ) -> None:
        self._path, self._is_cache, self._was_named = path, is_cache, was_named and not is_cache
        self._level = logging.INFO if is_cache else logging.WARNING
        self._written = ""
        self.table = LatencyTable(machine)
        if path is not None:
            try:
                self.table = read_table(path, machine)
            except (ModelError, UsageError) as error:
                if self._was_named:
                    raise
                _log.log(self._level, "not used: %s", error)

    def save(self) -> None:
        """Write what was added, if anything was; raises ValidationError, but not for a cache."""
        if self._path is None:
            return
        table = replace(self.table, models={}, comparisons={}) if self._is_cache else self.table
        text = _to_text(table)
        if text == self._written:
            return
        try:
            _write(text, self._path)
            self._written = text
        except ValidationError as error:
            if self._was_named:
                raise
            _log.log(self._level, "times are not kept: %s", error)


def _positive(value: float) -> float:
    number = float(value)
    if not 0 <= number < 1e12:
        raise ValueError(f"{value!r} is no time")
    return number


def _comparison(entry: Mapping[str, Any]) -> LatencyComparison:
    numbers = {name: _positive(entry[name]) for name in _RATIOS}
    return LatencyComparison(**{**entry, **numbers})


def _describe(machine: Machine) -> str:
    return (
        f"{machine.runtime}, {machine.provider}, {machine.threads} threads on {machine.n_cores} cores of "
        f"{machine.processor}"
    )
