"""Start, watch and stop one process of ours: a worker, or a baseline that it is measured against.

A process has a session of its own, so that Ctrl-C reaches only the command that started it, and the kernel kills it
when the thread that started it ends. Its output is appended to a log file.
"""

from __future__ import annotations

import ctypes
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from infra.errors import InfraError
from infra.signals import restore_default_signals
from streams.config.settings import Settings, variable

WORKER = (sys.executable, "-m", "infra.cli", "worker")
STOP_S = 30.0
STOP_SLACK_S = 5.0
POLL_S = 0.05
ANSWER_S = 10.0
LINE_CHARS_MAX = 1_000
PR_SET_PDEATHSIG = 1
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
_LIBC = ctypes.CDLL(None)


class ProcessFailed(InfraError):
    """The process ended by itself, did not make progress in time, or did not stop as it should."""


@dataclass(frozen=True, slots=True)
class Program:
    """A command line, what is added to its environment, and where its output goes."""

    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Variables added to those of this process."""
    folder: Path | None = None
    """Working directory; None keeps the one of this process."""
    name: str = "the worker"
    """Name of the process in error messages."""


class Process:
    """A started program."""

    def __init__(self, program: Program, popen: subprocess.Popen[bytes], log_begin: int, started_at: float) -> None:
        self.program, self.pid, self.started_at = program, popen.pid, started_at
        self._popen, self._log_begin = popen, log_begin

    @classmethod
    def start(cls, program: Program) -> Process:
        """Start a program; `started_at` is the wall clock right before."""
        program.log.parent.mkdir(parents=True, exist_ok=True)
        started_at = time.time()
        with program.log.open("ab") as log:
            log_begin = log.tell()
            popen = subprocess.Popen(
                list(program.command),
                env={**os.environ, **program.environment},
                cwd=program.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        return cls(program, popen, log_begin, started_at)

    @property
    def cpu_s(self) -> float:
        """CPU seconds so far: user and system time of all threads, including those that have ended."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    @property
    def resident_mb(self) -> float:
        """Resident memory in 10^6 bytes; 0 once the process has ended."""
        try:
            return float(psutil.Process(self.pid).memory_info().rss) / 1e6
        except psutil.Error:
            return 0.0

    def exit_code(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        return self._popen.poll()

    def require(self) -> None:
        """Raise `ProcessFailed` unless the process runs."""
        if (code := self.exit_code()) is not None:
            raise self._failure("ended by itself", f"exit status {code}: {self.last_line()}")

    def wait_until(self, reached: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Return when `reached()` is true; raise `ProcessFailed` if the process ends before or the time is up."""
        deadline_s = time.monotonic() + timeout_s
        while not reached():
            self.require()
            if time.monotonic() > deadline_s:
                raise self._failure(f"has not reached {what}", f"within {timeout_s:.0f} s: {self.last_line()}")
            time.sleep(POLL_S)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; a process that has ended ignores it."""
        self._popen.send_signal(number)

    def wait(self, timeout_s: float | None = None) -> int:
        """Return the exit code once the process has ended; after `timeout_s` it is killed."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return self.kill()

    def stop(self, timeout_s: float = STOP_S) -> int:
        """Send SIGTERM and return the exit code; after `timeout_s` the process is killed."""
        self.send_signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def stop_in_order(self, timeout_s: float) -> None:
        """Stop a running process; raise `ProcessFailed` unless it ends in time with exit code 0."""
        self.require()
        code = self.stop(timeout_s)
        if code == -signal.SIGKILL:
            raise self._failure("did not stop", f"within {timeout_s:.0f} s")
        if code:
            raise self._failure("failed while it stopped", f"exit status {code}: {self.last_line()}")

    def kill(self) -> int:
        """End the process at once, if it still runs, and return its exit code."""
        self._popen.kill()
        return self._popen.wait()

    def output(self) -> str:
        """Return what the process has written since it was started."""
        with self.program.log.open("rb") as log:
            log.seek(self._log_begin)
            return log.read().decode(errors="replace")

    def last_line(self) -> str:
        """Return the last line of the output, or the last one that reports an error if there is one."""
        lines = [line.strip() for line in self.output().splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error:") or "CRITICAL" in line]
        return (errors or lines or ["no output"])[-1][:LINE_CHARS_MAX]

    def _failure(self, what: str, detail: str) -> ProcessFailed:
        return ProcessFailed(f"{self.program.name} {what}", detail, f"see its log {self.program.log}")


@contextmanager
def running(program: Program, *, grace_s: float = 0.0) -> Iterator[Process]:
    """Run a program until the end of the block, where it is killed; with `grace_s`, SIGTERM comes so much earlier."""
    with interrupts_held_back() as let_go:
        process = Process.start(program)
        try:
            let_go()
            yield process
        finally:
            if grace_s:
                process.stop(grace_s)
            process.kill()


def worker_program(values: Mapping[str, Any], log: Path) -> Program:
    """Return a worker with `values` (setting -> value) in its environment."""
    return Program(WORKER, log, environment(values))


def stop_seconds(settings: Settings) -> float:
    """Return how long a worker with these settings may take to stop."""
    return settings.worker.shutdown_timeout_ms / 1_000 + STOP_SLACK_S


@contextmanager
def interrupts_held_back() -> Iterator[Callable[[], None]]:
    """Hold SIGINT and SIGTERM back until the yielded function is called, or until the end of the block.

    An interrupt that is raised while Python forks would be swallowed by the hooks that run then, or would orphan the
    child.
    """
    if threading.current_thread() is not threading.main_thread():  # Python runs signal handlers in the main thread only
        yield lambda: None
        return
    held: list[int] = []
    before = {number: signal.signal(number, lambda received, _: held.append(received)) for number in INTERRUPTS}

    def let_go() -> None:
        while before:
            signal.signal(*before.popitem())
        while held:
            signal.raise_signal(held.pop())

    try:
        yield let_go
    finally:
        let_go()


def environment(values: Mapping[str, Any]) -> dict[str, str]:
    """Return settings (key -> value) as environment variables."""
    return {variable(key): str(value) for key, value in values.items()}


def with_values(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Return `settings` with some of them replaced; keys as in the settings reference."""
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        changed = getattr(settings, group).model_copy(update={name: value}) if group else value
        settings = settings.model_copy(update={group or name: changed})
    return settings


def fetch_page(port: int, path: str, timeout_s: float = ANSWER_S) -> tuple[int, str]:
    """Return status and text of a page on loopback; (0, "") while nothing answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=timeout_s) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except (OSError, http.client.HTTPException):
        return 0, ""


def scrape(port: int) -> str:
    """Return the text of `/metrics` on loopback; empty while nothing answers."""
    return fetch_page(port, "/metrics")[1]


def sample(text: str, name: str, labels: str = "") -> float:
    r"""Sum one metric over its labels, in Prometheus' text format; 0 if it is absent.

    With `labels`, only series whose labels contain that text count.

    >>> text = 'a_total{p="0"} 2.0\na_total{p="1"} 3.0\na_total_more 9.0'
    >>> sample(text, "a_total"), sample(text, "a_total", 'p="1"')
    (5.0, 3.0)
    """
    total = 0.0
    for line in text.splitlines():
        series, _, value = line.rpartition(" ")
        found, _, found_labels = series.partition("{")
        total += float(value) if found == name and labels in found_labels else 0.0
    return total


def free_port() -> int:
    """Return a port on loopback that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    restore_default_signals()
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
