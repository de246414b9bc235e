"""The fast way to add events: `kernel.cpp`, called once per batch, over the arrays of the parts.

The structures below are those of the C++ source. The parts keep their arrays for life, so that their addresses are
taken once. Loading the library is not done here: see `streams.features_kernel`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from encoder.arrays import F64, I64, Bool
from streams.core.features.definitions import FeatureSet, Filter
from streams.core.features.lanes import Distinct, hashed
from streams.core.features.rankings import Affinity, TopK
from streams.core.features.recent import LastK, SecondsSince, Sessions
from streams.core.features.tiles import Events, Ring

_LONG, _INT, _POINTER, _DOUBLE = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p, ctypes.c_double
NUMBERS, IDS = ("duration", "value"), ("item", "surface")
KINDS = (Ring, Distinct, TopK, Affinity, LastK, SecondsSince, Sessions)
"""In the order of the kernel's numbers."""
AddEvents = Callable[[Any, int, Any], None]
"""The function of the kernel."""


class _Accumulator(ctypes.Structure):
    _fields_ = (("filter", _INT), ("number", _INT), ("statistic", _INT), ("unused", _INT), ("initial", _DOUBLE))


class _Part(ctypes.Structure):
    _fields_ = (
        *(
            (name, _LONG)
            for name in ("kind", "hop_ms", "tiles", "cap", "k", "filter", "column", "accumulators", "gap_ms")
        ),
        ("half_life_ms", _DOUBLE),
        *((name, _POINTER) for name in "abcde"),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("events", _LONG),
        ("stride", _LONG),
        *((name, _POINTER) for name in ("rows", "times_ms", "passes", "numbers", "items", "ids", "groups")),
    )


class NativeParts:
    """The parts of a `FeatureState` as the kernel sees them."""

    def __init__(
        self, add_events: AddEvents, feature_set: FeatureSet, filters: Sequence[Filter], groups: Sequence[str]
    ) -> None:
        """Make room for the columns of a batch; `filters` and `groups` are all that the features use, in this order."""
        self._add_events, self._feature_set = add_events, feature_set
        self._filters, self._groups = list(filters), list(groups)
        self._kept: list[Any] = []
        """What the structures point to."""
        self._parts: Any = None

    def bind(self, parts: Sequence[Any], sessions: Sequence[tuple[Filter, Sessions]]) -> None:
        """Take the addresses of all arrays, which must not be replaced afterwards."""
        described = [self._described(each) for each in parts]
        described += [self._sessions(chosen, each) for chosen, each in sessions]
        self._parts = (_Part * len(described))(*described)

    def add(self, events: Events) -> None:
        """Add events, in order of arrival."""
        passes = np.array([events.passes[each] for each in self._filters], np.bool_)  # [F, E]
        numbers = np.array([events.numbers[each] for each in NUMBERS], np.float64)
        ids = np.array([hashed(events.items), hashed(events.surfaces)], np.int64)
        groups = np.array([events.groups[each] for each in self._groups], np.int64)
        rows, times_ms = np.ascontiguousarray(events.rows), np.ascontiguousarray(events.timestamp_ms)
        items = np.ascontiguousarray(events.items)
        columns = (rows, times_ms, passes, numbers, items, ids, groups)
        batch = _Batch(len(rows), len(rows), *(column.ctypes.data for column in columns))
        self._add_events(self._parts, len(self._parts), ctypes.byref(batch))

    def _described(self, part: Any) -> _Part:
        """Return the structure of a part."""
        if isinstance(part, Ring):
            return self._ring(part)
        feature = part.feature
        structure = _Part(kind=KINDS.index(type(part)), filter=self._filters.index(feature.filter))
        structure.hop_ms, structure.tiles, structure.cap = feature.hop_ms or 1, feature.tiles, feature.cap
        structure.k, structure.half_life_ms = feature.k, float(feature.half_life_ms)
        if isinstance(part, Distinct):
            structure.column = IDS.index(feature.of)
        elif feature.group:
            structure.column = self._groups.index(feature.group)
        return self._pointing(structure, arrays_of(part))

    def _ring(self, ring: Ring) -> _Part:
        accumulators = (_Accumulator * len(ring.accumulators))()
        for structure, each, initial in zip(accumulators, ring.accumulators, ring.initial.tolist(), strict=True):
            structure.filter = self._filters.index(each.filter)
            structure.number = NUMBERS.index(each.of) if each.of else -1
            structure.statistic, structure.initial = int(each.statistic), initial
        self._kept.append(accumulators)
        part = _Part(kind=KINDS.index(Ring), hop_ms=ring.hop_ms, tiles=ring.tiles, accumulators=len(accumulators))
        part.c = ctypes.addressof(accumulators)
        return self._pointing(part, arrays_of(ring))

    def _sessions(self, chosen: Filter, sessions: Sessions) -> _Part:
        part = _Part(kind=KINDS.index(Sessions), filter=self._filters.index(chosen), gap_ms=sessions.gap_ms)
        return self._pointing(part, arrays_of(sessions))

    def _pointing(self, part: _Part, arrays: Sequence[I64 | F64 | Bool]) -> _Part:
        """Point `a`, `b`, ... to the arrays."""
        for name, array in zip("abcde", arrays, strict=False):
            assert array.flags.c_contiguous
            setattr(part, name, array.ctypes.data)
        self._kept.append(arrays)
        return part


def arrays_of(part: Any) -> list[Any]:
    """Return the arrays of a part in the order in which the kernel has them."""
    match part:
        case Ring():
            return [part.hops, part.numbers]
        case Distinct():
            return [part.lanes.keys, part.last, part.newest, part.theta, part.dropped]
        case TopK():
            return [part.lanes.keys, part.hops, part.counts, part.dropped]
        case Affinity():
            return [part.lanes.keys, part.sums, part.newest_ms, part.dropped]
        case LastK():
            return [part.items, part.times_ms]
        case SecondsSince():
            return [part.last_ms]
        case _:
            return [part.first_ms, part.last_ms, part.depths]
