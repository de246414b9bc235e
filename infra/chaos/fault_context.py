"""The parts of a run that a fault can reach: broker, workers and their disks, workload, topics, and a seeded generator.

A fault is a generator over a `FaultContext`: it strikes, yields the seconds until its next step, heals what it broke,
and ends. `play` runs several at once. A fault that is stopped half-way still heals, in its `finally`.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import kafka
from kafka.admin import ConfigResource, ConfigResourceType

from infra.chaos.checks.violations import Violation
from infra.harness.deployment import Deployment
from infra.harness.run import Run
from infra.harness.workload import Workload
from infra.kafka.broker import Broker

TICK_S = 0.05
STARTED_S = 1.0
READY_MAX_S = 40.0
Steps = Iterator[float]


@dataclass(slots=True)
class FaultContext:
    """Everything that a fault can reach."""

    broker: Broker
    run: Run
    workload: Workload
    rng: random.Random
    folder: Path
    rebalances_wanted: int
    progress: Callable[[str], None] = print
    """Prints a line about the progress of a long fault."""
    found: list[Violation] = field(default_factory=list)
    """Violations found by faults themselves, in addition to the checker's."""
    broker_restarts: int = 0
    memory_mb: list[float] = field(default_factory=list)
    """Memory of one worker, after each rebalance."""
    rebalances: int = 0
    """Rebalances in that worker's log."""

    @property
    def deployment(self) -> Deployment:
        """Deployment of the run."""
        return self.run.deployment

    def some_worker(self) -> int | None:
        """Return a running worker at random, or None if none runs."""
        running = self.run.supervisor.running()
        return self.rng.choice(running) if running else None

    def until_ready(self, number: int) -> Steps:
        """Wait until a worker that was just started or killed has a ready partition, or the time is up."""
        yield STARTED_S
        until_s = time.monotonic() + READY_MAX_S
        while time.monotonic() < until_s and not self.run.supervisor.has_ready_partition(number):
            yield TICK_S

    def restart_broker(self) -> Steps:
        """Restart the broker in a thread, and wait until it answers."""
        thread = threading.Thread(target=self.broker.restart, name="broker-restart")
        thread.start()
        while thread.is_alive():
            yield TICK_S
        self.broker_restarts += 1


def play(context: FaultContext, faults: Sequence[Steps]) -> None:
    """Run faults side by side until all have healed, while the supervisor restarts workers."""
    due_s = {fault: time.monotonic() for fault in faults}
    try:
        while due_s:
            context.run.supervisor.tick()
            for fault in [fault for fault, at_s in due_s.items() if at_s <= time.monotonic()]:
                try:
                    due_s[fault] = time.monotonic() + next(fault)
                except StopIteration:
                    del due_s[fault]
            time.sleep(TICK_S)
    finally:
        for fault in due_s:
            fault.close()  # type: ignore[attr-defined]


def set_topic_config(servers: str, topic: str, configs: dict[str, str]) -> None:
    """Alter a topic at the broker; the change is in force on return."""
    with _admin(servers) as admin:
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs)])


def delete_topic(servers: str, topic: str) -> None:
    """Delete a topic."""
    with _admin(servers) as admin:
        admin.delete_topics([topic])


def delete_records(servers: str, topic: str, before: dict[int, int]) -> None:
    """Delete the records of each partition before an offset."""
    with _admin(servers) as admin:
        admin.delete_records({kafka.TopicPartition(topic, number): offset for number, offset in before.items()})


def _admin(servers: str) -> closing[kafka.KafkaAdminClient]:
    return closing(kafka.KafkaAdminClient(bootstrap_servers=servers))
