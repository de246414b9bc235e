"""Overrides are installed by one call; records without a wrapper have the same content and positions."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from aiokafka.consumer import fetcher
from aiokafka.consumer.fetcher import FetchResult
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.structs import ConsumerRecord, TopicPartition
from faust import stores

from streams.engine.compat import STORE_CLASS, STORE_SCHEME, install_overrides
from streams.engine.records import ParsedRecords, Parsing, ResponseRecords
from streams.engine.table import SequenceStore

TP = TopicPartition("actions", 3)
READ_COMMITTED = 1
RECORDS: list[tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]] = [
    (b"user-1", b"{}", []),
    (b"user-2", None, [("ce_id", b"7"), ("ce_source", b"app")]),
    (None, b"\xff", []),
    (b"", b"", [("empty", b"")]),
]
SEEN = ("key", "value", "offset", "timestamp", "timestamp_type")


IMPORTS_ALL = f"""
import streams.app, streams.health, streams.worker
from aiokafka.consumer import fetcher
from faust import stores
assert fetcher.PartitionRecords.__module__ == "aiokafka.consumer.fetcher"
assert {STORE_SCHEME!r} not in stores.STORES.aliases
"""


class _Assignment:
    """The part of aiokafka's assignment that reading uses: active, never paused, its position moved by the reader."""

    active, paused, position = True, False, 0

    def state_value(self, tp: TopicPartition) -> _Assignment:
        return self

    def consumed_to(self, position: int) -> None:
        self.position = position


def _partition_records(key_deserializer: Any) -> ParsedRecords:
    builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, -1, 1 << 20)
    for offset, (key, value, headers) in enumerate(RECORDS):
        assert builder.append(offset, 1_000 + offset, key, value, headers)
    response = ResponseRecords(bytes(builder.build()))
    return ParsedRecords(TP, response, [], 0, key_deserializer, None, True, READ_COMMITTED)


def test_parsed_records_hold_what_wrapped_ones_hold() -> None:
    """Key, value, headers, offset and time equal those of aiokafka's own records, for missing and empty parts too."""
    wrapped, parsed = list(_partition_records(None)), list(_partition_records(Parsing()))
    assert [[getattr(record, name) for name in SEEN] for record in parsed] == [
        [getattr(record, name) for name in SEEN] for record in wrapped
    ]
    assert [list(record.headers) for record in parsed] == [headers for _, _, headers in RECORDS]
    assert not any(isinstance(record, ConsumerRecord) for record in parsed)


def test_other_consumers_get_consumer_records() -> None:
    """Without `Parsing` a consumer in this process gets complete consumer records, with topic and partition."""
    records = list(_partition_records(None))
    assert all(type(record) is ConsumerRecord for record in records)
    assert {(record.topic, record.partition) for record in records} == {TP}


@pytest.mark.parametrize("records_max", [1, 2, 3, 4, 5])
def test_reading_in_pieces_loses_and_repeats_nothing(records_max: int) -> None:
    """The pieces are contiguous for any limit per read, and the position is after the last record read."""
    assignment = _Assignment()
    result = FetchResult(TP, assignment=assignment, partition_records=_partition_records(Parsing()), backoff=0)
    offsets: list[int] = []
    while result.has_more():
        offsets += [record.offset for record in result.getall(records_max)]
        assert assignment.position == offsets[-1] + 1
    assert offsets == list(range(len(RECORDS)))


def test_importing_the_worker_overrides_nothing() -> None:
    """Faust and aiokafka are unchanged until `install_overrides` is called, with every worker module imported."""
    ended = subprocess.run([sys.executable, "-c", IMPORTS_ALL], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_overrides_are_installed_by_one_call_and_once() -> None:
    """`install_overrides` sets all names, and a second call sets them to the same values."""
    for _ in range(2):
        install_overrides()
        assert fetcher.PartitionRecords is ParsedRecords
        assert fetcher.MemoryRecords is ResponseRecords
        assert ParsedRecords.__mro__[1].__module__ == "aiokafka.consumer.fetcher"
        assert stores.STORES.by_name(STORE_SCHEME) is SequenceStore
        assert stores.STORES.aliases[STORE_SCHEME] == STORE_CLASS
