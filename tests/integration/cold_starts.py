"""Starts of a partition on a real broker, as the worker makes them, each compared with what was committed.

`Partitions` is the worker's own: it fences, reads the committed offset, restores onto the given disk and checks the
restored mark. Only Faust, which provides no more than the consumer here, is replaced by hand.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiokafka
from faust.types import TP
from rocksdict import Cache

from infra.chaos.faults.disk import alter_data_files
from streams.core.layout import StateLimits
from streams.core.partition_state import PartitionState
from streams.core.triggers import TriggerPolicy
from streams.engine.compat import install_overrides
from streams.engine.own_records import Published
from streams.engine.ownership import OwnedPartition
from streams.engine.partition_host import PartitionsConfig
from streams.engine.partitions import Partitions
from streams.storage.codec import CheckpointMark
from streams.storage.store import PartitionStore
from streams.telemetry.metrics import Metrics
from tests.integration.changelogs import Log

Predecessor = Callable[[Log], Awaitable[None]]
Disk = Callable[["Starts"], None]
"""Prepares the disk for the next start."""
BEYOND_EVERY_LOG = 1 << 40


def empty(starts: Starts) -> None:
    """Delete the local database."""
    PartitionStore.destroy(starts.database)


def kept(starts: Starts) -> None:
    """Keep the local database as the last start closed it."""


def old(starts: Starts) -> None:
    """Bring back the local database as the first start closed it."""
    copy = starts.folder / "copy"
    if copy.exists():
        PartitionStore.destroy(starts.database)
        shutil.copytree(copy, starts.database)
    elif starts.database.exists():
        shutil.copytree(starts.database, copy)


def altered(starts: Starts) -> None:
    """Invert bytes in every data file: the database opens and cannot be read."""
    alter_data_files(starts.folder)


def truncated(starts: Starts) -> None:
    """Cut the largest data file to half its size."""
    files = sorted(starts.database.glob("*.sst"), key=lambda file: file.stat().st_size)
    for file in files[-1:]:
        os.truncate(file, file.stat().st_size // 2)


def without_manifest(starts: Starts) -> None:
    """Delete the list of data files."""
    for file in starts.database.glob("MANIFEST-*"):
        file.unlink()


def of_another_log(starts: Starts) -> None:
    """Let the local database claim records beyond the log's end, as after the topic was created again."""
    if starts.database.exists():
        store = PartitionStore.open(starts.database)
        store.write([(b"cforeign", b"foreign")], BEYOND_EVERY_LOG)
        store.close()


@dataclass
class Starts:
    """Counts starts by outcome: on the whole state, on anything else, or rejected; it is the partitions' host."""

    log: Log
    folder: Path
    start_s: float = 20.0
    """Bound for one start; a restore that takes longer has found no end."""
    disk: Disk = empty
    whole: int = 0
    incomplete: int = 0
    rejected: list[str] = field(default_factory=list)
    restored: list[int] = field(default_factory=list)
    """Changelog records that each start read."""
    held: list[int] = field(default_factory=list)
    """Records of the whole state at each start."""
    log_ids: set[str] = field(default_factory=set)
    """Identities of the changelog in the local databases."""

    @property
    def count(self) -> tuple[int, int, int]:
        """Starts that were whole, incomplete, and rejected."""
        return self.whole, self.incomplete, len(self.rejected)

    @property
    def database(self) -> Path:
        """Folder of the local database."""
        changelog = self.log.names.changelog
        return self.folder / f"{changelog.topic}-{changelog.partition}"

    async def start(self, consumer: aiokafka.AIOKafkaConsumer) -> None:
        """Acquire the partition on the prepared disk, and give it back at once."""
        metrics = Metrics()
        partitions = Partitions(self._config(), self, metrics)  # type: ignore[arg-type]
        partitions.app, partitions.assigned = App(consumer), frozenset({0})
        self.disk(self)
        try:
            await asyncio.wait_for(partitions._acquire_until_ready(0, App.consumer_generation_id), self.start_s)
        except TimeoutError:
            self.rejected.append("the restore found no end")
        await partitions._close(list(partitions.ready.values()))
        self.restored.append(int(metrics.restored_records.value()))
        self.held.append(len(self.log.truth))

    def _config(self) -> PartitionsConfig:
        names = self.log.names
        return PartitionsConfig(
            app_id=names.group_id,
            source_topic=names.source.topic,
            changelog_topic=names.changelog.topic,
            client=self.log.client,
            data_dir=self.folder,
            checkpoint_interval_ms=1_000,
            transaction_timeout_ms=30_000,
            session_timeout_ms=10_000,
        )

    def new_state(self) -> PartitionState:
        """Return an empty state; nothing is applied to it."""
        return PartitionState(TriggerPolicy(), StateLimits(hot_users_max=16))

    def open_store(self, path: Path) -> PartitionStore:
        """Open the local database."""
        return PartitionStore.open(path, cache=Cache(1 << 20))

    def destroy_store(self, path: Path) -> None:
        """Delete the local database."""
        PartitionStore.destroy(path)

    def published_since(self, partition: int, mark: CheckpointMark) -> list[AsyncGenerator[Published] | None]:
        """Return nothing that was published."""
        return [None, None]

    def on_ready(self, owned: OwnedPartition) -> None:
        """Compare everything in the local database with what was committed."""
        held = {key: value for prefix in (b"c", b"u", b"m") for key, value in owned.store._scan(prefix)}
        self.log_ids.add(owned.store.log_id)
        if held == self.log.truth and owned.next_offset == self.log.offset:
            self.whole += 1
        else:
            self.incomplete += 1

    async def on_revoking(self, owned: Collection[OwnedPartition]) -> None:
        """Do nothing: no work is in flight."""

    def on_lost(self, owned: OwnedPartition) -> None:
        """Do nothing: no work is in flight."""

    def abort(self, reason: str) -> None:
        """Record why the worker would have ended."""
        self.rejected.append(reason)


class App:
    """The part of Faust that acquiring a partition uses, written by hand over a real consumer."""

    consumer_generation_id = 1

    def __init__(self, consumer: aiokafka.AIOKafkaConsumer) -> None:
        self._consumer = consumer
        self.consumer = self._thread = self

    def _ensure_consumer(self) -> aiokafka.AIOKafkaConsumer:
        return self._consumer

    async def call_thread(self, method: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Call the consumer's method directly; there is no second thread."""
        return await method(*args)

    async def earliest_offsets(self, tp: TP) -> dict[TP, int]:
        """Return 0 for the one partition."""
        return {tp: 0}

    async def highwaters(self, tp: TP) -> dict[TP, int]:
        """Return an end beyond every mark: the source topic is not read."""
        return {tp: BEYOND_EVERY_LOG}

    async def seek_wait(self, offsets: Mapping[TP, int]) -> None:
        """Do nothing: the source topic is not read."""

    def epoch(self, tp: TP) -> int:
        """Return the epoch after one seek."""
        return 1

    def resume_partitions(self, tps: Collection[TP]) -> None:
        """Do nothing: the source topic is not read."""


async def alone(log: Log) -> None:
    """No predecessor is at work."""


async def started(starts: Starts, count: int, predecessor: Predecessor = alone) -> Starts:
    """Make `count` starts, each after the predecessor's work."""
    install_overrides()
    names, client = starts.log.names, starts.log.client
    async with aiokafka.AIOKafkaConsumer(**client, group_id=names.group_id, enable_auto_commit=False) as consumer:
        consumer.assign([names.source])
        for _ in range(count):
            await predecessor(starts.log)
            await starts.start(consumer)
    return starts
