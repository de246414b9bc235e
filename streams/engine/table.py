"""The Faust table `user-sequences`, and the store behind it.

Faust provides the table's name, its changelog topic, co-partitioning and assignment. Faust would also write the
changelog and the store key by key; here the checkpoints of `streams.engine.partitions` write both. The table is
therefore read-only for Faust code: `table[user]` is the stored head record of that user as of the last checkpoint.
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
    """Faust's read-only view of the local databases of the partitions that this worker owns."""

    @property
    def _partitions(self) -> Partitions:
        partitions: Partitions = self.app.partitions
        return partitions

    def persisted_offset(self, tp: TP) -> int | None:
        """Return the changelog offset that the local database has reached; None if the partition is not ready."""
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
        """Raise: there is no backup."""
        self._no_backup()

    def restore_backup(self, *args: Any, **kwargs: Any) -> None:
        """Raise: there is no backup."""
        self._no_backup()

    def _no_backup(self) -> NoReturn:
        raise TypeError("the table user-sequences needs no backup: its changelog is the durable copy")

    def reset_state(self) -> None:
        """Do nothing: untrusted state is rebuilt from the changelog at the next assignment."""

    def apply_changelog_batch(self, batch: Iterable[Any], to_key: Any, to_value: Any) -> None:
        """Do nothing: Faust restores nothing (see `streams.engine.recovery`), so its buffers are empty."""


class SequenceTable(faust.Table):
    """A Faust table that starts and stops the service `Partitions`."""

    async def on_start(self) -> None:
        """Start the table, then the partitions."""
        await super().on_start()
        await self.add_runtime_dependency(self.app.partitions)

    async def on_stop(self) -> None:
        """Checkpoint and close the partitions, then stop the table."""
        await self.app.partitions.revoke_all()
        await super().on_stop()
