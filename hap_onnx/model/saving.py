"""Write a model so that it is there complete or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto

from hap_onnx.errors import ValidationError
from hap_onnx.model.protos import MAX_PROTO_BYTES, copy_without, count_bytes

_EXTERNAL_MIN_BYTES = 1024  # smaller tensors stay in the model file: shape inference reads them
ALIGNMENT = 4096  # lets onnxruntime map the weights instead of copying them


def make_folder(path: Path, *, option: str = "--work-dir") -> None:
    """Make a folder, and those that it is in, unless they are there; raises ValidationError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValidationError(
            f"the folder {path} cannot be made ({error.strerror or error}); check {option}"
        ) from error


def save_model(
    proto: ModelProto,
    path: Path,
    *,
    external_data: bool,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a model so that it appears at ``path`` complete or not at all.

    ``check`` is called with the temporary file before it is renamed and may raise to refuse it. Weights
    go to ``<stem>-<hash>.data`` beside the model if ``external_data`` is set or the model exceeds 2 GB; the
    name follows from the content, so an older model at ``path`` keeps its own data until the rename.

    Raises:
        ValidationError: the folder or the disk does not take the files.
    """
    path = Path(path)
    temporary: list[Path] = []
    model_file = _beside(path, "tmp.onnx")
    try:
        if external_data or count_bytes(proto) > MAX_PROTO_BYTES:
            proto = _move_weights_out(proto, path, temporary)
        temporary.append(model_file)
        _write(model_file, [proto.SerializeToString(deterministic=True)])
        if check is not None:
            check(model_file)
        os.replace(model_file, path)
        temporary.clear()
        _sync_folder(path.parent)
    except OSError as error:
        raise ValidationError(
            f"{path} cannot be written ({error.strerror or error}); "
            "check the folder, its permissions and the free space"
        ) from error
    finally:
        for leftover in temporary:
            with suppress(OSError):
                leftover.unlink()


def write_text(path: Path, text: str, *, what: str) -> None:
    """Write a small file, complete or not at all; raises ValidationError, which calls it ``what``."""
    temporary = _beside(path, "tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValidationError(f"{what} {path} cannot be written: {error.strerror or error}") from error


def _beside(path: Path, suffix: str) -> Path:
    """Return a hidden name in the same folder, where a rename is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}.{suffix}")


def _write(path: Path, chunks: Iterable[bytes]) -> None:
    with path.open("wb") as stream:
        for chunk in chunks:
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename last; not every file system allows it, and the file itself is already safe."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def count_saved_bytes(proto: ModelProto, path: Path, *, external_data: bool) -> int:
    """Return how many bytes ``save_model`` will write: the file and its external data."""
    total = count_bytes(proto)
    if not external_data and total <= MAX_PROTO_BYTES:
        return total
    slim: ModelProto = copy_without(proto, omit=["graph"])
    slim.graph.CopyFrom(copy_without(proto.graph, omit=["initializer"]))
    position = 0
    for tensor in proto.graph.initializer:
        raw = _raw_data(tensor)
        if raw is None or len(raw) < _EXTERNAL_MIN_BYTES:
            slim.graph.initializer.append(tensor)
            continue
        position += -position % ALIGNMENT
        header = _header_with_meta(tensor)
        header.data_location = TensorProto.EXTERNAL
        name = f"{path.stem}-{'0' * 12}.data"
        for key, value in (("offset", position), ("length", len(raw)), ("location", name)):
            header.external_data.add(key=key, value=str(value))
        slim.graph.initializer.append(header)
        position += len(raw)
    return int(slim.ByteSize()) + position


def _move_weights_out(proto: ModelProto, path: Path, temporary: list[Path]) -> ModelProto:
    """Write large initializers to a file named after their content; return the model that points there."""
    slim: ModelProto = copy_without(proto, omit=["graph"])
    slim.graph.CopyFrom(copy_without(proto.graph, omit=["initializer"]))
    data_file = _beside(path, "tmp.data")
    temporary.append(data_file)
    digest, position = hashlib.sha256(), 0
    outside: list[TensorProto] = []
    with data_file.open("wb") as stream:
        for tensor in proto.graph.initializer:
            raw = _raw_data(tensor)
            if raw is None or len(raw) < _EXTERNAL_MIN_BYTES:
                slim.graph.initializer.append(tensor)
                continue
            padding = bytes(-position % ALIGNMENT)
            header = _header_with_meta(tensor)
            header.data_location = TensorProto.EXTERNAL
            for key, value in (("offset", position + len(padding)), ("length", len(raw))):
                header.external_data.add(key=key, value=str(value))
            for chunk in (padding, raw):
                stream.write(chunk)
                digest.update(chunk)
            position += len(padding) + len(raw)
            slim.graph.initializer.append(header)
            outside.append(slim.graph.initializer[-1])
        stream.flush()
        os.fsync(stream.fileno())
    if not outside:
        data_file.unlink()
        temporary.remove(data_file)
        return slim
    final = path.with_name(f"{path.stem}-{digest.hexdigest()[:12]}.data")
    for tensor in outside:
        tensor.external_data.add(key="location", value=final.name)
    is_new = not final.exists()
    os.replace(data_file, final)
    temporary.remove(data_file)
    if is_new:  # an equal file of an earlier run may be in use
        temporary.append(final)
    return slim


def _header_with_meta(tensor: TensorProto) -> TensorProto:
    header: TensorProto = copy_without(
        tensor,
        omit=[
            "raw_data",
            "float_data",
            "int32_data",
            "int64_data",
            "double_data",
            "uint64_data",
            "data_location",
        ],
    )
    return header


def _raw_data(tensor: TensorProto) -> bytes | None:
    """Return the bytes of a tensor; None for strings, which cannot be external."""
    if tensor.data_type == TensorProto.STRING:
        return None
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)).raw_data
