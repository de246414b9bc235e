"""Snapshots: what a checkpoint writes of the sequences, which is everything that changed since the last one.

A head record (the header and the tail) is written whenever its user changed. A chunk is written once, when it is
complete, and again when a late event moved the actions after it.
"""

from __future__ import annotations

import numpy as np

from encoder.arrays import I64
from streams.core.columns import Columns, rows_where, spans, starts_of
from streams.core.expiry import is_gone
from streams.core.layout import HAD_DEADLINE, NEVER, Snapshot
from streams.core.sequences import SequenceState


def begin(state: SequenceState) -> Snapshot:
    """Return a snapshot of the dirty users; they are clean from now on, but stay hot until `commit` or `abort`."""
    rows = state.hot_rows()
    rows = rows[state.live["dirty"][rows]]  # [U]
    headers, live = state.columns(rows)
    owner, number, chunks = _changed_chunks(state, rows, headers, live)
    deleted_users, deleted_keys = _deleted_keys(state, live, owner, number)
    headers["tail"] = headers["count"] % state.limits.chunk_length
    tail = headers["tail"].astype(np.int64)
    snapshot = Snapshot(
        users=state.users_of(rows),
        headers=headers,
        tails=state.actions_at(rows, headers["count"] - tail, tail),
        tail_starts=starts_of(tail),
        chunk_users=owner,
        chunk_numbers=number,
        chunks=chunks,
        deleted_users=deleted_users,
        deleted_keys=deleted_keys,
        dirty_from=live["dirty_from"].copy(),
        stored_keys=live["stored_keys"].astype(np.int64),
        emptied=live["emptied"].copy(),
        gone=is_gone(headers, live),
    )
    _clean(state, rows, headers.copy(), live)
    return snapshot


def commit(state: SequenceState, snapshot: Snapshot) -> None:
    """Allow the users of a snapshot to be evicted, because it is durable."""
    state.live["in_snapshot"][state.rows_of(snapshot.users)] = False


def abort(state: SequenceState, snapshot: Snapshot) -> None:
    """Make the users of a snapshot dirty again, because it may not be durable."""
    rows = state.rows_of(snapshot.users)
    headers, live = state.columns(rows)
    live["in_snapshot"], live["dirty"] = False, True
    live["dirty_from"] = np.minimum(live["dirty_from"], snapshot.dirty_from)
    live["stored_keys"] = np.maximum(live["stored_keys"], snapshot.stored_keys)
    live["emptied"] |= snapshot.emptied
    headers["flags"] |= snapshot.headers["flags"]
    state.put(rows, headers, live)


def _changed_chunks(state: SequenceState, rows: I64, headers: Columns, live: Columns) -> tuple[I64, I64, Columns]:
    """Return the complete chunks that are not durable: index into `rows` [K], chunk number [K], actions [K, C].

    For C = 4, M = 8, count = 14 and dirty_from = 9, chunk 2 is written: chunk 1 is durable, and 3 is not complete.

        position   0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13
                   chunk 0 | chunk 1 | chunk 2   | tail
                                 ^ oldest kept
                                         ^ dirty_from
    """
    length = state.limits.chunk_length
    kept_from = np.maximum(headers["count"] - state.limits.sequence_length, 0)
    first = np.maximum(live["dirty_from"], kept_from) // length  # [U], first chunk to write
    owner, number = spans(first, np.maximum(headers["count"] // length - first, 0))  # [K] each
    actions = state.actions_at(rows[owner], number * length, np.full(len(owner), length))  # [K * C]
    return owner, number, actions.reshape(-1, length)


def _deleted_keys(state: SequenceState, live: Columns, owner: I64, number: I64) -> tuple[I64, I64]:
    """Return the stored chunk keys of forgotten users that this snapshot does not overwrite: user index [D], key [D].

    A pair (user, key) is compared as the one number `user * chunk_keys + key`.
    """
    emptied = rows_where(live["emptied"])
    user, key = spans(np.zeros(len(emptied), np.int64), live["stored_keys"][emptied].astype(np.int64))
    user = emptied[user]
    keys = state.limits.chunk_keys
    stays = np.isin(user * keys + key, owner * keys + number % keys)
    return user[~stays], key[~stays]


def _clean(state: SequenceState, rows: I64, headers: Columns, live: Columns) -> None:
    headers["flags"] = np.where(headers["due_ms"] != NEVER, HAD_DEADLINE, 0)
    live["dirty"], live["emptied"], live["in_snapshot"] = False, False, True
    live["dirty_from"] = headers["count"]
    live["stored_keys"] = np.minimum(headers["count"] // state.limits.chunk_length, state.limits.chunk_keys)
    state.put(rows, headers, live)
