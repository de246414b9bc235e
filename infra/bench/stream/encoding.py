"""Embeddings per second and per CPU second, from bytes to bytes: the worker and its baselines on the same bursts.

A burst holds one event of each user, so that no embedding can be saved. It is done when the output topic holds one more
embedding of each. Baselines get fewer users, since each of their embeddings is a pass over the whole sequence; the
sequences of their users are full too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import kafka
import numpy as np
from kafka.structs import TopicPartition

from infra.bench.baselines import stream as baselines
from infra.bench.stream.bursts import Burst, distinct_users
from infra.bench.stream.comparison import Comparison, Measurement, start_baselines
from infra.bench.stream.subject import Subject
from infra.bench.stream.worker import PARTITIONS, MeasuredWorker, WorkerJob
from infra.harness.reporting import Spread, console
from infra.harness.worker_process import Process

BASELINE_USERS = 200
BASELINE_EVENTS = 600
TIMEOUT_S = 180.0
IDLE_S = 1.5
"""Pause between bursts: more than the event time that a burst covers, and a checkpoint."""

UNFAIR = """What is not equal, before any figure:
- in favour of the worker: it keeps keys and values, which by construction saves a factor of the sequence's length, and
  processes users in batches; the baselines embed one event at a time by a full pass over the sequence, as a first
  version would.
- in favour of the baselines: nn.TransformerEncoder has no rotation, windows or time bias and leaves them out; their
  bursts are of 200 users, whose state stays in caches; they do not order events, drop repeats or write headers."""


@dataclass(frozen=True, slots=True)
class RatePlan:
    """Extent of the comparison."""

    users: int
    """Users of the worker."""
    rounds: int
    with_baselines: bool
    """True to measure the baselines too."""


@dataclass(frozen=True, slots=True)
class EncodeRates:
    """Embeddings per second of the worker and of its baselines."""

    comparison: Comparison

    @property
    def saturation(self) -> float:
        """Embeddings per second of the worker, by the clock."""
        return Spread(tuple(self.comparison.measurements[0].wall_rates)).median

    def print_table(self) -> None:
        """Print the comparison."""
        self.comparison.print_table("Embeddings per second")

    def result(self) -> dict[str, float | None]:
        """Return the figures of the last line."""
        ratios = self.comparison.ratios(1)
        return {
            "embeddings_per_cpu_second": round(Spread(tuple(self.comparison.measurements[0].rates)).median),
            **{f"ratio_{name}": ratios.get(name) for name in baselines.ENCODERS},
        }


def measure_rates(
    worker: MeasuredWorker, process: Process, job: WorkerJob, folder: Path, plan: RatePlan
) -> EncodeRates:
    """Send bursts to all subjects alternately; `worker` runs already and its users have full sequences."""
    client = worker.client
    with ExitStack() as stack:
        ours = _measurement(worker.subject, process, client, plan.users, plan.users)
        measurements = [ours]
        preparations = baselines.ENCODERS if plan.with_baselines else {}
        console.print(UNFAIR if plan.with_baselines else "")
        release = worker.settings.encoder.release_dir
        task = baselines.Job(client["bootstrap_servers"], folder, job.encoder.sequence_length, release)
        started, unavailable = start_baselines(stack, task, preparations)
        for subject, running in started.values():
            _fill(subject, running, client, job.encoder.sequence_length)
            measurements.append(_measurement(subject, running, client, BASELINE_USERS, BASELINE_EVENTS))
        for round_ in range(1, plan.rounds + 1):
            for each in measurements:
                each.measure(client, round_, IDLE_S)
            rates = ", ".join(f"{each.subject.name} {each.rates[-1]:,.0f}" for each in measurements)
            console.print(f"round {round_} of {plan.rounds}, embeddings per CPU second: {rates}")
    return EncodeRates(Comparison(measurements, unavailable))


def _measurement(subject: Subject, process: Process, client: dict[str, str], users: int, events: int) -> Measurement:
    def burst_of(round_: int) -> Burst:
        return Burst(distinct_users(np.random.default_rng(round_), users, events), PARTITIONS, seed=round_)

    published = _published(client, subject.output)
    return Measurement(subject, process, burst_of, published, expected=published())


def _fill(baseline: Subject, process: Process, client: dict[str, str], kept: int) -> None:
    """Give each user of a baseline a full sequence; it embeds only users whose sequence is full."""
    users = distinct_users(np.random.default_rng(0), BASELINE_USERS, BASELINE_USERS * kept)
    asyncio.run(Burst(users, PARTITIONS, seed=0).append(baseline.topic, client))
    published = _published(client, baseline.output)
    process.wait_until(lambda: published() >= BASELINE_USERS, "full sequences", TIMEOUT_S)


def _published(client: dict[str, str], topic: str) -> Callable[[], int]:
    """Return a count of the records in an output topic that starts at offset 0 and holds no transactions."""
    consumer = _consumer(client["bootstrap_servers"])
    partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
    return lambda: int(sum(consumer.end_offsets(partitions).values()))


@cache
def _consumer(bootstrap_servers: str) -> kafka.KafkaConsumer:
    return kafka.KafkaConsumer(bootstrap_servers=bootstrap_servers)
