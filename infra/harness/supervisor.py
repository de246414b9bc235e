"""Keep the workers of a run running: real processes, each with a disk and a name of its own.

`Supervisor.tick` restarts a worker that ended although it is wanted, and notes how it ended; call it often. Workers die
with this process.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psutil

from infra.harness.deployment import Deployment

PR_SET_PDEATHSIG = 1
RESTART_AFTER_S = 0.3
STOP_S = 25.0
PORT = re.compile(r"^(\S+ \S+) .*metrics at http://[^:]+:(\d+)/metrics", re.MULTILINE)
LOG_TIME = "%Y-%m-%d %H:%M:%S,%f"
READY = " is ready at offset "
_LIBC = ctypes.CDLL(None)

WORKER = (sys.executable, "-m", "infra.cli", "worker")
STOPPED, ABORTED, FORCED = 0, 70, 71
"""Exit codes that a worker documents: stopped in order, ended itself to be started again, stopped the hard way."""
REFUSED = 1
"""A command that ended with one line: a broker, a release or a setting is not there."""


@dataclass(frozen=True, slots=True)
class Exit:
    """One end of one worker."""

    number: int
    at: float
    """Of `time.time`."""
    code: int
    expected: bool
    """Whether it was told to end, or killed."""
    last_words: str


@dataclass(slots=True)
class WorkerHandle:
    """One worker's place: at most one process at a time, one disk, one log."""

    number: int
    process: subprocess.Popen[bytes] | None = None
    wanted: bool = False
    doomed: bool = False
    """It was told to end or killed: its end is no news."""
    started_at: float = 0.0
    ended_at: float = 0.0
    log_begin: int = 0
    """Where in its log the present process began."""
    port: int | None = None


@dataclass
class Supervisor:
    """Starts, watches, hurts and stops workers."""

    deployment: Deployment
    command: Sequence[str] = WORKER
    workers: dict[int, WorkerHandle] = field(default_factory=dict)
    exits: list[Exit] = field(default_factory=list)
    start_seconds: list[float] = field(default_factory=list)
    """From a process's start until its worker begins: what the machine makes of importing the program."""
    kills: int = 0
    """Processes ended by SIGKILL so far."""

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def scale(self, count: int, *, cold: bool = False) -> None:
        """Workers 0 to `count` - 1 are wanted, the others are told to stop; with `cold`, new ones have empty disks."""
        for number in range(count):
            if cold and not self._worker(number).wanted:
                shutil.rmtree(self.deployment.data_dir(number), ignore_errors=True)
            self._worker(number).wanted = True
        for worker in self.workers.values():
            if worker.number >= count:
                worker.wanted = False
                self._stop(worker)
        self.tick()

    def tick(self) -> None:
        """Note who has ended, and start who is wanted and has been down for a moment."""
        for worker in self.workers.values():
            if worker.process is not None and (code := worker.process.poll()) is not None:
                self._note_end(worker, code)
            rested = time.time() - worker.ended_at >= RESTART_AFTER_S
            if worker.process is None and worker.wanted and rested:
                self._start(worker)

    def running(self) -> list[int]:
        """Numbers of the workers whose process runs and is wanted."""
        return [worker.number for worker in list(self.workers.values()) if worker.process is not None and worker.wanted]

    def kill(self, number: int) -> None:
        """SIGKILL; the supervisor starts it again."""
        self._signal(self.workers[number], signal.SIGKILL)

    def terminate(self, number: int) -> None:
        """SIGTERM; the supervisor starts it again once it has ended."""
        self._signal(self.workers[number], signal.SIGTERM)

    def pause(self, number: int) -> None:
        """SIGSTOP."""
        self._signal(self.workers[number], signal.SIGSTOP)

    def resume(self, number: int) -> None:
        """SIGCONT."""
        self._signal(self.workers[number], signal.SIGCONT)

    def hold(self, number: int) -> None:
        """Kill a worker and keep it down until `release`."""
        worker = self.workers[number]
        worker.wanted = False
        self._signal(worker, signal.SIGKILL)
        if worker.process is not None:
            self._note_end(worker, worker.process.wait())

    def retire(self, number: int) -> None:
        """SIGTERM, and keep it down until `release`."""
        worker = self.workers[number]
        worker.wanted = False
        self._stop(worker)

    def release(self, number: int) -> None:
        """Let a held worker, or a new one, be started."""
        self._worker(number).wanted = True
        self.tick()

    def is_down(self, number: int) -> bool:
        worker = self.workers[number]
        return worker.process is None or worker.process.poll() is not None

    def memory_mb(self, number: int) -> float:
        """Resident memory of a worker, in 10^6 bytes; 0 when it does not run."""
        process = self.workers[number].process
        try:
            return float(psutil.Process(process.pid).memory_info().rss) / 1e6 if process is not None else 0.0
        except psutil.Error:
            return 0.0

    def port(self, number: int) -> int | None:
        """Where the worker's present process answers `/livez`; None before it does."""
        worker = self.workers[number]
        if worker.port is None and (found := PORT.search(self.said(number))):
            worker.port = int(found[2])
            begun = datetime.strptime(found[1], LOG_TIME).timestamp()
            self.start_seconds.append(begun - worker.started_at)
        return worker.port

    def is_ready(self, number: int) -> bool:
        """Whether the worker's present process has had a partition ready."""
        return not self.is_down(number) and READY in self.said(number)

    def said(self, number: int) -> str:
        """What the worker's present, or last, process has written."""
        with self._log_path(number).open("rb") as log:
            log.seek(self._worker(number).log_begin)
            return log.read().decode(errors="replace")

    def stop(self) -> Counter[int]:
        """SIGTERM to all and wait; the exit codes, -9 for one that did not end in time."""
        codes: Counter[int] = Counter()
        for worker in self.workers.values():
            worker.wanted = False
            self._stop(worker)
        for worker in self.workers.values():
            if worker.process is not None:
                try:
                    code = worker.process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    worker.process.kill()
                    code = worker.process.wait()
                codes[code] += 1
                self._note_end(worker, code)
        return codes

    def close(self) -> None:
        """Kill whoever still runs."""
        for worker in self.workers.values():
            if worker.process is not None:
                worker.process.kill()
                worker.process.wait()
                worker.process = None

    def log(self, number: int) -> str:
        """All that a worker has said, over all its starts."""
        return self._log_path(number).read_text(errors="replace")

    def _worker(self, number: int) -> WorkerHandle:
        return self.workers.setdefault(number, WorkerHandle(number))

    def _log_path(self, number: int) -> Path:
        return self.deployment.folder / f"worker-{number}.log"

    def _start(self, worker: WorkerHandle) -> None:
        started_at = time.time()
        with self._log_path(worker.number).open("ab") as log:
            worker.log_begin = log.tell()
            worker.process = subprocess.Popen(
                [*self.command, "--config", str(self.deployment.config)],
                env={**os.environ, **self.deployment.worker_environment(worker.number)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        worker.doomed, worker.port, worker.started_at = False, None, started_at

    def _stop(self, worker: WorkerHandle) -> None:
        """SIGTERM, unless the process has had one: a second says "at once"."""
        if not worker.doomed:
            self._signal(worker, signal.SIGTERM)

    def _signal(self, worker: WorkerHandle, number: signal.Signals) -> None:
        if worker.process is None:
            return
        worker.process.send_signal(number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            worker.doomed = True
        self.kills += number is signal.SIGKILL

    def _note_end(self, worker: WorkerHandle, code: int) -> None:
        words = self.said(worker.number).strip().splitlines()[-1:] or [""]
        self.exits.append(Exit(worker.number, time.time(), code, worker.doomed, words[0][:300]))
        worker.process, worker.ended_at = None, time.time()


def _die_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
