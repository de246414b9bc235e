"""Freshness against load on the whole path: from handing an event to Kafka to receiving an embedding that contains it.

    python -m infra.bench.stream.freshness [--quick] [--no-peers] [--size small|reference] [--against CHECKOUT]

A real broker with four partitions, the shipped worker, every event a trigger, 5,000 users with full sequences. Producer
and consumer are this process; broker, worker and client share the machine.

1. Bursts of one event of each user, none of which can share an embedding, are appended at once: embeddings per second
   by the clock is *saturation*. Embeddings per CPU second (user and system, all threads of the process) are compared
   with those of the baselines, whose bursts alternate with those of the worker.
2. 2,000 events/s: p50 and p99 of freshness, over all events.
3. A ladder of loads up to 150 % of saturation, each with the time to drain its backlog. The plot shows these.
4. Two workers, 2,000 events/s; inside a burst of ten times that rate, one is killed (SIGKILL) and stays down. Take-over
   is the time from the kill to the first embedding of each of its partitions; from then on freshness counts again.

The program prints what is not equal before the figures. With `--against` it does something else: the worker and that of
another checkout of this project take turns at 2,000 events/s, which shows what a change does to freshness and CPU.
"""

from __future__ import annotations

import asyncio
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from encoder.arrays import F64, I64
from encoder.model import EncoderConfig
from infra.bench.stream.bursts import Burst, distinct_users
from infra.bench.stream.encoding import EncodeRates, RatePlan, measure_rates
from infra.bench.stream.freshness_plot import save_plot
from infra.bench.stream.traffic import Outcome, Route, Stretch, drive
from infra.bench.stream.worker import PARTITIONS, MeasuredWorker, WorkerJob, join_worker, prepare_worker
from infra.errors import InfraError
from infra.harness.freshness import percentiles
from infra.harness.reporting import console, machine, print_result, print_table, run_command
from infra.harness.worker_process import STOP_S, Process, running
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
"""Traffic after the kill until freshness counts again: three session timeouts of the group."""
REPORTS = Path("reports")


class TakeOverTooLate(InfraError):
    """The traffic ended before the take-over, so nothing could be measured after it."""


class Size(StrEnum):
    """Size of the encoder."""

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
    """Duration of each part."""

    rounds: int
    steady_s: float
    step_s: float
    burst_s: float
    after_s: float
    """Traffic after the time allowed for the take-over."""


FULL = Plan(rounds=5, steady_s=30.0, step_s=8.0, burst_s=1.0, after_s=20.0)
QUICK = Plan(rounds=1, steady_s=3.0, step_s=1.0, burst_s=0.5, after_s=3.0)


@dataclass(frozen=True, slots=True)
class Step:
    """The outcome of one load; CPU is in fractions of one core."""

    load: float
    """Fraction of saturation."""
    outcome: Outcome
    worker_cpu: float
    client_cpu: float


@dataclass(frozen=True, slots=True)
class Kill:
    """Freshness after one of two workers was killed."""

    takeover_s: float
    freshness_ms: F64
    """[E] for the events sent after the take-over."""
    unserved: int


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="Take seconds instead of minutes; the figures mean little.")
    ] = False,
    with_baselines: Annotated[bool, typer.Option("--peers/--no-peers", help="Measure the baselines too.")] = True,
    size: Annotated[Size, typer.Option(help="Size of the encoder.")] = Size.SMALL,
    against: Annotated[Path | None, typer.Option(exists=True, help="Compare with the worker of this checkout.")] = None,
) -> None:
    """Measure freshness on the whole path, against load, through a kill, and against baselines."""
    plan = QUICK if quick else FULL
    job = WorkerJob(EVERY_ACTION, ENCODERS[size], CACHE_BYTES_MAX, items=10_000)
    if against is not None:
        _compare(against, job, plan)
        return
    with (
        tempfile.TemporaryDirectory(prefix="streamformer-bench-") as folder,
        broker_or_external() as broker,
    ):
        servers = broker.bootstrap_servers
        worker = prepare_worker("worker", servers, Path(folder) / "worker", job)
        with _ready(worker) as (process,):
            _fill(worker, job.encoder.sequence_length)
            rates = measure_rates(worker, process, job, Path(folder), RatePlan(USERS, plan.rounds, with_baselines))
            steady = _step(worker, process, RATE / rates.saturation, rates.saturation, plan.steady_s)
            _print_step("2,000 events/s", steady)
            steps = [_ladder_step(worker, process, load, rates.saturation, plan.step_s) for load in LADDER]
        kill = _kill_one_of_two(servers, Path(folder), job, plan)
    plot = save_plot([(each.outcome.rate, each.outcome.freshness_ms) for each in steps], rates.saturation, REPORTS)
    _report(size, job.encoder, rates, steady, steps, kill)
    console.print(f"plot: {plot}")


def _compare(against: Path, job: WorkerJob, plan: Plan) -> None:
    """Drive this worker and that of another checkout in turn, and print the figures of both."""
    found: dict[str, list[tuple[float, float, float]]] = {"this": [], "other": []}
    with tempfile.TemporaryDirectory(prefix="streamformer-bench-") as folder, broker_or_external() as broker:
        workers = {name: prepare_worker(name, broker.bootstrap_servers, Path(folder) / name, job) for name in found}
        programs = {name: worker.subject.program for name, worker in workers.items()}
        programs["other"] = replace(programs["other"], folder=against)
        with ExitStack() as stack:
            processes = {}
            for name, worker in workers.items():
                processes[name] = stack.enter_context(running(programs[name], grace_s=STOP_S))
                processes[name].wait_until(lambda: is_settled([worker]), "the state of readiness", READY_S)  # noqa: B023
                _fill(worker, job.encoder.sequence_length)
            for round_ in range(2 * plan.rounds):
                for name in sorted(found, reverse=round_ % 2 == 0):
                    step = _step(workers[name], processes[name], 1.0, RATE, plan.steady_s / 3)
                    _print_step(f"round {round_ + 1}, {name}", step)
                    p50, p99 = percentiles(step.outcome.freshness_ms, 50, 99)
                    found[name].append((p50, p99, step.worker_cpu))
    figures = {
        f"{name}_{what}": [round(each[at], 3) for each in rows]
        for name, rows in found.items()
        for at, what in enumerate(("p50_ms", "p99_ms", "cpu"))
    }
    print_result({"bench": "freshness-against", "machine": machine(), "events_per_second": RATE, **figures})


@contextmanager
def _ready(*workers: MeasuredWorker) -> Iterator[list[Process]]:
    """Run workers of one application; they are ready when the block begins."""
    with ExitStack() as stack:
        started = [stack.enter_context(running(worker.subject.program, grace_s=STOP_S)) for worker in workers]
        started[0].wait_until(lambda: is_settled(workers), "the state in which all partitions are ready", READY_S)
        yield started


def is_settled(workers: Sequence[MeasuredWorker]) -> bool:
    """Return whether every worker has partitions, and all partitions are restored."""
    ready = [worker.partitions_ready for worker in workers]
    return sum(ready) == PARTITIONS and min(ready) > 0


def _fill(worker: MeasuredWorker, actions: int) -> None:
    """Give every user a full sequence, and wait for the embeddings."""
    started_s = time.monotonic()
    users = distinct_users(np.random.default_rng(0), USERS, USERS * actions)
    burst = Burst(users, PARTITIONS, seed=0)
    asyncio.run(burst.append(worker.subject.topic, worker.client))
    asyncio.run(drive(_route(worker), np.arange(USERS), [Stretch(1_000, 1.0)], drain_timeout_s=120.0))
    console.print(f"{burst.events:,} events for full sequences, processed in {time.monotonic() - started_s:.1f} s")


def _ladder_step(worker: MeasuredWorker, process: Process, load: float, saturation: float, seconds: float) -> Step:
    step = _step(worker, process, load, saturation, seconds)
    _print_step(f"{load:.0%} of saturation", step)
    return step


def _step(worker: MeasuredWorker, process: Process, load: float, saturation: float, seconds: float) -> Step:
    users = np.random.default_rng(round(load * 1_000)).integers(USERS, size=100_000)
    cpu_s, own_s, started_s = process.cpu_s, time.process_time(), time.monotonic()
    outcome = asyncio.run(drive(_route(worker), users, [Stretch(load * saturation, seconds)], drain_timeout_s=DRAIN_S))
    elapsed_s = time.monotonic() - started_s
    return Step(load, outcome, (process.cpu_s - cpu_s) / elapsed_s, (time.process_time() - own_s) / elapsed_s)


def _kill_one_of_two(servers: str, folder: Path, job: WorkerJob, plan: Plan) -> Kill:
    """Kill one of two workers in the middle of a burst; see the docstring of the module."""
    survivor = prepare_worker("survivor", servers, folder / "survivor", job)
    victim = join_worker(survivor, "victim", folder / "victim")
    users = np.random.default_rng(4).integers(USERS, size=200_000)
    before_s = plan.steady_s / 3
    load = [
        Stretch(RATE, before_s),
        Stretch(BURST_FACTOR * RATE, plan.burst_s),
        Stretch(RATE, TAKE_OVER_S + plan.after_s),
    ]
    with _ready(survivor, victim) as (_, killed):
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
    route: Route, users: I64, load: Sequence[Stretch], victim: Process, after_s: float
) -> tuple[Outcome, float]:
    async def kill() -> float:
        await asyncio.sleep(after_s)
        victim.send_signal(signal.SIGKILL)
        return time.time()

    killing = asyncio.create_task(kill())
    outcome = await drive(route, users, load, drain_timeout_s=DRAIN_S)
    return outcome, await killing


def take_over(outcome: Outcome, killed_s: float) -> float:
    """Return when the last of the killed worker's partitions gave embeddings again.

    Its partitions are those without embeddings for more than a second after the kill.
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
    return Route(topics.actions, topics.embeddings, PARTITIONS, worker.client)


def _print_step(what: str, step: Step) -> None:
    p50, p99 = percentiles(step.outcome.freshness_ms, 50, 99)
    console.print(f"{what}: p50 {p50:,.1f} ms, p99 {p99:,.1f} ms")


def _row(what: str, step: Step) -> tuple[str, ...]:
    outcome = step.outcome
    p50, p99 = percentiles(outcome.freshness_ms, 50, 99)
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
    p50, p99 = percentiles(steady.outcome.freshness_ms, 50, 99)
    kill_p50, kill_p99 = percentiles(kill.freshness_ms, 50, 99)
    at_80, top = (next(step for step in steps if step.load == load) for load in (0.8, 1.5))
    print_result(
        {
            "bench": "freshness",
            "machine": machine(),
            "encoder": f"{size}: d {encoder.d_model}, {len(encoder.windows)} layers, windows of {encoder.windows[0]}",
            "p50_ms": round(p50, 1),
            "p99_ms": round(p99, 1),
            "saturation_events_per_second": round(rates.saturation),
            "p99_ms_at_80_percent": round(percentiles(at_80.outcome.freshness_ms, 99)[0], 1),
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
