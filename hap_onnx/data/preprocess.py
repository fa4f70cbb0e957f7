"""How an image file becomes a model input.

Every recipe ends in ``(pixel * scale - mean) / std``, with pixels of 0 to 255 and one mean and std
per channel (or one for all). The presets:

- ``imagenet``: shorter side resized to 256/224 of the input, then a centre crop (an image that already
  has the input's size is taken as it is); (x / 255 - mean) / std of ImageNet.
- ``unit``: resized until it just covers the input, then a centre crop; x / 255, so 0 to 1.
- ``signed``: the same geometry; (x - 127.5) / 127.5, so -1 to 1.
- ``raw``: the same geometry; 0 to 255.

Anything else is a TOML file with one table, here with all its keys::

    [image]
    resize = "shorter"            # "shorter" (default), "stretch" or "none"
    size = 256                    # shorter side, or [height, width] to cover (shorter) or reach (stretch)
    crop = [224, 224]             # centre crop; default: the model's input size
    interpolation = "bilinear"    # nearest, bilinear (default), bicubic, lanczos or box
    color = "rgb"                 # rgb, bgr or gray; default by the model's number of channels
    layout = "nchw"               # nchw or nhwc; default by the model's shape
    scale = "1/255"               # a number, or a fraction as text; default 1
    mean = [0.485, 0.456, 0.406]  # after scaling; default 0
    std = [0.229, 0.224, 0.225]   # default 1

EXIF rotation is not applied, as in the usual training pipelines.
"""

from __future__ import annotations

import difflib
import functools
import math
import struct
import sys
import warnings
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from hap_onnx.errors import CalibrationError, UsageError
from hap_onnx.model.input_spec import InputSpec, format_shape, is_float
from hap_onnx.text_files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PRESETS = ("imagenet", "unit", "signed", "raw")
DEFAULT_SIDE = 224

_KEYS = ("resize", "size", "crop", "interpolation", "color", "layout", "scale", "mean", "std")
_RESIZES = ("shorter", "stretch", "none")
_COLORS = ("rgb", "bgr", "gray")
_LAYOUTS = ("nchw", "nhwc")
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# What Pillow's decoders raise on damaged, cut, or over-sized files.
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, OverflowError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


class UnreadableImageError(Exception):
    """One image file cannot be decoded; the message says why. Callers decide whether to skip it."""


@dataclass(frozen=True)
class Preprocessing:
    """A complete recipe for one model input; make it with `resolve_preprocessing`.

    ``resize_to`` is the shorter side or (height, width); None means no resizing. ``output`` is the
    (height, width) after the centre crop; None means that the image's own size stays.
    ``assumed`` lists what neither the user nor the model said.
    """

    name: str
    resize: str
    resize_to: int | tuple[int, int] | None
    output: tuple[int, int] | None
    interpolation: str
    color: str
    layout: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    keep_matching: bool = False
    assumed: tuple[str, ...] = ()

    def describe(self) -> str:
        """One sentence for the user: everything that happens to an image."""
        steps = [{"rgb": "RGB", "bgr": "BGR", "gray": "grey"}[self.color]]
        if self.resize_to is not None:
            steps.append(self._describe_resize())
        if self.output is not None and not (self.resize == "stretch" and self.resize_to == self.output):
            steps.append(f"centre crop to {self.output[0]}x{self.output[1]}")
        values = (
            "x" if self.scale == 1 else f"x/{1 / self.scale:.6g}" if self.scale < 1 else f"x*{self.scale:.6g}"
        )
        if any(self.mean) or any(s != 1 for s in self.std):
            values = f"({values} - {_format_numbers(self.mean)}) / {_format_numbers(self.std)}"
        elif values == "x":
            values = "pixel values as they are"
        steps += [values, f"layout {self.layout.upper()}"]
        sentence = f"Images are preprocessed by '{self.name}': " + ", ".join(steps)
        return sentence + "".join(f"; {text}" for text in self.assumed) + "."

    def _describe_resize(self) -> str:
        to, how = self.resize_to, self.interpolation
        if self.resize == "stretch":
            assert isinstance(to, tuple)
            text = f"stretched to {to[0]}x{to[1]} ({how})"
        elif isinstance(to, tuple):
            text = f"resized to cover {to[0]}x{to[1]} ({how})"
        else:
            text = f"shorter side resized to {to} ({how})"
        return text + (" unless it has the input's size already" if self.keep_matching else "")


@dataclass(frozen=True)
class _Request:
    """What a preset or a TOML file asks for; None is left to the model."""

    name: str
    resize: str = "shorter"
    size: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    color: str | None = None
    layout: str | None = None
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    margin: float = 1.0
    keep_matching: bool = False
    assumed: tuple[str, ...] = ()


_PRESET_REQUESTS = {
    "imagenet": _Request("imagenet", scale=1 / 255, mean=IMAGENET_MEAN, std=IMAGENET_STD,
                         margin=256 / 224, keep_matching=True),
    "unit": _Request("unit", scale=1 / 255),
    "signed": _Request("signed", mean=(127.5,), std=(127.5,)),
    "raw": _Request("raw"),
}  # fmt: skip


def resolve_preprocessing(preprocess: str | Path | Preprocessing | None, spec: InputSpec) -> Preprocessing:
    """The recipe for ``spec``: a preset's word, the path of a TOML file, or None for the default.

    Raises UsageError for an unknown word or a mistake in the TOML file, and CalibrationError when
    the recipe or images in general do not fit the model's input.
    """
    if isinstance(preprocess, Preprocessing):
        return preprocess
    if len(spec.shape) != 4:
        raise CalibrationError(
            f"A folder of images needs a model input of 4 axes, [N, C, H, W] or [N, H, W, C], but the "
            "input is "
            f"{spec}; give the data as .npz arrays instead."
        )
    layout, layout_assumed = _infer_layout(spec)
    channels_axis = 1 if layout == "nchw" else 3
    request = _find_request(preprocess, spec, spec.shape[channels_axis])
    if request.layout is not None and request.layout != layout:
        layout, layout_assumed, channels_axis = request.layout, (), 1 if request.layout == "nchw" else 3
    elif request.layout is not None:
        layout_assumed = ()
    color, color_assumed = _resolve_color(request, spec, spec.shape[channels_axis])
    spatial = spec.shape[2:4] if layout == "nchw" else spec.shape[1:3]
    output, size_assumed = _resolve_output(request, spec, spatial)
    _check_values(request, spec, n_channels=1 if color == "gray" else 3)
    return Preprocessing(
        name=request.name,
        resize=request.resize,
        resize_to=_resolve_resize(request, output),
        output=output,
        interpolation=request.interpolation,
        color=color,
        layout=layout,
        scale=request.scale,
        mean=request.mean,
        std=request.std,
        keep_matching=request.keep_matching,
        assumed=request.assumed + layout_assumed + color_assumed + size_assumed,
    )


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that are read, whatever a file's name says: for others Pillow may run programs."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def load_image(path: Path, *, check_only: bool = False) -> Image.Image:
    """Decode an image file completely to mode RGB or L (grey files stay grey).

    ``check_only`` decodes JPEG files at an eighth of their size: all bytes are read, in less time.
    Raises UnreadableImageError for anything that Pillow cannot decode, or judges a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_formats()) as image:
                if check_only:
                    image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
                return _to_eight_bits(image)
    except FileNotFoundError as error:
        raise UnreadableImageError("the file is not there any more") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError("not an image") from error
    except _DECODE_ERRORS as error:
        raise UnreadableImageError(str(error) or type(error).__name__) from error


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) from the file's header. Raises UnreadableImageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_formats()) as image:
                return image.height, image.width
    except _DECODE_ERRORS as error:
        raise UnreadableImageError(str(error) or type(error).__name__) from error


def output_size(recipe: Preprocessing, size: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) that an image of ``size`` leaves `preprocess_image` with."""
    if recipe.output is not None:
        return recipe.output
    return size if recipe.resize_to is None else _resized_size(recipe, size)


def preprocess_image(image: Image.Image, recipe: Preprocessing) -> np.ndarray:
    """A decoded image as float32 [C, H, W] or [H, W, C].

    Raises CalibrationError when nothing resizes the image and it is smaller than the crop.
    """
    image = image.convert("L" if recipe.color == "gray" else "RGB")
    matches = recipe.output == (image.height, image.width)
    if recipe.resize_to is not None and not (recipe.keep_matching and matches):
        height, width = _resized_size(recipe, (image.height, image.width))
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), _FILTERS[recipe.interpolation])
    if recipe.output is not None and recipe.output != (image.height, image.width):
        image = _centre_crop(image, recipe.output)
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels  # [H, W, C]
    if recipe.color == "bgr":
        pixels = pixels[:, :, ::-1]
    mean, std = np.asarray(recipe.mean, np.float32), np.asarray(recipe.std, np.float32)
    values = (pixels * np.float32(recipe.scale) - mean) / std
    return np.ascontiguousarray(values.transpose(2, 0, 1) if recipe.layout == "nchw" else values)


def nearest_word(word: str, words: Collection[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``words``, or an empty text."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def _find_request(preprocess: str | Path | None, spec: InputSpec, channels: int | str | None) -> _Request:
    if preprocess is None:
        return _default_request(spec, channels)
    word = str(preprocess)
    if word in _PRESET_REQUESTS:
        request = _PRESET_REQUESTS[word]
        if len(request.mean) == 3 and channels == 1:
            raise UsageError(
                f"--preprocess {word} is for 3 channels but the model's input {spec} has 1; use unit, "
                "signed, raw "
                "or a TOML file."
            )
        return request
    path = Path(preprocess)
    if not path.is_file():
        raise UsageError(
            f"--preprocess '{word}' is neither a preset ({', '.join(PRESETS)}) nor the path of a TOML file"
            + (nearest_word(word, PRESETS) or ".")
        )
    return _read_request(path)


def _default_request(spec: InputSpec, channels: int | str | None) -> _Request:
    hint = "choose another with --preprocess"
    if not is_float(spec.dtype):
        return replace(_PRESET_REQUESTS["raw"], assumed=(f"the default for {spec.dtype} inputs, {hint}",))
    if channels == 1:
        return replace(_PRESET_REQUESTS["unit"], assumed=(f"the default for 1-channel images, {hint}",))
    return replace(_PRESET_REQUESTS["imagenet"], assumed=(f"the default for 3-channel images, {hint}",))


def _read_request(path: Path) -> _Request:
    try:
        table = tomllib.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a readable TOML file ({error}).") from error
    for key in table:
        if key != "image":
            hint = " (put it under a line [image])" if key in _KEYS else nearest_word(key, ("image",))
            raise UsageError(f"{path}: unknown entry '{key}', only the table [image] is allowed{hint or '.'}")
    image = table.get("image")
    if not isinstance(image, dict):
        raise UsageError(f"{path}: has no table [image]; its keys are {', '.join(_KEYS)}.")
    for key in image:
        if key not in _KEYS:
            close = nearest_word(key, _KEYS)
            raise UsageError(
                f"{path}: unknown key '{key}' in [image]{close or '; the keys are ' + ', '.join(_KEYS)}."
            )
    return _parse_request(path, image)


def _parse_request(path: Path, image: Mapping[str, Any]) -> _Request:
    crop = _parse_size(path, image, "crop")
    request = _Request(
        name=path.name,
        resize=_parse_word(path, image, "resize", _RESIZES) or "shorter",
        size=_parse_size(path, image, "size"),
        crop=(crop, crop) if isinstance(crop, int) else crop,
        interpolation=_parse_word(path, image, "interpolation", tuple(_FILTERS)) or "bilinear",
        color=_parse_word(path, image, "color", _COLORS),
        layout=_parse_word(path, image, "layout", _LAYOUTS),
        scale=_parse_scale(path, image),
        mean=_parse_numbers(path, image, "mean", 0.0),
        std=_parse_numbers(path, image, "std", 1.0),
    )
    if any(value == 0 for value in request.std):
        raise UsageError(f"{path}: std must not be 0.")
    if request.resize == "none" and request.size is not None:
        raise UsageError(f'{path}: size has no meaning with resize = "none"; remove one of the two.')
    if request.resize == "stretch" and isinstance(request.size, int):
        return replace(request, size=(request.size, request.size))
    return request


def _parse_word(path: Path, image: Mapping[str, Any], key: str, words: tuple[str, ...]) -> str | None:
    value = image.get(key)
    if value is None or value in words:
        return value
    raise UsageError(
        f"{path}: {key} must be one of {', '.join(words)}, got "
        f"{value!r}{nearest_word(str(value), words) or '.'}"
    )


def _parse_size(path: Path, image: Mapping[str, Any], key: str) -> int | tuple[int, int] | None:
    value = image.get(key)
    if value is None:
        return None
    sides = value if isinstance(value, list) else [value]
    if len(sides) in (1, 2) and all(type(side) is int and side > 0 for side in sides):
        return sides[0] if len(sides) == 1 else (sides[0], sides[1])
    raise UsageError(f"{path}: {key} must be a positive whole number or [height, width], got {value!r}.")


def _parse_scale(path: Path, image: Mapping[str, Any]) -> float:
    value = image.get("scale", 1)
    try:
        scale = float(Fraction(value)) if isinstance(value, str) else float(_number(value))
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise UsageError(
            f'{path}: scale must be a number or a fraction such as "1/255", got {value!r}.'
        ) from error
    if not math.isfinite(scale) or scale <= 0:
        raise UsageError(f"{path}: scale must be positive and finite, got {value!r}.")
    return scale


def _parse_numbers(path: Path, image: Mapping[str, Any], key: str, default: float) -> tuple[float, ...]:
    value = image.get(key, default)
    items = value if isinstance(value, list) else [value]
    try:
        numbers = tuple(float(_number(item)) for item in items)
    except (TypeError, OverflowError) as error:
        raise UsageError(
            f"{path}: {key} must be a number or a list with one per channel, got {value!r}."
        ) from error
    if len(numbers) not in (1, 3) or not all(math.isfinite(number) for number in numbers):
        raise UsageError(f"{path}: {key} must be 1 finite number or 3, got {value!r}.")
    return numbers


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(value)
    return value


def _infer_layout(spec: InputSpec) -> tuple[str, tuple[str, ...]]:
    if spec.shape[1] in (1, 3):
        return "nchw", ()
    if spec.shape[3] in (1, 3):
        return "nhwc", ()
    return "nchw", ("the layout is assumed, the model does not say it",)


def _resolve_color(
    request: _Request, spec: InputSpec, channels: int | str | None
) -> tuple[str, tuple[str, ...]]:
    if isinstance(channels, int) and channels not in (1, 3):
        raise CalibrationError(
            f"Images have 1 or 3 channels but the model's input {spec} has {channels}; give the data as "
            ".npz arrays "
            "instead, or set layout in a TOML file for --preprocess."
        )
    if request.color is not None:
        wanted = 1 if request.color == "gray" else 3
        if isinstance(channels, int) and channels != wanted:
            raise CalibrationError(
                f'{request.name}: color = "{request.color}" gives {wanted} channel(s) but '
                f"the model's input {spec} has {channels}."
            )
        return request.color, ()
    if channels == 1:
        return "gray", ()
    return "rgb", () if channels == 3 else ("RGB is assumed, the model does not say its channels",)


def _resolve_output(
    request: _Request, spec: InputSpec, spatial: tuple[int | str | None, ...]
) -> tuple[tuple[int, int] | None, tuple[str, ...]]:
    """(height, width) that the model gets, or None to keep each image's own."""
    asked = request.crop
    if asked is None and request.resize == "stretch" and isinstance(request.size, tuple):
        asked = request.size
    if asked is not None:
        for got, wanted in zip(asked, spatial, strict=True):
            if isinstance(wanted, int) and got != wanted:
                raise CalibrationError(
                    f"{request.name}: makes images of {asked[0]}x{asked[1]} but the model's input {spec} "
                    "wants "
                    f"{format_shape(spatial)} (height, width); set crop to that or leave it out."
                )
        return asked, ()
    if request.resize == "none":
        return None, ()  # images must have the model's size already: checked when the folder is opened
    size = request.size if request.size is not None else DEFAULT_SIDE
    free = (size, size) if isinstance(size, int) else size
    output = tuple(side if isinstance(side, int) else free[i] for i, side in enumerate(spatial))
    assumed: tuple[str, ...] = ()
    if request.size is None and not all(isinstance(side, int) for side in spatial):
        assumed = (f"the model leaves its image size open, so {output[0]}x{output[1]} is assumed "
                   "(a TOML file for --preprocess can set another)",)  # fmt: skip
    return (output[0], output[1]), assumed


def _resolve_resize(request: _Request, output: tuple[int, int] | None) -> int | tuple[int, int] | None:
    if request.resize == "none":
        return None
    if request.size is not None:
        return request.size
    assert output is not None
    sides = (round(output[0] * request.margin), round(output[1] * request.margin))
    return sides[0] if request.resize == "shorter" and sides[0] == sides[1] else sides


def _check_values(request: _Request, spec: InputSpec, *, n_channels: int) -> None:
    for key, numbers in (("mean", request.mean), ("std", request.std)):
        if len(numbers) not in (1, n_channels):
            raise CalibrationError(
                f"{request.name}: {key} has {len(numbers)} numbers for {n_channels} channel."
            )
    plain = request.scale == 1 and not any(request.mean) and all(s == 1 for s in request.std)
    if not is_float(spec.dtype) and (spec.dtype.kind not in "iu" or not plain):
        raise CalibrationError(
            f"The model's input {spec} does not take scaled pixels"
            + (
                "; use --preprocess raw."
                if spec.dtype.kind in "iu"
                else "; give the data as .npz arrays instead."
            )
        )


def _resized_size(recipe: Preprocessing, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) after resizing; never smaller than the crop that follows."""
    to = recipe.resize_to
    assert to is not None
    if recipe.resize == "stretch":
        assert isinstance(to, tuple)
        return to
    height, width = size
    if isinstance(to, int):  # rounds down, as torchvision does
        short = min(height, width)
        resized = (to, to * width // short) if height == short else (to * height // short, to)
        if recipe.output is None or (resized[0] >= recipe.output[0] and resized[1] >= recipe.output[1]):
            return resized
        to = recipe.output
    factor = max(to[0] / height, to[1] / width)
    return max(to[0], round(height * factor)), max(to[1], round(width * factor))


def _centre_crop(image: Image.Image, output: tuple[int, int]) -> Image.Image:
    height, width = output
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    if top < 0 or left < 0 or image.height < height or image.width < width:
        raise CalibrationError(
            f"an image of {image.height}x{image.width} is smaller than the model's {height}x{width} and "
            "resizing "
            'is off; set resize to "shorter" or "stretch".'
        )
    return image.crop((left, top, left + width, top + height))


def _to_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip at 255 instead of scaling
        return Image.fromarray((np.asarray(image, dtype=np.uint16) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode '{image.mode}' have no known range")
    return image.copy() if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "LA" else "RGB")


def _format_numbers(numbers: tuple[float, ...]) -> str:
    texts = [f"{number:.6g}" for number in numbers]
    return texts[0] if len(texts) == 1 else "(" + ", ".join(texts) + ")"
