"""The compiled kernel, `kernel.cpp`: adds events, writes values, packs and unpacks users, each in one call for all.

Loading the library is not done here: see `streams.features_kernel`.

Shapes: U users, E events.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from encoder.actions.columns import ACTION_DTYPE, Actions
from encoder.arrays import F64, I64, Bool
from streams.core.features.binding import Binding
from streams.core.features.selection import Selection
from streams.core.features.structures import Functions, MomentsStructure, SourceStructure

ROOM_BYTES = 2**20
"""Size of the output at first; twice as much whenever that is not enough."""


class Kernel:
    """The functions of the compiled library, for one feature state."""

    def __init__(self, functions: Functions, binding: Binding, selection: Selection) -> None:
        self._functions, self._binding, self._selection = functions, binding, selection
        self._state, self._selected = ctypes.byref(binding.structure), ctypes.byref(selection.structure)
        self._estimated: dict[bytes, tuple[str, ...]] = {}
        """Names of the estimates of a user, by the bytes of the user's row in the matrix that the library fills."""
        self._out = np.empty(ROOM_BYTES, np.uint8)
        """Kept, because memory of that size is given back to the operating system when it is freed."""

    def add(self, rows: I64, actions: Actions, values: F64 | None) -> None:
        """Add events [E] of users in `rows` [E], in order of arrival; `values` [E] is NaN where an event has none."""
        rows, actions = np.ascontiguousarray(rows, np.int64), np.ascontiguousarray(actions, ACTION_DTYPE)
        numbers = None if values is None else np.ascontiguousarray(values, np.float64)
        address = None if numbers is None else numbers.ctypes.data
        source = SourceStructure(len(rows), rows.ctypes.data, actions.ctypes.data, address)
        self._functions.add_events(self._state, self._selected, ctypes.byref(source))

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
