"""Attention and its relatives against onnxruntime, and second derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import gradgradcheck

from hap_onnx.ops.attention import Attention, RotaryEmbedding, TensorScatter, _macs_attention
from tests.helpers import check_node, rand

B, H, G, S, T, D, E = 2, 4, 2, 3, 5, 6, 8  # samples, query and key heads, queries, keys, sizes of q and v


def _check(*optional: np.ndarray | None, merged: bool = False, n_outputs: int = 1, **attributes: Any) -> None:
    q, k, v = rand(B, H, S, D), rand(B, G, T, D, seed=1), rand(B, G, T, E, seed=2)
    if merged:
        q, k, v = (x.transpose(0, 2, 1, 3).reshape(B, x.shape[2], -1) for x in (q, k, v))
        attributes.update(q_num_heads=H, kv_num_heads=G)
    opset = attributes.pop("opset", 23)
    check_node(
        "Attention", q, k, v, *optional, n_outputs=n_outputs, opset=opset, tolerance=1e-4, **attributes
    )


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("opset", [23, 24])
def test_attention_equals_onnxruntime(merged: bool, opset: int) -> None:
    _check(merged=merged, opset=opset)
    _check(merged=merged, opset=opset, scale=0.3)
    _check(merged=merged, opset=opset, softcap=0.7)


@pytest.mark.parametrize("shape", [(S, T), (H, S, T), (B, H, S, T), (B, 1, S, T)])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("is_causal", [0, 1])
def test_masks_equal_onnxruntime(shape: tuple[int, ...], kind: str, is_causal: int) -> None:
    mask = rand(*shape, seed=3)
    if kind == "bool":
        mask = mask > -0.5
        mask[..., 0] = True  # every query sees one key at least
    _check(mask, is_causal=is_causal)


def test_a_mask_may_be_the_same_for_all_queries() -> None:  # onnxruntime wants a row for each
    q, k, v = torch.randn(B, H, S, D), torch.randn(B, G, T, D), torch.randn(B, G, T, E)
    mask = torch.randn(B, 1, 1, T)
    torch.testing.assert_close(Attention(q, k, v, mask), Attention(q, k, v, mask.expand(B, 1, S, T)))


@pytest.mark.parametrize("is_causal", [0, 1])
def test_a_past_comes_before_the_keys(is_causal: int) -> None:
    past = rand(B, G, 4, D, seed=4), rand(B, G, 4, E, seed=5)
    for merged in (False, True):
        _check(None, *past, n_outputs=3, is_causal=is_causal, merged=merged)


def test_padded_keys_are_not_seen() -> None:
    _check(None, None, None, np.array([2, 5]), opset=24)
    mask = rand(B, 1, S, T, seed=3)
    _check(mask, None, None, np.array([4, 3]), opset=24)


def test_a_query_without_keys_gives_zeros_and_no_nan_in_gradients() -> None:
    q, k, v = (torch.randn(1, 1, 2, 3, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False], [False, False]])
    y = Attention(q, k, v, mask)
    assert torch.equal(y[0, 0, 1], torch.zeros(3))
    for gradient in torch.autograd.grad(y.square().sum(), (q, k, v)):
        assert torch.isfinite(gradient).all()


def test_windows_bound_what_a_query_sees() -> None:
    q, k, v = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), torch.eye(4)[None, None]
    y = Attention(q, k, v, left_window_size=1, right_window_size=0)
    wanted = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5]])
    assert torch.allclose(y[0, 0], wanted)


def test_attention_is_twice_differentiable() -> None:
    q, k, v = (torch.randn(1, n, 3, 2, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1))
    mask = torch.tensor([[True, False, True], [False, True, True], [True, True, False]])
    assert gradgradcheck(lambda *x: Attention(*x, mask, softcap=2.0), (q, k, v))


def test_macs_count_both_products() -> None:
    split = [(B, H, S, D), (B, G, T, D), (B, G, T, E)]
    merged = [(B, S, H * D), (B, T, G * D), (B, T, G * E)]

    class Node:
        attrs: dict[str, int] = {"q_num_heads": H, "kv_num_heads": G}  # noqa: RUF012

    for shapes in (split, merged):
        assert _macs_attention(Node(), shapes, []) == B * H * S * T * (D + E)
    assert _macs_attention(Node(), [*split, None, (B, G, 4, D)], []) == B * H * S * (T + 4) * (D + E)


# --- RotaryEmbedding, TensorScatter ---


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("width", [0, 4])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("by_position", [False, True])
def test_rotary_embedding_equals_onnxruntime(
    interleaved: int, width: int, merged: bool, by_position: bool
) -> None:
    x = rand(B, H, S, D) if not merged else rand(B, S, H * D)
    shape = (10, (width or D) // 2) if by_position else (B, S, (width or D) // 2)
    positions = np.array([[0, 1, 2], [7, 8, 9]]) if by_position else None
    attributes = {"num_heads": H} if merged else {}
    check_node(
        "RotaryEmbedding", x, rand(*shape, seed=1), rand(*shape, seed=2), positions, opset=23,
        interleaved=interleaved, rotary_embedding_dim=width, **attributes,
    )  # fmt: skip


def test_rotary_embedding_keeps_lengths() -> None:
    angle = torch.randn(1, S, D // 2)
    x = torch.randn(1, H, S, D)
    y = RotaryEmbedding(x, torch.cos(angle), torch.sin(angle))
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), atol=1e-5)


@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_tensor_scatter_writes_each_sample_at_its_place(mode: str) -> None:
    start = [3, 1] if mode == "circular" else [2, 0]
    cache, update = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 2, 5)
    wanted = cache.clone()
    for sample in range(2):
        for step in range(2):
            wanted[sample, :, (start[sample] + step) % 4] = update[sample, :, step]
    assert torch.equal(TensorScatter(cache, update, torch.tensor(start), mode=mode), wanted)
    assert torch.equal(TensorScatter(cache, update)[:, :, :2], update)
    moved = TensorScatter(
        cache.transpose(1, 2), update.transpose(1, 2), torch.tensor(start), axis=1, mode=mode
    )
    assert torch.equal(moved.transpose(1, 2), wanted)
