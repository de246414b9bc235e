"""Traffic at a given rate, and the freshness of every event in it.

The load is open: an event is sent when it is due, regardless of the events before it. An event is served by the first
embedding of its user that contains it, so events that share an embedding count each on its own. Nothing else may be
sent to the topic in the meantime.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.partitioner import murmur2
from aiokafka.structs import TopicPartition

from encoder.arrays import F64, I64
from infra.bench.stream.bursts import BATCH_BYTES_MAX, ITEMS
from infra.harness.freshness import Received, Sent, key_of, reading, served_s

TICK_S = 0.002


@dataclass(frozen=True, slots=True)
class Route:
    """The topics of events and of embeddings."""

    actions: str
    embeddings: str
    partitions: int
    client: Mapping[str, Any]
    """Connection options of aiokafka."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a load with one rate."""

    rate: float
    """Events per second."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """E events and R embeddings, as columns."""

    sent_s: F64
    """[E] seconds since the epoch."""
    served_s: F64
    """[E] when the first embedding containing the event was received; NaN if there was none."""
    received_s: F64
    """[R] when each embedding arrived."""
    received_partition: I64
    """[R]"""
    drain_s: float
    """Seconds from the last event sent to the last event served."""

    @property
    def freshness_ms(self) -> F64:
        """Freshness of the events that were served."""
        ms = (self.served_s - self.sent_s) * 1000
        return ms[~np.isnan(ms)]

    @property
    def unserved(self) -> int:
        """Events that no embedding contains."""
        return int(np.isnan(self.served_s).sum())

    @property
    def events_per_embedding(self) -> float:
        """Events that share one embedding, on average."""
        return len(self.sent_s) / max(1, len(self.received_s))

    @property
    def rate(self) -> float:
        """Events per second that were really sent."""
        return (len(self.sent_s) - 1) / max(1e-9, float(np.ptp(self.sent_s)))


async def drive(route: Route, users: I64, load: Sequence[Stretch], *, drain_timeout_s: float) -> Outcome:
    """Send the load, `users` (numbers) acting in turn, and wait until every event is served or the time is up."""
    producer = AIOKafkaProducer(
        **route.client, enable_idempotence=True, linger_ms=0, max_batch_size=BATCH_BYTES_MAX, acks="all"
    )
    await producer.start()
    try:
        traffic = _Traffic(route, users, producer, await _ends(route))
        async with reading(route.embeddings, route.partitions, route.client, traffic.receive, from_end=True) as require:
            await traffic.send(load)
            await producer.flush()
            sent_s = time.time()
            while traffic.waiting and time.time() - sent_s < drain_timeout_s:
                await asyncio.sleep(0.02)
                require()
        return traffic.outcome(sent_s)
    finally:
        await producer.stop()


class _Traffic:
    """Events and embeddings of one load."""

    def __init__(self, route: Route, users: I64, producer: AIOKafkaProducer, ends: Sequence[int]) -> None:
        self._route, self._users, self._producer = route, users, producer
        self._sent, self._received = Sent(ends), Received()
        self._names = {user: b"user-%d" % user for user in np.unique(users).tolist()}
        self._partition_of = {
            user: (murmur2(name) & 0x7FFFFFFF) % route.partitions for user, name in self._names.items()
        }
        self.waiting: dict[int, int] = {}
        """User -> offset of the user's newest event, until an embedding contains it."""

    async def send(self, load: Sequence[Stretch]) -> None:
        """Send every event when it is due."""
        row = 0
        for stretch in load:
            began_s, first = time.monotonic(), row
            while (elapsed_s := time.monotonic() - began_s) < stretch.seconds:
                due = first + int(elapsed_s * stretch.rate)
                if due > row:
                    await self._send(self._users.take(np.arange(row, due), mode="wrap").tolist())
                    row = due
                await asyncio.sleep(TICK_S)

    async def _send(self, users: Sequence[int]) -> None:
        """Send one event of each user now."""
        by_partition: dict[int, list[int]] = {}
        for user in users:
            by_partition.setdefault(self._partition_of[user], []).append(user)
        now_s = time.time()
        for partition, acting in by_partition.items():
            batch, base_offset = self._producer.create_batch(), self._sent.end(partition)
            for offset, user in enumerate(acting, base_offset):
                batch.append(timestamp=None, key=self._names[user], value=_event(user, offset, int(now_s * 1000)))
                self.waiting[user] = offset
            batch.close()
            self._sent.add(partition, base_offset, acting, now_s)
            await self._producer.send_batch(batch, self._route.actions, partition=partition)

    def receive(self, partition: int, records: Sequence[Any], at_s: float) -> None:
        """Keep when each embedding arrived."""
        for record in records:
            user, offset = int(record.key[5:]), _source_offset(record.headers)
            self._received.add(user, partition, offset, 0, at_s)
            if self.waiting.get(user, offset + 1) <= offset:
                del self.waiting[user]

    def outcome(self, sent_s: float) -> Outcome:
        """Match events with embeddings; `sent_s` is when the last event was acknowledged."""
        sent_keys, sent_at_s = self._sent.columns()
        received = self._received.columns()
        served = served_s(sent_keys, key_of(received.user, received.source_offset), received.at_s)
        last_s = float(np.nanmax(served)) if np.isfinite(served).any() else np.nan
        return Outcome(sent_at_s, served, received.at_s, received.partition, max(0.0, last_s - sent_s))


def _event(user: int, number: int, now_ms: int) -> bytes:
    """Return the JSON of one action; items follow a fixed shuffle of the numbers."""
    return (
        b'{"user_id":"user-%d","item_id":"item-%d","action":"click","timestamp_ms":%d,"surface":"home",'
        b'"duration_ms":%d,"event_id":"f%d-%d"}'
    ) % (user, number * 7_919 % ITEMS, now_ms, number % 60_000, user, number)


def _source_offset(headers: Sequence[tuple[str, bytes]]) -> int:
    return next(int(value) for name, value in headers if name == "source-offset")


async def _ends(route: Route) -> list[int]:
    partitions = [TopicPartition(route.actions, number) for number in range(route.partitions)]
    async with AIOKafkaConsumer(**route.client) as consumer:
        ends = await consumer.end_offsets(partitions)
    return [int(ends[partition]) for partition in partitions]
