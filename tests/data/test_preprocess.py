"""Images to model inputs: values against arithmetic by hand, and every mistake of a recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hap_onnx.data.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    UnreadableImageError,
    load_image,
    output_size,
    preprocess_image,
    resolve_preprocessing,
)
from hap_onnx.errors import CalibrationError, UsageError
from hap_onnx.model.input_spec import InputSpec

FLOAT = np.dtype(np.float32)


def nchw(height: int | str = 8, width: int | str = 8, channels: int | str = 3) -> InputSpec:
    return InputSpec("x", FLOAT, ("N", channels, height, width))


def noise(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_toml(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("preset", "low", "high"),
    [("unit", 0.0, 1.0), ("signed", -1.0, 1.0), ("raw", 0.0, 255.0)],
)
def test_presets_map_black_and_white(preset: str, low: float, high: float) -> None:
    recipe = resolve_preprocessing(preset, nchw())
    for value, wanted in ((0, low), (255, high)):
        out = preprocess_image(Image.new("RGB", (8, 8), (value,) * 3), recipe)
        assert out.shape == (3, 8, 8)
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, wanted, atol=1e-6)


def test_imagenet_values_of_an_image_of_the_right_size() -> None:
    pixels = noise(8, 8)
    out = preprocess_image(Image.fromarray(pixels), resolve_preprocessing("imagenet", nchw()))
    wanted = (pixels / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(out, wanted.transpose(2, 0, 1), atol=1e-5)


def test_imagenet_geometry_is_resize_256_and_centre_crop_224() -> None:
    recipe = resolve_preprocessing("imagenet", nchw(224, 224))
    assert (recipe.resize_to, recipe.output) == (256, (224, 224))
    image = Image.fromarray(noise(300, 401))
    resized = image.resize((401 * 256 // 300, 256), Image.Resampling.BILINEAR)
    left, top = round((resized.width - 224) / 2), 16
    pixels = np.asarray(resized.crop((left, top, left + 224, top + 224)))
    wanted = (pixels / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(preprocess_image(image, recipe), wanted.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize("preset", ["imagenet", "unit", "signed", "raw"])
@pytest.mark.parametrize("size", [(5, 40), (40, 5), (1, 1), (9, 8), (6, 12), (500, 3)])
@pytest.mark.parametrize("wanted", [(8, 8), (6, 12), (12, 6)])
def test_any_image_fits_any_model(preset: str, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    recipe = resolve_preprocessing(preset, nchw(*wanted))
    assert preprocess_image(Image.fromarray(noise(*size)), recipe).shape == (3, *wanted)
    assert output_size(recipe, size) == wanted


def test_default_depends_on_channels_and_type_and_is_said() -> None:
    three = resolve_preprocessing(None, nchw())
    assert three.name == "imagenet"
    assert "default for 3-channel images" in three.describe()
    assert "(0.485, 0.456, 0.406)" in three.describe()
    one = resolve_preprocessing(None, nchw(channels=1))
    assert (one.name, one.color) == ("unit", "gray")
    whole = resolve_preprocessing(None, InputSpec("x", np.dtype(np.uint8), ("N", 8, 8, 3)))
    assert (whole.name, whole.layout) == ("raw", "nhwc")


def test_symbolic_size_is_assumed_aloud() -> None:
    recipe = resolve_preprocessing("unit", nchw("H", "W"))
    assert recipe.output == (224, 224)
    assert "224x224 is assumed" in recipe.describe()
    half_open = resolve_preprocessing("unit", nchw(96, "W"))
    assert half_open.output == (96, 224)


def test_symbolic_size_from_toml(tmp_path: Path) -> None:
    recipe = resolve_preprocessing(write_toml(tmp_path, "[image]\nsize = 40\n"), nchw("H", "W"))
    assert recipe.output == (40, 40)
    assert "assumed" not in recipe.describe()


def test_everything_unknown_is_assumed_aloud() -> None:
    text = resolve_preprocessing("unit", nchw("H", "W", "C")).describe()
    assert "layout is assumed" in text
    assert "RGB is assumed" in text


def test_detector_recipe_by_toml(tmp_path: Path) -> None:
    path = write_toml(tmp_path, '[image]\nresize = "stretch"\nmean = 127\nstd = 128\n')
    recipe = resolve_preprocessing(path, InputSpec("x", FLOAT, (1, 3, 6, 8)))
    image = Image.fromarray(noise(20, 31))
    wanted = (np.asarray(image.resize((8, 6), Image.Resampling.BILINEAR), np.float32) - 127) / 128
    np.testing.assert_allclose(preprocess_image(image, recipe), wanted.transpose(2, 0, 1), atol=1e-6)
    assert "(x - 127) / 128" in recipe.describe()
    assert "stretched to 6x8" in recipe.describe()


def test_all_keys_by_toml(tmp_path: Path) -> None:
    path = write_toml(
        tmp_path,
        """
        [image]
        resize = "shorter"
        size = 10
        crop = [6, 8]
        interpolation = "nearest"
        color = "bgr"
        layout = "nhwc"
        scale = "1/255"
        mean = [0.1, 0.2, 0.3]
        std = [1, 2, 4]
        """,
    )
    recipe = resolve_preprocessing(path, InputSpec("x", FLOAT, ("N", "H", "W", "C")))
    image = Image.fromarray(noise(20, 30))
    small = np.asarray(image.resize((15, 10), Image.Resampling.NEAREST))[2:8, 4:12]  # round(3.5) is 4
    wanted = (small[:, :, ::-1] / 255 - np.array([0.1, 0.2, 0.3])) / np.array([1, 2, 4])
    np.testing.assert_allclose(preprocess_image(image, recipe), wanted, atol=1e-6)
    assert recipe.assumed == ()


def test_gray_model_gets_gray() -> None:
    pixels = noise(8, 8)
    out = preprocess_image(Image.fromarray(pixels), resolve_preprocessing("raw", nchw(channels=1)))
    np.testing.assert_array_equal(out[0], np.asarray(Image.fromarray(pixels).convert("L"), np.float32))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[image]\nintrepolation = 'box'\n", "unknown key 'intrepolation'.*did you mean 'interpolation'"),
        ("[image]\nstdev = 2\n", "unknown key 'stdev'.*did you mean 'std'"),
        ("[image]\nzzz = 2\n", "the keys are resize, size"),
        ("mean = 3\n", r"put it under a line \[image\]"),
        ("[images]\nmean = 3\n", "did you mean 'image'"),
        ("", r"no table \[image\]"),
        ("[image\n", "not a readable TOML"),
        ("[image]\nresize = 'shortest'\n", "resize must be one of .*did you mean 'shorter'"),
        ("[image]\nsize = 0\n", "size must be a positive"),
        ("[image]\nsize = true\n", "size must be a positive"),
        ("[image]\ncrop = [1, 2, 3]\n", "crop must be a positive"),
        ("[image]\nscale = '1/0'\n", "scale must be a number"),
        ("[image]\nscale = -1\n", "scale must be positive"),
        ("[image]\nstd = 0\n", "std must not be 0"),
        ("[image]\nmean = [1, 2]\n", "mean must be 1 finite number or 3"),
        ("[image]\nmean = 'a'\n", "mean must be a number"),
        ("[image]\nmean = nan\n", "mean must be 1 finite"),
        ("[image]\nresize = 'none'\nsize = 3\n", "size has no meaning"),
    ],
)
def test_mistakes_in_toml(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        resolve_preprocessing(write_toml(tmp_path, text), nchw())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[image]\ncrop = 9\n", "makes images of 9x9"),
        ("[image]\nresize = 'stretch'\nsize = [8, 9]\n", "makes images of 8x9"),
        ("[image]\ncolor = 'gray'\n", "1 channel"),
    ],
)
def test_recipe_that_does_not_fit_the_model(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(CalibrationError, match=match):
        resolve_preprocessing(write_toml(tmp_path, text), nchw())


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'imagenet'"):
        resolve_preprocessing("imagnet", nchw())


def test_three_means_for_one_channel(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is for 3 channels"):
        resolve_preprocessing("imagenet", nchw(channels=1))
    path = write_toml(tmp_path, "[image]\nmean = [1, 2, 3]\n")
    with pytest.raises(CalibrationError, match="mean has 3 numbers for 1 channel"):
        resolve_preprocessing(path, nchw(channels=1))


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (InputSpec("x", FLOAT, ("N", 10)), "needs a model input of 4 axes"),
        (InputSpec("x", FLOAT, ("N", 4, 8, 8)), "1 or 3 channels"),
        (InputSpec("x", np.dtype(bool), ("N", 3, 8, 8)), "give the data as .npz"),
    ],
)
def test_inputs_that_are_no_images(spec: InputSpec, match: str) -> None:
    with pytest.raises(CalibrationError, match=match):
        resolve_preprocessing(None, spec)


def test_scaled_pixels_for_an_integer_input() -> None:
    with pytest.raises(CalibrationError, match="use --preprocess raw"):
        resolve_preprocessing("unit", InputSpec("x", np.dtype(np.uint8), ("N", 3, 8, 8)))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_image_modes(tmp_path: Path, mode: str) -> None:
    value = 255 if mode == "1" else 200  # mode "1" would dither
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(np.full((4, 4), 257 * 200, np.uint16)).save(path)
    else:
        Image.new("L", (4, 4), value).convert("RGB" if mode == "CMYK" else "L").convert(mode).save(path)
    image = load_image(path)
    assert image.mode in ("L", "RGB")
    out = preprocess_image(image, resolve_preprocessing("raw", nchw(4, 4)))
    np.testing.assert_allclose(out, value, atol=1)


def test_damaged_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.png"
    text.write_text("I am no image")
    with pytest.raises(UnreadableImageError, match="not an image"):
        load_image(text)
    whole = tmp_path / "whole.jpg"
    Image.fromarray(noise(64, 64)).save(whole)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:-400])
    for check_only in (True, False):
        with pytest.raises(UnreadableImageError, match="truncated"):
            load_image(cut, check_only=check_only)
        assert load_image(whole, check_only=check_only).mode == "RGB"
    with pytest.raises(UnreadableImageError, match="not there"):
        load_image(tmp_path / "gone.png")
    for limit in (64 * 64 - 1, 100):  # above the limit Pillow warns, above twice the limit it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UnreadableImageError, match="decompression bomb"):
            load_image(whole)
