"""The incremental runtime: one new action costs one token, because the keys and values of hot users are cached.

For each user the batch states how many actions there have been (`counts`) and whether anything other than an append
happened (`revisions`). Tokens that the user's slot has already seen under the same revision are not computed again.
All other users are computed from their newest `receptive_field` actions, in the same call. Memory bounds the slots, and
the least recently used slot is given up first. A lost slot costs time and never changes an embedding.

Shapes: U users of the batch, S users of a call, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from encoder.actions.columns import SequenceBatch
from encoder.arrays import F32, I64
from encoder.inference.forward import ForwardPass
from encoder.inference.slots import SlotTable
from encoder.model import EncoderConfig

TOKENS_MAX = 1_024
"""Tokens of one pass: enough to spread the cost of calls and of loading the weights; more tokens bring nothing."""


class IncrementalRuntime:
    """An `EncoderRuntime` over the slots of a kernel; `table` records which user owns each. Not thread-safe."""

    def __init__(self, version: str, config: EncoderConfig, forward: ForwardPass, table: SlotTable) -> None:
        self.version = version
        self.embedding_dim = config.embedding_dim
        self.sequence_length = config.sequence_length
        self.actions_needed = config.actions_needed
        self.dtype = forward.dtype
        self.prefills = 0
        """Number of times that a user was computed from its kept actions because no slot could be extended."""
        self.extensions = 0
        """Number of times that a user was computed from its slot and its new actions alone."""
        self._reach = config.receptive_field
        self._forward = forward
        self._table = table

    def embed(self, batch: SequenceBatch) -> F32:
        """Return embeddings [U, E] of length one.

        Each user has at least one row and occurs once; raises `ValueError`.
        """
        check(batch)
        embeddings = np.empty((len(batch), self.embedding_dim), np.float32)
        for low in range(0, len(batch), self._table.slots):
            users = np.arange(low, min(low + self._table.slots, len(batch)))
            self._embed_some(batch, users, embeddings)
        return embeddings

    def forget(self, users: Sequence[bytes]) -> None:
        """Drop what is cached of these users."""
        self._table.forget(users)

    def clear(self) -> None:
        """Drop what is cached of all users."""
        self._table.clear()

    def _embed_some(self, batch: SequenceBatch, users: I64, embeddings: F32) -> None:
        """Embed consecutive users, at most as many as there are slots."""
        slots = self._table.take(batch.users[users[0] : users[-1] + 1])  # [S]
        fresh, firsts = self._fresh(batch, users, slots)
        for part in bounded(fresh, TOKENS_MAX, TOKENS_MAX):
            self._table.open(slots[part])
            rows = self._forward.run(batch, users[part], slots[part], fresh[part], firsts[part])  # [part, E]
            embeddings[users[part]] = rows
            # A slot behind a NaN stays open: it holds NaN too, and a later pass must not build on it.
            sound = part[np.isfinite(rows.sum(axis=1))]
            self._table.seal(slots[sound], batch.counts[users[sound]], batch.revisions[users[sound]], firsts[sound])

    def _fresh(self, batch: SequenceBatch, users: I64, slots: I64) -> tuple[I64, I64]:
        """Return how many newest actions of each user to compute, and the position its slot counts from; both [S].

            the user's actions    0 ........................... counts
            seen by its slot      |<----- seen ---->|
            to compute                              |<-missing->|
            rows of the batch            |<-------- kept ------>|

        A slot is extended when its revision matches and the batch holds every missing action and the one before them
        (missing < kept), because the time since the previous action is a feature. A user without a new action
        recomputes the newest token, which changes nothing in the slot.
        """
        counts, seen = batch.counts[users], self._table.counts[slots]  # [S] both
        kept = batch.starts[users + 1] - batch.starts[users]  # [S]
        missing = counts - seen  # [S]
        hit = (seen > 0) & (self._table.revisions[slots] == batch.revisions[users])  # [S]
        hit &= (missing >= 0) & (missing < kept) & (missing <= self._reach)
        fresh = np.where(hit, np.maximum(missing, 1), np.minimum(kept, self._reach))  # [S]
        self.extensions += int(hit.sum())
        self.prefills += len(hit) - int(hit.sum())
        return fresh, np.where(hit, self._table.firsts[slots], counts - fresh)


def bounded(tokens: I64, tokens_max: int, users_max: int) -> Iterator[I64]:
    """Split users with `tokens` [S] tokens each into parts, as indices, with users of similar lengths together.

    A part has at most `users_max` users and at most `tokens_max` tokens, or a single user who has more.

    >>> [part.tolist() for part in bounded(np.array([9, 1, 2, 1]), 4, 2)]
    [[1, 3], [2], [0]]
    """
    order = np.argsort(tokens, kind="stable")  # [S] shortest first
    low = 0
    ends = np.cumsum(tokens[order])  # [S]
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
