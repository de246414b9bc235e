"""Keep the workers of a run running: real processes, each with a disk and a name of its own.

`Supervisor.tick` restarts a worker that ended although it is wanted, and notes how it ended; call it often. Workers die
with this process.
"""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from infra.harness.deployment import Deployment
from infra.harness.worker_process import WORKER, Process, Program, fetch_page

RESTART_AFTER_S = 0.3
STOP_S = 25.0
PORT = re.compile(r"^(\S+ \S+) .*metrics at http://[^:]+:(\d+)/metrics", re.MULTILINE)
LOG_TIME = "%Y-%m-%d %H:%M:%S,%f"
READY = " is ready at offset "

STOPPED, CANNOT_START, ABORTED, FORCED = 0, 1, 70, 71
"""Documented exit codes: stopped in order, a dependency is missing, ended itself to be restarted, shutdown was cut."""
KILLED, TERMINATED = -signal.SIGKILL, -signal.SIGTERM


@dataclass(frozen=True, slots=True)
class Exit:
    """One end of one worker."""

    number: int
    at: float
    """Seconds since the epoch."""
    code: int
    expected: bool
    """True if the worker had been terminated or killed."""
    last_line: str


@dataclass(slots=True)
class WorkerHandle:
    """One worker: at most one process at a time, one disk, one log."""

    number: int
    process: Process | None = None
    """Process that runs or whose end has not been noted."""
    latest: Process | None = None
    """Process that was started last, running or ended."""
    wanted: bool = False
    is_ending: bool = False
    """True once the process has been terminated or killed, so that its end is expected."""
    ended_at: float = 0.0
    port: int | None = None


@dataclass
class Supervisor:
    """Starts, restarts, disturbs and stops workers."""

    deployment: Deployment
    command: Sequence[str] = WORKER
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables added to the environment of every worker."""
    folder: Path | None = None
    """Working directory of the workers; None keeps the one of this process."""
    workers: dict[int, WorkerHandle] = field(default_factory=dict)
    exits: list[Exit] = field(default_factory=list)
    start_seconds: list[float] = field(default_factory=list)
    """Time from each process's start until its worker begins; most of it is Python importing the program."""
    kills: int = 0
    """Processes that were sent SIGKILL so far."""

    def __enter__(self) -> Supervisor:
        """Return the supervisor; leaving the block kills all workers."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Kill all workers."""
        self.close()

    def scale(self, count: int, *, cold: bool = False) -> None:
        """Want workers 0 to `count` - 1 and terminate the others; with `cold`, new workers get empty disks."""
        for number in range(count):
            if cold and not self._worker(number).wanted:
                shutil.rmtree(self.deployment.data_dir(number), ignore_errors=True)
            self._worker(number).wanted = True
        for worker in self.workers.values():
            if worker.number >= count:
                worker.wanted = False
                self._terminate_once(worker)
        self.tick()

    def tick(self) -> None:
        """Note which workers have ended, and start those that are wanted and have been down for a moment."""
        for worker in self.workers.values():
            if worker.process is not None and (code := worker.process.exit_code()) is not None:
                self._note_exit(worker, worker.process, code)
            has_rested = time.time() - worker.ended_at >= RESTART_AFTER_S
            if worker.process is None and worker.wanted and has_rested:
                self._start(worker)

    def running(self) -> list[int]:
        """Return the numbers of wanted workers that have a process."""
        return [worker.number for worker in list(self.workers.values()) if worker.process and worker.wanted]

    def kill(self, number: int) -> None:
        """Send SIGKILL; the worker is restarted."""
        self._signal(self.workers[number], signal.SIGKILL)

    def terminate(self, number: int) -> None:
        """Send SIGTERM; the worker is restarted once it has ended."""
        self._signal(self.workers[number], signal.SIGTERM)

    def pause(self, number: int) -> None:
        """Send SIGSTOP."""
        self._signal(self.workers[number], signal.SIGSTOP)

    def resume(self, number: int) -> None:
        """Send SIGCONT."""
        self._signal(self.workers[number], signal.SIGCONT)

    def hold(self, number: int) -> None:
        """Kill a worker and keep it down until `start`."""
        worker = self.workers[number]
        worker.wanted = False
        self._signal(worker, signal.SIGKILL)
        if worker.process is not None:
            self._note_exit(worker, worker.process, worker.process.wait())

    def retire(self, number: int) -> None:
        """Terminate a worker and keep it down until `start`."""
        worker = self.workers[number]
        worker.wanted = False
        self._terminate_once(worker)

    def start(self, number: int) -> None:
        """Want a worker again, or a new one."""
        self._worker(number).wanted = True
        self.tick()

    def start_once(self, number: int) -> None:
        """Start a worker at once, unless it runs; it is not started again when it ends."""
        worker = self._worker(number)
        worker.wanted = False
        self.tick()
        if worker.process is None:
            self._start(worker)

    def is_down(self, number: int) -> bool:
        """Return whether no process of the worker runs."""
        process = self.workers[number].process
        return process is None or process.exit_code() is not None

    def memory_mb(self, number: int) -> float:
        """Return a worker's resident memory in 10^6 bytes; 0 while it does not run."""
        process = self.workers[number].process
        return process.resident_mb if process else 0.0

    def port(self, number: int) -> int | None:
        """Return the port of the worker's latest process; None before it has reported one."""
        worker = self.workers[number]
        if worker.port is None and worker.latest and (found := PORT.search(worker.latest.output())):
            worker.port = int(found[2])
            begun_at = datetime.strptime(found[1], LOG_TIME).astimezone().timestamp()  # the log is in local time
            self.start_seconds.append(begun_at - worker.latest.started_at)
        return worker.port

    def page(self, number: int, path: str, timeout_s: float = 10.0) -> tuple[int, str]:
        """Return status and text of a page that a worker serves; (0, "") while it does not answer."""
        port = self.port(number)
        return fetch_page(port, path, timeout_s) if port else (0, "")

    def is_ready(self, number: int = 0) -> bool:
        """Return whether every partition of the worker is restored and publishing."""
        return self.page(number, "/readyz")[0] == 200

    def has_ready_partition(self, number: int) -> bool:
        """Return whether the worker's running process has had a partition ready."""
        return not self.is_down(number) and READY in self.output(number)

    def output(self, number: int) -> str:
        """Return the log of the worker's latest process."""
        worker = self.workers.get(number)
        return worker.latest.output() if worker and worker.latest else ""

    def log(self, number: int) -> str:
        """Return the log of a worker over all its starts."""
        return self._log_path(number).read_text(errors="replace")

    def stop(self) -> Counter[int]:
        """Terminate all workers and return their exit codes; one that does not end in time is killed."""
        codes: Counter[int] = Counter()
        for worker in self.workers.values():
            worker.wanted = False
            self._terminate_once(worker)
        for worker in self.workers.values():
            if worker.process is not None:
                code = worker.process.wait(STOP_S)
                codes[code] += 1
                self._note_exit(worker, worker.process, code)
        return codes

    def close(self) -> None:
        """Kill the workers that still run."""
        for worker in self.workers.values():
            if worker.process is not None:
                worker.process.kill()
                worker.process = None

    def _worker(self, number: int) -> WorkerHandle:
        return self.workers.setdefault(number, WorkerHandle(number))

    def _log_path(self, number: int) -> Path:
        return self.deployment.folder / f"worker-{number}.log"

    def _start(self, worker: WorkerHandle) -> None:
        command = (*self.command, "--config", str(self.deployment.config))
        environment = {**self.environment, **self.deployment.worker_environment(worker.number)}
        program = Program(command, self._log_path(worker.number), environment, self.folder)
        worker.latest = worker.process = Process.start(program)
        worker.is_ending, worker.port = False, None

    def _terminate_once(self, worker: WorkerHandle) -> None:
        """Send SIGTERM unless the process has had one: a second one makes it end at once."""
        if not worker.is_ending:
            self._signal(worker, signal.SIGTERM)

    def _signal(self, worker: WorkerHandle, number: signal.Signals) -> None:
        if worker.process is None:
            return
        worker.process.send_signal(number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            worker.is_ending = True
        self.kills += number is signal.SIGKILL

    def _note_exit(self, worker: WorkerHandle, process: Process, code: int) -> None:
        self.exits.append(Exit(worker.number, time.time(), code, worker.is_ending, process.last_line()))
        worker.process, worker.ended_at = None, time.time()
