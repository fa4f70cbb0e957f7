"""Arrays as samples: checks against the model's inputs, and reading rows without holding everything.

An array on disk is read by seeking, not by mapping: a file that is cut while we run then gives an
error instead of killing the process, and thousands of files need no open handles.
"""

from __future__ import annotations

import math
import os
import shutil
import weakref
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
from numpy.lib import format as npy_format
from PIL import Image

from hap_onnx.data.preprocess import nearest_word
from hap_onnx.errors import CalibrationError
from hap_onnx.interrupts import hold_signals
from hap_onnx.model.input_spec import InputSpec, format_shape, is_float, type_name
from hap_onnx.model.temporary import make_temporary_folder

LABELS = "labels"
_CHUNK_BYTES = 1 << 24
_MAX_DEFLATED = 1100  # how many bytes one byte of a .npz that NumPy writes can stand for, and a little more
_LIKELY_LABELS = ("label", "y", "target", "targets", "classes", "class", "gt")


@dataclass(frozen=True)
class Stamp:
    """Tells whether a file is still the one that it was: what was learnt of it holds for no other."""

    size: int
    modified_ns: int
    number: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """Take it from what the system says of a file."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)

    def check(self, status: os.stat_result, where: str) -> None:
        """Raise CalibrationError unless the file is the same."""
        if status.st_size < self.size:
            raise CalibrationError(
                f"{where}: the file ends too early (cut while it was in use?); write it again."
            )
        if Stamp.of(status) != self:
            raise CalibrationError(
                f"{where}: the file was changed while it was in use; leave the data alone while hap-onnx "
                "runs, and start again."
            )


class StoredArray(Protocol):
    """An array with the sample axis first, in memory or on disk. ``where`` names it for messages."""

    where: str

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The rows, in the order asked for. Raises CalibrationError when the file fails."""


def _remove_folder(path: Path) -> None:
    with hold_signals():
        shutil.rmtree(path, ignore_errors=True)


class SpillFolder:
    """A temporary folder for unpacked arrays, removed with its owner or when the program ends."""

    def __init__(self, parent: Path | None = None) -> None:
        self._parent = parent
        self._path: Path | None = None
        self._n_files = 0

    def new_file(self) -> Path:
        """A fresh path inside the folder, which is made when first needed."""
        if self._path is None:
            with hold_signals():
                self._path = make_temporary_folder("data", self._parent)
                weakref.finalize(self, _remove_folder, self._path)
        self._n_files += 1
        return self._path / f"{self._n_files}.bin"

    def free_bytes(self, path: Path) -> int:
        """What the disk that holds ``path`` still takes."""
        return shutil.disk_usage(path.parent).free


class MemoryArray:
    """A NumPy array that the caller holds (it may be a memory map)."""

    def __init__(self, array: np.ndarray, where: str) -> None:
        self._array = array
        self.where = where

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> np.dtype:
        return self._array.dtype

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self._array[rows]


class FileArray:
    """Rows of a C-ordered array at ``offset`` bytes into a file."""

    def __init__(
        self, path: Path, *, offset: int, shape: tuple[int, ...], dtype: np.dtype, where: str
    ) -> None:
        self._path, self._offset = path, offset
        self.shape, self.dtype, self.where = shape, dtype, where
        with _reading(where):
            self._stamp = Stamp.of(path.stat())

    def read(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        flat = out.reshape(-1).view(np.uint8)
        row_bytes = flat.size // max(1, len(rows))
        try:
            with self._path.open("rb") as file:
                for first, row, count in _runs(rows):
                    file.seek(self._offset + row * row_bytes)
                    wanted = flat[first * row_bytes : (first + count) * row_bytes].data
                    if file.readinto(wanted) != len(wanted):
                        raise CalibrationError(
                            f"{self.where}: the file ends too early (cut while it was in use?); write it "
                            "again."
                        )
                self._stamp.check(os.fstat(file.fileno()), self.where)
        except FileNotFoundError as error:
            raise CalibrationError(
                f"{self.where}: the file was there at the start and is gone now; keep the data in place "
                "while "
                "hap-onnx runs."
            ) from error
        except OSError as error:
            raise CalibrationError(f"{self.where}: cannot be read ({error}).") from error
        return out


class PackedArray:
    """An array that has no plain bytes on disk (compressed, or Fortran order): unpacked at first use."""

    def __init__(
        self,
        path: Path,
        member: str | None,
        *,
        shape: tuple[int, ...],
        dtype: np.dtype,
        where: str,
        spill: SpillFolder,
    ) -> None:
        self._path, self._member, self._spill = path, member, spill
        self.shape, self.dtype, self.where = shape, dtype, where
        self._unpacked: FileArray | None = None
        with _reading(where):
            self._stamp = Stamp.of(path.stat())

    def read(self, rows: np.ndarray) -> np.ndarray:
        if self._unpacked is None:
            self._unpacked = self._unpack()
        return self._unpacked.read(rows)

    def _unpack(self) -> FileArray:
        target = self._spill.new_file()
        n_bytes = self.dtype.itemsize * math.prod(self.shape)
        if n_bytes > self._spill.free_bytes(target):
            raise CalibrationError(
                f"{self.where}: unpacking needs {n_bytes / 1e9:.1f} GB in {target.parent.parent}, which is "
                "more than "
                "is free; save the array with numpy.savez (not savez_compressed) or point TMPDIR elsewhere."
            )
        with _reading(self.where):
            self._stamp.check(self._path.stat(), self.where)
            with _open_member(self._path, self._member) as source, target.open("wb") as file:
                fortran_order = _read_header(source)[2]
                for chunk in iter(lambda: source.read(_CHUNK_BYTES), b""):
                    _write_chunk(file, chunk, target)
            self._stamp.check(self._path.stat(), self.where)
        if target.stat().st_size < n_bytes:
            raise CalibrationError(f"{self.where}: holds less data than its header says; write it again.")
        if fortran_order:
            target = self._reorder(target)
        return FileArray(target, offset=0, shape=self.shape, dtype=self.dtype, where=self.where)

    def _reorder(self, path: Path) -> Path:
        columns = np.memmap(path, dtype=self.dtype, mode="r", shape=self.shape, order="F")
        target = self._spill.new_file()
        step = max(1, _CHUNK_BYTES // max(1, columns.nbytes // max(1, len(columns))))
        with _reading(self.where), target.open("wb") as file:
            for start in range(0, len(columns), step):
                _write_chunk(file, np.ascontiguousarray(columns[start : start + step]).data, target)
        path.unlink()
        return target


class ArraySource:
    """Samples made of arrays in one or more parts (files, or one dict); part order is sample order.

    ``names`` are those of the files, where there are several.

    Checks names, types, shapes and counts when made, values in `drop_bad`.
    """

    class_names: tuple[str, ...] | None = None
    preprocessing = "Arrays are given to the model as they are, without preprocessing."

    def __init__(
        self,
        parts: Sequence[tuple[Mapping[str, StoredArray], np.ndarray | None]],
        inputs: Sequence[InputSpec],
        *,
        notes: Sequence[str] = (),
        names: Sequence[str] = (),
    ) -> None:
        self._inputs, self.notes, self._names = tuple(inputs), tuple(notes), tuple(names)
        sizes = _FreeSizes(inputs)
        for arrays, _ in parts:
            for spec in inputs:
                check_dtype(spec, arrays[spec.name].dtype, arrays[spec.name].where)
                sizes.check(spec, arrays[spec.name].shape, arrays[spec.name].where)
            _check_counts([arrays[spec.name] for spec in inputs])
        self._parts = [{spec.name: arrays[spec.name] for spec in inputs} for arrays, _ in parts]
        counts = [len_of(next(iter(arrays.values()))) for arrays in self._parts]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.n_samples = int(self._starts[-1])
        labels = [part_labels for _, part_labels in parts if part_labels is not None]
        self.labels = np.concatenate(labels) if labels and len(labels) == len(parts) else None

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The samples as the model's types, in the order asked for."""
        out: dict[str, np.ndarray] = {}
        part_of = np.searchsorted(self._starts, indices, side="right") - 1
        for part in np.unique(part_of):
            at = np.flatnonzero(part_of == part)
            for spec in self._inputs:
                values = cast_values(
                    spec, self._parts[part][spec.name].read(indices[at] - self._starts[part])
                )
                if len(at) == len(indices):
                    out[spec.name] = values
                else:
                    out.setdefault(spec.name, np.empty((len(indices), *values.shape[1:]), values.dtype))[
                        at
                    ] = values
        return out

    def name_of(self, index: int) -> str | None:
        """The file of a sample, with its place where the file has several; None where there is no choice."""
        if not self._names:
            return None
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        is_alone = self._starts[part + 1] - self._starts[part] == 1
        return self._names[part] if is_alone else f"{self._names[part]}[{index - self._starts[part]}]"

    def picture_of(self, index: int) -> Image.Image | None:
        """The only input that looks like an image, its numbers in their own range; else None."""
        found = [
            picture
            for values in self.read(np.array([index])).values()
            if values.ndim == 4 and (picture := array_picture(values[0])) is not None
        ]
        return found[0] if len(found) == 1 else None

    def drop_bad(self, indices: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
        """All of ``indices`` and no notes. Raises CalibrationError on NaN, infinity or overflow."""
        for part, arrays in enumerate(self._parts):
            rows = np.sort(indices[(indices >= self._starts[part]) & (indices < self._starts[part + 1])])
            for spec in self._inputs:
                _check_rows(spec, arrays[spec.name], rows - self._starts[part])
        return indices, ()


def array_picture(array: np.ndarray) -> Image.Image | None:
    """Show one input [C, H, W] or [H, W, C] with 1 or 3 channels, each of its numbers in its own range."""
    if array.ndim != 3 or array.dtype.kind not in "fiu" or not array.size:
        return None
    if array.shape[0] in (1, 3):
        array = np.moveaxis(array, 0, 2)
    elif array.shape[2] not in (1, 3):
        return None
    if min(array.shape[:2]) < 4:  # a picture has some pixels
        return None
    values = array.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        return None
    scaled = np.round((values - low) * (255 / (high - low) if high > low else 0.0)).astype(np.uint8)
    return Image.fromarray(scaled[:, :, 0] if scaled.shape[2] == 1 else scaled)


def len_of(array: StoredArray) -> int:
    """The number of samples."""
    return array.shape[0]


def from_mapping(
    data: Mapping[str, Any], inputs: Sequence[InputSpec], *, where: str = ""
) -> tuple[dict[str, StoredArray], np.ndarray | None]:
    """One part from arrays in memory, keyed by input name; ``where`` is put before each array's name."""
    notes: list[str] = []
    check_names(data, inputs, where=where or "The data", notes=notes)
    prefix = f"{where}, " if where else ""
    arrays: dict[str, StoredArray] = {
        spec.name: MemoryArray(
            _as_array(data[spec.name], f"{prefix}array '{spec.name}'"), f"{prefix}array '{spec.name}'"
        )
        for spec in inputs
    }
    labels = None
    if LABELS in data and LABELS not in arrays and data[LABELS] is not None:
        raw = _as_array(data[LABELS], f"{prefix}array '{LABELS}'")
        labels = check_labels(raw, _first_count(arrays), f"{prefix}array '{LABELS}'")
    return arrays, labels


def from_npz(
    path: Path, inputs: Sequence[InputSpec], *, spill: SpillFolder, notes: list[str]
) -> tuple[dict[str, StoredArray], np.ndarray | None]:
    """One part from a .npz file; only headers and labels are read."""
    with _reading(str(path)), zipfile.ZipFile(path) as archive:
        members = {name[:-4]: archive.getinfo(name) for name in archive.namelist() if name.endswith(".npy")}
    check_names(members, inputs, where=str(path), notes=notes)
    arrays = {spec.name: _member_array(path, members[spec.name], spec.name, spill) for spec in inputs}
    labels = None
    if LABELS in members and LABELS not in arrays:
        stored = _member_array(path, members[LABELS], LABELS, spill)
        if len(stored.shape) == 0:
            raise CalibrationError(
                f"{stored.where}: is a single number; labels need one class number per sample."
            )
        labels = check_labels(stored.read(np.arange(stored.shape[0])), _first_count(arrays), stored.where)
    return arrays, labels


def from_npy(
    path: Path, inputs: Sequence[InputSpec], *, spill: SpillFolder
) -> tuple[dict[str, StoredArray], None]:
    """One part from a .npy file, for models of one input."""
    if len(inputs) != 1:
        raise CalibrationError(
            f"{path}: .npy files have no names and the model has {len(inputs)} inputs "
            f"({_join(spec.name for spec in inputs)}); save .npz files with one array per input."
        )
    where = str(path)
    with _reading(where), path.open("rb") as file:
        shape, dtype, fortran_order, offset = _checked_header(file, where)
    if fortran_order and len(shape) > 1:
        return {
            inputs[0].name: PackedArray(path, None, shape=shape, dtype=dtype, where=where, spill=spill)
        }, None
    _check_length(path, offset, shape, dtype, where)
    return {inputs[0].name: FileArray(path, offset=offset, shape=shape, dtype=dtype, where=where)}, None


def from_iterable(
    items: Iterable[Mapping[str, Any]], inputs: Sequence[InputSpec], *, spill: SpillFolder
) -> tuple[dict[str, StoredArray], np.ndarray | None]:
    """One part from batches in memory, written to a temporary file once, so that they can be read again."""
    for spec in inputs:
        if spec.dtype.kind in "OUS":
            raise CalibrationError(f"The model's input {spec} takes text, which only .npz files can give.")
    sizes, count = _FreeSizes(inputs), 0
    labels: list[np.ndarray] = []
    targets = [spill.new_file() for _ in inputs]
    shapes: dict[str, tuple[int, ...]] = {}
    for number, item in enumerate(items):
        where = f"Item {number} of the data"
        if not isinstance(item, Mapping):
            raise CalibrationError(
                f"{where}: is a {type(item).__name__}; each item must be a dict of one array per model input "
                f"({_join(spec.name for spec in inputs)}), batch first."
            )
        arrays, item_labels = from_mapping(item, inputs, where=where)
        if number and (item_labels is None) != (not labels):
            raise CalibrationError(f"{where}: labels must be in all items or in none.")
        for spec, target in zip(inputs, targets, strict=True):
            array = arrays[spec.name]
            check_dtype(spec, array.dtype, array.where)
            sizes.check(spec, array.shape, array.where)
            values = cast_values(spec, array.read(np.arange(len_of(array))))
            check_values(spec, values, array.where, first=0)
            shapes[spec.name] = values.shape[1:]
            with _reading(where), target.open("ab") as file:
                _write_chunk(file, np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, target)
        _check_counts(list(arrays.values()))
        count += _first_count(arrays)
        if item_labels is not None:
            labels.append(item_labels)
    if not shapes:
        raise CalibrationError("The data is an empty iterable; give at least one dict of arrays.")
    stored: dict[str, StoredArray] = {
        spec.name: FileArray(target, offset=0, shape=(count, *shapes[spec.name]), dtype=spec.dtype,
                             where=f"the data, array '{spec.name}'")
        for spec, target in zip(inputs, targets, strict=True)
    }  # fmt: skip
    return stored, np.concatenate(labels) if labels else None


def check_names(names: Collection[str], inputs: Sequence[InputSpec], *, where: str, notes: list[str]) -> None:
    """One array per input; others are noted, unless they look like mistyped labels."""
    wanted = [spec.name for spec in inputs]
    missing = [name for name in wanted if name not in names]
    if missing:
        there = _join(names) if names else "no arrays"
        raise CalibrationError(
            f"{where}: has no array for the model's input{'s' if len(missing) > 1 else ''} "
            f"{_join(missing)}; it holds "
            f"{there}. Save the arrays under the model's names."
        )
    extra = [name for name in names if name not in wanted and name != LABELS]
    for name in extra:
        if LABELS not in names and (name.lower() in _LIKELY_LABELS or nearest_word(name.lower(), (LABELS,))):
            raise CalibrationError(
                f"{where}: array '{name}' is no input of the model; did you mean '{LABELS}'?"
            )
    if extra:
        notes.append(f"{where}: {_join(extra)} ignored, not among the model's inputs ({_join(wanted)})")


def check_dtype(spec: InputSpec, dtype: np.dtype, where: str) -> None:
    """Refuse element types that casting would bend: only widths may differ."""
    got = _kind(dtype)
    wanted = "string" if spec.dtype.kind in "OUS" else _kind(spec.dtype)
    if got == wanted and got != "object":
        return
    if got == "object":
        advice = "holds Python objects, which are not read; save numbers with a fixed element type"
    elif wanted == "float" and got == "integer":
        advice = (
            f"holds whole numbers ({dtype.name}) but the model wants {spec.dtype.name}; scale pixels as in "
            "training "
            f"(for example x / 255, then mean and std) and save them as {spec.dtype.name}, or give a "
            "folder of images "
            "with --preprocess"
        )
    else:
        advice = f"has type {type_name(dtype)} but the model wants {type_name(spec.dtype)}; convert it"
    raise CalibrationError(f"{where}: {advice} (input {spec}).")


def cast_values(spec: InputSpec, values: np.ndarray) -> np.ndarray:
    """To the model's type; `check_values` finds what does not survive it."""
    if values.dtype == spec.dtype and values.dtype.isnative:
        return values
    if spec.dtype.kind in "OUS":
        return values.astype(object)
    if spec.dtype.kind in "iu" and values.size:
        limits = np.iinfo(spec.dtype)
        if int(values.min()) < limits.min or int(values.max()) > limits.max:
            raise CalibrationError(
                f"Array '{spec.name}': values from {values.min()} to {values.max()} do not fit the model's "
                f"{spec.dtype.name}."
            )
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # what overflows to infinity is reported by check_values
        return values.astype(spec.dtype)


def check_values(
    spec: InputSpec, values: np.ndarray, where: str, *, first: int, rows: np.ndarray | None = None
) -> None:
    """Refuse NaN and infinity, after casting; ``first`` or ``rows`` number the samples for the message."""
    if not is_float(spec.dtype) or len(values) == 0:
        return
    numbers = values if values.dtype.kind == "f" else values.astype(np.float32)
    finite = np.isfinite(numbers).reshape(len(values), -1).all(axis=1)
    if finite.all():
        return
    bad = np.flatnonzero(~finite)
    sample = int(bad[0]) + first if rows is None else int(rows[bad[0]])
    nan = bool(np.isnan(numbers[bad[0]]).any())
    raise CalibrationError(
        f"{where}: sample {sample} holds {'NaN' if nan else f'infinity (as {spec.dtype.name})'}; remove "
        "such samples "
        "or repair them."
    )


def check_labels(labels: np.ndarray, n_samples: int, where: str) -> np.ndarray:
    """Labels as int64 [n_samples]. Raises CalibrationError for another type, length, or negative numbers."""
    if labels.dtype.kind not in "iu":
        raise CalibrationError(
            f"{where}: has type {type_name(labels.dtype)} but labels are whole numbers, the class index of "
            "each sample."
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise CalibrationError(
            f"{where}: has shape {format_shape(labels.shape)} but labels need [{n_samples}], one class "
            "index per "
            "sample" + (" (for one-hot rows take argmax over axis 1)." if labels.ndim == 2 else ".")
        )
    if len(labels) != n_samples:
        raise CalibrationError(f"{where}: has {len(labels)} labels for {n_samples} samples.")
    if labels.size and (labels.min() < 0 or int(labels.max()) > np.iinfo(np.int64).max):
        raise CalibrationError(
            f"{where}: holds the class {labels.min() if labels.min() < 0 else labels.max()}, but classes "
            "count from 0."
        )
    return labels.astype(np.int64)


class _FreeSizes:
    """Shape checks that remember what symbolic and unknown axes were, so that all samples agree."""

    def __init__(self, inputs: Sequence[InputSpec]) -> None:
        self._batch_symbols = {
            spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], str)
        }
        self._seen: dict[tuple[str, int] | str, tuple[int, str]] = {}

    def check(self, spec: InputSpec, shape: tuple[int, ...], where: str) -> None:
        if not spec.shape:
            raise CalibrationError(
                f"The model's input {spec} has no batch axis; such inputs are not supported."
            )
        if len(shape) != len(spec.shape):
            hint = _batch_hint(spec, shape)
            raise CalibrationError(
                f"{where}: has {len(shape)} axes {format_shape(shape)} but the model's input {spec} has "
                f"{len(spec.shape)}{hint}."
            )
        for axis in range(1, len(shape)):
            self._check_axis(spec, axis, shape, where)

    def _check_axis(self, spec: InputSpec, axis: int, shape: tuple[int, ...], where: str) -> None:
        wanted, got = spec.shape[axis], shape[axis]
        if isinstance(wanted, int):
            if got != wanted:
                raise CalibrationError(
                    f"{where}: has shape {format_shape(shape)}, so axis {axis} is {got}, but the model's "
                    f"input {spec} "
                    f"wants {wanted}{_order_hint(spec, shape)}."
                )
            return
        if wanted in self._batch_symbols:
            return
        key = wanted if isinstance(wanted, str) else (spec.name, axis)
        size, place = self._seen.setdefault(key, (got, where))
        if size != got:
            symbol = f" '{wanted}'" if isinstance(wanted, str) else ""
            raise CalibrationError(
                f"{where}: has shape {format_shape(shape)}, so axis {axis}{symbol} is {got}, but it is "
                f"{size} in "
                f"{place}; all samples need one shape."
            )


def _batch_hint(spec: InputSpec, shape: tuple[int, ...]) -> str:
    fits = len(shape) == len(spec.shape) - 1 and all(
        not isinstance(wanted, int) or got == wanted
        for got, wanted in zip(shape, spec.shape[1:], strict=True)
    )
    return "; axis 0 must be the batch, add it with x[None]" if fits else ", with the batch first"


def _order_hint(spec: InputSpec, shape: tuple[int, ...]) -> str:
    if len(shape) != 4:
        return ""
    for order, text in (((0, 3, 1, 2), "x.transpose(0, 3, 1, 2)"), ((0, 2, 3, 1), "x.transpose(0, 2, 3, 1)")):
        if all(not isinstance(spec.shape[i], int) or shape[order[i]] == spec.shape[i] for i in range(1, 4)):
            return f"; channels are in the wrong place, use {text}"
    return ""


def _check_counts(arrays: Sequence[StoredArray]) -> None:
    for array in arrays[1:]:
        if len_of(array) != len_of(arrays[0]):
            raise CalibrationError(
                f"{array.where}: has {len_of(array)} samples but {arrays[0].where} has "
                f"{len_of(arrays[0])}; axis 0 of "
                "all arrays must be the same."
            )


def _check_rows(spec: InputSpec, array: StoredArray, rows: np.ndarray) -> None:
    row_bytes = max(1, math.prod(array.shape[1:]) * max(array.dtype.itemsize, spec.dtype.itemsize))
    step = max(1, _CHUNK_BYTES // row_bytes)
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        check_values(spec, cast_values(spec, array.read(chunk)), array.where, first=0, rows=chunk)


def _as_array(value: Any, where: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CalibrationError(f"{where}: cannot be made a NumPy array ({error}).") from error


def _first_count(arrays: Mapping[str, StoredArray]) -> int:
    array = next(iter(arrays.values()))
    if not array.shape:
        raise CalibrationError(f"{array.where}: is a single number; arrays need the batch as axis 0.")
    return array.shape[0]


def _kind(dtype: np.dtype) -> str:
    if is_float(dtype):
        return "float"
    return {"i": "integer", "u": "integer", "b": "bool", "c": "complex", "U": "string", "S": "string"}.get(
        dtype.kind, "object"
    )


def _join(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    text = ", ".join(f"'{name}'" for name in names[:limit])
    return text + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(position, first row, count) of each stretch of consecutive rows."""
    starts = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 2) != 1)
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        yield int(start), int(rows[start]), int(stop - start)


def _member_array(path: Path, info: zipfile.ZipInfo, name: str, spill: SpillFolder) -> StoredArray:
    where = f"{path}, array '{name}'"
    with _reading(where), _open_member(path, info.filename) as file:
        shape, dtype, fortran_order, header_bytes = _checked_header(file, where)
    n_bytes = dtype.itemsize * math.prod(shape)
    most = info.file_size
    if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the file may lie about that
        most = min(most, _MAX_DEFLATED * path.stat().st_size)
    if most - header_bytes < n_bytes:
        raise CalibrationError(f"{where}: holds less data than its header says; write it again.")
    if info.compress_type != zipfile.ZIP_STORED or (fortran_order and len(shape) > 1):
        return PackedArray(path, info.filename, shape=shape, dtype=dtype, where=where, spill=spill)
    with _reading(where), path.open("rb") as file:
        file.seek(info.header_offset + 26)  # the local header repeats the name with its own "extra" length
        name_bytes, extra_bytes = np.frombuffer(file.read(4), "<u2")
    offset = info.header_offset + 30 + int(name_bytes) + int(extra_bytes) + header_bytes
    return FileArray(path, offset=offset, shape=shape, dtype=dtype, where=where)


def _checked_header(file: BinaryIO, where: str) -> tuple[tuple[int, ...], np.dtype, bool, int]:
    shape, dtype, fortran_order, n_bytes = _read_header(file)
    if dtype.hasobject or dtype.names is not None:
        raise CalibrationError(
            f"{where}: holds Python objects or records, which are not read (they could run code); save "
            "plain numbers."
        )
    return shape, dtype, fortran_order, n_bytes


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype, bool, int]:
    version = npy_format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"unknown .npy version {version}")
    read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if any(size < 0 for size in shape):
        raise ValueError(f"impossible shape {shape}")
    return shape, dtype, fortran_order, file.tell()


def _check_length(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, where: str) -> None:
    wanted = offset + dtype.itemsize * math.prod(shape)
    if path.stat().st_size < wanted:
        raise CalibrationError(
            f"{where}: is cut short, {path.stat().st_size} bytes of the {wanted} that its header says; "
            "write it again."
        )


@contextmanager
def _open_member(path: Path, member: str | None) -> Iterator[BinaryIO]:
    """The bytes of a .npy file, or of a member of a zip archive."""
    if member is None:
        with path.open("rb") as file:
            yield file
        return
    with zipfile.ZipFile(path) as archive, archive.open(member) as packed:
        yield cast(BinaryIO, packed)


def _write_chunk(file: BinaryIO, chunk: bytes | memoryview, target: Path) -> None:
    """Write to an unpacked file, of which a full disk must not look like damaged data."""
    try:
        file.write(chunk)
    except OSError as error:
        raise CalibrationError(
            f"The data cannot be unpacked into {target.parent.parent} ({error.strerror or error}); free some "
            "space there, or point --work-dir or TMPDIR elsewhere."
        ) from error


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turn what damaged files raise into one CalibrationError that names the place."""
    try:
        yield
    except FileNotFoundError as error:
        raise CalibrationError(f"{where}: the file is gone.") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError) as error:
        raise CalibrationError(f"{where}: the file is damaged or of another format ({error}).") from error
    except (OSError, RuntimeError, NotImplementedError) as error:  # RuntimeError: encrypted archives
        raise CalibrationError(f"{where}: cannot be read or unpacked ({error}).") from error
