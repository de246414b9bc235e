"""One worker as a process of its own: started with settings, watched, stopped by SIGTERM, never left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.errors import InfraError
from streams.config.settings import Settings, variable

STOP_SLACK_S = 5.0
PR_SET_PDEATHSIG = 1
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
_LIBC = ctypes.CDLL(None)


class WorkerFailed(InfraError):
    """The worker ended by itself, or did not end when told to."""


class WorkerProcess:
    """A running worker; its output goes to `log`."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, stop_s: float) -> None:
        self.pid = process.pid
        self._process, self._log, self._stop_s = process, log, stop_s

    def require(self) -> None:
        """Raise `WorkerFailed` unless it runs."""
        if (status := self._process.poll()) is not None:
            raise WorkerFailed("the worker ended by itself", f"exit status {status}: {self.last_words()}", _REMEDY)

    def stop(self) -> None:
        """SIGTERM, and return once the final checkpoint is written; raises `WorkerFailed` where it was not."""
        self.require()
        self._process.terminate()
        try:
            status = self._process.wait(self._stop_s)
        except subprocess.TimeoutExpired:
            raise WorkerFailed("the worker did not stop", f"within {self._stop_s:.0f} s", _REMEDY) from None
        if status:
            raise WorkerFailed("the worker stopped badly", f"exit status {status}: {self.last_words()}", _REMEDY)

    def kill(self) -> None:
        """End it if it still runs."""
        self._process.kill()
        self._process.wait()

    def last_words(self) -> str:
        """The last line of its log, or what matters of it: the error line that a command ends with."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error:") or "CRITICAL" in line]
        return (errors or lines or ["it said nothing"])[-1][:300]


_REMEDY = "run `streamformer worker` by hand to see all that it says"


@contextmanager
def worker_process(values: Mapping[str, Any], settings: Settings, log: Path) -> Iterator[WorkerProcess]:
    """A worker with `values` (setting -> value) in its environment, killed at the end of the block if it still runs."""
    stop_s = settings.worker.shutdown_timeout_ms / 1_000 + STOP_SLACK_S
    with _interrupts_held_back() as let_go:
        worker = WorkerProcess(_spawn(values, log), log, stop_s)
        try:
            let_go()
            yield worker
        finally:
            worker.kill()


def _spawn(values: Mapping[str, Any], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "infra.cli", "worker"],
            env={**os.environ, **environment(values)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches the demo alone, which then stops the worker in order
            preexec_fn=_die_with_parent,
        )


@contextmanager
def _interrupts_held_back() -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM wait until what is yielded is called, or until the end of the block.

    Raised while Python forks, an interrupt would be swallowed by the hooks that run then, or orphan the child.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone hears interrupts
        yield lambda: None
        return
    held: list[int] = []
    before = {number: signal.signal(number, lambda heard, _: held.append(heard)) for number in INTERRUPTS}

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
    """Settings as environment variables."""
    return {variable(key): str(value) for key, value in values.items()}


def with_values(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """`settings` with some of them replaced; keys as in docs/reference/settings.md."""
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        changed = getattr(settings, group).model_copy(update={name: value}) if group else value
        settings = settings.model_copy(update={group or name: changed})
    return settings


def free_port() -> int:
    """A port on loopback that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
