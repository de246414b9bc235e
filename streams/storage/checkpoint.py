"""A checkpoint of one partition: outputs, then changelog and source offset together, then the local store.

The order is what makes a crash anywhere harmless:

1. everything published for the events in the snapshot is acknowledged, or it would be lost with the snapshot;
2. changelog records, their mark and the source offset become visible in one transaction, or not at all;
3. the store, a cache of the changelog, follows; it may always be behind, never ahead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from streams.core.partition_state import PartitionState
from streams.storage.codec import CheckpointMark, encode, encode_mark
from streams.storage.store import Record, Store

__all__ = ["ChangelogTransaction", "CheckpointMark", "Outputs", "checkpoint"]


class Outputs(Protocol):
    """What has been published for one source partition."""

    async def acknowledged(self) -> None:
        """Return when all that was published before this call is acknowledged; raises when it cannot be."""
        ...


class ChangelogTransaction(Protocol):
    """The changelog and the committed offset of one source partition, as one transaction at the broker."""

    async def begin(self) -> None: ...

    async def append(self, records: Sequence[Record]) -> int:
        """Write the records; return the changelog offset of the last one."""
        ...

    async def send_source_offset(self, source_offset: int) -> None: ...

    async def commit(self) -> None: ...


async def checkpoint(
    state: PartitionState, mark: CheckpointMark, outputs: Outputs, changelog: ChangelogTransaction, store: Store
) -> int:
    """Make `state` durable as of `mark`, which describes it at the moment of the call; return the records written.

    Whatever a port raises passes through. Before the commit has returned, the state is dirty as before, and another
    checkpoint may be tried (with a new transaction: the outcome of this one may be unknown). After it, only the local
    store has failed: stop the worker. While the state has notes of outputs that it has not taken up, the mark stays
    before these outputs, so that the next owner reads them again.
    """
    if state.has_unseen_outputs:
        known = store.mark()
        mark = CheckpointMark(mark.source_offset, known.output_offset if known else 0)
    snapshot = state.begin_checkpoint()
    try:
        records: list[Record] = [*encode(snapshot, state.limits), encode_mark(mark)]
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
