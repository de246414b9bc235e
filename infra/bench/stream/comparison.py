"""A comparison in rounds: every subject in turn gets a burst of events while the others are idle.

CPU seconds are read before the burst and again when its last event has had its effect and the last checkpoint is in, so
the start of a process does not count. Ratios are formed within each round.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from infra.bench.baselines.stream import BaselineUnavailable, Job
from infra.bench.stream.bursts import Burst
from infra.bench.stream.subject import Subject
from infra.harness.reporting import Spread, agreed_ratio, console, print_table
from infra.harness.worker_process import STOP_S, Process, running

BURST_TIMEOUT_S = 180.0


@dataclass(slots=True)
class Measurement:
    """A running subject and its figures, one per round."""

    subject: Subject
    process: Process
    burst_of: Callable[[int], Burst]
    """Return the burst of a round."""
    progress: Callable[[], int]
    """Return how many events have had their effect, or more; each event adds one."""
    expected: int = 0
    """Progress once all bursts so far have had their effect."""
    rates: list[float] = field(default_factory=list)
    """Events per CPU second."""
    wall_rates: list[float] = field(default_factory=list)
    """Events per second by the clock."""

    def burst(self, client: Mapping[str, str], round_: int) -> tuple[int, float]:
        """Send a burst and wait for its effect; return its events, and the seconds from its first append on."""
        burst = self.burst_of(round_)
        appending_s = asyncio.run(burst.append(self.subject.topic, client))
        started_s = time.monotonic() - appending_s
        self.expected += burst.events
        what = f"the effect of {burst.events:,} events"
        self.process.wait_until(lambda: self.progress() >= self.expected, what, BURST_TIMEOUT_S)
        seconds = time.monotonic() - started_s
        time.sleep(self.subject.settle_s)
        return burst.events, seconds

    def measure(self, client: Mapping[str, str], round_: int, idle_s: float) -> None:
        """Wait for a moment, then send the burst of a round and keep its figures."""
        time.sleep(idle_s)
        cpu_s = self.process.cpu_s
        events, seconds = self.burst(client, round_)
        self.rates.append(events / (self.process.cpu_s - cpu_s))
        self.wall_rates.append(events / seconds)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The worker, which comes first, and its baselines."""

    measurements: Sequence[Measurement]
    unavailable: Mapping[str, str]
    """Name of a baseline that cannot run here -> reason."""

    def print_table(self, title: str) -> None:
        """Print medians and ranges, and the ratio to the worker."""
        ours = self.measurements[0]
        rows = [
            (
                each.subject.name,
                str(Spread(tuple(each.rates))),
                str(Spread(tuple(each.wall_rates))),
                _against(ours, each),
            )
            for each in self.measurements
        ]
        headings = ("", "per CPU second", "by the clock", "worker / this one")
        print_table(f"{title}: median (smallest to largest)", headings, rows)
        for name, reason in self.unavailable.items():
            console.print(f"{name} was not measured: {reason}")

    def ratios(self, digits: int) -> dict[str, float]:
        """Return the median ratio of the worker to each other subject, by name."""
        ours, *others = self.measurements
        return {each.subject.name: round(agreed_ratio(ours.rates, each.rates).median, digits) for each in others}


def start_baselines(
    stack: ExitStack, job: Job, preparations: Mapping[str, Callable[[Job], Subject]]
) -> tuple[dict[str, tuple[Subject, Process]], dict[str, str]]:
    """Start the baselines, which stop with `stack`; return them, and the reasons of those that cannot run here."""
    started, unavailable = {}, {}
    for name, prepare in preparations.items():
        try:
            subject = prepare(job)
        except BaselineUnavailable as error:
            unavailable[name] = str(error)
            continue
        started[name] = subject, stack.enter_context(running(subject.program, grace_s=STOP_S))
    return started, unavailable


def _against(ours: Measurement, other: Measurement) -> str:
    """Return the ratio; "more" only where every round agrees."""
    if ours.subject.name in other.subject.name:  # the worker itself, or the worker at another job
        return ""
    ratio = agreed_ratio(ours.rates, other.rates)
    return f"{ratio}, {'more in every round' if min(ratio.values) > 1 else 'not more in every round'}"
