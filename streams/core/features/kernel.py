"""The compiled kernel, `kernel.cpp`: adds events, packs and unpacks users, each in one call for all features.

The structures below are those of the C++ source. The parts keep their arrays for life, so that their addresses are
taken once. Loading the library is not done here: see `streams.features_kernel`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from encoder.arrays import F64, I64, U8, Bool
from streams.core.features.definitions import Filter
from streams.core.features.distinct import Distinct
from streams.core.features.rankings import Affinity, TopK
from streams.core.features.recent import LastK, SecondsSince, Sessions
from streams.core.features.tiles import Ring

_LONG, _INT, _POINTER, _DOUBLE = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p, ctypes.c_double
NUMBERS, IDS = ("duration", "value"), ("item", "surface")
KINDS = (Ring, Distinct, TopK, Affinity, LastK, SecondsSince, Sessions)
"""Classes of parts, in the order of `Kind` in the kernel."""
PACKED_BYTES = 4_096
"""Bytes of a packed user for which there is room at first; twice as much when that is not enough."""


class Functions(Protocol):
    """The functions of the compiled library."""

    def add_events(self, parts: Any, count: int, batch: Any) -> None:
        """Add a batch to all parts."""

    def pack_users(self, parts: Any, count: int, rows: Any, users: int, out: Any, size: int, ends: Any) -> int:
        """Write users to `out`; return the bytes, -1 if they do not fit."""

    def unpack_users(self, parts: Any, count: int, rows: Any, users: int, data: Any, ends: Any) -> int:
        """Read users; return the first whose bytes are wrong, -1 if there is none."""


class _Accumulator(ctypes.Structure):
    _fields_ = (("filter", _INT), ("number", _INT), ("statistic", _INT), ("unused", _INT), ("initial", _DOUBLE))


class _Names(ctypes.Structure):
    _fields_ = (("count", _LONG), ("hashes", _POINTER), ("sorted", _POINTER), ("codes", _POINTER))


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

    def __init__(
        self,
        functions: Functions,
        filters: Sequence[Filter],
        groups: Sequence[str],
        name_hashes: Mapping[str, I64],
    ) -> None:
        """Use `functions`; `filters` and `groups` are in the order of the columns of a batch.

        `name_hashes` holds, per item attribute, the 32-bit hash of each value by its code.
        """
        self._functions, self._filters, self._groups = functions, list(filters), list(groups)
        self._kept: list[Any] = []
        """What the structures point to."""
        self._names = {group: self._names_of(name_hashes[group]) for group in groups}
        self._parts: Any = (_Part * 0)()
        self._bytes = PACKED_BYTES

    def bind(self, parts: Sequence[tuple[Filter, Any]]) -> None:
        """Take the addresses of the arrays of all parts, which must not be replaced afterwards."""
        described = [self._described(chosen, part) for chosen, part in parts]
        self._parts = (_Part * len(described))(*described)

    def add(self, events: Events) -> None:
        """Add events."""
        columns = (events.rows, events.times_ms, events.passes, events.numbers, events.items, events.ids, events.groups)
        contiguous = [np.ascontiguousarray(column) for column in columns]
        count = len(events.rows)
        batch = _Batch(count, count, *(column.ctypes.data for column in contiguous))
        self._functions.add_events(self._parts, len(self._parts), ctypes.byref(batch))

    def pack(self, rows: I64) -> list[bytes]:
        """Return the state of users [U], each as bytes that `unpack` reads."""
        rows, ends = np.ascontiguousarray(rows), np.zeros(len(rows), np.int64)
        while True:
            out = np.empty(self._bytes * max(len(rows), 1), np.uint8)
            size = self._functions.pack_users(
                self._parts,
                len(self._parts),
                rows.ctypes.data,
                len(rows),
                out.ctypes.data,
                len(out),
                ends.ctypes.data,
            )
            if size >= 0:
                packed = out[:size].tobytes()
                bounds = [0, *ends.tolist()]
                return [packed[low:high] for low, high in pairwise(bounds)]
            self._bytes *= 2

    def unpack(self, rows: I64, packed: Sequence[bytes]) -> int:
        """Read users into `rows` [U], which must be cleared; return the first that is damaged, -1 if there is none."""
        data: U8 = np.frombuffer(b"".join(packed), np.uint8)
        rows, ends = np.ascontiguousarray(rows), np.cumsum([len(each) for each in packed], dtype=np.int64)
        return self._functions.unpack_users(
            self._parts, len(self._parts), rows.ctypes.data, len(rows), data.ctypes.data, ends.ctypes.data
        )

    def _names_of(self, hashes: I64) -> _Names:
        order = np.argsort(hashes).astype(np.int64)
        by_code, ascending = hashes.astype(np.uint32), hashes[order].astype(np.uint32)
        self._kept.append((order, by_code, ascending))
        return _Names(len(hashes), by_code.ctypes.data, ascending.ctypes.data, order.ctypes.data)

    def _described(self, chosen: Filter, part: Any) -> _Part:
        """Return the structure of a part."""
        structure = _Part(kind=KINDS.index(type(part)))
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
                    structure.column = self._groups.index(feature.group)
                    structure.e = ctypes.addressof(self._names[feature.group])
        for name, array in zip("abcde", arrays_of(part), strict=False):
            assert array.flags.c_contiguous
            setattr(structure, name, array.ctypes.data)
        self._kept.append(part)
        return structure

    def _accumulators(self, ring: Ring) -> int:
        """Return the address of the structures of a ring's accumulators."""
        structures = (_Accumulator * len(ring.accumulators))()
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
