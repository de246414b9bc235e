"""Run rounds of faults, drawn from one seed, until the time is over.

Every fault strikes alone once, in a seeded order; pairs strike between those and afterwards. Pairs are drawn so that
kills of workers and restarts of brokers keep pace with `KILLS_PER_HOUR` and `RESTARTS_PER_HOUR`.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from infra.chaos.fault_context import FaultContext
from infra.chaos.faults import broker
from infra.chaos.faults.catalogue import BY_NAME, CATALOGUE, Fault, Group, pairs, usable
from infra.chaos.faults.disk import can_mount
from infra.chaos.round import Round, run_round
from infra.harness.deployment import deploy
from infra.harness.run import Run
from infra.harness.stall_monitor import StallMonitor
from infra.harness.workload import Workload, WorkloadOptions
from infra.kafka.cluster import Cluster
from infra.kafka.node import BrokerOptions

KILLS_PER_HOUR = 230
RESTARTS_PER_HOUR = {1: 26, 3: 70}
"""By number of brokers: while the only one is away, nothing else can be tested."""
REBALANCES_LONG_RUN, REBALANCES_SHORT_RUN = 100, 6
LONG_MINUTES = 30
LARGEST_RECORD_BYTES = 2 << 20
TOMBSTONES = (0.001, 0.001, 0.0)
"""Share of deletions among the events, drawn per round: without any, users keep what they had before it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Options of a schedule."""

    seed: int
    minutes: float
    faults: tuple[str, ...] = ()
    """Faults to repeat in this order, instead of all faults and pairs."""
    keep_going: bool = False
    rate: float = 500.0
    """Actions per second."""
    brokers: int = 3
    features: bool = True


@dataclass(slots=True)
class Outcome:
    """Results so far."""

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
        """Number of violations in all rounds."""
        return sum(len(each.violations) for each in self.rounds)

    @property
    def faults(self) -> Counter[str]:
        """Number of rounds per fault."""
        return Counter(name for each in self.rounds for name in each.faults)

    @property
    def worst_resume_seconds(self) -> float:
        """Longest time to resume."""
        return max((each.resume_seconds for each in self.rounds), default=0.0)

    @property
    def explained_outputs(self) -> int:
        """Number of stale and repeated outputs that a fault explained."""
        counts = self.rounds[-1].counts if self.rounds else Counter[str]()
        return sum(count for name, count in counts.items() if name.startswith("explained_"))

    def freshness_ms(self, quantile: float) -> float:
        """Return a quantile of the time from an action's arrival in the log to an embedding that contains it."""
        ages = [each.freshness_ms for each in self.rounds if len(each.freshness_ms)]
        return float(np.quantile(np.concatenate(ages), quantile)) if ages else 0.0


def run_schedule(plan: Plan, progress: Callable[[str], None], on_round: Callable[[Outcome], None]) -> Outcome:
    """Run rounds until the time is over, or until a round finds a violation and `keep_going` is not set."""
    outcome = Outcome(plan, left_out=[fault.name for fault in CATALOGUE if not is_possible(fault, plan.brokers)])
    with _context(plan, progress, outcome) as context, StallMonitor(context.run) as monitor:
        begun_s = time.monotonic()
        draws = _draws(plan, context, lambda: time.monotonic() - begun_s)
        options = WorkloadOptions(rate=plan.rate)
        while (elapsed_s := time.monotonic() - begun_s) < plan.minutes * 60:
            faults = next(draws)
            names = " + ".join(fault.name for fault in faults)
            progress(f"{elapsed_s / 60:5.1f} min, round {len(outcome.rounds) + 1}: {names}")
            options = replace(options, tombstones=context.rng.choice(TOMBSTONES))
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
def _context(plan: Plan, progress: Callable[[str], None], outcome: Outcome) -> Iterator[FaultContext]:
    """Start the brokers, an application and its workload; the folder is kept if there are violations."""
    folder = Path(tempfile.mkdtemp(prefix="streamformer-chaos-"))
    progress(f"starting {plan.brokers} broker(s)")
    try:
        with Cluster.start(BrokerOptions(message_bytes_max=LARGEST_RECORD_BYTES), plan.brokers) as cluster:
            deployment = deploy(
                folder / "chaos", cluster.bootstrap_servers, "chaos", brokers=plan.brokers, features=plan.features
            )
            workload = Workload(deployment.settings, plan.seed, options=WorkloadOptions(rate=0.0))
            with Run(deployment) as run:
                workload.start()
                rebalances = REBALANCES_LONG_RUN if plan.minutes >= LONG_MINUTES else REBALANCES_SHORT_RUN
                try:
                    yield FaultContext(cluster, run, workload, random.Random(plan.seed), folder, rebalances, progress)
                finally:
                    workload.stop()
    finally:
        if outcome.violations:
            progress(f"worker logs and disks: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _draws(plan: Plan, context: FaultContext, elapsed_s: Callable[[], float]) -> Iterator[tuple[Fault, ...]]:
    """Yield the faults of each round."""
    if plan.faults:
        while True:
            yield from (tuple(BY_NAME[each] for each in name.split("+")) for name in plan.faults)
    alone = [fault for fault in CATALOGUE if is_possible(fault, plan.brokers)]
    context.rng.shuffle(alone)
    for fault in alone:
        yield (fault,)
        yield next_pair(context, elapsed_s())
    while True:
        yield next_pair(context, elapsed_s())


def next_pair(context: FaultContext, elapsed_s: float) -> tuple[Fault, ...]:
    """Draw two faults that may strike together, including those that are behind their pace."""
    hours = (elapsed_s + 60) / 3600
    wanted = set()
    if context.run.supervisor.kills < KILLS_PER_HOUR * hours:
        wanted.add("worker-killed")
    brokers = len(context.cluster.brokers)
    restarts_behind = RESTARTS_PER_HOUR[brokers] * hours - context.broker_restarts
    if restarts_behind > 0:
        restarting = [
            each for each in usable(brokers) if each.group is Group.BROKER and each.steps is not broker.frozen
        ]
        is_far = brokers > 1 and restarts_behind >= brokers
        wanted.add("brokers-rolled" if is_far else context.rng.choice(restarting).name)
    found = [pair for pair in pairs(brokers) if wanted <= {fault.name for fault in pair}]
    return context.rng.choice([pair for pair in found if all(is_possible(fault, brokers) for fault in pair)])


def is_possible(fault: Fault, brokers: int) -> bool:
    """Return whether this machine and this number of brokers have what a fault needs."""
    return fault.brokers_min <= brokers and (fault.name != "disk-full" or can_mount())
