"""Temporary files and folders with names that say who made them: a later run removes what a killed one left.

Nothing can clean up after SIGKILL or a power cut. The names hold the machine and the process; what a process
of this machine has left that is no longer there is removed by the next run that writes to the same place.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hap_onnx.errors import ValidationError
from hap_onnx.interrupts import hold_signals

_PREFIX = "hap-onnx-"
_TAG = r"(?P<host>[0-9a-f]{6})-(?P<pid>\d+)"
_FILE = re.compile(rf"\.(?P<target>.+)\.{_TAG}(\.(?P<digest>[0-9a-f]{{12}}))?\.tmp(\.\w+)?")
_FOLDER = re.compile(rf"{_PREFIX}[a-z]+-{_TAG}-.*")


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def beside(path: Path, suffix: str = "tmp") -> Path:
    """Return a hidden name in the same folder, where a rename is atomic; ``suffix`` begins with ``tmp``."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.{suffix}")


def beside_with_data(path: Path, digest: str) -> Path:
    """Return such a name for a model that brings external data with it, whose hash begins with ``digest``."""
    return beside(path, f"{digest[:12]}.tmp.onnx")


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``path``, for what libraries write under names of their own.

    It goes at the end, and what a killed run has left at the start. Signals are held: what takes long has to
    be ``interruptible``. Raises OSError if there cannot be a folder.
    """
    with hold_signals():
        remove_leftovers(path)
        folder = beside(path, "tmp.d")
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def data_path(path: Path, digest: str) -> Path:
    """Return where the external data of a model goes: the name follows from the content."""
    return path.with_name(f"{path.stem}-{digest[:12]}.data")


def remove_leftovers(path: Path) -> None:
    """Remove temporary files that processes which are gone have left beside ``path``, on their way to it."""
    for file, found in _find(path.parent, _FILE):
        if found["target"] == path.name and _is_gone(found):
            _remove_file(file, path, found["digest"])


def remove_all_leftovers(folder: Path) -> None:
    """Remove all temporary files and folders in ``folder`` that processes which are gone have left."""
    for file, found in _find(folder, _FILE):
        if _is_gone(found):
            _remove_file(file, file.with_name(found["target"]), found["digest"])
    _remove_dead_folders(folder)


def _remove_dead_folders(place: Path) -> None:
    for folder, found in _find(place, _FOLDER):
        if found["pid"] != str(os.getpid()) and _is_gone(found):
            shutil.rmtree(folder, ignore_errors=True)


def _find(folder: Path, pattern: re.Pattern[str]) -> Iterator[tuple[Path, re.Match[str]]]:
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        found = pattern.fullmatch(name)
        if found is not None:
            yield folder / name, found


def _is_gone(found: re.Match[str]) -> bool:
    """Tell whether the process of a leftover is no more; not known of other machines."""
    if os.name != "posix" or found["host"] != _host():
        return False
    pid = int(found["pid"])
    if pid == os.getpid():  # of an earlier process with this number: names are made after this is asked
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _remove_file(file: Path, target: Path, digest: str | None) -> None:
    """Remove a temporary file or folder, and the data that a temporary model was the first to need."""
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file, ignore_errors=True)
        return
    try:
        file.unlink()
    except OSError:
        return
    if digest is None:
        return
    data = data_path(target, digest)
    with suppress(OSError):
        if not (target.exists() and data.name.encode() in target.read_bytes()):
            data.unlink()


def make_temporary_folder(kind: str, parent: Path | None = None) -> Path:
    """Make a temporary folder in ``parent`` (default: the system's place), and remove dead ones there.

    Signals should be held until it is noted that it has to go.

    Raises:
        ValidationError: there cannot be one.
    """
    place = Path(tempfile.gettempdir()) if parent is None else parent
    _remove_dead_folders(place)
    try:
        return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{kind}-{_host()}-{os.getpid()}-", dir=place))
    except OSError as error:
        raise ValidationError(
            f"a temporary folder cannot be made in {place} ({error.strerror or error}); check --work-dir, or "
            "point TMPDIR elsewhere"
        ) from error


@contextmanager
def temporary_folder(kind: str, parent: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder that goes at the end, as far as the system lets it.

    Signals are held: what takes long has to be ``interruptible``.
    """
    with hold_signals():
        folder = make_temporary_folder(kind, parent)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
