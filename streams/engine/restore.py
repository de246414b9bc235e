"""Restore of one partition: from the changelog to the local database, with a verifiable end.

A restore begins after fencing, so the end offset that it reads is final. It continues until the reader's *position* has
reached that offset. Waiting for the last *record* would be wrong: transaction markers occupy offsets without a record,
so the restore would end too early or never. A local database that does not match the log is deleted and rebuilt. If the
head of the log was deleted, a rebuild is impossible: only a database that holds the deleted records can continue.
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
from streams.errors import HaltsPartition
from streams.storage.store import PartitionStore

logger = logging.getLogger(__name__)

OpenStore = Callable[[Path], PartitionStore]
RECORDS_PER_WRITE = 1_000
"""Bounds how long one write blocks the event loop: a write batch holds the GIL, about 3 ms for 1,000 records."""
PROGRESS_EVERY_S = 5.0


class IncompleteRestore(HaltsPartition):
    """Records of the state are lost, so processing of the partition must not begin."""

    retriable = False


async def restore(
    path: Path,
    open_store: OpenStore,
    tp: TopicPartition,
    client: Mapping[str, Any],
    *,
    on_progress: Callable[[int, int], None],
) -> PartitionStore:
    """Open the database at `path`, bring it to the end of changelog partition `tp`, and return it.

    `on_progress(records restored, offsets remaining)` is called after every write. On cancellation the database is
    closed; it keeps what was written, together with its changelog offset, so the next restore continues from there.
    Raises `IncompleteRestore` when the log no longer holds records that the database lacks, and `StoreDamaged` when the
    database cannot be read.
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
    """Return the local database and the log offset to continue from; an empty one if it does not match the log."""
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
        "local state at %s ends at offset %s, but the changelog at %d: it is deleted and rebuilt",
        path,
        local,
        reader.end,
    )
    PartitionStore.destroy(path)
    return open_store(path), 0


def _cut(reader: LogReader, local: int | None) -> str:
    """Return the error text. Compaction leaves the log's first offset at 0, so a higher one proves a deletion."""
    disk = "is empty" if local is None else f"ends at offset {local}"
    return (
        f"the changelog {reader.tp.topic}, partition {reader.tp.partition}, begins at offset {reader.begin} and the "
        f"local state {disk}: records in between, and users with them, were deleted by kafka-delete-records or "
        "cleanup.policy=delete; start a worker that still has its local state, or set a new app_id to rebuild every "
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
