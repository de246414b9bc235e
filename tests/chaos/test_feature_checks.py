"""The checker passes a faithful log of features, and names each fault that is put into one."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from infra.chaos.checks.checker import Checker, Rules, Verdict
from infra.chaos.checks.violations import Explained, Kind
from infra.harness.feature_files import CATEGORIES, DEFINITIONS, FeatureRules
from infra.harness.history import History, LogRecord
from streams.core.features.attributes import Attributes
from streams.core.features.definitions import parse_features
from streams.core.features.partition import FeatureConfig
from streams.core.layout import StateLimits
from streams.core.partition_state import PartitionState
from streams.core.policy import TriggerPolicy
from streams.features_kernel import load_functions
from streams.storage.codec import CheckpointMark, encode, encode_mark
from streams.storage.features import encode_features as encode_stored
from streams.storage.memory_store import MemoryStore
from streams.storage.reader import read_users
from streams.wire.actions import DecodeLimits, decode_actions
from streams.wire.embeddings import encode_tombstone
from streams.wire.features import FeatureBatch, encode_features

LIMITS = StateLimits(sequence_length=8, chunk_length=4, counts_too_old=True)
NOW_MS = 1_700_000_000_000
TABLE = {f"item-{number}": {"category": CATEGORIES[number % len(CATEGORIES)]} for number in range(30)}
ATTRIBUTES = Attributes.of(TABLE)
FEATURE_SET = parse_features(DEFINITIONS, ATTRIBUTES.names)
BATCH = 7


@dataclass(frozen=True, slots=True)
class Received:
    """A record as a consumer returns it."""

    key: bytes | None
    value: bytes | None
    offset: int
    timestamp: int
    headers: tuple[tuple[str, bytes], ...] = ()


@pytest.fixture(scope="module")
def config() -> FeatureConfig:
    """Return the features of a run."""
    return FeatureConfig(FEATURE_SET, ATTRIBUTES, load_functions())


@pytest.fixture(scope="module")
def history(config: FeatureConfig) -> History:
    """Return a faithful log."""
    return faithful(config)


def sent() -> list[LogRecord]:
    """Return events of three users: late ones and some older than everything kept, duplicates, deletions, poison."""
    rng = np.random.default_rng(5)
    records: list[LogRecord] = []

    def send(key: bytes, value: bytes | None) -> None:
        records.append(LogRecord(0, len(records), NOW_MS + 1_000 * len(records), key, value))

    for number in range(30):
        for user in ("ann", "bob", "cy"):
            late_ms = int(rng.integers(0, 90_000_000)) if rng.random() < 0.3 else 0
            event: dict[str, Any] = {
                "user_id": user,
                "item_id": f"item-{number}",
                "action": "click" if rng.random() < 0.6 else "save",
                "timestamp_ms": NOW_MS + 1_000 * len(records) - late_ms,
                "duration_ms": number + 1,
                "event_id": f"{user}-{number - 1 if rng.random() < 0.1 else number}",
            }
            if rng.random() < 0.7:
                event["value"] = float(rng.integers(0, 100)) / 4
            send(user.encode(), json.dumps(event).encode())
        if number == 12:
            send(b"cy", b'{"value": "x"')
            send(b"bob", None)
    send(b"cy", None)
    return records


def faithful(config: FeatureConfig) -> History:
    """Process `sent` with the real core and codec, in batches: apply, publish the features of due users, checkpoint."""
    inputs, changelog, outputs = sent(), list[LogRecord](), list[LogRecord]()
    state, store = PartitionState(TriggerPolicy(), LIMITS, config), MemoryStore()

    def append(log: list[LogRecord], key: bytes, value: bytes | None, headers: Any = ()) -> None:
        log.append(LogRecord(0, len(log), inputs[-1].timestamp_ms + len(log), key, value, tuple(headers)))

    for begin in range(0, len(inputs), BATCH):
        part = inputs[begin : begin + BATCH]
        now_ms = part[-1].timestamp_ms + 50
        received = [Received(one.key, one.value, one.offset, one.timestamp_ms) for one in part]
        decoded = decode_actions(received, now_ms=now_ms, limits=DecodeLimits(with_values=True))
        cold = state.missing(decoded.actions.users)
        read = read_users(store, cold, LIMITS, with_features=True)
        state.load(cold, read.stored, read.features)
        effects = state.apply(decoded.actions, now_ms)
        for user, offset in zip(effects.forgotten, effects.forgotten_offsets.tolist(), strict=True):
            append(outputs, *encode_tombstone(user, offset))
        for message in features(state, effects.due, now_ms):
            append(outputs, *message)
        snapshot = state.begin_checkpoint()
        mark = encode_mark(CheckpointMark(part[-1].offset + 1, 0))
        records = [*encode(snapshot, LIMITS), *encode_stored(snapshot), mark]
        state.commit_checkpoint(snapshot)
        store.write(records, len(changelog))
        for key, value in records:
            append(changelog, key, value)
    return History(inputs, changelog, features=outputs)


def features(state: PartitionState, due: list[bytes], now_ms: int) -> list[tuple[Any, ...]]:
    """Compute the features of due users; return key, value and headers of each record."""
    job = state.begin_job(due)
    users = job.sequences.users
    if not users:
        return []
    of, found = state.feature_job(users, now_ms), []
    batch = FeatureBatch(
        users=users,
        values=of.records.values,
        event_times_ms=of.newest_event_ms,
        source_offsets=of.offsets,
        as_of_ms=of.as_of_ms,
        valid_until_ms=of.records.valid_until_ms,
        reasons=["every_n"] * len(users),
        completeness=of.records.completeness,
        estimated=of.records.estimated,
        feature_set=FEATURE_SET.version,
        computed_at_ms=now_ms,
    )
    found += encode_features(batch)
    state.finish_feature_job(of, now_ms)
    state.finish_job(users, job.offsets, now_ms)
    return found


def judged(history: History, config: FeatureConfig, *explained: Explained, sample_every: int = 1) -> Verdict:
    """Return what a new checker says about the features of a log, without what it says about missing embeddings."""
    tables = tomllib.loads(DEFINITIONS)["feature"]
    rules = FeatureRules(tables, TABLE, FEATURE_SET.version)
    checker = Checker(
        Rules(8, 4, "v1", "actions", sample_every, explained, features=rules, feature_config=config), None
    )
    checker.feed(history)
    verdict = checker.judge({0: len(history.inputs)})
    ours = [one for one in verdict.violations if "the last output" not in one.detail and one.kind not in NOT_OURS]
    return replace(verdict, violations=ours)


NOT_OURS = {Kind.DEAD_LETTER_MISSING, Kind.COMMITTED_BEHIND}


def kinds(verdict: Verdict) -> set[Kind]:
    """Return the kinds of the violations."""
    return set(verdict.kinds())


def changed(history: History, at: int, **fields: Any) -> History:
    """Return the log with one other features record."""
    records = list(history.features)
    records[at] = replace(records[at], **fields)
    return replace(history, features=records)


def headers_with(record: LogRecord, name: str, value: bytes) -> tuple[tuple[str, bytes], ...]:
    """Return the headers of a record with another value."""
    return tuple((each, value if each == name else old) for each, old in record.headers)


def test_a_faithful_log_passes(history: History, config: FeatureConfig) -> None:
    """Core and model agree on late events, some older than everything kept, duplicates, deletions and absent values."""
    verdict = judged(history, config)
    assert [str(one) for one in verdict.violations] == []
    assert verdict.counts["features_of_sample"] == verdict.counts["feature_records"] > 20
    assert verdict.counts["feature_tombstones"] == 2
    assert verdict.counts["features_recomputed"] == verdict.counts["features_unpacked"] == 2


@pytest.mark.parametrize("name", [table["name"] for table in tomllib.loads(DEFINITIONS)["feature"]])
def test_a_wrong_value_is_named(history: History, config: FeatureConfig, name: str) -> None:
    """A value that differs is reported with the feature and both values, for every kind of feature."""
    at = max(at for at, record in enumerate(history.features) if record.key == b"ann")
    values = json.loads(history.features[at].value or b"")
    values[name] = [*values[name][1:], values[name][0]] if isinstance(values[name], list) else (values[name] or 0) + 1
    (found, *_) = judged(changed(history, at, value=json.dumps(values).encode()), config, sample_every=0).violations
    assert (found.kind, found.user, found.detail.startswith(f"{name} is")) == (Kind.WRONG_FEATURES, b"ann", True)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("feature-set", b"f" * 16),
        ("event-time-ms", b"1700000000000"),
        ("as-of-ms", b"1700000000001"),
        ("valid-until-ms", b"1700000000001"),
        ("completeness", b'{"latest": 0.5}'),
        ("estimated", b"surfaces_28d"),
        ("source-offset", b"1"),
    ],
)
def test_an_untrue_header_is_named(history: History, config: FeatureConfig, header: str, value: bytes) -> None:
    """A header that was not true at the record's source offset is reported, even if later records are right."""
    at = [at for at, record in enumerate(history.features) if record.key == b"ann"][4]
    record = history.features[at]
    headers = (*(each for each in record.headers if each[0] != header), (header, value))
    assert Kind.WRONG_FEATURES in kinds(judged(changed(history, at, headers=headers), config))


def test_a_late_valid_until_is_named(history: History, config: FeatureConfig) -> None:
    """A value that changes before `valid-until-ms` is reported."""
    at = [at for at, record in enumerate(history.features) if record.key == b"ann"][4]
    late = headers_with(history.features[at], "valid-until-ms", b"%d" % (NOW_MS + 3_000_000))
    (found, *_) = judged(changed(history, at, headers=late), config).violations
    assert "before valid-until-ms" in found.detail


def test_features_that_go_back_are_named_unless_a_fault_explains_it(history: History, config: FeatureConfig) -> None:
    """Older features after newer ones are stale; the same ones again are not."""
    of_ann = [record for record in history.features if record.key == b"ann"]
    again = replace(history, features=[*history.features, of_ann[-1]])
    assert judged(again, config).violations == []
    assert judged(again, config).counts["features_again"] == 1
    stale = replace(history, features=[*history.features, replace(of_ann[0], timestamp_ms=NOW_MS)])
    assert kinds(judged(stale, config)) == {Kind.STALE}
    assert judged(stale, config, Explained(NOW_MS - 1, NOW_MS + 1)).violations == []
    earlier = headers_with(of_ann[-1], "as-of-ms", b"%d" % (int(dict(of_ann[-1].headers)["as-of-ms"]) - 10))
    back = replace(history, features=[*history.features, replace(of_ann[-1], headers=earlier)])
    assert Kind.STALE in kinds(judged(back, config))


def test_missing_features_and_tombstones_are_named(history: History, config: FeatureConfig) -> None:
    """The last features contain the last change; a forgotten user has none, and features follow its tombstone."""
    last = max(at for at, record in enumerate(history.features) if record.key == b"ann")
    without = [record for at, record in enumerate(history.features) if at != last]
    assert kinds(judged(replace(history, features=without), config)) == {Kind.UNPUBLISHED}
    for user in (b"cy", b"bob"):
        kept = [record for record in history.features if record.key != user or record.value is not None]
        assert kinds(judged(replace(history, features=kept), config)) == {Kind.RESURRECTED}


def rewritten(history: History, change: Callable[[bytes], bytes | None]) -> History:
    """Return the log with other stored features; None leaves a record out."""
    changelog = []
    for record in history.changelog:
        is_stored = record.key is not None and record.key[:1] == b"f" and record.value is not None
        value = change(record.value or b"") if is_stored else record.value
        if value is not None or not is_stored:
            changelog.append(replace(record, value=value))
    return replace(history, changelog=changelog)


def test_stored_features_that_are_lost_or_damaged_are_named(history: History, config: FeatureConfig) -> None:
    """Missing, damaged and old records of stored features are reported, and those of a forgotten user."""
    assert kinds(judged(rewritten(history, lambda _: None), config)) == {Kind.WRONG_STATE}
    damaged = rewritten(history, lambda value: value[:-1] + bytes([value[-1] ^ 1]))
    assert kinds(judged(damaged, config)) == {Kind.WRONG_STATE}
    of_ann = [record for record in history.changelog if record.key == b"fann"]
    old = replace(history, changelog=[*history.changelog, replace(of_ann[-3], offset=len(history.changelog))])
    assert kinds(judged(old, config)) == {Kind.WRONG_STATE}
    of_cy = next(record for record in reversed(history.changelog) if record.key == b"fcy" and record.value)
    left = replace(history, changelog=[*history.changelog, of_cy])
    assert kinds(judged(left, config)) == {Kind.LEFTOVER}
