"""Restore: how soon a worker is ready on an empty disk and on its own, and what memory many users on disk cost it.

    python -m infra.bench.stream.restore [--quick]

1. a changelog of 1,000,000 users with 64 actions each is written in transactions, as a worker would have;
2. `streamformer worker` is started on an empty disk, stopped with SIGTERM, and started again on the disk it left;
3. two more workers restore 1,000,000 and 5,000,000 users of 8 actions; then events of random users flow, more of them
   than the hot set holds, and resident memory is read all the while.

A restore is counted from the moment the worker has its assignment until all its partitions are ready: fence, read,
write, prove. The start of the process before that (imports, encoder, joining the group) is told apart.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from infra.bench.baselines.processes import Running
from infra.bench.stream.bursts import Burst
from infra.bench.stream.restore_plot import save_plot
from infra.bench.stream.synthetic_state import FIRST_USER, Population, fill, writers
from infra.bench.stream.worker import PARTITIONS, MeasuredWorker, WorkerJob, prepare_worker
from infra.harness.reporting import console, machine, print_result, print_table, resident_mb, run_command
from infra.kafka.broker import BrokerOptions, broker_or_external
from streams.core.layout import StateLimits

REPORTS = Path("reports")
READY_S = 300.0
LOOK_S = 0.02
SAMPLE_S = 0.25
SETTLE_S = 2.0
"""Between the end of the flow and the last sample: two checkpoints."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything."""

    restored: Population
    few: Population
    many: Population
    hot_users_max: int
    """Of each partition while memory is measured."""
    events: int
    bursts: int


FULL = Plan(
    restored=Population(1_000_000, 64),
    few=Population(1_000_000, 8),
    many=Population(5_000_000, 8),
    hot_users_max=16_384,
    events=400_000,
    bursts=4,
)
QUICK = Plan(
    restored=Population(50_000, 64),
    few=Population(20_000, 8),
    many=Population(60_000, 8),
    hot_users_max=4_096,
    events=30_000,
    bursts=2,
)


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a worker, in seconds."""

    process_s: float
    """Until it has its assignment."""
    restore_s: float
    """From then until all partitions are ready."""
    restore_cpu_s: float
    """CPU seconds of the worker in that time, all threads."""


@dataclass(slots=True)
class Memory:
    """Resident memory of a worker while events flow."""

    users: int
    seconds: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    restored_mb: float = 0.0
    """When the restore had ended."""

    @property
    def flowing_mb(self) -> float:
        """Median of the second half of the flow: the hot set is full."""
        return float(np.median(self.rss_mb[len(self.rss_mb) // 2 :]))


def main(quick: Annotated[bool, typer.Option("--quick", help="A small part of everything.")] = False) -> None:
    """Measure restore, warm restart, and memory over users on disk."""
    plan = QUICK if quick else FULL
    with (
        tempfile.TemporaryDirectory(prefix="streamformer-bench-") as folder,
        broker_or_external(BrokerOptions(heap_mb=512)) as broker,
        writers() as pool,
        _progress() as progress,
    ):
        bench = Bench(plan, broker.bootstrap_servers, Path(folder), pool, progress)
        cold, warm = bench.starts()
        memories = [bench.memory(population) for population in (plan.few, plan.many)]
    _report(plan, cold, warm, memories)


@dataclass(frozen=True, slots=True)
class Bench:
    """The plan at work on one broker."""

    plan: Plan
    bootstrap_servers: str
    folder: Path
    pool: ProcessPoolExecutor
    progress: Progress

    def starts(self) -> tuple[Start, Start]:
        """On an empty disk, and on the one that this start has left."""
        worker = self._populated("restore", self.plan.restored, WorkerJob())
        with _started(worker) as running:
            cold = self._ready(worker, running, "restore on an empty disk")
        with _started(worker) as running:
            warm = self._ready(worker, running, "start on its own disk")
        return cold, warm

    def memory(self, population: Population) -> Memory:
        """Of a worker that has restored `population`, while events of random users of it flow."""
        name = f"memory-{population.users // 1_000}k"
        worker = self._populated(name, population, WorkerJob(hot_users_max=self.plan.hot_users_max))
        memory = Memory(population.users)
        with _started(worker) as running:
            self._ready(worker, running, "restore")
            memory.restored_mb = resident_mb(running.process.pid)
            asyncio.run(self._flow(worker, running, memory))
        return memory

    def _populated(self, name: str, population: Population, job: WorkerJob) -> MeasuredWorker:
        """A worker, not started, whose changelog holds the population."""
        worker = prepare_worker(name, self.bootstrap_servers, self.folder / name, job)
        total = population.records(StateLimits(worker.settings.state.sequence_length))
        task = self.progress.add_task(f"changelog of {population.users:,} users", total=total)
        fill(
            self.pool,
            worker.settings,
            population,
            lambda records: self.progress.update(task, completed=min(records, total)),
        )
        return worker

    def _ready(self, worker: MeasuredWorker, running: Running, what: str) -> Start:
        """Wait until the worker has its assignment, then until it is ready."""
        task = self.progress.add_task(what, total=PARTITIONS)
        running.wait_until(lambda: _readiness(worker) is not None, "an assignment", READY_S)
        assigned_s, assigned_cpu_s = time.monotonic(), running.cpu_s
        last = 0

        def is_ready() -> bool:
            nonlocal last
            last = _readiness(worker) or last
            self.progress.update(task, completed=last)
            return last == PARTITIONS

        running.wait_until(is_ready, "all partitions ready", READY_S)
        restore_s, restore_cpu_s = time.monotonic() - assigned_s, running.cpu_s - assigned_cpu_s
        return Start(assigned_s - running.started_s, restore_s, restore_cpu_s)

    async def _flow(self, worker: MeasuredWorker, running: Running, memory: Memory) -> None:
        """Append bursts of random users, one when the last is applied, and read the worker's memory all the while."""
        sampling = asyncio.create_task(_sample(running.process.pid, memory))
        task = self.progress.add_task("events of random users", total=self.plan.events)
        each = self.plan.events // self.plan.bursts
        for number in range(1, self.plan.bursts + 1):
            rng = np.random.default_rng(number)
            burst = Burst(FIRST_USER + rng.integers(memory.users, size=each), PARTITIONS, seed=number)
            await burst.append(worker.topic, {"bootstrap_servers": self.bootstrap_servers})
            await asyncio.to_thread(running.wait_applied, number * each, READY_S)
            self.progress.update(task, completed=number * each)
        await asyncio.sleep(SETTLE_S)
        sampling.cancel()


async def _sample(pid: int, memory: Memory) -> None:
    began_s = time.monotonic()
    while True:
        memory.seconds.append(time.monotonic() - began_s)
        memory.rss_mb.append(resident_mb(pid))
        await asyncio.sleep(SAMPLE_S)


@contextmanager
def _started(worker: MeasuredWorker) -> Iterator[Running]:
    running = Running.start(worker.contestant)
    try:
        yield running
    finally:
        running.stop()


def _readiness(worker: MeasuredWorker) -> int | None:
    """Partitions that are ready, None before there is an assignment, from what `/readyz` says."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{worker.settings.web.port}/readyz", timeout=10).close()
        return PARTITIONS
    except urllib.error.HTTPError as error:
        count, _, rest = error.read().decode().partition(" ")
        return PARTITIONS - int(count) if rest.startswith("partitions are being restored") else None
    except OSError:
        return None


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        yield progress


def _report(plan: Plan, cold: Start, warm: Start, memories: list[Memory]) -> None:
    restored = plan.restored
    rows = [
        (what, f"{start.restore_s:.1f}", f"{start.restore_cpu_s:.1f}", f"{start.process_s:.1f}")
        for what, start in (("empty disk", cold), ("its own disk", warm))
    ]
    print_table(
        f"{restored.users:,} users of {restored.actions} actions, in seconds",
        ("", "assignment to ready", "CPU in that time", "process to assignment"),
        rows,
    )
    print_table(
        "Resident memory of a worker, in MB",
        ("users on disk", "restored", "events flowing"),
        [(f"{each.users:,}", f"{each.restored_mb:,.0f}", f"{each.flowing_mb:,.0f}") for each in memories],
    )
    plot = save_plot([(each.users, each.seconds, each.rss_mb) for each in memories], REPORTS)
    console.print(f"memory over time: {plot}")
    few, many = memories
    print_result(
        {
            "bench": "restore",
            "machine": machine(),
            "users": restored.users,
            "restore_seconds": round(cold.restore_s, 2),
            "restore_cpu_seconds": round(cold.restore_cpu_s, 2),
            "warm_restart_seconds": round(warm.restore_s, 2),
            "start_seconds": round(warm.process_s, 2),
            "rss_mb_1m": round(few.flowing_mb),
            "rss_mb_5m": round(many.flowing_mb),
        }
    )


if __name__ == "__main__":
    run_command(main)
