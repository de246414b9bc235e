"""Describes the parts and features of a feature state to the compiled library: the arrays, and what each is for.

The arrays keep their addresses for life, so they are taken once.
"""

from __future__ import annotations

import ctypes

import numpy as np

from streams.core.features.attributes import Attributes, json_text
from streams.core.features.completeness import Completeness
from streams.core.features.definitions import Feature, FeatureSet, Filter, Kind
from streams.core.features.distinct import Distinct
from streams.core.features.parts import Part, Parts, arrays_of
from streams.core.features.rankings import Affinity, TopK
from streams.core.features.recent import LastK, SecondsSince, Sessions
from streams.core.features.structures import (
    AccumulatorStructure,
    FieldStructure,
    Items,
    Names,
    PartStructure,
    StateStructure,
    Texts,
)
from streams.core.features.tiles import STATISTICS, Ring

NUMBERS, IDS = ("duration", "value"), ("item", "surface")
KINDS = (Ring, Distinct, TopK, Affinity, LastK, SecondsSince, Sessions)
"""Classes of parts, in the order of `Kind` in the kernel."""
OTHER = 5
FIELD_KINDS = (*STATISTICS, None, Kind.SESSION_LENGTH, Kind.SESSION_DEPTH)
"""Kinds of features in the order of `FieldKind` in the kernel; all others are `OTHER`."""
ESTIMATES = frozenset({Kind.DISTINCT, Kind.TOP_K, Kind.DECAYED_AFFINITY})
"""Kinds whose value may be an estimate."""
FORMAT = 1
"""Format of packed users, their first byte; the hash of the feature set follows."""


class KnownTexts:
    """The texts of all items and attribute values, which several states may share."""

    def __init__(self, attributes: Attributes) -> None:
        hashes = attributes.name_hashes()
        self.items = Items(attributes)
        self._names = {each: Names(names, hashes[each]) for each, names in attributes.names.items()}
        self._nothing = Names((), np.zeros(0, np.int64))

    def of(self, attribute: str) -> Names:
        """Return the values of an attribute, none of one that is not known any more."""
        return self._names.get(attribute, self._nothing)


class Binding:
    """The structure of a feature state, and everything that it points to."""

    def __init__(self, feature_set: FeatureSet, parts: Parts, complete: Completeness, texts: KnownTexts) -> None:
        features = feature_set.features
        self.filters = list(dict.fromkeys(each.filter for each in features))
        """In the order in which the kernel has them."""
        self.groups = sorted({each.group for each in features if each.group})
        """Item attributes in the order in which the kernel has them."""
        self.estimates = [each.name for each in features if each.kind in ESTIMATES]
        """Names of the features that may be estimates."""
        self._texts, self._kept = texts, [parts, complete]
        described = [self._part(chosen, part) for chosen, part in parts.all]
        places = {id(part): place for place, (_, part) in enumerate(parts.all)}
        self._names = Texts([json_text(each.name) + b":" for each in features])
        fields = [self._field(each, at, parts.of(each), places) for at, each in enumerate(features)]
        self._parts = (PartStructure * len(described))(*described)
        self._fields = (FieldStructure * len(fields))(*fields)
        self.header = bytes((FORMAT,)) + bytes.fromhex(feature_set.version)
        self.structure = StateStructure(
            len(described),
            len(fields),
            ctypes.addressof(self._parts),
            ctypes.addressof(self._fields),
            complete.from_ms.ctypes.data,
            complete.is_partial.ctypes.data,
        )
        self.structure.header[: len(self.header)] = self.header

    def _field(self, feature: Feature, at: int, part: Part, places: dict[int, int]) -> FieldStructure:
        """Return the structure of feature number `at`."""
        kind = FIELD_KINDS.index(feature.kind) if feature.kind in FIELD_KINDS else OTHER
        field = FieldStructure(part=places[id(part)], kind=kind, window_ms=feature.window_ms, estimate=-1)
        field.name, field.items = self._names.of(at), ctypes.addressof(self._texts.items.structure)
        if isinstance(part, Ring):
            statistics = STATISTICS[feature.kind]
            field.count, field.number = part.place(feature, statistics[0]), part.place(feature, statistics[-1])
        if feature.kind in ESTIMATES:
            field.estimate = self.estimates.index(feature.name)
        return field

    def _part(self, chosen: Filter, part: Part) -> PartStructure:
        """Return the structure of a part."""
        structure = PartStructure(kind=KINDS.index(type(part)))
        if isinstance(part, Ring):
            structure.hop_ms, structure.tiles = part.hop_ms, part.tiles
            structure.c, structure.accumulators = self._accumulators(part), len(part.accumulators)
        else:
            structure.filter = self.filters.index(chosen)
            if isinstance(part, Sessions):
                structure.gap_ms = part.gap_ms
            else:
                feature = part.feature
                structure.hop_ms, structure.tiles, structure.cap = feature.hop_ms or 1, feature.tiles, feature.cap
                structure.k, structure.half_life_ms = feature.k, feature.half_life_ms or 1
                if isinstance(part, Distinct):
                    structure.column = IDS.index(feature.of)
                if feature.group:
                    structure.column = self.groups.index(feature.group)
                    structure.e = ctypes.addressof(self._texts.of(feature.group).structure)
        for name, array in zip("abcde", arrays_of(part), strict=False):
            assert array.flags.c_contiguous
            setattr(structure, name, array.ctypes.data)
        return structure

    def _accumulators(self, ring: Ring) -> int:
        """Return the address of the structures of a ring's accumulators."""
        structures = (AccumulatorStructure * len(ring.accumulators))()
        for structure, each, initial in zip(structures, ring.accumulators, ring.initial.tolist(), strict=True):
            structure.filter = self.filters.index(each.filter)
            structure.number = NUMBERS.index(each.of) if each.of else -1
            structure.statistic, structure.initial = int(each.statistic), initial
            structure.reach = ring.reach(each)
        self._kept.append(structures)
        return ctypes.addressof(structures)
