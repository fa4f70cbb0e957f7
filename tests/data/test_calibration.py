"""Data in every form of the contract, and one clear error for everything that can be wrong with it."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hap_onnx.data import array_data
from hap_onnx.data.calibration import Dataset, InputSpec, Subset, open_dataset, split_dataset
from hap_onnx.data.preprocess import load_image, preprocess_image, resolve_preprocessing
from hap_onnx.errors import CalibrationError, UsageError
from tests.forks import limit_files, run_fork

FLOAT = np.dtype(np.float32)
X = InputSpec("x", FLOAT, ("N", 3, 4, 4))
TOKENS = InputSpec("tokens", np.dtype(np.int64), ("N", "T"))
MASK = InputSpec("mask", FLOAT, ("N", "T"))


def samples(n: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, 4, 4)).astype(np.float32)


def read_all(dataset: Dataset, *, batch_size: int = 4, name: str = "x") -> np.ndarray:
    batches = list(dataset.batches(np.arange(dataset.n_samples), batch_size))
    return np.concatenate([batch.inputs[name] for batch in batches])


def write_images(
    folder: Path, n: int, *, size: tuple[int, int] = (6, 5), suffix: str = ".png"
) -> list[np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(n)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(n)]
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{number:03}{suffix}")
    return images


# --- forms of data -------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: Callable[..., None]) -> None:
    x, labels = samples(10), np.arange(10, dtype=np.uint8) % 3
    save(tmp_path / "d.npz", x=x, labels=labels)
    dataset = open_dataset(tmp_path / "d.npz", [X])
    assert dataset.n_samples == 10
    assert dataset.labels is not None
    assert dataset.labels.dtype == np.int64
    np.testing.assert_array_equal(dataset.labels, labels)
    for _ in range(2):  # read again each pass
        np.testing.assert_array_equal(read_all(dataset), x)
    batches = list(dataset.batches([7, 0, 1, 2, 9], 2))
    assert [len(batch.inputs["x"]) for batch in batches] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([b.inputs["x"] for b in batches]), x[[7, 0, 1, 2, 9]])
    np.testing.assert_array_equal(np.concatenate([b.labels for b in batches]), labels[[7, 0, 1, 2, 9]])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
def test_npz_layouts_and_float_widths(tmp_path: Path, save: Any, order: Any, dtype: str) -> None:
    x = samples(6).astype(dtype)
    save(tmp_path / "d.npz", x=np.asarray(x, order=order))
    out = read_all(open_dataset(tmp_path / "d.npz", [X]))
    assert out.dtype == FLOAT
    np.testing.assert_array_equal(out, x.astype(np.float32))


def test_several_inputs_with_a_free_axis(tmp_path: Path) -> None:
    tokens, mask = np.arange(24, dtype=np.int32).reshape(4, 6), np.ones((4, 6), np.float32)
    np.savez(tmp_path / "d.npz", tokens=tokens, mask=mask, note=np.zeros(3))
    dataset = open_dataset(tmp_path / "d.npz", [TOKENS, MASK])
    (batch,) = dataset.batches(range(4), 4)
    assert batch.inputs["tokens"].dtype == np.int64
    np.testing.assert_array_equal(batch.inputs["tokens"], tokens)
    assert any("'note' ignored" in note for note in dataset.notes)


def test_fixed_batch_of_the_model_does_not_bind_the_data() -> None:
    assert open_dataset({"x": samples(7)}, [InputSpec("x", FLOAT, (1, 3, 4, 4))]).n_samples == 7


@pytest.mark.parametrize("kind", ["npz", "npy"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_folder_of_arrays_in_name_order(tmp_path: Path, kind: str, order: Any) -> None:
    x = samples(9)
    for name, rows in (("c", slice(7, 9)), ("a", slice(0, 3)), ("b", slice(3, 7))):
        part = np.asarray(x[rows], order=order)
        if kind == "npy":
            np.save(tmp_path / f"{name}.npy", part)
        else:
            np.savez(tmp_path / f"{name}.npz", x=part, labels=np.arange(9)[rows])
    (tmp_path / ".hidden.npz").write_text("junk")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "readme.txt").write_text("hello")
    dataset = open_dataset(str(tmp_path), [X])
    np.testing.assert_array_equal(read_all(dataset), x)
    (batch,) = dataset.batches([8, 0, 4, 3, 1], 5)  # across files, out of order
    np.testing.assert_array_equal(batch.inputs["x"], x[[8, 0, 4, 3, 1]])
    assert (dataset.labels is not None) == (kind == "npz")
    if dataset.labels is not None:
        np.testing.assert_array_equal(dataset.labels, np.arange(9))
    assert any("readme.txt" in note for note in dataset.notes)


def test_python_arrays() -> None:
    x = samples(6)
    np.testing.assert_array_equal(read_all(open_dataset({"x": x}, [X])), x)
    np.testing.assert_array_equal(read_all(open_dataset(x.astype(np.float64), [X])), x)
    labelled = open_dataset({"x": x, "labels": np.arange(6)}, [X])
    assert labelled.labels is not None


def test_iterable_of_dicts_is_read_once_and_spilled(tmp_path: Path) -> None:
    x, labels = samples(10), np.arange(10)
    n_taken = 0

    def generate() -> Iterator[dict[str, np.ndarray]]:
        nonlocal n_taken
        for start in (0, 4, 8):
            n_taken += 1
            yield {"x": x[start : start + 4].astype(np.float64), "labels": labels[start : start + 4]}

    dataset = open_dataset(generate(), [X], work_dir=tmp_path)
    for _ in range(2):
        np.testing.assert_array_equal(read_all(dataset), x)
    np.testing.assert_array_equal(dataset.labels, labels)
    assert n_taken == 3
    assert list(tmp_path.iterdir())
    del dataset
    gc.collect()
    assert not list(tmp_path.iterdir())  # temporary files go with the dataset


def test_compressed_arrays_are_unpacked_once_and_removed(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=samples(8))
    work = tmp_path / "work"
    work.mkdir()
    dataset = open_dataset(tmp_path / "d.npz", [X], work_dir=work)
    before = sorted(work.rglob("*"))
    read_all(dataset)
    assert sorted(work.rglob("*")) == before
    del dataset
    gc.collect()
    assert not list(work.iterdir())


def test_memory_does_not_hold_all_samples(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "d.npy"
    spec = InputSpec("x", FLOAT, ("N", 65536))
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(256, 65536)).flush()  # 64 MiB
    tracemalloc.start()
    dataset = open_dataset(path.parent, [spec])
    for batch in dataset.batches(range(256), 4):
        assert batch.inputs["x"].shape == (4, 65536)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


# --- folders of images ---------------------------------------------------------------------------


def test_flat_images(tmp_path: Path) -> None:
    write_images(tmp_path, 6)
    (tmp_path / ".DS_Store").write_text("junk")
    (tmp_path / "notes.txt").write_text("hello")
    dataset = open_dataset(tmp_path, [X])
    assert dataset.labels is None
    assert "imagenet" in dataset.preprocessing
    assert "default" in dataset.preprocessing
    assert any("notes.txt" in note for note in dataset.notes)
    recipe = resolve_preprocessing(None, X)
    wanted = np.stack([preprocess_image(load_image(tmp_path / f"{i:03}.png"), recipe) for i in range(6)])
    for _ in range(2):
        np.testing.assert_array_equal(read_all(dataset), wanted)


def test_images_by_class(tmp_path: Path) -> None:
    for name, n in (("dog", 3), ("cat", 2), ("__MACOSX", 1), (".cache", 1)):
        write_images(tmp_path / name, n, suffix=".JPG")
    (tmp_path / "bird").mkdir()  # a class without samples keeps its number
    dataset = open_dataset(tmp_path, [X], preprocess="unit")
    assert dataset.class_names == ("bird", "cat", "dog")
    np.testing.assert_array_equal(dataset.labels, [1, 1, 2, 2, 2])
    assert read_all(dataset).shape == (5, 3, 4, 4)


def test_classes_file_gives_the_order(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 2)
    (tmp_path / "classes.txt").write_text("dog\nfish\ncat\n\n")
    dataset = open_dataset(tmp_path, [X])
    assert dataset.class_names == ("dog", "fish", "cat")
    np.testing.assert_array_equal(dataset.labels, [0, 0, 2, 2])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("dog\ncta\n", "no line for the subfolder 'cat'; did you mean 'cta'"),
        ("dog\n\ncat\n", "line 2 is empty"),
        ("dog\ncat\ndog\n", "line 3 repeats 'dog'"),
    ],
)
def test_classes_file_mistakes(tmp_path: Path, text: str, match: str) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 2)
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(CalibrationError, match=match):
        open_dataset(tmp_path, [X])


def test_uint8_model_gets_pixels(tmp_path: Path) -> None:
    images = write_images(tmp_path, 5, size=(4, 4))
    dataset = open_dataset(tmp_path, [InputSpec("x", np.dtype(np.uint8), (1, 4, 4, 3))])
    out = read_all(dataset)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, np.stack(images))


def test_few_bad_images_are_skipped_and_counted(tmp_path: Path) -> None:
    write_images(tmp_path, 30)
    (tmp_path / "004.png").write_text("not an image at all")
    dataset = open_dataset(tmp_path, [X])
    assert dataset.n_samples == 29
    assert read_all(dataset).shape[0] == 29
    assert any("1 of 30 images skipped" in note and "004.png" in note for note in dataset.notes)


def test_many_bad_images_are_an_error(tmp_path: Path) -> None:
    write_images(tmp_path, 30, suffix=".jpg")
    for number in (3, 4, 5):
        whole = (tmp_path / f"{number:03}.jpg").read_bytes()
        (tmp_path / f"{number:03}.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CalibrationError, match=r"3 of 30 images cannot be read: .*003\.jpg"):
        open_dataset(tmp_path, [X])


def test_a_single_bad_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(CalibrationError, match="1 of 1 images cannot be read"):
        open_dataset(tmp_path, [X])


def test_bombs_are_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, 6)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(CalibrationError, match="decompression bomb"):
        open_dataset(tmp_path, [X])


@pytest.mark.parametrize(
    ("shape", "match"),
    [(("N", 3, 4, 4), "7x5 .* does not fit the model's input"), (("N", 3, "H", "W"), "7x5 .* but .* is 6x5")],
)
def test_images_of_other_sizes_without_resizing(tmp_path: Path, shape: Any, match: str) -> None:
    write_images(tmp_path / "d", 3)
    if shape[2] == 4:
        for path in (tmp_path / "d").iterdir():
            Image.new("RGB", (4, 4)).save(path)
    Image.new("RGB", (5, 7)).save(tmp_path / "d" / "odd.png")
    (tmp_path / "r.toml").write_text('[image]\nresize = "none"\n')
    with pytest.raises(CalibrationError, match=match):
        open_dataset(tmp_path / "d", [InputSpec("x", FLOAT, shape)], preprocess=tmp_path / "r.toml")


def test_image_that_disappears_midway(tmp_path: Path) -> None:
    write_images(tmp_path, 6)
    dataset = open_dataset(tmp_path, [X])
    (tmp_path / "003.png").unlink()
    with pytest.raises(CalibrationError, match=r"003\.png: could be read at the start"):
        read_all(dataset)


def test_mixed_layouts(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    write_images(tmp_path / "cat", 2)
    with pytest.raises(CalibrationError, match="2 images beside 2 in subfolders"):
        open_dataset(tmp_path, [X])
    np.savez(tmp_path / "d.npz", x=samples(5))
    with pytest.raises(CalibrationError, match="mixes arrays"):
        open_dataset(tmp_path, [X])


# --- everything that can be wrong ----------------------------------------------------------------


def bad_value(value: float) -> np.ndarray:
    x = samples(8)
    x[5, 1, 2, 3] = value
    return x


BAD_ARRAYS: list[tuple[dict[str, Any], str]] = [
    ({"y": samples(8)}, r"has no array for the model's input 'x'; it holds 'y'"),
    ({}, "it holds no arrays"),
    (
        {"x": (samples(8) * 9).astype(np.uint8)},
        r"whole numbers \(uint8\) but the model wants float32; scale pixels",
    ),
    ({"x": samples(8) > 0}, "has type bool but the model wants float32"),
    ({"x": samples(8).astype(complex)}, "complex128"),
    ({"x": np.array(["a"] * 8)}, "has type string"),
    ({"x": samples(8)[0]}, r"has 3 axes \[3, 4, 4\] .* add it with x\[None\]"),
    ({"x": samples(8).reshape(8, 48)}, r"has 2 axes \[8, 48\] .* has 4"),
    ({"x": samples(8)[:, :2]}, r"axis 1 is 2, but .*'x' float32 \[N, 3, 4, 4\] wants 3"),
    ({"x": samples(8).transpose(0, 2, 3, 1)}, r"use x\.transpose\(0, 3, 1, 2\)"),
    ({"x": bad_value(np.nan)}, "sample 5 holds NaN"),
    ({"x": bad_value(np.inf)}, "sample 5 holds infinity"),
    ({"x": bad_value(1.0).astype(np.float64) * 1e60}, r"sample 0 holds infinity \(as float32\)"),
    ({"x": samples(0)}, "holds no samples"),
    ({"x": samples(8), "labels": np.arange(7)}, "has 7 labels for 8 samples"),
    ({"x": samples(8), "labels": np.arange(8.0)}, "type float64 but labels are whole numbers"),
    ({"x": samples(8), "labels": np.arange(8) - 1}, "holds the class -1"),
    ({"x": samples(8), "labels": np.eye(8, dtype=int)}, "one-hot rows take argmax"),
    ({"x": samples(8), "label": np.arange(8)}, "did you mean 'labels'"),
    ({"x": samples(8), "targets": np.arange(8)}, "did you mean 'labels'"),
    ({"x": np.float32(3)}, "has 0 axes|single number"),
]


@pytest.mark.parametrize(("arrays", "match"), BAD_ARRAYS)
@pytest.mark.parametrize("form", ["dict", "npz", "npz in folder", "iterable"])
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], match: str, form: str) -> None:
    if form == "iterable" and match == "holds no samples":
        data: Any = [arrays, arrays]
    elif form == "iterable":
        data = [{"x": samples(8), **({"labels": np.arange(8)} if "labels" in arrays else {})}, arrays]
    elif form == "dict":
        data = arrays
    else:
        np.savez_compressed(tmp_path / "d.npz", **arrays)
        data = tmp_path / "d.npz" if form == "npz" else tmp_path
    with pytest.raises(CalibrationError, match=match) as caught:
        open_dataset(data, [X])
    text = str(caught.value)
    assert text[-1] in ".?"
    assert "\n" not in text
    if form.startswith("npz"):
        assert str(tmp_path) in text


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"tokens": np.ones((4, 6)), "mask": np.ones((4, 6))}, "has type float64 but the model wants int64"),
        (
            {"tokens": np.ones((4, 6), int), "mask": np.ones((4, 5))},
            "axis 1 'T' is 5, but it is 6 in array 'tokens'",
        ),
        ({"tokens": np.ones((4, 6), int), "mask": np.ones((3, 6))}, "has 3 samples but array 'tokens' has 4"),
        (
            {"tokens": np.full((4, 6), 2**63, np.uint64), "mask": np.ones((4, 6))},
            "do not fit the model's int64",
        ),
        ({"mask": np.ones((4, 6))}, "has no array for the model's input 'tokens'; it holds 'mask'"),
    ],
)
def test_two_inputs_that_do_not_fit(arrays: dict[str, np.ndarray], match: str) -> None:
    with pytest.raises(CalibrationError, match=match):
        open_dataset(arrays, [TOKENS, MASK])


def test_parts_with_other_free_sizes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((4, 6), np.float32))
    np.save(tmp_path / "b.npy", np.ones((4, 7), np.float32))
    with pytest.raises(CalibrationError, match=r"b\.npy: .* axis 1 'T' is 7, but it is 6 in .*a\.npy"):
        open_dataset(tmp_path, [MASK])


def test_labels_in_some_files_only(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=samples(4), labels=np.arange(4))
    np.savez(tmp_path / "b.npz", x=samples(4))
    with pytest.raises(CalibrationError, match=r"'a\.npz' has labels and 'b\.npz' has none"):
        open_dataset(tmp_path, [X])
    with pytest.raises(CalibrationError, match=r"Item 1 .*labels must be in all items or in none"):
        open_dataset([{"x": samples(4), "labels": np.arange(4)}, {"x": samples(4)}], [X])


def test_npy_for_two_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((4, 6), np.float32))
    with pytest.raises(CalibrationError, match=r"a\.npy: .* has 2 inputs \('tokens', 'mask'\)"):
        open_dataset(tmp_path, [TOKENS, MASK])


def test_images_for_two_inputs(tmp_path: Path) -> None:
    write_images(tmp_path, 5)
    with pytest.raises(CalibrationError, match="which fill one input, but the model has 2"):
        open_dataset(tmp_path, [X, MASK])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_object_arrays_are_never_unpickled(tmp_path: Path, save: Any) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    save(tmp_path / "d.npz", x=np.array([Trap()] * 5, dtype=object))
    with pytest.raises(CalibrationError, match="holds Python objects"):
        open_dataset(tmp_path / "d.npz", [X])
    np.save(tmp_path / "d.npy", np.array([Trap()] * 5, dtype=object))
    (tmp_path / "d.npz").unlink()
    with pytest.raises(CalibrationError, match="holds Python objects"):
        open_dataset(tmp_path, [X])
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
@pytest.mark.parametrize("content", [b"", b"junk", b"\x93NUMPY", b"PK\x03\x04 and no more"])
def test_files_that_are_something_else(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"d{suffix}").write_bytes(content)
    with pytest.raises(CalibrationError, match=rf"d\{suffix}.*damaged or of another format"):
        open_dataset(tmp_path, [X])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_cut_npz(tmp_path: Path, save: Any, share: float) -> None:
    path = tmp_path / "d.npz"
    save(path, x=samples(20))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CalibrationError, match="damaged"):
        open_dataset(path, [X])


def test_flipped_bytes_in_compressed_npz(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=samples(200))
    content = bytearray(path.read_bytes())
    content[20000:20040] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"array 'x': .*damaged"):
        open_dataset(path, [X])


def test_cut_npy(tmp_path: Path) -> None:
    path = tmp_path / "d.npy"
    np.save(path, samples(20))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CalibrationError, match="cut short"):
        open_dataset(tmp_path, [X])


def test_array_file_that_changes_midway(tmp_path: Path) -> None:
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", samples(5))
    dataset = open_dataset(tmp_path, [X])
    content = (tmp_path / "b.npy").read_bytes()
    (tmp_path / "b.npy").write_bytes(content[:-100])
    with pytest.raises(CalibrationError, match=r"b\.npy: the file ends too early"):
        read_all(dataset)
    (tmp_path / "a.npy").unlink()
    with pytest.raises(CalibrationError, match=r"a\.npy: the file was there at the start and is gone"):
        read_all(dataset)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("how", ["in place", "by another file"])
def test_data_that_changes_midway_is_refused(tmp_path: Path, save: Any, how: str) -> None:
    """The same size and shape: without a look at the file, batches would be of two kinds."""
    path, other = tmp_path / "d.npz", tmp_path / "other.npz"
    save(path, x=samples(20))
    work = tmp_path / "work"
    work.mkdir()
    dataset = open_dataset(path, [X], work_dir=work)
    if save is np.savez_compressed:  # it is unpacked by now, and what happens to the archive does not matter
        path.unlink()
        assert len(read_all(dataset)) == 20
        return
    before = read_all(dataset)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    (path if how == "in place" else other).write_bytes(content)
    if how != "in place":
        os.replace(other, path)
    os.utime(path, ns=(1, 1))  # clocks of file systems are coarse
    with pytest.raises(CalibrationError, match=r"d\.npz, array 'x': the file was changed while it was in"):
        read_all(dataset)
    assert len(before) == 20


def test_an_archive_that_changes_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=samples(20))
    array = array_data.PackedArray(
        path, "x.npy", shape=(20, 3, 4, 4), dtype=FLOAT, where="d", spill=array_data.SpillFolder()
    )
    np.savez_compressed(path, x=samples(20, seed=1))
    os.utime(path, ns=(1, 1))
    with pytest.raises(CalibrationError, match=r"d: the file (was changed|ends too early)"):
        array.read(np.arange(3))


def test_an_image_that_changes_midway(tmp_path: Path) -> None:
    write_images(tmp_path, 6)
    dataset = open_dataset(tmp_path, [X])
    read_all(dataset)
    (tmp_path / "003.png").write_bytes((tmp_path / "004.png").read_bytes())
    os.utime(tmp_path / "003.png", ns=(1, 1))
    with pytest.raises(CalibrationError, match=r"003\.png: the file was changed while it was in use"):
        read_all(dataset)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_disk_that_is_full_when_data_is_unpacked_is_not_taken_for_damage(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=samples(200))
    folder = tmp_path / "folder"
    folder.mkdir()
    np.save(folder / "f.npy", np.asfortranarray(samples(200)))

    def read() -> None:
        limit_files(10_000)
        for data in (path, folder):
            with pytest.raises(CalibrationError, match=r"be unpacked into .* \(File too large\); free"):
                open_dataset(data, [X], work_dir=tmp_path)

    ended = run_fork(read)
    assert ended.code == 0, ended.err
    assert not list(tmp_path.glob("hap-onnx-*/*"))


def test_no_room_to_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=samples(20))
    monkeypatch.setattr(array_data.SpillFolder, "free_bytes", lambda self, path: 10)
    with pytest.raises(CalibrationError, match="which is more than is free"):
        open_dataset(tmp_path / "d.npz", [X])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: p / "missing", "missing: no such file or folder"),
        (lambda p: p, "holds no .npz, .npy or image files"),
        (lambda p: _touch(p / "d.csv"), "not a form of data that is known"),
        (lambda p: _touch(p / "d.npy"), "put it into a folder"),
        (lambda p: _touch(p / "d.png"), "put it into a folder"),
        (lambda p: 3, "The data is a int"),
        (lambda p: b"abc", "The data is a bytes"),
        (lambda p: [], "empty iterable"),
        (lambda p: [samples(3)], "Item 0 .* is a ndarray; each item must be a dict"),
    ],
)
def test_data_that_is_none(tmp_path: Path, make: Callable[[Path], Any], match: str) -> None:
    with pytest.raises(CalibrationError, match=match):
        open_dataset(make(tmp_path), [X])


def _touch(path: Path) -> Path:
    path.touch()
    return path


def test_one_array_for_two_inputs() -> None:
    with pytest.raises(CalibrationError, match="one array but the model has 2 inputs"):
        open_dataset(samples(5), [X, MASK])


def test_requests_without_meaning(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--preprocess is for folders of images"):
        open_dataset({"x": samples(5)}, [X], preprocess="unit")
    with pytest.raises(UsageError, match="--max-samples"):
        open_dataset({"x": samples(5)}, [X], max_samples=0)


def test_scalar_input() -> None:
    with pytest.raises(CalibrationError, match="no batch axis"):
        open_dataset({"x": np.ones(5)}, [InputSpec("x", FLOAT, ())])


# --- subsets and splits --------------------------------------------------------------------------


def small(n: int, labels: np.ndarray | None = None) -> Dataset:
    """A dataset whose only value per sample is its number."""
    arrays = {"x": np.arange(n, dtype=np.float32)[:, None]}
    return open_dataset(
        arrays | ({} if labels is None else {"labels": labels}), [InputSpec("x", FLOAT, ("N", 1))]
    )


def members(subset: Subset) -> list[int]:
    return [int(value) for batch in subset.batches(7) for value in batch.inputs["x"][:, 0]]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(5, 200), seed=st.integers(0, 2**32), n_classes=st.integers(0, 12))
def test_split_is_a_deterministic_partition(n: int, seed: int, n_classes: int) -> None:
    labels = np.random.default_rng(seed).integers(0, n_classes, n) if n_classes else None
    dataset = small(n, labels)
    splits = split_dataset(dataset, seed=seed)
    parts = [splits.calibrate, splits.choose, splits.report]
    assert sorted(i for part in parts for i in members(part)) == list(range(n))
    assert splits.choose.n_samples == splits.report.n_samples == max(1, round(0.2 * n))
    again = split_dataset(dataset, seed=seed)
    assert members(again.calibrate) == members(splits.calibrate)
    assert members(again.report) == members(splits.report)
    if labels is not None:
        for part, share in zip(parts, (0.6, 0.2, 0.2), strict=True):
            np.testing.assert_array_equal(part.labels, labels[members(part)])
            got, wanted = (
                np.bincount(part.labels, minlength=n_classes),
                share * np.bincount(labels, minlength=n_classes),
            )
            assert (abs(got - wanted) <= 0.15 * n**0.5 + 4).all()


def test_seeds_differ() -> None:
    dataset = small(50)
    assert members(split_dataset(dataset, seed=0).report) != members(split_dataset(dataset, seed=1).report)


def test_any_prefix_is_balanced() -> None:
    labels = np.repeat(np.arange(5), [100, 100, 100, 100, 100])
    calibrate = split_dataset(small(500, labels), seed=0).calibrate
    first = calibrate.take(50)
    assert first.n_samples == 50
    assert first.labels is not None
    assert np.bincount(first.labels, minlength=5).min() >= 7


def test_val_is_the_report_part() -> None:
    data, val = small(40), small(9)
    splits = split_dataset(data, seed=0, val=val)
    assert splits.report.dataset is val
    assert sorted(members(splits.report)) == list(range(9))
    assert (splits.calibrate.n_samples, splits.choose.n_samples) == (30, 10)
    assert sorted(members(splits.calibrate) + members(splits.choose)) == list(range(40))


def test_val_with_other_classes(tmp_path: Path) -> None:
    for folder, names in (("data", ("a", "b", "c")), ("val", ("a", "c"))):
        for name in names:
            write_images(tmp_path / folder / name, 2)
    data, val = (open_dataset(tmp_path / folder, [X]) for folder in ("data", "val"))
    with pytest.raises(CalibrationError, match=r"same classes.txt into both"):
        split_dataset(data, seed=0, val=val)


@pytest.mark.parametrize("n", [1, 4])
def test_too_few_samples(n: int) -> None:
    with pytest.raises(CalibrationError, match=f"has {n} sample.*at least 5"):
        split_dataset(small(n), seed=0)


def test_max_samples_is_seeded_balanced_and_nested() -> None:
    x, labels = samples(60), np.repeat(np.arange(3), [40, 10, 10])
    data = {"x": x, "labels": labels}

    def chosen(n: int, seed: int = 0) -> Dataset:
        return open_dataset(data, [X], max_samples=n, seed=seed)

    assert chosen(30).n_samples == 30
    assert read_all(chosen(30)).tobytes() == read_all(chosen(30)).tobytes()
    assert read_all(chosen(30)).tobytes() != read_all(chosen(30, seed=1)).tobytes()
    counts = np.bincount(chosen(30).labels)
    assert (abs(counts - [20, 5, 5]) <= 2).all()
    few, many = ({row.tobytes() for row in read_all(chosen(n))} for n in (10, 30))
    assert few < many
    assert chosen(100).n_samples == 60
    for row, label in zip(read_all(chosen(12)), chosen(12).labels, strict=True):
        at = int(np.flatnonzero((x == row).all(axis=(1, 2, 3)))[0])
        assert labels[at] == label


def test_max_samples_reads_only_what_it_chose(tmp_path: Path) -> None:
    x = samples(40)
    keep = read_all(open_dataset({"x": x}, [X], max_samples=5))
    unused = [i for i in range(40) if not (keep == x[i]).all(axis=(1, 2, 3)).any()]
    x[unused] = np.nan
    assert open_dataset({"x": x}, [X], max_samples=5).n_samples == 5


def test_messages_name_no_internals() -> None:
    with pytest.raises(CalibrationError) as caught:
        open_dataset({"y": samples(4)}, [X])
    assert not re.search(r"Traceback|0x[0-9a-f]+|<.*object", str(caught.value))


# --- shared models' data -------------------------------------------------------------------------

SHARED = os.environ.get("HAP_ONNX_SHARED")


@pytest.mark.skipif(SHARED is None, reason="HAP_ONNX_SHARED is not set")
def test_photographs_for_the_face_detector(tmp_path: Path) -> None:
    assert SHARED is not None
    (tmp_path / "face.toml").write_text('[image]\nresize = "stretch"\nmean = 127\nstd = 128\n')
    spec = InputSpec("input", FLOAT, (1, 3, 240, 320))
    dataset = open_dataset(
        Path(SHARED) / "data" / "faces", [spec], preprocess=tmp_path / "face.toml", max_samples=5
    )
    (batch,) = dataset.batches(range(5), 5)
    assert batch.inputs["input"].shape == (5, 3, 240, 320)
    assert -1 <= batch.inputs["input"].min() < -0.5
    assert 0.5 < batch.inputs["input"].max() <= 1
