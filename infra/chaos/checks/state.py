"""Compare the changelog with the model: each checkpoint as it was written, and at rest what a restore would read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from encoder.actions.columns import Actions
from infra.chaos.checks.violations import Kind, Violation
from infra.harness.history import LogRecord
from infra.harness.model import Model, ModelUser
from streams.core.layout import StateLimits
from streams.storage.codec import (
    CHUNK_PREFIX,
    HEAD_PREFIX,
    MARK_KEY,
    CorruptValue,
    chunk_key,
    decode_chunk,
    decode_head,
    decode_mark,
)


@dataclass(slots=True)
class _Partition:
    """Changelog of one partition."""

    checked: int = 0
    """Number of the model's changes that a checkpoint has been compared with."""


class StateChecks:
    """Follows the changelog, and decodes it by the documented byte layout."""

    def __init__(self, model: Model, *, sequence_length: int, chunk_length: int) -> None:
        self._model = model
        self._limits = StateLimits(sequence_length=sequence_length, chunk_length=chunk_length)
        self._partitions: dict[int, _Partition] = defaultdict(_Partition)
        self.values: dict[int, dict[bytes, bytes]] = defaultdict(dict)
        """Last value of each key of the changelog, by partition."""
        self.marks: dict[int, int] = {}
        """Source offset in the last mark, by partition."""
        self._moves: dict[int, int] = {}
        """Source offset at which an operator lets a partition continue, until its mark has been read."""
        self.checkpoints = 0

    def feed(self, records: Iterable[LogRecord]) -> list[Violation]:
        """Apply changelog records in order, and check the checkpoint that each mark completes."""
        found: list[Violation] = []
        for record in records:
            assert record.key is not None
            values = self.values[record.partition]
            if record.value is None:
                values.pop(record.key, None)
            else:
                values[record.key] = record.value
            if record.key == MARK_KEY:
                found += self._at_mark(record)
        return found

    def _at_mark(self, record: LogRecord) -> Iterator[Violation]:
        """Every user that changed before the mark's source offset must be in the state of that offset.

        The mark of an unfinished rewrite is none of a checkpoint: its offset is still one of the log of before.
        """
        assert record.value is not None
        mark = decode_mark(record.value)
        if mark.unfinished:
            return
        partition, offset = record.partition, mark.source_offset
        self.checkpoints += 1
        is_moved = self._moves.get(partition) == offset
        if is_moved:
            del self._moves[partition]
        if offset < self.marks.get(partition, 0) and not is_moved:
            detail = f"the mark before it names {self.marks[partition]}"
            yield Violation(Kind.WRONG_CHECKPOINT, None, partition, offset, detail)
        self.marks[partition] = offset
        part, changes = self._partitions[partition], self._model.changes.get(partition, [])
        last: dict[bytes, int] = {}
        while part.checked < len(changes) and changes[part.checked][0] < offset:
            changed_at, user = changes[part.checked]
            last[user] = changed_at
            part.checked += 1
        for user, changed_at in last.items():
            yield from self._head(partition, user, changed_at)

    def _head(self, partition: int, name: bytes, offset: int) -> Iterator[Violation]:
        """A user's head must be the one right after `offset`."""
        value = self.values[partition].get(HEAD_PREFIX + name)
        if value is None:
            yield Violation(Kind.WRONG_CHECKPOINT, name, partition, offset, "the user has no head")
            return
        try:
            header, _ = decode_head(name, value)
        except CorruptValue as error:
            yield Violation(Kind.WRONG_STATE, name, partition, offset, str(error))
            return
        found = int(header["applied_offset"][0]), int(header["count"][0])
        must = self._model.users[name].versions[offset]
        if found != (offset, must.count):
            detail = f"applied offset {found[0]}, must be {offset}; count {found[1]}, must be {must.count}"
            yield Violation(Kind.WRONG_CHECKPOINT, name, partition, offset, detail)

    def at_rest(self) -> Iterator[Violation]:
        """Compare what a restore would read with the model, per user and action."""
        for name, user in self._model.users.items():
            yield from self._user_at_rest(name, user)
        for number, offset in self._moves.items():
            yield Violation(Kind.WRONG_CHECKPOINT, None, number, offset, "no mark of the operator's move is there")
        yield from self._unknown_users()
        yield from self._leftovers()

    def move(self, partition: int, to: int) -> None:
        """Expect a mark at this source offset, which may be before the last one."""
        self._moves[partition] = to

    def settle(self) -> None:
        """Start to count changes at 0 again, because the model is about to drop them."""
        for part in self._partitions.values():
            part.checked = 0

    def _user_at_rest(self, name: bytes, user: ModelUser) -> Iterator[Violation]:
        where = (name, user.partition, user.applied_offset)
        value = self.values[user.partition].get(HEAD_PREFIX + name)
        if value is None:
            yield Violation(Kind.LOST, *where, "the user is not in the changelog")
            return
        try:
            header, tail = decode_head(name, value)
            kept = self._kept(name, user.partition, int(header["count"][0]), tail)
        except CorruptValue as error:
            yield Violation(Kind.WRONG_STATE, *where, str(error))
            return
        yield from compare(*where, kept, user.actions())
        if int(header["count"][0]) != user.count or int(header["applied_offset"][0]) != user.applied_offset:
            detail = (
                f"count {header['count'][0]}, must be {user.count}; "
                f"applied offset {header['applied_offset'][0]}, must be {user.applied_offset}"
            )
            yield Violation(Kind.WRONG_STATE, *where, detail)

    def _kept(self, name: bytes, partition: int, count: int, tail: Actions) -> Actions:
        """Return the kept actions, oldest first: chunks by number, then the tail. Raises `CorruptValue`."""
        length, values = self._limits.chunk_length, self.values[partition]
        first = max(0, count - self._limits.sequence_length)
        numbers = range(first // length, count // length)
        chunks = [
            decode_chunk(name, number, values.get(chunk_key(name, number, self._limits)), self._limits)
            for number in numbers
        ]
        return np.concatenate((*chunks, tail))[first - (first // length) * length :]

    def _unknown_users(self) -> Iterator[Violation]:
        for number, values in self.values.items():
            for key in values:
                if key[:1] == HEAD_PREFIX and key[1:] not in self._model.users:
                    yield Violation(Kind.FOREIGN, key[1:], number, -1, "the input has no action of this user")

    def _leftovers(self) -> Iterator[Violation]:
        """A chunk that the user, as counted since the last deletion, has not written is one of before."""
        for number, values in self.values.items():
            for key in values:
                if key[:1] != CHUNK_PREFIX:
                    continue
                name, index = key[1:-1], key[-1]
                if _is_leftover(self._model.users.get(name), index, self._limits.chunk_length):
                    yield Violation(Kind.LEFTOVER, name, number, -1, f"chunk {index} is of before the deletion")


def _is_leftover(user: ModelUser | None, index: int, chunk_length: int) -> bool:
    """Chunks are written in turn, so a user with fewer of them than `index` wrote this one before a deletion."""
    return user is None or index >= user.count // chunk_length


def compare(name: bytes, partition: int, offset: int, found: Actions, expected: Actions) -> Iterator[Violation]:
    """Yield every lost, doubled and foreign action, or the place from which the order is wrong."""
    rows, must = found.tolist(), expected.tolist()
    if rows == must:
        return
    surplus, missing = Counter(rows) - Counter(must), Counter(must) - Counter(rows)
    for row in missing:
        yield Violation(Kind.LOST, name, partition, offset, f"action {_name(row)} is missing")
    for row in surplus:
        kind = Kind.DOUBLED if row in must else Kind.FOREIGN
        yield Violation(kind, name, partition, offset, f"action {_name(row)} is there once too often")
    if not surplus and not missing:
        at = next(i for i, (a, b) in enumerate(zip(rows, must, strict=True)) if a != b)
        yield Violation(Kind.SWAPPED, name, partition, offset, f"the order is wrong from action {at} of {len(must)}")


def _name(row: tuple[int, ...]) -> str:
    """Return the action's number, which was sent as its duration, and its event time."""
    return f"number {row[4]} of {row[3]} ms"
