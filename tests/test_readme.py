"""What the README shows exists; ``.ci/run`` executes its two commands themselves."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import click
import pytest

import hap_onnx
from hap_onnx import cli
from hap_onnx.config import read_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shell_lines():
    return [line for block in blocks("sh") for line in block.splitlines()]


def options_of(command):
    parameters = [entry for entry in command.params if isinstance(entry, click.Option)]
    return {flag for entry in parameters for flag in (*entry.opts, *entry.secondary_opts)} | {"--help"}


def test_two_commands_come_first_and_set_up_by_themselves():
    first, second = shell_lines()[:2]
    for line in (first, second):
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[")
        extras = re.search(r"\[(.*)\]", line).group(1).split(",")
        assert set(extras) <= set(PROJECT["optional-dependencies"])
    assert first.endswith("-m hap_onnx.example")
    assert second.endswith("-m pytest")
    assert README.count("python3 -m venv") == 2


def test_commands_of_the_readme_exist_with_their_options():
    lines = [line for line in shell_lines() if line.startswith("hap-onnx ")]
    assert {line.split()[1] for line in lines} == {"apply", "compress", "inspect", "validate"}
    for line in lines:
        words = shlex.split(line, comments=True)
        context = cli.cli.commands[words[1]].make_context(words[1], words[2:], obj=cli.Session())
        assert context.params, line


def test_options_that_the_readme_mentions_exist():
    known = set().union(*map(options_of, cli.cli.commands.values())) | {"--force-reinstall"}
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert len(mentioned) > 10
    assert mentioned <= known


def test_python_names_of_the_readme_exist():
    names = set(re.findall(r"hap_onnx\.([A-Za-z_]+)", "".join(blocks("python"))))
    names |= set(re.findall(r"`hap_onnx\.([A-Za-z_]+)", README))
    assert names
    assert names <= set(hap_onnx.__all__)


def test_the_config_file_of_the_readme_is_valid(tmp_path):
    path = tmp_path / "hap.toml"
    path.write_text(*blocks("toml"), encoding="utf-8")
    assert read_config(path, also=("data",))["keep_macs"] == 0.5


def test_links_to_files_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert targets
    assert all((ROOT / target).exists() for target in targets)


def test_the_changelog_knows_this_version():
    assert f"## {hap_onnx.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_dependency_is_pinned():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    wanted = list(PROJECT["dependencies"])
    for extra in PROJECT["optional-dependencies"].values():
        wanted += extra
    for requirement in wanted:
        name = re.match(r"[\w-]+", requirement).group()
        if name != "tomli":  # for Python 3.10 only
            assert re.search(rf"^{name}==", pins, re.MULTILINE), name


@pytest.mark.skipif(os.name != "posix", reason="a POSIX script")
def test_the_check_script_is_executable():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
