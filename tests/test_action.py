"""Recipes for CI: the GitHub Action's steps as bash runs them, the workflow, and the recipe in shell.

What GitHub itself does (other actions, expressions) is played as far as the steps need it.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from helpers import make_model, node, rand

ROOT = Path(__file__).parents[1]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS = ACTION["runs"]["steps"]
WORKFLOW = ROOT / "examples" / "ci" / "compress.yml"
SCRIPT = ROOT / "examples" / "ci" / "compress.sh"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the action runs on Linux")

HOSTILE = (
    "$(touch hacked)", "`touch hacked`", "'; touch hacked; '", '"; touch hacked; "', "a b", "-v", "--help",
    "${{ inputs.model }}", "x\ny=z", "{owner}", "\\", "*", "é ü", "$HOME", "&& touch hacked",
)  # fmt: skip


# ---------------------------------------------------------------- GitHub, played


class Runner:
    """Runs the action's own steps; ``programs`` comes first on the PATH."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder = folder
        self.programs = programs
        self.workspace = folder / "workspace"
        self.workspace.mkdir()
        (folder / "temp").mkdir()
        self.summary = folder / "summary"
        self.log = ""
        self.steps: dict[str, dict[str, Any]] = {"cache": {"outputs": {}, "outcome": "success"}}

    def run(self, **inputs: str) -> int:
        """Run the steps until one fails, and return its exit code."""
        self.set_inputs(**inputs)
        for step in STEPS:
            if "run" not in step or not self.holds(step.get("if", "true")):
                continue
            code = self.run_step(step)
            if code:
                return code
        return 0

    def set_inputs(self, **inputs: str) -> None:
        given = {name.replace("_", "-"): value for name, value in inputs.items()}
        defaults = {name: str(facts.get("default", "")) for name, facts in ACTION["inputs"].items()}
        assert set(given) <= set(defaults)
        self.inputs = {**defaults, **given}

    def run_step(self, step: Mapping[str, Any]) -> int:
        assert step["shell"] == "bash"
        assert "${{" not in step["run"]  # no input may become part of a script
        script, output = self.folder / "script.sh", self.folder / "output"
        script.write_text(step["run"], encoding="utf-8")
        output.write_text("", encoding="utf-8")
        variables = {name: self.expand(value) for name, value in step.get("env", {}).items()}
        result = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=self.workspace,
            env={
                **os.environ,
                "PATH": f"{self.programs}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "GITHUB_ACTION_PATH": str(ROOT),
                "GITHUB_OUTPUT": str(output),
                "GITHUB_STEP_SUMMARY": str(self.summary),
                "RUNNER_TEMP": str(self.folder / "temp"),
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.log += result.stdout
        outcome = "failure" if result.returncode else "success"
        self.steps[step.get("id", "")] = {"outputs": read_outputs(output), "outcome": outcome}
        return result.returncode

    def expand(self, text: str) -> str:
        return re.sub(r"\$\{\{\s*(.*?)\s*\}\}", lambda match: self.value(match[1]), text)

    def value(self, expression: str) -> str:
        if expression == "toJSON(inputs)":
            return json.dumps(self.inputs, indent=2)
        first, *names = expression.split(".")
        found: Any = {"inputs": self.inputs, "steps": self.steps}[first]
        for name in names:
            found = found.get(name, "")
        return found

    def holds(self, condition: str) -> bool:
        """Evaluate comparisons joined by ``&&``, which is all that the action uses."""
        results = []
        for part in condition.split("&&"):
            words = part.split()
            if words in (["always()"], ["true"]):
                continue
            left, sign, right = words
            results.append((self.value(left) == right.strip("'")) == (sign == "=="))
        return all(results)

    @property
    def outputs(self) -> dict[str, str]:
        """What the action gives to the workflow."""
        return {name: self.expand(facts["value"]) for name, facts in ACTION["outputs"].items()}


def read_outputs(path: Path) -> dict[str, str]:
    """Read GITHUB_OUTPUT as GitHub does: ``name=value``, or ``name<<END`` and lines up to END."""
    found, lines = {}, iter(path.read_text(encoding="utf-8").split("\n"))
    for line in lines:
        if "<<" in line:
            name, end = line.split("<<", 1)
            found[name] = "\n".join(iter(lambda end=end: next(lines), end))
        elif "=" in line:
            name, value = line.split("=", 1)
            found[name] = value
        else:
            assert line == ""
    return found


def make_program(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path):
    """A folder with ``python`` and ``hap-onnx``, as an installation makes them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    make_program(folder / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    make_program(folder / "hap-onnx", f'#!/bin/sh\nexec "{sys.executable}" -m hap_onnx "$@"\n')
    return folder


@pytest.fixture
def runner(tmp_path, programs):
    return Runner(tmp_path, programs)


@pytest.fixture
def words(programs, tmp_path):
    """Replace hap-onnx by a program that keeps its words, and says and returns what it is told."""
    make_program(
        programs / "hap-onnx",
        f"""#!{sys.executable}
import json, os, sys
json.dump(sys.argv[1:], open({str(tmp_path / "words.json")!r}, "w"))
print(os.environ.get("SAY", ""), file=sys.stderr)
sys.exit(int(os.environ.get("CODE", "0")))
""",
    )
    return lambda: json.loads((tmp_path / "words.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- the file


def test_the_action_is_complete():
    assert ACTION["runs"]["using"] == "composite"
    assert all(facts["description"] for facts in (*ACTION["inputs"].values(), *ACTION["outputs"].values()))
    for step in STEPS:
        assert ("uses" in step) != ("run" in step)
        assert "uses" not in step or re.fullmatch(r"actions/[\w/-]+@v\d+", step["uses"])


@pytest.mark.parametrize(
    ("schema", "path"),
    [("github-actions", "action.yml"), ("github-workflows", "examples/ci/compress.yml")],
)
def test_files_for_github_hold_to_its_schema(schema, path, tmp_path):
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    done = subprocess.run([*check, str(ROOT / path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "wrong.yml"
    wrong.write_text((ROOT / path).read_text(encoding="utf-8").replace("steps:", "step:"), encoding="utf-8")
    assert subprocess.run([*check, str(wrong)], capture_output=True, check=False).returncode == 1


def test_the_workflow_gives_the_action_inputs_that_it_has_and_reads_outputs_that_it_has():
    text = WORKFLOW.read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"].values()
    calls = [step for job in jobs for step in job["steps"] if step.get("uses", "").startswith("hap-onnx/")]
    assert {call["with"].get("command", "compress") for call in calls} == {"compress", "validate"}
    assert all(set(call["with"]) <= set(ACTION["inputs"]) for call in calls)
    required = {name for name, facts in ACTION["inputs"].items() if facts.get("required")}
    assert all(required <= set(call["with"]) for call in calls)
    assert {call["id"] for call in calls} == {"hap"}
    read = set(re.findall(r"steps\.hap\.outputs\.([\w-]+)", text))
    assert read
    assert read <= set(ACTION["outputs"])


def test_inputs_are_never_part_of_a_script():
    assert not any("${{" in step["run"] for step in STEPS if "run" in step)


def test_every_input_is_used():
    text = json.dumps(STEPS) + (ROOT / "tools" / "action.py").read_text(encoding="utf-8")
    for name in ACTION["inputs"]:
        assert f"inputs.{name}" in text or f'"{name}"' in text, name


def test_work_is_kept_after_a_failure_too_but_not_twice(runner):
    save = next(step for step in STEPS if "save" in step.get("uses", ""))
    assert save["if"].startswith("always()")
    runner.inputs = {"work-dir": "w", "command": "compress"}
    for hit, is_kept in (("true", False), ("false", True), ("", True)):
        runner.steps["cache"] = {"outputs": {"cache-hit": hit}, "outcome": "success"}
        assert runner.holds(save["if"]) == is_kept
    runner.inputs["command"] = "validate"
    assert not runner.holds(save["if"])


# ---------------------------------------------------------------- words and results


def test_inputs_become_the_words_of_one_command(runner, words):
    code = runner.run(
        install="false", model="net.onnx", data="calib data/", config="hap.toml", output="small.onnx",
        keep_macs="0.5", max_drop="none", args="--exclude 'head.*' --seed 3 --exclude \"a b\"",
    )  # fmt: skip
    assert code == 0
    command, *options, report, summary, dashes, model = words()
    assert (command, dashes, model) == ("compress", "--", "net.onnx")
    assert options == [
        "--data=calib data/", "--config=hap.toml", "--output=small.onnx", "--keep-macs=0.5",
        "--max-drop=none", "--work-dir=.hap-onnx", "--exclude", "head.*", "--seed", "3", "--exclude", "a b",
    ]  # fmt: skip
    assert report.startswith("--report=/")
    assert summary.startswith("--summary=/")


def test_a_comparison_gets_both_models_and_no_work_folder(runner, words):
    inputs = {"command": "validate", "model": "a", "candidate": "b", "data": "c", "work_dir": "d"}
    assert runner.run(install="false", **inputs) == 0
    assert words()[0] == "validate"
    assert words()[-3:] == ["--", "a", "b"]
    assert not any("work-dir" in word for word in words())
    assert "key" not in runner.steps


@pytest.mark.parametrize("start", range(0, len(HOSTILE), 5))
def test_nothing_in_an_input_is_executed(runner, words, start):
    names = ("data", "output", "max-drop", "work-dir", "val")
    texts = dict(zip(names, HOSTILE[start : start + 5], strict=True))
    inputs = {name.replace("-", "_"): text for name, text in texts.items()}
    arguments = " ".join(shlex.quote(text) for text in HOSTILE)
    assert runner.run(install="false", model=HOSTILE[start], args=arguments, **inputs) == 0
    found = words()
    assert found[-1] == HOSTILE[start]
    assert {f"--{name}={text}" for name, text in texts.items()} <= set(found)
    assert set(HOSTILE) <= set(found)
    assert list(runner.workspace.iterdir()) == []
    assert set(runner.steps["run"]["outputs"]) <= set(ACTION["outputs"])


def test_further_arguments_are_split_but_not_expanded(runner, words):
    arguments = "$(touch hacked) `touch hacked` ; touch hacked && touch hacked | * ~ $HOME > hacked"
    assert runner.run(install="false", model="m", data="d", args=arguments) == 0
    assert " ".join(words()[3 : 3 + len(arguments.split())]) == arguments
    assert list(runner.workspace.iterdir()) == []


def test_a_quote_without_its_other_half_is_a_usage_error(runner, words):
    assert runner.run(install="false", model="m", data="d", args="--exclude 'a") == 2
    assert "No closing quotation" in runner.log
    assert "No closing quotation" in runner.summary.read_text(encoding="utf-8")
    assert runner.outputs["exit-code"] == "2"


@pytest.mark.parametrize(("code", "passed"), [(0, "true"), (1, ""), (2, ""), (3, "false")])
def test_the_exit_code_is_passed_on_and_something_is_always_said(runner, words, monkeypatch, code, passed):
    monkeypatch.setenv("CODE", str(code))
    monkeypatch.setenv("SAY", "<b>why</b>\n::set-output name=x::y\n# not a heading\x1b[2J")
    assert runner.run(install="false", model="m", data="d") == code
    assert runner.outputs["exit-code"] == str(code)
    assert runner.outputs["passed"] == passed
    text = runner.summary.read_text(encoding="utf-8")
    assert text.splitlines()[0] == f"### ❌ hap-onnx ended with exit code {code}"
    assert "    <b>why</b>\n" in text  # indented: it is shown as it is
    assert "    # not a heading [2J\n" in text


def test_github_obeys_no_line_of_the_log(runner, words, monkeypatch):
    monkeypatch.setenv("SAY", "::error::hostile")
    runner.run(install="false", model="m", data="d")
    lines = runner.log.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("::stop-commands::"))
    token = lines[start].removeprefix("::stop-commands::")
    assert len(token) >= 32
    assert start < lines.index("::error::hostile") < lines.index(f"::{token}::")


def test_a_missing_program_is_told(runner, programs):
    make_program(programs / "hap-onnx", "#!/does/not/exist\n")
    assert runner.run(install="false", model="m", data="d") == 1
    assert "cannot be run" in runner.summary.read_text(encoding="utf-8")


# ---------------------------------------------------------------- the cache


def keys_of(runner, **changes):
    runner.set_inputs(**{"model": "m.onnx", "data": "data", **changes})
    assert runner.run_step(next(step for step in STEPS if step.get("id") == "key")) == 0
    return runner.steps["key"]["outputs"]


def test_the_cache_depends_on_model_data_config_and_options(runner):
    for name in ("m.onnx", "m[1].onnx", "data/a/1.png", "hap.toml"):
        path = runner.workspace / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    same = keys_of(runner, config="hap.toml")
    assert set(same) == {"model", "job"}
    assert keys_of(runner, config="hap.toml") == same
    assert keys_of(runner, config="hap.toml", keep_macs="0.5")["model"] == same["model"]
    seen = [same["job"], keys_of(runner, config="hap.toml", keep_macs="0.5")["job"]]
    for name, content in (("data/a/1.png", b"x"), ("data/a/2.png", b"x"), ("hap.toml", b"seed = 1")):
        (runner.workspace / name).write_bytes(content)
        seen.append(keys_of(runner, config="hap.toml")["job"])
    assert len(set(seen)) == len(seen)
    models = [same["model"], keys_of(runner, model="m[1].onnx")["model"]]
    for name, content in (("m.onnx", b"x"), ("m.onnx.data", b"weights"), ("m.onnx.data", b"others")):
        (runner.workspace / name).write_bytes(content)
        models.append(keys_of(runner)["model"])
    (runner.workspace / "m[1].onnx_data").write_bytes(b"weights")
    models.append(keys_of(runner, model="m[1].onnx")["model"])
    assert len(set(models)) == len(models)


# ---------------------------------------------------------------- with hap-onnx itself


@pytest.fixture
def network(runner):
    """A model that can be compressed, data for it, and a damaged copy, in the workspace."""
    weights = {"w1": rand(32, 8), "b1": rand(32, seed=1), "w2": rand(4, 32, seed=2), "b2": rand(4, seed=3)}
    nodes = [
        node("Gemm", ["x", "w1", "b1"], ["h"], transB=1), node("Relu", ["h"], ["r"]),
        node("Gemm", ["r", "w2", "b2"], ["y"], transB=1),
    ]  # fmt: skip
    inputs = {"x": ["N", 8]}
    onnx.save(make_model(nodes, inputs=inputs, outputs=["y"], weights=weights), runner.workspace / "net.onnx")
    weights["w2"] = weights["w2"] * 0.5
    onnx.save(make_model(nodes, inputs=inputs, outputs=["y"], weights=weights), runner.workspace / "bad.onnx")
    np.savez(runner.workspace / "calib.npz", x=rand(500, 8, seed=4))
    return runner.workspace / "net.onnx"


def test_a_model_is_compressed(runner, network):
    code = runner.run(
        install="false", model="net.onnx", data="calib.npz", keep_params="0.7", output="a $(b) 'c'.onnx",
        args="--allow-slower --metric r2",
    )  # fmt: skip
    assert code == 0, runner.log
    outputs = runner.outputs
    assert outputs["passed"] == "true"
    assert outputs["output"] == "a $(b) 'c'.onnx"
    assert (runner.workspace / outputs["output"]).is_file()
    assert (runner.workspace / ".hap-onnx").is_dir()
    assert 0 < float(outputs["macs-ratio"]) <= 0.75
    assert 0 < float(outputs["bytes-ratio"]) < 1
    assert float(outputs["latency-ratio"]) > 0
    report = json.loads(Path(outputs["report"]).read_text(encoding="utf-8"))
    assert float(outputs["drop"]) == pytest.approx(report["quality"]["drop"], rel=1e-5)
    text = runner.summary.read_text(encoding="utf-8")
    assert text.startswith("### ✅ `net.onnx`: file -")
    assert Path(outputs["summary"]).read_text(encoding="utf-8") == text


@pytest.mark.slow
def test_a_gate_that_is_not_met_fails_the_step_with_its_figures(runner, network):
    code = runner.run(
        install="false", model="net.onnx", data="calib.npz", keep_params="0.3", max_drop="0.000001",
        args="--allow-slower --metric r2",
    )  # fmt: skip
    assert code == 3, runner.log
    assert runner.outputs["passed"] == "false"
    assert runner.outputs["output"] == ""
    assert float(runner.outputs["drop"]) > 0.000001
    assert not (runner.workspace / "net.hap.onnx").exists()
    text = runner.summary.read_text(encoding="utf-8")
    assert text.startswith("### ❌ `net.onnx`: refused: file -")
    assert "**Nothing was written.** R2 drops by" in text


@pytest.mark.parametrize(
    ("candidate", "code", "mark"),
    [pytest.param("net.onnx", 0, "✅", marks=pytest.mark.slow), ("bad.onnx", 3, "❌")],
)
def test_validate_is_a_regression_gate(runner, network, candidate, code, mark):
    found = runner.run(
        install="false", command="validate", model="net.onnx", candidate=candidate, data="calib.npz",
        max_drop="0.01", args="--allow-slower --metric r2",
    )  # fmt: skip
    assert found == code, runner.log
    assert runner.outputs["passed"] == ("true" if code == 0 else "false")
    text = runner.summary.read_text(encoding="utf-8")
    assert text.startswith(f"### {mark} `{candidate}` against `net.onnx`")


# ---------------------------------------------------------------- any other CI: the recipe in shell


def run_script(programs, folder, *arguments, **variables):
    """Run the recipe in a folder of its own; returns exit code, what it said, and seconds of computing."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        cwd=folder,
        env={
            "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1",
            "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **variables,
        },
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout, seconds


def test_the_script_passes_everything_on_as_it_is(programs, words, tmp_path):
    given = {"MODEL": "-a $(touch hacked).onnx", "DATA": "b c/", "OUTPUT": "d e.onnx", "HAP_WORK": "f g"}
    code, said, _ = run_script(programs, tmp_path, "--exclude", "head.*", "a b", **given)
    assert (code, said.splitlines()[-1]) == (0, "written: d e.onnx")
    assert words() == [
        "compress", "--data=b c/", "--output=d e.onnx", "--work-dir=f g", "--report=hap-onnx/report.json",
        "--summary=hap-onnx/summary.md", "--exclude", "head.*", "a b", "--", "-a $(touch hacked).onnx",
    ]  # fmt: skip
    assert (tmp_path / "hap-onnx").is_dir()
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("missing", ["MODEL", "DATA"])
def test_the_script_says_what_it_needs(programs, words, tmp_path, missing):
    given = {name: "x" for name in ("MODEL", "DATA") if name != missing}
    code, said, _ = run_script(programs, tmp_path, **given)
    assert code != 0
    assert missing in said
    assert not (tmp_path / "words.json").exists()


@pytest.mark.parametrize(("code", "told"), [(1, "exit code 1"), (2, "exit code 2"), (3, "refused: ")])
def test_the_script_ends_with_the_exit_code(programs, words, tmp_path, code, told):
    found, said, _ = run_script(programs, tmp_path, MODEL="m", DATA="d", CODE=str(code))
    assert found == code
    assert told in said.splitlines()[-1]
    assert "written" not in said


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with a network that knows handwritten digits, ``model.onnx``, and ``calib.npz``."""
    pytest.importorskip("sklearn")
    from tests.docs_world import write_network

    folder = tmp_path_factory.mktemp("digits")
    write_network(folder)
    return folder


@pytest.mark.slow
def test_the_script_goes_on_from_the_work_of_an_earlier_run(programs, digits, tmp_path):
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    given = {"MODEL": "model.onnx", "DATA": "calib.npz"}
    words = ("--keep-macs", "0.5", "--max-drop", "0.05", "--allow-slower")
    results = []
    for _ in range(2):
        code, said, seconds = run_script(programs, folder, *words, **given)
        assert code == 0, said
        report = json.loads((folder / "hap-onnx" / "report.json").read_text(encoding="utf-8"))
        results.append(((folder / "hap-onnx" / "model.onnx").read_bytes(), report, seconds))
    (model, first, cost), (again, _, less) = results
    assert first["quality"]["metric"] == "accuracy"
    assert first["after"]["macs"] <= 0.5 * first["before"]["macs"]
    assert again == model
    assert less < cost
    text = (folder / "hap-onnx" / "summary.md").read_text(encoding="utf-8")
    assert text.startswith("### ✅ `model.onnx`: file -")


@pytest.mark.slow
def test_the_script_refuses_what_does_not_meet_the_gate(programs, digits, tmp_path):
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    given = {"MODEL": "model.onnx", "DATA": "calib.npz"}
    words = ("--keep-params", "0.02", "--max-drop", "0.001", "--allow-slower")
    code, said, _ = run_script(programs, folder, *words, **given)
    assert code == 3, said
    assert said.splitlines()[-1].startswith("refused: ")
    assert not (folder / "hap-onnx" / "model.onnx").exists()
    text = (folder / "hap-onnx" / "summary.md").read_text(encoding="utf-8")
    assert text.startswith("### ❌ `model.onnx`: refused: ")
    assert (
        json.loads((folder / "hap-onnx" / "report.json").read_text(encoding="utf-8"))["quality"]["drop"]
        > 0.001
    )
