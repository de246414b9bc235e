"""Restore of one partition: from the changelog to the local database, with a verifiable end.

A restore begins after fencing, so the end offset that it reads is final. It continues until the reader's *position* has
reached that offset. Waiting for the last *record* would be wrong: transaction markers occupy offsets without a record,
so the restore would end too early or never. A local database that does not match the log, by the id of the topic or by
its offset, is deleted and rebuilt. If the head of the log was deleted, a rebuild is impossible: only a database that
holds the deleted records can continue.
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
from streams.engine.clients import KAFKA, Clients
from streams.engine.proof import IncompleteRestore
from streams.errors import RebuildsPartition
from streams.storage.store import PartitionStore

logger = logging.getLogger(__name__)

OpenStore = Callable[[Path], PartitionStore]
RECORDS_PER_WRITE = 1_000
"""Bounds how long one write blocks the event loop: a write batch holds the GIL, about 3 ms for 1,000 records."""
PROGRESS_EVERY_S = 5.0


class StoreOfAnotherLog(RebuildsPartition):
    """The local database was written from another changelog than the one at hand, so none of it is used."""


async def restore(
    path: Path,
    open_store: OpenStore,
    tp: TopicPartition,
    client: Mapping[str, Any],
    *,
    on_progress: Callable[[int, int], None],
    log_id: str = "",
    clients: Clients = KAFKA,
) -> PartitionStore:
    """Open the database at `path`, bring it to the end of changelog partition `tp`, and return it.

    `log_id` identifies the changelog topic, and is kept in the database; empty if the broker reports none.
    `on_progress(records restored, offsets remaining)` is called after every write. On cancellation the database is
    closed; it keeps what was written, together with its changelog offset, so the next restore continues from there.
    Raises `IncompleteRestore` when the log no longer holds records that the database lacks, `StoreOfAnotherLog` when
    the database was written from another log, and `StoreDamaged` when it cannot be read.
    """
    reader = LogReader(tp, client, clients)
    store: PartitionStore | None = None
    try:
        await reader.open()
        store = open_store(path)
        start = await _start(store, reader, log_id)
        store.claim(log_id)
        await _read(store, reader, start, on_progress)
    except BaseException:
        if store is not None:
            store.close()
        raise
    finally:
        await reader.close()
    return store


async def _start(store: PartitionStore, reader: LogReader, log_id: str) -> int:
    """Return the log offset from which the database continues; raise if it does not match the log."""
    local = store.changelog_offset
    if store.log_id and log_id and store.log_id != log_id:
        raise StoreOfAnotherLog(f"it belongs to the changelog with id {store.log_id}, but the one at hand is {log_id}")
    if local is None and reader.begin == 0:
        return 0
    if local is None or not reader.begin <= local + 1 <= reader.end:
        if reader.begin > 0:
            raise IncompleteRestore(_cut(reader, local))
        raise StoreOfAnotherLog(f"it ends at changelog offset {local}, but the changelog ends at {reader.end}")
    if not store.log_id:
        await _check_unnamed(store, reader, local)
    return local + 1


async def _check_unnamed(store: PartitionStore, reader: LogReader, local: int) -> None:
    """Take over a database that names no log, written by an earlier version, if the log has what it read last.

    That is the mark of a checkpoint and the record before it. When compaction has removed one of them, only a rebuild
    is certain; without the log's head it is not possible.
    """
    record, before = await reader.record_at(local), await reader.record_at(local - 1)
    both = [each for each in (record, before) if each is not None]  # a mark alone may be the same in another life
    if len(both) == 2 and store.get_many([each.key for each in both]) == [each.value for each in both]:
        logger.info("a local database of an earlier version, at changelog offset %d, is taken over", local)
    elif reader.begin == 0:
        raise StoreOfAnotherLog(f"it names no changelog, and its last record, {local}, is not in the one at hand")
    elif record is not None:
        raise IncompleteRestore(_cut(reader, local))


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
