"""The last record that a state contains, read again from the source log: the proof compares it with the mark's."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from aiokafka.errors import OffsetOutOfRangeError
from aiokafka.structs import TopicPartition

from streams.engine.clients import KAFKA, Clients
from streams.engine.records import CorruptBatch, Parsing
from streams.storage.codec import CheckpointMark
from streams.storage.identity import LastRecord

READ_S = 10.0
"""Time that the broker has to respond; the acquisition is tried again afterwards."""
POLL_MS = 100


async def reread(
    source: Any,
    client: Mapping[str, Any],
    mark: CheckpointMark | None,
    earliest: int,
    end: int,
    clients: Clients = KAFKA,
) -> LastRecord | None:
    """Return what the log holds at the offset of the mark's last record.

    None means that nothing can be said: the mark has no last record, retention has deleted it, or there is no visible
    record at its offset (in a log that is compacted against the rules, for instance) or a damaged one.
    """
    last = mark.last if mark else None
    if last is None or not earliest <= last.offset < end:
        return None
    consumer = clients.consumer(
        **client,
        enable_auto_commit=False,
        auto_offset_reset="none",
        isolation_level="read_committed",
        key_deserializer=Parsing(),
        max_partition_fetch_bytes=1,  # the broker returns one batch, however large
    )
    try:
        async with asyncio.timeout(READ_S):
            await consumer.start()
            record = await _record_at(consumer, TopicPartition(*source), last.offset)
    except (CorruptBatch, OffsetOutOfRangeError):  # the latter: retention was faster
        return None
    finally:
        await consumer.stop()
    return LastRecord.of(record) if record is not None else None


async def _record_at(consumer: Any, tp: TopicPartition, offset: int) -> Any:
    """Return the record at an offset; None if no visible one is there."""
    consumer.assign([tp])
    consumer.seek(tp, offset)
    while True:
        fetched = await consumer.getmany(tp, timeout_ms=POLL_MS, max_records=1)
        for record in fetched.get(tp, ()):
            return record if record.offset == offset else None
        if await consumer.position(tp) > offset:
            return None
