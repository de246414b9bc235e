"""Ingestion: events per CPU-second of one worker, and of its peers on the same job in the same run.

    python -m infra.bench.stream.ingest [--quick] [--no-peers]

The job: JSON from Kafka, the last 64 actions of each user kept durably (a changelog or recovery store, made durable
every second), a trigger evaluated for each event and none firing. Everyone is one process on a real broker with four
partitions. How it is counted:

1. every process is started, gets one burst to warm up, and stays up;
2. in each round every process in turn gets a burst of events, appended faster than anyone reads, while the others
   are idle. Its CPU seconds (user and system, all threads) are read before the burst and again when the broker holds
   the commit of the burst's last event plus half a second, so the last checkpoint is in and start-up is not;
3. a figure is the median over the rounds of events / CPU seconds, a ratio the median of the ratios of each round.

What is not equal is printed before the figures.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from encoder.arrays import I64
from infra.bench.baselines import stream as rivals
from infra.bench.baselines.processes import Contestant, Running
from infra.bench.stream.bursts import Burst, distinct_users, zipf_users
from infra.bench.stream.worker import PARTITIONS, MeasuredWorker, prepare_worker
from infra.harness.reporting import Spread, agreed_ratio, console, machine, print_result, print_table, run_command
from infra.kafka.broker import broker_or_external

ACTIVE_USERS = 20_000
POPULATION = 200_000
"""Of the run with distinct users: more than two checkpoints' worth, so that neither holds anybody twice."""
ROUNDS = 5
BURST_TIMEOUT_S = 180.0
IDLE_S = 1.0

UNFAIR = """What is not equal, before any figure:
- for the peers: they keep three fields of an action (Kafka Streams 16 bytes), the worker all six in 32 bytes; they do
  not check fields, drop repeated event ids, order late events or keep state exactly once; Bytewax keeps no history of
  snapshots and decodes with orjson.
- for the worker: it is made for this job and takes events by the batch, the peers are general and call a function for
  each event; it holds hot users in memory, as Bytewax and Kafka Streams' record cache do."""


@dataclass(slots=True)
class Entrant:
    """A process in the contest, and what was measured of it."""

    running: Running
    users: Callable[[int], I64]
    """Who acts in a burst of so many events."""
    burst_events: int
    worker: MeasuredWorker | None = None
    sent: int = 0
    rates: list[float] = field(default_factory=list)
    """Events per CPU second of each round."""
    wall_rates: list[float] = field(default_factory=list)
    changelog_bytes: list[float] = field(default_factory=list)
    """Per event, of each round; the worker's own count."""

    @property
    def name(self) -> str:
        return self.running.contestant.name


def main(
    quick: Annotated[bool, typer.Option("--quick", help="One small round.")] = False,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Measure the peers too.")] = True,
) -> None:
    """Measure events per CPU-second of a worker and of its peers."""
    rounds, scale = (1, 0.05) if quick else (ROUNDS, 1.0)
    with (
        tempfile.TemporaryDirectory(prefix="streamformer-bench-") as folder,
        broker_or_external() as broker,
        _entrants(broker.bootstrap_servers, Path(folder), scale, peers) as (entrants, unavailable),
    ):
        console.print(UNFAIR if peers else "")
        for each in entrants:
            _burst(each, broker.bootstrap_servers, seed=0)
            console.print(f"{each.name}: started and warmed up with {each.running.cpu_s:.1f} CPU seconds")
        for round_ in range(1, rounds + 1):
            for each in entrants:
                _measure(each, broker.bootstrap_servers, seed=round_)
            console.print(f"round {round_} of {rounds}: " + ", ".join(_last(each) for each in entrants))
    _report(entrants, unavailable)


@contextmanager
def _entrants(
    bootstrap_servers: str, folder: Path, scale: float, peers: bool
) -> Iterator[tuple[list[Entrant], dict[str, str]]]:
    """Everyone, started; and the peers that cannot take part, with the reason."""
    unavailable: dict[str, str] = {}
    with ExitStack() as stack:

        def enter(contestant: Contestant, users: Callable[[int], I64], events: int) -> Entrant:
            running = Running.start(contestant)
            stack.callback(running.stop)
            return Entrant(running, users, int(events * scale))

        def ours(name: str, users: Callable[[int], I64], events: int) -> Entrant:
            worker = prepare_worker(name, bootstrap_servers, folder / name)
            entrant = enter(worker.contestant, users, events)
            entrant.worker = worker
            return entrant

        entrants = [ours("worker", _active, 1_000_000), ours("worker-distinct", _distinct, 400_000)]
        job = rivals.Job(bootstrap_servers, folder)
        for name, prepare, events in _PEERS if peers else ():
            try:
                entrants.append(enter(prepare(job), _active, events))
            except rivals.PeerUnavailable as error:
                unavailable[name] = str(error)
        yield entrants, unavailable


_PEERS = (
    ("bytewax", rivals.bytewax_peer, 400_000),
    ("quix", rivals.quix_peer, 100_000),
    ("faust", rivals.faust_peer, 20_000),
    ("kafka-streams", rivals.kafka_streams_peer, 300_000),
)
"""Events of a burst: what keeps each of them busy for some seconds."""


def _active(events: int) -> I64:
    return zipf_users(np.random.default_rng(events), ACTIVE_USERS, events)


def _distinct(events: int) -> I64:
    return distinct_users(np.random.default_rng(1), POPULATION, events)


def _burst(entrant: Entrant, bootstrap_servers: str, *, seed: int) -> float:
    """Send a burst and wait until it is durable; returns the seconds from first append to the commit."""
    burst = Burst(entrant.users(entrant.burst_events), PARTITIONS, seed=seed)
    contestant = entrant.running.contestant
    appending_s = asyncio.run(burst.append(contestant.topic, {"bootstrap_servers": bootstrap_servers}))
    started_s = time.monotonic() - appending_s
    entrant.sent += burst.events
    entrant.running.wait_applied(entrant.sent, BURST_TIMEOUT_S)
    seconds = time.monotonic() - started_s
    time.sleep(contestant.settle_s)
    return seconds


def _measure(entrant: Entrant, bootstrap_servers: str, *, seed: int) -> None:
    time.sleep(IDLE_S)
    written, cpu_s = _changelog_bytes(entrant), entrant.running.cpu_s
    seconds = _burst(entrant, bootstrap_servers, seed=seed)
    entrant.rates.append(entrant.burst_events / (entrant.running.cpu_s - cpu_s))
    entrant.wall_rates.append(entrant.burst_events / seconds)
    entrant.changelog_bytes.append((_changelog_bytes(entrant) - written) / entrant.burst_events)


def _changelog_bytes(entrant: Entrant) -> float:
    return entrant.worker.metric("streamformer_changelog_bytes_total") if entrant.worker else 0.0


def _last(entrant: Entrant) -> str:
    return f"{entrant.name} {entrant.rates[-1]:,.0f}"


def _report(entrants: Sequence[Entrant], unavailable: dict[str, str]) -> None:
    ours, distinct, *others = entrants
    rows = [
        (each.name, str(Spread(tuple(each.rates))), str(Spread(tuple(each.wall_rates))), _against(ours, each))
        for each in entrants
    ]
    print_table(
        "Events per second: median (smallest to largest)",
        ("", "per CPU second", "on the clock", "worker / this one"),
        rows,
    )
    for name, why in unavailable.items():
        console.print(f"{name} did not take part: {why}")
    result: dict[str, Any] = {
        "bench": "ingest",
        "machine": machine(),
        "events_per_cpu_second": round(Spread(tuple(ours.rates)).median),
        "distinct_users_events_per_cpu_second": round(Spread(tuple(distinct.rates)).median),
        "changelog_bytes_per_event": round(Spread(tuple(ours.changelog_bytes)).median, 1),
    }
    measured = {each.name: round(agreed_ratio(ours.rates, each.rates).median, 2) for each in others}
    for name, _, _ in _PEERS:
        result[f"ratio_{name.replace('-', '_')}"] = measured.get(name)
    print_result(result)


def _against(ours: Entrant, other: Entrant) -> str:
    """The ratio; "faster" only where every round agrees."""
    ratio = agreed_ratio(ours.rates, other.rates)
    if other.worker is not None:
        return ""
    verdict = "faster in every round" if min(ratio.values) > 1 else "not faster in every round"
    return f"{ratio}, {verdict}"


if __name__ == "__main__":
    run_command(main)
