"""Records as strangers send them: with headers, times, partitions, compression and transactions of their own choice."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiokafka
from aiokafka.structs import TopicPartition

from infra.harness.events import REQUEST_BYTES_MAX, Event, partition_of
from streams.config.settings import Settings


@dataclass(frozen=True, slots=True)
class Record:
    """One record; a partition of None means the one that the key hashes to."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()
    partition: int | None = None
    timestamp_ms: int | None = None


def good(user: str, number: int = 1, **fields: Any) -> Record:
    """Return a valid action of a user, a moment ago; actions with a larger number are later."""
    value = {
        "user_id": user,
        "item_id": f"item-{number}",
        "action": "click",
        "timestamp_ms": time.time_ns() // 1_000_000 - 60_000 + number,
        "event_id": f"{user}/{number}",
        **fields,
    }
    return Record(user.encode(), json.dumps(value).encode())


def users(count: int, prefix: str = "user") -> list[str]:
    """Return `count` user ids."""
    return [f"{prefix}-{number}" for number in range(count)]


def users_of_partition(settings: Settings, partition: int, count: int, prefix: str = "user") -> list[str]:
    """Return `count` user ids that hash to one partition."""
    found: list[str] = []
    number = 0
    while len(found) < count:
        name = f"{prefix}-{number}"
        if partition_of(name.encode(), settings.topics.partitions) == partition:
            found.append(name)
        number += 1
    return found


def send(settings: Settings, records: Sequence[Record], **options: Any) -> None:
    """Produce records to the input topic in order, and return once all are acknowledged; `options` are aiokafka's."""

    async def produce() -> None:
        async with _producer(settings, **options) as producer:
            await _send_all(producer, settings, records)

    asyncio.run(produce())


@asynccontextmanager
async def transaction(settings: Settings, name: str, timeout_ms: int = 120_000) -> AsyncIterator[Any]:
    """Yield `send(records)` inside a transaction of another program; it is committed at the end of the block.

    An exception in the block aborts it.
    """
    options = {"transactional_id": name, "transaction_timeout_ms": timeout_ms}
    async with _producer(settings, **options) as producer, producer.transaction():
        yield lambda records: _send_all(producer, settings, records)


def as_records(events: Sequence[Event]) -> list[Record]:
    """Return events of the harness as records."""
    return [Record(key, value) for key, value in events]


@asynccontextmanager
async def _producer(settings: Settings, **options: Any) -> AsyncIterator[Any]:
    given: Mapping[str, Any] = {"max_request_size": REQUEST_BYTES_MAX, "enable_idempotence": True, **options}
    async with aiokafka.AIOKafkaProducer(bootstrap_servers=settings.kafka.bootstrap_servers, **given) as producer:
        yield producer


async def _send_all(producer: Any, settings: Settings, records: Sequence[Record]) -> None:
    topic, partitions = settings.topics.actions, settings.topics.partitions
    for each in records:
        partition = partition_of(each.key, partitions) if each.partition is None else each.partition
        await producer.send(
            topic,
            each.value,
            key=each.key,
            partition=partition,
            timestamp_ms=each.timestamp_ms,
            headers=list(each.headers),
        )
    await producer.flush()


def topic_partition(topic: str, partition: int) -> Any:
    """Return Kafka's pair of topic and partition."""
    return TopicPartition(topic, partition)
