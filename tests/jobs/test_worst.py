"""Samples that differ most: found by their outputs, named by their files, shown as they are."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hap_onnx.data.calibration import InputSpec, Subset, open_dataset
from hap_onnx.jobs.worst import N_WORST, draw_worst, find_worst
from tests.helpers import rand

SPEC = InputSpec("x", np.dtype(np.float32), ("N", 3, 8, 8))


def arrays_of(path: Path) -> Subset:
    dataset = open_dataset(path, [SPEC])
    return Subset(dataset, np.arange(dataset.n_samples)[::-1])


def test_the_farthest_come_first_and_equal_ones_are_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=rand(30, 3, 8, 8), labels=np.arange(30) % 3)
    part = arrays_of(tmp_path / "d.npz")
    before = {"y": rand(30, 3, seed=1), "z": rand(30, 2, seed=2)}
    after = {"y": before["y"].copy(), "z": before["z"] + 9}
    after["y"][[4, 20, 7]] += np.array([[1.0], [3.0], [2.0]], np.float32)
    worst = find_worst(before, after, part, scales={"y": 2.0}, scores="y")
    assert [sample.index for sample in worst] == [29 - 20, 29 - 7, 29 - 4]
    assert [sample.distance for sample in worst] == pytest.approx([54.0, 24.0, 6.0], rel=1e-5)
    tops = before["y"].argmax(1)
    for sample in worst:
        assert (sample.before, sample.after) == (str(tops[29 - sample.index]),) * 2
        assert (sample.label, sample.source) == (str(sample.index % 3), None)
    after["y"] += 1
    after["y"][11] = np.nan  # the worst of all
    worst = find_worst(before, after, part, scales={"y": 2.0}, scores=None)
    assert len(worst) == N_WORST
    assert (worst[0].index, worst[0].before, worst[0].label) == (29 - 11, None, None)


def test_answers_that_change_come_before_those_that_do_not(tmp_path: Path) -> None:
    """A page that tells of a drop must show the samples on which it is."""
    n = 2 * N_WORST
    np.savez(tmp_path / "d.npz", x=rand(n, 3, 8, 8))
    part = arrays_of(tmp_path / "d.npz")
    before = {"y": np.tile(np.array([[1.0, 0.9]], np.float32), (n, 1))}
    after = {"y": before["y"] * np.linspace(10, 2, n, dtype=np.float32)[:, None]}  # far, of the same class
    after["y"][[14, 17]] = [[0.9, 0.95], [0.9, 1.1]]  # near, of the other
    worst = find_worst(before, after, part, scales={"y": 1.0}, scores="y")
    assert [sample.index for sample in worst[:3]] == [n - 1 - 17, n - 1 - 14, n - 1]
    assert [sample.before != sample.after for sample in worst] == [True] * 2 + [False] * (N_WORST - 2)
    assert all(first.distance > second.distance for first, second in pairwise(worst[2:]))
    unknown = find_worst(before, after, part, scales={"y": 1.0}, scores=None)
    assert [sample.index for sample in unknown] == [n - 1 - place for place in range(N_WORST)]


def test_images_have_their_names_classes_and_pictures(tmp_path: Path) -> None:
    for name, colour in (("cat", (250, 10, 20)), ("dog", (0, 0, 200))):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (200, 100), colour).save(tmp_path / name / f"{number}.png")
    dataset = open_dataset(tmp_path, [SPEC])
    part = Subset(dataset, np.arange(6))
    before = {"y": np.eye(2, dtype=np.float32)[[0, 0, 0, 1, 1, 1]]}
    after = {"y": before["y"].copy()}
    after["y"][4] = [5, 0]
    (sample,) = worst = find_worst(before, after, part, scales={"y": 1.0}, scores="y")
    assert (sample.index, sample.source) == (4, "dog/1.png")
    assert (sample.label, sample.before, sample.after) == ("dog", "dog", "cat")
    picture = Image.open(io.BytesIO(draw_worst(worst, part)[4]))
    assert picture.format == "PNG"
    assert picture.size == (160, 80)
    assert picture.convert("RGB").getpixel((20, 20)) == (0, 0, 200)


def test_arrays_in_several_files_are_found_in_them(tmp_path: Path) -> None:
    for number, size in enumerate((3, 1, 4)):
        np.savez(tmp_path / f"{number}.npz", x=rand(size, 3, 8, 8))
    dataset = open_dataset(tmp_path, [SPEC])
    names = [dataset.name_of(index) for index in range(8)]
    assert names == ["0.npz[0]", "0.npz[1]", "0.npz[2]", "1.npz", *(f"2.npz[{row}]" for row in range(4))]


def test_arrays_are_shown_in_their_own_range_if_they_look_like_images() -> None:
    x = np.zeros((6, 3, 8, 8), np.float32)
    x[:, 0, :, :4], x[:, 2] = 3.0, -1.0
    picture = open_dataset({"x": x}, [SPEC]).picture_of(0)
    assert picture is not None
    assert [picture.getpixel((column, 0)) for column in (0, 7)] == [(255, 64, 0), (64, 64, 0)]
    grey = InputSpec("x", np.dtype(np.float32), ("N", 8, 8, 1))
    shown = open_dataset({"x": rand(6, 8, 8, 1)}, [grey]).picture_of(2)
    assert shown is not None
    assert shown.mode == "L"
    for shape in ((6, 5), (6, 7, 8, 8), (6, 3, 1, 8), (6, 3, 8)):
        spec = InputSpec("x", np.dtype(np.float32), ("N", *shape[1:]))
        assert open_dataset({"x": rand(*shape)}, [spec]).picture_of(0) is None
