"""Records of the topics of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One record of a topic, independent of the client that fetched it."""

    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class History:
    """Committed records of each topic; those of one partition are in order of offset."""

    inputs: Sequence[LogRecord] = ()
    changelog: Sequence[LogRecord] = ()
    outputs: Sequence[LogRecord] = ()
    dead_letters: Sequence[LogRecord] = ()
    features: Sequence[LogRecord] = ()
