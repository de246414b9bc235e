"""The softmax loss of pairs over a pool of items, in memory that does not grow with pairs times pool.

Shapes: P pairs, N pool, E embedding. Logits are `scale * <user, item>`; the scale is exp of a learned parameter, at
most 100 (a temperature of at least 0.01).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoder.arrays import I64

SCALE_MAX = 100.0
CHUNK = 256
"""Pairs whose logits exist at one time: few enough to stay in the cache of a core."""

MaskLogits = Callable[[Tensor, int], None]
"""Sets to minus infinity, in place, the logits [n, N] of the pairs from the given one on that are no negatives."""


def softmax_loss(
    users: Tensor,
    targets: Tensor,
    pool: Tensor,
    weights: Tensor,
    *,
    target_log_q: Tensor,
    pool_log_q: Tensor,
    hide: MaskLogits,
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """Weighted mean of -log softmax of each pair's target among itself and the pool.

    `users` [P, E] already scaled, `targets` [P, E], `pool` [N, E], `weights` [P] summing to 1; the log-Q [P] and [N]
    are taken from the logits (PinnerFormer, equation 2). `hide` removes the entries of the pool that are no negatives
    of a pair. With `precision` bfloat16 the factors of products are rounded to it; logits and sums are float32.
    """
    loss: Tensor = _PooledSoftmax.apply(  # type: ignore[no-untyped-call]
        users, targets, pool, weights, target_log_q, pool_log_q, hide, precision
    )
    return loss


class _PooledSoftmax(torch.autograd.Function):
    """Gradients are taken chunk by chunk in the forward pass, so no [P, N] matrix is ever kept."""

    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        targets: Tensor,
        pool: Tensor,
        weights: Tensor,
        target_log_q: Tensor,
        pool_log_q: Tensor,
        hide: MaskLogits,
        precision: torch.dtype,
    ) -> Tensor:
        total = users.new_zeros(())
        by_user, by_target, by_pool = torch.empty_like(users), torch.empty_like(targets), torch.zeros_like(pool)
        lower = precision if precision == torch.bfloat16 else users.dtype
        rounded_pool = pool.to(lower)
        for start in range(0, len(users), CHUNK):
            part = slice(start, start + CHUNK)
            u, t, w = users[part], targets[part], weights[part]
            with rounded_factors(precision):
                logits = torch.addmm(-pool_log_q, u, pool.T)
            hide(logits, start)
            positive = (u * t).sum(-1) - target_log_q[part]
            highest = torch.maximum(positive, logits.amax(-1))
            share = logits.sub_(highest.unsqueeze(-1)).exp_()
            own = (positive - highest).exp()
            in_all = share.sum(-1) + own
            total += (w * (in_all.log() + highest - positive)).sum()
            share = share.mul_((w / in_all).unsqueeze(-1)).to(lower)
            pull = (w * (own / in_all - 1)).unsqueeze(-1)
            by_user[part] = (share @ rounded_pool).to(u.dtype) + pull * t
            by_target[part] = pull * u
            by_pool += (share.T @ u.to(lower)).to(u.dtype)
        ctx.save_for_backward(by_user, by_target, by_pool)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        by_user, by_target, by_pool = ctx.saved_tensors
        (gradient,) = gradients
        return by_user * gradient, by_target * gradient, by_pool * gradient, None, None, None, None, None


@contextmanager
def rounded_factors(precision: torch.dtype) -> Iterator[None]:
    """Within, float32 products round their factors if `precision` says so; sums stay float32.

    To bfloat16 on a CPU, to TF32 on a GPU.
    """
    if precision != torch.bfloat16:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def equal_user_weights(users: I64) -> Tensor:
    """[P] weights that sum to 1, every user of [P] having the same total."""
    _, inverse, counts = np.unique(users, return_inverse=True, return_counts=True)
    return torch.from_numpy((1.0 / (len(counts) * counts[inverse])).astype(np.float32))
