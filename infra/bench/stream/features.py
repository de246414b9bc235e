"""Features: what they cost a worker per event, beside windows of other stream processors on the same features.

    python -m infra.bench.stream.features [--quick] [--no-peers] [--rounds N]

The subjects are processes on one real broker with four partitions, which take turns as in `infra.bench.stream.ingest`
(which describes the procedure). Every figure is the median over the rounds, and every ratio is formed within a round.

- `worker-features` has 20 definitions of every kind over 1 h, 1 d, 7 d and 28 d, whose filters let every event pass,
  and item attributes. `worker` does the same job without. No trigger fires, so features are state: read from the event,
  kept exactly, in every checkpoint. Before the rounds all users get a history of up to 90 active days.
- `worker-published` computes and publishes the features of each user that acts: 20 definitions, no encoder.
- `worker-subset` has the four features that the baselines express too: count and sum of durations over 1 h and 1 d.

Without a broker: the bytes that the state of a user takes (99th percentile), and rows per second of `features compute`.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from encoder.arrays import I64
from infra.bench.baselines import stream as baselines
from infra.bench.stream.bursts import Burst, distinct_users, zipf_users
from infra.bench.stream.comparison import Comparison, Measurement, start_baselines
from infra.bench.stream.feature_job import DEFINITIONS, SUBSET, history, write_attributes
from infra.bench.stream.feature_state import offline_rates, state_bytes
from infra.bench.stream.worker import PARTITIONS, MeasuredWorker, WorkerJob, prepare_worker
from infra.harness.reporting import Spread, agreed_ratio, console, machine, print_result, run_command
from infra.harness.worker_process import STOP_S, running
from infra.kafka.broker import broker_or_external

USERS = 20_000
HISTORY_EVENTS_PER_DAY = 1.0
EVENTS, PUBLISHED_EVENTS = 400_000, 60_000
ROUNDS = 5
IDLE_S = 1.0
STATE_USERS, OFFLINE_USERS = 1_000, 1_000

UNFAIR = """What is not equal, before any figure:
- in favour of the baselines: they keep tumbling tiles (5 minutes and an hour) that a reader has to add up, at one
  update per event and window; windows that hold the sum ready (hopping) would take 12 and 24. They do not check fields,
  drop repeated event ids, order late events or keep state exactly once. The worker also keeps the last 64 actions of
  each user in order, which these features do not need.
- in favour of the worker: it is made for this job and processes events in batches, while the baselines are general and
  call a function per event. Its state of a user is one record, so a checkpoint writes one where they write one per
  tile."""

BASELINE_EVENTS = {"quix": 60_000, "kafka-streams": 300_000}
"""Events of a burst, which keep the baseline busy for some seconds."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything that runs."""

    all: list[Measurement]
    unavailable: dict[str, str]
    """Name of a baseline that cannot run here -> reason."""
    published: MeasuredWorker
    published_per_cpu_s: list[float]
    """Users whose features were published, per CPU second in each round."""


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Run one small round; print no last line.")] = False,
    with_baselines: Annotated[bool, typer.Option("--peers/--no-peers", help="Measure the baselines too.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to measure.")] = ROUNDS,
) -> None:
    """Measure what features cost a worker, beside windows of other stream processors."""
    rounds, scale, load = (1, 0.05, os.getloadavg()) if quick else (rounds, 1.0, os.getloadavg())
    with tempfile.TemporaryDirectory(prefix="streamformer-bench-") as name:
        folder = Path(name)
        alone = _without_broker(folder, scale)
        with broker_or_external() as broker, _started(broker.bootstrap_servers, folder, scale, with_baselines) as setup:
            console.print(UNFAIR if with_baselines else "")
            client = {"bootstrap_servers": broker.bootstrap_servers}
            for each in setup.all:
                each.burst(client, 0)
                console.print(f"{each.subject.name}: started and warmed up with {each.process.cpu_s:.1f} CPU seconds")
            for round_ in range(1, rounds + 1):
                _measure_round(setup, client, round_)
                rates = ", ".join(f"{each.subject.name} {each.rates[-1]:,.0f}" for each in setup.all)
                console.print(f"round {round_} of {rounds}: {rates}")
    result = _report(setup) | alone | {"load": [round(each, 2) for each in (*load, *os.getloadavg())]}
    if not quick:
        print_result({"bench": "features", "machine": machine(), **result})


def _without_broker(folder: Path, scale: float) -> dict[str, float]:
    """Measure state and offline computation."""
    definitions, attributes = folder / "features.toml", write_attributes(folder / "items.csv")
    definitions.write_text(DEFINITIONS)
    stored = round(state_bytes(definitions, attributes, int(STATE_USERS * scale)))
    console.print(f"state of a user: {stored:,} bytes (99th percentile)")
    rows, actions = offline_rates(definitions, attributes, folder, int(OFFLINE_USERS * scale))
    console.print(f"features compute: {rows:,.0f} rows and {actions:,.0f} actions per second")
    return {"state_bytes_per_user": stored, "offline_rows_per_second": round(rows)}


@contextmanager
def _started(bootstrap_servers: str, folder: Path, scale: float, with_baselines: bool) -> Iterator[Setup]:
    """Start four workers and the baselines."""
    users = int(USERS * scale)
    full = WorkerJob(definitions=DEFINITIONS, attributes=folder / "items.csv")
    publishing = replace(full, policy="[triggers]\nevery_n = 1\n", is_embedding=False)
    jobs = {
        "worker-features": (full, _active(users, int(EVENTS * scale))),
        "worker": (WorkerJob(), _active(users, int(EVENTS * scale))),
        "worker-subset": (WorkerJob(is_embedding=False, definitions=SUBSET), _active(users, int(EVENTS * scale))),
        "worker-published": (
            publishing,
            lambda seed: distinct_users(np.random.default_rng(seed), users, int(PUBLISHED_EVENTS * scale)),
        ),
    }
    with ExitStack() as stack:
        measurements = []
        workers = {name: prepare_worker(name, bootstrap_servers, folder / name, job) for name, (job, _) in jobs.items()}
        for name, worker in workers.items():
            process = stack.enter_context(running(worker.subject.program, grace_s=STOP_S))
            bursts = _with_history(users, jobs[name][1])
            measurements.append(Measurement(worker.subject, process, bursts, worker.subject.applied))
        preparations = baselines.WINDOWS if with_baselines else {}
        started, unavailable = start_baselines(stack, baselines.Job(bootstrap_servers, folder), preparations)
        for name, (subject, process) in started.items():
            acting = _active(users, int(BASELINE_EVENTS[name] * scale))
            measurements.append(Measurement(subject, process, _present(acting), subject.applied))
        yield Setup(measurements, unavailable, workers["worker-published"], [])


def _active(users: int, events: int) -> Callable[[int], I64]:
    return lambda _: zipf_users(np.random.default_rng(events), users, events)


def _present(acting: Callable[[int], I64]) -> Callable[[int], Burst]:
    return lambda round_: Burst(acting(round_), PARTITIONS, seed=round_, with_values=True)


def _with_history(users: int, acting: Callable[[int], I64]) -> Callable[[int], Burst]:
    """Return the bursts of a worker, of which the first is the history of its users."""

    def burst_of(round_: int) -> Burst:
        if round_:
            return _present(acting)(round_)
        rng = np.random.default_rng(0)
        rows, times_ms = history(rng, users, HISTORY_EVENTS_PER_DAY, time.time_ns() // 1_000_000)
        return Burst(rows, PARTITIONS, seed=0, times_ms=times_ms, with_values=True)

    return burst_of


def _measure_round(setup: Setup, client: dict[str, str], round_: int) -> None:
    for each in setup.all:
        published, cpu_s = setup.published.metric("streamformer_features_published_total"), each.process.cpu_s
        each.measure(client, round_, IDLE_S)
        if each.subject.name == setup.published.subject.name:
            published = setup.published.metric("streamformer_features_published_total") - published
            setup.published_per_cpu_s.append(published / (each.process.cpu_s - cpu_s))


def _report(setup: Setup) -> dict[str, Any]:
    """Print tables and return the figures of the last line."""
    by_name = {each.subject.name: each for each in setup.all}
    features, plain, subset = (by_name[name] for name in ("worker-features", "worker", "worker-subset"))
    Comparison([features, plain, by_name["worker-published"]], {}).print_table("Events per second, 20 features")
    others = [by_name[name] for name in baselines.WINDOWS if name in by_name]
    comparison = Comparison([subset, *others], setup.unavailable)
    comparison.print_table("Events per second, 4 features")
    overhead = Spread(tuple(each - 1 for each in agreed_ratio(plain.rates, features.rates).values))
    console.print(f"CPU per event with features over without, minus 1: {overhead}")
    published = Spread(tuple(setup.published_per_cpu_s))
    console.print(f"users published per CPU second: {published}")
    ratios = comparison.ratios(2)
    return {
        "events_per_cpu_second": round(Spread(tuple(features.rates)).median),
        "without_features": round(Spread(tuple(plain.rates)).median),
        "overhead": round(overhead.median, 3),
        "published_users_per_cpu_second": round(published.median),
        "subset_events_per_cpu_second": round(Spread(tuple(subset.rates)).median),
        **{f"ratio_{name.replace('-', '_')}": ratios.get(name) for name in baselines.WINDOWS},
    }


if __name__ == "__main__":
    run_command(main)
