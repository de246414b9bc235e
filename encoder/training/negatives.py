"""What a positive is told apart from: the whole catalogue, or a pool sampled for the batch, with its log-Q.

PinnerFormer draws one pool for a batch, positives of the batch and uniform items mixed, and corrects each logit by the
logarithm of how often its item is expected in the pool; frequencies come from a count-min sketch that is updated
before it is used, or from exact counts.

Shapes: P pairs, N pool, I items.
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
    """How the pool is made."""

    kind: Literal["full", "sampled"] = "full"
    random_negatives: int = 8_192
    """Drawn uniformly from the catalogue, for every batch anew."""
    batch_negatives_max: int = 5_000
    """Positives of the batch that serve as negatives of the others; 0 for none."""
    log_q: Literal["none", "exact", "sketch"] = "sketch"
    """Where the frequency of an item among the positives is taken from for the correction."""
    scale_initial: float = 1 / 0.07
    equal_users: bool = True
    """Every user of a batch weighs the same, as published; otherwise every pair does."""

    def __post_init__(self) -> None:
        if min(self.random_negatives, self.batch_negatives_max) < 0:
            raise ValueError("numbers of negatives must be at least 0")
        if self.kind == "sampled" and self.random_negatives + self.batch_negatives_max == 0:
            raise ValueError("a sampled softmax needs negatives: random_negatives or batch_negatives_max")
        if not 1 <= self.scale_initial <= SCALE_MAX:
            raise ValueError(f"scale_initial must lie between 1 and {SCALE_MAX:.0f}")


@dataclass(frozen=True, slots=True)
class Pool:
    """The negatives of one batch."""

    rows: Tensor
    """[N] item rows."""
    log_q: Tensor
    """[N] taken from the logits of the pool."""
    target_log_q: Tensor
    """[P] taken from the logits of the positives."""
    hide: MaskLogits


class NegativeSampler:
    """Makes the pool of each batch; `positives` [I + 1] counts how often each item row is a positive of the log.

    Frequencies are kept and looked up on the CPU; pools lie on `device`.
    """

    def __init__(self, config: LossConfig, positives: I64, *, seed: int, device: torch.device = CPU) -> None:
        self.config, self.items, self.device = config, len(positives) - 1, device
        self.exact = exact_log_frequency(positives)
        self.sketch = CountMinSketch(seed=seed)

    def pool(self, users: I64, targets: I64, rng: np.random.Generator) -> Pool:
        """The pool for pairs of user ids [P] and the item rows [P] that are their positives."""
        if self.config.kind == "full":
            rows = torch.arange(self.items + 1, device=self.device)
            log_q, target_log_q = (torch.zeros(size, device=self.device) for size in (len(rows), len(targets)))
            return Pool(rows, log_q, target_log_q, mask_targets(torch.from_numpy(targets).to(self.device)))
        in_batch = targets
        if len(in_batch) > self.config.batch_negatives_max:
            in_batch = rng.choice(in_batch, self.config.batch_negatives_max, replace=False)
        pool = np.concatenate([in_batch, rng.integers(1, self.items + 1, self.config.random_negatives)])
        self.sketch.add(targets)
        hide = mask_own_positives(users, targets, pool, items=self.items, device=self.device)
        log_q, target_log_q = (self._log_q(rows, len(in_batch)).to(self.device) for rows in (pool, targets))
        return Pool(torch.from_numpy(pool).to(self.device), log_q, target_log_q, hide)

    def _log_q(self, rows: I64, in_batch: int) -> Tensor:
        if self.config.log_q == "none":
            return torch.zeros(len(rows))
        frequency = self.exact[rows] if self.config.log_q == "exact" else self.sketch.log_frequency(rows)
        return expected_count_log_q(frequency, batch=in_batch, uniform=self.config.random_negatives, items=self.items)


def mask_targets(target_rows: Tensor) -> MaskLogits:
    """For a pool that is the whole catalogue (row r of it is item row r): hide each pair's target alone.

    Row 0, the unknown item, is never offered.
    """

    def hide(logits: Tensor, start: int) -> None:
        rows = target_rows[start : start + len(logits)].unsqueeze(-1)
        logits.scatter_(1, rows, -torch.inf)
        logits[:, 0] = -torch.inf

    return hide


def mask_own_positives(users: I64, targets: I64, pool: I64, *, items: int, device: torch.device) -> MaskLogits:
    """For a sampled pool [N] of item rows: hide every item that is a positive of the pair's user in this batch."""
    distinct, user = np.unique(users, return_inverse=True)
    own = np.zeros((len(distinct), items + 1), np.bool_)
    own[user, targets] = True
    in_pool, user_of_pair = (torch.from_numpy(values).to(device) for values in (own[:, pool], user))

    def hide(logits: Tensor, start: int) -> None:
        logits.masked_fill_(in_pool[user_of_pair[start : start + len(logits)]], -torch.inf)

    return hide


def expected_count_log_q(log_frequency: Tensor, *, batch: int, uniform: int, items: int) -> Tensor:
    """Logarithm of how often items are expected in a pool of `batch` positives and `uniform` draws.

    `log_frequency` [..] is the logarithm of an item's share among positives.
    """
    return torch.log(batch * torch.exp(log_frequency) + uniform / items)


def exact_log_frequency(counts: I64) -> Tensor:
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

    def add(self, ids: I64) -> None:
        """Count ids [n], each as often as it occurs."""
        for row, places in zip(self.counts, self._places(ids), strict=True):
            np.add.at(row, places, 1)
        self.total += len(ids)

    def log_frequency(self, ids: I64) -> Tensor:
        """Logarithms of the estimated shares of ids [n]; an id never seen counts as one."""
        estimate = np.min([row[places] for row, places in zip(self.counts, self._places(ids), strict=True)], axis=0)
        return torch.from_numpy(np.log(np.maximum(estimate, 1) / max(self.total, 1)).astype(np.float32))

    def _places(self, ids: I64) -> I64:
        mixed = (ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))[None] * self._factors  # multiply-shift
        return (mixed >> self._shift).astype(np.int64)
