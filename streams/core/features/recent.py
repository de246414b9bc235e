"""Features of the newest events: the last k items, the time since the last event, and the session that is open.

Shapes: U users, K items of a user.
"""

from __future__ import annotations

import numpy as np

from encoder.arrays import F64, I64
from streams.core.features.definitions import Feature
from streams.core.features.tiles import NEVER_MS

SESSIONS = 8
"""Sessions that are kept of a user, so that late events can join the newest ones."""
SESSION_DTYPE = np.dtype([("first_ms", "<i8"), ("last_ms", "<i8"), ("depth", "<i8")])
"""Times of the first and last event, and the number of events: 0 for no session."""


class LastK:
    """The items of the last k events, newest first; of equal event times the one that arrived later is newer."""

    def __init__(self, feature: Feature, rows: int) -> None:
        self.feature = feature
        self.items = np.zeros((rows, feature.k), np.int64)
        self.times_ms = np.zeros((rows, feature.k), np.int64)

    def values(self, rows: I64) -> I64:
        """Return the keys of the items [U, K], newest first, 0 where there are fewer events."""
        found: I64 = self.items[rows]
        return found


class SecondsSince:
    """The time since the user's last event."""

    def __init__(self, feature: Feature, rows: int) -> None:
        self.feature = feature
        self.last_ms = np.zeros(rows, np.int64)
        """Time of the last event plus one, 0 without one."""

    def values(self, rows: I64, as_of_ms: I64) -> F64:
        """Return the seconds [U], NaN for a user without an event. They grow with time, all alike."""
        last_ms = self.last_ms[rows] - 1
        return np.where(last_ms < 0, np.nan, (as_of_ms - last_ms) / 1_000)


class Sessions:
    """Sessions: events of which each is at most `gap` after the one before. The newest 8 of a user are kept.

    A late event joins the session in whose reach it is, or joins two to one. The open session is exact unless late
    events would join it with the eighth before it.
    """

    def __init__(self, gap_ms: int, rows: int) -> None:
        self.gap_ms = gap_ms
        self.kept = np.zeros((rows, SESSIONS), SESSION_DTYPE)
        """The sessions of each user, newest first."""

    def values(self, rows: I64, as_of_ms: I64) -> tuple[F64, I64, I64]:
        """Return seconds [U] and events [U] of the open session, 0 without one, and when it ends [U]."""
        newest = self.kept[rows, 0]
        is_open = (newest["depth"] > 0) & (as_of_ms - newest["last_ms"] <= self.gap_ms)
        seconds = np.where(is_open, (newest["last_ms"] - newest["first_ms"]) / 1_000, 0.0)
        until_ms = np.where(is_open, newest["last_ms"] + self.gap_ms + 1, NEVER_MS)
        return seconds, np.where(is_open, newest["depth"], 0), until_ms
