"""Records of a fetch response, as the engine parses them: fast, tolerant, and exact about what cannot be read.

aiokafka wraps each record that it has parsed into a `ConsumerRecord`. Wrapping costs a microsecond per record, more
than parsing it, and adds nothing that a batch needs, because topic and partition are those of the batch. A consumer
created with a `Parsing` as its `key_deserializer` therefore gets the parser's records, which have `key`, `value`,
`headers`, `offset`, `timestamp` and `timestamp_type`, but no other attribute of a `ConsumerRecord`.

Three kinds of input make aiokafka's parser raise, again at every fetch:

- a header name that is not UTF-8: the batch is parsed again by `streams.wire.raw_records`;
- a batch that is damaged (checksum, length, format, compressed content): it is named by its range of offsets, and then
  either reported or skipped, as `Parsing` says. Records before it are delivered first;
- a batch that is cut off, because its length is damaged: aiokafka would skip one offset without a trace. It is treated
  as damaged.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException, UnsupportedCodecError
from aiokafka.record.default_records import _DefaultRecordBatchPy, _DefaultRecordPy
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.structs import TopicPartition

from streams.errors import StreamformerError
from streams.wire.raw_records import read_record

_LENGTH = struct.Struct(">qi")  # base offset, number of bytes after these two fields
_LAST_OFFSET_DELTA = struct.Struct(">i")
_LAST_OFFSET_DELTA_AT = 23
RECORDS_PER_BATCH_MAX = 10_000_000
"""Beyond any batch of a broker; a larger number in a damaged header is not believed."""


class CorruptBatch(StreamformerError):
    """A record batch of the log cannot be parsed; `first` to `last` are the offsets that it holds."""

    def __init__(self, tp: TopicPartition, first: int, last: int, detail: str) -> None:
        super().__init__(
            f"the batch of topic {tp.topic}, partition {tp.partition}, offsets {first} to {last}, cannot be read",
            detail,
            "restore it from a replica, or skip it: see docs/guides/operate.md",
        )
        self.tp, self.first, self.last = tp, first, last


@dataclass(slots=True)
class Parsing:
    """A consumer's `key_deserializer` that requests the parser's records; it also collects what the parser found."""

    skip_corrupt: bool = False
    """Whether damaged batches are skipped instead of reported."""
    report: bool = False
    """Whether damaged batches are collected in `faults`; otherwise they raise out of the fetch."""
    faults: dict[TopicPartition, CorruptBatch] = field(default_factory=dict)
    """Batch at which a partition cannot go on."""
    skipped: dict[TopicPartition, list[CorruptBatch]] = field(default_factory=dict)
    reached: dict[TopicPartition, int] = field(default_factory=dict)
    """Offset after the last response that was parsed completely, also if it held no visible record."""
    jumps: dict[TopicPartition, int] = field(default_factory=dict)
    """Offset of a response that does not continue where the one before ended: the position was reset in between."""

    def __call__(self, key: bytes | None) -> bytes | None:
        """Return the key unchanged."""
        return key

    def begin(self, tp: TopicPartition, offset: int) -> None:
        """Record that the response fetched at `offset` is parsed."""
        if self.reached.get(tp, offset) != offset:
            self.jumps[tp] = offset

    def forget(self, tp: TopicPartition) -> None:
        """Forget where the partition was: it was sought."""
        for of in (self.faults, self.skipped, self.reached, self.jumps):
            of.pop(tp, None)


class ResponseRecords:
    """The batches of one fetch response of one partition; aiokafka creates this class after `install_overrides`."""

    def __init__(self, data: bytes | None) -> None:
        self._data = data or b""
        self._fast = MemoryRecords(self._data)
        self._taken = 0

    def size_in_bytes(self) -> int:
        """Return the size of the response."""
        return len(self._data)

    def has_next(self) -> bool:
        """Return whether a batch follows; True for a response that holds nothing but a batch that is cut off."""
        return self._fast.has_next() or (self._taken == 0 and bool(self._data))

    def next_batch(self) -> Any:
        """Return the next batch, None if it is cut off."""
        self._taken += 1
        return self._fast.next_batch()

    def current(self) -> memoryview:
        """Return the bytes of the batch that `next_batch` returned last."""
        position = 0
        for _ in range(self._taken - 1):
            position += _LENGTH.size + _LENGTH.unpack_from(self._data, position)[1]
        length = _LENGTH.unpack_from(self._data, position)[1] if len(self._data) >= position + _LENGTH.size else 0
        return memoryview(self._data)[position : position + _LENGTH.size + max(0, length)]

    def range(self, at: int) -> tuple[int, int]:
        """Return the offsets of the batch returned last, not below `at`, as far as its header can be believed."""
        data = self.current()
        if len(data) < _LAST_OFFSET_DELTA_AT + _LAST_OFFSET_DELTA.size:
            return at, at
        (base, _), (delta,) = _LENGTH.unpack_from(data), _LAST_OFFSET_DELTA.unpack_from(data, _LAST_OFFSET_DELTA_AT)
        if data[16] < 2 or not 0 <= delta <= RECORDS_PER_BATCH_MAX or base > at + RECORDS_PER_BATCH_MAX:
            return at, at
        return max(at, base), max(at, base + delta)


class TolerantBatch(_DefaultRecordBatchPy):
    """A batch whose header names need not be UTF-8."""

    _pos: int

    def _read_msg(self, *_: Any) -> Any:
        record = read_record(self._buffer, self._pos)
        self._pos = record.end
        is_append_time = self.timestamp_type == self.LOG_APPEND_TIME
        return _DefaultRecordPy(
            self.base_offset + record.offset_delta,
            self.max_timestamp if is_append_time else self.first_timestamp + record.timestamp_delta,
            self.timestamp_type,
            record.key,
            record.value,
            record.headers,
        )


class ParsedRecords(fetcher.PartitionRecords):
    """The records of one partition in a fetch response; aiokafka creates this class after `install_overrides`."""

    next_fetch_offset: int

    def __iter__(self) -> Iterator[Any]:
        records: Iterator[Any] = self._records_iterator
        return records

    def _unpack_records(self) -> Iterator[Any]:
        """Yield the records from `next_fetch_offset` on, and move it; a damaged batch ends the response."""
        tp, given = self._tp, self._key_deserializer
        parsing = given if isinstance(given, Parsing) else None
        if parsing is not None:
            parsing.begin(tp, self.next_fetch_offset)
        has_yielded = False
        try:
            while self._records.has_next():
                batch = self._visible(self._records.next_batch())
                while batch is not None:
                    try:
                        for record in batch:
                            if record.offset < self.next_fetch_offset:  # a batch is fetched whole
                                continue
                            item = record if parsing is not None else self._consumer_record(tp, record)
                            self.next_fetch_offset = record.offset + 1
                            has_yielded = True
                            yield item
                        self.next_fetch_offset = batch.next_offset  # compaction may have removed its last record
                        break
                    except UnicodeDecodeError:
                        batch = self._tolerant(batch)
        except Exception as error:  # a parser may raise anything on damaged bytes
            if not has_yielded:  # otherwise the next fetch begins at the damaged batch
                self._damaged(parsing, error)
        if parsing is not None:
            parsing.reached[tp] = self.next_fetch_offset

    def _tolerant(self, batch: Any) -> TolerantBatch:
        """Return the batch returned last, to be parsed again; records that were yielded are passed over."""
        if isinstance(batch, TolerantBatch):
            raise CorruptRecordException("a deserializer cannot read it")
        return TolerantBatch(self._records.current())

    def _damaged(self, parsing: Parsing | None, error: Exception) -> None:
        """Skip, report or raise the batch that was returned last."""
        first, last = self._records.range(self.next_fetch_offset)
        fault = CorruptBatch(self._tp, first, last, f"{type(error).__name__}: {error}")
        if parsing is None or not (parsing.skip_corrupt or parsing.report):
            raise fault from error
        if parsing.skip_corrupt and not isinstance(error, UnsupportedCodecError):
            parsing.skipped.setdefault(self._tp, []).append(fault)
            self.next_fetch_offset = last + 1
        else:
            parsing.faults[self._tp] = fault

    def _visible(self, batch: Any) -> Any:
        """Return the batch; None if it is a marker or part of an aborted transaction; raise if it is damaged."""
        if batch is None:
            raise CorruptRecordException("its length reaches beyond the response")
        if getattr(batch, "magic", 0) > 2:
            raise CorruptRecordException(f"its format {batch.magic} is unknown")
        if self._check_crcs and not batch.validate_crc():
            raise CorruptRecordException("its checksum is wrong")
        if self._isolation_level == fetcher.READ_COMMITTED and batch.producer_id is not None:
            self._consume_aborted_up_to(batch.base_offset)
            if batch.is_control_batch and self._contains_abort_marker(batch):
                self._aborted_producers.discard(batch.producer_id)
            if batch.is_transactional and batch.producer_id in self._aborted_producers:
                self.next_fetch_offset = batch.next_offset
                return None
        if batch.is_control_batch:
            self.next_fetch_offset = batch.next_offset
            return None
        return batch
