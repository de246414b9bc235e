"""A training under way, for people: a bar with rates and time left on a terminal, a line now and then without one."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from encoder.training.run import Progress as TrainingState

LINE_EVERY_S = 15.0


class TrainingScreen:
    """Takes what `train_release` reports; a context, so that the terminal is left as it was found."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=1.0)
        self._told = 0.0
        self._first: TrainingState | None = None

    def __enter__(self) -> TrainingScreen:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def line(self, text: str) -> None:
        """Say something above the bar."""
        self._bar.console.print(text, highlight=False)

    def prepare(self, text: str) -> None:
        """Say what is done that is no training, beside the bar, or in a line when the last is long enough ago."""
        self._bar.update(self._task, description=text)
        self._line_now_and_then(text)

    def show(self, standing: TrainingState) -> None:
        """Move the bar, or print a line when the last is long enough ago."""
        self._first = self._first or standing
        figures = progress_text(self._first, standing)
        self._bar.update(self._task, completed=standing.fraction, description=figures)
        self._line_now_and_then(f"{standing.fraction:.0%} {figures}", is_last=standing.fraction >= 1)

    def _line_now_and_then(self, text: str, *, is_last: bool = False) -> None:
        now = time.monotonic()
        if self._bar.disable and (now - self._told >= LINE_EVERY_S or is_last):
            self._told = now
            self.line(text)


def progress_text(first: TrainingState, now: TrainingState) -> str:
    """Rate and time left, by what was done since the first report, then epoch, loss and the last validation."""
    seconds, done = now.seconds - first.seconds, now.fraction - first.fraction
    parts = [f"epoch {now.epoch}", f"loss {now.loss:.3f}"]
    if seconds > 0 and done > 0:
        left = round(seconds / done * (1 - now.fraction))
        parts = [f"{(now.tokens - first.tokens) / seconds:,.0f} tokens/s", f"{left // 60}:{left % 60:02} left", *parts]
    if now.metric is not None:
        parts.append(f"validation HR@10 {now.metric:.3f}")
    return ", ".join(parts)
