"""Features of the newest events: the last k items, the time since the last event, and the session that is open.

Shapes: E events, U users, K items, S sessions of a user.
"""

from __future__ import annotations

import numpy as np

from encoder.arrays import F64, I64
from streams.core.columns import rows_where, run_lengths, run_starts
from streams.core.features.definitions import Feature
from streams.core.features.tiles import NEVER_MS, Events

LONG_AGO_MS = -(2**62)
SESSIONS = 8
"""Sessions that are kept of a user, so that late events can join the newest ones."""


def ranks_from_end(rows: I64) -> I64:
    """Return each event's place counted from the end of its run of equal rows, from 0.

    >>> ranks_from_end(np.array([4, 4, 4, 7])).tolist()
    [2, 1, 0, 0]
    """
    starts = run_starts(rows)
    lengths = run_lengths(starts, len(rows))
    return np.repeat(starts + lengths - 1, lengths) - np.arange(len(rows))


class LastK:
    """The items of the last k events, newest first; of equal event times the one that arrived later is newer."""

    def __init__(self, feature: Feature, rows: int) -> None:
        self.feature = feature
        self.items = np.zeros((rows, feature.k), np.int64)
        self.times_ms = np.full((rows, feature.k), LONG_AGO_MS)

    def add(self, events: Events) -> None:
        """Add events in order of arrival."""
        counts = rows_where(events.selected(self.feature.filter))
        rows, items, times_ms = events.rows[counts], events.items[counts], events.timestamp_ms[counts]
        order = np.lexsort((times_ms, rows))
        rows, items, times_ms = rows[order], items[order], times_ms[order]
        newest = ranks_from_end(rows) < self.feature.k
        rows, items, times_ms = rows[newest], items[newest], times_ms[newest]
        while len(rows):  # the oldest of each user first
            now = run_starts(rows)
            self._insert(rows[now], items[now], times_ms[now])
            rows, items, times_ms = np.delete(rows, now), np.delete(items, now), np.delete(times_ms, now)

    def _insert(self, rows: I64, items: I64, times_ms: I64) -> None:
        """Insert one event for each of distinct users before the first that is not newer."""
        held_items, held_ms = self.items[rows], self.times_ms[rows]
        place = (held_ms > times_ms[:, None]).sum(axis=1)  # [U], K if all are newer
        source = np.arange(self.feature.k) - (np.arange(self.feature.k) > place[:, None])  # [U, K]
        held_items, held_ms = np.take_along_axis(held_items, source, 1), np.take_along_axis(held_ms, source, 1)
        fits = rows_where(place < self.feature.k)
        held_items[fits, place[fits]], held_ms[fits, place[fits]] = items[fits], times_ms[fits]
        self.items[rows], self.times_ms[rows] = held_items, held_ms

    def clear(self, rows: I64) -> None:
        """Forget everything of these users."""
        self.items[rows], self.times_ms[rows] = 0, LONG_AGO_MS

    def values(self, rows: I64) -> I64:
        """Return the keys of the items [U, K], newest first, 0 where there are fewer events."""
        found: I64 = self.items[rows]
        return found


class SecondsSince:
    """The time since the user's last event."""

    def __init__(self, feature: Feature, rows: int) -> None:
        self.feature = feature
        self.last_ms = np.full(rows, LONG_AGO_MS)

    def add(self, events: Events) -> None:
        """Add events, in any order."""
        counts = events.selected(self.feature.filter)
        np.maximum.at(self.last_ms, events.rows[counts], events.timestamp_ms[counts])

    def clear(self, rows: I64) -> None:
        """Forget everything of these users."""
        self.last_ms[rows] = LONG_AGO_MS

    def values(self, rows: I64, as_of_ms: I64) -> F64:
        """Return the seconds [U], NaN for a user without an event. They grow with time, all alike."""
        last_ms = self.last_ms[rows]
        return np.where(last_ms == LONG_AGO_MS, np.nan, (as_of_ms - last_ms) / 1_000)


class Sessions:
    """Sessions: events of which each is at most `gap` after the one before. The newest 8 of a user are kept.

    A late event joins the session in whose reach it is, or joins two to one. The open session is exact unless late
    events would join it with the eighth before it.
    """

    def __init__(self, gap_ms: int, rows: int) -> None:
        self.gap_ms = gap_ms
        self.first_ms = np.full((rows, SESSIONS), LONG_AGO_MS)
        self.last_ms = np.full((rows, SESSIONS), LONG_AGO_MS)
        """Times of each session's last event, newest first."""
        self.depths = np.zeros((rows, SESSIONS), np.int64)

    def add(self, rows: I64, timestamp_ms: I64) -> None:
        """Add events, in any order."""
        order = np.lexsort((timestamp_ms, rows))
        rows, times_ms = rows[order], timestamp_ms[order]
        is_start = np.ones(len(rows), np.bool_)
        is_start[1:] = (rows[1:] != rows[:-1]) | (times_ms[1:] - times_ms[:-1] > self.gap_ms)
        starts = rows_where(is_start)  # events of one batch that make up one session are added as one
        depths = run_lengths(starts, len(rows))
        first_ms, last_ms, rows = times_ms[starts], times_ms[starts + depths - 1], rows[starts]
        newest = ranks_from_end(rows) < SESSIONS
        first_ms, last_ms, rows, depths = first_ms[newest], last_ms[newest], rows[newest], depths[newest]
        while len(rows):
            now = run_starts(rows)
            self._join(rows[now], first_ms[now], last_ms[now], depths[now])
            first_ms, last_ms = np.delete(first_ms, now), np.delete(last_ms, now)
            rows, depths = np.delete(rows, now), np.delete(depths, now)

    def _join(self, rows: I64, first_ms: I64, last_ms: I64, depths: I64) -> None:
        """Add one session for each of distinct users, and join it with those in reach."""
        firsts, lasts, counts = self.first_ms[rows], self.last_ms[rows], self.depths[rows]  # [U, S]
        near = (counts > 0) & (first_ms[:, None] - lasts <= self.gap_ms) & (firsts - last_ms[:, None] <= self.gap_ms)
        first_ms = np.minimum(first_ms, np.where(near, firsts, NEVER_MS).min(axis=1))
        last_ms = np.maximum(last_ms, np.where(near, lasts, LONG_AGO_MS).max(axis=1))
        depths = depths + np.where(near, counts, 0).sum(axis=1)
        lasts = np.where(near, LONG_AGO_MS, lasts)
        counts = np.where(near, 0, counts)
        firsts, lasts = np.column_stack((first_ms, firsts)), np.column_stack((last_ms, lasts))
        counts = np.column_stack((depths, counts))
        order = np.argsort(-lasts, axis=1, kind="stable")[:, :SESSIONS]
        self.first_ms[rows] = np.take_along_axis(firsts, order, 1)
        self.last_ms[rows] = np.take_along_axis(lasts, order, 1)
        self.depths[rows] = np.take_along_axis(counts, order, 1)

    def clear(self, rows: I64) -> None:
        """Forget everything of these users."""
        self.first_ms[rows], self.last_ms[rows], self.depths[rows] = LONG_AGO_MS, LONG_AGO_MS, 0

    def values(self, rows: I64, as_of_ms: I64) -> tuple[F64, I64, I64]:
        """Return seconds [U] and events [U] of the open session, 0 without one, and when it ends [U]."""
        last_ms = self.last_ms[rows, 0]
        is_open = (self.depths[rows, 0] > 0) & (as_of_ms - last_ms <= self.gap_ms)
        seconds = np.where(is_open, (last_ms - self.first_ms[rows, 0]) / 1_000, 0.0)
        until_ms = np.where(is_open, last_ms + self.gap_ms + 1, NEVER_MS)
        return seconds, np.where(is_open, self.depths[rows, 0], 0), until_ms
