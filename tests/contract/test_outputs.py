"""The outputs on a real broker: dead letters of every size, and reading back what was published."""

from __future__ import annotations

import asyncio
from typing import Any

import aiokafka
import pytest
from kafka.admin import KafkaAdminClient, NewTopic

from streams.engine.compat import install_overrides
from streams.engine.outputs import VALUE_OMITTED, Outputs, OutputsConfig
from streams.wire.embeddings import EmbeddingCodec, encode_tombstone

pytestmark = pytest.mark.broker
TOPIC_BYTES_MAX = 1_500_000


@pytest.fixture
def config(broker: Any, topic_prefix: str) -> OutputsConfig:
    """Return the configuration of outputs to two new topics, the second with a limit on record sizes."""
    install_overrides()
    embeddings, dead_letter = f"{topic_prefix}-out", f"{topic_prefix}-dead"
    admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    limit = {"max.message.bytes": str(TOPIC_BYTES_MAX)}
    admin.create_topics([NewTopic(embeddings, 1, 1), NewTopic(dead_letter, 1, 1, topic_configs=limit)])
    admin.close()
    client = {"bootstrap_servers": broker.bootstrap_servers}
    return OutputsConfig(embeddings, dead_letter, EmbeddingCodec.FLOAT32, client, request_timeout_ms=20_000)


async def sent_and_read(config: OutputsConfig, value: bytes) -> Any:
    """Send a dead letter with this value and return the record that arrives."""
    outputs = Outputs(config)
    await outputs.start()
    try:
        await outputs.dead_letter(0, b"ann", value, [("error-reason", b"value-too-large")])
    finally:
        await outputs.stop()
    consumer = aiokafka.AIOKafkaConsumer(
        config.dead_letter_topic, **config.client, auto_offset_reset="earliest", max_partition_fetch_bytes=4 << 20
    )
    await consumer.start()
    try:
        return await asyncio.wait_for(consumer.getone(), 20)
    finally:
        await consumer.stop()


def test_a_dead_letter_above_the_clients_megabyte_arrives_whole(config: OutputsConfig) -> None:
    """The client rejects nothing that the broker accepts: 1.2 MB arrive unchanged."""
    value = b"x" * 1_200_000
    record = asyncio.run(sent_and_read(config, value))
    assert record.value == value
    assert VALUE_OMITTED not in dict(record.headers)


def test_a_dead_letter_too_large_for_its_topic_arrives_without_its_value(config: OutputsConfig) -> None:
    """Key and headers of a rejected dead letter still arrive, and one header holds the size of the value."""
    record = asyncio.run(sent_and_read(config, b"x" * 2_000_000))
    assert (record.key, record.value) == (b"ann", None)
    assert dict(record.headers) == {"error-reason": b"value-too-large", VALUE_OMITTED: b"2000000"}


@pytest.mark.parametrize(
    ("offset", "expected"), [(0, [b"ann", b"ben"]), (1, [b"ben"]), (2, []), (1_000, [b"ann", b"ben"])]
)
def test_published_since_an_offset(config: OutputsConfig, offset: int, expected: list[bytes]) -> None:
    """Reading begins at an offset within the topic; one beyond its end is of an earlier topic, so all is read."""

    async def published() -> list[bytes]:
        outputs = Outputs(config)
        await outputs.start()
        try:
            assert await outputs.publish_tombstones(0, [encode_tombstone(b"ann", 7), encode_tombstone(b"ben", 9)]) == 2
            return (await outputs.published_since(0, offset, "any")).users
        finally:
            await outputs.stop()

    assert asyncio.run(published()) == expected
