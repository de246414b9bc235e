"""Deadlines of many users: a wheel of 100 ms buckets that costs nothing while nothing is due.

An entry means only "look at this user then". The deadline itself is in the user's state, and an entry that comes too
early is harmless: the user is entered again. Hot users are entered by row, cold users by user id. An entry is never
before its deadline's bucket, and late by less than one bucket.

The wheel is bounded by the number of users, however often they come and go: a row or a user id has one valid entry,
its earliest, and a later one is not added beside it. An entry that an earlier one has replaced is ignored when its
bucket comes, and swept out before such entries outnumber the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np

from encoder.arrays import I64
from streams.core.columns import run_starts

BUCKET_MS = 100
NO_BUCKET = 2**62
"""Bucket of a row without an entry."""
SWEEP_ABOVE = 1_024
"""Entries that are never swept, so that a small wheel is not swept all the time."""


class Deadlines:
    """The wheel of one partition."""

    def __init__(self) -> None:
        self._rows: dict[int, list[I64]] = {}
        """Rows of hot users, by bucket; one array per `add`."""
        self._users: dict[int, list[bytes]] = {}
        """Cold users, by bucket."""
        self._order: list[int] = []
        """Heap of the buckets that have entries."""
        self._bucket_of_row: I64 = np.zeros(0, np.int64)
        """Bucket of each row's valid entry, `NO_BUCKET` without one; as long as the highest row that was entered."""
        self._bucket_of_user: dict[bytes, int] = {}
        """Bucket of each user id's valid entry."""
        self._entries = 0

    def __len__(self) -> int:
        return self._entries

    @property
    def next_ms(self) -> int | None:
        """Time at which the next bucket falls due, None while the wheel is empty."""
        return self._order[0] * BUCKET_MS if self._order else None

    def add(self, rows: I64, due_ms: I64) -> None:
        """Enter hot users, unless they have an entry that is as early; none of `due_ms` may be NEVER."""
        if not len(rows):
            return
        self._reserve(int(rows.max()) + 1)
        buckets = _buckets(due_ms)
        sooner = (buckets < self._bucket_of_row[rows]).nonzero()[0]
        rows, buckets = rows[sooner], buckets[sooner]
        self._bucket_of_row[rows] = buckets
        for bucket, entries in _by_bucket(buckets):
            self._open(bucket)
            self._rows.setdefault(bucket, []).append(rows[entries])
        self._entries += len(rows)
        self._sweep_if_large()

    def add_cold(self, users: Sequence[bytes], due_ms: I64) -> None:
        """Enter users that are not in memory, unless they have an entry that is as early; as `add` does."""
        known = self._bucket_of_user
        for bucket, entries in _by_bucket(_buckets(due_ms)):
            new = [users[entry] for entry in entries.tolist() if known.get(users[entry], NO_BUCKET) > bucket]
            if new:
                self._open(bucket)
                known.update(dict.fromkeys(new, bucket))
                self._users.setdefault(bucket, []).extend(new)
                self._entries += len(new)
        self._sweep_if_large()

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
                entered = hot.pop()
                taken += len(entered)
                valid = entered[self._bucket_of_row[entered] == bucket]
                self._bucket_of_row[valid] = NO_BUCKET
                rows.append(valid)
            room = max(users_max - taken, 0)
            users += [user for user in cold[:room] if self._bucket_of_user.get(user) == bucket]
            taken += min(len(cold), room)
            del cold[:room]
            if not hot and not cold:
                self._close(bucket)
        for user in users:
            self._bucket_of_user.pop(user, None)
        self._entries -= taken
        return np.unique(np.concatenate(rows)), users

    def _reserve(self, rows: int) -> None:
        """Make room for the entries of `rows` rows."""
        missing = rows - len(self._bucket_of_row)
        if missing > 0:
            more = np.full(max(missing, len(self._bucket_of_row)), NO_BUCKET, np.int64)
            self._bucket_of_row = np.concatenate((self._bucket_of_row, more))

    def _sweep_if_large(self) -> None:
        """Remove replaced entries once they may outnumber the valid ones."""
        if self._entries > SWEEP_ABOVE + 2 * (len(self._bucket_of_row) + len(self._bucket_of_user)):
            self._sweep()

    def _sweep(self) -> None:
        """Remove the entries that an earlier one has replaced."""
        self._entries = 0
        for bucket in list(self._order):
            hot = [rows[self._bucket_of_row[rows] == bucket] for rows in self._rows.pop(bucket, [])]
            cold = [user for user in self._users.pop(bucket, []) if self._bucket_of_user.get(user) == bucket]
            if kept := [rows for rows in hot if len(rows)]:
                self._rows[bucket] = kept
            if cold:
                self._users[bucket] = cold
            self._entries += sum(map(len, kept)) + len(cold)
        self._order = sorted({*self._rows, *self._users})  # a sorted list is a heap

    def _open(self, bucket: int) -> None:
        if bucket not in self._rows and bucket not in self._users:
            heapq.heappush(self._order, bucket)

    def _close(self, bucket: int) -> None:
        heapq.heappop(self._order)
        self._rows.pop(bucket, None)
        self._users.pop(bucket, None)


def _buckets(due_ms: I64) -> I64:
    """Return the bucket of each deadline: the first that begins at or after it."""
    buckets: I64 = -(-np.maximum(due_ms, 0) // BUCKET_MS)  # rounds up
    return buckets


def _by_bucket(buckets: I64) -> Iterable[tuple[int, I64]]:
    """Yield each bucket and the indices of its entries."""
    order = np.argsort(buckets, kind="stable")
    starts = run_starts(buckets[order])
    for entries in np.split(order, starts[1:]) if len(order) else []:
        yield int(buckets[entries[0]]), entries
