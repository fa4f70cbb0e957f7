"""Code in forks of this process: killed, limited or without streams, and quick, since all is imported."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRACED = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")


@dataclass(frozen=True)
class Ended:
    """How a fork ended: ``code`` is negative after a signal."""

    code: int
    out: str
    err: str


def run_fork(work: Callable[[], int | None], *, folder: Path | None = None) -> Ended:
    """Run ``work`` in a fork and wait; its result is the exit code."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = start_fork(work, folder=folder, streams=(out.fileno(), err.fileno()))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode())
    return Ended(code, *texts)


def start_fork(
    work: Callable[[], int | None], *, folder: Path | None = None, streams: tuple[int, int] | None = None
) -> int:
    """Start ``work`` in a fork and return its process number."""
    pid = os.fork()
    if pid:
        return pid
    code = 99  # an error of the test itself
    try:
        if streams is not None:
            os.dup2(streams[0], 1)
            os.dup2(streams[1], 2)
            # What pytest has put there would keep the text to itself.
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        if folder is not None:
            os.chdir(folder)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        code = work() or 0
        gc.collect()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                with contextlib.suppress(OSError):  # to a disk that is full; the work has said so
                    stream.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def run_command(folder: Path, *arguments: str | Path, limit: Callable[[], None] = lambda: None) -> Ended:
    """Run ``hap-onnx`` in a fork that works in ``folder``, under a limit that it gives itself."""
    from hap_onnx import cli, pipeline  # noqa: F401
    from hap_onnx.jobs import machine

    def work() -> int:
        machine.LATENCY_SECONDS = 0.05
        limit()
        return cli.main(list(map(str, arguments)))

    return run_fork(work, folder=folder)


def act_before(folder: Path, number: int, act: Callable[[], None]) -> None:
    """Call ``act`` before the file operation of that number in ``folder``, counted from one; for forks."""
    n_seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal n_seen
        place = arguments[0] if event in TRACED else None
        if isinstance(place, (str, os.PathLike)) and os.path.abspath(place).startswith(str(folder)):
            n_seen += 1
            if n_seen == number:
                act()

    sys.addaudithook(hook)


def limit_files(n_bytes: int) -> None:
    """Let no file grow beyond ``n_bytes``: what a full disk does, but for the number of the error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))


def memory_of(kind: str) -> int:
    """Return bytes of memory as the system counts them for this process: VmSize, VmRSS, VmHWM ..."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) << 10
    raise KeyError(kind)
