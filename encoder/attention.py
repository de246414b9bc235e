"""Attention of actions to the actions before them: grouped heads, sliding windows, rotary positions, event time.

Rotary positions after Su et al. (arXiv 2104.09864), grouped heads after Ainslie et al. (arXiv 2305.13245).

Shapes: B users, L actions, N sequences of T queries and S keys, H query heads, G key/value heads, K head size,
W window.
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
"""The event-time bias grows with the logarithm of minutes."""


def attend_window(q: Tensor, k: Tensor, v: Tensor, time_ms: Tensor, window: int, slope: Tensor | None) -> Tensor:
    """Causal attention of [B, L] to the last `window` positions, in blocks that see themselves and the one before.

    A block is one window long, so a query costs at most 2 W keys whatever L is. Returns [B, L, H, K].
    """
    batch, length = time_ms.shape
    size = min(window, length)
    blocks = -(-length // size)
    q, k, v, time = (_blocked(x, blocks, size) for x in (q, k, v, time_ms))
    span = size
    if blocks > 1:
        k, v, key_time = (_with_previous(x) for x in (k, v, time))
        span = 2 * size
    else:
        key_time = time
    at_query = torch.arange(size, device=q.device)[:, None] + span - size
    at_key = torch.arange(span, device=q.device)
    visible = (at_key <= at_query) & (at_key > at_query - window)
    first = visible & (at_key >= span - size)
    mask = torch.stack([first, *([visible] * (blocks - 1))]).unsqueeze(1).unsqueeze(0)  # [1, blocks, 1, T, S]
    if slope is not None:
        mask = time_bias(slope, time, key_time).masked_fill(~mask, -math.inf)
    mask = mask.expand(batch, *mask.shape[1:]).flatten(0, 1)
    mixed = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask)
    return mixed.reshape(batch, blocks * size, *mixed.shape[2:])[:, :length]


def rope_at(position: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [..., 1, K / 2] of positions [...]; angles in float64, so a millionth action rotates exactly too."""
    half = head_dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=position.device) / half
    angle = position.double().unsqueeze(-1) * ROTARY_BASE**-exponent
    return torch.cos(angle).float().unsqueeze(-2), torch.sin(angle).float().unsqueeze(-2)


def rope_periods(head_dim: int) -> F64:
    """[K / 2] positions in which each pair of `rope_at` turns once."""
    half = head_dim // 2
    return 2 * math.pi * ROTARY_BASE ** (np.arange(half) / half)


def apply_rope(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + K / 2) of the last axis [..., heads, K], in float32."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def time_bias(slope: Tensor, query_ms: Tensor, key_ms: Tensor) -> Tensor:
    """What event-time distance takes from attention logits: [..., H, T, S] of times [..., T] and [..., S]."""
    return -F.softplus(slope)[:, None, None] * log_minutes(query_ms, key_ms).unsqueeze(-3)


def log_minutes(query_ms: Tensor, key_ms: Tensor) -> Tensor:
    """log(1 + minutes) from each key to each query, 0 for keys that are later: [..., T, S]."""
    apart_ms = (query_ms.unsqueeze(-1) - key_ms.unsqueeze(-2)).clamp(min=0)
    return torch.log1p(apart_ms.float() / (1_000 * BIAS_UNIT_S))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Grouped attention [N, T, H, K] of queries [N, T, H, K] to keys and values [N, S, G, K].

    `mask` broadcasts to [N, H, T, S]: boolean (True may be seen), or what is added to the logits.
    """
    group = q.shape[-2] // k.shape[-2]
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, dim=1) for x in (k, v))
    if torch.is_autocast_enabled("cpu"):
        return _attend_by_products(q, k, v, mask).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same on [N, H, T or S, K], for training in bfloat16 on a CPU: a third of the fused kernel's time there."""
    if mask.dtype == torch.bool:
        mask = q.new_zeros(mask.shape).masked_fill_(~mask, -math.inf)
    bias = mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2]).flatten(0, 1)
    logits = torch.baddbmm(bias, (q * q.shape[-1] ** -0.5).flatten(0, 1), k.flatten(0, 1).transpose(-1, -2))
    mixed: Tensor = torch.softmax(logits, -1, dtype=q.dtype) @ v.flatten(0, 1)
    return mixed.view(q.shape)


def _blocked(x: Tensor, blocks: int, size: int) -> Tensor:
    """[B, L, ...] -> [B, blocks, size, ...], zeros behind the end."""
    missing = blocks * size - x.shape[1]
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
    return x.reshape(x.shape[0], blocks, size, *x.shape[2:])


def _with_previous(x: Tensor) -> Tensor:
    """[B, blocks, size, ...] -> [B, blocks, 2 size, ...]: each block behind the one before it."""
    previous = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    return torch.cat([previous, x], dim=2)
