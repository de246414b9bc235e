"""The proof that a restored state continues the source log: decided from what was found, before anything is processed.

Four positions of a source partition are compared, with the state's mark at offset m and the committed offset at c:

    log     |<- earliest ......................................... end ->|
    m = c   the rule: one transaction wrote both
    m < c   the changelog has lost records, or an operator moved the group's offset forward: rejected
    m > c   an operator moved the offset back, or the group's offsets are gone: the state continues at m, and says so
    m < earliest   retention deleted events before they were read: counted, and continued at the earliest offset
    m > end        the log is shorter than what was read from it: truncated, rejected
    m <= end       but the log holds another record than the last one before m: truncated and grown again, rejected

Offsets are comparable only within one log, so the identity in the mark comes first. A checkpoint commits its offset
with the note `COMMITTED_BY`, by which an offset that somebody else committed is recognised.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from streams.errors import HaltsPartition, StopsWorker
from streams.storage.codec import CheckpointMark
from streams.storage.identity import Identity, LastRecord, differences

COMMITTED_BY = "streamformer checkpoint"
"""Metadata of the offsets that checkpoints commit."""


class WrongIdentity(StopsWorker):
    """The state belongs to another cluster, topic or layout than the settings lead to."""


class Unproven(HaltsPartition):
    """The state of one partition does not continue its log; only an operator can decide how it goes on."""

    retriable = False


class IncompleteRestore(Unproven):
    """Records of the state are lost, so processing of the partition must not begin."""


class SourceTruncated(Unproven):
    """The source log ends, or has ended, before the position of the state."""


class OffsetsMoved(Unproven):
    """Somebody moved the offset of the consumer group past the events that the state contains."""


@dataclass(frozen=True, slots=True)
class Names:
    """Names in the messages about one partition."""

    app_id: str
    source_topic: str
    changelog_topic: str
    partition: int


@dataclass(frozen=True, slots=True)
class Found:
    """What was found of one partition after fencing and restoring."""

    mark: CheckpointMark | None
    committed: int | None
    """Committed offset of the group, None without one."""
    metadata: str
    """Metadata of the committed offset."""
    earliest: int
    """First offset that the source log still has."""
    end: int
    """Offset after the last stable record of the source log."""
    identity: Identity
    """Identity that the settings lead to."""
    last: LastRecord | None = None
    """What the source log holds at the offset of the mark's last record; None if that cannot be read any more."""

    @property
    def is_overwritten(self) -> bool:
        """True if the source log holds another record than the last one that the state contains."""
        held = self.mark.last if self.mark else None
        return held is not None and self.last is not None and held != self.last


@dataclass(frozen=True, slots=True)
class Proven:
    """Where a partition continues."""

    mark: CheckpointMark
    """Mark whose position advances with each checkpoint; it has the present identity."""
    expired: int = 0
    """Offsets that retention deleted before they were read."""
    rewound: bool = False
    """True if the committed offset was before the mark."""
    must_write: bool = False
    """True if the next checkpoint must write the mark, although nothing has changed: it or the committed offset was not
    as a checkpoint writes them."""
    lines: list[str] = field(default_factory=list)
    """Lines for the log, about everything that was assumed or found different."""


def prove(names: Names, found: Found) -> Proven:
    """Return where the partition continues; raise `WrongIdentity` or `Unproven`, with the ways on, if it must not."""
    mark = found.mark
    if mark is None:
        if found.committed is not None:
            raise _behind(names, found)
        return Proven(CheckpointMark(found.earliest, 0, found.identity))
    check_identity(names, mark, found.identity)
    if found.committed is not None and mark.source_offset < found.committed:
        raise _behind(names, found)
    if mark.source_offset > found.end:
        raise truncated(names, mark.source_offset, found.end)
    if found.is_overwritten:
        raise _overwritten(names, mark, found.end)
    lines = []
    if mark.identity is None:
        lines.append(_taken_over(names, found.identity))
    rewound = mark.source_offset > (mark.source_offset if found.committed is None else found.committed)
    if rewound or found.committed is None:
        lines.append(_rewound(names, mark.source_offset, found.committed))
    expired = max(0, found.earliest - mark.source_offset)
    start = mark.source_offset + expired
    proven = replace(mark, source_offset=start, identity=found.identity)
    must_write = mark.source_offset != found.committed or mark.identity != found.identity
    return Proven(proven, expired, rewound, must_write, lines)


def truncated(names: Names, position: int, end: int) -> SourceTruncated:
    """Return the error about a source log that ends before the position of the state."""
    return SourceTruncated(
        f"partition {names.partition} of {names.source_topic} ends at offset {end}, but the state contains events up "
        f"to offset {position}: the log was truncated (for example by an unclean leader election) or created again, "
        "and new events would be taken for old ones. Ways on, with the workers stopped: `streamformer state skip "
        f"--partition {names.partition} --to {end}` keeps every sequence and continues at the new end; `streamformer "
        "state adopt` begins at a chosen place of every partition; a new app_id begins with empty state"
    )


def _overwritten(names: Names, mark: CheckpointMark, end: int) -> SourceTruncated:
    """Return the error about a source log that was truncated and has grown past the position of the state."""
    at, position = mark.last.offset if mark.last else 0, mark.source_offset
    return SourceTruncated(
        f"partition {names.partition} of {names.source_topic} holds another record at offset {at} than the one that "
        "the state contains: the log was truncated (for example by an unclean leader election) and has grown again, to "
        f"{end}, and new events would be taken for old ones. Ways on, with the workers stopped: `streamformer state "
        f"skip --partition {names.partition} --to {position}` keeps every sequence and leaves out the new events "
        f"before {position}, a lower offset applies them too; `streamformer state adopt` begins at a chosen place of "
        "every partition; a new app_id begins with empty state"
    )


def expired_line(names: Names, lost: int, begin: int) -> str:
    """Return the error line about events that retention deleted before they were read."""
    return (
        f"{lost} events of partition {names.partition} of {names.source_topic} (offsets {begin} to {begin + lost - 1}) "
        "were deleted by retention before they were read; raise retention.ms of the topic, and keep workers running"
    )


def check_identity(names: Names, mark: CheckpointMark, found: Identity) -> None:
    """Raise `WrongIdentity` unless a state with this mark may continue on the logs at hand."""
    state = f"the state of {names.app_id} (changelog {names.changelog_topic}, partition {names.partition})"
    if mark.unfinished:
        raise WrongIdentity(
            f"{state} is half rewritten, because `{mark.unfinished}` was interrupted: run it again with the same "
            "options"
        )
    if mark.identity is None:
        return
    if (held := mark.identity.layout) and found.layout and held != found.layout:
        raise WrongIdentity(
            f"{state} was written with {held}, the settings have {found.layout}: restore the old settings, or start a "
            "new application id"
        )
    if problems := list(differences(mark.identity, found)):
        raise WrongIdentity(
            f"{state} is of another log, at offset {mark.source_offset}: {'; '.join(problems)}. Two ways on: "
            "`streamformer state adopt` keeps every sequence and begins at a chosen place of this topic; a new app_id "
            "begins with empty state"
        )


def _behind(names: Names, found: Found) -> Unproven:
    """Return the error about a state that ends before the committed offset."""
    mark, committed = found.mark, found.committed
    at = "empty" if mark is None else f"of offset {mark.source_offset}"
    if mark is None or found.metadata == COMMITTED_BY or mark.identity is None:
        return IncompleteRestore(
            f"the restored state is {at}, but offset {committed} is committed: the changelog {names.changelog_topic}, "
            f"partition {names.partition}, has lost records or was created again (or somebody moved the offset of "
            f"group {names.app_id} forward: then move it back, or skip with `streamformer state skip --partition "
            f"{names.partition} --to {committed}`); set a new app_id to rebuild from the source topic"
        )
    return OffsetsMoved(
        f"somebody moved the offset of group {names.app_id} in partition {names.partition} of {names.source_topic} "
        f"forward to {committed}; the state contains the events before {mark.source_offset}. To skip the "
        f"{committed - mark.source_offset if committed is not None else 0} offsets in between, run `streamformer state "
        f"skip --partition {names.partition} --to {committed}`; to process them, run it with --to {mark.source_offset}"
    )


def _taken_over(names: Names, identity: Identity) -> str:
    return (
        f"the state of partition {names.partition} was written by an earlier version and names no log; it is taken "
        f"over, once, as that of topic {identity.source_topic} with id {identity.source_topic_id or 'unknown'} in "
        f"cluster {identity.cluster_id or 'unknown'}"
    )


def _rewound(names: Names, position: int, committed: int | None) -> str:
    what = (
        f"group {names.app_id} has no committed offset"
        if committed is None
        else f"somebody moved the offset of group {names.app_id} back to {committed}"
    )
    return (
        f"{what} in partition {names.partition} of {names.source_topic}, but the state contains the events before "
        f"{position} and continues there; to read events again on purpose, stop the workers and run `streamformer "
        f"state skip --partition {names.partition} --to OFFSET`"
    )
