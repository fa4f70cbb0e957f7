"""Which of several processes this is; without torch, which takes seconds to import."""

from __future__ import annotations

import os
from dataclasses import dataclass

from hap_onnx.errors import UsageError

_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """The number of this process among all, how many there are, and its number on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def find_place() -> Place:
    """Return what ``torchrun``, or whoever sets the same variables, says of this process.

    Raises UsageError for variables that make no sense.
    """
    if any(name not in os.environ for name in _NAMES):
        return Place()
    try:
        rank, size, local, port = (
            int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        )
    except ValueError as error:
        raise UsageError(f"RANK, WORLD_SIZE, LOCAL_RANK and MASTER_PORT must be numbers: {error}") from error
    if not (0 <= rank < size and local >= 0 and 0 <= port < 2**16):
        raise UsageError(f"RANK={rank} of WORLD_SIZE={size} at MASTER_PORT={port} makes no sense")
    return Place(rank, size, local)
