"""A source partition while this worker owns it: state, store, producer, and the position of each."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from faust.types import TP

from streams.core.partition_state import PartitionState
from streams.engine.changelog import ChangelogProducer
from streams.engine.delivery import RecordBatch
from streams.errors import HaltsPartition
from streams.storage.codec import CheckpointMark
from streams.storage.store import PartitionStore


class Continuity(Enum):
    """Relation of a batch to the offset that its partition expects next."""

    CONTIGUOUS = "contiguous"
    """The batch holds the expected offset: apply it from there."""
    STALE = "stale"
    """All of its records were processed, or it was fetched before the last seek: ignore it."""
    GAP = "gap"
    """It begins above the expected offset: records in between were not delivered."""


@dataclass(slots=True, eq=False)
class OwnedPartition:
    """A source partition while this worker owns it."""

    tp: TP
    state: PartitionState
    store: PartitionStore
    producer: ChangelogProducer
    next_offset: int
    """Offset at which the next batch must begin; a checkpoint commits it."""
    committed_offset: int
    """Source offset of the last checkpoint."""
    output_offset: int
    """Offset after the last acknowledged record of this partition in the output topic."""
    mark: CheckpointMark = field(default_factory=lambda: CheckpointMark(0, 0))
    """Mark that checkpoints write, with the identity of the logs; only its offsets advance."""
    mark_is_outdated: bool = False
    """True until a checkpoint has written a mark that was found in an older format or with another identity."""
    producer_failed: bool = False
    """True after a failed checkpoint: the producer must be replaced before the next one."""
    rebuilt: bool = False
    """True after a rebuild of the local store: a value that is corrupt now is corrupt in the changelog too."""
    epoch: int = 0
    """Number of seeks so far; batches fetched before the last one are ignored."""
    unacknowledged: set[asyncio.Future[Any]] = field(default_factory=set)
    """Dead letters and tombstones that must be acknowledged before a checkpoint commits the offsets of their events."""
    checkpointing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def next_mark(self) -> CheckpointMark:
        """Return the mark of a checkpoint at the present position."""
        return replace(self.mark, source_offset=self.next_offset, output_offset=self.output_offset)

    def continuity(self, batch: RecordBatch) -> Continuity:
        """Return how the batch continues the partition; every record must be processed exactly once."""
        if batch.epoch < self.epoch or batch.end <= self.next_offset:
            return Continuity.STALE
        return Continuity.CONTIGUOUS if batch.begin <= self.next_offset else Continuity.GAP


class SendFailed(HaltsPartition):
    """A dead letter or tombstone could not be delivered; only a replay of its event can send it again."""


class PendingOutputs:
    """Dead letters and tombstones of a partition sent up to now; implements `streams.storage.checkpoint.Outputs`."""

    def __init__(self, owned: OwnedPartition) -> None:
        self._owned, self._pending = owned, list(owned.unacknowledged)

    async def acknowledged(self) -> None:
        """Wait until all of them are acknowledged; raise `SendFailed` if one was not."""
        for failure in await asyncio.gather(*self._pending, return_exceptions=True):
            if isinstance(failure, BaseException):
                raise SendFailed(f"a dead letter or tombstone could not be delivered: {failure!r}")
        self._owned.unacknowledged.difference_update(self._pending)
