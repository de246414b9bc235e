"""The rules of a sequence, one event at a time: for the few users whose events are not plain appends.

This is also the definition that the vectorised path in `streams.core.sequences` is tested against.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from encoder.actions.columns import Actions


class Outcome(IntEnum):
    """What became of an event."""

    APPLIED = 0
    LATE = 1
    """Applied, but not as the newest."""
    TOMBSTONE = 2
    DUPLICATE = 3
    TOO_OLD = 4
    FORGOTTEN = 5
    """Not younger than the tombstone of its user: dropped, so that no deleted user comes back."""


@dataclass
class Merging:
    """One user's sequence while events are merged into it, one after another."""

    rows: Actions
    """Kept actions before the merge, oldest first."""
    count: int
    applied_offset: int
    forgotten_ms: int
    length_max: int

    def __post_init__(self) -> None:
        self.times: list[int] = self.rows["timestamp_ms"].tolist()
        self.ids: list[int] = self.rows["event_id"].tolist()
        self.order = list(range(len(self.rows)))
        self.revisions = 0
        self.changed_from = self.count
        """First position that changed otherwise than by an append."""
        self.emptied = False

    def event(self, index: int, timestamp_ms: int, event_id: int, offset: int) -> Outcome:
        """Merge the event whose action is row `index` of kept and new actions put together."""
        if offset <= self.applied_offset:
            return Outcome.DUPLICATE
        if timestamp_ms <= self.forgotten_ms:
            return Outcome.FORGOTTEN
        if event_id and event_id in self.ids:
            return Outcome.DUPLICATE
        place = bisect_right(self.times, timestamp_ms)
        if place == 0 and len(self.times) == self.length_max:
            return Outcome.TOO_OLD
        is_late = place < len(self.times)
        if is_late:
            self.revisions += 1
            self.changed_from = min(self.changed_from, self.count - len(self.times) + place)
        self._insert(place, index, timestamp_ms, event_id)
        self.applied_offset = offset
        return Outcome.LATE if is_late else Outcome.APPLIED

    def tombstone(self, timestamp_ms: int, offset: int) -> Outcome:
        """Forget the user: the sequence is empty, its past does not come back."""
        if offset <= self.applied_offset:
            return Outcome.DUPLICATE
        self.times, self.ids, self.order = [], [], []
        self.count, self.changed_from, self.emptied = 0, 0, True
        self.revisions += 1
        self.forgotten_ms = max(self.forgotten_ms, timestamp_ms)
        self.applied_offset = offset
        return Outcome.TOMBSTONE

    def _insert(self, place: int, index: int, timestamp_ms: int, event_id: int) -> None:
        self.times.insert(place, timestamp_ms)
        self.ids.insert(place, event_id)
        self.order.insert(place, index)
        self.count += 1
        if len(self.times) > self.length_max:
            del self.times[0], self.ids[0], self.order[0]


def merge(user: Merging, actions: Actions, offsets: list[int], tombstones: list[bool]) -> tuple[Actions, list[Outcome]]:
    """Merge the events into `user`, in order; return its kept actions, oldest first, and each event's outcome."""
    outcomes = []
    times, ids, kept = actions["timestamp_ms"].tolist(), actions["event_id"].tolist(), len(user.rows)
    for i, (offset, is_tombstone) in enumerate(zip(offsets, tombstones, strict=True)):
        if is_tombstone:
            outcomes.append(user.tombstone(times[i], offset))
        else:
            outcomes.append(user.event(kept + i, times[i], ids[i], offset))
    return np.concatenate((user.rows, actions))[user.order], outcomes
