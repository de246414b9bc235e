"""Overrides inside Faust and aiokafka, installed by one visible call: `install_overrides`.

aiokafka wraps each record that it has parsed into a `ConsumerRecord`. Wrapping costs a microsecond per record, more
than parsing it, and adds nothing that a batch needs, because topic and partition are those of the batch. A consumer
created with `key_deserializer=as_parsed` therefore yields the parser's records, which have `key`, `value`, `headers`,
`offset`, `timestamp` and `timestamp_type`, but no other attribute of a `ConsumerRecord`. All other consumers of the
process are unaffected.

Consumers with a group get the coordinator of `streams.engine.membership`.

Private parts relied upon, held by tests/contract/test_faust_insides.py: `aiokafka.consumer.fetcher.PartitionRecords`
(`__iter__`, `__next__`, `_unpack_records`, `_consumer_record`) and `FetchResult.getall`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aiokafka.consumer import consumer, fetcher
from faust import stores

from streams.engine.membership import WatchedCoordinator

STORE_SCHEME = "streamformer-rocksdb"
STORE_URL = f"{STORE_SCHEME}://"
STORE_CLASS = "streams.engine.table:SequenceStore"


def install_overrides() -> None:
    """Replace the names inside Faust and aiokafka that the engine needs changed; a second call changes nothing."""
    fetcher.PartitionRecords = ParsedRecords
    consumer.GroupCoordinator = WatchedCoordinator
    stores.STORES.aliases[STORE_SCHEME] = STORE_CLASS


def as_parsed(key: bytes | None) -> bytes | None:
    """Return the key unchanged; as a consumer's `key_deserializer` it requests the parser's records."""
    return key


class ParsedRecords(fetcher.PartitionRecords):
    """The records of one partition in a fetch response; aiokafka creates this class after `install_overrides`."""

    def __iter__(self) -> Iterator[Any]:
        records: Iterator[Any] = self._records_iterator
        return records

    def _consumer_record(self, tp: Any, record: Any) -> Any:
        if self._key_deserializer is as_parsed:
            return record
        return super()._consumer_record(tp, record)
