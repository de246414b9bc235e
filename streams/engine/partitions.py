"""The source partitions that this worker owns: acquired, read without a gap, checkpointed and given back.

After an assignment a task of its own acquires each partition, with its source partition paused:

1. *fence*: starting the partition's transactional producer locks every predecessor out at the broker;
2. *restore*: the local database is brought to the changelog's end offset, read after fencing; a database that does not
   match the log is rebuilt;
3. *prove*: the restored checkpoint mark holds the source offset it belongs to. If that is below the committed offset,
   the restore is incomplete, and the worker stops instead of processing on it;
4. *catch up on outputs*: outputs after the mark were published before, and are not published again;
5. *resume*: seek to the mark's offset and resume the partition.

A partition is checkpointed before it is given back. A partition that another worker has fenced is dropped at once,
without a write.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition
from faust.types import TP
from mode import Service

from streams.core.partition_state import PartitionState
from streams.engine.changelog import ChangelogNames, ChangelogProducer, Fenced
from streams.engine.delivery import RecordBatch
from streams.engine.outputs import Published
from streams.engine.ownership import Continuity, OwnedPartition, PendingOutputs
from streams.engine.restore import IncompleteRestore, restore
from streams.errors import LosesPartition, RebuildsPartition, StopsWorker
from streams.storage.checkpoint import CheckpointMark, checkpoint
from streams.storage.store import PartitionStore
from streams.telemetry.metrics import Metrics
from streams.telemetry.watchdog import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PartitionsConfig:
    """Names, connection and limits for acquiring and checkpointing partitions."""

    app_id: str
    source_topic: str
    changelog_topic: str
    client: Mapping[str, Any]
    """Connection options of aiokafka: servers and security."""
    data_dir: Path
    checkpoint_interval_ms: int
    transaction_timeout_ms: int
    session_timeout_ms: int
    restores_max: int = 2
    """Maximum number of partitions restored at the same time."""


class PartitionHost(Protocol):
    """The worker as its partitions see it: it provides their parts, and they report events to it."""

    def new_state(self) -> PartitionState:
        """Return an empty state."""
        ...

    def open_store(self, path: Path) -> PartitionStore:
        """Open or create the local database at `path`."""
        ...

    async def published_since(self, partition: int, offset: int) -> Published:
        """Return what this encoder version has published from output offset `offset` on."""
        ...

    def on_ready(self, owned: OwnedPartition) -> None:
        """Begin to process a partition."""
        ...

    async def on_revoking(self, owned: Collection[OwnedPartition]) -> None:
        """Stop taking work for these partitions, and let work in flight finish within bounded time."""
        ...

    def on_lost(self, owned: OwnedPartition) -> None:
        """Stop taking work for a partition that already has a new owner."""
        ...

    def abort(self, reason: str) -> None:
        """End the process at once, because continuing would risk an event."""
        ...


class Partitions(Service):
    """Acquires, checkpoints and gives back the partitions of this worker; a service that Faust runs."""

    app: Any
    """The Faust app, set before the service starts."""

    def __init__(self, config: PartitionsConfig, host: PartitionHost, metrics: Metrics, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._config, self._host, self._metrics = config, host, metrics
        self._restores = asyncio.Semaphore(config.restores_max)
        self._acquiring: dict[int, asyncio.Task[None]] = {}
        self._fenced_at: dict[int, float] = {}
        self.ready: dict[int, OwnedPartition] = {}
        """Partitions that are being processed, by number."""
        self.assigned: frozenset[int] = frozenset()
        """Numbers of the assigned partitions, ready or still being acquired."""

    # -- acquiring

    async def on_assigned(self, changelogs: frozenset[TP], generation: int) -> None:
        """Start to acquire the partitions of a new assignment; return at once."""
        self.assigned = frozenset(tp.partition for tp in changelogs)
        self._fenced_at.clear()
        for number in sorted(self.assigned):
            self._start_acquiring(number, generation)

    def _start_acquiring(self, number: int, generation: int, *, rebuilt: bool = False) -> None:
        acquiring = self._acquire_or_abort(number, generation, rebuilt=rebuilt)
        task = asyncio.create_task(acquiring, name=f"acquire-{number}")
        self._acquiring[number] = task
        task.add_done_callback(lambda _: self._acquiring.pop(number, None))

    async def rebuild(self, owned: OwnedPartition) -> None:
        """Delete the partition's damaged local database, and acquire the partition again from the changelog."""
        number = owned.tp.partition
        self.app.consumer.pause_partitions({owned.tp})
        await self._host.on_revoking([owned])
        await self.checkpoint(owned)
        await self._close([owned])
        PartitionStore.destroy(self._path(number))
        self._start_acquiring(number, self.app.consumer_generation_id, rebuilt=True)

    def _path(self, number: int) -> Path:
        return self._config.data_dir / f"{self._config.changelog_topic}-{number}"

    async def _acquire_or_abort(self, number: int, generation: int, *, rebuilt: bool = False) -> None:
        try:
            await self._acquire_or_rebuild(number, generation, rebuilt=rebuilt)
        except LosesPartition:
            logger.warning("partition %d was taken over by another worker while it was being acquired", number)
        except StopsWorker as error:
            self._host.abort(f"partition {number} cannot be acquired: {error}")
        except Exception as error:
            logger.exception("partition %d cannot be acquired", number)
            self._host.abort(f"partition {number} cannot be acquired: {error!r}")

    async def _acquire_or_rebuild(self, number: int, generation: int, *, rebuilt: bool) -> None:
        try:
            await self._acquire(number, generation, rebuilt=rebuilt)
        except RebuildsPartition as damage:
            logger.warning(
                "the local state of partition %d is deleted and rebuilt from the changelog: %s", number, damage
            )
            PartitionStore.destroy(self._path(number))
            await self._acquire(number, generation, rebuilt=True)

    async def _acquire(self, number: int, generation: int, *, rebuilt: bool) -> None:
        started = time.monotonic()
        source = TP(self._config.source_topic, number)
        producer = self._new_producer(number)
        store = None
        try:
            await producer.start()
            committed = await self._committed(source)
            async with self._restores:
                store = await self._restore(number)
            owned = await self._owned(source, store, producer, self._prove(number, store, committed))
            owned.rebuilt = rebuilt
            if self.app.consumer_generation_id != generation:
                raise Fenced(f"partition {number}: the assignment has changed")
            await self._resume(owned)
        except BaseException:
            if store is not None:
                store.close()
            await producer.stop()
            raise
        seconds = time.monotonic() - started
        self._metrics.restore_seconds.observe(seconds)
        logger.info("partition %d is ready at offset %d after %.2f s", number, owned.next_offset, seconds)

    def _new_producer(self, number: int) -> ChangelogProducer:
        config = self._config
        names = ChangelogNames(
            group_id=config.app_id,
            source=TopicPartition(config.source_topic, number),
            changelog=TopicPartition(config.changelog_topic, number),
        )
        return ChangelogProducer(names, config.client, transaction_timeout_ms=config.transaction_timeout_ms)

    async def _committed(self, source: TP) -> int | None:
        """Return the committed offset. It is read after fencing, so no predecessor can still advance it."""
        thread = self.app.consumer._thread
        committed: int | None = await thread.call_thread(thread._ensure_consumer().committed, source)
        return committed

    async def _restore(self, number: int) -> PartitionStore:
        def on_progress(records: int, remaining: int) -> None:
            self._metrics.restored_records.inc(records)
            self._metrics.restore_remaining.set(remaining, partition=number)

        changelog = TopicPartition(self._config.changelog_topic, number)
        return await restore(
            self._path(number), self._host.open_store, changelog, self._config.client, on_progress=on_progress
        )

    def _prove(self, number: int, store: PartitionStore, committed: int | None) -> CheckpointMark | None:
        """Return the restored mark, after a check that the restore is complete.

        Mark and committed offset were written in one transaction, so a mark below the offset proves lost records.
        """
        mark = store.mark()
        if committed is not None and (mark is None or mark.source_offset < committed):
            at = "empty" if mark is None else f"of offset {mark.source_offset}"
            raise IncompleteRestore(
                f"the restored state is {at}, but offset {committed} is committed: the changelog "
                f"{self._config.changelog_topic} has lost records; set a new app_id to rebuild from the source topic"
            )
        return mark

    async def _owned(
        self, source: TP, store: PartitionStore, producer: ChangelogProducer, mark: CheckpointMark | None
    ) -> OwnedPartition:
        state = self._host.new_state()
        published = await self._host.published_since(source.partition, mark.output_offset if mark else 0)
        state.seed_published(published.users, published.source_offsets)
        state.seed_deadlines(store.pending())
        earliest = (await self.app.consumer.earliest_offsets(source))[source]
        start = earliest if mark is None else mark.source_offset
        return OwnedPartition(source, state, store, producer, start, start, published.end)

    async def _resume(self, owned: OwnedPartition) -> None:
        await self.app.consumer.seek_wait({owned.tp: owned.next_offset})
        owned.epoch = self.app.consumer._thread.epoch(owned.tp)
        self.ready[owned.tp.partition] = owned
        self._host.on_ready(owned)
        self.app.consumer.resume_partitions({owned.tp})

    # -- reading without a gap

    async def accept(self, batch: RecordBatch) -> OwnedPartition | None:
        """Return the partition that `batch` continues; None if the batch is stale, or after a seek because of a gap."""
        owned = self.ready.get(batch.tp.partition)
        if owned is None or (continuity := owned.continuity(batch)) is Continuity.STALE:
            return None
        if continuity is Continuity.GAP and not await self._expired(owned, batch):
            self._metrics.position_gaps.inc()
            await self._seek(owned)
            return None
        return owned

    async def _expired(self, owned: OwnedPartition, batch: RecordBatch) -> bool:
        """Return whether the missing records no longer exist because the topic's retention has deleted them."""
        earliest = (await self.app.consumer.earliest_offsets(owned.tp))[owned.tp]
        if earliest < batch.begin:
            return False
        lost = batch.begin - owned.next_offset
        logger.error(
            "%d events of %s were deleted by retention before they were read; raise retention.ms of the topic",
            lost,
            owned.tp,
        )
        self._metrics.events_expired.inc(lost)
        return True

    async def _seek(self, owned: OwnedPartition) -> None:
        logger.warning("records of %s were not delivered; seeking back to offset %d", owned.tp, owned.next_offset)
        owned.epoch = self.app.consumer._thread.epoch(owned.tp) + 1
        await self.app.consumer.seek_wait({owned.tp: owned.next_offset})

    def progress(self) -> dict[str, Progress]:
        """Return the positions of fetching, processing and checkpoints of each ready partition, for the watchdog."""
        thread, progress = self.app.consumer._thread, {}
        for number, owned in self.ready.items():
            fetched, delivered = thread.positions(owned.tp)
            end = self.app.consumer.highwater(owned.tp) or 0
            progress[f"fetching of partition {number}"] = Progress(fetched, end)
            progress[f"processing of partition {number}"] = Progress(owned.next_offset, delivered)
            progress[f"checkpoints of partition {number}"] = Progress(owned.committed_offset, owned.next_offset)
        return progress

    # -- checkpoints

    @Service.task
    async def _checkpoints(self) -> None:
        interval_s = self._config.checkpoint_interval_ms / 1000
        async for _ in self.itertimer(interval_s, name="checkpoint"):
            self._check_fenced()
            await asyncio.gather(*(self.checkpoint(owned) for owned in list(self.ready.values())))

    def checkpoint_soon(self, owned: OwnedPartition) -> None:
        """Start a checkpoint without waiting for it, unless one is running."""
        if not owned.checkpointing.locked():
            self.add_future(self.checkpoint(owned))

    async def checkpoint(self, owned: OwnedPartition) -> None:
        """Make the partition's state and position durable; drop the partition if another worker has fenced it."""
        async with owned.checkpointing:
            if self.ready.get(owned.tp.partition) is not owned:
                return
            try:
                if owned.producer_failed:
                    await self._renew_producer(owned)
                await self._write_checkpoint(owned)
            except LosesPartition:
                await self._drop_fenced(owned)
            except (KafkaError, OSError) as error:
                owned.producer_failed = True
                self._metrics.checkpoint_failures.inc()
                logger.warning("checkpoint of %s failed and will be repeated: %r", owned.tp, error)

    async def _write_checkpoint(self, owned: OwnedPartition) -> None:
        if not owned.state.is_dirty and owned.next_offset == owned.committed_offset:
            return
        started, written_before = time.monotonic(), owned.producer.bytes_written
        mark = CheckpointMark(owned.next_offset, owned.output_offset)
        try:
            records = await checkpoint(owned.state, mark, PendingOutputs(owned), owned.producer, owned.store)
        except StopsWorker as error:
            self._host.abort(f"checkpoint of {owned.tp} cannot be completed: {error}")
        owned.committed_offset = mark.source_offset
        self._metrics.checkpoint_seconds.observe(time.monotonic() - started)
        self._metrics.changelog_records.inc(records)
        self._metrics.changelog_bytes.inc(owned.producer.bytes_written - written_before)
        self._metrics.committed_offset.set(mark.source_offset, partition=owned.tp.partition)

    async def _renew_producer(self, owned: OwnedPartition) -> None:
        """Replace the producer after a failure; starting the new one ends the open transaction."""
        await owned.producer.stop()
        owned.producer = self._new_producer(owned.tp.partition)
        await owned.producer.start()
        owned.producer_failed = False

    async def _drop_fenced(self, owned: OwnedPartition) -> None:
        logger.warning("partition %d has a new owner; it is dropped without a write", owned.tp.partition)
        self._metrics.fenced.inc()
        self._fenced_at[owned.tp.partition] = time.monotonic()
        self._host.on_lost(owned)
        await self._close([owned])

    def _check_fenced(self) -> None:
        """Abort a worker that was fenced and sees no rebalance: it is cut off from its group; only a restart helps."""
        bound_s = self._config.session_timeout_ms / 1000 + 3
        for number, at in self._fenced_at.items():
            if time.monotonic() - at > bound_s:
                self._host.abort(f"partition {number} was fenced {bound_s:.0f} s ago and no rebalance has followed")

    # -- giving back

    async def revoke_all(self) -> None:
        """Checkpoint and close every partition, when partitions are revoked and at shutdown."""
        for task in list(self._acquiring.values()):
            task.cancel()
        await asyncio.gather(*self._acquiring.values(), return_exceptions=True)
        owned = list(self.ready.values())
        await self._host.on_revoking(owned)
        await asyncio.gather(*(self.checkpoint(each) for each in owned))
        await self._close(owned)
        self.assigned = frozenset()

    async def _close(self, owned: Collection[OwnedPartition]) -> None:
        for each in owned:
            if self.ready.get(each.tp.partition) is each:
                del self.ready[each.tp.partition]
                each.store.close()
                await each.producer.stop()
