"""Several processes that share the work, as forks of this one: quick, since all is imported."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from forks import Ended, start_fork

from hap_onnx.distributed import Team, join_team

T = TypeVar("T")
SECONDS = 60.0
"""How long a team may take before it counts as hanging."""


def free_port() -> int:
    """Return a port that nobody listens to."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What ``torchrun`` tells a process, but for a store of its own."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def start_team(
    size: int, work: Callable[[int], int | None], *, folder: Path, port: int | None = None
) -> dict[int, int]:
    """Start ``work(rank)`` in each of some processes; returns their ranks by number.

    What they print goes to ``out.RANK`` and ``err.RANK`` in ``folder``.
    """
    port = port or free_port()
    started: dict[int, int] = {}
    for rank in range(size):

        def be(rank: int = rank) -> int | None:
            os.environ.update(variables(rank, size, port))
            return work(rank)

        streams = tuple(
            os.open(folder / f"{name}.{rank}", os.O_RDWR | os.O_CREAT | os.O_TRUNC) for name in ("out", "err")
        )
        started[start_fork(be, streams=(streams[0], streams[1]))] = rank
        for stream in streams:
            os.close(stream)
    return started


def wait_for_team(started: Mapping[int, int], folder: Path, *, seconds: float = SECONDS) -> list[Ended]:
    """Wait for all processes of a team; what still runs after ``seconds`` is killed and fails the test."""
    left, ended, end = dict(started), {}, time.monotonic() + seconds
    try:
        while left:
            for pid in list(left):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    rank = left.pop(pid)
                    texts = [(folder / f"{name}.{rank}").read_text() for name in ("out", "err")]
                    ended[rank] = Ended(os.waitstatus_to_exitcode(status), *texts)
            assert time.monotonic() < end, f"still running after {seconds:g} s: ranks {sorted(left.values())}"
            time.sleep(0.01)
    finally:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return [ended[rank] for rank in sorted(ended)]


def run_team(size: int, work: Callable[[Team], T], *, timeout_s: float = SECONDS) -> list[T]:
    """Return what ``work`` gives in each process of a team, by rank."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        def be(rank: int) -> None:
            with join_team(timeout_s) as team:
                found = work(team)
            (folder / f"found.{rank}").write_bytes(pickle.dumps(found))

        ended = wait_for_team(start_team(size, be, folder=folder), folder)
        assert [one.code for one in ended] == [0] * size, "\n".join(one.err for one in ended)
        return [pickle.loads((folder / f"found.{rank}").read_bytes()) for rank in range(size)]


def run_commands(
    size: int, folder: Path, *arguments: Any, before: Callable[[int], None] = lambda rank: None
) -> list[Ended]:
    """Run ``hap-onnx`` as a team of processes that work in ``folder``; ``before`` is called in each."""
    from hap_onnx import cli, pipeline  # noqa: F401
    from hap_onnx.jobs import machine

    def be(rank: int) -> int:
        os.chdir(folder)
        machine.LATENCY_SECONDS = 0.05
        before(rank)
        return cli.main(list(map(str, arguments)))

    return wait_for_team(start_team(size, be, folder=folder), folder)
