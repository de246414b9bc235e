"""The slot table: which user owns which slot of the KV cache, and what each slot has seen.

A slot's columns state up to which action its keys and values are valid. Before writing into slots, call `open`; once
every write has succeeded, call `seal`. A pass that fails half-way therefore leaves slots that hold nothing, and never
slots that claim more than they hold. The least recently used slot is given up first.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import numpy as np

from encoder.arrays import I64


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
        self._used_at: I64 = np.zeros(slots, np.int64)
        self.counts: I64 = np.zeros(slots, np.int64)
        """Number [slots] of the user's actions that the slot has seen; 0 when it holds nothing."""
        self.revisions: I64 = np.zeros(slots, np.int64)
        """Revision [slots] of the sequence that the slot was computed from."""
        self.firsts: I64 = np.zeros(slots, np.int64)
        """Position [slots] of the oldest action that the slot was computed from."""

    def take(self, users: Sequence[bytes]) -> I64:
        """Return the slots [U] of at most `slots` distinct users; a user without one gets one that holds nothing."""
        taken = self._found(users)
        self._now += 1
        self._used_at[taken[taken >= 0]] = self._now
        new = np.flatnonzero(taken < 0)
        if len(new):
            taken[new] = self._allot([users[u] for u in new.tolist()])
        return taken

    def open(self, slots: I64) -> None:
        """Mark slots as holding nothing while they are written."""
        self.counts[slots] = 0

    def seal(self, slots: I64, counts: I64, revisions: I64, firsts: I64) -> None:
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

    def _found(self, users: Sequence[bytes]) -> I64:
        """Return the slots [U], -1 for users without one.

        If all users have one, a single `itemgetter` call looks them up. That is faster because the processor then waits
        for many cache misses at once.
        """
        try:
            found = itemgetter(*users)(self._slot_of) if len(users) > 1 else [self._slot_of[user] for user in users]
        except KeyError:
            found = [self._slot_of.get(user, -1) for user in users]
        return np.array(found, np.int64)

    def _allot(self, users: list[bytes]) -> I64:
        """Give users free slots first, then the least recently used ones, but none that this call has used."""
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
