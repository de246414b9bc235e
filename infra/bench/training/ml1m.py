"""`make evaluate-ml1m`: both encoders on MovieLens-1M, leave-one-out, ranked among all items that a user has not rated.

Items with fewer than five ratings are dropped. Ratings are sorted by user and time, and ties keep the order of the
file. The last rating is the test, the one before it validation: 6,040 users and 3,416 items. For each seed, the release
in `releases/` is used if it was trained with the current recipe; otherwise it is trained now, on one thread. What is
unfair: users often enter ratings a page at a time, so ratings of the same second keep the order of that page, which
helps every model alike.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from encoder.data.log import ActionLog, LogColumns, read_log
from encoder.data.split import make_split
from encoder.evaluation.next_item import NextItemEvaluator, Scores
from encoder.release import Release, ReleaseError, load_release
from encoder.training.progress import TrainingScreen
from encoder.training.recipe import LogConfig, Recipe, parse_recipe, read_recipe
from encoder.training.run import train_release
from infra.datasets.movielens import movielens_1m
from infra.harness.reporting import console, machine, print_result, print_table, run_command

RUNS = Path(__file__).parents[3] / "encoder" / "runs"
RELEASES = Path("releases")
USERS, ITEMS = 6_040, 3_416


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Scores of one release on the test queries."""

    name: str
    release: Release
    time_blind: Scores
    time_given: Scores | None
    """Scores with the time of the rating to predict; None if the encoder has no read-out."""


def main(
    seeds: Annotated[str, typer.Option(help="Seeds of the streaming encoder, separated by commas.")] = "1",
    minutes: Annotated[float, typer.Option(min=0, help="Time limit per training; 0: only the recipe's budget.")] = 0,
    window: Annotated[
        bool, typer.Option("--window/--no-window", help="Evaluate the window encoder too, with the first seed.")
    ] = True,
) -> None:
    """Load or train the releases, and rank the last rating of every user."""
    log = read_log(movielens_1m(notice=console.print), LogColumns())
    chosen = [_seed(text) for text in seeds.split(",")]
    runs = [("ml1m_streaming", seed) for seed in chosen] + [("ml1m_window", chosen[0])] * window
    evaluated = [evaluate(f"{name}-{seed}", trained(log, name, seed, minutes), log) for name, seed in runs]
    streaming, windows = evaluated[: len(chosen)], evaluated[len(chosen) :]
    popular = evaluator_of(log, streaming[0].release).popularity_scores()
    show(evaluated, popular)
    print_result(
        {"bench": "ml1m", "machine": machine()}
        | summary(streaming)
        | {
            "window_hr10": windows[0].time_blind.hr10 if windows else None,
            "window_ndcg10": windows[0].time_blind.ndcg10 if windows else None,
            "streaming_less_window_hr10": paired(streaming[0], windows[0]) if windows else None,
            "popularity_hr10": popular.hr10,
            "train_minutes": statistics.mean(each.release.training["seconds"] / 60 for each in streaming),
            "train_tokens": statistics.mean(each.release.training["tokens"] for each in streaming),
        }
    )


def trained(log: ActionLog, name: str, seed: int, minutes: float) -> Release:
    """Return the release of a recipe and a seed: from disk if it matches the recipe, else trained now."""
    recipe = replace(read_recipe(RUNS / f"{name}.toml"), seed=seed)
    folder = RELEASES / f"{name}-{seed}"
    try:
        recorded = load_release(folder)
        if same(recipe, parse_recipe(recorded.training["recipe"])):
            console.print(f"using {folder}, trained for {recorded.training['seconds'] / 60:.0f} minutes")
            return recorded
    except ReleaseError:
        pass
    with TrainingScreen(console) as screen:
        screen.line(f"training {folder}")
        return train_release(
            log, recipe, out_dir=folder, seconds_max=minutes * 60 or None, threads=1, resume=True, progress=screen.show
        )


def same(one: Recipe, other: Recipe) -> bool:
    """Return whether two recipes give the same release for the same log; the location of the log does not matter."""
    return replace(one, log=LogConfig()) == replace(other, log=LogConfig())


def evaluator_of(log: ActionLog, release: Release) -> NextItemEvaluator:
    """Return the evaluator of the test queries. Raises `ReleaseError` if they are not those of published figures."""
    recipe = parse_recipe(release.training["recipe"])
    split = make_split(log, recipe.split, seed=recipe.seed)
    if (len(split.test), len(release.vocabularies.item_keys)) != (USERS, ITEMS):
        raise ReleaseError(
            f"not the standard split: {len(split.test)} queries, {len(release.vocabularies.item_keys)} items; "
            f"set split.kind to leave_one_out and split.items_min to 5, which gives {USERS} and {ITEMS}"
        )
    return NextItemEvaluator(split.log, release.vocabularies, split.test, mask_seen=True)


def evaluate(name: str, release: Release, log: ActionLog) -> Evaluated:
    """Evaluate a release on the test queries."""
    evaluator, read_out = evaluator_of(log, release), release.config.read_out
    given = evaluator.encoder_scores(release.model, time_given=True) if read_out else None
    return Evaluated(name, release, evaluator.encoder_scores(release.model), given)


def paired(one: Evaluated, other: Evaluated) -> dict[str, float]:
    """Return the HR@10 of `one` minus that of `other` on the same queries, with its standard error."""
    difference = (one.time_blind.ranks < 10).astype(np.float64) - (other.time_blind.ranks < 10)
    return {
        "difference": float(difference.mean()),
        "standard_error": float(difference.std(ddof=1) / np.sqrt(len(difference))),
    }


def summary(streaming: list[Evaluated]) -> dict[str, Any]:
    """Return the figures of every seed."""
    given = [each.time_given for each in streaming if each.time_given]
    return {
        "time_blind_hr10": [each.time_blind.hr10 for each in streaming],
        "time_blind_ndcg10": [each.time_blind.ndcg10 for each in streaming],
        "time_given_hr10": [scores.hr10 for scores in given],
        "time_given_ndcg10": [scores.ndcg10 for scores in given],
    }


def show(evaluated: list[Evaluated], popular: Scores) -> None:
    """Print a table of time-blind scores, and one of scores that use the time of the rating to predict."""
    rows = [(each.name, *_figures(each.time_blind), *_cost(each.release)) for each in evaluated]
    headings = ("time-blind", "HR@10", "standard error", "NDCG@10", "minutes", "million tokens")
    print_table("MovieLens-1M, leave-one-out", headings, [*rows, ("popular in 7 days", *_figures(popular), "", "")])
    given = [(each.name, *_figures(each.time_given)) for each in evaluated if each.time_given]
    if given:
        print_table("The same, reading the time of the rating", ("time-given", *headings[1:4]), given)


def _figures(scores: Scores) -> tuple[str, str, str]:
    error = np.sqrt(scores.hr10 * (1 - scores.hr10) / len(scores.ranks))
    return f"{scores.hr10:.4f}", f"{error:.4f}", f"{scores.ndcg10:.4f}"


def _cost(release: Release) -> tuple[str, str]:
    return f"{release.training['seconds'] / 60:.0f}", f"{release.training['tokens'] / 1e6:.1f}"


def _seed(text: str) -> int:
    if not text.strip().isdigit():
        raise typer.BadParameter(f"seeds must be whole numbers separated by commas, not {text}")
    return int(text)


if __name__ == "__main__":
    run_command(main)
