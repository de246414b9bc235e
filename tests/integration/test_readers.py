"""The readers of demo, benchmarks and recount pass records that stop other clients, on a real broker."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from infra.harness.freshness import reading
from infra.harness.raw import batch_with_header, produce
from infra.harness.whole_topic import read_topic
from infra.harness.worker_process import with_values
from infra.kafka.broker import Broker
from infra.kafka.topics import ensure_topics
from streams.config.settings import Settings, load_settings
from tests.integration.test_poisoned_log import damage

pytestmark = pytest.mark.broker
WHOLE = [b"first", b"odd", b"last"]


@pytest.fixture
def settings(broker: Any, topic_prefix: str) -> Settings:
    """Return settings whose input topic holds a good record, an odd header name, a damaged batch and a good record."""
    if not isinstance(broker, Broker):
        pytest.skip("needs a broker whose disk can be damaged")
    settings = with_values(
        load_settings(),
        {
            "app_id": topic_prefix,
            "kafka.bootstrap_servers": broker.bootstrap_servers,
            "topics.actions": f"{topic_prefix}-in",
            "topics.partitions": 1,
        },
    )
    ensure_topics(settings)
    topic = settings.topics.actions

    async def fill() -> None:
        async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap_servers) as producer:
            await producer.send_and_wait(topic, b"first", partition=0)
            produce(broker.bootstrap_servers, topic, 0, batch_with_header(b"ann", b"odd", b"\xff\xfe"))
            for value in (b"to-be-damaged", b"last"):
                await producer.send_and_wait(topic, value, partition=0)

    asyncio.run(fill())
    damage(broker, topic, 0, b"to-be-damaged")
    return settings


def test_a_whole_topic_is_read(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """`read_topic` yields every record that can be read, and names the offsets that cannot."""

    async def values() -> list[bytes]:
        return [each.value async for _, records in read_topic(settings, settings.topics.actions) for each in records]

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(asyncio.wait_for(values(), 10)) == WHOLE
    assert "partition 0, offsets 2 to 2, cannot be read" in caplog.text


def test_freshness_is_read_past_them(settings: Settings) -> None:
    """`reading` passes on every record that can be read, and does not fail."""
    values: list[bytes] = []

    async def scenario() -> None:
        topic, client = settings.topics.actions, settings.kafka.client_options()

        def take(partition: int, records: Any, at_s: float) -> None:
            values.extend(record.value for record in records)

        async with reading(topic, 1, client, take, from_end=False) as require, asyncio.timeout(10):
            while len(values) < len(WHOLE):
                await asyncio.sleep(0.01)
                require()

    asyncio.run(scenario())
    assert values == WHOLE
