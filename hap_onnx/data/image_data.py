"""A folder of images as samples: flat without labels, or one subfolder per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from hap_onnx.data.array_data import Stamp
from hap_onnx.data.preprocess import (
    Preprocessing,
    UnreadableImageError,
    image_size,
    load_image,
    nearest_word,
    output_size,
    preprocess_image,
)
from hap_onnx.errors import CalibrationError
from hap_onnx.model.input_spec import InputSpec, is_float
from hap_onnx.text_files import read_text

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".jp2")
)
CLASSES_FILE = "classes.txt"
MAX_BAD_SHARE = 0.05


@dataclass(frozen=True)
class ImageFolder:
    """The image files in sample order, and their class numbers where subfolders give them."""

    files: tuple[Path, ...]
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...]


class ImageSource:
    """Images decoded and preprocessed anew at each read."""

    def __init__(self, folder: ImageFolder, spec: InputSpec, recipe: Preprocessing) -> None:
        self._files, self._spec, self._recipe = folder.files, spec, recipe
        self.labels, self.class_names, self.notes = folder.labels, folder.class_names, folder.notes
        self.n_samples = len(folder.files)
        self.preprocessing = recipe.describe()
        self._stamps: dict[int, Stamp] = {}  # of the files that were checked

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The images as the model's type, in the order asked for. Raises CalibrationError."""
        images = []
        for index in indices:
            path = self._files[index]
            try:
                if index in self._stamps:
                    self._stamps[index].check(path.stat(), str(path))
                images.append(preprocess_image(load_image(path), self._recipe))
            except (UnreadableImageError, OSError) as error:
                raise _gone(path, error) from error
        batch = np.stack(images)
        if not is_float(self._spec.dtype):
            limits = np.iinfo(self._spec.dtype)
            batch = batch.clip(limits.min, limits.max)
        return {self._spec.name: batch.astype(self._spec.dtype, copy=False)}

    def name_of(self, index: int) -> str:
        """The path of an image inside its folder."""
        path = self._files[index]
        return path.name if self.labels is None else f"{path.parent.name}/{path.name}"

    def picture_of(self, index: int) -> Image.Image:
        """The image as it is in the file. Raises CalibrationError."""
        path = self._files[index]
        try:
            return load_image(path)
        except (UnreadableImageError, OSError) as error:
            raise _gone(path, error) from error

    def drop_bad(self, indices: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
        """``indices`` without unreadable images, and a note that counts them.

        Raises CalibrationError when more than a small share is unreadable, or when images that
        nothing resizes differ from the model's size or from each other.
        """
        keep, bad, sizes = [], [], _Sizes(self._spec, self._recipe)
        for index in indices:
            path = self._files[index]
            try:
                stamp = Stamp.of(path.stat())
                load_image(path, check_only=True)
                size = image_size(path)
            except OSError as error:
                bad.append(f"{path} ({error.strerror or error})")
                continue
            except UnreadableImageError as error:
                bad.append(f"{path} ({error})")
                continue
            sizes.check(path, size)
            self._stamps[int(index)] = stamp
            keep.append(index)
        if not bad:
            return indices, ()
        first = "; ".join(bad[:3]) + (f"; and {len(bad) - 3} more" if len(bad) > 3 else "")
        if not keep or len(bad) > max(1, int(MAX_BAD_SHARE * len(indices))):
            raise CalibrationError(
                f"{len(bad)} of {len(indices)} images cannot be read: {first}. Repair or remove them."
            )
        note = f"{len(bad)} of {len(indices)} images skipped because they cannot be read: {first}"
        return np.asarray(keep, dtype=np.int64), (note,)


def _gone(path: Path, error: Exception) -> CalibrationError:
    return CalibrationError(
        f"{path}: could be read at the start and cannot be read now ({error}); keep the data in place while "
        "hap-onnx runs."
    )


class _Sizes:
    """All images must leave preprocessing with one size, the model's where it is fixed."""

    def __init__(self, spec: InputSpec, recipe: Preprocessing) -> None:
        self._recipe = recipe
        self._spec = spec
        self._wanted = spec.shape[2:4] if recipe.layout == "nchw" else spec.shape[1:3]
        self._first: tuple[tuple[int, int], Path] | None = None

    def check(self, path: Path, size: tuple[int, int]) -> None:
        crop = self._recipe.output if self._recipe.resize_to is None else None
        if crop is not None and (size[0] < crop[0] or size[1] < crop[1]):
            raise CalibrationError(
                f"{path}: is {size[0]}x{size[1]} (height x width), smaller than the crop of "
                f'{crop[0]}x{crop[1]}, and resizing is off; set resize to "shorter" or "stretch".'
            )
        got = output_size(self._recipe, size)
        if any(
            isinstance(wanted, int) and wanted != side for wanted, side in zip(self._wanted, got, strict=True)
        ):
            raise CalibrationError(
                f"{path}: is {got[0]}x{got[1]} (height x width), which does not fit the model's input "
                f'{self._spec}, and resizing is off; set resize to "shorter" or "stretch".'
            )
        first = self._first = self._first or (got, path)
        if got != first[0]:
            raise CalibrationError(
                f"{path}: is {got[0]}x{got[1]} (height x width) but {first[1]} is "
                f'{first[0][0]}x{first[0][1]}, and resizing is off; set resize to "shorter" or "stretch".'
            )


def visible(folder: Path) -> list[Path]:
    """The entries of a folder in name order, without hidden files and the leavings of archivers."""
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise CalibrationError(f"{folder}: cannot be listed ({error}).") from error
    return [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]


def is_image(path: Path) -> bool:
    """By the file name's ending."""
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def find_images(folder: Path) -> ImageFolder | None:
    """The images of a folder, or None when it holds none. Raises CalibrationError on unclear layouts."""
    entries = visible(folder)
    flat = [entry for entry in entries if is_image(entry)]
    in_classes = {entry.name: visible(entry) for entry in entries if entry.is_dir()}
    classes = {name: [file for file in files if is_image(file)] for name, files in in_classes.items()}
    n_in_classes = sum(map(len, classes.values()))
    if flat and n_in_classes:
        raise CalibrationError(
            f"{folder}: has {len(flat)} images beside {n_in_classes} in subfolders; use either one flat "
            "folder (no "
            "labels) or one subfolder per class."
        )
    if flat:
        ignored = [entry for entry in entries if entry not in set(flat)]
        return ImageFolder(tuple(flat), None, None, _ignored_note(folder, ignored))
    if not n_in_classes:
        return None
    names = _class_names(folder, list(classes))
    files = [file for name in names for file in classes.get(name, ())]
    labels = np.repeat(np.arange(len(names)), [len(classes.get(name, ())) for name in names])
    ignored = [entry for entry in entries if entry.is_file() and entry.name != CLASSES_FILE]
    ignored += [file for name in classes for file in in_classes[name] if not is_image(file)]
    source = CLASSES_FILE if (folder / CLASSES_FILE).is_file() else "the sorted names"
    plural = "es" if len(names) > 1 else ""
    notes = _ignored_note(folder, ignored)
    notes += (f"{folder}: {len(names)} class{plural} by subfolder, labels follow {source}",)
    return ImageFolder(tuple(files), labels.astype(np.int64), tuple(names), notes)


def _class_names(folder: Path, subfolders: Sequence[str]) -> list[str]:
    path = folder / CLASSES_FILE
    if not path.is_file():
        return sorted(subfolders)
    try:
        lines = read_text(path, encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read as text ({error}).") from error
    names = [line.strip() for line in lines]
    for number, name in enumerate(names):
        if not name:
            raise CalibrationError(f"{path}: line {number + 1} is empty; write one subfolder name per line.")
        if name in names[:number]:
            raise CalibrationError(f"{path}: line {number + 1} repeats '{name}'; each class has one line.")
    for name in subfolders:
        if name not in names:
            close = nearest_word(name, names)
            raise CalibrationError(f"{path}: has no line for the subfolder '{name}'{close or '; add it.'}")
    return names


def _ignored_note(folder: Path, ignored: Sequence[Path]) -> tuple[str, ...]:
    if not ignored:
        return ()
    names = ", ".join(f"'{entry.name}'" for entry in ignored[:3])
    return (f"{folder}: {len(ignored)} other entr{'ies' if len(ignored) > 1 else 'y'} ignored ({names}"
            + (", ...)" if len(ignored) > 3 else ")"),)  # fmt: skip
