"""What a subscriber sees: every embedding as it arrives, matched with the event that it answers.

Freshness here is the time from handing an event to Kafka to having received an embedding that contains it. The event
is found by the embedding's partition and `source-offset`, for the event times of a replayed log are history. Both
sides run in one event loop and read one clock.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from encoder.arrays import F32, I64
from infra.datasets.replay import Acknowledged
from infra.demo.recall import Publications
from infra.errors import InfraError, detail
from streams.config.settings import Settings
from streams.wire.embeddings import Tombstone, decode_embedding

FETCH_WAIT_MS = 100
RECORDS_MAX = 2_000


def now_ms() -> int:
    """Processing time."""
    return time.time_ns() // 1_000_000


class ForeignEvents(InfraError):
    """The demo's topics are in use by somebody else."""


class Sent:
    """When each event was handed to the producer, by partition and offset; the demo's events are the only ones."""

    def __init__(self, partitions: int) -> None:
        self._sent_at_ms = [array("q") for _ in range(partitions)]

    def __len__(self) -> int:
        return sum(map(len, self._sent_at_ms))

    def add(self, batch: Acknowledged) -> None:
        """Note an acknowledged batch. Raises `ForeignEvents`."""
        sent = self._sent_at_ms[batch.partition]
        if batch.base_offset != len(sent):
            raise ForeignEvents(
                "somebody else writes to the demo's topics",
                f"offset {batch.base_offset} of partition {batch.partition} where {len(sent)} was next",
                "leave the broker to the demo while it runs",
            )
        sent.extend([batch.sent_at_ms] * len(batch.rows))

    def end_offsets(self) -> list[int]:
        """Of each partition, where the next event goes."""
        return [len(sent) for sent in self._sent_at_ms]

    def at_ms(self, partition: I64, offset: I64) -> I64:
        """Sending times of the events at these offsets; -1 where that is not known yet."""
        result = np.full(len(partition), -1, np.int64)
        for number, sent in enumerate(self._sent_at_ms):
            rows = np.flatnonzero((partition == number) & (offset < len(sent)))
            result[rows] = np.array(sent, np.int64)[offset[rows]]
        return result


@dataclass(frozen=True, slots=True)
class Seen:
    """E embeddings in order of arrival, as columns."""

    user: I64
    partition: I64
    source_offset: I64
    event_time_ms: I64
    received_at_ms: I64

    def __len__(self) -> int:
        return len(self.user)

    def freshness_ms(self, sent: Sent) -> I64:
        """Received minus produced; -1 where the event is not known yet."""
        sent_at_ms = sent.at_ms(self.partition, self.source_offset)
        return np.where(sent_at_ms < 0, -1, self.received_at_ms - sent_at_ms)


class Observer:
    """Reads the embeddings topic from its beginning, in the event loop, until it is told to stop."""

    def __init__(self, settings: Settings, user_keys: Sequence[bytes]) -> None:
        self._settings = settings
        self._user_of = {key.decode(): user for user, key in enumerate(user_keys)}
        self._columns = [array("q") for _ in Seen.__slots__]
        self._vectors: list[F32] = []
        self.reasons: Counter[str] = Counter()
        self.newest_offset = np.full(len(user_keys), -1, np.int64)
        """[U] source offset of each user's newest embedding."""
        self._newest_by_partition = [-1] * settings.topics.partitions

    def __len__(self) -> int:
        return len(self._vectors)

    async def run(self) -> None:
        """Consume until cancelled; raises `InfraError` when the broker is gone."""
        consumer = AIOKafkaConsumer(
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=FETCH_WAIT_MS,
            **self._settings.kafka.client_options(),
        )
        topic = self._settings.topics.embeddings
        try:
            await consumer.start()
            consumer.assign([TopicPartition(topic, number) for number in range(self._settings.topics.partitions)])
            while True:
                fetched = await consumer.getmany(timeout_ms=1_000, max_records=RECORDS_MAX)
                received_at_ms = now_ms()
                for tp, records in fetched.items():
                    self._take(tp.partition, records, received_at_ms)
        except (KafkaError, OSError) as error:
            raise InfraError("the embeddings cannot be read", detail(error), "see that the broker is up") from error
        finally:
            await consumer.stop()

    def seen(self, begin: int = 0) -> Seen:
        """What arrived from number `begin` on."""
        return Seen(*(np.array(column[begin:], np.int64) for column in self._columns))

    def lag(self, sent: Sent) -> int:
        """Events that were sent after the newest event that an embedding contains, over all partitions."""
        return sum(end - 1 - newest for end, newest in zip(sent.end_offsets(), self._newest_by_partition, strict=True))

    def publications(self) -> Publications:
        """Everything that arrived, as the readers of an evaluation hold it."""
        seen = self.seen()
        vectors = np.stack(self._vectors) if self._vectors else np.zeros((0, 1), np.float32)
        return Publications(seen.user, seen.event_time_ms, vectors)

    def last_vectors(self) -> dict[int, F32]:
        """The last embedding of each user."""
        return dict(zip(self._columns[0], self._vectors, strict=True))

    def _take(self, partition: int, records: Sequence[Any], received_at_ms: int) -> None:
        for record in records:
            embedding = decode_embedding(record.key, record.value, record.headers)
            if isinstance(embedding, Tombstone):
                continue
            user, metadata = self._user_of[embedding.user], embedding.metadata
            values = (user, partition, metadata.source_offset, metadata.event_time_ms, received_at_ms)
            for column, value in zip(self._columns, values, strict=True):
                column.append(value)
            self._vectors.append(embedding.vector)
            self.reasons[metadata.reason] += 1
            self.newest_offset[user] = metadata.source_offset
            self._newest_by_partition[partition] = max(self._newest_by_partition[partition], metadata.source_offset)
