"""Changelogs of every shape, written by the worker's own producer, each with a record of what was committed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import kafka
from aiokafka.structs import TopicPartition

from streams.engine.changelog import ChangelogNames, ChangelogProducer, LogReader
from streams.storage.codec import CheckpointMark, encode_mark
from streams.storage.store import Record

COMPACT_S = 90
CONFIGS = {
    "cleanup.policy": "compact",
    "segment.bytes": str(1 << 20),
    "segment.ms": "100",
    "min.cleanable.dirty.ratio": "0.01",
    "delete.retention.ms": "0",
}
Shape = Callable[["Log"], Awaitable[None]]


@dataclass
class Log:
    """A changelog partition as its writers leave it, and the state that was committed to it."""

    names: ChangelogNames
    client: Mapping[str, Any]
    random: random.Random
    truth: dict[bytes, bytes] = field(default_factory=dict)
    offset: int = 0
    """Committed offset of the source partition."""

    @classmethod
    def create(cls, bootstrap_servers: str, name: str, seed: int) -> Log:
        """Create a topic of one partition, and another as its source."""
        source, changelog = TopicPartition(f"{name}-source", 0), TopicPartition(f"{name}-changelog", 0)
        admin = kafka.KafkaAdminClient(bootstrap_servers=bootstrap_servers)
        topic = {"num_partitions": 1, "replication_factor": 1}
        admin.create_topics(
            {source.topic: topic, changelog.topic: {**topic, "configs": CONFIGS}}, wait_for_metadata=True
        )
        admin.close()
        names = ChangelogNames(name, source, changelog)
        return cls(names, {"bootstrap_servers": bootstrap_servers}, random.Random(seed))

    def producer(self) -> ChangelogProducer:
        """Return a producer of this partition that is not started."""
        return ChangelogProducer(self.names, self.client, transaction_timeout_ms=30_000)

    def records(self, count: int, size: int, keys: int = 1 << 30) -> list[Record]:
        """Return `count` records over `keys` keys: random values of `size` bytes, and one in twenty a tombstone."""
        return [
            (
                b"c%d" % self.random.randrange(keys),
                None if self.random.random() < 0.05 else self.random.randbytes(size),
            )
            for _ in range(count)
        ]

    async def checkpoint(self, writer: ChangelogProducer, records: list[Record]) -> None:
        """Commit a checkpoint, and update the expected state after the commit."""
        offset = self.offset + 10
        marked = [*records, encode_mark(CheckpointMark(offset, 0))]
        await writer.begin()
        await writer.append(marked)
        await writer.send_source_offset(offset)
        await writer.commit()
        self.offset = offset
        for key, value in marked:
            if value is None:
                self.truth.pop(key, None)
            else:
                self.truth[key] = value

    async def leave_open(self, writer: ChangelogProducer) -> None:
        """Begin a checkpoint and end before its commit; the successor's start aborts it."""
        await writer.begin()
        await writer.append([*self.records(20, 50), encode_mark(CheckpointMark(self.offset + 10, 0))])


async def written(log: Log, checkpoints: int, count: int, size: int, keys: int = 1 << 30) -> None:
    """Commit a number of checkpoints with `count` records each."""
    writer = log.producer()
    await writer.start()
    for _ in range(checkpoints):
        await log.checkpoint(writer, log.records(count, size, keys))
    await writer.stop()


async def compacted(log: Log) -> None:
    """Write few keys again and again into small segments, until compaction has removed the first records."""
    await written(log, 30, 120, 1_000, keys=60)
    until_s = asyncio.get_running_loop().time() + COMPACT_S
    while await first_offset(log) == 0:
        assert asyncio.get_running_loop().time() < until_s, "the broker has compacted nothing"
        await written(log, 1, 5, 20, keys=60)  # a segment rolls when something is appended
        await asyncio.sleep(0.5)


async def first_offset(log: Log) -> int:
    """Return the offset of the first record that still exists."""
    reader = LogReader(log.names.changelog, log.client)
    await reader.open()
    try:
        async for records in reader.batches(reader.begin, records_max=1):
            return int(records[0].offset)
        return 0
    finally:
        await reader.close()


async def few_large_values(log: Log) -> None:
    """Write two checkpoints of large values."""
    await written(log, 2, 8, 100_000)


async def many_small_ones(log: Log) -> None:
    """Write many small checkpoints."""
    await written(log, 120, 25, 40)


async def trailing_markers(log: Log) -> None:
    """End the log with markers: of a commit, then of aborted transactions, whose records must stay invisible."""
    await written(log, 10, 20, 60)
    for _ in range(4):
        writer = log.producer()
        await writer.start()
        await log.leave_open(writer)
        await writer.stop()
    await (last := log.producer()).start()
    await last.stop()


async def nothing(log: Log) -> None:
    """Leave the changelog empty."""


async def an_open_transaction(log: Log) -> None:
    """Write some checkpoints; each start finds one more committed and another left open."""
    await written(log, 5, 20, 60)


async def left_open(log: Log) -> None:
    """Commit a checkpoint, begin another one, and vanish."""
    writer = log.producer()
    await writer.start()
    await log.checkpoint(writer, log.records(10, 60))
    await log.leave_open(writer)
    await writer._producer.client.close()


CHECKPOINT_RECORDS = 11


async def another_checkpoint(log: Log) -> None:
    """Commit ten records and a mark, and stop in order."""
    await written(log, 1, CHECKPOINT_RECORDS - 1, 60)


SHAPES: tuple[Shape, ...] = (
    few_large_values,
    many_small_ones,
    trailing_markers,
    nothing,
    an_open_transaction,
    compacted,
)
