"""A keeper process: it runs one Java broker for its parent, and cleans up however the parent ends.

This is a program of its own that needs only the standard library: `python keeper.py FOLDER -- COMMAND...`. It reads one
order per line from standard input: `start`, `stop` (SIGTERM, then SIGKILL) or `kill` (SIGKILL). It confirms each with
one line on standard output: the broker's pid, or its exit status. When standard input ends or the parent changes, it
stops the broker, removes FOLDER and exits. If the keeper itself is killed, the kernel kills the broker.
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
    """Obey orders until the parent has ended."""
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
    """Runs one broker process at a time, and appends its output to `server.log` in the folder."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        self._folder = folder
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def obey(self, order: str) -> int:
        """Carry out one order; return the line to print."""
        return {"start": self.start, "stop": self.stop, "kill": self.kill}[order]()

    def start(self) -> int:
        """Start the broker; return its pid."""
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent
            )
        return self._process.pid

    def stop(self) -> int:
        """Stop the broker in order, by SIGKILL after `STOP_S`; return its exit status."""
        if self._process is None:
            return 0
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """Kill the broker; return its exit status."""
        if self._process is None:
            return 0
        self._process.kill()
        return self._process.wait()


def _orders(parent_pid: int) -> Iterator[str]:
    """Yield lines of standard input until it ends, or the parent dies while a forked sibling holds the pipe open."""
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
    """Restore, in the child, the signals that the keeper ignores, and have it killed when the keeper dies."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3:])
