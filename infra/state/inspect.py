"""Look at the state in the changelog: one user, every partition's position, or a check of everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from aiokafka.structs import TopicPartition

from encoder.actions.columns import Actions
from infra.state.logs import Application
from infra.state.rewrite import partition_of
from streams.core.columns import Columns
from streams.core.layout import LONG_AGO, NEVER, StoredFeatures
from streams.core.policy import Reason
from streams.engine.changelog import LogReader
from streams.engine.proof import Found, prove
from streams.errors import HaltsPartition, StopsWorker
from streams.storage.codec import (
    CHUNK_PREFIX,
    HEAD_PREFIX,
    MARK_KEY,
    CheckpointMark,
    CorruptValue,
    LayoutChanged,
    chunk_key,
    decode_mark,
    head_key,
    unseal,
)
from streams.storage.features import decode_features, features_key
from streams.storage.memory_store import MemoryStore
from streams.storage.reader import read_users
from streams.storage.store import DEFINITIONS_PREFIX, FEATURES_PREFIX, PartitionStore

USERS_PER_READ = 5_000
PROBLEMS_SHOWN = 20
"""Problems that are described, per partition; the rest is counted."""


def found_as_json(app: Application, partition: int, found: Found) -> dict[str, Any]:
    """Return everything that a worker would find in a partition, with the line that it would end with, if any."""
    mark = found.mark
    held = mark.identity if mark else None
    problem, notes = "", []
    try:
        notes = prove(app.names(partition), found).lines
    except (HaltsPartition, StopsWorker) as error:
        problem = str(error)
    return {
        "partition": partition,
        "state_offset": mark.source_offset if mark else None,
        "output_offset": mark.output_offset if mark else None,
        "committed_offset": found.committed,
        "earliest_offset": found.earliest,
        "end_offset": found.end,
        "lag": found.end - max(found.earliest, mark.source_offset if mark else found.earliest),
        "identity": held.as_json() if held else None,
        "life": mark.life if mark else 0,
        "operations": list(mark.operations) if mark else [],
        "problem": problem,
        "notes": notes,
    }


@dataclass(slots=True)
class Checked:
    """What `verify` found in one partition."""

    partition: int
    records: int = 0
    deleted: int = 0
    users: int = 0
    users_with_features: int = 0
    forgotten: int = 0
    """Users without an action, of whom a head remains."""
    actions: int = 0
    marks: int = 0
    problem_count: int = 0
    problems: list[str] = field(default_factory=list)
    """The first `PROBLEMS_SHOWN` problems."""

    def problem(self, text: str) -> None:
        """Count a problem, and keep its text if it is one of the first."""
        self.problem_count += 1
        if len(self.problems) < PROBLEMS_SHOWN:
            self.problems.append(text)


async def verify(app: Application, partition: int) -> Checked:
    """Read a whole changelog partition and check every record, every mark and every user in it."""
    checked = Checked(partition)
    found = await app.found(partition)
    try:
        prove(app.names(partition), found)
    except (HaltsPartition, StopsWorker) as error:
        checked.problem(str(error))
    await _check_log(app, partition, checked)
    async with app.restored(partition) as store:
        heads = store.heads()
        while page := [user for user, _ in islice(heads, USERS_PER_READ)]:
            _check_users(app, store, page, checked)
    return checked


async def _check_log(app: Application, partition: int, checked: Checked) -> None:
    """Check every visible record by itself, and the order of the marks."""
    reader = LogReader(TopicPartition(app.settings.changelog_topic, partition), app.client)
    before: CheckpointMark | None = None
    try:
        await reader.open()
        if reader.begin > 0:
            checked.problem(f"the log begins at offset {reader.begin}: a worker without local state cannot restore it")
        async for records in reader.batches(reader.begin, records_max=5_000):
            for record in records:
                checked.records += 1
                checked.deleted += record.value is None
                try:
                    before = _check_record(record, before, checked)
                except CorruptValue as error:
                    checked.problem(f"offset {record.offset}: {error}")
    finally:
        await reader.close()
    if before is None and checked.records:
        checked.problem("the log has records and no mark")


def _check_record(record: Any, before: CheckpointMark | None, checked: Checked) -> CheckpointMark | None:
    """Return the newest mark up to this record; raise `CorruptValue` if its bytes are not those that were written."""
    key, value = record.key or b"", record.value
    if value is None:
        return before
    if key == MARK_KEY:
        mark = decode_mark(value)
        checked.marks += 1
        is_moved = before is not None and (mark.life != before.life or mark.operations != before.operations)
        if before is not None and mark.source_offset < before.source_offset and not is_moved:
            checked.problem(
                f"offset {record.offset}: the mark goes back from {before.source_offset} to {mark.source_offset}"
            )
        return mark
    if key[:1] == FEATURES_PREFIX:
        decode_features(key[1:], value)
    elif key[:1] == DEFINITIONS_PREFIX or key[:1] in (HEAD_PREFIX, CHUNK_PREFIX):
        unseal(key, value)
    else:
        checked.problem(f"offset {record.offset}: the key {key[:40]!r} is unknown")
    return before


def _check_users(app: Application, store: PartitionStore, users: Sequence[bytes], checked: Checked) -> None:
    """Check that every user is whole and in its partition."""
    count = app.settings.topics.partitions
    try:
        read = read_users(store, users, app.limits, with_features=True)
    except LayoutChanged as error:
        checked.problem(str(error))
        return
    for user in users:
        if partition_of(user, count) != checked.partition:
            checked.problem(f"user {user!r} belongs to partition {partition_of(user, count)}")
    for damage in read.corrupt.values():
        checked.problem(str(damage))
    checked.users += len(users)
    checked.users_with_features += sum(each is not None for each in read.features)
    checked.forgotten += int((read.stored.headers["count"] == 0).sum())
    checked.actions += len(read.stored.actions)


async def show(app: Application, user: bytes) -> dict[str, Any] | None:
    """Return the state of one user as of the last checkpoint; None if it has none."""
    partition = partition_of(user, app.settings.topics.partitions)
    chunks = (chunk_key(user, number, app.limits) for number in range(app.limits.chunk_keys))
    wanted = {head_key(user), features_key(user), *chunks}
    store = MemoryStore()
    mark: CheckpointMark | None = None
    reader = LogReader(TopicPartition(app.settings.changelog_topic, partition), app.client)
    try:
        await reader.open()
        async for records in reader.batches(reader.begin, records_max=5_000):
            kept = [(record.key, record.value) for record in records if record.key in wanted]
            if kept:
                store.write(kept, records[-1].offset)
            for record in records:
                mark = decode_mark(record.value) if record.key == MARK_KEY else mark
    finally:
        await reader.close()
    if head_key(user) not in store.records:
        return None
    read = read_users(store, [user], app.limits, with_features=True)
    for error in read.corrupt.values():
        raise error
    shown = _user_as_json(user, partition, mark, read.stored.headers, read.stored.actions)
    return shown | {"features": _features_as_json(read.features[0])}


def _features_as_json(stored: StoredFeatures | None) -> dict[str, Any] | None:
    """Return what is stored of a user's features; their values are in the features topic."""
    if stored is None:
        return None
    return {"feature_set": stored.version, "bytes": len(stored.packed), "refresh": _time(stored.refresh_ms)}


def _user_as_json(
    user: bytes, partition: int, mark: CheckpointMark | None, headers: Columns, actions: Actions
) -> dict[str, Any]:
    header = headers[0]
    return {
        "user": user.decode(errors="backslashreplace"),
        "partition": partition,
        "as_of_offset": mark.source_offset if mark else None,
        "actions_applied": int(header["count"]),
        "actions_kept": len(actions),
        "applied_offset": int(header["applied_offset"]),
        "published_offset": int(header["encoded_offset"]),
        "unpublished_actions": int(header["unencoded"]),
        "due": Reason(int(header["reason"])).label if header["reason"] else None,
        "deadline": _time(int(header["due_ms"])),
        "forgotten": _time(int(header["forgotten_ms"])),
        "actions": list(_actions_as_json(actions)),
    }


def _actions_as_json(actions: Actions) -> Iterator[dict[str, Any]]:
    """Yield the fields of each kept action; ids are stored as hashes."""
    names = actions.dtype.names or ()
    for row in actions:
        yield {name: row[name].tolist() for name in names}


def _time(ms: int) -> str | None:
    if ms in (NEVER, LONG_AGO):
        return None
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return str(ms)
