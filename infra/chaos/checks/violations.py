"""What can be wrong with a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """The ways in which a law can be broken; a closed set, printed in results."""

    LOST = "lost"
    """An action that a sequence must hold is missing."""
    DOUBLED = "doubled"
    """An action stands twice in a sequence."""
    SWAPPED = "swapped"
    """The right actions in the wrong order."""
    FOREIGN = "foreign"
    """An action that must not be in a sequence: deduplicated, too old, forgotten, or never sent."""
    WRONG_STATE = "wrong-state"
    """Counters or bytes of a stored user are not what they must be."""
    WRONG_CHECKPOINT = "wrong-checkpoint"
    """A checkpoint's state is not that of the source offset its mark names."""
    COMMITTED_AHEAD = "committed-ahead"
    COMMITTED_BEHIND = "committed-behind"
    UNPROCESSED = "unprocessed"
    STALE = "stale"
    """An older embedding after a newer one, and no fault explains it."""
    REPEATED = "repeated"
    """Published twice for the same source offset, and no fault explains it."""
    WRONG_OUTPUT = "wrong-output"
    """An output that does not say what was true at its source offset."""
    WRONG_EMBEDDING = "wrong-embedding"
    """The last embedding is not that of the full history."""
    UNPUBLISHED = "unpublished"
    """The last embedding does not contain the last action."""
    RESURRECTED = "resurrected"
    """A forgotten user still has an embedding."""
    DEAD_LETTER_MISSING = "dead-letter-missing"
    DEAD_LETTER_WRONG = "dead-letter-wrong"
    SLOW_RESUME = "slow-resume"
    """Progress did not resume in time after a fault was healed."""
    UNSEEN_STALL = "unseen-stall"
    """Nothing moved for longer than the watchdog allows, and no worker ended itself."""
    UNEXPECTED_EXIT = "unexpected-exit"
    """A worker ended in a way that is none of the documented ones."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken law: what, of whom, where, and the detail."""

    kind: Kind
    user: bytes | None
    partition: int
    offset: int
    detail: str

    def __str__(self) -> str:
        who = "" if self.user is None else f" user {self.user.decode(errors='replace')}"
        return f"{self.kind}:{who} partition {self.partition} offset {self.offset}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Explained:
    """A span of processing time in which outputs may be stale or repeated, because of a fault."""

    begin_ms: int
    end_ms: int


def is_explained(at_ms: int, spans: Sequence[Explained]) -> bool:
    return any(span.begin_ms <= at_ms <= span.end_ms for span in spans)
