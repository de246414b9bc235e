"""The outputs on a real and a simulated broker: refusals, dead letters, and reading back what was published."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import aiokafka
import numpy as np
import pytest
from aiokafka.errors import MessageSizeTooLargeError
from aiokafka.structs import TopicPartition
from kafka.admin import KafkaAdminClient, NewTopic

from infra.chaos.fault_context import set_topic_config
from infra.harness.simulation.broker import Broker
from infra.harness.simulation.clients import Link, clients_of
from infra.kafka.broker import Broker as KafkaBroker
from streams.engine.changelog import LogReader
from streams.engine.clients import KAFKA
from streams.engine.compat import install_overrides
from streams.engine.dead_letters import VALUE_OMITTED
from streams.engine.outputs import Outputs, OutputsConfig
from streams.engine.own_records import OwnRecords
from streams.engine.topic_limits import TopicLimits
from streams.wire.embeddings import EmbeddingCodec, encode_tombstone

TOPIC_BYTES_MAX = 1_500_000


class KnownLimits(TopicLimits):
    """Size limits of a broker that has no administration."""

    async def _read(self) -> None: ...


OWN = OwnRecords(encoder_version="any", feature_set="")


@dataclass(frozen=True)
class Site:
    """The topics of a test, and how their limit is set."""

    config: OutputsConfig
    set_limit: Callable[[str, int], None]
    limits: Callable[[], TopicLimits | None]

    def outputs(self) -> Outputs:
        """Return outputs that are not started."""
        return Outputs(self.config, limits=self.limits())


@pytest.fixture(params=[pytest.param("kafka", marks=pytest.mark.broker), "simulated"])
def site(request: pytest.FixtureRequest, topic_prefix: str) -> Site:
    """Return outputs to two new topics, the second with a limit on record sizes."""
    topics = f"{topic_prefix}-out", f"{topic_prefix}-dead"
    options: dict[str, Any] = {}
    if request.param == "simulated":
        simulated = Broker()
        for topic in topics:
            simulated.create(topic, 1)

        def set_limit(topic: str, size: int) -> None:
            simulated.topics[topic].batch_bytes_max = size

        clients, limits = clients_of(Link(simulated)), lambda: KnownLimits({}, topics)
    else:
        install_overrides()
        servers = request.getfixturevalue("broker").bootstrap_servers
        options = {"bootstrap_servers": servers}
        admin = KafkaAdminClient(**options)
        admin.create_topics([NewTopic(topic, 1, 1) for topic in topics])
        admin.close()

        def set_limit(topic: str, size: int) -> None:
            set_topic_config(servers, topic, {"max.message.bytes": str(size)})

        clients, limits = KAFKA, lambda: None
    set_limit(topics[1], TOPIC_BYTES_MAX)
    config = OutputsConfig(*topics, EmbeddingCodec.FLOAT32, options, request_timeout_ms=20_000, clients=clients)
    return Site(config, set_limit, limits)


async def sent_and_read(site: Site, value: bytes) -> Any:
    """Send a dead letter with this value and return the record that arrives."""
    outputs = site.outputs()
    await outputs.start()
    try:
        await outputs.dead_letter(0, b"ann", value, [("error-reason", b"value-too-large")])
    finally:
        await outputs.stop()
    config = site.config
    reader = LogReader(TopicPartition(config.dead_letter_topic, 0), config.client, config.clients)
    await reader.open()
    try:
        return await asyncio.wait_for(reader.record_at(0), 20)
    finally:
        await reader.close()


def test_a_dead_letter_above_the_clients_megabyte_arrives_whole(site: Site) -> None:
    """The client rejects nothing that the broker accepts: 1.2 MB arrive unchanged."""
    value = b"x" * 1_200_000
    record = asyncio.run(sent_and_read(site, value))
    assert record.value == value
    assert VALUE_OMITTED not in dict(record.headers)


def test_a_dead_letter_too_large_for_its_topic_arrives_without_its_value(site: Site) -> None:
    """Key and headers of a rejected dead letter still arrive, and one header holds the size of the value."""
    record = asyncio.run(sent_and_read(site, b"x" * 2_000_000))
    assert (record.key, record.value) == (b"ann", None)
    assert dict(record.headers) == {"error-reason": b"value-too-large", VALUE_OMITTED: b"2000000"}


@pytest.mark.parametrize(
    ("offset", "expected"), [(0, [b"ann", b"ben"]), (1, [b"ben"]), (2, []), (1_000, [b"ann", b"ben"])]
)
def test_published_since_an_offset(site: Site, offset: int, expected: list[bytes]) -> None:
    """Reading begins at an offset within the topic; one beyond its end is of an earlier topic, so all is read."""

    async def published() -> list[bytes]:
        outputs = site.outputs()
        await outputs.start()
        try:
            assert await outputs.publish_tombstones(0, [encode_tombstone(b"ann", 7), encode_tombstone(b"ben", 9)]) == 2
            return [
                user async for page in outputs.published_since(outputs.topics[0], 0, offset, OWN) for user in page.users
            ]
        finally:
            await outputs.stop()

    assert asyncio.run(published()) == expected


def with_outputs(outputs: Outputs, scenario: Callable[[Outputs], Awaitable[None]]) -> None:
    """Run a scenario over started outputs."""

    async def run() -> None:
        await outputs.start()
        try:
            await scenario(outputs)
        finally:
            await outputs.stop()

    asyncio.run(run())


def test_a_partition_is_published_to_again_after_refusals(site: Site) -> None:
    """Refused several times, a partition takes records again at once when the topic does, without a gap or a repeat."""
    topic = site.config.embeddings_topic

    async def scenario(outputs: Outputs) -> None:
        assert await outputs.publish_tombstones(0, [encode_tombstone(b"ann", 1)]) == 1
        site.set_limit(topic, 10)
        lane = outputs._lane(topic, 0)
        for _ in range(3):
            with pytest.raises(MessageSizeTooLargeError):
                await lane.append([encode_tombstone(b"ben", 2)])
        forgotten = asyncio.create_task(outputs.publish_tombstones(0, [encode_tombstone(b"ben", 3)]))
        await asyncio.sleep(1)
        assert not forgotten.done()
        assert outputs.unacknowledged_s(0) >= 1
        site.set_limit(topic, 100_000)
        async with asyncio.timeout(5):
            assert await forgotten == 2
        assert (outputs.unacknowledged_s(0), outputs.last_error(0)) == (0.0, None)
        offsets = [page.source_offsets async for page in outputs.published_since(outputs.topics[0], 0, 0, OWN)]
        assert np.concatenate(offsets).tolist() == [1, 3]

    with_outputs(site.outputs(), scenario)


def test_no_producer_counts_further_than_it_may(site: Site) -> None:
    """With a limit of 7 records per producer, 40 records of one partition arrive in order and none is refused."""

    async def scenario(outputs: Outputs) -> None:
        users = [b"user-%02d" % number for number in range(40)]
        ends = await asyncio.gather(
            *(outputs.publish_tombstones(0, [encode_tombstone(user, number)]) for number, user in enumerate(users))
        )
        assert ends == list(range(1, 41))
        assert outputs._metrics.output_producers.value() == 6
        pages = [page async for page in outputs.published_since(outputs.topics[0], 0, 0, OWN)]
        assert [user for page in pages for user in page.users] == users
        assert pages[-1].end == 40

    with_outputs(replace(site, config=replace(site.config, records_per_producer_max=7)).outputs(), scenario)


@pytest.fixture(scope="module")
def narrow() -> Iterator[KafkaBroker]:
    """Yield a broker that closes the connection of a request above 200 kB, even if its topics allow more."""
    with KafkaBroker.start() as broker:
        properties = broker.folder / "server.properties"
        properties.write_text(properties.read_text() + "socket.request.max.bytes=200000\n")
        broker.restart()
        yield broker


@pytest.mark.broker
@pytest.mark.parametrize("knows", [True, False], ids=["limit known", "limit unknown"])
def test_a_dead_letter_above_the_brokers_request_size_loses_its_value(
    narrow: KafkaBroker, topic_prefix: str, knows: bool, monkeypatch: pytest.MonkeyPatch
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

    with_outputs(Outputs(OutputsConfig(*topics, EmbeddingCodec.FLOAT32, client, request_timeout_ms=2_000)), scenario)


async def _nothing(self: Any) -> None:
    """Read no limit, as without the right to describe configurations."""
