"""What ``.ci/run`` and a new user rely on in the README; test_docs.py runs what it shows."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

import hap_onnx

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


def test_two_commands_come_first_and_set_up_by_themselves():
    first, second = shell_lines()[:2]
    for line in (first, second):
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[")
        extras = re.search(r"\[(.*)\]", line).group(1).split(",")
        assert set(extras) <= set(PROJECT["optional-dependencies"])
    assert first.endswith("-m hap_onnx.example")
    assert second.endswith("-m pytest")
    assert README.count("python3 -m venv") == 2


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
