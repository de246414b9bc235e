"""The durable state of one partition on local disk: RocksDB as a cache of the changelog partition.

A store holds the changelog's records under their own keys, and five kinds of local records:

- `o`: the *changelog offset*. Every record up to it is in the store. It is written with the last batch of a write only:
  a crash between batches leaves records that are newer than the offset. The restore then reads the changelog from the
  offset and writes the same records again, before anything is read from the store.
- `l`: the *log id*, which identifies the changelog topic that the records come from. It is written before any record. A
  store written before version 2 of the mark has none.
- `p` + user id: `due_ms` of each user with a deadline, so that deadlines are found without reading every user; and
  `q` + user id: the same for the refresh of a user's features.
- `n` + user id: a *note* of the newest source offset that the output topic holds of a user without a record here. Notes
  are made when the partition is acquired, and mean nothing later than the replay that they are for.

Unreadable files are noticed on opening or later, while the store is in use. A file named `DAMAGED` is then left beside
them, so that the next `open`, even after a crash, raises and the store is rebuilt.

There is no write-ahead log. After a crash RocksDB returns to the last flush, a prefix of the batches, and so to an
older changelog offset. The changelog has the rest, at most two write buffers of it.

`streams.storage.memory_store` implements the same contract in memory.
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
from streams.errors import HaltsPartition, RebuildsPartition
from streams.storage.codec import (
    CHUNK_PREFIX,
    HEAD_PREFIX,
    MARK_KEY,
    CheckpointMark,
    deadline_of,
    decode_mark,
    had_deadline,
    has_deadline,
)

RECORDS_PER_WRITE = 1_000
"""Records per write batch. A batch holds the GIL: 1,000 records take about 3 ms."""
SCAN_USERS = 10_000
"""Users read at a time by a scan."""
OFFSET_KEY = b"o"
"""Key of the changelog offset; local only, like the deadlines."""
LOG_KEY = b"l"
"""Key of the log id; local only."""
DEADLINE_PREFIX = b"p"
"""First byte of the key of a deadline; the user id follows."""
REFRESH_PREFIX = b"q"
"""First byte of the key of a refresh; the user id follows."""
FEATURES_PREFIX = b"f"
"""First byte of the key of a user's features in the changelog; the user id follows (`streams.storage.features`)."""
DEFINITIONS_PREFIX = b"d"
"""First byte of the key of the definitions of a feature set in the changelog; its hash follows."""
_REFRESH_AT = 16
"""Place of the refresh in a feature record."""
NOTE_PREFIX = b"n"
"""First byte of the key of a note; the user id follows. No other key begins with it, so all are deleted as a range."""
NO_NOTE = -1
"""Source offset of a user without a note."""
DAMAGED = "DAMAGED"
"""Name of the file that marks a store as damaged."""
INDEX = {HEAD_PREFIX: DEADLINE_PREFIX, FEATURES_PREFIX: REFRESH_PREFIX}
"""Records of which a time is kept in an index -> prefix of the index."""
NUMBER = struct.Struct("<q")
"""Encoding of the one number in a local record: an offset or a time."""
_NEVER_BYTES = NUMBER.pack(NEVER)

Record = tuple[bytes, bytes | None]
"""Key and value; None deletes the key."""


class StoreDamaged(RebuildsPartition):
    """The local files cannot be used: delete them (`PartitionStore.destroy`) and rebuild from the changelog."""


class StoreLocked(HaltsPartition):
    """Another process has the store open; try again after it has ended."""


class StoreFailed(HaltsPartition):
    """A read or write failed, for example because the disk is full; the changelog still has the state."""


class Store(Protocol):
    """The contract of a store, as checkpoints, restores and reads use it."""

    @property
    def changelog_offset(self) -> int | None:
        """Offset up to which every changelog record is in the store; None if nothing was ever written."""
        ...

    @property
    def log_id(self) -> str:
        """Identity of the changelog that the records come from; empty if it is unknown."""
        ...

    def claim(self, log_id: str) -> None:
        """Record the identity of the changelog that the records come from."""
        ...

    def mark(self) -> CheckpointMark | None:
        """Return the mark of the last checkpoint in the store, None without one."""
        ...

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the value of each key, None for a missing one."""
        ...

    def write_steps(self, records: Sequence[Record], changelog_offset: int) -> Iterator[None]:
        """Write in batches of at most `RECORDS_PER_WRITE`, one per step; the last one contains the offset."""
        ...

    def pending(self) -> Iterator[tuple[bytes, int]]:
        """Yield (user, due_ms) of every user with a deadline; an entry may be outdated, but none is missing."""
        ...

    def heads_after(self, user: bytes, users_max: int) -> list[tuple[bytes, bytes]]:
        """Return (user, head value) of the next users after `user`, in order of user id."""
        ...

    def note(self, users: Sequence[bytes], offsets: Sequence[int]) -> None:
        """Note the newest source offset that the output topic holds of each of these distinct users."""
        ...

    def noted(self, users: Sequence[bytes]) -> list[int]:
        """Return the noted source offset of each user, `NO_NOTE` without one."""
        ...

    def drop_notes(self) -> None:
        """Delete every note."""
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

        Raises:
            StoreLocked: Another process has it open.
            StoreDamaged: Its files are not usable.
            StoreFailed: The disk is full.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        options = _options(cache or Cache(8 << 20), write_buffer_bytes)
        if write_buffers is not None:
            options.set_write_buffer_manager(write_buffers)
        if (path / DAMAGED).exists():
            raise StoreDamaged(f"store {path.name} could not be read earlier; rebuild it from the changelog")
        try:
            db = Rdict(str(path), options)
        except Exception as error:
            # rocksdict raises plain exceptions, so they can be distinguished only by RocksDB's text.
            if "/LOCK: " in str(error):
                raise StoreLocked(f"store {path.name} is in use: {error}; wait until its process has ended") from error
            if "no space" in str(error).lower():
                raise StoreFailed(f"store {path.name} cannot be opened: {error}; free disk space") from error
            raise StoreDamaged(f"store {path.name} cannot be opened: {error}; rebuild it from the changelog") from error
        try:
            return cls(db)
        except StoreDamaged:
            db.close()  # releases the lock, so that the store can be rebuilt
            raise

    @staticmethod
    def destroy(path: Path) -> None:
        """Delete what is left of the store's files."""
        shutil.rmtree(path, ignore_errors=True)

    @property
    def changelog_offset(self) -> int | None:
        """Offset up to which every changelog record is in the store; None if nothing was ever written."""
        return self._changelog_offset

    @property
    def log_id(self) -> str:
        """Identity of the changelog that the records come from; empty if it is unknown."""
        value = self._reading(lambda: self._db.get(LOG_KEY))
        return "" if value is None else bytes(value).decode()

    def claim(self, log_id: str) -> None:
        """Record the identity of the changelog that the records come from."""
        batch = WriteBatch(raw_mode=True)
        batch.put(LOG_KEY, log_id.encode())
        self._write(batch)

    def mark(self) -> CheckpointMark | None:
        """Return the mark of the last checkpoint in the store, None without one."""
        value = self._reading(lambda: self._db.get(MARK_KEY))
        return None if value is None else decode_mark(value)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the value of each key, None for a missing one; raise `StoreDamaged` if files cannot be read."""
        return self._reading(lambda: self._db.get(list(keys))) if keys else []

    def write(self, records: Sequence[Record], changelog_offset: int) -> None:
        """Write all records, and `changelog_offset` as that of the last one."""
        for _ in self.write_steps(records, changelog_offset):
            pass

    def write_steps(self, records: Sequence[Record], changelog_offset: int) -> Iterator[None]:
        """Write one batch per step, so that an event loop can do other work in between."""
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
        """Yield (user, head value) of every user, in order of user id."""
        return ((key[1:], value) for key, value in self._scan(HEAD_PREFIX))

    def heads_after(self, user: bytes, users_max: int) -> list[tuple[bytes, bytes]]:
        """Return (user, head value) of the next users after `user`, in order of user id."""
        page = self._reading(partial(self._page, HEAD_PREFIX + user + b"\x00", HEAD_PREFIX, users_max))
        return [(key[1:], value) for key, value in page]

    def chunks(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value) of every chunk, in order of key."""
        return self._scan(CHUNK_PREFIX)

    def features(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value) of every user's features, in order of key."""
        return self._scan(FEATURES_PREFIX)

    def definitions(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value) of the definitions of every feature set."""
        return self._scan(DEFINITIONS_PREFIX)

    def pending(self) -> Iterator[tuple[bytes, int]]:
        """Yield (user, due_ms) of every user with a deadline; an entry may be outdated, but none is missing."""
        for prefix in (DEADLINE_PREFIX, REFRESH_PREFIX):
            yield from ((key[1:], NUMBER.unpack(value)[0]) for key, value in self._scan(prefix))

    def note(self, users: Sequence[bytes], offsets: Sequence[int]) -> None:
        """Note the newest source offset that the output topic holds of each of these distinct users."""
        batch = WriteBatch(raw_mode=True)
        for user, offset, before in zip(users, offsets, self.noted(users), strict=True):
            batch.put(NOTE_PREFIX + user, NUMBER.pack(max(offset, before)))
        self._write(batch)

    def noted(self, users: Sequence[bytes]) -> list[int]:
        """Return the noted source offset of each user, `NO_NOTE` without one."""
        return [note_of(value) for value in self.get_many([NOTE_PREFIX + user for user in users])]

    def drop_notes(self) -> None:
        """Delete every note."""
        if self._reading(partial(self._page, NOTE_PREFIX, NOTE_PREFIX, 1)):
            batch = WriteBatch(raw_mode=True)
            batch.delete_range(NOTE_PREFIX, bytes((NOTE_PREFIX[0] + 1,)))
            self._write(batch)

    def flush(self) -> None:
        """Make everything that was written survive a crash of this process."""
        self._db.flush()

    def close(self) -> None:
        """Flush, and release the files and their lock; closing twice is harmless."""
        with suppress(DbClosedError):
            self._db.close()

    def _write(self, batch: WriteBatch) -> None:
        try:
            self._db.write(batch, self._write_options)
        except Exception as error:
            if "Corruption" in str(error):  # found by a compaction; the next open raises, and the store is rebuilt
                self._mark_damaged()
            raise StoreFailed(f"store cannot be written: {error}; check the disk") from error

    def _scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield the records whose key begins with `prefix`, page by page.

        No RocksDB iterator outlives a page, because it would hold the lock past `close`.
        """
        start = prefix
        while page := self._reading(partial(self._page, start, prefix)):
            yield from page
            start = page[-1][0] + b"\x00"

    def _page(self, start: bytes, prefix: bytes, users_max: int = SCAN_USERS) -> list[tuple[bytes, bytes]]:
        rows = self._db.iter()
        try:
            rows.seek(start)
            page: list[tuple[bytes, bytes]] = []
            while len(page) < users_max and rows.valid() and rows.key()[:1] == prefix:
                page.append((rows.key(), rows.value()))
                rows.next()
            rows.status()  # raises if the scan ended at an unreadable block, which looks like the end
            return page
        finally:
            del rows  # the traceback of a failure would keep the iterator, and the iterator the lock

    def _reading(self, read: Callable[[], Any]) -> Any:
        """Return what `read` returns; a failure marks the files as damaged."""
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


def note_of(value: bytes | None) -> int:
    """Return the source offset in a note, `NO_NOTE` without one."""
    return NO_NOTE if value is None else int(NUMBER.unpack(value)[0])


class _Puts(Protocol):
    def put(self, key: bytes, value: bytes) -> None: ...
    def delete(self, key: bytes) -> None: ...


def put_record(batch: _Puts, key: bytes, value: bytes | None) -> None:
    """Put one changelog record into a batch, and for a head or features its entry in the index of deadlines."""
    if value is None:
        batch.delete(key)
        if index := INDEX.get(key[:1]):
            batch.delete(index + key[1:])
        return
    batch.put(key, value)
    if key[:1] == HEAD_PREFIX:
        if has_deadline(value):
            batch.put(DEADLINE_PREFIX + key[1:], NUMBER.pack(deadline_of(value)))
        elif had_deadline(value):
            batch.delete(DEADLINE_PREFIX + key[1:])
    elif key[:1] == FEATURES_PREFIX:
        refresh = value[_REFRESH_AT : _REFRESH_AT + NUMBER.size]
        if refresh != _NEVER_BYTES:
            batch.put(REFRESH_PREFIX + key[1:], refresh)
        elif value[1]:  # the record before this one had a refresh
            batch.delete(REFRESH_PREFIX + key[1:])


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
