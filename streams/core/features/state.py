"""The feature state of one partition's hot users: events in, values out. Pure; times are parameters.

    state = FeatureState(feature_set, attributes, rows)
    state.add(rows, actions, values)        # events that are applied, in order of arrival
    columns = state.values(rows, as_of_ms)  # of any users, as of a time after their newest event

A *row* is the user's place in the hot table (`streams.core.sequences`). The result does not depend on the order of the
events, nor on their division into batches, except where a definition says that a value is an estimate.

Shapes: E events, U users.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from encoder.actions.columns import Actions, name_code
from encoder.arrays import F64, I64, Bool
from streams.core.features.attributes import Attributes as Attributes
from streams.core.features.attributes import AttributesError as AttributesError
from streams.core.features.definitions import Feature, FeatureSet, Filter, Kind
from streams.core.features.distinct import FREE, Distinct, hashed
from streams.core.features.kernel import Events, Kernel
from streams.core.features.rankings import Affinity, TopK
from streams.core.features.recent import LastK, SecondsSince, Sessions
from streams.core.features.structures import Functions
from streams.core.features.tiles import KINDS, NEVER_MS, Ring
from streams.errors import RebuildsPartition

Single = Distinct | TopK | Affinity | LastK | SecondsSince
SINGLE: Mapping[Kind, Callable[[Feature, int], Single]] = {
    Kind.DISTINCT: Distinct,
    Kind.TOP_K: TopK,
    Kind.DECAYED_AFFINITY: Affinity,
    Kind.LAST_K: LastK,
    Kind.SECONDS_SINCE: SecondsSince,
}
"""Kinds with a part for each feature."""


@dataclass(frozen=True, slots=True)
class FeatureColumns:
    """The values of U users as of their times."""

    values: dict[str, list[Any]]
    """[U] per feature: a number, None, a list of ids, or a list of [name, number], as JSON has them."""
    valid_until_ms: I64
    """[U] when a value changes without an event; `NEVER_MS` if none does. Values that always age are left out."""
    estimated: dict[str, Bool]
    """[U] per feature that may be an estimate: whether it is one."""


@dataclass(frozen=True, slots=True)
class FeatureRecords:
    """The values of U users as records carry them."""

    values: list[bytes]
    """[U] JSON objects: the values of `FeatureColumns` by name, in the order of the names."""
    valid_until_ms: I64
    """[U] as in `FeatureColumns`."""
    estimated: list[tuple[str, ...]]
    """[U] names of the features whose value is an estimate."""


class DamagedFeatures(RebuildsPartition):
    """The stored feature state of a user cannot be read."""


class FeatureState:
    """The state of all features for the users of a hot table."""

    def __init__(self, feature_set: FeatureSet, attributes: Attributes, rows: int, functions: Functions) -> None:
        """Make room for `rows` users; `functions` are those of the compiled kernel."""
        self.feature_set, self._attributes = feature_set, attributes
        features = feature_set.features
        self._filters = list(dict.fromkeys(each.filter for each in features))
        self._codes = {
            each: (_table(each.actions), _table(each.surfaces), self._wanted(each)) for each in self._filters
        }
        self._groups = sorted({each.group for each in features if each.group})
        tiled = [each for each in features if each.kind in KINDS]
        self._rings = [
            Ring(hop_ms, [each for each in tiled if each.hop_ms == hop_ms], rows)
            for hop_ms in sorted({each.hop_ms for each in tiled})
        ]
        self._single = {each: SINGLE[each.kind](each, rows) for each in features if each.kind in SINGLE}
        self._sessions = {
            (chosen, gap_ms): Sessions(gap_ms, rows)
            for chosen, gap_ms in dict.fromkeys((each.filter, each.gap_ms) for each in features if each.gap_ms)
        }
        parts: list[tuple[Filter, Any]] = [
            *((Filter(), ring) for ring in self._rings),
            *((feature.filter, part) for feature, part in self._single.items()),
            *((chosen, part) for (chosen, _), part in self._sessions.items()),
        ]
        self._kernel = Kernel(functions, self._filters, attributes)
        self._kernel.bind(parts, [(each, self._part_of(each)) for each in features], self._groups)

    def add(self, rows: I64, actions: Actions, values: F64) -> None:
        """Add events [E] of users in `rows` [E], in order of arrival; `values` [E] is NaN where an event has none."""
        if not len(rows):
            return
        items, surfaces = actions["item"].astype(np.int64), actions["surface"].astype(np.int64)
        places = self._attributes.places(items)
        durations = actions["duration_ms"].astype(np.float64)
        groups = [_codes(self._attributes.codes[each], places) for each in self._groups]
        self._kernel.add(
            Events(
                rows=rows,
                times_ms=np.ascontiguousarray(actions["timestamp_ms"]),
                passes=np.array([self._passes(each, actions, places) for each in self._filters], np.bool_),
                numbers=np.array([np.where(durations > 0, durations, np.nan), values]),
                items=items,
                ids=np.array([hashed(items), hashed(surfaces)]),
                groups=np.array(groups, np.int64),
            )
        )

    def pack(self, rows: I64) -> list[bytes]:
        """Return the state of users [U] as bytes that `unpack` reads."""
        return self._kernel.pack(rows)

    def unpack(self, rows: I64, packed: Sequence[bytes]) -> None:
        """Replace the state of users [U] by what `pack` returned; raise `DamagedFeatures` if it is not that."""
        self.clear(rows)
        damaged = self._kernel.unpack(rows, packed)
        if damaged >= 0:
            raise DamagedFeatures(
                "stored features cannot be read",
                f"{len(packed[damaged])} bytes of user {damaged} of {len(packed)}",
                "rebuild the partition from the changelog",
            )

    def clear(self, rows: I64) -> None:
        """Forget everything of the users in these rows."""
        for part in (*self._rings, *self._single.values(), *self._sessions.values()):
            part.clear(rows)

    def values(self, rows: I64, as_of_ms: I64) -> FeatureColumns:
        """Return the values of users in `rows` [U]; `as_of_ms` [U] must be later than each user's newest event."""
        values: dict[str, list[Any]] = {}
        estimated: dict[str, Bool] = {}
        until_ms = np.full(len(rows), NEVER_MS)
        for ring in self._rings:
            columns, gone_ms = ring.values(rows, as_of_ms)
            until_ms = np.minimum(until_ms, gone_ms)
            for feature in ring.features:
                counts = feature.kind is Kind.COUNT
                column = columns[feature.name]
                values[feature.name] = column.astype(np.int64).tolist() if counts else _none_for_nan(column)
        for feature, part in self._single.items():
            match part:
                case Distinct():
                    counted, exact, gone_ms = part.values(rows, as_of_ms)
                    values[feature.name], estimated[feature.name] = counted.tolist(), ~exact
                    until_ms = np.minimum(until_ms, gone_ms)
                case TopK():
                    codes, totals, gone_ms = part.values(rows, as_of_ms)
                    values[feature.name] = self._ranked(feature.group, codes, totals.astype(np.int64))
                    estimated[feature.name] = part.dropped[rows]
                    until_ms = np.minimum(until_ms, gone_ms)
                case Affinity():
                    codes, sums = part.values(rows, as_of_ms)
                    values[feature.name] = self._ranked(feature.group, codes, sums)
                    estimated[feature.name] = part.dropped[rows]
                case LastK():
                    values[feature.name] = self._ids(part.values(rows))
                case SecondsSince():
                    values[feature.name] = _none_for_nan(part.values(rows, as_of_ms))
        for feature in self.feature_set.features:
            if feature.gap_ms:
                seconds, depths, gone_ms = self._sessions[feature.filter, feature.gap_ms].values(rows, as_of_ms)
                is_length = feature.kind is Kind.SESSION_LENGTH
                values[feature.name] = seconds.tolist() if is_length else depths.tolist()
                until_ms = np.minimum(until_ms, gone_ms)
        return FeatureColumns({each.name: values[each.name] for each in self.feature_set.features}, until_ms, estimated)

    def records(self, rows: I64, as_of_ms: I64) -> FeatureRecords:
        """Return what `values` does as one JSON object per user, compiled."""
        values, until_ms, estimated = self._kernel.values(rows, as_of_ms)
        return FeatureRecords(values, until_ms, estimated)

    def _part_of(self, feature: Feature) -> Any:
        """Return the part that holds the state of a feature."""
        if feature.gap_ms:
            return self._sessions[feature.filter, feature.gap_ms]
        if feature.kind in SINGLE:
            return self._single[feature]
        return next(ring for ring in self._rings if ring.hop_ms == feature.hop_ms)

    def _wanted(self, chosen: Filter) -> list[tuple[str, Bool]]:
        """Return, per attribute of the filter, whether each of its codes counts."""
        names = self._attributes.names
        return [(each, np.isin(np.array(names.get(each, ()), object), values)) for each, values in chosen.where]

    def _passes(self, chosen: Filter, actions: Actions, places: I64) -> Bool:
        """Return which events pass the filter [E]."""
        by_action, by_surface, wanted = self._codes[chosen]
        passes = np.ones(len(actions), np.bool_)
        if by_action is not None:
            passes &= by_action[actions["action"]]
        if by_surface is not None:
            passes &= by_surface[actions["surface"]]
        for attribute, counts in wanted:
            codes = _codes(self._attributes.codes[attribute], places)
            passes &= (codes >= 0) & counts[np.maximum(codes, 0)] if len(counts) else False
        return passes

    def _ranked(self, group: str, codes: I64, totals: Any) -> list[Any]:
        """Return per user a list of [name, number]."""
        names = self._attributes.names[group]
        by_user: list[list[int]] = codes.tolist()
        by_lane: list[list[float]] = totals.tolist()
        return [
            [[names[code], number] for code, number in zip(row, numbers, strict=True) if code != FREE]
            for row, numbers in zip(by_user, by_lane, strict=True)
        ]

    def _ids(self, items: I64) -> list[Any]:
        """Return per user a list of item ids; an item without a known id is shown by its key, in hexadecimal."""
        ids = self._attributes.ids
        known: list[int] = self._attributes.places(items.reshape(-1)).tolist()
        keys: list[int] = items.reshape(-1).tolist()
        shown = [ids[at] if at >= 0 else f"{key % 2**64:016x}" for key, at in zip(keys, known, strict=True)]
        counts: list[int] = (items != 0).sum(axis=1).tolist()  # an absent item comes after all others
        return [shown[items.shape[1] * user : items.shape[1] * user + count] for user, count in enumerate(counts)]


def _table(names: tuple[str, ...]) -> Bool | None:
    """Return whether each code counts [65536], None if all do."""
    if not names:
        return None
    table = np.zeros(65_536, np.bool_)
    table[[name_code(name) for name in names]] = True
    return table


def _codes(codes: I64, places: I64) -> I64:
    """Return the code of the item at each place, -1 where the item is not known."""
    return np.where(places >= 0, codes[np.maximum(places, 0)], -1) if len(codes) else np.full(len(places), -1)


def _none_for_nan(column: F64) -> list[float | None]:
    return [each if math.isfinite(each) else None for each in column.tolist()]
