"""Read the weights that a model keeps in files beside it, and nothing else.

A model file can name any path. Only regular files inside the model's own folder are opened, symbolic
links resolved, and never more is read than the file has and the tensor's type and shape need.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from onnx import ModelProto, TensorProto

from hap_onnx.errors import ModelError
from hap_onnx.model.protos import check_tensor, n_data_bytes, walk_tensors

_MAX_DIGITS = 18  # more than any file has, and never too many for Python
_MAX_FIELD_BYTES = 2**31 - 1  # protobuf's limit for one field


def read_external_data(proto: ModelProto, path: Path) -> tuple[int, tuple[Path, ...]]:
    """Read the external weights of ``proto``, the model at ``path``, into memory; return bytes and files.

    Raises:
        ModelError: a file is missing, too short, outside the model's folder, or disagrees with the shapes.
    """
    folder = path.parent.resolve()
    n_bytes = 0
    files: dict[Path, None] = {}
    for where, tensor in walk_tensors(proto):
        where = f"{where} of {path}"
        if tensor.data_location == TensorProto.EXTERNAL:
            check_tensor(tensor, where=where)
            file = _find_file(_entries(tensor).get("location", ""), folder, where=where)
            files[file] = None
            tensor.raw_data = _read(tensor, file, where=where)
            n_bytes += len(tensor.raw_data)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    return n_bytes, tuple(files)


def _entries(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _read(tensor: TensorProto, file: Path, *, where: str) -> bytes:
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
            data = stream.read(length)
    except OSError as error:
        raise ModelError(
            f"{where}: the external data file {file} cannot be read ({error.strerror or error})"
        ) from error
    if len(data) != length:
        raise ModelError(
            f"{where}: {file} ended after {len(data)} of {length} bytes; is another program writing it?"
        )
    return data


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
