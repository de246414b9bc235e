"""Packing: messages become as few produce batches as the broker's size limit allows, sent in order.

aiokafka's own `send` takes one message at a time, with a future for each. Here a caller packs its messages into batches
itself, enqueues all of them, and awaits one acknowledgement.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.structs import TopicPartition

from streams.wire.embeddings import Message

BATCH_BYTES_MAX = 900_000
"""Below the broker's default `message.max.bytes` of 1,048,588; a topic's own limit may be lower."""


async def send_packed(
    producer: Any,
    tp: TopicPartition,
    messages: Iterable[Message],
    *,
    batch_bytes: int = BATCH_BYTES_MAX,
    on_sent: Callable[[asyncio.Future[Any]], None] | None = None,
) -> Awaitable[int]:
    """Enqueue `messages` (at least one) for `tp`; return what becomes the offset after the last one.

    When this returns, the messages have their place in the producer's queue, so a later call comes after them. The
    result is to be awaited: it is done when every batch has ended, and raises when one has failed. `on_sent` gets the
    result of each batch as soon as it is enqueued, so that none is lost from view when a later one cannot be.
    """
    batches = list(_batches(producer, messages, batch_bytes))
    pending: list[asyncio.Future[Any]] = []
    for batch in batches:
        pending.append(await producer.send_batch(batch, tp.topic, partition=tp.partition))
        if on_sent is not None:
            on_sent(pending[-1])
    return _end(pending, int(batches[-1].record_count()))


async def _end(pending: list[asyncio.Future[Any]], last_batch_records: int) -> int:
    await asyncio.wait(pending)  # unlike `gather` it cancels no batch together with its caller
    failures = [failure for future in pending if (failure := future.exception()) is not None]
    if failures:
        raise failures[0]
    return int(pending[-1].result().offset) + last_batch_records  # `offset` is the one of the batch's first message


def _batches(producer: Any, messages: Iterable[Message], batch_bytes: int) -> Iterator[Any]:
    """Fill batches of at most the size limit; a larger message gets a batch of its own."""
    batch = _new_batch(producer, batch_bytes)
    for key, value, headers in messages:
        if batch.append(timestamp=None, key=key, value=value, headers=headers) is None:  # full
            batch.close()
            yield batch
            batch = _new_batch(producer, batch_bytes)
            batch.append(timestamp=None, key=key, value=value, headers=headers)
    batch.close()
    yield batch


def _new_batch(producer: Any, batch_bytes: int) -> Any:
    """Return an empty batch; one of the producer's own, unless it has to be smaller."""
    if batch_bytes >= BATCH_BYTES_MAX:
        return producer.create_batch()
    transactions = producer._txn_manager
    return BatchBuilder(batch_bytes, 0, is_transactional=transactions.transactional_id is not None)
