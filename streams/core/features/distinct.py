"""Distinct items or surfaces over a window: exact for few, estimated for many.

Shapes: U users, R rows of the hot table, L lanes of a user.
"""

from __future__ import annotations

import numpy as np

from encoder.arrays import I64, Bool
from streams.core.features.definitions import Feature
from streams.core.features.tiles import NEVER_MS

FREE = -1
"""Key of a lane that is not in use."""
FULL_RANGE = 2**32
"""Ids of `distinct` are hashed to numbers below this."""
MIX = np.uint64(0x9E3779B97F4A7C15)
"""Odd multiplier after Fibonacci hashing: its product's upper bits depend on every bit of an id."""


def hashed(ids: I64) -> I64:
    """Return ids as numbers below 2^32, FREE for 0, which stands for no id."""
    numbers = (ids.astype(np.uint64) * MIX >> np.uint64(32)).astype(np.int64)
    return np.where(ids == 0, FREE, numbers)


class Distinct:
    """The number of different items or surfaces in the window.

    Each id is hashed to 32 bits and keeps the newest hop in which it occurred, so it leaves the window by itself, and a
    late event that is not the newest changes nothing. The count is exact while at most `cap` ids are in the window.
    Beyond that the ids with the smallest hashes are kept, and all below `theta` are known: the count is estimated as
    the number kept divided by theta as a fraction of the range, with a relative standard error of about
    1 / sqrt(number kept) (a theta sketch: Dasgupta, Lang, Rhodes, Thaler, 2016). It is exact again once every id that
    was dropped has left the window.
    """

    def __init__(self, feature: Feature, rows: int) -> None:
        self.feature = feature
        self.keys = np.full((rows, feature.cap), FREE, np.int64)
        """Hashed ids [R, L] of each user."""
        self.last = np.full((rows, feature.cap), FREE, np.int32)
        """Newest hop of each lane's id."""
        self.newest = np.full(rows, FREE, np.int32)
        """Newest hop of each user."""
        self.theta = np.full(rows, FULL_RANGE, np.int64)
        self.dropped = np.full(rows, FREE, np.int32)
        """Newest hop of the ids that were dropped."""

    def clear(self, rows: I64) -> None:
        """Forget everything of these users."""
        self.keys[rows] = FREE
        self.last[rows] = self.newest[rows] = self.dropped[rows] = FREE
        self.theta[rows] = FULL_RANGE

    def values(self, rows: I64, as_of_ms: I64) -> tuple[I64, Bool, I64]:
        """Return the counts [U], whether each is exact [U], and when the first id leaves the window [U]."""
        feature = self.feature
        begin = (as_of_ms - feature.window_ms) // feature.hop_ms  # [U]
        last = self.last[rows].astype(np.int64)
        inside = (last >= begin[:, None]) & (self.keys[rows] != FREE)  # [U, L]
        counts = inside.sum(axis=1)
        exact = (self.theta[rows] == FULL_RANGE) | (self.dropped[rows] < begin)
        estimates = np.rint(counts * (FULL_RANGE / self.theta[rows])).astype(np.int64)
        oldest = np.where(inside, last, NEVER_MS // feature.hop_ms - feature.tiles).min(axis=1)
        until_ms = np.where(counts > 0, (oldest + 1) * feature.hop_ms + feature.window_ms, NEVER_MS)
        return np.where(exact, counts, estimates), exact, until_ms
