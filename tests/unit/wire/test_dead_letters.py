"""The headers that a dead letter adds to its record."""

from __future__ import annotations

from streams.wire.actions import DecodeLimits, decode_actions
from streams.wire.dead_letters import DETAIL_CHARS_MAX, dead_letter_headers, error_headers
from tests.unit.wire.test_actions import NOW_MS, FetchedRecord


def test_a_dead_letter_has_reason_and_origin_after_its_own_headers() -> None:
    """The record's own headers come first, unchanged; reason, detail and origin follow as text."""
    record = FetchedRecord(b"ann", b"\xff{", [("traceparent", b"\x00\xff")], offset=12)
    [rejected] = decode_actions([record], now_ms=NOW_MS, limits=DecodeLimits()).rejected
    headers = dead_letter_headers(rejected, record, topic="user-actions", partition=3)
    assert headers[0] == ("traceparent", b"\x00\xff")
    assert dict(headers[1:]) == {
        "error-reason": b"not-json",
        "error-detail": rejected.detail.encode(),
        "source-topic": b"user-actions",
        "source-partition": b"3",
        "source-offset": b"12",
    }


def test_a_detail_is_bounded() -> None:
    """A long detail is truncated, so a dead letter is larger than its record by a bounded number of bytes."""
    headers = error_headers([], reason="encoder", detail="x" * 10_000, topic="t", partition=0, offset=0)
    assert dict(headers)["error-detail"] == b"x" * DETAIL_CHARS_MAX
