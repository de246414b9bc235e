"""What the stream core keeps of a user, as columns, and what it exchanges with the codec.

Persisted per user: one header (`HEADER_DTYPE`) and the kept actions. An action's *position* is its index, in
event-time order, among all actions ever applied for the user; position p lives in ring cell `p mod M` of the user's
slot, so the kept actions are the positions `count - min(count, M)` to `count - 1`. For durable storage positions are
cut into chunks of C: chunk k holds positions kC to kC + C - 1 and is written once it is complete; what follows the
last complete chunk is the *tail* and travels with the header.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from encoder.actions.columns import ACTION_DTYPE, Actions
from encoder.arrays import I64, Bool
from streams.core.columns import Columns

NEVER = 2**63 - 1
"""`due_ms` of a user for whom no deadline is pending."""
LONG_AGO = -(2**62)
"""Before every event and every processing time."""

HEADER_DTYPE = np.dtype(
    [
        ("version", "u1"),
        ("flags", "u1"),  # HAD_DEADLINE
        ("reason", "u1"),  # Reason for which the user is due, 0 when not due
        ("tail", "u1"),  # actions after the last complete chunk
        ("revision", "<u4"),  # changes at anything but an append, never reset
        ("count", "<i8"),  # actions ever applied (since the user was last forgotten)
        ("applied_offset", "<i8"),  # source offset of the last event that changed this user, -1 before the first
        ("encoded_offset", "<i8"),  # the output topic holds an embedding (or tombstone) of at least this source offset
        ("due_offset", "<i8"),  # source offset that the wanted embedding must contain
        ("forgotten_ms", "<i8"),  # record time of the last tombstone, LONG_AGO without one
        ("first_unencoded_ms", "<i8"),  # processing time of the oldest unencoded action
        ("due_ms", "<i8"),  # processing time at which the user must be looked at, NEVER when there is nothing to do
        ("last_encoded_ms", "<i8"),  # processing time of the last hand-over to the encode queue or acknowledgement
        ("unencoded", "<u4"),  # applied actions that no acknowledged embedding contains
        ("chunk_length", "<u2"),  # C
        ("chunks", "<u2"),  # M / C
    ],
    align=True,
)
assert HEADER_DTYPE.itemsize == 80

STATE_VERSION = 1
HAD_DEADLINE = 1
"""Flag: the header written before this one had a deadline, so an index entry may exist that must go."""


@dataclass(frozen=True, slots=True)
class StateLimits:
    """The sizes of one partition's state. `sequence_length` and `chunk_length` are fixed for the life of the state."""

    sequence_length: int = 256
    """M, kept actions of a user."""
    chunk_length: int = 16
    """C, divides M."""
    hot_users_max: int = 65_536
    """Users of one partition in memory; at 8.8 kB each when their sequences are full."""
    wake_users_max: int = 10_000
    """Users that one wake-up may load or evaluate."""

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
        """Chunk records a user can have: one more than are kept, so that a new chunk never replaces a needed one."""
        return self.sequence_length // self.chunk_length + 1


@dataclass(frozen=True, slots=True)
class StoredSequences:
    """The durable state of some users, whole: row i of `headers` and actions starts[i] to starts[i + 1]."""

    headers: Columns
    """[U] of HEADER_DTYPE; `new_headers` for a user that nothing is stored of."""
    actions: Actions
    """[N], per user oldest first."""
    starts: I64
    """[U + 1]."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that must be written for the users that changed since the last checkpoint."""

    users: Sequence[bytes]
    headers: Columns
    """[U] of HEADER_DTYPE."""
    tails: Actions
    tail_starts: I64
    """[U + 1]: user u owns tails[tail_starts[u]:tail_starts[u + 1]]."""
    chunk_users: I64
    """[K], index into `users`."""
    chunk_numbers: I64
    """[K], absolute."""
    chunks: Columns
    """[K, C] of ACTION_DTYPE; cells older than the kept sequence hold newer actions and are never read."""
    deleted_users: I64
    """[D], index into `users`."""
    deleted_keys: I64
    """[D], chunk keys that a forgotten user no longer has."""
    dirty_from: I64
    """[U], first position that was not durable before this snapshot."""
    stored_keys: I64
    """[U], chunk keys that were stored before this snapshot."""
    emptied: Bool
    """[U], forgotten since the snapshot before this one."""

    def __len__(self) -> int:
        return len(self.users)


def new_headers(users: int, limits: StateLimits) -> Columns:
    """Headers of users that nothing is known of."""
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
    """The stored state of users that were never seen."""
    return StoredSequences(new_headers(users, limits), np.zeros(0, ACTION_DTYPE), np.zeros(users + 1, np.int64))
