"""A run of chaos: rounds until the time is over, drawn from one seed.

Every fault strikes alone once, in a seeded order; between those, and after, pairs strike. Pairs are drawn so that
kills of workers and restarts of the broker keep pace with what an hour must hold (`KILLS_PER_HOUR`,
`RESTARTS_PER_HOUR`).
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from infra.chaos.fault_context import FaultContext
from infra.chaos.faults.catalogue import BY_NAME, CATALOGUE, Fault, pairs
from infra.chaos.faults.disk import can_mount
from infra.chaos.round import Round, run_round
from infra.harness.deployment import deploy
from infra.harness.run import Run
from infra.harness.stall_monitor import StallMonitor
from infra.harness.workload import Workload, WorkloadOptions
from infra.kafka.broker import Broker, BrokerOptions

KILLS_PER_HOUR, RESTARTS_PER_HOUR = 230, 26
REBALANCES_OF_AN_HOUR, REBALANCES_OF_A_SHORT_RUN = 100, 6
LONG_MINUTES = 30
LARGEST_RECORD_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run."""

    seed: int
    minutes: float
    faults: tuple[str, ...] = ()
    """Only these, one after the other, again and again; none: all of them, and pairs."""
    keep_going: bool = False
    rate: float = 500.0
    """Actions a second."""


@dataclass(slots=True)
class Outcome:
    """What a run came to."""

    plan: Plan
    rounds: list[Round] = field(default_factory=list)
    seconds: float = 0.0
    worker_kills: int = 0
    broker_restarts: int = 0
    rebalances: int = 0
    memory_mb: Sequence[float] = ()
    start_seconds: Sequence[float] = ()
    longest_stall_s: float = 0.0
    left_out: Sequence[str] = ()

    @property
    def violations(self) -> int:
        return sum(len(each.violations) for each in self.rounds)

    @property
    def faults(self) -> Counter[str]:
        return Counter(name for each in self.rounds for name in each.faults)

    @property
    def worst_resume_seconds(self) -> float:
        return max((each.resume_seconds for each in self.rounds), default=0.0)

    def freshness_ms(self, quantile: float) -> float:
        """Of all actions of all rounds, from their arrival in the log to the embedding that contains them."""
        ages = [each.freshness_ms for each in self.rounds if len(each.freshness_ms)]
        return float(np.quantile(np.concatenate(ages), quantile)) if ages else 0.0


def run_schedule(plan: Plan, say: Callable[[str], None], on_round: Callable[[Outcome], None]) -> Outcome:
    """Run rounds until the time is over or, unless told to keep going, a law is broken."""
    outcome = Outcome(plan, left_out=() if can_mount() else ("disk-full",))
    with _context(plan, say, outcome) as context, StallMonitor(context.run) as monitor:
        begun_s = time.monotonic()
        draws = _draws(plan, context, lambda: time.monotonic() - begun_s)
        options = WorkloadOptions(rate=plan.rate)
        while (elapsed_s := time.monotonic() - begun_s) < plan.minutes * 60:
            faults = next(draws)
            names = " + ".join(fault.name for fault in faults)
            say(f"{elapsed_s / 60:5.1f} min, round {len(outcome.rounds) + 1}: {names}")
            outcome.rounds.append(run_round(context, monitor, len(outcome.rounds) + 1, faults, options))
            outcome.seconds = time.monotonic() - begun_s
            outcome.worker_kills, outcome.broker_restarts = context.run.supervisor.kills, context.broker_restarts
            outcome.rebalances, outcome.memory_mb = context.rebalances, tuple(context.memory_mb)
            outcome.start_seconds = tuple(context.run.supervisor.start_seconds)
            outcome.longest_stall_s = monitor.longest_stall_s
            on_round(outcome)
            if outcome.violations and not plan.keep_going:
                break
    return outcome


@contextmanager
def _context(plan: Plan, say: Callable[[str], None], outcome: Outcome) -> Iterator[FaultContext]:
    """A broker, an application and its workload; the folder is kept when a law was broken, for its logs."""
    folder = Path(tempfile.mkdtemp(prefix="streamformer-chaos-"))
    say("starting a broker")
    try:
        with Broker.start(BrokerOptions(message_bytes_max=LARGEST_RECORD_BYTES)) as broker:
            deployment = deploy(folder / "chaos", broker.bootstrap_servers, "chaos")
            workload = Workload(deployment.settings, plan.seed, options=WorkloadOptions(rate=0.0))
            with Run(deployment) as run:
                workload.start()
                rebalances = REBALANCES_OF_AN_HOUR if plan.minutes >= LONG_MINUTES else REBALANCES_OF_A_SHORT_RUN
                try:
                    yield FaultContext(broker, run, workload, random.Random(plan.seed), folder, rebalances, say)
                finally:
                    workload.stop()
    finally:
        if outcome.violations:
            say(f"the workers' logs and disks are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _draws(plan: Plan, context: FaultContext, elapsed_s: Callable[[], float]) -> Iterator[tuple[Fault, ...]]:
    """The faults of each round."""
    if plan.faults:
        while True:
            yield from (tuple(BY_NAME[each] for each in name.split("+")) for name in plan.faults)
    alone = [fault for fault in CATALOGUE if fault.name != "disk-full" or can_mount()]
    context.rng.shuffle(alone)
    for fault in alone:
        yield (fault,)
        yield _pair(context, elapsed_s())
    while True:
        yield _pair(context, elapsed_s())


def _pair(context: FaultContext, elapsed_s: float) -> tuple[Fault, ...]:
    """Two faults that may strike together, what is behind its pace among them."""
    hours = (elapsed_s + 60) / 3600
    wanted = set()
    if context.run.supervisor.kills < KILLS_PER_HOUR * hours:
        wanted.add("worker-killed")
    if context.broker_restarts < RESTARTS_PER_HOUR * hours:
        wanted.add(context.rng.choice(("broker-killed", "broker-bounced")))
    found = [pair for pair in pairs() if wanted <= {fault.name for fault in pair}]
    drawable = [pair for pair in found if can_mount() or all(fault.name != "disk-full" for fault in pair)]
    return context.rng.choice(drawable)
