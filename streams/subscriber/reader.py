"""Reading of topics from a position on, without a consumer group: what all subscribers have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import CorruptRecordError, KafkaError

from streams.errors import BrokerUnreachable, CannotStart, StreamformerError
from streams.kafka_records import tolerate_header_names

ANSWER_MS = 5_000
"""Time that the broker has to respond at the start."""
RECONNECT_MAX_MS = 1_000
"""Longest time between two attempts to reach a broker, as in Kafka's Java clients; kafka-python would wait up to 30 s
after a broker is back."""
CHECK_ADDRESS = "check the address and that the broker is up"


class DamagedTopic(StreamformerError):
    """A record batch of the topic is damaged, so what follows in its partition cannot be read."""


class TopicReader:
    """The records of some partitions of topics."""

    def __init__(
        self,
        bootstrap_servers: str,
        topics: Sequence[str],
        *,
        from_beginning: bool,
        partitions: Collection[int] | None,
        client: Mapping[str, Any] | None,
    ) -> None:
        """Connect, at the end of the topics or at their beginning; read the same `partitions` of each, None is all."""
        options = {
            "reconnect_backoff_max_ms": RECONNECT_MAX_MS,
            **(client or {}),
            "bootstrap_servers": bootstrap_servers,
        }
        try:
            self._consumer = KafkaConsumer(
                group_id=None,
                enable_auto_commit=False,
                auto_offset_reset="earliest" if from_beginning else "latest",
                bootstrap_timeout_ms=ANSWER_MS,
                **options,
            )
            tolerate_header_names(self._consumer)
            self._assign([tp for topic in topics for tp in self._wanted(topic, partitions)])
        except KafkaError as error:
            raise BrokerUnreachable(f"no broker answers at {bootstrap_servers}", str(error), CHECK_ADDRESS) from None

    def poll(self, timeout_ms: int, records_max: int) -> list[Any]:
        """Return at most `records_max` records, in order per partition; none if none arrives in `timeout_ms`.

        Raises `DamagedTopic` at a record batch whose checksum or content is damaged; no call can pass it.
        """
        try:
            fetched = self._consumer.poll(timeout_ms=timeout_ms, max_records=records_max)
        except CorruptRecordError as error:
            remedy = "publish the users again (a worker does after a new app_id), or restore the batch from a replica"
            raise DamagedTopic("the topic holds a record batch that cannot be read", str(error), remedy) from None
        return [record for records in fetched.values() for record in records]

    def until_end(self) -> Iterator[list[Any]]:
        """Yield records up to the present end of all partitions."""
        waiting = self._consumer.end_offsets(list(self._consumer.assignment()))
        while waiting:
            yield self.poll(200, records_max=5_000)
            waiting = {tp: end for tp, end in waiting.items() if self._consumer.position(tp) < end}

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()

    def _wanted(self, topic: str, partitions: Collection[int] | None) -> list[TopicPartition]:
        existing = self._consumer.partitions_for_topic(topic) or set()
        wanted = existing if partitions is None else set(partitions)
        if not wanted or not wanted <= existing:
            self.close()
            detail = f"{topic} has the partitions {sorted(existing)}" if existing else f"{topic} does not exist"
            raise CannotStart("nothing to read", detail, "check topic and partitions in the settings")
        return [TopicPartition(topic, number) for number in sorted(wanted)]

    def _assign(self, tps: Sequence[TopicPartition]) -> None:
        self._consumer.assign(tps)
        for tp in tps:
            self._consumer.position(tp)  # resolves the end now, so that everything published from here on is read
