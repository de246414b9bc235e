"""The rules of a sequence, event by event: for the few users whose events are not plain appends.

This is also the definition against which the vectorised path in `streams.core.sequences` is tested.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from encoder.actions.columns import Actions


class Outcome(IntEnum):
    """The outcome of applying one event."""

    APPLIED = 0
    """Applied as the user's newest action."""
    LATE = 1
    """Applied, but not as the newest action."""
    TOMBSTONE = 2
    """The user was forgotten."""
    DUPLICATE = 3
    """Dropped, because it was applied before."""
    TOO_OLD = 4
    """Dropped, because the sequence is full of newer actions."""
    FORGOTTEN = 5
    """Dropped, because it is not newer than its user's tombstone; applied, it would bring a deleted user back."""


@dataclass
class Merging:
    """The sequence of one user while events are merged into it one after another.

    `times`, `ids` and `order` are parallel lists of the sequence as it will be, oldest first. An entry of `order` is an
    index into the actions kept before the merge followed by the new actions, so no action is copied until the end.
    """

    kept: Actions
    """Actions kept before the merge, oldest first."""
    count: int
    applied_offset: int
    forgotten_ms: int
    length_max: int
    ttl_ms: int = 0
    """Gap between two actions at which the older ones are forgotten; 0 means none."""
    counts_too_old: bool = False
    """See `streams.core.layout.StateLimits`."""

    def __post_init__(self) -> None:
        self.times: list[int] = self.kept["timestamp_ms"].tolist()
        self.ids: list[int] = self.kept["event_id"].tolist()
        self.order = list(range(len(self.kept)))
        self.revisions = 0
        self.changed_from = self.count
        """First position that changed other than by an append."""
        self.emptied = False
        self.expired_at: int | None = None
        """Offset before the last event that began a new sequence because of its gap."""

    def event(self, index: int, timestamp_ms: int, event_id: int, offset: int) -> Outcome:
        """Merge an event; `index` is that of its action among the kept and the new actions together."""
        if offset <= self.applied_offset:
            return Outcome.DUPLICATE
        if timestamp_ms <= self.forgotten_ms:
            return Outcome.FORGOTTEN
        if event_id and event_id in self.ids:
            return Outcome.DUPLICATE
        if self.ttl_ms and self.times and timestamp_ms - self.times[-1] >= self.ttl_ms:
            self._empty()
            self.expired_at = offset - 1
        place = bisect_right(self.times, timestamp_ms)  # after actions of equal event time
        if place == 0 and len(self.times) == self.length_max:
            if self.counts_too_old:
                self.applied_offset = offset
            return Outcome.TOO_OLD
        is_late = place < len(self.times)
        if is_late:
            self.revisions += 1
            self.changed_from = min(self.changed_from, self.count - len(self.times) + place)
        self._insert(place, index, timestamp_ms, event_id)
        self.applied_offset = offset
        return Outcome.LATE if is_late else Outcome.APPLIED

    def tombstone(self, timestamp_ms: int, offset: int) -> Outcome:
        """Forget the user: empty the sequence, and bar events up to the tombstone's time."""
        if offset <= self.applied_offset:
            return Outcome.DUPLICATE
        self._empty()
        self.forgotten_ms = max(self.forgotten_ms, timestamp_ms)
        self.applied_offset = offset
        return Outcome.TOMBSTONE

    def _empty(self) -> None:
        self.times, self.ids, self.order = [], [], []
        self.count, self.changed_from, self.emptied = 0, 0, True
        self.revisions += 1

    def _insert(self, place: int, index: int, timestamp_ms: int, event_id: int) -> None:
        self.times.insert(place, timestamp_ms)
        self.ids.insert(place, event_id)
        self.order.insert(place, index)
        self.count += 1
        if len(self.times) > self.length_max:
            del self.times[0], self.ids[0], self.order[0]


def merge(user: Merging, actions: Actions, offsets: list[int], tombstones: list[bool]) -> tuple[Actions, list[Outcome]]:
    """Merge events into `user`, in order; return its kept actions, oldest first, and the outcome of each event."""
    outcomes = []
    times, ids, kept = actions["timestamp_ms"].tolist(), actions["event_id"].tolist(), len(user.kept)
    for i, (offset, is_tombstone) in enumerate(zip(offsets, tombstones, strict=True)):
        if is_tombstone:
            outcomes.append(user.tombstone(times[i], offset))
        else:
            outcomes.append(user.event(kept + i, times[i], ids[i], offset))
    return np.concatenate((user.kept, actions))[user.order], outcomes
