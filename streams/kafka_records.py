"""Make one kafka-python consumer read records whose header names are not UTF-8, and name damaged batches.

kafka-python's parser raises at such a name, again at every poll, so a reader could never pass that record. Other
consumers of the process are unaffected: only the given consumer's fetcher is changed.

Private parts relied upon, held by tests/contract/test_records.py: `KafkaConsumer._fetcher`, `Fetcher.PartitionRecords`
(created by `_parse_fetched_data` through the instance), `DefaultRecordBatch._read_msg`, `_buffer` and `_pos`.
"""

from __future__ import annotations

from typing import Any

from kafka import KafkaConsumer
from kafka.consumer.fetcher import Fetcher
from kafka.record.default_records import ControlRecord, DefaultRecord, DefaultRecordBatch

from streams.wire.raw_records import read_record


def tolerate_header_names(consumer: KafkaConsumer) -> KafkaConsumer:
    """Return the consumer, which from now on reads header names of any bytes."""
    consumer._fetcher.PartitionRecords = _PartitionRecords
    return consumer


class _Batch(DefaultRecordBatch):
    """A batch whose header names need not be UTF-8; records that are fine are parsed by kafka-python."""

    __slots__ = ()
    _buffer: bytearray
    _pos: int

    def _read_msg(self, *args: Any) -> Any:
        try:
            return super()._read_msg(*args)
        except UnicodeDecodeError:
            record = read_record(self._buffer, self._pos)
        self._pos = record.end  # type: ignore[misc]  # a slot of the untyped base
        is_append_time = self.timestamp_type == self.LOG_APPEND_TIME
        timestamp = self.max_timestamp if is_append_time else self.first_timestamp + record.timestamp_delta
        kind = ControlRecord if self.is_control_batch else DefaultRecord
        offset = self.base_offset + record.offset_delta
        return kind(record.size, offset, timestamp, self.timestamp_type, record.key, record.value, record.headers)


class _Records:
    """The batches of a fetch response, as `_Batch`."""

    def __init__(self, records: Any) -> None:
        self._records = records

    def next_batch(self) -> Any:
        batch = self._records.next_batch()
        if type(batch) is DefaultRecordBatch:
            batch.__class__ = _Batch
        return batch


class _PartitionRecords(Fetcher.PartitionRecords):
    def __init__(self, fetch_offset: int, tp: Any, records: Any, **options: Any) -> None:
        super().__init__(fetch_offset, tp, _Records(records), **options)
