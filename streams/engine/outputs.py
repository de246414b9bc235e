"""Records that leave the worker outside of transactions: embeddings, tombstones and dead letters.

One ordinary idempotent producer sends them, because they must be visible within milliseconds. A caller that depends on
their arrival awaits the acknowledgement. Embeddings of a partition are appended in the order of the calls of `publish`.
Source and output topic have the same number of partitions, so a user has the same partition in both.
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
"""Limit of the client, far above aiokafka's default of 1 MB: a rejected action may be large, and the broker decides."""
VALUE_OMITTED = "error-value-omitted-bytes"
"""Header of a dead letter whose value the topic did not accept: its size. The value stays in the source topic."""


@dataclass(frozen=True, slots=True)
class Published:
    """Outputs of one encoder version in one partition of the output topic, from some offset on."""

    users: list[bytes]
    source_offsets: I64
    """[U] newest published source offset of each user."""
    end: int
    """Offset after the last record of the partition."""
    foreign: int = 0
    """Records left out because their source offsets belong to another log."""


@dataclass(frozen=True, slots=True)
class OutputsConfig:
    """Topics, format and limits of the outputs."""

    embeddings_topic: str
    dead_letter_topic: str
    codec: EmbeddingCodec
    client: Mapping[str, Any]
    """Connection options of aiokafka: servers and security."""
    request_timeout_ms: int
    """Time that an embedding may wait for the broker before its user is encoded again."""


class Outputs:
    """The producer of embeddings, tombstones and dead letters."""

    def __init__(self, config: OutputsConfig) -> None:
        self._config = config
        self._producer: aiokafka.AIOKafkaProducer | None = None
        self._turns: dict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        """Locks by partition, which make callers append in the order of their calls."""

    async def start(self) -> None:
        """Connect the producer."""
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
        """Flush and close the producer, if it was started."""
        if self._producer is not None:
            await self._producer.stop()

    async def publish(self, partition: int, batch: EmbeddingBatch) -> int:
        """Append embeddings to the output topic; return the offset after them once they are acknowledged."""
        return await self._append(partition, encode_embeddings(batch, self._config.codec))

    async def publish_tombstones(self, partition: int, messages: Iterable[Message]) -> int:
        """Append tombstones of forgotten users; return the offset after them once they are acknowledged."""
        return await self._append(partition, messages)

    async def dead_letter(
        self, partition: int, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]
    ) -> None:
        """Send one record to the dead-letter topic; return once it is acknowledged.

        When the topic rejects the value as too large, the record is sent without it and with a header that holds its
        size, because no record may stop a worker.
        """
        try:
            await self._dead_letter(partition, key, value, headers)
        except MessageSizeTooLargeError:
            logger.warning(
                "a dead letter of %d bytes is too large for its topic; it is sent without the value", len(value or b"")
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

    async def published_since(
        self, partition: int, offset: int, encoder_version: str, source_id: str = ""
    ) -> Published:
        """Read from the output topic what this encoder version has published, from `offset` to the present end.

        Records of another source log are left out, because their offsets would hold back every new embedding.
        """
        reader = LogReader(TopicPartition(self._config.embeddings_topic, partition), self._config.client)
        newest: dict[bytes, int] = {}
        foreign = 0
        try:
            await reader.open()
            start = offset if reader.begin <= offset <= reader.end else reader.begin  # else the topic was created again
            async for records in reader.batches(start, records_max=10_000):
                for record in records:
                    source_offset, of = _source(record, encoder_version)
                    if record.key is None or source_offset is None:
                        continue
                    if of and source_id and of != source_id:
                        foreign += 1
                    else:
                        newest[record.key] = max(source_offset, newest.get(record.key, -1))
        finally:
            await reader.close()
        if foreign:
            logger.warning(
                "%d records in partition %d of %s stem from another source log than %s; they are left as they are, and "
                "their users are published again when they act",
                foreign,
                partition,
                self._config.embeddings_topic,
                source_id,
            )
        return Published(list(newest), np.fromiter(newest.values(), np.int64, len(newest)), reader.end, foreign)


def _source(record: Any, encoder_version: str) -> tuple[int | None, str]:
    """Return source offset and source id of an embedding of this version or of a tombstone; None for anything else."""
    if record.value is None:
        headers = dict(record.headers)
        offset = headers.get("source-offset")
        return None if offset is None else int(offset), (headers.get("source-id") or b"").decode()
    try:
        metadata = decode_metadata(record.headers)
    except MalformedEmbedding:
        return None, ""
    return metadata.source_offset if metadata.encoder_version == encoder_version else None, metadata.source_id
