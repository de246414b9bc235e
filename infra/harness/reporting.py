"""Reports of benchmarks and checks: the machine, repeated figures, tables, one JSON line."""

from __future__ import annotations

import json
import logging
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from encoder.hardware import machine as machine
from streams.errors import StreamformerError
from streams.telemetry.memory import keep_freed_memory

__all__ = [
    "Spread",
    "agreed_ratio",
    "console",
    "machine",
    "print_result",
    "print_table",
    "run_command",
]

console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
"""Console for people; standard output is for the JSON line alone."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The values of one figure, measured several times."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the values."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        """Return `median (smallest to largest)`, whole numbers with separators.

        >>> str(Spread((120_000.0, 118_400.0, 131_000.0)))
        '120,000 (118,400 to 131,000)'
        """
        digits = 0 if self.median >= 100 else 2
        return f"{self.median:,.{digits}f} ({min(self.values):,.{digits}f} to {max(self.values):,.{digits}f})"


def agreed_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Return our figure over theirs, one ratio per round."""
    return Spread(tuple(our / their for our, their in zip(ours, theirs, strict=True)))


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table for people: the first column to the left, figures to the right."""
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def run_command(main: Callable[..., None]) -> None:
    """Run `main` as a command line; an expected failure becomes one line on standard error and exit code 1."""
    keep_freed_memory()
    logging.getLogger("kafka").addHandler(logging.NullHandler())
    try:
        typer.run(main)
    except (StreamformerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def print_result(result: Mapping[str, Any]) -> None:
    """Print the last line on standard output."""
    print(json.dumps(result), flush=True)
