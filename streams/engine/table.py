"""The Faust table `user-sequences`, and the store behind it.

Faust gives the table its name, its changelog topic, co-partitioning and assignment. What it would do per key (send a
changelog record, write the store) is done for whole checkpoints by `streams.engine.partitions`, so the table is
read-only to Faust code: `table[user]` is the stored head record of that user as of the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import faust
from faust.stores.base import SerializedStore
from faust.types import TP

from streams.engine.partitions import Partitions
from streams.storage.codec import head_key

TABLE_NAME = "user-sequences"


class SequenceStore(SerializedStore):
    """Faust's view of the RocksDB databases of the partitions this worker owns; read-only."""

    @property
    def _partitions(self) -> Partitions:
        partitions: Partitions = self.app.partitions
        return partitions

    def persisted_offset(self, tp: TP) -> int | None:
        owned = self._partitions.ready.get(tp.partition)
        return owned.store.changelog_offset if owned is not None else None

    def _get(self, key: bytes) -> bytes | None:
        for owned in self._partitions.ready.values():
            (value,) = owned.store.get_many([head_key(key)])
            if value is not None:
                return value
        return None

    def _contains(self, key: bytes) -> bool:
        return self._get(key) is not None

    def _iteritems(self) -> Iterator[tuple[bytes, bytes]]:
        for owned in self._partitions.ready.values():
            yield from owned.store.heads()

    def _iterkeys(self) -> Iterator[bytes]:
        return (key for key, _ in self._iteritems())

    def _itervalues(self) -> Iterator[bytes | None]:
        return (value for _, value in self._iteritems())

    def _size(self) -> int:
        return sum(1 for _ in self._iteritems())

    def _set(self, key: bytes, value: bytes | None) -> NoReturn:
        raise TypeError("the table user-sequences is read-only: its records are written by checkpoints")

    def _del(self, key: bytes) -> NoReturn:
        self._set(key, None)

    def _clear(self) -> NoReturn:
        self._set(b"", None)

    async def backup_partition(self, *args: Any, **kwargs: Any) -> None:
        self._no_backup()

    def restore_backup(self, *args: Any, **kwargs: Any) -> None:
        self._no_backup()

    def _no_backup(self) -> NoReturn:
        raise TypeError("the table user-sequences needs no backup: its changelog is the durable copy")

    def reset_state(self) -> None:
        """Nothing to reset: a state that cannot be trusted is rebuilt from the changelog at assignment."""

    def apply_changelog_batch(self, batch: Iterable[Any], to_key: Any, to_value: Any) -> None:
        """Faust restores nothing here (see `streams.engine.recovery`); its buffers are empty."""


class SequenceTable(faust.Table):
    """A Faust table whose life cycle carries that of the owned partitions."""

    async def on_start(self) -> None:
        await super().on_start()
        await self.add_runtime_dependency(self.app.partitions)

    async def on_stop(self) -> None:
        await self.app.partitions.revoke_all()
        await super().on_stop()
