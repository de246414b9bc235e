"""Actions as columns: the one layout that training, batch and stream share.

An action is a fixed-width record of 32 bytes. Ids of any form become 64-bit keys and names of action types and
surfaces become 16-bit codes, both by a fixed hash: state outlives every vocabulary, so no vocabulary is needed to
write it. Zero means "absent" in every hashed column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from encoder.arrays import I64, Bool

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
    """The 64-bit key of an id: XXH3 of its UTF-8 bytes, never 0."""
    return xxh3_64_intdigest(text.encode()) or 1


def name_code(name: str) -> int:
    """The 16-bit code of an action type or surface: XXH3 modulo 65,535, plus 1; 0 for the empty name.

    Two names of one vocabulary may share a code (0.3 % for twenty names); whoever builds a vocabulary checks that.
    """
    return xxh3_64_intdigest(name.encode()) % 65_535 + 1 if name else 0


@dataclass(frozen=True, slots=True)
class ActionBatch:
    """Decoded actions of one source partition, in offset order; row i of each column is one event.

    A row whose `is_tombstone` is set forgets its user: its `timestamp_ms` is the Kafka record's time, the rest is 0.
    """

    users: list[bytes]
    """User ids as they key the record, UTF-8; length N."""
    actions: Actions
    """[N] of ACTION_DTYPE."""
    offsets: I64
    """[N], strictly increasing source offsets."""
    is_tombstone: Bool
    """[N]."""

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """The kept sequences of U users, one after another, each oldest first: what an encoder runtime is asked to embed.

    `counts[u]` is the number of actions ever applied for the user, so the newest row has position `counts[u] - 1`
    and the first row of the user has position `counts[u] - (starts[u + 1] - starts[u])`. `revisions[u]` changes
    whenever anything but an append happened (a late event, a deletion): with an equal revision, a cache that has
    seen `c <= counts[u]` actions needs the last `counts[u] - c` rows only.
    """

    users: Sequence[bytes]
    actions: Actions
    """[N] rows of all users."""
    starts: I64
    """[U + 1]: user u owns rows starts[u] to starts[u + 1]."""
    counts: I64
    """[U]."""
    revisions: I64
    """[U]."""

    def __len__(self) -> int:
        return len(self.users)
