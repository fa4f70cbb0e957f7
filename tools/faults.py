"""Kill real jobs at random moments, and check that nothing half-written is left and that they go on.

    python -m tools.faults kills --n 200 --seed 0

Each trial starts ``hap-onnx compress`` with ``--work-dir`` and sends it SIGKILL, SIGTERM or SIGINT: after a
random time, or just before one of its file operations (to open, sync, rename or remove a file, to make a
folder), so that the short windows in which files are written are met as often as the long ones in which it
computes. Some jobs are killed again when they go on. After each kill:

- the exit code is that of the contract, and stderr ends with one line that says so, without a traceback;
- the output is not there, or is there whole: the bytes of a run that nobody disturbed, with its data;
- after SIGTERM and Ctrl-C, nothing that the run has made is left outside the work folder.

In the end the same command runs undisturbed. It must write the same bytes as ever, and leave nothing of the
killed ones: no temporary files beside the output, in the work folder or in the system's.

Most runs are forks of a process that has imported the libraries, which is quick, and know their file
operations through Python's audit hook; ``--fresh`` is the share of new processes of the plain command.
"""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
TIMEOUT = 300.0

# Variants of the job: options, and whether the model keeps its weights in a file beside it.
JOBS: Mapping[str, tuple[tuple[str, ...], bool]] = {
    "epochs": (("--keep-macs", "0.5", "--epochs", "3"), False),
    "rounds": (("--keep-params", "0.4", "--rounds", "2", "--epochs", "1", "--method", "prune"), True),
    "search": (("--max-drop", "0.3", "--metric", "agreement", "--method", "prune"), True),
}

# ---------------------------------------------------------------- the job


def small_network(seed: int = 0) -> onnx.ModelProto:
    """Return stem, two residual blocks and a classifier: x [N, 3, 8, 8] -> scores [N, 5]."""
    generator = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    nodes: list[onnx.NodeProto] = []

    def conv(x: str, y: str, n_in: int, n_out: int, stride: int = 1) -> str:
        scale = np.sqrt(2 / (9 * n_in))
        weights[f"{y}.w"] = (scale * generator.standard_normal((n_out, n_in, 3, 3))).astype(np.float32)
        weights[f"{y}.b"] = (0.1 * generator.standard_normal(n_out)).astype(np.float32)
        inputs = [x, f"{y}.w", f"{y}.b"]
        nodes.append(helper.make_node("Conv", inputs, [y], name=y, pads=[1] * 4, strides=[stride] * 2))
        return y

    def relu(x: str) -> str:
        nodes.append(helper.make_node("Relu", [x], [f"{x}.relu"], name=f"{x}.relu"))
        return f"{x}.relu"

    x = relu(conv("x", "stem", 3, 16))
    for index, (n_in, n_out, stride) in enumerate([(16, 16, 1), (16, 32, 2)]):
        inner = conv(relu(conv(x, f"a{index}", n_in, n_out, stride)), f"b{index}", n_out, n_out)
        shortcut = x if stride == 1 else conv(x, f"s{index}", n_in, n_out, stride)
        nodes.append(helper.make_node("Add", [inner, shortcut], [f"sum{index}"], name=f"sum{index}"))
        x = relu(f"sum{index}")
    weights["head"] = generator.standard_normal((32, 5)).astype(np.float32)
    nodes += [
        helper.make_node("GlobalAveragePool", [x], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "head"], ["scores"], name="head"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "small",
        [value("x", onnx.TensorProto.FLOAT, ["N", 3, 8, 8])],
        [value("scores", onnx.TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@dataclass(frozen=True)
class Place:
    """A folder with one job: what it reads, writes and works in."""

    path: Path
    job: str

    @classmethod
    def make(cls, path: Path, job: str) -> Place:
        """Write model and data."""
        external = JOBS[job][1]
        for name in ("in", "out", "tmp", "work"):
            (path / name).mkdir(parents=True)
        generator = np.random.default_rng(1)
        data = generator.standard_normal((80, 3, 8, 8)) + 1.5 * generator.standard_normal((80, 3, 1, 1))
        # What is compressed is unpacked into the work folder.
        np.savez_compressed(path / "in" / "calib.npz", x=data.astype(np.float32))
        options: dict[str, Any] = {}
        if external:
            options = {"save_as_external_data": True, "location": "net.data", "size_threshold": 64}
        onnx.save(small_network(), path / "in" / "net.onnx", **options)
        return cls(path, job)

    @property
    def arguments(self) -> list[str]:
        return [
            "compress", "in/net.onnx", "--data", "in/calib.npz", "-o", "out/net.onnx", "--work-dir", "work",
            "--save-plan", "out/plan.json", "--report", "out/report.json", "--allow-slower", "-q",
            "--threads", "1", *JOBS[self.job][0],
        ]  # fmt: skip

    def files(self, *folders: str) -> dict[str, str]:
        """Hash the files in some folders, by name; folders count as files without content."""
        found = {}
        for folder in folders:
            for path in sorted((self.path / folder).rglob("*")):
                content = path.read_bytes() if path.is_file() else b""
                found[str(path.relative_to(self.path))] = hashlib.sha256(content).hexdigest()
        return found


# ---------------------------------------------------------------- runs that are stopped


@dataclass(frozen=True)
class Stop:
    """When a run gets a signal: after some seconds, or before a file operation of its own."""

    number: signal.Signals
    seconds: float | None = None
    operation: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a run ended. ``was_hit`` says that the signal came before the end."""

    code: int
    stderr: str
    seconds: float
    was_hit: bool
    n_operations: int = 0


_TRACED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.listdir")
_inside: list[bool] = []


def _watch(folder: Path, act: Callable[[int], None]) -> None:
    """Call ``act`` with a running number before each file operation on something in ``folder``."""
    prefix, n_seen = str(folder), 0

    def see(event: str, path: Any) -> None:
        nonlocal n_seen
        if _inside or not isinstance(path, (str, bytes, os.PathLike)):
            return
        _inside.append(True)  # what follows is ours
        try:
            is_ours = os.path.abspath(os.fsdecode(path)).startswith(prefix)
        finally:
            _inside.pop()
        if is_ours:
            n_seen += 1
            act(n_seen)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _TRACED and arguments:
            see(event, arguments[0])

    sys.addaudithook(hook)
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        see("fsync", prefix)
        sync(descriptor)

    os.fsync = fsync  # it has no audit event


def _run_here(place: Place, stop: Stop | None, counter: Any) -> None:
    """Be the process of a run; never returns."""
    os.chdir(place.path)
    os.environ["TMPDIR"] = str(place.path / "tmp")
    tempfile.tempdir = None
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(place.path / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)

    def act(n_seen: int) -> None:
        counter.value = n_seen
        if stop is not None and stop.operation == n_seen:
            os.kill(os.getpid(), stop.number)

    from hap_onnx import cli
    from hap_onnx.jobs import machine

    machine.LATENCY_SECONDS = 0.05
    _watch(place.path, act)
    code = cli.main(place.arguments)
    gc.collect()  # as the end of a process: what is in circles has temporary folders
    os._exit(code)


def run_fork(place: Place, stop: Stop | None) -> Ended:
    """Run the job in a fork of this process, which has imported everything."""
    context = multiprocessing.get_context("fork")
    counter = context.Value("q", 0, lock=False)
    process = context.Process(target=_run_here, args=(place, stop, counter))
    start = time.monotonic()
    process.start()
    was_hit = False
    if stop is not None and stop.seconds is not None:
        process.join(stop.seconds)
        was_hit = process.is_alive()
        if was_hit:
            assert process.pid is not None
            os.kill(process.pid, stop.number)
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        raise click.ClickException(f"a run in {place.path} did not end {TIMEOUT:g} s after {stop}")
    assert process.exitcode is not None
    if stop is not None and stop.operation is not None:
        was_hit = counter.value >= stop.operation
    stderr = (place.path / "stderr").read_text()
    return Ended(process.exitcode, stderr, time.monotonic() - start, was_hit, counter.value)


def run_fresh(place: Place, stop: Stop | None) -> Ended:
    """Run the job as a user does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(place.path / "tmp")}
    start, was_hit = time.monotonic(), False
    with subprocess.Popen(
        [sys.executable, "-m", "hap_onnx", *place.arguments],
        cwd=place.path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        if stop is not None:
            try:
                process.wait(stop.seconds)
            except subprocess.TimeoutExpired:
                was_hit = True
                process.send_signal(stop.number)
        _, stderr = process.communicate(timeout=TIMEOUT)
    return Ended(process.returncode, stderr, time.monotonic() - start, was_hit)


# ---------------------------------------------------------------- what must hold


@dataclass
class Tally:
    """What was seen, and what was wrong."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    late: Counter[tuple[str, str]] = field(default_factory=Counter)
    finished: Counter[tuple[str, str]] = field(default_factory=Counter)
    left: Counter[tuple[str, str]] = field(default_factory=Counter)
    n_resumed: int = 0
    problems: list[str] = field(default_factory=list)


def check_kill(
    place: Place, ended: Ended, stop: Stop, before: Mapping[str, str], expected: Mapping[str, str]
) -> Iterator[str]:
    """Yield what is wrong after a run was stopped, or ended just before it could be."""
    number = stop.number
    output = place.files("out")
    outputs = {name: digest for name, digest in output.items() if "report" not in name}
    if ended.code == 0:
        yield from check_end(place, ended, expected)
        return
    if number == signal.SIGKILL:
        if ended.code != -signal.SIGKILL:
            yield f"exit code {ended.code} after SIGKILL: {ended.stderr[-300:]}"
    elif ended.code not in (CODES[number], -number):  # until our handlers are there, the system's act
        yield f"exit code {ended.code} after {number.name}: {ended.stderr[-300:]}"
    elif ended.code == CODES[number]:
        lines = ended.stderr.splitlines()
        is_said = bool(lines) and "nothing was written" in lines[-1]
        if not is_said or any(not line.startswith("warning: ") for line in lines[:-1]):
            yield f"stderr after {number.name}: {ended.stderr[-300:]!r}"
        names = sorted(name for name in {*output, *before} if name.startswith("out"))
        changed = [name for name in names if output.get(name) != before.get(name) and not _is_temporary(name)]
        if changed:
            yield f"something was written, though stopped by {number.name}: {changed}"
        # What a SIGKILL has left before is not this run's, whether it has come to removing it or not.
        made = [name for name in _temporaries(place) if name not in before]
        if left := [name for name in made if not name.startswith("work")]:
            yield f"left after {number.name}: {left}"
    for name, digest in outputs.items():
        if any(part.startswith(".") for part in Path(name).parts):
            continue  # what the next run removes
        if expected.get(name) != digest:
            yield f"{name} is there and is not what it should be"
    if "out/net.onnx" in outputs and set(outputs) < set(expected):
        yield f"the model is there, but not {sorted(set(expected) - set(outputs))}"


def _is_temporary(name: str) -> bool:
    return re.search(r"/(\.[^/]*tmp[^/]*|hap-onnx-[^/]*)(/|$)", f"/{name}") is not None


def _temporaries(place: Place) -> list[str]:
    """Return names of temporary files and folders that a run has left."""
    return [name for name in place.files("out", "work", "tmp") if _is_temporary(name)]


def check_end(place: Place, ended: Ended, expected: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong after a run came to its end."""
    if ended.code != 0:
        yield f"exit code {ended.code} at the end: {ended.stderr[-500:]}"
        return
    found = place.files("out")
    digests = {name: digest for name, digest in found.items() if "report" not in name}
    if digests != dict(expected):
        wrong = sorted(name for name in {*digests, *expected} if digests.get(name) != expected.get(name))
        yield f"not what an undisturbed run writes: {wrong}"
    if "out/report.json" not in found:
        yield "there is no report"
    if left := _temporaries(place):
        yield f"left at the end: {left}"


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody stopped: what it wrote (not the report, which holds times), and how long it took."""

    digests: Mapping[str, str]
    seconds: Mapping[str, float]
    n_operations: int


def undisturbed(folder: Path, job: str, *, with_fresh: bool) -> Undisturbed:
    """Run a job to its end, in both ways."""
    seconds, digests, n_operations = {}, [], 0
    for how, run in (("fork", run_fork), ("fresh", run_fresh)):
        if how == "fresh" and not with_fresh:
            continue
        place = Place.make(folder / f"{job}-{how}", job)
        ended = run(place, None)
        if ended.code != 0:
            raise click.ClickException(f"the job {job} fails undisturbed: {ended.stderr}")
        found = place.files("out")
        digests.append({name: digest for name, digest in found.items() if "report" not in name})
        seconds[how] = ended.seconds
        n_operations = ended.n_operations or n_operations
    if any(other != digests[0] for other in digests):
        raise click.ClickException(f"two undisturbed runs of the job {job} wrote different bytes")
    return Undisturbed(digests[0], seconds, n_operations)


def kill_jobs(n_kills: int, *, seed: int, fresh: float, folder: Path, say: Callable[[str], None]) -> Tally:
    """Kill jobs ``n_kills`` times; those whose signal came too late are not counted as kills."""
    draw = random.Random(seed)
    references = {job: undisturbed(folder / "undisturbed", job, with_fresh=fresh > 0) for job in JOBS}
    for job, reference in references.items():
        took = ", ".join(f"{how} {seconds:.1f} s" for how, seconds in reference.seconds.items())
        say(f"{job}: {took}, {reference.n_operations} file operations")
    tally, n_trials = Tally(), 0
    while sum(tally.kills.values()) < n_kills:
        n_trials += 1
        job = draw.choice(sorted(JOBS))
        place, reference = Place.make(folder / f"trial{n_trials}", job), references[job]
        problems: list[str] = []
        while not problems:
            number = draw.choice(SIGNALS)
            how = "fresh" if draw.random() < fresh else "fork"
            if how == "fresh" or draw.random() < 0.4:
                stop = Stop(number, seconds=draw.uniform(0, 1.05) * reference.seconds[how])
            else:
                stop = Stop(number, operation=draw.randint(1, reference.n_operations))
            before = place.files("out", "work", "tmp")
            ended = (run_fresh if how == "fresh" else run_fork)(place, stop)
            kind = (number.name, "file operation" if stop.operation is not None else f"time, {how}")
            (tally.kills if ended.was_hit else tally.late)[kind] += 1
            tally.finished[kind] += ended.was_hit and (place.path / "out" / "net.onnx").exists()
            tally.left[kind] += ended.was_hit and bool(_temporaries(place))
            problems += check_kill(place, ended, stop, before, reference.digests)
            problems = [f"trial {n_trials} ({job}), {stop}, {how}: {problem}" for problem in problems]
            if ended.code == 0 or draw.random() < 0.25:
                break
        if not problems:
            problems = list(check_end(place, run_fork(place, None), reference.digests))
            problems = [f"trial {n_trials} ({job}), going on: {problem}" for problem in problems]
            tally.n_resumed += not problems
        for problem in problems:
            say(f"PROBLEM: {problem}")
        tally.problems += problems
        if not problems:
            shutil.rmtree(place.path)
        if n_trials % 10 == 0:
            n_done, n_problems = sum(tally.kills.values()), len(tally.problems)
            say(f"{n_done} kills, {tally.n_resumed} jobs went on, {n_problems} problems")
    return tally


def show(tally: Tally) -> Table:
    """Make a table of what was seen."""
    table = Table(title=f"{sum(tally.kills.values())} kills")
    for column in ("signal", "moment", "kills", "output was whole", "files for the next run", "too late"):
        table.add_column(column, justify="left" if column in ("signal", "moment") else "right")
    for kind in sorted({*tally.kills, *tally.late}):
        numbers = (tally.kills, tally.finished, tally.left, tally.late)
        table.add_row(*kind, *(str(counter[kind]) for counter in numbers))
    return table


@click.group(help=__doc__)
def main() -> None:
    """Collect the commands."""


@main.command(help="Kill jobs at random moments.")
@click.option("--n", "n_kills", default=200, help="How often.")
@click.option("--seed", default=0)
@click.option("--fresh", default=0.15, help="Share of runs that are new processes of the plain command.")
@click.option("--keep", type=click.Path(path_type=Path), help="Work here, and keep what went wrong.")
def kills(n_kills: int, seed: int, fresh: float, keep: Path | None) -> None:
    # One thread: a fork of a process with several would hang.
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a background job would ignore it
    import torch

    torch.set_num_threads(1)
    from hap_onnx import cli, pipeline  # noqa: F401

    console = Console(width=100)
    start = time.monotonic()
    folder = Path(keep or tempfile.mkdtemp(prefix="faults-")).resolve()

    def say(text: str) -> None:
        print(text, flush=True)

    tally = kill_jobs(n_kills, seed=seed, fresh=fresh, folder=folder, say=say)
    if keep is None:
        shutil.rmtree(folder)
    console.print(show(tally))
    print(
        f"{tally.n_resumed} jobs went on to the bytes of an undisturbed run; {len(tally.problems)} problems; "
        f"{time.monotonic() - start:.0f} s"
    )
    sys.exit(1 if tally.problems else 0)


if __name__ == "__main__":
    main()
