"""The subscriber of the demo: it receives every embedding and keeps what the report needs of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from aiokafka.errors import KafkaError

from encoder.arrays import F32
from infra.demo.recall import Publications
from infra.errors import InfraError, detail
from infra.harness.freshness import Received, Sent, reading
from streams.config.settings import Settings
from streams.wire.embeddings import Tombstone, decode_embedding


class Observer:
    """Receives the embeddings of numbered users, from the beginning of the topic on."""

    def __init__(self, settings: Settings, user_keys: Sequence[bytes]) -> None:
        self._settings = settings
        self._user_of = {key.decode(): user for user, key in enumerate(user_keys)}
        self._vectors: list[F32] = []
        self.received = Received()
        self.reasons: Counter[str] = Counter()
        """Embeddings by the trigger that caused them."""
        self.newest_offset = np.full(len(user_keys), -1, np.int64)
        """[U] source offset of each user's newest embedding."""
        self._newest_by_partition = [-1] * settings.topics.partitions

    def __len__(self) -> int:
        return len(self.received)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Callable[[], None]]:
        """Receive until the end of the block; the yielded function raises `InfraError` when the broker is gone."""
        topics = self._settings.topics
        client = self._settings.kafka.client_options()
        try:
            async with reading(topics.embeddings, topics.partitions, client, self.take, from_end=False) as require:
                yield require
        except (KafkaError, OSError) as error:
            raise InfraError("cannot read the embeddings", detail(error), "check that the broker is up") from error

    def take(self, partition: int, records: Sequence[Any], at_s: float) -> None:
        """Keep records that have arrived."""
        for record in records:
            embedding = decode_embedding(record.key, record.value, record.headers)
            if isinstance(embedding, Tombstone):
                continue
            user, metadata = self._user_of[embedding.user], embedding.metadata
            self.received.add(user, partition, metadata.source_offset, metadata.event_time_ms, at_s)
            self._vectors.append(embedding.vector)
            self.reasons[metadata.reason] += 1
            self.newest_offset[user] = metadata.source_offset
            self._newest_by_partition[partition] = max(self._newest_by_partition[partition], metadata.source_offset)

    def lag(self, sent: Sent) -> int:
        """Return the events sent after the newest event that an embedding contains, over all partitions."""
        return sum(sent.end(number) - 1 - newest for number, newest in enumerate(self._newest_by_partition))

    def publications(self) -> Publications:
        """Return everything that arrived, for the comparison of readers."""
        embeddings = self.received.columns()
        vectors = np.stack(self._vectors) if self._vectors else np.zeros((0, 1), np.float32)
        return Publications(embeddings.user, embeddings.event_time_ms, vectors)

    def last_vectors(self) -> dict[int, F32]:
        """Return the last embedding of each user."""
        return dict(zip(self.received.columns().user.tolist(), self._vectors, strict=True))
