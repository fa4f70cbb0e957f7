"""The zoo: common architectures exported to ONNX, compressed, and checked, with a table of what works.

    python -m tools.zoo export zoo/                       # write the files (all, or those that match names)
    python -m tools.zoo check zoo/ 'resnet*' --until twin
    python -m tools.zoo check zoo/                        # go on: only what is missing is done
    python -m tools.zoo table zoo/

Needs ``pip install -e '.[zoo]'``. Where torchvision asks for another torch than the one that is there, put it
and timm in with ``pip install --no-deps``: only Python code of theirs is used. Nothing is downloaded: weights
are random, and so is the data.

Each file runs in a process of its own, on one thread, with a time limit. Results are kept in zoo/results, one
JSON file per model; the table is zoo/results/zoo.md, with all numbers in zoo.json beside it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import multiprocessing
import os
import resource
import shlex
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tools import zoo_checks
from tools.zoo_models import FILES, NETWORKS, export, make_inputs

STAGES = ("twin", "inspect", "compress")
KEEP = 0.6

Record = dict[str, Any]


# ---------------------------------------------------------------- processes


def run_apart(work: Callable[[], None], log: Path, limit: float) -> str | None:
    """Run ``work`` in a forked process whose output goes to ``log``; return what ended it early, or None."""

    def body() -> None:
        with log.open("w", buffering=1) as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            sys.stdout = sys.stderr = stream
            torch.set_num_threads(1)
            code = 0
            try:
                work()
            except BaseException:
                traceback.print_exc()
                code = 1
        os._exit(code)  # the parent's exit handlers are not ours

    process = multiprocessing.get_context("fork").Process(target=body)
    with warnings.catch_warnings():  # threads that are lost in the fork: the parent computes nothing
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return f"time limit of {limit:.0f} s"
    if process.exitcode == 0:
        return None
    if process.exitcode is not None and process.exitcode < 0:
        return f"killed by signal {-process.exitcode}"
    return _last_line(log)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "ended without a word"


# ---------------------------------------------------------------- records


def read_record(folder: Path, name: str) -> Record:
    path = folder / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"name": name}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    path = folder / "results" / f"{record['name']}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


def _select(globs: Sequence[str]) -> list[str]:
    names = [name for name in FILES if not globs or any(fnmatch.fnmatch(name, glob) for glob in globs)]
    if not names:
        raise click.BadParameter(f"no file of the zoo is named like {list(globs)}")
    return names


def _model_path(folder: Path, name: str) -> Path:
    return folder / "models" / f"{name}.onnx"


def _data(name: str, n: int) -> dict[str, np.ndarray]:
    return make_inputs(FILES[name][0], n, seed=7)


# ---------------------------------------------------------------- one file


def check_file(
    folder: Path, name: str, stages: Iterable[str], *, samples: int, keep: float, options: Sequence[str]
) -> None:
    """Run stages of one file and write its record after each."""
    path, results = _model_path(folder, name), folder / "results"
    data = _data(name, samples)
    for stage in stages:
        record = read_record(folder, name)
        start = time.perf_counter()
        try:
            if stage == "twin":
                facts = zoo_checks.check_twin(path, data)
            elif stage == "inspect":
                facts = zoo_checks.check_inspect(path, data)
            else:
                facts = _compress(path, data, results, keep=keep, options=options)
        except Exception as error:
            traceback.print_exc()
            facts = {
                "ok": False,
                "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                "trace": traceback.format_exc(limit=-6),
            }
        facts.setdefault("seconds", time.perf_counter() - start)
        facts["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        write_record(folder, {**record, stage: facts})
        sys.stdout.flush()


def _compress(
    path: Path, data: Mapping[str, np.ndarray], results: Path, *, keep: float, options: Sequence[str]
) -> Record:
    data_path = results / f"{path.stem}.npz"
    np.savez(data_path, **data)
    facts = zoo_checks.compress_file(path, data_path, results, keep=keep, options=options)
    data_path.unlink()
    facts["options"] = " ".join(options)
    facts["peak_mb_compress"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    report_path = results / f"{path.stem}.report.json"
    if facts["exit"] != 0:
        facts["ok"] = facts["exit"] == 3
        return facts
    report = json.loads(report_path.read_text())
    before, after = report["before"], report["after"]
    facts |= {
        "kept_params": after["params"] / max(before["params"], 1),
        "kept_macs": after["macs"] / before["macs"] if before["macs"] else None,
        "metric": report["quality"]["metric"],
        "quality": report["quality"]["after"],
        "stages": report["seconds"],
        "implants": len(report["plan"]["implants"]),
    }
    facts |= zoo_checks.check_valid(path, Path(facts["output"]), data)
    facts |= zoo_checks.check_exact(path, results / f"{path.stem}.plan.json", data)
    counted = facts["params_after"] / max(facts["params_before"], 1)
    facts["met"] = bool(max(facts["kept_params"], counted) <= keep + 1e-9)
    facts["ok"] = all(facts.get(name) is not False for name in ("met", "valid", "exact", "dynamic"))
    return facts


def _wanted_stages(record: Record, until: str, *, again: bool, failed: bool, mtime: float) -> list[str]:
    """Stages that are not done, or are to be done again."""
    stages = STAGES[: STAGES.index(until) + 1]
    if again or record.get("mtime") != mtime:
        return list(stages)
    return [
        stage
        for stage in stages
        if stage not in record
        or record[stage].get("exit") in (130, 143)  # stopped by a signal
        or (failed and not record[stage].get("ok", False))
    ]


# ---------------------------------------------------------------- the table


def _mark(value: Any) -> str:
    return "–" if value is None else "yes" if value else "NO"


def _percent(value: Any) -> str:
    return "–" if value is None else f"{100 * value:.0f}"


COLUMNS = (
    "file", "M params", "twin", "prunable %", "params %", "MACs %", "exact", "valid", "dynamic", "s", "MB",
    "exit", "reason",
)  # fmt: skip


def table_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """One row of text per file, under ``COLUMNS``."""
    rows = []
    for record in records:
        twin, seen, done = (record.get(stage) or {} for stage in STAGES)
        seconds = sum(stage.get("seconds", 0.0) for stage in (twin, seen, done))
        reasons = [stage.get("reason") for stage in (twin, seen, done)]
        if done.get("met") is False:
            reasons.append("budget not met in the file")
        reasons += done.get("problems") or []
        cuts = [(seen.get("half") or {}).get("exact"), done.get("exact")]
        exact = False if False in cuts else True if True in cuts else None
        rows.append(
            (
                record["name"],
                f"{record['params'] / 1e6:.2f}" if record.get("params") else "–",
                _mark(twin.get("ok")),
                _percent(seen.get("prunable_params")),
                _percent(done.get("kept_params")),
                _percent(done.get("kept_macs")),
                _mark(exact),
                _mark(done.get("valid")),
                _mark(done.get("dynamic")),
                f"{seconds:.0f}" if seconds else "–",
                str(done.get("peak_mb_compress") or done.get("peak_mb") or twin.get("peak_mb") or "–"),
                "–" if "exit" not in done else str(done["exit"]),
                "; ".join(reason for reason in reasons if reason)[:160],
            )
        )
    return rows


def summarise(records: Sequence[Record]) -> list[str]:
    """The figures that must hold, in words."""
    twins = [record["twin"].get("ok", False) for record in records if "twin" in record]
    done = {record["name"]: record["compress"] for record in records if "compress" in record}
    main = {name: facts for name, facts in done.items() if "__" not in name}

    def count(facts: Mapping[str, Record]) -> str:
        ok = sum(entry.get("exit") == 0 and entry.get("ok", False) for entry in facts.values())
        refused = sum(entry.get("exit") == 3 for entry in facts.values())
        return f"{ok} of {len(facts)} reach the budget, {refused} refused with a reason (exit code 3)"

    invalid = [name for name, facts in done.items() if facts.get("valid") is False]
    fixed = [name for name, facts in done.items() if facts.get("dynamic") is False]
    cuts = [(r["name"], (r.get("inspect", {}).get("half") or {}).get("exact")) for r in records]
    cuts += [(name, facts.get("exact")) for name, facts in done.items()]
    proven = sum(exact is True for _, exact in cuts)
    inexact = [name for name, exact in cuts if exact is False]
    crashed = [name for name, facts in done.items() if facts.get("exit") not in (0, 3)]
    ways = Counter(facts.get("options") or "the defaults" for facts in done.values())
    return [
        f"files: {len(records)} of {len(FILES)}; architectures: {len(NETWORKS)}",
        f"twin equals onnxruntime: {sum(twins)} of {len(twins)}",
        f"compress, architectures: {count(main)}",
        f"compress, all files: {count(done)}",
        "options of compress: " + "; ".join(f"{way}: {n} files" for way, n in ways.most_common()),
        f"cuts that equal the masked original: {proven}; inexact: {len(inexact)} {inexact}",
        f"invalid: {len(invalid)} {invalid}; no longer dynamic: {len(fixed)} {fixed}; "
        f"failed otherwise: {len(crashed)} {crashed}",
    ]


def write_table(folder: Path, records: Sequence[Record]) -> None:
    """Write zoo.json and zoo.md."""
    results = folder / "results"
    (results / "zoo.json").write_text(json.dumps(records, indent=1) + "\n")
    lines = ["# Coverage on the zoo", "", *(f"- {line}" for line in summarise(records)), ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table_rows(records)]
    (results / "zoo.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _show(folder: Path, names: Sequence[str]) -> None:
    records = [read_record(folder, name) for name in names]
    write_table(folder, [read_record(folder, name) for name in FILES])
    table = Table(title="Coverage on the zoo")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("file", "reason") else "right")
    for row in table_rows(records):
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    for line in summarise(records):
        console.print(line, highlight=False)


# ---------------------------------------------------------------- commands

_FOLDER = click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
_GLOBS = click.argument("globs", nargs=-1)


@click.group(help=__doc__)
def main() -> None:
    """Collect the commands."""


@main.command("export")
@_FOLDER
@_GLOBS
@click.option("--again", is_flag=True, help="Also those that are there.")
@click.option("--limit", default=600.0, show_default=True, help="Seconds per file.")
def export_command(folder: Path, globs: tuple[str, ...], again: bool, limit: float) -> None:
    """Write the ONNX files whose names match."""
    for sub in ("models", "results", "logs"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for name in _select(globs):
        path = _model_path(folder, name)
        if path.exists() and not again:
            continue
        network, variant = FILES[name]
        partial = path.with_suffix(".partial")

        def work(network=network, variant=variant, partial=partial, name=name) -> None:  # type: ignore[no-untyped-def]
            n_params = export(network, variant, partial)
            write_record(folder, {**read_record(folder, name), "params": n_params})

        start = time.perf_counter()
        problem = run_apart(work, folder / "logs" / f"{name}.export.log", limit)
        if problem is None:
            partial.replace(path)
        partial.unlink(missing_ok=True)
        print(f"{name}: {problem or 'ok'} ({time.perf_counter() - start:.0f} s)", flush=True)


@main.command("check")
@_FOLDER
@_GLOBS
@click.option("--until", type=click.Choice(STAGES), default="compress", show_default=True)
@click.option("--again", is_flag=True, help="Do all stages again.")
@click.option("--failed", is_flag=True, help="Do again what has failed.")
@click.option("--limit", default=900.0, show_default=True, help="Seconds per file.")
@click.option("--samples", default=64, show_default=True, help="Samples of calibration data.")
@click.option("--options", default="", help="More options for compress, such as '--method prune'.")
@click.option("--keep", default=KEEP, show_default=True, help="Share of the parameters to keep.")
def check_command(
    folder: Path, globs: tuple[str, ...], until: str, again: bool, failed: bool, limit: float, samples: int,
    options: str, keep: float,
) -> None:  # fmt: skip
    """Run the files whose names match: twin, inspect, compress."""
    names = [name for name in _select(globs) if _model_path(folder, name).exists()]
    for name in names:
        record = read_record(folder, name)
        mtime = _model_path(folder, name).stat().st_mtime
        stages = _wanted_stages(record, until, again=again, failed=failed, mtime=mtime)
        if not stages:
            continue
        kept = {key: value for key, value in record.items() if key not in stages}
        write_record(folder, {**kept, "mtime": mtime})

        def work(name=name, stages=stages) -> None:  # type: ignore[no-untyped-def]
            check_file(folder, name, stages, samples=samples, keep=keep, options=shlex.split(options))

        log = folder / "logs" / f"{name}.log"
        problem = run_apart(work, log, limit)
        record = read_record(folder, name)
        if problem is not None:
            stage = next(stage for stage in stages if stage not in record)
            record[stage] = {"ok": False, "reason": f"{stage}: {problem}"}
        elif record.get("compress", {}).get("exit"):
            record["compress"].setdefault("reason", _last_line(log))
        write_record(folder, record)
        print(" ".join(cell for cell in table_rows([record])[0] if cell), flush=True)
    with contextlib.suppress(BrokenPipeError):
        _show(folder, names)


@main.command("table")
@_FOLDER
@_GLOBS
def table_command(folder: Path, globs: tuple[str, ...]) -> None:
    """Print what is known of the files whose names match, and write zoo.md and zoo.json."""
    _show(folder, _select(globs))


if __name__ == "__main__":
    main()
