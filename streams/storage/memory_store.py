"""A store in a dictionary, for simulations and tests; it passes the contract tests of the RocksDB store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from streams.storage.codec import HEAD_PREFIX, MARK_KEY, CheckpointMark, decode_mark
from streams.storage.store import (
    DEADLINE_PREFIX,
    LOG_KEY,
    NOTE_PREFIX,
    NUMBER,
    OFFSET_KEY,
    RECORDS_PER_WRITE,
    REFRESH_PREFIX,
    Record,
    note_of,
    put_record,
)


class MemoryStore:
    """A store in a dictionary; implements `streams.storage.store.Store`."""

    def __init__(self, *, records_per_write: int = RECORDS_PER_WRITE) -> None:
        self.records: dict[bytes, bytes] = {}
        self._records_per_write = records_per_write

    @property
    def changelog_offset(self) -> int | None:
        """Offset up to which every changelog record is in the store; None if nothing was ever written."""
        value = self.records.get(OFFSET_KEY)
        return None if value is None else int(NUMBER.unpack(value)[0])

    @property
    def log_id(self) -> str:
        """Identity of the changelog that the records come from; empty if it is unknown."""
        return self.records.get(LOG_KEY, b"").decode()

    def claim(self, log_id: str) -> None:
        """Record the identity of the changelog that the records come from."""
        self.records[LOG_KEY] = log_id.encode()

    def mark(self) -> CheckpointMark | None:
        """Return the mark of the last checkpoint in the store, None without one."""
        value = self.records.get(MARK_KEY)
        return None if value is None else decode_mark(value)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the value of each key, None for a missing one."""
        return [self.records.get(key) for key in keys]

    def write(self, records: Sequence[Record], changelog_offset: int) -> None:
        """Write all records, and `changelog_offset` as that of the last one."""
        for _ in self.write_steps(records, changelog_offset):
            pass

    def write_steps(self, records: Sequence[Record], changelog_offset: int) -> Iterator[None]:
        """Write one batch per step, as the RocksDB store does."""
        for begin in range(0, max(len(records), 1), self._records_per_write):
            for key, value in records[begin : begin + self._records_per_write]:
                put_record(self, key, value)
            if begin + self._records_per_write >= len(records):
                self.put(OFFSET_KEY, NUMBER.pack(changelog_offset))
            yield

    def heads(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield (user, head value) of every user, in order of user id."""
        return ((key[1:], self.records[key]) for key in sorted(self.records) if key[:1] == HEAD_PREFIX)

    def heads_after(self, user: bytes, users_max: int) -> list[tuple[bytes, bytes]]:
        """Return (user, head value) of the next users after `user`, in order of user id."""
        return [each for each in self.heads() if each[0] > user][:users_max]

    def pending(self) -> Iterator[tuple[bytes, int]]:
        """Yield (user, due_ms) of every user with a deadline."""
        prefixes = (DEADLINE_PREFIX, REFRESH_PREFIX)
        return ((key[1:], NUMBER.unpack(self.records[key])[0]) for key in sorted(self.records) if key[:1] in prefixes)

    def note(self, users: Sequence[bytes], offsets: Sequence[int]) -> None:
        """Note the newest source offset that the output topic holds of each of these distinct users."""
        for user, offset, before in zip(users, offsets, self.noted(users), strict=True):
            self.put(NOTE_PREFIX + user, NUMBER.pack(max(offset, before)))

    def noted(self, users: Sequence[bytes]) -> list[int]:
        """Return the noted source offset of each user, `NO_NOTE` without one."""
        return [note_of(self.records.get(NOTE_PREFIX + user)) for user in users]

    def drop_notes(self) -> None:
        """Delete every note."""
        for key in [key for key in self.records if key[:1] == NOTE_PREFIX]:
            self.delete(key)

    def close(self) -> None:
        """Do nothing: there are no files."""

    def put(self, key: bytes, value: bytes) -> None:
        """Set one key."""
        self.records[key] = value

    def delete(self, key: bytes) -> None:
        """Delete one key, if it is there."""
        self.records.pop(key, None)
