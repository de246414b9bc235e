"""Deadlines of many users: a wheel of 100 ms buckets that costs nothing while nothing is due.

An entry means only "look at this user then". The deadline itself is in the user's state, and an outdated entry is
ignored when its bucket comes. Hot users are entered by row, cold users by user id. An entry is never early, and late
by less than one bucket.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np

from encoder.arrays import I64
from streams.core.columns import run_starts

BUCKET_MS = 100


class Deadlines:
    """The wheel of one partition."""

    def __init__(self) -> None:
        self._rows: dict[int, list[I64]] = {}
        """Rows of hot users, by bucket; one array per `add`."""
        self._users: dict[int, list[bytes]] = {}
        """Cold users, by bucket."""
        self._order: list[int] = []
        """Heap of the buckets that have entries."""

    @property
    def next_ms(self) -> int | None:
        """Time at which the next bucket falls due, None while the wheel is empty."""
        return self._order[0] * BUCKET_MS if self._order else None

    def add(self, rows: I64, due_ms: I64) -> None:
        """Enter hot users; none of `due_ms` may be NEVER."""
        for bucket, entries in _by_bucket(due_ms):
            self._open(bucket)
            self._rows.setdefault(bucket, []).append(rows[entries])

    def add_cold(self, users: Sequence[bytes], due_ms: I64) -> None:
        """Enter users that are not in memory; none of `due_ms` may be NEVER."""
        for bucket, entries in _by_bucket(due_ms):
            self._open(bucket)
            self._users.setdefault(bucket, []).extend(users[entry] for entry in entries.tolist())

    def pop(self, now_ms: int, users_max: int) -> tuple[I64, list[bytes]]:
        """Remove entries due at `now_ms`; return the rows of hot users and the ids of cold users.

        At most `users_max` are removed in all, and beyond that the rest of one `add`.
        """
        rows: list[I64] = [np.zeros(0, np.int64)]
        users: list[bytes] = []
        taken = 0
        while self._order and self._order[0] * BUCKET_MS <= now_ms and taken < users_max:
            bucket = self._order[0]
            hot, cold = self._rows.get(bucket, []), self._users.get(bucket, [])
            while hot and taken < users_max:
                rows.append(hot.pop())
                taken += len(rows[-1])
            room = max(users_max - taken, 0)
            users += cold[:room]
            taken += min(len(cold), room)
            del cold[:room]
            if not hot and not cold:
                self._close(bucket)
        return np.unique(np.concatenate(rows)), users

    def _open(self, bucket: int) -> None:
        if bucket not in self._rows and bucket not in self._users:
            heapq.heappush(self._order, bucket)

    def _close(self, bucket: int) -> None:
        heapq.heappop(self._order)
        self._rows.pop(bucket, None)
        self._users.pop(bucket, None)


def _by_bucket(due_ms: I64) -> Iterable[tuple[int, I64]]:
    """Yield each bucket and the indices of its deadlines; a bucket begins at or after the deadlines in it."""
    buckets = -(-np.maximum(due_ms, 0) // BUCKET_MS)  # rounds up
    order = np.argsort(buckets, kind="stable")
    starts = run_starts(buckets[order])
    for entries in np.split(order, starts[1:]) if len(order) else []:
        yield int(buckets[entries[0]]), entries
