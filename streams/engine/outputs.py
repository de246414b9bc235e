"""Records that leave the worker outside of transactions: embeddings, tombstones and dead letters.

They must be visible within milliseconds, so idempotent producers send them, over one *lane* per topic and partition
(see `streams.engine.lanes`): nothing that the broker refuses stops a lane for longer than the refusal lasts, and no
lane stops another. Embeddings of a partition are appended in the order of the calls of `publish`. Dead letters have
producers of their own, because a request that is too large costs the connection it is sent over.
Source and output topic have the same number of partitions, so a user has the same partition in both.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from aiokafka.errors import MessageSizeTooLargeError
from aiokafka.structs import TopicPartition

from streams.engine.changelog import LogReader
from streams.engine.clients import KAFKA, Clients
from streams.engine.dead_letters import DeadLetters
from streams.engine.lanes import RECORDS_MAX, Lane
from streams.engine.own_records import OwnRecords, Published
from streams.engine.packing import BATCH_BYTES_MAX
from streams.engine.producers import ProducerPool
from streams.engine.topic_limits import TopicLimits
from streams.errors import CannotStart
from streams.telemetry.metrics import Metrics
from streams.wire.embeddings import EmbeddingBatch, EmbeddingCodec, encode_embeddings
from streams.wire.features import FeatureBatch, encode_features
from streams.wire.headers import Message

logger = logging.getLogger(__name__)

RECORD_BYTES_MAX = 64 << 20
"""Limit of the client, far above aiokafka's default of 1 MB: a rejected action may be large, and the broker decides."""

IN_FLIGHT_S = 15.0
"""Time that outputs in flight may take before their partition is acquired."""


PAGE_RECORDS = 1_000
"""Records of the output topic that are decoded at a time, in about 10 ms."""


class RecordTooLarge(CannotStart):
    """A topic accepts no record of the size that the worker will have to write."""


@dataclass(frozen=True, slots=True)
class OutputsConfig:
    """Topics, format and limits of the outputs."""

    embeddings_topic: str
    """Empty for a worker without an encoder."""
    dead_letter_topic: str
    codec: EmbeddingCodec
    client: Mapping[str, Any]
    """Connection options of aiokafka: servers and security."""
    request_timeout_ms: int
    records_per_producer_max: int = RECORDS_MAX
    """Records of one partition after which a producer is replaced."""
    clients: Clients = KAFKA
    features_topic: str = ""
    """Empty for a worker that computes no features."""

    @property
    def outputs(self) -> list[str]:
        """The topics of what is computed of users."""
        return [topic for topic in (self.embeddings_topic, self.features_topic) if topic]


class Outputs:
    """Sends embeddings, features, tombstones and dead letters."""

    def __init__(
        self, config: OutputsConfig, metrics: Metrics | None = None, limits: TopicLimits | None = None
    ) -> None:
        self._config, self._metrics = config, metrics or Metrics()
        topics = *config.outputs, config.dead_letter_topic
        self.limits = limits or TopicLimits(config.client, topics)
        self._pools = {topic: ProducerPool(self._new_producer) for topic in topics}
        self._lanes: dict[TopicPartition, Lane] = {}
        self._dead_letters: dict[int, DeadLetters] = {}

    async def start(self, largest: Mapping[str, int] | None = None) -> None:
        """Read the topics' size limits and connect to the broker.

        `largest` holds the size of the largest record of each topic; raises `RecordTooLarge` where one is not accepted.
        """
        await self.limits.read()
        for topic, size in (largest or {}).items():
            limit = self.limits.record_bytes(topic)
            if limit is not None and size > limit:
                raise RecordTooLarge(
                    f"{topic} accepts records of at most {limit} bytes",
                    f"one written by this worker may have {size}",
                    "raise the topic's max.message.bytes (and the broker's socket.request.max.bytes)",
                )
        pool = self._pools[self._config.outputs[0]]
        pool.give_back(await pool.lease())

    async def stop(self) -> None:
        """Flush and close the producers, within bounded time."""
        for pool in self._pools.values():
            await pool.stop()

    async def publish(self, partition: int, batch: EmbeddingBatch) -> int:
        """Append embeddings to the output topic; return the offset after them once they are acknowledged."""
        messages = list(encode_embeddings(batch, self._config.codec))
        return await self._append(self._config.embeddings_topic, partition, messages)

    async def publish_features(self, partition: int, batch: FeatureBatch) -> int:
        """Append features to their topic; return the offset after them once they are acknowledged."""
        return await self._append(self._config.features_topic, partition, list(encode_features(batch)))

    async def _append(self, topic: str, partition: int, messages: Sequence[Message]) -> int:
        try:
            return await self._lane(topic, partition).append(messages)
        except MessageSizeTooLargeError:
            await self.limits.refresh()
            raise

    @property
    def topics(self) -> list[str]:
        """Topics of what is computed of users; a forgotten user is forgotten in each of them."""
        return self._config.outputs

    async def publish_tombstones(self, partition: int, messages: Sequence[Message], topic: str = "") -> int:
        """Append tombstones of forgotten users before anything that is published later, however long that takes.

        Without `topic` they go to the first of `topics`.
        """
        return await self._lane(topic or self.topics[0], partition).deliver(messages)

    async def dead_letter(
        self, partition: int, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]
    ) -> None:
        """Send one record to the dead-letter topic; return once it is acknowledged."""
        await self.dead_letters(partition, [(key, value, list(headers))])

    async def dead_letters(self, partition: int, letters: Sequence[Message]) -> None:
        """Send records to the dead-letter topic; return once all are acknowledged, however long that takes.

        A record that the topic rejects as too large is sent without its value and with a header that holds its size,
        because no record may stop a worker.
        """
        sender = self._dead_letters.get(partition)
        if sender is None:
            lane = self._lane(self._config.dead_letter_topic, partition)
            timeout_s = self._config.request_timeout_ms / 1000
            sender = DeadLetters(lane, self.limits, self._metrics, timeout_s=timeout_s)
            self._dead_letters[partition] = sender
        await sender.deliver(letters)

    def is_busy(self, partition: int) -> bool:
        """Return whether outputs of the partition would only wait, because a topic takes none at present."""
        return any(self._lane(topic, partition).is_busy for topic in self._config.outputs)

    def unacknowledged_s(self, partition: int) -> float:
        """Return for how long the oldest output of the partition has not been acknowledged."""
        return max((lane.unacknowledged_s() for lane in self._lanes_of(partition)), default=0.0)

    def last_error(self, partition: int) -> str | None:
        """Return the last failure of the partition's outputs; None if the last attempt was acknowledged."""
        return next((lane.last_error for lane in self._lanes_of(partition) if lane.last_error), None)

    def reset(self, partition: int) -> None:
        """Forget failures of a partition that is given back: its new owner publishes what is left."""
        for lane in self._lanes_of(partition):
            lane.reset()

    def _lanes_of(self, partition: int) -> list[Lane]:
        tps = (TopicPartition(topic, partition) for topic in self._pools)
        return [self._lanes[tp] for tp in tps if tp in self._lanes]

    def _lane(self, topic: str, partition: int) -> Lane:
        tp = TopicPartition(topic, partition)
        lane = self._lanes.get(tp)
        if lane is None:
            lane = self._lanes[tp] = Lane(
                tp,
                self._pools[topic],
                batch_bytes=lambda: self.limits.batch_bytes(topic),
                records_max=self._config.records_per_producer_max,
            )
        return lane

    def _new_producer(self) -> Any:
        self._metrics.output_producers.inc()
        return self._config.clients.producer(
            **self._config.client,
            acks="all",
            enable_idempotence=True,
            max_batch_size=BATCH_BYTES_MAX,
            max_request_size=RECORD_BYTES_MAX,
            request_timeout_ms=self._config.request_timeout_ms,
            linger_ms=0,
        )

    async def published_since(
        self, topic: str, partition: int, offset: int, own: OwnRecords
    ) -> AsyncGenerator[Published]:
        """Yield what was published in a topic, from its offset `offset` to the present end, in pages.

        The last page ends at the end of the partition. Records of another source log are left out, because their
        offsets would hold back every new record. What this worker has in flight for a former ownership of the
        partition ends before: its outcome must be among what is read. Raises `TimeoutError` where that takes long.
        """
        config, tp = self._config, TopicPartition(topic, partition)
        reader = LogReader(tp, config.client, config.clients)
        foreign = 0
        async with asyncio.timeout(IN_FLIGHT_S):
            await self._lane(topic, partition).settle()
        try:
            await reader.open()
            start = offset if reader.begin <= offset <= reader.end else reader.begin  # else the topic was created again
            async for records in reader.batches(start, records_max=PAGE_RECORDS):
                page = own.page(records)
                foreign += page.foreign
                yield page
            yield Published([], np.zeros(0, np.int64), reader.end)
        finally:
            await reader.close()
        if foreign:
            logger.warning(
                "%d records in partition %d of %s stem from another source log than %s; they are left as they are, and "
                "their users are published again when they act",
                foreign,
                partition,
                topic,
                own.source_id,
            )
