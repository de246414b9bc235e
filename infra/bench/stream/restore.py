"""Restore: seconds until a worker is ready, on an empty disk and on its own, and its memory with many users on disk.

    python -m infra.bench.stream.restore [--quick]

1. A changelog of 1,000,000 users with 64 actions each is written in transactions, as a worker would have done.
2. `streamformer worker` is started on an empty disk, stopped with SIGTERM, and started again on the disk that it left.
3. Two more workers restore 1,000,000 and 5,000,000 users of 8 actions. Then events of random users arrive, of more
   users than the hot set holds, while resident memory is sampled.

A restore lasts from the assignment of the partitions until all of them are ready: fence, read, write, prove. The start
of the process before that (imports, encoder, joining the group) is reported apart.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from infra.bench.stream.bursts import Burst
from infra.bench.stream.restore_plot import save_plot
from infra.bench.stream.synthetic_state import FIRST_USER, SyntheticState, fill, writers
from infra.bench.stream.worker import PARTITIONS, MeasuredWorker, WorkerJob, prepare_worker
from infra.harness.reporting import console, machine, print_result, print_table, run_command
from infra.harness.worker_process import STOP_S, Process, fetch_page, running
from infra.kafka.broker import broker_or_external
from infra.kafka.node import BrokerOptions
from streams.core.layout import StateLimits

REPORTS = Path("reports")
READY_S = 300.0
LOOK_S = 0.02
SAMPLE_S = 0.25
SETTLE_S = 2.0
"""Time between the last event and the last sample: two checkpoints."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Extent of each part."""

    restored: SyntheticState
    few: SyntheticState
    many: SyntheticState
    hot_users_max: int
    """Hot users per partition while memory is measured."""
    events: int
    bursts: int


FULL = Plan(
    restored=SyntheticState(1_000_000, 64),
    few=SyntheticState(1_000_000, 8),
    many=SyntheticState(5_000_000, 8),
    hot_users_max=16_384,
    events=400_000,
    bursts=4,
)
QUICK = Plan(
    restored=SyntheticState(50_000, 64),
    few=SyntheticState(20_000, 8),
    many=SyntheticState(60_000, 8),
    hot_users_max=4_096,
    events=30_000,
    bursts=2,
)


@dataclass(frozen=True, slots=True)
class Start:
    """Durations of one start of a worker."""

    process_s: float
    """Time from the start of the process to its assignment."""
    restore_s: float
    """Time from the assignment until all partitions are ready."""
    restore_cpu_s: float
    """CPU seconds of the worker from the assignment until it is ready, all threads."""


@dataclass(slots=True)
class Memory:
    """Resident memory of a worker while events arrive."""

    users: int
    seconds: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    restored_mb: float = 0.0
    """Resident memory right after the restore."""

    @property
    def steady_mb(self) -> float:
        """Median of the second half of the samples, when the hot set is full."""
        return float(np.median(self.rss_mb[len(self.rss_mb) // 2 :]))


def main(quick: Annotated[bool, typer.Option("--quick", help="Take a small part of everything.")] = False) -> None:
    """Measure restore, warm restart, and memory against users on disk."""
    plan = QUICK if quick else FULL
    with (
        tempfile.TemporaryDirectory(prefix="streamformer-bench-") as folder,
        broker_or_external(BrokerOptions(heap_mb=512)) as broker,
        writers() as pool,
        _progress() as progress,
    ):
        bench = Bench(plan, broker.bootstrap_servers, Path(folder), pool, progress)
        cold, warm = bench.starts()
        memories = [bench.memory(state) for state in (plan.few, plan.many)]
    _report(plan, cold, warm, memories)


@dataclass(frozen=True, slots=True)
class Bench:
    """The parts of the benchmark, on one broker."""

    plan: Plan
    bootstrap_servers: str
    folder: Path
    pool: ProcessPoolExecutor
    progress: Progress

    def starts(self) -> tuple[Start, Start]:
        """Start a worker on an empty disk, and again on the disk that the first start has left."""
        worker = self._filled("restore", self.plan.restored, WorkerJob())
        with _started(worker) as process:
            cold = self._ready(worker, process, "restore on an empty disk")
        with _started(worker) as process:
            warm = self._ready(worker, process, "start on its own disk")
        return cold, warm

    def memory(self, state: SyntheticState) -> Memory:
        """Measure a worker that has restored `state`, while events of random users of it arrive."""
        name = f"memory-{state.users // 1_000}k"
        worker = self._filled(name, state, WorkerJob(hot_users_max=self.plan.hot_users_max))
        memory = Memory(state.users)
        with _started(worker) as process:
            self._ready(worker, process, "restore")
            memory.restored_mb = process.resident_mb
            asyncio.run(self._send(worker, process, memory))
        return memory

    def _filled(self, name: str, state: SyntheticState, job: WorkerJob) -> MeasuredWorker:
        """Prepare a worker whose changelog holds the state; it is not started."""
        worker = prepare_worker(name, self.bootstrap_servers, self.folder / name, job)
        total = state.records(StateLimits(worker.settings.state.sequence_length))
        task = self.progress.add_task(f"changelog of {state.users:,} users", total=total)
        fill(
            self.pool,
            worker.settings,
            state,
            lambda records: self.progress.update(task, completed=min(records, total)),
        )
        return worker

    def _ready(self, worker: MeasuredWorker, process: Process, what: str) -> Start:
        """Wait until the worker has its assignment, then until it is ready."""
        task = self.progress.add_task(what, total=PARTITIONS)
        process.wait_until(lambda: _readiness(worker) is not None, "an assignment", READY_S)
        assigned_s, assigned_cpu_s = time.time(), process.cpu_s
        last = 0

        def is_ready() -> bool:
            nonlocal last
            last = _readiness(worker) or last
            self.progress.update(task, completed=last)
            return last == PARTITIONS

        process.wait_until(is_ready, "all partitions ready", READY_S)
        restore_s, restore_cpu_s = time.time() - assigned_s, process.cpu_s - assigned_cpu_s
        return Start(assigned_s - process.started_at, restore_s, restore_cpu_s)

    async def _send(self, worker: MeasuredWorker, process: Process, memory: Memory) -> None:
        """Append bursts of random users, each after the last has been applied, and sample the worker's memory."""
        sampling = asyncio.create_task(_sample(process, memory))
        task = self.progress.add_task("events of random users", total=self.plan.events)
        each = self.plan.events // self.plan.bursts
        for number in range(1, self.plan.bursts + 1):
            rng = np.random.default_rng(number)
            burst = Burst(FIRST_USER + rng.integers(memory.users, size=each), PARTITIONS, seed=number)
            await burst.append(worker.subject.topic, worker.client)
            await asyncio.to_thread(worker.subject.wait_applied, process, number * each, READY_S)
            self.progress.update(task, completed=number * each)
        await asyncio.sleep(SETTLE_S)
        sampling.cancel()


async def _sample(process: Process, memory: Memory) -> None:
    began_s = time.monotonic()
    while True:
        memory.seconds.append(time.monotonic() - began_s)
        memory.rss_mb.append(process.resident_mb)
        await asyncio.sleep(SAMPLE_S)


def _started(worker: MeasuredWorker) -> AbstractContextManager[Process]:
    return running(worker.subject.program, grace_s=STOP_S)


def _readiness(worker: MeasuredWorker) -> int | None:
    """Return the partitions that are ready, from the text of `/readyz`; None before there is an assignment."""
    status, text = fetch_page(worker.settings.web.port, "/readyz")
    if status == 200:
        return PARTITIONS
    count, _, rest = text.partition(" ")
    return PARTITIONS - int(count) if rest.startswith("partitions are being restored") else None


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
        ("users on disk", "restored", "events arriving"),
        [(f"{each.users:,}", f"{each.restored_mb:,.0f}", f"{each.steady_mb:,.0f}") for each in memories],
    )
    plot = save_plot([(each.users, each.seconds, each.rss_mb) for each in memories], REPORTS)
    console.print(f"plot of memory over time: {plot}")
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
            "rss_mb_1m": round(few.steady_mb),
            "rss_mb_5m": round(many.steady_mb),
        }
    )


if __name__ == "__main__":
    run_command(main)
