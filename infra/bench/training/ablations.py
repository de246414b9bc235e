"""Small versions of PinnerFormer's tables 3, 4, 6 and 10 (arXiv 2205.04507): one recipe in all ways of a table.

    python -m infra.bench.training.ablations objectives
    python -m infra.bench.training.ablations negatives
    python -m infra.bench.training.ablations features --seeds 1,2,3
    python -m infra.bench.training.ablations features --log actions.csv.gz
    python -m infra.bench.training.ablations sasrec
    python -m infra.bench.training.ablations encoders --log actions.csv.gz

The encoder is the demo's on MovieLens-1M, or that of the tldr-pages recipe on the tldr-pages log. The split is
leave-one-out, and every ablation trains on the same small number of tokens. What is unfair: the target is the very next
item, which favours objectives that train on the next item, whereas the paper evaluates on all actions of the following
two weeks. `ablation_tables` documents the rows of each table.

Each row is compared with the first one on the same queries. The standard error of the difference is over queries, of
means over the seeds: it measures what other users would change. What other seeds would change shows in the smallest and
the largest difference of a single seed.
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
class AblationScores:
    """Scores of one training on the test queries."""

    hits: F64
    """[Q] 1 if the target is among the best ten, else 0."""
    ndcg10: float
    p90_coverage10: float


def main(
    table: Annotated[Table, typer.Argument(help="Table to compute, named after what its rows change.")],
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens per training.")] = 1_000_000,
    seeds: Annotated[str, typer.Option(help="Seeds of each ablation, separated by commas.")] = "1",
    log: Annotated[Path | None, typer.Option(help="The tldr-pages log; default: MovieLens-1M.")] = None,
) -> None:
    """Train every ablation of a table and rank the last action of every user."""
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
    """Return a log and its recipe; for tldr-pages, languages serve as surfaces."""
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
    """Return the figures of every row of a table, all trained in one precision and evaluated on the same queries."""
    split = make_split(log, recipe.split, seed=recipe.seed)
    scores = {
        name: [train_and_score(split, with_seed(ablation, seed), f"{name}, seed {seed}", precision) for seed in seeds]
        for name, ablation in rows_of(table, recipe, log).items()
    }
    first = next(iter(scores.values()))
    return {name: summary(each, first) for name, each in scores.items()}


def with_seed(ablation: Ablation, seed: int) -> Ablation:
    """Return the ablation with another seed."""
    return replace(ablation, recipe=replace(ablation.recipe, seed=seed))


def train_and_score(split: Split, ablation: Ablation, name: str, precision: torch.dtype) -> AblationScores:
    """Train an ablation and score it on the test queries."""
    with TrainingScreen(console) as screen:
        screen.line(f"training {name}")
        trainer = train(split.train, ablation, precision, screen.show)
    evaluator = evaluator_of(split, trainer)
    vectors, items = evaluator.query_vectors(trainer.model), known_items(trainer.model)  # [K, E], [I, E]
    scores = evaluator.scores(vectors, items)
    coverage = p90_coverage(evaluator.top_items(vectors, items, 10), items=len(items))
    return AblationScores(hits_at(scores.ranks, 10), scores.ndcg10, coverage)


def evaluator_of(split: Split, trainer: AblationTrainer) -> NextItemEvaluator:
    """Return the evaluator of the test queries, with the masked columns of the ablation."""
    ablation = trainer.ablation
    evaluator = NextItemEvaluator(split.log, trainer.vocabularies, split.test, mask_seen=ablation.recipe.data.hide_seen)
    evaluator.tokens = without(evaluator.tokens, ablation.masked)
    return evaluator


def summary(scores: Sequence[AblationScores], first: Sequence[AblationScores]) -> dict[str, Any]:
    """Return means over the S seeds, and the difference of HR@10 from the first row, paired by seed and query.

    The standard error is that of the mean over queries [Q] of the difference of each query, averaged over the seeds.
    """
    differences = np.stack([one.hits - other.hits for one, other in zip(scores, first, strict=True)])  # [S, Q]
    of_query = differences.mean(axis=0)  # [Q]
    return {
        "hr10": mean(float(each.hits.mean()) for each in scores),
        "ndcg10": mean(each.ndcg10 for each in scores),
        "p90_coverage10": mean(each.p90_coverage10 for each in scores),
        "difference": float(of_query.mean()),
        "standard_error": float(of_query.std(ddof=1) / np.sqrt(len(of_query))),
        "difference_of_seeds": differences.mean(axis=1).tolist(),
    }


def show(title: str, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table."""
    rows: list[tuple[str, ...]] = []
    for name, each in figures.items():
        of_seeds = each["difference_of_seeds"]
        compared = (f"{each['difference']:+.4f}", f"{each['standard_error']:.4f}") if rows else ("", "")
        spread = f"{min(of_seeds):+.4f} to {max(of_seeds):+.4f}" if rows and len(of_seeds) > 1 else ""
        scores = (f"{each[column]:.4f}" for column in ("hr10", "ndcg10", "p90_coverage10"))
        rows.append((name, *scores, *compared, spread))
    headings = ("", "HR@10", "NDCG@10", "P90 coverage@10", "vs. the first", "standard error", "single seeds")
    print_table(title, headings, rows)


def seed_numbers(text: str) -> list[int]:
    """Parse seeds separated by commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise typer.BadParameter(f"seeds must be whole numbers separated by commas, not {text}")
    return [int(part) for part in parts]


if __name__ == "__main__":
    run_command(main)
