"""Read the weights that a model keeps in files beside it, and nothing else.

A model file can name any path. Only regular files inside the model's own folder are opened, symbolic
links resolved, and never more is read than the file has and the tensor's type and shape need.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from hap_onnx.errors import ModelError
from hap_onnx.model.protos import check_tensor, n_data_bytes, walk_tensors
from hap_onnx.model.weights import LargeModel, bytes_of, is_large, outside_header, put_inside, to_read_only

_MAX_DIGITS = 18  # more than any file has, and never too many for Python
_MAX_FIELD_BYTES = 2**31 - 1  # protobuf's limit for one field


def read_external_data(proto: ModelProto, path: Path) -> tuple[LargeModel, int, tuple[Path, ...]]:
    """Read the external weights of ``proto``, the model at ``path``; return also their bytes and files.

    Small ones become part of ``proto``, large initializers arrays. They are read, not mapped: a file that is
    cut while it is in use must not end the process, and one that changes must not change the result.

    Raises:
        ModelError: a file is missing, too short, outside the model's folder, or disagrees with the shapes.
    """
    folder = path.parent.resolve()
    n_bytes = 0
    files: dict[Path, tuple[int, ...] | None] = {}
    weights: dict[str, np.ndarray] = {}
    n_initializers = len(proto.graph.initializer)
    for index, (where, tensor) in enumerate(walk_tensors(proto)):
        where = f"{where} of {path}"
        if tensor.data_location == TensorProto.EXTERNAL:
            check_tensor(tensor, where=where)
            file = _find_file(_entries(tensor).get("location", ""), folder, where=where)
            files.setdefault(file, stamp_of(file))
            array = _read(tensor, file, where=where)
            n_bytes += array.nbytes
            if index < n_initializers and is_large(tensor, array.nbytes):
                weights[tensor.name] = _typed(tensor, array)
                tensor.CopyFrom(outside_header(tensor))
            else:
                put_inside(tensor, array)
    for file, stamp in files.items():
        if stamp_of(file) != stamp:
            raise ModelError(f"{file} was changed while it was read; start again when it is complete")
    return LargeModel(proto, weights), n_bytes, tuple(files)


def stamp_of(path: Path) -> tuple[int, ...] | None:
    """Return what changes with a file; None where it is not there."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def _typed(tensor: TensorProto, array: np.ndarray) -> np.ndarray:
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return to_read_only(array.view(dtype).reshape(tuple(tensor.dims)))


def _entries(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _read(tensor: TensorProto, file: Path, *, where: str) -> np.ndarray:
    """Return the bytes of a tensor."""
    entries = _entries(tensor)
    if tensor.data_type == TensorProto.STRING:
        raise ModelError(
            f"{where} keeps strings as external data, which ONNX does not allow; export the model again"
        )
    expected = n_data_bytes(tensor)
    offset = _number(entries.get("offset", "0"), "offset", where=where)
    length = _number(entries.get("length", str(expected)), "length", where=where)
    if length != expected:
        raise ModelError(
            f"{where} declares {length} bytes of external data, but its type and shape {list(tensor.dims)} "
            f"need {expected}; export the model again"
        )
    if expected > _MAX_FIELD_BYTES:
        raise ModelError(
            f"{where} takes {expected} bytes, but one tensor may have 2 GB at most; split it and export again"
        )
    try:
        size = file.stat().st_size
        if offset + length > size:
            raise ModelError(
                f"{where} needs bytes {offset} to {offset + length} of {file.name!r}, but this file has "
                f"{size}; it is truncated: export or download it again"
            )
        with file.open("rb") as stream:
            stream.seek(offset)
            array = np.empty(length, np.uint8)
            n_read = stream.readinto(bytes_of(array)) if length else 0
    except OSError as error:
        raise ModelError(
            f"{where}: the external data file {file} cannot be read ({error.strerror or error})"
        ) from error
    if n_read != length:
        raise ModelError(
            f"{where}: {file} ended after {n_read} of {length} bytes; is another program writing it?"
        )
    return array


def _find_file(location: str, folder: Path, *, where: str) -> Path:
    if not location:
        raise ModelError(f"{where} says that its data is external but names no file; export the model again")
    for flavour in (PurePosixPath(location), PureWindowsPath(location)):
        if flavour.is_absolute() or flavour.drive or flavour.root or ".." in flavour.parts:
            raise ModelError(
                f"{where} names the external data file {location!r}, but only a path inside the model's "
                "folder is allowed; put the file beside the model and export again"
            )
    try:
        file = (folder / location).resolve()
        if not file.is_relative_to(folder):
            raise ModelError(
                f"{where} names the external data file {location!r}, which is a link out of the model's "
                "folder; put the file itself beside the model"
            )
        if not file.exists():
            raise ModelError(
                f"{where} needs the external data file {location!r}, which is not in {folder}; "
                "put it beside the model"
            )
        if not file.is_file():
            raise ModelError(
                f"{where} names {location!r} as external data file, but that is not a regular file"
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{where} names the external data file {location!r}, which cannot be opened "
            f"({getattr(error, 'strerror', None) or error})"
        ) from error
    return file


def _number(text: str, key: str, *, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise ModelError(
            f"{where} has the external data {key} {text[:40]!r}, but a whole number of bytes is expected"
        )
    return int(text)
