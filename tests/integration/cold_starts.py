"""Starts of a partition as the worker makes them, on a real broker, counted against the truth.

`Partitions` is the worker's own: it fences, reads the committed offset, restores onto an empty disk and proves by the
mark. Faust, which only hands over the consumer here, is stood in for by hand.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiokafka
import numpy as np
from faust.types import TP
from rocksdict import Cache

from streams.core.layout import StateLimits
from streams.core.partition_state import PartitionState
from streams.core.policy import TriggerPolicy
from streams.engine.outputs import Published
from streams.engine.ownership import OwnedPartition
from streams.engine.partitions import Partitions, PartitionsConfig
from streams.storage.store import PartitionStore
from streams.telemetry.metrics import Metrics
from tests.integration.changelogs import Log

Predecessor = Callable[[Log], Awaitable[None]]


@dataclass
class Starts:
    """How many starts began, on state that was whole or was not, and how many refused to; the partitions' host."""

    log: Log
    folder: Path
    start_s: float = 20.0
    """A start that takes longer has found no end."""
    whole: int = 0
    incomplete: int = 0
    refused: list[str] = field(default_factory=list)

    @property
    def count(self) -> tuple[int, int, int]:
        return self.whole, self.incomplete, len(self.refused)

    async def start(self, consumer: aiokafka.AIOKafkaConsumer) -> None:
        """One start on an empty disk, given back at once."""
        partitions = Partitions(self._config(), self, Metrics())  # type: ignore[arg-type]
        partitions.app = App(consumer)
        PartitionStore.destroy(self.folder)
        try:
            await asyncio.wait_for(partitions._acquire_or_abort(0, App.consumer_generation_id), self.start_s)
        except TimeoutError:
            self.refused.append("the restore found no end")
        await partitions._close(list(partitions.ready.values()))

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
        return PartitionState(TriggerPolicy(), StateLimits(hot_users_max=16))

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

    async def on_revoking(self, owned: Collection[OwnedPartition]) -> None:
        """Nothing is in flight."""

    def on_lost(self, owned: OwnedPartition) -> None:
        """Nothing is in flight."""

    def abort(self, reason: str) -> None:
        self.refused.append(reason)


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


async def alone(log: Log) -> None:
    """No predecessor is at work."""


async def started(starts: Starts, count: int, predecessor: Predecessor = alone) -> Starts:
    """So many starts, the predecessor's work before each."""
    names, client = starts.log.names, starts.log.client
    async with aiokafka.AIOKafkaConsumer(**client, group_id=names.group_id, enable_auto_commit=False) as consumer:
        consumer.assign([names.source])
        for _ in range(count):
            await predecessor(starts.log)
            await starts.start(consumer)
    return starts
