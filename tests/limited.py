"""Runs of the command line in forked processes with limits of memory and time.

Importing torch and onnxruntime takes seconds, so one process imports them once and forks for each run; what
a run does to its memory, its limits or its signals ends with it.

    python -m tests.limited        reads one JSON request a line on stdin, answers with one JSON a line
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[1]
MEMORY_BYTES = 1 << 30
SECONDS = 30


@dataclass(frozen=True)
class Result:
    """How one run ended: ``code`` is negative for a signal, ``peak`` the bytes above those of the imports."""

    code: int
    out: str
    err: str
    seconds: float
    peak: int


class LimitedRunner:
    """Runs ``hap-onnx`` in a folder, in processes that may use so much memory more than the imports do."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.limited"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._requests, self._answers = self._server.stdin, self._server.stdout

    def __enter__(self) -> LimitedRunner:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._requests.close()
        self._server.wait(timeout=60)
        self._answers.close()

    def run(
        self,
        folder: Path,
        arguments: Sequence[str | Path],
        *,
        memory: int = MEMORY_BYTES,
        seconds: int = SECONDS,
    ) -> Result:
        """Run the command line in ``folder``; more memory fails there, more time ends with a signal."""
        words = list(map(str, arguments))
        request = {"folder": str(folder), "arguments": words, "memory": memory, "seconds": seconds}
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        return Result(**json.loads(self._answers.readline()))


def _serve() -> None:
    from hap_onnx import pipeline  # noqa: F401  (what takes seconds)

    for line in sys.stdin:
        request = json.loads(line)
        outside = Path(request["folder"]).with_suffix(".streams")
        outside.mkdir(exist_ok=True)
        streams = [outside / "out", outside / "err"]
        start = time.perf_counter()
        child = os.fork()
        if not child:
            _run(request, streams)
        code, usage = _wait(child, start + request["seconds"])
        answer = {
            "code": code,
            "out": streams[0].read_text(errors="replace"),
            "err": streams[1].read_text(errors="replace"),
            "seconds": time.perf_counter() - start,
            "peak": (usage.ru_maxrss - _resident_kb()) * 1024,
        }
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _run(request: dict, streams: Sequence[Path]) -> None:
    """Run the command in this, the forked, process; never returns."""
    code = 99
    try:
        for number, path in enumerate(streams, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["folder"])
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + request["memory"],) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # Should nobody be left to end it:
        resource.setrlimit(resource.RLIMIT_CPU, (2 * request["seconds"],) * 2)
        from hap_onnx import cli

        code = cli.main(request["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _wait(child: int, deadline: float) -> tuple[int, resource.struct_rusage]:
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage
        if time.perf_counter() > deadline:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return os.waitstatus_to_exitcode(status), usage
        time.sleep(0.005)


def _resident_kb() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


if __name__ == "__main__":
    _serve()
