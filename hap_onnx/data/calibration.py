"""Representative data, from whatever the user has to batches of named arrays.

Forms of data: a .npz file keyed by input name, batch first, optional ``labels``; a folder of such
.npz files (or of .npy files for models of one input) in name order; a folder of images, flat or one
subfolder per class; and in Python a dict of arrays, one array for models of one input, or an
iterable of dicts. Samples are read again at each pass, never all held.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from hap_onnx.data.array_data import (
    ArraySource,
    SpillFolder,
    StoredArray,
    from_iterable,
    from_mapping,
    from_npy,
    from_npz,
)
from hap_onnx.data.image_data import IMAGE_SUFFIXES, ImageSource, find_images, is_image, visible
from hap_onnx.data.preprocess import Preprocessing, resolve_preprocessing
from hap_onnx.errors import CalibrationError, UsageError
from hap_onnx.model.input_spec import InputSpec

__all__ = ["Batch", "Dataset", "InputSpec", "Splits", "Subset", "open_dataset", "split_dataset"]

MIN_SAMPLES = 5
_SELECT, _SPLIT = 1, 2  # keeps the two random orders of one seed apart
_FORMS = (
    "give a .npz file (one array per model input, batch first), a folder of .npz or .npy files, or a folder "
    "of images"
)


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples: one array per model input, batch first, and int64 labels [batch] if there are any."""

    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None


class _Source(Protocol):
    n_samples: int
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    preprocessing: str
    notes: tuple[str, ...]

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]: ...

    def drop_bad(self, indices: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]: ...

    def name_of(self, index: int) -> str | None: ...

    def picture_of(self, index: int) -> Image.Image | None: ...


class Dataset:
    """Checked samples that can be read any number of times; make it with `open_dataset`.

    ``preprocessing`` is a sentence for the user; ``notes`` are further ones, on what was ignored or
    skipped; ``class_names`` are subfolder names in the order of the labels.
    """

    def __init__(
        self, source: _Source, indices: np.ndarray, *, notes: tuple[str, ...], spill: SpillFolder
    ) -> None:
        self._source, self._indices = source, indices
        self._spill = spill  # the temporary files live as long as this object
        self.n_samples = len(indices)
        self.labels = None if source.labels is None else source.labels[indices]
        self.class_names = source.class_names
        self.preprocessing = source.preprocessing
        self.notes = notes

    def batches(
        self, indices: np.ndarray | Sequence[int], batch_size: int, *, first: int = 0, step: int = 1
    ) -> Iterator[Batch]:
        """The samples in the order of ``indices``, at most ``batch_size`` at a time, read anew.

        With ``step``, only each so-many-th batch, from number ``first`` on.

        Raises CalibrationError when a file has gone or changed since the data was opened.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        indices = np.asarray(indices, dtype=np.int64)
        for start in range(first * batch_size, len(indices), step * batch_size):
            chosen = indices[start : start + batch_size]
            yield Batch(
                self._source.read(self._indices[chosen]),
                None if self.labels is None else self.labels[chosen],
            )

    def number_of(self, index: int) -> int:
        """The place of sample ``index`` in the order of the data, from 0."""
        return int(self._indices[index])

    def name_of(self, index: int) -> str | None:
        """The file of sample ``index``, with its place in it; None where all are in one file, or in none."""
        return self._source.name_of(self.number_of(index))

    def picture_of(self, index: int) -> Image.Image | None:
        """Sample ``index`` as people see it: the image file, or an input that looks like an image; else None.

        The numbers of an array are spread out over their own range: its brightness and its colours need not
        be those that the picture once had. Raises CalibrationError when the file has gone.
        """
        return self._source.picture_of(self.number_of(index))


@dataclass(frozen=True, eq=False)
class Subset:
    """Samples of a dataset by number; their order is random and balanced over labels, so that any
    first few represent all."""

    dataset: Dataset
    indices: np.ndarray

    @property
    def n_samples(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> np.ndarray | None:
        return None if self.dataset.labels is None else self.dataset.labels[self.indices]

    def batches(self, batch_size: int, *, first: int = 0, step: int = 1) -> Iterator[Batch]:
        """All samples of the subset, or some of their batches, see `Dataset.batches`."""
        return self.dataset.batches(self.indices, batch_size, first=first, step=step)

    def take(self, n_samples: int) -> Subset:
        """The first ``n_samples`` (all, if there are fewer)."""
        return Subset(self.dataset, self.indices[:n_samples])


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint parts: *calibrate* for statistics and training, *choose* for search, *report* for the "
    "result."""

    calibrate: Subset
    choose: Subset
    report: Subset

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many samples each part has."""
        return self.calibrate.n_samples, self.choose.n_samples, self.report.n_samples


def open_dataset(
    data: Any,
    inputs: Sequence[InputSpec],
    *,
    preprocess: str | Path | Preprocessing | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    work_dir: Path | None = None,
) -> Dataset:
    """Open data in any of the forms above and check all of it against the model's inputs.

    ``preprocess`` is for images: a preset or a TOML file (see `hap_onnx.data.preprocess`). ``max_samples``
    takes a random part, balanced over labels, that depends only on the data and ``seed``.
    Compressed arrays are unpacked once into a temporary folder inside ``work_dir`` (default: the system's).

    Raises CalibrationError when the data does not fit, is damaged or empty, and UsageError for a
    request without meaning.
    """
    if max_samples is not None and max_samples < 1:
        raise UsageError(f"--max-samples must be at least 1, got {max_samples}.")
    if not inputs:
        raise CalibrationError("The model has no inputs, so data cannot be given to it.")
    spill = SpillFolder(work_dir)
    source = _open_source(data, inputs, preprocess, spill)
    if source.n_samples == 0:
        raise CalibrationError(f"{_describe(data)}: holds no samples; {_FORMS}.")
    chosen = np.arange(source.n_samples, dtype=np.int64)
    if max_samples is not None and max_samples < source.n_samples:
        chosen = np.sort(_balanced_order(source.n_samples, source.labels, (seed, _SELECT))[:max_samples])
    chosen, skipped = source.drop_bad(chosen)
    return Dataset(source, chosen, notes=source.notes + skipped, spill=spill)


def split_dataset(dataset: Dataset, *, seed: int, val: Dataset | None = None) -> Splits:
    """60/20/20 by seed, each part with its share of every label; with ``val``, that is the report part
    and ``dataset`` is split 75/25.

    Raises CalibrationError when there are too few samples, or when the classes of ``val`` differ.
    """
    least = MIN_SAMPLES if val is None else 2
    if dataset.n_samples < least:
        raise CalibrationError(
            f"The data has {dataset.n_samples} sample{'s' if dataset.n_samples != 1 else ''}, but at least "
            f"{least} are "
            "needed to calibrate, choose and report on different ones; give more (some hundreds are usual)."
        )
    order = _balanced_order(dataset.n_samples, dataset.labels, (seed, _SPLIT))
    if val is None:
        n_part = max(1, round(0.2 * dataset.n_samples))
        calibrate, choose, report = np.split(order, [len(order) - 2 * n_part, len(order) - n_part])
        return Splits(Subset(dataset, calibrate), Subset(dataset, choose), Subset(dataset, report))
    if dataset.class_names and val.class_names and dataset.class_names != val.class_names:
        raise CalibrationError(
            "The class subfolders of --val differ from those of --data, so the same label would mean "
            "different "
            "classes; use the same subfolders, or put the same classes.txt into both."
        )
    n_choose = max(1, round(0.25 * dataset.n_samples))
    calibrate, choose = np.split(order, [len(order) - n_choose])
    report = _balanced_order(val.n_samples, val.labels, (seed, _SPLIT))
    return Splits(Subset(dataset, calibrate), Subset(dataset, choose), Subset(val, report))


def _balanced_order(n_samples: int, labels: np.ndarray | None, seed: tuple[int, int]) -> np.ndarray:
    """All sample numbers in a random order in which each label is spread evenly (jittered stratification).

    Sample k of the n of its label, in random order, goes to a random place in [k/n, (k+1)/n).
    """
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(n_samples)
    if labels is None:
        return shuffled
    _, label_of, counts = np.unique(labels[shuffled], return_inverse=True, return_counts=True)
    by_label = np.argsort(label_of, kind="stable")
    rank = np.empty(n_samples)
    rank[by_label] = np.arange(n_samples) - np.repeat(np.cumsum(counts) - counts, counts)
    place = (rank + generator.random(n_samples)) / counts[label_of]
    return shuffled[np.argsort(place, kind="stable")]


def _open_source(
    data: Any, inputs: Sequence[InputSpec], preprocess: str | Path | Preprocessing | None, spill: SpillFolder
) -> _Source:
    if isinstance(data, (str, os.PathLike)):
        return _open_path(Path(data), inputs, preprocess, spill)
    _refuse_preprocess(preprocess)
    notes: list[str] = []
    if isinstance(data, Mapping):
        return ArraySource([from_mapping(data, inputs)], inputs)
    if isinstance(data, np.ndarray) or hasattr(data, "__array__"):
        if len(inputs) != 1:
            raise CalibrationError(
                f"The data is one array but the model has {len(inputs)} inputs "
                f"({', '.join(repr(spec.name) for spec in inputs)}); give a dict of one array per input."
            )
        return ArraySource([from_mapping({inputs[0].name: data}, inputs)], inputs, notes=notes)
    if isinstance(data, Iterable) and not isinstance(data, (bytes, bytearray)):
        return ArraySource([from_iterable(data, inputs, spill=spill)], inputs)
    raise CalibrationError(
        f"The data is a {type(data).__name__}; give a path, a dict of arrays, an array, or an iterable of "
        "dicts."
    )


def _open_path(
    path: Path, inputs: Sequence[InputSpec], preprocess: str | Path | Preprocessing | None, spill: SpillFolder
) -> _Source:
    if not path.exists():
        raise CalibrationError(f"{path}: no such file or folder; {_FORMS}.")
    if not (path.is_dir() or path.is_file()):
        raise CalibrationError(f"{path}: is neither a file nor a folder; {_FORMS}.")
    if path.is_dir():
        arrays = [
            entry for entry in visible(path) if entry.suffix.lower() in (".npz", ".npy") and entry.is_file()
        ]
        if arrays:
            _refuse_preprocess(preprocess)
            return _open_array_folder(path, arrays, inputs, spill)
        return _open_image_folder(path, inputs, preprocess)
    if path.suffix.lower() != ".npz":
        single = path.suffix.lower() == ".npy" or path.suffix.lower() in IMAGE_SUFFIXES
        raise CalibrationError(
            f"{path}: " + ("a single file of this kind is not taken, put it into a folder; or " if single else
                           "not a form of data that is known; ") + _FORMS + "."
        )  # fmt: skip
    _refuse_preprocess(preprocess)
    notes: list[str] = []
    part = from_npz(path, inputs, spill=spill, notes=notes)
    return ArraySource([part], inputs, notes=notes)


def _open_array_folder(
    folder: Path, files: Sequence[Path], inputs: Sequence[InputSpec], spill: SpillFolder
) -> ArraySource:
    others = [entry for entry in visible(folder) if entry not in set(files)]
    if any(is_image(entry) for entry in others):
        raise CalibrationError(
            f"{folder}: mixes arrays ('{files[0].name}') and images; keep them in two folders."
        )
    notes: list[str] = []
    parts: list[tuple[dict[str, StoredArray], np.ndarray | None]] = []
    names = [file.name for file in files]
    for file in files:
        if file.suffix.lower() == ".npy":
            parts.append(from_npy(file, inputs, spill=spill))
        else:
            parts.append(from_npz(file, inputs, spill=spill, notes=notes))
        if (parts[-1][1] is None) != (parts[0][1] is None):
            with_labels, without = (files[0], file) if parts[-1][1] is None else (file, files[0])
            raise CalibrationError(
                f"{folder}: '{with_labels.name}' has labels and '{without.name}' has none; give them in "
                "all files or "
                "in none."
            )
    if len(notes) > 1:
        notes = [f"{notes[0]} (and the like in {len(notes) - 1} more files)"]
    if others:
        notes.append(f"{folder}: {len(others)} other entries ignored ('{others[0].name}', ...)")
    return ArraySource(parts, inputs, notes=notes, names=names)


def _open_image_folder(
    folder: Path, inputs: Sequence[InputSpec], preprocess: str | Path | Preprocessing | None
) -> ImageSource:
    images = find_images(folder)
    if images is None:
        raise CalibrationError(
            f"{folder}: holds no .npz, .npy or image files; {_FORMS} (flat, or a subfolder per class)."
        )
    if len(inputs) != 1:
        raise CalibrationError(
            f"{folder}: holds images, which fill one input, but the model has {len(inputs)} "
            f"({', '.join(repr(spec.name) for spec in inputs)}); save .npz files with one array per input."
        )
    return ImageSource(images, inputs[0], resolve_preprocessing(preprocess, inputs[0]))


def _refuse_preprocess(preprocess: object) -> None:
    if preprocess is not None:
        raise UsageError(
            "--preprocess is for folders of images; arrays must hold what the model takes already."
        )


def _describe(data: Any) -> str:
    return str(data) if isinstance(data, (str, os.PathLike)) else "The data"
