"""Disturb worker processes: kill, terminate, freeze, scale and rebalance them."""

from __future__ import annotations

import shutil
import sys

from infra.chaos.fault_context import FaultContext, Steps
from infra.harness.supervisor import READY
from infra.harness.worker_process import WORKER

FAULTY_WORKER = (sys.executable, "-m", "infra.harness.faulty_worker")
HELPERS_FROM = 10
"""First number of the workers that exist only to cause rebalances."""


def killed(context: FaultContext) -> Steps:
    """Kill one worker or all several times with SIGKILL: at work, while they start, while they restore."""
    for number in range(context.rng.randint(4, 6)):
        if number:
            yield context.rng.uniform(2.0, 6.0)
        running = context.run.supervisor.running()
        victims = running if context.rng.random() < 0.4 else running[:1]
        for victim in victims:
            context.run.supervisor.kill(victim)


def terminated(context: FaultContext) -> Steps:
    """Terminate a worker twice; the supervisor restarts it."""
    for number in range(2):
        if number:
            yield context.rng.uniform(4.0, 8.0)
        worker = context.some_worker()
        if worker is not None:
            context.run.supervisor.terminate(worker)


def frozen_10(context: FaultContext) -> Steps:
    """Freeze a worker with SIGSTOP for 10 s, longer than its session."""
    yield from _freeze(context, 10.0)


def frozen_70(context: FaultContext) -> Steps:
    """Freeze a worker with SIGSTOP for 70 s, longer than session, transaction and watchdog timeouts."""
    yield from _freeze(context, 70.0)


def _freeze(context: FaultContext, seconds: float) -> Steps:
    worker = context.some_worker()
    if worker is None:
        return
    context.run.supervisor.pause(worker)
    try:
        yield seconds
    finally:
        context.run.supervisor.resume(worker)


def scaled_to_3(context: FaultContext) -> Steps:
    """Scale from 1 worker to 3 and back to 1, with disks kept."""
    yield from _scale(context, 3, cold=False)


def scaled_to_4_cold(context: FaultContext) -> Steps:
    """Scale from 1 worker to 4, whose new disks are empty, and back to 1."""
    yield from _scale(context, 4, cold=True)


def _scale(context: FaultContext, count: int, *, cold: bool) -> Steps:
    supervisor = context.run.supervisor
    supervisor.scale(1)
    try:
        yield 1.0
        supervisor.scale(count, cold=cold)
        yield from context.until_ready(count - 1)
        yield context.rng.uniform(6.0, 10.0)
    finally:
        supervisor.scale(1)


def rebalanced_in_restore(context: FaultContext) -> Steps:
    """Add workers with empty disks, each while the one before it restores, and kill one while it restores."""
    supervisor = context.run.supervisor
    try:
        for count in (2, 3, 4):
            supervisor.scale(count, cold=True)
            yield context.rng.uniform(0.2, 1.5)
        yield context.rng.uniform(2.5, 4.0)
        supervisor.kill(3)
        yield 6.0
    finally:
        supervisor.scale(1)


def rebalanced_in_inference(context: FaultContext) -> Steps:
    """Add and remove a worker while the encoders, made ten times slower, always have users in progress."""
    supervisor = context.run.supervisor
    supervisor.command = (*FAULTY_WORKER, "slow", *WORKER[3:])
    try:
        for number in supervisor.running():
            supervisor.kill(number)
        yield from context.until_ready(0)
        supervisor.scale(2)
        yield from context.until_ready(1)
        yield context.rng.uniform(2.0, 4.0)
        supervisor.scale(1)
        yield 8.0
    finally:
        supervisor.command = WORKER
        supervisor.scale(1)
        for number in supervisor.running():
            supervisor.kill(number)


def rebalanced_often(context: FaultContext) -> Steps:
    """Add and kill helpers until one worker has seen the wanted number of rebalances, and measure its memory."""
    supervisor = context.run.supervisor
    supervisor.scale(1)
    yield 6.0
    seen, helper, spared = 0, HELPERS_FROM, 3
    try:
        while seen < context.rebalances_wanted and helper - HELPERS_FROM < context.rebalances_wanted:
            supervisor.start(helper)
            yield from context.until_ready(helper)
            seen = rebalances_seen(supervisor.output(0))
            if seen >= spared:
                context.memory_mb.append(supervisor.memory_mb(0))
            context.progress(f"{seen} of {context.rebalances_wanted} rebalances, {supervisor.memory_mb(0):.0f} MB")
            _remove(context, helper)
            helper += 1
    finally:
        context.rebalances = max(context.rebalances, seen)
        if helper in supervisor.workers:
            _remove(context, helper)


def _remove(context: FaultContext, helper: int) -> None:
    supervisor = context.run.supervisor
    supervisor.hold(helper)
    del supervisor.workers[helper]
    shutil.rmtree(context.deployment.data_dir(helper), ignore_errors=True)


def rebalances_seen(log: str) -> int:
    """Count the assignments in a worker's log, at least: a partition that is ready again began a new one."""
    count, ready = 0, set[str]()
    for line in log.splitlines():
        if READY not in line:
            continue
        partition = line.split("partition ", 1)[1].split(" ", 1)[0]
        if partition in ready or not ready:
            count, ready = count + 1, set()
        ready.add(partition)
    return count
