"""Take from the source log what an application of its own has read, or was going to read, and play its operator.

A small application is fed and judged. Then its source topic expires, is truncated, elects a leader that lacks records,
or is created again. Events that expired before they were read are counted exactly, and the worker goes on. In the other
cases the right answer is a refusal that names the way on; the operator takes it (`streamformer state skip` or `adopt`),
the model is told what the log has lost, and every invariant must hold for what follows.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from infra.chaos.checks.violations import Kind, Violation
from infra.chaos.fault_context import FaultContext, Steps, delete_records, delete_topic
from infra.chaos.faults.changelog import wait_at_work
from infra.chaos.faults.cluster import alone_on
from infra.harness.deployment import deploy
from infra.harness.run import Run
from infra.harness.worker_process import sample
from infra.harness.workload import Workload, WorkloadOptions
from infra.kafka.address import BrokerFailed
from infra.kafka.broker import Broker
from infra.kafka.topics import ensure_topics

FEED_S, UNREAD_S, MORE_S = 6.0, 3.0, 5.0
REST_S, CALM_S, REFUSED_S, COMMAND_S, LOOK_S = 40.0, 10.0, 60.0, 60.0, 0.3
FENCED_S = 4.0
"""Time after which the cluster has noticed that a broker is gone: its session is 2 s."""
USERS, RATE = 100, 200.0
PARTITION = 0
"""Partition that loses records; the others go on."""
EXPIRED = "streamformer_events_expired_total"


@dataclass(frozen=True, slots=True)
class App:
    """The small application, with its workload."""

    context: FaultContext
    what: str
    run: Run
    workload: Workload

    @property
    def topic(self) -> str:
        """Source topic."""
        return self.run.deployment.settings.topics.actions

    def work(self, seconds: float) -> Steps:
        """Run a worker and let users act for a while, then wait for rest and judge."""
        self.run.supervisor.scale(1)
        self.workload.options = replace(self.workload.options, rate=RATE)
        yield from wait_at_work(self.run, seconds)
        self.workload.calm(CALM_S)
        if not self.run.rest(REST_S):
            self.report(Kind.UNPROCESSED, f"not at rest in time: {self.run.busy_with}")
        violations = self.run.judge().violations
        self.context.found += [replace(each, detail=f"{self.what}: {each.detail}") for each in violations]
        self.run.checker.settle()

    def act_unread(self) -> Steps:
        """Let users act while no worker runs."""
        self.workload.options = replace(self.workload.options, rate=RATE)
        yield UNREAD_S
        self.workload.calm(CALM_S)

    def wait_refusal(self, text: str) -> Steps:
        """Wait until the log of the worker contains a text, and stop the worker; report it if that takes too long."""
        for _ in range(int(REFUSED_S / LOOK_S)):
            self.run.supervisor.tick()
            if text in self.run.supervisor.log(0):
                break
            yield LOOK_S
        else:
            self.report(Kind.UNSEEN_STALL, f"the worker did not write {text!r}: {self.run.supervisor.output(0)[-300:]}")
        self.run.supervisor.stop()

    def command(self, *arguments: str) -> None:
        """Run `streamformer state` as the operator; report it if that fails."""
        program = [sys.executable, "-m", "infra.cli", "state", *arguments, "--yes"]
        done = subprocess.run(
            [*program, "--config", str(self.run.deployment.config)],
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        lines = (done.stdout + done.stderr).strip().splitlines()
        self.context.progress(f"          {self.what}: state {' '.join(arguments)}: {lines[-1][:150] if lines else ''}")
        if done.returncode:
            self.report(Kind.UNSEEN_STALL, f"state {arguments[0]} ends with {done.returncode}: {lines[-1:]}")

    def report(self, kind: Kind, detail: str) -> None:
        """Add a violation."""
        self.context.found.append(Violation(kind, None, -1, -1, f"{self.what}: {detail}"))


def expired(context: FaultContext) -> Steps:
    """Delete records that were not read yet; the worker counts them exactly and goes on."""
    with _app(context, "source-expired") as app:
        yield from app.work(FEED_S)
        app.run.supervisor.stop()
        committed = app.run.reader.committed()
        yield from app.act_unread()
        ends = app.run.reader.ends()
        unread = sum(end - committed.get(number, 0) for number, end in ends.items())
        begins = {number: context.rng.randint(committed.get(number, 0), end) for number, end in ends.items()}
        delete_records(context.servers, app.topic, begins)
        app.run.reader.skip(app.topic, begins)
        lost = sum(begin - committed.get(number, 0) for number, begin in begins.items())
        yield from app.work(MORE_S)
        counted = sample(app.run.supervisor.page(0, "/metrics")[1], EXPIRED)
        context.progress(f"          {app.what}: {lost} of {unread} unread events expired, {counted:.0f} were counted")
        if counted != lost:
            app.report(Kind.LOST, f"{lost} events expired, {counted:.0f} were counted")


def recreated(context: FaultContext) -> Steps:
    """Delete the source topic and create it again; the operator adopts the state."""
    with _app(context, "source-recreated") as app:
        yield from app.work(FEED_S)
        app.run.supervisor.stop()
        delete_topic(context.servers, app.topic)
        yield 1.0
        ensure_topics(app.run.deployment.settings, replication_factor=context.deployment.brokers)
        app.run.reader.restart(app.topic)
        app.workload.renew_producer()
        yield from app.act_unread()
        app.run.supervisor.scale(1)
        yield from app.wait_refusal("state adopt")
        app.command("adopt", "--at", "earliest")
        for number in range(app.run.deployment.settings.topics.partitions):
            app.run.checker.move(number, to=0, offset_max=-1)
        yield from app.work(MORE_S)


def truncated(context: FaultContext) -> Steps:
    """Cut off half of a partition's only replica while its broker is down; the operator skips to the new end."""
    with _app(context, "source-truncated") as app:
        broker = context.some_broker()
        yield from alone_on(context, app.topic, PARTITION, [broker])
        yield from app.work(FEED_S)
        app.run.supervisor.stop()
        broker.kill()
        _cut(broker, app.topic)
        yield from context.restart(broker)
        yield from _follow(app, started=False)


def unclean_election(context: FaultContext) -> Steps:
    """Make a replica the leader that lacks events which a worker has applied; the operator skips to the new end."""
    with _app(context, "unclean-election") as app:
        brokers = context.rng.sample(context.cluster.brokers, 2)
        yield from alone_on(context, app.topic, PARTITION, brokers)
        yield from app.work(FEED_S)
        leader = context.cluster.leader(app.topic, PARTITION)
        (follower,) = (broker for broker in brokers if broker is not leader)
        follower.kill()
        yield FENCED_S
        yield from app.work(MORE_S)
        leader.kill()
        yield from context.restart(follower)
        yield from context.until(lambda: _elected(context, app.topic, follower), "no unclean leader was elected")
        yield from context.restart(leader)
        yield from _follow(app, started=True)


def _follow(app: App, *, started: bool) -> Steps:
    """Wait for the refusal of a partition that has lost its end, skip to the new end, and go on there."""
    before = app.run.checker.model.ends[PARTITION]
    app.run.reader.close()
    end = app.run.reader.ends()[PARTITION]
    if end >= before:
        raise BrokerFailed("the source was not truncated", f"it ends at {end}, and ended at {before}", "")
    app.context.progress(f"          {app.what}: partition {PARTITION} ended at {before} and ends at {end}")
    if not started:
        app.run.supervisor.scale(1)
    yield from app.wait_refusal(f"state skip --partition {PARTITION} --to {end}")
    app.command("skip", "--partition", str(PARTITION), "--to", str(end))
    app.run.checker.move(PARTITION, to=end, offset_max=end - 1)
    app.run.reader.skip(app.topic, {PARTITION: end})
    app.workload.renew_producer()
    yield from app.work(MORE_S)


def _elected(context: FaultContext, topic: str, follower: Broker) -> bool:
    """Return whether the follower leads; make it the leader as soon as the partition has none."""
    if context.cluster.replicas(topic, PARTITION).in_sync == frozenset({follower.id}):
        return True
    context.cluster.elect_unclean(topic, PARTITION)
    return False


def _cut(broker: Broker, topic: str) -> None:
    """Cut the segment of the partition to half, as a disk does that has lost what was not yet written."""
    log = Path(broker.folder) / "data" / f"{topic}-{PARTITION}" / "00000000000000000000.log"
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])


@contextmanager
def _app(context: FaultContext, what: str) -> Iterator[App]:
    name = f"{context.deployment.settings.app_id}-{what}-{context.rng.randrange(10**6)}"
    deployment = deploy(
        context.folder / name,
        context.servers,
        name,
        brokers=context.deployment.brokers,
        features=context.deployment.has_features,
    )
    options = WorkloadOptions(rate=0.0)
    workload = Workload(deployment.settings, context.rng.randrange(2**31), users=USERS, options=options)
    with Run(deployment) as run:
        workload.start()
        try:
            yield App(context, what, run, workload)
        finally:
            workload.stop()
