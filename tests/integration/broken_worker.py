"""Runs the real worker with one deliberate fault.

Usage: `python -m tests.integration.broken_worker FAULT FOLDER [OPTIONS]`. Some faults are trouble that a sound worker
must survive (`TROUBLE`, `GROUP`); the others break its defences (`BROKEN`) or delay it (`LIFE`). A fault that strikes
once per run leaves a file in FOLDER, because the worker is started again.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from aiokafka.consumer.subscription_state import SubscriptionState
from faust.assignor.partition_assignor import PartitionAssignor
from yarl import URL

from encoder.actions.columns import ActionBatch
from infra.cli import main
from streams import ingest as ingest_module
from streams.core.sequences import Applied, SequenceState
from streams.engine import checkpoints as checkpoints_module
from streams.engine import partitions as partitions_module
from streams.engine.changelog import ChangelogProducer, LogReader
from streams.engine.delivery import RecordBatch
from streams.engine.ownership import Continuity, OwnedPartition
from streams.engine.partitions import Partitions
from streams.ingest import Ingest
from streams.storage.codec import encode, encode_mark
from streams.storage.store import OFFSET_KEY, PartitionStore, Record

CRASHED = 9
RESTORE_S = 4.0
LOST_BATCHES = (3, 4)
FOLDER = Path()
"""Folder of the run, set by `run`."""


def crash_once() -> None:
    """End the process as kill -9 would, at the first call of the run."""
    if not (mark := FOLDER / "crashed").exists():
        mark.touch()
        os._exit(CRASHED)


# -- trouble that a sound worker must survive


def crashes_before_commit() -> None:
    """Crash once, just before the commit of a checkpoint."""
    commit = ChangelogProducer.commit

    async def crashing(self: ChangelogProducer) -> None:
        crash_once()
        await commit(self)

    ChangelogProducer.commit = crashing  # type: ignore[method-assign]


def crashes_after_commit() -> None:
    """Crash once, after a commit and before the local store is written."""
    commit = ChangelogProducer.commit

    async def crashing(self: ChangelogProducer) -> None:
        await commit(self)
        crash_once()

    ChangelogProducer.commit = crashing  # type: ignore[method-assign]


def delivers_twice() -> None:
    """Deliver every batch twice."""
    on_batch = Ingest.on_batch

    async def twice(self: Ingest, batch: RecordBatch) -> None:
        owned = self._partitions.ready.get(batch.tp.partition)
        before = owned.next_offset if owned else 0
        await on_batch(self, batch)
        if owned is not None and owned.next_offset > before:
            owned.next_offset = before
            await on_batch(self, batch)

    Ingest.on_batch = twice  # type: ignore[method-assign]


def loses_batches() -> None:
    """Lose two batches."""
    on_batch, count = Ingest.on_batch, iter(range(1, 1 << 30))

    async def losing(self: Ingest, batch: RecordBatch) -> None:
        if next(count) not in LOST_BATCHES:
            await on_batch(self, batch)

    Ingest.on_batch = losing  # type: ignore[method-assign]


# -- broken defences


def no_dedupe_by_offset() -> None:
    """Deliver every batch twice, to a state that does not recognise applied offsets."""
    delivers_twice()
    apply = SequenceState.apply

    def forgetful(self: SequenceState, batch: ActionBatch) -> Applied:
        self.headers["applied_offset"][self.rows_of(batch.users)] = -1
        return apply(self, batch)

    SequenceState.apply = forgetful  # type: ignore[method-assign]


def no_position_guard() -> None:
    """Lose two batches, and accept every batch as contiguous."""
    loses_batches()
    OwnedPartition.continuity = lambda self, batch: Continuity.CONTIGUOUS  # type: ignore[method-assign]


def store_before_commit() -> None:
    """Write the local store before the transaction commits, and crash in between."""

    async def checkpoint(state: Any, mark: Any, outputs: Any, changelog: Any, store: Any) -> int:
        snapshot = state.begin_checkpoint()
        records = [*encode(snapshot, state.limits), encode_mark(mark)]
        await outputs.acknowledged()
        await changelog.begin()
        store.write(records, await changelog.append(records))
        store.flush()
        crash_once()
        await changelog.send_source_offset(mark.source_offset)
        await changelog.commit()
        state.commit_checkpoint(snapshot)
        return len(records)

    checkpoints_module.checkpoint = checkpoint


def offset_before_records() -> None:
    """Store the changelog offset before its records, and crash in between."""
    write_steps = PartitionStore.write_steps

    def hasty(self: PartitionStore, records: Sequence[Record], changelog_offset: int) -> Iterator[None]:
        self._db.put(OFFSET_KEY, changelog_offset.to_bytes(8, "little"))
        self.flush()
        crash_once()
        return write_steps(self, records, changelog_offset)

    PartitionStore.write_steps = hasty  # type: ignore[method-assign]


def restore_ends_at_a_silence() -> None:
    """End a restore at the first fetch that returns nothing."""

    async def batches(self: LogReader, start: int, *, records_max: int) -> AsyncIterator[list[Any]]:
        self._consumer.seek(self.tp, start)
        while records := (await self._consumer.getmany(self.tp, timeout_ms=0, max_records=records_max)).get(self.tp):
            yield records

    LogReader.batches = batches  # type: ignore[method-assign, assignment]


# -- delays and stalls, for the tests of the life cycle


def restores_slowly() -> None:
    """Delay each restore."""
    restore = partitions_module.restore

    async def slow(*args: Any, **kwargs: Any) -> PartitionStore:
        await asyncio.sleep(RESTORE_S)
        return await restore(*args, **kwargs)

    partitions_module.restore = slow


def stops_for_ever() -> None:
    """Never finish giving back partitions."""
    revoke_all = Partitions.revoke_all

    async def endless(self: Partitions) -> None:
        if self.ready:
            await asyncio.Event().wait()
        await revoke_all(self)

    Partitions.revoke_all = endless  # type: ignore[method-assign]


def processes_nothing() -> None:
    """Never process a batch."""

    async def waiting(self: Ingest, batch: RecordBatch) -> None:
        await asyncio.Event().wait()

    Ingest.on_batch = waiting  # type: ignore[method-assign]


def blocks_the_loop() -> None:
    """Block the event loop with each batch."""
    decode = ingest_module.decode_actions

    def blocking(*args: Any, **kwargs: Any) -> Any:
        time.sleep(RESTORE_S)
        return decode(*args, **kwargs)

    ingest_module.decode_actions = blocking


# -- life in a group


def is_idle_for_hours() -> None:
    """Make aiokafka believe that pauses between two fetches are ten thousand times as long as they are."""
    real = SubscriptionState.fetcher_idle_time
    SubscriptionState.fetcher_idle_time = property(lambda self: real.fget(self) * 10_000)


def has_another_url() -> None:
    """Join under another URL, as a worker on another host or of another version does."""
    PartitionAssignor._url = URL("http://another-host:6066")


def is_on_another_host() -> None:
    """Run on a host of another name."""
    socket.gethostname = lambda: "another-host"


def contradicts_its_assignment() -> None:
    """Raise inside aiokafka's coordination task when an assignment arrives."""

    def contradicting(self: PartitionAssignor, assignment: Any) -> None:
        raise AssertionError("the assignment contradicts itself")

    PartitionAssignor.on_assignment = contradicting


Fault = Callable[[], None]
TROUBLE: tuple[Fault, ...] = (crashes_before_commit, crashes_after_commit, delivers_twice, loses_batches)
BROKEN: tuple[Fault, ...] = (
    no_dedupe_by_offset,
    no_position_guard,
    store_before_commit,
    offset_before_records,
    restore_ends_at_a_silence,
)
LIFE: tuple[Fault, ...] = (restores_slowly, stops_for_ever, processes_nothing, blocks_the_loop)
GROUP: tuple[Fault, ...] = (is_idle_for_hours, has_another_url, is_on_another_host, contradicts_its_assignment)


def command(fault: Fault, folder: Path) -> tuple[str, ...]:
    """Return the command that starts a worker with the fault; options may follow."""
    return sys.executable, "-m", "tests.integration.broken_worker", fault.__name__, str(folder)


def run(name: str, folder: str, *options: str) -> None:
    """Install the fault and run the worker."""
    global FOLDER
    FOLDER = Path(folder)
    {fault.__name__: fault for fault in (*TROUBLE, *BROKEN, *LIFE, *GROUP)}[name]()
    sys.argv = ["streamformer", "worker", *options]
    main()


if __name__ == "__main__":
    run(*sys.argv[1:])
