"""The source partitions that this worker owns: acquired, read without a gap, checkpointed and given back.

After an assignment a task of its own acquires each partition, with its source partition paused:

1. *fence*: starting the partition's transactional producer locks every predecessor out at the broker;
2. *restore*: the local database is brought to the changelog's end offset, read after fencing; a database that does not
   match the log is rebuilt;
3. *prove*: the restored checkpoint mark holds the logs and the source offset that it belongs to. If they are not those
   at hand, or the restore is incomplete, nothing is processed (see `streams.engine.proof`);
4. *catch up on outputs*: outputs after the mark were published before, and are not published again;
5. *resume*: seek to the mark's offset and resume the partition.

A partition is checkpointed (see `streams.engine.checkpoints`) before it is given back. One that cannot go on while
others can is *halted*: it is paused, reported, and tried again where that can help.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Coroutine
from pathlib import Path
from typing import Any

from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition
from faust.types import TP

from streams.core.partition_state import PartitionState
from streams.engine.acquisition import ProvenPartitions
from streams.engine.changelog import ChangelogProducer, Fenced, LogReader
from streams.engine.delivery import RecordBatch
from streams.engine.ownership import Continuity, OwnedPartition
from streams.engine.partition_host import PartitionHost, PartitionsConfig
from streams.engine.proof import Proven
from streams.engine.published import Noted, note_published
from streams.engine.restore import restore
from streams.errors import HaltsPartition, LosesPartition, RebuildsPartition, StopsWorker
from streams.storage.codec import CheckpointMark
from streams.storage.identity import Identity
from streams.storage.store import PartitionStore
from streams.telemetry.metrics import Metrics
from streams.telemetry.watchdog import Progress

logger = logging.getLogger(__name__)

MEMBER_S = 3.0
"""Time that the group may take to answer whether this worker is a member."""
END_S = 10.0
"""Time that the broker may take to report the end of a log."""
RESTORE_STALL_S = 15.0
"""Time without a record after which a restore is given up and tried again, because its partition may have no leader."""


class Partitions(ProvenPartitions):
    """Acquires, checkpoints and gives back the partitions of this worker; a service that Faust runs."""

    def __init__(self, config: PartitionsConfig, host: PartitionHost, metrics: Metrics, **kwargs: Any) -> None:
        super().__init__(config, host, metrics, **kwargs)
        self._restores = asyncio.Semaphore(config.restores_max)
        self._acquiring: dict[int, asyncio.Task[None]] = {}
        self.assigned: frozenset[int] = frozenset()
        """Numbers of the assigned partitions: ready, halted or still being acquired."""
        self.has_joined = False
        """Whether this worker has an assignment, which may be empty: there can be more workers than partitions."""

    @property
    def source_partitions(self) -> int:
        """Number of partitions of the source topic; 0 if the placement of users is not checked."""
        return self._config.source_partitions

    def may_use(self, number: int) -> bool:
        """Return whether the local database of a partition is open here, or may be opened at any moment."""
        return number in self.assigned or number in self.ready or number in self._acquiring

    # -- halting

    def halt(self, number: int, reason: str, *, refused: bool = False) -> None:
        """Stop processing one partition that cannot go on while others can, and report why.

        The partition is paused: nothing at or after the fault is processed or committed. `resume` or the next
        assignment ends that. `refused` means that only an operator can help; see `Halts`.
        """
        if self.halted.begin(number, reason, refused=refused):
            logger.error("partition %d is halted, and the others go on: %s", number, reason)
            self._metrics.halts.inc()
        if (owned := self.ready.get(number)) is not None:
            self.app.consumer.pause_partitions({owned.tp})

    async def resume(self, number: int) -> None:
        """Continue a halted partition at its first record that was not processed."""
        owned = self.ready.get(number)
        if self.halted.end(number) and owned is not None:
            await self._seek(owned)
            self.app.consumer.resume_partitions({owned.tp})

    async def restart(self, number: int, reason: str) -> None:
        """Halt a partition whose state in memory cannot be used any more; acquire it again from its last checkpoint."""
        owned, generation = self.ready.get(number), self.app.consumer_generation_id
        if owned is None:
            return
        self.halt(number, reason)
        self._host.on_lost(owned)
        await self._close([owned])
        self._start_acquiring(number, generation, delay_s=self.halted.next_retry_s(number))

    def reacquire(self, number: int) -> None:
        """Acquire an assigned partition that is not in memory, under the present assignment."""
        self._start_acquiring(number, self.app.consumer_generation_id, delay_s=self.halted.next_retry_s(number))

    def hold(self, owned: OwnedPartition, until: Coroutine[Any, Any, None]) -> None:
        """Pause a partition until `until` returns, as backpressure; what arrives before that is fetched again."""
        number = owned.tp.partition
        self._metrics.holds.inc()
        self.app.consumer.pause_partitions({owned.tp})
        self.held[number] = asyncio.create_task(self._continue_after(owned, until), name=f"hold-{number}")

    async def _continue_after(self, owned: OwnedPartition, until: Coroutine[Any, Any, None]) -> None:
        await until
        number = owned.tp.partition
        self.held.pop(number, None)
        if self.ready.get(number) is owned and number not in self.halted:
            await self._seek(owned)
            self.app.consumer.resume_partitions({owned.tp})

    # -- acquiring

    async def on_assigned(self, changelogs: frozenset[TP], generation: int) -> None:
        """Start to acquire the partitions of a new assignment; return at once."""
        self.assigned = frozenset(tp.partition for tp in changelogs)
        self.has_joined = True
        self._fenced_at.clear()
        self.halted.clear()
        for number in sorted(self.assigned):
            self._start_acquiring(number, generation)

    def _start_acquiring(self, number: int, generation: int, *, rebuilt: bool = False, delay_s: float = 0.0) -> None:
        if not self._is_assigned(number, generation):
            return
        acquiring = self._acquire_until_ready(number, generation, rebuilt=rebuilt, delay_s=delay_s)
        task = asyncio.create_task(acquiring, name=f"acquire-{number}")
        self._acquiring[number] = task
        task.add_done_callback(lambda done: self._note_acquired(number, done))

    def _note_acquired(self, number: int, done: asyncio.Task[None]) -> None:
        if self._acquiring.get(number) is done:
            del self._acquiring[number]

    async def rebuild(self, owned: OwnedPartition) -> None:
        """Delete the partition's damaged local database, and acquire the partition again from the changelog."""
        number, generation = owned.tp.partition, self.app.consumer_generation_id
        self.app.consumer.pause_partitions({owned.tp})
        await self._host.on_revoking([owned])
        await self.checkpoint(owned)
        if self.ready.get(number) is not owned:
            return  # lost or revoked in the meantime: it belongs to another worker, which must not be fenced
        await self._close([owned])
        self._host.destroy_store(self._path(number))
        self._start_acquiring(number, generation, rebuilt=True)

    def _path(self, number: int) -> Path:
        return self._config.data_dir / f"{self._config.changelog_topic}-{number}"

    def _is_assigned(self, number: int, generation: int) -> bool:
        """Return whether the partition still belongs to this worker under the assignment of `generation`."""
        return number in self.assigned and bool(self.app.consumer_generation_id == generation)

    async def _is_member(self) -> bool:
        """Ask the group whether this worker is still a member: a worker that is not would fence the rightful owner."""
        thread = self.app.consumer._thread
        try:
            async with asyncio.timeout(MEMBER_S):
                return bool(await thread.call_thread(thread._ensure_consumer()._coordinator._do_heartbeat))
        except (KafkaError, TimeoutError):
            return False

    async def _acquire_until_ready(
        self, number: int, generation: int, *, rebuilt: bool = False, delay_s: float = 0.0
    ) -> None:
        """Acquire the partition; while that fails it is halted, and tried again after growing delays."""
        is_first = not delay_s and not rebuilt
        while True:
            await asyncio.sleep(delay_s)
            may_fence = is_first or await self._is_member()
            if may_fence and await self._acquire_or_halt(number, generation, rebuilt=rebuilt):
                return
            is_first, delay_s = False, self.halted.next_retry_s(number)

    async def _acquire_or_halt(self, number: int, generation: int, *, rebuilt: bool) -> bool:
        """Try once to acquire the partition; return False if it is to be tried again."""
        try:
            await self._acquire_or_rebuild(number, generation, rebuilt=rebuilt)
        except LosesPartition:
            logger.warning("partition %d was taken over by another worker while it was being acquired", number)
        except StopsWorker as error:
            self._host.abort(f"partition {number} cannot be acquired: {error}")
        except HaltsPartition as error:
            self.halt(number, f"it cannot be acquired: {error}", refused=not error.retriable)
            if not self.halted.refuse_all(self.assigned):
                return False
            self._host.abort(f"partition {number} cannot be acquired: {error}")
        except Exception as error:
            if number not in self.halted:
                logger.exception("partition %d cannot be acquired", number)
            self.halt(number, f"it cannot be acquired: {error!r}")
            return False
        return True

    async def _acquire_or_rebuild(self, number: int, generation: int, *, rebuilt: bool) -> None:
        try:
            await self._acquire(number, generation, rebuilt=rebuilt)
        except RebuildsPartition as damage:
            logger.warning(
                "the local state of partition %d is deleted and rebuilt from the changelog: %s", number, damage
            )
            self._metrics.stores_rebuilt.inc()
            self._host.destroy_store(self._path(number))
            await self._acquire(number, generation, rebuilt=True)

    async def _acquire(self, number: int, generation: int, *, rebuilt: bool) -> None:
        started = time.monotonic()
        source = TP(self._config.source_topic, number)
        producer = self._new_producer(number)
        store = None
        try:
            if not self._is_assigned(number, generation):  # a late start would fence the rightful owner
                raise Fenced(f"partition {number}: the assignment has changed")
            await producer.start()
            identity = await self._identity()
            committed = await self._committed(source)
            async with self._restores:
                store = await self._restore(number, identity)
            proven = await self._prove(source, store, identity, committed)
            owned = await self._owned(source, store, producer, proven)
            owned.rebuilt = rebuilt
            if not self._is_assigned(number, generation):
                raise Fenced(f"partition {number}: the assignment has changed")
            await self._resume(owned)
        except BaseException:
            await self._release(store, producer)
            raise
        seconds = time.monotonic() - started
        self._metrics.restore_seconds.observe(seconds)
        logger.info("partition %d is ready at offset %d after %.2f s", number, owned.next_offset, seconds)

    async def _restore(self, number: int, identity: Identity) -> PartitionStore:
        """Restore the local database; raise `TimeoutError` when nothing arrives, so that other restores can begin."""
        changelog = TopicPartition(self._config.changelog_topic, number)
        async with asyncio.timeout(RESTORE_STALL_S) as limit:

            def on_progress(records: int, remaining: int) -> None:
                self._metrics.restored_records.inc(records)
                self._metrics.restore_remaining.set(remaining, partition=number)
                limit.reschedule(asyncio.get_running_loop().time() + RESTORE_STALL_S)

            return await restore(
                self._path(number),
                self._host.open_store,
                changelog,
                self._config.client,
                on_progress=on_progress,
                log_id=identity.log_id,
                clients=self._config.clients,
            )

    async def _owned(
        self, source: TP, store: PartitionStore, producer: ChangelogProducer, proven: Proven
    ) -> OwnedPartition:
        state, mark = self._host.new_state(), proven.mark
        noted = await self._note_published(state, store, mark, source.partition)
        state.seed_deadlines(store.pending())
        start = mark.source_offset
        owned = OwnedPartition(source, state, store, producer, start, start - proven.expired, noted.end, mark)
        owned.mark_is_outdated, owned.notes_until = proven.must_write, noted.until
        owned.features_offset, owned.replayed_at = noted.features_end, noted.replayed_at
        return owned

    async def _note_published(
        self, state: PartitionState, store: PartitionStore, mark: CheckpointMark, number: int
    ) -> Noted:
        """Note what is published beyond the mark; raise `TimeoutError` when nothing arrives, as `_restore` does."""
        async with self._restores, asyncio.timeout(RESTORE_STALL_S) as limit:

            def on_page(notes: int) -> None:
                self._metrics.outputs_noted.inc(notes)
                limit.reschedule(asyncio.get_running_loop().time() + RESTORE_STALL_S)

            embeddings, features = self._host.published_since(number, mark)
            return await note_published(embeddings, features, state, store, mark, on_page)

    async def _resume(self, owned: OwnedPartition) -> None:
        await self.app.consumer.seek_wait({owned.tp: owned.next_offset})
        owned.epoch = self.app.consumer._thread.epoch(owned.tp)
        self.ready[owned.tp.partition] = owned
        self.halted.end(owned.tp.partition)
        self._host.on_ready(owned)
        self.app.consumer.resume_partitions({owned.tp})

    # -- reading without a gap

    async def accept(self, batch: RecordBatch) -> OwnedPartition | None:
        """Return the partition that `batch` continues; None if the batch is stale, or after a seek because of a gap."""
        owned = self.ready.get(batch.tp.partition)
        if batch.tp.partition in self.halted or batch.tp.partition in self.held:
            return None
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
        self.report_expired(owned.tp.partition, batch.begin - owned.next_offset, owned.next_offset)
        return True

    async def continue_at(self, owned: OwnedPartition, offset: int) -> None:
        """Continue at another offset of the log, because those before it no longer exist."""
        owned.next_offset = offset
        await self._seek(owned)

    async def _seek(self, owned: OwnedPartition) -> None:
        logger.warning("partition %d is fetched again from offset %d", owned.tp.partition, owned.next_offset)
        owned.epoch = self.app.consumer._thread.epoch(owned.tp) + 1
        await self.app.consumer.seek_wait({owned.tp: owned.next_offset})

    def ends(self, owned: OwnedPartition) -> tuple[int, int]:
        """Return the last stable offset and the high watermark of the source partition, as far as they are known.

        Nothing from the last stable offset on can be read yet, so lag and progress are measured against it.
        """
        end, high = self.app.consumer._thread.end(owned.tp)
        end = max(end, owned.next_offset)
        return end, max(high, end)

    async def read_end(self, owned: OwnedPartition) -> int:
        """Return the last stable offset of the source partition as the broker has it now; raise `KafkaError`.

        What is known from the last fetch may be old: a partition may be paused, and a fetch may be under way.
        """
        reader = LogReader(TopicPartition(*owned.tp), self._config.client, self._config.clients)
        try:
            async with asyncio.timeout(END_S):
                await reader.open()
                return reader.end
        finally:
            await reader.close()

    def progress(self) -> dict[str, Progress]:
        """Return the positions of fetching, processing and checkpoints of each ready partition, for the watchdog."""
        thread, progress = self.app.consumer._thread, {}
        for number, owned in self.ready.items():
            if number in self.halted:
                continue  # it is reported as halted, and ending the worker would stop the others too
            if number not in self.held:
                fetched, delivered = thread.positions(owned.tp)
                end, _ = thread.end(owned.tp)
                progress[f"fetching of partition {number}"] = Progress(fetched, end)
                progress[f"processing of partition {number}"] = Progress(owned.next_offset, delivered)
            if not owned.undelivered.sending and owned.failing_since is None:  # else the reason is known and reported
                progress[f"checkpoints of partition {number}"] = Progress(owned.committed_offset, owned.next_offset)
        return progress

    # -- giving back

    async def revoke_all(self) -> None:
        """Checkpoint and close every partition, when partitions are revoked and at shutdown."""
        self.assigned, self.has_joined = frozenset(), False
        for task in list(self._acquiring.values()):
            task.cancel()
        await asyncio.gather(*self._acquiring.values(), return_exceptions=True)
        owned = list(self.ready.values())
        await self._host.on_revoking(owned)
        await self._last_checkpoints(owned)
        await self._close(owned)
        self.halted.clear()

    async def _last_checkpoints(self, owned: Collection[OwnedPartition]) -> None:
        """Checkpoint partitions within half a session; the next owner reads the events of those left over again."""
        tasks = {asyncio.create_task(self.checkpoint(each)) for each in owned}
        if not tasks:
            return
        done, left = await asyncio.wait(tasks, timeout=self._config.session_timeout_ms / 2_000)
        for task in left:
            task.cancel()
        if left:
            logger.warning("the last checkpoints of %d partitions were given up: they took too long", len(left))
            await asyncio.wait(left)
        for task in done:
            task.result()
