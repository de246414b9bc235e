"""One source partition while this worker owns it: its state, its store, its producer, and how far each of them is."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from faust.types import TP

from streams.core.partition_state import PartitionState
from streams.engine.changelog import ChangelogProducer
from streams.engine.delivery import RecordBatch
from streams.errors import StopsWorker
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
    """One source partition while this worker owns it."""

    tp: TP
    state: PartitionState
    store: PartitionStore
    producer: ChangelogProducer
    next_offset: int
    """Where the next batch must begin; what a checkpoint commits."""
    committed_offset: int
    output_offset: int
    """Past the last acknowledged record of this partition in the output topic."""
    producer_failed: bool = False
    """The last checkpoint failed: the producer must be replaced before the next."""
    rebuilt: bool = False
    """Its local store was just rebuilt from the changelog: what is corrupt now is so in the changelog too."""
    epoch: int = 0
    """Batches fetched before this many seeks are ignored."""
    unacknowledged: set[asyncio.Future[Any]] = field(default_factory=set)
    """Dead letters that must be acknowledged before the offsets behind them may be committed."""
    checkpointing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def continuity(self, batch: RecordBatch) -> Continuity:
        """Return how the batch continues the partition; every record must be processed exactly once."""
        if batch.epoch < self.epoch or batch.end <= self.next_offset:
            return Continuity.STALE
        return Continuity.CONTIGUOUS if batch.begin <= self.next_offset else Continuity.GAP


class SendFailed(StopsWorker):
    """A dead letter or tombstone could not be delivered; only a replay can send it again. Stops the worker."""


class PendingOutputs:
    """What has been sent for the events of a partition up to now, as `streams.storage.checkpoint.Outputs`."""

    def __init__(self, owned: OwnedPartition) -> None:
        self._owned, self._pending = owned, list(owned.unacknowledged)

    async def acknowledged(self) -> None:
        for failure in await asyncio.gather(*self._pending, return_exceptions=True):
            if isinstance(failure, BaseException):
                raise SendFailed(f"a dead letter or tombstone could not be delivered: {failure!r}")
        self._owned.unacknowledged.difference_update(self._pending)
