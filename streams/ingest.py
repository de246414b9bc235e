"""The ingest loop: a record batch comes in, the pure core decides, and its effects are performed here.

A batch is applied in *parts* of bounded size, so that a large one neither holds the event loop nor needs all its users
in memory at once. A part is applied without an await, so a checkpoint contains either all of it or nothing. Steps that
take time (waiting for room in the encode queue, reading cold users) come before.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from encoder.actions.columns import ActionBatch
from streams.core.effects import Effects
from streams.core.features.partition import PartitionFeatures
from streams.core.layout import StoredFeatures
from streams.core.merge import Outcome
from streams.core.policy import Reason
from streams.encoding.partition_jobs import PartitionJobs
from streams.encoding.queue import EncodeQueue
from streams.engine.dead_letters import weight_of
from streams.engine.delivery import RecordBatch
from streams.engine.outputs import Outputs
from streams.engine.ownership import OwnedPartition
from streams.engine.partitions import Partitions
from streams.storage.features import former_definitions
from streams.storage.reader import read_users
from streams.storage.store import NO_NOTE, PartitionStore, StoreDamaged
from streams.telemetry.metrics import Metrics
from streams.telemetry.times import SkewMeter
from streams.wire.actions import Decoded, DecodeLimits, decode_actions
from streams.wire.dead_letters import dead_letter_headers
from streams.wire.deletions import Placement
from streams.wire.embeddings import Message, encode_tombstone
from streams.wire.placement import misplaced, reject_misplaced

logger = logging.getLogger(__name__)

TIMERS_EVERY_S = 0.05
"""Interval at which deadlines are checked: half of the resolution of the deadline wheel."""
ROOM_EVERY_S = 0.01
"""Interval at which a full queue or a full state is checked for room again."""
PART_RECORDS_MAX = 8_192
"""Records that are applied at a time; a state with fewer hot users takes as many records as it has rows."""
HOLD_AFTER_S = 1.0
"""Time for which all partitions wait for room in the state of one; then that one is held."""
_LATE = int(Outcome.LATE)
"""The last outcome of an event that was applied, as a plain int."""


class InFlightLimits(NamedTuple):
    """Limits of a worker on dead letters and tombstones that are being sent."""

    records: int = 10_000
    size: int = 32 << 20
    """Bytes of keys, values and headers."""


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
        in_flight_max: InFlightLimits | None = None,
    ) -> None:
        self._partitions, self._queue, self._outputs, self._metrics = partitions, queue, outputs, metrics
        self._limits, self._checkpoint_events_max, self._now_ms = limits, checkpoint_events_max, now_ms
        self._in_flight_max = in_flight_max or InFlightLimits()
        self._jobs: dict[OwnedPartition, PartitionJobs] = {}
        self._firing: dict[OwnedPartition, asyncio.Task[None]] = {}
        self._skew = SkewMeter(metrics)

    def add(self, owned: OwnedPartition, jobs: PartitionJobs) -> None:
        """Start processing a partition that has become ready."""
        self._jobs[owned] = jobs

    def remove(self, owned: OwnedPartition) -> None:
        """Stop processing a partition; its users leave the queue and stay due in its state."""
        jobs = self._jobs.pop(owned, None)
        if jobs is not None:
            self._queue.drop(jobs)

    async def on_batch(self, batch: RecordBatch) -> None:
        """Apply a batch if it continues exactly where the last one of its partition ended; ignore it otherwise.

        Its parts are applied one after the other, and each moves the position. What is left when the partition is lost
        or held in between is fetched again.
        """
        owned = await self._partitions.accept(batch)
        if owned is None:
            return
        records = batch.records
        if batch.begin < owned.next_offset:
            records = [record for record in records if record.offset >= owned.next_offset]
        for begin, end in _parts(len(records), min(PART_RECORDS_MAX, owned.state.limits.hot_users_max)):
            if begin:
                await asyncio.sleep(0)
            if not self._continues(owned, batch) or self._holds_back(owned) or not await self._has_room(owned):
                return
            part = records[begin:end]
            if not await self._apply(owned, part, batch.end if end == len(records) else part[-1].offset + 1):
                return
        self._note_damage(owned, batch)

    def _continues(self, owned: OwnedPartition, batch: RecordBatch) -> bool:
        """Return whether the rest of the batch may be applied; others may have acted since the last part."""
        number, partitions = owned.tp.partition, self._partitions
        is_paused = number in partitions.halted or number in partitions.held
        return self._is_mine(owned) and not is_paused and owned.epoch <= batch.epoch

    async def _apply(self, owned: OwnedPartition, records: Sequence[Any], end: int) -> bool:
        """Apply consecutive records, after which the position is `end`; return False if that was not possible."""
        if not records:  # transaction markers and aborted records only
            owned.next_offset = max(end, owned.next_offset)
            return True
        decoded, cold = self._decode(owned, records)
        if not await self._load(owned, decoded.actions.users, cold, may_hold=True):
            return False
        self._count_unmatched(owned, decoded)
        effects = owned.state.apply(decoded.actions, self._now_ms())
        owned.next_offset, owned.last_record = end, records[-1]
        self._reject(owned, records, decoded)
        self._perform(owned, effects)
        self._count(owned, len(records), decoded.actions, effects)
        return True

    def _decode(self, owned: OwnedPartition, records: Sequence[Any]) -> tuple[Decoded, list[bytes]]:
        """Decode the records, and reject those of users that belong to another partition; return also who is cold.

        A user in memory was checked when it came in by an event; `misplaced` holds those that came in by a timer.
        """
        number, count = owned.tp.partition, self._partitions.source_partitions
        placement = Placement(number, count) if count else None
        decoded = decode_actions(records, now_ms=self._now_ms(), limits=self._limits, placement=placement)
        cold = owned.state.missing(decoded.actions.users)
        if placement is None or not self._limits.check_partition:
            return decoded, cold
        wrong = misplaced(cold, number, count)
        if owned.misplaced:
            wrong |= owned.misplaced.intersection(decoded.actions.users)
        if not wrong:
            return decoded, cold
        left = [user for user in cold if user not in wrong]
        return reject_misplaced(decoded, wrong, records, number, count), left

    def _count_unmatched(self, owned: OwnedPartition, decoded: Decoded) -> None:
        """Count deletions of users that have no actions: their key may not be what the producer thinks."""
        batch = decoded.actions
        if batch.is_tombstone.any():
            forgotten = [batch.users[row] for row in batch.is_tombstone.nonzero()[0].tolist()]
            acting = {batch.users[row] for row in (~batch.is_tombstone).nonzero()[0].tolist()}
            unmatched = owned.state.without_actions([user for user in forgotten if user not in acting])
            self._metrics.tombstones_unmatched.inc(unmatched)

    async def run_timers(self) -> None:
        """Fire the timers of all partitions until cancelled; costs nothing while none is due."""
        while True:
            await asyncio.sleep(TIMERS_EVERY_S)
            self._skew.observe()
            now_ms = self._now_ms()
            for owned in list(self._jobs):
                deadline_ms = owned.state.next_deadline_ms
                if owned not in self._firing and deadline_ms is not None and deadline_ms <= now_ms:
                    task = asyncio.create_task(self._fire_or_restart(owned, now_ms), name=f"timers of {owned.tp}")
                    self._firing[owned] = task  # of its own: a partition without room does not delay the others
                    task.add_done_callback(partial(self._note_fired, owned))

    def _note_fired(self, owned: OwnedPartition, done: asyncio.Task[None]) -> None:
        self._firing.pop(owned, None)
        if not done.cancelled() and (failure := done.exception()) is not None:
            logger.error("the timers of %s failed: %r", owned.tp, failure)

    async def _fire_or_restart(self, owned: OwnedPartition, until_ms: int) -> None:
        try:
            await self._fire_timers(owned, until_ms)
        except Exception as error:
            logger.exception("the timers of %s failed", owned.tp)
            await self._partitions.restart(owned.tp.partition, f"its timers failed: {error!r}")

    async def _fire_timers(self, owned: OwnedPartition, until_ms: int) -> None:
        """Fire the timers due by `until_ms`, in portions; those of cold users fire after the users are loaded."""
        while (deadline_ms := owned.state.next_deadline_ms) is not None and deadline_ms <= until_ms:
            effects = owned.state.fire_timers(until_ms)
            self._perform(owned, effects)
            if not await self._load(owned, effects.to_load, effects.to_load):
                return
            if self._limits.check_partition and (count := self._partitions.source_partitions):
                owned.misplaced |= misplaced(effects.to_load, owned.tp.partition, count)
            await asyncio.sleep(0)
            if not self._is_mine(owned):
                return

    async def expire(self, owned: OwnedPartition, users: Sequence[bytes], now_ms: int) -> bool:
        """Forget those of `users` who had no action for the TTL before `now_ms`; return False if the partition is lost.

        The caller makes sure that every event up to that moment is applied.
        """
        if not await self._load(owned, users, owned.state.missing(users)) or not self._is_mine(owned):
            return False
        self._perform(owned, owned.state.expire(users, now_ms, owned.next_offset - 1))
        return True

    def _is_mine(self, owned: OwnedPartition) -> bool:
        return self._partitions.ready.get(owned.tp.partition) is owned

    def _holds_back(self, owned: OwnedPartition) -> bool:
        """Hold a partition of which too many dead letters are in flight; return whether it is held."""
        limits = self._dead_letter_limits()
        if not owned.undelivered.exceeds(*limits):
            return False
        self._partitions.hold(owned, owned.undelivered.wait_below(*limits))
        return True

    def _dead_letter_limits(self) -> tuple[int, int]:
        """Return how many records and bytes a partition may have in flight: its share of the worker's limits."""
        shares = max(1, len(self._partitions.assigned))
        return self._in_flight_max.records // shares, self._in_flight_max.size // shares

    async def _has_room(self, owned: OwnedPartition) -> bool:
        """Wait while the encode queue is full; return whether the partition is still owned afterwards.

        A rebalance waits for the current batch, so it ends the wait: the batch is then applied beyond the limit.
        """
        while not self._queue.has_room and not self._partitions.app.rebalancing:
            await asyncio.sleep(ROOM_EVERY_S)
        return self._is_mine(owned)

    async def _load(
        self, owned: OwnedPartition, users: Sequence[bytes], cold: list[bytes], *, may_hold: bool = False
    ) -> bool:
        """Load `cold`, those of `users` not in memory; return False if the partition was lost in the meantime.

        With `may_hold` a partition that gets no room for them soon is held, and False is returned too.
        """
        state = owned.state
        if not cold:
            return True
        state.evict(len(cold), spare=users)
        hold_at = time.monotonic() + HOLD_AFTER_S
        while state.room < len(cold):
            # Every user in memory is dirty or in the encode queue: write the dirty ones, let the encoder go on.
            if may_hold and time.monotonic() > hold_at:
                self._partitions.hold(owned, self._wait_room(owned, len(cold)))
                return False
            self._partitions.checkpoint_soon(owned)
            await asyncio.sleep(ROOM_EVERY_S)
            if not self._is_mine(owned):
                return False
            cold = state.missing(users)
            state.evict(len(cold), spare=users)
        try:
            read = read_users(owned.store, cold, state.limits, with_features=state.features is not None)
            noted = owned.store.noted(cold) if owned.has_notes else []
        except StoreDamaged as damage:
            logger.error("%s: %s", owned.tp, damage)
            await self._partitions.rebuild(owned)
            return False
        if read.corrupt and not await self._quarantine(owned, read.corrupt):
            return False
        if state.features is not None:
            self._learn(owned.store, state.features, read.features)
        state.load(cold, read.stored, read.features)
        if state.features is not None:
            rebuilt, damaged = state.features.take_counts()
            self._metrics.features_rebuilt.inc(rebuilt)
            self._metrics.features_damaged.inc(damaged)
        if noted:
            rows = [row for row, offset in enumerate(noted) if offset != NO_NOTE]
            state.seed_published([cold[row] for row in rows], np.array([noted[row] for row in rows], np.int64))
        return True

    def _learn(
        self, store: PartitionStore, features: PartitionFeatures, stored: Sequence[StoredFeatures | None]
    ) -> None:
        """Read the definitions of feature sets of before, as far as users of theirs are to be loaded."""
        for version, feature_set in former_definitions(store, features.unknown_versions(stored)).items():
            logger.info("features of feature set %s are taken over or computed again as %s", version, features.version)
            features.learn(version, feature_set)

    async def _wait_room(self, owned: OwnedPartition, users: int) -> None:
        while self._is_mine(owned) and owned.state.room < users:
            self._partitions.checkpoint_soon(owned)
            await asyncio.sleep(ROOM_EVERY_S)
            owned.state.evict(users, spare=())

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
        if jobs is not None:  # otherwise the partition is being given back, and its due users stay due in its state
            self._queue.put(jobs, effects.due, effects.priorities.tolist(), effects.reasons.tolist())
        for reason, fired in enumerate(np.bincount(effects.reasons).tolist()):
            if fired:
                self._metrics.triggers.inc(fired, reason=Reason(reason).label)
        if effects.expired:
            self._metrics.users_expired.inc(len(effects.expired))
            self._queue.forget(effects.expired)
        if effects.forgotten:
            offsets = effects.forgotten_offsets.tolist()
            forgotten, source_id = zip(effects.forgotten, offsets, strict=True), owned.mark.source_id
            tombstones = [encode_tombstone(user, offset, source_id) for user, offset in forgotten]
            for topic in self._outputs.topics:
                sending = self._outputs.publish_tombstones(owned.tp.partition, tombstones, topic)
                owned.undelivered.add(sending, len(tombstones), weight_of(tombstones))
        if effects.refresh and jobs is not None:
            jobs.refresh(effects.refresh)

    def _reject(self, owned: OwnedPartition, records: Sequence[Any], decoded: Decoded) -> None:
        topic, partition = owned.tp
        letters: list[Message] = []
        for rejected in decoded.rejected:
            record = records[rejected.index]
            headers = dead_letter_headers(rejected, record, topic=topic, partition=partition)
            self._metrics.rejected.inc(1, reason=rejected.reason)
            letters.append((record.key, record.value, headers))
        if letters:
            owned.undelivered.add(self._outputs.dead_letters(partition, letters), len(letters), weight_of(letters))

    def _note_damage(self, owned: OwnedPartition, batch: RecordBatch) -> None:
        """Count damaged batches that were skipped, and halt a partition that cannot go on after this batch."""
        for skipped in batch.skipped:
            logger.error("skipped, because kafka.skip_corrupt_batches is set: %s", skipped)
            self._metrics.corrupt_records_skipped.inc(skipped.last - skipped.first + 1)
        if batch.fault is not None:
            self._partitions.halt(owned.tp.partition, str(batch.fault), refused=True)

    def _count(self, owned: OwnedPartition, records: int, batch: ActionBatch, effects: Effects) -> None:
        metrics, arrival_ms, event_ms = self._metrics, batch.arrival_ms, batch.actions["timestamp_ms"]
        metrics.events.inc(records)
        if effects.outcomes.any():  # most batches are small, and every outcome in them is APPLIED (0)
            is_applied = effects.outcomes <= _LATE
            arrival_ms, event_ms = arrival_ms[is_applied], event_ms[is_applied]
            for outcome, counter in (
                (Outcome.DUPLICATE, metrics.duplicates),
                (Outcome.LATE, metrics.late_inserted),
                (Outcome.TOO_OLD, metrics.late_dropped),
                (Outcome.FORGOTTEN, metrics.forgotten_dropped),
                (Outcome.TOMBSTONE, metrics.tombstones),
            ):
                counter.inc(effects.count(outcome))
        self._skew.add(arrival_ms, event_ms)
        if owned.next_offset - owned.committed_offset >= self._checkpoint_events_max:
            self._partitions.checkpoint_soon(owned)


def _parts(records: int, part_max: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each part of at most `part_max` records; a batch without records is one empty part."""
    for begin in range(0, max(records, 1), part_max):
        yield begin, min(begin + part_max, records)
