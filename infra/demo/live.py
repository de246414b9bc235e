"""Progress on standard error: a live table on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from infra.demo.observer import Observer
from infra.harness.freshness import Sent, percentiles

PLAIN_EVERY_S = 4.0
RECENT_S = 3.0


@dataclass(frozen=True, slots=True)
class Figures:
    """Progress of a replay at one moment; rates and freshness are over the last `RECENT_S` seconds."""

    events: int
    events_total: int
    events_per_second: float
    embeddings: int
    embeddings_per_second: float
    freshness_p50_ms: float
    freshness_p99_ms: float
    lag: int
    """Events sent after the newest embedded one, over all partitions."""
    reasons: dict[str, int]

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) pairs as text."""
        triggers = ", ".join(f"{reason} {count:,}" for reason, count in sorted(self.reasons.items()))
        return [
            ("events", f"{self.events:,} of {self.events_total:,}, {self.events_per_second:,.0f}/s"),
            ("embeddings", f"{self.embeddings:,}, {self.embeddings_per_second:,.0f}/s"),
            ("freshness", f"p50 {self.freshness_p50_ms:,.0f} ms, p99 {self.freshness_p99_ms:,.0f} ms"),
            ("lag", f"{self.lag:,} events"),
            ("triggers", triggers or "none yet"),
        ]


class Meter:
    """Computes figures of what was sent and received since its creation."""

    def __init__(self, sent: Sent, observer: Observer, events_total: int) -> None:
        self._sent, self._observer, self._total = sent, observer, events_total
        self._first_event, self._first_embedding = len(sent), len(observer)
        self._reasons = observer.reasons.copy()
        self._marks = deque([(time.monotonic(), len(sent), len(observer))])

    def read(self) -> Figures:
        """Return the figures of this moment."""
        now = (time.monotonic(), len(self._sent), len(self._observer))
        while len(self._marks) > 1 and now[0] - self._marks[1][0] >= RECENT_S:
            self._marks.popleft()
        then_s, events, embeddings = self._marks[0]
        self._marks.append(now)
        seconds = max(now[0] - then_s, 1e-3)
        recent = self._observer.received.columns(embeddings)
        p50, p99 = percentiles(recent.freshness_ms(self._sent), 50, 99)
        return Figures(
            events=now[1] - self._first_event,
            events_total=self._total,
            events_per_second=(now[1] - events) / seconds,
            embeddings=now[2] - self._first_embedding,
            embeddings_per_second=(now[2] - embeddings) / seconds,
            freshness_p50_ms=p50,
            freshness_p99_ms=p99,
            lag=self._observer.lag(self._sent),
            reasons=dict(self._observer.reasons - self._reasons),
        )


class Screen:
    """Permanent lines, and below them a table that changes."""

    REDRAWS_PER_SECOND = 4

    def __init__(self, console: Console, started_s: float) -> None:
        self._console, self._started_s = console, started_s
        self._live = Live(
            console=console,
            transient=True,
            refresh_per_second=self.REDRAWS_PER_SECOND,
            redirect_stdout=False,  # standard output is for the report alone
            redirect_stderr=False,
        )
        self._plain_due_s = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def line(self, text: str) -> None:
        """Print a permanent line."""
        self._live.update("")
        self._console.print(
            f"{time.monotonic() - self._started_s:6.1f} s  {text}", highlight=False, markup=False, soft_wrap=True
        )

    def show(self, rows: list[tuple[str, str]]) -> None:
        """Show figures: redrawn on a terminal, a line every few seconds elsewhere."""
        if self._console.is_terminal:
            table = Table.grid(padding=(0, 2))
            for name, value in rows:
                table.add_row(f"[bold]{name}[/bold]", value)
            self._live.update(table)
        elif time.monotonic() >= self._plain_due_s:
            self._plain_due_s = time.monotonic() + PLAIN_EVERY_S
            self.line("; ".join(f"{name}: {value}" for name, value in rows))
