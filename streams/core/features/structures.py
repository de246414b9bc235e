"""The structures and functions of the compiled library, as `parts.h` and `kernel.cpp` declare them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from encoder.arrays import I64
from streams.core.features.attributes import Attributes, json_text

_LONG, _INT, _POINTER, _DOUBLE = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p, ctypes.c_double


class Functions(Protocol):
    """The functions of the compiled library."""

    def add_events(self, state: Any, selection: Any, source: Any) -> None:
        """Add events to all parts."""

    def write_values(self, state: Any, moments: Any, out: Any, size: int) -> int:
        """Write the values of users to `out`; return the bytes, -1 if they do not fit."""

    def write_shares(self, state: Any, rows: Any, as_of_ms: Any, users: int, shares: Any) -> None:
        """Write which share of its window each feature of users has seen."""

    def pack_users(self, state: Any, rows: Any, users: int, out: Any, size: int, ends: Any) -> int:
        """Write users to `out`; return the bytes, -1 if they do not fit."""

    def clear_users(self, state: Any, rows: Any, users: int) -> None:
        """Forget users."""

    def unpack_users(self, state: Any, rows: Any, users: int, data: Any, ends: Any) -> int:
        """Read users; return the first whose bytes are wrong, -1 if there is none."""


class AccumulatorStructure(ctypes.Structure):
    """An accumulator of a ring."""

    _fields_ = (("filter", _INT), ("number", _INT), ("statistic", _INT), ("reach", _INT), ("initial", _DOUBLE))


class TextsStructure(ctypes.Structure):
    """Texts one after another, and where each starts."""

    _fields_ = (("bytes", _POINTER), ("starts", _POINTER))


class NamesStructure(ctypes.Structure):
    """The values of an item attribute."""

    _fields_ = (
        ("count", _LONG),
        *((name, _POINTER) for name in ("hashes", "sorted", "codes")),
        ("texts", TextsStructure),
    )


class ItemsStructure(ctypes.Structure):
    """The items whose ids are known."""

    _fields_ = (
        *((name, _LONG) for name in ("count", "shift")),
        *((name, _POINTER) for name in ("keys", "buckets")),
        ("texts", TextsStructure),
    )


class FieldStructure(ctypes.Structure):
    """A feature of the output."""

    _fields_ = (
        *((name, _LONG) for name in ("part", "kind", "window_ms", "count", "number", "estimate")),
        ("name", TextsStructure),
        ("items", _POINTER),
    )


class PartStructure(ctypes.Structure):
    """A part and its arrays."""

    _fields_ = (
        *(
            (name, _LONG)
            for name in (
                *("kind", "hop_ms", "tiles", "cap", "k", "filter", "column", "accumulators", "gap_ms", "half_life_ms"),
            )
        ),
        *((name, _POINTER) for name in "abcde"),
    )


class ConditionStructure(ctypes.Structure):
    """A condition on an item attribute."""

    _fields_ = (("codes", _POINTER), ("counts", _POINTER))


class FilterStructure(ctypes.Structure):
    """A filter: tables of action types and of surfaces, and conditions."""

    _fields_ = (*((name, _POINTER) for name in ("actions", "surfaces", "conditions")), ("condition_count", _LONG))


class SelectionStructure(ctypes.Structure):
    """Filters and attributes."""

    _fields_ = (
        *((name, _LONG) for name in ("filter_count", "group_count")),
        *((name, _POINTER) for name in ("filters", "groups", "items")),
    )


class SourceStructure(ctypes.Structure):
    """Events."""

    _fields_ = (("events", _LONG), *((name, _POINTER) for name in ("rows", "actions", "values")))


class MomentsStructure(ctypes.Structure):
    """The users whose values are written."""

    _fields_ = (
        *((name, _LONG) for name in ("users", "stride")),
        *((name, _POINTER) for name in ("rows", "as_of_ms", "ends", "until_ms", "estimates")),
    )


class StateStructure(ctypes.Structure):
    """All parts and fields, and the completeness of the fields."""

    _fields_ = (
        *((name, _LONG) for name in ("part_count", "field_count")),
        *((name, _POINTER) for name in ("parts", "fields", "complete_from_ms", "is_partial")),
        ("header", ctypes.c_uint8 * 16),
    )


class Texts:
    """Texts in the form in which the library reads them."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self._bytes = np.frombuffer(b"".join(texts), np.uint8)
        self._starts = np.array([0, *accumulate(map(len, texts))], np.int64)
        self.structure = self.of(0)

    def of(self, place: int) -> TextsStructure:
        """Return the structure of the texts from this one on."""
        return TextsStructure(self._bytes.ctypes.data, self._starts[place:].ctypes.data)


class Names:
    """The values of an item attribute in the form in which the library reads them."""

    def __init__(self, names: Sequence[str], hashes: I64) -> None:
        """Take the values by code, and their hashes."""
        self._texts = Texts([json_text(name) for name in names])
        self._order = np.argsort(hashes).astype(np.int64)
        self._hashes, self._sorted = hashes.astype(np.uint32), hashes[self._order].astype(np.uint32)
        arrays = (self._hashes, self._sorted, self._order)
        self.structure = NamesStructure(len(names), *(each.ctypes.data for each in arrays), self._texts.structure)


class Items:
    """The items whose ids are known, in the form in which the library reads them."""

    def __init__(self, attributes: Attributes) -> None:
        self._keys = np.ascontiguousarray(attributes.keys)
        self._texts = Texts([json_text(item) for item in attributes.ids])
        bits = max(len(self._keys).bit_length(), 1)
        buckets = (self._keys.view(np.uint64) ^ np.uint64(1 << 63)) >> np.uint64(64 - bits)
        self._buckets = np.searchsorted(buckets, np.arange(2**bits + 1, dtype=np.uint64)).astype(np.int64)
        self.structure = ItemsStructure(
            len(self._keys), 64 - bits, self._keys.ctypes.data, self._buckets.ctypes.data, self._texts.structure
        )
