"""The part of a run that a fault can reach: broker, workers and their disks, workload, topics, and a seeded generator.

A fault is a generator over a `FaultContext`: it strikes, yields the seconds until its next step, heals what it broke,
and ends. `play` runs several at once. A fault that is stopped half-way still heals, in its `finally`.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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
    """One run's surroundings."""

    broker: Broker
    run: Run
    workload: Workload
    rng: random.Random
    folder: Path
    rebalances_wanted: int
    say: Callable[[str], None] = print
    found: list[Violation] = field(default_factory=list)
    """What faults themselves have found, beyond the checker."""
    broker_restarts: int = 0
    memory_mb: list[float] = field(default_factory=list)
    """Of one worker, through the rebalances."""
    rebalances: int = 0
    """Of that worker, as its log tells them."""

    @property
    def deployment(self) -> Deployment:
        return self.run.deployment

    def some_worker(self) -> int | None:
        """A running worker, by the rng."""
        running = self.run.supervisor.running()
        return self.rng.choice(running) if running else None

    def until_ready(self, number: int) -> Steps:
        """Until a worker that was just started, or killed, works; it may take its time, but not for ever."""
        yield STARTED_S
        until_s = time.monotonic() + READY_MAX_S
        while time.monotonic() < until_s and not self.run.supervisor.is_ready(number):
            yield TICK_S

    def restart_broker(self) -> Steps:
        """Start the broker again while time goes on; ends when it answers."""
        thread = threading.Thread(target=self.broker.restart, name="broker-restart")
        thread.start()
        while thread.is_alive():
            yield TICK_S
        self.broker_restarts += 1


def play(context: FaultContext, faults: Sequence[Steps]) -> None:
    """Run faults side by side until all have healed, the supervisor of the workers going on."""
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


def admin(servers: str) -> kafka.KafkaAdminClient:
    return kafka.KafkaAdminClient(bootstrap_servers=servers)


def set_topic_config(servers: str, topic: str, configs: dict[str, str]) -> None:
    """Alter a topic at the broker; returns once that is in force."""
    client = admin(servers)
    try:
        client.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs)])
    finally:
        client.close()


def delete_topic(servers: str, topic: str) -> None:
    client = admin(servers)
    try:
        client.delete_topics([topic])
    finally:
        client.close()


def delete_records(servers: str, topic: str, before: dict[int, int]) -> None:
    """Remove the records of each partition before an offset."""
    client = admin(servers)
    try:
        client.delete_records({kafka.TopicPartition(topic, number): offset for number, offset in before.items()})
    finally:
        client.close()
