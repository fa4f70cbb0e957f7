"""Look for graphs that come out wrong and for files that break the command line.

    python -m tools.fuzz graphs --n 20000 --seed 0
    python -m tools.fuzz files --n 20000 --seed 0 --processes 500

``graphs`` draws random valid models (``fuzz_graphs``), cuts them in many ways and compares (``fuzz_checks``).
``files`` damages valid models, plans and data (``fuzz_files``) and gives them to the command line. Case i is
that of seed ``--seed + i`` and nothing else; failing ones are kept in ``--keep``, made as small as they get.
Exit code 1 if there are any.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import onnx
import torch

from hap_onnx.jobs.machine import use_threads
from tools.fuzz_checks import Failed, check_graph
from tools.fuzz_files import Arena, Ending, FileCase, draw_case, remove, write_case
from tools.fuzz_graphs import Replayed, Seeded, random_model

MINIMISE_TRIES = 400


class Progress:
    """Prints a line about every ten seconds."""

    def __init__(self, total: int, *, every: float = 10.0) -> None:
        self._total, self._every = total, every
        self._start = self._last = time.monotonic()
        self.done = 0

    @property
    def rate(self) -> float:
        return self.done / max(time.monotonic() - self._start, 1e-9)

    def step(self, counts: Counter[str]) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self._last >= self._every or self.done == self._total:
            self._last = now
            click.echo(f"{self.done}/{self._total}  {self.rate:.1f}/s  {_line(counts)}")


def _line(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


# --- graphs ---


def graph_failure(drawn: Sequence[int], *, seed: int) -> Failed | None:
    """Return what is wrong with the model of some decisions, None if nothing is."""
    try:
        check_graph(random_model(Replayed(drawn)), seed=seed)
    except Failed as failure:
        return failure
    return None


def minimise(drawn: Sequence[int], fails: Callable[[Sequence[int]], bool], *, tries: int) -> list[int]:
    """Make a list of decisions shorter and smaller while it still fails."""
    best = list(drawn)
    while True:
        before = best
        size = max(len(best) // 2, 1)
        while size:
            start = 0
            while start < len(best):
                rest = best[start + size :]
                for candidate in (
                    best[:start] + rest,
                    best[:start] + [0] * (len(best) - start - len(rest)) + rest,
                ):
                    if candidate == best:
                        continue
                    if not tries:
                        return best
                    tries -= 1
                    if fails(candidate):
                        best = candidate
                        break
                else:
                    start += size
            size //= 2
        if best == before:
            return best


@contextmanager
def lean() -> Iterator[None]:
    """Let small graphs take little time, and say nothing of what is odd in them."""
    logger = logging.getLogger("hap_onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    flags = torch.backends.mkldnn.set_flags(False)  # what it prepares costs more than these convolutions
    try:
        with use_threads(1):
            yield
    finally:
        torch.backends.mkldnn.set_flags(flags[0])
        logger.setLevel(level)


@click.group()
def main() -> None:
    """Fuzz hap-onnx."""


@main.command()
@click.option("--n", default=1000, show_default=True, help="How many graphs.")
@click.option("--seed", default=0, show_default=True, help="Seed of the first; each next one has the next.")
@click.option("--keep", default="fuzz-failures", show_default=True, type=click.Path(path_type=Path))
@click.option("--stop-after", default=20, show_default=True, help="Failures after which to stop.")
def graphs(n: int, seed: int, keep: Path, stop_after: int) -> None:
    """Cut N random graphs in many ways, and compare each with the masked original."""
    found, outcomes, progress = Counter[str](), Counter[str](), Progress(n)
    with lean():
        for number in range(seed, seed + n):
            draws = Seeded(number)
            failure: Failed | None = None
            try:
                check_graph(random_model(draws), seed=number, counts=found)
            except Failed as error:
                failure = error
            outcomes["exact" if failure is None else failure.kind] += 1
            if failure is not None:
                click.echo(f"seed {number}: {failure}")
                _keep_graph(keep, number, draws.drawn, failure)
            progress.step(outcomes)
            if progress.done - outcomes["exact"] >= stop_after:
                break
    click.echo(f"{progress.done} graphs from seed {seed}, {progress.rate:.1f}/s: {_line(outcomes)}")
    click.echo(f"in them: {_line(found)}")
    raise SystemExit(int(outcomes["exact"] != progress.done))


def _keep_graph(keep: Path, seed: int, drawn: Sequence[int], failure: Failed) -> None:
    """Minimise a failing graph and write it with what is needed to see it fail again."""

    def fails(candidate: Sequence[int]) -> bool:
        found = graph_failure(candidate, seed=seed)
        return found is not None and found.kind == failure.kind

    smallest = minimise(drawn, fails, tries=MINIMISE_TRIES)
    folder = keep / f"graph-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(random_model(Replayed(drawn)), folder / "found.onnx")
    onnx.save(random_model(Replayed(smallest)), folder / "minimal.onnx")
    last = graph_failure(smallest, seed=seed)
    case = {"seed": seed, "drawn": smallest, "failure": str(failure), "minimal": str(last)}
    (folder / "case.json").write_text(json.dumps(case, indent=1) + "\n", encoding="utf-8")
    click.echo(f"  kept in {folder}: {len(random_model(Replayed(smallest)).graph.node)} nodes, {last}")


# --- files ---


@main.command()
@click.option("--n", default=1000, show_default=True, help="How many cases.")
@click.option("--seed", default=0, show_default=True, help="Seed of the first; each next one has the next.")
@click.option(
    "--processes", default=20, show_default=True, help="How many of them, the last, run as processes."
)
@click.option("--keep", default="fuzz-failures", show_default=True, type=click.Path(path_type=Path))
@click.option("--models", default=16, show_default=True, help="How many valid models are there to damage.")
@click.option("--stop-after", default=50, show_default=True, help="Failures after which to stop.")
def files(n: int, seed: int, processes: int, keep: Path, models: int, stop_after: int) -> None:
    """Give N damaged or hostile files to the command line."""
    outcomes, slowest, failures = Counter[str](), (0.0, -1), 0
    with tempfile.TemporaryDirectory(prefix="hap-fuzz-") as folder:
        arena, progress = Arena(Path(folder), n_models=models), Progress(n)
        for number in range(seed, seed + n):
            case = draw_case(number, arena.bases)
            in_process = number - seed >= n - processes
            ending = arena.run(case, in_process=in_process)
            outcomes[ending.kind] += 1
            slowest = max(slowest, (ending.seconds, number))
            if not ending.is_sound:
                failures += 1
                click.echo(f"seed {number}: {' '.join(case.command)}: {ending.kind}: {ending.detail}")
                _keep_files(keep, arena, case, ending, in_process=in_process)
            progress.step(outcomes)
            if failures >= stop_after:
                break
    click.echo(f"{progress.done} cases from seed {seed}, {progress.rate:.1f}/s: {_line(outcomes)}")
    click.echo(f"the slowest is seed {slowest[1]} with {slowest[0]:.1f} s")
    raise SystemExit(int(failures > 0))


def _keep_files(keep: Path, arena: Arena, case: FileCase, ending: Ending, *, in_process: bool) -> None:
    """Write the files of a failing case, with no more mutations than it takes."""
    smallest = arena.minimise(case, ending, in_process=in_process)
    folder = keep / f"files-{case.seed}"
    remove(folder)
    write_case(smallest, arena.bases[case.base], folder)
    story = {"seed": case.seed, "command": case.command, "mutations": smallest.mutations, "kind": ending.kind}
    text = json.dumps({**story, "detail": ending.detail}, indent=1)
    (folder / "case.json").write_text(text + "\n", encoding="utf-8")
    click.echo(f"  kept in {folder}: {', '.join(name for _, name, _ in smallest.mutations)}")


if __name__ == "__main__":
    main()
