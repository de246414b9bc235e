"""The watchdog: it detects that pending work is not progressing.

A silent stall is the worst fault of a stream processor: the process is up, but partitions do not advance. The watchdog
compares each position with its own past, so traffic in one partition cannot hide a stall in another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Progress:
    """Position of one activity: `done` must change while it is behind `wanted`."""

    done: int
    wanted: int


@dataclass(slots=True)
class Watchdog:
    """Reports activities that were behind for `timeout_ms` without moving."""

    timeout_ms: int
    _since: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Activity that is behind -> (its position, the time at which it reached that position)."""

    def observe(self, progress: Mapping[str, Progress], now_ms: int) -> str | None:
        """Record the present progress by name; return one line that names what has stalled, or None."""
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
