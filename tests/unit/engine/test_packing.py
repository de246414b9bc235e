"""Packing fills batches in order, splits only at the limit, and reports the offset after the last message."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.default_records import DefaultRecordBatch
from aiokafka.structs import TopicPartition

from streams.engine.packing import send_packed
from streams.wire.embeddings import Message

TP = TopicPartition("out", 1)
BATCH_BYTES = 1_000


class Producer:
    """A producer that stores batches, and acknowledges them when the test wants it to."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.acknowledged: list[asyncio.Future[Any]] = []

    def create_batch(self) -> Any:
        """Return an empty batch of aiokafka's own kind."""
        return BatchBuilder(BATCH_BYTES, 0)

    async def send_batch(self, batch: Any, topic: str, *, partition: int) -> asyncio.Future[Any]:
        """Take a batch, which must be closed, for the expected partition."""
        assert (topic, partition) == TP
        assert batch._closed
        self.sent.append(batch)
        self.acknowledged.append(asyncio.get_running_loop().create_future())
        return self.acknowledged[-1]

    def acknowledge(self) -> None:
        """Confirm every batch, the first message at offset 100."""
        offset = 100
        for batch, future in zip(self.sent, self.acknowledged, strict=True):
            future.set_result(SimpleNamespace(offset=offset))
            offset += batch.record_count()

    @property
    def messages(self) -> list[Message]:
        """Everything sent, in order."""
        batches = [DefaultRecordBatch(bytes(batch._builder.build())) for batch in self.sent]
        return [(record.key, record.value, list(record.headers)) for batch in batches for record in batch]


def messages(count: int, size: int) -> list[Message]:
    """Return distinct messages with a value of `size` bytes and a header."""
    return [(b"k%d" % number, b"v" * size, [("number", b"%d" % number)]) for number in range(count)]


@pytest.mark.parametrize(("count", "size", "batches"), [(1, 10, 1), (5, 10, 1), (30, 100, 5), (3, 5_000, 3)])
def test_messages_keep_their_order_across_batches(count: int, size: int, batches: int) -> None:
    """All messages arrive once and in order, in as few batches as fit; one above the limit is alone in its batch."""

    async def scenario() -> None:
        producer, wanted = Producer(), messages(count, size)
        end = await send_packed(producer, TP, iter(wanted))
        assert producer.messages == wanted
        assert len(producer.sent) == batches
        producer.acknowledge()
        assert await end == 100 + count

    asyncio.run(scenario())


def test_a_failed_batch_fails_the_whole_call() -> None:
    """If one of several batches is not acknowledged, the caller gets its error and no offset."""

    async def scenario() -> None:
        producer = Producer()
        end = await send_packed(producer, TP, messages(30, 100))
        producer.acknowledged[1].set_exception(ConnectionError("gone"))
        for future in (producer.acknowledged[0], *producer.acknowledged[2:]):
            future.set_result(SimpleNamespace(offset=0))
        with pytest.raises(ConnectionError, match="gone"):
            await end

    asyncio.run(scenario())
