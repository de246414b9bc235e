"""The feature state of one partition's hot users: events in, values out. Pure; times are parameters.

    state = FeatureState(feature_set, attributes, rows, functions)
    state.add(rows, actions, values)        # events that are applied, in order of arrival
    records = state.records(rows, as_of_ms)  # of any users, as of a time after their newest event

A *row* is the user's place in the hot table (`streams.core.sequences`). The result does not depend on the order of the
events, nor on their division into batches, except where a definition says that a value is an estimate.

Shapes: E events, U users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from encoder.actions.columns import Actions
from encoder.arrays import F64, I64
from streams.core.features.attributes import Attributes as Attributes
from streams.core.features.attributes import AttributesError as AttributesError
from streams.core.features.binding import FORMAT, Binding, KnownTexts
from streams.core.features.completeness import Completeness
from streams.core.features.definitions import Feature, FeatureSet
from streams.core.features.evolution import copy, copy_completeness, origins
from streams.core.features.kernel import Kernel
from streams.core.features.parts import Parts
from streams.core.features.reference import FeatureColumns as FeatureColumns
from streams.core.features.reference import Reference
from streams.core.features.selection import Selection
from streams.core.features.structures import Functions
from streams.errors import HaltsPartition, RebuildsPartition

REBUILT_TOGETHER = 256
"""Users whose features are computed from their kept actions at once."""


@dataclass(frozen=True, slots=True)
class FeatureRecords:
    """The values of U users as records carry them."""

    values: list[bytes]
    """[U] JSON objects: the values of `FeatureColumns` by name, in the order of the names."""
    valid_until_ms: I64
    """[U] as in `FeatureColumns`."""
    estimated: list[tuple[str, ...]]
    """[U] names of the features whose value is an estimate."""
    completeness: list[dict[str, float]]
    """[U] as in `FeatureColumns`."""


class DamagedFeatures(RebuildsPartition):
    """The stored feature state of a user cannot be read."""


class OtherFeatureSet(HaltsPartition):
    """The stored feature state of a user belongs to another feature set, whose hash is `version`."""

    retriable = False

    def __init__(self, version: str, wanted: str) -> None:
        self.version = version
        super().__init__(
            "stored features are of another feature set",
            f"{version}, not {wanted}",
            "restore its definitions, or let a worker take over what both have in common",
        )


class FeatureState:
    """The state of all features for the users of a hot table."""

    def __init__(
        self,
        feature_set: FeatureSet,
        attributes: Attributes,
        rows: int,
        functions: Functions,
        texts: KnownTexts | None = None,
    ) -> None:
        """Make room for `rows` users; `functions` are those of the compiled kernel.

        `texts` are those of the attributes, given where another state of the same attributes has them.
        """
        self.feature_set, self._attributes, self._functions = feature_set, attributes, functions
        self._texts = texts or KnownTexts(attributes)
        self._parts = Parts(feature_set, rows)
        self._complete = Completeness(feature_set, self._parts, rows)
        self._binding = Binding(feature_set, self._parts, self._complete, self._texts)
        selection = Selection(self._binding.filters, self._binding.groups, attributes, self._texts.items)
        self._kernel = Kernel(functions, self._binding, selection)
        self._reference = Reference(feature_set, self._parts, attributes, self._complete)
        self._rebuilders: dict[tuple[str, ...], FeatureState] = {}

    @staticmethod
    def row_bytes(feature_set: FeatureSet) -> int:
        """Return the memory of one user in the hot table, in bytes; a row that was never used takes none."""
        return Parts(feature_set, 1).row_bytes + 8 * len(feature_set.features) + 1

    def add(self, rows: I64, actions: Actions, values: F64 | None = None) -> None:
        """Add events [E] of users in `rows` [E], in order of arrival.

        `values` [E] is NaN where an event has no value; None if no event has one.
        """
        if len(rows):
            self._kernel.add(rows, actions, values)

    def values(self, rows: I64, as_of_ms: I64) -> FeatureColumns:
        """Return the values of users in `rows` [U]; `as_of_ms` [U] must be later than each user's newest event.

        This is the slow reference of `records`.
        """
        return self._reference.columns(rows, as_of_ms)

    def records(self, rows: I64, as_of_ms: I64) -> FeatureRecords:
        """Return what `values` does as one JSON object per user, compiled."""
        values, until_ms, estimated = self._kernel.values(rows, as_of_ms)
        shares: list[dict[str, float]] = [{}] * len(rows)
        partial = np.flatnonzero(self._complete.partial(rows))
        if len(partial):
            named = self._complete.named(self._kernel.shares(rows[partial], as_of_ms[partial]))
            for user, each in zip(partial.tolist(), named, strict=True):
                shares[user] = each
        return FeatureRecords(values, until_ms, estimated, shares)

    def complete_from_ms(self, rows: I64) -> I64:
        """Return from which event time on users [U] have every event, per feature [U, F]; 0 for "always"."""
        found: I64 = self._complete.from_ms[rows]
        return found

    def set_complete_from(self, rows: I64, names: Sequence[str], times_ms: I64) -> None:
        """Set from which event time [U] on users have every event in these features, 0 for "always"."""
        self._complete.set(rows, names, times_ms)

    def pack(self, rows: I64) -> list[bytes]:
        """Return the state of users [U] as bytes that `unpack` reads."""
        return self._kernel.pack(rows)

    def unpack(self, rows: I64, packed: Sequence[bytes]) -> None:
        """Replace the state of users [U] by what `pack` returned.

        Raises `DamagedFeatures` if it is not that, and `OtherFeatureSet` if another feature set has packed it; in both
        cases the rows are empty afterwards.
        """
        self.clear(rows)
        if not all(each.startswith(self._binding.header) for each in packed):
            raise self._other(packed)
        damaged = self._kernel.unpack(rows, packed)
        if damaged >= 0:
            self.clear(rows)
            raise _damaged(packed, damaged, f"{len(packed[damaged])} bytes")

    def take_over(self, rows: I64, old: FeatureState, old_rows: I64) -> list[str]:
        """Copy what users [U] keep of a state with other definitions; return the features that are left to `rebuild`.

        `rows` must be cleared. See `streams.core.features.evolution` for what is kept.
        """
        found = origins(self.feature_set, old.feature_set)
        pairs = [(each, found[each.name][0]) for each in self.feature_set.features if each.name in found]
        copy(self._parts, rows, old._parts, old_rows, pairs)
        copy_completeness(self._complete, rows, old._complete, old_rows, found)
        return [each.name for each in self.feature_set.features if each.name not in found]

    def rebuild(self, rows: I64, names: Sequence[str], actions: Actions, starts: I64, complete_from_ms: I64) -> None:
        """Compute the features that `take_over` returned from the kept actions of users [U], and no other feature.

        User u owns the actions from `starts[u]` to `starts[u + 1]`, oldest first, and they are complete from
        `complete_from_ms[u]`. Kept actions have no `value`, so features of one begin after the newest of them.
        """
        wanted = [each for each in self.feature_set.features if each.name in set(names)]
        if not wanted or not len(rows):
            return
        state = self._rebuilder(wanted)
        pairs = [(each, each) for each in wanted]
        for low in range(0, len(rows), REBUILT_TOGETHER):
            users = np.arange(low, min(low + REBUILT_TOGETHER, len(rows)))
            chosen = actions[starts[users[0]] : starts[users[-1] + 1]]
            state.clear(users - low)
            state.add(np.repeat(users - low, np.diff(starts)[users]), chosen)
            copy(self._parts, rows[users], state._parts, users - low, pairs)
        self._complete.set(rows, [each.name for each in wanted], complete_from_ms)
        is_empty = starts[1:] == starts[:-1]
        newest_ms = np.zeros(len(rows), np.int64)
        newest_ms[~is_empty] = actions["timestamp_ms"][starts[1:][~is_empty] - 1]
        from_ms = np.where(is_empty, complete_from_ms, np.maximum(complete_from_ms, newest_ms + 1))
        self._complete.set(rows, [each.name for each in wanted if each.of == "value"], from_ms)

    def clear(self, rows: I64) -> None:
        """Forget everything of the users in these rows."""
        self._kernel.clear(rows)

    def _rebuilder(self, features: Sequence[Feature]) -> FeatureState:
        """Return an empty state of only these features."""
        names = tuple(each.name for each in features)
        if names not in self._rebuilders:
            chosen = FeatureSet(tuple(features), self.feature_set.attributes)
            self._rebuilders = {
                names: FeatureState(chosen, self._attributes, REBUILT_TOGETHER, self._functions, self._texts)
            }
        return self._rebuilders[names]

    def _other(self, packed: Sequence[bytes]) -> DamagedFeatures | OtherFeatureSet:
        """Return what is wrong with the header of the first user that has another one."""
        header = self._binding.header
        user, found = next((user, each) for user, each in enumerate(packed) if not each.startswith(header))
        if len(found) < len(header):
            return _damaged(packed, user, f"{len(found)} bytes")
        if found[0] != FORMAT:
            return _damaged(packed, user, f"format {found[0]} is unknown, this release reads {FORMAT}")
        return OtherFeatureSet(found[1 : len(header)].hex(), self.feature_set.version)


def _damaged(packed: Sequence[bytes], user: int, detail: str) -> DamagedFeatures:
    return DamagedFeatures(
        "stored features cannot be read",
        f"user {user} of {len(packed)}: {detail}",
        "rebuild the partition from the changelog",
    )
