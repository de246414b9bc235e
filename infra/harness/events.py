"""Send chosen events to a deployment, in a given order."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import aiokafka
from aiokafka.partitioner import murmur2

from streams.config.settings import Settings

Event = tuple[bytes | None, bytes | None]
"""Key and value of a record."""
REQUEST_BYTES_MAX = 2 << 20


def action(user: str, number: int, **fields: Any) -> Event:
    """Return action `number` of a user; actions are one second apart in event time, and `fields` replace any field."""
    event = {
        "user_id": user,
        "item_id": f"item-{number}",
        "action": "click",
        "timestamp_ms": (time.time_ns() // 1_000_000_000 - 1_000 + number) * 1_000,
        "duration_ms": number,
        "event_id": f"{user}/{number}",
        **fields,
    }
    return user.encode(), json.dumps(event).encode()


def partition_of(key: bytes | None, partitions: int) -> int:
    """Return the partition of a key, as the Java client computes it; records without a key go to that of b""."""
    return int((murmur2(key or b"") & 0x7FFFFFFF) % partitions)


def send(settings: Settings, events: Sequence[Event]) -> None:
    """Produce events in order, and return once all are acknowledged."""

    async def produce() -> None:
        producer = aiokafka.AIOKafkaProducer(
            bootstrap_servers=settings.kafka.bootstrap_servers,
            max_request_size=REQUEST_BYTES_MAX,
            enable_idempotence=True,
        )
        async with producer:
            for key, value in events:
                partition = partition_of(key, settings.topics.partitions)
                await producer.send(settings.topics.actions, value, key=key, partition=partition)
            await producer.flush()

    asyncio.run(produce())
