"""Reads what the topics of a run hold, as the checker takes it; knows where it stopped reading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import kafka
from kafka.errors import KafkaError

from infra.chaos.checks.checker import History
from infra.harness.model import LogRecord
from streams.config.settings import Settings

POLL_MS = 200


class HistoryReader:
    """Reads every topic of one application, committed records only."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._next: dict[str, dict[int, int]] = {}
        self._consumer: Any = None
        self._admin: Any = None

    def read_new(self) -> History:
        """What has been added to each topic since the last call; the input topic reaches at least as far as others.

        Raises `KafkaError` when the broker does not answer; then nothing has been taken in.
        """
        names = self._settings.topics
        topics = (self._settings.changelog_topic, names.embeddings, names.dead_letter, names.actions)
        read = {topic: self._read(topic, self._next.get(topic, {})) for topic in topics}
        self._next = {topic: positions for topic, (_, positions) in read.items()}
        changelog, outputs, dead_letters, inputs = (read[topic][0] for topic in topics)
        return History(inputs, changelog, outputs, dead_letters)

    def restart(self, topic: str) -> None:
        """The topic has been created again: what it holds now is read from its beginning."""
        self._next.pop(topic, None)
        self.close()

    def committed(self) -> dict[int, int]:
        """The group's committed offset of each partition of the input; partitions without one are absent."""
        with self._renewed_on_failure():
            self._admin = self._admin or kafka.KafkaAdminClient(bootstrap_servers=self._servers)
            found: Mapping[Any, Any] = self._admin.list_group_offsets(self._settings.app_id)[self._settings.app_id]
        topic = self._settings.topics.actions
        return {tp.partition: each.offset for tp, each in found.items() if tp.topic == topic and each.offset >= 0}

    def ends(self, topic: str | None = None) -> dict[int, int]:
        """Past the last committed record of each partition of a topic, the input where none is named."""
        with self._renewed_on_failure():
            tps = self._partitions(topic or self._settings.topics.actions)
            ends: Mapping[Any, int] = self._opened().end_offsets(tps)
        return {tp.partition: end for tp, end in ends.items()}

    def read_all(self, topic: str) -> list[LogRecord]:
        """Everything a topic holds, apart from what `read_new` has read."""
        return self._read(topic, {})[0]

    def close(self) -> None:
        """Drop the connections; the next call makes new ones."""
        for client in (self._consumer, self._admin):
            if client is not None:
                with suppress(KafkaError, OSError):
                    client.close()
        self._consumer = self._admin = None

    @property
    def _servers(self) -> str:
        return self._settings.kafka.bootstrap_servers

    def _opened(self) -> Any:
        self._consumer = self._consumer or kafka.KafkaConsumer(
            bootstrap_servers=self._servers,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            max_partition_fetch_bytes=4 << 20,
        )
        return self._consumer

    @contextmanager
    def _renewed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except KafkaError:
            self.close()
            raise

    def _partitions(self, topic: str) -> list[Any]:
        return [kafka.TopicPartition(topic, number) for number in range(self._settings.topics.partitions)]

    def _read(self, topic: str, start: Mapping[int, int]) -> tuple[list[LogRecord], dict[int, int]]:
        """Records from `start` (or the beginning) to the present end, and the positions behind them."""
        with self._renewed_on_failure():
            consumer, tps = self._opened(), self._partitions(topic)
            consumer.assign(tps)
            for tp in tps:
                if tp.partition in start:
                    consumer.seek(tp, start[tp.partition])
                else:
                    consumer.seek_to_beginning(tp)
            ends = consumer.end_offsets(tps)
            records: list[LogRecord] = []
            while any(consumer.position(tp) < ends[tp] for tp in tps):
                for batch in consumer.poll(POLL_MS).values():
                    records += [_record(one) for one in batch]
            return records, {tp.partition: consumer.position(tp) for tp in tps}


def _record(record: Any) -> LogRecord:
    headers = tuple((name, bytes(value or b"")) for name, value in record.headers)
    return LogRecord(record.partition, record.offset, record.timestamp, record.key, record.value, headers)
