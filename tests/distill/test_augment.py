"""Images are flipped and shifted as a slow loop does it, and only where the original hardly notices."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hap_onnx.data.calibration import InputSpec, Subset, open_dataset
from hap_onnx.distill import augment
from hap_onnx.distill.augment import (
    AUGMENTATIONS,
    MIN_SIZE,
    SHIFT,
    Augmenter,
    find_augmenter,
    flip,
    shift,
)
from tests.helpers import make_model, make_twin, node, rand

# --- what is done to an image ---


def flipped(image: np.ndarray) -> np.ndarray:
    """Mirror an image [C, H, W], pixel by pixel."""
    result = np.empty_like(image)
    width = image.shape[2]
    for column in range(width):
        result[:, :, column] = image[:, :, width - 1 - column]
    return result


def shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Shift an image [C, H, W], pixel by pixel; edges are repeated."""
    _, height, width = image.shape
    result = np.empty_like(image)
    for row in range(height):
        for column in range(width):
            from_row = min(max(row - down, 0), height - 1)
            from_column = min(max(column - right, 0), width - 1)
            result[:, row, column] = image[:, from_row, from_column]
    return result


def variants(image: np.ndarray, kind: str) -> list[np.ndarray]:
    if kind == "flip":
        return [image, flipped(image)]
    most = [max(1, round(SHIFT * size)) for size in image.shape[1:]]
    return [
        shifted(image, down, right)
        for down in range(-most[0], most[0] + 1)
        for right in range(-most[1], most[1] + 1)
    ]


def which(image: np.ndarray, among: list[np.ndarray]) -> int:
    found = [index for index, one in enumerate(among) if np.array_equal(image, one)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("kind", AUGMENTATIONS)
@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 4),
    channels=st.sampled_from([1, 3, 4]),
    height=st.integers(4, 20),
    width=st.integers(4, 20),
    seed=st.integers(0, 99),
)
def test_each_image_is_one_variant_of_itself(
    kind: str, n: int, channels: int, height: int, width: int, seed: int
) -> None:
    images = rand(n, channels, height, width, seed=seed)
    given_images = torch.from_numpy(images.copy())
    found = AUGMENTATIONS[kind](given_images, np.random.default_rng(seed)).numpy()
    assert (found.dtype, found.shape) == (images.dtype, images.shape)
    np.testing.assert_array_equal(given_images.numpy(), images)  # the samples themselves stay
    for before, after in zip(images, found, strict=True):
        which(after, variants(before, kind))


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_all_variants_are_about_as_frequent(kind: str) -> None:
    image = rand(3, 8, 16)
    among = variants(image, kind)
    n = 200 * len(among)
    images = torch.from_numpy(np.repeat(image[None], n, axis=0))
    found = AUGMENTATIONS[kind](images, np.random.default_rng(2)).numpy()
    counts = np.bincount([which(one, among) for one in found], minlength=len(among))
    expected = n / len(among)
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("augment", [flip, shift])
def test_the_same_state_of_the_generator_gives_the_same_images(augment: Any) -> None:
    images = torch.from_numpy(rand(8, 3, 16, 16))
    first, second = (augment(images, np.random.default_rng((3, 12, 5))) for _ in range(2))
    assert torch.equal(first, second)
    other = augment(images, np.random.default_rng((3, 12, 6)))
    assert not torch.equal(first, other)


def test_an_augmenter_takes_one_kind_after_the_other() -> None:
    images = torch.from_numpy(rand(6, 3, 16, 16))
    augmenter = Augmenter("x", ("flip", "shift"), channels_last=False)
    generator = np.random.default_rng(1)
    expected = shift(flip(images, generator), generator)
    found = augmenter({"x": images}, np.random.default_rng(1))
    assert list(found) == ["x"]
    assert torch.equal(found["x"], expected)


def test_channels_may_be_last_and_other_inputs_stay() -> None:
    images, other = torch.from_numpy(rand(6, 3, 16, 20)), torch.ones(6)
    first = Augmenter("x", ("flip", "shift"), channels_last=False)
    last = Augmenter("x", ("flip", "shift"), channels_last=True)
    expected = first({"x": images}, np.random.default_rng(1))["x"]
    found = last({"other": other, "x": images.movedim(1, -1)}, np.random.default_rng(1))
    assert torch.equal(found["x"], expected.movedim(1, -1))
    assert found["other"] is other


# --- what the original hardly notices ---

SIZE = 16


def subset_of(**arrays: np.ndarray) -> Subset:
    specs = [
        InputSpec(name, array.dtype, ("N", *array.shape[1:]))
        for name, array in arrays.items()
        if name != "labels"
    ]
    return Subset(open_dataset(arrays, specs), np.arange(len(next(iter(arrays.values())))))


def find(model: onnx.ModelProto, **arrays: np.ndarray) -> Augmenter | None:
    outputs = [output.name for output in model.graph.output]
    return find_augmenter(make_twin(model), subset_of(**arrays), outputs=outputs, batch_size=32, seed=0)


def bright(n: int = 96, *, size: int = SIZE, channels: int = 3) -> np.ndarray:
    """Return images [n, channels, size, size] that differ most in the brightness of their channels."""
    return 0.3 * rand(n, channels, size, size) + 2 * rand(n, channels, 1, 1, seed=1)


def classifier(*, size: int = SIZE, channels: int = 3, batch: int | str = "N") -> onnx.ModelProto:
    """Return class scores of the mean colour: no place in the image matters."""
    return make_model(
        [
            node("GlobalAveragePool", ["x"], ["p"]),
            node("Flatten", ["p"], ["f"]),
            node("Gemm", ["f", "w"], ["scores"]),
        ],
        inputs={"x": [batch, channels, size, size]},
        outputs=["scores"],
        weights={"w": rand(channels, 4)},
    )


def test_a_classifier_that_looks_at_colours_takes_both() -> None:
    assert find(classifier(), x=bright()) == Augmenter("x", ("flip", "shift"), channels_last=False)


def test_a_model_written_for_one_image_is_tried_too() -> None:
    assert find(classifier(batch=1), x=bright()) == Augmenter("x", ("flip", "shift"), channels_last=False)


def test_a_classifier_with_channels_last_takes_both() -> None:
    model = make_model(
        [node("ReduceMean", ["x"], ["p"], axes=[1, 2], keepdims=0), node("MatMul", ["p", "w"], ["scores"])],
        inputs={"x": ["N", SIZE, SIZE, 3]},
        outputs=["scores"],
        weights={"w": rand(3, 4)},
    )
    x = np.ascontiguousarray(bright().transpose(0, 2, 3, 1))
    assert find(model, x=x) == Augmenter("x", ("flip", "shift"), channels_last=True)


def test_a_detector_of_left_and_right_is_not_flipped() -> None:
    halves = np.repeat(rand(96, 3, 1, 2, seed=1), SIZE // 2, axis=3)
    weight = np.ones((4, 3, SIZE, SIZE), np.float32) * rand(4, 3, 1, 1, seed=2)
    weight[..., SIZE // 2 :] *= -1
    model = make_model(
        [node("Conv", ["x", "w"], ["h"]), node("Flatten", ["h"], ["scores"])],
        inputs={"x": ["N", 3, SIZE, SIZE]},
        outputs=["scores"],
        weights={"w": weight},
    )
    x = np.ascontiguousarray(np.broadcast_to(halves, (96, 3, SIZE, SIZE)))
    found = find(model, x=x)
    assert found == Augmenter("x", ("shift",), channels_last=False)


def test_a_detector_of_position_is_not_shifted() -> None:
    """A symmetric stripe in the middle: mirrored it is the same, two pixels aside it is not."""
    weight = np.zeros((4, 3, SIZE, SIZE), np.float32)
    weight[..., SIZE // 2 - 1 : SIZE // 2 + 1] = rand(4, 3, 1, 1)
    model = make_model(
        [node("Conv", ["x", "w"], ["h"]), node("Flatten", ["h"], ["y"])],
        inputs={"x": ["N", 3, SIZE, SIZE]},
        outputs=["y"],
        weights={"w": weight},
    )
    half = rand(96, 3, 1, SIZE // 2)
    x = np.repeat(np.concatenate([half, half[..., ::-1]], axis=3), SIZE, axis=2)
    assert find(model, x=np.ascontiguousarray(x)) == Augmenter("x", ("flip",), channels_last=False)


def test_a_model_whose_output_moves_with_the_image_takes_none() -> None:
    weight = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)
    model = make_model(
        [node("Conv", ["x", "w"], ["y"])],
        inputs={"x": ["N", 3, SIZE, SIZE]},
        outputs=["y"],
        weights={"w": weight},
    )
    assert find(model, x=rand(96, 3, SIZE, SIZE)) is None


def test_only_outputs_that_count_are_looked_at() -> None:
    model = make_model(
        [
            node("Relu", ["x"], ["same"]),
            node("GlobalAveragePool", ["x"], ["p"]),
            node("Flatten", ["p"], ["f"]),
            node("Gemm", ["f", "w"], ["scores"]),
        ],
        inputs={"x": ["N", 3, SIZE, SIZE]},
        outputs=["same", "scores"],
        weights={"w": rand(3, 4)},
    )
    twin, subset = make_twin(model), subset_of(x=bright())
    options: dict[str, Any] = {"batch_size": 32, "seed": 0}
    found = find_augmenter(twin, subset, outputs=["scores"], **options)
    assert found is not None
    assert found.kinds == ("flip", "shift")


@pytest.mark.parametrize(
    ("size", "channels"), [(MIN_SIZE - 1, 3), (SIZE, 2), (SIZE, 5), (SIZE, 1), (SIZE, 4)]
)
def test_images_have_enough_pixels_and_one_three_or_four_channels(size: int, channels: int) -> None:
    found = find(classifier(size=size, channels=channels), x=bright(size=size, channels=channels))
    is_image = size >= MIN_SIZE and channels in (1, 3, 4)
    assert (found is not None) == is_image


def test_several_inputs_are_not_augmented() -> None:
    model = make_model(
        [
            node("Add", ["x", "z"], ["sum"]),
            node("GlobalAveragePool", ["sum"], ["p"]),
            node("Flatten", ["p"], ["f"]),
            node("Gemm", ["f", "w"], ["scores"]),
        ],
        inputs={"x": ["N", 3, SIZE, SIZE], "z": ["N", 3, SIZE, SIZE]},
        outputs=["scores"],
        weights={"w": rand(3, 4)},
    )
    assert find(model, x=bright(), z=bright()) is None


def test_sequences_and_integers_are_not_augmented() -> None:
    model = make_model(
        [node("ReduceMean", ["x"], ["p"], axes=[1], keepdims=0), node("MatMul", ["p", "w"], ["scores"])],
        inputs={"x": ["N", SIZE, 3]},
        outputs=["scores"],
        weights={"w": rand(3, 4)},
    )
    assert find(model, x=rand(96, SIZE, 3)) is None
    pixels = np.random.default_rng(0).integers(0, 255, (96, 3, SIZE, SIZE)).astype(np.int64)
    model = make_model(
        [
            node("Cast", ["x"], ["c"], to=onnx.TensorProto.FLOAT),
            node("GlobalAveragePool", ["c"], ["p"]),
            node("Flatten", ["p"], ["f"]),
            node("Gemm", ["f", "w"], ["scores"]),
        ],
        inputs={"x": pixels[:1]},
        outputs=["scores"],
        weights={"w": rand(3, 4)},
    )
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    assert find(model, x=pixels) is None


@pytest.mark.parametrize(("limit", "n"), [(1 << 28, 96), (1, 32), (3 * 32 * 3 * SIZE * SIZE * 4, 64)])
def test_as_many_images_are_tried_as_fit_in_memory(
    monkeypatch: pytest.MonkeyPatch, limit: int, n: int
) -> None:
    monkeypatch.setattr(augment, "TRIED_BYTES", limit)
    seen: list[int] = []
    twin = make_twin(classifier())
    twin.register_forward_hook(lambda module, args, output: seen.append(len(output["scores"])))
    found = find_augmenter(twin, subset_of(x=bright()), outputs=["scores"], batch_size=32, seed=0)
    assert found is not None
    assert seen[0] == 32  # the one that says how large samples are
    assert sum(seen[1:]) == 3 * n  # as they are, flipped, shifted
