"""Deadlines of many users: a wheel of buckets of 100 ms, which costs nothing while nothing is due.

An entry says only "look at this user then": the deadline itself is in the user's state, and an entry that has become
untrue is dropped when its bucket comes. Hot users are entered by slot, cold ones by user id. An entry is never early,
and late by less than one bucket.
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
        self._slots: dict[int, list[I64]] = {}
        self._users: dict[int, list[bytes]] = {}
        self._order: list[int] = []

    @property
    def next_ms(self) -> int | None:
        """When the next bucket falls due, None while there is none."""
        return self._order[0] * BUCKET_MS if self._order else None

    def add(self, slots: I64, due_ms: I64) -> None:
        """Enter hot users; none of `due_ms` may be NEVER."""
        for bucket, rows in _by_bucket(due_ms):
            self._open(bucket)
            self._slots.setdefault(bucket, []).append(slots[rows])

    def add_cold(self, users: Sequence[bytes], due_ms: I64) -> None:
        """Enter users that are not in memory; none of `due_ms` may be NEVER."""
        for bucket, rows in _by_bucket(due_ms):
            self._open(bucket)
            self._users.setdefault(bucket, []).extend(users[row] for row in rows.tolist())

    def pop(self, now_ms: int, users_max: int) -> tuple[I64, list[bytes]]:
        """Take entries due at `now_ms`, (slots, cold users): `users_max` in all, plus what one `add` entered."""
        slots: list[I64] = [np.zeros(0, np.int64)]
        users: list[bytes] = []
        taken = 0
        while self._order and self._order[0] * BUCKET_MS <= now_ms and taken < users_max:
            bucket = self._order[0]
            hot, cold = self._slots.get(bucket, []), self._users.get(bucket, [])
            while hot and taken < users_max:
                slots.append(hot.pop())
                taken += len(slots[-1])
            room = max(users_max - taken, 0)
            users += cold[:room]
            taken += min(len(cold), room)
            del cold[:room]
            if not hot and not cold:
                self._close(bucket)
        return np.unique(np.concatenate(slots)), users

    def _open(self, bucket: int) -> None:
        if bucket not in self._slots and bucket not in self._users:
            heapq.heappush(self._order, bucket)

    def _close(self, bucket: int) -> None:
        heapq.heappop(self._order)
        self._slots.pop(bucket, None)
        self._users.pop(bucket, None)


def _by_bucket(due_ms: I64) -> Iterable[tuple[int, I64]]:
    """Rows by bucket: the first whose beginning is at or after the deadline."""
    buckets = -(-np.maximum(due_ms, 0) // BUCKET_MS)
    order = np.argsort(buckets, kind="stable")
    starts = run_starts(buckets[order])
    for rows in np.split(order, starts[1:]) if len(order) else []:
        yield int(buckets[rows[0]]), rows
