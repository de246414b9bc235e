"""A store in a dictionary, for simulations and tests; it passes the contract tests of the RocksDB store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from streams.storage.codec import HEAD_PREFIX, MARK_KEY, CheckpointMark, decode_mark
from streams.storage.store import DEADLINE_PREFIX, NUMBER, OFFSET_KEY, RECORDS_PER_WRITE, Record, put_record


class MemoryStore:
    """A store in a dictionary, for simulations."""

    def __init__(self, *, records_per_write: int = RECORDS_PER_WRITE) -> None:
        self.records: dict[bytes, bytes] = {}
        self._records_per_write = records_per_write

    @property
    def changelog_offset(self) -> int | None:
        value = self.records.get(OFFSET_KEY)
        return None if value is None else int(NUMBER.unpack(value)[0])

    def mark(self) -> CheckpointMark | None:
        value = self.records.get(MARK_KEY)
        return None if value is None else decode_mark(value)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.records.get(key) for key in keys]

    def write(self, records: Sequence[Record], changelog_offset: int) -> None:
        for _ in self.write_steps(records, changelog_offset):
            pass

    def write_steps(self, records: Sequence[Record], changelog_offset: int) -> Iterator[None]:
        for begin in range(0, max(len(records), 1), self._records_per_write):
            for key, value in records[begin : begin + self._records_per_write]:
                put_record(self, key, value)
            if begin + self._records_per_write >= len(records):
                self.put(OFFSET_KEY, NUMBER.pack(changelog_offset))
            yield

    def heads(self) -> Iterator[tuple[bytes, bytes]]:
        return ((key[1:], self.records[key]) for key in sorted(self.records) if key[:1] == HEAD_PREFIX)

    def pending(self) -> Iterator[tuple[bytes, int]]:
        return (
            (key[1:], NUMBER.unpack(self.records[key])[0]) for key in sorted(self.records) if key[:1] == DEADLINE_PREFIX
        )

    def put(self, key: bytes, value: bytes) -> None:
        self.records[key] = value

    def delete(self, key: bytes) -> None:
        self.records.pop(key, None)
