"""One partition's durable state on local disk: RocksDB as a cache of the changelog partition.

A store holds the changelog's records under their own keys, and beside them

- `o`: the *changelog offset*: every record up to it is in the store. It is written in the last batch of a write, and
  in no other. A crash between batches leaves records that are newer than the offset says; reading the changelog from
  there writes the same records again, and nothing is read from the store before that has been done.
- `p` + user id: `due_ms` of each user with a deadline, so that deadlines are found without reading every user.

Files that cannot be read are noticed at once or in the middle of work. Then a file named `DAMAGED` is left beside them,
so that the next `open`, also after a crash, has the store rebuilt.

There is no write-ahead log. After a crash RocksDB returns to what was last flushed, a prefix of the batches, and with
it to an older changelog offset; the changelog has the rest, at most two write buffers of it.

`streams.storage.memory_store` keeps the same promises in memory, for simulations.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from rocksdict import (
    BlockBasedOptions,
    Cache,
    DbClosedError,
    DBCompressionType,
    Options,
    Rdict,
    WriteBatch,
    WriteBufferManager,
    WriteOptions,
)

from streams.core.layout import NEVER
from streams.errors import RebuildsPartition, StopsWorker
from streams.storage.codec import HEAD_PREFIX, MARK_KEY, CheckpointMark, deadline_of, decode_mark, had_deadline

RECORDS_PER_WRITE = 1_000
"""A write batch holds the GIL: 1,000 records are about 3 ms."""
SCAN_USERS = 10_000
OFFSET_KEY = b"o"
"""Key of the changelog offset; local only, like the deadlines."""
DEADLINE_PREFIX = b"p"
"""First byte of the key of a deadline; the user id follows."""
DAMAGED = "DAMAGED"
NUMBER = struct.Struct("<q")
"""How the local records hold their one number, an offset or a time."""

Record = tuple[bytes, bytes | None]


class StoreDamaged(RebuildsPartition):
    """The local files cannot be used: delete them (`PartitionStore.destroy`) and rebuild from the changelog."""


class StoreLocked(StopsWorker):
    """Another process has the store open; try again when it has ended."""


class StoreFailed(StopsWorker):
    """A read or write failed, for instance on a full disk; stops the worker, whose state the changelog has."""


class Store(Protocol):
    """What checkpoints, restores and reads need of a store."""

    @property
    def changelog_offset(self) -> int | None:
        """Every changelog record up to this offset is in the store; None when nothing was ever written."""
        ...

    def mark(self) -> CheckpointMark | None:
        """The mark of the last checkpoint in the store."""
        ...

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values of `keys`, None for what is not there."""
        ...

    def write_steps(self, records: Sequence[Record], changelog_offset: int) -> Iterator[None]:
        """Write in batches of at most `RECORDS_PER_WRITE`, one a step; the last carries the offset."""
        ...

    def pending(self) -> Iterator[tuple[bytes, int]]:
        """(user, due_ms) of users with a deadline; an entry may be outdated, a missing one never is."""
        ...


class PartitionStore:
    """The RocksDB store of one partition."""

    def __init__(self, db: Rdict) -> None:
        self._db = db
        self._write_options = WriteOptions()
        self._write_options.disable_wal = True
        value = self._reading(lambda: db.get(OFFSET_KEY))
        self._changelog_offset = None if value is None else NUMBER.unpack(value)[0]

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        cache: Cache | None = None,
        write_buffers: WriteBufferManager | None = None,
        write_buffer_bytes: int = 16 << 20,
    ) -> Self:
        """Open or create the store at `path`; `cache` and `write_buffers` are shared by all stores of a worker.

        Raises `StoreLocked` when another process holds it, `StoreDamaged` when its files are not usable.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        options = _options(cache or Cache(8 << 20), write_buffer_bytes)
        if write_buffers is not None:
            options.set_write_buffer_manager(write_buffers)
        if (path / DAMAGED).exists():
            raise StoreDamaged(f"store {path.name} could not be read before; rebuild it from the changelog")
        try:
            db = Rdict(str(path), options)
        except Exception as error:
            # rocksdict raises plain exceptions; RocksDB's text is all there is to tell them apart.
            if "/LOCK: " in str(error):
                raise StoreLocked(f"store {path.name} is in use: {error}; wait until its process has ended") from error
            if "no space" in str(error).lower():
                raise StoreFailed(f"store {path.name} cannot be opened: {error}; free disk space") from error
            raise StoreDamaged(f"store {path.name} cannot be opened: {error}; rebuild it from the changelog") from error
        try:
            return cls(db)
        except StoreDamaged:
            db.close()  # its lock, which whoever rebuilds the store needs
            raise

    @staticmethod
    def destroy(path: Path) -> None:
        """Delete the store's files, whatever is left of them."""
        shutil.rmtree(path, ignore_errors=True)

    @property
    def changelog_offset(self) -> int | None:
        return self._changelog_offset

    def mark(self) -> CheckpointMark | None:
        value = self._reading(lambda: self._db.get(MARK_KEY))
        return None if value is None else decode_mark(value)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """As `Store.get_many`; raises `StoreDamaged` when files cannot be read, and leaves the mark that says so."""
        return self._reading(lambda: self._db.get(list(keys))) if keys else []

    def write(self, records: Sequence[Record], changelog_offset: int) -> None:
        """Write all records and the offset up to which they reach."""
        for _ in self.write_steps(records, changelog_offset):
            pass

    def write_steps(self, records: Sequence[Record], changelog_offset: int) -> Iterator[None]:
        """As `write`, one batch a step, so that an event loop can do other things in between."""
        for begin in range(0, max(len(records), 1), RECORDS_PER_WRITE):
            batch = WriteBatch(raw_mode=True)
            for key, value in records[begin : begin + RECORDS_PER_WRITE]:
                put_record(batch, key, value)
            is_last = begin + RECORDS_PER_WRITE >= len(records)
            if is_last:
                batch.put(OFFSET_KEY, NUMBER.pack(changelog_offset))
            self._write(batch)
            if is_last:
                self._changelog_offset = changelog_offset
            yield

    def heads(self) -> Iterator[tuple[bytes, bytes]]:
        """(user, head value) of every user."""
        return ((key[1:], value) for key, value in self._scan(HEAD_PREFIX))

    def pending(self) -> Iterator[tuple[bytes, int]]:
        return ((key[1:], NUMBER.unpack(value)[0]) for key, value in self._scan(DEADLINE_PREFIX))

    def flush(self) -> None:
        """Make everything written so far survive a crash of this process."""
        self._db.flush()

    def close(self) -> None:
        """Flush and release the files and their lock; closing twice is harmless."""
        with suppress(DbClosedError):
            self._db.close()

    def _write(self, batch: WriteBatch) -> None:
        try:
            self._db.write(batch, self._write_options)
        except Exception as error:
            if "Corruption" in str(error):  # found by a compaction; the next open has the store rebuilt
                self._mark_damaged()
            raise StoreFailed(f"store cannot be written: {error}; check the disk") from error

    def _scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Records whose key begins with `prefix`. No iterator outlives a step: it would hold the lock past `close`."""
        start = prefix
        while page := self._reading(partial(self._page, start, prefix)):
            yield from page
            start = page[-1][0] + b"\x00"

    def _page(self, start: bytes, prefix: bytes) -> list[tuple[bytes, bytes]]:
        rows = self._db.iter()
        try:
            rows.seek(start)
            page: list[tuple[bytes, bytes]] = []
            while len(page) < SCAN_USERS and rows.valid() and rows.key()[:1] == prefix:
                page.append((rows.key(), rows.value()))
                rows.next()
            rows.status()  # raises where an unreadable block only looks like the end
            return page
        finally:
            del rows  # the traceback of a failure would hold it, and it the lock

    def _reading(self, read: Callable[[], Any]) -> Any:
        """What `read` returns; a failure marks the files as damaged."""
        try:
            return read()
        except DbClosedError:
            raise
        except Exception as error:
            self._mark_damaged()
            raise StoreDamaged(f"store cannot be read: {error}; rebuild it from the changelog") from error

    def _mark_damaged(self) -> None:
        with suppress(OSError):
            Path(self._db.path(), DAMAGED).touch()


class _Puts(Protocol):
    def put(self, key: bytes, value: bytes) -> None: ...
    def delete(self, key: bytes) -> None: ...


def put_record(batch: _Puts, key: bytes, value: bytes | None) -> None:
    """One changelog record, and for a head its entry in the index of deadlines."""
    if value is None:
        batch.delete(key)
        return
    batch.put(key, value)
    if key[:1] == HEAD_PREFIX:
        due_ms = deadline_of(value)
        if due_ms != NEVER:
            batch.put(DEADLINE_PREFIX + key[1:], NUMBER.pack(due_ms))
        elif had_deadline(value):
            batch.delete(DEADLINE_PREFIX + key[1:])


def _options(cache: Cache, write_buffer_bytes: int) -> Options:
    table = BlockBasedOptions()
    table.set_block_cache(cache)
    table.set_bloom_filter(10, False)
    table.set_cache_index_and_filter_blocks(True)
    table.set_pin_l0_filter_and_index_blocks_in_cache(True)
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_block_based_table_factory(table)
    options.set_compression_type(DBCompressionType.lz4())
    options.set_write_buffer_size(write_buffer_bytes)
    options.set_max_write_buffer_number(2)
    options.set_max_open_files(256)
    options.set_keep_log_file_num(2)
    return options
