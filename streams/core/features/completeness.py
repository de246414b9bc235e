"""Completeness: which share of its window a feature of a user has really seen.

Each user has a time per feature from which on every event of the user is contained, 0 if all are. It is later than 0
where a feature was defined after the user had acted, and only a part of the earlier events could be counted.

    begin          complete from            as of
    |--- not all ------|------- all -----------|      share = (as of - complete from) / (as of - begin), at most 1

`begin` is the earliest time whose events the value depends on:

| kind | begin |
| --- | --- |
| with a window | the begin of the window |
| `decayed_affinity` | ten half-lives earlier: an event before that counts less than 0.001 |
| `session_length`, `session_depth` | one gap before the open session begins; one gap before `as of` without one |

Two kinds have no window. `last_k` has the share of its k places whose events are certain, because they are not older
than `complete from`. `seconds_since` is complete if its event is not older than that, and has the share 0 if it is.

A share is rounded down to four digits, so what is not complete is never shown as 1.

Shapes: U users, R rows of the hot table, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from encoder.arrays import I64, Bool
from streams.core.features.definitions import Feature, FeatureSet
from streams.core.features.parts import Part, Parts
from streams.core.features.recent import LastK, SecondsSince, Sessions

WHOLE = 10_000
"""Share of a feature that has seen its whole window."""
HALF_LIVES = 10
LATEST_MS = 2**50
"""Latest time that is kept, far beyond every clock."""


class Completeness:
    """The times from which on the features of each user are complete."""

    def __init__(self, feature_set: FeatureSet, parts: Parts, rows: int) -> None:
        self._features, self.parts = feature_set.features, parts
        self._column = {each.name: at for at, each in enumerate(self._features)}
        self.from_ms = np.zeros((rows, len(self._features)), np.int64)
        """[R, F] in the order of the features; 0 for "always"."""
        self.is_partial = np.zeros(rows, np.bool_)
        """Whether any time of the user is not 0."""

    def feature(self, name: str) -> Feature:
        """Return a feature by its name."""
        return self._features[self._column[name]]

    def of(self, name: str, rows: I64) -> I64:
        """Return the times of one feature [U]."""
        found: I64 = self.from_ms[rows, self._column[name]]
        return found

    def set(self, rows: I64, names: Sequence[str], times_ms: I64) -> None:
        """Set the times of these features for users [U]; `times_ms` is [U], or [U, names]."""
        columns = np.array([[self._column[name] for name in names]], np.int64)
        times_ms = times_ms if times_ms.ndim == 2 else times_ms[:, None]
        self.from_ms[rows[:, None], columns] = np.clip(times_ms, 0, LATEST_MS)
        self.is_partial[rows] = self.from_ms[rows].any(axis=1)

    def shares(self, rows: I64, as_of_ms: I64) -> list[dict[str, float]]:
        """Return the shares below 1 of users [U] by feature; the slow reference of `write_shares` in the kernel."""
        return [
            {
                feature.name: share / WHOLE
                for feature, from_ms in zip(self._features, self.from_ms[row].tolist(), strict=True)
                if (share := _share(feature, self.parts.of(feature), row, at_ms, from_ms)) < WHOLE
            }
            for row, at_ms in zip(rows.tolist(), as_of_ms.tolist(), strict=True)
        ]

    def named(self, shares: I64) -> list[dict[str, float]]:
        """Return shares [U, F], in parts of `WHOLE`, by feature, without those that are complete."""
        names = [each.name for each in self._features]
        return [
            {name: share / WHOLE for name, share in zip(names, row, strict=True) if share < WHOLE}
            for row in shares.tolist()
        ]

    def partial(self, rows: I64) -> Bool:
        """Return which users [U] may have a feature that is not complete."""
        found: Bool = self.is_partial[rows]
        return found


def _share(feature: Feature, part: Part, row: int, as_of_ms: int, from_ms: int) -> int:
    if from_ms == 0:
        return WHOLE
    match part:
        case LastK():
            certain = (part.items[row] != 0) & (part.times_ms[row] >= from_ms)
            return int(certain.sum()) * WHOLE // feature.k
        case SecondsSince():
            return WHOLE if part.last_ms[row] - 1 >= from_ms else 0
        case Sessions():
            first_ms, last_ms, depth = part.kept[row, 0].tolist()
            is_open = depth > 0 and as_of_ms - last_ms <= part.gap_ms
            begin_ms = (first_ms if is_open else as_of_ms) - part.gap_ms
        case _:
            half_lives_ms = HALF_LIVES * feature.half_life_ms
            begin_ms = feature.begin_ms(as_of_ms) if feature.window_ms else as_of_ms - half_lives_ms
    if from_ms <= begin_ms:
        return WHOLE
    return max(as_of_ms - from_ms, 0) * WHOLE // (as_of_ms - begin_ms)
