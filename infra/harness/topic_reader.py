"""Read the topics of a run, from where the last read ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import kafka
from kafka.errors import KafkaError, LeaderNotAvailableError

from infra.harness.history import History, LogRecord
from streams.config.settings import Settings
from streams.kafka_records import tolerate_header_names

POLL_MS = 200
PARTITION_FETCH_BYTES_MAX = 4 << 20
RECONNECT_MAX_MS, ENDS_MS = 500, 2_000
"""Limits of waits that are 30 s by default and would look like workers that do not resume. kafka-python asks a broker
that leads a partition no longer for its end again and again, and never who leads it now; a new client asks that first.
"""


class HistoryReader:
    """Reads every topic of one application; aborted transactions are invisible to it.

    Each method raises `KafkaError` when the broker does not answer, and can then be called again.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._next: dict[str, dict[int, int]] = {}
        self._consumer: Any = None
        self._admin: Any = None

    def read_new(self) -> History:
        """Return the records appended since the last call.

        The input topic is read last, so that it reaches at least as far as the topics derived from it.
        """
        names = self._settings.topics
        has_features = self._settings.features.definitions_file is not None
        features = [names.features] if has_features else []
        topics = (self._settings.changelog_topic, names.embeddings, names.dead_letter, *features, names.actions)
        read = {topic: self._read(topic, self._next.get(topic, {})) for topic in topics}
        self._next = {topic: positions for topic, (_, positions) in read.items()}
        changelog, outputs, dead_letters, *more, inputs = (read[topic][0] for topic in topics)
        return History(inputs, changelog, outputs, dead_letters, *more)

    def read_all(self, topic: str) -> list[LogRecord]:
        """Return all records of a topic; `read_new` is unaffected."""
        return self._read(topic, {})[0]

    def restart(self, topic: str) -> None:
        """Read a topic from its beginning again, because it has been created again."""
        self._next.pop(topic, None)
        self.close()

    def skip(self, topic: str, positions: Mapping[int, int]) -> None:
        """Continue to read some partitions of a topic at other offsets, because the log has lost records."""
        self._next[topic] = {**self._next.get(topic, {}), **positions}
        self.close()

    def committed(self) -> dict[int, int]:
        """Return the group's committed offset per input partition; partitions without one are absent."""
        with self._reconnect_on_failure():
            self._admin = self._admin or kafka.KafkaAdminClient(
                bootstrap_servers=self._servers, reconnect_backoff_max_ms=RECONNECT_MAX_MS
            )
            found: Mapping[Any, Any] = self._admin.list_group_offsets(self._settings.app_id)[self._settings.app_id]
        topic = self._settings.topics.actions
        return {tp.partition: each.offset for tp, each in found.items() if tp.topic == topic and each.offset >= 0}

    def ends(self, topic: str | None = None) -> dict[int, int]:
        """Return the offset after the last committed record per partition of a topic, by default the input topic."""
        with self._reconnect_on_failure():
            tps = self._partitions(topic or self._settings.topics.actions)
            ends = self._ends(tps)
        return {tp.partition: end for tp, end in ends.items()}

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        for client in (self._consumer, self._admin):
            if client is not None:
                with suppress(KafkaError, OSError):
                    client.close()
        self._consumer = self._admin = None

    @property
    def _servers(self) -> str:
        return self._settings.kafka.bootstrap_servers

    def _connected(self) -> Any:
        self._consumer = self._consumer or tolerate_header_names(
            kafka.KafkaConsumer(
                bootstrap_servers=self._servers,
                reconnect_backoff_max_ms=RECONNECT_MAX_MS,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                isolation_level="read_committed",
                max_partition_fetch_bytes=PARTITION_FETCH_BYTES_MAX,
            )
        )
        return self._consumer

    def _ends(self, tps: list[Any]) -> Mapping[Any, int]:
        """Return the ends of partitions; raise `KafkaError` if one has no leader, which kafka-python leaves out."""
        try:
            ends: Mapping[Any, int] = self._connected().end_offsets(tps, timeout_ms=ENDS_MS)
        except KeyError as error:
            raise LeaderNotAvailableError(str(error)) from None
        return ends

    @contextmanager
    def _reconnect_on_failure(self) -> Iterator[None]:
        try:
            yield
        except KafkaError:
            self.close()
            raise

    def _partitions(self, topic: str) -> list[Any]:
        return [kafka.TopicPartition(topic, number) for number in range(self._settings.topics.partitions)]

    def _read(self, topic: str, start: Mapping[int, int]) -> tuple[list[LogRecord], dict[int, int]]:
        """Return records from `start`, or from the beginning, to the present end, and the positions after them."""
        with self._reconnect_on_failure():
            consumer, tps = self._connected(), self._partitions(topic)
            consumer.assign(tps)
            for tp in tps:
                if tp.partition in start:
                    consumer.seek(tp, start[tp.partition])
                else:
                    consumer.seek_to_beginning(tp)
            ends = self._ends(tps)
            records: list[LogRecord] = []
            while any(consumer.position(tp) < ends[tp] for tp in tps):
                for batch in consumer.poll(POLL_MS).values():
                    records += [_record(one) for one in batch]
            return records, {tp.partition: consumer.position(tp) for tp in tps}


def _record(record: Any) -> LogRecord:
    headers = tuple((name, bytes(value or b"")) for name, value in record.headers)
    return LogRecord(record.partition, record.offset, record.timestamp, record.key, record.value, headers)
