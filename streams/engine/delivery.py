"""Delivery by record batch: an agent receives everything that one fetch returned as one event.

Faust's own path costs about 70 microseconds per event, and as much again for each message of a fetch. Here a fetch
becomes one `RecordBatch` per partition, and all of them are the value of one Faust message. That cost is then paid once
per fetch, however many partitions there are.

The delivery layer owns positions. Each batch states where it begins and ends in the log, and the batches of a partition
are contiguous. Records that can no longer be delivered, because of a rebalance or because the flow was stopped, are
fetched again after a seek. The receiver checks the continuity once more: see `streams.engine.partitions`.

Faust never commits an offset of a batched topic; only checkpoints commit.

Private parts relied upon, held by tests/contract/test_faust_insides.py:
`faust.transport.consumer.Consumer`: `_wait_next_records`, `_filter_tps_with_pending_acks`, `_acked`,
`_acked_index`, `_add_gap`, `_buffered_partitions`, `_get_active_partitions`, `_new_consumer_thread`,
`verify_event_path`;
`faust.transport.drivers.aiokafka.AIOKafkaConsumerThread`: `_fetch_records`, `_seek_wait`, `_create_worker_consumer`;
`aiokafka.AIOKafkaConsumer`: `_fetch_max_wait_ms`, `_isolation_level`, `_key_deserializer`, `_auto_offset_reset`,
`_fetcher._subscriptions`, `_fetcher._prefetch_backoff`;
`aiokafka.consumer.subscription_state.TopicPartitionState`: `_position`, `lso`, `highwater`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiokafka
from aiokafka.errors import NoOffsetForPartitionError, OffsetOutOfRangeError
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage

from streams.engine.records import CorruptBatch, Parsing

PREFETCH_BACKOFF_S = 0.002
MORE_S = 0.005
"""Wait for records that arrived after those that were ready; the broker responds at once if there are any."""


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """Consecutive records of one source partition: everything visible in the log from `begin` up to `end`.

    A batch without records advances the position over an aborted transaction, for instance.

    log   ... r r m | m r r m r m | r r ...     r: record, m: transaction marker
                    begin         end
    """

    tp: TP
    begin: int
    """Position before the fetch; every visible record from here on is in the batch."""
    end: int
    """Position after the fetch: after the last record and the transaction markers that follow it."""
    records: list[Any]
    """Records as parsed (see `streams.engine.records`); none if the range holds markers and aborted records only."""
    epoch: int
    """Number of seeks of the partition before the fetch; it distinguishes batches from before a seek."""
    skipped: tuple[CorruptBatch, ...] = ()
    """Damaged batches in the range that were skipped, because the settings allow it."""
    fault: CorruptBatch | None = None
    """Damaged batch at `end`, at which the partition cannot go on."""


class BatchConsumerThread(driver.AIOKafkaConsumerThread):
    """The consumer's thread: it fetches, and keeps the position of each partition equal to what it handed over."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._joined_at: dict[TP, int] = {}
        """Position after the last batch handed over, by partition; a seek removes it."""
        self._epochs: dict[TP, int] = {}
        self._out_of_range: dict[TP, int] = {}
        """Position that the log does not have, by partition; fetching is paused until a seek."""
        self._parsing = Parsing(report=True, skip_corrupt=self.transport.skip_corrupt_batches)

    async def on_start(self) -> None:
        """Start the consumer, and let it fetch the next records early."""
        await super().on_start()
        # The default is to wait 100 ms before fetching other partitions of a broker while one is still being consumed.
        self._ensure_consumer()._fetcher._prefetch_backoff = PREFETCH_BACKOFF_S

    async def _fetch_records(
        self,
        consumer: aiokafka.AIOKafkaConsumer,
        active_partitions: Iterable[TP],
        timeout: float | None = None,
        max_records: int | None = None,
    ) -> Mapping[TP, RecordBatch]:
        # A frozen copy: the caller may change its set during the fetch, and aiokafka takes an empty set for "all".
        wanted = frozenset(active_partitions)
        if not wanted:
            return {}
        generation = self.app.consumer_generation_id
        before = {tp: self._joined_at.get(tp, self._position(consumer, tp)) for tp in wanted}
        epochs = {tp: self.epoch(tp) for tp in wanted}
        fetched = await self._fetch(consumer, wanted, 0, max_records)
        if fetched:
            await self._fetch_more(consumer, before, fetched, max_records)
        else:
            fetched = await self._fetch(consumer, wanted, timeout, max_records)
        fetched |= {tp: [] for tp in wanted if tp not in fetched and self._has_news(tp, before[tp], epochs[tp])}
        if not fetched:
            return {}
        if self.app.consumer_generation_id != generation or not self.consumer.flow_active:
            self._hand_back(consumer, before, fetched)
            return {}
        return {tp: self._join(consumer, tp, before[tp], records) for tp, records in fetched.items()}

    async def _fetch(
        self, consumer: aiokafka.AIOKafkaConsumer, wanted: frozenset[TP], timeout: float | None, max_records: int | None
    ) -> dict[TP, list[Any]]:
        """Return fetched records; a position outside the log is noted instead of silently reset, and paused."""
        try:
            return dict(await super()._fetch_records(consumer, wanted, timeout, max_records))
        except NoOffsetForPartitionError:  # from before the first seek of a new partition
            return {}
        except OffsetOutOfRangeError as error:
            for tp, offset in error.args[0].items():
                if self._position(consumer, tp) == offset:
                    self._out_of_range[TP(*tp)] = offset
                    consumer.pause(aiokafka.TopicPartition(*tp))
            return {}

    def out_of_range(self, tp: TP) -> int | None:
        """Return the position of the partition if the log does not have it; None otherwise."""
        return self._out_of_range.get(tp)

    async def _fetch_more(
        self,
        consumer: aiokafka.AIOKafkaConsumer,
        before: Mapping[TP, int | None],
        fetched: dict[TP, list[Any]],
        max_records: int | None,
    ) -> None:
        """Add records that reached the broker since: aiokafka fetches again only when the ready ones are taken."""
        left = None if max_records is None else max_records - sum(len(records) for records in fetched.values())
        if left == 0:
            return
        epochs = {tp: self.epoch(tp) for tp in before}
        try:
            more = await self._fetch(consumer, frozenset(before), MORE_S, left)
        except BaseException:
            self._drop_sought(fetched, epochs)
            self._hand_back(consumer, before, fetched)
            raise
        self._drop_sought(fetched, epochs)
        for tp, records in more.items():
            if self.epoch(tp) == epochs[tp]:
                fetched[tp] = [*fetched.get(tp, ()), *records]
            else:  # sought while we waited, so the position before these records is unknown
                self._hand_back(consumer, {tp: None}, {tp: records})

    def _drop_sought(self, fetched: dict[TP, list[Any]], epochs: Mapping[TP, int]) -> None:
        """Drop records of partitions that have been sought since they were fetched."""
        for tp in [tp for tp in fetched if self.epoch(tp) != epochs[tp]]:
            del fetched[tp]

    def positions(self, tp: TP) -> tuple[int, int]:
        """Return up to which offset the partition has been fetched, and up to which delivered; 0 if unknown."""
        return self._position(self._ensure_consumer(), tp) or 0, self._joined_at.get(tp, 0)

    def epoch(self, tp: TP) -> int:
        """Return how often the partition has been sought."""
        return self._epochs.get(tp, 0)

    def _has_news(self, tp: TP, before: int | None, epoch: int) -> bool:
        """Return whether something other than records was found: markers, aborted records or a damaged batch."""
        if before is None or self.epoch(tp) != epoch:
            return False
        parsing = self._parsing
        return parsing.reached.get(tp, before) > before or tp in parsing.faults or tp in parsing.jumps

    def _join(self, consumer: aiokafka.AIOKafkaConsumer, tp: TP, begin: int | None, records: list[Any]) -> RecordBatch:
        """Return the batch; if the position was reset inside the fetch, it begins there, so that the gap is noticed."""
        parsing = self._parsing
        jump = parsing.jumps.pop(tp, None)
        if jump is not None:
            records = [record for record in records if record.offset >= jump]
            begin = jump
        if records:
            begin = records[0].offset if begin is None else min(begin, records[0].offset)
        assert begin is not None  # without records only a partition whose position is known has news
        end = max(parsing.reached.get(tp, 0), records[-1].offset + 1 if records else 0, begin)
        self._joined_at[tp] = end
        skipped = tuple(parsing.skipped.pop(tp, ()))
        return RecordBatch(tp, begin, end, records, self.epoch(tp), skipped, parsing.faults.pop(tp, None))

    def _hand_back(
        self, consumer: aiokafka.AIOKafkaConsumer, before: Mapping[TP, int | None], fetched: Mapping[TP, list[Any]]
    ) -> None:
        """Seek back to the records that are not delivered; a partition that was revoked needs no seek."""
        for tp, records in fetched.items():
            self._joined_at.pop(tp, None)
            self._parsing.forget(tp)
            begin = records[0].offset if before[tp] is None and records else before[tp]
            if tp in consumer.assignment() and begin is not None:
                consumer.seek(tp, begin)

    def end(self, tp: TP) -> tuple[int, int]:
        """Return the last stable offset of the partition and its high watermark, as of the last fetch; 0 if unknown.

        Records from the last stable offset on belong to transactions that are still open, so nobody can read them yet.
        """
        state = self._state(self._ensure_consumer(), tp)
        if state is None:
            return 0, 0
        high = state.highwater or 0
        return high if state.lso is None or state.lso < 0 else state.lso, high

    @classmethod
    def _position(cls, consumer: aiokafka.AIOKafkaConsumer, tp: TP) -> int | None:
        state = cls._state(consumer, tp)
        position: int | None = state and state._position
        return position

    @staticmethod
    def _state(consumer: aiokafka.AIOKafkaConsumer, tp: TP) -> Any:
        subscription = consumer._fetcher._subscriptions.subscription
        if subscription is None or subscription.assignment is None or tp not in subscription.assignment.tps:
            return None
        return subscription.assignment.state_value(tp)

    async def _seek_wait(self, consumer: aiokafka.AIOKafkaConsumer, partitions: Mapping[TP, int]) -> None:
        for tp in partitions:
            self._joined_at.pop(tp, None)
            self._parsing.forget(tp)
            self._epochs[tp] = self.epoch(tp) + 1
            if self._out_of_range.pop(tp, None) is not None and tp in consumer.assignment():
                consumer.resume(aiokafka.TopicPartition(*tp))
        await super()._seek_wait(consumer, partitions)

    def _create_worker_consumer(self, transport: BatchTransport) -> aiokafka.AIOKafkaConsumer:
        consumer = super()._create_worker_consumer(transport)
        # Faust hard-codes 1,500 ms, and reads uncommitted records unless its own exactly-once mode is on.
        consumer._fetch_max_wait_ms = transport.fetch_max_wait_ms
        consumer._isolation_level = "read_committed"
        consumer._auto_offset_reset = "none"  # a reset would skip events without a trace: see `out_of_range`
        consumer._key_deserializer = self._parsing
        return consumer


class BatchConsumer(driver.Consumer):
    """Faust's consumer, which yields one message per fetch for the batched topics."""

    transport: BatchTransport

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resumed = asyncio.Event()

    def _new_consumer_thread(self) -> BatchConsumerThread:
        return BatchConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, ConsumerMessage]]:
        """Yield the result of one fetch; all batched topics are one message, its value a tuple of `RecordBatch`."""
        if self.flow_active and not self._get_active_partitions():
            await self._wait_resumed(timeout)
            return
        fetched, active = await self._wait_next_records(timeout)
        generation = self.app.consumer_generation_id
        batches = [
            batch
            for tp, batch in (fetched or {}).items()
            if active is None or tp in active or tp in self._buffered_partitions
        ]
        for message in self._messages(batches, generation):
            if self.should_stop or not self.flow_active or self.app.consumer_generation_id != generation:
                return  # the receiver notices the gap and seeks back to what is not delivered here
            yield message.tp, message

    def _messages(self, batches: Sequence[RecordBatch], generation: int) -> Iterator[ConsumerMessage]:
        whole = tuple(batch for batch in batches if batch.tp.topic in self.transport.batched_topics)
        if whole:
            yield self._whole_message(whole, generation)
        for batch in batches:
            if batch.tp.topic not in self.transport.batched_topics:
                yield from (self._to_message(batch.tp, record) for record in batch.records)

    @staticmethod
    def _whole_message(batches: tuple[RecordBatch, ...], generation: int) -> ConsumerMessage:
        """Return one message; to Faust it comes from the first partition and ends where that one's batch ends."""
        tp, last = batches[0].tp, batches[0].end - 1
        record = batches[0].records[-1] if batches[0].records else None
        return ConsumerMessage(
            tp.topic,
            tp.partition,
            last,
            record.timestamp / 1000.0 if record else 0.0,
            record.timestamp_type if record else 0,
            (),
            None,
            batches,
            None,
            0,
            0,
            tp,
            generation_id=generation,
        )

    async def _wait_resumed(self, timeout: float) -> None:
        """Wait until a partition is resumed; Faust would sleep for a second while none is active."""
        self._resumed.clear()
        await self.wait(self._resumed, timeout=timeout)

    def resume_partitions(self, tps: Iterable[TP]) -> None:
        """Resume partitions and wake a waiting fetch."""
        super().resume_partitions(tps)
        self._resumed.set()

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterable[TP]:
        """Yield partitions whose offsets Faust may commit, and drop what batched topics have left to commit.

        Overriding `ack` would not do: Faust's compiled stream records acknowledgements without calling it.
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
        """Do nothing: Faust measures progress by its own commits, and a batched topic has none."""


class BatchTransport(driver.Transport):
    """Faust's aiokafka transport with `BatchConsumer`; `streams.app` sets it as `app.transport`."""

    Consumer = BatchConsumer

    def __init__(
        self,
        *args: Any,
        batched_topics: frozenset[str],
        fetch_max_wait_ms: int,
        skip_corrupt_batches: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.batched_topics = batched_topics
        self.fetch_max_wait_ms = fetch_max_wait_ms
        self.skip_corrupt_batches = skip_corrupt_batches
