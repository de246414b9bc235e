"""Negatives: the pool of items that a positive competes with, and the log-Q correction of their logits.

The pool is either the whole catalogue or sampled per batch. PinnerFormer (arXiv 2205.04507) samples one
pool per batch, a mix of the batch's own positives and uniform items, and corrects each logit by the logarithm of the
expected count of its item in the pool. Item frequencies come from a count-min sketch that is updated before it is
used, or from exact counts.

Shapes: P pairs, N pool, I items, U distinct users of the batch, n ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from encoder.arrays import I64
from encoder.hardware import CPU
from encoder.training.losses import SCALE_MAX, MaskLogits


@dataclass(frozen=True, slots=True)
class LossConfig:
    """Options of the loss and of its pool of negatives."""

    kind: Literal["full", "sampled"] = "full"
    random_negatives: int = 8_192
    """Number of items drawn uniformly from the catalogue for each batch."""
    batch_negatives_max: int = 5_000
    """Maximum number of the batch's positives that serve as negatives of other pairs; 0 for none."""
    log_q: Literal["none", "exact", "sketch"] = "sketch"
    """Source of the item frequencies for the log-Q correction."""
    scale_initial: float = 1 / 0.07
    equal_users: bool = True
    """Whether every user of a batch has the same weight, as published; otherwise every pair has."""

    def __post_init__(self) -> None:
        if min(self.random_negatives, self.batch_negatives_max) < 0:
            raise ValueError("random_negatives and batch_negatives_max must be at least 0")
        if self.kind == "sampled" and self.random_negatives + self.batch_negatives_max == 0:
            raise ValueError("a sampled softmax needs negatives: set random_negatives or batch_negatives_max")
        if not 1 <= self.scale_initial <= SCALE_MAX:
            raise ValueError(f"scale_initial must be between 1 and {SCALE_MAX:.0f}")


@dataclass(frozen=True, slots=True)
class Pool:
    """The negatives of one batch."""

    rows: Tensor
    """[N] item rows."""
    log_q: Tensor
    """[N] log-Q, subtracted from the logits of the pool."""
    target_log_q: Tensor
    """[P] log-Q, subtracted from the logits of the positives."""
    mask: MaskLogits
    """Removes the entries of the pool that are not negatives of a pair."""


class NegativeSampler:
    """Builds the pool of each batch; `positives` [I + 1] counts how often each item row is a positive in the log.

    Frequencies are kept on the CPU; pools are placed on `device`.
    """

    def __init__(self, config: LossConfig, positives: I64, *, seed: int, device: torch.device = CPU) -> None:
        self.config, self.items, self.device = config, len(positives) - 1, device
        self.exact = exact_log_frequency(positives)
        self.sketch = CountMinSketch(seed=seed)

    def pool(self, users: I64, targets: I64, rng: np.random.Generator) -> Pool:
        """Return the pool for pairs of user ids [P] and the item rows [P] of their positives."""
        if self.config.kind == "full":
            rows = torch.arange(self.items + 1, device=self.device)
            log_q, target_log_q = (torch.zeros(size, device=self.device) for size in (len(rows), len(targets)))
            return Pool(rows, log_q, target_log_q, mask_targets(torch.from_numpy(targets).to(self.device)))
        in_batch = targets
        if len(in_batch) > self.config.batch_negatives_max:
            in_batch = rng.choice(in_batch, self.config.batch_negatives_max, replace=False)
        # The pool: [0, n) positives of the batch, [n, N) uniform items; an item may occur several times.
        pool = np.concatenate([in_batch, rng.integers(1, self.items + 1, self.config.random_negatives)])
        self.sketch.add(targets)
        mask = mask_own_positives(users, targets, pool, items=self.items, device=self.device)
        log_q, target_log_q = (self._log_q(rows, len(in_batch)).to(self.device) for rows in (pool, targets))
        return Pool(torch.from_numpy(pool).to(self.device), log_q, target_log_q, mask)

    def _log_q(self, rows: I64, in_batch: int) -> Tensor:
        if self.config.log_q == "none":
            return torch.zeros(len(rows))
        frequency = self.exact[rows] if self.config.log_q == "exact" else self.sketch.log_frequency(rows)
        return expected_count_log_q(frequency, batch=in_batch, uniform=self.config.random_negatives, items=self.items)


def mask_targets(target_rows: Tensor) -> MaskLogits:
    """Return the mask for a pool that is the whole catalogue, where entry r is item row r.

    It removes each pair's target, which enters the softmax on its own, and row 0, the unknown item.
    """

    def mask(logits: Tensor, start: int) -> None:
        rows = target_rows[start : start + len(logits)].unsqueeze(-1)  # [C, 1]
        logits.scatter_(1, rows, -torch.inf)
        logits[:, 0] = -torch.inf

    return mask


def mask_own_positives(users: I64, targets: I64, pool: I64, *, items: int, device: torch.device) -> MaskLogits:
    """Return the mask for a sampled pool [N] of item rows: the positives of the pair's own user in this batch."""
    distinct, user = np.unique(users, return_inverse=True)
    own = np.zeros((len(distinct), items + 1), np.bool_)  # [U, I + 1]
    own[user, targets] = True
    in_pool, user_of_pair = (torch.from_numpy(values).to(device) for values in (own[:, pool], user))  # [U, N], [P]

    def mask(logits: Tensor, start: int) -> None:
        logits.masked_fill_(in_pool[user_of_pair[start : start + len(logits)]], -torch.inf)

    return mask


def expected_count_log_q(log_frequency: Tensor, *, batch: int, uniform: int, items: int) -> Tensor:
    """Return the logarithm of the expected count of items in a pool of `batch` positives and `uniform` draws.

    `log_frequency` [...] is the logarithm of each item's share among the positives.
    """
    return torch.log(batch * torch.exp(log_frequency) + uniform / items)


def exact_log_frequency(counts: I64) -> Tensor:
    """Return the logarithms [I + 1] of the items' shares among the positives; a count of 0 is taken as 1."""
    counts = np.maximum(counts, 1)
    return torch.from_numpy(np.log(counts / counts.sum()).astype(np.float32))


class CountMinSketch:
    """Estimates how often each id was added, in fixed memory (Cormode, Muthukrishnan 2005).

    An estimate is never too low. With `depth` rows of `width` counters it is too high by at most e / width of all
    additions, with a probability of at least 1 - exp(-depth). The hash functions depend on the seed only, so all
    processes of a run hash alike.
    """

    def __init__(self, *, width: int = 1 << 20, depth: int = 2, seed: int = 0) -> None:
        if width & (width - 1):
            raise ValueError("width of a sketch must be a power of two")
        self.counts = np.zeros((depth, width), np.int64)
        self.total = 0
        rng = np.random.default_rng(seed)
        self._factors = rng.integers(0, 1 << 63, (depth, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._shift = np.uint64(64 - (width.bit_length() - 1))

    def add(self, ids: I64) -> None:
        """Add ids [n], each as often as it occurs."""
        for row, columns in zip(self.counts, self._columns(ids), strict=True):
            np.add.at(row, columns, 1)
        self.total += len(ids)

    def log_frequency(self, ids: I64) -> Tensor:
        """Return the logarithms of the estimated shares of ids [n]; an estimate of 0 is taken as 1."""
        estimate = np.min([row[columns] for row, columns in zip(self.counts, self._columns(ids), strict=True)], axis=0)
        return torch.from_numpy(np.log(np.maximum(estimate, 1) / max(self.total, 1)).astype(np.float32))

    def _columns(self, ids: I64) -> I64:
        """Return the counter column [depth, n] of each id in each row: multiply-shift hashing."""
        mixed = (ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))[None] * self._factors  # [depth, n], mod 2^64
        return (mixed >> self._shift).astype(np.int64)
