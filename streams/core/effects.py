"""What comes out of the core after a batch or fired timers: data that others act on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from encoder.arrays import I64, U8
from streams.core.merge import Outcome


@dataclass(frozen=True, slots=True)
class Effects:
    """What is to be done after a batch or a wake-up."""

    due: list[bytes]
    """Users to hand over to the encode queue."""
    reasons: U8
    """[len(due)] of `Reason`."""
    priorities: I64
    """[len(due)], 1 and up; a higher one is encoded first and shed last."""
    forgotten: list[bytes]
    """Users whose tombstone goes to every compacted output, acknowledged before the next checkpoint."""
    forgotten_offsets: I64
    """[len(forgotten)], source offsets of their tombstones."""
    to_load: list[bytes]
    """Cold users whose deadline has come: load them and wake again."""
    outcomes: U8
    """[N] of `Outcome`, one per event of the batch."""

    def count(self, outcome: Outcome) -> int:
        """Events of the batch with this outcome."""
        return int(np.count_nonzero(self.outcomes == outcome))
