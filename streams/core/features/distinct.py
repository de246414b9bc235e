"""Distinct items or surfaces over a window: exact for few, estimated for many.

Shapes: U users, R rows of the hot table, L lanes of a user.
"""

from __future__ import annotations

import numpy as np

from encoder.arrays import I64, Bool
from streams.core.features.definitions import Feature
from streams.core.features.tiles import NEVER_MS

FULL_RANGE = 2**32
"""Ids are hashed to numbers below this."""

HEAD_DTYPE = np.dtype(
    [
        ("newest", "<u4"),  # mark of the user's newest hop
        ("theta", "<u4"),  # ids below it are known; 0 if all are
        ("dropped", "<u4"),  # mark of the newest hop of the ids that were dropped
        ("used", "<u4"),  # lanes in use
    ]
)


class Distinct:
    """The number of different items or surfaces in the window.

    Each id is hashed to 32 bits and keeps the newest hop in which it occurred, so it leaves the window by itself, and a
    late event that is not the newest changes nothing. The count is exact while at most `cap` ids are in the window.
    Beyond that the ids with the smallest hashes are kept, and all below `theta` are known: the count is estimated as
    the number kept divided by theta as a fraction of the range, with a relative standard error of about
    1 / sqrt(number kept) (a theta sketch: Dasgupta, Lang, Rhodes, Thaler, 2016). It is exact again once every id that
    was dropped has left the window.
    """

    def __init__(self, feature: Feature, rows: int) -> None:
        self.feature = feature
        self.keys = np.zeros((rows, feature.cap), np.uint32)
        """Hashed ids [R, L] of each user."""
        self.last = np.zeros((rows, feature.cap), np.uint32)
        """Mark of the newest hop of each lane's id."""
        self.heads = np.zeros(rows, HEAD_DTYPE)

    def values(self, rows: I64, as_of_ms: I64) -> tuple[I64, Bool, I64]:
        """Return the counts [U], whether each is exact [U], and when that changes without an event [U]."""
        feature, heads = self.feature, self.heads[rows]
        begin = np.maximum((as_of_ms - feature.window_ms) // feature.hop_ms, 0)  # [U]
        hops = self.last[rows].astype(np.int64) - 1  # [U, L]
        inside = (hops >= begin[:, None]) & (np.arange(feature.cap) < heads["used"][:, None])
        counts = inside.sum(axis=1)
        exact = (heads["theta"] == 0) | (heads["dropped"].astype(np.int64) - 1 < begin)
        theta = np.where(heads["theta"] == 0, FULL_RANGE, heads["theta"].astype(np.int64))
        estimates = np.rint(counts * (FULL_RANGE / theta)).astype(np.int64)
        oldest = np.where(inside, hops, NEVER_MS // feature.hop_ms - feature.tiles).min(axis=1)
        until_ms = np.where(counts > 0, (oldest + 1) * feature.hop_ms + feature.window_ms, NEVER_MS)
        exact_ms = heads["dropped"].astype(np.int64) * feature.hop_ms + feature.window_ms  # an estimate ends then
        until_ms = np.where(exact, until_ms, np.minimum(until_ms, exact_ms))
        return np.where(exact, counts, estimates), exact, until_ms
