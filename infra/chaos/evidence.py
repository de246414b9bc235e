"""Reads what the topics of a run hold, as the checker takes it; knows where it stopped reading."""

from __future__ import annotations

from collections.abc import Mapping

import kafka

from infra.chaos.checker import Evidence
from infra.chaos.truth import LogRecord
from streams.settings import Settings

POLL_MS = 200


class Gatherer:
    """Reads every topic of one application, committed records only."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._next: dict[str, dict[int, int]] = {}
        self._group = settings.app_id
        self._topic = settings.topics.actions

    def gather(self) -> Evidence:
        """What has been added to each topic since the last call; the input topic reaches at least as far as others."""
        names = self._settings.topics
        topics = (self._settings.changelog_topic, names.embeddings, names.dead_letter, names.actions)
        read = {topic: self._read(topic, self._next.get(topic, {})) for topic in topics}
        self._next = {topic: positions for topic, (_, positions) in read.items()}
        changelog, outputs, dead_letters, inputs = (read[topic][0] for topic in topics)
        return Evidence(inputs, changelog, outputs, dead_letters)

    def committed(self) -> dict[int, int]:
        """The group's committed offset of each partition of the input."""
        admin = kafka.KafkaAdminClient(bootstrap_servers=self._settings.kafka.bootstrap_servers)
        try:
            return committed_offsets(admin, self._group, self._topic)
        finally:
            admin.close()

    def peek(self, topic: str) -> bool:
        """Whether a topic holds anything."""
        return bool(self.read_all(topic))

    def read_all(self, topic: str) -> list[LogRecord]:
        """Everything a topic holds, apart from what `gather` has read."""
        return self._read(topic, {})[0]

    def _read(self, topic: str, start: Mapping[int, int]) -> tuple[list[LogRecord], dict[int, int]]:
        """Records from `start` (or the beginning) to the present end, and the positions behind them."""
        consumer = kafka.KafkaConsumer(
            bootstrap_servers=self._settings.kafka.bootstrap_servers,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            max_partition_fetch_bytes=4 << 20,
        )
        try:
            return self._read_with(consumer, topic, start)
        finally:
            consumer.close()

    def _read_with(
        self, consumer: kafka.KafkaConsumer, topic: str, start: Mapping[int, int]
    ) -> tuple[list[LogRecord], dict[int, int]]:
        tps = [kafka.TopicPartition(topic, number) for number in range(self._settings.topics.partitions)]
        consumer.assign(tps)
        for tp in tps:
            if tp.partition in start:
                consumer.seek(tp, start[tp.partition])
        ends = consumer.end_offsets(tps)
        records: list[LogRecord] = []
        while any(consumer.position(tp) < ends[tp] for tp in tps):
            for batch in consumer.poll(POLL_MS).values():
                records += [_record(one) for one in batch]
        return records, {tp.partition: consumer.position(tp) for tp in tps}


def committed_offsets(admin: kafka.KafkaAdminClient, group: str, topic: str) -> dict[int, int]:
    """Partition -> committed offset; partitions without one are absent."""
    found: Mapping[kafka.TopicPartition, kafka.structs.OffsetAndMetadata]
    found = admin.list_group_offsets(group)[group]
    return {tp.partition: each.offset for tp, each in found.items() if tp.topic == topic and each.offset >= 0}


def _record(one: object) -> LogRecord:
    record: kafka.consumer.fetcher.ConsumerRecord = one
    headers = tuple((name, bytes(value or b"")) for name, value in record.headers)
    return LogRecord(record.partition, record.offset, record.timestamp, record.key, record.value, headers)
