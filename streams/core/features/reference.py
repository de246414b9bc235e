"""The values of features in plain numpy: the slow reference of the compiled kernel, `values.h`.

Shapes: U users.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from encoder.arrays import F64, I64, Bool
from streams.core.features.attributes import Attributes
from streams.core.features.completeness import Completeness
from streams.core.features.definitions import FeatureSet, Kind
from streams.core.features.distinct import Distinct
from streams.core.features.parts import Parts
from streams.core.features.rankings import Affinity, TopK
from streams.core.features.recent import LastK, SecondsSince
from streams.core.features.tiles import NEVER_MS


@dataclass(frozen=True, slots=True)
class FeatureColumns:
    """The values of U users as of their times."""

    values: dict[str, list[Any]]
    """[U] per feature: a number, None, a list of ids, or a list of [name, number], as JSON has them."""
    valid_until_ms: I64
    """[U] when a value changes without an event; `NEVER_MS` if none does. Values that always age are left out."""
    estimated: dict[str, Bool]
    """[U] per feature that may be an estimate: whether it is one."""
    completeness: list[dict[str, float]]
    """[U] share that a feature has seen of its window, where it is below 1 (`streams.core.features.completeness`)."""


class Reference:
    """Reads the values out of the parts."""

    def __init__(self, feature_set: FeatureSet, parts: Parts, attributes: Attributes, complete: Completeness) -> None:
        self._features, self._parts, self._attributes = feature_set.features, parts, attributes
        self._complete = complete

    def columns(self, rows: I64, as_of_ms: I64) -> FeatureColumns:
        """Return the values of users in `rows` [U] as of [U]."""
        values: dict[str, list[Any]] = {}
        estimated: dict[str, Bool] = {}
        until_ms = np.full(len(rows), NEVER_MS)
        for ring in self._parts.rings:
            columns, gone_ms = ring.values(rows, as_of_ms)
            until_ms = np.minimum(until_ms, gone_ms)
            for feature in ring.features:
                counts = feature.kind is Kind.COUNT
                column = columns[feature.name]
                values[feature.name] = column.astype(np.int64).tolist() if counts else _none_unless_finite(column)
        for feature, part in self._parts.single.items():
            match part:
                case Distinct():
                    counted, exact, gone_ms = part.values(rows, as_of_ms)
                    values[feature.name], estimated[feature.name] = counted.tolist(), ~exact
                    until_ms = np.minimum(until_ms, gone_ms)
                case TopK():
                    codes, totals, estimated[feature.name], gone_ms = part.values(rows, as_of_ms)
                    values[feature.name] = self._ranked(feature.group, codes, totals.astype(np.int64))
                    until_ms = np.minimum(until_ms, gone_ms)
                case Affinity():
                    codes, sums, estimated[feature.name] = part.values(rows, as_of_ms)
                    values[feature.name] = self._ranked(feature.group, codes, sums)
                case LastK():
                    values[feature.name] = self._ids(part.values(rows))
                case SecondsSince():
                    values[feature.name] = _none_unless_finite(part.values(rows, as_of_ms))
        for feature in self._features:
            if feature.gap_ms:
                seconds, depths, gone_ms = self._parts.sessions[feature.filter, feature.gap_ms].values(rows, as_of_ms)
                is_length = feature.kind is Kind.SESSION_LENGTH
                values[feature.name] = seconds.tolist() if is_length else depths.tolist()
                until_ms = np.minimum(until_ms, gone_ms)
        shares = self._complete.shares(rows, as_of_ms)
        return FeatureColumns({each.name: values[each.name] for each in self._features}, until_ms, estimated, shares)

    def _ranked(self, group: str, codes: I64, totals: Any) -> list[Any]:
        """Return per user a list of [name, number]."""
        names = self._attributes.names.get(group, ())
        by_user: list[list[int]] = codes.tolist()
        by_lane: list[list[float]] = totals.tolist()
        return [
            [[names[code], number] for code, number in zip(row, numbers, strict=True) if code >= 0]
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


def _none_unless_finite(column: F64) -> list[float | None]:
    return [each if math.isfinite(each) else None for each in column.tolist()]
