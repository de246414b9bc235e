"""Replay a log of actions to `user-actions`, in its order: at a fixed rate, at its own pace, or as fast as possible.

`load_log` reads Parquet or CSV into an `EventLog`; `replay` produces it and reports what the broker has acknowledged.
Values are the JSON of the contract, keyed by user id and partitioned by murmur2, so the events of a user keep their
order.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError
from aiokafka.partitioner import murmur2

from encoder.arrays import I64
from infra.datasets.event_log import EventLog
from infra.errors import InfraError, detail
from streams.config.settings import Settings

TICK_S = 0.01
ROWS_PER_TICK_MAX = 10_000
BATCH_BYTES_MAX = 900_000
REQUEST_TIMEOUT_MS = 30_000
TOPIC_TIMEOUT_S = 15.0
ACKNOWLEDGE_S = 60.0
STOP_S = 5.0


class ReplayFailed(InfraError):
    """The broker did not acknowledge an event."""


@dataclass(frozen=True, slots=True)
class Pace:
    """The pace: `rate` events per second, or event time `speed` times as fast as the clock; neither sends at once."""

    rate: float | None = None
    speed: float | None = None

    def due(self, log: EventLog, elapsed_s: float) -> int:
        """Return how many of the log's first events are due after `elapsed_s` seconds."""
        if self.rate is not None:
            return min(len(log), int(self.rate * elapsed_s))
        if self.speed is not None:
            reached_ms = log.timestamp_ms[0] + elapsed_s * 1_000 * self.speed
            return int(np.searchsorted(log.latest_ms, reached_ms, side="right"))
        return len(log)


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """An acknowledged batch: row `rows[i]` of the log is at offset `base_offset + i` of `partition`."""

    partition: int
    base_offset: int
    rows: I64
    sent_at_s: float
    """Time at which the batch was handed to the producer, in seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class ReplayTotals:
    """Totals of a replay; `acknowledged` equals the length of the log unless it was stopped."""

    acknowledged: int
    seconds: float


async def replay(
    log: EventLog,
    settings: Settings,
    pace: Pace,
    *,
    on_acknowledged: Callable[[Acknowledged], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> ReplayTotals:
    """Produce the log's events to the actions topic and return once every event sent is acknowledged.

    `on_acknowledged` is called in the event loop for each batch, `stop` before each tick. Events of one partition are
    acknowledged in order. Raises `ReplayFailed`.
    """
    producer = AIOKafkaProducer(
        enable_idempotence=True,
        linger_ms=0,
        max_batch_size=BATCH_BYTES_MAX,
        request_timeout_ms=REQUEST_TIMEOUT_MS,
        **settings.kafka.client_options(),
    )
    run = _Run(log, settings.topics.actions, producer, on_acknowledged)
    try:
        await producer.start()
        await run.open()
        await run.follow(pace, stop)
    except (KafkaError, OSError) as error:  # TimeoutError is an OSError
        raise ReplayFailed(
            f"the replay ended after {run.acknowledged:,} of {len(log):,} events",
            detail(error),
            "check that the broker is up and that the topic exists (`streamformer topics create`), then run it again",
        ) from error
    finally:
        await _stop(producer)
    return ReplayTotals(run.acknowledged, time.monotonic() - run.started_s)


async def _stop(producer: AIOKafkaProducer) -> None:
    """Stop in bounded time: an idempotent producer without a broker would wait for it forever."""
    with suppress(TimeoutError):
        await asyncio.wait_for(producer.stop(), STOP_S)


class _Run:
    """State of one replay."""

    def __init__(
        self, log: EventLog, topic: str, producer: AIOKafkaProducer, on_acknowledged: Callable[[Acknowledged], None]
    ) -> None:
        self.acknowledged = 0
        self.started_s = time.monotonic()
        self._log = log
        self._topic = topic
        self._producer = producer
        self._on_acknowledged = on_acknowledged
        self._partitions: I64 = np.empty(0, np.int64)

    async def open(self) -> None:
        """Look up the partitions of the topic and assign each event to one."""
        try:
            count = len(await asyncio.wait_for(self._producer.partitions_for(self._topic), TOPIC_TIMEOUT_S))
        except TimeoutError as error:
            raise UnknownTopicOrPartitionError(f"no topic {self._topic}") from error
        by_user = np.array([(murmur2(key) & 0x7FFFFFFF) % count for key in self._log.user_keys], np.int64)
        self._partitions = by_user[self._log.user_index]
        self.started_s = time.monotonic()

    async def follow(self, pace: Pace, stop: Callable[[], bool]) -> None:
        sent = 0
        while sent < len(self._log) and not stop():
            due = pace.due(self._log, time.monotonic() - self.started_s)
            if due <= sent:
                await asyncio.sleep(TICK_S)
                continue
            upto = min(due, sent + ROWS_PER_TICK_MAX)
            await self._send(np.arange(sent, upto))
            sent = upto
            if pace.rate is not None or pace.speed is not None:
                await asyncio.sleep(TICK_S if due == upto else 0)

    async def _send(self, rows: I64) -> None:
        partitions = self._partitions[rows]
        present = np.unique(partitions).tolist()
        await asyncio.gather(*(self._send_partition(p, rows[partitions == p]) for p in present))

    async def _send_partition(self, partition: int, rows: I64) -> None:
        """Send batches one by one, each after the one before is acknowledged."""
        for batch, its_rows in self._batches(rows):
            sent_at_s = time.time()
            future = await self._producer.send_batch(batch, self._topic, partition=partition)
            metadata = await asyncio.wait_for(future, ACKNOWLEDGE_S)
            self.acknowledged += len(its_rows)
            self._on_acknowledged(Acknowledged(partition, metadata.offset, its_rows, sent_at_s))

    def _batches(self, rows: I64) -> Iterable[tuple[Any, I64]]:
        batch, begin = self._producer.create_batch(), 0
        for i, (key, value) in enumerate(self._log.records(rows)):
            if batch.append(key=key, value=value, timestamp=None) is None:
                batch.close()
                yield batch, rows[begin:i]
                batch, begin = self._producer.create_batch(), i
                batch.append(key=key, value=value, timestamp=None)
        batch.close()
        yield batch, rows[begin:]
