"""What ``action.yml`` runs: the action's inputs become one call of hap-onnx, its report the action's outputs.

    python -I tools/action.py key      name the cache of --work-dir by what it depends on
    python -I tools/action.py run      run hap-onnx; the exit code is its own

Inputs come as a JSON object in the environment variable INPUTS, results go to the files that GitHub names in
GITHUB_OUTPUT and GITHUB_STEP_SUMMARY. Needs only Python and the command hap-onnx: no shell sees an input.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

PASSED_ON = (
    "data", "val", "config", "output", "keep-params", "keep-macs", "keep-latency", "max-bytes", "max-drop",
)  # fmt: skip
FOR_COMPRESS = ("work-dir",)
HASHED = ("data", "val", "config")  # files and folders beside the model
PACKAGES = ("hap-onnx", "onnx", "onnxruntime", "onnxruntime-gpu", "torch")
N_LAST_LINES = 30
BLOCK = 2**20


def main(arguments: list[str]) -> int:
    """Run one of the two commands; returns the exit code."""
    inputs = {name: str(value) for name, value in json.loads(os.environ["INPUTS"]).items()}
    if arguments == ["key"]:
        write_outputs(find_keys(inputs))
        return 0
    if arguments == ["run"]:
        return run(inputs)
    print("usage: action.py key | run", file=sys.stderr)
    return 2


# ---------------------------------------------------------------- the cache


def find_keys(inputs: Mapping[str, str]) -> dict[str, str]:
    """Return hashes of the model, and of all else that the work depends on."""
    model = Path(inputs["model"])
    weights = sorted(model.parent.glob(f"{_quoted(model.name)}?*"))  # external data, as exporters name it
    of_model = hashlib.sha256()
    for path in (model, *weights):
        _add_file(of_model, path.name, path)
    of_job = hashlib.sha256(json.dumps([dict(inputs), _versions()], sort_keys=True).encode())
    for name in HASHED:
        if inputs.get(name):
            for path in sorted(_files(Path(inputs[name]))):
                _add_file(of_job, str(path), path)
    return {"model": of_model.hexdigest()[:16], "job": of_job.hexdigest()[:16]}


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _quoted(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _files(path: Path) -> Iterator[Path]:
    return (entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else iter((path,))


def _add_file(digest: Any, name: str, path: Path) -> None:
    """Add name and content; a file that is missing is hap-onnx's to complain about."""
    digest.update(repr(name).encode())
    if path.is_file():
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)


# ---------------------------------------------------------------- hap-onnx


def run(inputs: Mapping[str, str]) -> int:
    """Run hap-onnx, tell GitHub about the result, and return hap-onnx's exit code."""
    folder = Path(tempfile.mkdtemp(prefix="hap-onnx-", dir=os.environ.get("RUNNER_TEMP")))
    report, summary = folder / "report.json", folder / "summary.md"
    try:
        command = build_command(inputs, report=report, summary=summary)
    except ValueError as error:
        print(f"hap-onnx: error: args: {error}", file=sys.stderr)
        command, code, last = [], 2, f"args: {error}"
    else:
        print(shlex.join(command), flush=True)
        code, last = run_command(command)
    if not summary.is_file():  # something went wrong before there was anything to report
        summary.write_text(describe_failure(code, last), encoding="utf-8")
    append(os.environ.get("GITHUB_STEP_SUMMARY"), summary.read_text(encoding="utf-8"))
    found = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    passed = {0: "true", 3: "false"}.get(code, "")
    write_outputs(
        {
            "exit-code": str(code),
            "passed": passed,
            "report": str(report) if found else "",
            "summary": str(summary),
            **describe_report(found),
        }
    )
    return code


def build_command(inputs: Mapping[str, str], *, report: Path, summary: Path) -> list[str]:
    """Return hap-onnx's words; raises ValueError if ``args`` has a quote without its other half."""
    words = ["hap-onnx", inputs["command"]]
    names = PASSED_ON + (FOR_COMPRESS if inputs["command"] == "compress" else ())
    # With "=", a value that begins with a dash is still a value.
    words += [f"--{name}={inputs[name]}" for name in names if inputs.get(name)]
    words += shlex.split(inputs.get("args", ""))
    words += [f"--report={report}", f"--summary={summary}", "--", inputs["model"]]
    return words + ([inputs["candidate"]] if inputs.get("candidate") else [])


def run_command(command: list[str]) -> tuple[int, str]:
    """Run a command with its output in the log; returns its exit code and its last lines on stderr."""
    last: deque[str] = deque(maxlen=N_LAST_LINES)
    # GitHub obeys lines of the log that begin with "::", and names in a model can hold anything.
    token = secrets.token_hex(16)
    print(f"::stop-commands::{token}", flush=True)
    try:
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace"
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                print(line, end="", file=sys.stderr, flush=True)
                last.append(line)
        code = process.returncode
    except OSError as error:
        last.append(f"hap-onnx cannot be run: {error}\n")
        print(last[-1], end="", file=sys.stderr)
        code = 1
    finally:
        print(f"\n::{token}::", flush=True)
    return (code if code >= 0 else 128 - code), "".join(last)


# ---------------------------------------------------------------- results


def describe_report(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the action's outputs from a report of hap-onnx; what was not measured is empty."""
    before, after = report.get("before") or {}, report.get("after") or {}
    ratios = {
        f"{name}-ratio": f"{after[key] / before[key]:.6g}"
        for name, key in (("bytes", "bytes"), ("macs", "macs"), ("latency", "latency_ms"))
        if before.get(key) and after.get(key) is not None
    }
    if report.get("latency"):
        ratios["latency-ratio"] = f"{report['latency']['ratio']:.6g}"
    quality = report.get("quality") or {}
    drop = "" if quality.get("drop") is None else f"{quality['drop']:.6g}"
    return {"output": report.get("output") or "", **ratios, "drop": drop}


def describe_failure(code: int, last: str) -> str:
    """Return a summary in Markdown for a run that ended without one: the last lines, as they are."""
    visible = ("".join(c if c.isprintable() else " " for c in line) for line in last.splitlines())
    lines = "\n".join(f"    {line}" for line in visible)
    return f"### ❌ hap-onnx ended with exit code {code}\n\n{lines or '    (it said nothing)'}\n"


def write_outputs(outputs: Mapping[str, str]) -> None:
    """Set outputs of the step; values may have several lines, and cannot set others."""
    text = ""
    for name, value in outputs.items():
        end = secrets.token_hex(16)
        text += f"{name}<<{end}\n{value}\n{end}\n"
    append(os.environ.get("GITHUB_OUTPUT"), text)


def append(path: str | None, text: str) -> None:
    """Append to one of GitHub's files, if there is one."""
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
