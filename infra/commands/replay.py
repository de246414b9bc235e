"""`streamformer replay`: send a log of actions to `user-actions`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from infra.datasets.event_log import Columns, EventLog, event_log, load_log
from infra.datasets.generator import GeneratorPolicy, generate
from infra.datasets.movielens import movielens_1m
from infra.datasets.replay import Acknowledged, Pace, ReplayTotals
from infra.datasets.replay import replay as replay_log
from streams.config.settings import Settings
from streams.options import BootstrapServers, Config, settings_of

app = typer.Typer()
PLAIN_LINE_EVENTS = 100_000


@app.command()
def replay(  # noqa: PLR0913 - one parameter per option
    file: Annotated[Path | None, typer.Argument(help="Parquet or CSV file; default: MovieLens-1M.")] = None,
    rate: Annotated[str, typer.Option(help="Events per second, or `max`.")] = "max",
    speed: Annotated[
        float | None, typer.Option(help="Instead of --rate: how many times as fast event time runs.")
    ] = None,
    generate_events: Annotated[
        int, typer.Option("--generate", help="Instead of a file: number of events to generate.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the generated events.")] = 1,
    limit: Annotated[int, typer.Option(min=0, help="Send only this many events; 0 sends all.")] = 0,
    config: Config = None,
    bootstrap_servers: BootstrapServers = None,
    user: Annotated[str, typer.Option(help="Column of user ids.")] = "user_id",
    item: Annotated[str, typer.Option(help="Column of item ids.")] = "item_id",
    action: Annotated[str, typer.Option(help="Column of action types.")] = "action",
    timestamp: Annotated[str, typer.Option(help="Column of event times.")] = "timestamp_ms",
    time_unit: Annotated[Literal["ms", "s"], typer.Option(help="Unit of event times.")] = "ms",
    surface: Annotated[str, typer.Option(help="Column of surfaces, if any.")] = "",
    duration_ms: Annotated[str, typer.Option(help="Column of durations, if any.")] = "",
    event_id: Annotated[str, typer.Option(help="Column of event ids, if any.")] = "",
    value: Annotated[str, typer.Option(help="Column of numbers for features, if any.")] = "",
) -> None:
    """Send a log in event-time order, keyed by user id, and wait until the broker has acknowledged every event."""
    pace = _pace(rate, speed)
    settings = settings_of(config, bootstrap_servers)
    if file and generate_events:
        raise typer.BadParameter("give a file or --generate, not both")
    columns = Columns(user, item, action, timestamp, surface, duration_ms, event_id, time_unit, value)
    log = _log(file, generate_events, seed, columns)
    totals = _run(log.head(limit) if limit else log, settings, pace)
    per_second = totals.acknowledged / max(totals.seconds, 1e-9)
    print(f"{totals.acknowledged:,} events acknowledged in {totals.seconds:.1f} s, {per_second:,.0f} events/s")


def _pace(rate: str, speed: float | None) -> Pace:
    if speed is not None:
        if rate != "max":
            raise typer.BadParameter("give --rate or --speed, not both")
        if not speed > 0:
            raise typer.BadParameter("--speed must be above 0")
        return Pace(speed=speed)
    if rate == "max":
        return Pace()
    try:
        events_per_second = float(rate)
    except ValueError:
        events_per_second = 0.0
    if not 0 < events_per_second < float("inf"):
        raise typer.BadParameter(f"--rate must be a number above 0 or `max`, not {rate!r}")
    return Pace(rate=events_per_second)


def _log(file: Path | None, generate_events: int, seed: int, columns: Columns) -> EventLog:
    if file:
        return load_log(file, columns)
    if generate_events:
        return event_log(generate(GeneratorPolicy(events=generate_events), seed))
    return load_log(movielens_1m(lambda line: print(line, file=sys.stderr)))


def _run(log: EventLog, settings: Settings, pace: Pace) -> ReplayTotals:
    """Replay with a progress bar on a terminal, and with a line every `PLAIN_LINE_EVENTS` events elsewhere."""
    console = Console(stderr=True)
    total = len(log)
    if not console.is_terminal:
        plain = _PlainLines(total)
        return asyncio.run(replay_log(log, settings, pace, on_acknowledged=plain))
    bar = Progress(TextColumn("replay"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)
    with bar:
        task = bar.add_task("replay", total=total)

        def advance(batch: Acknowledged) -> None:
            bar.advance(task, len(batch.rows))

        return asyncio.run(replay_log(log, settings, pace, on_acknowledged=advance))


class _PlainLines:
    """Prints progress every `PLAIN_LINE_EVENTS` events."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0

    def __call__(self, batch: Acknowledged) -> None:
        before, self._done = self._done, self._done + len(batch.rows)
        if self._done // PLAIN_LINE_EVENTS > before // PLAIN_LINE_EVENTS:
            print(f"replay: {self._done:,} of {self._total:,} events", file=sys.stderr)
