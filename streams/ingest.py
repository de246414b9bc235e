"""The agent's loop: a record batch comes in, the pure core decides, and its effects are performed here.

Everything that changes a partition's state runs on the event loop without an await in between, so a checkpoint sees
either all of a batch or nothing of it. What takes time (reading cold users, room in the encode queue) comes before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from streams.core.effects import Effects
from streams.core.merge import Outcome
from streams.core.policy import Reason
from streams.encoding.partition_jobs import PartitionSource
from streams.encoding.queue import EncodeQueue
from streams.engine.delivery import RecordBatch
from streams.engine.outputs import Outputs
from streams.engine.ownership import OwnedPartition
from streams.engine.partitions import Partitions
from streams.storage.reader import read_users
from streams.storage.store import StoreDamaged
from streams.telemetry.metrics import Metrics
from streams.wire.actions import Decoded, DecodeLimits, decode_actions
from streams.wire.dead_letters import dead_letter_headers
from streams.wire.embeddings import encode_tombstone

logger = logging.getLogger(__name__)

WAKE_EVERY_S = 0.05
"""How often deadlines are looked at: half of the wheel's resolution."""
ROOM_EVERY_S = 0.01


class Ingest:
    """Takes record batches and fired timers of the owned partitions through the core."""

    def __init__(
        self,
        partitions: Partitions,
        queue: EncodeQueue,
        outputs: Outputs,
        metrics: Metrics,
        *,
        limits: DecodeLimits,
        checkpoint_events_max: int,
        now_ms: Callable[[], int],
    ) -> None:
        self._partitions, self._queue, self._outputs, self._metrics = partitions, queue, outputs, metrics
        self._limits, self._checkpoint_events_max, self._now_ms = limits, checkpoint_events_max, now_ms
        self._sources: dict[OwnedPartition, PartitionSource] = {}

    def add(self, owned: OwnedPartition, source: PartitionSource) -> None:
        """A partition has become ready."""
        self._sources[owned] = source

    def remove(self, owned: OwnedPartition) -> None:
        """A partition is given back: its users leave the queue, and stay due in its state."""
        source = self._sources.pop(owned, None)
        if source is not None:
            self._queue.drop(source)

    async def on_batch(self, batch: RecordBatch) -> None:
        """Apply a batch exactly where the last one of its partition ended, or not at all."""
        owned = await self._partitions.accept(batch)
        if owned is None or not await self._has_room(owned):
            return
        records = [record for record in batch.records if record.offset >= owned.next_offset]
        decoded = decode_actions(records, now_ms=self._now_ms(), limits=self._limits)
        if not await self._load(owned, decoded.actions.users):
            return
        effects = owned.state.apply(decoded.actions, self._now_ms())
        owned.next_offset = batch.end
        self._refuse(owned, records, decoded)
        self._perform(owned, effects)
        self._count(owned, len(records), effects)

    async def wake(self) -> None:
        """Fire the timers of all partitions until cancelled; costs nothing while none is due."""
        while True:
            await asyncio.sleep(WAKE_EVERY_S)
            for owned in list(self._sources):
                await self._wake(owned, self._now_ms())

    async def _wake(self, owned: OwnedPartition, until_ms: int) -> None:
        """Fire what falls due until then, in portions; the cold ones among the users fire once they are loaded."""
        while (deadline_ms := owned.state.next_deadline_ms) is not None and deadline_ms <= until_ms:
            effects = owned.state.fire_timers(until_ms)
            self._perform(owned, effects)
            if not await self._load(owned, effects.to_load):
                return
            await asyncio.sleep(0)
            if not self._is_mine(owned):
                return

    def _is_mine(self, owned: OwnedPartition) -> bool:
        return self._partitions.ready.get(owned.tp.partition) is owned

    async def _has_room(self, owned: OwnedPartition) -> bool:
        """Hold back while too many users wait; False when the partition is gone meanwhile.

        A rebalance waits for the batch in hand, so it ends the wait: the batch is taken beyond the limit.
        """
        while not self._queue.has_room and not self._partitions.app.rebalancing:
            await asyncio.sleep(ROOM_EVERY_S)
        return self._is_mine(owned)

    async def _load(self, owned: OwnedPartition, users: Sequence[bytes]) -> bool:
        """Take the cold ones of `users` into memory; False when the partition is gone meanwhile."""
        state = owned.state
        cold = state.missing(users)
        if not cold:
            return True
        state.evict(len(cold), spare=users)
        while state.room < len(cold):
            # Everyone in memory is dirty or waits for the encoder: make them clean, let the encoder go on.
            await self._partitions.checkpoint(owned)
            await asyncio.sleep(ROOM_EVERY_S)
            if not self._is_mine(owned):
                return False
            cold = state.missing(users)
            state.evict(len(cold), spare=users)
        try:
            read = read_users(owned.store, cold, state.limits)
        except StoreDamaged as damage:
            logger.error("%s: %s", owned.tp, damage)
            await self._partitions.rebuild(owned)
            return False
        if read.corrupt and not await self._quarantine(owned, read.corrupt):
            return False
        state.load(cold, read.stored)
        return True

    async def _quarantine(self, owned: OwnedPartition, corrupt: Collection[bytes]) -> bool:
        """Corrupt users: first rebuild the local store; what is corrupt in the changelog too begins anew (True)."""
        if owned.rebuilt:
            logger.error(
                "%d users of %s are corrupt in the changelog: their sequences begin anew", len(corrupt), owned.tp
            )
            self._metrics.corrupt_users.inc(len(corrupt))
            return True
        logger.error("%d users of %s are corrupt on disk: rebuilding from the changelog", len(corrupt), owned.tp)
        await self._partitions.rebuild(owned)
        return False

    def _perform(self, owned: OwnedPartition, effects: Effects) -> None:
        source = self._sources.get(owned)
        if source is None:
            return
        self._queue.put(source, effects.due, effects.priorities.tolist(), effects.reasons.tolist())
        for reason, fired in enumerate(np.bincount(effects.reasons).tolist()):
            if fired:
                self._metrics.triggers.inc(fired, reason=Reason(reason).label)
        if effects.forgotten:
            offsets = effects.forgotten_offsets.tolist()
            tombstones = [encode_tombstone(*each) for each in zip(effects.forgotten, offsets, strict=True)]
            self._track(owned, self._outputs.publish_tombstones(owned.tp.partition, tombstones))

    def _refuse(self, owned: OwnedPartition, records: Sequence[Any], decoded: Decoded) -> None:
        topic, partition = owned.tp
        for refused in decoded.refused:
            record = records[refused.index]
            headers = dead_letter_headers(refused, record, topic=topic, partition=partition)
            self._metrics.refused.inc(1, reason=refused.reason)
            self._track(owned, self._outputs.dead_letter(partition, record.key, record.value, headers))

    def _track(self, owned: OwnedPartition, sending: Any) -> None:
        """Send in the background; the next checkpoint waits for it, and repeats it from the log where it fails."""
        task = asyncio.ensure_future(sending)
        owned.unacknowledged.add(task)

    def _count(self, owned: OwnedPartition, events: int, effects: Effects) -> None:
        metrics = self._metrics
        metrics.events.inc(events)
        if effects.outcomes.any():  # most batches are small and hold nothing but APPLIED
            for outcome, counter in (
                (Outcome.DUPLICATE, metrics.duplicates),
                (Outcome.LATE, metrics.late_inserted),
                (Outcome.TOO_OLD, metrics.late_dropped),
                (Outcome.FORGOTTEN, metrics.forgotten_dropped),
                (Outcome.TOMBSTONE, metrics.tombstones),
            ):
                counter.inc(effects.count(outcome))
        if owned.next_offset - owned.committed_offset >= self._checkpoint_events_max:
            self._partitions.checkpoint_soon(owned)
