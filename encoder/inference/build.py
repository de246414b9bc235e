"""Compile `kernel.cpp` into a shared library and load it; a C++ compiler is all that is needed.

The library is built at first use for the processor at hand. It is kept in the cache folder (`$XDG_CACHE_HOME` or
`~/.cache`) under a hash of the sources, the definitions, the compiler and the processor's features. The compiler writes
to a temporary file that is then renamed, so workers that start together never load half a library.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("kernel.cpp")
HEADERS = (SOURCE.with_name("vectors.h"), SOURCE.with_name("attention.h"))
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")
BUILD_TIMEOUT_S = 120
log = logging.getLogger(__name__)


def load_library(definitions: Mapping[str, int | str]) -> ctypes.CDLL | None:
    """Load the library for these definitions, building it if needed; return None and log why if that fails."""
    compiler = find_compiler()
    if compiler is None:
        log.warning("no C++ compiler found: the encoder runs on plain torch, several times slower; install g++")
        return None
    try:
        return ctypes.CDLL(str(build_library(compiler, definitions)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = " ".join(str(getattr(error, "stderr", "") or error).split())[:300]
        log.warning(
            "cannot build the kernel: %s; the encoder runs on plain torch, several times slower; "
            "install g++ or set CXX to a working compiler",
            detail,
        )
        return None


def find_compiler() -> str | None:
    """Return the path of the compiler named by `CXX`, or else of the first common one on the path."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), None)


def build_library(compiler: str, definitions: Mapping[str, int | str]) -> Path:
    """Return the library's file, compiled if it is not cached; raises `OSError` or `SubprocessError`."""
    command = [compiler, *FLAGS, *native_flags(compiler), *(f"-D{name}={value}" for name, value in definitions.items())]
    sources = b"\0".join(path.read_bytes() for path in (SOURCE, *HEADERS))
    identity = "\0".join([*command, compiler_version(compiler), processor_features()])
    name = hashlib.sha256(sources + b"\0" + identity.encode()).hexdigest()[:24] + ".so"
    path = cache_folder() / name
    if not path.exists():
        compile_to(path, command)
    return path


def compile_to(path: Path, command: list[str]) -> None:
    """Compile into a temporary file and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        beside = Path(folder) / path.name
        subprocess.run(
            [*command, str(SOURCE), "-o", str(beside)],
            check=True,
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_S,
        )
        beside.replace(path)


def cache_folder() -> Path:
    """Return the folder that built libraries are kept in."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "streamformer" / "kernels"


@cache
def native_flags(compiler: str) -> list[str]:
    """Return the option that makes this compiler target the processor it runs on, or nothing if it has none."""
    for flag in ("-march=native", "-mcpu=native"):
        probe = [compiler, flag, "-x", "c++", "-fsyntax-only", os.devnull]
        if subprocess.run(probe, capture_output=True, timeout=BUILD_TIMEOUT_S).returncode == 0:
            return [flag]
    return []


@cache
def compiler_version(compiler: str) -> str:
    """Return what `compiler --version` prints."""
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S).stdout


@cache
def processor_features() -> str:
    """Return the architecture's name, followed by the processor's features where Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.machine() + flags
