"""The command line in real processes: bad input, gates and signals, with nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from sample_models import images, residual_cnn, with_labels, write

from hap_onnx import cli
from hap_onnx.jobs import machine
from tests.helpers import make_model, node, rand

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


class Folder:
    """A folder with a model and data, and commands that run in it.

    Most commands run in this process, since importing torch takes seconds; stdout and stderr are caught
    below Python, where onnxruntime writes too.
    """

    def __init__(self, path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.path, self._capfd = path, capfd

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def run(self, *arguments: str | Path, code: int = 0) -> Result:
        self._capfd.readouterr()
        found = cli.main(list(map(str, arguments)))
        result = Result(found, *self._capfd.readouterr())
        return self._checked(result, code)

    def run_process(self, *arguments: str | Path, code: int = 0) -> Result:
        command = [sys.executable, "-m", "hap_onnx", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=self.path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
        )
        return self._checked(Result(done.returncode, done.stdout, done.stderr), code)

    @staticmethod
    def _checked(result: Result, code: int) -> Result:
        assert result.code == code, result.err
        assert "Traceback" not in result.err
        return result

    @property
    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.path)) for path in self.path.rglob("*"))

    def check_refused(
        self, *arguments: str | Path, code: int, says: Sequence[str], process: bool = False
    ) -> None:
        """Assert that ``compress`` says one sentence with these words and writes nothing."""
        before = {name: (self / name).stat().st_mtime_ns for name in self.files}
        run = self.run_process if process else self.run
        result = run("compress", "net.onnx", "--data", *arguments, "-q", "--threads", "1", code=code)
        assert result.out == ""
        check_sentence(result.err, says)
        assert {name: (self / name).stat().st_mtime_ns for name in self.files} == before


def check_sentence(error: str, says: Sequence[str]) -> None:
    """Assert that stderr holds one line of ours with these words."""
    lines = error.splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith("hap-onnx: error: ")
    assert "unexpected" not in lines[0]
    for word in says:
        assert word in lines[0]


@pytest.fixture
def folder(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "LATENCY_SECONDS", 0.1)
    write(tmp_path)
    np.savez(tmp_path / "calib.npz", x=images())
    return Folder(tmp_path, capfd)


BUDGET = ("--keep-macs", "0.5")

# ---------------------------------------------------------------- bad models


def test_a_file_that_is_not_onnx(folder: Folder) -> None:
    (folder / "net.onnx").write_text("<html>not found</html>")
    folder.check_refused("calib.npz", *BUDGET, code=1, says=["net.onnx"], process=True)


def test_a_truncated_model(folder: Folder) -> None:
    whole = (folder / "net.onnx").read_bytes()
    (folder / "net.onnx").write_bytes(whole[: len(whole) // 2])
    folder.check_refused("calib.npz", *BUDGET, code=1, says=["net.onnx"])


def test_a_model_that_is_not_there(folder: Folder) -> None:
    error = folder.run("compress", "none.onnx", "--data", "calib.npz", *BUDGET, code=1).err
    check_sentence(error, ["none.onnx", "not exist"])
    assert folder.files == ["calib.npz", "net.onnx"]


def test_missing_external_data(folder: Folder) -> None:
    write(folder.path, external=True)
    (folder / "net.data").unlink()
    folder.check_refused("calib.npz", *BUDGET, code=1, says=["net.data"])


def test_truncated_external_data(folder: Folder) -> None:
    write(folder.path, external=True)
    (folder / "net.data").write_bytes((folder / "net.data").read_bytes()[:5000])
    folder.check_refused("calib.npz", *BUDGET, code=1, says=["net.data"])


def test_an_operator_that_onnxruntime_cannot_run(folder: Folder) -> None:
    model = make_model(
        [node("Frobnicate", ["x"], ["y"], domain="org.example")],
        inputs={"x": ["N", 3, 8, 8]},
        outputs=["y"],
        domains={"org.example": 1},
    )
    write(folder.path, model)
    folder.check_refused("calib.npz", *BUDGET, code=1, says=["Frobnicate"])


# ---------------------------------------------------------------- bad data


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": rand(50, 3, 9, 9)[:, :2]}, ["x", "2, 9, 9"]),
        ({"image": images(50)}, ["image", "x"]),
        ({"x": np.array([["a"] * 3] * 50)}, ["x"]),
        ({"x": images(50).astype(np.complex64)}, ["x", "complex64"]),
        ({"x": np.where(np.arange(192).reshape(3, 8, 8) == 7, np.nan, images(50))}, ["x", "NaN"]),
        ({"x": images(0)}, ["calib.npz"]),
    ],
    ids=["shape", "name", "text", "dtype", "NaN", "no samples"],
)
def test_data_that_does_not_fit(folder: Folder, arrays: dict[str, np.ndarray], says: list[str]) -> None:
    np.savez(folder / "calib.npz", **arrays)  # type: ignore[arg-type]
    folder.check_refused("calib.npz", *BUDGET, code=1, says=says)


def test_an_empty_folder_of_data(folder: Folder) -> None:
    (folder / "calib").mkdir()
    folder.check_refused("calib", *BUDGET, code=1, says=["calib"])


def test_data_that_is_not_there(folder: Folder) -> None:
    folder.check_refused("none.npz", *BUDGET, code=1, says=["none.npz"])


def test_a_truncated_npz(folder: Folder) -> None:
    whole = (folder / "calib.npz").read_bytes()
    (folder / "calib.npz").write_bytes(whole[: len(whole) // 2])
    folder.check_refused("calib.npz", *BUDGET, code=1, says=["calib.npz"])


def test_labels_at_chance_level(folder: Folder) -> None:
    np.savez(folder / "calib.npz", x=images(200), labels=np.arange(200) % 5)
    folder.check_refused("calib.npz", *BUDGET, code=1, says=["preprocess"])


# ---------------------------------------------------------------- bad requests and outputs


def test_an_impossible_budget(folder: Folder) -> None:
    arguments = ("calib.npz", "--keep-macs", "0.0001")
    folder.check_refused(*arguments, code=3, says=["macs"], process=True)


def test_a_pattern_that_matches_nothing(folder: Folder) -> None:
    arguments = ("calib.npz", *BUDGET, "--exclude", "none*")
    folder.check_refused(*arguments, code=2, says=["'none*'"])


def test_the_output_is_the_input(folder: Folder) -> None:
    for output in ("net.onnx", "./net.onnx", folder / "net.onnx"):
        arguments = ("calib.npz", *BUDGET, "-o", output)
        folder.check_refused(*arguments, code=2, says=["same file as MODEL"])


@pytest.mark.parametrize("output", ["net.onnx/small.onnx", "no/such/folder/small.onnx"])
def test_an_output_that_cannot_be_written(folder: Folder, output: str) -> None:
    arguments = ("calib.npz", *BUDGET, "-o", output)
    folder.check_refused(*arguments, code=1, says=["cannot be written"])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no files")
def test_an_output_in_a_folder_that_takes_no_files(folder: Folder) -> None:
    arguments = ("calib.npz", *BUDGET, "--allow-slower", "-o", "/proc/small.onnx")
    folder.check_refused(*arguments, code=1, says=["/proc/small.onnx", "cannot be written"])


# ---------------------------------------------------------------- the other commands


def test_a_plan_that_is_damaged_or_for_another_model(folder: Folder) -> None:
    plan = folder / "plan.json"
    folder.run(
        "compress", "net.onnx", "--data", "calib.npz", *BUDGET, "--dry-run", "--save-plan", plan,
        "-q", "--threads", "1",
    )  # fmt: skip
    whole = plan.read_text()
    write(folder.path, residual_cnn(seed=4))
    for text, says in ((whole, "another model"), (whole[:100], "damaged"), ("[]", "not a plan")):
        plan.write_text(text)
        before = folder.files
        error = folder.run("apply", "net.onnx", plan, code=1).err
        assert says in error
        check_sentence(error, [])
        assert folder.files == before


@pytest.mark.parametrize(
    "options", [("--method", "implant"), ("--method", "hap"), ("--preset", "paper", "--probes", "8")]
)
def test_methods_with_implants_and_their_plans(folder: Folder, options: tuple[str, ...]) -> None:
    arguments = ("compress", "net.onnx", "--data", "calib.npz", "--keep-macs", "0.7", *options, "-q",
                 "--threads", "1", "--allow-slower", "--save-plan", "plan.json")  # fmt: skip
    dry = folder.run(*arguments, "--dry-run", "--json")
    plan = json.loads(dry.out)["plan"]
    assert json.loads(dry.out)["output"] is None
    assert [entry["node"] for entry in plan["implants"]] == [
        entry["node"] for entry in json.loads((folder / "plan.json").read_text())["implants"]
    ]
    for entry in plan["implants"]:
        assert sorted(entry) == ["expected_loss", "kind", "measured", "node", "predicted_loss", "rank"]
    assert bool(plan["implants"]) or "hap" in options
    assert folder.files == ["calib.npz", "net.onnx", "plan.json", "plan.safetensors"]
    folder.run("apply", "net.onnx", "plan.json", "-o", "applied.onnx")
    text = " ".join(folder.run(*arguments).out.split())
    assert (folder / "net.hap.onnx").read_bytes() == (folder / "applied.onnx").read_bytes()
    n_implants = len(plan["implants"])
    assert not n_implants or f"{n_implants} implant" in text


def test_methods_that_cannot_be(folder: Folder) -> None:
    for arguments in (("--method", "implants"), ("--preset", "papers")):
        error = folder.run("compress", "net.onnx", "--data", "calib.npz", *BUDGET, *arguments, code=2).err
        assert f"Invalid value for '{arguments[0]}'" in error
    paper = ("--preset", "paper", "--align", "4")
    folder.check_refused("calib.npz", *BUDGET, *paper, code=2, says=["leave --align away"])
    paper = ("--preset", "paper", "--method", "implant")
    folder.check_refused("calib.npz", *BUDGET, *paper, code=2, says=["leave --method implant away"])
    arguments = ("--method", "implant", "--keep-macs", "0.001", "--allow-slower")
    folder.check_refused("calib.npz", *arguments, code=3, says=["macs", "the least is"])
    arguments = ("--preset", "paper", "--probes", "4", "--keep-macs", "0.0001", "--allow-slower")
    folder.check_refused("calib.npz", *arguments, code=3, says=["recipe"])


def test_inspect_of_a_damaged_model(folder: Folder) -> None:
    (folder / "net.onnx").write_bytes(b"\x08\x08junk")
    error = folder.run("inspect", "net.onnx", code=1).err
    check_sentence(error, ["net.onnx"])


def test_the_main_job_and_what_follows(folder: Folder) -> None:
    np.savez(folder / "calib.npz", **with_labels(images(150)))  # type: ignore[arg-type]
    result = folder.run_process(
        "compress", "net.onnx", "--data", "calib.npz", *BUDGET, "--threads", "1", "--allow-slower",
        "--json", "--save-plan", "plan.json", "--report", "report.json",
    )  # fmt: skip
    report = json.loads(result.out)
    assert report == json.loads((folder / "report.json").read_text())
    assert report["budget"]["reached"]["keep_macs"] <= 0.5
    assert report["quality"]["metric"] == "accuracy"
    small = (folder / "net.hap.onnx").read_bytes()
    onnx.checker.check_model(onnx.load_from_string(small), full_check=True)
    (folder / "net.hap.onnx").unlink()
    assert "parameters" in folder.run("apply", "net.onnx", "plan.json").out
    assert (folder / "net.hap.onnx").read_bytes() == small
    assert "make_a1" in folder.run("inspect", "net.onnx").out
    assert folder.files == [
        "calib.npz", "net.hap.onnx", "net.onnx", "plan.json", "plan.safetensors", "report.json",
    ]  # fmt: skip


def test_a_gate_that_fails_keeps_an_older_result(folder: Folder) -> None:
    (folder / "net.hap.onnx").write_bytes(b"older")
    result = folder.run(
        "compress", "net.onnx", "--data", "calib.npz", "--keep-macs", "0.2", "--max-drop", "0", "--metric",
        "r2", "--threads", "1", "--allow-slower", "-q", "--keep-rejected", code=3,
    )  # fmt: skip
    assert "r2 drops by" in result.err
    assert result.err.count("\n") == 1
    assert "parameters" in result.out  # the numbers behind the refusal
    assert (folder / "net.hap.onnx").read_bytes() == b"older"
    assert "net.hap.onnx.rejected.onnx" in folder.files


# ---------------------------------------------------------------- signals

# Runs the real job and stops at a place where a file is half-written or a stage is at work.
PAUSED_JOB = textwrap.dedent(
    """
    import sys, time
    import hap_onnx.cli as cli
    from hap_onnx.jobs import machine, rounds
    from hap_onnx.model import saving

    stage = sys.argv.pop(1)
    machine.LATENCY_SECONDS = 0.1

    def pause(*args, **options):
        print("paused", flush=True)
        time.sleep(60)

    if stage == "write":
        saving.os.replace = pause
    else:
        setattr(rounds, stage, pause)
    sys.exit(cli.main())
    """
)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize(
    ("stage", "number", "code", "word"),
    [
        ("build_loss_model", signal.SIGINT, 130, "interrupted"),
        ("write", signal.SIGINT, 130, "interrupted"),
        ("write", signal.SIGTERM, 143, "terminated"),
    ],
)
def test_a_signal_in_the_middle_leaves_nothing(
    folder: Folder, stage: str, number: signal.Signals, code: int, word: str
) -> None:
    write(folder.path, external=True)
    before = folder.files
    command = [
        sys.executable, "-c", PAUSED_JOB, stage, "compress", "net.onnx", "--data", "calib.npz", *BUDGET,
        "--threads", "1", "--recover", "none", "--allow-slower", "-q", "--report", "r.json",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=folder.path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "paused\n"
        if stage == "write":
            assert len(folder.files) > len(before)
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert process.returncode == code
    assert error == f"hap-onnx: {word}; nothing was written\n"
    assert folder.files == before


# Runs a real sweep and stops in the middle of its second point.
PAUSED_SWEEP = textwrap.dedent(
    """
    import sys, time
    import hap_onnx.cli as cli
    from hap_onnx.jobs import machine
    from hap_onnx.jobs.job import Job

    machine.LATENCY_SECONDS = 0.1
    n_before, real = 1, Job.try_out

    def try_out(self):
        global n_before
        n_before -= 1
        if n_before < 0:
            print("paused", flush=True)
            time.sleep(60)
        return real(self)

    Job.try_out = try_out
    sys.exit(cli.main())
    """
)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_an_interrupted_sweep_tells_what_is_left(folder: Folder) -> None:
    arguments = ("--sweep", "0.7,0.5", "--threads", "1", "--recover", "none", "--allow-slower", "-q")
    command = [sys.executable, "-c", PAUSED_SWEEP, "compress", "net.onnx", "--data", "calib.npz", *arguments,
               "--method", "prune"]  # fmt: skip
    with subprocess.Popen(
        command, cwd=folder.path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "paused\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    left = "net.hap.sweep holds what is done, 1 of the sweep's points"
    assert error.splitlines()[-1] == f"hap-onnx: interrupted; {left}"
    folder.run("apply", "net.onnx", "net.hap.sweep/keep-macs-0.70.json", "-o", "small.onnx")
    assert json.loads((folder / "net.hap.sweep/sweep.json").read_text())["complete"] is False


def test_a_sweep_prints_its_table_or_its_report(folder: Folder) -> None:
    arguments = ("compress", "net.onnx", "--data", "calib.npz", "--sweep", "0.7,0.0001", "--threads", "1",
                 "--recover", "none", "--method", "prune", "--allow-slower", "-q")  # fmt: skip
    text = " ".join(folder.run(*arguments).out.split())
    assert "x 0.0001: the budget cannot be reached" in text
    assert "hap-onnx apply net.onnx net.hap.sweep/keep-macs-0.70.json" in text
    report = json.loads(folder.run(*arguments, "--json").out)
    assert report == json.loads((folder / "net.hap.sweep/sweep.json").read_text())
    result = folder.run(*arguments, "--sweep", "0.0001", "--json", code=3)
    assert json.loads(result.out)["output"] is None
    assert "no point of the sweep is met" in result.err


# Runs the real job and stops in training: at the n-th update, or while a state is half-written.
PAUSED_TRAINING = textwrap.dedent(
    """
    import os, sys, time
    import hap_onnx.cli as cli
    from hap_onnx.jobs import machine
    from hap_onnx.distill import checkpoint
    from hap_onnx.distill.training import Trainer

    place, n = sys.argv.pop(1).split()
    machine.LATENCY_SECONDS = 0.1
    n_calls = 0

    def pause_at(function):
        def call(*args):
            global n_calls
            n_calls += 1
            if n_calls == int(n):
                print("paused", flush=True)
                time.sleep(60)
            return function(*args)
        return call

    if place == "update":
        Trainer.update = pause_at(Trainer.update)
    else:
        class Os:  # the one of this module only: others write files, too
            replace = staticmethod(pause_at(os.replace))
            getpid, fsync = staticmethod(os.getpid), staticmethod(os.fsync)
        checkpoint.os = Os
    sys.exit(cli.main())
    """
)
TRAINED = (*BUDGET, "--epochs", "4", "--batch-size", "16", "--method", "prune", "--threads", "1",
           "--allow-slower", "-q")  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("update 1", signal.SIGKILL),
        pytest.param("update 7", signal.SIGKILL, marks=pytest.mark.slow),  # as 15, which is stopped otherwise
        ("replace 5", signal.SIGKILL),
        ("update 15", signal.SIGTERM),
        ("replace 4", signal.SIGINT),
    ],
)
def test_a_job_that_is_killed_in_training_goes_on(folder: Folder, place: str, number: signal.Signals) -> None:
    arguments = ("compress", "net.onnx", "--data", "calib.npz", *TRAINED)
    command = [sys.executable, "-c", PAUSED_TRAINING, place, *arguments, "--work-dir", "work"]
    with subprocess.Popen(
        command, cwd=folder.path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "paused\n"
        half_written = [name for name in folder.files if ".tmp" in name]
        assert bool(half_written) == place.startswith("replace")
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number
        word = "interrupted" if number == signal.SIGINT else "terminated"
        assert error == (
            f"hap-onnx: {word}; nothing was written at net.hap.onnx; the same command goes on from work\n"
        )
        assert not [name for name in folder.files if ".tmp" in name]
    assert {name for name in folder.files if "work" not in name} == {"calib.npz", "net.onnx"}

    folder.run(*arguments, "--work-dir", "work", "--report", "r.json")
    assert "sensitivity" not in json.loads((folder / "r.json").read_text())["seconds"]
    assert not [name for name in folder.files if ".tmp" in name]
    resumed = (folder / "net.hap.onnx").read_bytes()
    folder.run(*arguments, "--work-dir", "other")
    assert (folder / "net.hap.onnx").read_bytes() == resumed


def test_training_is_told_in_the_table(folder: Folder) -> None:
    arguments = [word for word in TRAINED if word != "-q"]
    result = folder.run("compress", "net.onnx", "--data", "calib.npz", *arguments)
    text = " ".join(result.out.split())
    assert "training: distance to the original " in text
    assert ", best after " in text
    assert "training on 72 samples for 4 epochs" in " ".join(result.err.split())


def test_words_of_training_that_cannot_be(folder: Folder) -> None:
    folder.check_refused(
        "calib.npz", *BUDGET, "--epochs", "2", "--recover", "none", code=2, says=["--epochs"]
    )
    folder.check_refused("calib.npz", "--rounds", "2", code=2, says=["--rounds needs a budget"])
