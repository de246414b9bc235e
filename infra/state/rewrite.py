"""Rewrite the state of an application in its changelog: adopt it for another source log, or move its position.

Every partition is written by the worker's own transactional producer, so a worker that still runs is fenced. While more
than one transaction is needed, the first one leaves a mark that names the unfinished command: workers reject it, and
the same command run again starts over and loses nothing, because sequences are only ever copied.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice

from aiokafka.structs import TopicPartition
from kafka.partitioner.default import murmur2

from infra.errors import InfraError
from infra.state.logs import Application
from streams.engine.changelog import ChangelogNames, ChangelogProducer, LogReader
from streams.engine.proof import Found
from streams.storage.codec import OPERATIONS_KEPT, CheckpointMark, encode_mark
from streams.storage.identity import differences
from streams.storage.rebase import OTHER_LOG, rebase
from streams.storage.store import PartitionStore, Record

HEADS_PER_STEP = 2_000
RECORDS_PER_TRANSACTION = 5_000
Report = Callable[[str], None]


def partition_of(user: bytes, partitions: int) -> int:
    """Return the partition of a user, as every producer must choose it."""
    return int((murmur2(user) & 0x7FFFFFFF) % partitions)


@dataclass(frozen=True, slots=True)
class Adoption:
    """A plan: whose state is adopted, and where each partition of the new source begins."""

    old: Application
    new: Application
    marks: Mapping[int, CheckpointMark | None]
    """Marks of the old state, by its partitions."""
    places: Mapping[int, int]
    """Source offset at which each partition begins."""
    command: str
    """The command as it has to be repeated after an interruption."""

    @property
    def is_in_place(self) -> bool:
        """True if old and new state are in the same changelog."""
        return self.old.settings.changelog_topic == self.new.settings.changelog_topic

    def new_mark(self, partition: int, output_offset: int) -> CheckpointMark:
        """Return the mark with which the adopted partition begins."""
        held = self.marks.get(partition) if self.is_in_place else None
        life = 1 + max((mark.life for mark in self.marks.values() if mark), default=0)
        sources = {mark.identity.source_topic_id for mark in self.marks.values() if mark and mark.identity}
        what = (
            f"adopt from {self.old.settings.app_id} (topic ids {', '.join(sorted(sources)) or 'unknown'}) at offset "
            f"{self.places[partition]}"
        )
        return CheckpointMark(
            self.places[partition],
            output_offset,
            self.new.identity,
            life,
            "",
            noted(held.operations if held else (), what),
        )


def noted(operations: Iterable[str], what: str) -> tuple[str, ...]:
    """Return the operations of a mark with one more."""
    line = f"{datetime.now(UTC).isoformat(timespec='seconds')} {what}"
    return (*operations, line)[-OPERATIONS_KEPT:]


def check_adoption(plan: Adoption) -> None:
    """Raise `InfraError` if the plan would mix two states, or cannot be carried out."""
    old, new = plan.old.settings, plan.new.settings
    if not any(plan.marks.values()):
        raise InfraError(f"{old.changelog_topic} holds no state", "no partition has a mark", "check the application id")
    layouts = {mark.identity.layout for mark in plan.marks.values() if mark and mark.identity and mark.identity.layout}
    if layouts - {plan.new.identity.layout}:
        raise InfraError(
            "the layout of the state is another",
            f"{', '.join(sorted(layouts))} instead of {plan.new.identity.layout}",
            "restore state.sequence_length and state.chunk_length",
        )
    if plan.is_in_place and len(plan.marks) != new.topics.partitions:
        raise InfraError(
            "another number of partitions needs another application id",
            f"{old.changelog_topic} has {len(plan.marks)} partitions, the settings say {new.topics.partitions}",
            "set a new app_id and a new topics.embeddings, run `streamformer topics create`, then `streamformer state "
            f"adopt --from-app {old.app_id}`",
        )


async def adopt(plan: Adoption, report: Report) -> int:
    """Carry out the plan; return the number of users."""
    plan.new.require_no_workers()
    if plan.is_in_place:
        return sum([await _adopt_in_place(plan, number, report) for number in sorted(plan.places)])
    plan.old.require_no_workers()
    return await _adopt_elsewhere(plan, report)


async def _adopt_in_place(plan: Adoption, number: int, report: Report) -> int:
    app, mark = plan.new, plan.marks[number]
    async with producing(app, number) as producer, app.restored(number) as store:
        if mark is not None:
            await _commit(producer, [encode_mark(replace(mark, unfinished=plan.command))])
        users = await _rebase(store, producer, OTHER_LOG, report)
        await _finish(plan, producer, number)
    report(f"partition {number}: {users} users, continues at offset {plan.places[number]}")
    return users


async def _adopt_elsewhere(plan: Adoption, report: Report) -> int:
    """Copy every user to its partition of another changelog."""
    users, count = 0, plan.new.settings.topics.partitions
    async with AsyncExitStack() as stack:
        writers = {}
        for number in plan.places:
            if (held := await plan.new.last_mark(number)) is not None and not held.unfinished:
                raise InfraError(
                    f"{plan.new.settings.changelog_topic} already holds state",
                    f"partition {number} has a mark at offset {held.source_offset}",
                    "two states cannot be mixed: set an app_id that was never used",
                )
            writers[number] = _Writer(await stack.enter_async_context(producing(plan.new, number)))
            unfinished = CheckpointMark(plan.places[number], 0, plan.new.identity, unfinished=plan.command)
            await _commit(writers[number].producer, [encode_mark(unfinished)])
        for old in plan.marks:
            async with plan.old.restored(old) as store:
                for key, value in store.chunks():
                    await writers[partition_of(key[1:-1], count)].append((key, value))
                for key, value in store.features():
                    await writers[partition_of(key[1:], count)].append((key, value))
                for key, value in store.definitions():
                    for writer in writers.values():
                        await writer.append((key, value))
                for records in _rebased(store, OTHER_LOG, report):
                    users += len(records)
                    for record in records:
                        await writers[partition_of(record[0][1:], count)].append(record)
        for number, writer in writers.items():
            await writer.flush()
            await _finish(plan, writer.producer, number)
            report(f"partition {number}: {writer.records} records, begins at offset {plan.places[number]}")
    return users


class _Writer:
    """Appends records to one partition, in transactions of bounded size."""

    def __init__(self, producer: ChangelogProducer) -> None:
        self.producer = producer
        self.records = 0
        self._pending: list[Record] = []

    async def append(self, record: Record) -> None:
        self._pending.append(record)
        self.records += 1
        if len(self._pending) >= RECORDS_PER_TRANSACTION:
            await self.flush()

    async def flush(self) -> None:
        if self._pending:
            await _commit(self.producer, self._pending)
        self._pending = []


async def _finish(plan: Adoption, producer: ChangelogProducer, number: int) -> None:
    mark = plan.new_mark(number, await output_end(plan.new, number))
    await _commit(producer, [encode_mark(mark)], mark.source_offset)


async def _rebase(store: PartitionStore, producer: ChangelogProducer, offset_max: int, report: Report) -> int:
    """Rewrite the head of every user in its own partition; return the number of users."""
    users = 0
    for records in _rebased(store, offset_max, report):
        users += len(records)
        if records:
            await _commit(producer, records)
    return users


def _rebased(store: PartitionStore, offset_max: int, report: Report) -> Iterator[list[Record]]:
    heads = store.heads()
    while page := list(islice(heads, HEADS_PER_STEP)):
        records, corrupt = rebase(page, offset_max)
        for user in corrupt:
            report(f"the state of user {user!r} is corrupt and was left as it is")
        yield list(records)


async def _commit(producer: ChangelogProducer, records: list[Record], source_offset: int | None = None) -> None:
    """Write one transaction; without a source offset the group's position stays as it is."""
    await producer.begin()
    await producer.append(records)
    if source_offset is not None:
        await producer.send_source_offset(source_offset)
    await producer.commit()


@asynccontextmanager
async def producing(app: Application, number: int) -> AsyncIterator[ChangelogProducer]:
    """Fence every worker of the partition, and yield its producer."""
    settings = app.settings
    names = ChangelogNames(
        settings.app_id,
        TopicPartition(settings.topics.actions, number),
        TopicPartition(settings.changelog_topic, number),
    )
    timeout_ms = settings.kafka.transaction_timeout_ms
    producer = ChangelogProducer(names, app.client, transaction_timeout_ms=timeout_ms)
    try:
        await producer.start()
        yield producer
    finally:
        await producer.stop()


async def output_end(app: Application, number: int) -> int:
    """Return the offset after the last record of a partition of the output topic."""
    reader = LogReader(TopicPartition(app.settings.topics.embeddings, number), app.client)
    try:
        await reader.open()
        return reader.end
    finally:
        await reader.close()


@dataclass(frozen=True, slots=True)
class Move:
    """A plan: one partition continues at another offset of its log."""

    app: Application
    partition: int
    found: Found
    to: int
    command: str

    @property
    def position(self) -> int:
        """Offset at which the state is; the beginning of the log without state."""
        return self.found.mark.source_offset if self.found.mark else self.found.earliest

    @property
    def is_truncated(self) -> bool:
        """True if the state contains offsets that the log does not have, so they may be used again for other events."""
        return self.position > self.found.end or self.found.is_overwritten

    def new_mark(self, output_offset: int) -> CheckpointMark:
        """Return the mark at the new place; the last record is not kept, because the operator vouches for the place.

        `output_offset` replaces the one of a state whose log was truncated.
        """
        mark = self.found.mark or CheckpointMark(self.position, 0)
        if self.is_truncated:
            mark = replace(mark, life=mark.life + 1, unfinished="", output_offset=output_offset)
        operations = noted(mark.operations, f"skip from offset {self.position} to {self.to}")
        return replace(mark, source_offset=self.to, identity=self.found.identity, operations=operations, last=None)

    def describe(self) -> str:
        """Return what the move does, in one line."""
        distance = self.to - self.position
        if self.found.is_overwritten:
            return (
                f"continue at offset {self.to} of a log that was truncated and has grown to {self.found.end} (the "
                f"state is at {self.position}); every user keeps its sequence, and events from {self.to} on are new"
            )
        if self.is_truncated:
            return (
                f"continue at offset {self.to} of a log that was truncated to {self.found.end} (the state is at "
                f"{self.position}); every user keeps its sequence, and new events below {self.position} are new"
            )
        if distance > 0:
            return f"skip {distance} offsets, {self.position} to {self.to - 1}: their events are never applied"
        if distance < 0:
            return (
                f"read {-distance} offsets again, {self.to} to {self.position - 1}: each user ignores the events up to "
                "the last one that it has applied"
            )
        return f"stay at offset {self.to}, and commit it for the group"


def check_move(move: Move) -> None:
    """Raise `InfraError` if the position cannot be moved there."""
    found, mark = move.found, move.found.mark
    if (
        mark is not None
        and mark.identity is not None
        and (problems := list(differences(mark.identity, found.identity)))
    ):
        raise InfraError("the state is of another log", "; ".join(problems), "use `streamformer state adopt`")
    if mark is not None and mark.unfinished and mark.unfinished != move.command:
        raise InfraError("the state is half rewritten", f"`{mark.unfinished}` was interrupted", "run that again first")
    if not found.earliest <= move.to <= found.end:
        raise InfraError(
            f"partition {move.partition} cannot continue at offset {move.to}",
            f"the log has the offsets {found.earliest} to {found.end}",
            "choose an offset within the log",
        )


async def carry_out(move: Move, report: Report) -> None:
    """Move the position."""
    app, output_offset = move.app, 0
    app.require_no_workers()
    async with producing(app, move.partition) as producer:
        if move.is_truncated:
            mark = move.found.mark or CheckpointMark(move.position, 0)
            await _commit(producer, [encode_mark(replace(mark, unfinished=move.command))])
            async with app.restored(move.partition) as store:
                users = await _rebase(store, producer, move.to - 1, report)
            report(f"partition {move.partition}: {users} users")
            output_offset = await output_end(app, move.partition)
        await _commit(producer, [encode_mark(move.new_mark(output_offset))], move.to)
