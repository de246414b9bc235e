"""The shape of PinnerFormer's tables 3, 4, 6 and 10 in small: one recipe, trained in every way that a table compares.

    python -m infra.bench.training.ablations objectives
    python -m infra.bench.training.ablations negatives
    python -m infra.bench.training.ablations features --seeds 1,2,3
    python -m infra.bench.training.ablations features --log actions.csv.gz
    python -m infra.bench.training.ablations sasrec
    python -m infra.bench.training.ablations encoders --log actions.csv.gz

The demo's encoder on MovieLens-1M, or the recipe of the tldr-pages log on that, leave-one-out, each ablation with the
same few tokens. What is unfair: the question is the very next item, which favours objectives that train on the next
item; the paper asks for all of a fortnight. What the rows of each table are is told in `ablation_tables`.

Each row is compared with the first on the same questions. The standard error of the difference is over questions, of
means over the seeds: it says what other users would have changed. What other seeds would have changed is seen from the
smallest and the largest difference of one seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import torch
import typer

from encoder.arrays import F64
from encoder.data.log import ActionLog, LogColumns, read_log
from encoder.data.split import Split, SplitConfig, make_split
from encoder.evaluation.next_item import NextItemEvaluator, known_items
from encoder.evaluation.ranking import hits_at, p90_coverage
from encoder.hardware import faster_precision
from encoder.training.progress import TrainingScreen
from encoder.training.recipe import Recipe, read_recipe
from infra.bench.training.ablation_tables import Table, rows_of
from infra.bench.training.ablation_trainer import Ablation, AblationTrainer, train, without
from infra.bench.training.ml1m import RUNS
from infra.datasets.movielens import movielens_1m
from infra.harness.reporting import console, machine, print_result, print_table, run_command


@dataclass(frozen=True, slots=True)
class Graded:
    """One training on the test questions."""

    hits: F64
    """[Q] 1 where the answer is among the best ten."""
    ndcg10: float
    p90_coverage10: float


def main(
    table: Annotated[Table, typer.Argument(help="What varies.")],
    tokens: Annotated[int, typer.Option(min=1, help="Of each training.")] = 1_000_000,
    seeds: Annotated[str, typer.Option(help="Seeds of each ablation, with commas between them.")] = "1",
    log: Annotated[Path | None, typer.Option(help="The tldr-pages log; MovieLens-1M if none is named.")] = None,
) -> None:
    """Train every ablation and rank the last action of every user."""
    chosen = seed_numbers(seeds)
    actions, recipe = data_set(log)
    recipe = replace(recipe, budget=replace(recipe.budget, tokens_max=tokens))
    torch.set_num_threads(1)
    precision = faster_precision()
    figures = measured(actions, table, recipe, chosen, precision)
    show(f"{table.value}, {tokens:,} tokens each, seeds {seeds}", figures)
    print_result(
        {
            "bench": "variants",
            "machine": machine(),
            "table": table.value,
            "log": "tldr-pages" if log else "ml1m",
            "tokens": tokens,
            "seeds": chosen,
            "precision": str(precision).removeprefix("torch."),
            **figures,
        }
    )


def data_set(path: Path | None) -> tuple[ActionLog, Recipe]:
    """A log and its recipe; the languages of tldr-pages stand in for surfaces."""
    recipe = read_recipe(RUNS / ("tldr_pages.toml" if path else "demo.toml"))
    columns = replace(recipe.log.columns, surface="language") if path else LogColumns()
    recipe = replace(
        recipe,
        encoder=replace(recipe.encoder, read_out=False),
        split=SplitConfig("leave_one_out", items_min=5),
    )
    return read_log(path or movielens_1m(notice=console.print), columns), recipe


def measured(
    log: ActionLog, table: Table, recipe: Recipe, seeds: Sequence[int], precision: torch.dtype
) -> dict[str, dict[str, Any]]:
    """The figures of every row of a table, all trained in one precision and asked the same questions."""
    split = make_split(log, recipe.split, seed=recipe.seed)
    graded = {
        name: [grade(split, with_seed(ablation, seed), f"{name}, seed {seed}", precision) for seed in seeds]
        for name, ablation in rows_of(table, recipe, log).items()
    }
    first = next(iter(graded.values()))
    return {name: summary(each, first) for name, each in graded.items()}


def with_seed(ablation: Ablation, seed: int) -> Ablation:
    """The ablation, trained with another seed."""
    return replace(ablation, recipe=replace(ablation.recipe, seed=seed))


def grade(split: Split, ablation: Ablation, name: str, precision: torch.dtype) -> Graded:
    """Train an ablation and grade it on the test questions."""
    with TrainingScreen(console) as screen:
        screen.line(f"training {name}")
        trainer = train(split.train, ablation, precision, screen.show)
    evaluator = evaluator_of(split, trainer)
    queries, items = evaluator.query_vectors(trainer.model), known_items(trainer.model)
    scores = evaluator.scores(queries, items)
    coverage = p90_coverage(evaluator.top_items(queries, items, 10), items=len(items))
    return Graded(hits_at(scores.ranks, 10), scores.ndcg10, coverage)


def evaluator_of(split: Split, trainer: AblationTrainer) -> NextItemEvaluator:
    """The test questions, asked without the features that the ablation leaves out."""
    ablation = trainer.ablation
    evaluator = NextItemEvaluator(split.log, trainer.vocabularies, split.test, mask_seen=ablation.recipe.data.hide_seen)
    evaluator.tokens = without(evaluator.tokens, ablation.hidden)
    return evaluator


def summary(graded: Sequence[Graded], first: Sequence[Graded]) -> dict[str, Any]:
    """Means over the seeds, and the difference of HR@10 to the first row, paired by seed and question.

    The standard error is that of the mean over questions of each question's difference, a mean over the seeds.
    """
    differences = np.stack([one.hits - other.hits for one, other in zip(graded, first, strict=True)])
    of_question = differences.mean(axis=0)
    return {
        "hr10": mean(float(each.hits.mean()) for each in graded),
        "ndcg10": mean(each.ndcg10 for each in graded),
        "p90_coverage10": mean(each.p90_coverage10 for each in graded),
        "difference": float(of_question.mean()),
        "standard_error": float(of_question.std(ddof=1) / np.sqrt(len(of_question))),
        "difference_of_seeds": differences.mean(axis=1).tolist(),
    }


def show(title: str, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """The table for people."""
    rows: list[tuple[str, ...]] = []
    for name, each in figures.items():
        of_seeds = each["difference_of_seeds"]
        compared = (f"{each['difference']:+.4f}", f"{each['standard_error']:.4f}") if rows else ("", "")
        spread = f"{min(of_seeds):+.4f} to {max(of_seeds):+.4f}" if rows and len(of_seeds) > 1 else ""
        scores = (f"{each[column]:.4f}" for column in ("hr10", "ndcg10", "p90_coverage10"))
        rows.append((name, *scores, *compared, spread))
    headings = ("", "HR@10", "NDCG@10", "P90 coverage@10", "to the first", "standard error", "of one seed")
    print_table(title, headings, rows)


def seed_numbers(text: str) -> list[int]:
    """Seeds with commas between them."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise typer.BadParameter(f"seeds are whole numbers with commas between them, not {text}")
    return [int(part) for part in parts]


if __name__ == "__main__":
    run_command(main)
