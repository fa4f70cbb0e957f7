"""Read text files that a user names, within bounds, and tell whose version wrote them."""

from __future__ import annotations

import errno
import stat
from pathlib import Path
from typing import Any

MAX_BYTES = 16 * 2**20


def read_text(path: Path, *, max_bytes: int = MAX_BYTES, encoding: str = "utf-8") -> str:
    """Return the text of a regular file of at most ``max_bytes``: a pipe may never end, nor a device.

    Raises:
        OSError: it is another kind of file, too large, or cannot be read.
        UnicodeDecodeError: it is not text.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if status.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {max_bytes / 2**20:g} MB", str(path))
    return path.read_text(encoding)


def describe_age(found: Any, known: str) -> str | None:
    """Say which version has written a file whose schema is ``found``; None if it is no other one's.

    Schemas are ``hap-onnx/KIND/NUMBER``; this version reads that of ``known``.
    """
    kind, number = known.rsplit("/", 1)
    if not isinstance(found, str) or not found.startswith(f"{kind}/"):
        return None
    digits = found.removeprefix(f"{kind}/")
    if not digits.isascii() or not digits.isdigit() or int(digits[:9]) == int(number):
        return None
    age = "an older" if int(digits[:9]) < int(number) else "a newer"
    return f"{age} version of hap-onnx (its schema is {found[:80]!r}, not {known!r})"
