"""Freshness: from an event handed to Kafka to an embedding that contains it, on the whole path, against load.

    python -m infra.bench.stream.freshness [--quick] [--no-peers] [--size small|reference]

A real broker with four partitions, the shipped worker, every event a trigger, the events of 5,000 users with full
sequences; producer and consumer are this process. Broker, worker and client share the machine.

1. Bursts of one event of each user, which nothing can coalesce, appended at once: embeddings a second is *saturation*,
   embeddings per CPU second (user and system, all threads of the process) is compared with the peers', whose bursts
   take turns with the worker's.
2. 2,000 events/s: p50 and p99 of freshness, over all events.
3. A ladder of loads up to 150 % of saturation, and how long what was left took to drain. The plot is made of these.
4. Two workers, 2,000 events/s; inside a burst of ten times that, one is killed (SIGKILL) and stays dead. Take-over is
   the time from the kill to the first embedding of each of its partitions; from then on freshness counts again.

What is not equal is printed before the figures.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from encoder.arrays import F64, I64
from encoder.model import EncoderConfig
from infra.bench.baselines.processes import Running
from infra.bench.stream.bursts import Burst, distinct_users
from infra.bench.stream.encoding import EncodeRates, measure_rates
from infra.bench.stream.freshness_plot import save_plot
from infra.bench.stream.traffic import Outcome, Route, Stretch, drive
from infra.bench.stream.worker import PARTITIONS, MeasuredWorker, WorkerJob, join_worker, prepare_worker
from infra.errors import InfraError
from infra.harness.reporting import console, machine, print_result, print_table, run_command
from infra.kafka.broker import broker_or_external

EVERY_ACTION = "[triggers]\nevery_n = 1\n"
USERS = 5_000
CACHE_BYTES_MAX = 2 << 30
RATE = 2_000.0
LADDER = (0.25, 0.5, 0.8, 1.0, 1.25, 1.5)
"""Loads as fractions of saturation."""
BURST_FACTOR = 10
DRAIN_S = 60.0
READY_S = 60.0
TAKE_OVER_S = 30.0
"""Traffic after the kill until freshness counts again: the group's session timeout, and as much again, twice."""
REPORTS = Path("reports")


class TakeOverTooLate(InfraError):
    """Nothing is left to be measured after the take-over."""


class Size(StrEnum):
    """Of the encoder."""

    SMALL = "small"
    REFERENCE = "reference"


ENCODERS = {
    Size.SMALL: EncoderConfig(
        d_model=64, heads=4, kv_heads=2, windows=(32, 32), embedding_dim=64, item_dim=64, sequence_length=64
    ),
    Size.REFERENCE: EncoderConfig(),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How long things are measured."""

    rounds: int
    steady_s: float
    step_s: float
    burst_s: float
    after_s: float
    """Of traffic after the take-over is possible."""


FULL = Plan(rounds=5, steady_s=30.0, step_s=8.0, burst_s=1.0, after_s=20.0)
QUICK = Plan(rounds=1, steady_s=3.0, step_s=1.0, burst_s=0.5, after_s=3.0)


@dataclass(frozen=True, slots=True)
class Step:
    """One load on the ladder, and the CPU it took as a fraction of one core."""

    load: float
    """Fraction of saturation."""
    outcome: Outcome
    worker_cpu: float
    client_cpu: float


@dataclass(frozen=True, slots=True)
class Kill:
    """What a killed worker does to freshness."""

    takeover_s: float
    freshness_ms: F64
    """Of all events sent after the take-over."""
    unserved: int


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes; figures mean little.")] = False,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Measure the peers too.")] = True,
    size: Annotated[Size, typer.Option(help="Of the encoder.")] = Size.SMALL,
) -> None:
    """Measure freshness on the whole path, against load, through a kill, and against its peers."""
    plan = QUICK if quick else FULL
    job = WorkerJob(EVERY_ACTION, ENCODERS[size], CACHE_BYTES_MAX, items=10_000)
    with (
        tempfile.TemporaryDirectory(prefix="streamformer-bench-") as folder,
        broker_or_external() as broker,
    ):
        servers = broker.bootstrap_servers
        worker = prepare_worker("fresh", servers, Path(folder) / "fresh", job)
        with _running(worker) as (running,):
            _fill(worker, job.encoder.sequence_length)
            rates = measure_rates(worker, running, job, Path(folder), USERS, plan.rounds, peers=peers)
            steady = _step(worker, running, RATE / rates.saturation, rates.saturation, plan.steady_s)
            _say("2,000 events/s", steady)
            steps = [_ladder_step(worker, running, load, rates.saturation, plan.step_s) for load in LADDER]
        kill = _kill_trial(servers, Path(folder), job, plan)
    plot = save_plot([(each.outcome.rate, each.outcome.freshness_ms) for each in steps], rates.saturation, REPORTS)
    _report(size, job.encoder, rates, steady, steps, kill)
    console.print(f"plot: {plot}")


@contextmanager
def _running(*workers: MeasuredWorker) -> Iterator[list[Running]]:
    """Workers of one application, ready."""
    started = [Running.start(worker.contestant) for worker in workers]
    try:
        ready = lambda: is_settled(workers)  # noqa: E731
        started[0].wait_until(ready, "all partitions ready", READY_S)
        yield started
    finally:
        for running in started:
            running.stop()


def is_settled(workers: Sequence[MeasuredWorker]) -> bool:
    """Whether every worker has partitions, and all of them together have all partitions, restored."""
    ready = [worker.partitions_ready for worker in workers]
    return sum(ready) == PARTITIONS and min(ready) > 0


def _fill(worker: MeasuredWorker, actions: int) -> None:
    """Give every user a full sequence, and wait for the embeddings."""
    started_s = time.monotonic()
    users = distinct_users(np.random.default_rng(0), USERS, USERS * actions)
    burst = Burst(users, PARTITIONS, seed=0)
    asyncio.run(burst.append(worker.topic, _client(worker)))
    asyncio.run(drive(_route(worker), np.arange(USERS), [Stretch(1_000, 1.0)], drain_timeout_s=120.0))
    console.print(f"{burst.events:,} events for full sequences, worked off in {time.monotonic() - started_s:.1f} s")


def _ladder_step(worker: MeasuredWorker, running: Running, load: float, saturation: float, seconds: float) -> Step:
    step = _step(worker, running, load, saturation, seconds)
    _say(f"{load:.0%} of saturation", step)
    return step


def _step(worker: MeasuredWorker, running: Running, load: float, saturation: float, seconds: float) -> Step:
    users = np.random.default_rng(round(load * 1_000)).integers(USERS, size=100_000)
    cpu_s, own_s, started_s = running.cpu_s, time.process_time(), time.monotonic()
    outcome = asyncio.run(drive(_route(worker), users, [Stretch(load * saturation, seconds)], drain_timeout_s=DRAIN_S))
    elapsed_s = time.monotonic() - started_s
    return Step(load, outcome, (running.cpu_s - cpu_s) / elapsed_s, (time.process_time() - own_s) / elapsed_s)


def _kill_trial(servers: str, folder: Path, job: WorkerJob, plan: Plan) -> Kill:
    """Kill one of two workers in the middle of a burst; see the module's docstring."""
    survivor = prepare_worker("survivor", servers, folder / "survivor", job)
    victim = join_worker(survivor, "victim", folder / "victim")
    users = np.random.default_rng(4).integers(USERS, size=200_000)
    before_s = plan.steady_s / 3
    load = [
        Stretch(RATE, before_s),
        Stretch(BURST_FACTOR * RATE, plan.burst_s),
        Stretch(RATE, TAKE_OVER_S + plan.after_s),
    ]
    with _running(survivor, victim) as (_, killed):
        _fill(survivor, job.encoder.sequence_length)
        outcome, killed_s = asyncio.run(
            _drive_and_kill(_route(survivor), users, load, killed, before_s + plan.burst_s / 2)
        )
    taken_over_s = take_over(outcome, killed_s)
    after = outcome.sent_s >= taken_over_s
    freshness_ms = (outcome.served_s - outcome.sent_s)[after] * 1000
    if not after.any():
        raise TakeOverTooLate(
            "the killed worker's partitions came back too late",
            f"after {taken_over_s - killed_s:.0f} s, when the traffic had ended",
            "run it again on a less busy machine",
        )
    kill = Kill(taken_over_s - killed_s, freshness_ms[~np.isnan(freshness_ms)], outcome.unserved)
    console.print(f"killed one of two workers: taken over after {kill.takeover_s:.1f} s")
    return kill


async def _drive_and_kill(
    route: Route, users: I64, load: Sequence[Stretch], victim: Running, after_s: float
) -> tuple[Outcome, float]:
    async def kill() -> float:
        await asyncio.sleep(after_s)
        victim.process.kill()
        return time.time()

    killing = asyncio.create_task(kill())
    outcome = await drive(route, users, load, drain_timeout_s=DRAIN_S)
    return outcome, await killing


def take_over(outcome: Outcome, killed_s: float) -> float:
    """When the last of the killed worker's partitions gave embeddings again.

    Its partitions are those that fell silent for more than a second after the kill.
    """
    resumed_s = killed_s
    for partition in range(PARTITIONS):
        times = outcome.received_s[outcome.received_partition == partition]
        times = np.concatenate([[killed_s], times[times > killed_s]])
        gaps = np.diff(times)
        if len(gaps) and gaps.max() > 1:
            resumed_s = max(resumed_s, float(times[int(gaps.argmax()) + 1]))
    return resumed_s


def _route(worker: MeasuredWorker) -> Route:
    topics = worker.settings.topics
    return Route(topics.actions, topics.embeddings, PARTITIONS, _client(worker))


def _client(worker: MeasuredWorker) -> dict[str, str]:
    return {"bootstrap_servers": worker.settings.kafka.bootstrap_servers}


def _percentiles(freshness_ms: F64) -> tuple[float, float]:
    """p50 and p99, NaN where there is nothing."""
    if not len(freshness_ms):
        return float("nan"), float("nan")
    p50, p99 = np.percentile(freshness_ms, [50, 99])
    return float(p50), float(p99)


def _say(what: str, step: Step) -> None:
    p50, p99 = _percentiles(step.outcome.freshness_ms)
    console.print(f"{what}: p50 {p50:,.1f} ms, p99 {p99:,.1f} ms")


def _row(what: str, step: Step) -> tuple[str, ...]:
    outcome = step.outcome
    p50, p99 = _percentiles(outcome.freshness_ms)
    return (
        what,
        f"{outcome.rate:,.0f}",
        f"{p50:,.1f}",
        f"{p99:,.1f}",
        f"{outcome.freshness_ms.max(initial=0):,.0f}",
        f"{outcome.events_per_embedding:.2f}",
        f"{outcome.drain_s:.2f}",
        f"{outcome.unserved}",
        f"{step.worker_cpu:.0%} / {step.client_cpu:.0%}",
    )


def _report(
    size: Size, encoder: EncoderConfig, rates: EncodeRates, steady: Step, steps: Sequence[Step], kill: Kill
) -> None:
    rows = [_row("2,000 events/s", steady), *(_row(f"{each.load:.0%} of saturation", each) for each in steps)]
    headings = ("load", "events/s", "p50 ms", "p99 ms", "max ms", "events/embedding", "drain s", "unserved")
    print_table("Freshness, event sent to embedding received", (*headings, "worker / client CPU"), rows)
    rates.print_table()
    p50, p99 = _percentiles(steady.outcome.freshness_ms)
    kill_p50, kill_p99 = _percentiles(kill.freshness_ms)
    at_80, top = (next(step for step in steps if step.load == load) for load in (0.8, 1.5))
    print_result(
        {
            "bench": "freshness",
            "machine": machine(),
            "encoder": f"{size}: d {encoder.d_model}, {len(encoder.windows)} layers, windows of {encoder.windows[0]}",
            "p50_ms": round(p50, 1),
            "p99_ms": round(p99, 1),
            "saturation_events_per_second": round(rates.saturation),
            "p99_ms_at_80_percent": round(_percentiles(at_80.outcome.freshness_ms)[1], 1),
            "max_ms_at_150_percent": round(float(top.outcome.freshness_ms.max(initial=0)), 1),
            "events_per_embedding_at_150_percent": round(top.outcome.events_per_embedding, 2),
            "drain_seconds_after_150_percent": round(top.outcome.drain_s, 2),
            "kill_p50_ms": round(kill_p50, 1),
            "kill_p99_ms": round(kill_p99, 1),
            "takeover_seconds": round(kill.takeover_s, 1),
            "unserved": sum(step.outcome.unserved for step in (steady, *steps)) + kill.unserved,
        }
        | rates.result()
    )


if __name__ == "__main__":
    run_command(main)
