"""Loads the compiled kernel of the feature state, `streams/core/features/kernel.cpp`."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from encoder.compiled import Kernel, load_library
from streams.core.features.structures import Functions
from streams.errors import CannotStart

FOLDER = Path(__file__).parent / "core" / "features"
KERNEL = Kernel(
    FOLDER / "kernel.cpp",
    tuple(
        FOLDER / name
        for name in ("parts.h", "columns.h", "add.h", "bits.h", "pack.h", "lanes.h", "complete.h", "values.h")
    ),
    "features cannot be computed",
)


class NoCompiler(CannotStart):
    """The kernel of the features cannot be built."""


@cache
def load_functions() -> Functions:
    """Return the kernel's functions, built if they are not cached; raise `NoCompiler`, with the reason in the log."""
    library = load_library(KERNEL, {})
    if library is None:
        raise NoCompiler("features need a C++ compiler", "the log has the reason", "install g++, or set CXX")
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    library.add_events.argtypes, library.add_events.restype = [pointer, pointer, pointer], None
    library.write_values.argtypes, library.write_values.restype = [pointer, pointer, pointer, whole], whole
    library.write_shares.argtypes, library.write_shares.restype = [pointer, pointer, pointer, whole, pointer], None
    library.pack_users.argtypes, library.pack_users.restype = [pointer, pointer, whole, pointer, whole, pointer], whole
    library.clear_users.argtypes, library.clear_users.restype = [pointer, pointer, whole], None
    library.unpack_users.argtypes, library.unpack_users.restype = [pointer, pointer, whole, pointer, pointer], whole
    functions: Functions = library
    return functions
