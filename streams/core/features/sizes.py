"""Bytes of a user's packed feature state: at most, and typically. Pure; `pack.h` and `lanes.h` have the layout.

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
from streams.core.features.tiles import KINDS, Accumulator, Statistic, accumulators_of

ACTIVE_DAYS, ACTIVE_HOURS, ACTIVE_MINUTES = 1 / 4, 2, 4
"""Of a typical user: share of days, hours per active day, tiles of 5 minutes."""
ITEMS, SURFACES, VALUES = 10, 2, 8
"""Of a typical user: items per active day, surfaces, values of an attribute."""
MARK_BITS, TIME_BITS, COUNT_BITS, NUMBER_BITS, DURATION_BITS = 1 + 63, 7 + 50, 61, 66, 41
"""Most bits of a hop, of a time, of a count below 2^31, of any number, and of one with 32 bits."""
TILE_COUNT_BITS = 31
"""Most bits of a count in one tile of a ranking."""
ID_BITS = 32
"""Bits of a hashed id or name."""
HEAD_BITS = 9 * 8 + 1 + 6 + 42
"""Format and hash of the feature set, no feature that is not complete, and the newest time, before the year 2109."""
COMPLETE_BITS = 17 + 6 + 50
"""Most bits of the time from which on a feature is complete, while it is not."""


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of a user's state, or bits while they are added."""

    typical: int
    most: int

    def __add__(self, other: Size) -> Size:
        return Size(self.typical + other.typical, self.most + other.most)


def size_of(features: FeatureSet | Feature) -> Size:
    """Return the bytes that all features of a set take per user, or one feature alone.

    Features with windows of one hop share tiles, so a set can take less than the sum of its features; it can take more
    if their windows are of different lengths, because the tiles of all cover the longest.
    """
    chosen = features.features if isinstance(features, FeatureSet) else (features,)
    total = Size(HEAD_BITS, HEAD_BITS + 16) if isinstance(features, FeatureSet) else Size(0, 0)
    total += Size(0, COMPLETE_BITS * len(chosen))
    for hop_ms in sorted({each.hop_ms for each in chosen if each.kind in KINDS}):
        total += _ring([each for each in chosen if each.kind in KINDS and each.hop_ms == hop_ms])
    for _ in {(each.filter, each.gap_ms) for each in chosen if each.gap_ms}:
        total += Size(7 + SESSIONS * (35 + 29 + 7), 7 + SESSIONS * (56 + 56 + COUNT_BITS))
    for each in chosen:
        total += _single(each)
    return Size(math.ceil(total.typical / 8), math.ceil(total.most / 8))


def active_tiles(feature: Feature) -> int:
    """Return the number of tiles in which a typical user acts."""
    days = max(1, math.ceil(feature.window_ms / DAY_MS * ACTIVE_DAYS))
    if feature.hop_ms == DAY_MS:
        return days
    return min(feature.tiles, days * ACTIVE_HOURS if feature.hop_ms == HOUR_MS else ACTIVE_MINUTES)


def _ring(features: list[Feature]) -> Size:
    longest = max(features, key=lambda each: each.tiles)
    accumulators = {each for feature in features for each in accumulators_of(feature)}
    most = typical = 0.0
    for each in accumulators:
        tiles = [feature for feature in features if each in accumulators_of(feature)]
        reach = max(tiles, key=lambda feature: feature.tiles)
        most += reach.tiles * _longest_number(each)
        typical += active_tiles(reach) * _typical_number(each)
    return Size(8 + math.ceil(active_tiles(longest) * 4 + typical), math.ceil(MARK_BITS + 1 + longest.tiles * 3 + most))


def _single(feature: Feature) -> Size:
    place = (feature.tiles - 1).bit_length()
    match feature.kind:
        case Kind.DISTINCT:
            days = max(1, math.ceil(feature.window_ms / DAY_MS * ACTIVE_DAYS))
            ids = min(feature.cap, ITEMS * days if feature.of == "item" else SURFACES)
            lane = ID_BITS + place
            return Size(8 + 7 + ids * lane, MARK_BITS + 1 + 17 + ID_BITS + 21 + feature.cap * lane)
        case Kind.TOP_K:
            values, active = min(feature.cap, VALUES), active_tiles(feature)
            tile = 21 + feature.cap + feature.cap * TILE_COUNT_BITS
            typical = values * ID_BITS + feature.tiles + active * (5 + values + math.ceil(values * 0.75) * 2)
            return Size(8 + 7 + typical, MARK_BITS + 18 + 21 + feature.cap * ID_BITS + feature.tiles * tile)
        case Kind.DECAYED_AFFINITY:
            lane = ID_BITS + 64
            return Size(16 + min(feature.cap, VALUES) * lane, TIME_BITS + 22 + feature.cap * lane)
        case Kind.LAST_K:
            return Size(7 + feature.k * (64 + 26), 21 + feature.k * (64 + TIME_BITS))
        case Kind.SECONDS_SINCE:
            return Size(8, TIME_BITS)
        case _:
            return Size(0, 0)


def _longest_number(accumulator: Accumulator) -> int:
    """Return the bits of a count, of a duration, which has 32 bits, and of any number."""
    if accumulator.statistic is Statistic.COUNT:
        return COUNT_BITS
    is_one_duration = accumulator.of == "duration" and accumulator.statistic in (Statistic.MIN, Statistic.MAX)
    return DURATION_BITS if is_one_duration else NUMBER_BITS


def _typical_number(accumulator: Accumulator) -> int:
    """Return the bits of a small count, of a duration in whole milliseconds, and of a price or a sum of prices."""
    if accumulator.statistic is Statistic.COUNT:
        return 6
    if accumulator.of == "duration":
        return 28
    return 27 if accumulator.statistic in (Statistic.MIN, Statistic.MAX) else 48
