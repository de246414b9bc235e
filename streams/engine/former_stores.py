"""Local databases of partitions that have moved to other workers: deleted once nothing has used them for a named time.

A database is a cache of the changelog, and useful for a while: a partition that comes back continues from it. Kept for
ever it would fill the disk, and hold users who have asked to be forgotten since. Its age is the newest time of its
files, so it survives restarts of the worker and needs no record of its own.

Nothing that is in use is deleted. Partitions of this worker are left out, and so is everything while an assignment is
being negotiated. Other processes are kept out by RocksDB's own lock file, which is locked here for the deletion. This
process's own lock on an open database would be lost by that (POSIX), which is why open ones are never tried. The
folder is renamed before its files are deleted: a partition that returns in the meantime begins with a new one.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, Protocol

from streams.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

SWEEP_EVERY_S = 60.0
"""Longest interval between two looks at the folder; a short TTL shortens it."""
SWEEP_MIN_S = 0.5
DELETING = ".deleting"
"""Suffix of a folder whose deletion has begun; one that an interrupted deletion left is deleted by the next sweep."""
LOCK_FILE = "LOCK"


class Usage(Protocol):
    """Which partitions this process may have open; implemented by `streams.engine.partitions.Partitions`."""

    has_joined: bool

    def may_use(self, number: int) -> bool:
        """Return whether the partition's database is open here, or may be opened at any moment."""
        ...


class FormerStores:
    """Finds and deletes the databases of one application that this worker has not used for `ttl_ms`."""

    def __init__(
        self,
        data_dir: Path,
        changelog_topic: str,
        usage: Usage,
        metrics: Metrics,
        *,
        ttl_ms: int,
        now_ms: Callable[[], int],
    ) -> None:
        self._data_dir, self._usage, self._metrics = data_dir, usage, metrics
        self._ttl_ms, self._now_ms = ttl_ms, now_ms
        self._name = re.compile(re.escape(changelog_topic) + r"-(\d+)")

    async def run(self) -> NoReturn:
        """Sweep until cancelled: first when this worker has an assignment, then at intervals."""
        interval_s = min(SWEEP_EVERY_S, max(SWEEP_MIN_S, self._ttl_ms / 4_000))
        while True:
            await asyncio.sleep(interval_s if self._usage.has_joined else SWEEP_MIN_S)
            try:
                await self.sweep()
            except OSError as error:  # a full or failing disk; the next sweep tries again
                logger.warning("local databases of partitions that moved away could not be deleted: %r", error)

    async def sweep(self) -> int:
        """Delete what is old enough; return how many databases that were. Does nothing without an assignment."""
        deleted = 0
        for path in list(self._leftovers()):
            await asyncio.to_thread(shutil.rmtree, path)
        for number, path in list(self._stores()):
            if not self._is_former(number) or self._age_ms(path) < self._ttl_ms or (moved := self._claim(path)) is None:
                continue
            age_s = self._age_ms(moved) // 1_000
            await asyncio.to_thread(shutil.rmtree, moved)
            logger.info("deleted the local database of partition %d, which moved away: unused for %d s", number, age_s)
            self._metrics.former_stores_deleted.inc()
            deleted += 1
        if self._usage.has_joined:
            self._metrics.former_stores.set(sum(self._is_former(number) for number, _ in self._stores()))
        return deleted

    def _is_former(self, number: int) -> bool:
        return self._usage.has_joined and not self._usage.may_use(number)

    def _stores(self) -> Iterator[tuple[int, Path]]:
        """Yield partition number and path of every database of this application."""
        for path in self._data_dir.iterdir() if self._data_dir.is_dir() else ():
            if (named := self._name.fullmatch(path.name)) and path.is_dir() and not path.is_symlink():
                yield int(named[1]), path

    def _leftovers(self) -> Iterator[Path]:
        for path in self._data_dir.iterdir() if self._data_dir.is_dir() else ():
            if path.name.endswith(DELETING) and self._name.fullmatch(path.name.removesuffix(DELETING)):
                yield path

    def _age_ms(self, path: Path) -> int:
        """Return for how long nothing in the folder has changed."""
        newest_ns = path.stat().st_mtime_ns
        for each in os.scandir(path):
            with suppress(FileNotFoundError):
                newest_ns = max(newest_ns, each.stat().st_mtime_ns)
        return self._now_ms() - newest_ns // 1_000_000

    def _claim(self, path: Path) -> Path | None:
        """Rename the folder for its deletion; return None while another process has the database open.

        There is no await between the check that this process does not use it and the rename.
        """
        moved = path.with_name(path.name + DELETING)
        with _locked(path / LOCK_FILE) as is_free:
            if not is_free:
                return None
            path.rename(moved)
        return moved


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold RocksDB's lock of a database that is not open in this process; yield False if another process holds it."""
    try:
        file = path.open("r+b")
    except FileNotFoundError:  # never opened completely, or damaged: nobody has it open
        yield True
        return
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            yield False
        else:
            yield True
