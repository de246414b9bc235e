"""The changelog topic: a transactional producer per source partition, and a reader with a verifiable end.

Starting a `ChangelogProducer` raises the epoch of its `transactional.id` at the broker. The broker then aborts an open
transaction of the predecessor, and the predecessor can never write again, even if it is only cut off and still runs.
End offsets and committed offsets are reliable only after that: the broker acknowledges a commit before it writes the
markers that make it visible, and starting a producer waits for them.

The code below avoids three traps of aiokafka's transactions:

- a failed batch leaves the transaction open, and a commit would succeed without it; so every batch is awaited;
- offsets sent while batches are in flight are rejected and retried; so batches are sent first;
- a producer may not be used after a failure; so it is discarded.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiokafka.errors import ProducerFenced
from aiokafka.structs import TopicPartition

from streams.engine.clients import KAFKA, Clients
from streams.engine.packing import BATCH_BYTES_MAX, send_packed
from streams.engine.producers import stop_producer
from streams.engine.proof import COMMITTED_BY
from streams.engine.records import Parsing
from streams.errors import LosesPartition
from streams.storage.store import Record
from streams.wire.embeddings import Message

logger = logging.getLogger(__name__)

TRANSACTION_SHARE = 0.8
"""Share of its timeout after which a transaction is given up."""
RECORDS_MAX = 1 << 30
"""Records by one producer, half of what aiokafka can count."""
POLL_MS = 20
"""Interval at which a reader checks its position, which markers at the end of a log advance without a record."""


class Fenced(LosesPartition):
    """Another worker has taken the partition over, so this worker may not write to it any more."""


@dataclass(frozen=True, slots=True)
class ChangelogNames:
    """Names in the transactions of one partition: consumer group, source partition and changelog partition."""

    group_id: str
    source: TopicPartition
    changelog: TopicPartition

    @property
    def transactional_id(self) -> str:
        """Id that all owners of the partition share, so that each one fences those before it."""
        return f"{self.changelog.topic}-{self.changelog.partition}"


class ChangelogProducer:
    """Writes the changelog and the committed offset of one source partition in transactions.

    Implements `storage.checkpoint.ChangelogTransaction`. Every step raises `Fenced` when the partition has a new owner,
    and `KafkaError` or `TimeoutError` when the step failed or its outcome is unknown; the caller then stops and
    replaces this producer.
    """

    def __init__(
        self,
        names: ChangelogNames,
        client: Mapping[str, Any],
        *,
        transaction_timeout_ms: int,
        batch_bytes: int = BATCH_BYTES_MAX,
        clients: Clients = KAFKA,
    ) -> None:
        self._names, self._batch_bytes = names, batch_bytes
        self._step_s = transaction_timeout_ms / 2_000
        self._transaction_s = transaction_timeout_ms * TRANSACTION_SHARE / 1_000
        self._give_up_at = math.inf
        """Time of the event loop at which the open transaction is given up, before the broker does that."""
        self._producer = clients.producer(
            **client,
            acks="all",
            transactional_id=names.transactional_id,
            transaction_timeout_ms=transaction_timeout_ms,
            max_batch_size=BATCH_BYTES_MAX,
            linger_ms=0,
        )
        self._records = 0
        self.bytes_written = 0
        """Bytes of keys and values appended so far, committed or not."""

    @property
    def is_worn(self) -> bool:
        """Whether its count of records is so close to the overflow that it must be replaced."""
        return self._records >= RECORDS_MAX

    async def start(self) -> None:
        """Fence every predecessor; return when its transactions have ended."""
        await self._producer.start()

    async def stop(self) -> None:
        """Close the connection within bounded time.

        An open transaction stays open until the start of the successor aborts it.
        """
        await stop_producer(self._producer)

    async def begin(self) -> None:
        """Begin a transaction."""
        self._give_up_at = asyncio.get_running_loop().time() + self._transaction_s
        async with self._step():
            await self._producer.begin_transaction()

    async def append(self, records: Sequence[Record]) -> int:
        """Write `records` (at least one), wait until the broker has all of them, and return the offset of the last."""
        messages: list[Message] = [(key, value, []) for key, value in records]
        async with self._step():
            end = await (
                await send_packed(self._producer, self._names.changelog, messages, batch_bytes=self._batch_bytes)
            )
        self._records += len(messages)
        self.bytes_written += sum([len(key) + len(value or b"") for key, value in records])
        return end - 1

    async def send_source_offset(self, source_offset: int) -> None:
        """Add the committed offset of the source partition to the transaction."""
        async with self._step():
            committed = {self._names.source: (source_offset, COMMITTED_BY)}
            await self._producer.send_offsets_to_transaction(committed, self._names.group_id)

    async def commit(self) -> None:
        """Commit records and offset together."""
        async with self._step():
            await self._producer.commit_transaction()

    @asynccontextmanager
    async def _step(self) -> AsyncIterator[None]:
        """Bound one step, and all of them: a partition without a leader would hold up its checkpoint that long.

        The broker ends a transaction that takes longer than its timeout, and fences its producer. That would look as
        if the partition had a new owner.
        """
        try:
            async with asyncio.timeout_at(min(self._give_up_at, asyncio.get_running_loop().time() + self._step_s)):
                yield
        except ProducerFenced as error:
            raise Fenced(f"partition {self._names.source.partition} has a new owner") from error


class LogReader:
    """Reads one partition up to the end offset that was current at `open`, and proves that it did."""

    def __init__(self, tp: TopicPartition, client: Mapping[str, Any], clients: Clients = KAFKA) -> None:
        self.tp = tp
        self._consumer = clients.consumer(
            **client,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            key_deserializer=Parsing(),  # a damaged batch raises
            max_partition_fetch_bytes=4 << 20,
            fetch_max_wait_ms=100,
        )
        self.begin = 0
        """First offset of the log."""
        self.end = 0
        """Offset after the last stable record at the time of `open`."""

    async def open(self) -> None:
        """Assign the partition and read its begin and end offsets."""
        await self._consumer.start()
        self._consumer.assign([self.tp])
        self.begin = (await self._consumer.beginning_offsets([self.tp]))[self.tp]
        self.end = (await self._consumer.end_offsets([self.tp]))[self.tp]

    async def close(self) -> None:
        """Close the connection."""
        await self._consumer.stop()

    async def record_at(self, offset: int) -> Any | None:
        """Return the record at `offset`; None if there is no visible one, because of compaction or a marker."""
        async for records in self.batches(offset, records_max=1):
            return records[0] if records[0].offset == offset else None
        return None

    async def batches(self, start: int, *, records_max: int) -> AsyncIterator[list[Any]]:
        """Yield the records from `start` on in lists of at most `records_max`, until the position has reached `end`.

        The end is judged by position, not by the last record, because transaction markers occupy offsets of their own.
        When the iterator ends, every visible record in [start, end) has been yielded.
        """
        self._consumer.seek(self.tp, start)
        position = start
        while position < self.end:
            fetched = await self._consumer.getmany(self.tp, timeout_ms=POLL_MS, max_records=records_max)
            records = fetched.get(self.tp)
            if records:
                yield records
            position = await self._consumer.position(self.tp)
