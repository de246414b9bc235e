"""An in-memory broker: one source partition, its changelog, its committed offset, and the output topic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from streams.storage.store import Record


class Fenced(Exception):
    """The transaction belongs to a producer that a newer one has replaced."""


@dataclass(frozen=True)
class SourceRecord:
    """A record of the source topic, as a consumer returns it."""

    key: bytes | None
    value: bytes | None
    offset: int
    timestamp: int
    headers: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True)
class Output:
    """A record of the output topic; a tombstone has the version None."""

    user: bytes
    version: int | None
    offset: int
    items: tuple[int, ...] = ()


@dataclass
class Broker:
    """The state that survives every worker."""

    source: list[SourceRecord] = field(default_factory=list)
    changelog: dict[int, Record] = field(default_factory=dict)
    """Visible records by offset; transaction markers and aborted or compacted records leave gaps."""
    changelog_end: int = 0
    committed_offset: int | None = None
    outputs: list[Output] = field(default_factory=list)
    epoch: int = 0

    def fence(self) -> int:
        """Start a new producer for the partition and return its epoch; earlier producers are rejected from now on."""
        self.epoch += 1
        self.changelog_end += 1
        return self.epoch

    def compact(self) -> None:
        """Keep only the last record of each key, at its offset."""
        last = {key: offset for offset, (key, _) in self.changelog.items()}
        keep = set(last.values())
        self.changelog = {offset: record for offset, record in self.changelog.items() if offset in keep}


class Transaction:
    """A transaction of a checkpoint; `effect` is called right before each side effect and may raise."""

    def __init__(self, broker: Broker, epoch: int, effect: Callable[[str], None]) -> None:
        self._broker, self._epoch, self._effect = broker, epoch, effect
        self._records: dict[int, Record] = {}
        self._source_offset: int | None = None

    async def begin(self) -> None:
        """Begin a transaction."""
        self._reach("begin")
        self._records, self._source_offset = {}, None

    async def append(self, records: Sequence[Record]) -> int:
        """Reserve offsets for the records; return that of the last one."""
        self._reach("append")
        begin = self._broker.changelog_end
        self._records = dict(enumerate(records, begin))
        self._broker.changelog_end = begin + len(records)
        return self._broker.changelog_end - 1

    async def send_source_offset(self, source_offset: int) -> None:
        """Add the source offset to the transaction."""
        self._reach("source offset")
        self._source_offset = source_offset

    async def commit(self) -> None:
        """Make records and source offset visible together."""
        self._reach("commit")
        self._broker.changelog |= self._records
        self._broker.changelog_end += 1
        self._broker.committed_offset = self._source_offset

    def _reach(self, name: str) -> None:
        self._effect(name)
        if self._epoch != self._broker.epoch:
            raise Fenced(name)
