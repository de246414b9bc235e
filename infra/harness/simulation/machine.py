"""What a worker in memory runs on: disks that lose their last writes, an encoder, and the thread that it runs in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from encoder.actions.columns import SequenceBatch
from encoder.arrays import F32
from infra.harness.simulation.link import Link
from streams.core.layout import StateLimits
from streams.storage.memory_store import MemoryStore
from streams.storage.store import Record, StoreFailed

LIMITS = StateLimits(sequence_length=8, chunk_length=2, hot_users_max=4, wake_users_max=3)
ITEM_BITS = 24
"""Bits of an item's key that a float32 holds exactly."""


class Disk(MemoryStore):
    """A store that keeps its contents after each write, so that a crash can undo the last writes."""

    def __init__(self, records: Mapping[bytes, bytes] | None = None) -> None:
        super().__init__(records_per_write=2)
        self.records |= records or {}
        self.link: Link | None = None
        self.failures = 0
        """Writes that fail next, as on a full disk."""
        self._past: deque[dict[bytes, bytes]] = deque([dict(self.records)], maxlen=6)

    def claim(self, log_id: str) -> None:
        """Record the identity of the changelog, with a side effect."""
        self._effect()
        super().claim(log_id)
        self._past.append(dict(self.records))

    def write_steps(self, records: Sequence[Record], changelog_offset: int) -> Iterator[None]:
        """Write one batch per step, with a side effect before each."""
        steps = super().write_steps(records, changelog_offset)
        while True:
            self._effect()
            if self.failures:
                self.failures -= 1
                raise StoreFailed("the disk is full")
            if next(steps, steps) is steps:
                return
            self._past.append(dict(self.records))
            yield

    def crash(self, lost_writes: int) -> None:
        """Undo the last writes, as far back as they are kept."""
        for _ in range(min(lost_writes, len(self._past) - 1)):
            self._past.pop()
        self.records = dict(self._past[-1])

    def _effect(self) -> None:
        if self.link is not None:
            self.link.effect()


@dataclass
class Machine:
    """The disks of one host, by file name; they outlive its workers."""

    disks: dict[str, Disk] = field(default_factory=dict)

    def crash(self, lost_writes: int) -> None:
        """Undo the last writes."""
        for disk in self.disks.values():
            disk.crash(lost_writes)

    def copy(self) -> Machine:
        """Return a machine whose disks hold the same."""
        return Machine({name: Disk(disk.records) for name, disk in self.disks.items()})


class Encoder:
    """An encoder whose embedding is the sequence itself; like the real one it caches sequences by revision."""

    embedding_dim = sequence_length = actions_needed = LIMITS.sequence_length
    dtype = "float32"

    def __init__(self, version: str) -> None:
        self.version = version
        self.extensions = self.prefills = 0
        self.bad_users: set[bytes] = set()
        """Users on whom it raises."""
        self.failures = 0
        """Number of the next calls that raise, for every batch."""
        self._cache: dict[bytes, tuple[int, int, list[int]]] = {}
        """Revision, count and items of a user's last embedding."""

    def embed(self, batch: SequenceBatch) -> F32:
        """Return one row per user: its items, oldest first, and -1 where there are none."""
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the encoder failed")
        if self.bad_users.intersection(batch.users):
            raise RuntimeError("the encoder cannot embed one of these users")
        rows = np.full((len(batch.users), self.embedding_dim), -1, np.float32)
        for row, user in enumerate(batch.users):
            items = self._items(batch, row, user)
            rows[row, : len(items)] = items
        return rows

    def forget(self, users: Sequence[bytes]) -> None:
        """Drop what is cached of these users."""
        for user in users:
            self._cache.pop(user, None)

    def clear(self) -> None:
        """Drop everything that is cached."""
        self._cache.clear()

    def _items(self, batch: SequenceBatch, row: int, user: bytes) -> list[int]:
        """Append the new actions to what is cached under the same revision, as an incremental encoder does."""
        begin, end = int(batch.starts[row]), int(batch.starts[row + 1])
        given = [low_bits(item) for item in batch.actions["item"][begin:end].tolist()]
        revision, count = int(batch.revisions[row]), int(batch.counts[row])
        cached = self._cache.get(user)
        if cached is not None and cached[0] == revision and 0 <= count - cached[1] <= len(given):
            new = count - cached[1]
            given = (cached[2] + given[len(given) - new :])[-self.sequence_length :]
            self.extensions += 1
        else:
            self.prefills += 1
        self._cache[user] = revision, count, given
        return given


def low_bits(item: int) -> int:
    """Return the part of an item's key that an embedding of the simulation shows."""
    return item & ((1 << ITEM_BITS) - 1)


class EncoderThread(Executor):
    """Runs calls in order; while it is held, calls wait until the history lets them through."""

    def __init__(self) -> None:
        self.is_held = False
        self.waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a call at once, or keep it."""
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: fn(*args, **kwargs)))
        if not self.is_held:
            self.run(len(self.waiting))
        return future

    def run(self, calls: int) -> None:
        """Run the oldest calls."""
        for _ in range(min(calls, len(self.waiting))):
            future, call = self.waiting.popleft()
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Do nothing."""
