"""Effects: the core's decisions after a batch or fired timers, as data that the ingest loop acts on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from encoder.arrays import I64, U8
from streams.core.merge import Outcome


@dataclass(frozen=True, slots=True)
class Effects:
    """Work that a batch or fired timers leave for the ingest loop."""

    due: list[bytes]
    """Users to put into the encode queue."""
    reasons: U8
    """[len(due)] of `Reason`."""
    priorities: I64
    """[len(due)], from 1; users of a higher priority are encoded first and shed last."""
    forgotten: list[bytes]
    """Users whose tombstone must be published, and acknowledged before the next checkpoint commits."""
    forgotten_offsets: I64
    """[len(forgotten)], source offsets of the tombstones."""
    to_load: list[bytes]
    """Cold users whose deadline has come: load them and fire the timers again."""
    outcomes: U8
    """[N] of `Outcome`, one per event of the batch."""
    expired: list[bytes] = field(default_factory=list)
    """Users forgotten because of the TTL: nothing computed from their actions may be used again."""

    refresh: list[bytes] = field(default_factory=list)
    """Users whose features are to be published again, because a value has changed without an event."""

    def count(self, outcome: Outcome) -> int:
        """Return how many events of the batch had this outcome."""
        return int(np.count_nonzero(self.outcomes == outcome))
