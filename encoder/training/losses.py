"""Sampled softmax over a pool of items, in memory that does not grow with pairs times pool.

Logits are `scale * <user, item>`; the scale is the exponential of a learned parameter and at most 100 (a temperature
of at least 0.01).

Shapes: P pairs, N pool, E embedding, C pairs of one chunk.
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
"""Number of pairs whose logits exist at one time: few enough to stay in the cache of a core."""

MaskLogits = Callable[[Tensor, int], None]
"""A call `mask(logits, first)` sets the logits [C, N] of non-negatives to -inf, in place; row 0 is pair `first`."""


def softmax_loss(
    users: Tensor,
    targets: Tensor,
    pool: Tensor,
    weights: Tensor,
    *,
    target_log_q: Tensor,
    pool_log_q: Tensor,
    mask: MaskLogits,
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """Return the weighted mean of -log softmax of each pair's target among itself and the pool.

        loss = sum_p w_p * -log( exp(s_p) / (exp(s_p) + sum_n exp(s_pn)) )
        s_p  = <user_p, target_p> - log Q(target_p)         s_pn = <user_p, pool_n> - log Q(pool_n)

    This is PinnerFormer's equation 2 (arXiv 2205.04507). `users` [P, E] are already scaled; `targets` are [P, E],
    `pool` [N, E], `weights` [P] with sum 1, `target_log_q` [P] and `pool_log_q` [N]. `mask` removes the entries of the
    pool that are not negatives of a pair. With `precision` bfloat16 the factors of matrix products are rounded to
    bfloat16; logits and sums stay float32.
    """
    loss: Tensor = _PooledSoftmax.apply(  # type: ignore[no-untyped-call]
        users, targets, pool, weights, target_log_q, pool_log_q, mask, precision
    )
    return loss


class _PooledSoftmax(torch.autograd.Function):
    """The loss with its gradients computed chunk by chunk in the forward pass, so no [P, N] matrix is ever kept.

    With the softmax probabilities share_pn = exp(s_pn) / Z_p of the pool and share_p = exp(s_p) / Z_p of the target:

        d loss / d user_p   = w_p * ( sum_n share_pn * pool_n + (share_p - 1) * target_p )
        d loss / d target_p = w_p * (share_p - 1) * user_p
        d loss / d pool_n   = sum_p w_p * share_pn * user_p

    `backward` only multiplies the three by the incoming gradient, a scalar.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 (an autograd function takes its inputs as positional arguments)
        ctx: Any,
        users: Tensor,
        targets: Tensor,
        pool: Tensor,
        weights: Tensor,
        target_log_q: Tensor,
        pool_log_q: Tensor,
        mask: MaskLogits,
        precision: torch.dtype,
    ) -> Tensor:
        total = users.new_zeros(())
        by_user, by_target, by_pool = torch.empty_like(users), torch.empty_like(targets), torch.zeros_like(pool)
        lower = precision if precision == torch.bfloat16 else users.dtype
        rounded_pool = pool.to(lower)  # [N, E]
        for start in range(0, len(users), CHUNK):
            part = slice(start, start + CHUNK)
            u, t, w = users[part], targets[part], weights[part]  # [C, E], [C, E], [C]
            with rounded_factors(precision):
                logits = torch.addmm(-pool_log_q, u, pool.T)  # [C, N]
            mask(logits, start)
            positive = (u * t).sum(-1) - target_log_q[part]  # [C]
            highest = torch.maximum(positive, logits.amax(-1))  # [C], subtracted so that exp cannot overflow
            share = logits.sub_(highest.unsqueeze(-1)).exp_()  # [C, N], not yet divided by Z
            target_share = (positive - highest).exp()  # [C], not yet divided by Z
            z = share.sum(-1) + target_share  # [C], Z_p / exp(highest)
            total += (w * (z.log() + highest - positive)).sum()
            share = share.mul_((w / z).unsqueeze(-1)).to(lower)  # [C, N], now w_p * share_pn
            pull = (w * (target_share / z - 1)).unsqueeze(-1)  # [C, 1], w_p * (share_p - 1)
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
    """Let float32 products round their factors inside this context if `precision` is bfloat16; sums stay float32.

    Factors are rounded to bfloat16 on a CPU and to TF32 on a GPU.
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
    """Return weights [P] that sum to 1 and give every user in `users` [P] the same total weight."""
    _, inverse, counts = np.unique(users, return_inverse=True, return_counts=True)
    return torch.from_numpy((1.0 / (len(counts) * counts[inverse])).astype(np.float32))
