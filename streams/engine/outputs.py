"""What leaves the worker outside of transactions: embeddings, tombstones and dead letters.

They go through one ordinary idempotent producer, for they must be visible within milliseconds. Whatever needs them to
have arrived waits for the acknowledgement. Embeddings of a partition are appended in the order in which `publish` was
called; source and output topic have the same number of partitions, so a user's embedding lies in the user's partition.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiokafka
import numpy as np
from aiokafka.errors import MessageSizeTooLargeError
from aiokafka.structs import TopicPartition

from encoder.arrays import I64
from streams.engine.changelog import LogReader
from streams.engine.packing import BATCH_BYTES_MAX, send_packed
from streams.wire.embeddings import (
    EmbeddingBatch,
    EmbeddingCodec,
    MalformedEmbedding,
    Message,
    decode_metadata,
    encode_embeddings,
)

logger = logging.getLogger(__name__)

RECORD_BYTES_MAX = 64 << 20
"""What the client lets through: a refused action may be larger than aiokafka's 1 MB, and the broker decides."""
VALUE_OMITTED = "error-value-omitted-bytes"
"""Header of a dead letter that the topic would not take whole: how long the value is that stays in the source topic."""


@dataclass(frozen=True, slots=True)
class Published:
    """What the output topic holds of one partition beyond some offset, by one encoder version."""

    users: list[bytes]
    source_offsets: I64
    """[U]: the newest published source offset of each user."""
    end: int
    """Past the last record of the partition."""


@dataclass(frozen=True, slots=True)
class OutputsConfig:
    """Where outputs go and how they are written."""

    embeddings_topic: str
    dead_letter_topic: str
    codec: EmbeddingCodec
    client: Mapping[str, Any]
    """aiokafka's connection options: servers and security."""
    request_timeout_ms: int
    """How long an output may wait for the broker before its users are encoded again."""


class Outputs:
    """The producer of embeddings, tombstones and dead letters."""

    def __init__(self, config: OutputsConfig) -> None:
        self._config = config
        self._producer: aiokafka.AIOKafkaProducer | None = None
        self._turns: dict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        """Per partition: whoever came first appends first."""

    async def start(self) -> None:
        self._producer = aiokafka.AIOKafkaProducer(
            **self._config.client,
            acks="all",
            enable_idempotence=True,
            max_batch_size=BATCH_BYTES_MAX,
            max_request_size=RECORD_BYTES_MAX,
            request_timeout_ms=self._config.request_timeout_ms,
            linger_ms=0,
        )
        await self._producer.start()

    async def stop(self) -> None:
        if self._producer is not None:
            await self._producer.stop()

    async def publish(self, partition: int, batch: EmbeddingBatch) -> int:
        """Append embeddings to the output topic; returns the offset behind them once they are acknowledged."""
        return await self._append(partition, encode_embeddings(batch, self._config.codec))

    async def publish_tombstones(self, partition: int, messages: Iterable[Message]) -> int:
        """Append tombstones of forgotten users; returns the offset behind them once they are acknowledged."""
        return await self._append(partition, messages)

    async def dead_letter(
        self, partition: int, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]
    ) -> None:
        """Send one record to the dead-letter topic; returns once it is acknowledged.

        A value that the topic finds too large is left out, and a header says so: no record stops a worker.
        """
        try:
            await self._dead_letter(partition, key, value, headers)
        except MessageSizeTooLargeError:
            logger.warning(
                "a dead letter of %d bytes is too large for its topic: the value is left out", len(value or b"")
            )
            omitted = (VALUE_OMITTED, b"%d" % len(value or b""))
            await self._dead_letter(partition, key, None, [*headers, omitted])

    async def _dead_letter(
        self, partition: int, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]
    ) -> None:
        assert self._producer is not None
        await self._producer.send_and_wait(
            self._config.dead_letter_topic, key=key, value=value, headers=list(headers), partition=partition
        )

    async def _append(self, partition: int, messages: Iterable[Message]) -> int:
        assert self._producer is not None
        async with self._turns[partition]:
            acknowledged = await send_packed(
                self._producer, TopicPartition(self._config.embeddings_topic, partition), messages
            )
        return await acknowledged

    async def published_since(self, partition: int, offset: int, encoder_version: str) -> Published:
        """Read the output topic from `offset` to its present end: what has been published by this encoder version."""
        reader = LogReader(TopicPartition(self._config.embeddings_topic, partition), self._config.client)
        newest: dict[bytes, int] = {}
        try:
            await reader.open()
            start = offset if reader.begin <= offset <= reader.end else reader.begin  # the topic was created anew
            async for records in reader.batches(start, records_max=10_000):
                for record in records:
                    source_offset = _source_offset(record, encoder_version)
                    if record.key is not None and source_offset is not None:
                        newest[record.key] = max(source_offset, newest.get(record.key, -1))
        finally:
            await reader.close()
        return Published(list(newest), np.fromiter(newest.values(), np.int64, len(newest)), reader.end)


def _source_offset(record: Any, encoder_version: str) -> int | None:
    """The source offset of an embedding of this version, or of a tombstone; None for anything else."""
    if record.value is None:
        return next((int(value) for name, value in record.headers if name == "source-offset"), None)
    try:
        metadata = decode_metadata(record.headers)
    except MalformedEmbedding:
        return None
    return metadata.source_offset if metadata.encoder_version == encoder_version else None
