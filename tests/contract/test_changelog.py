"""The guarantees of Kafka transactions that the state relies on, on a real broker and on that of the simulation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from aiokafka.structs import TopicPartition
from kafka import TopicPartition as KafkaTopicPartition
from kafka.admin import KafkaAdminClient, NewTopic

from infra.harness.simulation.broker import Broker
from infra.harness.simulation.clients import Link, clients_of
from streams.engine.changelog import ChangelogNames, ChangelogProducer, Fenced, LogReader
from streams.engine.clients import KAFKA, Clients
from streams.engine.compat import install_overrides
from streams.engine.last_record import reread
from streams.engine.packing import BATCH_BYTES_MAX
from streams.storage.codec import CheckpointMark
from streams.storage.identity import LastRecord


@dataclass(frozen=True)
class Client:
    """Connection options and the classes that take them."""

    options: dict[str, Any]
    clients: Clients
    delete_before: Callable[[TopicPartition, int], None]
    """Deletes the records of a partition before an offset."""


@pytest.fixture(params=[pytest.param("kafka", marks=pytest.mark.broker), "simulated"])
def client(request: pytest.FixtureRequest, names: ChangelogNames) -> Client:
    """Return a connection to a broker that has the topics."""
    topics = names.source.topic, names.changelog.topic
    if request.param == "simulated":
        simulated = Broker()
        for topic in topics:
            simulated.create(topic, 1)
        return Client({}, clients_of(Link(simulated)), lambda tp, offset: simulated.log(tp).delete_before(offset))
    install_overrides()
    options = {"bootstrap_servers": request.getfixturevalue("broker").bootstrap_servers}
    admin = KafkaAdminClient(**options)
    admin.create_topics([NewTopic(topic, 1, 1) for topic in topics])
    admin.close()

    def delete_before(tp: TopicPartition, offset: int) -> None:
        admin = KafkaAdminClient(**options)
        admin.delete_records({KafkaTopicPartition(*tp): offset})
        admin.close()

    return Client(options, KAFKA, delete_before)


@pytest.fixture
def names(topic_prefix: str) -> ChangelogNames:
    """Return the names of a source and a changelog topic of one partition each."""
    source, changelog = f"{topic_prefix}-source", f"{topic_prefix}-changelog"
    return ChangelogNames(topic_prefix, TopicPartition(source, 0), TopicPartition(changelog, 0))


def producer(names: ChangelogNames, client: Client) -> ChangelogProducer:
    """Return a producer that is not started."""
    return ChangelogProducer(names, client.options, transaction_timeout_ms=10_000, clients=client.clients)


async def fence_predecessors(names: ChangelogNames, client: Client) -> None:
    """Start a producer and stop it, because a commit is acknowledged before its markers are written.

    Every owner of a partition does the same before it reads.
    """
    successor = producer(names, client)
    await successor.start()
    await successor.stop()


async def read_all(names: ChangelogNames, client: Client) -> list[tuple[bytes, bytes]]:
    """Return every visible record."""
    await fence_predecessors(names, client)
    reader = LogReader(names.changelog, client.options, client.clients)
    await reader.open()
    try:
        return [(r.key, r.value) async for batch in reader.batches(reader.begin, records_max=500) for r in batch]
    finally:
        await reader.close()


async def committed(names: ChangelogNames, client: Client) -> int | None:
    """Return the committed source offset."""
    await fence_predecessors(names, client)
    consumer = client.clients.consumer(**client.options, group_id=names.group_id, enable_auto_commit=False)
    await consumer.start()
    try:
        consumer.assign([names.source])
        offset: int | None = await consumer.committed(names.source)
        return offset
    finally:
        await consumer.stop()


async def commit(writer: ChangelogProducer, records: Sequence[tuple[bytes, bytes]], source_offset: int) -> int:
    """Commit records and a source offset in one transaction; return the offset of the last record."""
    await writer.begin()
    last = await writer.append(records)
    await writer.send_source_offset(source_offset)
    await writer.commit()
    return last


def numbered(n: int, size: int = 10) -> Sequence[tuple[bytes, bytes]]:
    """Return `n` distinct records with values of `size` bytes."""
    return [(b"k%d" % i, b"v" * size) for i in range(n)]


def test_the_last_record_of_a_state_is_read_again(names: ChangelogNames, client: Client) -> None:
    """What a worker has consumed and what is read again have one checksum; a marker or a deleted record is not read."""

    async def scenario() -> None:
        writer = producer(names, client)
        await writer.start()
        await commit(writer, numbered(3), 7)  # offset 3 is a marker
        await commit(writer, numbered(2), 9)
        await writer.stop()
        await fence_predecessors(names, client)
        reader = LogReader(names.changelog, client.options, client.clients)
        await reader.open()
        consumed = [r async for batch in reader.batches(0, records_max=500) for r in batch]
        await reader.close()

        async def reread_at(offset: int, earliest: int = 0) -> LastRecord | None:
            mark = CheckpointMark(6, 0, last=LastRecord(offset, 0))
            return await reread(names.changelog, client.options, mark, earliest, reader.end, client.clients)

        assert [await reread_at(record.offset) for record in consumed] == list(map(LastRecord.of, consumed))
        assert [await reread_at(3), await reread_at(1, earliest=2), await reread_at(reader.end)] == [None] * 3
        client.delete_before(names.changelog, 4)
        assert await reread_at(1) is None  # deleted after its offsets were looked up
        assert await reread_at(4) == LastRecord.of(consumed[3])

    asyncio.run(scenario())


def test_commit_writes_records_and_offset_together(names: ChangelogNames, client: Client) -> None:
    """A commit makes its records readable and its source offset committed, and returns the last record's offset."""

    async def scenario() -> None:
        writer = producer(names, client)
        await writer.start()
        assert await commit(writer, numbered(3), 7) == 2
        assert await commit(writer, numbered(2), 9) == 5  # offset 3 is the marker of the first
        await writer.stop()
        assert await read_all(names, client) == [*numbered(3), *numbered(2)]
        assert await committed(names, client) == 9

    asyncio.run(scenario())


def test_a_commit_larger_than_one_batch_arrives_whole(names: ChangelogNames, client: Client) -> None:
    """Records beyond the size of one produce batch are split over several, and none is missing."""

    async def scenario() -> None:
        records = numbered(40, size=BATCH_BYTES_MAX // 10)
        writer = producer(names, client)
        await writer.start()
        await commit(writer, records, 1)
        await writer.stop()
        assert await read_all(names, client) == records

    asyncio.run(scenario())


def test_a_predecessor_is_fenced_and_leaves_nothing(names: ChangelogNames, client: Client) -> None:
    """Once a successor has started, the predecessor can write neither a record nor an offset."""

    async def scenario() -> None:
        old, new = producer(names, client), producer(names, client)
        await old.start()
        await commit(old, numbered(1), 1)
        await new.start()
        with pytest.raises(Fenced):
            await commit(old, numbered(5), 99)
        await old.stop()
        await commit(new, numbered(2), 2)
        await new.stop()
        assert await read_all(names, client) == [*numbered(1), *numbered(2)]
        assert await committed(names, client) == 2

    asyncio.run(scenario())


def test_a_transaction_is_given_up_before_the_broker_ends_it(names: ChangelogNames, client: Client) -> None:
    """The broker would fence the producer, as if the partition had a new owner; a slow step fails in time instead."""

    async def scenario() -> None:
        writer = ChangelogProducer(names, client.options, transaction_timeout_ms=1_000, clients=client.clients)
        await writer.start()
        await writer.begin()
        await asyncio.sleep(0.85)
        with pytest.raises(TimeoutError):
            await writer.append(numbered(1))
        await writer.stop()

    asyncio.run(scenario())


def test_an_open_transaction_of_a_dead_predecessor_is_aborted(names: ChangelogNames, client: Client) -> None:
    """Records that were sent but not committed are invisible, and do not delay the reader."""

    async def scenario() -> None:
        old, new = producer(names, client), producer(names, client)
        await old.start()
        await old.begin()
        await old.append(numbered(3))
        await new.start()
        await commit(new, numbered(1), 4)
        await new.stop()
        assert await read_all(names, client) == numbered(1)
        await old.stop()

    asyncio.run(scenario())


def test_reader_ends_behind_trailing_markers(names: ChangelogNames, client: Client) -> None:
    """The reader returns at the end of a log that ends in transaction markers, aborted ones too."""

    async def scenario() -> None:
        writer = producer(names, client)
        await writer.start()
        await commit(writer, numbered(2), 1)
        await writer.begin()
        await writer.append(numbered(3))
        await writer._producer.abort_transaction()
        await writer.stop()
        await fence_predecessors(names, client)
        reader = LogReader(names.changelog, client.options, client.clients)
        await reader.open()
        async with asyncio.timeout(10):
            seen = [r async for batch in reader.batches(0, records_max=500) for r in batch]
        assert len(seen) == 2
        assert reader.end == 7  # 2 records, marker, 3 aborted records, marker
        await reader.close()

    asyncio.run(scenario())


def test_a_marker_is_no_record(names: ChangelogNames, client: Client) -> None:
    """Asked for one offset, the reader returns the record there, and None where a transaction marker is."""

    async def scenario() -> None:
        writer = producer(names, client)
        await writer.start()
        await commit(writer, numbered(2), 1)
        await commit(writer, numbered(1), 2)
        await writer.stop()
        await fence_predecessors(names, client)
        reader = LogReader(names.changelog, client.options, client.clients)
        await reader.open()
        at_two, at_three = await reader.record_at(2), await reader.record_at(3)
        assert (at_two, at_three and at_three.key) == (None, b"k0")
        await reader.close()

    asyncio.run(scenario())
