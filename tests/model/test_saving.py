"""Writing models while something goes wrong: killed at each file operation, a full disk, two at once."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from hap_onnx.errors import ValidationError
from hap_onnx.jobs.work_folder import WorkFolder
from hap_onnx.model import saving
from hap_onnx.model.loading import load_model
from hap_onnx.model.saving import save_model
from hap_onnx.model.temporary import beside, make_temporary_folder, remove_all_leftovers, remove_leftovers
from hap_onnx.model.weights import split_model
from tests.forks import act_before, limit_files, run_fork, start_fork
from tests.helpers import make_model, node, rand

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

KILLED = -signal.SIGKILL
MAX_OPERATIONS = 60


def model_of(seed: int) -> onnx.ModelProto:
    """A model of 40 kB."""
    return make_model(
        [node("MatMul", ["x", "w"], ["y"])],
        inputs={"x": ["N", 100]},
        outputs=["y"],
        weights={"w": rand(100, 100, seed=seed)},
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Stopped(BaseException):
    """As the command line turns a signal into."""


def stop() -> None:
    raise Stopped


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("older", [False, True])
def test_a_model_is_there_whole_or_not_at_all_whenever_the_writer_is_killed(
    tmp_path: Path, external: bool, older: bool
) -> None:
    hashes = [load_model(model_of(seed)).sha256 for seed in (0, 1)]
    outcomes = set()
    for number in range(1, MAX_OPERATIONS):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "out.onnx"
        if older:
            save_model(model_of(0), path, external_data=external)
        before = names(folder)

        def write(folder: Path = folder, path: Path = path, number: int = number) -> None:
            act_before(folder, number, kill)
            save_model(model_of(1), path, external_data=external)

        code = run_fork(write).code
        assert code in (0, KILLED)
        if path.exists():
            outcomes.add(hashes.index(load_model(path).sha256))
        else:
            assert not older
        # What the killed one has left, the next one removes, and an older model's own data stays.
        save_model(model_of(1), path, external_data=external)
        assert load_model(path).sha256 == hashes[1]
        own = {name for name in before if name != "out.onnx"}
        assert len(set(names(folder)) - own) == 1 + external
        if code == 0:
            break
    else:
        raise AssertionError("it is never done")
    assert outcomes == ({0, 1} if older else {1})


@pytest.mark.parametrize("external", [False, True])
def test_a_signal_at_any_file_operation_leaves_nothing_or_the_whole_model(
    tmp_path: Path, external: bool
) -> None:
    sha256 = load_model(model_of(1)).sha256
    for number in range(1, MAX_OPERATIONS):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "out.onnx"

        def write(folder: Path = folder, path: Path = path, number: int = number) -> int:
            act_before(folder, number, stop)
            try:
                save_model(model_of(1), path, external_data=external)
            except Stopped:
                return 7
            return 0

        code = run_fork(write).code
        assert code in (0, 7)
        if path.exists():
            assert load_model(path).sha256 == sha256
            assert len(names(folder)) == 1 + external
        else:
            assert names(folder) == []
        if code == 0:
            break
    else:
        raise AssertionError("it is never done")


def test_data_that_another_model_needs_is_not_removed_with_what_was_killed(tmp_path: Path) -> None:
    """A killed run has brought data to its place; meanwhile a model that needs the same is there."""
    path = tmp_path / "out.onnx"

    def write() -> None:
        save_model(model_of(1), path, external_data=True, check=lambda _: kill())

    assert run_fork(write).code == KILLED
    (leftover,) = (name for name in names(tmp_path) if name.endswith(".tmp.onnx"))
    path.write_bytes((tmp_path / leftover).read_bytes())  # as if the rename had been done, too
    remove_leftovers(path)
    assert load_model(path).sha256 == load_model(model_of(1)).sha256


def test_two_that_write_to_one_place_do_so_one_after_the_other(tmp_path: Path) -> None:
    path, go, is_in = tmp_path / "out.onnx", tmp_path / "go", tmp_path / "in"

    def first() -> None:
        def check(_: Path) -> None:
            is_in.touch()
            while not go.exists():
                time.sleep(0.01)
            raise ValidationError("refused")  # and takes its data away

        with pytest.raises(ValidationError, match="refused"):
            save_model(model_of(1), path, external_data=True, check=check)

    def second() -> None:
        save_model(model_of(1), path, external_data=True)

    one = start_fork(first)
    while not is_in.exists():
        time.sleep(0.01)
    two = start_fork(second)
    time.sleep(0.2)
    assert os.waitpid(two, os.WNOHANG) == (0, 0)
    assert not path.exists()
    go.touch()
    for pid in (one, two):
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert load_model(path).sha256 == load_model(model_of(1)).sha256


def test_a_folder_that_stays_locked_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "LOCK_SECONDS", 0.2)
    with saving._locked(tmp_path):
        with pytest.raises(ValidationError, match=r"another program has kept .* locked for 0\.2 s; wait"):
            save_model(model_of(0), tmp_path / "out.onnx", external_data=False)
    assert names(tmp_path) == []


@pytest.mark.parametrize("external", [False, True])
def test_a_disk_that_takes_no_more_leaves_nothing_and_is_said(tmp_path: Path, external: bool) -> None:
    path = tmp_path / "out.onnx"
    path.write_bytes(b"the older model")

    def write() -> None:
        limit_files(10_000)
        with pytest.raises(ValidationError, match=r"out\.onnx cannot be written \(File too large\); check"):
            save_model(model_of(1), path, external_data=external)

    ended = run_fork(write)
    assert ended.code == 0, ended.err
    assert names(tmp_path) == ["out.onnx"]
    assert path.read_bytes() == b"the older model"


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    target, folder = tmp_path / "target.onnx", tmp_path / "out"
    folder.mkdir()
    for content in (b"precious", None):
        if content is None:
            target.unlink()
        else:
            target.write_bytes(content)
        link = folder / "link.onnx"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        save_model(model_of(1), link, external_data=False)
        assert not link.is_symlink()
        assert load_model(link).sha256 == load_model(model_of(1)).sha256
        assert target.exists() == (content is not None)
        assert content is None or target.read_bytes() == content


# ---------------------------------------------------------------- leftovers


def test_only_what_is_nobodys_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"

    def leave() -> None:
        for name in (beside(path), beside(path, "tmp.onnx"), beside(path, "tmp.data")):
            name.write_bytes(b"half")
        beside(tmp_path / "other.onnx").write_bytes(b"half")

    assert run_fork(leave).code == 0
    left = names(tmp_path)
    assert len(left) == 4
    others = [".out.onnx.tmp", ".out.onnx.000000-1.tmp", ".out.onnx.123.tmp", "out-0123456789ab.data"]
    own = beside(path).name.replace(f"-{os.getpid()}", f"-{os.getppid()}")  # of one that runs
    for name in (*others, own):
        (tmp_path / name).write_bytes(b"of others")
    remove_leftovers(path)
    other = next(name for name in left if name.startswith(".other"))
    assert names(tmp_path) == sorted([*others, own, other])
    remove_all_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*others, own])


def test_temporary_folders_of_the_dead_go_when_the_next_is_made(tmp_path: Path) -> None:
    def leave() -> None:
        (make_temporary_folder("data", tmp_path) / "1.bin").write_bytes(b"much")
        make_temporary_folder("refit", tmp_path)
        kill()

    (tmp_path / "hap-onnx-data-mine").mkdir()
    assert run_fork(leave).code == KILLED
    assert len(names(tmp_path)) == 3
    first = make_temporary_folder("data", tmp_path)
    second = make_temporary_folder("data", tmp_path)
    assert names(tmp_path) == sorted(["hap-onnx-data-mine", first.name, second.name])
    remove_all_leftovers(tmp_path)
    assert first.is_dir()
    assert run_fork(leave).code == KILLED
    remove_all_leftovers(tmp_path)
    assert names(tmp_path) == sorted(["hap-onnx-data-mine", first.name, second.name])


def test_a_work_folder_that_takes_no_files_is_said() -> None:
    def work(folder: Path) -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        with pytest.raises(ValidationError, match=r"made in .* \(Permission denied\); check --work-dir"):
            make_temporary_folder("data", folder)
        with pytest.raises(ValidationError, match=r"cannot be made \(Permission denied\); check --work-dir"):
            with WorkFolder(folder, "key").lock():
                raise AssertionError("it is locked")

    with tempfile.TemporaryDirectory() as name:  # that of pytest is closed to others
        Path(name).chmod(0o555)
        ended = run_fork(lambda: work(Path(name)))
        assert ended.code == 0, ended.err
        Path(name).chmod(0o755)


def test_nothing_is_removed_where_nothing_can_be_listed(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "missing" / "out.onnx")
    remove_all_leftovers(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
def test_models_in_one_piece_and_in_two_are_written_alike(tmp_path: Path, dtype: type) -> None:
    weights = {"w": rand(40, 50).astype(dtype), "small": np.arange(3, dtype=dtype)}
    nodes = [node("Identity", ["w"], ["y"]), node("Identity", ["small"], ["z"])]
    model = make_model(nodes, inputs={"x": ["N", 40]}, outputs=["y", "z"], weights=weights)
    written: list[dict[str, bytes]] = []
    for index, one in enumerate((model, split_model(model))):
        folder = tmp_path / str(index)
        folder.mkdir()
        save_model(one, folder / "out.onnx", external_data=True)
        n_bytes = saving.count_saved_bytes(one, folder / "out.onnx", external_data=True)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
        assert n_bytes == sum(map(len, written[-1].values()))
    assert written[0] == written[1]




