"""From `kernel.cpp` to a loaded library, with nothing but a C++ compiler.

Built at first use for the machine at hand and kept in the cache folder (`$XDG_CACHE_HOME` or `~/.cache`), under a hash
of the source, the definitions, the compiler and the processor's features; written beside and renamed, so that workers
that start together never load half a file.
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
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")
BUILD_TIMEOUT_S = 120
log = logging.getLogger(__name__)


def load_library(definitions: Mapping[str, int | str]) -> ctypes.CDLL | None:
    """The library for these definitions, built if need be; None, with the reason logged, where that cannot be done."""
    compiler = find_compiler()
    if compiler is None:
        log.warning("no c++ compiler found: the encoder runs on plain torch, several times slower; install g++")
        return None
    try:
        return ctypes.CDLL(str(built(compiler, definitions)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = " ".join(str(getattr(error, "stderr", "") or error).split())[:300]
        log.warning("kernel cannot be built: %s; the encoder runs on plain torch, several times slower", detail)
        return None


def find_compiler() -> str | None:
    """The compiler named by `CXX`, else the first of the usual ones on the path."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), None)


def built(compiler: str, definitions: Mapping[str, int | str]) -> Path:
    """The library's file; raises `OSError` or `SubprocessError` when it cannot be made."""
    command = [compiler, *FLAGS, *native_flags(compiler), *(f"-D{name}={value}" for name, value in definitions.items())]
    source = SOURCE.read_bytes()
    identity = "\0".join([*command, compiler_version(compiler), processor_features()])
    name = hashlib.sha256(source + b"\0" + identity.encode()).hexdigest()[:24] + ".so"
    path = cache_folder() / name
    if not path.exists():
        compile_to(path, command)
    return path


def compile_to(path: Path, command: list[str]) -> None:
    """Compile into a file of its own and rename it to `path`."""
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
    """Where built libraries are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "streamformer" / "kernels"


@cache
def native_flags(compiler: str) -> list[str]:
    """The compiler's option for "this very processor"; none where it has none."""
    for flag in ("-march=native", "-mcpu=native"):
        probe = [compiler, flag, "-x", "c++", "-fsyntax-only", os.devnull]
        if subprocess.run(probe, capture_output=True, timeout=BUILD_TIMEOUT_S).returncode == 0:
            return [flag]
    return []


@cache
def compiler_version(compiler: str) -> str:
    """What the compiler says of itself."""
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S).stdout


@cache
def processor_features() -> str:
    """The processor's features as Linux lists them, else the name of its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.machine() + flags
