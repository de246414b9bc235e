"""The compiled kernel, `kernel.cpp`: adds events, writes values, packs and unpacks users, each in one call for all.

The parts keep their arrays for life, so that their addresses are
taken once. Loading the library is not done here: see `streams.features_kernel`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from encoder.arrays import F64, I64, U8, Bool
from streams.core.features.attributes import Attributes, json_text
from streams.core.features.definitions import Feature, Filter, Kind
from streams.core.features.distinct import Distinct
from streams.core.features.rankings import Affinity, TopK
from streams.core.features.recent import LastK, SecondsSince, Sessions
from streams.core.features.structures import (
    AccumulatorStructure,
    BatchStructure,
    FieldStructure,
    Functions,
    Items,
    MomentsStructure,
    Names,
    PartStructure,
    Texts,
)
from streams.core.features.tiles import STATISTICS, Ring

NUMBERS, IDS = ("duration", "value"), ("item", "surface")
KINDS = (Ring, Distinct, TopK, Affinity, LastK, SecondsSince, Sessions)
"""Classes of parts, in the order of `Kind` in the kernel."""
ROOM_BYTES = 2**20
"""Size of the output at first; twice as much whenever that is not enough."""
OTHER = 5
FIELD_KINDS = (*STATISTICS, None, Kind.SESSION_LENGTH, Kind.SESSION_DEPTH)
"""Kinds of features in the order of `FieldKind` in the kernel; all others are `OTHER`."""
ESTIMATES = frozenset({Kind.DISTINCT, Kind.TOP_K, Kind.DECAYED_AFFINITY})
"""Kinds whose value may be an estimate."""


@dataclass(frozen=True, slots=True)
class Events:
    """The columns of a batch that the kernel reads; row i of each is one event, in order of arrival."""

    rows: I64
    times_ms: I64
    passes: Bool
    """[filters, E]"""
    numbers: F64
    """[NUMBERS, E], NaN where an event has none."""
    items: I64
    ids: I64
    """[IDS, E], hashed (`distinct.hashed`)."""
    groups: I64
    """[attributes, E], codes of the values, -1 where there is none."""


class Kernel:
    """The parts of a `FeatureState`, as the compiled library sees them."""

    def __init__(self, functions: Functions, filters: Sequence[Filter], attributes: Attributes) -> None:
        """Use `functions`; `filters` are in the order of the rows of `Events.passes`."""
        self._functions, self._filters = functions, list(filters)
        self._items, hashes = Items(attributes), attributes.name_hashes()
        self._names = {each: Names(names, hashes[each]) for each, names in attributes.names.items()}
        self._kept: list[Any] = []
        """What the structures point to."""
        self._parts: Any = (PartStructure * 0)()
        self._fields: Any = (FieldStructure * 0)()
        self._estimates: list[str] = []
        """Names of the features that may be estimates."""
        self._estimated: dict[bytes, tuple[str, ...]] = {}
        """Those of a user, by the bytes of the user's row in the matrix that the library fills."""
        self._out = np.empty(ROOM_BYTES, np.uint8)
        """Kept, because memory of that size is given back to the operating system when it is freed."""

    def bind(
        self, parts: Sequence[tuple[Filter, Any]], features: Sequence[tuple[Feature, Any]], groups: Sequence[str]
    ) -> None:
        """Take the addresses of the arrays of all parts, which must not be replaced afterwards.

        `features` are those of the output, each with its part; `groups` is in the order of the rows of `Events.groups`.
        """
        described = [self._described(chosen, part, groups) for chosen, part in parts]
        self._parts = (PartStructure * len(described))(*described)
        self._estimates = [feature.name for feature, _ in features if feature.kind in ESTIMATES]
        places = {id(part): place for place, (_, part) in enumerate(parts)}
        names = Texts([json_text(feature.name) + b":" for feature, _ in features])
        fields = [self._field(feature, part) for feature, part in features]
        for at, (field, (_, part)) in enumerate(zip(fields, features, strict=True)):
            field.part, field.name = places[id(part)], names.of(at)
        self._fields = (FieldStructure * len(fields))(*fields)
        self._kept.append(names)

    def add(self, events: Events) -> None:
        """Add events."""
        columns = (events.rows, events.times_ms, events.passes, events.numbers, events.items, events.ids, events.groups)
        contiguous = [np.ascontiguousarray(column) for column in columns]
        count = len(events.rows)
        batch = BatchStructure(count, count, *(column.ctypes.data for column in contiguous))
        self._functions.add_events(self._parts, len(self._parts), ctypes.byref(batch))

    def values(self, rows: I64, as_of_ms: I64) -> tuple[list[bytes], I64, list[tuple[str, ...]]]:
        """Return the values of users [U] as JSON objects, until when each holds, and the names of the estimates."""
        rows, as_of_ms, count = np.ascontiguousarray(rows), np.ascontiguousarray(as_of_ms), len(rows)
        ends, until_ms = np.zeros(count, np.int64), np.zeros(count, np.int64)
        estimates = np.zeros((count, len(self._estimates)), np.bool_)
        arrays = (rows, as_of_ms, ends, until_ms, estimates)
        moments = MomentsStructure(count, len(self._estimates), *(each.ctypes.data for each in arrays))

        def write(out: int, size: int) -> int:
            return self._functions.write_values(
                self._parts, self._fields, len(self._fields), ctypes.byref(moments), out, size
            )

        return self._written(write, ends), until_ms, self._names_of(estimates)

    def pack(self, rows: I64) -> list[bytes]:
        """Return the state of users [U], each as bytes that `unpack` reads."""
        rows, ends = np.ascontiguousarray(rows), np.zeros(len(rows), np.int64)

        def write(out: int, size: int) -> int:
            return self._functions.pack_users(
                self._parts, len(self._parts), rows.ctypes.data, len(rows), out, size, ends.ctypes.data
            )

        return self._written(write, ends)

    def unpack(self, rows: I64, packed: Sequence[bytes]) -> int:
        """Read users into `rows` [U], which must be cleared; return the first that is damaged, -1 if there is none."""
        data: U8 = np.frombuffer(b"".join(packed), np.uint8)
        rows, ends = np.ascontiguousarray(rows), np.cumsum([len(each) for each in packed], dtype=np.int64)
        return self._functions.unpack_users(
            self._parts, len(self._parts), rows.ctypes.data, len(rows), data.ctypes.data, ends.ctypes.data
        )

    def _written(self, write: Callable[[int, int], int], ends: I64) -> list[bytes]:
        """Return what `write` writes for each user, given room and its size; it fills `ends` and returns the size."""
        while (size := write(self._out.ctypes.data, len(self._out))) < 0:
            self._out = np.empty(2 * len(self._out), np.uint8)
        written = self._out[:size].tobytes()
        return [written[low:high] for low, high in pairwise([0, *ends.tolist()])]

    def _names_of(self, estimates: Bool) -> list[tuple[str, ...]]:
        """Return the names of each user's estimates [U]."""
        width, found = len(self._estimates), estimates.tobytes()
        if not estimates.any():
            return [()] * len(estimates)
        users = [found[start : start + width] for start in range(0, len(found), width)]
        for each in set(users) - self._estimated.keys():
            self._estimated[each] = tuple(name for name, is_one in zip(self._estimates, each, strict=True) if is_one)
        return [self._estimated[each] for each in users]

    def _field(self, feature: Feature, part: Any) -> FieldStructure:
        """Return the structure of a feature, without its name and part."""
        kind = FIELD_KINDS.index(feature.kind) if feature.kind in FIELD_KINDS else OTHER
        field = FieldStructure(kind=kind, window_ms=feature.window_ms, estimate=-1)
        field.items = ctypes.addressof(self._items.structure)
        if isinstance(part, Ring):
            statistics = STATISTICS[feature.kind]
            field.count, field.number = part.place(feature, statistics[0]), part.place(feature, statistics[-1])
        if feature.kind in ESTIMATES:
            field.estimate = self._estimates.index(feature.name)
        return field

    def _described(self, chosen: Filter, part: Any, groups: Sequence[str]) -> PartStructure:
        """Return the structure of a part."""
        structure = PartStructure(kind=KINDS.index(type(part)))
        if isinstance(part, Ring):
            structure.hop_ms, structure.tiles = part.hop_ms, part.tiles
            structure.c, structure.accumulators = self._accumulators(part), len(part.accumulators)
        else:
            structure.filter = self._filters.index(chosen)
            if isinstance(part, Sessions):
                structure.gap_ms = part.gap_ms
            else:
                feature = part.feature
                structure.hop_ms, structure.tiles, structure.cap = feature.hop_ms or 1, feature.tiles, feature.cap
                structure.k, structure.half_life_ms = feature.k, float(feature.half_life_ms)
                if isinstance(part, Distinct):
                    structure.column = IDS.index(feature.of)
                if feature.group:
                    structure.column = groups.index(feature.group)
                    structure.e = ctypes.addressof(self._names[feature.group].structure)
        for name, array in zip("abcde", arrays_of(part), strict=False):
            assert array.flags.c_contiguous
            setattr(structure, name, array.ctypes.data)
        self._kept.append(part)
        return structure

    def _accumulators(self, ring: Ring) -> int:
        """Return the address of the structures of a ring's accumulators."""
        structures = (AccumulatorStructure * len(ring.accumulators))()
        for structure, each, initial in zip(structures, ring.accumulators, ring.initial.tolist(), strict=True):
            structure.filter = self._filters.index(each.filter)
            structure.number = NUMBERS.index(each.of) if each.of else -1
            structure.statistic, structure.initial = int(each.statistic), initial
        self._kept.append(structures)
        return ctypes.addressof(structures)


def arrays_of(part: Any) -> list[Any]:
    """Return the arrays of a part in the order in which the kernel has them."""
    match part:
        case Ring():
            return [part.hops, part.numbers]
        case Distinct():
            return [part.keys, part.last, part.newest, part.theta, part.dropped]
        case TopK():
            return [part.keys, part.hops, part.counts, part.dropped]
        case Affinity():
            return [part.keys, part.sums, part.newest_ms, part.dropped]
        case LastK():
            return [part.items, part.times_ms]
        case SecondsSince():
            return [part.last_ms]
        case _:
            return [part.first_ms, part.last_ms, part.depths]
