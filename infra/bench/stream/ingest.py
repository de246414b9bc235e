"""Ingestion: events per CPU second of one worker and of its baselines, on the same job in the same run.

    python -m infra.bench.stream.ingest [--quick] [--no-peers] [--against CHECKOUT] [--rounds N]

The job: JSON from Kafka; the last 64 actions of each user kept durably (in a changelog or a recovery store, made
durable every second); a trigger evaluated for each event, of which none fires. Each subject is one process on a real
broker with four partitions. The procedure:

1. Every process is started, receives one burst to warm up, and keeps running.
2. In each round every process in turn receives a burst of events, appended faster than it can read, while the others
   are idle. Its CPU seconds (user and system, all threads) are read before the burst and again half a second after the
   broker holds the commit of the last event, so the last checkpoint counts and the start does not.
3. A figure is the median over the rounds of events / CPU seconds; a ratio is the median of the ratios of all rounds.

The program prints what is not equal before the figures. With `--against` the worker of another checkout of this
project takes part too, in the same rounds, which shows what a change costs where two runs would differ by more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from encoder.arrays import I64
from infra.bench.baselines import stream as baselines
from infra.bench.stream.bursts import Burst, distinct_users, zipf_users
from infra.bench.stream.comparison import Comparison, Measurement, start_baselines
from infra.bench.stream.worker import PARTITIONS, MeasuredWorker, prepare_worker
from infra.harness.reporting import Spread, console, machine, print_result, run_command
from infra.harness.worker_process import STOP_S, running
from infra.kafka.broker import broker_or_external

ACTIVE_USERS = 20_000
ALL_USERS = 200_000
"""Users of the run with distinct users: more than two checkpoints of events, so that no checkpoint has a user twice."""
ROUNDS = 5
IDLE_S = 1.0
EVENTS, DISTINCT_EVENTS = 1_000_000, 400_000

UNFAIR = """What is not equal, before any figure:
- in favour of the baselines: they keep three fields of an action (Kafka Streams 16 bytes), the worker all six in 32
  bytes; they do not check fields, drop repeated event ids, order late events or keep state exactly once; Bytewax keeps
  no history of snapshots and decodes with orjson.
- in favour of the worker: it is made for this job and processes events in batches, while the baselines are general and
  call a function per event; it keeps hot users in memory, as do Bytewax and the record cache of Kafka Streams."""

BASELINES: dict[str, tuple[Callable[[baselines.Job], Any], int]] = {
    "bytewax": (baselines.bytewax, 400_000),
    "quix": (baselines.quix, 100_000),
    "faust": (baselines.faust, 20_000),
    "kafka-streams": (baselines.kafka_streams, 300_000),
}
"""Name -> preparation, and events of a burst, which keep the baseline busy for some seconds."""


@dataclass(slots=True)
class Setup:
    """Everything that runs."""

    comparison: Comparison
    worker: MeasuredWorker
    changelog_bytes: list[float] = field(default_factory=list)
    """Changelog bytes per event in each round, as the worker counts them."""


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Run one small round.")] = False,
    with_baselines: Annotated[bool, typer.Option("--peers/--no-peers", help="Measure the baselines too.")] = True,
    against: Annotated[Path | None, typer.Option(exists=True, help="Checkout whose worker takes part too.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to measure.")] = ROUNDS,
) -> None:
    """Measure events per CPU second of a worker and of its baselines."""
    rounds, scale = (1, 0.05) if quick else (rounds, 1.0)
    with (
        tempfile.TemporaryDirectory(prefix="streamformer-bench-") as folder,
        broker_or_external() as broker,
        _started(broker.bootstrap_servers, Path(folder), scale, with_baselines, against) as setup,
    ):
        console.print(UNFAIR if with_baselines else "")
        client = {"bootstrap_servers": broker.bootstrap_servers}
        for each in setup.comparison.measurements:
            each.burst(client, 0)
            console.print(f"{each.subject.name}: started and warmed up with {each.process.cpu_s:.1f} CPU seconds")
        for round_ in range(1, rounds + 1):
            _measure_round(setup, client, round_)
            rates = ", ".join(f"{each.subject.name} {each.rates[-1]:,.0f}" for each in setup.comparison.measurements)
            console.print(f"round {round_} of {rounds}: {rates}")
    _report(setup)


@contextmanager
def _started(
    bootstrap_servers: str, folder: Path, scale: float, with_baselines: bool, against: Path | None
) -> Iterator[Setup]:
    """Start two workers, one for each choice of users, those of the other checkout, and the baselines."""

    def active(events: int) -> Callable[[int], Burst]:
        count = int(events * scale)
        return _bursts(zipf_users(np.random.default_rng(count), ACTIVE_USERS, count))

    distinct = distinct_users(np.random.default_rng(1), ALL_USERS, int(DISTINCT_EVENTS * scale))
    chosen = {"worker": active(EVENTS), "worker-distinct": _bursts(distinct)}
    with ExitStack() as stack:
        measurements = []
        workers = {name: prepare_worker(name, bootstrap_servers, folder / name) for name in chosen}
        for name, worker in workers.items():
            process = stack.enter_context(running(worker.subject.program, grace_s=STOP_S))
            measurements.append(Measurement(worker.subject, process, chosen[name], worker.subject.applied))
        for name in chosen if against else ():
            other = prepare_worker(f"other-{name}", bootstrap_servers, folder / f"other-{name}").subject
            process = stack.enter_context(running(replace(other.program, folder=against), grace_s=STOP_S))
            measurements.append(Measurement(other, process, chosen[name], other.applied))
        preparations = {name: prepare for name, (prepare, _) in BASELINES.items()} if with_baselines else {}
        started, unavailable = start_baselines(stack, baselines.Job(bootstrap_servers, folder), preparations)
        for name, (subject, process) in started.items():
            measurements.append(Measurement(subject, process, active(BASELINES[name][1]), subject.applied))
        yield Setup(Comparison(measurements, unavailable), workers["worker"])


def _bursts(users: I64) -> Callable[[int], Burst]:
    return lambda round_: Burst(users, PARTITIONS, seed=round_)


def _measure_round(setup: Setup, client: dict[str, str], round_: int) -> None:
    ours, *others = setup.comparison.measurements
    before = setup.worker.metric("streamformer_changelog_bytes_total")
    events = ours.expected
    ours.measure(client, round_, IDLE_S)
    written = setup.worker.metric("streamformer_changelog_bytes_total") - before
    setup.changelog_bytes.append(written / (ours.expected - events))
    for each in others:
        each.measure(client, round_, IDLE_S)


def _report(setup: Setup) -> None:
    ours, distinct, *_ = setup.comparison.measurements
    setup.comparison.print_table("Events per second")
    result: dict[str, Any] = {
        "bench": "ingest",
        "machine": machine(),
        "events_per_cpu_second": round(Spread(tuple(ours.rates)).median),
        "distinct_users_events_per_cpu_second": round(Spread(tuple(distinct.rates)).median),
        "changelog_bytes_per_event": round(Spread(tuple(setup.changelog_bytes)).median, 1),
    }
    ratios = setup.comparison.ratios(2)
    result |= {f"ratio_{name.replace('-', '_')}": ratios.get(name) for name in BASELINES}
    print_result(result | _ratios_to_other(setup.comparison.measurements))


def _ratios_to_other(measurements: Sequence[Measurement]) -> dict[str, list[float]]:
    """Return the ratio to the worker of the other checkout in each round, per choice of users."""
    rates = {each.subject.name: each.rates for each in measurements}
    return {
        f"ratios_to_{other}": [round(a / b, 3) for a, b in zip(rates[name], rates[other], strict=True)]
        for name, other in ((name, f"other-{name}") for name in ("worker", "worker-distinct"))
        if other in rates
    }


if __name__ == "__main__":
    run_command(main)
