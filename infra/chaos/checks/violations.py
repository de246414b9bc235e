"""Violations: the ways in which a run can break an invariant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Kind of a violation; a closed set, printed in results."""

    LOST = "lost"
    """A sequence lacks an action."""
    DOUBLED = "doubled"
    """A sequence holds an action twice."""
    SWAPPED = "swapped"
    """A sequence holds the right actions in the wrong order."""
    FOREIGN = "foreign"
    """A sequence holds an action that is a duplicate, too old, forgotten, or was never sent."""
    WRONG_STATE = "wrong-state"
    """A stored user has wrong counters, or bytes that cannot be read."""
    WRONG_CHECKPOINT = "wrong-checkpoint"
    """The state in a checkpoint is not that of the source offset its mark names."""
    COMMITTED_AHEAD = "committed-ahead"
    """The committed offset is after the one in the last mark."""
    COMMITTED_BEHIND = "committed-behind"
    """The committed offset is before the one in the last mark."""
    UNPROCESSED = "unprocessed"
    """The log has records after the committed offset."""
    STALE = "stale"
    """An older embedding, or older features, followed a newer one, and no fault explains it."""
    REPEATED = "repeated"
    """An embedding was published twice for the same source offset, and no fault explains it."""
    WRONG_OUTPUT = "wrong-output"
    """An output has headers that were not true at its source offset."""
    WRONG_EMBEDDING = "wrong-embedding"
    """The last embedding is not that of the full history."""
    WRONG_FEATURES = "wrong-features"
    """Features have headers that were not true at their source offset, or values that are not the model's."""
    UNPUBLISHED = "unpublished"
    """The last embedding, or the last features, do not contain the last action."""
    RESURRECTED = "resurrected"
    """A forgotten user still has an embedding or features."""
    LEFTOVER = "leftover"
    """The changelog keeps actions or features of a forgotten user."""
    DEAD_LETTER_MISSING = "dead-letter-missing"
    """A rejected record has no dead letter."""
    DEAD_LETTER_WRONG = "dead-letter-wrong"
    """A dead letter differs from the rejected record, gives another reason, or is of a valid action."""
    SLOW_RESUME = "slow-resume"
    """Progress did not resume in time after a fault was healed."""
    UNSEEN_STALL = "unseen-stall"
    """A partition did not move for longer than the watchdog allows, and no worker noticed."""
    HELD_UP = "held-up"
    """A partition did not move because another one could not."""
    UNEXPECTED_EXIT = "unexpected-exit"
    """A worker ended in an undocumented way."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken invariant."""

    kind: Kind
    user: bytes | None
    partition: int
    offset: int
    detail: str

    def __str__(self) -> str:
        """Return the violation on one line."""
        who = "" if self.user is None else f" user {self.user.decode(errors='replace')}"
        return f"{self.kind}:{who} partition {self.partition} offset {self.offset}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Explained:
    """Span of processing time in which outputs may be stale or repeated because of a fault."""

    begin_ms: int
    end_ms: int


def is_explained(at_ms: int, spans: Sequence[Explained]) -> bool:
    """Return whether some span contains the time."""
    return any(span.begin_ms <= at_ms <= span.end_ms for span in spans)
