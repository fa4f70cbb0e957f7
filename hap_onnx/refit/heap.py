"""What the C library does with freed memory."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc
LARGE_BYTES = 1 << 21
_USUAL_BYTES = 1 << 25  # where glibc ends by itself, once large blocks were freed


@contextmanager
def freed_blocks_returned() -> Iterator[None]:
    """Have what large tensors leave go back to the system at once, in the context.

    By itself glibc keeps such blocks for the next ones, but small objects settle in them meanwhile: memory
    then grows with the number of batches. Where the C library is another one, or the user has a threshold of
    their own, nothing is changed.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        yield
        return
    set_option(_MMAP_THRESHOLD, LARGE_BYTES)
    try:
        yield
    finally:
        set_option(_MMAP_THRESHOLD, _USUAL_BYTES)
