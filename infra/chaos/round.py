"""Run one round: workers at work, one fault or two, healing, resumption, rest, judgement.

The time to resume begins when every fault has healed, and ends when the committed offset of every partition has passed
the end that the log had at that moment. The workload continues in this time. The limit is `RESUME_MAX_S`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from encoder.arrays import F32
from infra.chaos.checks.violations import Explained, Kind, Violation
from infra.chaos.fault_context import FaultContext, play
from infra.chaos.faults.catalogue import Fault, Group
from infra.harness.stall_monitor import StallMonitor
from infra.harness.supervisor import FORCED, KILLED, STOPPED, TERMINATED, Exit
from infra.harness.workload import WorkloadOptions

RESUME_MAX_S = 15.0
AFTER_S = 1.5
ROUND_MAX_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Round:
    """Result of a round."""

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
        """Names of the faults, for people."""
        return " + ".join(self.faults) or "no fault"


def run_round(
    context: FaultContext, monitor: StallMonitor, number: int, faults: Sequence[Fault], options: WorkloadOptions
) -> Round:
    """Strike, heal, rest and judge; on return the run is at rest and the checker has settled."""
    begun_s, run = time.monotonic(), context.run
    exits_before = len(run.supervisor.exits)
    context.workload.options = options
    resume_s = _strike(context, faults)
    busy = _rest(context, faults)
    verdict = run.judge()
    run.explained[:] = [replace(span, end_ms=min(span.end_ms, _now_ms())) for span in run.explained]
    exits = run.supervisor.exits[exits_before:]
    violations = (
        *verdict.violations,
        *context.found,
        *monitor.take(),
        *_slow(resume_s),
        *_unrested(busy),
        *_unexpected(exits, faults),
    )
    context.found.clear()
    if not busy:
        run.checker.settle()
    return Round(
        number,
        tuple(fault.name for fault in faults),
        time.monotonic() - begun_s,
        resume_s,
        np.array(verdict.freshness_ms, np.float32),
        verdict.counts,
        Counter(each.code for each in exits),
        violations,
    )


def _strike(context: FaultContext, faults: Sequence[Fault]) -> float:
    """Run the faults on workers that work; return the seconds until they resumed."""
    run, begun_ms = context.run, _now_ms()
    if any(fault.explains for fault in faults):
        run.explained.append(Explained(begun_ms, begun_ms + ROUND_MAX_MS))
    play(context, [context.until_in_sync()])
    run.supervisor.scale(_workers(context, faults))
    run.wait(AFTER_S)
    run.wait_resumed()
    play(context, [fault.steps(context) for fault in faults])
    resume_s = run.wait_resumed()
    run.wait(AFTER_S)
    return resume_s


def _rest(context: FaultContext, faults: Sequence[Fault]) -> str:
    """Stop the workload and wait for rest; return what prevents it, empty at rest."""
    if not context.workload.calm(30):
        return "the producer did not come to rest"
    if context.run.rest(max([60.0, *(fault.rest_s for fault in faults)])):
        return ""
    return context.run.busy_with or "the workers were quiet for a moment only"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _workers(context: FaultContext, faults: Sequence[Fault]) -> int:
    """Draw one or two workers; one if a fault depends on it."""
    groups = {fault.group for fault in faults}
    return 1 if groups & {Group.SCALE, Group.DISK, Group.ALONE} else context.rng.choice((1, 1, 2))


def is_permitted(code: int, expected: bool, faults: Sequence[Fault]) -> bool:
    """Return whether a worker may have ended like this: it was terminated or killed, or a fault is a reason.

    -SIGTERM is permitted because the signal may arrive while Python still imports the program.
    """
    if any(code in fault.exits for fault in faults):
        return True
    if code == FORCED:
        return expected and any(fault.exits for fault in faults)
    return expected and code in (STOPPED, KILLED, TERMINATED)


def _slow(resume_s: float) -> list[Violation]:
    if resume_s <= RESUME_MAX_S:
        return []
    detail = f"resumed {resume_s:.1f} s after the faults healed, limit {RESUME_MAX_S:.0f} s"
    return [Violation(Kind.SLOW_RESUME, None, -1, -1, detail)]


def _unexpected(exits: Sequence[Exit], faults: Sequence[Fault]) -> list[Violation]:
    return [
        Violation(Kind.UNEXPECTED_EXIT, None, -1, each.code, f"worker {each.number}: {each.last_line}")
        for each in exits
        if not is_permitted(each.code, each.expected, faults)
    ]


def _unrested(busy: str) -> list[Violation]:
    return [Violation(Kind.UNPROCESSED, None, -1, -1, f"not at rest in time: {busy}")] if busy else []
