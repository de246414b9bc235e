"""What each user's history must be, recomputed from the actions alone: the yardstick for what the worker holds.

Written apart from the worker's state and kept obvious: whoever has plain appends needs a sort and nothing else, and
the few users with a late or repeated event are walked through one event at a time.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from encoder.arrays import I64, U64


@dataclass(frozen=True, slots=True)
class Histories:
    """The applied events of U users as row numbers of the input, users one after another, each oldest first."""

    rows: I64
    starts: I64
    """[U + 1]."""
    last_rows: I64
    """[U] the row that was applied last, by arrival; -1 for a user without any."""

    @property
    def counts(self) -> I64:
        """[U] actions applied."""
        return np.diff(self.starts)


def recompute(users: int, user_index: I64, timestamp_ms: I64, event_ids: U64, length_max: int) -> Histories:
    """Histories of N events in order of arrival; an event of `user_index[i]` has row number i.

    An event is left out when its id (0: none) is among the kept ones of its user, or when it is older than everything
    in a sequence that holds `length_max` already; all others go where their event time says, ties by arrival.
    """
    arrival = np.argsort(user_index, kind="stable")
    applied = np.ones(len(user_index), np.bool_)
    bounds = np.searchsorted(user_index[arrival], np.arange(users + 1))
    for user in _irregular(user_index, timestamp_ms, event_ids, arrival):
        rows = arrival[bounds[user] : bounds[user + 1]]
        applied[rows] = _walk(timestamp_ms[rows].tolist(), event_ids[rows].tolist(), length_max)
    last_rows = np.full(users, -1, np.int64)
    kept = arrival[applied[arrival]]
    np.maximum.at(last_rows, user_index[kept], kept)
    ordered = kept[np.lexsort((timestamp_ms[kept], user_index[kept]))]
    return Histories(ordered, np.searchsorted(user_index[ordered], np.arange(users + 1)), last_rows)


def _irregular(user_index: I64, timestamp_ms: I64, event_ids: U64, arrival: I64) -> list[int]:
    """Users with an event behind a newer one, or with an event id that occurs twice."""
    users, times = user_index[arrival], timestamp_ms[arrival]
    late = users[1:][(np.diff(times) < 0) & (np.diff(users) == 0)]
    by_id = np.lexsort((event_ids, user_index))
    users, ids = user_index[by_id], event_ids[by_id]
    repeated = users[1:][(ids[1:] == ids[:-1]) & (ids[1:] != 0) & (np.diff(users) == 0)]
    found: list[int] = np.union1d(late, repeated).tolist()
    return found


def _walk(times_ms: list[int], ids: list[int], length_max: int) -> list[bool]:
    """For one user's events in order of arrival: which are applied."""
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
