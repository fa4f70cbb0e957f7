"""Plan: which channels stay and which layers become implants. Chosen by ``choose``, kept in a file.

``CompressionPlan`` records the decision with everything that is needed to carry it out again, and
``save_plan`` and ``load_plan`` keep it as ``PLAN.json`` and ``PLAN.safetensors``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns the names of bfloat16 and the like)
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from hap_onnx.config import plan_weights_path
from hap_onnx.coupling.channels import Coupling
from hap_onnx.errors import ModelError, UsageError, ValidationError
from hap_onnx.implants.factors import KINDS
from hap_onnx.interrupts import interruptible
from hap_onnx.model.temporary import folder_beside
from hap_onnx.text_files import describe_age, read_text

PLAN_SCHEMA = "hap-onnx/plan/1"
_MAX_PLAN_BYTES = 2**28

Ints = NDArray[np.int64]

# --------------------------------------------------------------- the decision


@dataclass(frozen=True, eq=False)
class GroupDecision:
    """Which channels of a group stay: positions 0..size-1 within the group, ascending and read-only.

    Raises ValueError unless ``keep`` and ``drop`` together are each position once.
    """

    group: str
    keep: Ints
    drop: Ints

    def __post_init__(self) -> None:
        for name in ("keep", "drop"):
            given = np.asarray(getattr(self, name))
            if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
                raise ValueError(f"{self.group}: {name} must be a list of positions")
            positions = given.astype(np.int64)
            if (np.diff(positions) <= 0).any():
                raise ValueError(f"{self.group}: {name} must ascend, without repetition")
            positions.flags.writeable = False
            object.__setattr__(self, name, positions)
        if not np.array_equal(np.sort(np.concatenate([self.keep, self.drop])), np.arange(self.size)):
            raise ValueError(f"{self.group}: keep and drop do not part the positions 0..{self.size - 1}")

    @classmethod
    def from_keep(cls, group: str, size: int, keep: Iterable[int]) -> GroupDecision:
        """Decide to keep these of ``size`` channels, in whatever order they are given."""
        kept = np.unique(np.array(list(keep), np.int64))
        if len(kept) and (kept[0] < 0 or kept[-1] >= size):
            raise ValueError(f"{group}: keeps positions beyond its {size} channels")
        return cls(group, kept, np.setdiff1d(np.arange(size), kept))

    @property
    def size(self) -> int:
        return len(self.keep) + len(self.drop)


@dataclass(frozen=True, eq=False)
class NodeReplacement:
    """A node that becomes an implant.

    Attributes:
        kind: one of ``implants.KINDS``.
        rank: per conv group; for pointwise how many output channels get 1x1 kernels.
        channels: for pointwise, which: positions of the output channels of the original node, ascending.
        predicted_loss: what the curvature of the layer says, at the widths of the plan.
        expected_loss: that, corrected by what was measured on the layer.
        measured: the kind, the predicted and the measured loss of each implant of the layer that was tried.
    """

    node: str
    kind: str
    rank: int
    channels: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    predicted_loss: float = 0.0
    expected_loss: float = 0.0
    measured: tuple[tuple[str, float, float], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.rank < 1:
            raise ValueError(f"{self.node}: no implant is of kind {self.kind!r} and rank {self.rank}")
        losses = [loss for _, *pair in self.measured for loss in pair]
        if not np.isfinite([self.predicted_loss, self.expected_loss, *losses]).all():
            raise ValueError(f"{self.node}: losses must be finite")
        channels = np.array(self.channels, np.int64)
        n_wanted = self.rank if self.kind == "pointwise" else 0
        if channels.shape != (n_wanted,) or (np.diff(channels) <= 0).any() or (channels < 0).any():
            raise ValueError(f"{self.node}: a {self.kind} implant names {n_wanted} ascending channels")
        channels.flags.writeable = False
        object.__setattr__(self, "channels", channels)


@dataclass(frozen=True, eq=False)
class CompressionPlan:
    """All that is needed to compress one model again: no data, no training.

    Attributes:
        model_sha256: hash of the model file that the plan is for.
        version: the hap-onnx that made it.
        config: the options it was made with, JSON-ready.
        decisions: one per channel group.
        replacements: the nodes that become implants.
        predicted_loss: the expected increase of the loss, by group.
        weights: initializers that are more than slices of the original's (refitted), by name, read-only.
        notes: why, by group.
        layer_notes: why, by contraction, replaced or not.
        training: how the weights were trained, JSON-ready; empty where they were not.
        then: how the compressed model becomes the final file (a ``quantize.Recipe``, JSON-ready); empty if it
            is the final file. Of the last round only.
        earlier: the plans of the rounds before, first round first. Each belongs to the model that the one
            before it makes, the first to the original; this plan then belongs to what the last of them makes.

    Raises ValueError for values that cannot be written to a plan file.
    """

    model_sha256: str
    version: str
    config: Mapping[str, Any]
    decisions: tuple[GroupDecision, ...]
    predicted_loss: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    replacements: tuple[NodeReplacement, ...] = ()
    layer_notes: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    then: Mapping[str, Any] = field(default_factory=dict)
    earlier: tuple[CompressionPlan, ...] = ()

    def __post_init__(self) -> None:
        if any(plan.earlier for plan in self.earlier):
            raise ValueError("the rounds of a plan are one list")
        groups = [decision.group for decision in self.decisions]
        if len(set(groups)) != len(groups):
            raise ValueError("a group is decided twice")
        nodes = [replacement.node for replacement in self.replacements]
        if len(set(nodes)) != len(nodes):
            raise ValueError("a node is replaced twice")
        strangers = sorted({*self.predicted_loss, *self.notes} - set(groups))
        if strangers:
            raise ValueError(f"losses or notes for groups that are not decided: {', '.join(strangers)}")
        losses = {group: float(loss) for group, loss in self.predicted_loss.items()}
        weights = {name: _frozen_copy(name, array) for name, array in sorted(self.weights.items())}
        frozen: dict[str, Any] = {
            "config": json.loads(json.dumps(dict(self.config), allow_nan=False)),
            "decisions": tuple(self.decisions),
            "replacements": tuple(self.replacements),
            "predicted_loss": json.loads(json.dumps(losses, allow_nan=False)),
            "weights": weights,
            "notes": dict(self.notes),
            "layer_notes": dict(self.layer_notes),
            "training": json.loads(json.dumps(dict(self.training), allow_nan=False)),
            "then": json.loads(json.dumps(dict(self.then), allow_nan=False)),
            "earlier": tuple(self.earlier),
        }
        for name, value in frozen.items():
            object.__setattr__(self, name, MappingProxyType(value) if isinstance(value, dict) else value)

    def check_model(self, sha256: str) -> None:
        """Raise ModelError unless the plan was made for the model with this hash."""
        if sha256 != self.model_sha256:
            raise ModelError(
                "the plan was made for another model: it belongs to the one with SHA-256 "
                f"{self.model_sha256[:16]}..., this one has {sha256[:16]}..."
            )

    def decisions_for(self, coupling: Coupling) -> tuple[GroupDecision, ...]:
        """Return the decisions in the order of the groups of ``coupling``.

        Raises:
            ModelError: the groups of the plan are not those of the model.
        """
        decided = {decision.group: decision for decision in self.decisions}
        problems = [
            f"'{group.name}' has {group.size} channels, the plan decides "
            + (str(decided[group.name].size) if group.name in decided else "none")
            for group in coupling.groups
            if group.name not in decided or decided[group.name].size != group.size
        ]
        known = {group.name for group in coupling.groups}
        problems += [f"there is no group '{name}'" for name in decided if name not in known]
        if problems:
            raise ModelError(f"the plan does not fit the model's channel groups: {'; '.join(problems[:5])}")
        return tuple(decided[group.name] for group in coupling.groups)


def _frozen_copy(name: str, array: np.ndarray) -> np.ndarray:
    copy = array
    if array.flags.writeable or not array.flags.c_contiguous:
        copy = np.array(array, order="C")
    if copy.dtype.kind in "OUSmM":
        raise ValueError(f"weight '{name}' has type {copy.dtype}, which is no number")
    copy = copy.astype(copy.dtype.newbyteorder("="), copy=False)
    copy.flags.writeable = False  # large weights are not copied again
    return copy


# --------------------------------------------------------------- the file


def plan_hash(plan: CompressionPlan) -> str:
    """Return 16 hex digits that tell plans apart: equal plans have equal ones."""
    content = hashlib.sha256()
    for name, array in _all_weights(plan).items():
        for part in (name.encode(), str((array.dtype.name, array.shape)).encode(), array.tobytes()):
            content.update(len(part).to_bytes(8, "little") + part)
    text = json.dumps(_to_document(plan, content.hexdigest()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_plan(plan: CompressionPlan, path: str | Path) -> None:
    """Write ``path`` (JSON) and the weights beside it (``.safetensors``), each complete or not at all.

    Raises:
        UsageError: ``path`` is the name of the weights.
        ValidationError: the folder or the disk does not take the files.
    """
    path = Path(path)
    weights_path = plan_weights_path(path)
    if weights_path == path:
        raise UsageError(f"{path} is the name of the plan's weights: give the plan one that ends in .json")
    try:
        with folder_beside(path) as folder:
            temporary = folder / weights_path.name, folder / path.name
            with interruptible():
                stored = {name: _as_storable(array) for name, array in _all_weights(plan).items()}
                safetensors.numpy.save_file(stored, temporary[0])
                document = _to_document(plan, hash_file(temporary[0]))
                text = json.dumps(document, sort_keys=True, indent=1, allow_nan=False) + "\n"
                temporary[1].write_text(text, encoding="utf-8")
                shutil.copymode(temporary[1], temporary[0])  # safetensors lets nobody else read
                for file in temporary:
                    _sync(file)
            os.replace(temporary[0], weights_path)
            os.replace(temporary[1], path)  # last: a plan that is there is complete
    except (OSError, safetensors.SafetensorError) as error:
        raise ValidationError(
            f"{path} cannot be written ({getattr(error, 'strerror', None) or error}); "
            "check the folder, its permissions and the free space"
        ) from error


def load_plan(path: str | Path) -> CompressionPlan:
    """Read a plan that ``save_plan`` wrote.

    Raises:
        ModelError: a file is missing, damaged, or does not belong to the other.
    """
    path = Path(path)
    try:
        document = json.loads(
            read_text(path, max_bytes=_MAX_PLAN_BYTES), parse_constant=_refuse_constant
        )
    except OSError as error:
        raise ModelError(f"the plan {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"the plan {path} is damaged: it is not valid JSON ({error})") from error
    if not isinstance(document, dict) or document.get("schema") != PLAN_SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else None
        if age := describe_age(found, PLAN_SCHEMA):
            raise ModelError(
                f"the plan {path} was written by {age}; apply it with that version, or make it anew with "
                "'hap-onnx compress ... --save-plan'"
            )
        raise ModelError(
            f"{path} is not a plan that this version can read: its schema is {found!r}, not {PLAN_SCHEMA!r}"
        )
    try:
        _check_types(document)
        weights = _load_weights(plan_weights_path(path), document["weights"])
        rounds = [*document.get("earlier", []), document]
        for entry in rounds:
            _check_types(entry)
        *earlier, last = map(_from_document, rounds, _split_weights(weights, len(rounds)))
        return replace(last, earlier=tuple(earlier))
    except (ValueError, KeyError, OverflowError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ModelError(f"the plan {path} is damaged: {what}") from error


def _prefix(index: int) -> str:
    """How the names of a round's weights begin in the file, if there are several rounds."""
    return f"round:{index}:"


def _all_weights(plan: CompressionPlan) -> dict[str, np.ndarray]:
    """The weights of all rounds under names that tell them apart; those of a single round as they are."""
    if not plan.earlier:
        return dict(plan.weights)
    rounds = (*plan.earlier, plan)
    return {
        _prefix(index) + name: array
        for index, part in enumerate(rounds)
        for name, array in part.weights.items()
    }


def _split_weights(weights: Mapping[str, np.ndarray], n_rounds: int) -> list[dict[str, np.ndarray]]:
    """Undo ``_all_weights``; raises ValueError on a name that belongs to no round."""
    if n_rounds == 1:
        return [dict(weights)]
    rounds: list[dict[str, np.ndarray]] = [{} for _ in range(n_rounds)]
    for name, array in weights.items():
        index = next((index for index in range(n_rounds) if name.startswith(_prefix(index))), None)
        if index is None:
            raise ValueError(f"the weight '{name}' belongs to no round")
        rounds[index][name.removeprefix(_prefix(index))] = array
    return rounds


def _to_document(plan: CompressionPlan, weights_sha256: str) -> dict[str, Any]:
    tensors = {
        name: f"{array.dtype.name}[{','.join(map(str, array.shape))}]"
        for name, array in _all_weights(plan).items()
    }
    document = _describe(plan)
    if plan.earlier:
        document["earlier"] = [_describe(part) for part in plan.earlier]
    return {**document, "weights": {"sha256": weights_sha256, "tensors": tensors}}


def _describe(plan: CompressionPlan) -> dict[str, Any]:
    """One round of a plan, without its weights."""
    groups = []
    for decision in plan.decisions:
        entry: dict[str, Any] = {
            "name": decision.group,
            "size": decision.size,
            "width": len(decision.keep),
            "keep": _to_runs(decision.keep),
        }
        if decision.group in plan.predicted_loss:
            entry["predicted_loss"] = plan.predicted_loss[decision.group]
        if decision.group in plan.notes:
            entry["note"] = plan.notes[decision.group]
        groups.append(entry)
    implants = []
    for replacement in plan.replacements:
        entry = {
            "node": replacement.node,
            "kind": replacement.kind,
            "rank": replacement.rank,
            "predicted_loss": replacement.predicted_loss,
            "expected_loss": replacement.expected_loss,
        }
        if len(replacement.channels):
            entry["channels"] = _to_runs(replacement.channels)
        if replacement.measured:
            entry["measured"] = [list(measured) for measured in replacement.measured]
        implants.append(entry)
    document = {
        "schema": PLAN_SCHEMA,
        "hap_onnx": plan.version,
        "model_sha256": plan.model_sha256,
        "config": dict(plan.config),
        "groups": groups,
        "implants": implants,
        "layers": dict(plan.layer_notes),
    }
    if plan.training:
        document["training"] = dict(plan.training)
    if plan.then:
        document["then"] = dict(plan.then)
    return document


def _from_document(document: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> CompressionPlan:
    """Undo ``_describe``."""
    groups = document["groups"]
    return CompressionPlan(
        model_sha256=document["model_sha256"],
        version=document["hap_onnx"],
        config=document["config"],
        decisions=tuple(
            GroupDecision.from_keep(entry["name"], _checked_size(entry), _from_runs(entry))
            for entry in groups
        ),
        predicted_loss={e["name"]: e["predicted_loss"] for e in groups if "predicted_loss" in e},
        weights=weights,
        notes={e["name"]: e["note"] for e in groups if "note" in e},
        replacements=tuple(_load_replacement(entry) for entry in document.get("implants", [])),
        layer_notes=document.get("layers", {}),
        training=document.get("training", {}),
        then=document.get("then", {}),
    )


_TYPES: Mapping[str, type] = MappingProxyType(
    {"hap_onnx": str, "model_sha256": str, "config": dict, "groups": list}
)
_GROUP_TYPES: Mapping[str, type] = MappingProxyType({"name": str, "size": int, "width": int, "keep": str})


def _check_words(words: Mapping[str, Any]) -> None:
    """Raise ValueError unless the options that carrying out a plan reads are what they must be."""
    shapes = words.get("input_shapes", {})
    if not isinstance(shapes, dict) or not all(_is_list_of(shape, int) for shape in shapes.values()):
        raise ValueError("'input_shapes' does not map names to lists of sizes")
    if any(size < 1 for shape in shapes.values() for size in shape):
        raise ValueError("a size in 'input_shapes' is not positive")
    for name in ("exclude", "only"):
        if not _is_list_of(words.get(name, []), str):
            raise ValueError(f"'{name}' is no list of patterns")
    if not _is_list_of([words.get("seed", 0)], int):
        raise ValueError("'seed' is no whole number")


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, kind) and not isinstance(entry, bool) for entry in value
    )


def _check_types(document: Any) -> None:
    """Raise ValueError or KeyError unless a round has what it must have."""
    if not isinstance(document, dict):
        raise ValueError("an entry of 'earlier' is no object")
    for name, expected in _TYPES.items():
        if not isinstance(document[name], expected):
            raise ValueError(f"'{name}' is no {expected.__name__}")
    _check_words(document["config"])
    for entry in document["groups"]:
        if not isinstance(entry, dict):
            raise ValueError("an entry of 'groups' is no object")
        for name, expected in _GROUP_TYPES.items():
            if not isinstance(entry[name], expected) or isinstance(entry[name], bool):
                raise ValueError(f"'{name}' of a group is no {expected.__name__}")
        loss = entry.get("predicted_loss", 0.0)
        if not isinstance(loss, (int, float)) or isinstance(loss, bool):
            raise ValueError(f"'predicted_loss' of '{entry['name']}' is no number")
        if not isinstance(entry.get("note", ""), str):
            raise ValueError(f"'note' of '{entry['name']}' is no text")
    if not isinstance(document.get("implants", []), list):
        raise ValueError("'implants' is no list")
    for entry in document.get("implants", []):
        _check_implant(entry)
    notes = document.get("layers", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise ValueError("'layers' does not map names to texts")
    for name, kind in (("training", dict), ("then", dict), ("earlier", list)):
        if not isinstance(document.get(name, kind()), kind):
            raise ValueError(f"'{name}' is no {kind.__name__}")
    for name, value in document.get("training", {}).items():
        if name in _TRAINING_TYPES and (
            not isinstance(value, _TRAINING_TYPES[name]) or isinstance(value, bool)
        ):
            raise ValueError(f"'{name}' of 'training' has the wrong type")


_TRAINING_TYPES: Mapping[str, type | tuple[type, ...]] = MappingProxyType(
    {
        "epochs": int,
        "best_epoch": (int, float),
        "start_score": (int, float, type(None)),
        "best_score": (int, float, type(None)),
        "rollbacks": int,
        "augmentations": list,
    }
)

_IMPLANT_TYPES: Mapping[str, type | tuple[type, ...]] = MappingProxyType(
    {"node": str, "kind": str, "rank": int, "predicted_loss": (int, float), "expected_loss": (int, float)}
)


def _check_implant(entry: Any) -> None:
    if not isinstance(entry, dict):
        raise ValueError("an entry of 'implants' is no object")
    for name, expected in _IMPLANT_TYPES.items():
        if not isinstance(entry[name], expected) or isinstance(entry[name], bool):
            raise ValueError(f"'{name}' of an implant has the wrong type")
    if not isinstance(entry.get("channels", ""), str):
        raise ValueError(f"'channels' of the implant '{entry['node']}' is no text")
    measured = entry.get("measured", [])
    if not isinstance(measured, list) or not all(_is_measured(item) for item in measured):
        raise ValueError(f"'measured' of the implant '{entry['node']}' is no list of a kind and two losses")
    if not 0 < entry["rank"] <= _MAX_SIZE:
        raise ValueError(f"the implant '{entry['node']}' has rank {entry['rank']}")


def _is_measured(item: Any) -> bool:
    return (
        isinstance(item, list)
        and len(item) == 3
        and isinstance(item[0], str)
        and all(isinstance(loss, (int, float)) and not isinstance(loss, bool) for loss in item[1:])
    )


def _load_replacement(entry: Mapping[str, Any]) -> NodeReplacement:
    runs = {"name": entry["node"], "keep": entry.get("channels", ""), "size": _MAX_SIZE}
    channels = _from_runs({**runs, "width": entry["rank"]}) if "channels" in entry else []
    return NodeReplacement(
        node=entry["node"],
        kind=entry["kind"],
        rank=entry["rank"],
        channels=np.array(channels, np.int64),
        predicted_loss=float(entry["predicted_loss"]),
        expected_loss=float(entry["expected_loss"]),
        measured=tuple((kind, float(one), float(two)) for kind, one, two in entry.get("measured", [])),
    )


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


_MAX_SIZE = 1 << 28  # channels of one group: a damaged number must not ask for all memory


def _checked_size(entry: Mapping[str, Any]) -> int:
    if not 0 < entry["size"] <= _MAX_SIZE:
        raise ValueError(f"'{entry['name']}' has {entry['size']} channels")
    return int(entry["size"])


def _to_runs(positions: Ints) -> str:
    """Write ascending positions for people: ``0-3,7``."""
    if not len(positions):
        return ""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    runs = np.split(positions, breaks)
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _from_runs(entry: Mapping[str, Any]) -> list[int]:
    positions: list[int] = []
    for run in entry["keep"].split(",") if entry["keep"] else []:
        first, _, last = run.partition("-")
        bounds = (first, last or first)
        if not all(bound.isascii() and bound.isdigit() and len(bound) < 10 for bound in bounds):
            raise ValueError(f"'{entry['name']}' keeps {run!r}, which is neither a position nor a range")
        start, stop = int(bounds[0]), int(bounds[1])
        if stop < start or stop >= entry["size"] or (positions and start <= positions[-1]):
            raise ValueError(f"'{entry['name']}' keeps {run!r}: out of order, or beyond its channels")
        if len(positions) + stop - start >= entry["width"]:
            raise ValueError(f"'{entry['name']}' keeps more channels than {entry['width']}, as it says")
        positions.extend(range(start, stop + 1))
    if len(positions) != entry["width"]:
        raise ValueError(f"'{entry['name']}' keeps {len(positions)} channels and says {entry['width']}")
    return positions


_STORED_AS_THEY_ARE = frozenset(
    "float64 float32 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool".split()
)


def _as_storable(array: np.ndarray) -> np.ndarray:
    """View types that safetensors does not give to numpy (bfloat16 ...) as integers; the JSON names them."""
    return array if array.dtype.name in _STORED_AS_THEY_ARE else array.view(f"u{array.dtype.itemsize}")


def _load_weights(path: Path, entry: Any) -> dict[str, np.ndarray]:
    if not isinstance(entry, dict) or not isinstance(entry["sha256"], str):
        raise ValueError("'weights' needs a 'sha256'")
    if not isinstance(entry["tensors"], dict):
        raise ValueError("'weights' needs its 'tensors'")
    try:
        data = path.read_bytes()  # not mapped: the file may change
        digest = hashlib.sha256(data).hexdigest()
        if digest != entry["sha256"]:
            raise ModelError(
                f"{path} does not belong to the plan beside it, or is damaged: its SHA-256 is "
                f"{digest[:16]}..., the plan says {entry['sha256'][:16]}..."
            )
        stored = safetensors.numpy.load(data)
        del data
    except OSError as error:
        raise ModelError(f"the plan's weights {path} cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise ModelError(f"the plan's weights {path} are damaged: {error}") from error
    if set(stored) != set(entry["tensors"]):
        odd = sorted(set(stored) ^ set(entry["tensors"]))
        raise ValueError(f"the plan and its weights differ in {', '.join(odd[:5])}")
    weights = {}
    for name, array in stored.items():
        described = entry["tensors"][name]
        type_name = described.partition("[")[0] if isinstance(described, str) else ""
        try:
            dtype = np.dtype(type_name) if type_name else array.dtype
            typed = array if type_name in _STORED_AS_THEY_ARE else array.view(dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(f"weight '{name}' is described as {described!r}") from error
        if described != f"{typed.dtype.name}[{','.join(map(str, typed.shape))}]":
            raise ValueError(f"weight '{name}' is not {described}, as the plan says")
        typed.flags.writeable = False
        weights[name] = typed
    return weights


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content; raises OSError if it cannot be read."""
    digest = hashlib.sha256()
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file")
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
