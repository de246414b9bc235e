"""Actions: decode the records of one source partition to columns, with a reason for each record that is rejected.

A value is a JSON object `{"user_id", "item_id", "action", "timestamp_ms", "surface"?, "duration_ms"?, "event_id"?}`,
and, where features use it, the number `"value"?`.
Unknown fields are ignored, and `null` in an optional field means that it is absent. Two envelopes are accepted as they
are: CloudEvents in binary mode (`ce_*` headers; the value is the data, and `ce_source` with `ce_id` is the event id if
the data has none) and Confluent framing (a zero byte and a 4-byte schema id before the JSON). A null value forgets the
user.

The *arrival time* of a record is when the broker appended it. A topic with `message.timestamp.type=LogAppendTime` has
it in its records. With `CreateTime` a record has a time of its producer instead, whose clock may be wrong, so the
processing time of the batch is taken: the latest time at which the record can have arrived.

A batch without an invalid record is decoded as a whole. Otherwise it is decoded record by record, so that an invalid
record affects no other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_digest

from encoder.actions.columns import ACTION_DTYPE, ActionBatch, item_key, name_code
from encoder.arrays import I64, U64
from streams.wire.deletions import Placement, UnclearDeletion, check_event_type, plain_user

Headers = Sequence[tuple[str, bytes]]


class Record(Protocol):
    """A consumed Kafka record, as far as it is read here; every client's own type matches it."""

    @property
    def key(self) -> bytes | None:
        """User id in UTF-8."""

    @property
    def value(self) -> bytes | None:
        """JSON, None for a tombstone."""

    @property
    def headers(self) -> Headers:
        """Names and values of the headers."""

    @property
    def offset(self) -> int:
        """Offset in the source partition."""

    @property
    def timestamp(self) -> int:
        """Record time in ms, negative if unknown."""

    # A client's record also has `timestamp_type`, which is `LOG_APPEND_TIME` if the broker has set the time.


LOG_APPEND_TIME = 1
"""Type of a record's timestamp that the broker has set, by Kafka's message format."""
NAMES_KEPT_MAX = 4_096
"""Names of actions and surfaces whose codes are cached, far more than any policy distinguishes."""


class RejectReason(StrEnum):
    """Reasons for which a record is rejected; a closed set, used as metric label and dead-letter header."""

    KEY_MISSING = "key-missing"
    KEY_INVALID = "key-invalid"
    KEY_MISMATCH = "key-mismatch"
    WRONG_PARTITION = "wrong-partition"
    DELETION_UNCLEAR = "deletion-unclear"
    VALUE_TOO_LARGE = "value-too-large"
    NOT_UTF8 = "not-utf8"
    NOT_JSON = "not-json"
    FIELD_MISSING = "field-missing"
    FIELD_TYPE = "field-type"
    FIELD_LENGTH = "field-length"
    FIELD_RANGE = "field-range"
    TIMESTAMP_UNIT = "timestamp-unit"
    TIMESTAMP_PAST = "timestamp-past"
    TIMESTAMP_FUTURE = "timestamp-future"


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Limits of an action: ids and names in characters, values in bytes."""

    value_bytes_max: int = 65_536
    id_chars_max: int = 256
    name_chars_max: int = 64
    timestamp_ahead_max_ms: int = 600_000
    """Time by which an event time may be ahead of processing time."""
    timestamp_min_ms: int = 315_532_800_000
    """Oldest event time accepted, 1980 by default, which is later than every current time in seconds read as ms."""
    check_partition: bool = True
    """Whether records are rejected whose key belongs to another partition; see `streams.wire.placement`."""
    with_values: bool = False
    """Whether actions may have the number `value`; otherwise a field of that name is ignored like any other."""
    deletion_ce_type: str = ""
    """The `ce_type` of CloudEvents without data that forget their user; others without data are rejected."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A rejected record: its index in the decoded list, the reason, and a detail for a human reader."""

    index: int
    reason: RejectReason
    detail: str


@dataclass(frozen=True, slots=True)
class Decoded:
    """The actions of a list of records, in order, and the rejected records by ascending index."""

    actions: ActionBatch
    rejected: list[Rejected]


def decode_actions(
    records: Sequence[Record], *, now_ms: int, limits: DecodeLimits, placement: Placement | None = None
) -> Decoded:
    """Decode the records of one partition; every record becomes a row of the result or is rejected, never both.

    `now_ms` is processing time; `placement` is needed to understand deletions whose key is not the plain user id. No
    content of a record makes this raise.
    """
    decoder = _decoder(limits)
    try:
        values: list[Any] = [record.value for record in records]  # a None among them raises TypeError below
        keys: list[Any] = [record.key for record in records]
        if max(map(len, values), default=0) <= limits.value_bytes_max:
            events = list(map(decoder.decode, values))
            if [event.user_id.encode() for event in events] == keys:
                batch = _batch(keys, events, records, now_ms)
                return _within_time(_with_values(batch, events, limits), range(len(records)), [], now_ms, limits)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError):
        pass
    return _decode_one_by_one(records, decoder, now_ms, limits, placement)


def _decode_one_by_one(
    records: Sequence[Record],
    decoder: msgspec.json.Decoder[Any],
    now_ms: int,
    limits: DecodeLimits,
    placement: Placement | None,
) -> Decoded:
    kept: list[int] = []
    keys: list[bytes] = []
    events: list[Any] = []
    rejected: list[Rejected] = []
    for index, record in enumerate(records):
        try:
            user, event = _read(record, decoder, limits, placement)
            keys.append(user)
            events.append(event)
            kept.append(index)
        except _RejectedError as error:
            rejected.append(Rejected(index, error.reason, error.detail))
    good = [records[index] for index in kept]
    batch = _batch(keys, events, good, now_ms)
    for row, event in enumerate(events):
        if event is _FORGOTTEN:
            batch.is_tombstone[row] = True
            batch.actions[row] = np.zeros((), ACTION_DTYPE)
            batch.actions["timestamp_ms"][row] = _tombstone_time_ms(good[row].timestamp, now_ms)
    return _within_time(_with_values(batch, events, limits), kept, rejected, now_ms, limits)


def _batch(keys: list[bytes], events: list[Any], records: Sequence[Record], now_ms: int) -> ActionBatch:
    actions = np.zeros(len(events), ACTION_DTYPE)
    actions["item"] = _id_keys([event.item_id for event in events])
    actions["action"] = _name_codes([event.action for event in events])
    actions["surface"] = _name_codes([event.surface for event in events])
    actions["timestamp_ms"] = [event.timestamp_ms for event in events]
    actions["duration_ms"] = [event.duration_ms or 0 for event in events]
    actions["event_id"] = _event_keys([event.event_id or "" for event in events], records)
    offsets = np.fromiter([record.offset for record in records], np.int64, len(records))
    return ActionBatch(keys, actions, offsets, np.zeros(len(events), np.bool_), _arrival_ms(records, now_ms))


def _with_values(batch: ActionBatch, events: list[Any], limits: DecodeLimits) -> ActionBatch:
    """Add the column of values, if there is any."""
    if not limits.with_values:
        return batch
    values = [event.value for event in events]
    if not any(value is not None for value in values):
        return batch
    return replace(batch, values=np.array([math.nan if value is None else value for value in values]))


def _arrival_ms(records: Sequence[Record], now_ms: int) -> I64:
    """Return the arrival times, at most the present: by the broker's clock where the topic reports it.

    Both ends are looked at, because somebody may have altered the topic in between.
    """
    ends = records[:1], records[-1:]
    if not records or any(getattr(one, "timestamp_type", None) != LOG_APPEND_TIME for (one,) in ends):
        return np.full(len(records), now_ms, np.int64)
    times_ms = np.fromiter([record.timestamp for record in records], np.int64, len(records))
    return np.minimum(times_ms, now_ms)


def _id_keys(ids: list[str]) -> U64:
    """Return `item_key` of each id; the digest is big-endian."""
    digests = b"".join(map(xxh3_64_digest, map(str.encode, ids)))
    keys = np.frombuffer(digests, ">u8").astype(np.uint64)
    keys[keys == 0] = 1
    return keys


def _event_keys(ids: list[str], records: Sequence[Record]) -> U64 | int:
    """Return the key of each event id; 0 for an absent id unless CloudEvents headers identify the event."""
    headers = [record.headers for record in records]
    if any(headers):
        ids = [id_ or _cloud_event_id(of_one) for id_, of_one in zip(ids, headers, strict=True)]
    if not any(ids):
        return 0
    keys = _id_keys(ids)
    keys[keys == _KEY_OF_NO_ID] = 0
    return keys


def _name_codes(names: list[str | None]) -> npt.NDArray[np.uint16]:
    return np.array(list(map(_CODES.__getitem__, names)), np.uint16)


class _Codes(dict[str | None, int]):
    """Cache of `name_code` for recent names; a dict lookup costs a fifth of a call through `lru_cache`."""

    def __missing__(self, name: str | None) -> int:
        if len(self) >= NAMES_KEPT_MAX:
            self.clear()
        self[name] = code = name_code(name or "")
        return code


_CODES = _Codes()


def _within_time(
    batch: ActionBatch, indices: Sequence[int], rejected: list[Rejected], now_ms: int, limits: DecodeLimits
) -> Decoded:
    """Reject the rows whose event time is outside the limits; row r came from record `indices[r]`."""
    times_ms = batch.actions["timestamp_ms"]
    latest_ms = now_ms + limits.timestamp_ahead_max_ms
    is_bad = ((times_ms < limits.timestamp_min_ms) | (times_ms > latest_ms)) & ~batch.is_tombstone
    if not is_bad.any():
        return Decoded(batch, rejected)
    untimely = [
        Rejected(indices[row], *_time_rejection(int(times_ms[row]), latest_ms, limits))
        for row in np.flatnonzero(is_bad).tolist()
    ]
    keep = np.flatnonzero(~is_bad)
    return Decoded(batch.select(keep), sorted([*rejected, *untimely], key=lambda one: one.index))


def _time_rejection(time_ms: int, latest_ms: int, limits: DecodeLimits) -> tuple[RejectReason, str]:
    for unit, per_ms in (("seconds", 1e-3), ("microseconds", 1e3), ("nanoseconds", 1e6)):
        if limits.timestamp_min_ms <= time_ms / per_ms <= latest_ms:
            return RejectReason.TIMESTAMP_UNIT, f"timestamp_ms {time_ms} looks like {unit}; send milliseconds"
    if time_ms < limits.timestamp_min_ms:
        return RejectReason.TIMESTAMP_PAST, f"timestamp_ms {time_ms} is before {limits.timestamp_min_ms}"
    return RejectReason.TIMESTAMP_FUTURE, f"timestamp_ms {time_ms} is after {latest_ms}, the latest accepted"


class _RejectedError(Exception):
    """Carries reason and detail of a rejected record to `_decode_one_by_one`."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def _read(
    record: Record, decoder: msgspec.json.Decoder[Any], limits: DecodeLimits, placement: Placement | None
) -> tuple[bytes, Any]:
    """Return the user and the event of one record, `_FORGOTTEN` for a tombstone; raise `_RejectedError`."""
    if record.key is None:
        raise _RejectedError(RejectReason.KEY_MISSING, "the record has no key; the key is the user id")
    if record.value is None:
        return _forgotten_user(record.key, record.headers, limits, placement), _FORGOTTEN
    if len(record.value) > limits.value_bytes_max:
        detail = f"the value has {len(record.value)} bytes, the limit is {limits.value_bytes_max}"
        raise _RejectedError(RejectReason.VALUE_TOO_LARGE, detail)
    event = _decode(_unframed(record.value), decoder)
    if event.user_id.encode() != record.key:
        raise _RejectedError(RejectReason.KEY_MISMATCH, "the key of the record is not its user_id in UTF-8")
    return record.key, event


def _decode(data: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _RejectedError(_reason_of(str(error)), str(error)) from None
    except UnicodeDecodeError as error:
        raise _RejectedError(RejectReason.NOT_UTF8, f"a text is not UTF-8: {error.reason}") from None
    except msgspec.DecodeError as error:
        raise _RejectedError(RejectReason.NOT_JSON, str(error)) from None
    except RecursionError:
        raise _RejectedError(RejectReason.NOT_JSON, "the value is nested too deeply") from None


def _reason_of(message: str) -> RejectReason:
    """Return the reason behind a message of msgspec, which has one exception type for all of them."""
    if "missing required field" in message:
        return RejectReason.FIELD_MISSING
    if "of length" in message:
        return RejectReason.FIELD_LENGTH
    if "`int` <=" in message or "`int` >=" in message or "out of range" in message:
        return RejectReason.FIELD_RANGE
    return RejectReason.FIELD_TYPE


def _forgotten_user(key: bytes, headers: Headers, limits: DecodeLimits, placement: Placement | None) -> bytes:
    try:
        check_event_type(headers, limits.deletion_ce_type)
        user = plain_user(key, placement)
    except UnclearDeletion as error:
        raise _RejectedError(RejectReason.DELETION_UNCLEAR, str(error)) from None
    try:
        is_user = 0 < len(user.decode()) <= limits.id_chars_max
    except UnicodeDecodeError:
        is_user = False
    if not is_user:
        raise _RejectedError(
            RejectReason.KEY_INVALID, f"the key must be UTF-8 text of 1 to {limits.id_chars_max} characters"
        )
    return user


def _tombstone_time_ms(timestamp_ms: int, now_ms: int) -> int:
    """Return the record's time, but at most the present: a future time would forget actions that are yet to come."""
    return min(timestamp_ms, now_ms) if timestamp_ms >= 0 else now_ms


def _unframed(value: bytes) -> bytes:
    return value[5:] if value[:1] == b"\0" else value


def _cloud_event_id(headers: Headers) -> str:
    """Return `source id`, which is unique by CloudEvents 1.0 (section 3.1.1); empty if the headers have no id."""
    attributes = dict(headers)
    if "ce_id" not in attributes:
        return ""
    parts = (attributes.get("ce_source") or b"", attributes["ce_id"] or b"")
    return " ".join(part.decode(errors="replace") for part in parts)


@lru_cache(maxsize=16)
def _decoder(limits: DecodeLimits) -> msgspec.json.Decoder[Any]:
    id_text = Annotated[str, msgspec.Meta(min_length=1, max_length=limits.id_chars_max)]
    name = Annotated[str, msgspec.Meta(min_length=1, max_length=limits.name_chars_max)]
    surface = Annotated[str, msgspec.Meta(max_length=limits.name_chars_max)]
    fields: list[Any] = [
        ("user_id", id_text),
        ("item_id", id_text),
        ("action", name),
        ("timestamp_ms", Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]),
        ("surface", surface | None, ""),
        ("duration_ms", Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)] | None, 0),
        ("event_id", id_text | None, ""),
    ]
    if limits.with_values:
        fields.append(("value", float | None, None))
    return msgspec.json.Decoder(msgspec.defstruct("Event", fields, gc=False))


@dataclass(frozen=True, slots=True)
class _Forgotten:
    """A placeholder for the event that a tombstone does not have."""

    item_id: str = ""
    action: str = ""
    timestamp_ms: int = 0
    surface: str = ""
    duration_ms: int = 0
    event_id: str = ""
    value: float | None = None


_FORGOTTEN = _Forgotten()
_KEY_OF_NO_ID = item_key("")
