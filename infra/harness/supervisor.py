"""The workers of a run: real processes, each with its own disk and name, kept running as a supervisor would.

A worker that ends although it is wanted is started again, and how it ended is noted. `fleet.tick()` does that; call it
often. Workers die with this process.
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

from infra.harness.deployment import Stage

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
class Slot:
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
class Fleet:
    """Starts, watches, hurts and stops workers."""

    stage: Stage
    command: Sequence[str] = WORKER
    slots: dict[int, Slot] = field(default_factory=dict)
    exits: list[Exit] = field(default_factory=list)
    start_seconds: list[float] = field(default_factory=list)
    """From a process's start until its worker begins: what the machine makes of importing the program."""
    kills: int = 0
    """Processes ended by SIGKILL so far."""

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def scale(self, count: int, *, cold: bool = False) -> None:
        """Workers 0 to `count` - 1 are wanted, the others are told to stop; with `cold`, new ones have empty disks."""
        for number in range(count):
            if cold and not self._slot(number).wanted:
                shutil.rmtree(self.stage.data_dir(number), ignore_errors=True)
            self._slot(number).wanted = True
        for slot in self.slots.values():
            if slot.number >= count:
                slot.wanted = False
                self._stop(slot)
        self.tick()

    def tick(self) -> None:
        """Note who has ended, and start who is wanted and has been down for a moment."""
        for slot in self.slots.values():
            if slot.process is not None and (code := slot.process.poll()) is not None:
                self._note_end(slot, code)
            rested = time.time() - slot.ended_at >= RESTART_AFTER_S
            if slot.process is None and slot.wanted and rested:
                self._start(slot)

    def running(self) -> list[int]:
        """Numbers of the workers whose process runs and is wanted."""
        return [slot.number for slot in list(self.slots.values()) if slot.process is not None and slot.wanted]

    def kill(self, number: int) -> None:
        """SIGKILL; the supervisor starts it again."""
        self._signal(self.slots[number], signal.SIGKILL)

    def terminate(self, number: int) -> None:
        """SIGTERM; the supervisor starts it again once it has ended."""
        self._signal(self.slots[number], signal.SIGTERM)

    def pause(self, number: int) -> None:
        """SIGSTOP."""
        self._signal(self.slots[number], signal.SIGSTOP)

    def resume(self, number: int) -> None:
        """SIGCONT."""
        self._signal(self.slots[number], signal.SIGCONT)

    def hold(self, number: int) -> None:
        """Kill a worker and keep it down until `release`."""
        slot = self.slots[number]
        slot.wanted = False
        self._signal(slot, signal.SIGKILL)
        if slot.process is not None:
            self._note_end(slot, slot.process.wait())

    def retire(self, number: int) -> None:
        """SIGTERM, and keep it down until `release`."""
        slot = self.slots[number]
        slot.wanted = False
        self._stop(slot)

    def release(self, number: int) -> None:
        """Let a held worker, or a new one, be started."""
        self._slot(number).wanted = True
        self.tick()

    def is_down(self, number: int) -> bool:
        slot = self.slots[number]
        return slot.process is None or slot.process.poll() is not None

    def memory_mb(self, number: int) -> float:
        """Resident memory of a worker, in 10^6 bytes; 0 when it does not run."""
        process = self.slots[number].process
        try:
            return float(psutil.Process(process.pid).memory_info().rss) / 1e6 if process is not None else 0.0
        except psutil.Error:
            return 0.0

    def port(self, number: int) -> int | None:
        """Where the worker's present process answers `/livez`; None before it does."""
        slot = self.slots[number]
        if slot.port is None and (found := PORT.search(self.said(number))):
            slot.port = int(found[2])
            begun = datetime.strptime(found[1], LOG_TIME).timestamp()
            self.start_seconds.append(begun - slot.started_at)
        return slot.port

    def is_ready(self, number: int) -> bool:
        """Whether the worker's present process has had a partition ready."""
        return not self.is_down(number) and READY in self.said(number)

    def said(self, number: int) -> str:
        """What the worker's present, or last, process has written."""
        with self._log_path(number).open("rb") as log:
            log.seek(self._slot(number).log_begin)
            return log.read().decode(errors="replace")

    def stop(self) -> Counter[int]:
        """SIGTERM to all and wait; the exit codes, -9 for one that did not end in time."""
        codes: Counter[int] = Counter()
        for slot in self.slots.values():
            slot.wanted = False
            self._stop(slot)
        for slot in self.slots.values():
            if slot.process is not None:
                try:
                    code = slot.process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    slot.process.kill()
                    code = slot.process.wait()
                codes[code] += 1
                self._note_end(slot, code)
        return codes

    def close(self) -> None:
        """Kill whoever still runs."""
        for slot in self.slots.values():
            if slot.process is not None:
                slot.process.kill()
                slot.process.wait()
                slot.process = None

    def log(self, number: int) -> str:
        """All that a worker has said, over all its starts."""
        return self._log_path(number).read_text(errors="replace")

    def _slot(self, number: int) -> Slot:
        return self.slots.setdefault(number, Slot(number))

    def _log_path(self, number: int) -> Path:
        return self.stage.folder / f"worker-{number}.log"

    def _start(self, slot: Slot) -> None:
        started_at = time.time()
        with self._log_path(slot.number).open("ab") as log:
            slot.log_begin = log.tell()
            slot.process = subprocess.Popen(
                [*self.command, "--config", str(self.stage.config)],
                env={**os.environ, **self.stage.worker_environment(slot.number)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        slot.doomed, slot.port, slot.started_at = False, None, started_at

    def _stop(self, slot: Slot) -> None:
        """SIGTERM, unless the process has had one: a second says "at once"."""
        if not slot.doomed:
            self._signal(slot, signal.SIGTERM)

    def _signal(self, slot: Slot, number: signal.Signals) -> None:
        if slot.process is None:
            return
        slot.process.send_signal(number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            slot.doomed = True
        self.kills += number is signal.SIGKILL

    def _note_end(self, slot: Slot, code: int) -> None:
        words = self.said(slot.number).strip().splitlines()[-1:] or [""]
        self.exits.append(Exit(slot.number, time.time(), code, slot.doomed, words[0][:300]))
        slot.process, slot.ended_at = None, time.time()


def _die_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
