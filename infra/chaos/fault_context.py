"""The parts of a run that a fault can reach: brokers, workers, their disks, workload, topics, and a seeded generator.

A fault is a generator over a `FaultContext`: it strikes, yields the seconds until its next step, heals what it broke,
and ends. `play` runs several at once. A fault that is stopped half-way still heals, in its `finally`.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import kafka
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import KafkaError

from infra.chaos.checks.violations import Violation
from infra.harness.deployment import Deployment
from infra.harness.run import Run
from infra.harness.workload import Workload
from infra.kafka.address import BrokerFailed
from infra.kafka.broker import Broker
from infra.kafka.cluster import Cluster

TICK_S = 0.05
STARTED_S = 1.0
READY_MAX_S = 40.0
LOOK_S, IN_SYNC_MAX_S = 0.3, 60.0
Steps = Iterator[float]


@dataclass(slots=True)
class FaultContext:
    """Everything that a fault can reach."""

    cluster: Cluster
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

    @property
    def servers(self) -> str:
        """Addresses of all brokers."""
        return self.cluster.bootstrap_servers

    def some_broker(self) -> Broker:
        """Return a broker at random."""
        return self.rng.choice(self.cluster.brokers)

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

    def restart(self, broker: Broker) -> Steps:
        """Restart a broker in a thread, and wait until it answers."""
        thread = threading.Thread(target=broker.restart, name="broker-restart")
        thread.start()
        while thread.is_alive():
            yield TICK_S
        self.broker_restarts += 1

    def until_in_sync(self) -> Steps:
        """Wait until every replica of every partition is in sync; a fault that starts earlier strikes two brokers."""
        yield from self.until(self.cluster.is_in_sync, "the replicas are not in sync")

    def until(self, condition: Callable[[], bool], problem: str) -> Steps:
        """Wait until a condition holds, which may fail to answer; raise `BrokerFailed` when the time is up."""
        until_s = time.monotonic() + IN_SYNC_MAX_S
        while True:
            with suppress(KafkaError, OSError):
                if condition():
                    return
            if time.monotonic() > until_s:
                raise BrokerFailed(problem, f"waited for {IN_SYNC_MAX_S:.0f} s", "see the logs of the brokers")
            yield LOOK_S


def play(context: FaultContext, faults: Sequence[Steps]) -> None:
    """Run faults side by side until all have healed, while the supervisor restarts workers."""
    due_s = {fault: time.monotonic() for fault in faults}
    try:
        while due_s:
            context.run.supervisor.tick()
            for fault in [fault for fault, at_s in due_s.items() if at_s <= time.monotonic()]:
                try:
                    wait_s = next(fault)  # may take long itself; the wait begins when it returns
                except StopIteration:
                    del due_s[fault]
                else:
                    due_s[fault] = time.monotonic() + wait_s
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
