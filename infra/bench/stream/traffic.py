"""Traffic at a given rate, and the freshness of every event in it: handed to Kafka -> embedding received.

One producer and one consumer in this process and one clock. The load is open: an event is sent when its time has come,
whatever became of the ones before it. An event counts as served by the first embedding of its user that contains it,
so events that share an embedding count each for itself. Everything sent to the topic meanwhile must come from here.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.partitioner import murmur2
from aiokafka.structs import TopicPartition

from encoder.arrays import F64, I64
from infra.bench.stream.bursts import BATCH_BYTES_MAX, ITEMS

TICK_S = 0.002
FETCH_WAIT_MS = 100
OFFSET_BITS = 32
"""A user's number and an offset in one key; a benchmark sends fewer events than that."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where events go and where embeddings come from."""

    actions: str
    embeddings: str
    partitions: int
    client: Mapping[str, Any]
    """aiokafka's connection options."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A piece of a load."""

    rate: float
    """Events per second."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """E events in the order of sending, as columns."""

    sent_s: F64
    """[E] seconds since the epoch."""
    served_s: F64
    """[E] when the first embedding containing the event was received; NaN where none was."""
    partition: I64
    """[E]"""
    received_s: F64
    """[R] when each embedding arrived."""
    received_partition: I64
    """[R]"""
    drain_s: float
    """From the last event sent to the last event served."""

    @property
    def freshness_ms(self) -> F64:
        """[E] of the events that were served."""
        ms = (self.served_s - self.sent_s) * 1000
        return ms[~np.isnan(ms)]

    @property
    def unserved(self) -> int:
        return int(np.isnan(self.served_s).sum())

    @property
    def events_per_embedding(self) -> float:
        return len(self.sent_s) / max(1, len(self.received_s))

    @property
    def rate(self) -> float:
        """Events per second that were really sent."""
        return (len(self.sent_s) - 1) / max(1e-9, float(self.sent_s[-1] - self.sent_s[0]))


async def drive(route: Route, users: I64, load: Sequence[Stretch], *, drain_timeout_s: float) -> Outcome:
    """Send the load, `users` (numbers) acting in turn, and wait until every event is served or the time is up."""
    async with _connected(route) as (producer, consumers):
        traffic = _Traffic(route, users, producer, await _ends(consumers[0], route))
        readers = [asyncio.create_task(traffic.receive(consumer)) for consumer in consumers]
        try:
            await traffic.send(load)
            await producer.flush()
            sent_s = time.time()
            while traffic.waiting and time.time() - sent_s < drain_timeout_s:
                await asyncio.sleep(0.02)
                for reader in readers:
                    if reader.done():
                        reader.result()
            return traffic.outcome(sent_s)
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)


class _Traffic:
    """What is on its way."""

    def __init__(self, route: Route, users: I64, producer: AIOKafkaProducer, ends: Sequence[int]) -> None:
        self._route, self._users, self._producer = route, users, producer
        self._next = list(ends)
        """Of each partition, the offset that the next event gets."""
        self._names = {user: b"user-%d" % user for user in np.unique(users).tolist()}
        self._partition_of = {
            user: (murmur2(name) & 0x7FFFFFFF) % route.partitions for user, name in self._names.items()
        }
        self._sent, self._sent_s = array("q"), array("d")
        """Key (user and offset) and time of each event."""
        self._received, self._received_s = array("q"), array("d")
        self.waiting: dict[int, int] = {}
        """User -> key of the user's newest event, while no embedding contains it."""

    async def send(self, load: Sequence[Stretch]) -> None:
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
        """Send one event of each, now."""
        batches: dict[int, Any] = {}
        now_s = time.time()
        for user in users:
            partition = self._partition_of[user]
            batch = batches.get(partition)
            if batch is None:
                batch = batches[partition] = self._producer.create_batch()
            offset = self._next[partition]
            batch.append(timestamp=None, key=self._names[user], value=_event(user, offset, int(now_s * 1000)))
            self._next[partition] += 1
            key = user << OFFSET_BITS | offset
            self._sent.append(key)
            self._sent_s.append(now_s)
            self.waiting[user] = key
        for partition, batch in batches.items():
            batch.close()
            await self._producer.send_batch(batch, self._route.actions, partition=partition)

    async def receive(self, consumer: AIOKafkaConsumer) -> None:
        """Note embeddings as they arrive, until cancelled."""
        while True:
            fetched = await consumer.getmany(timeout_ms=1_000)
            now_s = time.time()
            for records in fetched.values():
                for record in records:
                    user = int(record.key[5:])
                    key = user << OFFSET_BITS | _source_offset(record.headers)
                    self._received.append(key)
                    self._received_s.append(now_s)
                    if self.waiting.get(user, key + 1) <= key:
                        del self.waiting[user]

    def outcome(self, sent_s: float) -> Outcome:
        sent, received = np.array(self._sent, np.int64), np.array(self._received, np.int64)
        received_s = np.array(self._received_s)
        served_s = serve(sent, received, received_s)
        last_s = float(np.nanmax(served_s)) if np.isfinite(served_s).any() else np.nan
        return Outcome(
            sent_s=np.array(self._sent_s),
            served_s=served_s,
            partition=self._partitions(sent),
            received_s=received_s,
            received_partition=self._partitions(received),
            drain_s=max(0.0, last_s - sent_s),
        )

    def _partitions(self, keys: I64) -> I64:
        return np.array([self._partition_of.get(user, -1) for user in (keys >> OFFSET_BITS).tolist()], np.int64)


def serve(sent: I64, received: I64, received_s: F64) -> F64:
    """When each sent key was served: by the first embedding of the same user with the same or a later offset.

    >>> one, two = 1 << OFFSET_BITS, 2 << OFFSET_BITS
    >>> serve(np.array([one + 5, one + 6, two + 7]), np.array([one + 6]), np.array([10.0])).tolist()
    [10.0, 10.0, nan]
    """
    order = np.lexsort((received_s, received))
    keys, times = received[order], received_s[order]
    at = np.searchsorted(keys, sent, side="left")
    known = np.minimum(at, max(0, len(keys) - 1))
    served = np.full(len(sent), np.nan)
    if len(keys):
        hit = (at < len(keys)) & (keys[known] >> OFFSET_BITS == sent >> OFFSET_BITS)
        served[hit] = times[known[hit]]
    return served


def _event(user: int, number: int, now_ms: int) -> bytes:
    """The JSON of one action; items follow a fixed shuffle of the numbers."""
    return (
        b'{"user_id":"user-%d","item_id":"item-%d","action":"click","timestamp_ms":%d,"surface":"home",'
        b'"duration_ms":%d,"event_id":"f%d-%d"}'
    ) % (user, number * 7_919 % ITEMS, now_ms, number % 60_000, user, number)


def _source_offset(headers: Sequence[tuple[str, bytes]]) -> int:
    return next(int(value) for name, value in headers if name == "source-offset")


async def _ends(consumer: AIOKafkaConsumer, route: Route) -> list[int]:
    partitions = [TopicPartition(route.actions, number) for number in range(route.partitions)]
    ends = await consumer.end_offsets(partitions)
    return [int(ends[partition]) for partition in partitions]


@asynccontextmanager
async def _connected(route: Route) -> AsyncIterator[tuple[AIOKafkaProducer, list[AIOKafkaConsumer]]]:
    """A producer, and a consumer for each partition of the embeddings, at its end.

    One consumer for all of them would hold new records of a partition back while it waits for the others'.
    """
    producer = AIOKafkaProducer(
        **route.client, enable_idempotence=True, linger_ms=0, max_batch_size=BATCH_BYTES_MAX, acks="all"
    )
    async with AsyncExitStack() as stack:
        await producer.start()
        stack.push_async_callback(producer.stop)
        consumers = []
        for number in range(route.partitions):
            consumer = AIOKafkaConsumer(
                **route.client,
                enable_auto_commit=False,
                fetch_max_wait_ms=FETCH_WAIT_MS,
            )
            await consumer.start()
            stack.push_async_callback(consumer.stop)
            at = TopicPartition(route.embeddings, number)
            consumer.assign([at])
            await consumer.seek_to_end(at)
            await consumer.position(at)
            consumers.append(consumer)
        yield producer, consumers
