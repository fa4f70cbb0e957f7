"""Every command and piece of code in the README and in docs/ is run, or is in a list that says why not."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import fastjsonschema
import onnxruntime
import pytest
import yaml

import hap_onnx
from hap_onnx import cli
from hap_onnx.config import (
    CompressConfig,
    check_options,
    default_folder,
    default_output,
    describe_options,
    files_of,
    flag_of,
    read_config,
)
from tests.pages import PAGES, ROOT, Command, find_blocks, find_commands
from tools.schema import build_schema

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BLOCKS = tuple(find_blocks())
COMMANDS = tuple(find_commands())

CI = "run by .ci/run, word for word"
INSTALLS = "installs packages; the README's installations are run by .ci/run"
THEIRS = "hours, on the networks and images of these figures, which are not in the repository"
HOURS = "hours; the suite runs less of the same"
ITSELF = "this very suite"

NOT_RUN = (
    (r"README\.md", r"python3 -m venv \.venv && \.venv/bin/pip install .*", CI),
    (r"README\.md", r"\.venv/bin/ruff check \. && \.venv/bin/mypy", CI),
    (r"README\.md", r"\.venv/bin/sphinx-build .*", CI),
    (r"README\.md", r"\.venv/bin/python -m pytest .*", ITSELF),
    (r"README\.md", r"\.venv/bin/pip install .*", INSTALLS),
    (r"docs/(install|development)\.md", r"pip install .*", INSTALLS),
    (r"docs/development\.md", r"python -m pytest -W default", ITSELF),
    (r"docs/faults\.md", r"python -m pytest tests/test_interrupts\.py -m slow", ITSELF),
    (r"docs/development\.md", r"python -m tools\.zoo export zoo/ && .*", HOURS),
    (r"docs/faults\.md", r"python -m tools\.faults kills .*", HOURS),
    (r"docs/fuzzing\.md", r"python -m tools\.fuzz (graphs|files) .*", HOURS),
    (r"docs/results\.md", r"python (-m tools\.|tools/)\w+.*", THEIRS),
    (r"docs/results\.md", r"hap-onnx .*(resnet20|resnet56|mlp|ultraface_rfb_320)\.onnx.*", THEIRS),
)
"""(page, command, why it is not run)."""

OTHERS_OPTIONS = {
    "--force-reinstall", "--index-url", "--keep-going", "--help",
    "--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint",
}  # fmt: skip
"""Options on the pages that belong to other programs than ours."""


def why_not_run(command: Command) -> str:
    text = " ".join(command.text.split())
    for page, pattern, reason in NOT_RUN:
        if re.fullmatch(page, command.page) and re.fullmatch(pattern, text):
            return reason
    return ""


def is_quick(command: Command) -> bool:
    """Whether a command takes a second or so here."""
    words = command.words
    return words[0] == "hap-onnx" and words[1] in ("inspect", "apply", "validate")


def case(command: Command):
    marks = () if is_quick(command) else (pytest.mark.slow,)
    return pytest.param(command, marks=marks, id=command.label)


RUN = [command for command in COMMANDS if not why_not_run(command)]


# ---------------------------------------------------------------- running them


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    pytest.importorskip("sklearn")
    from tests.docs_world import write_world

    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture
def folder(world, tmp_path):
    return Path(shutil.copytree(world, tmp_path / "work"))


def expect_files(command: Command, folder: Path) -> list[Path]:
    """Return what a plain command of ours must have written, and remove what lies there already."""
    words = command.words
    if words[0] != "hap-onnx" or words[1] not in ("compress", "apply"):
        return []
    context = cli.cli.commands[words[1]].make_context(words[1], words[2:], obj=cli.Session())
    given = {name: value for name, value in context.params.items() if value is not None and value != ()}
    model, config = Path(given.pop("model")), given.pop("config", None)
    given.pop("data", None), given.pop("plan", None)
    if words[1] == "apply":
        options = check_options(given, command="apply")
        files = [options["output"] or default_output(model)]
    else:
        if config is not None:
            given = {**read_config(folder / config, also=("data",)), **given}
            given.pop("data", None)
        wanted = CompressConfig.from_options(given)
        output = wanted.output or (default_folder if wanted.sweep else default_output)(model)
        files = list(files_of(wanted, output=output).values())
        if wanted.sweep:
            shutil.rmtree(folder / output, ignore_errors=True)  # a sweep wants a folder of its own
            names = [f"keep-{wanted.objective or 'macs'}-{ratio:.2f}.json" for ratio in wanted.sweep]
            files += [output / name for name in (*names, "sweep.json", "sweep.md", "sweep.svg")]
    for path in files:
        (folder / path).unlink(missing_ok=True)
    return [folder / path for path in files]


COMMAND = f"""#!{sys.executable}
import sys
sys.path.append({str(ROOT)!r})
from hap_onnx.__main__ import run
sys.exit(run())
"""
"""What an installation makes of ``hap-onnx``, which does not import from the current folder."""

PYTHON = f"""#!/bin/sh
PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}} exec {shlex.quote(sys.executable)} "$@"
"""


def run_shell(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run text as a user's shell would, in whose environment hap-onnx is installed."""
    programs = folder.parent / "bin"
    programs.mkdir(exist_ok=True)
    for name, script in {"python": PYTHON, "hap-onnx": COMMAND}.items():
        (programs / name).write_text(script, encoding="utf-8")
        (programs / name).chmod(0o755)
    search = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": search, "OMP_NUM_THREADS": "1"}
    shell = ["bash", "-euo", "pipefail", "-c", text]
    return subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(os.name != "posix", reason="forks, and a POSIX shell")
@pytest.mark.parametrize("command", [case(command) for command in RUN])
def test_command_runs(command, folder):
    expected = expect_files(command, folder)
    if is_quick(command):
        from tests.forks import run_command

        ended = run_command(folder, *command.words[1:])
        code, told = ended.code, ended.out + ended.err
    else:
        process = run_shell(command.text, folder)
        code, told = process.returncode, process.stdout + process.stderr
    assert code == 0, told
    assert "Traceback" not in told
    assert all(path.is_file() for path in expected), told
    for path in expected:
        if path.suffix == ".onnx":
            onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))


def is_quick_code(text: str) -> bool:
    return not re.search(r"\b(compress|sweep)\(", text)


@pytest.mark.skipif(os.name != "posix", reason="forks")
@pytest.mark.parametrize(
    "block",
    [
        pytest.param(
            block,
            marks=() if is_quick_code(block.text) else (pytest.mark.slow,),
            id=f"{block.page}:{block.line}",
        )
        for block in BLOCKS
        if block.language == "python"
    ],
)
def test_python_runs(block, folder):
    from tests.forks import run_fork

    def work() -> int:
        sys.path.insert(0, "")
        exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {"__name__": "__main__"})
        return 0

    ended = run_fork(work, folder=folder)
    assert ended.code == 0, ended.err


# ---------------------------------------------------------------- what can be told without running


def test_the_list_of_what_is_not_run_is_not_longer_than_it_must_be():
    for page, pattern, _ in NOT_RUN:
        assert any(
            re.fullmatch(page, command.page) and re.fullmatch(pattern, " ".join(command.text.split()))
            for command in COMMANDS
        ), pattern


def test_the_pages_are_found():
    pages = {command.page for command in COMMANDS}
    assert {"README.md", "docs/budget.md", "docs/sweep.md", "docs/results.md"} <= pages
    assert len(RUN) > 25
    assert sum(map(is_quick, RUN)) >= 5


def test_blocks_have_a_language_that_is_checked():
    known = {"sh", "python", "toml", "yaml"}
    others = {block.language for block in BLOCKS} - known
    assert all(re.match(r"\{(eval-rst|toctree|include|errors|options)\}", each) for each in others)


@pytest.fixture
def scripts(monkeypatch):
    """Let tools that are run as files find each other."""
    monkeypatch.syspath_prepend(ROOT / "tools")


def our_commands(text: str) -> list[list[str]]:
    """Return the words of all calls of hap-onnx in a command or script."""
    found = re.findall(r"(?:^|[;&|(]\s*|\s)hap-onnx ([a-z]+ [^;&|\n]*)", text.replace("\\\n", " "))
    return [shlex.split(each, comments=True) for each in found]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch, where a tool imports parts of it
@pytest.mark.parametrize("command", [pytest.param(each, id=each.label) for each in COMMANDS])
def test_options_of_commands_exist(command, scripts):
    text = command.text
    for words in our_commands(text):
        assert cli.cli.commands[words[0]].make_context(words[0], words[1:], obj=cli.Session()).params
    for name, rest in re.findall(r"python (?:-m tools\.|tools/)(\w+)(?:\.py)?((?: [^&|;#\n]+)?)", text):
        words = shlex.split(rest)
        tool = importlib.import_module(f"tools.{name}").main
        while isinstance(tool, click.Group):
            tool = tool.commands[words.pop(0)]
        tool.make_parser(click.Context(tool)).parse_args(words)  # files need not be there


def options_of(command: click.Command) -> set[str]:
    inner = command.commands.values() if isinstance(command, click.Group) else ()
    own = {
        flag
        for each in command.params
        if isinstance(each, click.Option)
        for flag in (*each.opts, *each.secondary_opts)
    }
    return own.union(*map(options_of, inner))


def tools() -> Sequence[click.Command]:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    names = set(re.findall(r"python (?:-m tools\.|tools/)(\w+)", text))
    return [importlib.import_module(f"tools.{name}").main for name in sorted(names)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_options_that_pages_mention_exist(page, scripts):
    known = options_of(cli.cli) | OTHERS_OPTIONS
    if page.parent.name == "docs":
        known = known.union(*map(options_of, tools()))
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page.read_text(encoding="utf-8")))
    assert mentioned <= known


def test_every_command_is_shown_somewhere():
    shown = {words[0] for command in COMMANDS for words in our_commands(command.text)}
    assert shown == set(cli.cli.commands)


def test_python_names_of_the_pages_exist():
    names = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        names |= set(re.findall(r"`hap_onnx\.([A-Za-z_]+)", text))
    for block in BLOCKS:
        if block.language == "python":
            names |= set(re.findall(r"hap_onnx\.([A-Za-z_]+)", block.text))
    assert names
    assert all(name in hap_onnx.__all__ or (ROOT / "hap_onnx" / f"{name}.py").is_file() for name in names), (
        names
    )


def test_yaml_of_the_pages_is_valid():
    tables = [yaml.safe_load(block.text) for block in BLOCKS if block.language == "yaml"]
    assert tables
    assert all(isinstance(table, (dict, list)) for table in tables)


def test_config_files_of_the_pages_are_valid(tmp_path):
    accepts = fastjsonschema.compile(build_schema())
    tables = [block for block in BLOCKS if block.language == "toml"]
    for block in tables:
        table = tomllib.loads(block.text)
        if "image" in table:  # a recipe for images, with which a command of its page is run
            assert block.name
            continue
        path = tmp_path / "hap.toml"
        path.write_text(block.text, encoding="utf-8")
        options = read_config(path, also=("data",))
        CompressConfig.from_options({name: value for name, value in options.items() if name != "data"})
        accepts(table)
    assert len(tables) >= 3


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_links_to_files_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
    for target in targets:
        assert (page.parent / target.split("#")[0]).exists(), target


def test_every_section_of_options_is_on_the_page_of_options():
    shown = {block.language.split()[1] for block in BLOCKS if block.language.startswith("{options}")}
    assert shown == set(cli.SECTIONS)


def test_every_page_is_in_the_table_of_contents():
    listed = set()
    for block in BLOCKS:
        if block.language == "{toctree}":
            listed |= {line for line in block.text.splitlines() if line and not line.startswith(":")}
    assert listed == {page.stem for page in PAGES if page.parent.name == "docs"} - {"index"}


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_shows_every_option(tmp_path):
    pytest.importorskip("furo")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "docs", str(tmp_path / "site")]
    process = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    commands = (tmp_path / "site" / "cli.html").read_text(encoding="utf-8")
    options = (tmp_path / "site" / "config.html").read_text(encoding="utf-8")
    for name, command in cli.cli.commands.items():
        for option in command.params:
            if isinstance(option, click.Option):
                assert f'id="cmdoption-hap-onnx-{name}-{option.opts[0].lstrip("-")}"' in commands
    for option in describe_options("compress"):
        assert f">{flag_of(option.name)[2:]}</span></code>" in options
