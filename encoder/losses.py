"""Softmax losses over a pool of items: the whole catalogue, or sampled with a correction for how they were sampled.

Shapes: P pairs, N pool, E embedding, I items, U users of the batch. Logits are `scale * <user, item>`; the scale is
exp of a learned parameter, at most 100 (a temperature of at least 0.01).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from encoder.features import Ints

SCALE_MAX = 100.0
CHUNK = 1_024
"""Pairs whose logits exist at one time."""

Hide = Callable[[Tensor, int], None]
"""Sets to minus infinity, in place, the logits [n, N] of the pairs from the given one on that are no negatives."""


@dataclass(frozen=True, slots=True)
class LossConfig:
    """How the pool is made."""

    kind: Literal["full", "sampled"] = "full"
    random_negatives: int = 8_192
    """Drawn uniformly from the catalogue, for every batch anew."""
    batch_negatives_max: int = 5_000
    """Positives of the batch that serve as negatives of the others; 0 for none."""
    log_q: Literal["none", "exact", "sketch"] = "sketch"
    """Where the frequency of an item among the positives is taken from for the correction."""
    scale_initial: float = 1 / 0.07

    def __post_init__(self) -> None:
        if min(self.random_negatives, self.batch_negatives_max) < 0:
            raise ValueError("numbers of negatives must be at least 0")
        if self.kind == "sampled" and self.random_negatives + self.batch_negatives_max == 0:
            raise ValueError("a sampled softmax needs negatives: random_negatives or batch_negatives_max")
        if not 1 <= self.scale_initial <= SCALE_MAX:
            raise ValueError(f"scale_initial must lie between 1 and {SCALE_MAX:.0f}")


def softmax_loss(
    users: Tensor,
    targets: Tensor,
    pool: Tensor,
    weights: Tensor,
    *,
    target_log_q: Tensor,
    pool_log_q: Tensor,
    hide: Hide,
) -> Tensor:
    """Weighted mean of -log softmax of each pair's target among itself and the pool.

    `users` [P, E] already scaled, `targets` [P, E], `pool` [N, E], `weights` [P] summing to 1; the log-Q are taken
    from the logits (PinnerFormer, equation 2). `hide` removes the pool's entries that are positives of the pair.
    """
    loss: Tensor = _PooledSoftmax.apply(users, targets, pool, weights, target_log_q, pool_log_q, hide)  # type: ignore[no-untyped-call]
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
        hide: Hide,
    ) -> Tensor:
        total = users.new_zeros(())
        by_user, by_target, by_pool = torch.empty_like(users), torch.empty_like(targets), torch.zeros_like(pool)
        for start in range(0, len(users), CHUNK):
            part = slice(start, start + CHUNK)
            u, t, w = users[part], targets[part], weights[part]
            logits = torch.addmm(-pool_log_q, u, pool.T)
            hide(logits, start)
            positive = (u * t).sum(-1) - target_log_q[part]
            log_sum = torch.logaddexp(positive, logits.logsumexp(-1))
            total += (w * (log_sum - positive)).sum()
            share = logits.sub_(log_sum.unsqueeze(-1)).exp_().mul_(w.unsqueeze(-1))
            pull = (w * ((positive - log_sum).exp() - 1)).unsqueeze(-1)
            by_user[part] = torch.addmm(pull * t, share, pool)
            by_target[part] = pull * u
            by_pool.addmm_(share.T, u)
        ctx.save_for_backward(by_user, by_target, by_pool)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        by_user, by_target, by_pool = ctx.saved_tensors
        (gradient,) = gradients
        return by_user * gradient, by_target * gradient, by_pool * gradient, None, None, None, None


def hide_targets(target_rows: Tensor) -> Hide:
    """For a pool that is the whole catalogue (row r of it is item row r): hide each pair's target alone.

    Row 0, the unknown item, is never offered.
    """

    def hide(logits: Tensor, start: int) -> None:
        rows = target_rows[start : start + len(logits)].unsqueeze(-1)
        logits.scatter_(1, rows, -torch.inf)
        logits[:, 0] = -torch.inf

    return hide


def hide_own_positives(users: Tensor, target_rows: Tensor, pool_rows: Tensor, *, items: int) -> Hide:
    """For a sampled pool [N] of item rows: hide every item that is a target of the pair's user in this batch."""
    own = torch.zeros(int(users.max()) + 1, items + 1, dtype=torch.bool, device=users.device)
    own[users, target_rows] = True
    in_pool = own[:, pool_rows]

    def hide(logits: Tensor, start: int) -> None:
        logits.masked_fill_(in_pool[users[start : start + len(logits)]], -torch.inf)

    return hide


def equal_user_weights(users: Ints) -> Tensor:
    """[P] weights that sum to 1, every user of [P] having the same total."""
    _, inverse, counts = np.unique(users, return_inverse=True, return_counts=True)
    return torch.from_numpy((1.0 / (len(counts) * counts[inverse])).astype(np.float32))


def expected_count_log_q(log_frequency: Tensor, *, batch: int, uniform: int, items: int) -> Tensor:
    """Logarithm of how often items are expected in a pool of `batch` positives and `uniform` draws.

    `log_frequency` [..] is the logarithm of an item's share among positives.
    """
    return torch.log(batch * torch.exp(log_frequency) + uniform / items)


def exact_log_frequency(counts: Ints) -> Tensor:
    """[I + 1] logarithms of the items' shares among the positives; an item that never was one counts as one."""
    counts = np.maximum(counts, 1)
    return torch.from_numpy(np.log(counts / counts.sum()).astype(np.float32))


class CountMinSketch:
    """Estimates how often each of many ids was seen; never too low, and too high by few (Cormode, Muthukrishnan 2005).

    Seeded, so that every process of a run hashes alike. `depth` rows of `width` counters; an estimate exceeds the
    truth by at most e / width of all that was seen, with a probability of at least 1 - exp(-depth).
    """

    def __init__(self, *, width: int = 1 << 20, depth: int = 2, seed: int = 0) -> None:
        if width & (width - 1):
            raise ValueError("width of a sketch must be a power of two")
        self.counts = np.zeros((depth, width), np.int64)
        self.total = 0
        rng = np.random.default_rng(seed)
        self._factors = rng.integers(0, 1 << 63, (depth, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._shift = np.uint64(64 - (width.bit_length() - 1))

    def add(self, ids: Ints) -> None:
        """Count ids [n], each as often as it occurs."""
        for row, places in zip(self.counts, self._places(ids), strict=True):
            np.add.at(row, places, 1)
        self.total += len(ids)

    def log_frequency(self, ids: Ints) -> Tensor:
        """Logarithms of the estimated shares of ids [n]; an id never seen counts as one."""
        estimate = np.min([row[places] for row, places in zip(self.counts, self._places(ids), strict=True)], axis=0)
        return torch.from_numpy(np.log(np.maximum(estimate, 1) / max(self.total, 1)).astype(np.float32))

    def _places(self, ids: Ints) -> Ints:
        mixed = (ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))[None] * self._factors  # multiply-shift
        return (mixed >> self._shift).astype(np.int64)
