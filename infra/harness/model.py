"""Recompute every user's sequence, record by record, from the input topic.

The model is written from the contract (docs/reference/contracts.md) and not from the worker's code: one event at a
time, Python lists, no shortcuts. It shares with the worker only the layout of an action (`encoder.actions`), in which
sequences are compared.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np

from encoder.actions.columns import ACTION_DTYPE, Actions, item_key, name_code
from infra.harness.events import partition_of
from infra.harness.feature_model import Event
from infra.harness.history import LogRecord

VALUE_BYTES_MAX = 65_536
ID_CHARS_MAX = 256
TIMESTAMP_MIN_MS = 315_532_800_000
TIMESTAMP_AHEAD_MAX_MS = 600_000
LONG_AGO = -(2**62)


Row = tuple[int, int, int, int, int, int]
"""One action in the order of ACTION_DTYPE's fields: item, action, surface, timestamp_ms, duration_ms, event_id."""
TIME, EVENT_ID = 3, 5


@dataclass(frozen=True, slots=True)
class UserVersion:
    """A user right after one source offset; an embedding of that offset must carry these figures in its headers."""

    count: int
    newest_ms: int
    length: int
    rows: tuple[Row, ...] = ()
    """Kept actions, of sampled users only: every one of their embeddings is recomputed."""
    events: Sequence[Event] = ()
    """Events since the user was last forgotten, of which the first `events_count` are those up to the source offset."""
    events_count: int = 0


@dataclass(slots=True)
class ModelUser:
    """One user: kept actions, oldest first, and earlier versions by source offset."""

    partition: int
    rows: list[Row] = field(default_factory=list)
    count: int = 0
    applied_offset: int = -1
    forgotten_ms: int = LONG_AGO
    versions: dict[int, UserVersion] = field(default_factory=dict)
    tombstones: set[int] = field(default_factory=set)
    events: list[Event] = field(default_factory=list)
    """Every event since the user was last forgotten, kept or not, in order of arrival; empty without features."""

    def actions(self) -> Actions:
        """Return the kept actions as columns."""
        return np.array(self.rows, ACTION_DTYPE)


class Rejected(Exception):
    """The record is no action; the text is the reason that its dead letter must carry."""


class Model:
    """Every user as it must be after the input fed so far."""

    def __init__(
        self, sequence_length: int, sample_every: int = 0, partitions: int = 0, *, has_features: bool = False
    ) -> None:
        """Expect each user in its place among `partitions`; with 0 every place is right.

        With features every event is kept, and one that is older than the kept sequence changes its user too.
        """
        self.has_features = has_features
        self._length_max = sequence_length
        self._sample_every = sample_every
        self._partitions = partitions
        self.users: dict[bytes, ModelUser] = {}
        self.rejected: dict[tuple[int, int], tuple[str, LogRecord]] = {}
        """Reason and record as received, by (partition, offset)."""
        self.changes: dict[int, list[tuple[int, bytes]]] = {}
        """Offset and user of every event that changed a user, by partition and in order of offset."""
        self.arrived_ms: dict[tuple[int, int], int] = {}
        """Arrival time of every applied action, by (partition, offset)."""
        self.ends: dict[int, int] = {}
        """Offset after the last record, by partition."""
        self.events = 0

    def is_sampled(self, name: bytes) -> bool:
        """Return whether the user belongs to the sample: one user in `sample_every`, nobody for 0."""
        return bool(self._sample_every) and crc32(name) % self._sample_every == 0

    def feed(self, records: Iterable[LogRecord]) -> None:
        """Apply records; those of one partition come in order of offset."""
        for record in records:
            self.ends[record.partition] = record.offset + 1
            self.events += 1
            try:
                name, row = parse(record, self._partitions, with_values=self.has_features)
            except Rejected as rejected:
                self.rejected[record.partition, record.offset] = (str(rejected), record)
                continue
            self._apply(record, name, row)

    def move(self, partition: int, to: int, offset_max: int) -> None:
        """Continue a partition at another offset, after `settle`: sequences stay, and offsets are lowered.

        `offset_max` is the last offset that still means something: `to` - 1 in a truncated log, -1 in another one.
        """
        self.ends[partition] = to
        for user in self.users.values():
            if user.partition == partition:
                user.applied_offset = min(user.applied_offset, offset_max)
                user.versions.clear()
                user.tombstones.clear()

    def settle(self) -> None:
        """Keep each user's present version, and drop the earlier ones."""
        for user in self.users.values():
            last = user.applied_offset
            user.versions = {last: user.versions[last]} if last in user.versions else {}
            user.tombstones &= {last}
        self.changes.clear()
        self.arrived_ms.clear()
        self.rejected.clear()

    def _apply(self, record: LogRecord, name: bytes, row: Row | None) -> None:
        user = self.users.setdefault(name, ModelUser(record.partition))
        changed = self._forget(user, record) if row is None else self._insert(user, row)
        if not changed:
            return
        if self.has_features and row is not None:
            user.events.append(_event(record, len(user.events)))
        user.applied_offset = record.offset
        newest_ms = user.rows[-1][TIME] if user.rows else LONG_AGO
        user.versions[record.offset] = UserVersion(
            user.count,
            newest_ms,
            len(user.rows),
            tuple(user.rows) if self.is_sampled(name) else (),
            user.events,
            len(user.events),
        )
        self.changes.setdefault(record.partition, []).append((record.offset, name))
        if row is not None:
            self.arrived_ms[record.partition, record.offset] = record.timestamp_ms

    def _forget(self, user: ModelUser, record: LogRecord) -> bool:
        user.rows, user.events, user.count = [], [], 0
        user.forgotten_ms = max(user.forgotten_ms, record.timestamp_ms)
        user.tombstones.add(record.offset)
        return True

    def _insert(self, user: ModelUser, row: Row) -> bool:
        if row[TIME] <= user.forgotten_ms:
            return False
        if row[EVENT_ID] and any(kept[EVENT_ID] == row[EVENT_ID] for kept in user.rows):
            return False
        place = bisect_right(user.rows, row[TIME], key=lambda kept: kept[TIME])
        if place == 0 and len(user.rows) == self._length_max:
            return self.has_features
        user.rows.insert(place, row)
        user.count += 1
        del user.rows[: max(0, len(user.rows) - self._length_max)]
        return True


def parse(record: LogRecord, partitions: int = 0, *, with_values: bool = False) -> tuple[bytes, Row | None]:
    """Return user and action of a record, None as the action of a deletion; raise `Rejected` if it is neither.

    With `with_values` the field `value` must be a number; otherwise it is ignored, like any other.
    """
    if record.key is None:
        raise Rejected("key-missing")
    name, row = (
        (_deleted(record, partitions), None)
        if record.value is None
        else (record.key, _row(record, with_values=with_values))
    )
    if partitions and partition_of(name, partitions) != record.partition:
        raise Rejected("wrong-partition")
    return name, row


def _row(record: LogRecord, *, with_values: bool) -> Row:
    value = record.value or b""
    if len(value) > VALUE_BYTES_MAX:
        raise Rejected("value-too-large")
    event = _object(value[5:] if value[:1] == b"\0" else value)
    row = (
        item_key(_text(event, "item_id", ID_CHARS_MAX)),
        name_code(_text(event, "action", 64)),
        name_code(_optional(event, "surface", 64)),
        _number(event, "timestamp_ms"),
        event.get("duration_ms") or 0,
        item_key(event_id) if (event_id := _optional(event, "event_id", ID_CHARS_MAX)) else 0,
    )
    if _text(event, "user_id", ID_CHARS_MAX).encode() != record.key:
        raise Rejected("key-mismatch")
    _check_time(row[TIME], record.timestamp_ms)
    _check_duration(event.get("duration_ms"))
    if with_values and (isinstance(event.get("value"), bool) or not isinstance(event.get("value"), int | float | None)):
        raise Rejected("field-type")
    return row


def _event(record: LogRecord, arrival: int) -> Event:
    """Return an action that was accepted as the model of the features takes it; equal texts are one object."""
    value = record.value or b""
    event = _object(value[5:] if value[:1] == b"\0" else value)
    return Event(
        sys.intern(event["item_id"]),
        sys.intern(event["action"]),
        event["timestamp_ms"],
        sys.intern(event.get("surface") or ""),
        event.get("duration_ms") or 0,
        None if event.get("value") is None else float(event["value"]),
        arrival,
    )


def _deleted(record: LogRecord, partitions: int) -> bytes:
    """Return the user that a record without a value forgets.

    The key is the plain id, or the id as JSON text, in a JSON object or behind a schema id. Forms other than the plain
    id are understood only in the user's own partition.
    """
    key = record.key or b""
    if any(name == "ce_type" for name, _ in record.headers):
        raise Rejected("deletion-unclear")
    inner = key[5:] if key[:1] == b"\0" and len(key) > 5 else key
    user = _user_in_json(inner)
    if user is None:
        user = inner
    if any(byte < 0x20 for byte in user):
        raise Rejected("deletion-unclear")
    if user != key and partition_of(user, partitions or 1) != (record.partition if partitions else 0):
        raise Rejected("deletion-unclear")
    if not _is_id(user):
        raise Rejected("key-invalid")
    return user


def _user_in_json(key: bytes) -> bytes | None:
    """Return the id in a key that is JSON text or a JSON object, None if it is neither."""
    if key[:1] not in (b'"', b"{"):
        return None
    try:
        found = json.loads(key)
    except (ValueError, RecursionError):
        return None
    user = found.get("user_id") if isinstance(found, dict) else found
    if not isinstance(user, str) or not user:
        raise Rejected("deletion-unclear")
    return user.encode()


def _object(value: bytes) -> dict[str, Any]:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise Rejected("not-utf8") from None
    try:
        event = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Rejected("not-json") from None
    if not isinstance(event, dict):
        raise Rejected("field-type")
    return event


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _text(event: dict[str, Any], name: str, chars_max: int) -> str:
    if name not in event:
        raise Rejected("field-missing")
    text = event[name]
    if not isinstance(text, str):
        raise Rejected("field-type")
    if not 1 <= len(text) <= chars_max:
        raise Rejected("field-length")
    return text


def _optional(event: dict[str, Any], name: str, chars_max: int) -> str:
    return "" if event.get(name) in (None, "") else _text(event, name, chars_max)


def _number(event: dict[str, Any], name: str) -> int:
    if name not in event:
        raise Rejected("field-missing")
    number = event[name]
    if not isinstance(number, int) or isinstance(number, bool):
        raise Rejected("field-type")
    return number


def _check_duration(duration_ms: Any) -> None:
    if duration_ms is not None and not isinstance(duration_ms, int):
        raise Rejected("field-type")
    if duration_ms is not None and not 0 <= duration_ms < 2**32:
        raise Rejected("field-range")


def _check_time(time_ms: int, arrived_ms: int) -> None:
    latest_ms = arrived_ms + TIMESTAMP_AHEAD_MAX_MS
    if TIMESTAMP_MIN_MS <= time_ms <= latest_ms:
        return
    if any(TIMESTAMP_MIN_MS <= time_ms / per_ms <= latest_ms for per_ms in (1e-3, 1e3, 1e6)):
        raise Rejected("timestamp-unit")
    raise Rejected("timestamp-past" if time_ms < TIMESTAMP_MIN_MS else "timestamp-future")


def _is_id(key: bytes) -> bool:
    try:
        return 1 <= len(key.decode()) <= ID_CHARS_MAX
    except UnicodeDecodeError:
        return False
