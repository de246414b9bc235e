"""The library for consumers of embeddings.

    with EmbeddingSubscriber("127.0.0.1:9092", from_beginning=True) as subscriber:
        newest = subscriber.table()           # user id -> Embedding, as of now
        for change in subscriber:             # then every change as it arrives
            if isinstance(change, Tombstone):
                newest.pop(change.user, None)
            else:
                newest[change.user] = change

The topic is delivered at least once. For each user and encoder version, the subscriber drops and counts changes that
are older than, or equal to, one already seen. The topic is compacted, so a reader that starts at its beginning gets
every user's newest embedding and needs no committed position. Records that are not embeddings are counted and skipped.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Self

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import CorruptRecordError, KafkaError

from streams.errors import BrokerUnreachable, CannotStart, StreamformerError
from streams.kafka_records import tolerate_header_names
from streams.wire.embeddings import Embedding, MalformedEmbedding, Tombstone, decode_embedding

logger = logging.getLogger(__name__)

Change = Embedding | Tombstone

ANSWER_MS = 5_000
"""Time that the broker has to respond at the start."""
RECONNECT_MAX_MS = 1_000
"""Longest time between two attempts to reach a broker, as in Kafka's Java clients; kafka-python would wait up to 30 s
after a broker is back."""
CHECK_ADDRESS = "check the address and that the broker is up"


class DamagedTopic(StreamformerError):
    """A record batch of the topic is damaged, so what follows in its partition cannot be read."""


class EmbeddingSubscriber:
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
        options = {
            "reconnect_backoff_max_ms": RECONNECT_MAX_MS,
            **(client or {}),
            "bootstrap_servers": bootstrap_servers,
        }
        self._freshest = Freshest(users_max)
        self.malformed = 0
        """Number of records skipped because they are not embeddings."""
        try:
            self._consumer = KafkaConsumer(
                group_id=None,
                enable_auto_commit=False,
                auto_offset_reset="earliest" if from_beginning else "latest",
                bootstrap_timeout_ms=ANSWER_MS,
                **options,
            )
            tolerate_header_names(self._consumer)
            self._assign(topic, partitions)
        except KafkaError as error:
            raise BrokerUnreachable(f"no broker answers at {bootstrap_servers}", str(error), CHECK_ADDRESS) from None

    @property
    def stale(self) -> int:
        """Number of changes dropped because a newer one of the same user and encoder version had been seen."""
        return self._freshest.stale

    @property
    def repeated(self) -> int:
        """Number of changes dropped because they had been seen."""
        return self._freshest.repeated

    def __iter__(self) -> Iterator[Change]:
        """Yield every change as it arrives, without end; wait while the broker is away."""
        while True:
            yield from self.poll(1_000)

    def poll(self, timeout_ms: int, records_max: int = 500) -> list[Change]:
        """Return the changes in at most `records_max` records; an empty list if none arrives in `timeout_ms`.

        Raises `DamagedTopic` at a record batch whose checksum or content is damaged; no call can pass it.
        """
        try:
            fetched = self._consumer.poll(timeout_ms=timeout_ms, max_records=records_max)
        except CorruptRecordError as error:
            remedy = "publish the users again (a worker does after a new app_id), or restore the batch from a replica"
            raise DamagedTopic("the topic holds a record batch that cannot be read", str(error), remedy) from None
        return [change for records in fetched.values() for change in self._changes(records)]

    def table(self) -> dict[str, Embedding]:
        """Read up to the present end of the topic; return the newest embedding of each user not forgotten."""
        held: dict[str, Embedding] = {}
        waiting = self._consumer.end_offsets(list(self._consumer.assignment()))
        while waiting:
            for change in self.poll(200, records_max=5_000):
                if isinstance(change, Tombstone):
                    held.pop(change.user, None)
                else:
                    held[change.user] = change
            waiting = {tp: end for tp, end in waiting.items() if self._consumer.position(tp) < end}
        return held

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _assign(self, topic: str, partitions: Collection[int] | None) -> None:
        existing = self._consumer.partitions_for_topic(topic) or set()
        wanted = existing if partitions is None else set(partitions)
        if not wanted or not wanted <= existing:
            self.close()
            detail = f"{topic} has the partitions {sorted(existing)}" if existing else f"{topic} does not exist"
            raise CannotStart("nothing to read", detail, "check topic and partitions in the settings")
        tps = [TopicPartition(topic, number) for number in sorted(wanted)]
        self._consumer.assign(tps)
        for tp in tps:
            self._consumer.position(tp)  # resolves the end now, so that everything published from here on is read

    def _changes(self, records: Iterable[Any]) -> Iterator[Change]:
        for record in records:
            try:
                change = decode_embedding(record.key, record.value, record.headers)
            except MalformedEmbedding as error:
                self.malformed += 1
                logger.warning("skipped offset %d of partition %d: %s", record.offset, record.partition, error)
                continue
            if self._freshest.accepts(change):
                yield change


class Freshest:
    """Decides whether a change is new, by the source offsets seen before it.

    An embedding is new unless the same or a later offset was seen in an embedding of the same user and encoder version
    or in the user's tombstone. A tombstone is new unless the same or a later offset was seen in any change of the user.
    Offsets of different source logs cannot be compared: the first change of a user from another log is new, unless the
    log is an earlier life of the one seen last. Beyond `users_max` users, the user without a change for longest is
    forgotten, and its next change is new.
    """

    def __init__(self, users_max: int) -> None:
        self._users_max = users_max
        self._offsets: OrderedDict[str, dict[str | None, int]] = OrderedDict()
        """User -> encoder version (None for the tombstone) -> newest source offset."""
        self._sources: dict[str, str] = {}
        """User -> id of the source log of its last change, where known."""
        self.stale = self.repeated = 0

    def accepts(self, change: Change) -> bool:
        """Return whether `change` is new, and remember it if so."""
        offsets = self._offsets.setdefault(change.user, {})
        self._offsets.move_to_end(change.user)
        if len(self._offsets) > self._users_max:
            self._sources.pop(self._offsets.popitem(last=False)[0], None)
        source_id = change.source_id if isinstance(change, Tombstone) else change.metadata.source_id
        if source_id and not self._follows(change.user, source_id, offsets):
            self.stale += 1
            return False
        if isinstance(change, Tombstone):
            return self._is_new(offsets, None, change.source_offset, max(offsets.values(), default=-1))
        version, offset = change.metadata.encoder_version, change.metadata.source_offset
        return self._is_new(offsets, version, offset, max(offsets.get(version, -1), offsets.get(None, -1)))

    def _follows(self, user: str, source_id: str, offsets: dict[str | None, int]) -> bool:
        """Return False for an earlier life of the same log; forget the offsets of another log."""
        seen = self._sources.get(user, "")
        (topic_id, _, life), (seen_topic_id, _, seen_life) = source_id.partition("/"), seen.partition("/")
        if topic_id == seen_topic_id and _number(life) < _number(seen_life):
            return False
        if source_id != seen and (seen or life):  # a first id without a life may be that of the offsets seen so far
            offsets.clear()
        self._sources[user] = sys.intern(source_id)
        return True

    def _is_new(self, offsets: dict[str | None, int], of: str | None, offset: int, seen: int) -> bool:
        if 0 <= offset <= seen:
            self.stale += offset < seen
            self.repeated += offset == seen
            return False
        offsets[of] = max(offset, offsets.get(of, -1))
        return True


def _number(life: str) -> int:
    return int(life) if life.isascii() and life.isdigit() else 0


def as_json(change: Change) -> str:
    """Return one line of JSON: the vector with its metadata, or the tombstone."""
    if isinstance(change, Tombstone):
        return json.dumps({"user": change.user, "tombstone": True, "source_offset": change.source_offset})
    metadata = change.metadata
    return json.dumps(
        {
            "user": change.user,
            "encoder_version": metadata.encoder_version,
            "event_time_ms": metadata.event_time_ms,
            "sequence_length": metadata.sequence_length,
            "reason": metadata.reason,
            "source_offset": metadata.source_offset,
            "encoded_at_ms": metadata.encoded_at_ms,
            "vector": [float(text) for text in change.vector.astype(str)],
        }
    )
