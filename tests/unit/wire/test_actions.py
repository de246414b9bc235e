"""Decoding of actions: every record becomes a row or is rejected with its reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.actions.columns import item_key, name_code
from streams.wire import actions
from streams.wire.actions import NAMES_KEPT_MAX, Decoded, DecodeLimits, RejectReason, decode_actions

NOW_MS = 1_700_000_000_000
LIMITS = DecodeLimits()
GOOD: dict[str, Any] = {"user_id": "ann", "item_id": "i1", "action": "view", "timestamp_ms": NOW_MS}


@dataclass(frozen=True)
class FetchedRecord:
    """A record as a consumer returns it."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()
    offset: int = 0
    timestamp: int = NOW_MS


def record_of(event: object, *, key: bytes | None = b"ann", offset: int = 0) -> FetchedRecord:
    """Return a record whose value is `event` in JSON."""
    return FetchedRecord(key, json.dumps(event).encode(), offset=offset)


def decode(*records: FetchedRecord) -> Decoded:
    """Decode records under the default limits."""
    return decode_actions(records, now_ms=NOW_MS, limits=LIMITS)


def rejection_of(record: FetchedRecord) -> tuple[RejectReason, str]:
    """Return reason and detail of a record that is decoded between two valid ones, which must not be affected."""
    decoded = decode(record_of(GOOD, offset=4), record, record_of(GOOD, offset=6))
    assert decoded.actions.offsets.tolist() == [4, 6]
    [rejected] = decoded.rejected
    assert rejected.index == 1
    return rejected.reason, rejected.detail


def test_every_field_is_decoded_to_its_column() -> None:
    """A complete event fills every column: ids by `item_key`, names by `name_code`, numbers unchanged."""
    event = {**GOOD, "surface": "home", "duration_ms": 1_500, "event_id": "e-1", "extra": [1, {"x": None}]}
    decoded = decode(record_of(event, offset=7))
    assert decoded.rejected == []
    assert decoded.actions.users == [b"ann"]
    assert decoded.actions.offsets.tolist() == [7]
    assert decoded.actions.is_tombstone.tolist() == [False]
    assert decoded.actions.actions[0].tolist() == (
        item_key("i1"),
        name_code("view"),
        name_code("home"),
        NOW_MS,
        1_500,
        item_key("e-1"),
    )


@pytest.mark.parametrize("absent", [{}, {"surface": None, "duration_ms": None, "event_id": None}])
def test_an_absent_optional_field_is_zero(absent: dict[str, None]) -> None:
    """A missing or null optional field is 0 in its column."""
    row = decode(record_of({**GOOD, **absent})).actions.actions[0]
    assert (row["surface"], row["duration_ms"], row["event_id"]) == (0, 0, 0)


def test_only_absent_event_ids_are_zero() -> None:
    """Only absent event ids are 0 in a batch of events with and without an id."""
    decoded = decode(record_of(GOOD), record_of({**GOOD, "event_id": "e"}), record_of(GOOD))
    assert decoded.actions.actions["event_id"].tolist() == [0, item_key("e"), 0]


def test_nothing_decodes_to_nothing() -> None:
    """An empty list of records is an empty batch."""
    decoded = decode()
    assert (len(decoded.actions), decoded.rejected) == (0, [])


BAD_EVENTS: dict[str, tuple[Any, str, str]] = {
    "no user": ({k: v for k, v in GOOD.items() if k != "user_id"}, "field-missing", "user_id"),
    "no item": ({k: v for k, v in GOOD.items() if k != "item_id"}, "field-missing", "item_id"),
    "no action": ({k: v for k, v in GOOD.items() if k != "action"}, "field-missing", "action"),
    "no timestamp": ({k: v for k, v in GOOD.items() if k != "timestamp_ms"}, "field-missing", "timestamp_ms"),
    "user null": ({**GOOD, "user_id": None}, "field-type", "$.user_id"),
    "item a number": ({**GOOD, "item_id": 5}, "field-type", "$.item_id"),
    "action a list": ({**GOOD, "action": ["view"]}, "field-type", "$.action"),
    "timestamp a text": ({**GOOD, "timestamp_ms": str(NOW_MS)}, "field-type", "$.timestamp_ms"),
    "timestamp a fraction": ({**GOOD, "timestamp_ms": NOW_MS + 0.5}, "field-type", "$.timestamp_ms"),
    "timestamp true": ({**GOOD, "timestamp_ms": True}, "field-type", "$.timestamp_ms"),
    "surface a number": ({**GOOD, "surface": 1}, "field-type", "$.surface"),
    "duration a text": ({**GOOD, "duration_ms": "1"}, "field-type", "$.duration_ms"),
    "event id a number": ({**GOOD, "event_id": 1}, "field-type", "$.event_id"),
    "an array": ([GOOD], "field-type", "array"),
    "a JSON null": (None, "field-type", "null"),
    "item empty": ({**GOOD, "item_id": ""}, "field-length", "$.item_id"),
    "item too long": ({**GOOD, "item_id": "i" * 257}, "field-length", "$.item_id"),
    "action empty": ({**GOOD, "action": ""}, "field-length", "$.action"),
    "action too long": ({**GOOD, "action": "a" * 65}, "field-length", "$.action"),
    "surface too long": ({**GOOD, "surface": "s" * 65}, "field-length", "$.surface"),
    "event id empty": ({**GOOD, "event_id": ""}, "field-length", "$.event_id"),
    "event id too long": ({**GOOD, "event_id": "e" * 257}, "field-length", "$.event_id"),
    "duration negative": ({**GOOD, "duration_ms": -1}, "field-range", "$.duration_ms"),
    "duration over 32 bits": ({**GOOD, "duration_ms": 2**32}, "field-range", "$.duration_ms"),
    "timestamp over 64 bits": ({**GOOD, "timestamp_ms": 2**63}, "field-range", "$.timestamp_ms"),
    "seconds": ({**GOOD, "timestamp_ms": NOW_MS // 1_000}, "timestamp-unit", "seconds"),
    "microseconds": ({**GOOD, "timestamp_ms": NOW_MS * 1_000}, "timestamp-unit", "microseconds"),
    "nanoseconds": ({**GOOD, "timestamp_ms": NOW_MS * 10**6}, "timestamp-unit", "nanoseconds"),
    "the far past": ({**GOOD, "timestamp_ms": 0}, "timestamp-past", "before"),
    "negative time": ({**GOOD, "timestamp_ms": -NOW_MS}, "timestamp-past", "before"),
    "the future": ({**GOOD, "timestamp_ms": NOW_MS + 600_001}, "timestamp-future", "after"),
}


@pytest.mark.parametrize(("event", "reason", "detail"), BAD_EVENTS.values(), ids=BAD_EVENTS.keys())
def test_a_bad_field_has_its_reason(event: object, reason: str, detail: str) -> None:
    """Each invalid field is rejected with its own reason, and the detail names the problem."""
    got_reason, got_detail = rejection_of(record_of(event))
    assert got_reason == reason
    assert detail in got_detail


GOOD_BYTES = json.dumps(GOOD).encode()
BAD_RECORDS = {
    "no key": (FetchedRecord(None, GOOD_BYTES), "key-missing"),
    "no key, no value": (FetchedRecord(None, None), "key-missing"),
    "another's key": (FetchedRecord(b"bob", GOOD_BYTES), "key-mismatch"),
    "empty key": (FetchedRecord(b"", GOOD_BYTES), "key-mismatch"),
    "tombstone, empty key": (FetchedRecord(b"", None), "key-invalid"),
    "tombstone, key not UTF-8": (FetchedRecord(b"\xff", None), "key-invalid"),
    "tombstone, key too long": (FetchedRecord(b"u" * 257, None), "key-invalid"),
    "empty value": (FetchedRecord(b"ann", b""), "not-json"),
    "prose": (FetchedRecord(b"ann", b"hello"), "not-json"),
    "cut": (FetchedRecord(b"ann", GOOD_BYTES[:-1]), "not-json"),
    "two events": (FetchedRecord(b"ann", GOOD_BYTES + b"\n" + GOOD_BYTES), "not-json"),
    "Infinity": (FetchedRecord(b"ann", GOOD_BYTES[:-1] + b',"other":Infinity}'), "not-json"),
    "NaN": (FetchedRecord(b"ann", GOOD_BYTES[:-1] + b',"duration_ms":NaN}'), "not-json"),
    "lone surrogate": (FetchedRecord(b"ann", GOOD_BYTES.replace(b"i1", b"\\ud800")), "not-json"),
    "bottomless": (FetchedRecord(b"ann", GOOD_BYTES[:-1] + b',"x":' + b"[" * 20_000), "not-json"),
    "UTF-16": (FetchedRecord(b"ann", json.dumps(GOOD).encode("utf-16")), "not-json"),
    "not UTF-8": (FetchedRecord(b"ann", GOOD_BYTES.replace(b"i1", b"\xff\xfe")), "not-utf8"),
    "10 MB": (FetchedRecord(b"ann", GOOD_BYTES[:-1] + b',"x":"' + b"x" * 10_000_000 + b'"}'), "value-too-large"),
    "Avro in a frame": (FetchedRecord(b"ann", b"\0\0\0\0\7\6ann\4i1"), "not-json"),
    "a frame and no more": (FetchedRecord(b"ann", b"\0\0\0\0\7"), "not-json"),
    "half a frame": (FetchedRecord(b"ann", b"\0\0"), "not-json"),
}


@pytest.mark.parametrize(("record", "reason"), BAD_RECORDS.values(), ids=BAD_RECORDS.keys())
def test_a_bad_record_has_its_reason(record: FetchedRecord, reason: str) -> None:
    """Each invalid key, value or encoding is rejected with its own reason, and the records around it are kept."""
    assert rejection_of(record)[0] == reason


def test_a_wrong_event_time_is_found_after_another_invalid_record() -> None:
    """Event times are checked last, and their rejections still name the right record, in order."""
    untimely = record_of({**GOOD, "timestamp_ms": 5})
    decoded = decode(record_of(GOOD), untimely, FetchedRecord(b"ann", b"{"), untimely)
    assert [(one.index, one.reason) for one in decoded.rejected] == [
        (1, RejectReason.TIMESTAMP_PAST),
        (2, RejectReason.NOT_JSON),
        (3, RejectReason.TIMESTAMP_PAST),
    ]


def test_every_reason_is_reached() -> None:
    """Every reason of the closed set is produced by a case above."""
    reached = {reason for _, reason, _ in BAD_EVENTS.values()} | {reason for _, reason in BAD_RECORDS.values()}
    elsewhere = {RejectReason.WRONG_PARTITION, RejectReason.DELETION_UNCLEAR}  # test_placement, test_deletions
    assert reached == set(RejectReason) - elsewhere


@pytest.mark.parametrize(
    "event",
    [
        {**GOOD, "timestamp_ms": NOW_MS + 600_000},
        {**GOOD, "timestamp_ms": LIMITS.timestamp_min_ms},
        {**GOOD, "item_id": "i" * 256, "action": "a" * 64, "surface": "s" * 64, "event_id": "e" * 256},
        {**GOOD, "duration_ms": 2**32 - 1},
        {**GOOD, "surface": "", "duration_ms": 0},
        {**GOOD, "item_id": "\0", "action": "просмотр", "surface": "🏠"},
    ],
)
def test_the_limits_themselves_are_allowed(event: dict[str, object]) -> None:
    """A value exactly at a limit is accepted."""
    assert decode(record_of(event)).rejected == []


def test_a_null_value_is_a_tombstone_at_its_record_time() -> None:
    """A tombstone becomes a row with its record's time and zeros elsewhere, at its place in the batch."""
    forget = FetchedRecord(b"bob", None, offset=5, timestamp=NOW_MS - 7)
    decoded = decode(record_of(GOOD, offset=4), forget, record_of(GOOD, offset=6))
    assert decoded.actions.users == [b"ann", b"bob", b"ann"]
    assert decoded.actions.is_tombstone.tolist() == [False, True, False]
    assert decoded.actions.actions[1].tolist() == (0, 0, 0, NOW_MS - 7, 0, 0)
    assert decoded.rejected == []


@pytest.mark.parametrize("timestamp_ms", [-1, NOW_MS + 10**9])
def test_a_tombstone_never_forgets_the_future(timestamp_ms: int) -> None:
    """A record time that is unknown or ahead of the clock is replaced by the present."""
    decoded = decode(FetchedRecord(b"bob", None, timestamp=timestamp_ms))
    assert decoded.actions.actions["timestamp_ms"].tolist() == [NOW_MS]


def test_an_old_tombstone_is_accepted() -> None:
    """The limits on event time do not apply to a tombstone."""
    decoded = decode(FetchedRecord(b"bob", None, timestamp=5))
    assert decoded.actions.actions["timestamp_ms"].tolist() == [5]


def test_confluent_framing_is_read() -> None:
    """JSON after a zero byte and a schema id is decoded, also among unframed values."""
    framed = FetchedRecord(b"ann", b"\0\0\0\0\x2a" + GOOD_BYTES)
    decoded = decode(record_of(GOOD), framed)
    assert decoded.rejected == []
    assert decoded.actions.actions[0] == decoded.actions.actions[1]


def test_cloud_events_headers_give_the_event_id() -> None:
    """`ce_source` and `ce_id` together are the event id, unless the data has its own."""
    headers = [("ce_specversion", b"1.0"), ("ce_source", b"/app"), ("ce_id", b"7"), ("content-type", b"json")]
    own = json.dumps({**GOOD, "event_id": "mine"}).encode()
    decoded = decode(
        FetchedRecord(b"ann", GOOD_BYTES, headers),
        FetchedRecord(b"ann", own, headers),
        FetchedRecord(b"ann", GOOD_BYTES, [("traceparent", b"00-1")]),
    )
    assert decoded.actions.actions["event_id"].tolist() == [item_key("/app 7"), item_key("mine"), 0]


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)
events = st.fixed_dictionaries(
    {
        "user_id": texts,
        "item_id": texts,
        "action": texts,
        "timestamp_ms": st.integers(LIMITS.timestamp_min_ms, NOW_MS + LIMITS.timestamp_ahead_max_ms),
    },
    optional={
        "surface": st.none() | st.text(st.characters(codec="utf-8"), max_size=30),
        "duration_ms": st.none() | st.integers(0, 2**32 - 1),
        "event_id": st.none() | texts,
        "other": st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.lists(texts),
    },
)
bad_records = st.sampled_from([record for record, _ in BAD_RECORDS.values() if len(record.value or b"") < 10**6])


@settings(max_examples=200)
@given(st.lists(st.one_of(events, bad_records), max_size=12), st.booleans())
def test_columns_equal_plain_decoding(inputs: list[dict[str, object] | FetchedRecord], escape: bool) -> None:
    """Valid records decode as by `json.loads`, in order; an invalid record affects no other."""
    records = [
        FetchedRecord(str(one["user_id"]).encode(), json.dumps(one, ensure_ascii=escape).encode(), offset=offset)
        if isinstance(one, dict)
        else one
        for offset, one in enumerate(inputs)
    ]
    decoded = decode(*records)
    good = [one for one in inputs if isinstance(one, dict)]
    assert decoded.actions.users == [str(one["user_id"]).encode() for one in good]
    assert decoded.actions.actions.tolist() == [
        (
            item_key(str(one["item_id"])),
            name_code(str(one["action"])),
            name_code(str(one.get("surface") or "")),
            one["timestamp_ms"],
            one.get("duration_ms") or 0,
            item_key(str(one["event_id"])) if one.get("event_id") else 0,
        )
        for one in good
    ]
    assert [one.index for one in decoded.rejected] == [i for i, one in enumerate(inputs) if not isinstance(one, dict)]


@settings(max_examples=300)
@given(st.binary(max_size=60), st.none() | st.binary(max_size=6))
def test_no_bytes_raise(value: bytes, key: bytes | None) -> None:
    """Arbitrary bytes are rejected and never raise."""
    decoded = decode(FetchedRecord(key, value))
    assert len(decoded.rejected) == 1


def test_fields_are_limited_by_the_settings_given() -> None:
    """Two sets of limits in one process do not affect each other."""
    tight = DecodeLimits(id_chars_max=1)
    assert len(decode_actions([record_of(GOOD)], now_ms=NOW_MS, limits=tight).rejected) == 1
    assert decode(record_of(GOOD)).rejected == []


def test_columns_do_not_share_memory_with_the_records() -> None:
    """Columns are writable, because they do not share memory with the records."""
    decoded = decode(record_of(GOOD))
    decoded.actions.actions["item"][0] = np.uint64(3)
    assert decoded.actions.actions["item"][0] == 3


def test_more_names_than_are_cached_still_have_their_codes() -> None:
    """More names than the cache may hold change no code, and the cache stays bounded."""
    names = [f"name-{number}" for number in range(NAMES_KEPT_MAX + 10)]
    for _ in range(2):
        decoded = decode(*(record_of({**GOOD, "action": name}) for name in names))
        assert decoded.actions.actions["action"].tolist() == [name_code(name) for name in names]
    assert len(actions._CODES) <= NAMES_KEPT_MAX


WITH_VALUES = DecodeLimits(with_values=True)


def test_values_are_a_column_of_numbers() -> None:
    """An absent or null value is NaN, and a batch without any has no column; tombstones have none."""
    records = [record_of({**GOOD, **more}) for more in ({"value": 2}, {"value": -0.5}, {"value": None}, {})]
    decoded = decode_actions([*records, FetchedRecord(b"ann", None)], now_ms=NOW_MS, limits=WITH_VALUES)
    assert decoded.rejected == []
    assert decoded.actions.values is not None
    np.testing.assert_array_equal(decoded.actions.values, [2.0, -0.5, np.nan, np.nan, np.nan])
    assert decode_actions(records[2:], now_ms=NOW_MS, limits=WITH_VALUES).actions.values is None
    selected = decoded.actions.select(np.array([1, 2])).values
    assert selected is not None
    np.testing.assert_array_equal(selected, [-0.5, np.nan])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ('"9.99"', RejectReason.FIELD_TYPE),
        ("true", RejectReason.FIELD_TYPE),
        ("[1]", RejectReason.FIELD_TYPE),
        ("NaN", RejectReason.NOT_JSON),
        ("Infinity", RejectReason.NOT_JSON),
        ("1e999", RejectReason.FIELD_RANGE),
    ],
)
def test_a_value_that_is_no_number_is_rejected_where_features_use_it(value: str, reason: RejectReason) -> None:
    """Elsewhere the field is ignored like any other unknown one, as long as the record is JSON."""
    text = json.dumps({**GOOD, "value": 0}).replace('"value": 0', f'"value": {value}')
    record = FetchedRecord(b"ann", text.encode())
    decoded = decode_actions([record, record_of({**GOOD, "value": 1})], now_ms=NOW_MS, limits=WITH_VALUES)
    assert [rejected.reason for rejected in decoded.rejected] == [reason]
    assert decoded.actions.values is not None
    assert decoded.actions.values.tolist() == [1.0]
    if reason is not RejectReason.NOT_JSON:
        assert decode(record).rejected == []
