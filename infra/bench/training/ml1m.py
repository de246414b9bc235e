"""`make evaluate-ml1m`: both encoders on MovieLens-1M, leave-one-out, ranked among all items that a user has not rated.

Items with fewer than five ratings are dropped; a stable sort by user and time keeps the order of the file on ties; the
last rating is the test, the one before it validation: 6,040 users, 3,416 items. For each seed the release in
`releases/` is taken if it was made with the recipe as it stands, else it is trained there, on one thread. What is
unfair: ratings are often entered a page at a time, so ties of one second carry the order of that page, to everyone's
advantage alike.
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
class Graded:
    """One release on the test questions."""

    name: str
    release: Release
    blind: Scores
    given: Scores | None
    """With the time of the rating to predict; only where the encoder has a read-out."""


def main(
    seeds: Annotated[str, typer.Option(help="Seeds of the streaming encoder, with commas between them.")] = "1",
    minutes: Annotated[float, typer.Option(min=0, help="Of each training at most; 0: the recipe's budget.")] = 0,
    window: Annotated[bool, typer.Option("--window/--no-window", help="The window encoder too, first seed.")] = True,
) -> None:
    """Train or take the releases, and rank the last rating of every user."""
    log = read_log(movielens_1m(notice=console.print), LogColumns())
    chosen = [_seed(text) for text in seeds.split(",")]
    runs = [("ml1m_streaming", seed) for seed in chosen] + [("ml1m_window", chosen[0])] * window
    graded = [grade(f"{name}-{seed}", made(log, name, seed, minutes), log) for name, seed in runs]
    streaming, windows = graded[: len(chosen)], graded[len(chosen) :]
    popular = evaluator_of(log, streaming[0].release).popularity_scores()
    show(graded, popular)
    print_result(
        {"bench": "ml1m", "machine": machine()}
        | summary(streaming)
        | {
            "window_hr10": windows[0].blind.hr10 if windows else None,
            "window_ndcg10": windows[0].blind.ndcg10 if windows else None,
            "streaming_less_window_hr10": paired(streaming[0], windows[0]) if windows else None,
            "popularity_hr10": popular.hr10,
            "train_minutes": statistics.mean(each.release.training["seconds"] / 60 for each in streaming),
            "train_tokens": statistics.mean(each.release.training["tokens"] for each in streaming),
        }
    )


def made(log: ActionLog, name: str, seed: int, minutes: float) -> Release:
    """The release of a recipe and a seed: as recorded, or trained now."""
    recipe = replace(read_recipe(RUNS / f"{name}.toml"), seed=seed)
    folder = RELEASES / f"{name}-{seed}"
    try:
        recorded = load_release(folder)
        if same(recipe, parse_recipe(recorded.training["recipe"])):
            console.print(f"taking {folder}, trained for {recorded.training['seconds'] / 60:.0f} minutes")
            return recorded
    except ReleaseError:
        pass
    with TrainingScreen(console) as screen:
        screen.line(f"training {folder}")
        return train_release(
            log, recipe, out_dir=folder, seconds_max=minutes * 60 or None, threads=1, resume=True, progress=screen.show
        )


def same(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes make the same release of the same log, wherever the log lies."""
    return replace(one, log=LogConfig()) == replace(other, log=LogConfig())


def evaluator_of(log: ActionLog, release: Release) -> NextItemEvaluator:
    """The test questions, checked to be those that published figures are about."""
    recipe = parse_recipe(release.training["recipe"])
    split = make_split(log, recipe.split, seed=recipe.seed)
    if (len(split.test), len(release.vocabularies.item_keys)) != (USERS, ITEMS):
        raise ReleaseError(
            f"not the standard split: {len(split.test)} questions, {len(release.vocabularies.item_keys)} items; "
            f"split.kind must be leave_one_out with items_min 5, to give {USERS} and {ITEMS}"
        )
    return NextItemEvaluator(split.log, release.vocabularies, split.test, mask_seen=True)


def grade(name: str, release: Release, log: ActionLog) -> Graded:
    """A release on the test questions."""
    evaluator, read_out = evaluator_of(log, release), release.config.read_out
    given = evaluator.encoder_scores(release.model, time_given=True) if read_out else None
    return Graded(name, release, evaluator.encoder_scores(release.model), given)


def paired(one: Graded, other: Graded) -> dict[str, float]:
    """HR@10 of one less the other's, on the same questions, with the standard error of the difference."""
    difference = (one.blind.ranks < 10).astype(np.float64) - (other.blind.ranks < 10)
    return {
        "difference": float(difference.mean()),
        "standard_error": float(difference.std(ddof=1) / np.sqrt(len(difference))),
    }


def summary(streaming: list[Graded]) -> dict[str, Any]:
    """The figures of every seed."""
    given = [each.given for each in streaming if each.given]
    return {
        "time_blind_hr10": [each.blind.hr10 for each in streaming],
        "time_blind_ndcg10": [each.blind.ndcg10 for each in streaming],
        "time_given_hr10": [scores.hr10 for scores in given],
        "time_given_ndcg10": [scores.ndcg10 for scores in given],
    }


def show(graded: list[Graded], popular: Scores) -> None:
    """A table of scores that do not read the time of the rating to predict, and one of those that do."""
    rows = [(each.name, *_figures(each.blind), *_cost(each.release)) for each in graded]
    headings = ("time-blind", "HR@10", "standard error", "NDCG@10", "minutes", "million tokens")
    print_table("MovieLens-1M, leave-one-out", headings, [*rows, ("popular in 7 days", *_figures(popular), "", "")])
    given = [(each.name, *_figures(each.given)) for each in graded if each.given]
    if given:
        print_table("The same, reading the time of the rating", ("time-given", *headings[1:4]), given)


def _figures(scores: Scores) -> tuple[str, str, str]:
    error = np.sqrt(scores.hr10 * (1 - scores.hr10) / len(scores.ranks))
    return f"{scores.hr10:.4f}", f"{error:.4f}", f"{scores.ndcg10:.4f}"


def _cost(release: Release) -> tuple[str, str]:
    return f"{release.training['seconds'] / 60:.0f}", f"{release.training['tokens'] / 1e6:.1f}"


def _seed(text: str) -> int:
    if not text.strip().isdigit():
        raise typer.BadParameter(f"seeds are whole numbers with commas between them, not {text}")
    return int(text)


if __name__ == "__main__":
    run_command(main)
