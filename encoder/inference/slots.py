"""Which user owns which slot of the slabs, and what each slot has seen; least recently used goes first.

A slot's columns say up to where its keys and values are valid. Whoever is about to write into slots calls `open` and,
once every write has succeeded, `seal`: a step that failed half-way leaves slots that hold nothing, never slots that
claim more than they hold.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


class SlotTable:
    """Slots 0 to `slots - 1`, each owned by at most one user. Not thread-safe."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"no room for a single user: {slots} slots; raise cache_bytes_max")
        self.slots = slots
        self.evictions = 0
        self._owner: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(range(slots - 1, -1, -1))
        self.counts: Int64s = np.zeros(slots, np.int64)
        """[slots] actions of the user that the slot has seen; 0 when it holds nothing."""
        self.revisions: Int64s = np.zeros(slots, np.int64)
        """[slots] revision of the sequence that the slot was computed from."""
        self.firsts: Int64s = np.zeros(slots, np.int64)
        """[slots] position of the oldest action that the slot was computed from."""

    def take(self, users: Sequence[bytes]) -> Int64s:
        """The slots [U] of at most `slots` distinct users; who has none gets one that holds nothing."""
        owner = self._owner
        found = [owner.get(user, -1) for user in users]
        for user, slot in zip(users, found, strict=True):
            if slot >= 0:
                owner.move_to_end(user)
        taken = np.array(found, np.int64)
        for u in np.flatnonzero(taken < 0).tolist():
            taken[u] = self._allot(users[u])
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
            slot = self._owner.pop(user, None)
            if slot is not None:
                self.counts[slot] = 0
                self._free.append(slot)

    def clear(self) -> None:
        """Free every slot."""
        self.forget(list(self._owner))

    def __len__(self) -> int:
        return len(self._owner)

    def _allot(self, user: bytes) -> int:
        if self._free:
            slot = self._free.pop()
        else:
            _, slot = self._owner.popitem(last=False)
            self.evictions += 1
        self.counts[slot] = 0
        self._owner[user] = slot
        return slot
