"""Fetch responses with every codec, header names of any bytes, and damaged batches, in both clients' parsers."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.structs import TopicPartition
from kafka.record import MemoryRecords as KafkaRecords
from kafka.record.util import calc_crc32c

from streams.engine.records import CorruptBatch, ParsedRecords, Parsing, ResponseRecords
from streams.kafka_records import _PartitionRecords, tolerate_header_names

TP = TopicPartition("actions", 3)
CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
NAME = b"NN"
"""Header name that a test replaces by bytes that are not UTF-8, without changing any length."""


def batch(base: int, count: int, codec: str = "none", headers: Any = (("NN", b"1"),)) -> bytes:
    """Return a record batch of `count` records from offset `base` on."""
    builder = DefaultRecordBatchBuilder(2, CODECS[codec], 0, -1, -1, -1, 1 << 20)
    for number in range(count):
        assert builder.append(number, 1_000 + number, b"key", b"value-%d" % (base + number), list(headers))
    return struct.pack(">q", base) + bytes(builder.build())[8:]


def changed(data: bytes, old: bytes, new: bytes) -> bytes:
    """Return a batch with other content and the right checksum."""
    assert old in data
    data = data.replace(old, new)
    return data[:17] + struct.pack(">I", calc_crc32c(data[21:])) + data[21:]


def damaged(data: bytes) -> bytes:
    """Return a batch whose last byte is wrong, and so its checksum."""
    return data[:-1] + bytes([data[-1] ^ 1])


def parse(data: bytes, parsing: Parsing, start: int = 0) -> tuple[list[Any], int]:
    """Return the records that the worker's parser yields from offset `start` on, and the next offset to fetch."""
    records = ParsedRecords(TP, ResponseRecords(data), [], start, parsing, None, True, 1)
    return list(records), records.next_fetch_offset


def parse_by_kafka_python(data: bytes) -> list[Any]:
    """Return the records that a consumer of kafka-python yields after `tolerate_header_names`."""
    consumer = SimpleNamespace(_fetcher=SimpleNamespace(PartitionRecords=None))
    tolerate_header_names(consumer)
    assert consumer._fetcher.PartitionRecords is _PartitionRecords
    taken: list[Any] = _PartitionRecords(0, TP, KafkaRecords(data)).take()
    return taken


@pytest.mark.parametrize("codec", CODECS)
def test_both_clients_read_every_codec(codec: str) -> None:
    """What a base installation and a worker bring is enough for every codec that Kafka has."""
    data = batch(0, 50, codec)
    values = [b"value-%d" % number for number in range(50)]
    assert [record.value for record in parse(data, Parsing())[0]] == values
    assert [record.value for record in parse_by_kafka_python(data)] == values


def test_header_names_may_be_any_bytes() -> None:
    """A name that is not UTF-8 becomes text that shows its bytes; nothing around it is lost."""
    data = batch(0, 2) + changed(batch(2, 3), NAME, b"\xff\xfe") + batch(5, 1)
    for records in (parse(data, Parsing())[0], parse_by_kafka_python(data)):
        assert [record.offset for record in records] == list(range(6))
        assert [list(record.headers) for record in records][1:3] == [[("NN", b"1")], [("\\xff\\xfe", b"1")]]
        assert [record.value for record in records] == [b"value-%d" % number for number in range(6)]
        assert [record.timestamp for record in records][2:5] == [1_000, 1_001, 1_002]


def test_a_strange_name_in_the_middle_repeats_nothing() -> None:
    """Records of the batch before the strange name are yielded once, and a fetch in its middle begins there."""
    strange = batch(0, 4).replace(b"value-2\x02\x04NN", b"value-2\x02\x04\xff\xfe")
    data = changed(strange, b"key", b"key")
    assert [record.offset for record in parse(data, Parsing())[0]] == [0, 1, 2, 3]
    assert [record.offset for record in parse(data, Parsing(), start=2)[0]] == [2, 3]


DAMAGES = {
    "checksum": damaged(batch(2, 3)),
    "cut off": batch(2, 3)[:-7],
    "length beyond the response": batch(2, 3)[:8] + struct.pack(">i", 1 << 20) + batch(2, 3)[12:],
    "length too small": batch(2, 3)[:8] + struct.pack(">i", 3) + batch(2, 3)[12:],
    "format": batch(2, 3)[:16] + b"\x07" + batch(2, 3)[17:],
    "compressed content": changed(batch(2, 3, "gzip"), b"\x1f\x8b", b"\x1f\x8c"),
    "a field beyond the batch": changed(batch(2, 3), b"\x06key", b"\x7fkey"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_batch_is_named_after_all_before_it(damage: str) -> None:
    """Records before the damage are delivered; the next fetch reports it, and goes no further."""
    data, parsing = batch(0, 2) + DAMAGES[damage], Parsing(report=True)
    assert [record.offset for record in parse(data, parsing)[0]] == [0, 1]
    assert not parsing.faults
    records, after = parse(DAMAGES[damage], parsing, start=2)
    assert (records, after, parsing.faults[TP].first) == ([], 2, 2)
    assert "topic actions, partition 3, offsets 2 to " in str(parsing.faults[TP])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_batch_is_skipped_only_on_request(damage: str) -> None:
    """With the setting the position passes the batch, and what was skipped is recorded; a plain reader raises."""
    parsing = Parsing(report=True, skip_corrupt=True)
    records, after = parse(DAMAGES[damage], parsing, start=2)
    (skipped,) = parsing.skipped[TP]
    assert (records, skipped.first, after) == ([], 2, skipped.last + 1)
    assert parsing.reached[TP] == after
    with pytest.raises(CorruptBatch, match="offsets 2 to"):
        parse(DAMAGES[damage], Parsing(), start=2)


def test_damage_range_is_that_of_the_batch() -> None:
    """Where header and length are whole, the range is exact, also behind batches that were read."""
    parsing = Parsing(report=True)
    parse(damaged(batch(5, 4)), parsing, start=5)
    assert (parsing.faults[TP].first, parsing.faults[TP].last) == (5, 8)


def test_a_reset_between_fetches_is_a_jump() -> None:
    """A response that does not begin where the last one ended is noticed: its records do not follow."""
    parsing = Parsing()
    parse(batch(0, 2), parsing)
    parse(batch(2, 2), parsing, start=2)
    assert not parsing.jumps
    parse(batch(9, 1), parsing, start=9)
    assert parsing.jumps == {TP: 9}
