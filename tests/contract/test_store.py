"""The contract of a store, on RocksDB and in memory; and the failures that only files on disk can have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from streams.core.layout import NEVER, StateLimits, new_headers
from streams.storage.codec import CheckpointMark, encode_mark, head_key, seal
from streams.storage.memory_store import MemoryStore
from streams.storage.store import NO_NOTE, RECORDS_PER_WRITE, PartitionStore, Record, StoreDamaged, StoreLocked

LIMITS = StateLimits()
AnyStore = PartitionStore | MemoryStore


@pytest.fixture(params=["rocksdb", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AnyStore]:
    """Yield an empty store of each kind."""
    if request.param == "memory":
        yield MemoryStore()
        return
    opened = PartitionStore.open(tmp_path / "store")
    yield opened
    opened.close()


def head(user: bytes, *, due_ms: int = NEVER, had_deadline: bool = False) -> Record:
    """Return a head record without actions."""
    header = new_headers(1, LIMITS)
    header["due_ms"], header["flags"] = due_ms, had_deadline
    return head_key(user), seal(head_key(user), header.tobytes())


def test_a_written_value_is_read(store: AnyStore) -> None:
    """Values are returned by key, None for missing and deleted ones."""
    store.write([(b"ca\x00", b"1"), (b"cb\x00", b"2")], 10)
    store.write([(b"ca\x00", None), (b"cc\x00", b"\x00" * 600)], 12)
    assert store.get_many([b"ca\x00", b"cb\x00", b"cc\x00", b"cx\x00"]) == [None, b"2", b"\x00" * 600, None]
    assert store.get_many([]) == []


def test_a_new_store_is_empty(store: AnyStore) -> None:
    """An empty store has no changelog offset, no mark, no users and no deadlines."""
    assert (store.changelog_offset, store.mark(), list(store.heads()), list(store.pending())) == (None, None, [], [])
    assert store.log_id == ""


def test_notes_are_kept_apart_and_deleted_together(store: AnyStore) -> None:
    """The newest offset of a user counts; notes are no users, deadlines or marks, and nothing else goes with them."""
    store.claim("cluster/topic-1")
    store.write([head(b"ann", due_ms=7)], 3)
    store.note([b"ann", b"bob"], [5, 6])
    store.note([b"bob", b"ann"], [4, 9])
    assert store.noted([b"ann", b"bob", b"cat"]) == [9, 6, NO_NOTE]
    for _ in range(2):
        assert [user for user, _ in store.heads()] == [b"ann"]
        assert list(store.pending()) == [(b"ann", 7)]
        assert (store.changelog_offset, store.log_id, store.mark()) == (3, "cluster/topic-1", None)
        store.drop_notes()
    assert store.noted([b"ann", b"bob"]) == [NO_NOTE, NO_NOTE]


def test_a_deleted_head_takes_its_deadline_along(store: AnyStore) -> None:
    """An expired user leaves no entry in the index; pages of heads follow each other in order of user id."""
    store.write([head(user, due_ms=7) for user in (b"a", b"ab", b"b", b"c")], 3)
    assert [user for user, _ in store.heads_after(b"", 3)] == [b"a", b"ab", b"b"]
    assert [user for user, _ in store.heads_after(b"b", 3)] == [b"c"]
    store.write([(head_key(b"ab"), None)], 4)
    assert [user for user, _ in store.heads_after(b"a", 3)] == [b"b", b"c"]
    assert [user for user, _ in store.pending()] == [b"a", b"b", b"c"]


def test_the_log_id_is_kept(store: AnyStore) -> None:
    """The identity of the changelog is read back, and is no user, deadline or mark."""
    store.claim("cluster/topic-1")
    store.claim("cluster/topic-2")
    store.write([head(b"a")], 3)
    assert store.log_id == "cluster/topic-2"
    assert (store.mark(), [user for user, _ in store.heads()], list(store.pending())) == (None, [b"a"], [])


def test_offset_comes_with_the_last_batch(store: AnyStore) -> None:
    """During a write the offset is that of the previous write; an empty write moves it, too."""
    store.write([], 4)
    records = [(b"c%05d\x00" % index, b"x") for index in range(2 * RECORDS_PER_WRITE + 1)]
    offsets = [store.changelog_offset for _ in store.write_steps(records, 9_000)]
    assert offsets == [4, 4, 9_000]
    assert store.get_many([records[0][0], records[-1][0]]) == [b"x", b"x"]


def test_interrupted_write_keeps_the_old_offset(store: AnyStore) -> None:
    """After a crash between batches, records may be newer than the offset, never older."""
    store.write([(b"ca\x00", b"old")], 4)
    steps = store.write_steps([(b"ca\x00", b"new")] * (RECORDS_PER_WRITE + 1), 9)
    next(steps)
    assert (store.get_many([b"ca\x00"]), store.changelog_offset) == ([b"new"], 4)


def test_mark_is_that_of_the_last_checkpoint(store: AnyStore) -> None:
    """The mark record of the last checkpoint is read back."""
    store.write([encode_mark(CheckpointMark(5, 7))], 1)
    store.write([encode_mark(CheckpointMark(6, 9))], 2)
    assert store.mark() == CheckpointMark(6, 9)


def test_deadlines_are_indexed(store: AnyStore) -> None:
    """Users with a deadline are found with it; users whose deadline was removed are not."""
    store.write([head(b"a", due_ms=500), head(b"b"), head(b"c", due_ms=-3)], 3)
    assert sorted(store.pending()) == [(b"a", 500), (b"c", -3)]
    store.write([head(b"a", had_deadline=True), head(b"c", due_ms=8, had_deadline=True)], 5)
    assert sorted(store.pending()) == [(b"c", 8)]
    assert [user for user, _ in store.heads()] == [b"a", b"b", b"c"]


def test_scan_crosses_page_borders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan over several pages yields every user once, also ids that are prefixes of one another."""
    monkeypatch.setattr("streams.storage.store.SCAN_USERS", 3)
    users = sorted([b"", b"a", b"aa", b"a\x00", b"b", b"\xff", b"\xff\xff"])
    store = PartitionStore.open(tmp_path / "store")
    store.write([head(user, due_ms=1) for user in users], 1)
    assert [user for user, _ in store.heads()] == users
    assert [user for user, _ in store.pending()] == users
    store.close()


def test_reopened_store_has_everything(tmp_path: Path) -> None:
    """A reopened store has all records, the offset and the mark."""
    store = PartitionStore.open(tmp_path / "store")
    store.write([head(b"a", due_ms=500), encode_mark(CheckpointMark(5, 7))], 77)
    store.close()
    store.close()
    again = PartitionStore.open(tmp_path / "store")
    assert (again.changelog_offset, again.mark()) == (77, CheckpointMark(5, 7))
    assert list(again.pending()) == [(b"a", 500)]
    again.close()


def test_held_lock_is_reported(tmp_path: Path) -> None:
    """A store that is open elsewhere cannot be opened; the error text advises to wait."""
    store = PartitionStore.open(tmp_path / "store")
    with pytest.raises(StoreLocked, match="wait until its process has ended"):
        PartitionStore.open(tmp_path / "store")
    store.close()
    PartitionStore.open(tmp_path / "store").close()


def test_close_releases_the_lock_with_a_scan_half_read(tmp_path: Path) -> None:
    """A scan that was not read to its end does not keep the files locked."""
    store = PartitionStore.open(tmp_path / "store")
    store.write([head(b"%d" % index, due_ms=1) for index in range(10)], 1)
    half_read = store.pending()
    assert len(list(islice(half_read, 3))) == 3
    store.close()
    PartitionStore.open(tmp_path / "store").close()


def _filled(path: Path) -> None:
    store = PartitionStore.open(path)
    rng = np.random.default_rng(1)
    store.write([(b"c%06d\x00" % index, rng.bytes(400)) for index in range(5_000)], 1)
    store.close()


def test_missing_manifest_is_damage(tmp_path: Path) -> None:
    """A store without its MANIFEST is damaged; after `destroy` it opens again, empty."""
    path = tmp_path / "store"
    _filled(path)
    for manifest in path.glob("MANIFEST*"):
        manifest.unlink()
    with pytest.raises(StoreDamaged, match="rebuild it from the changelog"):
        PartitionStore.open(path)
    PartitionStore.destroy(path)
    again = PartitionStore.open(path)
    assert again.changelog_offset is None
    again.close()


@pytest.mark.parametrize("fault", ["truncated", "overwritten"])
def test_broken_data_file_is_damage(tmp_path: Path, fault: str) -> None:
    """A truncated or overwritten data file is detected at the latest when it is read; no wrong value is returned."""
    path = tmp_path / "store"
    _filled(path)
    files = list(path.glob("*.sst"))
    assert files
    for file in files:
        if fault == "truncated":
            os.truncate(file, file.stat().st_size // 2)
        else:
            with file.open("r+b") as data:
                data.seek(0)
                data.write(os.urandom(file.stat().st_size // 2))

    def read_all() -> None:
        store = PartitionStore.open(path)
        try:
            store.get_many([b"c%06d\x00" % index for index in range(5_000)])
        finally:
            store.close()

    with pytest.raises(StoreDamaged):
        read_all()


WRITER = """
import sys
from pathlib import Path
from streams.storage.store import PartitionStore
store = PartitionStore.open(Path(sys.argv[1]), write_buffer_bytes=1 << 20)
for checkpoint in range(10**6):
    records = [(b"c%05d\\x00" % index, b"%d" % checkpoint + b" " * 400) for index in range(3_000)]
    store.write(records, checkpoint)
    print(checkpoint, flush=True)
"""


def test_altered_block_is_damage_and_never_a_short_scan(tmp_path: Path) -> None:
    """A block with a wrong checksum makes a scan fail instead of ending early; the next open fails, too."""
    path = tmp_path / "store"
    store = PartitionStore.open(path)
    rng = np.random.default_rng(3)
    store.write([head(b"%06d" % number, due_ms=int(rng.integers(1, 2**40))) for number in range(20_000)], 5)
    store.close()
    (file,) = path.glob("*.sst")
    content = bytearray(file.read_bytes())
    at = len(content) // 3
    content[at : at + 64] = bytes(byte ^ 0xFF for byte in content[at : at + 64])
    file.write_bytes(content)
    store = PartitionStore.open(path)
    with pytest.raises(StoreDamaged, match="rebuild it from the changelog"):
        list(store.pending()) + list(store.heads())
    store.close()
    with pytest.raises(StoreDamaged, match="could not be read earlier"):
        PartitionStore.open(path)
    PartitionStore.destroy(path)
    assert PartitionStore.open(path).changelog_offset is None


def test_kill_leaves_a_store_no_older_than_its_offset(tmp_path: Path) -> None:
    """After `kill -9` a store opens, and no record is older than the changelog offset."""
    path = tmp_path / "store"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) == 12:
            break
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    store = PartitionStore.open(path)
    offset = store.changelog_offset
    assert offset is not None
    values = store.get_many([b"c%05d\x00" % index for index in range(3_000)])
    assert min(int((value or b"-1").split()[0]) for value in values) >= offset
    store.close()
