"""Packing: messages become as few produce batches as the broker's size limit allows, sent in order.

aiokafka's own `send` takes one message at a time, with a future for each. Here a caller packs its messages into batches
itself, enqueues all of them, and awaits one acknowledgement.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Iterator
from typing import Any

from aiokafka.structs import TopicPartition

from streams.wire.embeddings import Message

BATCH_BYTES_MAX = 900_000
"""Below the broker's default `message.max.bytes` of 1,048,588."""


async def send_packed(producer: Any, tp: TopicPartition, messages: Iterable[Message]) -> Awaitable[int]:
    """Enqueue `messages` (at least one) for `tp`; return what becomes the offset after the last one.

    When this returns, the messages have their place in the producer's queue, so a later call comes after them. The
    result is to be awaited: it is done when the broker has acknowledged every batch, and raises when one has failed.
    """
    batches = list(_batches(producer, messages))
    pending = [await producer.send_batch(batch, tp.topic, partition=tp.partition) for batch in batches]
    return _end(pending, int(batches[-1].record_count()))


async def _end(pending: list[Any], last_batch_records: int) -> int:
    results = await asyncio.gather(*pending)
    return int(results[-1].offset) + last_batch_records  # `offset` is the one of the batch's first message


def _batches(producer: Any, messages: Iterable[Message]) -> Iterator[Any]:
    """Fill batches of at most the producer's `max_batch_size`; a larger message gets a batch of its own."""
    batch = producer.create_batch()
    for key, value, headers in messages:
        if batch.append(timestamp=None, key=key, value=value, headers=headers) is None:  # full
            batch.close()
            yield batch
            batch = producer.create_batch()
            batch.append(timestamp=None, key=key, value=value, headers=headers)
    batch.close()
    yield batch
