"""The parts of a feature state: which arrays there are, and which part holds which feature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streams.core.features.definitions import Feature, FeatureSet, Filter, Kind
from streams.core.features.distinct import Distinct
from streams.core.features.rankings import Affinity, TopK
from streams.core.features.recent import LastK, SecondsSince, Sessions
from streams.core.features.tiles import KINDS, Ring

Single = Distinct | TopK | Affinity | LastK | SecondsSince
Part = Ring | Single | Sessions
SINGLE: Mapping[Kind, Callable[[Feature, int], Single]] = {
    Kind.DISTINCT: Distinct,
    Kind.TOP_K: TopK,
    Kind.DECAYED_AFFINITY: Affinity,
    Kind.LAST_K: LastK,
    Kind.SECONDS_SINCE: SecondsSince,
}
"""Kinds with a part for each feature."""


class Parts:
    """All parts of a feature set, each with room for the same rows."""

    def __init__(self, feature_set: FeatureSet, rows: int) -> None:
        features = feature_set.features
        tiled = [each for each in features if each.kind in KINDS]
        self.rings = [
            Ring(hop_ms, [each for each in tiled if each.hop_ms == hop_ms], rows)
            for hop_ms in sorted({each.hop_ms for each in tiled})
        ]
        self.single = {each: SINGLE[each.kind](each, rows) for each in features if each.kind in SINGLE}
        self.sessions = {
            (chosen, gap_ms): Sessions(gap_ms, rows)
            for chosen, gap_ms in dict.fromkeys((each.filter, each.gap_ms) for each in features if each.gap_ms)
        }

    @property
    def all(self) -> list[tuple[Filter, Any]]:
        """Every part with its filter; a ring has one per accumulator instead."""
        return [
            *((Filter(), ring) for ring in self.rings),
            *((feature.filter, part) for feature, part in self.single.items()),
            *((chosen, part) for (chosen, _), part in self.sessions.items()),
        ]

    def of(self, feature: Feature) -> Part:
        """Return the part that holds the state of a feature."""
        if feature.gap_ms:
            return self.sessions[feature.filter, feature.gap_ms]
        if feature.kind in SINGLE:
            return self.single[feature]
        return next(ring for ring in self.rings if ring.hop_ms == feature.hop_ms)

    @property
    def row_bytes(self) -> int:
        """Memory of one row of all parts, if it is used fully."""
        arrays = [array for _, part in self.all for array in arrays_of(part)]
        return sum(array.nbytes // len(array) for array in arrays)


def arrays_of(part: Part) -> Sequence[Any]:
    """Return the arrays of a part in the order in which the kernel has them."""
    match part:
        case Ring():
            return [part.cells]
        case Distinct():
            return [part.keys, part.last, part.heads]
        case TopK():
            return [part.keys, part.marks, part.heads, part.counts]
        case Affinity():
            return [part.keys, part.sums, part.heads]
        case LastK():
            return [part.items, part.times_ms]
        case SecondsSince():
            return [part.last_ms]
        case Sessions():
            return [part.kept]
