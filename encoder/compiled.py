"""Compile a kernel in C++ into a shared library and load it; a C++ compiler is all that is needed.

The library is built at first use for the processor at hand. It is kept in the cache folder (`$XDG_CACHE_HOME` or
`~/.cache`) under a hash of the sources, the definitions, the compiler and the processor's features. The compiler writes
to a temporary file that is then renamed, so workers that start together never load half a library.

A library is code that runs with the worker's rights. One is therefore loaded only from a folder and a file that belong
to this user or to root and that no other user may write. A file of another kind is compiled again; a folder of another
kind is not used, and the library is compiled into a private folder that is removed once it is loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")
BUILD_TIMEOUT_S = 120
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kernel:
    """The sources of a library."""

    source: Path
    headers: tuple[Path, ...]
    without: str
    """What happens without the library, as part of a sentence in the log."""


def load_library(kernel: Kernel, definitions: Mapping[str, int | str]) -> ctypes.CDLL | None:
    """Load the library for these definitions, building it if needed; return None and log why if that fails."""
    compiler = find_compiler()
    if compiler is None:
        log.warning("no C++ compiler found: %s; install g++", kernel.without)
        return None
    try:
        return _loaded(compiler, kernel, definitions)
    except (OSError, subprocess.SubprocessError) as error:
        detail = " ".join(str(getattr(error, "stderr", "") or error).split())[:300]
        log.warning(
            "cannot build the kernel: %s; %s; install g++ or set CXX to a working compiler", detail, kernel.without
        )
        return None


def find_compiler() -> str | None:
    """Return the path of the compiler named by `CXX`, or else of the first common one on the path."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), None)


def _loaded(compiler: str, kernel: Kernel, definitions: Mapping[str, int | str]) -> ctypes.CDLL:
    """Load the library from the cache folder, or from a private one where the cache folder cannot be used."""
    try:
        return ctypes.CDLL(str(build_library(compiler, kernel, definitions, cache_folder())))
    except OSError as error:
        log.warning("the cache of compiled kernels is not used: %s; the kernel is compiled at each start", error)
    with tempfile.TemporaryDirectory(prefix="streamformer-kernel-") as folder:
        return ctypes.CDLL(str(build_library(compiler, kernel, definitions, Path(folder))))


def build_library(compiler: str, kernel: Kernel, definitions: Mapping[str, int | str], folder: Path) -> Path:
    """Return the library's file, compiled if it is not in `folder`; raises `OSError` or `SubprocessError`."""
    command = [compiler, *FLAGS, *native_flags(compiler), *(f"-D{name}={value}" for name, value in definitions.items())]
    sources = b"\0".join(path.read_bytes() for path in (kernel.source, *kernel.headers))
    identity = "\0".join([*command, compiler_version(compiler), processor_features()])
    name = hashlib.sha256(sources + b"\0" + identity.encode()).hexdigest()[:24] + ".so"
    path = folder / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if reason := distrust(folder):
        raise PermissionError(f"{folder} {reason}; remove it, or set XDG_CACHE_HOME to a folder of your own")
    if path.exists() and (reason := distrust(path)):
        log.warning("a compiled kernel is not loaded but compiled again: %s %s", path, reason)
        path.unlink()
    if not path.exists():
        compile_to(path, [*command, str(kernel.source)])
    return path


def distrust(path: Path) -> str | None:
    """Return why code at `path` must not be loaded; None if only this user and root can have written it."""
    found = path.lstat()
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by other users (mode {stat.S_IMODE(found.st_mode):o})"
    return "is a link" if stat.S_ISLNK(found.st_mode) else None


def compile_to(path: Path, command: list[str]) -> None:
    """Run a compiler, its options and source complete but for the output: into a temporary file, renamed to `path`."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        beside = Path(folder) / path.name
        subprocess.run(
            [*command, "-o", str(beside)],
            check=True,
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_S,
        )
        beside.chmod(0o700)  # regardless of the umask
        beside.replace(path)


def cache_folder() -> Path:
    """Return the folder that built libraries are kept in; raises `OSError` where this user has no home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # a container whose user id has no entry in /etc/passwd, and no HOME
        raise FileNotFoundError(f"{error}") from None
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
