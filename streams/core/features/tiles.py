"""Tiles: rings of aggregates per hop, for count, sum, mean, min and max over sliding windows.

All features of one hop share a ring. A tile holds one number per *accumulator*, which is a filter with a statistic, so
that features over different windows, or with other names, do not count the same events twice.

    hop 1 d, 8 tiles          slot = hop index modulo 8
    slot           0     1     2     3     4     5     6     7
    hop index     96    97    98    99   100    93    94    95      newest 100; 92 and before are gone

A late event goes into the tile of its hop if the ring still has it; otherwise no window can reach it any more.

All arrays of a feature state begin as zeros that take no memory, so zero means "nothing" everywhere: a tile holds the
*mark* of its hop, which is the hop index plus one.

Shapes: U users, R rows of the hot table, T tiles of a ring, A accumulators of a ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from encoder.arrays import F64, I64
from streams.core.features.definitions import Feature, Filter, Kind

NEVER_MS = 2**62


class Statistic(IntEnum):
    """What an accumulator does with the number of an event."""

    COUNT = 0
    SUM = 1
    MIN = 2
    MAX = 3
    MEAN_SUM = 4


INITIAL = {
    Statistic.COUNT: 0.0,
    Statistic.SUM: 0.0,
    Statistic.MIN: np.inf,
    Statistic.MAX: -np.inf,
    Statistic.MEAN_SUM: 0.0,
}
STATISTICS = {
    Kind.COUNT: (Statistic.COUNT,),
    Kind.SUM: (Statistic.SUM,),
    Kind.MEAN: (Statistic.COUNT, Statistic.MEAN_SUM),
    Kind.MIN: (Statistic.MIN,),
    Kind.MAX: (Statistic.MAX,),
}
"""Accumulators of each kind, its value last.

A mean has a sum of its own, so that its sum and its count always cover the same events, even if a sum of the same
numbers was defined earlier than the mean.
"""
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
        self.accumulators = tuple(dict.fromkeys(each for feature in features for each in accumulators_of(feature)))
        self._number = {accumulator: at for at, accumulator in enumerate(self.accumulators)}
        self.initial = np.array([INITIAL[each.statistic] for each in self.accumulators])  # [A]
        self.cells = np.zeros((rows, self.tiles, 1 + len(self.accumulators)))
        """[R, T, 1 + A]: mark and numbers of each tile, side by side: an event touches one place in memory per ring."""

    def values(self, rows: I64, as_of_ms: I64) -> tuple[dict[str, F64], I64]:
        """Return the values [U] by feature name, and when [U] the first of them changes without an event.

        NaN and infinity stand for "none": the mean, least or greatest of no number, or a sum beyond every number.
        """
        cells = self.cells[rows]
        hops, numbers = cells[:, :, 0].astype(np.int64) - 1, cells[:, :, 1:]  # [U, T], [U, T, A]
        values, until_ms = {}, np.full(len(rows), NEVER_MS)
        for feature in self.features:
            begin = (as_of_ms - feature.window_ms) // self.hop_ms  # [U] first hop of the window
            first, last = STATISTICS[feature.kind][0], STATISTICS[feature.kind][-1]
            evidence, tiles = (numbers[:, :, self.place(feature, each)] for each in (first, last))
            used = (hops >= np.maximum(begin, 0)[:, None]) & (evidence != INITIAL[first])  # [U, T]
            values[feature.name] = _value(feature, np.where(used, tiles, INITIAL[last]), np.where(used, evidence, 0.0))
            oldest = np.where(used, hops, NEVER_MS // self.hop_ms - self.tiles).min(axis=1)
            gone_ms = np.where(used.any(axis=1), (oldest + 1) * self.hop_ms + feature.window_ms, NEVER_MS)
            until_ms = np.minimum(until_ms, gone_ms)
        return values, until_ms

    def place(self, feature: Feature, statistic: Statistic) -> int:
        """Return the index of an accumulator of a feature."""
        return self._number[Accumulator(feature.filter, feature.of, statistic)]

    def oldest_ms(self, feature: Feature, rows: I64) -> I64:
        """Return where the oldest tile begins that is kept of users [U], 0 if a window of the feature needs no older.

        The accumulators of the feature must be among those of the ring, which need not have the feature.
        """
        reach = min(self.reach(each) for each in accumulators_of(feature))
        if feature.tiles <= reach:
            return np.zeros(len(rows), np.int64)
        newest: I64 = self.cells[rows, :, 0].max(axis=1).astype(np.int64) - 1
        return np.maximum(newest - reach + 1, 0) * self.hop_ms

    def reach(self, accumulator: Accumulator) -> int:
        """Return the number of tiles, counted from the newest, that windows over an accumulator can touch."""
        return max(each.tiles for each in self.features if accumulator in accumulators_of(each))


def accumulators_of(feature: Feature) -> tuple[Accumulator, ...]:
    """Return the accumulators that a feature of `KINDS` is computed from."""
    return tuple(Accumulator(feature.filter, feature.of, each) for each in STATISTICS[feature.kind])


def _value(feature: Feature, tiles: F64, counts: F64) -> F64:
    """Return the value [U] of the tiles [U, T] in the window; a mean divides by the sum of `counts` [U, T]."""
    match feature.kind:
        case Kind.MIN:
            least: F64 = tiles.min(axis=1)
            return least
        case Kind.MAX:
            greatest: F64 = tiles.max(axis=1)
            return greatest
        case _:
            total: F64 = np.cumsum(tiles, axis=1)[:, -1]  # one after another, as the kernel does
            number = counts.sum(axis=1) if feature.kind is Kind.MEAN else np.ones(len(tiles))
            quotient: F64 = np.divide(total, number, np.full(len(total), np.nan), where=number > 0)
            return quotient
