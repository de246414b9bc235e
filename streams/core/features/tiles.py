"""Tiles: rings of aggregates per hop, for count, sum, mean, min and max over sliding windows.

All features of one hop share a ring. A tile holds one number per *accumulator*, which is a filter with a statistic, so
that features over different windows, or with other names, do not count the same events twice.

    hop 1 d, 8 tiles          slot = hop index modulo 8
    slot           0     1     2     3     4     5     6     7
    hop index     96    97    98    99   100    93    94    95      newest 100; 92 and before are gone

A late event goes into the tile of its hop if the ring still has it; otherwise no window can reach it any more.

Shapes: U users, R rows of the hot table, T tiles of a ring, A accumulators of a ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from encoder.arrays import F64, I64
from streams.core.features.definitions import Feature, Filter, Kind

EMPTY = -1
"""Hop index of a tile without events."""
NEVER_MS = 2**62


class Statistic(IntEnum):
    """What an accumulator does with the number of an event."""

    COUNT = 0
    SUM = 1
    MIN = 2
    MAX = 3


INITIAL = {Statistic.COUNT: 0.0, Statistic.SUM: 0.0, Statistic.MIN: np.inf, Statistic.MAX: -np.inf}
STATISTICS = {
    Kind.COUNT: (Statistic.COUNT,),
    Kind.SUM: (Statistic.COUNT, Statistic.SUM),
    Kind.MEAN: (Statistic.COUNT, Statistic.SUM),
    Kind.MIN: (Statistic.COUNT, Statistic.MIN),
    Kind.MAX: (Statistic.COUNT, Statistic.MAX),
}
"""Accumulators of each kind; the count tells whether there is any event at all."""
KINDS = frozenset(STATISTICS)


@dataclass(frozen=True, slots=True)
class Accumulator:
    """A statistic over the events that pass a filter and have the number `of`; "" stands for the event itself."""

    filter: Filter
    of: str
    statistic: Statistic


class Ring:
    """The tiles of all users for one hop."""

    def __init__(self, hop_ms: int, features: Sequence[Feature], rows: int) -> None:
        """Make room for `rows` users; `features` are all of this hop and of `KINDS`."""
        self.hop_ms, self.features = hop_ms, tuple(features)
        self.tiles = max(each.tiles for each in features)
        wanted = [
            Accumulator(each.filter, each.of, statistic) for each in features for statistic in STATISTICS[each.kind]
        ]
        self.accumulators = tuple(dict.fromkeys(wanted))
        self._number = {accumulator: at for at, accumulator in enumerate(self.accumulators)}
        self.initial = np.array([INITIAL[each.statistic] for each in self.accumulators])  # [A]
        self.hops = np.full((rows, self.tiles), EMPTY, np.int32)
        self.numbers = np.empty((rows * self.tiles, len(self.accumulators)))
        """Numbers of each cell, side by side: an event touches one place in memory per ring."""
        self.numbers[:] = self.initial

    def clear(self, rows: I64) -> None:
        """Forget everything of these users."""
        self.hops[rows] = EMPTY
        self.numbers.reshape(-1, self.tiles, len(self.accumulators))[rows] = self.initial

    def values(self, rows: I64, as_of_ms: I64) -> tuple[dict[str, F64], I64]:
        """Return the values [U] by feature name, and when [U] the first of them changes without an event.

        NaN stands for "none": the mean, least or greatest of no number.
        """
        hops = self.hops[rows].astype(np.int64)  # [U, T]
        numbers = self.numbers.reshape(-1, self.tiles, len(self.accumulators))[rows]  # [U, T, A]
        values, until_ms = {}, np.full(len(rows), NEVER_MS)
        for feature in self.features:
            begin = (as_of_ms - feature.window_ms) // self.hop_ms  # [U] first hop of the window
            counts = np.where(hops >= begin[:, None], self._numbers_of(numbers, feature, Statistic.COUNT), 0.0)
            values[feature.name] = self._value(feature, numbers, counts)
            oldest = np.where(counts > 0, hops, NEVER_MS // self.hop_ms - self.tiles).min(axis=1)
            gone_ms = np.where(counts.any(axis=1), (oldest + 1) * self.hop_ms + feature.window_ms, NEVER_MS)
            until_ms = np.minimum(until_ms, gone_ms)
        return values, until_ms

    def place(self, feature: Feature, statistic: Statistic) -> int:
        """Return the index of an accumulator of a feature."""
        return self._number[Accumulator(feature.filter, feature.of, statistic)]

    def _numbers_of(self, numbers: F64, feature: Feature, statistic: Statistic) -> F64:
        """Return the tiles [U, T] of one accumulator."""
        found: F64 = numbers[:, :, self.place(feature, statistic)]
        return found

    def _value(self, feature: Feature, numbers: F64, counts: F64) -> F64:
        """Return the value [U] over the tiles that are in the window; `counts` [U, T] is 0 in all others."""
        total: F64 = counts.sum(axis=1)
        if feature.kind is Kind.COUNT:
            return total
        statistic = STATISTICS[feature.kind][1]
        tiles = np.where(counts > 0, self._numbers_of(numbers, feature, statistic), INITIAL[statistic])
        if statistic is Statistic.SUM:
            summed: F64 = np.cumsum(tiles, axis=1)[:, -1]  # one after another, as the kernel does
            return (
                summed
                if feature.kind is Kind.SUM
                else np.divide(summed, total, np.full(len(total), np.nan), where=total > 0)
            )
        extreme: F64 = tiles.min(axis=1) if statistic is Statistic.MIN else tiles.max(axis=1)
        return np.where(total > 0, extreme, np.nan)
