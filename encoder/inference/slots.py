"""Which user owns which slot of the slabs, and what each slot has seen; least recently used goes first.

A slot's columns say up to where its keys and values are valid. Whoever is about to write into slots calls `open` and,
once every write has succeeded, `seal`: a step that failed half-way leaves slots that hold nothing, never slots that
claim more than they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import numpy as np

from encoder.arrays import I64

Int64s = I64


class SlotTable:
    """Slots 0 to `slots - 1`, each owned by at most one user. Not thread-safe."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"no room for a single user: {slots} slots; raise cache_bytes_max")
        self.slots = slots
        self.evictions = 0
        self._slot_of: dict[bytes, int] = {}
        self._owner_of: list[bytes] = [b""] * slots
        self._free = list(range(slots - 1, -1, -1))
        self._now = 0
        self._used_at: Int64s = np.zeros(slots, np.int64)
        self.counts: Int64s = np.zeros(slots, np.int64)
        """[slots] actions of the user that the slot has seen; 0 when it holds nothing."""
        self.revisions: Int64s = np.zeros(slots, np.int64)
        """[slots] revision of the sequence that the slot was computed from."""
        self.firsts: Int64s = np.zeros(slots, np.int64)
        """[slots] position of the oldest action that the slot was computed from."""

    def take(self, users: Sequence[bytes]) -> Int64s:
        """The slots [U] of at most `slots` distinct users; who has none gets one that holds nothing."""
        taken = self._found(users)
        self._now += 1
        self._used_at[taken[taken >= 0]] = self._now
        new = np.flatnonzero(taken < 0)
        if len(new):
            taken[new] = self._allot([users[u] for u in new.tolist()])
        return taken

    def open(self, slots: Int64s) -> None:
        """Mark slots as holding nothing while they are written."""
        self.counts[slots] = 0

    def seal(self, slots: Int64s, counts: Int64s, revisions: Int64s, firsts: Int64s) -> None:
        """Record what the slots hold, now that every write has succeeded."""
        self.revisions[slots] = revisions
        self.firsts[slots] = firsts
        self.counts[slots] = counts

    def forget(self, users: Sequence[bytes]) -> None:
        """Free the slots of these users; unknown users are ignored."""
        for user in users:
            slot = self._slot_of.pop(user, None)
            if slot is not None:
                self.counts[slot] = 0
                self._free.append(slot)

    def clear(self) -> None:
        """Free every slot."""
        self.forget(list(self._slot_of))

    def __len__(self) -> int:
        return len(self._slot_of)

    def _found(self, users: Sequence[bytes]) -> Int64s:
        """The slots [U], -1 for users without one.

        If all have one they are looked up by one call, in which the processor waits for many at once.
        """
        try:
            found = itemgetter(*users)(self._slot_of) if len(users) > 1 else [self._slot_of[user] for user in users]
        except KeyError:
            found = [self._slot_of.get(user, -1) for user in users]
        return np.array(found, np.int64)

    def _allot(self, users: list[bytes]) -> Int64s:
        """Free slots first, then those that were used longest ago; never one that this call has used."""
        free = [self._free.pop() for _ in range(min(len(users), len(self._free)))]
        self._used_at[free] = self._now
        missing = len(users) - len(free)
        if missing:
            free += np.argpartition(self._used_at, missing - 1)[:missing].tolist()
            for slot in free[-missing:]:
                del self._slot_of[self._owner_of[slot]]
            self.evictions += missing
        for user, slot in zip(users, free, strict=True):
            self._slot_of[user] = slot
            self._owner_of[slot] = user
        slots = np.array(free, np.int64)
        self._used_at[slots] = self._now
        self.counts[slots] = 0
        return slots
