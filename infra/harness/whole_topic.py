"""Read a whole topic once, after a run; `topic_reader` reads what is appended during one.

aiokafka decodes millions of records several times as fast as kafka-python, which the incremental reader uses because it
needs no event loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from infra.errors import InfraError, detail
from infra.harness.safe_consumer import SafeConsumer
from streams.config.settings import Settings

POLL_MS = 200
PARTITION_FETCH_BYTES_MAX = 8 << 20
RECORDS_MAX = 20_000


async def read_topic(settings: Settings, topic: str) -> AsyncIterator[tuple[int, list[Any]]]:
    """Yield (partition, records) from the beginning of a topic to its end as of the call, committed ones only.

    A damaged batch is skipped with a line in the log; records are those of `SafeConsumer`.

    A commit is acknowledged before its markers are written, and until then a reader of committed records sees an end
    before it. So the end is that of everything written, and open transactions are waited for. Raises `InfraError`.
    """
    partitions = [TopicPartition(topic, number) for number in range(settings.topics.partitions)]
    client = settings.kafka.client_options()
    reader = SafeConsumer(client, isolation_level="read_committed", max_partition_fetch_bytes=PARTITION_FETCH_BYTES_MAX)
    try:
        async with AIOKafkaConsumer(isolation_level="read_uncommitted", **client) as everything:
            ends = await everything.end_offsets(partitions)
        async with reader:
            reader.consumer.assign(partitions)
            await reader.consumer.seek_to_beginning()
            left = set(partitions)
            while left := {tp for tp in left if await reader.consumer.position(tp) < ends[tp]}:
                for tp, records in (await reader.take(timeout_ms=POLL_MS, records_max=RECORDS_MAX)).items():
                    yield tp.partition, records
    except KafkaError as error:
        raise InfraError(f"cannot read {topic}", detail(error), "check that the broker is up") from error


async def count_records(settings: Settings, topic: str) -> int:
    """Return the number of committed records in a topic."""
    return sum([len(records) async for _, records in read_topic(settings, topic)])
