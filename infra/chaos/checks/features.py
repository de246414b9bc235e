"""Compare the features topic with the model: each record as it is published, and each user's last record at rest.

Values are recomputed from the user's full list of events by `infra.harness.feature_model`, as of the time and the
source offset that the record states: for every record of a sample of users, and for the last record of the others. At
rest the stored feature state is read as a restore would read it, and must yield the same values.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from infra.chaos.checks.feature_values import difference, is_steady
from infra.chaos.checks.state import StateChecks
from infra.chaos.checks.violations import Explained, Kind, Violation, is_explained
from infra.harness.feature_files import FeatureRules
from infra.harness.history import LogRecord
from infra.harness.model import Model, UserVersion
from streams.core.features.partition import FeatureConfig
from streams.core.features.state import DamagedFeatures, FeatureState, OtherFeatureSet
from streams.storage.codec import HEAD_PREFIX, CorruptValue, decode_head
from streams.storage.features import decode_features as decode_stored
from streams.storage.features import features_key
from streams.storage.store import FEATURES_PREFIX
from streams.wire.features import MalformedFeatures, UserFeatures, decode_features

ROWS = 64
"""Users whose stored state is read at a time."""


@dataclass(slots=True)
class _Published:
    """Newest features of one user; older records are dropped, as a subscriber drops them."""

    source_offset: int = -1
    as_of_ms: int = -1
    record: UserFeatures | None = None
    """None after a tombstone."""
    forgotten_at: int = -1
    """Source offset of the last tombstone."""


@dataclass(frozen=True, slots=True)
class _Sampled:
    """A record whose values are to be recomputed."""

    name: bytes
    partition: int
    offset: int
    version: UserVersion
    record: UserFeatures


class FeatureChecks:
    """Follows the features topic, and reads the stored features that `state` has of the changelog."""

    def __init__(
        self,
        model: Model,
        state: StateChecks,
        rules: FeatureRules,
        config: FeatureConfig,
        explained: Sequence[Explained],
    ) -> None:
        self._model, self._state, self._rules, self._config = model, state, rules, config
        self._explained = explained
        self._users: dict[bytes, _Published] = defaultdict(_Published)
        self._fresh: set[bytes] = set()
        """Users with records that have not been judged."""
        self._sample: list[_Sampled] = []
        self._source_ids: dict[int, bytes] = {}
        """Log that the records of a partition name."""
        self.counts: Counter[str] = Counter()

    def feed(self, records: Iterable[LogRecord]) -> list[Violation]:
        """Check records, in order."""
        return [violation for record in records for violation in self._record(record)]

    def _record(self, record: LogRecord) -> Iterator[Violation]:
        name, headers = record.key or b"", dict(record.headers)
        offset = int(headers.get("source-offset", b"-1"))
        try:
            found = decode_features(record.key, record.value, record.headers)
        except MalformedFeatures as error:
            yield Violation(Kind.WRONG_FEATURES, name, record.partition, offset, str(error))
            return
        features = found if isinstance(found, UserFeatures) else None
        problem = self._untruth(record, name, offset, features) or self._other_log(record.partition, headers)
        if problem:
            yield Violation(Kind.WRONG_FEATURES, name, record.partition, offset, problem)
            return
        self.counts["feature_records" if features else "feature_tombstones"] += 1
        self._fresh.add(name)
        if features and self._model.is_sampled(name):
            version = self._model.users[name].versions[offset]
            self._sample.append(_Sampled(name, record.partition, offset, version, features))
        yield from self._order(record, name, offset, features)
        yield from self._forgotten(record, name, offset, features)

    def _untruth(self, record: LogRecord, name: bytes, offset: int, features: UserFeatures | None) -> str:
        """Describe what was not true at the record's source offset; empty if all was true."""
        user = self._model.users.get(name)
        if user is None:
            return "the input has no action of this user"
        if features is None:
            return "" if offset in user.tombstones else "no tombstone has this source offset"
        version, metadata = user.versions.get(offset), features.metadata
        if version is None or offset in user.tombstones:
            return "no event of the user that features count has this source offset"
        arrived_ms = self._model.arrived_ms.get((record.partition, offset), version.newest_ms)
        until_ms = metadata.valid_until_ms
        checks = {
            f"feature set {metadata.feature_set}": metadata.feature_set == self._rules.feature_set,
            f"event-time-ms {metadata.event_time_ms}, must be {version.newest_ms}": metadata.event_time_ms
            == version.newest_ms,
            f"as-of-ms {metadata.as_of_ms} not after the event": metadata.as_of_ms > version.newest_ms,
            f"as-of-ms {metadata.as_of_ms} before the arrival at {arrived_ms}": metadata.as_of_ms >= arrived_ms,
            f"valid-until-ms {until_ms} not after as-of-ms": until_ms is None or until_ms > metadata.as_of_ms,
            f"completeness {metadata.completeness} of a history that was seen": metadata.completeness == {},
        }
        return next((text for text, is_right in checks.items() if not is_right), "")

    def _other_log(self, partition: int, headers: Mapping[str, bytes]) -> str:
        source_id = headers.get("source-id", b"")
        known = self._source_ids.setdefault(partition, source_id)
        return "" if source_id == known else f"the header source-id is {source_id!r}, and the log is another"

    def _order(self, record: LogRecord, name: bytes, offset: int, features: UserFeatures | None) -> Iterator[Violation]:
        """A record replaces one of the same source offset if its values are not as of an earlier time."""
        newest = self._users[name]
        as_of_ms = features.metadata.as_of_ms if features else newest.as_of_ms
        if offset < newest.source_offset or (offset == newest.source_offset and as_of_ms < newest.as_of_ms):
            if is_explained(record.timestamp_ms, self._explained):
                self.counts["explained_stale_features"] += 1
                return
            detail = f"features as of {as_of_ms} after those of {newest.source_offset} as of {newest.as_of_ms}"
            yield Violation(Kind.STALE, name, record.partition, offset, detail)
        elif offset == newest.source_offset:
            self.counts["features_again"] += 1
        if offset >= newest.source_offset:
            forgotten_at = newest.forgotten_at if features else offset
            self._users[name] = _Published(offset, as_of_ms if features else -1, features, forgotten_at)

    def _forgotten(
        self, record: LogRecord, name: bytes, offset: int, features: UserFeatures | None
    ) -> Iterator[Violation]:
        """Features of a user who was forgotten follow the tombstone."""
        before = max((at for at in self._model.users[name].tombstones if at <= offset), default=-1)
        if features and self._users[name].forgotten_at < before:
            detail = f"features without the tombstone of {before} before them"
            yield Violation(Kind.RESURRECTED, name, record.partition, offset, detail)

    def behind(self) -> Iterator[Violation]:
        """Yield users whose last features lack their last change, and forgotten users that still have some."""
        for name, user in self._model.users.items():
            newest = self._users[name].source_offset if name in self._users else -1
            if newest < user.applied_offset:
                kind = Kind.UNPUBLISHED if user.rows else Kind.RESURRECTED
                detail = f"the last features have source offset {newest}"
                yield Violation(kind, name, user.partition, user.applied_offset, detail)

    def at_rest(self) -> Iterator[Violation]:
        """Compare the last features of each user, those of the sample, and what is stored, with the model."""
        behind = list(self.behind())
        yield from behind
        for one in self._sample:
            yield from self._recompute(one, is_last=False)
            self.counts["features_of_sample"] += 1
        late = {violation.user for violation in behind}
        names = sorted(name for name in self._fresh - late if self._model.users[name].rows)
        right = {}
        for name in names:
            user, published = self._model.users[name], self._users[name]
            if published.record is None:
                continue
            version = UserVersion(0, 0, 0, (), user.events, len(user.events))
            one = _Sampled(name, user.partition, published.source_offset, version, published.record)
            found = list(self._recompute(one, is_last=True))
            self.counts["features_recomputed"] += 1
            yield from found
            if not found:
                right[name] = published.record
        yield from self._stored_at_rest(right)

    def _recompute(self, one: _Sampled, *, is_last: bool) -> Iterator[Violation]:
        """Compare values with the model's, for a sample also just before they are said to change."""
        events, metadata = one.version.events[: one.version.events_count], one.record.metadata
        rules, of = self._rules, one.record
        problem = difference(rules, events, metadata.as_of_ms, of.values, metadata.estimated)
        if not problem and not is_last and metadata.valid_until_ms is not None:
            problem = is_steady(rules, events, metadata.as_of_ms, metadata.valid_until_ms, metadata.estimated)
        if problem:
            detail = f"{problem} (as of {metadata.as_of_ms}, {len(events)} events)"
            yield Violation(Kind.WRONG_FEATURES, one.name, one.partition, one.offset, detail)

    def _stored_at_rest(self, right: Mapping[bytes, UserFeatures]) -> Iterator[Violation]:
        """Every user with actions has a record that yields the values published last; nobody else has one."""
        for number, values in self._state.values.items():
            for key in [key for key in values if key[:1] == FEATURES_PREFIX]:
                user = self._model.users.get(key[1:])
                if user is None or not user.rows:
                    yield Violation(
                        Kind.LEFTOVER, key[1:], number, -1, "features are stored, and the user is forgotten"
                    )
        packed: dict[bytes, bytes] = {}
        for name, user in self._model.users.items():
            if not user.rows:
                continue
            stored, problem = self._stored(name, user.partition)
            if problem:
                yield Violation(Kind.WRONG_STATE, name, user.partition, user.applied_offset, problem)
            elif name in right:
                packed[name] = stored
        names = list(packed)
        for begin in range(0, len(names), ROWS):
            some = names[begin : begin + ROWS]
            yield from self._unpacked(some, [packed[name] for name in some], [right[name] for name in some])

    def _stored(self, name: bytes, partition: int) -> tuple[bytes, str]:
        """Return the packed features of a user, and what is wrong with their record."""
        values = self._state.values[partition]
        head, value = values.get(HEAD_PREFIX + name), values.get(features_key(name))
        if head is None:
            return b"", ""  # reported as lost
        if value is None:
            return b"", "no features are stored"
        try:
            header, _ = decode_head(name, head)
            stored = decode_stored(name, value)
        except CorruptValue as error:
            return b"", str(error)
        of, must = (stored.count, stored.revision), (int(header["count"][0]), int(header["revision"][0]))
        return stored.packed, "" if of == must else f"features of count and revision {of}, and the head has {must}"

    def _unpacked(
        self, names: Sequence[bytes], packed: Sequence[bytes], published: Sequence[UserFeatures]
    ) -> Iterator[Violation]:
        """Compare the values of stored features with those published last, as of the same time."""
        rows, state = np.arange(len(names)), self._feature_state
        where = [(name, self._model.users[name].partition, self._model.users[name].applied_offset) for name in names]
        try:
            state.unpack(rows, packed)
        except (DamagedFeatures, OtherFeatureSet) as error:
            yield Violation(Kind.WRONG_STATE, *where[0], f"among the features of {len(names)} users: {error}")
            return
        as_of_ms = np.array([each.metadata.as_of_ms for each in published])
        self.counts["features_unpacked"] += len(names)
        for place, value, record in zip(where, state.records(rows, as_of_ms).values, published, strict=True):
            if json.loads(value) != record.values:
                detail = f"stored features yield {value[:300]!r}, published was {record.values}"
                yield Violation(Kind.WRONG_STATE, *place, detail)

    @cached_property
    def _feature_state(self) -> FeatureState:
        config = self._config
        return FeatureState(config.feature_set, config.attributes, ROWS, config.functions)

    def move(self, partition: int, offset_max: int) -> None:
        """Lower the source offsets of a partition's records, whose log an operator has changed."""
        self._source_ids.pop(partition, None)
        for name, published in self._users.items():
            if name in self._model.users and self._model.users[name].partition == partition:
                published.source_offset = min(published.source_offset, offset_max)
                published.forgotten_at = min(published.forgotten_at, offset_max)

    def settle(self) -> None:
        """Drop every record but each user's last."""
        self._sample.clear()
        self._fresh.clear()
