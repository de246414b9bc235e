"""`streamformer train`, `streamformer evaluate` and `streamformer freshness`.

Tables are for people; the last line on standard output is one JSON object, the only one with `--json`. Progress goes
to standard error.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from encoder.data.log import ActionLog, LogColumns, LogError, read_log
from encoder.data.shards import FOLDER, Shards, open_log
from encoder.distributed import is_main_process
from encoder.evaluation import report
from encoder.evaluation.evaluate import (
    EvaluationOptions,
    Part,
    day,
    grade,
    later_ms,
    leave_one_out,
    read_interests,
    rolling,
)
from encoder.evaluation.freshness import freshness_table, plot_freshness
from encoder.release import Release, load_release
from encoder.training.progress import TrainingScreen
from encoder.training.recipe import Recipe, RecipeError, parse_recipe, read_recipe
from encoder.training.run import train_release

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(stderr=True)

RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="Columns, and what is kept out of rankings.")]
ReleaseDir = Annotated[Path, typer.Argument(help="A folder that train has written.")]
LogFile = Annotated[Path, typer.Argument(help="Actions: .parquet, .csv, .csv.gz or a folder of Parquet files.")]
Start = Annotated[str | None, typer.Option(help="First day asked about, YYYY-MM-DD; default: after the training.")]
JsonOnly = Annotated[bool, typer.Option("--json", help="Nothing but the JSON line.")]
Questions = Annotated[int, typer.Option(min=1, help="Questions at most, of each part.")]


class Protocol(StrEnum):
    """Who is asked what."""

    LEAVE_ONE_OUT = "leave-one-out"
    ROLLING = "rolling"


@app.command()
def train(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, like encoder/runs/demo.toml.")],
    actions: Annotated[Path | None, typer.Option(help="The log, in place of the recipe's log.path.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the release; default: releases/ and the name.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the recipe's.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="At most so long, whatever the budget.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: what this machine is faster with.")] = None,
) -> None:
    """Train a release; a training that was killed goes on where it stood when the command is given again."""
    recipe = read_recipe(recipe_file)
    recipe = recipe if seed is None else replace(recipe, seed=seed)
    path = _log_path(recipe, recipe_file, actions)
    folder = out or Path("releases") / recipe_file.stem
    with TrainingScreen(console if is_main_process() else Console(quiet=True)) as screen:
        log = open_log(
            path,
            recipe.log.columns,
            rows_max=recipe.log.rows_in_memory_max,
            folder=folder / FOLDER,
            tell=screen.prepare,
        )
        screen.line(f"{_size(log)}; the release goes to {folder}")
        release = train_release(
            log,
            recipe,
            out_dir=folder,
            seconds_max=None if minutes is None else minutes * 60,
            threads=threads,
            resume=True,
            progress=screen.show,
        )
    if is_main_process():
        if isinstance(log, Shards):
            log.remove()
        console.print(f"positives were told apart from {release.training['negative_pool']}")
        report.print_json("train", report.training_values(release, folder))


@app.command()
def evaluate(
    release_dir: ReleaseDir,
    log_file: LogFile,
    protocol: Annotated[Protocol, typer.Option(help="Who is asked what.")] = Protocol.ROLLING,
    start: Start = None,
    spans: Annotated[int, typer.Option(min=1, help="Parts of the rolling protocol.")] = 4,
    candidates: Annotated[int, typer.Option(min=0, help="Rank among so many random items; 0: all.")] = 0,
    interests: Annotated[Path | None, typer.Option(help="CSV with item_id, interest: for interest entropy.")] = None,
    questions: Questions = 20_000,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    recipe_file: RecipeFile = None,
    json_only: JsonOnly = False,
) -> None:
    """Rank the item that came next, beside the popularity of seven days."""
    release, recipe, log = _opened(release_dir, log_file, recipe_file)
    interest = read_interests(interests, release.vocabularies) if interests else None
    grading = EvaluationOptions(recipe.data.hide_seen, candidates, interest, seed)
    if protocol is Protocol.LEAVE_ONE_OUT:
        _warn_of_leak(recipe)
        log, asked = leave_one_out(log, items_min=recipe.split.items_min, questions_max=questions, seed=seed)
        parts = [("leave one out", asked)]
    else:
        from_ms = _start_ms(start, release)
        parts = rolling(log, from_ms=from_ms, spans=spans, questions_max=questions, seed=seed)
    graded: list[Part] = []
    with console.status("ranking") as status:
        for name, asked in parts:
            status.update(f"ranking {name}")
            graded.append(grade(release, log, name, asked, grading))
    if not json_only:
        report.print_parts(graded, candidates)
    report.print_json("evaluate", report.evaluation_values(release, protocol.value, candidates, graded))


@app.command()
def freshness(
    release_dir: ReleaseDir,
    log_file: LogFile,
    start: Start = None,
    days: Annotated[float, typer.Option(min=0.01, help="Length of the table's time.")] = 14.0,
    session_gap_minutes: Annotated[float, typer.Option(min=0.01, help="Silence that ends a session.")] = 30.0,
    questions: Questions = 20_000,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    plot: Annotated[Path, typer.Option(help="Where the picture goes (.svg, .png, .pdf).")] = Path(
        "reports/freshness.svg"
    ),
    recipe_file: RecipeFile = None,
    json_only: JsonOnly = False,
) -> None:
    """What an embedding is worth that is computed once, daily, hourly, per session or after every action."""
    release, recipe, log = _opened(release_dir, log_file, recipe_file)
    with console.status("asking every reader"):
        table = freshness_table(
            release,
            log,
            from_ms=_start_ms(start, release),
            days=days,
            session_gap_minutes=session_gap_minutes,
            hide_seen=recipe.data.hide_seen,
            questions_max=questions,
            seed=seed,
        )
        plot_freshness(table, plot)
    if not json_only:
        report.print_freshness(table, plot)
    report.print_json("freshness", report.freshness_values(release, table))


def _log_path(recipe: Recipe, recipe_file: Path, named: Path | None) -> Path:
    if named is None and not recipe.log.path:
        raise RecipeError(f"no log to train on: give --actions, or log.path in {recipe_file}")
    return named or Path(recipe.log.path)


def _size(log: ActionLog | Shards) -> str:
    if isinstance(log, Shards):
        return f"{log.rows:,} actions in {len(log)} shards"
    return f"{len(log):,} actions of {len(log.users):,} users"


def _opened(release_dir: Path, log_file: Path, recipe_file: Path | None) -> tuple[Release, Recipe, ActionLog]:
    """The release, the recipe that says how its log is read, and the log."""
    release = load_release(release_dir)
    recipe = read_recipe(recipe_file) if recipe_file else parse_recipe(release.training.get("recipe", {}))
    columns: LogColumns = recipe.log.columns
    return release, recipe, read_log(log_file, columns)


def _start_ms(start: str | None, release: Release) -> int:
    """Midnight of the day named, or the first time that the release has not seen. Raises `LogError`."""
    seen_until = later_ms(release)
    if start is None:
        if seen_until is None:
            raise LogError("the release does not say until when it was trained: give --start YYYY-MM-DD")
        return seen_until
    try:
        named = round(datetime.strptime(start, "%Y-%m-%d").replace(tzinfo=UTC).timestamp() * 1_000)
    except ValueError:
        raise LogError(f"start is no day: {start}; write it as YYYY-MM-DD") from None
    if seen_until is not None and named < seen_until:
        console.print(f"careful: the release was made with actions up to {day(seen_until)}, after the start named")
    return named


def _warn_of_leak(recipe: Recipe) -> None:
    if recipe.split.kind != "leave_one_out":
        console.print(
            f"careful: this release's split was {recipe.split.kind}, so it may have been trained on the last actions"
        )
