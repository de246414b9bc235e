"""The watchdog: notices that work which is there to be done is not being done.

Silent stalls are the worst fault of a stream processor: the process is up, the partitions stand still. Positions are
compared with their own past, so the clock is a parameter and no stall can hide behind traffic in another partition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Progress:
    """Where one thing stands: `done` must move while it is behind `wanted`."""

    done: int
    wanted: int


@dataclass(slots=True)
class Watchdog:
    """Reports what has not moved for `timeout_ms` although it was behind all the time."""

    timeout_ms: int
    _since: dict[str, tuple[int, int]] = field(default_factory=dict)
    """What is behind -> (where it stood, since when)."""

    def observe(self, progress: Mapping[str, Progress], now_ms: int) -> str | None:
        """Take in the present progress by name; return what has stalled, in a line, or None."""
        self._since = {
            name: self._since_of(name, each, now_ms) for name, each in progress.items() if each.done < each.wanted
        }
        stalled = [name for name, (_, since_ms) in self._since.items() if now_ms - since_ms >= self.timeout_ms]
        if not stalled:
            return None
        return f"no progress for {self.timeout_ms / 1000:g} s: {', '.join(sorted(stalled))}"

    def _since_of(self, name: str, now: Progress, now_ms: int) -> tuple[int, int]:
        done, since_ms = self._since.get(name, (now.done, now_ms))
        return (done, since_ms) if done == now.done else (now.done, now_ms)
