"""Commands of the encoder: `streamformer train`, `streamformer evaluate` and `streamformer freshness`.

Each command prints tables for people and, as the last line on standard output, one JSON object; with `--json` it prints
only that object. Progress goes to standard error.
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
from encoder.evaluation.evaluate import Evaluation, EvaluationOptions, evaluate_queries, read_interests
from encoder.evaluation.freshness import FreshnessOptions, freshness_table, plot_freshness
from encoder.evaluation.protocols import day, leave_one_out, rolling, unseen_from_ms
from encoder.release import Release, load_release
from encoder.training.progress import TrainingScreen
from encoder.training.recipe import Recipe, RecipeError, parse_recipe, read_recipe
from encoder.training.run import train_release

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(stderr=True)

RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="Recipe to read the log with; default: the one stored in the release.")
]
ReleaseDir = Annotated[Path, typer.Argument(help="Folder of a release, written by train.")]
LogFile = Annotated[Path, typer.Argument(help="Actions: .parquet, .csv, .csv.gz, .jsonl or a folder of Parquet files.")]
Start = Annotated[
    str | None, typer.Option(help="First day to predict, YYYY-MM-DD; default: the first time unseen in training.")
]
JsonOnly = Annotated[bool, typer.Option("--json", help="Print only the JSON line.")]
QueriesMax = Annotated[int, typer.Option("--questions", min=1, help="Maximum number of queries per part.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of sampling and of the intervals.")]


class Protocol(StrEnum):
    """Evaluation protocol: which actions are predicted."""

    LEAVE_ONE_OUT = "leave-one-out"
    ROLLING = "rolling"


@app.command()
def train(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe, such as encoder/runs/demo.toml.")],
    actions: Annotated[Path | None, typer.Option(help="Log to train on; default: log.path of the recipe.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the release; default: releases/ and the recipe's name.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed; default: the recipe's.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Time limit; training ends earlier if the budget is spent.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of threads; default: the faster choice, by measurement.")
    ] = None,
) -> None:
    """Train a release; run the same command again to resume a training that was killed."""
    recipe = read_recipe(recipe_file)
    recipe = recipe if seed is None else replace(recipe, seed=seed)
    path = _log_path(recipe, recipe_file, actions)
    folder = out or Path("releases") / recipe_file.stem
    with TrainingScreen(console if is_main_process() else Console(quiet=True)) as screen:
        rows_max, shards = recipe.log.rows_in_memory_max, folder / FOLDER
        log = open_log(path, recipe.log.columns, rows_max=rows_max, folder=shards, progress=screen.prepare)
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
        console.print(f"negatives: {release.training['negative_pool']}")
        report.print_json("train", report.training_values(release, folder))


@app.command()
def evaluate(  # noqa: PLR0913 (one parameter per option)
    release_dir: ReleaseDir,
    log_file: LogFile,
    protocol: Annotated[Protocol, typer.Option(help="Which actions are predicted.")] = Protocol.ROLLING,
    start: Start = None,
    spans: Annotated[int, typer.Option(min=1, help="Number of time spans of the rolling protocol.")] = 4,
    candidates: Annotated[
        int, typer.Option(min=0, help="Rank the target among N random items; 0: among all items.")
    ] = 0,
    interests: Annotated[
        Path | None, typer.Option(help="CSV with the columns item_id and interest, for the interest entropy.")
    ] = None,
    queries_max: QueriesMax = 20_000,
    seed: Seed = 1,
    recipe_file: RecipeFile = None,
    json_only: JsonOnly = False,
) -> None:
    """Evaluate next-item ranking, next to a baseline: popularity over seven days."""
    release, recipe, log = _opened(release_dir, log_file, recipe_file)
    interest = read_interests(interests, release.vocabularies) if interests else None
    options = EvaluationOptions(recipe.data.hide_seen, candidates, interest, seed)
    if protocol is Protocol.LEAVE_ONE_OUT:
        _warn_of_leak(recipe)
        log, queries = leave_one_out(log, items_min=recipe.split.items_min, queries_max=queries_max, seed=seed)
        parts = [("leave one out", queries)]
    else:
        from_ms = _start_ms(start, release)
        parts = rolling(log, from_ms=from_ms, spans=spans, queries_max=queries_max, seed=seed)
    evaluations: list[Evaluation] = []
    with console.status("ranking") as status:
        for name, queries in parts:
            status.update(f"ranking {name}")
            evaluations.append(evaluate_queries(release, log, name, queries, options))
    if not json_only:
        report.print_parts(evaluations, candidates)
    report.print_json("evaluate", report.evaluation_values(release, protocol.value, candidates, evaluations))


@app.command()
def freshness(  # noqa: PLR0913 (one parameter per option)
    release_dir: ReleaseDir,
    log_file: LogFile,
    start: Start = None,
    days: Annotated[float, typer.Option(min=0.01, help="Number of days to predict.")] = 14.0,
    session_gap_minutes: Annotated[
        float, typer.Option(min=0.01, help="Minutes without an action that end a session.")
    ] = 30.0,
    queries_max: QueriesMax = 20_000,
    seed: Seed = 1,
    plot: Annotated[Path, typer.Option(help="File of the plot (.svg, .png or .pdf).")] = Path("reports/freshness.svg"),
    recipe_file: RecipeFile = None,
    json_only: JsonOnly = False,
) -> None:
    """Measure the value of embeddings computed once, daily, hourly, per session or after every action."""
    release, recipe, log = _opened(release_dir, log_file, recipe_file)
    options = FreshnessOptions(days, session_gap_minutes, recipe.data.hide_seen, queries_max, seed)
    with console.status("ranking for every reader"):
        table = freshness_table(release, log, from_ms=_start_ms(start, release), options=options)
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
    """Return the release, the recipe to read its log with, and the log."""
    release = load_release(release_dir)
    recipe = read_recipe(recipe_file) if recipe_file else parse_recipe(release.training.get("recipe", {}))
    columns: LogColumns = recipe.log.columns
    return release, recipe, read_log(log_file, columns)


def _start_ms(start: str | None, release: Release) -> int:
    """Return midnight of the given day, or the first time unseen in training. Raises `LogError`."""
    unseen_ms = unseen_from_ms(release)
    if start is None:
        if unseen_ms is None:
            raise LogError("the release has no record of its training time: give --start YYYY-MM-DD")
        return unseen_ms
    try:
        start_ms = round(datetime.strptime(start, "%Y-%m-%d").replace(tzinfo=UTC).timestamp() * 1_000)
    except ValueError:
        raise LogError(f"start is not a day: {start}; write it as YYYY-MM-DD") from None
    if unseen_ms is not None and start_ms < unseen_ms:
        console.print(f"warning: the release was trained with actions up to {day(unseen_ms)}, which is after --start")
    return start_ms


def _warn_of_leak(recipe: Recipe) -> None:
    if recipe.split.kind != "leave_one_out":
        console.print(
            f"warning: the split of this release was {recipe.split.kind}, so it may have been trained on the last "
            "actions"
        )
