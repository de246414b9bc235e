"""The value of freshness: is the item of an action in the top 10 of the embedding that a reader had just before it?

For an action of user u on item i at event time t, three readers differ only in their embedding: *fresh* has the newest
published one whose event time is before t, *daily* the newest before the last midnight up to t, *once* the newest as of
the start of the replay. Items are ranked by the dot product with the release's item vectors, without the items on which
u acted before t. Actions of the same time do not see each other. A reader without an embedding, and an item that the
release does not know, count as misses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from encoder.arrays import F32, I64, Bool

TOP = 10
DAY_MS = 86_400_000
WEEK_MS = 7 * DAY_MS
BLOCK_ROWS = 256
"""Rows of scores that stay in the cache of a core."""
_TIME_BITS = 42
"""Bits of an event time, up to the year 2109; (user, time) is packed into one integer to sort and search by."""


@dataclass(frozen=True, slots=True)
class Acts:
    """N actions as columns; `item` is a row of the release's item vectors, -1 for an item it does not know."""

    user: I64
    item: I64
    time_ms: I64

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True, slots=True)
class Publications:
    """P published embeddings in the order in which each user's were published."""

    user: I64
    event_time_ms: I64
    vectors: F32
    """[P, E] float32."""


def held(publications: Publications, user: I64, before_ms: I64) -> I64:
    """[N] Return the index of each user's newest publication with an event time below `before_ms`, or -1."""
    keys = packed(publications.user, publications.event_time_ms)
    order = np.argsort(keys, kind="stable")
    place = np.searchsorted(keys[order], packed(user, before_ms)) - 1  # [N] the last smaller key, of any user
    found = order[np.maximum(place, 0)] if len(order) else np.zeros(len(user), np.int64)
    mine = (place >= 0) & (publications.user[found] == user) if len(order) else np.zeros(len(user), np.bool_)
    return np.where(mine, found, -1)


def last_midnight_ms(time_ms: I64) -> I64:
    """Return the latest UTC midnight not after each time."""
    return time_ms // DAY_MS * DAY_MS


def packed(user: I64, time_ms: I64) -> I64:
    """Return one sortable integer for (user, time)."""
    return (user << _TIME_BITS) | np.clip(time_ms, 0, (1 << _TIME_BITS) - 1)


class SeenItems:
    """The known items on which each user had acted before a time."""

    def __init__(self, history: Acts) -> None:
        known = np.flatnonzero(history.item >= 0)
        order = known[np.lexsort((history.time_ms[known], history.item[known], history.user[known]))]
        user, item = history.user[order], history.item[order]
        first = np.ones(len(order), np.bool_)  # the first action of each (user, item)
        first[1:] = (np.diff(user) != 0) | (np.diff(item) != 0)
        firsts = order[first]
        keys = packed(history.user[firsts], history.time_ms[firsts])
        by_time = np.argsort(keys, kind="stable")
        self._keys, self._items = keys[by_time], history.item[firsts][by_time]

    def before(self, user: I64, time_ms: I64) -> tuple[I64, I64]:
        """Return pairs (index into `user`, item): items on which that user acted before that time, each once."""
        begin = np.searchsorted(self._keys, packed(user, np.zeros_like(user)))
        lengths = np.searchsorted(self._keys, packed(user, time_ms)) - begin
        query = np.repeat(np.arange(len(user)), lengths)
        # For row r of `user` the places begin[r], begin[r] + 1, ... of its `lengths[r]` keys, one row after another.
        at = np.arange(len(query)) - np.repeat(np.cumsum(lengths) - lengths - begin, lengths)
        return query, self._items[at]


def hits(acts: Acts, chosen: I64, vectors: F32, item_vectors: F32, seen: SeenItems) -> Bool:
    """[N] Return whether the item is among the `TOP` best of row `chosen` of `vectors` [P, E] (-1: none, a miss).

    Items that score as high are counted instead of sorted, so a tie never counts as a hit.
    """
    result = np.zeros(len(acts), np.bool_)
    scored = np.flatnonzero((chosen >= 0) & (acts.item >= 0))
    for begin in range(0, len(scored), BLOCK_ROWS):
        rows = scored[begin : begin + BLOCK_ROWS]
        scores = vectors[chosen[rows]] @ item_vectors.T  # [B, I]
        result[rows] = _in_top(scores, acts.item[rows], seen.before(acts.user[rows], acts.time_ms[rows]))
    return result


def _in_top(scores: F32, targets: I64, seen: tuple[I64, I64]) -> Bool:
    """[N] Return for scores [N, I] whether fewer than `TOP` other unseen items reach the target's score."""
    query, item = seen
    target_scores = scores[np.arange(len(targets)), targets]
    reaching = np.count_nonzero(scores >= target_scores[:, None], axis=1)
    seen_reaching = np.bincount(query[scores[query, item] >= target_scores[query]], minlength=len(targets))
    was_seen = np.zeros(len(targets), np.bool_)
    was_seen[query[item == targets[query]]] = True
    in_top: Bool = (reaching - seen_reaching <= TOP) & ~was_seen
    return in_top


def popularity_hits(acts: Acts, log: Acts, items: int, seen: SeenItems) -> Bool:
    """[N] Return the hits of a list that is the same for all users: the most popular items of the seven days before t.

    `log` is everything up to the end of `acts`. Ties of the week are broken by all actions before the first of `acts`.
    """
    known = np.flatnonzero(log.item >= 0)
    known = known[np.argsort(log.time_ms[known], kind="stable")]
    by_time, times = log.item[known], log.time_ms[known]
    older = by_time[: np.searchsorted(times, acts.time_ms.min(initial=0))]
    counts = (np.bincount(older, minlength=items) / (len(older) + 1.0)).astype(np.float32)
    result = np.zeros(len(acts), np.bool_)
    order = np.argsort(acts.time_ms, kind="stable")
    order = order[acts.item[order] >= 0]
    low = high = 0  # `counts` covers actions low to high of `by_time`
    for begin in range(0, len(order), BLOCK_ROWS):
        rows = order[begin : begin + BLOCK_ROWS]
        enter = np.searchsorted(times, acts.time_ms[rows])
        leave = np.searchsorted(times, acts.time_ms[rows] - WEEK_MS)
        change = _changes(enter, high, by_time, items) - _changes(leave, low, by_time, items)
        scores = counts + np.cumsum(change, axis=0)  # [B, I] the week before each row
        result[rows] = _in_top(scores, acts.item[rows], seen.before(acts.user[rows], acts.time_ms[rows]))
        counts, low, high = scores[-1], int(leave[-1]), int(enter[-1])
    return result


def _changes(ends: I64, begin: int, items_by_time: I64, items: int) -> F32:
    """[B, items] Return how often each item occurs in places ends[r - 1] to ends[r]; row 0 starts at `begin`."""
    change = np.zeros((len(ends), items), np.float32)
    row = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=begin))
    np.add.at(change, (row, items_by_time[begin : ends[-1]]), 1)
    return change
