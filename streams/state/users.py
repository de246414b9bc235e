"""Reading users: from the records of a store to the columns of the core.

The head alone is enough for a user with fewer than C actions; for the others exactly the chunks that hold kept
actions are read, all users' in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from encoder.actions import ACTION_DTYPE, Actions
from streams.core.layout import Columns, Ints, StateLimits, StoredSequences, new_headers, spans, starts_of
from streams.state.codec import CorruptValue, check_layout, chunk_key, decode_chunk, decode_head, head_key
from streams.state.store import Store


@dataclass(frozen=True, slots=True)
class Read:
    """Users as read from a store."""

    stored: StoredSequences
    """Aligned with the users asked for; a user that is unknown or corrupt is as new."""
    corrupt: dict[bytes, CorruptValue]
    """Users whose records are corrupt: rebuild the partition from the changelog before events reach them, or, when
    the changelog holds no better, count them and let them begin anew."""


def read_users(store: Store, users: Sequence[bytes], limits: StateLimits) -> Read:
    """Read distinct users. Raises `LayoutChanged` when the state was written with other sizes than `limits`."""
    corrupt: dict[bytes, CorruptValue] = {}
    headers, tails = _read_heads(store, users, limits, corrupt)
    check_layout(headers, limits)
    chunks = _read_chunks(store, users, headers, limits, corrupt)
    for row, user in enumerate(users):
        if user in corrupt:
            headers[row], tails[row] = new_headers(1, limits)[0], np.zeros(0, ACTION_DTYPE)
    return Read(_assemble(headers, tails, chunks, limits), corrupt)


def _read_heads(
    store: Store, users: Sequence[bytes], limits: StateLimits, corrupt: dict[bytes, CorruptValue]
) -> tuple[Columns, list[Actions]]:
    """Headers [U], and each user's tail."""
    headers = new_headers(len(users), limits)
    tails: list[Actions] = [np.zeros(0, ACTION_DTYPE)] * len(users)
    known, found = [], []
    for row, (user, value) in enumerate(zip(users, store.get_many([head_key(user) for user in users]), strict=True)):
        if value is None:
            continue
        try:
            header, tails[row] = decode_head(user, value)
        except CorruptValue as error:
            corrupt[user] = error
            continue
        known.append(row)
        found.append(header)
    if known:
        headers[known] = np.concatenate(found)
    return headers, tails


@dataclass(frozen=True, slots=True)
class _Chunks:
    first: Ints
    """[U], number of each user's first chunk with kept actions."""
    lengths: Ints
    """[U], how many chunks each user has."""
    actions: Actions
    """The chunks' actions, one user after another."""


def _read_chunks(
    store: Store, users: Sequence[bytes], headers: Columns, limits: StateLimits, corrupt: dict[bytes, CorruptValue]
) -> _Chunks:
    length = limits.chunk_length
    first = np.maximum(headers["count"] - limits.sequence_length, 0) // length
    lengths = headers["count"] // length - first
    owner, number = spans(first, lengths)
    names = [(users[row], chunk) for row, chunk in zip(owner.tolist(), number.tolist(), strict=True)]
    values = store.get_many([chunk_key(user, chunk, limits) for user, chunk in names])
    actions = np.zeros((len(names), length), ACTION_DTYPE)
    for row, ((user, chunk), value) in enumerate(zip(names, values, strict=True)):
        try:
            actions[row] = decode_chunk(user, chunk, value, limits)
        except CorruptValue as error:
            corrupt.setdefault(user, error)
    return _Chunks(first, lengths, actions.reshape(-1))


def _assemble(headers: Columns, tails: list[Actions], chunks: _Chunks, limits: StateLimits) -> StoredSequences:
    """Put each user's kept actions together, oldest first."""
    length, count = limits.chunk_length, headers["count"]
    kept = np.minimum(count, limits.sequence_length)
    tail = count % length
    chunk_starts, tail_starts = starts_of(chunks.lengths * length), starts_of(tail)
    source = np.concatenate((chunks.actions, *tails)) if tails else chunks.actions
    owner, position = spans(count - kept, kept)
    in_tail = position - (count - tail)[owner]
    at = np.where(
        in_tail >= 0,
        len(chunks.actions) + tail_starts[owner] + in_tail,
        chunk_starts[owner] + position - chunks.first[owner] * length,
    )
    return StoredSequences(headers, source[at], starts_of(kept))
