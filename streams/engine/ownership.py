"""A source partition while this worker owns it: state, store, producer, and the position of each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from faust.types import TP

from streams.core.partition_state import PartitionState
from streams.engine.changelog import ChangelogProducer
from streams.engine.delivery import RecordBatch
from streams.errors import HaltsPartition
from streams.storage.codec import CheckpointMark
from streams.storage.identity import LastRecord, Record
from streams.storage.store import PartitionStore

logger = logging.getLogger(__name__)

ACKNOWLEDGED_S = 2.0
"""Time for which a checkpoint waits for dead letters and tombstones before it is put off."""


class Continuity(Enum):
    """Relation of a batch to the offset that its partition expects next."""

    CONTIGUOUS = "contiguous"
    """The batch holds the expected offset: apply it from there."""
    STALE = "stale"
    """All of its records were processed, or it was fetched before the last seek: ignore it."""
    GAP = "gap"
    """It begins above the expected offset: records in between were not delivered."""


@dataclass(slots=True, eq=False)
class Undelivered:
    """Dead letters and tombstones of a partition that are being sent, and how much of them is in memory."""

    sending: set[asyncio.Task[Any]] = field(default_factory=set)
    records: int = 0
    size: int = 0
    """Bytes of keys, values and headers."""
    has_failed: bool = False
    """True once one was given up, so that its event must be read again."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever something has been acknowledged."""

    def add(self, sending: Coroutine[Any, Any, Any], records: int, size: int) -> None:
        """Send in the background; checkpoints wait for it."""
        task = asyncio.ensure_future(sending)
        self.sending.add(task)
        self.records, self.size = self.records + records, self.size + size
        task.add_done_callback(lambda done: self._end(done, records, size))

    def exceeds(self, records_max: int, size_max: int) -> bool:
        """Return whether more is being sent than the limits allow."""
        return self.records > records_max or self.size > size_max

    async def wait_below(self, records_max: int, size_max: int) -> None:
        """Return once no more is being sent than the limits allow."""
        while self.exceeds(records_max, size_max):
            self.changed.clear()
            await self.changed.wait()

    def cancel(self) -> None:
        """Give everything up: the next owner of the partition reads the events again."""
        for task in list(self.sending):
            task.cancel()

    def _end(self, done: asyncio.Task[Any], records: int, size: int) -> None:
        self.sending.discard(done)
        self.records, self.size = self.records - records, self.size - size
        self.changed.set()
        self.has_failed |= done.cancelled()
        if not done.cancelled() and (failure := done.exception()) is not None:
            self.has_failed = True
            logger.error("a dead letter or tombstone could not be sent: %r", failure)


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
    """Mark that checkpoints write, with the identity of the logs; only its offsets and its last record advance."""
    features_offset: int = 0
    """Offset after the last acknowledged record of this partition in the features topic."""
    mark_is_outdated: bool = False
    """True until a checkpoint has written a mark that was found in an older format or with another identity."""
    notes_until: int = 0
    """Source offset from which on the notes in the store mean nothing; 0 without notes (`streams.engine.published`)."""
    replayed_at: int = 0
    """Source offset from which on no published record is ahead of the state."""
    failing_since: float | None = None
    """Monotonic time since which every checkpoint has failed, None after one that succeeded."""
    producer_failed: bool = False
    """True after a failed checkpoint: the producer must be replaced before the next one."""
    is_closed: bool = False
    """True once the partition was given back or lost, or its state is read again: nothing more is published for it."""
    rebuilt: bool = False
    """True after a rebuild of the local store: a value that is corrupt now is corrupt in the changelog too."""
    last_record: Record | None = None
    """Last record processed; None before the first one, while that of `mark` is the last."""
    epoch: int = 0
    """Number of seeks so far; batches fetched before the last one are ignored."""
    misplaced: set[bytes] = field(default_factory=set)
    """Users with state here who belong to another partition, from before that was checked: no more events for them."""
    undelivered: Undelivered = field(default_factory=Undelivered)
    """Dead letters and tombstones that must be acknowledged before a checkpoint commits the offsets of their events."""
    checkpointing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def has_notes(self) -> bool:
        """True while an event may still come that a published embedding contains and the user's state does not."""
        return self.next_offset < self.notes_until

    @property
    def is_replaying(self) -> bool:
        """True while a record may be published that contains more than the state does."""
        return self.next_offset < self.replayed_at

    def next_mark(self) -> CheckpointMark:
        """Return the mark of a checkpoint at the present position.

        While there are notes, and while anything published is ahead of the state, its output offsets stay before those
        outputs, for the next owner.
        """
        last = self.mark.last if self.last_record is None else LastRecord.of(self.last_record)
        mark = replace(self.mark, source_offset=self.next_offset, last=last)
        if self.has_notes or self.is_replaying:
            return mark
        return replace(mark, output_offset=self.output_offset, features_offset=self.features_offset)

    def continuity(self, batch: RecordBatch) -> Continuity:
        """Return how the batch continues the partition; every record must be processed exactly once."""
        is_over = batch.end <= self.next_offset and (batch.fault is None or batch.end < self.next_offset)
        if batch.epoch < self.epoch or is_over:
            return Continuity.STALE
        return Continuity.CONTIGUOUS if batch.begin <= self.next_offset else Continuity.GAP


class SendFailed(HaltsPartition):
    """A dead letter or tombstone was given up; only a replay of its event can send it again."""


class NotAcknowledged(HaltsPartition):
    """Dead letters or tombstones are not acknowledged yet, so the checkpoint has to wait; nothing is lost."""


class PendingOutputs:
    """Dead letters and tombstones of a partition sent up to now; implements `streams.storage.checkpoint.Outputs`."""

    def __init__(self, owned: OwnedPartition) -> None:
        self._undelivered, self._pending = owned.undelivered, set(owned.undelivered.sending)

    async def acknowledged(self) -> None:
        """Return once all of them are acknowledged.

        Raises `NotAcknowledged` where that takes long, and `SendFailed` where one was given up.
        """
        waiting: set[Any] = set()
        if self._pending:
            _, waiting = await asyncio.wait(self._pending, timeout=ACKNOWLEDGED_S)
        if self._undelivered.has_failed:
            raise SendFailed("a dead letter or tombstone was given up; see the log")
        if waiting:
            raise NotAcknowledged(f"{len(waiting)} sends of dead letters or tombstones are not acknowledged yet")
