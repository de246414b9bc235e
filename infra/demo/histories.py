"""The history that each user must have, recomputed from the actions alone: the reference for the worker's state.

This module shares no code with the state and is kept simple: users with plain appends only need a sort, and the few
with a late or a repeated event are processed one event at a time.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from encoder.arrays import I64, U64


@dataclass(frozen=True, slots=True)
class Histories:
    """The applied events of U users as row numbers of the input: one user after another, each oldest first."""

    rows: I64
    starts: I64
    """[U + 1] user u has `rows[starts[u] : starts[u + 1]]`."""
    last_rows: I64
    """[U] row that was applied last, by arrival; -1 for a user without any."""

    @property
    def counts(self) -> I64:
        """[U] number of applied actions."""
        return np.diff(self.starts)


def recompute(users: int, user_index: I64, timestamp_ms: I64, event_ids: U64, length_max: int) -> Histories:
    """Return the histories of N events in order of arrival; row i is an event of user `user_index[i]`.

    An event is left out if its id (0: none) is among the kept ones of its user, or if it is older than everything in a
    sequence that already holds `length_max` events. All others are ordered by event time, ties by arrival.
    """
    arrival = np.argsort(user_index, kind="stable")  # [N] rows by user, then by arrival
    applied = np.ones(len(user_index), np.bool_)
    bounds = np.searchsorted(user_index[arrival], np.arange(users + 1))  # [U + 1] into `arrival`
    for user in _irregular(user_index, timestamp_ms, event_ids, arrival):
        rows = arrival[bounds[user] : bounds[user + 1]]
        applied[rows] = _applied(timestamp_ms[rows].tolist(), event_ids[rows].tolist(), length_max)
    last_rows = np.full(users, -1, np.int64)
    kept = arrival[applied[arrival]]  # [K] applied rows by user, then by arrival
    np.maximum.at(last_rows, user_index[kept], kept)
    ordered = kept[np.lexsort((timestamp_ms[kept], user_index[kept]))]
    return Histories(ordered, np.searchsorted(user_index[ordered], np.arange(users + 1)), last_rows)


def _irregular(user_index: I64, timestamp_ms: I64, event_ids: U64, arrival: I64) -> list[int]:
    """Return users with an event that arrived after a newer one, or with an event id that occurs twice."""
    users, times = user_index[arrival], timestamp_ms[arrival]
    late = users[1:][(np.diff(times) < 0) & (np.diff(users) == 0)]
    by_id = np.lexsort((event_ids, user_index))
    users, ids = user_index[by_id], event_ids[by_id]
    repeated = users[1:][(ids[1:] == ids[:-1]) & (ids[1:] != 0) & (np.diff(users) == 0)]
    found: list[int] = np.union1d(late, repeated).tolist()
    return found


def _applied(times_ms: list[int], ids: list[int], length_max: int) -> list[bool]:
    """Return which of one user's events, in order of arrival, are applied."""
    kept_times: list[int] = []
    kept_ids: list[int] = []
    applied = []
    for time_ms, id_ in zip(times_ms, ids, strict=True):
        place = bisect_right(kept_times, time_ms)
        is_applied = not (id_ and id_ in kept_ids) and not (place == 0 and len(kept_times) == length_max)
        applied.append(is_applied)
        if is_applied:
            kept_times.insert(place, time_ms)
            kept_ids.insert(place, id_)
            del kept_times[:-length_max], kept_ids[:-length_max]
    return applied
