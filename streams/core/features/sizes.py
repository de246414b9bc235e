"""Bytes of a user's packed feature state: at most, and typically. Pure; the layout is in `pack.h` and `complete.h`.

Typical is a user who acts on one day of four, about 12 times within two hours, on 10 items and 8 values of an
attribute:

    hop      active tiles
    5 min    4
    1 h      2 per active day
    1 d      1 per active day
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from streams.core.features.definitions import DAY_MS, HOUR_MS, Feature, FeatureSet, Kind
from streams.core.features.recent import SESSIONS
from streams.core.features.tiles import KINDS, STATISTICS, Accumulator, Statistic

ACTIVE_DAYS, ACTIVE_HOURS, ACTIVE_MINUTES = 1 / 4, 2, 4
"""Of a typical user: share of days, hours per active day, tiles of 5 minutes."""
ITEMS, SURFACES, VALUES = 10, 2, 8
"""Of a typical user: items per active day, surfaces, values of an attribute."""
HOP_BYTES, TIME_BYTES, COUNT_BYTES, NUMBER_BYTES = 5, 6, 5, 9
"""Most bytes of a hop's number, of a time before the year 2109, of a count below 2^31, and of any number."""
HEAD_BYTES = 9
"""Bytes of the feature set's hash and of the number of features that are not complete."""
COMPLETE_BYTES = 2 + TIME_BYTES
"""Bytes of the time from which on a feature is complete, while it is not."""
ID_BYTES = 4
"""Bytes of a hashed id or name."""


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of a user's state."""

    typical: int
    most: int

    def __add__(self, other: Size) -> Size:
        return Size(self.typical + other.typical, self.most + other.most)


def size_of(features: FeatureSet | Feature) -> Size:
    """Return the bytes that all features of a set take per user, or one feature alone.

    Features with windows of one hop share tiles, so a set can take less than the sum of its features; it can take more
    if their windows are of different lengths, because the tiles of all cover the longest.
    """
    if isinstance(features, FeatureSet):
        chosen, total = features.features, Size(HEAD_BYTES, HEAD_BYTES + 1)
    else:
        chosen, total = (features,), Size(0, 0)
    total += Size(0, COMPLETE_BYTES * len(chosen))
    for hop_ms in sorted({each.hop_ms for each in chosen if each.kind in KINDS}):
        total += _ring([each for each in chosen if each.kind in KINDS and each.hop_ms == hop_ms])
    for _ in {(each.filter, each.gap_ms) for each in chosen if each.gap_ms}:
        total += Size(1 + SESSIONS * 9, 1 + SESSIONS * (2 * TIME_BYTES + COUNT_BYTES))
    for each in chosen:
        total += _single(each)
    return total


def active_tiles(feature: Feature) -> int:
    """Return the number of tiles in which a typical user acts."""
    days = max(1, math.ceil(feature.window_ms / DAY_MS * ACTIVE_DAYS))
    if feature.hop_ms == DAY_MS:
        return days
    return min(feature.tiles, days * ACTIVE_HOURS if feature.hop_ms == HOUR_MS else ACTIVE_MINUTES)


def _ring(features: list[Feature]) -> Size:
    longest = max(features, key=lambda each: each.tiles)
    accumulators = {
        Accumulator(each.filter, each.of, statistic) for each in features for statistic in STATISTICS[each.kind]
    }
    most = sum(_longest_number(each) for each in accumulators)
    typical = sum(_typical_number(each) for each in accumulators)
    return Size(
        HOP_BYTES + _gap_bytes(active_tiles(longest)) + active_tiles(longest) * (1 + typical),
        HOP_BYTES + 2 + longest.tiles * (_gap_bytes(longest.tiles) + most),
    )


def _single(feature: Feature) -> Size:
    gap, tiles = _gap_bytes(feature.tiles), feature.tiles
    match feature.kind:
        case Kind.DISTINCT:
            days = max(1, math.ceil(feature.window_ms / DAY_MS * ACTIVE_DAYS))
            ids = min(feature.cap, ITEMS * days if feature.of == "item" else SURFACES)
            return Size(HOP_BYTES + 2 + ids * (ID_BYTES + 1), HOP_BYTES + 8 + feature.cap * (ID_BYTES + gap))
        case Kind.TOP_K:
            values, active = min(feature.cap, VALUES), active_tiles(feature)
            return Size(
                HOP_BYTES + 2 + values * (ID_BYTES + 1 + 2 * math.ceil(active / 2)),
                HOP_BYTES + 3 + feature.cap * (ID_BYTES + 2 + tiles * (gap + COUNT_BYTES)),
            )
        case Kind.DECAYED_AFFINITY:
            lane = ID_BYTES + 8
            return Size(TIME_BYTES + 2 + min(feature.cap, VALUES) * lane, TIME_BYTES + 3 + feature.cap * lane)
        case Kind.LAST_K:
            return Size(1 + TIME_BYTES + feature.k * 11, 1 + feature.k * (8 + TIME_BYTES))
        case Kind.SECONDS_SINCE:
            return Size(TIME_BYTES, TIME_BYTES)
        case _:
            return Size(0, 0)


def _longest_number(accumulator: Accumulator) -> int:
    """Return the bytes of a count, of a duration, which has 32 bits, and of any number."""
    is_duration = accumulator.of == "duration" and accumulator.statistic is not Statistic.SUM
    return COUNT_BYTES if accumulator.statistic is Statistic.COUNT or is_duration else NUMBER_BYTES


def _typical_number(accumulator: Accumulator) -> int:
    """Return the bytes of a small count, of a duration in whole milliseconds, and of a number such as a price."""
    if accumulator.statistic is Statistic.COUNT:
        return 1
    return 4 if accumulator.of == "duration" else NUMBER_BYTES


def _gap_bytes(tiles: int) -> int:
    """Return the bytes of a distance between tiles, or of a number of them."""
    return 1 if tiles <= 128 else 2
