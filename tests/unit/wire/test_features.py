"""Encoding and decoding of features and their headers."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.actions.columns import ACTION_DTYPE, item_key, name_code
from streams.core.features import tiles
from streams.core.features.definitions import parse_features
from streams.core.features.schema import json_schema, value_bytes_max
from streams.core.features.state import Attributes, FeatureState
from streams.features_kernel import load_functions
from streams.wire.features import (
    NEVER_MS,
    FeatureBatch,
    FeatureMetadata,
    MalformedFeatures,
    Tombstone,
    UserFeatures,
    decode_feature_metadata,
    decode_features,
    encode_features,
    largest_features,
)
from streams.wire.headers import encode_tombstone
from tests.unit.core.features.definitions import TOML

ATTRIBUTES = Attributes.of({f"item-{n}": {"color": ["red", "blue", 'a "b" ü'][n % 3]} for n in range(9)})
FEATURES = parse_features(TOML, ATTRIBUTES.names)
VALUE = {"n": 3, "mean": None, "sum": 1.5, "last": ["a", "b"], "none": [], "top": [["red", 3], ["blue", 0.25]]}
NUMBER = st.one_of(st.none(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False))
RANKED = st.lists(st.tuples(st.text(max_size=5), st.floats(0, 9)).map(list), max_size=3)
VALUES = st.dictionaries(st.text(max_size=5), st.one_of(NUMBER, st.lists(st.text(max_size=5), max_size=3), RANKED))


def batch_of(*values: dict[str, Any], **changed: Any) -> FeatureBatch:
    """Return a batch with distinct metadata per row."""
    count = len(values)
    columns = {
        "users": [f"user-{row}".encode() for row in range(count)],
        "values": [json.dumps(each).encode() for each in values],
        "event_times_ms": np.arange(count) + 1_700_000_000_000,
        "source_offsets": np.arange(count) + 2**40,
        "as_of_ms": np.arange(count) + 1_700_000_000_050,
        "valid_until_ms": np.arange(count) + 1_700_000_300_000,
        "reasons": ["every_n", "refresh"] * (count // 2) + ["every_n"] * (count % 2),
        "completeness": [{}] * count,
        "estimated": [()] * count,
        "feature_set": "0123456789abcdef",
        "computed_at_ms": 1_700_000_000_123,
    }
    return FeatureBatch(**(columns | changed))


def record_of(**changed: bytes | None) -> tuple[bytes, bytes | None, list[tuple[str, bytes]]]:
    """Return a record of `VALUE`, with headers replaced, or removed where None is given."""
    [(key, value, headers)] = encode_features(batch_of(VALUE, source_id="topic/1"))
    named = dict[str, bytes | None](headers) | {name.replace("_", "-"): text for name, text in changed.items()}
    assert key is not None
    return key, value, [(name, text) for name, text in named.items() if text is not None]


def test_all_metadata_is_in_headers() -> None:
    """The headers are those of the contract, as text; the value is only the JSON object."""
    batch = batch_of(VALUE, completeness=[{"n": 0.25}], estimated=[("last", "n")], source_id="topic/1")
    [(key, value, headers)] = encode_features(batch)
    assert key == b"user-0"
    assert json.loads(value or b"") == VALUE
    assert sorted(headers) == [
        ("as-of-ms", b"1700000000050"),
        ("completeness", b'{"n":0.25}'),
        ("computed-at-ms", b"1700000000123"),
        ("estimated", b"last,n"),
        ("event-time-ms", b"1700000000000"),
        ("feature-set", b"0123456789abcdef"),
        ("reason", b"every_n"),
        ("source-id", b"topic/1"),
        ("source-offset", b"1099511627776"),
        ("valid-until-ms", b"1700000300000"),
    ]


def test_what_there_is_not_has_no_header() -> None:
    """Values that never change by themselves, no estimate and an unknown log leave the header out."""
    [(_, _, headers)] = encode_features(batch_of(VALUE, valid_until_ms=np.array([NEVER_MS])))
    assert {name for name, _ in headers} == {
        *("feature-set", "as-of-ms", "completeness", "event-time-ms", "reason", "source-offset", "computed-at-ms")
    }
    assert dict(headers)["completeness"] == b"{}"
    assert decode_feature_metadata(headers) == FeatureMetadata(
        feature_set="0123456789abcdef",
        as_of_ms=1_700_000_000_050,
        valid_until_ms=None,
        completeness={},
        estimated=(),
        event_time_ms=1_700_000_000_000,
        reason="every_n",
        source_offset=2**40,
        computed_at_ms=1_700_000_000_123,
    )


def test_never_is_the_never_of_the_feature_state() -> None:
    """The feature state and the records agree on what stands for "never"."""
    assert NEVER_MS == tiles.NEVER_MS


@settings(max_examples=100)
@given(st.lists(VALUES, max_size=4), st.sampled_from([NEVER_MS, NEVER_MS - 1, 5]), st.floats(0, 1))
def test_decoding_inverts_encoding(values: list[dict[str, Any]], until_ms: int, share: float) -> None:
    """Every record decodes to what was encoded, with pairs as lists, as in JSON."""
    names = [tuple(sorted(name for name in each if name and "," not in name)) for each in values]
    batch = batch_of(
        *values,
        valid_until_ms=np.full(len(values), until_ms),
        completeness=[dict.fromkeys(each, share) for each in values],
        estimated=names,
    )
    read = [decode_features(*message) for message in encode_features(batch)]
    assert len(read) == len(batch)
    for row, features in enumerate(read):
        assert isinstance(features, UserFeatures)
        assert (features.user, features.values) == (f"user-{row}", values[row])
        assert features.metadata == FeatureMetadata(
            "0123456789abcdef",
            int(batch.as_of_ms[row]),
            None if until_ms == NEVER_MS else until_ms,
            dict.fromkeys(values[row], share),
            names[row],
            int(batch.event_times_ms[row]),
            batch.reasons[row],
            int(batch.source_offsets[row]),
            1_700_000_000_123,
        )


def test_a_null_value_is_a_tombstone() -> None:
    """A tombstone is that of embeddings: the user and the offset of the deletion, -1 if it is not stated."""
    assert decode_features(*encode_tombstone(b"ann", 41, "topic")) == Tombstone("ann", 41, "topic")
    assert decode_features(b"ann", None, []) == Tombstone("ann", -1)


MALFORMED: dict[str, tuple[bytes, dict[str, bytes | None], str]] = {
    "not JSON": (b'{"n": ', {}, "not a JSON object of features"),
    "empty": (b"", {}, "not a JSON object of features"),
    "not UTF-8": (b'{"n": ["\xff"]}', {}, "not a JSON object of features"),
    "two documents": (b'{"n": 1} {}', {}, "not a JSON object of features"),
    "an array": (b"[1]", {}, "got `array`"),
    "null": (b"null", {}, "got `null`"),
    "a text": (b'{"n": "x"}', {}, "got `str`"),
    "a truth value": (b'{"n": true}', {}, "got `bool`"),
    "an object": (b'{"n": {}}', {}, "got `object`"),
    "NaN": (b'{"n": NaN}', {}, "not a JSON object of features"),
    "infinity": (b'{"n": -Infinity}', {}, "not a JSON object of features"),
    "a number beyond a double": (b'{"n": 1e999}', {}, "out of range"),
    "a whole number without end": (b'{"n": %s}' % (b"9" * 5_000), {}, "not a JSON object of features"),
    "a number among ids": (b'{"n": ["a", 1]}', {}, "got `int`"),
    "null among ids": (b'{"n": ["a", null]}', {}, "got `null`"),
    "a pair of three": (b'{"n": [["a", 1, 2]]}', {}, "length 2"),
    "a pair without a number": (b'{"n": [["a", "b"]]}', {}, "got `str`"),
    "ids and pairs": (b'{"n": ["a", ["b", 1]]}', {}, "mixes ids with pairs"),
    "pairs and ids": (b'{"n": [["b", 1], "a"]}', {}, "mixes ids with pairs"),
    "nested without end": (b'{"n": ' + b"[" * 100_000, {}, "not a JSON object of features"),
    "no set": (b"{}", {"feature_set": None}, "header feature-set is missing"),
    "no time": (b"{}", {"as_of_ms": None}, "header as-of-ms is missing"),
    "no event time": (b"{}", {"event_time_ms": None}, "header event-time-ms is missing"),
    "no reason": (b"{}", {"reason": None}, "header reason is missing"),
    "no offset": (b"{}", {"source_offset": None}, "header source-offset is missing"),
    "no processing time": (b"{}", {"computed_at_ms": None}, "header computed-at-ms is missing"),
    "no completeness": (b"{}", {"completeness": None}, "header completeness is missing"),
    "offset a word": (b"{}", {"source_offset": b"many"}, "not an integer"),
    "offset too long": (b"{}", {"source_offset": b"9" * 5_000}, "not an integer"),
    "end a word": (b"{}", {"valid_until_ms": b"never"}, "not an integer"),
    "header not UTF-8": (b"{}", {"reason": b"\xff"}, "not UTF-8"),
    "completeness not JSON": (b"{}", {"completeness": b"half"}, "not a JSON object of numbers"),
    "completeness a text": (b"{}", {"completeness": b'{"n":"x"}'}, "not a JSON object of numbers"),
    "completeness above one": (b'{"n": 1}', {"completeness": b'{"n":1.5}'}, "not a share"),
    "completeness negative": (b'{"n": 1}', {"completeness": b'{"n":-0.1}'}, "not a share"),
    "completeness NaN": (b'{"n": 1}', {"completeness": b'{"n":NaN}'}, "not a JSON object of numbers"),
    "completeness of another feature": (b'{"n": 1}', {"completeness": b'{"m":0.5}'}, "names 'm'"),
    "estimate of another feature": (b'{"n": 1}', {"estimated": b"n,m"}, "names 'm'"),
}


@pytest.mark.parametrize(("value", "changed", "text"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_record_raises(value: bytes, changed: dict[str, bytes | None], text: str) -> None:
    """Each malformed record raises an error that names the problem."""
    key, _, headers = record_of(**changed)
    with pytest.raises(MalformedFeatures, match=text):
        decode_features(key, value, headers)


def test_a_key_that_is_not_text_is_malformed() -> None:
    """A key that is not UTF-8 raises an error that names the key."""
    _, value, headers = record_of()
    with pytest.raises(MalformedFeatures, match="key"):
        decode_features(b"\xff", value, headers)


def test_a_header_or_feature_that_is_new_is_read() -> None:
    """Headers may be added, and two of one name count as the last."""
    key, value, headers = record_of(a_new_one=b"x")
    read = decode_features(key, value, [("reason", b"first"), *headers])
    assert isinstance(read, UserFeatures)
    assert read.metadata.reason == "every_n"


EVENT = st.tuples(
    st.integers(0, 8), st.sampled_from(["view", "buy"]), st.integers(0, 40 * 86_400_000), st.floats(-9, 9)
)


@settings(max_examples=60)
@given(st.lists(EVENT, max_size=30), st.booleans())
def test_real_values_have_the_schema_and_the_length_that_are_stated(events: list[Any], are_unknown: bool) -> None:
    """What the feature state computes is valid by the schema, comes back as it was, and is not longer than stated."""
    state = FeatureState(FEATURES, ATTRIBUTES, 1, load_functions())
    actions = np.zeros(len(events), ACTION_DTYPE)
    actions["item"] = [item_key(f"{'other' if are_unknown else 'item'}-{item}") for item, *_ in events]
    actions["action"] = [name_code(action) for _, action, *_ in events]
    actions["surface"] = name_code("home")
    actions["timestamp_ms"] = [at for _, _, at, _ in events]
    state.add(np.zeros(len(events), np.int64), actions, np.array([number for *_, number in events], np.float64))
    as_of_ms = np.array([41 * 86_400_000])
    columns = state.values(np.zeros(1, np.int64), as_of_ms)
    (value,) = state.records(np.zeros(1, np.int64), as_of_ms).values
    batch = batch_of({}, values=[value], as_of_ms=as_of_ms, valid_until_ms=columns.valid_until_ms)
    (message,) = encode_features(batch)
    read = decode_features(*message)
    assert isinstance(read, UserFeatures)
    assert read.values == {name: column[0] for name, column in columns.values.items()}
    schema = json_schema(FEATURES)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(value), schema, jsonschema.Draft202012Validator)
    assert len(value) <= value_bytes_max(
        FEATURES, {"color": len(json.dumps('a "b" ü', ensure_ascii=False).encode())}, 18
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"views": None},
        {"views": 1.5},
        {"views": -1},
        {"top": [["red"]]},
        {"top": [["red", 1, 2]]},
        {"last": [1]},
        {"last": ["a"] * 4},
        {"more": 1},
    ],
)
def test_the_schema_rejects_other_values(changed: dict[str, Any]) -> None:
    """A value of another type, too many entries and a feature that is not defined are invalid."""
    columns = FeatureState(FEATURES, ATTRIBUTES, 1, load_functions()).values(np.zeros(1, np.int64), np.array([1]))
    nothing = {name: column[0] for name, column in columns.values.items()}
    validator = jsonschema.Draft202012Validator(json_schema(FEATURES))
    assert validator.is_valid(nothing)
    assert not validator.is_valid(nothing | changed)
    for name in nothing:
        assert not validator.is_valid({each: nothing[each] for each in nothing if each != name})


def test_no_message_is_longer_than_the_largest() -> None:
    """A message with every header, all features incomplete and estimated, is not longer than the bound."""
    names = [each.name for each in FEATURES.features]
    batch = batch_of(
        dict.fromkeys(names, 0),
        completeness=[dict.fromkeys(names, 1 / 3)],
        estimated=[tuple(names)],
        reasons=["max_staleness"],
        source_id="topic/1",
    )
    (message,) = encode_features(batch)
    value = message[1] or b""

    def size(message: Any) -> int:
        return sum(len(name) + len(text) for name, text in message[2]) + len(message[0]) + len(message[1])

    assert size(message) <= size(largest_features(len("user-0"), names, len(value), "topic/1"))
