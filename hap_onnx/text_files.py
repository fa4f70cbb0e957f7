"""Read text files that a user names, within bounds."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

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
