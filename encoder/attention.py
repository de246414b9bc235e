"""Causal attention with grouped heads, sliding windows, rotary positions and an event-time bias.

Rotary position embedding (rope): Su et al., arXiv 2104.09864. Grouped heads: Ainslie et al., arXiv 2305.13245.

Shapes: B users, L actions, N sequences of T queries and S keys, H query heads, G key/value heads, K head size,
W window, C blocks of T = min(W, L) positions.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from encoder.arrays import F64

ROTARY_BASE = 10_000.0
BIAS_UNIT_S = 60.0
"""Unit of the event-time bias, in seconds: the bias grows with the logarithm of minutes."""


def attend_window(q: Tensor, k: Tensor, v: Tensor, time_ms: Tensor, window: int, slope: Tensor | None) -> Tensor:
    """Return causal attention [B, L, H, K] of each position to the last `window` positions.

    `q` is [B, L, H, K], `k` and `v` are [B, L, G, K], `time_ms` is [B, L], `slope` is [H] or None. Sequences are cut
    into blocks of one window; a block attends to itself and to the block before it, so a query costs at most 2 W keys
    for any L:

        window 3, L = 7     block 0     block 1     block 2
        positions           0 1 2       3 4 5       6 - -          (-: padding)
        keys of block 1     0 1 2       3 4 5                      S = 2 T
        at_key              0 1 2       3 4 5
        at_query                        3 4 5                      visible: at_query - window < at_key <= at_query

    The block before block 0 is zeros, which `first` masks.
    """
    batch, length = time_ms.shape
    size = min(window, length)
    blocks = -(-length // size)
    q, k, v, time = (_blocked(x, blocks, size) for x in (q, k, v, time_ms))  # [B, C, T, ...]
    span = size
    if blocks > 1:
        k, v, key_time = (_with_previous(x) for x in (k, v, time))  # [B, C, 2 T, ...]
        span = 2 * size
    else:
        key_time = time
    at_query = torch.arange(size, device=q.device)[:, None] + span - size  # [T, 1]
    at_key = torch.arange(span, device=q.device)  # [S]
    visible = (at_key <= at_query) & (at_key > at_query - window)  # [T, S]
    first = visible & (at_key >= span - size)
    mask = torch.stack([first, *([visible] * (blocks - 1))]).unsqueeze(1).unsqueeze(0)  # [1, C, 1, T, S]
    if slope is not None:
        mask = time_bias(slope, time, key_time).masked_fill(~mask, -math.inf)  # [B, C, H, T, S]
    mask = mask.expand(batch, *mask.shape[1:]).flatten(0, 1)  # [N, 1 or H, T, S], N = B * C
    mixed = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask)  # [N, T, H, K]
    return mixed.reshape(batch, blocks * size, *mixed.shape[2:])[:, :length]


def rope_at(position: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine [..., 1, K / 2] of the rotary angles at positions [...].

    Angles are computed in float64, so that they stay exact at position one million.
    """
    half = head_dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=position.device) / half
    angle = position.double().unsqueeze(-1) * ROTARY_BASE**-exponent
    return torch.cos(angle).float().unsqueeze(-2), torch.sin(angle).float().unsqueeze(-2)


def rope_periods(head_dim: int) -> F64:
    """Return the number of positions [K / 2] in which each pair of `rope_at` completes one turn."""
    half = head_dim // 2
    return 2 * math.pi * ROTARY_BASE ** (np.arange(half) / half)


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + K / 2) of the last axis [..., heads, K], in float32."""
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)  # [..., heads, K / 2] each
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def time_bias(slope: Tensor, query_ms: Tensor, key_ms: Tensor) -> Tensor:
    """Return the bias [..., H, T, S] of attention logits from event times [..., T] of queries and [..., S] of keys.

    bias_h = -softplus(slope_h) * log(1 + minutes)
    """
    return -F.softplus(slope)[:, None, None] * log_minutes(query_ms, key_ms).unsqueeze(-3)


def log_minutes(query_ms: Tensor, key_ms: Tensor) -> Tensor:
    """Return log(1 + minutes) [..., T, S] from each key to each query; 0 if the key is later."""
    apart_ms = (query_ms.unsqueeze(-1) - key_ms.unsqueeze(-2)).clamp(min=0)
    return torch.log1p(apart_ms.float() / (1_000 * BIAS_UNIT_S))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return grouped attention [N, T, H, K] of queries [N, T, H, K] to keys and values [N, S, G, K].

    `mask` broadcasts to [N, H, T, S] and is boolean (True is visible) or a bias added to the logits.
    """
    group = q.shape[-2] // k.shape[-2]
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, dim=1) for x in (k, v))
    if torch.is_autocast_enabled("cpu"):
        return _attend_by_products(q, k, v, mask).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Compute attention on [N, H, T or S, K] by explicit products.

    In bfloat16 on a CPU this takes a third of the time of the fused kernel.
    """
    if mask.dtype == torch.bool:
        mask = q.new_zeros(mask.shape).masked_fill_(~mask, -math.inf)
    bias = mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2]).flatten(0, 1)
    logits = torch.baddbmm(bias, (q * q.shape[-1] ** -0.5).flatten(0, 1), k.flatten(0, 1).transpose(-1, -2))
    mixed: Tensor = torch.softmax(logits, -1, dtype=q.dtype) @ v.flatten(0, 1)
    return mixed.view(q.shape)


def _blocked(x: Tensor, blocks: int, size: int) -> Tensor:
    """Reshape [B, L, ...] to [B, blocks, size, ...], padded with zeros at the end."""
    missing = blocks * size - x.shape[1]
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
    return x.reshape(x.shape[0], blocks, size, *x.shape[2:])


def _with_previous(x: Tensor) -> Tensor:
    """Prepend to each block the block before it: [B, blocks, size, ...] -> [B, blocks, 2 size, ...]."""
    previous = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    return torch.cat([previous, x], dim=2)
