"""Latency of outputs at readers of both isolation levels, by the kind of producer that writes them.

- *idempotent*: one producer for all partitions, as the worker has it; commits only concern the changelog.
- *transactional*: a producer per partition, whose transaction holds the outputs; a commit per second.
- *in turn*: two transactional producers per partition, so that one writes while the other commits.

The rounds alternate on one broker: 4 partitions, 2,000 records/s in batches of 10 every 5 ms. The readers share the
process, and the event loop, with the writers, which is the same for all kinds. This is the measurement behind ADR 9.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import aiokafka
import numpy as np
from aiokafka.structs import TopicPartition
from kafka.admin import KafkaAdminClient, NewTopic

from infra.harness.reporting import console
from infra.kafka.broker import broker_or_external
from streams.engine.packing import send_packed
from streams.wire.embeddings import Message

PARTITIONS, BATCH, EVERY_S = 4, 10, 0.005
COMMIT_EVERY_S = 1.0
VALUE_BYTES = 256
SETTLE_S = 2.5
LEVELS = "read_uncommitted", "read_committed"


class Writer(Protocol):
    """Writes outputs of all partitions."""

    async def start(self) -> None:
        """Connect."""

    async def send(self, partition: int, messages: list[Message]) -> None:
        """Append messages; return once they are acknowledged."""

    async def commit(self, partition: int) -> None:
        """Make what was sent visible to readers of committed records, where that takes a step of its own."""

    async def stop(self) -> None:
        """Close the connections."""


class Idempotent:
    """One idempotent producer for all partitions."""

    def __init__(self, servers: str, topic: str) -> None:
        self._producer = aiokafka.AIOKafkaProducer(bootstrap_servers=servers, enable_idempotence=True, linger_ms=0)
        self._topic = topic

    async def start(self) -> None:
        """Connect."""
        await self._producer.start()

    async def send(self, partition: int, messages: list[Message]) -> None:
        """Append messages; return once they are acknowledged."""
        await (await send_packed(self._producer, TopicPartition(self._topic, partition), messages))

    async def commit(self, partition: int) -> None:
        """Do nothing: every record is committed."""

    async def stop(self) -> None:
        """Close the connection."""
        await self._producer.stop()


class Transactional:
    """`per_partition` transactional producers per partition, which take turns at each commit."""

    def __init__(self, servers: str, topic: str, per_partition: int = 1) -> None:
        self._topic = topic
        self._producers = {
            number: [
                aiokafka.AIOKafkaProducer(bootstrap_servers=servers, transactional_id=f"{topic}-{number}-{turn}")
                for turn in range(per_partition)
            ]
            for number in range(PARTITIONS)
        }
        self._turns = {number: asyncio.Lock() for number in range(PARTITIONS)}
        self._in_flight: dict[int, set[asyncio.Future[Any]]] = {number: set() for number in range(PARTITIONS)}

    async def start(self) -> None:
        """Connect, and begin a transaction of each producer."""
        for producers in self._producers.values():
            for producer in producers:
                await producer.start()
                await producer.begin_transaction()

    async def send(self, partition: int, messages: list[Message]) -> None:
        """Append messages; return once they are acknowledged."""
        async with self._turns[partition]:
            tp, in_flight = TopicPartition(self._topic, partition), self._in_flight[partition]
            acknowledged = await send_packed(self._producers[partition][0], tp, messages, on_sent=in_flight.add)
        await acknowledged

    async def commit(self, partition: int) -> None:
        """Commit what was sent; with two producers the other one takes over as soon as all that is acknowledged."""
        producers, turn = self._producers[partition], self._turns[partition]
        async with turn:
            if self._in_flight[partition]:
                await asyncio.wait(self._in_flight[partition])
                self._in_flight[partition].clear()
            producer = producers.pop(0)
            producers.append(producer)
            if len(producers) == 1:
                await self._end(producer)
        if len(producers) > 1:
            await self._end(producer)

    @staticmethod
    async def _end(producer: Any) -> None:
        await producer.commit_transaction()
        await producer.begin_transaction()

    async def stop(self) -> None:
        """Commit what is left, and close the connections."""
        for producers in self._producers.values():
            for producer in producers:
                await producer.commit_transaction()
                await producer.stop()


KINDS: dict[str, Callable[[str, str], Writer]] = {
    "idempotent": Idempotent,
    "transactional": Transactional,
    "in turn": lambda servers, topic: Transactional(servers, topic, 2),
}


async def measure(servers: str, kind: str, seconds: float) -> dict[str, list[float]]:
    """Return the latency in milliseconds of every record, by isolation level of its reader."""
    topic = f"outputs-{uuid.uuid4().hex[:8]}"
    admin = KafkaAdminClient(bootstrap_servers=servers)
    admin.create_topics([NewTopic(topic, PARTITIONS, 1)])
    admin.close()
    found: dict[str, list[float]] = {level: [] for level in LEVELS}
    writer = KINDS[kind](servers, topic)
    await writer.start()
    with _background() as spawn:
        for level in LEVELS:
            spawn(_read(servers, topic, level, found[level]))
        for number in range(PARTITIONS):
            spawn(_commit(writer, number))
        await asyncio.sleep(SETTLE_S)
        await _write(writer, seconds)
        await asyncio.sleep(SETTLE_S)
    await writer.stop()
    return found


async def _write(writer: Writer, seconds: float) -> None:
    begun, sending = time.monotonic(), set()
    for tick in range(int(seconds / EVERY_S)):
        await asyncio.sleep(max(0.0, begun + tick * EVERY_S - time.monotonic()))
        sent_at = b"%d" % time.time_ns()
        messages: list[Message] = [(b"user-%d" % number, sent_at.ljust(VALUE_BYTES), []) for number in range(BATCH)]
        task = asyncio.create_task(writer.send(tick % PARTITIONS, messages))
        sending.add(task)
        task.add_done_callback(sending.discard)
    if sending:
        await asyncio.wait(sending)


async def _commit(writer: Writer, partition: int) -> None:
    await asyncio.sleep(COMMIT_EVERY_S * partition / PARTITIONS)  # the worker's checkpoints are not in step either
    while True:
        await asyncio.sleep(COMMIT_EVERY_S)
        await asyncio.shield(writer.commit(partition))


async def _read(servers: str, topic: str, level: str, latencies: list[float]) -> None:
    consumer = aiokafka.AIOKafkaConsumer(
        topic, bootstrap_servers=servers, isolation_level=level, auto_offset_reset="earliest", fetch_max_wait_ms=100
    )
    async with consumer:
        async for record in consumer:
            latencies.append((time.time_ns() - int(record.value)) / 1e6)


@contextmanager
def _background() -> Iterator[Callable[[Any], None]]:
    tasks: list[asyncio.Task[Any]] = []
    try:
        yield lambda work: tasks.append(asyncio.create_task(work))
    finally:
        for task in tasks:
            task.cancel()


def main() -> None:
    """Measure every kind in alternating rounds; print a line per round and JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    figures: dict[str, dict[str, list[list[float]]]] = {kind: {level: [] for level in LEVELS} for kind in KINDS}
    with broker_or_external() as broker:
        for round_ in range(1, options.rounds + 1):
            for kind in KINDS:
                found = asyncio.run(measure(broker.bootstrap_servers, kind, options.seconds))
                for level, latencies in found.items():
                    p50, p99 = np.percentile(latencies, [50, 99]).tolist()
                    figures[kind][level].append([round(p50, 2), round(p99, 2)])
                    console.print(
                        f"round {round_}, {kind}, {level}: p50 {p50:.2f} ms, p99 {p99:.2f} ms, {len(latencies)} records"
                    )
    print(json.dumps({"bench": "outputs", "p50_p99_ms": figures}))


if __name__ == "__main__":
    main()
