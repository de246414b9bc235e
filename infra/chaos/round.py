"""One episode: workers at work, one fault or two, healing, resumption, rest, judgement.

Time to resume is measured from the moment at which all is healed: until the committed offset of every partition has
passed what the log held at that moment, traffic going on. It may take `RESUME_MAX_S`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from kafka.errors import KafkaError

from encoder.arrays import F32
from infra.chaos.checks.violations import Explained, Kind, Violation
from infra.chaos.fault_context import Scene, play
from infra.chaos.faults.catalogue import Fault, Group
from infra.harness.stall_monitor import Watch
from infra.harness.supervisor import FORCED, STOPPED
from infra.harness.workload import Habits

RESUME_MAX_S = 15.0
PATIENCE_S = 60.0
AFTER_S = 1.5
LOOK_S = 0.1
EPISODE_MAX_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Episode:
    """What an episode came to."""

    number: int
    faults: tuple[str, ...]
    seconds: float
    resume_seconds: float
    freshness_ms: F32
    counts: Counter[str]
    exits: Counter[int]
    violations: tuple[Violation, ...]

    @property
    def name(self) -> str:
        return " + ".join(self.faults) or "no fault"


def run_episode(scene: Scene, watch: Watch, number: int, faults: Sequence[Fault], habits: Habits) -> Episode:
    """Strike, heal, rest and judge; afterwards the scene is at rest and the checker has settled."""
    begun_s, begun_ms = time.monotonic(), _now_ms()
    fleet, trial = scene.trial.fleet, scene.trial
    exits_before = len(fleet.exits)
    if any(fault.explains for fault in faults):
        trial.explained.append(Explained(begun_ms, begun_ms + EPISODE_MAX_MS))
    scene.traffic.habits = habits
    fleet.scale(_workers(scene, faults))
    _pass(scene, AFTER_S)
    resumed(scene, PATIENCE_S)
    play(scene, [fault.steps(scene) for fault in faults])
    resume_s = resumed(scene, PATIENCE_S)
    _pass(scene, AFTER_S)
    busy = "" if scene.traffic.calm(30) else "the producer did not end"
    if not busy and not trial.rest(max([60.0, *(fault.rest_s for fault in faults)])):
        busy = trial.busy_with or "quiet for a moment only"
    verdict = trial.judge()
    trial.explained[:] = [replace(span, end_ms=min(span.end_ms, _now_ms())) for span in trial.explained]
    violations = [*verdict.violations, *scene.found, *watch.take(), *_slow(resume_s), *_unrested(busy)]
    exits = fleet.exits[exits_before:]
    violations += [
        Violation(Kind.UNEXPECTED_EXIT, None, -1, each.code, f"worker {each.number}: {each.last_words}")
        for each in exits
        if not _is_fine(each.code, each.expected, faults)
    ]
    freshness_ms = np.array(verdict.freshness_ms, np.float32)
    scene.found.clear()
    if not busy:
        trial.checker.settle()
    return Episode(
        number,
        tuple(fault.name for fault in faults),
        time.monotonic() - begun_s,
        resume_s,
        freshness_ms,
        verdict.counts,
        Counter(each.code for each in exits),
        tuple(violations),
    )


def resumed(scene: Scene, patience_s: float) -> float:
    """Seconds until every partition's committed offset has passed what the log holds now; infinite beyond patience."""
    started_s, wanted = time.monotonic(), None
    while time.monotonic() - started_s < patience_s:
        scene.trial.fleet.tick()
        try:
            wanted = wanted if wanted is not None else scene.trial.gatherer.ends()
            committed = scene.trial.gatherer.committed()
        except (KafkaError, OSError):
            continue
        if all(committed.get(partition, 0) >= end for partition, end in wanted.items()):
            return time.monotonic() - started_s
        time.sleep(LOOK_S)
    return float("inf")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _workers(scene: Scene, faults: Sequence[Fault]) -> int:
    """One or two, by the dice; one where a fault counts on it."""
    groups = {fault.group for fault in faults}
    return 1 if groups & {Group.SCALE, Group.DISK, Group.ALONE} else scene.dice.choice((1, 1, 2))


def _pass(scene: Scene, seconds: float) -> None:
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        scene.trial.fleet.tick()
        time.sleep(LOOK_S)


def _is_fine(code: int, told: bool, faults: Sequence[Fault]) -> bool:
    """Whether a worker may have ended so: told to, or for a reason that a fault gives.

    -15 is a SIGTERM that came while Python was still importing: nothing had begun.
    """
    if any(code in fault.exits for fault in faults):
        return True
    return told and (code in (STOPPED, -9, -15) or (code == FORCED and any(fault.exits for fault in faults)))


def _slow(resume_s: float) -> list[Violation]:
    if resume_s <= RESUME_MAX_S:
        return []
    return [Violation(Kind.SLOW_RESUME, None, -1, -1, f"{resume_s:.1f} s after all was healed")]


def _unrested(busy: str) -> list[Violation]:
    return [Violation(Kind.UNPROCESSED, None, -1, -1, f"no rest in time: {busy}")] if busy else []
