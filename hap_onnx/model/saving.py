"""Write a model so that it is there complete or not at all."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import onnx
from onnx import ModelProto, TensorProto

from hap_onnx.errors import ValidationError
from hap_onnx.interrupts import hold_signals, interruptible
from hap_onnx.model.protos import MAX_PROTO_BYTES, copy_without, count_bytes, n_data_bytes, tensor_header
from hap_onnx.model.temporary import beside, beside_with_data, data_path, remove_leftovers
from hap_onnx.model.weights import (
    MIN_BYTES,
    AnyModel,
    bytes_of,
    count_model_bytes,
    join_model,
    proto_of,
    weights_of,
)

ALIGNMENT = 4096  # lets onnxruntime map the weights instead of copying them
LOCK_SECONDS = 600.0
"""How long to wait for another run that writes to the same folder."""


def make_folder(path: Path, *, option: str = "--work-dir") -> None:
    """Make a folder, and those that it is in, unless they are there; raises ValidationError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValidationError(
            f"the folder {path} cannot be made ({error.strerror or error}); check {option}"
        ) from error


def save_model(
    model: AnyModel,
    path: Path,
    *,
    external_data: bool,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a model so that it appears at ``path`` complete or not at all.

    ``check`` is called with the temporary file, its data in place, before it is renamed, and may raise to
    refuse it. Weights go to ``<stem>-<hash>.data`` beside the model if ``external_data`` is set or the model
    exceeds 2 GB; the name follows from the content, so an older model at ``path`` keeps its own data.
    What a killed run has left on its way to ``path`` is removed.

    Raises:
        ValidationError: the folder or the disk does not take the files.
    """
    path = Path(path)
    temporary: list[Path] = []
    try:
        with hold_signals(), _locked(path.parent):
            try:
                remove_leftovers(path)
                with interruptible():
                    _write_model(model, path, external_data, temporary, check)
            finally:
                _remove(temporary)
            _sync_folder(path.parent)
    except OSError as error:
        raise ValidationError(
            f"{path} cannot be written ({error.strerror or error}); "
            "check the folder, its permissions and the free space"
        ) from error


def _write_model(
    model: AnyModel,
    path: Path,
    external_data: bool,
    temporary: list[Path],
    check: Callable[[Path], None] | None,
) -> None:
    """Write, check and rename; ``temporary`` lists what has to go if that fails.

    The model is written before its data gets its name, and says in its own name which data it is the first to
    need: so a killed run never leaves data that nothing tells of.
    """
    model_file, digest = beside(path, "tmp.onnx"), None
    if external_data or count_model_bytes(model) > MAX_PROTO_BYTES:
        data_file = beside(path, "tmp.data")
        temporary.append(data_file)
        proto, digest = _write_data(model, path, data_file)
    else:
        proto = join_model(model)
    if digest is not None and not data_path(path, digest).exists():  # an equal one may be in use
        model_file = beside_with_data(path, digest)
    temporary.append(model_file)
    _write(model_file, [proto.SerializeToString(deterministic=True)])
    if digest is not None:
        final = data_path(path, digest)
        if model_file != beside(path, "tmp.onnx"):
            temporary.append(final)
        os.replace(data_file, final)
    if check is not None:
        check(model_file)
    os.replace(model_file, path)
    temporary.clear()


def _remove(temporary: Iterable[Path]) -> None:
    """Remove what an interrupted write has left, unless the last rename was done: then it is the model's."""
    for leftover in temporary:
        try:
            leftover.unlink()
        except FileNotFoundError:
            if leftover.suffix == ".onnx":
                return
        except OSError:
            pass


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one run at a time write models to a folder, where the system can lock one.

    Two that write the same data would share the file, which the first to fail then takes away. Signals are
    let through while it waits.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # not POSIX, or a folder that cannot be read
        yield
        return
    try:
        with interruptible():
            _lock(descriptor, fcntl, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, fcntl: ModuleType, folder: Path) -> None:
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise ValidationError(
                    f"another program has kept {folder} locked for {LOCK_SECONDS:g} s; wait for it, or "
                    "write elsewhere"
                ) from None
            time.sleep(0.05)
        except OSError:  # a file system without locks
            return


def write_text(path: Path, text: str, *, what: str) -> None:
    """Write a small file, complete or not at all; raises ValidationError, which calls it ``what``."""
    temporary = beside(path)
    with hold_signals():
        remove_leftovers(path)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            raise ValidationError(f"{what} {path} cannot be written: {error.strerror or error}") from error
        finally:
            with suppress(OSError):
                temporary.unlink()


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


def count_saved_bytes(model: AnyModel, path: Path, *, external_data: bool) -> int:
    """Return how many bytes ``save_model`` will write: the file and its external data."""
    total = count_model_bytes(model)
    if not external_data and total <= MAX_PROTO_BYTES:
        return count_bytes(join_model(model))
    slim, position = _without_initializers(proto_of(model)), 0
    for tensor, n_bytes in _initializers(model):
        if n_bytes == 0:
            slim.graph.initializer.append(tensor)
            continue
        position += -position % ALIGNMENT
        header = _placed(tensor, position, n_bytes)
        header.external_data.add(key="location", value=data_path(path, "0" * 12).name)
        slim.graph.initializer.append(header)
        position += n_bytes
    return int(slim.ByteSize()) + position


def _without_initializers(proto: ModelProto) -> ModelProto:
    slim: ModelProto = copy_without(proto, omit=["graph"])
    slim.graph.CopyFrom(copy_without(proto.graph, omit=["initializer"]))
    return slim


def _initializers(model: AnyModel) -> Iterator[tuple[TensorProto, int]]:
    """Yield each initializer, and how many bytes of it go outside: 0 for those that stay."""
    for tensor in proto_of(model).graph.initializer:
        n_bytes = n_data_bytes(tensor) if tensor.data_type != TensorProto.STRING else 0
        yield tensor, n_bytes if n_bytes >= MIN_BYTES else 0


def _placed(tensor: TensorProto, position: int, n_bytes: int) -> TensorProto:
    """Return a tensor without its numbers, which are at ``position`` of a file."""
    header = tensor_header(tensor)
    header.data_location = TensorProto.EXTERNAL
    for key, value in (("offset", position), ("length", n_bytes)):
        header.external_data.add(key=key, value=str(value))
    return header


def _write_data(model: AnyModel, path: Path, data_file: Path) -> tuple[ModelProto, str | None]:
    """Write large initializers to ``data_file``; return the model that points to its final name, and a hash.

    The hash is None, and there is no file, if nothing is large.
    """
    slim, weights = _without_initializers(proto_of(model)), weights_of(model)
    digest, position = hashlib.sha256(), 0
    outside: list[TensorProto] = []
    with data_file.open("wb") as stream:
        for tensor, n_bytes in _initializers(model):
            if n_bytes == 0:
                slim.graph.initializer.append(tensor)
                continue
            padding = bytes(-position % ALIGNMENT)
            position += len(padding)
            array = weights.get(tensor.name)
            for chunk in (padding, _raw_data(tensor) if array is None else bytes_of(array)):
                stream.write(chunk)
                digest.update(chunk)
            slim.graph.initializer.append(_placed(tensor, position, n_bytes))
            outside.append(slim.graph.initializer[-1])
            position += n_bytes
        stream.flush()
        os.fsync(stream.fileno())
    if not outside:
        data_file.unlink()
        return slim, None
    for tensor in outside:
        tensor.external_data.add(key="location", value=data_path(path, digest.hexdigest()).name)
    return slim, digest.hexdigest()


def _raw_data(tensor: TensorProto) -> bytes:
    """Return the bytes of a tensor."""
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    return bytes(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)).raw_data)
