"""Coverage of a user's state by the output topic: an embedding contains every event up to its source offset.

Shapes: U users, in the order of their columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from encoder.arrays import I64
from streams.core.columns import Columns
from streams.core.layout import NEVER


def cover(headers: Columns, offsets: I64) -> None:
    """Record that embeddings of `offsets` [U] were acknowledged; users that wanted no more are done."""
    headers["encoded_offset"] = np.maximum(headers["encoded_offset"], offsets)
    done = headers["due_offset"] <= headers["encoded_offset"]
    headers["reason"] = np.where(done, 0, headers["reason"])
    headers["due_ms"] = np.where(done, NEVER, headers["due_ms"])


def cover_found(headers: Columns, offsets: I64, *, has_timers: bool) -> None:
    """Record that embeddings of `offsets` [U] were found in the output topic, of which the state knew nothing.

    While unencoded actions remain under a policy with timers, the deadline stays: it may fire early, never late.
    """
    headers["encoded_offset"] = np.maximum(headers["encoded_offset"], offsets)
    headers["reason"] = np.where(headers["due_offset"] <= offsets, 0, headers["reason"])
    headers["unencoded"] = np.where(headers["applied_offset"] <= offsets, 0, headers["unencoded"])
    waits = (headers["reason"] != 0) | ((headers["unencoded"] != 0) & has_timers)
    headers["due_ms"] = np.where(waits, headers["due_ms"], NEVER)


class ColdOutputs:
    """Source offsets that the output topic holds of cold users, beyond what their stored state records."""

    def __init__(self) -> None:
        self._offsets: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._offsets)

    def add(self, user: bytes, offset: int) -> None:
        """Record that the output topic holds an embedding of this offset."""
        self._offsets[user] = max(offset, self._offsets.get(user, -1))

    def take(self, users: Sequence[bytes]) -> tuple[list[int], I64]:
        """Remove those of `users` that are recorded; return their indices and offsets."""
        known = [index for index, user in enumerate(users) if user in self._offsets] if self._offsets else []
        return known, np.array([self._offsets.pop(users[index]) for index in known], np.int64)
