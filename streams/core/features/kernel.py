"""The compiled kernel, `kernel.cpp`: adds events, writes values, packs and unpacks users, each in one call for all.

Loading the library is not done here: see `streams.features_kernel`.

Shapes: U users, E events.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from encoder.arrays import F64, I32, I64, U32, Bool
from streams.core.features.binding import Binding
from streams.core.features.structures import BatchStructure, Functions, MomentsStructure

ROOM_BYTES = 2**20
"""Size of the output at first; twice as much whenever that is not enough."""


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
    ids: U32
    """[IDS, E], hashed (`distinct.hashed`)."""
    groups: I32
    """[attributes, E], codes of the values, -1 where there is none."""


class Kernel:
    """The functions of the compiled library, for one feature state."""

    def __init__(self, functions: Functions, binding: Binding) -> None:
        self._functions, self._binding = functions, binding
        self._state = ctypes.byref(binding.structure)
        self._estimated: dict[bytes, tuple[str, ...]] = {}
        """Names of the estimates of a user, by the bytes of the user's row in the matrix that the library fills."""
        self._out = np.empty(ROOM_BYTES, np.uint8)
        """Kept, because memory of that size is given back to the operating system when it is freed."""

    def add(self, events: Events) -> None:
        """Add events."""
        columns = (events.rows, events.times_ms, events.passes, events.numbers, events.items, events.ids, events.groups)
        contiguous = [np.ascontiguousarray(column) for column in columns]
        count = len(events.rows)
        batch = BatchStructure(count, count, *(column.ctypes.data for column in contiguous))
        self._functions.add_events(self._state, ctypes.byref(batch))

    def values(self, rows: I64, as_of_ms: I64) -> tuple[list[bytes], I64, list[tuple[str, ...]]]:
        """Return the values of users [U] as JSON objects, until when each holds, and the names of the estimates."""
        rows, as_of_ms, count = np.ascontiguousarray(rows), np.ascontiguousarray(as_of_ms), len(rows)
        ends, until_ms = np.zeros(count, np.int64), np.zeros(count, np.int64)
        estimates = np.zeros((count, len(self._binding.estimates)), np.bool_)
        arrays = (rows, as_of_ms, ends, until_ms, estimates)
        moments = MomentsStructure(count, estimates.shape[1], *(each.ctypes.data for each in arrays))

        def write(out: int, size: int) -> int:
            return self._functions.write_values(self._state, ctypes.byref(moments), out, size)

        return self._written(write, ends), until_ms, self._names_of(estimates)

    def shares(self, rows: I64, as_of_ms: I64) -> I64:
        """Return which share of its window each feature of users has seen [U, F], in parts of `WHOLE`."""
        rows, as_of_ms = np.ascontiguousarray(rows), np.ascontiguousarray(as_of_ms)
        shares = np.zeros((len(rows), self._binding.structure.field_count), np.int64)
        self._functions.write_shares(self._state, rows.ctypes.data, as_of_ms.ctypes.data, len(rows), shares.ctypes.data)
        return shares

    def pack(self, rows: I64) -> list[bytes]:
        """Return the state of users [U], each as bytes that `unpack` reads."""
        rows, ends = np.ascontiguousarray(rows), np.zeros(len(rows), np.int64)

        def write(out: int, size: int) -> int:
            return self._functions.pack_users(self._state, rows.ctypes.data, len(rows), out, size, ends.ctypes.data)

        return self._written(write, ends)

    def unpack(self, rows: I64, packed: Sequence[bytes]) -> int:
        """Read users into `rows` [U], which must be cleared; return the first that is damaged, -1 if there is none.

        All bytes must begin with the header of the binding.
        """
        data = np.frombuffer(b"".join([*packed, bytes(8)]), np.uint8)  # the kernel may read 8 bytes beyond
        rows, ends = np.ascontiguousarray(rows), np.cumsum([len(each) for each in packed], dtype=np.int64)
        return self._functions.unpack_users(
            self._state, rows.ctypes.data, len(rows), data.ctypes.data, ends.ctypes.data
        )

    def clear(self, rows: I64) -> None:
        """Forget the users in these rows."""
        rows = np.ascontiguousarray(rows)
        self._functions.clear_users(self._state, rows.ctypes.data, len(rows))

    def _written(self, write: Callable[[int, int], int], ends: I64) -> list[bytes]:
        """Return what `write` writes for each user, given room and its size; it fills `ends` and returns the size."""
        while (size := write(self._out.ctypes.data, len(self._out))) < 0:
            self._out = np.empty(2 * len(self._out), np.uint8)
        written = self._out[:size].tobytes()
        return [written[low:high] for low, high in pairwise([0, *ends.tolist()])]

    def _names_of(self, estimates: Bool) -> list[tuple[str, ...]]:
        """Return the names of each user's estimates [U]."""
        names, found = self._binding.estimates, estimates.tobytes()
        if not estimates.any():
            return [()] * len(estimates)
        users = [found[start : start + len(names)] for start in range(0, len(found), len(names))]
        for each in set(users) - self._estimated.keys():
            self._estimated[each] = tuple(name for name, is_one in zip(names, each, strict=True) if is_one)
        return [self._estimated[each] for each in users]
