"""A run of chaos: episodes until the time is over, drawn from one seed.

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

from infra.chaos.fault_context import Scene
from infra.chaos.faults.catalogue import BY_NAME, CATALOGUE, Fault, pairs
from infra.chaos.faults.disk import can_mount
from infra.chaos.round import Episode, run_episode
from infra.harness.deployment import set_up
from infra.harness.run import Trial
from infra.harness.stall_monitor import Watch
from infra.harness.workload import Habits, Traffic
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
    episodes: list[Episode] = field(default_factory=list)
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
        return sum(len(episode.violations) for episode in self.episodes)

    @property
    def faults(self) -> Counter[str]:
        return Counter(name for episode in self.episodes for name in episode.faults)

    @property
    def worst_resume_seconds(self) -> float:
        return max((episode.resume_seconds for episode in self.episodes), default=0.0)

    def freshness_ms(self, quantile: float) -> float:
        """Of all actions of all episodes, from their arrival in the log to the embedding that contains them."""
        ages = [episode.freshness_ms for episode in self.episodes if len(episode.freshness_ms)]
        return float(np.quantile(np.concatenate(ages), quantile)) if ages else 0.0


def run(plan: Plan, say: Callable[[str], None], on_episode: Callable[[Outcome], None]) -> Outcome:
    """Run episodes until the time is over or, unless told to keep going, a law is broken."""
    outcome = Outcome(plan, left_out=() if can_mount() else ("disk-full",))
    with _scene(plan, say, outcome) as scene, Watch(scene.trial) as watch:
        begun_s = time.monotonic()
        draws = _draws(plan, scene, lambda: time.monotonic() - begun_s)
        habits = Habits(rate=plan.rate)
        while (elapsed_s := time.monotonic() - begun_s) < plan.minutes * 60:
            faults = next(draws)
            names = " + ".join(fault.name for fault in faults)
            say(f"{elapsed_s / 60:5.1f} min, episode {len(outcome.episodes) + 1}: {names}")
            outcome.episodes.append(run_episode(scene, watch, len(outcome.episodes) + 1, faults, habits))
            outcome.seconds = time.monotonic() - begun_s
            outcome.worker_kills, outcome.broker_restarts = scene.trial.fleet.kills, scene.broker_restarts
            outcome.rebalances, outcome.memory_mb = scene.rebalances, tuple(scene.memory_mb)
            outcome.start_seconds = tuple(scene.trial.fleet.start_seconds)
            outcome.longest_stall_s = watch.longest_stall_s
            on_episode(outcome)
            if outcome.violations and not plan.keep_going:
                break
    return outcome


@contextmanager
def _scene(plan: Plan, say: Callable[[str], None], outcome: Outcome) -> Iterator[Scene]:
    """A broker, an application and its traffic; the folder is kept when a law was broken, for its logs."""
    folder = Path(tempfile.mkdtemp(prefix="streamformer-chaos-"))
    say("starting a broker")
    try:
        with Broker.start(BrokerOptions(message_bytes_max=LARGEST_RECORD_BYTES)) as broker:
            stage = set_up(folder / "chaos", broker.bootstrap_servers, "chaos")
            traffic = Traffic(stage.settings, plan.seed, habits=Habits(rate=0.0))
            with Trial(stage) as trial:
                traffic.start()
                rebalances = REBALANCES_OF_AN_HOUR if plan.minutes >= LONG_MINUTES else REBALANCES_OF_A_SHORT_RUN
                try:
                    yield Scene(broker, trial, traffic, random.Random(plan.seed), folder, rebalances, say)
                finally:
                    traffic.stop()
    finally:
        if outcome.violations:
            say(f"the workers' logs and disks are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _draws(plan: Plan, scene: Scene, elapsed_s: Callable[[], float]) -> Iterator[tuple[Fault, ...]]:
    """The faults of each episode."""
    if plan.faults:
        while True:
            yield from (tuple(BY_NAME[each] for each in name.split("+")) for name in plan.faults)
    alone = [fault for fault in CATALOGUE if fault.name != "disk-full" or can_mount()]
    scene.dice.shuffle(alone)
    for fault in alone:
        yield (fault,)
        yield _pair(scene, elapsed_s())
    while True:
        yield _pair(scene, elapsed_s())


def _pair(scene: Scene, elapsed_s: float) -> tuple[Fault, ...]:
    """Two faults that may strike together, what is behind its pace among them."""
    hours = (elapsed_s + 60) / 3600
    wanted = set()
    if scene.trial.fleet.kills < KILLS_PER_HOUR * hours:
        wanted.add("worker-killed")
    if scene.broker_restarts < RESTARTS_PER_HOUR * hours:
        wanted.add(scene.dice.choice(("broker-killed", "broker-bounced")))
    found = [pair for pair in pairs() if wanted <= {fault.name for fault in pair}]
    drawable = [pair for pair in found if can_mount() or all(fault.name != "disk-full" for fault in pair)]
    return scene.dice.choice(drawable)
