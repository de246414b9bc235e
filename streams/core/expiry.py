"""Forgetting users: on request, by a tombstone, and by expiry, when they have had no action for `user_ttl_ms`.

An expired user is forgotten as by a tombstone, with everything that is kept of it.

The age of a user is that of its newest action, by event time. Two rules forget it, and a replay agrees with both:

- an action at least the TTL newer than the newest one before it begins a new sequence (`streams.core.merge`). That
  depends on the log alone, so a worker that was down does not keep what it should have forgotten, or the reverse;
- a sweep forgets users whose newest action is the TTL behind the clock. It runs once every event up to that moment is
  applied, so nothing is forgotten because the worker lags.

The tombstone of an expiry has the offset of a source record that is mostly not the user's: newer than everything
published of the user, older than everything that will be. Where two actions of a user with the gap between them follow
each other in the log, the tombstone has the offset of the former, and follows what is published of it.
"""

from __future__ import annotations

import numpy as np

from encoder.actions.columns import ActionBatch
from encoder.arrays import I64, Bool
from streams.core.columns import Columns, rows_where
from streams.core.layout import LONG_AGO, NEVER
from streams.core.merge import Outcome
from streams.core.sequences import Applied, SequenceState

_TOMBSTONE = int(Outcome.TOMBSTONE)
"""A plain int: an enum lookup costs as much as one step of a small batch."""


def overdue(state: SequenceState, rows: I64, now_ms: int, offset: int) -> I64:
    """Return those of `rows` whose newest action is the TTL old, except for the user of the record at `offset`."""
    newest_ms = state.live["newest_ms"][rows]
    is_old = (newest_ms != LONG_AGO) & (newest_ms <= now_ms - state.limits.user_ttl_ms)
    found: I64 = rows[is_old & (state.headers["applied_offset"][rows] < offset)]
    return found


def empty(state: SequenceState, rows: I64) -> None:
    """Erase the actions of distinct users; the next snapshot deletes their records unless they act again before it."""
    headers, live = state.columns(rows)
    headers["count"] = 0
    headers["revision"] += np.uint32(1)
    live["newest_ms"], live["dirty_from"] = LONG_AGO, 0
    live["dirty"], live["emptied"], live["expired"] = True, True, True
    state.put(rows, headers, live)
    state.erase(rows)


def is_gone(headers: Columns, live: Columns) -> Bool:
    """Return which users need no record any more; a user who was ever forgotten keeps the bar against older events."""
    gone: Bool = live["expired"] & (headers["count"] == 0) & (headers["forgotten_ms"] == LONG_AGO)
    return gone


def forget(state: SequenceState, batch: ActionBatch, applied: Applied) -> tuple[list[bytes], I64, list[bytes]]:
    """Reset the triggers of forgotten users; return users and offsets of the tombstones to publish, and who expired.

    Those that expired come first: a later tombstone of the same batch follows.
    """
    events = rows_where(applied.outcomes == _TOMBSTONE)
    if not len(events) and not applied.expired:
        return [], events, []
    old = np.array(applied.expired, np.int64).reshape(-1, 2)  # [X] row, offset
    expired = state.users_of(old[:, 0])
    users, offsets = end_triggers(state, expired, old[:, 0], old[:, 1])
    last = {batch.users[event]: event for event in events.tolist()}  # one per user: the last
    events = np.array(list(last.values()), np.int64)
    more, more_offsets = end_triggers(state, list(last), applied.rows[events], batch.offsets[events])
    return users + more, np.concatenate((offsets, more_offsets)), expired


def end_triggers(state: SequenceState, users: list[bytes], rows: I64, offsets: I64) -> tuple[list[bytes], I64]:
    """Make forgotten users not due; return those whose tombstone is not published yet, and its source offsets.

    A tombstone that the output topic already holds is not returned, so a replay does not publish it again.
    """
    headers, live = state.columns(rows)
    is_new = rows_where(offsets > headers["encoded_offset"])
    headers["encoded_offset"] = np.maximum(headers["encoded_offset"], offsets)
    for column in ("reason", "unencoded", "first_unencoded_ms"):
        headers[column] = 0
    headers["due_ms"] = NEVER
    live["since_job"] = 0
    state.put(rows, headers, live)
    return [users[row] for row in is_new.tolist()], offsets[is_new]
