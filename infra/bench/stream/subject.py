"""The subject of a stream benchmark: a program that reads a topic of actions, the worker or a baseline.

The broker reports the progress of a program: the offsets that its consumer group has committed. Reading them costs the
program nothing. A program that commits none reports its own count over HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import kafka
from kafka.errors import RetriableError

from infra.harness.worker_process import Process, Program


@dataclass(frozen=True, slots=True)
class Subject:
    """A program, its topics, and how to see its progress."""

    program: Program
    topic: str
    """Topic that it reads; nothing else is written to it."""
    output: str
    """Topic that it writes."""
    applied: Callable[[], int]
    """Return the events applied so far, which are durable once `settle_s` have passed."""
    settle_s: float = 0.5

    @property
    def name(self) -> str:
        """Name in tables."""
        return self.program.name

    def wait_applied(self, process: Process, events: int, timeout_s: float) -> None:
        """Return when `events` in total are applied; raise `ProcessFailed` if that does not happen in time."""
        process.wait_until(lambda: self.applied() >= events, f"{events:,} events applied", timeout_s)


def committed(admin: kafka.KafkaAdminClient, group: str, topic: str) -> int:
    """Return the events of `topic` whose offsets `group` has committed; its partitions begin at 0."""
    try:
        offsets = admin.list_group_offsets({group: None})[group]
    except RetriableError:  # the first request about any group makes the broker create its topic of offsets
        return 0
    return sum(max(0, at.offset) for partition, at in offsets.items() if partition.topic == topic)
