"""The expected sequences, as plainly as possible: a dictionary of sorted lists, folded over the source log."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Event:
    """The content of one record of the source log."""

    user: bytes
    timestamp_ms: int
    item: int = 0
    event_id: int = 0
    strong: bool = False
    tombstone: bool = False
    name: str = ""
    """Item, as text."""
    value: float | None = None


@dataclass(frozen=True)
class Sequence:
    """A user's sequence after some record of the log."""

    kept: tuple[Event, ...] = ()
    count: int = 0
    forgotten_ms: int | None = None
    changed_at: int = -1
    """Offset of the last record that changed it."""
    seen: tuple[Event, ...] = ()
    """Every event since the user was last forgotten that is no repetition, in order of arrival."""

    @property
    def items(self) -> tuple[int, ...]:
        """Items of the kept actions, oldest first."""
        return tuple(event.item for event in self.kept)


@dataclass
class Model:
    """A source log (None where it holds no action), and every sequence after each of its records."""

    length_max: int
    counts_too_old: bool = False
    """Whether an event that is older than everything kept changes the user, because features count it."""
    ttl_ms: int = 0
    """Gap between two actions at which the older ones are forgotten; 0 for none."""
    log: list[Event | None] = field(default_factory=list)
    malformed: set[int] = field(default_factory=set)
    """Offsets of records that are not actions."""
    past: dict[bytes, list[Sequence]] = field(default_factory=dict)

    def append(self, event: Event | None) -> None:
        """Append the next record of the log."""
        offset = len(self.log)
        self.log.append(event)
        if event is None:
            self.malformed.add(offset)
        else:
            past = self.past.setdefault(event.user, [Sequence()])
            after = self._after(past[-1], event, offset)
            if after is not past[-1]:
                past.append(after)

    def skip(self) -> None:
        """Pass an offset without a record that anybody can read: a marker, or part of an aborted transaction."""
        self.log.append(None)

    def at(self, user: bytes, offset: int) -> Sequence:
        """Return the user's sequence after all records before `offset`."""
        return next(s for s in reversed(self.past.get(user, [Sequence()])) if s.changed_at < offset)

    def is_expired(self, sequence: Sequence, at_ms: int) -> bool:
        """Return whether a user is so old at a time that it is, or may be, forgotten."""
        return bool(self.ttl_ms and sequence.kept) and at_ms - sequence.kept[-1].timestamp_ms >= self.ttl_ms

    def _after(self, before: Sequence, event: Event, offset: int) -> Sequence:
        if event.tombstone:
            forgotten_ms = max(event.timestamp_ms, before.forgotten_ms or event.timestamp_ms)
            return Sequence(forgotten_ms=forgotten_ms, changed_at=offset)
        if before.forgotten_ms is not None and event.timestamp_ms <= before.forgotten_ms:
            return before
        if event.event_id and any(kept.event_id == event.event_id for kept in before.kept):
            return before
        if self.is_expired(before, event.timestamp_ms):
            before = Sequence(forgotten_ms=before.forgotten_ms)
        seen = (*before.seen, event)
        is_full = len(before.kept) == self.length_max
        if is_full and event.timestamp_ms < before.kept[0].timestamp_ms:
            return replace(before, changed_at=offset, seen=seen) if self.counts_too_old else before
        kept = sorted((*before.kept, event), key=lambda each: each.timestamp_ms)[-self.length_max :]
        return replace(before, kept=tuple(kept), count=before.count + 1, changed_at=offset, seen=seen)
