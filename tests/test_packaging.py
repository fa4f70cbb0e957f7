"""What a user gets from pip: sdist and wheel, what an import costs, the types, and the oldest versions."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import hap_onnx

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def run(*command, cwd=ROOT, **environment):
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# ---------------------------------------------------------------- sdist and wheel


def why_not_built():
    (backend,) = map(Requirement, PYPROJECT["build-system"]["requires"])
    try:
        found = version(backend.name)
    except PackageNotFoundError:
        found = "none"
    if found == "none" or found not in backend.specifier:
        return f"building needs {backend}, and there is {found}"
    return None if importlib.util.find_spec("pip") else "pip is not installed"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Return paths of the sdist, made of a copy of the sources, and of the wheel that is made of it."""
    if reason := why_not_built():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("packaging")
    skipped = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "build", "dist", "example", "*.egg-info"
    )
    shutil.copytree(ROOT, folder / "source", ignore=skipped)  # building writes there, and reads what it wrote
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(folder)!r}))"
    sdist = folder / run(sys.executable, "-c", code, cwd=folder / "source").stdout.split()[-1]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def test_the_wheel_holds_the_package_and_nothing_else(distributions):
    sdist, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (metadata,) = (name for name in held if name.endswith(".dist-info/METADATA"))
        about = archive.read(metadata).decode()
    info = metadata.rpartition("/")[0]
    sources = (path for path in (ROOT / "hap_onnx").rglob("*") if path.is_file())
    wanted = {path.relative_to(ROOT).as_posix() for path in sources if path.suffix != ".pyc"}
    assert {name for name in held if not name.startswith(f"{info}/")} == wanted
    data = ("py.typed", "report/html/page.css", "report/html/page.html.jinja")
    assert {f"hap_onnx/{name}" for name in data} < held
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} < held
    assert f"\nVersion: {hap_onnx.__version__}\n" in about
    assert f"\nRequires-Python: {PROJECT['requires-python']}\n" in about
    assert about.endswith((ROOT / "README.md").read_text(encoding="utf-8"))
    with tarfile.open(sdist) as archive:
        unpacked = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted | {"LICENSE", "README.md", "pyproject.toml"} <= unpacked


# ---------------------------------------------------------------- imports


def test_an_import_warns_of_nothing():
    code = "import hap_onnx, hap_onnx.cli, hap_onnx.config, hap_onnx.report"
    assert run(sys.executable, "-W", "error", "-c", code).stderr == ""


@pytest.mark.slow  # torch, onnx and onnxruntime come with it
def test_the_public_names_load_without_warnings():
    code = f"import hap_onnx; [getattr(hap_onnx, name) for name in {hap_onnx.__all__!r}]"
    assert run(sys.executable, "-W", "error", "-c", code).stderr == ""


HEAVY = ("torch", "onnxruntime", "onnx", "numpy", "scipy", "matplotlib", "PIL", "rich", "jinja2")


@pytest.mark.parametrize("words", [["--help"], ["compress", "--help"], ["--version"]])
def test_help_loads_nothing_that_takes_long(words):
    code = textwrap.dedent(f"""
        import sys
        from hap_onnx.__main__ import run
        sys.argv = ["hap-onnx", *{words!r}]
        code = run()
        print(code, sorted({{name.partition(".")[0] for name in sys.modules}} & set({HEAVY!r})))
    """)
    assert run(sys.executable, "-c", code).stdout.endswith("\n0 []\n")


# ---------------------------------------------------------------- the oldest versions


def bounds(requirements):
    """Return the lower bound of each requirement, by name; there is one, and no other condition."""
    found = {}
    for requirement in map(Requirement, requirements):
        (only,) = requirement.specifier
        assert only.operator == ">=", requirement
        found[requirement.name.lower()] = Version(only.version)
    return found


def test_the_oldest_versions_are_those_of_pyproject():
    lines = (ROOT / "constraints-min.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert len({pin.name.lower() for pin in pins}) == len(pins)
    assert all(re.fullmatch(r"==[\d.]+", str(pin.specifier)) for pin in pins)
    pinned = {pin.name.lower(): Version(str(pin.specifier).removeprefix("==")) for pin in pins}
    extras = PROJECT["optional-dependencies"]
    wanted = bounds([*PROJECT["dependencies"], *extras["examples"], *extras["test"]])
    assert pinned.pop("torch") >= wanted.pop("torch")  # old ones are large, and their wheels are few
    assert pinned == wanted


# ---------------------------------------------------------------- installed


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """Return the scripts' folder of a new environment with the wheel, and the dependencies that are here."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", home)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", scripts / "python"]
    run(*pip, "install", "--no-deps", "--no-index", distributions[1], cwd=home)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(scripts / "python", "-c", code, cwd=home).stdout.strip())
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(here)), encoding="utf-8")
    code = "import hap_onnx; print(hap_onnx.__file__)"
    assert Path(run(scripts / "python", "-c", code, cwd=home).stdout.strip()).is_relative_to(packages)
    return scripts


@pytest.mark.slow
def test_the_wheel_brings_the_command(installed):
    command = installed / "hap-onnx"
    assert run(command, "--version", cwd=installed).stdout == f"hap-onnx, version {hap_onnx.__version__}\n"
    assert "compress" in run(command, "--help", cwd=installed).stdout
    if os.name == "posix":
        assert min(processor_seconds(command) for _ in range(5)) < 0.5


def processor_seconds(command):
    """Return what ``--help`` computes for: the wait for it on a busy machine says nothing about hap-onnx."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(command, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


USERS_CODE = """
from pathlib import Path

import numpy as np
import torch
from typing_extensions import assert_type

import hap_onnx
from hap_onnx.events import Event


def show(event: Event) -> None:
    print(event.stage, event.message)


try:
    data = {"x": np.zeros((8, 3), np.float32)}
    report = hap_onnx.compress("model.onnx", data, on_event=show, keep_macs=0.5, output=Path("small.onnx"))
except hap_onnx.BudgetError as error:
    raise SystemExit(error.exit_code) from error
assert_type(report, hap_onnx.CompressReport)
assert_type(report.after.macs, int | None)
assert_type(hap_onnx.analyze("model.onnx", "data.npz"), hap_onnx.AnalyzeReport)
assert_type(hap_onnx.inspect("model.onnx"), hap_onnx.InspectReport)
assert_type(hap_onnx.sweep("model.onnx", "data.npz"), hap_onnx.SweepReport)
assert_type(hap_onnx.validate("model.onnx", "small.onnx", "data.npz"), hap_onnx.ValidateReport)
assert_type(hap_onnx.CompressConfig(keep_macs=0.5).keep_macs, float | None)
twin: torch.nn.Module = hap_onnx.load_twin("model.onnx")

# That these are errors shows that there are types at all: an unused "ignore" is an error as well.
hap_onnx.compress(3, "data.npz")  # type: ignore[arg-type]
hap_onnx.compress("model.onnx")  # type: ignore[call-arg]
hap_onnx.squeeze("model.onnx")  # type: ignore[attr-defined]
report.after.flops  # type: ignore[attr-defined]
"""


@pytest.mark.slow
def test_a_users_code_is_type_checked_against_the_installed_package(installed):
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    source = installed.parent / "users_code.py"
    source.write_text(USERS_CODE, encoding="utf-8")
    strict = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--python-executable"]
    done = run(*strict, installed / "python", source, cwd=installed.parent)
    assert done.stdout.startswith("Success: no issues found in 1 source file")
