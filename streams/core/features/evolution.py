"""What a feature state keeps when its definitions change.

A feature keeps its state if the former feature set has one that keeps the same, whatever its name: for features of
tiles the same accumulators in tiles of the same length, for all others the same `Feature.key`. A window may become
longer: the feature is then complete from the oldest tile that the former windows could touch. What depends on item
attributes is not kept when their version changes, because what was counted would be the sum of two meanings.

    former     count 7 d   |                    | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 . t
    now        count 28 d  | not known any more | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 . t
                                                ^ complete from

Shapes: U users, T tiles of a ring, A accumulators of a ring.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from encoder.arrays import I64
from streams.core.features.completeness import Completeness
from streams.core.features.definitions import Feature, FeatureSet
from streams.core.features.parts import Parts, arrays_of
from streams.core.features.tiles import KINDS, Ring, accumulators_of


def origins(new: FeatureSet, old: FeatureSet) -> dict[str, list[Feature]]:
    """Return the former features that each feature can take its state from, by name; without those that have none."""
    found = {each.name: [other for other in old.features if _is_origin(each, other)] for each in new.features}
    return {
        each.name: found[each.name]
        for each in new.features
        if found[each.name] and (new.attributes == old.attributes or not _needs_attributes(each))
    }


def copy(parts: Parts, rows: I64, source: Parts, source_rows: I64, pairs: Sequence[tuple[Feature, Feature]]) -> None:
    """Copy the state of users [U] from `source`, for pairs of a feature and a former one; it replaces what is there."""
    tiled = [feature for feature, _ in pairs if feature.kind in KINDS]
    for ring in parts.rings:
        wanted = list(dict.fromkeys(a for each in tiled if each.hop_ms == ring.hop_ms for a in accumulators_of(each)))
        if wanted:
            former = next(each for each in source.rings if each.hop_ms == ring.hop_ms)
            _copy_tiles(ring, rows, former, source_rows, [ring.accumulators.index(each) for each in wanted])
    for feature, origin in pairs:
        if feature.kind not in KINDS:
            arrays = zip(arrays_of(parts.of(feature)), arrays_of(source.of(origin)), strict=True)
            for array, other in arrays:
                array[rows] = other[source_rows]


def copy_completeness(
    complete: Completeness, rows: I64, former: Completeness, former_rows: I64, found: dict[str, list[Feature]]
) -> None:
    """Set from when on users [U] are complete in features that were copied from those in `found`."""
    for name, known in found.items():
        from_ms = np.min([former.of(each.name, former_rows) for each in known], axis=0)
        ring = former.parts.of(known[0])
        if isinstance(ring, Ring):
            from_ms = np.maximum(from_ms, ring.oldest_ms(complete.feature(name), former_rows))
        complete.set(rows, [name], from_ms)


def _is_origin(feature: Feature, other: Feature) -> bool:
    if feature.kind in KINDS and other.kind in KINDS:
        return feature.hop_ms == other.hop_ms and {*accumulators_of(feature)} <= {*accumulators_of(other)}
    return feature.key == other.key


def _needs_attributes(feature: Feature) -> bool:
    return bool(feature.group or feature.filter.where)


def _copy_tiles(ring: Ring, rows: I64, source: Ring, source_rows: I64, columns: Sequence[int]) -> None:
    """Replace accumulators (`columns` of the ring) of users by those of `source`, each tile by that of the same hop."""
    places = [1 + source.accumulators.index(ring.accumulators[column]) for column in columns]
    former = source.cells[source_rows]  # [U, T, 1 + A]
    marks = former[:, :, 0].astype(np.int64)
    newest = marks.max(axis=1)
    ring.cells[rows[:, None], :, np.array(columns) + 1] = ring.initial[columns][:, None]
    for tile in range(source.tiles):
        mark = marks[:, tile]
        slot = (mark - 1) % ring.tiles
        is_known = (mark > 0) & (mark >= ring.cells[rows, slot, 0])
        users, at = rows[is_known], slot[is_known]
        is_new = ring.cells[users, at, 0] < mark[is_known]
        ring.cells[users[is_new], at[is_new], 1:] = ring.initial
        ring.cells[users, at, 0] = mark[is_known]
        for column, place in zip(columns, places, strict=True):
            in_reach = mark[is_known] > newest[is_known] - source.reach(ring.accumulators[column])
            number = former[is_known, tile, place]
            ring.cells[users, at, 1 + column] = np.where(in_reach, number, ring.initial[column])
