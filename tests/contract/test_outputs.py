"""The outputs on a real broker: refusals, dead letters of every size, and reading back what was published."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import aiokafka
import numpy as np
import pytest
from aiokafka.errors import MessageSizeTooLargeError
from kafka.admin import KafkaAdminClient, NewTopic

from infra.chaos.fault_context import set_topic_config
from infra.kafka.broker import Broker
from streams.engine.compat import install_overrides
from streams.engine.dead_letters import VALUE_OMITTED
from streams.engine.outputs import Outputs, OutputsConfig
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
            return [user async for page in outputs.published_since(0, offset, "any") for user in page.users]
        finally:
            await outputs.stop()

    assert asyncio.run(published()) == expected


def with_outputs(config: OutputsConfig, scenario: Callable[[Outputs], Awaitable[None]]) -> None:
    """Run a scenario over started outputs."""

    async def run() -> None:
        outputs = Outputs(config)
        await outputs.start()
        try:
            await scenario(outputs)
        finally:
            await outputs.stop()

    asyncio.run(run())


def test_a_partition_is_published_to_again_after_refusals(config: OutputsConfig) -> None:
    """Refused several times, a partition takes records again at once when the topic does, without a gap or a repeat."""
    servers = config.client["bootstrap_servers"]

    async def scenario(outputs: Outputs) -> None:
        assert await outputs.publish_tombstones(0, [encode_tombstone(b"ann", 1)]) == 1
        set_topic_config(servers, config.embeddings_topic, {"max.message.bytes": "10"})
        lane = outputs._lane(config.embeddings_topic, 0)
        for _ in range(3):
            with pytest.raises(MessageSizeTooLargeError):
                await lane.append([encode_tombstone(b"ben", 2)])
        forgotten = asyncio.create_task(outputs.publish_tombstones(0, [encode_tombstone(b"ben", 3)]))
        await asyncio.sleep(1)
        assert not forgotten.done()
        assert outputs.unacknowledged_s(0) >= 1
        set_topic_config(servers, config.embeddings_topic, {"max.message.bytes": "100000"})
        async with asyncio.timeout(5):
            assert await forgotten == 2
        assert (outputs.unacknowledged_s(0), outputs.last_error(0)) == (0.0, None)
        offsets = [page.source_offsets async for page in outputs.published_since(0, 0, "any")]
        assert np.concatenate(offsets).tolist() == [1, 3]

    with_outputs(config, scenario)


def test_no_producer_counts_further_than_it_may(config: OutputsConfig) -> None:
    """With a limit of 7 records per producer, 40 records of one partition arrive in order and none is refused."""

    async def scenario(outputs: Outputs) -> None:
        users = [b"user-%02d" % number for number in range(40)]
        ends = await asyncio.gather(
            *(outputs.publish_tombstones(0, [encode_tombstone(user, number)]) for number, user in enumerate(users))
        )
        assert ends == list(range(1, 41))
        assert outputs._metrics.output_producers.value() == 6
        pages = [page async for page in outputs.published_since(0, 0, "any")]
        assert [user for page in pages for user in page.users] == users
        assert pages[-1].end == 40

    with_outputs(replace(config, records_per_producer_max=7), scenario)


@pytest.fixture(scope="module")
def narrow() -> Iterator[Broker]:
    """Yield a broker that closes the connection of a request above 200 kB, even if its topics allow more."""
    with Broker.start() as broker:
        properties = broker.folder / "server.properties"
        properties.write_text(properties.read_text() + "socket.request.max.bytes=200000\n")
        broker.restart()
        yield broker


@pytest.mark.parametrize("knows", [True, False], ids=["limit known", "limit unknown"])
def test_a_dead_letter_above_the_brokers_request_size_loses_its_value(
    narrow: Broker, topic_prefix: str, knows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A letter whose request costs the connection arrives without its value, between two that arrive whole."""
    install_overrides()
    client = {"bootstrap_servers": narrow.bootstrap_servers}
    admin = KafkaAdminClient(**client)
    topics = f"{topic_prefix}-out", f"{topic_prefix}-dead"
    admin.create_topics([NewTopic(topic, 1, 1) for topic in topics])
    admin.close()
    if not knows:
        monkeypatch.setattr("streams.engine.topic_limits.TopicLimits._read", _nothing)

    async def scenario(outputs: Outputs) -> None:
        for value in (b"small", b"x" * 400_000, b"after"):
            async with asyncio.timeout(20):
                await outputs.dead_letter(0, b"ann", value, [("error-reason", b"not-json")])
        consumer = aiokafka.AIOKafkaConsumer(topics[1], **client, auto_offset_reset="earliest")
        async with consumer:
            records = [await asyncio.wait_for(consumer.getone(), 20) for _ in range(3)]
        assert [record.value for record in records] == [b"small", None, b"after"]
        assert dict(records[1].headers)[VALUE_OMITTED] == b"400000"

    with_outputs(OutputsConfig(*topics, EmbeddingCodec.FLOAT32, client, request_timeout_ms=2_000), scenario)


async def _nothing(self: Any) -> None:
    """Read no limit, as without the right to describe configurations."""
