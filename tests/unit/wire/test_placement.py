"""The partition of a key, and records in another one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka.partitioner.default import murmur2

from streams.wire.actions import DecodeLimits, RejectReason, decode_actions
from streams.wire.partitioner import VECTOR_MIN, partitions_of
from streams.wire.placement import misplaced, reject_misplaced

NOW_MS = 1_700_000_000_000


@dataclass(frozen=True)
class FetchedRecord:
    """A record as a consumer returns it."""

    key: bytes
    value: bytes | None
    offset: int
    headers: tuple[Any, ...] = ()
    timestamp: int = NOW_MS


@given(st.lists(st.binary(max_size=40), max_size=3 * VECTOR_MIN), st.integers(1, 500))
def test_partitions_are_those_of_kafka_python(keys: list[bytes], count: int) -> None:
    """One by one and all at once, keys of every length have the partition that kafka-python computes."""
    expected = [(murmur2(key) & 0x7FFFFFFF) % count for key in keys]
    assert partitions_of(keys, count).tolist() == expected
    assert [int(partitions_of([key], count)[0]) for key in keys] == expected


@pytest.mark.parametrize(("key", "partition"), [(b"21", 56), (b"foobar", 9), (b"a-little-bit-long-string", 15)])
def test_partitions_are_those_of_the_java_client(key: bytes, partition: int) -> None:
    """Hashes published in the tests of Kafka's Java client, modulo 100 with the sign bit cleared."""
    java = {b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536}
    assert partitions_of([key], 100).tolist() == [(java[key] & 0x7FFFFFFF) % 100]
    assert partitions_of([key] * VECTOR_MIN, 100).tolist() == [(java[key] & 0x7FFFFFFF) % 100] * VECTOR_MIN


def test_only_records_of_misplaced_users_are_rejected() -> None:
    """Actions and deletions of a misplaced user are rejected with the right partition; all others stay, in order."""
    users = [f"user-{number}" for number in range(40)]
    records = [
        FetchedRecord(
            user.encode(),
            None
            if number % 3 == 0
            else json.dumps({"user_id": user, "item_id": "i", "action": "a", "timestamp_ms": NOW_MS}).encode(),
            10 + number,
        )
        for number, user in enumerate(users)
    ]
    records[5] = FetchedRecord(b"user-5", b"{", 15)
    decoded = decode_actions(records, now_ms=NOW_MS, limits=DecodeLimits())
    wrong = misplaced(decoded.actions.users, 1, 4)
    assert wrong == {user.encode() for user in users if (murmur2(user.encode()) & 0x7FFFFFFF) % 4 != 1} - {b"user-5"}
    placed = reject_misplaced(decoded, wrong, records, 1, 4)
    assert [one.index for one in placed.rejected] == sorted(
        number for number, user in enumerate(users) if user.encode() in wrong or number == 5
    )
    assert {one.reason for one in placed.rejected} == {RejectReason.WRONG_PARTITION, RejectReason.NOT_JSON}
    kept = [number for number, user in enumerate(users) if user.encode() not in wrong and number != 5]
    assert placed.actions.offsets.tolist() == [10 + number for number in kept]
    assert placed.actions.users == [users[number].encode() for number in kept]
    assert placed.actions.is_tombstone.tolist() == [number % 3 == 0 for number in kept]
