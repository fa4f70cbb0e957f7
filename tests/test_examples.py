"""What lies in ``examples/``; the slow tests run each in a process and a folder of its own."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = tuple(sorted(FOLDER.glob("*.py")))
INDEX = FOLDER / "README.md"

each = pytest.mark.parametrize("example", [pytest.param(path, id=path.stem) for path in EXAMPLES])


def test_index_lists_what_there_is():
    listed = re.findall(r"\]\((\w+\.py)\)", INDEX.read_text(encoding="utf-8"))
    assert sorted(listed) == [path.name for path in EXAMPLES]


@each
def test_example_compiles_and_says_what_it_shows(example):
    text = example.read_text(encoding="utf-8")
    tree = ast.parse(text)
    compile(tree, str(example), "exec")
    about = ast.get_docstring(tree)
    if about is None:  # cells of an editor: the first one is the docstring
        first = re.match(r"# %% \[markdown\]\n((?:#.*\n)+)", text)
        assert first is not None
        about = first[1]
    assert f"python examples/{example.name}" in about


@pytest.mark.slow
@each
def test_example_runs(example, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("onnxscript")
    paths = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert re.search(r"\d%", result.stdout), "no figures at the end"
    assert list(tmp_path.glob("example/**/small.onnx"))
