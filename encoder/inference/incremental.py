"""The incremental runtime: one new action costs one token, because keys and values of hot users are kept.

For each user the batch says how many actions there have been (`counts`) and whether anything but an append happened
(`revisions`). What the user's slot has seen with the same revision is not computed again; everybody else is computed
from the newest `receptive_field` actions, in the same call. Slots are bounded by memory and given up least recently
used first, so a lost cache is a cost and never a difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from encoder.actions.columns import SequenceBatch
from encoder.arrays import F32
from encoder.inference.forward import Steps
from encoder.inference.plan import Int64s
from encoder.inference.slots import SlotTable
from encoder.model import EncoderConfig

TOKENS_MAX = 1_024
"""Tokens of one step: enough that calls and the weights' way to the cache weigh little; more brings nothing."""


class IncrementalRuntime:
    """An `EncoderRuntime` over the slots of a kernel, whose owners `table` knows. Not thread-safe."""

    def __init__(self, version: str, config: EncoderConfig, steps: Steps, table: SlotTable) -> None:
        self.version = version
        self.embedding_dim = config.embedding_dim
        self.sequence_length = config.sequence_length
        self.dtype = steps.dtype
        self.prefills = 0
        """Users computed from their kept actions because no slot fitted."""
        self.extensions = 0
        """Users computed from their slot and their new actions alone."""
        self._reach = config.receptive_field
        self._steps = steps
        self._table = table

    def embed(self, batch: SequenceBatch) -> F32:
        """Embeddings [U, E] of length one. Each user has at least one row and occurs once; raises `ValueError`."""
        check(batch)
        embeddings = np.empty((len(batch), self.embedding_dim), np.float32)
        for low in range(0, len(batch), self._table.slots):
            users = np.arange(low, min(low + self._table.slots, len(batch)))
            self._embed_some(batch, users, embeddings)
        return embeddings

    def forget(self, users: Sequence[bytes]) -> None:
        """Drop what is kept of these users."""
        self._table.forget(users)

    def clear(self) -> None:
        """Drop what is kept of everybody."""
        self._table.clear()

    def _embed_some(self, batch: SequenceBatch, users: Int64s, embeddings: F32) -> None:
        """Embed consecutive users, at most as many as there are slots."""
        slots = self._table.take(batch.users[users[0] : users[-1] + 1])
        fresh, firsts = self._fresh(batch, users, slots)
        for part in bounded(fresh, TOKENS_MAX, TOKENS_MAX):
            self._table.open(slots[part])
            rows = self._steps.run(batch, users[part], slots[part], fresh[part], firsts[part])
            embeddings[users[part]] = rows
            sound = part[np.isfinite(rows.sum(axis=1))]  # what is not finite must not be built upon
            self._table.seal(slots[sound], batch.counts[users[sound]], batch.revisions[users[sound]], firsts[sound])

    def _fresh(self, batch: SequenceBatch, users: Int64s, slots: Int64s) -> tuple[Int64s, Int64s]:
        """How many newest actions of each user to compute, and the position that its slot counts from; both [S].

        A user with no new action recomputes the newest token, which changes nothing in the slot. The row before the
        first new one must be there too, because the gap to it is a feature.
        """
        counts, seen = batch.counts[users], self._table.counts[slots]
        kept = batch.starts[users + 1] - batch.starts[users]
        missing = counts - seen
        hit = (seen > 0) & (self._table.revisions[slots] == batch.revisions[users])
        hit &= (missing >= 0) & (missing < kept) & (missing <= self._reach)
        fresh = np.where(hit, np.maximum(missing, 1), np.minimum(kept, self._reach))
        self.extensions += int(hit.sum())
        self.prefills += len(hit) - int(hit.sum())
        return fresh, np.where(hit, self._table.firsts[slots], counts - fresh)


def bounded(tokens: Int64s, tokens_max: int, users_max: int) -> Iterator[Int64s]:
    """Split indices into parts of at most `users_max` users and `tokens_max` tokens (or one user), alike in length."""
    order = np.argsort(tokens, kind="stable")
    low = 0
    ends = np.cumsum(tokens[order])
    while low < len(order):
        done = ends[low - 1] if low else 0
        high = max(int(np.searchsorted(ends, done + tokens_max, side="right")), low + 1)
        high = min(high, low + users_max)
        yield order[low:high]
        low = high


def check(batch: SequenceBatch) -> None:
    """Raise `ValueError` when a user has no action, or more rows than actions."""
    kept = np.diff(batch.starts)
    wrong = np.flatnonzero((kept < 1) | (kept > batch.counts))
    if len(wrong):
        u = int(wrong[0])
        raise ValueError(
            f"sequence cannot be embedded: {kept[u]} rows for {batch.counts[u]} actions of user {batch.users[u]!r}; "
            "pass users with at least one kept action, and count every action"
        )
