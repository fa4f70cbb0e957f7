"""Attention as one operator, and what belongs to it: rotary embeddings and caches.

Shapes: B samples, H query heads (a multiple of the key heads G), S queries, T keys, D numbers per head.
"""

from __future__ import annotations

from math import prod, sqrt
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from torch import Tensor

from hap_onnx.ops.arguments import normalise_axis, together
from hap_onnx.ops.registry import edit_op, flow_op, macs_op, run_op

if TYPE_CHECKING:
    from hap_onnx.coupling.channels import Flow, Ids
    from hap_onnx.surgery import Cut

# --- Attention ---


def _split_heads(x: Tensor, n_heads: int | None) -> Tensor:
    """Return x [B, S, heads * D] as [B, heads, S, D]."""
    if not n_heads:
        raise ValueError("attention over inputs of three axes needs the number of heads")
    return x.reshape(x.shape[0], x.shape[1], n_heads, -1).transpose(1, 2)


def _repeat_heads(x: Tensor, n_heads: int) -> Tensor:
    """Let each key head [B, G, T, D] serve its run of query heads."""
    return x if x.shape[1] == n_heads else x.repeat_interleave(n_heads // x.shape[1], 1)


def _allowed(
    n_queries: int,
    n_keys: int,
    *,
    causal: bool,
    left: int,
    right: int,
    n_past: int,
    n_valid: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Say which keys each query may see by position [B or 1, 1, S, T]; None for all.

    ``n_valid`` [B] keys of each sample are no padding; the last query stands at the last of them.
    """
    if not causal and left < 0 and right < 0 and n_valid is None:
        return None
    keys = torch.arange(n_keys, device=device)
    offset: Tensor | int = n_past
    if n_valid is not None:
        n_valid = n_valid.to(device).reshape(-1, 1, 1, 1)
        offset = n_valid - n_queries
    queries = torch.arange(n_queries, device=device)[:, None] + offset
    ahead = (keys - queries).expand(-1 if n_valid is not None else 1, 1, n_queries, n_keys)
    allowed = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        allowed = allowed & (ahead <= 0)
    if left >= 0:
        allowed = allowed & (ahead >= -left)
    if right >= 0:
        allowed = allowed & (ahead <= right)
    return allowed if n_valid is None else allowed & (keys < n_valid)


def _bias(scores: Tensor, mask: Tensor | None, allowed: Tensor | None) -> Tensor | None:
    """Return what is added to scores [B, H, S, T]: minus infinity where a key must not be seen."""
    closed = scores.new_tensor(float("-inf"))
    bias = None
    if mask is not None:
        missing = scores.shape[-1] - mask.shape[-1]
        if mask.dtype == torch.bool:
            mask = torch.where(mask, torch.zeros_like(closed), closed)
        bias = F.pad(mask, (0, missing), value=float("-inf")) if missing > 0 else mask
    if allowed is not None:
        by_position = torch.where(allowed, torch.zeros_like(closed), closed)
        bias = by_position if bias is None else bias + by_position
    return bias


@run_op("Attention", since=23)
def Attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    n_outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """Scaled dot-product attention; further outputs are the keys and values with the past, and the scores.

    q is [B, H, S, D] or [B, S, H * D], k and v alike; a query that sees no key at all gives zeros.
    """
    merged = q.ndim == 3
    if merged:
        q, k, v = _split_heads(q, q_num_heads), _split_heads(k, kv_num_heads), _split_heads(v, kv_num_heads)
    if attn_mask is not None:
        q, attn_mask = together(q, attn_mask)
    n_past = 0
    if past_key is not None and past_value is not None:
        n_past = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    present = (k, v)
    n_heads, root = q.shape[1], sqrt(scale if scale else 1 / sqrt(q.shape[3]))
    scores = (q * root) @ (_repeat_heads(k, n_heads) * root).transpose(2, 3)  # [B, H, S, T]
    raw = scores
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    capped = scores
    allowed = _allowed(
        q.shape[2], k.shape[2], causal=bool(is_causal), left=left_window_size, right=right_window_size,
        n_past=n_past, n_valid=nonpad_kv_seqlen, device=q.device,
    )  # fmt: skip
    bias = _bias(scores, attn_mask, allowed)
    if bias is None:
        weights = torch.softmax(scores, -1)
    else:
        blind = torch.isneginf(bias).all(-1, keepdim=True)  # [..., S, 1]
        scores = scores + bias
        weights = torch.softmax(torch.where(blind, torch.zeros_like(scores), scores), -1)
        weights = torch.where(blind, torch.zeros_like(weights), weights)
    y = weights @ _repeat_heads(v, n_heads)
    if merged:
        y = y.transpose(1, 2).flatten(2)
    return y if n_outputs == 1 else (y, *present, (raw, capped, scores, weights)[qk_matmul_output_mode])


@macs_op("Attention")
def _macs_attention(
    node: gs.Node, input_shapes: list[tuple[int, ...] | None], output_shapes: list[tuple[int, ...]]
) -> int:
    """Count both products: queries with keys, and their weights with values."""
    q, k, v = input_shapes[:3]
    assert q is not None
    assert k is not None
    assert v is not None
    past = input_shapes[4] if len(input_shapes) > 4 else None
    n_keys = k[-2] + (past[2] if past is not None else 0)
    kv_heads = int(node.attrs.get("kv_num_heads", 1)) if len(v) == 3 else 1
    q_heads = int(node.attrs.get("q_num_heads", 1)) if len(q) == 3 else prod(q[1:-2])
    value_size = v[-1] // kv_heads * q_heads
    key_size = prod(q) // q[0] // q[-2]
    return q[0] * q[-2] * n_keys * (key_size + value_size)


@flow_op("Attention")
def _flow_attention(node: gs.Node, flow: Flow) -> None:
    """Whole heads go: of queries, keys and values together, groups of queries with the keys they read.

    Inputs are [B, H, S, W], or [B, S, H * W] with the numbers of heads as attributes.
    """
    present = [tensor for tensor in node.inputs if tensor.name]
    names = [tensor.name for tensor in node.inputs]
    found = [_heads(node, flow, index) for index in range(3)]
    q, k, v = found
    problem = None
    if any(names[4:]):
        problem = "Attention with a past, or with its length given"
    elif q is None or k is None or v is None:
        lacking = next(names[index] for index, heads in enumerate(found) if heads is None)
        problem = f"Attention reads '{lacking}', whose heads must stay"
    elif len(q) % len(k) or len(k) != len(v):
        problem = f"Attention of {len(q)} heads over {len(k)} and {len(v)}"
    if problem is not None or q is None or k is None or v is None:
        for tensor in present:
            flow.freeze(flow.ids(tensor), node, problem or "")
        return
    flow.join(k, v)
    flow.join(q, np.repeat(k, len(q) // len(k)))
    flow.heads.append(q)
    if len(names) > 3 and names[3]:
        _join_mask(node, flow, q)
    outputs = [*node.outputs, *[gs.Variable.empty()] * 4][:4]
    for output, heads in zip(outputs, (q, k, v, q), strict=True):
        if not output.name:
            continue
        shape = flow.shape(output)
        if len(shape) == 4:
            flow.put(output, 1, heads)
        else:
            flow.put(output, 2, np.repeat(heads, shape[2] // len(heads)))


def _heads(node: gs.Node, flow: Flow, index: int) -> Ids | None:
    """One id for each head of an input, None if it has none that can go."""
    tensor = node.inputs[index]
    found = flow.ids(tensor)
    if found is None:
        return None
    if len(flow.shape(tensor)) == 4:
        return found.ids if found.axis == 1 else None
    n_heads = int(node.attrs["q_num_heads" if index == 0 else "kv_num_heads"])
    if found.axis != 2 or len(found.ids) % n_heads:
        return None
    return flow.join_rows(found.ids.reshape(n_heads, -1))


def _join_mask(node: gs.Node, flow: Flow, heads: Ids) -> None:
    """Join the heads with a mask or bias [..., H, S, T] that tells them apart."""
    mask = node.inputs[3]
    shape, found = flow.shape(mask), flow.ids(mask)
    axis = len(shape) - 3
    if axis < 0 or shape[axis] == 1:
        flow.freeze(found, node, "Attention reads them as a mask")
    elif found is not None and found.axis == axis:
        flow.join(heads, found.ids)
    elif found is None and isinstance(mask, gs.Constant):
        flow.bind(mask, axis, heads, "follower", node)
    else:
        flow.freeze(found, node, "Attention reads them as a mask")
        flow.freeze(heads, node, f"Attention joins them with '{mask.name}', whose channels must stay")
        flow.wish(mask, shape[axis])


@edit_op("Attention")
def _edit_attention(node: gs.Node, cut: Cut) -> None:
    for attribute, tensor in zip(("q_num_heads", "kv_num_heads"), node.inputs[:2], strict=True):
        if attribute in node.attrs and len(cut.shape(tensor)) == 3:
            n_heads = int(node.attrs[attribute])
            node.attrs[attribute] = n_heads * cut.new_shape(tensor)[2] // cut.shape(tensor)[2]


# --- RotaryEmbedding ---


@run_op("RotaryEmbedding", since=23)
def RotaryEmbedding(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int | None = None,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Turn pairs of numbers of each head by an angle that depends on the position.

    x is [B, heads, S, D] or [B, S, heads * D]; the caches are [positions, pairs], or [B, S, pairs] without
    ``position_ids``. Pairs are neighbours if interleaved, else one of each half.
    """
    heads = _split_heads(x, num_heads) if x.ndim == 3 else x
    if position_ids is not None:
        index = position_ids.to(cos_cache.device)
        cos_cache, sin_cache = cos_cache[index], sin_cache[index]
    cos, sin = cos_cache.unsqueeze(1), sin_cache.unsqueeze(1)  # [B, 1, S, pairs]
    width = rotary_embedding_dim or heads.shape[-1]
    turned, rest = heads[..., :width], heads[..., width:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, -1)
    pairs = (cos * first - sin * second, sin * first + cos * second)
    y = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    y = torch.cat([y, rest], -1)
    return y.transpose(1, 2).flatten(2) if x.ndim == 3 else y


# --- TensorScatter ---


@run_op("TensorScatter", since=24)
def TensorScatter(
    cache: Tensor,
    update: Tensor,
    write_indices: Tensor | None = None,
    *,
    axis: int = -2,
    mode: str = "linear",
) -> Tensor:
    """Write ``update`` into ``cache`` along ``axis``, of each sample from its write index on."""
    cache, update = together(cache, update.to(cache.dtype))
    axis = normalise_axis(axis, cache.ndim)
    steps = torch.arange(update.shape[axis], device=cache.device)[None]
    if write_indices is not None:
        steps = steps + write_indices.to(cache.device).reshape(-1, 1)  # [B, S]
    if mode == "circular":
        steps = steps % cache.shape[axis]
    shape = [1] * cache.ndim
    shape[0], shape[axis] = steps.shape
    return cache.scatter(axis, steps.reshape(shape).expand_as(update), update)
