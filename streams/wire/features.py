"""Features on their output topic: columns to records, and a record back to the features of a user.

The key is the user id in UTF-8. The value is a JSON object from the name of each feature to its value: a number, null,
a list of ids, or a list of [name, number]. The metadata is in headers of UTF-8 text: `feature-set` (version of the
definitions), `as-of-ms` (time for which the values hold), `valid-until-ms` (time at which the first of them changes
without an event; missing if none does), `completeness` (JSON object from the name of each feature that has not seen its
whole window to the share that it has seen), `estimated` (names of the features that are estimates at present, separated
by commas; missing if none is), `event-time-ms` (of the newest action inside), `reason`, `source-offset` (of the newest
event inside), `source-id` (which log that offset belongs to; missing where unknown), `computed-at-ms` (processing
time). A null value is a tombstone, as for embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from encoder.arrays import I64
from streams.errors import StreamformerError
from streams.wire.headers import Headers, HeaderTexts, Message, Tombstone, source_headers, user_of

NEVER_MS = 2**62
"""Value of `valid_until_ms` for a user whose values do not change without an event, as the feature state has it."""

_Ranked = tuple[str, int | float]
_VALUES = msgspec.json.Decoder(dict[str, int | float | list[str | _Ranked] | None])
_SHARES = msgspec.json.Decoder(dict[str, float])


class MalformedFeatures(StreamformerError):
    """A record does not hold the features of a user; the text states why."""


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """The features of U users by one feature set, as columns."""

    users: Sequence[bytes]
    """User ids, UTF-8; length U."""
    values: Sequence[bytes]
    """[U] JSON objects, as `streams.core.features.state.FeatureState.records` has them."""
    event_times_ms: I64
    """[U], event time of the newest action inside."""
    source_offsets: I64
    """[U], source offset of the newest event inside."""
    as_of_ms: I64
    """[U], time for which the values hold."""
    valid_until_ms: I64
    """[U], time at which the first value changes without an event; `NEVER_MS` if none does."""
    reasons: Sequence[str]
    """[U], labels of the reasons for which the users were due."""
    completeness: Sequence[Mapping[str, float]]
    """[U], share of the window that each feature has seen; only those that have not seen all of it."""
    estimated: Sequence[tuple[str, ...]]
    """[U], names of the features that are estimates."""
    feature_set: str
    """Version of the definitions."""
    computed_at_ms: int
    """Processing time at which the batch was computed."""
    source_id: str = ""
    """Identity of the log that the source offsets belong to; empty if unknown."""

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True, slots=True)
class FeatureMetadata:
    """The headers of one record."""

    feature_set: str
    as_of_ms: int
    valid_until_ms: int | None
    """Time at which the first value changes without an event; None if none does."""
    completeness: Mapping[str, float]
    """Share of the window that each feature has seen; only those that have not seen all of it."""
    estimated: tuple[str, ...]
    """Names of the features that are estimates."""
    event_time_ms: int
    reason: str
    source_offset: int
    computed_at_ms: int
    source_id: str = ""
    """Identity of the log that the source offset belongs to; empty if unknown."""


@dataclass(frozen=True, slots=True)
class UserFeatures:
    """The features of a user that were read; `values` has numbers, None, lists of ids and lists of [name, number]."""

    user: str
    values: dict[str, Any]
    metadata: FeatureMetadata


def encode_features(batch: FeatureBatch) -> Iterator[Message]:
    """Return one message per user, in order."""
    feature_set = ("feature-set", batch.feature_set.encode())
    computed_at = ("computed-at-ms", b"%d" % batch.computed_at_ms)
    source = source_headers(batch.source_id)
    complete = ("completeness", b"{}")
    columns = zip(
        batch.users,
        batch.values,
        batch.event_times_ms.tolist(),
        batch.source_offsets.tolist(),
        batch.as_of_ms.tolist(),
        batch.valid_until_ms.tolist(),
        batch.reasons,
        batch.completeness,
        batch.estimated,
        strict=True,
    )
    for user, value, event_time_ms, source_offset, as_of_ms, until_ms, reason, shares, estimated in columns:
        headers = [
            feature_set,
            ("as-of-ms", b"%d" % as_of_ms),
            ("completeness", msgspec.json.encode(shares)) if shares else complete,
            ("event-time-ms", b"%d" % event_time_ms),
            ("reason", reason.encode()),
            ("source-offset", b"%d" % source_offset),
            computed_at,
            *source,
        ]
        if until_ms < NEVER_MS:
            headers.append(("valid-until-ms", b"%d" % until_ms))
        if estimated:
            headers.append(("estimated", ",".join(estimated).encode()))
        yield user, value, headers


def largest_features(id_bytes: int, names: Sequence[str], value_bytes: int, source_id: str = "") -> Message:
    """Return the largest message that features can have, so that topics can be checked before work begins.

    `value_bytes` is the length of the longest value (`streams.core.features.schema.value_bytes_max`).
    """
    number = np.array([2**62 - 1])
    batch = FeatureBatch(
        users=[bytes(id_bytes)],
        values=[bytes(value_bytes)],
        event_times_ms=number,
        source_offsets=number,
        as_of_ms=number,
        valid_until_ms=number,
        reasons=["max_staleness"],
        completeness=[dict.fromkeys(names, 0.12345678901234567e-300)],
        estimated=[tuple(names)],
        feature_set="f" * 16,
        computed_at_ms=2**62,
        source_id=source_id,
    )
    (message,) = encode_features(batch)
    return message


def decode_features(key: bytes | None, value: bytes | None, headers: Headers) -> UserFeatures | Tombstone:
    """Decode one record of the topic; raise `MalformedFeatures` if it is neither features nor a tombstone."""
    texts = HeaderTexts.of(headers, MalformedFeatures)
    user = user_of(key, MalformedFeatures)
    if value is None:
        return texts.tombstone(user)
    metadata = _metadata(texts)
    values = _values(value)
    if unknown := {*metadata.completeness, *metadata.estimated} - values.keys():
        raise MalformedFeatures(f"a header names {min(unknown)[:40]!r}, which the value does not have")
    return UserFeatures(user, values, metadata)


def decode_feature_metadata(headers: Headers) -> FeatureMetadata:
    """Decode only the headers; raise `MalformedFeatures` if one is missing or unreadable."""
    return _metadata(HeaderTexts.of(headers, MalformedFeatures))


def _values(value: bytes) -> dict[str, Any]:
    """Return the values by name, pairs as lists, as they are in JSON."""
    try:
        values: dict[str, Any] = _VALUES.decode(value)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:  # not UTF-8, or a number with too many digits
        raise MalformedFeatures(f"the value is not a JSON object of features: {error}") from None
    for name, each in values.items():
        if type(each) is list and each and type(each[0]) is tuple:
            values[name] = [list(pair) for pair in each]
        if type(each) is list and len({type(one) for one in each}) > 1:
            raise MalformedFeatures(f"feature {name[:40]!r} mixes ids with pairs of name and number")
    return values


def _metadata(texts: HeaderTexts) -> FeatureMetadata:
    estimated = texts.texts.get("estimated", "")
    return FeatureMetadata(
        feature_set=texts.text("feature-set"),
        as_of_ms=texts.integer("as-of-ms"),
        valid_until_ms=texts.integer("valid-until-ms") if "valid-until-ms" in texts.texts else None,
        completeness=_completeness(texts.text("completeness")),
        estimated=tuple(estimated.split(",")) if estimated else (),
        event_time_ms=texts.integer("event-time-ms"),
        reason=texts.text("reason"),
        source_offset=texts.integer("source-offset"),
        computed_at_ms=texts.integer("computed-at-ms"),
        source_id=texts.source_id,
    )


def _completeness(text: str) -> dict[str, float]:
    if text == "{}":
        return {}
    try:
        shares: dict[str, float] = _SHARES.decode(text)
    except (msgspec.DecodeError, ValueError) as error:
        raise MalformedFeatures(f"header completeness is not a JSON object of numbers: {error}") from None
    for name, share in shares.items():
        if not 0 <= share <= 1 or not math.isfinite(share):
            raise MalformedFeatures(f"header completeness has {share} for {name[:40]!r}, not a share from 0 to 1")
    return shares
