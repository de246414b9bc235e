"""Features of the newest events: the last k items, the time since the last event, and the session that is open.

Shapes: U users, K items of a user.
"""

from __future__ import annotations

import numpy as np

from encoder.arrays import F64, I64
from streams.core.features.definitions import Feature
from streams.core.features.tiles import NEVER_MS

LONG_AGO_MS = -(2**62)
SESSIONS = 8
"""Sessions that are kept of a user, so that late events can join the newest ones."""


class LastK:
    """The items of the last k events, newest first; of equal event times the one that arrived later is newer."""

    def __init__(self, feature: Feature, rows: int) -> None:
        self.feature = feature
        self.items = np.zeros((rows, feature.k), np.int64)
        self.times_ms = np.full((rows, feature.k), LONG_AGO_MS)

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
