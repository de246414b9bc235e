"""Actions as columns: the one layout that training, batch and stream share.

An action is a fixed-width record of 32 bytes. Ids become 64-bit keys and names of action types and surfaces become
16-bit codes, both by a fixed hash. State can therefore be written without a vocabulary, and outlives every vocabulary.
Zero means "absent" in all hashed columns.

Shapes: N actions, U users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from encoder.arrays import F64, I64, Bool

ACTION_DTYPE = np.dtype(
    [
        ("item", "<u8"),  # item_key(item id)
        ("action", "<u2"),  # name_code(action type)
        ("surface", "<u2"),  # name_code(surface), 0 when the event names none
        ("timestamp_ms", "<i8"),  # event time
        ("duration_ms", "<u4"),  # 0 when unknown
        ("event_id", "<u8"),  # item_key(event id), 0 when the event has none
    ]
)
assert ACTION_DTYPE.itemsize == 32

Actions = npt.NDArray[np.void]
"""A one-dimensional array of `ACTION_DTYPE`."""


def item_key(text: str) -> int:
    """Return the 64-bit key of an id: the XXH3 of its UTF-8 bytes, never 0."""
    return xxh3_64_intdigest(text.encode()) or 1


def name_code(name: str) -> int:
    """Return the 16-bit code of an action type or surface: XXH3 modulo 65,535, plus 1; 0 for the empty name.

    Two names of one vocabulary may share a code (with probability 0.3 % for twenty names); `Vocabularies` checks that.
    """
    return xxh3_64_intdigest(name.encode()) % 65_535 + 1 if name else 0


@dataclass(frozen=True, slots=True)
class ActionBatch:
    """Decoded actions of one source partition, in offset order; row i of each column is one event.

    A row with `is_tombstone` deletes the state of its user: its `timestamp_ms` is the time of the Kafka record, and its
    other fields are 0.
    """

    users: list[bytes]
    """N user ids: the UTF-8 keys of the records."""
    actions: Actions
    """[N] actions of `ACTION_DTYPE`."""
    offsets: I64
    """[N] source offsets, strictly increasing."""
    is_tombstone: Bool
    """[N] whether a row deletes its user."""
    arrival_ms: I64
    """[N] when the broker appended each record, as far as that is known: see `streams.wire.actions`."""
    values: F64 | None = None
    """[N] the number `value` of each action, NaN where it has none; None if no action has one. It is not kept in
    sequences."""

    def __len__(self) -> int:
        return len(self.users)

    def select(self, rows: I64) -> ActionBatch:
        """Return a batch of only these rows."""
        return ActionBatch(
            [self.users[row] for row in rows.tolist()],
            self.actions[rows],
            self.offsets[rows],
            self.is_tombstone[rows],
            self.arrival_ms[rows],
            None if self.values is None else self.values[rows],
        )


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """The kept sequences of U users, one after another, each oldest first: the input of an encoder runtime.

        actions    a0 a1 a2 | b0 | c0 c1        starts = [0, 3, 4, 6]
        position    7  8  9    0   41 42        counts = [10, 1, 43]

    `counts[u]` is the number of actions ever applied for user u, so the user's newest row has position `counts[u] - 1`
    and the oldest kept row has position `counts[u] - (starts[u + 1] - starts[u])`. `revisions[u]` changes with every
    change that is not an append (a late event, a deletion): if the revision is equal, a cache that has seen
    `c <= counts[u]` actions needs only the last `counts[u] - c` rows.
    """

    users: Sequence[bytes]
    """U user ids."""
    actions: Actions
    """[N] actions of all users."""
    starts: I64
    """[U + 1] bounds: user u owns rows starts[u] to starts[u + 1]."""
    counts: I64
    """[U] number of actions ever applied."""
    revisions: I64
    """[U] revision of each sequence."""

    def __len__(self) -> int:
        return len(self.users)
