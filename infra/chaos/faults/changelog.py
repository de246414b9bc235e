"""Damage the changelog of an application of its own, because the main run could not continue after it.

A small application is fed and stopped; its changelog is truncated, emptied or recreated; then the worker starts again,
with its disk kept or empty. Two outcomes are right: every invariant still holds; or the partition is halted with a
line that names the changelog, and its committed offset stays where it was. Going on with partial state is a violation.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace

from infra.chaos.checks.violations import Kind, Violation
from infra.chaos.fault_context import FaultContext, Steps, delete_records, delete_topic, set_topic_config
from infra.harness.deployment import deploy
from infra.harness.run import Run
from infra.harness.workload import Workload, WorkloadOptions
from infra.kafka.topics import ensure_topics

Harm = Callable[[Run], None]
FEED_S, OUTCOME_S, LOOK_S = 8.0, 90.0, 0.5
USERS = 100
DISKS = ("kept", "empty")
SETTLE_S = 5.0
"""Time for which a halted partition must not commit."""
HALTED = re.compile(r"partition (\d+) is halted, (.*changelog.*)")


def truncated(context: FaultContext) -> Steps:
    """Delete the first half of the changelog's records."""
    yield from _try(context, "truncated", lambda run: _cut(run, 0.5))


def emptied(context: FaultContext) -> Steps:
    """Delete all records of the changelog."""
    yield from _try(context, "emptied", lambda run: _cut(run, 1.0))


def recreated(context: FaultContext) -> Steps:
    """Delete the changelog and create it again."""
    yield from _try(context, "recreated", _recreate)


def _try(context: FaultContext, name: str, harm: Harm) -> Steps:
    for disk in DISKS:
        app = f"{context.deployment.settings.app_id}-{name}-{disk}-{context.rng.randrange(10**6)}"
        deployment = deploy(
            context.folder / app,
            context.servers,
            app,
            brokers=context.deployment.brokers,
            features=context.deployment.has_features,
        )
        workload = Workload(
            deployment.settings, context.rng.randrange(2**31), users=USERS, options=WorkloadOptions(rate=200)
        )
        with Run(deployment) as run:
            workload.start()
            try:
                yield from _damage(context, run, workload, f"changelog {name}, disk {disk}", harm, cold=disk == "empty")
            finally:
                workload.stop()


def _damage(context: FaultContext, run: Run, workload: Workload, what: str, harm: Harm, *, cold: bool) -> Steps:
    run.supervisor.scale(1)
    yield from wait_at_work(run, FEED_S)
    workload.calm(10)
    run.rest(30)
    run.supervisor.stop()
    harm(run)
    if cold:
        shutil.rmtree(run.deployment.data_dir(0))
    committed = run.reader.committed()
    workload.options = replace(workload.options, rate=200.0)
    run.supervisor.scale(1)
    yield from wait_at_work(run, 3.0)
    workload.calm(10)
    yield from _outcome(context, run, what, committed)


def wait_at_work(run: Run, seconds: float) -> Steps:
    """Let time pass while the supervisor of an application of its own restarts workers."""
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        run.supervisor.tick()
        yield LOOK_S / 2


def _outcome(context: FaultContext, run: Run, what: str, committed: dict[int, int]) -> Steps:
    """Wait until partitions are halted because of the changelog, or the worker is at rest with every invariant kept."""
    until_s = time.monotonic() + OUTCOME_S
    while time.monotonic() < until_s:
        halted = {int(found[1]): found[2] for found in HALTED.finditer(run.supervisor.log(0))}
        if halted:
            yield SETTLE_S
            context.progress(f"{what}: halted {sorted(halted)}: {next(iter(halted.values()))[:150]}")
            now = run.reader.committed()
            if any(now.get(number) != committed.get(number) for number in halted):
                context.found.append(
                    Violation(Kind.COMMITTED_AHEAD, None, -1, -1, f"{what}: rejected, but it committed")
                )
            return
        if run.rest(2.0):
            violations = run.judge().violations
            context.progress(f"{what}: continued with {len(violations)} violations")
            context.found += [replace(each, detail=f"{what}: {each.detail}") for each in violations]
            return
        yield LOOK_S
    last_line = run.supervisor.exits[-1].last_line if run.supervisor.exits else "no output"
    detail = f"{what}: neither rejected nor continued: {last_line}"
    context.found.append(Violation(Kind.UNSEEN_STALL, None, -1, -1, detail))


def _cut(run: Run, fraction: float) -> None:
    """Delete records from the beginning of each partition, up to a fraction of its length.

    Kafka rejects this for a compacted topic, so the cleanup policy is changed for a moment, as an operator would have.
    """
    topic, servers = run.deployment.settings.changelog_topic, run.deployment.settings.kafka.bootstrap_servers
    ends = run.reader.ends(topic)
    set_topic_config(servers, topic, {"cleanup.policy": "delete"})
    delete_records(servers, topic, {number: int(end * fraction) for number, end in ends.items()})
    set_topic_config(servers, topic, {"cleanup.policy": "compact"})


def _recreate(run: Run) -> None:
    topic, servers = run.deployment.settings.changelog_topic, run.deployment.settings.kafka.bootstrap_servers
    delete_topic(servers, topic)
    time.sleep(1.0)
    ensure_topics(run.deployment.settings, replication_factor=run.deployment.brokers)
    run.reader.restart(topic)
