"""The features of one partition's hot users, beside their sequences: the same events, the same checkpoints.

`PartitionState` owns one, and calls it with the rows of the hot table. What is stored of a user belongs to the sequence
that is stored with it: `count` and `revision` of both must be equal, or else the features were written before a time in
which nobody computed them, and are computed again from the kept sequence.

Values change when time passes without events. `refresh_ms` is the processing time at which a user's record is published
again because of that; a policy decides whether there is one.

Shapes: N events of a batch, U users, R rows of the hot table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from encoder.actions.columns import ActionBatch
from encoder.arrays import I64, Bool
from streams.core.columns import Columns, rows_where, spans, starts_of
from streams.core.features.attributes import Attributes
from streams.core.features.definitions import FeatureSet
from streams.core.features.state import DamagedFeatures, FeatureRecords, FeatureState
from streams.core.features.structures import Functions
from streams.core.features.tiles import NEVER_MS
from streams.core.layout import NEVER, StoredFeatures, StoredSequences
from streams.core.merge import Outcome
from streams.core.sequences import Applied

_LATE, _TOMBSTONE, _TOO_OLD = int(Outcome.LATE), int(Outcome.TOMBSTONE), int(Outcome.TOO_OLD)
"""Plain ints: an enum lookup costs as much as one step of a small batch."""
REBUILT_TOGETHER = 256
"""Users whose features are computed again at a time."""
REFRESH_RETRY_MS = 5_000
"""Time after which a refresh that was handed over and not acknowledged is handed over again."""


@dataclass(frozen=True, slots=True)
class RefreshPolicy:
    """Which users are published again when a value of theirs changes without an event, and how often."""

    enabled: bool = False
    every_min_ms: int = 60_000
    """Least time between two refreshes of a user."""
    active_ms: int = 0
    """Only users whose newest action is at most so old; 0 means all."""

    def next_ms(self, valid_until_ms: I64, newest_event_ms: I64, now_ms: int) -> I64:
        """Return when to publish users again [U] that are published at `now_ms`; NEVER for none."""
        if not self.enabled:
            return np.full(len(valid_until_ms), NEVER)
        at_ms = np.maximum(valid_until_ms, now_ms + self.every_min_ms)
        is_never = valid_until_ms >= NEVER_MS
        if self.active_ms:
            is_never |= at_ms > newest_event_ms + self.active_ms
        return np.where(is_never, NEVER, at_ms)


@dataclass(frozen=True, slots=True)
class FeatureConfig:
    """What a worker computes; the same for all of its partitions."""

    feature_set: FeatureSet
    attributes: Attributes
    functions: Functions
    refresh: RefreshPolicy = RefreshPolicy()

    def row_bytes(self) -> int:
        """Return the bytes that the features of a user take in memory."""
        return FeatureState.row_bytes(self.feature_set)


@dataclass(frozen=True, slots=True)
class FeatureJob:
    """The features of users as of one moment, to be published; row i of each column belongs to user i."""

    users: Sequence[bytes]
    records: FeatureRecords
    offsets: I64
    """[U], source offset of the newest event inside."""
    newest_event_ms: I64
    """[U], event time of the newest action."""
    as_of_ms: I64

    def __len__(self) -> int:
        return len(self.users)


class PartitionFeatures:
    """Feature state of the rows of a hot table, what of it is not stored yet, and when users are refreshed."""

    def __init__(self, config: FeatureConfig, rows: int) -> None:
        self.config = config
        self._state = FeatureState(config.feature_set, config.attributes, rows, config.functions)
        self.refresh_ms: I64 = np.full(rows, NEVER)
        """Processing time at which each user is published again without an event."""
        self._changed = np.zeros(rows, np.bool_)
        """Whether the state of a row differs from what is stored."""
        self._former: dict[str, FeatureState | None] = {}
        """Room for users whose features another feature set has stored, by its version; None if it is lost."""
        self.damaged = 0
        """Users whose stored features could not be read, although their checksum was right."""
        self.rebuilt = 0
        """Users whose features were computed again from their kept actions, at least in part."""
        self._had_refresh = np.zeros(rows, np.bool_)
        """Whether what is stored of a row has a refresh, so that the index may have an entry that must be deleted."""

    @property
    def version(self) -> str:
        """Version of the feature set."""
        return self.config.feature_set.version

    # -- users come and go

    def load(self, rows: I64, stored: StoredSequences, features: Sequence[StoredFeatures | None]) -> None:
        """Take the features of users in `rows` [U], of whom `stored` holds the sequences and `features` the rest.

        Features whose bytes cannot be read are computed again from the kept sequence, and counted in `damaged`.
        """
        self._state.clear(rows)
        self.refresh_ms[rows], self._changed[rows], self._had_refresh[rows] = NEVER, False, False
        headers = stored.headers
        same: list[int] = []
        others: dict[str, list[int]] = {}
        """Users whose features are computed again at least in part, by the feature set that stored them."""
        for index, (found, count, revision) in enumerate(
            zip(features, headers["count"].tolist(), headers["revision"].tolist(), strict=True)
        ):
            if found is not None and found.refresh_ms != NEVER:
                self._had_refresh[rows[index]] = True
            if found is None or (found.count, found.revision) != (count, revision):
                others.setdefault("", []).append(index)
            elif found.version != self.version:
                others.setdefault(found.version, []).append(index)
            else:
                same.append(index)
                self.refresh_ms[rows[index]] = found.refresh_ms
        others.setdefault("", []).extend(self._unpack(self._state, rows, same, features))
        for version, indices in others.items():
            acting = [index for index in indices if headers["count"][index]]
            for low in range(0, len(acting), REBUILT_TOGETHER):
                self._rebuild(rows, acting[low : low + REBUILT_TOGETHER], stored, features, version)

    def take_counts(self) -> tuple[int, int]:
        """Return how many users were rebuilt, and how many were damaged, since the last call."""
        counts = self.rebuilt, self.damaged
        self.rebuilt = self.damaged = 0
        return counts

    def unknown_versions(self, features: Sequence[StoredFeatures | None]) -> set[str]:
        """Return the feature sets that have stored `features` and whose definitions are not known: see `learn`."""
        return {found.version for found in features if found is not None} - {self.version} - self._former.keys()

    def learn(self, version: str, feature_set: FeatureSet | None) -> None:
        """Take note of a feature set of before; None if its definitions are lost."""
        attributes, functions = self.config.attributes, self.config.functions
        state = FeatureState(feature_set, attributes, REBUILT_TOGETHER, functions) if feature_set else None
        self._former[version] = state

    def _unpack(
        self, state: FeatureState, rows: I64, users: list[int], features: Sequence[StoredFeatures | None]
    ) -> list[int]:
        """Unpack the features of `users`, user u into rows[u]; return those whose bytes cannot be read."""
        if not users:
            return []
        try:
            state.unpack(rows[users], [found.packed for user in users if (found := features[user]) is not None])
        except DamagedFeatures:
            if len(users) == 1:
                self.damaged += 1
                return users
            half = len(users) // 2
            parts = users[:half], users[half:]
            return [user for part in parts for user in self._unpack(state, rows, part, features)]
        return []

    def _rebuild(
        self,
        rows: I64,
        users: list[int],
        stored: StoredSequences,
        features: Sequence[StoredFeatures | None],
        version: str,
    ) -> None:
        """Take features of loaded users over from a former feature set, and compute the others from the kept actions.

        What neither has is not complete.
        """
        former, names = self._former.get(version), [each.name for each in self.config.feature_set.features]
        if former is not None:
            places = np.zeros(len(rows), np.int64)
            places[users] = np.arange(len(users))
            if not self._unpack(former, places, users, features):  # otherwise all of it is computed again
                names = self._state.take_over(rows[users], former, places[users])
        lengths = np.diff(stored.starts)[users]
        _, kept = spans(stored.starts[:-1][users], lengths)
        actions, starts = stored.actions[kept], starts_of(lengths)
        is_cut = stored.headers["count"][users] > lengths
        complete_from_ms = np.where(is_cut, actions["timestamp_ms"][starts[:-1]], 0)
        self._state.rebuild(rows[users], names, actions, starts, complete_from_ms)
        self._changed[rows[users]] = True
        self.rebuilt += len(users)

    def drop(self, rows: I64) -> None:
        """Free the rows of users that leave memory."""
        self.refresh_ms[rows] = NEVER

    def clear(self, rows: I64) -> None:
        """Forget everything of the users in these rows."""
        self._state.clear(rows)
        self.refresh_ms[rows], self._changed[rows] = NEVER, True

    # -- events

    def apply(self, batch: ActionBatch, applied: Applied) -> None:
        """Add the events that were applied, and those that only the sequence is too short for.

        Of a user who is forgotten within the batch, or who begins a new sequence because of the TTL, only the events
        after that count.
        """
        is_added = (applied.outcomes <= _LATE) | (applied.outcomes == _TOO_OLD)  # [N]
        forgotten = rows_where(applied.outcomes == _TOMBSTONE)
        if len(forgotten) or applied.expired:
            is_added &= self._reset(batch, applied, forgotten)
        rows, actions, values = applied.rows, batch.actions, batch.values
        if not is_added.all():
            events = rows_where(is_added)
            rows, actions, values = rows[events], actions[events], None if values is None else values[events]
        self._state.add(rows, actions, values)
        self._changed[rows] = True

    def _reset(self, batch: ActionBatch, applied: Applied, forgotten: I64) -> Bool:
        """Clear users who are forgotten within the batch; return which events are not before that [N]."""
        last_before = np.full(len(self.refresh_ms), -1)  # [R], index of the last event that no longer counts
        last_before[applied.rows[forgotten]] = forgotten  # of several the last, since they ascend
        for row, offset in applied.expired:
            before = int(np.searchsorted(batch.offsets, offset, "right")) - 1
            last_before[row] = max(last_before[row], before)
        self.clear(
            np.unique(np.concatenate((applied.rows[forgotten], [row for row, _ in applied.expired])).astype(int))
        )
        is_after: Bool = np.arange(len(applied.rows)) > last_before[applied.rows]
        return is_after

    # -- publishing

    def job(self, users: Sequence[bytes], rows: I64, headers: Columns, newest_ms: I64, now_ms: int) -> FeatureJob:
        """Return the features of users as of now, and decide when they are published again without an event.

        The clock of a producer may be ahead: values are then as of a moment after the newest event.
        """
        as_of_ms = np.maximum(newest_ms + 1, now_ms)
        records = self._state.records(rows, as_of_ms)
        return FeatureJob(users, records, headers["applied_offset"].astype(np.int64), newest_ms, as_of_ms)

    def plan(self, rows: I64, valid_until_ms: I64, newest_ms: I64, now_ms: int) -> I64:
        """Set when users that are published now are published again; return the rows of which that changed."""
        next_ms = self.config.refresh.next_ms(valid_until_ms, newest_ms, now_ms)
        changed: I64 = rows[self.refresh_ms[rows] != next_ms]
        self.refresh_ms[rows] = next_ms
        self._changed[changed] = True
        return changed

    def plan_found(self, rows: I64) -> None:
        """Publish users again soon of whom something was published that the stored state knows nothing of.

        When those values change is not known any more, because the worker ended before it was stored.
        """
        if self.config.refresh.enabled:
            self.refresh_ms[rows], self._changed[rows] = 0, True

    def due(self, rows: I64, now_ms: int) -> I64:
        """Return those of `rows` that are to be refreshed now, and put them off in case that is not acknowledged."""
        found: I64 = rows[self.refresh_ms[rows] <= now_ms]
        self.refresh_ms[found] = now_ms + REFRESH_RETRY_MS
        return found

    # -- checkpoints

    def pack(self, rows: I64, headers: Columns) -> list[StoredFeatures | None]:
        """Return what is to be stored of users in `rows` [U], None where it is stored already."""
        changed = rows_where(self._changed[rows] & (headers["count"] > 0))
        packed = self._state.pack(rows[changed])
        found: list[StoredFeatures | None] = [None] * len(rows)
        counts, revisions = (headers[name][changed].tolist() for name in ("count", "revision"))
        refresh_ms, had_refresh = self.refresh_ms[rows[changed]].tolist(), self._had_refresh[rows[changed]].tolist()
        columns = zip(counts, revisions, refresh_ms, had_refresh, packed, strict=True)
        for index, column in zip(changed.tolist(), columns, strict=True):
            found[index] = StoredFeatures(*column)
        self._changed[rows] = False
        self._had_refresh[rows] = self.refresh_ms[rows] != NEVER
        return found

    def unpacked(self, rows: I64) -> None:
        """Take back what `pack` returned, because it may not be durable."""
        self._changed[rows], self._had_refresh[rows] = True, True
