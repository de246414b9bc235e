"""Records as aiokafka's parser makes them, without the object that aiokafka wraps around each.

Wrapping costs a microsecond a record, more than parsing it, and adds nothing that a batch needs: topic and partition
are those of the batch. A consumer made with `key_deserializer=as_parsed` yields the parser's records: `key`, `value`,
`headers`, `offset`, `timestamp` and `timestamp_type` are theirs, the other attributes of a `ConsumerRecord` are not.
All other consumers of the process are left as they are.

Private parts relied upon, held by tests/contract/test_faust_insides.py: `aiokafka.consumer.fetcher.PartitionRecords`
(`__iter__`, `__next__`, `_unpack_records`, `_consumer_record`) and `FetchResult.getall`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aiokafka.consumer import fetcher


def as_parsed(key: bytes | None) -> bytes | None:
    """The key as it is; given as `key_deserializer`, it asks for the parser's records."""
    return key


class ParsedRecords(fetcher.PartitionRecords):
    """One partition of a fetch response; aiokafka makes them all of this class once this module is imported."""

    def __iter__(self) -> Iterator[Any]:
        records: Iterator[Any] = self._records_iterator
        return records

    def _consumer_record(self, tp: Any, record: Any) -> Any:
        if self._key_deserializer is as_parsed:
            return record
        return super()._consumer_record(tp, record)


fetcher.PartitionRecords = ParsedRecords
