"""What a checkpoint writes of the sequences: everything that changed since the last one, and only that.

A header and its tail are written whenever the user changed; a chunk once, when it is complete, and again when a late
event moved what lies behind it.
"""

from __future__ import annotations

import numpy as np

from encoder.arrays import I64
from streams.core.columns import Columns, rows_where, spans, starts_of
from streams.core.layout import HAD_DEADLINE, NEVER, Snapshot
from streams.core.sequences import SequenceState


def begin(state: SequenceState) -> Snapshot:
    """The dirty users, who are clean from now on but stay hot until `commit` or `abort`."""
    slots = state.hot_slots()
    slots = slots[state.live["dirty"][slots]]
    headers, live = state.columns(slots)
    owner, number, chunks = _changed_chunks(state, slots, headers, live)
    deleted_users, deleted_keys = _deleted_keys(state, live, owner, number)
    headers["tail"] = headers["count"] % state.limits.chunk_length
    tail = headers["tail"].astype(np.int64)
    snapshot = Snapshot(
        users=state.users_of(slots),
        headers=headers,
        tails=state.rows(slots, headers["count"] - tail, tail),
        tail_starts=starts_of(tail),
        chunk_users=owner,
        chunk_numbers=number,
        chunks=chunks,
        deleted_users=deleted_users,
        deleted_keys=deleted_keys,
        dirty_from=live["dirty_from"].copy(),
        stored_keys=live["stored_keys"].astype(np.int64),
        emptied=live["emptied"].copy(),
    )
    _clean(state, slots, headers.copy(), live)
    return snapshot


def commit(state: SequenceState, snapshot: Snapshot) -> None:
    """The snapshot is durable: its users may be evicted."""
    state.live["in_snapshot"][state.slots(snapshot.users)] = False


def abort(state: SequenceState, snapshot: Snapshot) -> None:
    """The snapshot did not become durable, or may not have: its users are dirty again."""
    slots = state.slots(snapshot.users)
    headers, live = state.columns(slots)
    live["in_snapshot"], live["dirty"] = False, True
    live["dirty_from"] = np.minimum(live["dirty_from"], snapshot.dirty_from)
    live["stored_keys"] = np.maximum(live["stored_keys"], snapshot.stored_keys)
    live["emptied"] |= snapshot.emptied
    headers["flags"] |= snapshot.headers["flags"]
    state.put(slots, headers, live)


def _changed_chunks(state: SequenceState, slots: I64, headers: Columns, live: Columns) -> tuple[I64, I64, Columns]:
    """(index into `slots`, chunk number, the chunk's actions) of complete chunks that are not durable."""
    length = state.limits.chunk_length
    kept_from = np.maximum(headers["count"] - state.limits.sequence_length, 0)
    first = np.maximum(live["dirty_from"], kept_from) // length
    owner, number = spans(first, np.maximum(headers["count"] // length - first, 0))
    actions = state.rows(slots[owner], number * length, np.full(len(owner), length))
    return owner, number, actions.reshape(-1, length)


def _deleted_keys(state: SequenceState, live: Columns, owner: I64, number: I64) -> tuple[I64, I64]:
    """(index into the users, chunk key) of what is stored of forgotten users and is not written anew."""
    emptied = rows_where(live["emptied"])
    user, key = spans(np.zeros(len(emptied), np.int64), live["stored_keys"][emptied].astype(np.int64))
    user = emptied[user]
    keys = state.limits.chunk_keys
    stays = np.isin(user * keys + key, owner * keys + number % keys)
    return user[~stays], key[~stays]


def _clean(state: SequenceState, slots: I64, headers: Columns, live: Columns) -> None:
    headers["flags"] = np.where(headers["due_ms"] != NEVER, HAD_DEADLINE, 0)
    live["dirty"], live["emptied"], live["in_snapshot"] = False, False, True
    live["dirty_from"] = headers["count"]
    live["stored_keys"] = np.minimum(headers["count"] // state.limits.chunk_length, state.limits.chunk_keys)
    state.put(slots, headers, live)
