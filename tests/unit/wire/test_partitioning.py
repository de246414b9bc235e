"""Partition of a key: equal for every client in use, so that all events of a user are in one partition."""

from __future__ import annotations

from typing import Any

import pytest
from aiokafka.partitioner import DefaultPartitioner
from kafka.partitioner import DefaultPartitioner as KafkaPythonPartitioner

# Key -> murmur2 as Apache Kafka's own Java test states it (UtilsTest.testMurmur2), signed 32 bits.
MURMUR2 = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}
COUNTS = (1, 3, 4, 16, 100)


class _Cluster:
    """The part of kafka-python's cluster metadata that its partitioner reads."""

    def __init__(self, partitions: int) -> None:
        self._partitions = set(range(partitions))

    def topics(self) -> set[str]:
        return {"t"}

    def partitions_for_topic(self, topic: str) -> set[int]:
        return self._partitions

    def available_partitions_for_topic(self, topic: str) -> set[int]:
        return self._partitions


@pytest.mark.parametrize("partitions", COUNTS)
@pytest.mark.parametrize("key", MURMUR2)
def test_python_clients_place_keys_as_java_does(key: bytes, partitions: int) -> None:
    """Both aiokafka (and so Faust) and kafka-python choose the partition that Java's default partitioner chooses."""
    expected = (MURMUR2[key] & 0x7FFFFFFF) % partitions
    everywhere = list(range(partitions))
    kafka_python: Any = KafkaPythonPartitioner()
    assert DefaultPartitioner()(key, everywhere, everywhere) == expected
    assert kafka_python.partition("t", None, key, None, None, _Cluster(partitions)) == expected
