"""Sampling at computed positions against onnxruntime, and second derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradgradcheck

from hap_onnx.ops.sample import AffineGrid, CenterCropPad, Col2Im, DeformConv, GridSample, MaxUnpool, RoiAlign
from tests.helpers import check_node, rand

# --- GridSample, AffineGrid ---


@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align_corners", [0, 1])
def test_grid_sample_equals_onnxruntime(mode: str, padding_mode: str, align_corners: int) -> None:
    x, grid = rand(2, 3, 5, 4), 1.5 * rand(2, 6, 7, 2, seed=1)  # many points lie outside
    attributes = {"padding_mode": padding_mode, "align_corners": align_corners}
    check_node("GridSample", x, grid, opset=20, mode=mode, tolerance=1e-4, **attributes)
    before = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    check_node("GridSample", x, grid, opset=16, mode=before, tolerance=1e-4, **attributes)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align_corners", [0, 1])
def test_grid_sample_of_volumes_equals_onnxruntime(mode: str, padding_mode: str, align_corners: int) -> None:
    x, grid = rand(1, 2, 3, 4, 5), 1.3 * rand(1, 2, 3, 4, 3, seed=1)
    check_node(
        "GridSample", x, grid, opset=20, mode=mode, padding_mode=padding_mode, align_corners=align_corners,
        tolerance=1e-4,
    )  # fmt: skip


def test_points_that_are_no_numbers_or_far_away_do_no_harm() -> None:
    x, grid = torch.ones(1, 1, 2, 2), torch.tensor([1e30, float("inf"), 0.0, 0.0]).reshape(1, 1, 2, 2)
    y = GridSample(x, grid)
    assert y[0, 0, 0, 0] == 0
    assert y[0, 0, 0, 1] == 1


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_grid_sample_is_twice_differentiable(mode: str) -> None:
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    grid = (torch.rand(1, 3, 2, 2, dtype=torch.float64) * 1.6 - 0.8).requires_grad_()
    assert gradgradcheck(lambda x, grid: GridSample(x, grid, mode=mode), (x, grid))


@pytest.mark.parametrize("size", [[2, 3, 4, 5], [2, 1, 2, 3, 4]])
@pytest.mark.parametrize("align_corners", [0, 1])
def test_affine_grid_equals_torch(size: list[int], align_corners: int) -> None:
    n_axes = len(size) - 2
    theta = torch.randn(2, n_axes, n_axes + 1)
    ours = AffineGrid(theta, size, align_corners=align_corners)
    torch.testing.assert_close(ours, F.affine_grid(theta, size, align_corners=bool(align_corners)))


@pytest.mark.parametrize("align_corners", [0, 1])
def test_affine_grid_equals_onnxruntime(align_corners: int) -> None:
    for size in ([2, 3, 4, 5], [2, 3, 1, 4]):
        check_node(
            "AffineGrid", rand(2, 2, 3), np.array(size), constants=(1,), opset=20, align_corners=align_corners
        )


# --- RoiAlign ---


@pytest.mark.parametrize(
    ("opset", "attributes"),
    [
        (10, {}),
        (16, {"coordinate_transformation_mode": "half_pixel"}),
        (16, {"coordinate_transformation_mode": "output_half_pixel"}),
    ],
)
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align_equals_onnxruntime(
    opset: int, attributes: dict[str, Any], sampling_ratio: int, mode: str
) -> None:
    rois = np.array([[0, 0, 9, 9], [2, 3, 7.5, 8], [-3, -2, 4, 20], [5, 5, 5.5, 5.2]], np.float32)
    check_node(
        "RoiAlign", rand(2, 3, 6, 8), rois, np.array([0, 1, 1, 0]), opset=opset, output_height=2,
        output_width=3, sampling_ratio=sampling_ratio, spatial_scale=0.7, mode=mode, tolerance=1e-4,
        **attributes,
    )  # fmt: skip


def test_roi_align_without_regions_and_its_second_derivatives() -> None:
    empty = RoiAlign(torch.randn(1, 2, 4, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert empty.shape == (0, 2, 1, 1)
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0.3, 0.4, 2.7, 2.9]], dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(
        lambda x, rois: RoiAlign(
            x, rois, torch.tensor([0]), output_height=2, output_width=2, sampling_ratio=2
        ),
        (x, rois),
    )


# --- DeformConv ---


@pytest.mark.parametrize("offset_group", [1, 2])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("with_mask", [False, True])
def test_deform_conv_equals_onnxruntime(offset_group: int, group: int, with_mask: bool) -> None:
    attributes = {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2]}
    x, w, bias = rand(2, 4, 7, 8), rand(6, 4 // group, 3, 2, seed=1), rand(6, seed=2)
    out = (4, 7)
    offset = rand(2, offset_group * 3 * 2 * 2, *out, seed=3)
    mask = rand(2, offset_group * 3 * 2, *out, seed=4) if with_mask else None
    check_node(
        "DeformConv", x, w, offset, bias, mask, opset=19, group=group, offset_group=offset_group,
        tolerance=1e-4, **attributes,
    )  # fmt: skip


def test_deform_conv_without_offsets_is_a_convolution() -> None:
    for n_axes, conv in ((1, F.conv1d), (3, F.conv3d)):
        x, w = torch.randn(2, 3, *[5] * n_axes), torch.randn(4, 3, *[2] * n_axes)
        wanted = conv(x, w)
        offset = torch.zeros(2, 2**n_axes * n_axes, *wanted.shape[2:])
        torch.testing.assert_close(DeformConv(x, w, offset), wanted, rtol=1e-4, atol=1e-5)


def test_deform_conv_is_twice_differentiable() -> None:
    x, w = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 4, 4), (1, 2, 2, 2)))
    offset = (torch.rand(1, 8, 3, 3, dtype=torch.float64) * 0.5 + 0.2).requires_grad_()
    assert gradgradcheck(DeformConv, (x, w, offset))


# --- Col2Im, MaxUnpool, CenterCropPad ---


@pytest.mark.parametrize(
    "attributes",
    [{}, {"strides": [2, 1]}, {"dilations": [1, 2]}, {"pads": [1, 0, 2, 1]}, {"pads": [0, 1, 0, 1]}],
)
def test_col2im_is_the_transpose_of_unfolding(attributes: dict[str, list[int]]) -> None:
    pads = attributes.get("pads", [0] * 4)
    image = torch.randn(2, 3, 5, 6, requires_grad=True)
    padded = F.pad(image, [pads[1], pads[3], pads[0], pads[2]])
    columns = F.unfold(
        padded, (2, 3), dilation=attributes.get("dilations", 1), stride=attributes.get("strides", 1)
    )
    values = torch.randn_like(columns)
    (wanted,) = torch.autograd.grad(columns, image, values)
    torch.testing.assert_close(Col2Im(values, [5, 6], [2, 3], **attributes), wanted)


def test_col2im_equals_onnxruntime() -> None:
    check_node("Col2Im", rand(1, 2 * 4, 9), np.array([4, 4]), np.array([2, 2]), constants=(1, 2), opset=18)
    check_node("Col2Im", rand(1, 8, 12), np.array([3, 4, 3]), np.array([2, 2, 2]), constants=(1, 2), opset=18)


def test_max_unpool_undoes_max_pool() -> None:
    x = torch.randn(2, 3, 4, 6)
    y, index = F.max_pool2d(x, 2, return_indices=True)
    flat = index + torch.arange(6).reshape(2, 3, 1, 1) * 24  # ONNX counts in the whole tensor
    assert torch.equal(MaxUnpool(y, flat, kernel_shape=[2, 2], strides=[2, 2]), F.max_unpool2d(y, index, 2))


def test_max_unpool_equals_onnxruntime() -> None:
    index = np.array([5, 7, 13, 15]).reshape(1, 1, 2, 2)
    window = {"kernel_shape": [2, 2], "strides": [2, 2]}
    check_node("MaxUnpool", rand(1, 1, 2, 2), index, opset=11, **window)
    check_node(
        "MaxUnpool", rand(1, 1, 2, 2), index, np.array([1, 1, 5, 5]), constants=(2,), opset=11, **window
    )


@pytest.mark.parametrize("shape", [[3, 2], [5, 8], [8, 4], [4, 5]])
def test_center_crop_pad_equals_onnxruntime(shape: list[int]) -> None:
    check_node("CenterCropPad", rand(2, 5, 4), np.array(shape), constants=(1,), opset=18, axes=[1, -1])
    check_node("CenterCropPad", rand(5, 4), np.array(shape), constants=(1,), opset=18)


def test_center_crop_pad_keeps_the_middle() -> None:
    assert CenterCropPad(torch.arange(5), [3]).tolist() == [1, 2, 3]
    assert CenterCropPad(torch.ones(2), [4]).tolist() == [0, 1, 1, 0]
