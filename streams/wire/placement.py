"""Rejection of records in a partition that is not their user's.

A user whose records are in two partitions has two histories and two embeddings, and a deletion reaches only one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from streams.wire.actions import Decoded, Record, Rejected, RejectReason
from streams.wire.partitioner import partitions_of


def misplaced(keys: Sequence[bytes], partition: int, count: int) -> set[bytes]:
    """Return the keys that belong to another partition than the given one."""
    if not keys:
        return set()
    wrong = (partitions_of(keys, count) != partition).nonzero()[0]
    return {keys[index] for index in wrong.tolist()}


def reject_misplaced(
    decoded: Decoded, users: Collection[bytes], records: Sequence[Record], partition: int, count: int
) -> Decoded:
    """Return `decoded` with the records of `users`, deletions too, rejected as `wrong-partition`."""
    batch = decoded.actions
    is_wrong = np.fromiter((user in users for user in batch.users), np.bool_, len(batch))
    index_of = {record.offset: index for index, record in enumerate(records)}
    rejected = list(decoded.rejected)
    for row in is_wrong.nonzero()[0].tolist():
        right = int(partitions_of([batch.users[row]], count)[0])
        detail = f"the key belongs to partition {right} of {count} and was sent to {partition}; partition by murmur2"
        rejected.append(Rejected(index_of[int(batch.offsets[row])], RejectReason.WRONG_PARTITION, detail))
    keep = (~is_wrong).nonzero()[0]
    return Decoded(batch.select(keep), sorted(rejected, key=lambda one: one.index))
