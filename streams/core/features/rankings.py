"""Rankings: the values of an item attribute that a user acts on most, over a window or with decay.

Values of an attribute are codes in the order of their names, so that ties are in the order of the names.

Shapes: E events, U users, L lanes of a user, T tiles.
"""

from __future__ import annotations

import numpy as np

from encoder.arrays import F64, I64
from streams.core.columns import rows_where, run_starts
from streams.core.features.definitions import Feature
from streams.core.features.lanes import FREE, FULL_RANGE, Lanes
from streams.core.features.tiles import EMPTY, NEVER_MS, Events

LONG_AGO_MS = -(2**62)


class Ranking:
    """What both rankings share: a lane for each value, of which the least valuable is given up at `cap`.

    The ranking is exact while a user's events touch at most `cap` values; beyond that the value with the least is
    dropped with its count, and begins at 0 when it comes again.
    """

    def __init__(self, feature: Feature, rows: int) -> None:
        self.feature, self.lanes = feature, Lanes(rows, feature.cap)
        self.dropped = np.zeros(rows, np.bool_)
        """Whether a value of the user was ever dropped."""

    def _worth(self, rows: I64) -> F64:
        """Return what each lane holds [U, L]; 0 may be given up without a loss."""
        raise NotImplementedError

    def _reset(self, rows: I64, lanes: I64) -> None:
        """Begin lanes at 0."""
        raise NotImplementedError

    def _chosen(self, events: Events) -> tuple[I64, I64, I64]:
        """Return row, code and event time of the events that count."""
        codes = events.groups[self.feature.group]
        counts = events.selected(self.feature.filter) & (codes >= 0)
        return events.rows[counts], codes[counts], events.timestamp_ms[counts]

    def _lanes_of(self, rows: I64, codes: I64) -> I64:
        """Return the lane of each code, giving it one if it has none; FREE for what a later code has displaced."""
        lanes, found = self.lanes.find(rows, codes)
        if found.all():
            return lanes
        pairs = np.unique(rows[~found] * FULL_RANGE + codes[~found])
        while len(pairs):
            now = run_starts(pairs // FULL_RANGE)
            self._enter_one(pairs[now] // FULL_RANGE, pairs[now] % FULL_RANGE)
            pairs = np.delete(pairs, now)
        lanes, found = self.lanes.find(rows, codes)
        self.dropped[rows[~found]] = True
        return np.where(found, lanes, FREE)

    def _enter_one(self, rows: I64, codes: I64) -> None:
        """Enter one code for each of distinct users."""
        keys = self.lanes.keys[rows]
        worth = np.where(keys == FREE, -1.0, self._worth(rows))  # a free lane comes first
        lanes = worth.argmin(axis=1)
        self.dropped[rows] |= worth[np.arange(len(rows)), lanes] > 0
        self.lanes.keys[rows, lanes] = codes
        self._reset(rows, lanes)

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

    def _worth(self, rows: I64) -> F64:
        floor = self.hops[rows].max(axis=1) - self.feature.tiles + 1
        alive = self.hops[rows] >= floor[:, None]  # [U, T]
        worth: F64 = (self.counts[rows] * alive[:, None, :]).sum(axis=2, dtype=np.float64)
        return worth

    def _reset(self, rows: I64, lanes: I64) -> None:
        self.counts[rows, lanes] = 0

    def add(self, events: Events) -> None:
        """Add events, in any order."""
        rows, codes, timestamp_ms = self._chosen(events)
        if not len(rows):
            return
        hops = (timestamp_ms // self.feature.hop_ms).astype(np.int32)
        tiles = hops % self.feature.tiles
        before = self.hops[rows, tiles]
        np.maximum.at(self.hops, (rows, tiles), hops)
        newest = self.hops[rows, tiles]
        begun = rows_where(newest > before)
        self.counts[rows[begun], :, tiles[begun]] = 0
        fits = rows_where(hops == newest)
        lanes = self._lanes_of(rows[fits], codes[fits])
        kept = fits[lanes != FREE]
        np.add.at(self.counts, (rows[kept], lanes[lanes != FREE], tiles[kept]), 1)

    def clear(self, rows: I64) -> None:
        """Forget everything of these users."""
        self.lanes.clear(rows)
        self.hops[rows], self.counts[rows], self.dropped[rows] = EMPTY, 0, False

    def values(self, rows: I64, as_of_ms: I64) -> tuple[I64, F64, I64]:
        """Return the first codes [U, k] and their counts [U, k], and when the first event leaves the window [U]."""
        feature = self.feature
        begin = (as_of_ms - feature.window_ms) // feature.hop_ms
        hops = self.hops[rows].astype(np.int64)
        inside = hops >= begin[:, None]  # [U, T]
        counts = np.where(inside[:, None, :], self.counts[rows].astype(np.int64), 0)  # [U, L, T]
        codes, best = self._first_k(self.lanes.keys[rows], counts.sum(axis=2, dtype=np.float64))
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

    def _worth(self, rows: I64) -> F64:
        worth: F64 = self.sums[rows]
        return worth

    def _reset(self, rows: I64, lanes: I64) -> None:
        self.sums[rows, lanes] = 0

    def add(self, events: Events) -> None:
        """Add events, in any order."""
        rows, codes, timestamp_ms = self._chosen(events)
        if not len(rows):
            return
        distinct = np.unique(rows)
        before = self.newest_ms[distinct]
        np.maximum.at(self.newest_ms, rows, timestamp_ms)
        self.sums[distinct] *= self._decay(before - self.newest_ms[distinct])[:, None]
        lanes = self._lanes_of(rows, codes)
        kept = lanes != FREE
        np.add.at(self.sums, (rows[kept], lanes[kept]), self._decay(timestamp_ms - self.newest_ms[rows])[kept])

    def _decay(self, later_ms: I64) -> F64:
        """Return the factor for a time that is later by `later_ms`, which is negative for an older one."""
        factor: F64 = np.exp2(np.maximum(later_ms / self.feature.half_life_ms, -1100.0))
        return factor

    def clear(self, rows: I64) -> None:
        """Forget everything of these users."""
        self.lanes.clear(rows)
        self.sums[rows], self.newest_ms[rows], self.dropped[rows] = 0, LONG_AGO_MS, False

    def values(self, rows: I64, as_of_ms: I64) -> tuple[I64, F64]:
        """Return the first codes [U, k] and their sums [U, k] as of a time. They shrink with time, all alike."""
        sums = self.sums[rows] * self._decay(self.newest_ms[rows] - as_of_ms)[:, None]
        return self._first_k(self.lanes.keys[rows], sums)
