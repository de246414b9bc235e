"""One training from a log and a recipe to a release: the budget, the validation, the best weights.

The users that validate give up their last action, which is not trained on; the metric is the share of them for whom it
is among the ten items scored highest after the action before it (HR@10, items already acted on left out).
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from encoder.features import UNKNOWN, Ints, Vocabularies
from encoder.items import ItemVectors, TrainedItems
from encoder.ranking import hits_at, target_ranks
from encoder.release import Release, make_release
from encoder.training.log import ActionLog
from encoder.training.queries import embeddings_after, items_before
from encoder.training.recipe import Recipe, RecipeError
from encoder.training.trainer import Trainer

__all__ = ["Progress", "train_release"]

VALIDATING_USERS = 2_000
PROGRESS_EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training stands, for people."""

    epoch: int
    step: int
    tokens: int
    fraction: float
    """Of the budget, 0 to 1."""
    seconds: float
    loss: float
    """Mean since the report before."""
    metric: float | None
    """Of the last validation."""


@dataclass(frozen=True, slots=True)
class Validation:
    """Rows of the whole log that are asked, and the item rows that should come out on top."""

    log: ActionLog
    rows: Ints
    """[Q] the action before the last one of each validating user."""
    targets: Ints
    """[Q] item row of the last action."""

    def hit_rate(self, trainer: Trainer, vocabularies: Vocabularies) -> float:
        """HR@10 of the model as it stands."""
        model, tokens = trainer.model, self.log.tokens(vocabularies)
        with torch.inference_mode():
            queries = embeddings_after(model, tokens, self.log.starts, self.rows)
            items = model.item_embeddings().float().clone()
        query, item = items_before(tokens, self.log.starts, self.rows)
        unknown = np.arange(len(self.rows))
        hidden = (np.concatenate([query, unknown]), np.concatenate([item, np.zeros(len(unknown), np.int64)]))
        order = np.argsort(hidden[0], kind="stable")
        ranks = target_ranks(queries, items, self.targets, (hidden[0][order], hidden[1][order]))
        return float(hits_at(ranks, 10).mean())


def train_release(
    log: ActionLog,
    recipe: Recipe,
    *,
    out_dir: Path,
    seconds_max: float | None = None,
    threads: int | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Release:
    """Train until the budget of the recipe is spent (or `seconds_max`), and save the release in `out_dir`.

    Uses all cores unless `threads` says otherwise. `progress` hears every two seconds and at the end. With the same
    seed, machine and no time limit, the same release.
    """
    started = time.monotonic()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    vocabularies = log.vocabularies(items_min=recipe.data.items_min)
    validation, trained = hold_out(log, vocabularies, recipe)
    trainer = Trainer(trained, recipe, vocabularies, make_items(recipe, vocabularies))
    best = _fit(trainer, recipe, validation, started, seconds_max, progress)
    training = {
        "recipe": asdict(recipe),
        "tokens": trainer.tokens,
        "seconds": round(time.monotonic() - started, 1),
        "machine": platform.processor() or platform.machine(),
    }
    metrics = {} if best is None else {"validation_hr10": best}
    release = make_release(trainer.model, vocabularies, metrics=metrics, training=training)
    release.save(out_dir)
    return release


def hold_out(log: ActionLog, vocabularies: Vocabularies, recipe: Recipe) -> tuple[Validation, ActionLog]:
    """Take the last action, on a known item, away from some users that a seed chooses; at least two stay with each."""
    rng = np.random.default_rng([recipe.seed, 0])
    last = log.starts[1:] - 1
    item_rows = vocabularies.item_rows(log.actions["item"][np.maximum(last, 0)])
    able = np.flatnonzero((np.diff(log.starts) >= 3) & (item_rows != UNKNOWN))
    chosen = np.sort(rng.permutation(able)[: min(VALIDATING_USERS, len(able) // 10)])
    kept = np.ones(len(log), np.bool_)
    kept[last[chosen]] = False
    return Validation(log, last[chosen] - 1, item_rows[chosen]), log.select(kept)


def make_items(recipe: Recipe, vocabularies: Vocabularies) -> ItemVectors:
    """Item vectors as the recipe says. Raises `RecipeError` where they cannot be made."""
    items, dim = recipe.items, recipe.encoder.item_dim
    if items.source == "trained":
        return TrainedItems(len(vocabularies.item_keys), dim)
    raise RecipeError(f"items.source {items.source} is not available yet; use trained")


def _fit(
    trainer: Trainer,
    recipe: Recipe,
    validation: Validation,
    started: float,
    seconds_max: float | None,
    progress: Callable[[Progress], None],
) -> float | None:
    """Step until the budget is spent or patience ends; leaves the best weights in the model, returns their metric."""
    budget = recipe.budget
    best: tuple[float, Mapping[str, Tensor]] | None = None
    metric, stale, next_validation = None, 0, budget.validate_tokens
    losses: list[float] = []
    reported = started

    def report(fraction: float) -> None:
        seconds = time.monotonic() - started
        mean = float(np.mean(losses)) if losses else float("nan")
        progress(Progress(trainer.epoch, trainer.step, trainer.tokens, fraction, seconds, mean, metric))
        losses.clear()

    for rows in trainer.batches():
        fraction = _spent(trainer, recipe, time.monotonic() - started, seconds_max)
        if fraction >= 1 or stale >= budget.patience:
            break
        losses.append(trainer.train_step(rows, fraction))
        if trainer.tokens >= next_validation:
            next_validation += budget.validate_tokens
            metric = validation.hit_rate(trainer, trainer.vocabularies)
            stale = 0 if best is None or metric > best[0] else stale + 1
            if stale == 0:
                best = metric, {name: value.clone() for name, value in trainer.model.state_dict().items()}
        if time.monotonic() - reported >= PROGRESS_EVERY_S:
            reported = time.monotonic()
            report(fraction)
    if len(validation.rows):
        metric = validation.hit_rate(trainer, trainer.vocabularies)
        if best is not None and best[0] > metric:
            trainer.model.load_state_dict(best[1])
            metric = best[0]
    report(1.0)
    return metric


def _spent(trainer: Trainer, recipe: Recipe, seconds: float, seconds_max: float | None) -> float:
    """Share of the budget that is spent, by tokens or by the clock, whichever is further."""
    by_tokens = trainer.tokens / recipe.budget.tokens_max
    return max(by_tokens, seconds / seconds_max) if seconds_max else by_tokens
