"""Keeps one Java broker for a parent process, and cleans up when the parent is gone however it went.

A program of its own (standard library only): `python keeper.py FOLDER -- COMMAND...`. It reads orders from standard
input, one a line: `start`, `stop` (SIGTERM, then SIGKILL), `kill` (SIGKILL), and answers each with one line on
standard output: the broker's pid, or its exit status. When standard input ends or the parent changes, the broker is
stopped, FOLDER is removed and the keeper exits. Should the keeper itself be killed, the kernel kills the broker.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

STOP_S = 15.0
PARENT_CHECK_S = 0.5
PR_SET_PDEATHSIG = 1


def main(folder: Path, command: list[str]) -> None:
    """Obey orders until the parent is gone."""
    _ignore_terminal_signals()
    keeper = Keeper(folder, command)
    try:
        for order in _orders(os.getppid()):
            print(keeper.obey(order), flush=True)
    except BrokenPipeError:
        pass
    finally:
        keeper.stop()
        shutil.rmtree(folder, ignore_errors=True)


class Keeper:
    """One broker process at a time, its output appended to `server.log` in the folder."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        self._folder = folder
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def obey(self, order: str) -> int:
        return {"start": self.start, "stop": self.stop, "kill": self.kill}[order]()

    def start(self) -> int:
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent
            )
        return self._process.pid

    def stop(self) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        if self._process is None:
            return 0
        self._process.kill()
        return self._process.wait()


def _orders(parent_pid: int) -> Iterator[str]:
    """Lines of standard input until it ends or the parent dies (a forked sibling may hold the pipe open)."""
    pending = b""
    while os.getppid() == parent_pid:
        if not select.select([0], [], [], PARENT_CHECK_S)[0]:
            continue
        chunk = os.read(0, 4096)
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        yield from (line.decode() for line in lines)


def _ignore_terminal_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _die_with_parent() -> None:
    """In the child: restore the signals that the keeper ignores; be killed when the keeper dies."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3:])
