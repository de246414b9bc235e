"""Databases of partitions that moved away, in a real folder under a clock moved by hand."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from streams.engine.former_stores import FormerStores
from streams.storage.store import PartitionStore
from streams.telemetry.metrics import Metrics

CHANGELOG = "app-user-sequences-changelog"
TTL_MS = 1_000
HOLD = "import sys\nfrom rocksdict import Rdict\ndb = Rdict(sys.argv[1])\nprint('open', flush=True)\nsys.stdin.read()"


class Usage:
    """The partitions of a worker, as a set."""

    def __init__(self, *mine: int) -> None:
        self.has_joined, self.mine = True, set(mine)

    def may_use(self, number: int) -> bool:
        """Return whether the partition is in the set."""
        return number in self.mine


class Site:
    """A data folder with databases of four partitions, and a clock that begins when they were last written."""

    def __init__(self, folder: Path, ttl_ms: int = TTL_MS) -> None:
        self.folder, self.usage, self.metrics = folder, Usage(0, 1), Metrics()
        for number in range(4):
            PartitionStore.open(self.path(number)).close()
        self.now_ms = time.time_ns() // 1_000_000 + 1
        self.stores = FormerStores(
            folder, CHANGELOG, self.usage, self.metrics, ttl_ms=ttl_ms, now_ms=lambda: self.now_ms
        )

    def path(self, number: int) -> Path:
        """Return the folder of a partition's database."""
        return self.folder / f"{CHANGELOG}-{number}"

    def sweep(self) -> list[int]:
        """Sweep once; return which of the four databases are left."""
        asyncio.run(self.stores.sweep())
        return [number for number in range(4) if self.path(number).exists()]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Return a folder from which partitions 2 and 3 have moved away."""
    return Site(tmp_path)


def test_a_database_is_deleted_once_it_is_unused_for_the_ttl(site: Site) -> None:
    """Databases of partitions that moved away go at the TTL, not before; those of owned ones stay however old."""
    site.now_ms += TTL_MS - 500
    assert site.sweep() == [0, 1, 2, 3]
    assert site.metrics.former_stores.value() == 2
    site.now_ms += 50 * TTL_MS
    assert site.sweep() == [0, 1]
    assert site.metrics.former_stores.value() == 0
    assert site.metrics.former_stores_deleted.value() == 2


def test_the_age_is_that_of_the_newest_file(site: Site) -> None:
    """A database that was written later than its folder was changed is as young as its newest file."""
    site.now_ms += 10 * TTL_MS
    os.utime(site.path(2) / "CURRENT", ns=(site.now_ms * 1_000_000, site.now_ms * 1_000_000))
    assert site.sweep() == [0, 1, 2]


def test_a_ttl_of_zero_deletes_at_the_first_sweep(tmp_path: Path) -> None:
    """With 0 nothing is kept of partitions that moved away."""
    assert Site(tmp_path, ttl_ms=0).sweep() == [0, 1]


def test_nothing_is_deleted_without_an_assignment(site: Site) -> None:
    """At start and during a rebalance no partition is assigned, and yet none has moved away."""
    site.now_ms += 10 * TTL_MS
    site.usage.has_joined = False
    site.usage.mine.clear()
    assert site.sweep() == [0, 1, 2, 3]


def test_a_database_that_another_process_has_open_is_left_alone(site: Site) -> None:
    """RocksDB's lock protects it until that process ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(site.path(2))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        site.now_ms += 10 * TTL_MS
        assert site.sweep() == [0, 1, 2]
        other.stdin.close()
        other.wait(10)
    site.now_ms += 10 * TTL_MS
    assert site.sweep() == [0, 1]


def test_an_owned_database_stays_locked(site: Site) -> None:
    """A sweep never touches the lock file of a database that this process has open, which would release the lock."""
    store = PartitionStore.open(site.path(1))
    site.now_ms += 10 * TTL_MS
    assert site.sweep() == [0, 1]
    code = "import sys\nfrom rocksdict import Rdict\nRdict(sys.argv[1])"
    other = subprocess.run([sys.executable, "-c", code, str(site.path(1))], capture_output=True, check=False)
    assert other.returncode
    assert b"LOCK" in other.stderr
    store.close()


def test_only_databases_of_this_application_are_deleted(site: Site) -> None:
    """Other applications, files and names in the folder are left alone; an interrupted deletion is completed."""
    others = [site.folder / name for name in ("faust", f"other-{CHANGELOG}-2", f"{CHANGELOG}-2.bak", f"{CHANGELOG}-x")]
    leftover = site.folder / f"{CHANGELOG}-2.deleting"
    for path in (*others, leftover):
        path.mkdir()
        (path / "file").touch()
    site.now_ms += 10 * TTL_MS
    assert site.sweep() == [0, 1]
    assert all(path.exists() for path in others)
    assert not leftover.exists()
