"""One training from a log and a recipe to a release: the budget, validation, early stop, and going on after a kill.

The metric that decides is HR@10 over the validating questions of the recipe's split.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encoder.data.log import ActionLog, LogError, LogParts
from encoder.data.shards import Shards
from encoder.data.split import ShardedSplit, Split, make_split, split_shards
from encoder.distributed import ProcessGroup, join_process_group
from encoder.evaluation.next_item import NextItemEvaluator
from encoder.hardware import device_name, faster_precision, faster_threads, machine
from encoder.release import Release, make_release
from encoder.training.checkpoint import NAME, TrainingState, fingerprint, load_checkpoint, save_checkpoint
from encoder.training.negatives import LossConfig
from encoder.training.recipe import Recipe
from encoder.training.sources import make_items
from encoder.training.trainer import Trainer

PROGRESS_EVERY_S = 2.0
CHECKPOINT_EVERY_S = 60.0


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


def train_release(
    log: ActionLog | Shards,
    recipe: Recipe,
    *,
    out_dir: Path,
    seconds_max: float | None = None,
    threads: int | None = None,
    resume: bool = False,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Release:
    """Train until the budget of the recipe is spent (or `seconds_max`), and save the release in `out_dir`.

    Of a log in shards one is in memory at a time, beside the users who validate (see `split_shards`).
    Uses all cores if that is faster as the machine is loaded, unless `threads` says how many. With `resume` a
    checkpoint is kept in `out_dir` while training and, if one is there, training goes on from it, to the same weights
    as if it had never stopped (unless a time limit ends it). `progress` hears every two seconds and at the end. The
    same seed, machine, number of threads and no time limit give the same release, on CPUs to the last bit. Raises
    `LogError`, `ItemError`, `CheckpointError` or `DeviceError`.
    """
    run = Run(
        log,
        recipe,
        out_dir=out_dir,
        seconds_max=seconds_max,
        threads=threads,
        resume=resume,
        checkpoint_every_s=checkpoint_every_s,
        progress=progress,
    )
    run.train()
    return run.finish()


class Run:
    """A training under way, seen from outside: the clock, the metric, the files."""

    def __init__(
        self,
        log: ActionLog | Shards,
        recipe: Recipe,
        *,
        out_dir: Path,
        seconds_max: float | None,
        threads: int | None,
        resume: bool,
        checkpoint_every_s: float,
        progress: Callable[[Progress], None],
    ) -> None:
        self.started = self.reported = self.saved = time.monotonic()
        self.recipe, self.out_dir, self.seconds_max, self.resume = recipe, out_dir, seconds_max, resume
        self.progress, self.checkpoint_every_s = progress, checkpoint_every_s
        self.group = join_process_group()
        torch.set_num_threads(threads or (faster_threads() if self.group.size == 1 else 1))
        split: Split | ShardedSplit
        if isinstance(log, ActionLog):
            split = make_split(log, recipe.split, seed=recipe.seed)
        else:
            split = split_shards(log, recipe.split, seed=recipe.seed)
        self.trainer = make_trainer(split.train, recipe, self.group)
        self.evaluator = NextItemEvaluator(
            split.log, self.trainer.vocabularies, split.validation, hide_seen=recipe.data.hide_seen
        )
        self.later_ms = split.later_ms
        self.fingerprint = fingerprint(split.train, recipe)
        self.standing = TrainingState(next_validation=recipe.budget.validate_tokens)
        if resume:
            self.standing = load_checkpoint(out_dir, self.trainer, self.fingerprint)
        self.metric: float | None = None
        self.losses: list[float] = []

    @property
    def seconds(self) -> float:
        return self.standing.seconds + time.monotonic() - self.started

    @property
    def fraction(self) -> float:
        """Share of the budget that is spent, by tokens or by the clock, whichever is further."""
        by_tokens = self.trainer.tokens / self.recipe.budget.tokens_max
        return self.group.maximum(max(by_tokens, self.seconds / self.seconds_max)) if self.seconds_max else by_tokens

    def train(self) -> None:
        """Step until the budget is spent or patience ends; the best weights are left in the model."""
        for rows in self.trainer.batches():
            self.losses.append(self.trainer.train_step(rows, self.fraction))
            if self.trainer.tokens >= self.standing.next_validation:
                self.standing.next_validation += self.recipe.budget.validate_tokens
                self.validate()
            fraction = self.fraction
            if fraction >= 1 or self.standing.stale >= self.recipe.budget.patience:
                break
            self.tell(fraction)
        self.validate()
        if self.standing.best_weights:
            self.trainer.model.load_state_dict(self.standing.best_weights)
        self.report(1.0)

    def validate(self) -> None:
        """Measure, and remember the weights where they are the best so far."""
        if not len(self.evaluator.questions):
            return
        self.metric = self.evaluator.encoder_scores(self.trainer.model).hr10
        self.standing.stale += 1
        if self.standing.best is None or self.metric > self.standing.best:
            weights = {name: value.clone() for name, value in self.trainer.model.state_dict().items()}
            self.standing.best, self.standing.best_weights, self.standing.stale = self.metric, weights, 0

    def tell(self, fraction: float) -> None:
        """Report and write a checkpoint when it is time."""
        now = time.monotonic()
        if now - self.reported >= PROGRESS_EVERY_S:
            self.reported = now
            self.report(fraction)
        if self.resume and self.group.maximum(now - self.saved) >= self.checkpoint_every_s:
            self.saved = now
            self.save()

    def save(self) -> None:
        """Write the checkpoint."""
        standing = TrainingState(**{**vars(self.standing), "seconds": self.seconds})
        save_checkpoint(self.out_dir, self.trainer, standing, self.fingerprint)

    def report(self, fraction: float) -> None:
        trainer, loss = self.trainer, float(np.mean(self.losses)) if self.losses else math.nan
        self.losses.clear()
        self.progress(Progress(trainer.epoch, trainer.step, trainer.tokens, fraction, self.seconds, loss, self.metric))

    def finish(self) -> Release:
        """Make the release, save it and remove the checkpoint."""
        metrics = {} if self.standing.best is None else {"validation_hr10": self.standing.best}
        release = make_release(
            self.trainer.model, self.trainer.vocabularies, metrics=metrics, training=self.description()
        )
        if self.group.rank == 0:
            release.save(self.out_dir)
            (self.out_dir / NAME).unlink(missing_ok=True)
        return release

    def description(self) -> dict[str, Any]:
        return {
            "recipe": asdict(self.recipe),
            "later_ms": self.later_ms,
            "tokens": self.trainer.tokens,
            "seconds": round(self.seconds, 1),
            "machine": machine(),
            "device": device_name(self.group.device),
            "threads": torch.get_num_threads(),
            "processes": self.group.size,
            "precision": str(self.trainer.precision).removeprefix("torch."),
            "negative_pool": negative_pool(self.recipe.loss, len(self.trainer.vocabularies.item_keys), self.group.size),
        }


def negative_pool(loss: LossConfig, items: int, processes: int) -> str:
    """What a positive is told apart from in one batch, for people and for the release."""
    if loss.kind == "full":
        return f"the whole catalogue of {items:,} items"
    sampled = f"{loss.random_negatives:,} uniform items and up to {loss.batch_negatives_max:,} positives of the batch"
    return sampled if processes == 1 else f"{sampled}, a pool of its own in each of {processes} processes"


def make_trainer(train: LogParts, recipe: Recipe, group: ProcessGroup) -> Trainer:
    """The trainer of a recipe at its first step."""
    vocabularies, items = make_items(train, recipe)
    if not len(vocabularies.item_keys):
        raise LogError(f"no item occurs {recipe.data.items_min} times: lower data.items_min or bring a larger log")
    named = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(recipe.precision)
    precision = named or faster_precision(group.device.type)
    trainer = Trainer(train, recipe, vocabularies, items, group=group, precision=precision)
    if not trainer.positives_of_item.any():
        raise LogError("log has no action of the types in data.positives on a known item: check their names")
    return trainer
