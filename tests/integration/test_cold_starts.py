"""Cold starts never begin on incomplete state: counted, over seven shapes of changelog, against the truth.

Each start is the worker's own: fence, read the committed offset, restore onto an empty disk, prove by the mark. The
restored store is compared with what was committed, record by record. The same count fails when the end test is broken.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiokafka
import numpy as np
import pytest
from aiokafka.structs import TopicPartition
from faust.types import TP
from kafka.admin import ConfigResource, KafkaAdminClient, NewTopic
from rocksdict import Cache

from streams.core.pipeline import PartitionState, StateLimits
from streams.core.triggers import TriggerPolicy
from streams.engine.changelog import ChangelogNames, ChangelogProducer, Fenced, LogReader
from streams.engine.outputs import Published
from streams.engine.partitions import OwnedPartition, Partitions, PartitionsConfig
from streams.metrics import Metrics
from streams.state.codec import CheckpointMark, encode_mark
from streams.state.store import PartitionStore, Record

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(400)]
SEED = 31
STARTS = 43
"""Of each of the seven shapes: 301 in all."""
START_S = 20.0


@dataclass
class Log:
    """One changelog as its writers leave it, and what of it was committed."""

    names: ChangelogNames
    client: Mapping[str, Any]
    random: random.Random
    truth: dict[bytes, bytes] = field(default_factory=dict)
    offset: int = 0

    def producer(self) -> ChangelogProducer:
        return ChangelogProducer(self.names, self.client, transaction_timeout_ms=30_000)

    def records(self, count: int, size: int, keys: int = 1 << 30) -> list[Record]:
        """So many records of this many random bytes, some of them tombstones, over a set of keys."""
        made: list[Record] = []
        for _ in range(count):
            value = None if self.random.random() < 0.05 else self.random.randbytes(size)
            made.append((b"c%d" % self.random.randrange(keys), value))
        return made

    async def checkpoint(self, writer: ChangelogProducer, records: list[Record]) -> None:
        """Write a checkpoint; the truth follows once it is committed."""
        await writer.begin()
        offset = self.offset + 10
        await writer.append([*records, encode_mark(CheckpointMark(offset, 0))])
        await writer.send_source_offset(offset)
        await writer.commit()
        self.offset = offset
        for key, value in [*records, encode_mark(CheckpointMark(offset, 0))]:
            if value is None:
                self.truth.pop(key, None)
            else:
                self.truth[key] = value

    async def leave_open(self, writer: ChangelogProducer) -> None:
        """Begin a checkpoint and end before its commit: the successor's start aborts it."""
        await writer.begin()
        await writer.append([*self.records(20, 50), encode_mark(CheckpointMark(self.offset + 10, 0))])


async def written(log: Log, checkpoints: int, count: int, size: int, keys: int = 1 << 30) -> None:
    writer = log.producer()
    await writer.start()
    for _ in range(checkpoints):
        await log.checkpoint(writer, log.records(count, size, keys))
    await writer.stop()


async def few_large_values(log: Log) -> None:
    await written(log, 2, 15, 100_000)


async def many_small_ones(log: Log) -> None:
    await written(log, 120, 25, 40)


async def trailing_markers(log: Log) -> None:
    """Ends with the markers of aborted transactions, whose records are there and must not be seen."""
    await written(log, 10, 20, 60)
    for _ in range(4):
        writer = log.producer()
        await writer.start()
        await log.leave_open(writer)
        await writer.stop()
    await (last := log.producer()).start()
    await last.stop()


async def compacted(log: Log) -> None:
    """Small segments, every key written over and over: compaction has removed the first records."""
    await written(log, 30, 120, 1_000, keys=60)
    until_s = asyncio.get_running_loop().time() + 90
    while await first_offset(log) == 0:
        assert asyncio.get_running_loop().time() < until_s, "the broker has compacted nothing"
        await written(log, 1, 5, 20, keys=60)  # a segment rolls when something is appended
        await asyncio.sleep(1)


async def first_offset(log: Log) -> int:
    """Offset of the first record that is still there."""
    reader = LogReader(log.names.changelog, log.client)
    await reader.open()
    try:
        async for records in reader.batches(reader.begin, records_max=1):
            return int(records[0].offset)
        return 0
    finally:
        await reader.close()


async def nothing(log: Log) -> None:
    """A changelog that was never written."""


async def an_open_transaction(log: Log) -> None:
    await written(log, 5, 20, 60)


@dataclass
class Starts:
    """The starts of one shape: how many began, on state that was whole or not, and how many refused to."""

    log: Log
    folder: Path
    whole: int = 0
    incomplete: int = 0
    refused: list[str] = field(default_factory=list)

    # The host of the partitions, by hand.

    def new_state(self) -> PartitionState:
        return PartitionState(TriggerPolicy(), StateLimits())

    def open_store(self, path: Path) -> PartitionStore:
        return PartitionStore.open(path, cache=Cache(1 << 20))

    async def published_since(self, partition: int, offset: int) -> Published:
        return Published([], np.zeros(0, np.int64), 0)

    def on_ready(self, owned: OwnedPartition) -> None:
        held = {key: value for prefix in (b"c", b"u", b"m") for key, value in owned.store._scan(prefix)}
        if held == self.log.truth and owned.next_offset == self.log.offset:
            self.whole += 1
        else:
            self.incomplete += 1

    async def on_giving_back(self, owned: Collection[OwnedPartition]) -> None:
        """Nothing is in flight."""

    def abort(self, reason: str) -> None:
        self.refused.append(reason)

    async def start(self, consumer: aiokafka.AIOKafkaConsumer, number: int) -> None:
        """One start on an empty disk, given back at once."""
        names = self.log.names
        config = PartitionsConfig(
            app_id=names.group_id,
            source_topic=names.source.topic,
            changelog_topic=names.changelog.topic,
            client=self.log.client,
            data_dir=self.folder / str(number),
            checkpoint_interval_ms=1_000,
            transaction_timeout_ms=30_000,
            session_timeout_ms=10_000,
        )
        partitions = Partitions(config, self, Metrics())  # type: ignore[arg-type]
        partitions.app = App(consumer)
        try:
            await asyncio.wait_for(partitions._acquire_or_abort(0, 1), START_S)
        except TimeoutError:
            self.refused.append("the restore found no end")
        await partitions._close(list(partitions.ready.values()))
        PartitionStore.destroy(config.data_dir)


class App:
    """What a partition asks of Faust, by hand, over a real consumer."""

    consumer_generation_id = 1

    def __init__(self, consumer: aiokafka.AIOKafkaConsumer) -> None:
        self._consumer = consumer
        self.consumer = self._thread = self

    def _ensure_consumer(self) -> aiokafka.AIOKafkaConsumer:
        return self._consumer

    async def call_thread(self, method: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        return await method(*args)

    async def earliest_offsets(self, tp: TP) -> dict[TP, int]:
        return {tp: 0}

    async def seek_wait(self, offsets: Mapping[TP, int]) -> None:
        """Nothing is read from the source here."""

    def epoch(self, tp: TP) -> int:
        return 1

    def resume_partitions(self, tps: Collection[TP]) -> None:
        """Nothing is read from the source here."""


Shape = Callable[[Log], Awaitable[None]]
SHAPES: list[Shape] = [few_large_values, many_small_ones, trailing_markers, compacted, nothing, an_open_transaction]


@pytest.fixture
def log(broker: Any, topic_prefix: str) -> Log:
    source, changelog = f"{topic_prefix}-source", f"{topic_prefix}-changelog"
    small = {"cleanup.policy": "compact", "segment.bytes": str(1 << 20), "segment.ms": "500"}
    quick = {"min.cleanable.dirty.ratio": "0.01", "delete.retention.ms": "0"}
    admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    admin.create_topics([NewTopic(source, 1, 1), NewTopic(changelog, 1, 1, topic_configs={**small, **quick})])
    admin.close()
    print(f"seed {SEED}")
    names = ChangelogNames(topic_prefix, TopicPartition(source, 0), TopicPartition(changelog, 0))
    return Log(names, {"bootstrap_servers": broker.bootstrap_servers}, random.Random(SEED))


async def started(log: Log, folder: Path, count: int, before: Callable[[int], Awaitable[None]]) -> Starts:
    """So many starts, each preceded by `before`."""
    starts = Starts(log, folder)
    consumer = aiokafka.AIOKafkaConsumer(
        bootstrap_servers=log.client["bootstrap_servers"], group_id=log.names.group_id, enable_auto_commit=False
    )
    async with consumer:
        consumer.assign([log.names.source])
        for number in range(count):
            await before(number)
            await starts.start(consumer, number)
    return starts


async def quiet(number: int) -> None:
    """No predecessor is at work."""


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_every_cold_start_begins_on_whole_state(log: Log, tmp_path: Path, shape: Shape) -> None:
    """Whatever the changelog looks like, each of many starts restores exactly what was committed, and none refuses."""

    async def scenario() -> Starts:
        await shape(log)

        async def predecessor(number: int) -> None:
            if shape is an_open_transaction:
                writer = log.producer()
                await writer.start()
                await log.checkpoint(writer, log.records(10, 60))
                await log.leave_open(writer)  # and is never heard of again

        return await started(log, tmp_path, STARTS, predecessor)

    starts = asyncio.run(scenario())
    assert (starts.whole, starts.incomplete, starts.refused) == (STARTS, 0, [])


async def racing(log: Log, folder: Path, count: int) -> Starts:
    """Starts while a predecessor goes on with checkpoints until it finds itself fenced."""
    tasks: list[asyncio.Task[None]] = []

    async def predecessor(number: int) -> None:
        writer = log.producer()
        await writer.start()
        await log.checkpoint(writer, log.records(10, 60))
        tasks.append(asyncio.create_task(until_fenced(log, writer)))

    starts = await started(log, folder, count, predecessor)
    for task in tasks:
        await task
    return starts


async def until_fenced(log: Log, writer: ChangelogProducer) -> None:
    try:
        while True:
            await log.checkpoint(writer, log.records(10, 60))
    except Fenced:
        await writer.stop()


def test_a_predecessor_at_work_is_shut_out_before_the_end_is_read(log: Log, tmp_path: Path) -> None:
    """A predecessor that commits until it is fenced changes nothing behind the end that a start restores to."""
    starts = asyncio.run(racing(log, tmp_path, STARTS))
    assert (starts.whole, starts.incomplete, starts.refused) == (STARTS, 0, [])


# The count must be able to fail: the end test broken on purpose, one way at a time.


def ends_at_a_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends at the first fetch that brings nothing, as a recovery that starts before its consumer does."""

    async def batches(self: LogReader, start: int, *, records_max: int) -> Any:
        self._consumer.seek(self._tp, start)
        while records := (await self._consumer.getmany(self._tp, timeout_ms=0, max_records=records_max)).get(self._tp):
            yield records

    monkeypatch.setattr(LogReader, "batches", batches)


def ends_at_the_last_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends when a record has the last offset of the log, which a transaction marker has."""
    monkeypatch.setattr("tests.integration.test_cold_starts.START_S", 1.5)

    async def batches(self: LogReader, start: int, *, records_max: int) -> Any:
        self._consumer.seek(self._tp, start)
        last = start - 1
        while last + 1 < self.end:
            fetched = await self._consumer.getmany(self._tp, timeout_ms=200, max_records=records_max)
            for records in fetched.values():
                yield records
                last = records[-1].offset

    monkeypatch.setattr(LogReader, "batches", batches)


def end_read_before_fencing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores up to an end that was read while the predecessor could still commit."""
    stock, before = LogReader.open, {}
    start = ChangelogProducer.start

    async def read_then_fence(self: ChangelogProducer) -> None:
        reader = LogReader(self._names.changelog, {"bootstrap_servers": self._producer.client._bootstrap_servers})
        await stock(reader)
        before[self._names.changelog] = reader.end
        await reader.close()
        await start(self)

    async def old_end(self: LogReader) -> None:
        await stock(self)
        self.end = before.get(self._tp, self.end)

    monkeypatch.setattr(ChangelogProducer, "start", read_then_fence)
    monkeypatch.setattr(LogReader, "open", old_end)


@pytest.mark.parametrize(
    "broken", [ends_at_a_silence, ends_at_the_last_record, end_read_before_fencing], ids=lambda way: way.__name__
)
def test_a_broken_end_test_does_not_pass_the_count(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """With the end test broken some starts are refused by the mark, and without that proof too they begin on holes."""

    async def scenario() -> tuple[Starts, Starts]:
        await many_small_ones(log)
        broken(monkeypatch)
        guarded = await racing(log, tmp_path / "guarded", 5)
        monkeypatch.setattr(Partitions, "_prove", lambda self, number, store, committed: store.mark())
        return guarded, await racing(log, tmp_path / "unguarded", 5)

    guarded, unguarded = asyncio.run(scenario())
    print(guarded, unguarded)
    assert guarded.refused
    assert guarded.incomplete == 0
    assert unguarded.incomplete or "no end" in "".join(unguarded.refused)


@pytest.mark.parametrize("rest", ["empty", "old"])
def test_a_changelog_that_lost_its_records_is_refused(log: Log, tmp_path: Path, rest: str) -> None:
    """With an offset committed, a changelog that is empty or ends before it lets no start begin."""

    async def scenario() -> Starts:
        if rest == "old":
            await written(log, 3, 10, 50)
        writer = log.producer()
        await writer.start()
        await writer.begin()
        await writer.send_source_offset(log.offset + 10)
        await writer.commit()
        await writer.stop()
        return await started(log, tmp_path, 2, quiet)

    starts = asyncio.run(scenario())
    assert (starts.whole, starts.incomplete, len(starts.refused)) == (0, 0, 2)
    assert "has lost records" in starts.refused[0]


def test_a_changelog_cut_at_the_head_is_refused(log: Log, tmp_path: Path) -> None:
    """Records deleted from the head are lost users, though the last mark is there: no cold start begins on the rest."""

    async def scenario() -> Starts:
        await written(log, 5, 20, 50)
        admin = KafkaAdminClient(bootstrap_servers=log.client["bootstrap_servers"])
        changelog = log.names.changelog
        config = {"cleanup.policy": "compact,delete"}
        admin.alter_configs([ConfigResource("TOPIC", changelog.topic, config)])
        admin.delete_records({changelog: 40})
        admin.close()
        return await started(log, tmp_path, 2, quiet)

    starts = asyncio.run(scenario())
    assert (starts.whole, starts.incomplete, len(starts.refused)) == (0, 0, 2)
