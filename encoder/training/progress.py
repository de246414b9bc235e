"""Display of a training in progress: a bar with rate and time left on a terminal, a line every 15 seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from encoder.training.run import Progress

LINE_EVERY_S = 15.0


class TrainingScreen:
    """Shows the progress that `train_release` reports; a context manager, which restores the terminal at its end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = ProgressBar(
            TextColumn("training"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=1.0)
        self._printed_s = 0.0
        self._first: Progress | None = None

    def __enter__(self) -> TrainingScreen:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(text, highlight=False)

    def prepare(self, text: str) -> None:
        """Show a step before training: next to the bar, or as a line if the previous line is old enough."""
        self._bar.update(self._task, description=text)
        self._line_if_due(text)

    def show(self, progress: Progress) -> None:
        """Move the bar, or print a line if the previous line is old enough."""
        self._first = self._first or progress
        figures = progress_text(self._first, progress)
        self._bar.update(self._task, completed=progress.fraction, description=figures)
        self._line_if_due(f"{progress.fraction:.0%} {figures}", is_last=progress.fraction >= 1)

    def _line_if_due(self, text: str, *, is_last: bool = False) -> None:
        now = time.monotonic()
        if self._bar.disable and (now - self._printed_s >= LINE_EVERY_S or is_last):
            self._printed_s = now
            self.line(text)


def progress_text(first: Progress, now: Progress) -> str:
    """Return rate and time left, measured since the first report, then epoch, loss and the last validation metric."""
    seconds, done = now.seconds - first.seconds, now.fraction - first.fraction
    parts = [f"epoch {now.epoch}", f"loss {now.loss:.3f}"]
    if seconds > 0 and done > 0:
        left = round(seconds / done * (1 - now.fraction))
        parts = [f"{(now.tokens - first.tokens) / seconds:,.0f} tokens/s", f"{left // 60}:{left % 60:02} left", *parts]
    if now.metric is not None:
        parts.append(f"validation HR@10 {now.metric:.3f}")
    return ", ".join(parts)
