"""The ingest loop: a record batch comes in, the pure core decides, and its effects are performed here.

A batch is applied on the event loop without an await, so a checkpoint contains either all of it or nothing. Steps that
take time (waiting for room in the encode queue, reading cold users) come before.
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
from streams.encoding.partition_jobs import PartitionJobs
from streams.encoding.queue import EncodeQueue
from streams.engine.delivery import RecordBatch
from streams.engine.outputs import Outputs
from streams.engine.ownership import OwnedPartition
from streams.engine.partitions import Partitions
from streams.errors import StopsWorker
from streams.storage.reader import read_users
from streams.storage.store import StoreDamaged
from streams.telemetry.metrics import Metrics
from streams.wire.actions import Decoded, DecodeLimits, decode_actions
from streams.wire.dead_letters import dead_letter_headers
from streams.wire.embeddings import encode_tombstone

logger = logging.getLogger(__name__)

TIMERS_EVERY_S = 0.05
"""Interval at which deadlines are checked: half of the resolution of the deadline wheel."""
ROOM_EVERY_S = 0.01
"""Interval at which a full queue or a full state is checked for room again."""


class Ingest:
    """Runs record batches and timers of the owned partitions through the core."""

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
        self._jobs: dict[OwnedPartition, PartitionJobs] = {}

    def add(self, owned: OwnedPartition, jobs: PartitionJobs) -> None:
        """Start processing a partition that has become ready."""
        self._jobs[owned] = jobs

    def remove(self, owned: OwnedPartition) -> None:
        """Stop processing a partition; its users leave the queue and stay due in its state."""
        jobs = self._jobs.pop(owned, None)
        if jobs is not None:
            self._queue.drop(jobs)

    async def on_batch(self, batch: RecordBatch) -> None:
        """Apply a batch if it continues exactly where the last one of its partition ended; ignore it otherwise."""
        owned = await self._partitions.accept(batch)
        if owned is None or not await self._has_room(owned):
            return
        records = [record for record in batch.records if record.offset >= owned.next_offset]
        decoded = decode_actions(records, now_ms=self._now_ms(), limits=self._limits)
        if not await self._load(owned, decoded.actions.users):
            return
        effects = owned.state.apply(decoded.actions, self._now_ms())
        owned.next_offset = batch.end
        self._reject(owned, records, decoded)
        self._perform(owned, effects)
        self._count(owned, len(records), effects)

    async def run_timers(self) -> None:
        """Fire the timers of all partitions until cancelled; costs nothing while none is due."""
        while True:
            await asyncio.sleep(TIMERS_EVERY_S)
            for owned in list(self._jobs):
                try:
                    await self._fire_timers(owned, self._now_ms())
                except StopsWorker:
                    raise
                except Exception as error:
                    logger.exception("the timers of %s failed", owned.tp)
                    await self._partitions.restart(owned.tp.partition, f"its timers failed: {error!r}")

    async def _fire_timers(self, owned: OwnedPartition, until_ms: int) -> None:
        """Fire the timers due by `until_ms`, in portions; those of cold users fire after the users are loaded."""
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
        """Wait while the encode queue is full; return whether the partition is still owned afterwards.

        A rebalance waits for the current batch, so it ends the wait: the batch is then applied beyond the limit.
        """
        while not self._queue.has_room and not self._partitions.app.rebalancing:
            await asyncio.sleep(ROOM_EVERY_S)
        return self._is_mine(owned)

    async def _load(self, owned: OwnedPartition, users: Sequence[bytes]) -> bool:
        """Load the cold ones of `users` into memory; return False if the partition was lost in the meantime."""
        state = owned.state
        cold = state.missing(users)
        if not cold:
            return True
        state.evict(len(cold), spare=users)
        while state.room < len(cold):
            # Every user in memory is dirty or in the encode queue: write the dirty ones, let the encoder go on.
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
        """Rebuild the store because of corrupt users; after a rebuild, return True: they continue with empty state."""
        if owned.rebuilt:
            logger.error(
                "%d users of %s are corrupt in the changelog too; their sequences restart empty", len(corrupt), owned.tp
            )
            self._metrics.corrupt_users.inc(len(corrupt))
            return True
        logger.error(
            "%d users of %s are corrupt on disk; rebuilding the store from the changelog", len(corrupt), owned.tp
        )
        await self._partitions.rebuild(owned)
        return False

    def _perform(self, owned: OwnedPartition, effects: Effects) -> None:
        jobs = self._jobs.get(owned)
        if jobs is None:
            return
        self._queue.put(jobs, effects.due, effects.priorities.tolist(), effects.reasons.tolist())
        for reason, fired in enumerate(np.bincount(effects.reasons).tolist()):
            if fired:
                self._metrics.triggers.inc(fired, reason=Reason(reason).label)
        if effects.forgotten:
            offsets = effects.forgotten_offsets.tolist()
            forgotten, source_id = zip(effects.forgotten, offsets, strict=True), owned.mark.source_id
            tombstones = [encode_tombstone(user, offset, source_id) for user, offset in forgotten]
            self._track(owned, self._outputs.publish_tombstones(owned.tp.partition, tombstones))

    def _reject(self, owned: OwnedPartition, records: Sequence[Any], decoded: Decoded) -> None:
        topic, partition = owned.tp
        for rejected in decoded.rejected:
            record = records[rejected.index]
            headers = dead_letter_headers(rejected, record, topic=topic, partition=partition)
            self._metrics.rejected.inc(1, reason=rejected.reason)
            self._track(owned, self._outputs.dead_letter(partition, record.key, record.value, headers))

    def _track(self, owned: OwnedPartition, sending: Any) -> None:
        """Send in the background; the next checkpoint waits for it, and fails with it."""
        task = asyncio.ensure_future(sending)
        owned.unacknowledged.add(task)

    def _count(self, owned: OwnedPartition, events: int, effects: Effects) -> None:
        metrics = self._metrics
        metrics.events.inc(events)
        if effects.outcomes.any():  # most batches are small, and every outcome in them is APPLIED (0)
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
