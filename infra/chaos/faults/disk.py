"""Damage a worker's disk: truncated, altered and missing files, a lock held by another process, no space left."""

from __future__ import annotations

import fcntl
import os
import subprocess
from contextlib import suppress
from pathlib import Path

from infra.chaos.fault_context import TICK_S, FaultContext, Steps

NUMBER = 0
DISK_MB = 48
CHUNK = b"\0" * (1 << 20)


def sst_truncated(context: FaultContext) -> Steps:
    """Truncate a data file to half its size while the worker is down."""
    yield from _stop(context)
    files = sorted(_databases(context).glob("*/*.sst"), key=lambda file: file.stat().st_size)
    if files:
        os.truncate(files[-1], files[-1].stat().st_size // 2)
    context.run.supervisor.start(NUMBER)


def sst_altered(context: FaultContext) -> Steps:
    """Change bytes in the middle of each data file while the worker is down: it opens and cannot be read."""
    yield from _stop(context)
    alter_data_files(_databases(context))
    context.run.supervisor.start(NUMBER)


def alter_data_files(databases: Path) -> int:
    """Invert 64 bytes in each data file of a worker's databases; return the number of files."""
    files = list(databases.glob("*/*.sst"))
    for file in files:
        content = bytearray(file.read_bytes())
        middle = len(content) // 3
        content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
        file.write_bytes(content)
    return len(files)


def manifest_deleted(context: FaultContext) -> Steps:
    """Delete the list of data files while the worker is down."""
    yield from _stop(context)
    for file in context.rng.sample(sorted(_databases(context).glob("*/MANIFEST-*")), 1):
        file.unlink()
    context.run.supervisor.start(NUMBER)


def lock_held(context: FaultContext) -> Steps:
    """Lock the databases from another process while the worker starts, and release them some seconds later."""
    yield from _stop(context)
    locks = [file.open("r+b") for file in _databases(context).glob("*/LOCK")]
    try:
        for lock in locks:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        context.run.supervisor.start(NUMBER)
        yield context.rng.uniform(7.0, 11.0)
    finally:
        for lock in locks:
            lock.close()


def disk_full(context: FaultContext) -> Steps:
    """Fill a small disk under a worker, kill the worker, which then cannot start, and free the space."""
    supervisor, folder = context.run.supervisor, context.deployment.data_dir(NUMBER)
    supervisor.hold(NUMBER)
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)], check=True)
    try:
        supervisor.start(NUMBER)
        yield from context.until_ready(NUMBER)
        yield 1.0
        _fill(folder / "filler")
        yield 3.0
        supervisor.kill(NUMBER)
        yield 8.0
        (folder / "filler").unlink()
        yield from context.until_ready(NUMBER)
    finally:
        supervisor.hold(NUMBER)
        subprocess.run(["umount", "-l", str(folder)], check=True)
        supervisor.start(NUMBER)


def can_mount() -> bool:
    """Return whether this process may mount a small disk, as `disk_full` needs."""
    return os.geteuid() == 0


def _fill(path: Path) -> None:
    with suppress(OSError), path.open("wb", buffering=0) as filler:
        while filler.write(CHUNK):
            pass


def _databases(context: FaultContext) -> Path:
    return context.deployment.data_dir(NUMBER)


def _stop(context: FaultContext) -> Steps:
    """Terminate the worker and wait until it has ended, so that all its state is in files."""
    context.run.supervisor.retire(NUMBER)
    while not context.run.supervisor.is_down(NUMBER):
        yield TICK_S
    context.run.supervisor.tick()
