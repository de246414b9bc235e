"""Faults of worker processes: killed, told to stop, frozen, joined by others, rebalanced."""

from __future__ import annotations

import shutil
import sys

from infra.chaos.fault_context import Scene, Steps
from infra.harness.supervisor import READY, WORKER

LAUNCHER = (sys.executable, "-m", "infra.harness.faulty_worker")
HELPERS_FROM = 10
"""Numbers of workers that come and go only to cause rebalances."""


def killed(scene: Scene) -> Steps:
    """kill -9 several times, of one worker or of all: at work, while it starts, while it restores."""
    for number in range(scene.dice.randint(4, 6)):
        if number:
            yield scene.dice.uniform(2.0, 6.0)
        running = scene.trial.fleet.running()
        victims = running if scene.dice.random() < 0.4 else running[:1]
        for victim in victims:
            scene.trial.fleet.kill(victim)


def terminated(scene: Scene) -> Steps:
    """SIGTERM, twice; the supervisor starts the worker again."""
    for number in range(2):
        if number:
            yield scene.dice.uniform(4.0, 8.0)
        worker = scene.some_worker()
        if worker is not None:
            scene.trial.fleet.terminate(worker)


def frozen_10(scene: Scene) -> Steps:
    """SIGSTOP for 10 s: past the session."""
    yield from _frozen(scene, 10.0)


def frozen_70(scene: Scene) -> Steps:
    """SIGSTOP for 70 s: past the session, the transaction's time and the watchdog's."""
    yield from _frozen(scene, 70.0)


def _frozen(scene: Scene, seconds: float) -> Steps:
    worker = scene.some_worker()
    if worker is None:
        return
    scene.trial.fleet.pause(worker)
    try:
        yield seconds
    finally:
        scene.trial.fleet.resume(worker)


def scaled_to_3(scene: Scene) -> Steps:
    """1 worker, then 3, then 1, disks kept."""
    yield from _scaled(scene, 3, cold=False)


def scaled_to_4_cold(scene: Scene) -> Steps:
    """1 worker, then 4 whose new disks are empty, then 1."""
    yield from _scaled(scene, 4, cold=True)


def _scaled(scene: Scene, count: int, *, cold: bool) -> Steps:
    fleet = scene.trial.fleet
    fleet.scale(1)
    try:
        yield 1.0
        fleet.scale(count, cold=cold)
        yield from scene.until_ready(count - 1)
        yield scene.dice.uniform(6.0, 10.0)
    finally:
        fleet.scale(1)


def rebalanced_in_restore(scene: Scene) -> Steps:
    """Workers with empty disks join one after another, each while the one before it restores; one is killed in it."""
    fleet = scene.trial.fleet
    try:
        for count in (2, 3, 4):
            fleet.scale(count, cold=True)
            yield scene.dice.uniform(0.2, 1.5)
        yield scene.dice.uniform(2.5, 4.0)
        fleet.kill(3)
        yield 6.0
    finally:
        fleet.scale(1)


def rebalanced_in_inference(scene: Scene) -> Steps:
    """A worker joins and leaves while the encoders, ten times slower, always have users in hand."""
    fleet = scene.trial.fleet
    fleet.command = (*LAUNCHER, "slow", *WORKER[3:])
    try:
        for number in fleet.running():
            fleet.kill(number)
        yield from scene.until_ready(0)
        fleet.scale(2)
        yield from scene.until_ready(1)
        yield scene.dice.uniform(2.0, 4.0)
        fleet.scale(1)
        yield 8.0
    finally:
        fleet.command = WORKER
        fleet.scale(1)
        for number in fleet.running():
            fleet.kill(number)


def rebalanced_often(scene: Scene) -> Steps:
    """Helpers join and die until one worker has seen the wanted number of rebalances; its memory is measured."""
    fleet = scene.trial.fleet
    fleet.scale(1)
    yield 6.0
    seen, helper, spared = 0, HELPERS_FROM, 3
    try:
        while seen < scene.rebalances_wanted and helper - HELPERS_FROM < scene.rebalances_wanted:
            fleet.release(helper)
            yield from scene.until_ready(helper)
            seen = rebalances_seen(fleet.said(0))
            if seen >= spared:
                scene.memory_mb.append(fleet.memory_mb(0))
            scene.say(f"{seen} of {scene.rebalances_wanted} rebalances, {fleet.memory_mb(0):.0f} MB")
            _let_go(scene, helper)
            helper += 1
    finally:
        scene.rebalances = max(scene.rebalances, seen)
        if helper in fleet.slots:
            _let_go(scene, helper)


def _let_go(scene: Scene, helper: int) -> None:
    fleet = scene.trial.fleet
    fleet.hold(helper)
    del fleet.slots[helper]
    shutil.rmtree(scene.stage.data_dir(helper), ignore_errors=True)


def rebalances_seen(log: str) -> int:
    """How often a worker got partitions, at least: a partition that is ready again began a new assignment."""
    count, ready = 0, set[str]()
    for line in log.splitlines():
        if READY not in line:
            continue
        partition = line.split("partition ", 1)[1].split(" ", 1)[0]
        if partition in ready or not ready:
            count, ready = count + 1, set()
        ready.add(partition)
    return count
