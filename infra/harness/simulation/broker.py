"""A broker in memory: logs with transactions, a last stable offset and compaction; fencing; committed offsets.

It keeps the rules of Kafka that the worker relies on, and passes the same contract tests as a real broker
(tests/contract/test_changelog.py and test_outputs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from aiokafka.errors import MessageSizeTooLargeError, OutOfOrderSequenceNumber, ProducerFenced
from aiokafka.structs import TopicPartition

from streams.wire.embeddings import Message

RECORD_OVERHEAD_BYTES = 90
"""What a batch of one record adds to key, value and headers."""


@dataclass(frozen=True, slots=True)
class Record:
    """A record as a consumer returns it, with the producer that wrote it."""

    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    offset: int
    timestamp: int = 0
    timestamp_type: int = 0
    writer: int = 0


@dataclass(slots=True)
class Log:
    """One partition of a topic."""

    records: dict[int, Record] = field(default_factory=dict)
    """Committed records by offset; markers, aborted and compacted records leave gaps."""
    uncommitted: dict[int, Record] = field(default_factory=dict)
    """Records of open and of aborted transactions, by offset."""
    begin: int = 0
    end: int = 0
    """High watermark: the offset after the last record or marker."""
    open: dict[int, int] = field(default_factory=dict)
    """First offset of each open transaction, by producer."""

    @property
    def stable(self) -> int:
        """Last stable offset: every record before it is committed or aborted."""
        return min(self.open.values(), default=self.end)

    def append(
        self, messages: Sequence[Message], *, writer: int = 0, is_transactional: bool = False, timestamp: int = 0
    ) -> int:
        """Append records and return the offset of the first."""
        first = self.end
        if is_transactional:
            self.open.setdefault(writer, first)
        into = self.uncommitted if is_transactional else self.records
        for key, value, headers in messages:
            into[self.end] = Record(key, value, tuple(headers), self.end, timestamp, 0, writer)
            self.end += 1
        return first

    def end_transaction(self, writer: int, *, commit: bool) -> None:
        """Commit or abort the open transaction of a producer, if there is one; its marker takes an offset."""
        first = self.open.pop(writer, None)
        if first is None:
            return
        if commit:
            mine = [at for at, each in self.uncommitted.items() if at >= first and each.writer == writer]
            self.records |= {at: self.uncommitted.pop(at) for at in mine}
        self.end += 1

    def read(self, position: int, records_max: int, *, committed: bool = True) -> tuple[list[Record], int]:
        """Return records from `position` on, and the position after them and after what is invisible behind them."""
        end, found = self.stable if committed else self.end, list[Record]()
        for offset in range(position, end):
            record = self.records.get(offset) or (None if committed else self.uncommitted.get(offset))
            if record is not None:
                if len(found) == records_max:
                    return found, offset
                found.append(record)
        return found, max(position, end)

    def delete_before(self, offset: int) -> None:
        """Delete records, as retention does."""
        self.begin = max(self.begin, offset)
        self.records = {at: each for at, each in self.records.items() if at >= offset}

    def compact(self, *, drop_tombstones: bool) -> None:
        """Keep only the last stable record of each key, at its offset; a tombstone may go too."""
        stable = {offset: each for offset, each in sorted(self.records.items()) if offset < self.stable}
        last = {each.key: offset for offset, each in stable.items()}
        keep = {offset for key, offset in last.items() if stable[offset].value is not None or not drop_tombstones}
        self.records = {at: each for at, each in self.records.items() if at in keep or at >= self.stable}


@dataclass(slots=True)
class Topic:
    """A topic: its id, which another topic of the same name would not have, and its partitions."""

    id: str
    logs: list[Log]
    batch_bytes_max: int = 1_048_588


@dataclass(slots=True)
class Broker:
    """Everything that survives the workers."""

    topics: dict[str, Topic] = field(default_factory=dict)
    committed: dict[tuple[str, TopicPartition], tuple[int, str]] = field(default_factory=dict)
    """Offset and metadata by consumer group and partition."""
    cluster_id: str = "simulated"
    on_produced: Callable[[int, TopicPartition, Sequence[Message]], None] = lambda producer, tp, messages: None
    """Called before each batch is appended."""
    _topic_ids: int = 0
    _producers: int = 0
    _current: dict[str, int] = field(default_factory=dict)
    """Producer that may write under each transactional id; all earlier ones are fenced."""
    _ids: dict[int, str] = field(default_factory=dict)
    _offsets: dict[int, dict[tuple[str, TopicPartition], tuple[int, str]]] = field(default_factory=dict)
    """Offsets in the open transaction of each producer."""
    _sequences: dict[tuple[int, TopicPartition], int] = field(default_factory=dict)
    """Records accepted by producer and partition."""

    def create(self, topic: str, partitions: int) -> Topic:
        """Create a topic, in place of one of that name; its id is new."""
        self._topic_ids += 1
        self.topics[topic] = Topic(f"topic-{self._topic_ids}", [Log() for _ in range(partitions)])
        return self.topics[topic]

    def log(self, tp: TopicPartition) -> Log:
        """Return the log of a partition."""
        number: int = tp.partition
        return self.topics[tp.topic].logs[number]

    def start_producer(self, transactional_id: str | None) -> int:
        """Return a new producer; one with a transactional id ends the open transaction of its predecessors."""
        self._producers += 1
        if transactional_id is not None:
            before = self._current.get(transactional_id)
            if before is not None:
                self._end(before, commit=False)
            self._current[transactional_id] = self._producers
            self._ids[self._producers] = transactional_id
        return self._producers

    def produce(self, producer: int, tp: TopicPartition, first: int, messages: Sequence[Message]) -> int:
        """Append a batch whose first record is number `first` of its producer; return its offset."""
        is_transactional = self._check(producer)
        topic = self.topics[tp.topic]
        if size_of(messages) > topic.batch_bytes_max:
            raise MessageSizeTooLargeError
        if self._sequences.get((producer, tp), 0) != first:
            raise OutOfOrderSequenceNumber
        self._sequences[producer, tp] = first + len(messages)
        self.on_produced(producer, tp, messages)
        return self.log(tp).append(messages, writer=producer, is_transactional=is_transactional)

    def add_offsets(self, producer: int, group: str, offsets: dict[TopicPartition, tuple[int, str]]) -> None:
        """Add offsets to the producer's transaction."""
        self._check(producer)
        self._offsets.setdefault(producer, {}).update({(group, tp): each for tp, each in offsets.items()})

    def end_transaction(self, producer: int, *, commit: bool) -> None:
        """Commit or abort the producer's transaction."""
        self._check(producer)
        self._end(producer, commit=commit)

    def _end(self, producer: int, *, commit: bool) -> None:
        for topic in self.topics.values():
            for log in topic.logs:
                log.end_transaction(producer, commit=commit)
        offsets = self._offsets.pop(producer, {})
        if commit:
            self.committed |= offsets

    def _check(self, producer: int) -> bool:
        """Return whether the producer is a transactional one; raise if a newer one has fenced it."""
        transactional_id = self._ids.get(producer)
        if transactional_id is not None and self.is_fenced(producer, transactional_id):
            raise ProducerFenced
        return transactional_id is not None

    def is_fenced(self, producer: int, transactional_id: str) -> bool:
        """Return whether a newer producer has taken the transactional id over."""
        return self._current[transactional_id] != producer


def size_of(messages: Sequence[Message]) -> int:
    """Return the size of a batch."""
    return RECORD_OVERHEAD_BYTES + sum(
        len(key or b"") + len(value or b"") + sum(len(name) + len(content) for name, content in headers)
        for key, value, headers in messages
    )
