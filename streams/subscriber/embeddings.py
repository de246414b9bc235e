"""The subscriber of embeddings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from streams.subscriber.base import Subscriber
from streams.subscriber.freshest import Change, Freshest
from streams.subscriber.reader import TopicReader
from streams.wire.embeddings import Embedding, MalformedEmbedding, decode_embedding


class EmbeddingSubscriber(Subscriber[Embedding]):
    """Reads the embeddings of a topic, in order per user; not safe to share between threads."""

    def __init__(
        self,
        bootstrap_servers: str,
        *,
        topic: str = "user-embeddings",
        from_beginning: bool = False,
        partitions: Collection[int] | None = None,
        users_max: int = 1_000_000,
        client: Mapping[str, Any] | None = None,
    ) -> None:
        """Connect, at the end of the topic or at its beginning.

        Args:
            bootstrap_servers: Addresses of brokers, `host:port`, separated by commas.
            topic: Topic of the embeddings.
            from_beginning: Whether to read the embeddings that the topic already holds.
            partitions: Partitions to read, so that readers can share the users; None reads all.
            users_max: Number of users whose newest change is remembered, to recognise older ones.
            client: Further options of kafka-python, for instance for security.

        Raises:
            BrokerUnreachable: No broker responds.
            CannotStart: The topic or one of the partitions does not exist.
        """
        super().__init__()
        self._freshest = Freshest(users_max)
        self._reader = TopicReader(
            bootstrap_servers, [topic], from_beginning=from_beginning, partitions=partitions, client=client
        )

    @property
    def stale(self) -> int:
        """Number of changes dropped because a newer one of the same user and encoder version had been seen."""
        return self._freshest.stale

    @property
    def repeated(self) -> int:
        """Number of changes dropped because they had been seen."""
        return self._freshest.repeated

    def _changes(self, records: Iterable[Any]) -> Iterator[Change]:
        for record in records:
            try:
                change = decode_embedding(record.key, record.value, record.headers)
            except MalformedEmbedding as error:
                self._skip(record, error)
                continue
            if self._freshest.accepts(change):
                yield change
