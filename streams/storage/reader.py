"""Read users: from the records of a store to the columns of the core.

The head alone is enough for a user with fewer than C actions. For the others, exactly the chunks that contain kept
actions are read, in one call for all users.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from encoder.actions.columns import ACTION_DTYPE, Actions
from encoder.arrays import I64
from streams.core.columns import Columns, spans, starts_of
from streams.core.layout import HEADER_DTYPE, StateLimits, StoredFeatures, StoredSequences, new_headers
from streams.storage.codec import (
    ACTION_BYTES,
    HEAD_BYTES,
    CorruptValue,
    body_of,
    check_layout,
    chunk_dtype,
    chunk_key,
    decode_chunk,
    decode_head,
    head_key,
)
from streams.storage.features import read_features
from streams.storage.store import Store


@dataclass(frozen=True, slots=True)
class Read:
    """Users that were read from a store."""

    stored: StoredSequences
    """State of each requested user, in their order; unknown and corrupt users get an empty state."""
    corrupt: dict[bytes, CorruptValue]
    """Users whose records are corrupt. Rebuild the partition from the changelog before applying events to them; if they
    are corrupt in the changelog, too, count them and continue with empty state."""
    features: list[StoredFeatures | None]
    """Stored features of each requested user, in their order; empty unless they were asked for."""


def read_users(store: Store, users: Sequence[bytes], limits: StateLimits, *, with_features: bool = False) -> Read:
    """Read distinct users; raise `LayoutChanged` if the state was written with sizes other than those in `limits`."""
    corrupt: dict[bytes, CorruptValue] = {}
    heads = _read_heads(store, users, limits, corrupt)
    check_layout(heads.headers, limits)
    chunks = _read_chunks(store, users, heads.headers, limits, corrupt)
    features = read_features(store, users, corrupt) if with_features else []
    for row, user in enumerate(users if corrupt else ()):
        if user in corrupt:
            heads.headers[row] = new_headers(1, limits)[0]
    return Read(_assemble(heads, chunks, limits), corrupt, features)


NOT_STORED = -2
"""Encoded offset of a user without a stored head; that of a corrupt one is -1, as if nothing had been published."""


def encoded_offsets(store: Store, users: Sequence[bytes]) -> I64:
    """Return up to which source offset each user's stored state knows of outputs [U], `NOT_STORED` without state."""
    keys = [head_key(user) for user in users]
    offsets = np.full(len(users), NOT_STORED, np.int64)
    for row, (key, value) in enumerate(zip(keys, store.get_many(keys), strict=True)):
        if value is not None:
            body = body_of(key, value)
            is_whole = body is not None and len(body) >= HEAD_BYTES
            offsets[row] = np.frombuffer(body or b"", HEADER_DTYPE, 1)["encoded_offset"][0] if is_whole else -1
    return offsets


def may_be_older(user: bytes, head: bytes, than_ms: int) -> bool:
    """Return whether the newest action of a stored user may be at `than_ms` or before; its chunks are not read.

    False for a user without actions. A head that is corrupt, or ends with a complete chunk, does not tell the time.
    """
    body = body_of(head_key(user), head)
    if body is None or len(body) < HEAD_BYTES:
        return True
    header = np.frombuffer(body, HEADER_DTYPE, 1)[0]
    if not header["tail"] or len(body) == HEAD_BYTES:
        return bool(header["count"] > 0)
    return bool(np.frombuffer(body[-ACTION_BYTES:], ACTION_DTYPE)["timestamp_ms"][0] <= than_ms)


@dataclass(frozen=True, slots=True)
class _Heads:
    headers: Columns
    """[U] of HEADER_DTYPE."""
    tails: Actions
    """Tail actions, user by user."""
    tail_starts: I64
    """[U + 1], where each user's tail begins in `tails`."""


@dataclass(frozen=True, slots=True)
class _Chunks:
    first: I64
    """[U], number of each user's first chunk that contains kept actions."""
    starts: I64
    """[U + 1], where each user's actions begin in `actions`."""
    actions: Actions
    """Actions of the chunks, user by user."""


def _read_heads(
    store: Store, users: Sequence[bytes], limits: StateLimits, corrupt: dict[bytes, CorruptValue]
) -> _Heads:
    """Read the heads of `users`; an unknown user keeps a new header, a corrupt one is also added to `corrupt`."""
    headers = new_headers(len(users), limits)
    keys = [head_key(user) for user in users]
    known, bodies = [], []
    for row, (key, value) in enumerate(zip(keys, store.get_many(keys), strict=True)):
        if value is None:
            continue
        body = body_of(key, value)
        if body is not None and len(body) == HEAD_BYTES + ACTION_BYTES * body[3]:
            known.append(row)
            bodies.append(body)
        else:
            corrupt[users[row]] = _error(partial(decode_head, users[row], value))
    headers[known] = np.frombuffer(b"".join([body[:HEAD_BYTES] for body in bodies]), HEADER_DTYPE)
    tails = np.frombuffer(b"".join([body[HEAD_BYTES:] for body in bodies]), ACTION_DTYPE)
    return _Heads(headers, tails, starts_of(headers["tail"].astype(np.int64)))


def _read_chunks(
    store: Store, users: Sequence[bytes], headers: Columns, limits: StateLimits, corrupt: dict[bytes, CorruptValue]
) -> _Chunks:
    """Read every chunk that contains kept actions, K in all; a missing or corrupt one adds its user to `corrupt`."""
    first = np.maximum(headers["count"] - limits.sequence_length, 0) // limits.chunk_length  # [U]
    lengths = headers["count"] // limits.chunk_length - first  # [U], complete chunks to read
    owner, number = spans(first, lengths)  # [K] user index, [K] chunk number
    owners, numbers = owner.tolist(), number.tolist()
    keys = [chunk_key(users[row], chunk, limits) for row, chunk in zip(owners, numbers, strict=True)]
    values = store.get_many(keys)
    dtype = chunk_dtype(limits)
    nothing = bytes(dtype.itemsize)
    bodies = [value and body_of(key, value) for key, value in zip(keys, values, strict=True)]
    whole = [body if body and len(body) == dtype.itemsize else nothing for body in bodies]
    chunks = np.frombuffer(b"".join(whole), dtype)
    is_wrong = (chunks["number"] != number) | (chunks["chunk_length"] != limits.chunk_length)
    for row in np.flatnonzero(is_wrong).tolist():
        user, chunk, value = users[owners[row]], numbers[row], values[row]
        corrupt.setdefault(user, _error(partial(decode_chunk, user, chunk, value, limits)))
    return _Chunks(first, starts_of(lengths * limits.chunk_length), chunks["actions"].reshape(-1))


def _assemble(heads: _Heads, chunks: _Chunks, limits: StateLimits) -> StoredSequences:
    """Gather each user's kept actions, oldest first, from the concatenation of all chunks and all tails.

    A position before the user's last complete chunk ends is looked up in its chunks, a later one in its tail.
    """
    length, count = limits.chunk_length, heads.headers["count"]
    kept = np.minimum(count, limits.sequence_length)
    owner, position = spans(count - kept, kept)
    in_tail = position - (count - count % length)[owner]  # negative: the action is in a chunk
    at = np.where(
        in_tail >= 0,
        len(chunks.actions) + heads.tail_starts[owner] + in_tail,
        chunks.starts[owner] + position - chunks.first[owner] * length,
    )
    return StoredSequences(heads.headers, np.concatenate((chunks.actions, heads.tails)).take(at), starts_of(kept))


def _error(decode: Callable[[], object]) -> CorruptValue:
    """Return the error that decoding a corrupt value raises."""
    try:
        decode()
    except CorruptValue as error:
        return error
    raise AssertionError("a value that was judged corrupt can be decoded")
