"""A checkpoint of one partition: outputs, then changelog and source offset together, then the local store.

Because of this order, a crash at any point is harmless:

1. all that was published for the events in the snapshot is acknowledged; otherwise a crash after step 2 would lose it;
2. the changelog records, their mark and the source offset become visible in one transaction, or not at all;
3. the store, a cache of the changelog, is written last; it may be behind the changelog, never ahead of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from streams.core.partition_state import PartitionState
from streams.storage.codec import CheckpointMark, encode, encode_mark
from streams.storage.features import encode_features, missing_definitions
from streams.storage.store import Record, Store

__all__ = ["ChangelogTransaction", "CheckpointMark", "Outputs", "checkpoint"]


class Outputs(Protocol):
    """The outputs of one source partition."""

    async def acknowledged(self) -> None:
        """Wait until everything published before this call is acknowledged; raise if it cannot be."""
        ...


class ChangelogTransaction(Protocol):
    """The changelog and the committed offset of one source partition, as one transaction at the broker."""

    async def begin(self) -> None:
        """Begin a transaction."""
        ...

    async def append(self, records: Sequence[Record]) -> int:
        """Append the records; return the changelog offset of the last one."""
        ...

    async def send_source_offset(self, source_offset: int) -> None:
        """Add the source offset to the transaction."""
        ...

    async def commit(self) -> None:
        """Make records and source offset visible together."""
        ...


async def checkpoint(
    state: PartitionState, mark: CheckpointMark, outputs: Outputs, changelog: ChangelogTransaction, store: Store
) -> int:
    """Make `state` durable as of `mark`, its position at the moment of the call; return how many records were written.

    Errors of the ports pass through. If the commit has not returned, the state is dirty as before and another
    checkpoint may be tried, with a new transaction, because the outcome of this one may be unknown. If it has returned,
    only the local store failed: stop the worker. While the state has unseen outputs, the mark stays before them, so
    that the next owner reads them again.
    """
    if state.has_unseen_outputs:
        known = store.mark()
        known = known or CheckpointMark(0, 0)
        mark = replace(mark, output_offset=known.output_offset, features_offset=known.features_offset)
    snapshot = state.begin_checkpoint()
    try:
        records: list[Record] = [
            *missing_definitions(store, state.features),
            *encode(snapshot, state.limits),
            *encode_features(snapshot),
            encode_mark(mark),
        ]
        await outputs.acknowledged()
        await changelog.begin()
        changelog_offset = await changelog.append(records)
        await changelog.send_source_offset(mark.source_offset)
        await changelog.commit()
    except BaseException:
        state.abort_checkpoint(snapshot)
        raise
    for _ in store.write_steps(records, changelog_offset):
        await asyncio.sleep(0)
    state.commit_checkpoint(snapshot)
    return len(records)
