"""Deletions whose key or headers are not those of the contract."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import pytest

from streams.wire.actions import DecodeLimits, RejectReason, decode_actions
from streams.wire.deletions import Placement
from streams.wire.partitioner import partitions_of

HERE = Placement(int(partitions_of([b"ann"], 4)[0]), 4)
ELSEWHERE = Placement((HERE.partition + 1) % 4, 4)


@dataclass(frozen=True)
class Deletion:
    """A record without a value, as a consumer returns it."""

    key: bytes
    headers: tuple[tuple[str, Any], ...] = ()
    value: None = None
    offset: int = 7
    timestamp: int = 5


ENCODED = {
    "JSON text": b'"ann"',
    "Confluent framing": b"\x00\x00\x00\x00\x05ann",
    "framed JSON text": b'\x00\x00\x00\x00\x05"ann"',
    "JSON object": b'{"user_id": "ann"}',
}


def decode(deletion: Deletion, placement: Placement | None = HERE, **limits: Any) -> tuple[list[bytes], list[Any]]:
    """Return the users that are forgotten, and the rejections."""
    decoded = decode_actions([deletion], now_ms=9, limits=DecodeLimits(**limits), placement=placement)
    assert decoded.actions.is_tombstone.all()
    return decoded.actions.users, decoded.rejected


@pytest.mark.parametrize("key", ENCODED.values(), ids=ENCODED.keys())
def test_an_encoded_key_is_understood_where_its_user_is(key: bytes) -> None:
    """The plain user is forgotten in its own partition; in another one, or where it is unknown, it is rejected."""
    assert decode(Deletion(key)) == ([b"ann"], [])
    for placement in (ELSEWHERE, None):
        users, [rejected] = decode(Deletion(key), placement)
        assert (users, rejected.reason) == ([], RejectReason.DELETION_UNCLEAR)
        assert "'ann'" in rejected.detail


@pytest.mark.parametrize(
    "key", [struct.pack(">q", 42), struct.pack("<q", 42), b"[1]\x01", b'{"id": "ann"}', b'"\x00"', b"42\n", b"\x00"]
)
def test_a_key_without_an_id_is_rejected(key: bytes) -> None:
    """Numbers in bytes, objects without `user_id` and control characters forget nobody and say why, everywhere."""
    for partition in range(4):
        users, [rejected] = decode(Deletion(key), Placement(partition, 4))
        assert (users, rejected.reason) == ([], RejectReason.DELETION_UNCLEAR)


@pytest.mark.parametrize("key", [b"ann", b'ann"', b'"ann', b"{ann}", "ünï".encode(), b"42", b" "])
def test_a_plain_key_is_the_user_id(key: bytes) -> None:
    """Text that is not JSON is the id, in every partition; placement is checked elsewhere."""
    for placement in (HERE, ELSEWHERE, None):
        assert decode(Deletion(key), placement) == ([key], [])


def test_a_cloud_event_without_data_forgets_only_by_its_declared_type() -> None:
    """An event without data is a dead letter; the setting names the one type that means a deletion."""
    started = Deletion(b"ann", (("ce_id", b"1"), ("ce_type", b"session.started")))
    users, [rejected] = decode(started)
    assert (users, rejected.reason) == ([], RejectReason.DELETION_UNCLEAR)
    assert "session.started" in rejected.detail
    assert "decode.deletion_ce_type" in rejected.detail
    assert decode(started, deletion_ce_type="user.deleted")[1]
    for headers in ((("ce_id", b"1"),), (("ce_type", None), ("ce_id", b"1")), (("ce_type", b""),)):
        assert decode(Deletion(b"ann", headers))[1], headers
    erased = Deletion(b"ann", (("ce_type", b"user.deleted"),))
    assert decode(erased, deletion_ce_type="user.deleted") == ([b"ann"], [])
    assert decode(Deletion(b"ann", (("trace", b"x"), ("ce_id", None)))) == ([b"ann"], [])
