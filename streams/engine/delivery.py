"""Delivery by record batch: an agent receives the records of one partition as one event.

Faust's own path costs about 70 microseconds an event. Here a fetch becomes one `RecordBatch` per partition, carried
as the value of one Faust message, so that cost is paid once a batch.

The delivery layer owns positions. Each batch says where it begins and ends in the log, batches of a partition join
without a hole, and what was fetched but may not be delivered (a rebalance struck, the flow was stopped) is sought
back. The receiver checks the joint again: see `streams.engine.partitions`.

Faust never commits an offset of a batched topic; the checkpoint alone commits.

Private parts relied upon, held by tests/contract/test_faust_insides.py:
`faust.transport.consumer.Consumer`: `_wait_next_records`, `_filter_tps_with_pending_acks`, `_acked`,
`_acked_index`, `_add_gap`, `_buffered_partitions`, `_get_active_partitions`, `_new_consumer_thread`,
`verify_event_path`;
`faust.transport.drivers.aiokafka.AIOKafkaConsumerThread`: `_fetch_records`, `_seek_wait`, `_create_worker_consumer`;
`aiokafka.AIOKafkaConsumer`: `_fetch_max_wait_ms`, `_isolation_level`, `_key_deserializer`, `_fetcher._subscriptions`,
`_fetcher._prefetch_backoff`; `aiokafka.consumer.subscription_state.TopicPartitionState._position`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import aiokafka
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage

from streams.engine.records import as_parsed

PREFETCH_BACKOFF_S = 0.002


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """Consecutive records of one source partition: everything visible in the log from `begin` up to `end`."""

    tp: TP
    begin: int
    """Position before the fetch: no visible record between `begin` and the first one is missing."""
    end: int
    """Position after the fetch: above the last record, beyond control records that follow it."""
    records: list[Any]
    """Records as parsed (see `streams.engine.records`); at least one."""
    epoch: int
    """How often the partition had been sought when the batch was fetched: tells batches from before a seek."""


class BatchConsumerThread(driver.AIOKafkaConsumerThread):
    """The consumer's own thread: fetches, and keeps each partition's position equal to what was handed over."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._joined_at: dict[TP, int] = {}
        """Position after the last batch handed over, until a seek moves the partition."""
        self._epochs: dict[TP, int] = {}
        self._delivered_at = 0.0

    async def on_start(self) -> None:
        await super().on_start()
        # Stock waits 100 ms before it fetches other partitions of a broker while one is still being consumed.
        self._ensure_consumer()._fetcher._prefetch_backoff = PREFETCH_BACKOFF_S

    async def _fetch_records(
        self,
        consumer: aiokafka.AIOKafkaConsumer,
        active_partitions: Iterable[TP],
        timeout: float | None = None,
        max_records: int | None = None,
    ) -> Mapping[TP, RecordBatch]:
        # A frozen copy: the caller's set changes under us, and aiokafka reads an empty set as "all partitions".
        wanted = frozenset(active_partitions)
        if not wanted:
            return {}
        await self._gather()
        generation = self.app.consumer_generation_id
        before = {tp: self._joined_at.get(tp, self._position(consumer, tp)) for tp in wanted}
        fetched = await super()._fetch_records(consumer, wanted, timeout, max_records)
        if not fetched:
            return {}
        if self.app.consumer_generation_id != generation or not self.consumer.flow_active:
            self._hand_back(consumer, before, fetched)
            return {}
        self._delivered_at = time.monotonic()
        return {tp: self._join(consumer, tp, before[tp], records) for tp, records in fetched.items()}

    def positions(self, tp: TP) -> tuple[int, int]:
        """Where the partition was fetched to, and up to where its batches have been delivered; 0 where unknown."""
        return self._position(self._ensure_consumer(), tp) or 0, self._joined_at.get(tp, 0)

    async def _gather(self) -> None:
        """Let records gather for a moment after a delivery: a fetch request costs more than the records it brings."""
        wait_s = self._delivered_at + self.transport.deliver_every_ms / 1000 - time.monotonic()
        if wait_s > 0:
            await asyncio.sleep(wait_s)

    def epoch(self, tp: TP) -> int:
        """How often the partition has been sought."""
        return self._epochs.get(tp, 0)

    def _join(self, consumer: aiokafka.AIOKafkaConsumer, tp: TP, begin: int | None, records: list[Any]) -> RecordBatch:
        first, last = records[0].offset, records[-1].offset
        end = max(self._position(consumer, tp) or 0, last + 1)
        self._joined_at[tp] = end
        return RecordBatch(tp, first if begin is None else min(begin, first), end, records, self.epoch(tp))

    def _hand_back(
        self, consumer: aiokafka.AIOKafkaConsumer, before: Mapping[TP, int | None], fetched: Mapping[TP, list[Any]]
    ) -> None:
        """Seek back to what was fetched but is not delivered; a partition already gone needs no seek."""
        for tp, records in fetched.items():
            self._joined_at.pop(tp, None)
            if tp in consumer.assignment():
                begin = before[tp]
                consumer.seek(tp, records[0].offset if begin is None else begin)

    @staticmethod
    def _position(consumer: aiokafka.AIOKafkaConsumer, tp: TP) -> int | None:
        subscription = consumer._fetcher._subscriptions.subscription
        if subscription is None or subscription.assignment is None or tp not in subscription.assignment.tps:
            return None
        position: int | None = subscription.assignment.state_value(tp)._position
        return position

    async def _seek_wait(self, consumer: aiokafka.AIOKafkaConsumer, partitions: Mapping[TP, int]) -> None:
        for tp in partitions:
            self._joined_at.pop(tp, None)
            self._epochs[tp] = self.epoch(tp) + 1
        await super()._seek_wait(consumer, partitions)

    def _create_worker_consumer(self, transport: BatchTransport) -> aiokafka.AIOKafkaConsumer:
        consumer = super()._create_worker_consumer(transport)
        # Faust hard-codes 1,500 ms, and reads uncommitted records unless its own exactly-once is on.
        consumer._fetch_max_wait_ms = transport.fetch_max_wait_ms
        consumer._isolation_level = "read_committed"
        consumer._key_deserializer = as_parsed
        return consumer


class BatchConsumer(driver.Consumer):
    """Faust's consumer, yielding one message per partition and fetch for the batched topics."""

    transport: BatchTransport

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resumed = asyncio.Event()

    def _new_consumer_thread(self) -> BatchConsumerThread:
        return BatchConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, ConsumerMessage]]:
        """Yield what one fetch brought: a `RecordBatch` message for each partition of a batched topic."""
        if self.flow_active and not self._get_active_partitions():
            await self._wait_resumed(timeout)
            return
        batches, active = await self._wait_next_records(timeout)
        generation = self.app.consumer_generation_id
        for tp, batch in (batches or {}).items():
            if self.should_stop or not self.flow_active or self.app.consumer_generation_id != generation:
                return  # the receiver's position guard seeks back to what is left undelivered here
            if active is None or tp in active or tp in self._buffered_partitions:
                for message in self._messages(batch, generation):
                    yield tp, message

    def _messages(self, batch: RecordBatch, generation: int) -> Iterable[ConsumerMessage]:
        if batch.tp.topic not in self.transport.batched_topics:
            return (self._to_message(batch.tp, record) for record in batch.records)
        last = batch.records[-1]
        message = ConsumerMessage(
            batch.tp.topic,
            batch.tp.partition,
            last.offset,
            last.timestamp / 1000.0,
            last.timestamp_type,
            (),
            None,
            batch,
            None,
            0,
            0,
            batch.tp,
            generation_id=generation,
        )
        return (message,)

    async def _wait_resumed(self, timeout: float) -> None:
        """Stock sleeps a second when nothing is active; this wakes as soon as a partition is resumed."""
        self._resumed.clear()
        await self.wait(self._resumed, timeout=timeout)

    def resume_partitions(self, tps: Iterable[TP]) -> None:
        super().resume_partitions(tps)
        self._resumed.set()

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterable[TP]:
        """Where Faust looks for offsets to commit: what batched topics have left there is dropped.

        Not in `ack`: Faust's compiled stream keeps the same books without calling it.
        """
        for tp in list(super()._filter_tps_with_pending_acks(topics)):
            if tp.topic not in self.transport.batched_topics:
                yield tp
            else:
                self._acked.pop(tp, None)
                self._acked_index.pop(tp, None)

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        if tp.topic not in self.transport.batched_topics:
            await super()._add_gap(tp, offset_from, offset_to)

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Silent: Faust measures progress by its own commits, which a batched topic has none of."""


class BatchTransport(driver.Transport):
    """Faust's aiokafka transport with `BatchConsumer`; install it as `app.transport`."""

    Consumer = BatchConsumer

    def __init__(
        self,
        *args: Any,
        batched_topics: frozenset[str],
        fetch_max_wait_ms: int,
        deliver_every_ms: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.batched_topics = batched_topics
        self.fetch_max_wait_ms = fetch_max_wait_ms
        self.deliver_every_ms = deliver_every_ms
