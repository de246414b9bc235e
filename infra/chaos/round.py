"""One round: workers at work, one fault or two, healing, resumption, rest, judgement.

Time to resume is measured from the moment at which all is healed: until the committed offset of every partition has
passed what the log held at that moment, workload going on. It may take `RESUME_MAX_S`.
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
from infra.chaos.fault_context import FaultContext, play
from infra.chaos.faults.catalogue import Fault, Group
from infra.harness.stall_monitor import StallMonitor
from infra.harness.supervisor import FORCED, STOPPED
from infra.harness.workload import WorkloadOptions

RESUME_MAX_S = 15.0
PATIENCE_S = 60.0
AFTER_S = 1.5
LOOK_S = 0.1
ROUND_MAX_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Round:
    """What a round came to."""

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


def run_round(
    context: FaultContext, monitor: StallMonitor, number: int, faults: Sequence[Fault], options: WorkloadOptions
) -> Round:
    """Strike, heal, rest and judge; afterwards the context is at rest and the checker has settled."""
    begun_s, begun_ms = time.monotonic(), _now_ms()
    supervisor, run = context.run.supervisor, context.run
    exits_before = len(supervisor.exits)
    if any(fault.explains for fault in faults):
        run.explained.append(Explained(begun_ms, begun_ms + ROUND_MAX_MS))
    context.workload.options = options
    supervisor.scale(_workers(context, faults))
    _pass(context, AFTER_S)
    resumed(context, PATIENCE_S)
    play(context, [fault.steps(context) for fault in faults])
    resume_s = resumed(context, PATIENCE_S)
    _pass(context, AFTER_S)
    busy = "" if context.workload.calm(30) else "the producer did not end"
    if not busy and not run.rest(max([60.0, *(fault.rest_s for fault in faults)])):
        busy = run.busy_with or "quiet for a moment only"
    verdict = run.judge()
    run.explained[:] = [replace(span, end_ms=min(span.end_ms, _now_ms())) for span in run.explained]
    violations = [*verdict.violations, *context.found, *monitor.take(), *_slow(resume_s), *_unrested(busy)]
    exits = supervisor.exits[exits_before:]
    violations += [
        Violation(Kind.UNEXPECTED_EXIT, None, -1, each.code, f"worker {each.number}: {each.last_words}")
        for each in exits
        if not _is_fine(each.code, each.expected, faults)
    ]
    freshness_ms = np.array(verdict.freshness_ms, np.float32)
    context.found.clear()
    if not busy:
        run.checker.settle()
    return Round(
        number,
        tuple(fault.name for fault in faults),
        time.monotonic() - begun_s,
        resume_s,
        freshness_ms,
        verdict.counts,
        Counter(each.code for each in exits),
        tuple(violations),
    )


def resumed(context: FaultContext, patience_s: float) -> float:
    """Seconds until every partition's committed offset has passed what the log holds now; infinite beyond patience."""
    started_s, wanted = time.monotonic(), None
    while time.monotonic() - started_s < patience_s:
        context.run.supervisor.tick()
        try:
            wanted = wanted if wanted is not None else context.run.reader.ends()
            committed = context.run.reader.committed()
        except (KafkaError, OSError):
            continue
        if all(committed.get(partition, 0) >= end for partition, end in wanted.items()):
            return time.monotonic() - started_s
        time.sleep(LOOK_S)
    return float("inf")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _workers(context: FaultContext, faults: Sequence[Fault]) -> int:
    """One or two, by the rng; one where a fault counts on it."""
    groups = {fault.group for fault in faults}
    return 1 if groups & {Group.SCALE, Group.DISK, Group.ALONE} else context.rng.choice((1, 1, 2))


def _pass(context: FaultContext, seconds: float) -> None:
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        context.run.supervisor.tick()
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
