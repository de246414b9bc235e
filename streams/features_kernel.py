"""Loads the compiled kernel of the feature state, `streams/core/features/kernel.cpp`."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from encoder.compiled import Kernel, load_library
from streams.core.features.native import AddEvents

KERNEL = Kernel(
    Path(__file__).parent / "core" / "features" / "kernel.cpp",
    (),
    "features are computed by numpy, several times slower",
)


@cache
def load_kernel() -> AddEvents | None:
    """Return the kernel's function, built if need be; None, with the reason in the log, if it cannot be built."""
    library = load_library(KERNEL, {})
    if library is None:
        return None
    add_events: AddEvents = library.add_events
    library.add_events.argtypes, library.add_events.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p], None
    return add_events
