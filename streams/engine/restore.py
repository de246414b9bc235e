"""Restore of one partition: from the changelog to the local database, with an end that can be shown.

A restore begins after fencing, so the end offset it reads is final. It goes on until the reader's *position* has
passed that offset: markers of transactions fill offsets that no record has, and "the last record seen" would either
wait for ever or end too early. A local database that does not fit the log is deleted and rebuilt. A log whose head was
deleted is no basis for that: only a database that already holds the deleted records goes on from it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aiokafka.structs import TopicPartition

from streams.engine.changelog import LogReader
from streams.errors import StopsWorker
from streams.storage.store import PartitionStore

logger = logging.getLogger(__name__)

OpenStore = Callable[[Path], PartitionStore]
RECORDS_PER_WRITE = 1_000
"""A write batch holds the GIL: 1,000 records are about 3 ms."""
PROGRESS_EVERY_S = 5.0


class IncompleteRestore(StopsWorker):
    """Records of the state are missing for good; processing must not begin. Stops the worker."""


async def restore(
    path: Path,
    open_store: OpenStore,
    tp: TopicPartition,
    client: Mapping[str, Any],
    *,
    on_progress: Callable[[int, int], None],
) -> PartitionStore:
    """Open the database at `path` and bring it to the end of changelog partition `tp`; return it.

    `on_progress(records restored, offsets remaining)` is called after every write. On cancellation the database is
    closed; what was written stays, with the offset it reaches, so the next restore goes on from there. Raises
    `IncompleteRestore` where records that the database does not hold were deleted from the log, and `StoreDamaged`
    where the database cannot be read.
    """
    reader = LogReader(tp, client)
    store: PartitionStore | None = None
    try:
        await reader.open()
        store, start = _fit(path, open_store, reader)
        await _read(store, reader, start, on_progress)
    except BaseException:
        if store is not None:
            store.close()
        raise
    finally:
        await reader.close()
    return store


def _fit(path: Path, open_store: OpenStore, reader: LogReader) -> tuple[PartitionStore, int]:
    """The local database and where in the log to go on; an empty one where the local one does not fit the log."""
    store = open_store(path)
    local = store.changelog_offset
    if local is not None and reader.begin <= local + 1 <= reader.end:
        return store, local + 1
    if local is None and reader.begin == 0:
        return store, 0
    store.close()
    if reader.begin > 0:
        raise IncompleteRestore(_cut(reader, local))
    logger.warning(
        "local state at %s ends at offset %s, the changelog at %d: it is deleted and rebuilt", path, local, reader.end
    )
    PartitionStore.destroy(path)
    return open_store(path), 0


def _cut(reader: LogReader, local: int | None) -> str:
    """Compaction removes outdated records and leaves the log's first offset at 0; only deletion moves it."""
    disk = "is empty" if local is None else f"ends at offset {local}"
    return (
        f"the changelog {reader.tp.topic}, partition {reader.tp.partition}, begins at offset {reader.begin} and the "
        f"local state {disk}: records in between were deleted (kafka-delete-records, or cleanup.policy=delete), and "
        "users with them; start a worker that still has its local state, or a new application id, which rebuilds every "
        "user from the actions that the source topic still holds"
    )


async def _read(store: PartitionStore, reader: LogReader, start: int, on_progress: Callable[[int, int], None]) -> None:
    restored, started, reported = 0, time.monotonic(), time.monotonic()
    async for records in reader.batches(start, records_max=RECORDS_PER_WRITE):
        store.write([(record.key, record.value) for record in records], records[-1].offset)
        restored += len(records)
        remaining = max(0, reader.end - records[-1].offset - 1)
        on_progress(len(records), remaining)
        now = time.monotonic()
        if now - reported >= PROGRESS_EVERY_S:
            rate = (records[-1].offset + 1 - start) / (now - started)
            logger.info("restored %d records, %d offsets to go, about %.0f s", restored, remaining, remaining / rate)
            reported = now
        await asyncio.sleep(0)
    on_progress(0, 0)
