"""Rankings: the values of an item attribute that a user acts on most, over a window or with decay.

Values of an attribute are codes in the order of their names, so that ties are in the order of the names.

Shapes: U users, R rows of the hot table, L lanes of a user, T tiles.
"""

from __future__ import annotations

import math

import numpy as np

from encoder.arrays import F64, I64
from streams.core.features.definitions import Feature
from streams.core.features.distinct import FREE
from streams.core.features.tiles import EMPTY, NEVER_MS

LONG_AGO_MS = -(2**62)


class Ranking:
    """Base of both rankings: each value has a lane, and the lane with the least is given up at `cap`.

    The ranking is exact while a user's events touch at most `cap` values; beyond that the value with the least is
    dropped with its count, and begins at 0 when it comes again.
    """

    def __init__(self, feature: Feature, rows: int) -> None:
        self.feature = feature
        self.keys = np.full((rows, feature.cap), FREE, np.int64)
        """Codes [R, L] of the values that each user's lanes are for."""
        self.dropped = np.zeros(rows, np.bool_)
        """Whether a value of the user was ever dropped."""

    def _first_k(self, keys: I64, totals: F64) -> tuple[I64, F64]:
        """Return the codes [U, k] with the greatest totals, FREE where there are fewer, and the totals [U, k]."""
        totals = np.where(keys == FREE, 0.0, totals)
        order = np.lexsort((keys, -totals), axis=1)[:, : self.feature.k]
        codes, best = np.take_along_axis(keys, order, 1), np.take_along_axis(totals, order, 1)
        return np.where(best > 0, codes, FREE), best


class TopK(Ranking):
    """The values with the most events in the window."""

    def __init__(self, feature: Feature, rows: int) -> None:
        super().__init__(feature, rows)
        self.hops = np.full((rows, feature.tiles), EMPTY, np.int32)
        self.counts = np.zeros((rows, feature.cap, feature.tiles), np.int32)

    def clear(self, rows: I64) -> None:
        """Forget everything of these users."""
        self.keys[rows] = FREE
        self.hops[rows], self.counts[rows], self.dropped[rows] = EMPTY, 0, False

    def values(self, rows: I64, as_of_ms: I64) -> tuple[I64, F64, I64]:
        """Return the first codes [U, k] and their counts [U, k], and when the first event leaves the window [U]."""
        feature = self.feature
        begin = (as_of_ms - feature.window_ms) // feature.hop_ms
        hops = self.hops[rows].astype(np.int64)
        inside = hops >= begin[:, None]  # [U, T]
        counts = np.where(inside[:, None, :], self.counts[rows].astype(np.int64), 0)  # [U, L, T]
        codes, best = self._first_k(self.keys[rows], counts.sum(axis=2, dtype=np.float64))
        used = counts.sum(axis=1) > 0  # [U, T]
        oldest = np.where(used, hops, NEVER_MS // feature.hop_ms - feature.tiles).min(axis=1)
        until_ms = np.where(
            oldest < NEVER_MS // feature.hop_ms - feature.tiles,
            (oldest + 1) * feature.hop_ms + feature.window_ms,
            NEVER_MS,
        )
        return codes, best, until_ms


class Affinity(Ranking):
    """The values with the greatest sums of events, each halved every `half_life`.

    A sum is kept as of the user's newest event, so the order of events does not matter: a late one adds less.
    """

    def __init__(self, feature: Feature, rows: int) -> None:
        super().__init__(feature, rows)
        self.sums = np.zeros((rows, feature.cap))
        self.newest_ms = np.full(rows, LONG_AGO_MS)

    def _decay(self, later_ms: I64) -> F64:
        """Return the factor for a time that is later by `later_ms`, which is negative for an older one."""
        exponents = np.maximum(later_ms / self.feature.half_life_ms, -1100.0)
        return np.array([math.exp2(each) for each in exponents.tolist()])  # np.exp2 rounds otherwise than the kernel

    def clear(self, rows: I64) -> None:
        """Forget everything of these users."""
        self.keys[rows] = FREE
        self.sums[rows], self.newest_ms[rows], self.dropped[rows] = 0, LONG_AGO_MS, False

    def values(self, rows: I64, as_of_ms: I64) -> tuple[I64, F64]:
        """Return the first codes [U, k] and their sums [U, k] as of a time. They shrink with time, all alike."""
        sums = self.sums[rows] * self._decay(self.newest_ms[rows] - as_of_ms)[:, None]
        return self._first_k(self.keys[rows], sums)
