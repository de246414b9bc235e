"""Delivery by record batch, through a real Faust app on the real broker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiokafka
import faust
import pytest
from aiokafka.errors import KafkaConnectionError
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient, NewTopic
from yarl import URL

from streams.engine import delivery
from streams.engine.compat import install_overrides
from streams.engine.delivery import BatchTransport, RecordBatch
from streams.engine.recovery import with_on_assigned

pytestmark = pytest.mark.broker
PARTITIONS = 2


class Receiver:
    """A Faust app whose agent only records the batches it gets; every assignment starts at offset 0."""

    def __init__(self, bootstrap_servers: str, name: str, datadir: Path) -> None:
        install_overrides()
        self.batches: list[RecordBatch] = []
        self.servers = bootstrap_servers
        self.busy_s = 0.0
        """Time that a delivery blocks the event loop, so that the next one is ready."""
        self.topic = f"{name}-in"
        self._changelog = f"{name}-numbers-changelog"
        admin = KafkaAdminClient(bootstrap_servers=bootstrap_servers)
        admin.create_topics([NewTopic(self.topic, PARTITIONS, 1), NewTopic(self._changelog, PARTITIONS, 1)])
        admin.close()
        url = URL(f"kafka://{bootstrap_servers}")
        self.app = faust.App(
            name,
            broker=str(url),
            store="memory://",
            topic_partitions=PARTITIONS,
            topic_allow_declare=False,
            web_enabled=False,
            broker_max_poll_records=7,
            consumer_auto_offset_reset="earliest",
            TableManager=with_on_assigned(self._on_assigned),
            datadir=str(datadir),
        )
        batched = frozenset({self.topic})
        self.app.transport = BatchTransport([url], self.app, batched_topics=batched, fetch_max_wait_ms=50)
        source = self.app.topic(self.topic, key_type=bytes, value_type=bytes, value_serializer="raw")
        self.app.Table("numbers", partitions=PARTITIONS)
        self.app.agent(source)(self._receive)

    async def _on_assigned(self, changelogs: frozenset[TP], generation: int) -> None:
        for tp in changelogs:
            await self.resume(tp.partition, 0)

    async def resume(self, partition: int, offset: int) -> None:
        """Seek a partition and resume it."""
        source = TP(self.topic, partition)
        await self.app.consumer.seek_wait({source: offset})
        self.app.consumer.resume_partitions({source})

    async def _receive(self, stream: Any) -> None:
        async for batches in stream:
            self.batches.extend(batches)
            time.sleep(self.busy_s)

    async def produce_until(self, condition: Callable[[], bool]) -> int:
        """Send records to partition 0 from a thread until the condition holds; return their number."""

        def produce() -> int:
            producer, sent, end = KafkaProducer(bootstrap_servers=self.servers), 0, time.monotonic() + 30
            while not condition() and time.monotonic() < end:
                producer.send(self.topic, b"", partition=0)
                sent += 1
                time.sleep(0.002)
            producer.close()
            return sent

        self.busy_s = 0.05
        sent = await asyncio.to_thread(produce)
        assert condition()
        return sent

    def offsets(self, partition: int, epoch: int | None = None) -> list[int]:
        """Return the offsets received of a partition, of one epoch if it is given."""
        chosen = [b for b in self.batches if b.tp.partition == partition and epoch in (None, b.epoch)]
        return [record.offset for batch in chosen for record in batch.records]


@asynccontextmanager
async def running(receiver: Receiver) -> AsyncIterator[Receiver]:
    """Run the app during the block."""
    await receiver.app.start()
    try:
        yield receiver
    finally:
        await receiver.app.stop()


async def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until the condition holds; raise TimeoutError when it does not."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.05)


async def produce(
    bootstrap_servers: str, topic: str, partition: int, n: int, transactional_id: str | None = None
) -> None:
    """Send n records; with a transactional id each one in its own transaction, so that markers are between them."""
    producer = aiokafka.AIOKafkaProducer(bootstrap_servers=bootstrap_servers, transactional_id=transactional_id)
    async with producer:
        for i in range(n):
            if transactional_id is None:
                await producer.send_and_wait(topic, b"%d" % i, partition=partition)
            else:
                async with producer.transaction():
                    await producer.send_and_wait(topic, b"%d" % i, partition=partition)


@pytest.fixture
def receiver(broker: Any, topic_prefix: str, tmp_path: Path) -> Receiver:
    """Return an app that is not started, with a topic of its own."""
    return Receiver(broker.bootstrap_servers, topic_prefix, tmp_path)


def test_batches_of_a_partition_are_contiguous(broker: Any, receiver: Receiver) -> None:
    """Each batch begins where the one before it ended, and together they hold every record once, in order."""

    async def scenario() -> None:
        await produce(broker.bootstrap_servers, receiver.topic, 0, 40)
        await produce(broker.bootstrap_servers, receiver.topic, 1, 25)
        async with running(receiver):
            await eventually(lambda: len(receiver.offsets(0)) + len(receiver.offsets(1)) >= 65)
        for partition, n in ((0, 40), (1, 25)):
            assert receiver.offsets(partition) == list(range(n))
            own = [b for b in receiver.batches if b.tp.partition == partition]
            assert [b.begin for b in own] == [0] + [b.end for b in own[:-1]]
        assert max(len(b.records) for b in receiver.batches) <= 7

    asyncio.run(scenario())


def test_markers_of_a_transactional_upstream_are_no_gap(broker: Any, receiver: Receiver, topic_prefix: str) -> None:
    """Offsets of transaction markers are inside the bounds of batches, so no record seems to be missing."""

    async def scenario() -> None:
        async with running(receiver):
            await produce(broker.bootstrap_servers, receiver.topic, 0, 12, transactional_id=topic_prefix)
            await eventually(lambda: len(receiver.offsets(0)) >= 12)
            await produce(broker.bootstrap_servers, receiver.topic, 0, 3, transactional_id=topic_prefix)
            await eventually(lambda: len(receiver.offsets(0)) >= 15)
        assert receiver.offsets(0) == list(range(0, 30, 2))
        assert [b.begin for b in receiver.batches] == [0] + [b.end for b in receiver.batches[:-1]]

    asyncio.run(scenario())


def test_a_seek_starts_a_new_epoch_at_its_offset(broker: Any, receiver: Receiver) -> None:
    """After a seek the next batch begins exactly at the new offset, and its epoch differs from earlier batches."""

    async def scenario() -> None:
        await produce(broker.bootstrap_servers, receiver.topic, 0, 20)
        async with running(receiver):
            await eventually(lambda: len(receiver.offsets(0)) >= 20)
            before = max(b.epoch for b in receiver.batches)
            await receiver.resume(0, 11)
            await eventually(lambda: len(receiver.offsets(0, before + 1)) >= 9)
        replayed = [b for b in receiver.batches if b.epoch == before + 1]
        assert replayed[0].begin == 11
        assert receiver.offsets(0, before + 1) == list(range(11, 20))

    asyncio.run(scenario())


Interference = Callable[[driver.AIOKafkaConsumerThread, Any], Coroutine[Any, Any, None]]


def interfere(monkeypatch: pytest.MonkeyPatch, interference: Interference | None = None) -> list[int]:
    """Run `interference` before the second fetch of each delivery; return the sizes of those fetches."""
    monkeypatch.setattr(delivery, "MORE_S", 0.5)
    fetch, brought = driver.AIOKafkaConsumerThread._fetch_records, list[int]()

    async def fetching(self: Any, consumer: Any, wanted: Any, timeout: float, max_records: int) -> Any:
        if timeout == delivery.MORE_S and interference is not None:
            await interference(self, consumer)
        fetched = await fetch(self, consumer, wanted, timeout, max_records)
        if timeout == delivery.MORE_S:
            brought.append(sum(len(records) for records in fetched.values()))
        return fetched

    monkeypatch.setattr(driver.AIOKafkaConsumerThread, "_fetch_records", fetching)
    return brought


def test_what_came_since_the_fetch_is_delivered_with_it(
    broker: Any, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that arrive while the agent is busy are delivered together with the fetch that is ready."""
    brought = interfere(monkeypatch)

    async def scenario() -> None:
        receiver.app.conf.broker_max_poll_records = 1_000
        async with running(receiver):
            sent = await receiver.produce_until(lambda: sum(brought) > 0)
            await eventually(lambda: len(receiver.offsets(0)) >= sent)
        assert receiver.offsets(0) == list(range(sent))
        assert [b.begin for b in receiver.batches] == [0] + [b.end for b in receiver.batches[:-1]]

    asyncio.run(scenario())


def test_a_seek_between_both_fetches_voids_the_first(
    broker: Any, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partition that is sought between the two fetches of a delivery is delivered from the new offset only."""
    tp, seeks = TP(receiver.topic, 0), list[int]()

    async def seek(thread: Any, consumer: Any) -> None:
        if len(seeks) < 3:
            seeks.append(5)
            await thread._seek_wait(consumer, {tp: 5})

    interfere(monkeypatch, seek)

    async def scenario() -> None:
        receiver.app.conf.broker_max_poll_records = 1_000
        async with running(receiver):
            sent = await receiver.produce_until(lambda: len(seeks) == 3)
            await eventually(lambda: receiver.offsets(0)[-1:] == [sent - 1])
        first, *sought, last = range(1, 2 + len(seeks))  # the assignment itself seeks once, to 0
        assert {b.epoch for b in receiver.batches} <= {first, *sought, last}
        assert receiver.offsets(0, last) == list(range(5, sent))
        for epoch, begin in ((first, 0), *((epoch, 5) for epoch in sought)):  # an epoch may end before a delivery
            offsets = receiver.offsets(0, epoch)
            assert offsets == list(range(begin, begin + len(offsets)))

    asyncio.run(scenario())


def test_a_failure_between_both_fetches_loses_nothing(
    broker: Any, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records of the first fetch are fetched again and delivered later when the second fetch fails."""
    fails = list[int]()

    async def fail(thread: Any, consumer: Any) -> None:
        if len(fails) < 3:
            fails.append(1)
            raise KafkaConnectionError("the broker is gone")

    interfere(monkeypatch, fail)
    fetch = delivery.BatchConsumerThread._fetch_records

    async def surviving(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await fetch(self, *args, **kwargs)
        except KafkaConnectionError:
            return {}

    monkeypatch.setattr(delivery.BatchConsumerThread, "_fetch_records", surviving)

    async def scenario() -> None:
        receiver.app.conf.broker_max_poll_records = 1_000
        async with running(receiver):
            sent = await receiver.produce_until(lambda: len(fails) == 3)
            await eventually(lambda: len(receiver.offsets(0)) >= sent)
        assert receiver.offsets(0) == list(range(sent))
        assert [b.begin for b in receiver.batches] == [0] + [b.end for b in receiver.batches[:-1]]

    asyncio.run(scenario())


def test_faust_commits_nothing_of_a_batched_topic(broker: Any, receiver: Receiver, topic_prefix: str) -> None:
    """Acknowledged batches leave no committed offset, not even at shutdown: only checkpoints commit."""

    async def scenario() -> None:
        await produce(broker.bootstrap_servers, receiver.topic, 0, 10)
        async with running(receiver):
            await eventually(lambda: len(receiver.offsets(0)) >= 10)
            await receiver.app.consumer.commit()
        consumer = aiokafka.AIOKafkaConsumer(
            bootstrap_servers=broker.bootstrap_servers, group_id=topic_prefix, enable_auto_commit=False
        )
        async with consumer:
            tp = aiokafka.TopicPartition(receiver.topic, 0)
            consumer.assign([tp])
            assert await consumer.committed(tp) is None

    asyncio.run(scenario())
