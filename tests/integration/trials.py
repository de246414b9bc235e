"""What tests of worker processes share: actions to send, and waiting for what a worker says of itself."""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import aiokafka
from aiokafka.partitioner import murmur2

from infra.harness.run import Run
from streams.config.settings import Settings

Sent = tuple[bytes | None, bytes | None]
"""Key and value."""
SOON_S = 60.0


def action(user: str, number: int, **fields: Any) -> Sent:
    """Action `number` of a user, one a second in event time."""
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


def send(settings: Settings, records: Sequence[Sent]) -> None:
    """Produce records in order and wait for all."""

    async def produce() -> None:
        producer = aiokafka.AIOKafkaProducer(
            bootstrap_servers=settings.kafka.bootstrap_servers, max_request_size=2 << 20, enable_idempotence=True
        )
        async with producer:
            for key, value in records:
                partition = (murmur2(key or b"") & 0x7FFFFFFF) % settings.topics.partitions
                await producer.send(settings.topics.actions, value, key=key, partition=partition)
            await producer.flush()

    asyncio.run(produce())


def until(condition: Callable[[], bool], run: Run, timeout_s: float = SOON_S) -> float:
    """Wait until the condition holds; the seconds that took."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < timeout_s, run.supervisor.log(0)[-2_000:]
        time.sleep(0.05)
    return time.monotonic() - began_s


def asked(run: Run, path: str, number: int = 0) -> tuple[int, str]:
    """Status and text of a worker's page; (0, "") while nobody answers. Its last start counts."""
    ports = re.findall(r"metrics at http://127\.0\.0\.1:(\d+)/", run.supervisor.log(number))
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[-1]}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except (OSError, IndexError):
        return 0, ""


def is_ready(run: Run, number: int = 0) -> bool:
    return asked(run, "/readyz", number)[0] == 200
