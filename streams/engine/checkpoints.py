"""Checkpoints of the partitions of a worker: when they are written, and what follows when one fails.

A partition that another worker has fenced is dropped without a write. One whose local database cannot be written is
halted and acquired again. Anything else that fails is repeated with a new producer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from typing import Any

from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from aiokafka.structs import TopicPartition
from mode import Service

from streams.engine.changelog import ChangelogNames, ChangelogProducer
from streams.engine.halts import Halts
from streams.engine.ownership import NotAcknowledged, OwnedPartition, PendingOutputs
from streams.engine.partition_host import PartitionHost, PartitionsConfig
from streams.errors import HaltsPartition, LosesPartition, StopsWorker
from streams.storage.checkpoint import checkpoint
from streams.storage.store import PartitionStore
from streams.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

REACQUIRE_AFTER_S = 1.0
"""Time that a rebalance has to show that a fenced partition is another worker's."""


class CheckpointedPartitions(Service):
    """The partitions whose state is in memory, with their checkpoints; `Partitions` acquires and revokes them."""

    def __init__(self, config: PartitionsConfig, host: PartitionHost, metrics: Metrics, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._config, self._host, self._metrics = config, host, metrics
        self._fenced_at: dict[int, float] = {}
        self.ready: dict[int, OwnedPartition] = {}
        """Partitions whose state is in memory, by number; a halted one may be among them."""
        self.held: dict[int, asyncio.Task[None]] = {}
        """Partitions that are paused for a while as backpressure, by number."""
        self.halted = Halts()
        """Reason of each partition that cannot go on while others can, by number."""

    async def _is_member(self) -> bool:
        """Return whether the group still counts this worker as a member."""
        raise NotImplementedError

    def reacquire(self, number: int) -> None:
        """Acquire an assigned partition that is not in memory."""
        raise NotImplementedError

    async def restart(self, number: int, reason: str) -> None:
        """Halt a partition whose state in memory cannot be used any more; acquire it again from its last checkpoint."""
        raise NotImplementedError

    @Service.task
    async def _checkpoints(self) -> None:
        interval_s = self._config.checkpoint_interval_ms / 1000
        async for _ in self.itertimer(interval_s, name="checkpoint"):
            await self._check_fenced()
            for owned in list(self.ready.values()):
                self.checkpoint_soon(owned)  # by itself: one that cannot be written does not delay the others

    def checkpoint_soon(self, owned: OwnedPartition) -> None:
        """Start a checkpoint without waiting for it, unless one is running."""
        if not owned.checkpointing.locked():
            self.add_future(self.checkpoint(owned))

    async def checkpoint(self, owned: OwnedPartition) -> None:
        """Make the partition's state and position durable.

        A partition that another worker has fenced is dropped; one whose local database fails is acquired again.
        """
        async with owned.checkpointing:
            if self.ready.get(owned.tp.partition) is not owned:
                return
            try:
                must_renew = owned.producer_failed or owned.producer.is_worn
                if must_renew and not await self._renew_producer(owned):
                    return
                await self._write_checkpoint(owned)
            except LosesPartition:
                await self._drop_fenced(owned)
            except NotAcknowledged as waiting:
                self._metrics.checkpoints_put_off.inc()
                logger.warning("the checkpoint of %s is put off: %s", owned.tp, waiting)
            except HaltsPartition as error:
                await self.restart(owned.tp.partition, f"its checkpoint cannot be completed: {error}")
            except (KafkaError, OSError) as error:
                owned.producer_failed = True
                owned.failing_since = owned.failing_since or time.monotonic()
                if isinstance(error, MessageSizeTooLargeError):
                    await self._config.limits.refresh()
                self._metrics.checkpoint_failures.inc()
                logger.warning("checkpoint of %s failed and will be repeated: %r", owned.tp, error)

    async def _write_checkpoint(self, owned: OwnedPartition) -> None:
        is_current = owned.next_offset == owned.committed_offset and not owned.mark_is_outdated
        if is_current and not owned.state.is_dirty:
            return
        started, written_before = time.monotonic(), owned.producer.bytes_written
        mark = owned.next_mark()
        try:
            records = await checkpoint(owned.state, mark, PendingOutputs(owned), owned.producer, owned.store)
        except StopsWorker as error:
            self._host.abort(f"checkpoint of {owned.tp} cannot be completed: {error}")
        if mark.source_offset > owned.committed_offset:
            self.halted.note_progress(owned.tp.partition)
        owned.committed_offset, owned.failing_since = mark.source_offset, None
        owned.mark_is_outdated = False
        if owned.notes_until and not owned.has_notes:
            owned.store.drop_notes()
            owned.notes_until = 0
        self._metrics.checkpoint_seconds.observe(time.monotonic() - started)
        self._metrics.changelog_records.inc(records)
        self._metrics.changelog_bytes.inc(owned.producer.bytes_written - written_before)
        self._metrics.committed_offset.set(mark.source_offset, partition=owned.tp.partition)

    async def _renew_producer(self, owned: OwnedPartition) -> bool:
        """Replace the producer after a failure; starting the new one ends the open transaction.

        Return False if the partition may have a new owner, which a new producer would fence. The group is asked after
        the stop, which takes seconds where the broker does not answer.
        """
        owned.producer_failed = True
        await owned.producer.stop()
        if not await self._is_member():
            return False
        owned.producer = self._new_producer(owned.tp.partition)
        await owned.producer.start()
        owned.producer_failed = False
        return True

    async def _drop_fenced(self, owned: OwnedPartition) -> None:
        logger.warning("partition %d has a new owner; it is dropped without a write", owned.tp.partition)
        self._metrics.fenced.inc()
        self._fenced_at[owned.tp.partition] = time.monotonic()
        self.halted.end(owned.tp.partition)
        self._host.on_lost(owned)
        await self._close([owned])

    async def _check_fenced(self) -> None:
        """See to partitions that were fenced, and of which no rebalance has taken the assignment.

        While the group counts this worker as their owner, something else has fenced it: the broker ended a transaction
        that took too long, or a late start of a former owner. They are acquired again. A worker that does not reach its
        group is cut off from it: only a restart helps.
        """
        bound_s = self._config.session_timeout_ms / 1000 + 3
        for number, at in list(self._fenced_at.items()):
            elapsed_s = time.monotonic() - at
            if elapsed_s > REACQUIRE_AFTER_S and await self._is_member() and self._fenced_at.get(number) == at:
                del self._fenced_at[number]
                logger.warning("partition %d was fenced, and is still this worker's: it is acquired again", number)
                self.reacquire(number)
            elif elapsed_s > bound_s and number in self._fenced_at:
                self._host.abort(f"partition {number} was fenced {bound_s:.0f} s ago and no rebalance has followed")

    def _new_producer(self, number: int) -> ChangelogProducer:
        config = self._config
        names = ChangelogNames(
            group_id=config.app_id,
            source=TopicPartition(config.source_topic, number),
            changelog=TopicPartition(config.changelog_topic, number),
        )
        return ChangelogProducer(
            names,
            config.client,
            transaction_timeout_ms=config.transaction_timeout_ms,
            batch_bytes=config.limits.batch_bytes(config.changelog_topic),
            clients=config.clients,
        )

    async def _close(self, owned: Collection[OwnedPartition]) -> None:
        for each in owned:
            if self.ready.get(each.tp.partition) is each:
                del self.ready[each.tp.partition]
                each.is_closed = True
                each.undelivered.cancel()
                if (holding := self.held.pop(each.tp.partition, None)) is not None:
                    holding.cancel()
                await self._release(each.store, each.producer)

    @staticmethod
    async def _release(store: PartitionStore | None, producer: ChangelogProducer) -> None:
        try:
            if store is not None:
                store.close()
        except Exception:  # as on a full disk; the changelog has everything that the store lacks
            logger.exception("a local database could not be closed")
        await producer.stop()
