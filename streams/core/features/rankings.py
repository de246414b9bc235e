"""Rankings: the values of an item attribute that a user acts on most, over a window or with decay.

Values of an attribute are codes in the order of their names, so that ties are in the order of the names.

Shapes: U users, R rows of the hot table, L lanes of a user, T tiles.
"""

from __future__ import annotations

import math

import numpy as np

from encoder.arrays import F64, I64, Bool
from streams.core.features.definitions import Feature
from streams.core.features.tiles import NEVER_MS

TILE_COUNT_MAX = 65_535
"""Events of a value that a tile can count."""
HEAD_DTYPE = np.dtype(
    [
        ("newest_ms", "<i8"),  # of `Affinity`: time of the user's newest event, plus one
        (
            "dropped",
            "<u4",
        ),  # of `TopK`: mark of the newest hop of missing counts; of `Affinity`: whether a sum is missing
        ("used", "<u4"),  # lanes in use
    ]
)


class Ranking:
    """Base of both rankings: each value has a lane, and the lane with the least is given up at `cap`.

    The ranking is exact while a user's events touch at most `cap` values; beyond that the value with the least, and of
    equal ones that with the last name, is dropped with its number, and begins at 0 when it comes again.
    """

    def __init__(self, feature: Feature, rows: int) -> None:
        self.feature = feature
        self.keys = np.zeros((rows, feature.cap), np.int32)
        """Codes [R, L] of the values that each user's lanes are for."""
        self.heads = np.zeros(rows, HEAD_DTYPE)

    def _first_k(self, rows: I64, totals: F64) -> tuple[I64, F64]:
        """Return the codes [U, k] with the greatest totals, -1 where there are fewer, and the totals [U, k]."""
        keys = self.keys[rows].astype(np.int64)
        totals = np.where(np.arange(self.feature.cap) < self.heads["used"][rows][:, None], totals, 0.0)
        order = np.lexsort((keys, -totals), axis=1)[:, : self.feature.k]
        codes, best = np.take_along_axis(keys, order, 1), np.take_along_axis(totals, order, 1)
        return np.where(best > 0, codes, -1), best


class TopK(Ranking):
    """The values with the most events in the window.

    A tile counts at most `TILE_COUNT_MAX` events of a value. What is beyond that is missing like what was dropped, and
    the ranking is an estimate until the hop of what is missing has left the window.
    """

    def __init__(self, feature: Feature, rows: int) -> None:
        super().__init__(feature, rows)
        self.marks = np.zeros((rows, feature.tiles), np.uint32)
        self.counts = np.zeros((rows, feature.tiles, feature.cap), np.uint16)
        """[R, T, L]: an event touches one place, and sums of lanes are sums of vectors."""

    def values(self, rows: I64, as_of_ms: I64) -> tuple[I64, F64, Bool, I64]:
        """Return codes [U, k] and counts [U, k], which are estimates [U], and when the first event leaves [U]."""
        feature = self.feature
        begin = np.maximum((as_of_ms - feature.window_ms) // feature.hop_ms, 0)
        hops = self.marks[rows].astype(np.int64) - 1
        used = np.arange(feature.cap) < self.heads["used"][rows][:, None]  # [U, L]
        inside = (hops >= begin[:, None])[:, :, None] & used[:, None, :]  # [U, T, L]
        counts = np.where(inside, self.counts[rows].astype(np.int64), 0)
        codes, best = self._first_k(rows, counts.sum(axis=1, dtype=np.float64))
        never = NEVER_MS // feature.hop_ms - feature.tiles
        oldest = np.where(counts.any(axis=2), hops, never).min(axis=1)
        until_ms = np.where(oldest < never, (oldest + 1) * feature.hop_ms + feature.window_ms, NEVER_MS)
        return codes, best, self.heads["dropped"][rows].astype(np.int64) - 1 >= begin, until_ms


class Affinity(Ranking):
    """The values with the greatest sums of events, each halved every `half_life`.

    Sums are as of the begin of the half-life of the user's newest event, counted from 1970. Whenever a later one
    begins, all are multiplied by a power of two, which is exact. So the order of events does not matter: a late one
    adds less.
    """

    def __init__(self, feature: Feature, rows: int) -> None:
        super().__init__(feature, rows)
        self.sums = np.zeros((rows, feature.cap))

    def values(self, rows: I64, as_of_ms: I64) -> tuple[I64, F64, Bool]:
        """Return codes [U, k] and their sums [U, k] as of a time, and which are estimates [U].

        The sums shrink with time, all alike.
        """
        half_life_ms, heads = self.feature.half_life_ms, self.heads[rows]
        begin_ms = np.maximum(heads["newest_ms"] - 1, 0) // half_life_ms * half_life_ms
        exponents = np.maximum((begin_ms - as_of_ms) / half_life_ms, -1100.0)
        factors = np.array([math.exp2(each) for each in exponents.tolist()])  # np.exp2 rounds otherwise than the kernel
        codes, best = self._first_k(rows, self.sums[rows] * factors[:, None])
        return codes, best, heads["dropped"] > 0
