"""Hostile and damaged files beside the model: arrays, images, classes, options, recipes, plans, outputs.

Each is refused with one sentence and the exit code of the contract, within memory and time, and nothing is
written; or it is skipped with a count.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_models import EVIL, PETA
from PIL import Image
from sample_models import images, residual_cnn, write
from test_hostile_models import check_sentence, look

from hap_onnx.jobs.carry_out import from_plan_weights
from hap_onnx.model.model_io import load_model
from hap_onnx.planning.choose import Choice
from hap_onnx.planning.plan import CompressionPlan, GroupDecision, save_plan
from hap_onnx.prepare import make_probe, prepare
from hap_onnx.runtime.session import make_session
from tests.limited import LimitedRunner

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs limits of a process")

Make = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model, arrays, photographs and photographs by class."""
    path = tmp_path / "folder"
    path.mkdir()
    write(path)
    np.savez(path / "calib.npz", x=images(20))
    for name in ("photos", *(f"classes/c{index}" for index in range(5))):
        (path / name).mkdir(parents=True)
        for index in range(6):
            Image.fromarray(np.full((8, 8, 3), 40 * index, np.uint8)).save(path / name / f"{index}.png")
    return path


def refuse(
    runner: LimitedRunner, folder: Path, *words: str, code: int, says: list[str], data: str = "calib.npz"
) -> None:
    before = look(folder)
    result = runner.run(folder, ["compress", "net.onnx", "--data", data, "-q", *words])
    check_sentence(result, says, code=code)
    assert look(folder) == before


# ---------------------------------------------------------------- arrays


def npy(shape: str, *, descr: str = "'<f4'", n_bytes: int = 0) -> bytes:
    """The header of an array, as text, and some zeros."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(n_bytes)


def member(content: bytes, *, name: str = "x.npy", packed: bool = True, size: int | None = None) -> Make:
    """An archive with one array, which may lie about its size."""

    def make(folder: Path) -> None:
        kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
        with zipfile.ZipFile(folder / "calib.npz", "w", kind) as archive:
            archive.writestr(name, content)
        if size is not None:
            data = bytearray((folder / "calib.npz").read_bytes())
            entry = data.index(b"PK\x01\x02")
            data[entry + 24 : entry + 28] = struct.pack("<I", size)
            (folder / "calib.npz").write_bytes(data)

    return make


def arrays(**values: Any) -> Make:
    return lambda folder: np.savez(folder / "calib.npz", **values)


class Trap:
    """Leaves a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


def replaced(name: str, make: Make) -> Make:
    def build(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder)

    return build


def whole_npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


ARRAYS: dict[str, tuple[Make, list[str]]] = {
    "objects that run code": (arrays(x=np.array([Trap()] * 20, dtype=object)), ["'x'", "could run code"]),
    "labels that run code": (
        arrays(x=images(20), labels=np.array([Trap()] * 20, dtype=object)), ["'labels'", "could run code"],
    ),
    "a header that is code": (
        member(npy("(20, 3, 8, 8)", descr="__import__('os').mkdir('trapped')")), ["'x'", "damaged"],
    ),
    "records with objects": (
        member(npy("(20,)", descr="[('a', '<f4'), ('b', 'O')]", n_bytes=240)), ["'x'", "could run code"],
    ),
    "a petabyte": (member(npy(f"({PETA}, 3, 8, 8)", n_bytes=100)), ["'x'", "less data than its header says"]),
    "a petabyte that is not packed": (
        member(npy(f"({PETA}, 3, 8, 8)", n_bytes=100), packed=False), ["'x'", "less data"],
    ),
    "a size that lies": (
        member(npy("(5000000, 3, 8, 8)", n_bytes=100), size=2**32 - 2), ["'x'", "less data"],
    ),
    "more samples than a number holds": (member(npy(f"({2**64}, 3, 8, 8)")), ["'x'", "less data"]),
    "a negative number of samples": (member(npy("(-20, 3, 8, 8)")), ["'x'", "(-20, 3, 8, 8)"]),
    "a header of brackets": (member(npy("(" * 5000 + ")" * 5000)), ["'x'", "damaged"]),
    "a name that leads out": (member(whole_npy(images(20)), name="../x.npy"), ["no array", "'../x'"]),
    "a name that a terminal obeys": (member(whole_npy(images(20)), name=f"{EVIL}.npy"), ["\\x1b[31m"]),
    "infinity": (arrays(x=np.full((20, 3, 8, 8), np.inf, np.float32)), ["'x'", "infinity"]),
    "labels beyond all classes": (
        arrays(x=images(20), labels=np.full(20, 2**62)), [str(2**62), "5 classes"],
    ),
    "labels below zero": (arrays(x=images(20), labels=np.full(20, -1)), ["-1", "count from 0"]),
    "labels that are no numbers": (arrays(x=images(20), labels=np.full(20, np.nan)), ["'labels'", "whole"]),
    "samples that are all alike": (arrays(x=np.ones((20, 3, 8, 8), np.float32)), ["samples that differ"]),
    "a pipe": (
        replaced("calib.npz", lambda folder: os.mkfifo(folder / "calib.npz")),
        ["neither a file nor a folder"],
    ),
    "a device": (
        replaced("calib.npz", lambda folder: (folder / "calib.npz").symlink_to("/dev/zero")),
        ["neither a file nor a folder"],
    ),
    "a text file": (lambda folder: (folder / "calib.npz").write_text("x,y\n1,2\n"), ["calib.npz"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(runner: LimitedRunner, folder: Path, name: str) -> None:
    make, says = ARRAYS[name]
    make(folder)
    refuse(runner, folder, "--keep-macs", "0.5", code=1, says=says)
    assert not (folder / "trapped").exists()


# ---------------------------------------------------------------- images


def png(side: int) -> bytes:
    """A small file that says it is an image of this side."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(10**5))), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bad_images(content: bytes | Callable[[bytes], bytes], n: int) -> Make:
    def make(folder: Path) -> None:
        good = (folder / "photos" / "1.png").read_bytes()
        data = content if isinstance(content, bytes) else content(good)
        for index in range(n):
            (folder / "photos" / f"bad{index}.png").write_bytes(data)

    return make


IMAGES: dict[str, bytes | Callable[[bytes], bytes]] = {
    "a decompression bomb": png(100_000),
    "pixels of nothing": png(0),
    "half a file": lambda good: good[: len(good) // 2],
    "text": b"<html>not found</html>",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(/tmp/x) (w) file\n",
}


STOPS_LATER = ["compress", "net.onnx", "--data", "photos", "--exclude", "none*", "--threads", "1"]
"""A request that makes no sense, which shows once the data has been read."""


@pytest.mark.parametrize("name", IMAGES)
def test_one_bad_image_is_skipped_and_counted(runner: LimitedRunner, folder: Path, name: str) -> None:
    bad_images(IMAGES[name], 1)(folder)
    before = look(folder)
    result = runner.run(folder, STOPS_LATER)
    assert result.code == 2
    assert "'none*' matches no node" in result.err
    assert "1 of 7 images skipped because they cannot be read: photos/bad0.png" in result.err
    assert look(folder) == before


def test_no_program_is_run_for_an_image(runner: LimitedRunner, folder: Path) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    bad_images(IMAGES["PostScript"], 1)(folder)
    result = runner.run(folder, STOPS_LATER)
    assert "photos/bad0.png (not an image)" in result.err


@pytest.mark.parametrize("name", IMAGES)
def test_many_bad_images_are_an_error(runner: LimitedRunner, folder: Path, name: str) -> None:
    bad_images(IMAGES[name], 3)(folder)
    says = ["3 of 9 images cannot be read", "bad0.png", "Repair or remove them"]
    refuse(runner, folder, "--keep-macs", "0.5", data="photos", code=1, says=says)


def test_pipes_and_devices_among_images_are_no_images(runner: LimitedRunner, folder: Path) -> None:
    os.mkfifo(folder / "photos" / "pipe.png")
    (folder / "photos" / "zero.png").symlink_to("/dev/zero")
    result = runner.run(folder, STOPS_LATER)
    assert result.code == 2
    assert "'none*' matches no node" in result.err
    assert "2 other entries ignored ('pipe.png', 'zero.png')" in result.err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe\x00", ["classes.txt", "cannot be read as text"]),
        (b"c0\nc1\n\nc2", ["classes.txt", "line 3 is empty"]),
        (b"c0\nc0", ["classes.txt", "repeats 'c0'"]),
        (f"c0\n{EVIL}".encode(), ["classes.txt", "no line for the subfolder 'c1'"]),
        (bytes(17 * 2**20), ["classes.txt", "larger than 16 MB"]),
    ],
    ids=["no text", "empty line", "twice", "control characters", "large"],
)
def test_classes(runner: LimitedRunner, folder: Path, content: bytes, says: list[str]) -> None:
    (folder / "classes" / "classes.txt").write_bytes(content)
    refuse(runner, folder, "--keep-macs", "0.5", data="classes", code=1, says=says)


# ---------------------------------------------------------------- options and recipes

DEEP = "x = " + "[" * 10_000 + "]" * 10_000

OPTIONS: dict[str, tuple[bytes | str, list[str]]] = {
    "bytes": (b"\xff\x00", ["not valid TOML"]),
    "half a line": ("keep-macs = ", ["not valid TOML"]),
    "brackets in brackets": (DEEP, ["not valid TOML"]),
    "ten thousand digits": (f"seed = {'9' * 10_000}", ["not valid TOML"]),
    "an unknown option": ("frob = 1", ["unknown option 'frob'"]),
    "an option that a terminal obeys": ('"fr\\u001b[31mob" = 1', ["\\x1b[31mob"]),
    "text for a number": ('keep-macs = "half"', ["--keep-macs", "'half'"]),
    "no number": ("keep-macs = nan", ["--keep-macs", "nan"]),
    "infinity": ("keep-macs = inf", ["--keep-macs", "inf"]),
    "a table": ("[keep-macs]\na = 1", ["--keep-macs"]),
    "a seed of thirty digits": (f"seed = {10**30}", ["--seed", "at most"]),
    "a billion threads": (f"threads = {10**9}", ["--threads", "at most 1024"]),
    "a zero in a path": ('output = "a\\u0000b"', ["--output", "cannot be a path"]),
    "a path that is too long": (f'output = "{"a" * 5000}"', ["--output", "too long"]),
    "a metric that is no function": ('metric = ":"', ["--metric", "package.module:function"]),
    "sixteen megabytes": (b"#" * (17 * 2**20), ["larger than 16 MB"]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_in_a_file(runner: LimitedRunner, folder: Path, name: str) -> None:
    content, says = OPTIONS[name]
    (folder / "hap.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(runner, folder, "--config", "hap.toml", code=2, says=says)


RECIPES: dict[str, tuple[bytes | str, list[str]]] = {
    "bytes": (b"\xff\x00", ["not a readable TOML file"]),
    "brackets in brackets": (DEEP, ["not a readable TOML file"]),
    "an unknown table": ("[frob]", ["unknown entry 'frob'"]),
    "an unknown key": ("[image]\nfrob = 1", ["unknown key 'frob'"]),
    "a negative side": ("[image]\nsize = -4", ["size"]),
    "no numbers": ("[image]\nmean = [nan, nan, nan]\nstd = [1, 1, 1]", ["mean"]),
    "a deviation of zero": ("[image]\nmean = [0, 0, 0]\nstd = [0, 0, 0]", ["std"]),
    "an infinite scale": ("[image]\nscale = inf", ["scale"]),
    "a colour that a terminal obeys": ('[image]\ncolor = "\\u001b[31m"', ["color", "\\x1b"]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_preprocessing(runner: LimitedRunner, folder: Path, name: str) -> None:
    content, says = RECIPES[name]
    (folder / "p.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    words = ("--keep-macs", "0.5", "--preprocess", "p.toml")
    refuse(runner, folder, *words, data="photos", code=2, says=["p.toml", *says])


@pytest.mark.parametrize("name", ["hap.toml", "p.toml", "plan.json"])
def test_pipes_in_place_of_text(runner: LimitedRunner, folder: Path, name: str) -> None:
    os.mkfifo(folder / name)
    if name == "plan.json":
        result = runner.run(folder, ["apply", "net.onnx", name])
        check_sentence(result, [name, "not a regular file"])
    else:
        option, says = {
            "hap.toml": ("--config", ["not a regular file"]),
            "p.toml": ("--preprocess", ["nor the path of a TOML file"]),
        }[name]
        refuse(runner, folder, option, name, "--keep-macs", "0.5", data="photos", code=2, says=says)


# ---------------------------------------------------------------- outputs

OUTPUTS: dict[str, tuple[Make, list[str], int, list[str]]] = {
    "the model by a link": (
        lambda folder: (folder / "l.onnx").symlink_to("net.onnx"), ["-o", "l.onnx"], 2,
        ["same file as MODEL"],
    ),
    "the model by another name": (
        lambda folder: os.link(folder / "net.onnx", folder / "l.onnx"), ["-o", "l.onnx"], 2,
        ["same file as MODEL"],
    ),
    "a folder": (lambda folder: (folder / "d").mkdir(), ["-o", "d"], 2, ["is a folder"]),
    "a pipe": (
        lambda folder: os.mkfifo(folder / "pipe.onnx"), ["-o", "pipe.onnx"], 2, ["a device or a pipe"],
    ),
    "a device": (
        lambda folder: (folder / "l.onnx").symlink_to("/dev/zero"), ["-o", "l.onnx"], 2,
        ["a device or a pipe"],
    ),
    "an empty name": (lambda folder: None, ["-o", ""], 2, ["--output", "a path"]),
    "a folder that is not there": (lambda folder: None, ["-o", "no/o.onnx"], 1, ["there is no folder"]),
    "a report where a folder is": (
        lambda folder: (folder / "d").mkdir(), ["--report", "d"], 2, ["--report", "is a folder"],
    ),
    "a plan where the model is": (
        lambda folder: None, ["--save-plan", "net.onnx"], 2, ["same file as MODEL"],
    ),
    "a work folder that is a file": (lambda folder: None, ["--work-dir", "net.onnx"], 1, ["cannot be made"]),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(runner: LimitedRunner, folder: Path, name: str) -> None:
    make, words, code, says = OUTPUTS[name]
    make(folder)
    refuse(runner, folder, "--keep-macs", "0.5", *words, code=code, says=says)


# ---------------------------------------------------------------- plans


def make_plan(folder: Path) -> dict[str, Any]:
    """Write a plan that halves each group, with one weight of its own; return its document."""
    source = load_model(folder / "net.onnx")
    probe = make_probe(make_session(source.proto, providers="cpu", threads=1).inputs)
    prepared = prepare(source, probe)
    decisions = tuple(
        GroupDecision.from_keep(group.name, group.size, range(group.size // 2))
        for group in prepared.coupling.groups
    )
    weights = {"head.b": np.zeros(5, np.float32)}
    assert from_plan_weights(prepared, Choice(decisions), weights)
    plan = CompressionPlan(source.sha256, "0", {"seed": 0}, decisions, weights=weights)
    save_plan(plan, folder / "plan.json")
    document = json.loads((folder / "plan.json").read_text())
    assert isinstance(document, dict)
    return document


def set_in(document: dict[str, Any], path: tuple[str | int, ...], value: Any) -> None:
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value


PLANS: dict[str, tuple[tuple[str | int, ...], Any, list[str]]] = {
    "another model": (("model_sha256",), "0" * 64, ["another model", "0000000000000000"]),
    "another schema": (("schema",), "hap-onnx/plan/9", ["written by a newer version"]),
    "a group that is not there": (("groups", 0, "name"), EVIL, ["no group", "\\x1b[31m"]),
    "no group": (("groups",), [], ["decides none"]),
    "groups that are none": (("groups",), 7, ["damaged"]),
    "channels beyond a group": (("groups", 0, "keep"), f"0-{PETA}", ["damaged"]),
    "a group of a petabyte": (("groups", 0, "size"), PETA, ["damaged"]),
    "channels that are text": (("groups", 0, "keep"), "all", ["damaged"]),
    "an unknown weight": (("weights", "tensors", "no.such"), "float32[5]", ["damaged", "no.such"]),
    "a weight of a petabyte": (("weights", "tensors", "head.b"), f"float32[{PETA}]", ["damaged", "head.b"]),
    "a weight of objects": (("weights", "tensors", "head.b"), "object[5]", ["damaged", "head.b"]),
    "the hash of other weights": (("weights", "sha256"), "0" * 64, ["does not belong to the plan"]),
    "sizes that are impossible": (("config", "input_shapes"), {"x": [PETA] * 4}, ["input_shapes"]),
    "sizes that are text": (("config", "input_shapes"), {"x": "large"}, ["input_shapes"]),
    "patterns that are none": (("config", "exclude"), 7, ["exclude"]),
    "patterns that match nothing": (("config", "exclude"), ["none*"], ["'none*'"]),
    "an implant that cannot be": (
        ("implants",), [{"node": "make_a1", "kind": "magic", "rank": 1}], ["damaged"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_plans(runner: LimitedRunner, folder: Path, name: str) -> None:
    path, value, says = PLANS[name]
    document = make_plan(folder)
    set_in(document, path, value)
    (folder / "plan.json").write_text(json.dumps(document))
    before = look(folder)
    result = runner.run(folder, ["apply", "net.onnx", "plan.json"])
    check_sentence(result, says, code=2 if "match nothing" in name else 1)
    assert look(folder) == before


def test_a_plan_of_brackets(runner: LimitedRunner, folder: Path) -> None:
    (folder / "plan.json").write_text("[" * 100_000)
    check_sentence(runner.run(folder, ["apply", "net.onnx", "plan.json"]), ["plan.json", "damaged"])


@pytest.mark.parametrize("change", [lambda data: data[:-7], lambda data: b"\xff" * 8 + data[8:]])
def test_weights_of_a_plan_that_are_damaged(
    runner: LimitedRunner, folder: Path, change: Callable[[bytes], bytes]
) -> None:
    make_plan(folder)
    weights = folder / "plan.safetensors"
    weights.write_bytes(change(weights.read_bytes()))
    before = look(folder)
    result = runner.run(folder, ["apply", "net.onnx", "plan.json"])
    check_sentence(result, ["plan.safetensors", "does not belong to the plan"])
    assert look(folder) == before


def test_weights_with_a_header_of_petabytes_are_damaged(runner: LimitedRunner, folder: Path) -> None:
    document = make_plan(folder)
    header = json.dumps({"head.b": {"dtype": "F32", "shape": [PETA], "data_offsets": [0, 4 * PETA]}}).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(20)
    (folder / "plan.safetensors").write_bytes(data)
    document["weights"]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "plan.json").write_text(json.dumps(document))
    result = runner.run(folder, ["apply", "net.onnx", "plan.json"])
    check_sentence(result, ["plan.safetensors", "damaged"])


def test_the_plan_of_another_model(runner: LimitedRunner, folder: Path) -> None:
    make_plan(folder)
    write(folder, residual_cnn(seed=4))
    before = look(folder)
    result = runner.run(folder, ["apply", "net.onnx", "plan.json"])
    check_sentence(result, ["another model", load_model(folder / "net.onnx").sha256[:16]])
    assert look(folder) == before
