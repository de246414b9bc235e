"""The state of a user: its columns in memory, and the types exchanged with the codec.

Per user, one header (`HEADER_DTYPE`) and the kept actions are persisted. An action's *position* is its index, in
event-time order, among all actions ever applied for the user, so the kept actions are the positions
`count - min(count, M)` to `count - 1`. In memory, position p is in ring cell `p mod M` of the user's row (see
`streams.core.sequences`). In durable storage positions are cut into chunks of C: chunk k holds positions kC to
kC + C - 1 and is written once it is complete. The actions after the last complete chunk are the *tail*, which is
stored with the header. For M = 8, C = 4 and count = 14:

    position    ... 4   5   6   7 | 8   9  10  11 | 12  13
                    chunk 1       | chunk 2       | tail
                            ^ oldest kept               ^ newest
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from encoder.actions.columns import ACTION_DTYPE, Actions
from encoder.arrays import I64, Bool
from streams.core.columns import Columns

NEVER = 2**63 - 1
"""`due_ms` of a user without a pending deadline."""
LONG_AGO = -(2**62)
"""A time before every event time and processing time."""

HEADER_DTYPE = np.dtype(
    [
        ("version", "u1"),
        ("flags", "u1"),  # HAD_DEADLINE
        ("reason", "u1"),  # Reason for which the user is due, 0 when it is not
        ("tail", "u1"),  # actions after the last complete chunk
        ("revision", "<u4"),  # changes with anything but an append, never reset
        ("count", "<i8"),  # actions ever applied (since the user was last forgotten)
        ("applied_offset", "<i8"),  # source offset of the last event that changed this user, -1 before the first
        ("encoded_offset", "<i8"),  # the output topic holds an embedding or tombstone of this source offset
        ("due_offset", "<i8"),  # source offset that the wanted embedding must contain
        ("forgotten_ms", "<i8"),  # record time of the last tombstone, LONG_AGO without one
        ("first_unencoded_ms", "<i8"),  # processing time of the oldest unencoded action
        ("due_ms", "<i8"),  # processing time at which to look at the user, NEVER when there is nothing to do
        ("last_encoded_ms", "<i8"),  # processing time of the last hand-over to the encode queue, or acknowledgement
        ("unencoded", "<u4"),  # applied actions that no acknowledged embedding contains
        ("chunk_length", "<u2"),  # C
        ("chunks", "<u2"),  # M / C
    ],
    align=True,
)
assert HEADER_DTYPE.itemsize == 80

STATE_VERSION = 1
HAD_DEADLINE = 1
"""Flag: the header written before this one had a deadline, so the index may have an entry that must be deleted."""


@dataclass(frozen=True, slots=True)
class StateLimits:
    """The sizes of one partition's state; `sequence_length` and `chunk_length` cannot change once state is written."""

    sequence_length: int = 256
    """M, actions kept per user."""
    chunk_length: int = 16
    """C, actions per chunk; divides M."""
    hot_users_max: int = 65_536
    """Users of one partition in memory, 8.8 kB each when their sequences are full."""
    wake_users_max: int = 10_000
    """Users whose timers are fired, or who are loaded for it, at a time."""
    user_ttl_ms: int = 0
    """Time without an action after which a user is forgotten; 0 means never."""
    counts_too_old: bool = False
    """Whether an event that is older than everything kept is applied too, because features count it."""

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.chunk_length <= 255 or self.sequence_length % self.chunk_length:
            problems.append("chunk_length must be 1 to 255 and divide sequence_length")
        if not 1 <= self.sequence_length // max(self.chunk_length, 1) <= 254:
            problems.append("sequence_length must be 1 to 254 times chunk_length")
        if self.hot_users_max < 1 or self.wake_users_max < 1:
            problems.append("hot_users_max and wake_users_max must be positive")
        if problems:
            raise ValueError(f"state limits: {'; '.join(problems)}")

    @property
    def chunk_keys(self) -> int:
        """Chunk records per user: one more than are kept, so that a new chunk never replaces one still needed."""
        return self.sequence_length // self.chunk_length + 1


def share(limits: StateLimits, worker_max: int, partitions: int) -> StateLimits:
    """Return the limits of one of `partitions` partitions that together hold at most `worker_max` users in memory."""
    hot_users = max(1, min(limits.hot_users_max, worker_max // max(partitions, 1)))
    return replace(limits, hot_users_max=hot_users, wake_users_max=min(limits.wake_users_max, hot_users))


@dataclass(frozen=True, slots=True)
class StoredSequences:
    """The durable state of some users; user i has row i of `headers` and the actions starts[i] to starts[i + 1] - 1."""

    headers: Columns
    """[U] of HEADER_DTYPE; that of `new_headers` for users without stored state."""
    actions: Actions
    """[N], per user oldest first."""
    starts: I64
    """[U + 1]."""


@dataclass(frozen=True, slots=True)
class StoredFeatures:
    """The durable feature state of a user; it belongs to the sequence with the same `count` and `revision`."""

    count: int
    revision: int
    refresh_ms: int
    """Processing time at which the features are published again without an event; NEVER if they are not."""
    had_refresh: bool
    """Whether the record before this one had a refresh, so the index may have an entry that must be deleted."""
    packed: bytes
    """Written by `streams.core.features.state.FeatureState.pack`; it begins with a format and the feature set."""

    @property
    def version(self) -> str:
        """Version of the feature set."""
        return self.packed[1:9].hex()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that a checkpoint must write: the users that changed since the last one."""

    users: Sequence[bytes]
    headers: Columns
    """[U] of HEADER_DTYPE."""
    tails: Actions
    """Actions after the last complete chunk, user by user."""
    tail_starts: I64
    """[U + 1]; the tail of user u is tails[tail_starts[u]:tail_starts[u + 1]]."""
    chunk_users: I64
    """[K], index into `users`."""
    chunk_numbers: I64
    """[K], number of each chunk: its first position divided by C."""
    chunks: Columns
    """[K, C] of ACTION_DTYPE; places older than the kept sequence contain newer actions and are never read."""
    deleted_users: I64
    """[D], index into `users`."""
    deleted_keys: I64
    """[D], chunk keys to delete, of users that were forgotten."""
    dirty_from: I64
    """[U], first position that was not durable before this snapshot."""
    stored_keys: I64
    """[U], number of chunk keys that were stored before this snapshot."""
    emptied: Bool
    """[U], whether the user was forgotten since the last snapshot."""
    gone: Bool
    """[U], whether the user has expired, so that its head is deleted instead of written."""
    features: Sequence[StoredFeatures | None] = ()
    """[U], None where nothing is to be written; empty if no features are computed."""

    def __len__(self) -> int:
        return len(self.users)


def new_headers(users: int, limits: StateLimits) -> Columns:
    """Return headers of unknown users."""
    headers = np.zeros(users, HEADER_DTYPE)
    headers["version"] = STATE_VERSION
    headers["chunk_length"] = limits.chunk_length
    headers["chunks"] = limits.sequence_length // limits.chunk_length
    for offset in ("applied_offset", "encoded_offset", "due_offset"):
        headers[offset] = -1
    headers["forgotten_ms"] = headers["last_encoded_ms"] = LONG_AGO
    headers["due_ms"] = NEVER
    return headers


def nothing_stored(users: int, limits: StateLimits) -> StoredSequences:
    """Return the stored state of users of which nothing is stored."""
    return StoredSequences(new_headers(users, limits), np.zeros(0, ACTION_DTYPE), np.zeros(users + 1, np.int64))
