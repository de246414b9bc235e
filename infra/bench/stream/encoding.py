"""Embeddings per second and per CPU second, from bytes to bytes: the worker and its peers on the same bursts.

A burst holds one event of each user, so that nobody can save an embedding. It is done when the output topic holds one
more embedding of each. Peers get fewer users, since each of their embeddings is a pass over the whole sequence; their
sequences are full too.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import kafka
import numpy as np
from kafka.structs import TopicPartition

from infra.bench.baselines import stream as rivals
from infra.bench.baselines.processes import Running
from infra.bench.stream.bursts import Burst, distinct_users
from infra.bench.stream.worker import PARTITIONS, MeasuredWorker, WorkerJob
from infra.harness.reporting import Spread, agreed_ratio, console, print_table

PEER_USERS = 200
PEER_BURST_EVENTS = 600
TIMEOUT_S = 180.0
IDLE_S = 1.5
"""Between bursts: more than the event time that a burst covers, and a checkpoint."""

UNFAIR = """What is not equal, before any figure:
- for the peers: they embed one event at a time by a full pass over the sequence, as a first version would; the worker
  keeps keys and values, which saves it a factor of the sequence's length by construction, and takes users in batches.
- for the worker: nn.TransformerEncoder has no rotation, windows or time bias and leaves them out; the peers' bursts are
  of 200 users, whose state stays in caches; the peers do not order events, drop repeated ones or write headers."""


@dataclass(slots=True)
class Entrant:
    """A process in the contest, where its embeddings go, and what was measured."""

    name: str
    running: Running
    output: str
    users: int
    burst_events: int
    rates: list[float] = field(default_factory=list)
    """Embeddings per CPU second of each round."""
    wall_rates: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class EncodeRates:
    """The contest's outcome; the worker is the first."""

    entrants: list[Entrant]
    unavailable: dict[str, str]

    @property
    def saturation(self) -> float:
        """Embeddings a second of the worker."""
        return Spread(tuple(self.entrants[0].wall_rates)).median

    def print_table(self) -> None:
        ours, *others = self.entrants
        rows = [
            (each.name, str(Spread(tuple(each.rates))), str(Spread(tuple(each.wall_rates))), _against(ours, each))
            for each in (ours, *others)
        ]
        headings = ("", "per CPU second", "on the clock", "worker / this one")
        print_table("Embeddings per second: median (smallest to largest)", headings, rows)
        for name, why in self.unavailable.items():
            console.print(f"{name} did not take part: {why}")

    def result(self) -> dict[str, float | None]:
        ours, *others = self.entrants
        ratios = {each.name: round(agreed_ratio(ours.rates, each.rates).median, 1) for each in others}
        return {
            "embeddings_per_cpu_second": round(Spread(tuple(ours.rates)).median),
            **{f"ratio_{name}": ratios.get(name) for name in rivals.ENCODING_PEERS},
        }


def measure_rates(
    worker: MeasuredWorker, running: Running, job: WorkerJob, folder: Path, users: int, rounds: int, *, peers: bool
) -> EncodeRates:
    """Bursts by turns; `worker` runs already and its `users` have full sequences."""
    servers = worker.settings.kafka.bootstrap_servers
    unavailable: dict[str, str] = {}
    entrants = [Entrant("worker", running, worker.settings.topics.embeddings, users, users)]
    with ExitStack() as stack:
        if peers:
            console.print(UNFAIR)
            task = rivals.Job(servers, folder, kept=job.encoder.sequence_length, release=folder / "fresh" / "release")
            for name, prepare in rivals.ENCODING_PEERS.items():
                try:
                    contestant = prepare(task)
                except rivals.PeerUnavailable as error:
                    unavailable[name] = str(error)
                    continue
                peer = Running.start(contestant)
                stack.callback(peer.stop)
                output = contestant.environment["OUTPUT"]
                entrants.append(Entrant(name, peer, output, PEER_USERS, PEER_BURST_EVENTS))
                _fill(entrants[-1], servers, job.encoder.sequence_length)
        for round_ in range(1, rounds + 1):
            for each in entrants:
                _measure(each, servers, seed=round_)
            said = ", ".join(f"{each.name} {each.rates[-1]:,.0f}" for each in entrants)
            console.print(f"round {round_} of {rounds}, embeddings per CPU second: {said}")
    return EncodeRates(entrants, unavailable)


def _fill(peer: Entrant, servers: str, kept: int) -> None:
    """Give each of the peer's users a full sequence; a peer embeds only users whose sequence is full."""
    users = distinct_users(np.random.default_rng(0), peer.users, peer.users * kept)
    asyncio.run(Burst(users, PARTITIONS, seed=0).append(peer.running.contestant.topic, {"bootstrap_servers": servers}))
    peer.running.wait_until(lambda: embeddings(servers, peer.output) >= peer.users, "full sequences", TIMEOUT_S)


def _measure(entrant: Entrant, servers: str, *, seed: int) -> None:
    time.sleep(IDLE_S)
    users = distinct_users(np.random.default_rng(seed), entrant.users, entrant.burst_events)
    burst = Burst(users, PARTITIONS, seed=seed)
    before, cpu_s = embeddings(servers, entrant.output), entrant.running.cpu_s
    appending_s = asyncio.run(burst.append(entrant.running.contestant.topic, {"bootstrap_servers": servers}))
    started_s = time.monotonic() - appending_s
    wanted = before + entrant.burst_events
    entrant.running.wait_until(lambda: embeddings(servers, entrant.output) >= wanted, "all embeddings", TIMEOUT_S)
    entrant.wall_rates.append(entrant.burst_events / (time.monotonic() - started_s))
    time.sleep(entrant.running.contestant.settle_s)
    entrant.rates.append(entrant.burst_events / (entrant.running.cpu_s - cpu_s))


def embeddings(servers: str, topic: str) -> int:
    """Records in an output topic that starts at offset 0 and holds no transactions."""
    consumer = _consumer(servers)
    ends = consumer.end_offsets([TopicPartition(topic, number) for number in range(PARTITIONS)])
    return int(sum(ends.values()))


_consumers: dict[str, kafka.KafkaConsumer] = {}


def _consumer(servers: str) -> kafka.KafkaConsumer:
    if servers not in _consumers:
        _consumers[servers] = kafka.KafkaConsumer(bootstrap_servers=servers)
    return _consumers[servers]


def _against(ours: Entrant, other: Entrant) -> str:
    """The ratio; "more" only where every round agrees."""
    if other is ours:
        return ""
    ratio = agreed_ratio(ours.rates, other.rates)
    return f"{ratio}, {'more in every round' if min(ratio.values) > 1 else 'not more in every round'}"
