"""Starts never begin on incomplete state: counted over six shapes of changelog and seven kinds of disk.

The same count fails when the end of the restore is broken on purpose, one way at a time: those are the last tests.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import kafka
import pytest
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from streams.engine import checkpoints, partitions
from streams.engine.changelog import ChangelogNames, ChangelogProducer, Fenced, LogReader
from streams.engine.partitions import Partitions
from streams.engine.proof import Proven
from streams.errors import RebuildsPartition
from streams.storage.codec import MARK_KEY, CheckpointMark, CorruptValue
from streams.storage.store import PartitionStore, StoreDamaged
from tests.integration.changelogs import (
    CHECKPOINT_RECORDS,
    CONFIGS,
    SHAPES,
    Log,
    Shape,
    an_open_transaction,
    another_checkpoint,
    left_open,
    many_small_ones,
    written,
)
from tests.integration.cold_starts import (
    Disk,
    Starts,
    alone,
    altered,
    kept,
    of_another_log,
    old,
    started,
    truncated,
    without_manifest,
)

pytestmark = [pytest.mark.broker, pytest.mark.slow]
SEED = 31
STARTS = 50
"""Number of starts per shape; with six shapes, 300 in all."""
STARTS_PER_DISK = 12
RACES = 20
"""Number of starts beside a predecessor that is still writing."""
COMMIT_S = 10
"""Time within which a predecessor that is still writing and not fenced commits once more."""
BROKEN_STARTS = 3
Patch = pytest.MonkeyPatch


@pytest.fixture
def log(broker: Any, topic_prefix: str) -> Log:
    """Return an empty changelog."""
    print(f"seed {SEED}")
    return Log.create(broker.bootstrap_servers, topic_prefix, SEED)


def test_every_cold_start_begins_on_whole_state(broker: Any, topic_prefix: str, tmp_path: Path) -> None:
    """Each start, 300 in all over every shape of changelog, restores exactly what was committed."""

    async def of_shape(shape: Shape) -> tuple[str, tuple[int, int, int]]:
        name = shape.__name__
        log = Log.create(broker.bootstrap_servers, f"{topic_prefix}-{name}", SEED)
        await shape(log)
        predecessor = left_open if shape is an_open_transaction else alone
        return name, (await started(Starts(log, tmp_path / name), STARTS, predecessor)).count

    async def scenario() -> dict[str, tuple[int, int, int]]:
        return dict(await asyncio.gather(*map(of_shape, SHAPES)))

    print(f"seed {SEED}")
    counts = asyncio.run(scenario())
    assert counts == {shape.__name__: (STARTS, 0, 0) for shape in SHAPES}


@pytest.mark.parametrize("disk", [kept, old], ids=lambda disk: disk.__name__)
def test_every_warm_start_reads_only_what_its_disk_lacks(log: Log, tmp_path: Path, disk: Disk) -> None:
    """A database that another worker has overtaken is brought to the whole state by the records it lacks, and no more.

    Compaction may remove some of several checkpoints, but none of the newest.
    """

    async def scenario() -> Starts:
        await many_small_ones(log)
        return await started(Starts(log, tmp_path, disk=disk), STARTS_PER_DISK, another_checkpoint)

    starts = asyncio.run(scenario())
    assert starts.count == (STARTS_PER_DISK, 0, 0), starts.rejected
    cold, *warm = starts.restored
    assert cold >= starts.held[0]
    for number, records in enumerate(warm, 1):
        lacking = CHECKPOINT_RECORDS * (1 if disk is kept else number)
        assert CHECKPOINT_RECORDS <= records <= lacking < starts.held[number]


@pytest.mark.parametrize("disk", [altered, truncated, without_manifest, of_another_log], ids=lambda disk: disk.__name__)
def test_every_start_on_a_damaged_disk_rebuilds_it(log: Log, tmp_path: Path, disk: Disk) -> None:
    """A database that cannot be read, or is not of this log, is deleted, and the whole changelog is read again."""

    async def scenario() -> Starts:
        await many_small_ones(log)
        return await started(Starts(log, tmp_path, disk=disk), STARTS_PER_DISK, another_checkpoint)

    starts = asyncio.run(scenario())
    assert starts.count == (STARTS_PER_DISK, 0, 0), starts.rejected
    assert all(read >= held > 0 for read, held in zip(starts.restored, starts.held, strict=True))


def recreated(log: Log) -> None:
    """Delete the changelog and create it again, empty, under its name; the group's offsets are deleted, too."""
    admin = kafka.KafkaAdminClient(bootstrap_servers=log.client["bootstrap_servers"])
    changelog, source = log.names.changelog, log.names.source
    admin.delete_topics([changelog.topic])
    while changelog.topic in admin.list_topics():
        time.sleep(0.1)
    topic = {"num_partitions": 1, "replication_factor": 1, "configs": CONFIGS}
    admin.create_topics({changelog.topic: topic}, wait_for_metadata=True)
    admin.delete_group_offsets(log.names.group_id, [kafka.TopicPartition(*source)])
    admin.close()
    log.truth.clear()
    log.offset = 0


@pytest.mark.parametrize("named", [True, False], ids=["names its log", "of an earlier version"])
def test_a_disk_of_a_former_changelog_is_not_spliced(log: Log, tmp_path: Path, named: bool, monkeypatch: Patch) -> None:
    """After the changelog was created again and has grown past the old disk's offset, nothing of that disk is used."""

    async def scenario() -> Starts:
        starts = Starts(log, tmp_path, disk=kept)
        if not named:
            monkeypatch.setattr(PartitionStore, "claim", lambda self, log_id: None)
        await written(log, 2, 10, 50)
        await started(starts, 1)
        monkeypatch.undo()
        recreated(log)
        await written(log, 5, 10, 50)
        return await started(starts, 1)

    starts = asyncio.run(scenario())
    assert starts.count == (2, 0, 0), starts.rejected
    assert starts.restored[1] >= starts.held[1]
    assert all(starts.log_ids) or not named


def test_a_disk_of_an_earlier_version_is_taken_over(log: Log, tmp_path: Path, monkeypatch: Patch) -> None:
    """A database that names no log, but whose last record the changelog has, is kept: only the tail is read."""

    async def scenario() -> Starts:
        starts = Starts(log, tmp_path, disk=kept)
        monkeypatch.setattr(PartitionStore, "claim", lambda self, log_id: None)
        await many_small_ones(log)
        await started(starts, 1)
        monkeypatch.undo()
        await another_checkpoint(log)
        return await started(starts, 1)

    starts = asyncio.run(scenario())
    assert starts.count == (2, 0, 0), starts.rejected
    assert starts.restored[1] < starts.held[1]


def test_a_predecessor_at_work_is_shut_out_before_the_end_is_read(log: Log, tmp_path: Path) -> None:
    """A predecessor that commits until it is fenced changes nothing after the end that a start restores to."""
    starts = asyncio.run(racing(Starts(log, tmp_path), RACES))
    assert starts.count == (RACES, 0, 0), starts.rejected


async def racing(starts: Starts, count: int) -> Starts:
    """Make starts while a predecessor writes checkpoints until it finds itself fenced, or the starts are over."""
    tasks: list[asyncio.Task[None]] = []
    over = asyncio.Event()

    async def predecessor(log: Log) -> None:
        writer = log.producer()
        await writer.start()
        await log.checkpoint(writer, log.records(10, 60))
        tasks.append(asyncio.create_task(until_fenced(log, writer, over)))

    await started(starts, count, predecessor)
    over.set()
    await asyncio.gather(*tasks)
    return starts


async def committed_once_more(reader: LogReader) -> None:
    """Wait until the log has grown beyond the end that was read; raise TimeoutError when it does not."""
    async with asyncio.timeout(COMMIT_S):
        while (await reader._consumer.end_offsets([reader.tp]))[reader.tp] == reader.end:
            await asyncio.sleep(0.01)


async def until_fenced(log: Log, writer: ChangelogProducer, over: asyncio.Event) -> None:
    """Write checkpoints until fenced or told to stop."""
    try:
        while not over.is_set():
            await log.checkpoint(writer, log.records(10, 60))
    except (Fenced, KafkaError) as end:
        print(f"the predecessor ended with {end!r}")
    await writer.stop()


@pytest.mark.parametrize("rest", ["empty", "old"])
def test_a_changelog_that_lost_its_last_records_is_rejected(log: Log, tmp_path: Path, rest: str) -> None:
    """No start begins if an offset is committed and the changelog is empty, or ends before that offset."""

    async def scenario() -> Starts:
        await written(log, 3 if rest == "old" else 0, 10, 50)
        writer = log.producer()
        await writer.start()
        await writer.begin()
        await writer.send_source_offset(log.offset + 10)
        await writer.commit()
        await writer.stop()
        return await started(Starts(log, tmp_path), 2)

    starts = asyncio.run(scenario())
    assert starts.count == (0, 0, 2)
    assert "has lost records" in starts.rejected[0]


def test_a_changelog_cut_at_its_head_is_rejected(log: Log, tmp_path: Path) -> None:
    """No cold start begins if records at the head were deleted, and users with them, although the last mark exists."""
    cut = 40

    async def scenario() -> Starts:
        await written(log, 5, 20, 50)
        delete_records(log, cut)
        return await started(Starts(log, tmp_path), 2)

    starts = asyncio.run(scenario())
    assert starts.count == (0, 0, 2)
    assert f"begins at offset {cut}" in starts.rejected[0]


@pytest.mark.parametrize("damage", [StoreDamaged("an unreadable block"), CorruptValue(MARK_KEY, "a wrong checksum")])
def test_damage_met_while_acquiring_is_rebuilt(
    log: Log, tmp_path: Path, monkeypatch: Patch, damage: RebuildsPartition
) -> None:
    """A database that opens but cannot be read is deleted and restored again by the same start."""
    mark, damaged = PartitionStore.mark, []

    def damaged_once(self: PartitionStore) -> Any:
        if not damaged:
            damaged.append(self)
            raise damage
        return mark(self)

    async def scenario() -> Starts:
        await written(log, 3, 10, 50)
        monkeypatch.setattr(PartitionStore, "mark", damaged_once)
        return await started(Starts(log, tmp_path), 1)

    assert asyncio.run(scenario()).count == (1, 0, 0)
    assert damaged


def delete_records(log: Log, before: int) -> None:
    """Delete records as an operator's kafka-delete-records does; a compacted topic has to allow it first."""
    admin = kafka.KafkaAdminClient(bootstrap_servers=log.client["bootstrap_servers"])
    changelog = log.names.changelog
    resource = kafka.admin.ConfigResource(
        kafka.admin.ConfigResourceType.TOPIC, changelog.topic, {"cleanup.policy": "compact,delete"}
    )
    admin.alter_configs([resource])
    admin.delete_records({kafka.TopicPartition(*changelog): before})
    admin.close()


# The count must be able to fail. Each fault alone, with the proof by the mark in place and without it.


def ends_at_a_silence(patch: Patch) -> None:
    """End at the first fetch that returns nothing, like a recovery that looks before its consumer has fetched."""

    async def batches(self: LogReader, start: int, *, records_max: int) -> AsyncIterator[list[Any]]:
        self._consumer.seek(self.tp, start)
        while records := (await self._consumer.getmany(self.tp, timeout_ms=0, max_records=records_max)).get(self.tp):
            yield records

    patch.setattr(LogReader, "batches", batches)


def ends_at_the_last_record_seen(patch: Patch) -> None:
    """End when a record with the last offset was seen; that offset belongs to a marker, so this never ends."""

    async def batches(self: LogReader, start: int, *, records_max: int) -> AsyncIterator[list[Any]]:
        self._consumer.seek(self.tp, start)
        last = start - 1
        while last + 1 < self.end:
            for records in (await self._consumer.getmany(self.tp, timeout_ms=200, max_records=records_max)).values():
                yield records
                last = records[-1].offset

    patch.setattr(LogReader, "batches", batches)


def end_read_before_fencing(patch: Patch) -> None:
    """Restore up to an end that was read while the predecessor could still commit."""
    ends: dict[TopicPartition, int] = {}
    open_, batches = LogReader.open, LogReader.batches

    async def read_then_fence(self: ChangelogProducer) -> None:
        reader = LogReader(self._names.changelog, {"bootstrap_servers": self._producer.client._bootstrap_servers})
        await open_(reader)
        ends[reader.tp] = reader.end
        await committed_once_more(reader)
        await reader.close()
        await ChangelogProducer.start(self)

    async def old_end(self: LogReader) -> None:
        await open_(self)
        self.end = ends.get(self.tp, self.end)

    async def up_to_there(self: LogReader, start: int, *, records_max: int) -> AsyncIterator[list[Any]]:
        async for records in batches(self, start, records_max=records_max):
            if before := [record for record in records if record.offset < self.end]:
                yield before

    successor = type("Successor", (ChangelogProducer,), {"start": read_then_fence})
    patch.setattr(checkpoints, "ChangelogProducer", successor)
    patch.setattr(LogReader, "open", old_end)
    patch.setattr(LogReader, "batches", up_to_there)


Fault = Callable[[Patch], None]


async def unproved_start(self: Partitions, source: Any, store: PartitionStore, *unused: Any) -> Proven:
    """Continue at the mark that was restored, without a proof."""
    return Proven(store.mark() or CheckpointMark(0, 0))


@pytest.mark.parametrize(
    "fault",
    [ends_at_a_silence, ends_at_the_last_record_seen, end_read_before_fencing],
    ids=lambda fault: fault.__name__,
)
def test_a_broken_end_fails_the_count(log: Log, tmp_path: Path, monkeypatch: Patch, fault: Fault) -> None:
    """A restore with a broken end is rejected by the mark; without that check it is counted as incomplete."""

    async def scenario() -> tuple[Starts, Starts]:
        await many_small_ones(log)
        fault(monkeypatch)
        proved = await racing(Starts(log, tmp_path, start_s=1.5), BROKEN_STARTS)
        monkeypatch.setattr(Partitions, "_prove", unproved_start)
        return proved, await racing(Starts(log, tmp_path, start_s=1.5), BROKEN_STARTS)

    proved, unproved = asyncio.run(scenario())
    print(proved.count, unproved.count)
    assert proved.rejected
    assert proved.incomplete == 0
    assert unproved.incomplete or "the restore found no end" in unproved.rejected


def test_without_fencing_the_count_fails(log: Log, tmp_path: Path, monkeypatch: Patch) -> None:
    """A predecessor that nothing fences commits records after the end that a start restores to."""
    unique = property(lambda self: f"{self.changelog.topic}-{uuid.uuid4()}")
    monkeypatch.setattr(ChangelogNames, "transactional_id", unique)
    restore = partitions.restore

    async def restore_slowly(*args: Any, **kwargs: Any) -> PartitionStore:
        store = await restore(*args, **kwargs)
        reader = LogReader(log.names.changelog, log.client)
        await reader.open()
        await committed_once_more(reader)
        await reader.close()
        return store

    monkeypatch.setattr(partitions, "restore", restore_slowly)
    starts = asyncio.run(racing(Starts(log, tmp_path), BROKEN_STARTS))
    assert starts.incomplete
