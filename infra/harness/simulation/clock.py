"""Virtual time: an event loop that runs only when it is told to, on a clock that only the history advances."""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from asyncio import events
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TURNS_MAX = 5_000
"""Turns of the event loop at one time after which a worker counts as spinning."""


class Spinning(AssertionError):
    """A worker repeats something without a pause."""


class Clock:
    """Seconds since the begin of a history."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """Return the time, as `time.monotonic` does."""
        return self.now_s


class _NoFiles:
    """Stands for a selector: nothing that a simulated worker waits for is a file."""

    def select(self, timeout: float | None) -> list[Any]:
        return []

    def close(self) -> None: ...


class VirtualLoop(asyncio.BaseEventLoop):
    """The event loop of one worker; while it does not run, the worker is frozen."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock, self._selector = clock, _NoFiles()
        self.stopped = False
        """True after the worker has died: nothing runs any more."""
        self.failures: list[dict[str, Any]] = []
        """What tasks have raised that nobody waits for."""

    def time(self) -> float:
        """Return the virtual time."""
        return self._clock.now_s

    def run_until(self, at_s: float) -> None:
        """Run everything that is due up to `at_s`, and leave the clock there."""
        turns, turns_at_s = 0, self._clock.now_s
        ready, scheduled = self._ready, self._scheduled  # type: ignore[attr-defined]
        events._set_running_loop(self)
        try:
            while not self.stopped:
                while scheduled and scheduled[0]._cancelled:
                    heapq.heappop(scheduled)._scheduled = False
                if not ready:
                    if not scheduled or scheduled[0]._when > at_s:
                        break
                    self._clock.now_s = max(self._clock.now_s, scheduled[0]._when)
                if turns_at_s != self._clock.now_s:
                    turns, turns_at_s = 0, self._clock.now_s
                turns += 1
                if turns > TURNS_MAX:
                    raise Spinning(f"{TURNS_MAX} turns of the event loop, and no time passes")
                self._run_once()  # type: ignore[attr-defined]
        finally:
            events._set_running_loop(None)
        self._clock.now_s = max(self._clock.now_s, at_s)

    def settle(self) -> None:
        """Run everything that is due now."""
        self.run_until(self._clock.now_s)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep what an unobserved task has raised."""
        self.failures.append(context)

    def _process_events(self, event_list: list[Any]) -> None: ...

    def _write_to_self(self) -> None: ...


@contextmanager
def virtual_time(clock: Clock) -> Iterator[None]:
    """Let `time.monotonic` follow the clock, and silence the log: histories are full of what is worth a warning."""
    monotonic = time.monotonic
    disabled = logging.root.manager.disable
    time.monotonic = clock
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        time.monotonic = monotonic
        logging.disable(disabled)
