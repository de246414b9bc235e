"""A training run from a log and a recipe to a release: budget, validation, early stopping, and resuming after a kill.

The validation metric is HR@10 over the validation queries of the recipe's split.
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
    """Progress of a training, for people."""

    epoch: int
    step: int
    tokens: int
    fraction: float
    """Share of the budget that is spent, from 0 to 1."""
    seconds: float
    """Training time, including that before a resume."""
    loss: float
    """Mean loss since the previous report."""
    metric: float | None
    """Metric of the last validation."""


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
    """Train until the recipe's budget or `seconds_max` is spent, and save the release in `out_dir`.

    Of a log in shards, one shard is in memory at a time, next to the validating users (see `split_shards`). Without
    `threads`, all cores are used if that is measured to be faster on the machine as it is loaded now. With `resume`,
    checkpoints are kept in `out_dir` during training, and training continues from one that is there, to the same
    weights as without the interruption (except under a time limit). `progress` is called every two seconds and at the
    end. The same seed, machine and number of threads, without a time limit, give the same release; on CPUs it is equal
    to the last bit. Raises `LogError`, `ItemError`, `CheckpointError` or `DeviceError`.
    """
    options = RunOptions(out_dir, seconds_max, threads, resume, checkpoint_every_s, progress)
    run = Run(log, recipe, options)
    run.train()
    return run.finish()


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of a run; see `train_release`."""

    out_dir: Path
    seconds_max: float | None
    threads: int | None
    resume: bool
    checkpoint_every_s: float
    progress: Callable[[Progress], None]


class Run:
    """A training run: the clock, validation and files around a `Trainer`."""

    def __init__(self, log: ActionLog | Shards, recipe: Recipe, options: RunOptions) -> None:
        self.started = self.reported = self.saved = time.monotonic()
        self.recipe, self.options = recipe, options
        self.group = join_process_group()
        torch.set_num_threads(options.threads or (faster_threads() if self.group.size == 1 else 1))
        split: Split | ShardedSplit
        if isinstance(log, ActionLog):
            split = make_split(log, recipe.split, seed=recipe.seed)
        else:
            split = split_shards(log, recipe.split, seed=recipe.seed)
        self.trainer = make_trainer(split.train, recipe, self.group)
        self.evaluator = NextItemEvaluator(
            split.log, self.trainer.vocabularies, split.validation, mask_seen=recipe.data.hide_seen
        )
        self.unseen_from_ms = split.unseen_from_ms
        self.fingerprint = fingerprint(split.train, recipe)
        self.state = TrainingState(next_validation=recipe.budget.validate_tokens)
        if options.resume:
            self.state = load_checkpoint(options.out_dir, self.trainer, self.fingerprint)
        self.metric: float | None = None
        self.losses: list[float] = []

    @property
    def seconds(self) -> float:
        """Training time so far, including that before a resume."""
        return self.state.seconds + time.monotonic() - self.started

    @property
    def fraction(self) -> float:
        """Share of the budget that is spent, by tokens or by the clock, whichever is larger."""
        by_tokens = self.trainer.tokens / self.recipe.budget.tokens_max
        if not self.options.seconds_max:
            return by_tokens
        return self.group.maximum(max(by_tokens, self.seconds / self.options.seconds_max))

    def train(self) -> None:
        """Train until the budget or the patience is exhausted; the model ends with its best weights."""
        for rows in self.trainer.batches():
            self.losses.append(self.trainer.train_step(rows, self.fraction))
            if self.trainer.tokens >= self.state.next_validation:
                self.state.next_validation += self.recipe.budget.validate_tokens
                self.validate()
            fraction = self.fraction
            if fraction >= 1 or self.state.stale >= self.recipe.budget.patience:
                break
            self.report_and_save_if_due(fraction)
        self.validate()
        if self.state.best_weights:
            self.trainer.model.load_state_dict(self.state.best_weights)
        self.report(1.0)

    def validate(self) -> None:
        """Compute the metric, and keep a copy of the weights if it is the best so far."""
        if not len(self.evaluator.queries):
            return
        self.metric = self.evaluator.encoder_scores(self.trainer.model).hr10
        self.state.stale += 1
        if self.state.best is None or self.metric > self.state.best:
            weights = {name: value.clone() for name, value in self.trainer.model.state_dict().items()}
            self.state.best, self.state.best_weights, self.state.stale = self.metric, weights, 0

    def report_and_save_if_due(self, fraction: float) -> None:
        """Report progress and write a checkpoint, each when its interval has passed."""
        now = time.monotonic()
        if now - self.reported >= PROGRESS_EVERY_S:
            self.reported = now
            self.report(fraction)
        if self.options.resume and self.group.maximum(now - self.saved) >= self.options.checkpoint_every_s:
            self.saved = now
            self.save()

    def save(self) -> None:
        """Write the checkpoint."""
        state = TrainingState(**{**vars(self.state), "seconds": self.seconds})
        save_checkpoint(self.options.out_dir, self.trainer, state, self.fingerprint)

    def report(self, fraction: float) -> None:
        """Report progress, with the mean loss since the previous report."""
        trainer, loss = self.trainer, float(np.mean(self.losses)) if self.losses else math.nan
        self.losses.clear()
        self.options.progress(
            Progress(trainer.epoch, trainer.step, trainer.tokens, fraction, self.seconds, loss, self.metric)
        )

    def finish(self) -> Release:
        """Make the release, save it, and remove the checkpoint."""
        metrics = {} if self.state.best is None else {"validation_hr10": self.state.best}
        release = make_release(
            self.trainer.model, self.trainer.vocabularies, metrics=metrics, training=self.description()
        )
        if self.group.rank == 0:
            release.save(self.options.out_dir)
            (self.options.out_dir / NAME).unlink(missing_ok=True)
        return release

    def description(self) -> dict[str, Any]:
        """Return the record of this training for the metadata of the release."""
        return {
            "recipe": asdict(self.recipe),
            "later_ms": self.unseen_from_ms,
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
    """Describe the negatives of one batch, for people and for the metadata of the release."""
    if loss.kind == "full":
        return f"the whole catalogue of {items:,} items"
    sampled = f"{loss.random_negatives:,} uniform items and up to {loss.batch_negatives_max:,} positives of the batch"
    return sampled if processes == 1 else f"{sampled}, a pool of its own in each of {processes} processes"


def make_trainer(train: LogParts, recipe: Recipe, group: ProcessGroup) -> Trainer:
    """Return the trainer of a recipe before its first step."""
    vocabularies, items = make_items(train, recipe)
    if not len(vocabularies.item_keys):
        raise LogError(f"no item occurs {recipe.data.items_min} times: lower data.items_min or use a larger log")
    named = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(recipe.precision)
    precision = named or faster_precision(group.device.type)
    trainer = Trainer(train, recipe, vocabularies, items, group=group, precision=precision)
    if not trainer.positives_of_item.any():
        raise LogError("log has no action of the types in data.positives on a known item: check their names")
    return trainer
