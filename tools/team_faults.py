"""Kill one of several processes of real jobs at random moments, and check that all end and the job goes on.

    python -m tools.team_faults --n 20 --seed 0

Each trial starts a job of ``tools.faults`` under ``torchrun`` with ``--work-dir`` and sends SIGKILL to one of
its processes after a random time. After it:

- all processes end, within ``--limit`` seconds: far less than ``--dist-timeout``;
- the exit code is torchrun's for a failure, and at most one line on stderr is from hap-onnx: it names the
  process that is gone, unless that was killed before the processes had found each other;
- the output is not there, or is there whole.

In the end the same command runs undisturbed: it must write the bytes of a team that nobody disturbed, and
leave no temporary files of the killed ones.
"""

from __future__ import annotations

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
from collections.abc import Iterator, Mapping
from pathlib import Path

import click

from tools.faults import JOBS, ROOT, Ended, Place, check_end


def run_team(
    place: Place, size: int, *, limit: float, victim: int | None = None, after: float = 0.0
) -> Ended:
    """Run a job as a team; kill process ``victim`` of it after some seconds."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(place.path / "tmp"),
        "OMP_NUM_THREADS": "1",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    start, was_hit, killed = time.monotonic(), False, time.monotonic()
    with subprocess.Popen(
        [*launcher, "-m", "hap_onnx", *place.arguments],
        cwd=place.path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            if victim is not None:
                was_hit = _kill(process, victim, start + after)
                killed = time.monotonic()
            _, stderr = process.communicate(timeout=limit if was_hit else 20 * limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, stderr = process.communicate()
            stderr += f"\nstill running after {limit:g} s"
    return Ended(process.returncode, stderr, time.monotonic() - (killed if was_hit else start), was_hit)


def _kill(process: subprocess.Popen[str], victim: int, when: float) -> bool:
    """Kill one of the processes at a time, or as soon as it is there; False if they have ended before."""
    while process.poll() is None:
        workers = _children(process.pid)
        if len(workers) > victim and time.monotonic() >= when:
            os.kill(workers[victim], signal.SIGKILL)
            return True
        time.sleep(0.01)
    return False


def _children(pid: int) -> list[int]:
    try:
        return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []


def check_end_of_all(
    place: Place, ended: Ended, expected: Mapping[str, str], *, limit: float
) -> Iterator[str]:
    """Yield what is wrong after one process of a team was killed."""
    if ended.code == 0:
        yield from check_end(place, ended, expected)
        return
    if "still running" in ended.stderr:
        yield f"no end within {limit:g} s: {ended.stderr[-500:]}"
    if ended.code != 1:
        yield f"exit code {ended.code}"
    said = [line for line in ended.stderr.splitlines() if line.startswith("hap-onnx: ")]
    if len(said) > 1 or any("killed from outside" not in line and "terminated" not in line for line in said):
        yield f"stderr: {said}"
    output = {name: digest for name, digest in place.files("out").items() if "/." not in name}
    wrong = [name for name, digest in output.items() if "report" not in name and expected.get(name) != digest]
    if wrong:
        yield f"there and not whole: {wrong}"


@click.command(help=__doc__)
@click.option("--n", "n_kills", default=20, show_default=True, help="How often.")
@click.option("--size", default=2, show_default=True, help="Processes of a team.")
@click.option("--seed", default=0, show_default=True)
@click.option("--limit", default=60.0, show_default=True, help="Seconds until all must have ended.")
def main(n_kills: int, size: int, seed: int, limit: float) -> None:
    draw, start = random.Random(seed), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="team-faults-"))
    references: dict[str, tuple[Mapping[str, str], float]] = {}
    for job in JOBS:
        place = Place.make(folder / job, job)
        ended = run_team(place, size, limit=limit)
        if ended.code:
            raise click.ClickException(f"the job {job} fails undisturbed: {ended.stderr}")
        digests = {name: digest for name, digest in place.files("out").items() if "report" not in name}
        references[job] = digests, ended.seconds
        print(f"{job}: {ended.seconds:.1f} s in {size} processes", flush=True)
    seen: Counter[str] = Counter()
    slowest, problems = 0.0, 0
    for number in range(10 * n_kills):
        if seen["kills"] == n_kills:
            break
        job, victim = draw.choice(sorted(JOBS)), draw.randrange(size)
        expected, seconds = references[job]
        place, after = Place.make(folder / f"trial{number}", job), draw.uniform(0, seconds)
        ended = run_team(place, size, victim=victim, after=after, limit=limit)
        found = list(check_end_of_all(place, ended, expected, limit=limit))
        if ended.was_hit:
            seen["kills"] += 1
            slowest = max(slowest, ended.seconds)
            has_named = re.search(rf"hap-onnx: error: rank {victim} .*killed from outside", ended.stderr)
            seen["named"] += bool(has_named)
            seen["finished all the same"] += ended.code == 0
        if not found:
            again = run_team(place, size, limit=limit)
            found = [f"going on: {problem}" for problem in check_end(place, again, expected)]
            seen["went on"] += ended.was_hit and not found
        for problem in found:
            print(f"PROBLEM: {job}, rank {victim} after {after:.2f} s: {problem}", flush=True)
        problems += len(found)
        shutil.rmtree(place.path)
    shutil.rmtree(folder)
    facts = ", ".join(f"{count} {what}" for what, count in seen.items())
    print(
        f"{facts}; all had ended {slowest:.1f} s after the kill at the latest; {problems} problems; "
        f"{time.monotonic() - start:.0f} s"
    )
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
