"""Output of the commands: tables for people, and one JSON line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from encoder.evaluation.evaluate import Evaluation, Metrics
from encoder.evaluation.freshness import FreshnessTable
from encoder.evaluation.protocols import day
from encoder.hardware import machine
from encoder.release import Release

WIDTH = 120
"""Table width in characters when the output is not a terminal."""


def print_parts(parts: Sequence[Evaluation], candidates: int) -> None:
    """Print one table of time-blind metrics and, if there are any, one of time-given metrics."""
    among = f"{candidates:,} random items" if candidates else "all items"
    rows = [
        (
            part.name,
            f"{part.questions:,}",
            f"{part.unknown / part.questions:.1%}",
            _with_interval(part.time_blind),
            f"{part.time_blind.ndcg10:.4f}",
            f"{part.popularity.hr10:.4f}",
            f"{part.popularity.ndcg10:.4f}",
            f"{part.p90_coverage10:.3f}",
            "-" if part.interest_entropy50 is None else f"{part.interest_entropy50:.2f}",
        )
        for part in parts
    ]
    headings = ("", "queries", "unknown", "HR@10", "NDCG@10", "popular HR", "popular NDCG", "coverage", "entropy")
    _print_table(f"Time-blind, ranked among {among}; next to it, popularity in the seven days before", headings, rows)
    given = [
        (part.name, _with_interval(part.time_given), f"{part.time_given.ndcg10:.4f}")
        for part in parts
        if part.time_given
    ]
    if given:
        title = "Time-given: the encoder also reads the time of the action to predict"
        _print_table(title, ("", "HR@10", "NDCG@10"), given)


def print_freshness(table: FreshnessTable, plot: Path) -> None:
    """Print the schedules, then the staleness curve."""
    rows = [
        (
            reader.name if reader.staleness_ms is None else f"{reader.name} stale",
            f"{reader.hr10:.4f} ({reader.interval[0]:.4f} to {reader.interval[1]:.4f})",
            f"{reader.behind:+.4f} ({reader.behind_interval[0]:+.4f} to {reader.behind_interval[1]:+.4f})",
            f"{reader.empty:.1%}",
        )
        for reader in table.readers
    ]
    title = (
        f"Value of freshness: {table.questions:,} actions of {table.users:,} users, "
        f"{day(table.from_ms)} to {day(table.until_ms)}"
    )
    _print_table(title, ("embedding", "HR@10", "every action is better by", "no embedding"), rows)
    print(f"plot: {plot}")


def training_values(release: Release, folder: Path) -> dict[str, Any]:
    """Return the values of the JSON line of a training: its metrics and its record, without the recipe."""
    training = {key: value for key, value in release.training.items() if key not in ("recipe", "machine")}
    return {"release": str(folder), "version": release.version, **dict(release.metrics), **training}


def evaluation_values(release: Release, protocol: str, candidates: int, parts: Sequence[Evaluation]) -> dict[str, Any]:
    """Return the values of the JSON line of an evaluation."""
    return {
        "version": release.version,
        "protocol": protocol,
        "candidates": candidates,
        "parts": [asdict(part) for part in parts],
    }


def freshness_values(release: Release, table: FreshnessTable) -> dict[str, Any]:
    """Return the values of the JSON line of a freshness table."""
    return {"version": release.version, **asdict(table)}


def print_json(bench: str, values: dict[str, Any]) -> None:
    """Print the JSON line, which is the last line on standard output."""
    print(json.dumps({"bench": bench, "machine": machine(), **values}), flush=True)


def _with_interval(metrics: Metrics) -> str:
    low, high = metrics.hr10_interval
    return f"{metrics.hr10:.4f} ({low:.4f} to {high:.4f})"


def _print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)
