"""The shape of PinnerFormer's tables 3 and 4 in small: one recipe, trained with every objective or kind of negatives.

    python -m infra.bench.variants objectives
    python -m infra.bench.variants negatives

The demo's encoder on MovieLens-1M, leave-one-out, each variant with the same few tokens. What is unfair: the question
is the very next item, which favours objectives that train on the next item; the paper asks for all of a fortnight.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from encoder.negatives import LossConfig
from encoder.objectives import ObjectiveConfig
from encoder.ranking import p90_coverage
from encoder.training.log import ActionLog, LogColumns, read_log
from encoder.training.next_item import Exam, known_items
from encoder.training.recipe import Recipe, read_recipe
from encoder.training.run import train_release
from encoder.training.show import TrainingScreen
from encoder.training.splits import SplitConfig, make_split
from infra.bench.common import console, machine, print_result, print_table, run_command
from infra.bench.ml1m import RUNS
from infra.datasets import movielens_1m


class Table(StrEnum):
    """What varies."""

    OBJECTIVES = "objectives"
    NEGATIVES = "negatives"


def main(
    table: Annotated[Table, typer.Argument(help="What varies.")],
    tokens: Annotated[int, typer.Option(min=1, help="Of each training.")] = 1_000_000,
    seed: Annotated[int, typer.Option(min=0)] = 1,
) -> None:
    """Train every variant and rank the last rating of every user."""
    log = read_log(movielens_1m(notice=console.print), LogColumns())
    recipe = read_recipe(RUNS / "demo.toml")
    recipe = replace(
        recipe,
        seed=seed,
        split=SplitConfig("leave_one_out", items_min=5),
        budget=replace(recipe.budget, tokens_max=tokens),
    )
    chosen = objectives(recipe) if table is Table.OBJECTIVES else negatives(recipe)
    figures = {name: score(log, variant, name) for name, variant in chosen.items()}
    rows = [(name, *(f"{value:.4f}" for value in each.values())) for name, each in figures.items()]
    print_table(f"{table.value}, {tokens:,} tokens each", ("", "HR@10", "NDCG@10", "P90 coverage@10"), rows)
    print_result({"bench": "variants", "machine": machine(), "table": table.value, "tokens": tokens, **figures})


def objectives(recipe: Recipe) -> dict[str, Recipe]:
    """The four objectives of the paper's figure 2, and an even mix of two."""
    shares: dict[str, ObjectiveConfig] = {
        "next action": ObjectiveConfig({"next_action": 1.0}),
        "sasrec": ObjectiveConfig({"sasrec": 1.0}),
        "all action": ObjectiveConfig({"all_action": 1.0}),
        "dense all action": ObjectiveConfig({"dense_all_action": 1.0}),
        "sasrec and dense": ObjectiveConfig({"sasrec": 0.5, "dense_all_action": 0.5}),
    }
    return {name: replace(recipe, objective=objective) for name, objective in shares.items()}


def negatives(recipe: Recipe) -> dict[str, Recipe]:
    """Random, in-batch and mixed negatives, with and without the correction by log-Q; the same number of each."""
    kinds = {"random": (1_024, 0), "in-batch": (0, 1_024), "mixed": (512, 512)}
    return {
        f"{name}, {'log-Q' if log_q == 'exact' else 'as they are'}": replace(
            recipe, loss=LossConfig("sampled", *sizes, log_q=log_q, scale_initial=recipe.loss.scale_initial)
        )
        for name, sizes in kinds.items()
        for log_q in ("none", "exact")
    }


def score(log: ActionLog, recipe: Recipe, name: str) -> dict[str, float]:
    """Train a variant on one thread and grade it on the test questions."""
    with tempfile.TemporaryDirectory(prefix="streamformer-bench-") as folder, TrainingScreen(console) as screen:
        screen.line(f"training {name}")
        release = train_release(log, recipe, out_dir=Path(folder), threads=1, progress=screen.show)
    split = make_split(log, recipe.split, seed=recipe.seed)
    exam = Exam(split.log, release.vocabularies, split.test, hide_seen=True)
    queries, items = exam.queries(release.model), known_items(release.model)
    scores = exam.scores(queries, items)
    return {
        "hr10": scores.hr10,
        "ndcg10": scores.ndcg10,
        "p90_coverage10": p90_coverage(exam.top(queries, items, 10), items=len(items)),
    }


if __name__ == "__main__":
    run_command(main)
