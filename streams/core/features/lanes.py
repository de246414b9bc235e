"""Lanes: a bounded number of ids per user, found by comparison; and `distinct`, which counts them over a window.

Shapes: E events, U users, L lanes of a user.
"""

from __future__ import annotations

import numpy as np

from encoder.arrays import I64, Bool
from streams.core.columns import rows_where, run_starts
from streams.core.features.definitions import Feature
from streams.core.features.tiles import NEVER_MS, Events

FREE = -1
"""Key of a lane without an id."""
FULL_RANGE = 2**32
"""Ids of `distinct` are hashed to numbers below this."""
MIX = np.uint64(0x9E3779B97F4A7C15)
"""Odd multiplier after Fibonacci hashing: its product's upper bits depend on every bit of an id."""


class Lanes:
    """Up to `cap` ids of each user."""

    def __init__(self, rows: int, cap: int) -> None:
        self.cap = cap
        self.keys = np.full((rows, cap), FREE, np.int64)

    def find(self, rows: I64, keys: I64) -> tuple[I64, Bool]:
        """Return the lane [E] of each key in its row, and whether it has one [E]."""
        equal = self.keys[rows] == keys[:, None]  # [E, L]
        lanes = equal.argmax(axis=1)
        return lanes, equal[np.arange(len(rows)), lanes]

    def clear(self, rows: I64) -> None:
        """Free all lanes of these users."""
        self.keys[rows] = FREE


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
        self.feature, self.lanes = feature, Lanes(rows, feature.cap)
        self.last = np.full((rows, feature.cap), FREE, np.int32)
        """Newest hop of each lane's id."""
        self.newest = np.full(rows, FREE, np.int32)
        """Newest hop of each user."""
        self.theta = np.full(rows, FULL_RANGE, np.int64)
        self.dropped = np.full(rows, FREE, np.int32)
        """Newest hop of the ids that were dropped."""

    def add(self, events: Events) -> None:
        """Add events, in any order."""
        keys = hashed(events.items if self.feature.of == "item" else events.surfaces)
        counts = events.selected(self.feature.filter) & (keys != FREE)
        rows, keys = events.rows[counts], keys[counts]
        hops = (events.timestamp_ms[counts] // self.feature.hop_ms).astype(np.int32)
        np.maximum.at(self.newest, rows, hops)
        self._recover(rows)
        lanes, found = self.lanes.find(rows, keys)
        np.maximum.at(self.last, (rows[found], lanes[found]), hops[found])
        new = ~found & (hops >= self._floor(rows))
        if new.any():
            self._enter(rows[new], keys[new], hops[new])

    def _floor(self, rows: I64) -> I64:
        """Return the oldest hop that a window can still reach."""
        return self.newest[rows].astype(np.int64) - self.feature.tiles + 1

    def _recover(self, rows: I64) -> None:
        """Lift theta of users whose dropped ids have all left the window."""
        sampled = rows[(self.theta[rows] < FULL_RANGE) & (self.dropped[rows] < self._floor(rows))]
        self.theta[sampled], self.dropped[sampled] = FULL_RANGE, FREE

    def _enter(self, rows: I64, keys: I64, hops: I64) -> None:
        """Give ids that have no lane one, in ascending order of their hashes."""
        order = np.lexsort((-hops, keys, rows))
        rows, keys, hops = rows[order], keys[order], hops[order]
        starts = run_starts(rows * FULL_RANGE + keys)  # the newest hop of each id comes first
        rows, keys, hops = rows[starts], keys[starts], hops[starts]
        while len(rows):
            beyond = keys >= self.theta[rows]
            np.maximum.at(self.dropped, rows[beyond], hops[beyond])
            rows, keys, hops = rows[~beyond], keys[~beyond], hops[~beyond]
            now = run_starts(rows)  # one id of each user
            self._enter_one(rows[now], keys[now], hops[now])
            rest = np.ones(len(rows), np.bool_)
            rest[now] = False
            rows, keys, hops = rows[rest], keys[rest], hops[rest]

    def _enter_one(self, rows: I64, keys: I64, hops: I64) -> None:
        """Enter an id for each of distinct users: in a lane that is free or out of reach, or in that of the largest."""
        held = np.where(self.last[rows] >= self._floor(rows)[:, None], self.lanes.keys[rows], FREE)  # [U, L]
        free, is_free = (held == FREE).argmax(axis=1), (held == FREE).any(axis=1)
        largest = held.argmax(axis=1)
        replaced = held[np.arange(len(rows)), largest]
        full = rows_where(~is_free)
        is_smaller = keys[full] < replaced[full]
        self.theta[rows[full]] = np.maximum(keys[full], replaced[full])
        gone = np.where(is_smaller, self.last[rows[full], largest[full]], hops[full])
        self.dropped[rows[full]] = np.maximum(self.dropped[rows[full]], gone)
        enters = is_free.copy()
        enters[full] = is_smaller
        lanes = np.where(is_free, free, largest)[enters]
        self.lanes.keys[rows[enters], lanes] = keys[enters]
        self.last[rows[enters], lanes] = hops[enters]

    def clear(self, rows: I64) -> None:
        """Forget everything of these users."""
        self.lanes.clear(rows)
        self.last[rows] = self.newest[rows] = self.dropped[rows] = FREE
        self.theta[rows] = FULL_RANGE

    def values(self, rows: I64, as_of_ms: I64) -> tuple[I64, Bool, I64]:
        """Return the counts [U], whether each is exact [U], and when the first id leaves the window [U]."""
        feature = self.feature
        begin = (as_of_ms - feature.window_ms) // feature.hop_ms  # [U]
        last = self.last[rows].astype(np.int64)
        inside = (last >= begin[:, None]) & (self.lanes.keys[rows] != FREE)  # [U, L]
        counts = inside.sum(axis=1)
        exact = (self.theta[rows] == FULL_RANGE) | (self.dropped[rows] < begin)
        estimates = np.rint(counts * (FULL_RANGE / self.theta[rows])).astype(np.int64)
        oldest = np.where(inside, last, NEVER_MS // feature.hop_ms - feature.tiles).min(axis=1)
        until_ms = np.where(counts > 0, (oldest + 1) * feature.hop_ms + feature.window_ms, NEVER_MS)
        return np.where(exact, counts, estimates), exact, until_ms
